"""README and docs/cpu.md tell the truth: paths exist, commands run, every variable is listed."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_kernels.cli import main
from tests.tiny_checkpoint import write_tiny_checkpoint
from tests.toy_tasks import NAMES, write_toy_tasks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "docs/cpu.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES, re.MULTILINE | re.DOTALL)


COMMANDS = [
    line
    for block in code_blocks("bash")
    for line in block.splitlines()
    if line and not line.startswith("#")
]
MINITRON_COMMANDS = [line for line in COMMANDS if "minitron " in line]


def test_readme_paths_exist() -> None:
    top = "bench|csrc|docs|examples|include|minitron_kernels|tests|\\.ci"
    named = set(re.findall(rf"(?<![\w/.-])((?:{top})/[\w./-]*\w)", PAGES))
    named |= {link for link in re.findall(r"\]\(([^)#]+)", PAGES) if "://" not in link}
    assert len(named) >= 5
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_readme_commands_are_all_covered() -> None:
    """By this file when they are minitron's, else by CI, word for word."""
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8")
    others = [
        part
        for line in COMMANDS
        if line not in MINITRON_COMMANDS
        for part in line.split(" && ")
        if not part.startswith("python bench/")
    ]
    assert len(MINITRON_COMMANDS) >= 8
    assert "pip install ." in others
    assert "pytest" in others
    assert [part for part in others if part not in ci] == []


@pytest.mark.parametrize("command", MINITRON_COMMANDS)
def test_readme_command(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As typed, with a tiny random model in the place of those that its names stand for."""
    (tmp_path / "minitron-8b-random").mkdir()
    tiny = write_tiny_checkpoint(tmp_path / "minitron-8b-random")
    monkeypatch.setattr("minitron_kernels.loaders.hub._from_hub", lambda *repository: tiny)
    monkeypatch.setattr("minitron_kernels.loaders.hub._smollm2", lambda: tiny)
    monkeypatch.chdir(tmp_path)
    Path("prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "max_new_tokens": 3}\n')
    typed = "Hello.\n"
    if " | " in command:
        echo, command = command.split(" | ")
        assert echo.startswith("echo ")
        typed = " ".join(shlex.split(echo)[1:]) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    name, *args = shlex.split(command)
    assert name == "minitron"
    if args[0] == "eval":  # a toy task under the name of the real one
        toys = write_toy_tasks(tmp_path, names=("mmlu", *NAMES[1:]))
        monkeypatch.setattr("minitron_kernels.integrations.lm_eval.TASKS", toys)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    assert main(args) == 0
    out = capfd.readouterr().out
    assert out.strip()
    if "--json" in args:
        json.loads(out)


def test_readme_headline_command_speaks_of_planets(capfd: pytest.CaptureFixture[str]) -> None:
    """The first command, on the real model: 48 tokens of sense."""
    headline = MINITRON_COMMANDS[0]
    assert main([*shlex.split(headline)[1:], "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    assert len(result["token_ids"]) <= 48
    assert re.search(r"\b(sun|planets?|stars?|solar system)\b", result["text"].lower())


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python bench/")])
def test_readme_script(command: str, tmp_path: Path) -> None:
    """As typed, but for its size."""
    _, script, *args = shlex.split(command)
    small = ["--preset", "smollm2-135m", "--layers", "1", "--vocab", "512"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, ROOT / script, *args, *small], cwd=tmp_path, env=env, check=True
    )
    (tmp_path / "minitron-8b-random").rename(tmp_path / "written")
    assert main(["generate", "hi", "--model", str(tmp_path / "written"), "--no-stream"]) == 0


@pytest.mark.parametrize("snippet", code_blocks("python"))
def test_readme_python(
    snippet: str,
    smollm2_gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As written, with SmolLM2 in the place of the 8B model."""
    monkeypatch.setattr("minitron_kernels.loaders.hub._from_hub", lambda *repository: smollm2_gguf)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capfd.readouterr().out.strip()


def test_readme_lists_the_environment_variables() -> None:
    """Every variable that is read, and none that is not."""
    # environ["MK_..."], without a default, is how the build hands things to its own processes.
    reads = re.compile(r"(?:environ\.get|getenv)\(\s*\"(MK_\w+)\"")
    sources = [ROOT / "setup.py"]
    for folder in ("minitron_kernels", "csrc", "bench", "build_tools"):
        sources += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cpp", ".h"}]
    read = {name for path in sources for name in reads.findall(path.read_text(encoding="utf-8"))}
    listed = set(re.findall(r"^\| `(MK_\w+)` \|", README, re.MULTILINE))
    assert "MK_TRACEBACK" in read
    assert listed == read
