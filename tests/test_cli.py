"""The `minitron` command: what it prints, where, and with which exit code.

Most tests call `main` in this process; those about signals, pipes, locales and terminals start one.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_kernels import MinitronForCausalLM, SamplingParams
from minitron_kernels.generate import Engine, TokenEvent, generate
from minitron_kernels.loaders.tokenizer import AutoTokenizer
from tests.cli_process import popen
from tests.tiny_checkpoint import write_tiny_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by being shared out."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose context is long enough for a run to be interrupted."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("endless"), context=1 << 16)


def expected(folder: Path, prompt: str | list[int], **params: Any) -> Any:
    """The result of the Python API."""
    model = MinitronForCausalLM.from_pretrained(folder)
    return generate(
        model, AutoTokenizer.from_pretrained(folder), [prompt], SamplingParams(**params)
    )[0]


# --- start-up ---


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from minitron_kernels.cli import main; main(['generate', '--help']);"
        "main(['--help']); print(sorted({'torch', 'numpy', 'gguf', 'tokenizers', 'tqdm', "
        "'safetensors', 'huggingface_hub', 'jinja2', 'psutil'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):  # the least of three: the machine may be busy
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
        )
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert "--max-new-tokens" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 0.5


def test_version_and_bare_command(minitron: Callable[..., Any]) -> None:
    assert minitron("--version") == (0, metadata.version("minitron_kernels") + "\n", "")
    code, out, _ = minitron()
    assert code == 0
    assert all(command in out for command in ("generate", "chat", "score", "info"))


# --- generate ---


def test_generate_streams_the_text_of_the_api(minitron: Callable[..., Any], tiny: Path) -> None:
    text = expected(tiny, "hello", max_new_tokens=20).text
    args = ("--model", tiny, "--max-new-tokens", "20")
    assert minitron("generate", "hello", *args) == (0, text + "\n", "")
    assert minitron("generate", "hello", *args, "--no-stream") == (0, text + "\n", "")
    # From a pipe, where echo adds a newline.
    assert minitron("generate", *args, stdin="hello\n")[:2] == (0, text + "\n")
    assert minitron("generate", "-", *args, stdin="hello\r\n")[:2] == (0, text + "\n")
    assert minitron("generate", *args, stdin="hello\n\n")[1] != text + "\n"


def test_generate_prints_each_token_before_the_next_is_computed(
    tiny: Path, minitron: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = expected(tiny, "hello", max_new_tokens=12, ignore_eos=True)
    written: list[str] = []
    seen_at_step: list[str] = []
    step = Engine.step

    def spy(engine: Engine) -> list[TokenEvent]:
        seen_at_step.append("".join(written))
        return step(engine)

    class Terminal(io.StringIO):
        def flush(self) -> None:
            written.append(self.getvalue())
            self.seek(0)
            self.truncate()

    monkeypatch.setattr(Engine, "step", spy)
    monkeypatch.setattr(sys, "stdout", Terminal())
    minitron("generate", "hello", "--model", tiny, "--max-new-tokens", "12", "--ignore-eos")
    assert "".join(written) == result.text + "\n"
    assert len(seen_at_step) == 12
    assert all(result.text.startswith(seen) for seen in seen_at_step)
    # Nothing is held back but the bytes of an unfinished character.
    lengths = [len(seen) for seen in seen_at_step]
    assert lengths == sorted(lengths)
    assert lengths[-1] > len(result.text) // 2


def test_generate_json(minitron: Callable[..., Any], tiny: Path) -> None:
    options = {"temperature": 0.8, "top_k": 50, "seed": 3, "logprobs": 2, "max_new_tokens": 16}
    result = expected(tiny, "hello", **options)
    flags = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", v)]
    code, out, err = minitron("generate", "hello", "--model", tiny, *flags, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["prompt_ids"] == result.prompt_ids
    assert report["token_ids"] == result.token_ids
    assert report["text"] == result.text
    assert report["finish_reason"] == result.finish_reason
    assert report["logprobs"] == json.loads(json.dumps(result.logprobs))
    assert all(len(entry["top"]) == 2 for entry in report["logprobs"])
    timings = report["timings"]
    assert timings["load_seconds"] > 0
    assert timings["prefill_tokens"] == len(result.prompt_ids)
    assert timings["decode_tokens"] == len(result.token_ids) - 1  # the prefill yields the first
    for phase in ("prefill", "decode"):
        rate = timings[f"{phase}_tokens"] / timings[f"{phase}_seconds"]
        assert timings[f"{phase}_tokens_per_second"] == pytest.approx(rate)
    assert 1 << 26 < report["peak_memory_bytes"] < 1 << 34  # torch alone takes more than 64 MiB


def test_generate_json_without_logprobs_has_no_such_key(
    minitron: Callable[..., Any], tiny: Path
) -> None:
    _, out, _ = minitron("generate", "hello", "--model", tiny, "--max-new-tokens", "1", "--json")
    report = json.loads(out)
    assert "logprobs" not in report
    assert report["timings"]["decode_tokens_per_second"] is None  # the prefill made the token


def test_generate_options_reach_the_sampler(minitron: Callable[..., Any], tiny: Path) -> None:
    flags = {
        "temperature": 0.7,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 11,
        "min_new_tokens": 3,
        "max_new_tokens": 24,
    }
    result = expected(
        tiny, "hello", **flags, ignore_eos=True, logit_bias={70: 1.5, 71: -2.0}, stop=("zq", "%")
    )
    args = [part for k, v in flags.items() for part in (f"--{k.replace('_', '-')}", v)]
    args += ["--ignore-eos", "--logit-bias", "70=1.5", "--logit-bias", "71=-2"]
    args += ["--stop", "zq", "--stop", "%"]
    _, out, _ = minitron("generate", "hello", "--model", tiny, *args, "--json")
    assert json.loads(out)["token_ids"] == result.token_ids


def test_generate_number_of_threads(minitron: Callable[..., Any], tiny: Path) -> None:
    before = torch.get_num_threads()
    try:
        minitron("generate", "hi", "--model", tiny, "--num-threads", "2", "--max-new-tokens", "1")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_generate_without_model_takes_the_built_in_one(
    minitron: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(
        "minitron_kernels.loaders.hub.resolve",
        lambda name, revision=None: asked.append(name) or tiny,
    )
    code, _, err = minitron("generate", "hi", "--max-new-tokens", "1")
    assert code == 0
    assert asked[0] == "smollm2-135m"
    assert err.count("\n") == 1
    assert "smollm2-135m" in err
    assert "minitron generate --model minitron-8b" in err


def test_generate_from_a_batch_of_lines(
    minitron: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes('one\r\n\n  two {"x": 1}\ndrei é\n'.encode())
    prompts = ["one", '  two {"x": 1}', "drei é"]
    texts = [expected(tiny, prompt, max_new_tokens=9).text for prompt in prompts]
    args = ("generate", "--batch-file", file, "--model", tiny, "--max-new-tokens", "9")
    code, out, err = minitron(*args)
    assert (code, err) == (0, "")
    assert out == "".join(f"--- {i + 1}/3 ---\n{text}\n" for i, text in enumerate(texts))
    report = json.loads(minitron(*args, "--json")[1])
    assert [result["text"] for result in report["results"]] == texts
    assert report["timings"]["prefill_tokens"] == sum(len(p.encode()) + 1 for p in prompts)
    assert report["peak_memory_bytes"] > 0


@pytest.mark.parametrize("name", ["batch.jsonl", "batch.txt"])
def test_generate_from_a_batch_of_requests(
    minitron: Callable[..., Any], tiny: Path, tmp_path: Path, name: str
) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": "one"},
        {"prompt": [0, 50, 60], "max_new_tokens": 3},
        {"prompt": "three", "max_length": 10, "temperature": 1.0, "seed": 5},
        {"prompt": "four", "stop": "%", "logit_bias": {"70": 2}, "stop_token_ids": [80, 81]},
    ]
    file = tmp_path / name
    file.write_text("\n".join(map(json.dumps, requests)))
    results = [
        expected(tiny, "one", max_new_tokens=9),
        expected(tiny, [0, 50, 60], max_new_tokens=3),
        expected(tiny, "three", max_length=10, temperature=1.0, seed=5),
        expected(
            tiny, "four", max_new_tokens=9, stop=("%",), logit_bias={70: 2}, stop_token_ids=(80, 81)
        ),
    ]
    code, out, _ = minitron(
        "generate", "--batch-file", file, "--model", tiny, "--max-new-tokens", "9", "--json"
    )
    assert code == 0
    assert [r["token_ids"] for r in json.loads(out)["results"]] == [r.token_ids for r in results]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('["x"]', "prompt"),
        ('{"text": "x"}', "prompt"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt": []}', "empty"),
        ('{"prompt": [1, true]}', "ids"),
        ('{"prompt": 3}', "ids"),
        ('{"prompt": "\\ud800"}', "Unicode"),
        ('{"prompt": "x", "temprature": 1}', "temprature"),
        ('{"prompt": "x", "temperature": "hot"}', "temperature"),
        ('{"prompt": "x", "temperature": NaN}', "temperature"),
        ('{"prompt": "x", "stop": 5}', "stop must be a sequence, got 5"),
        ('{"prompt": "x", "stop_token_ids": 5}', "stop_token_ids must be a sequence, got 5"),
        ('{"prompt": "x", "logit_bias": [1]}', "must map token ids to numbers, got [1]"),
        ('{"prompt": "x", "logit_bias": {"a": 1}}', "token ids as keys, got 'a'"),
        ('{"prompt": "x", "logit_bias": {"-1": 1}}', "token ids as keys, got '-1'"),
        ('{"prompt": [99999]}', "99999"),
        (json.dumps({"prompt": "x" * 600}), "512"),
    ],
    ids=lambda value: value[:40],
)
def test_bad_batch_line_is_named(
    minitron: Callable[..., Any], tiny: Path, tmp_path: Path, line: str, named: str
) -> None:
    file = tmp_path / "batch.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n\n{line}\n')
    code, out, err = minitron("generate", "--batch-file", file, "--model", tiny)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file}, line 3: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize(("data", "named"), [(b"", "no prompt"), (b"\xff\n", "UTF-8")])
def test_bad_batch_file(
    minitron: Callable[..., Any], tmp_path: Path, data: bytes, named: str
) -> None:
    file = tmp_path / "batch.txt"
    file.write_bytes(data)
    code, out, err = minitron("generate", "--batch-file", file)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {file}")
    assert named in err


def test_prompt_from_stdin_must_be_utf8(minitron: Callable[..., Any]) -> None:
    code, out, err = minitron("generate", stdin=b"caf\xe9")
    assert (code, out) == (2, "")
    assert err.startswith("error: standard input is not UTF-8")


# --- interruptions, pipes, locales ---


@pytest.fixture
def interrupt_at_step_5(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Press Ctrl-C while the fifth step of the engine runs."""
    step = Engine.step
    steps = Counter[str]()

    def spy(engine: Engine) -> list[TokenEvent]:
        steps["taken"] += 1
        if steps["taken"] == 5:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr(Engine, "step", spy)
    yield
    assert steps["taken"] == 5


@pytest.mark.usefixtures("interrupt_at_step_5")
def test_interrupted_json_has_what_was_produced(minitron: Callable[..., Any], tiny: Path) -> None:
    code, out, err = minitron("generate", "hello", "--model", tiny, "--ignore-eos", "--json")
    assert (code, err) == (130, "")
    report = json.loads(out)
    assert report["finish_reason"] == "interrupted"
    assert len(report["token_ids"]) == 4


@pytest.mark.usefixtures("interrupt_at_step_5")
def test_interrupted_batch_keeps_what_is_finished(
    minitron: Callable[..., Any], tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "batch.jsonl"
    file.write_text('{"prompt": "a", "max_new_tokens": 2}\n{"prompt": "b"}\n')
    code, out, _ = minitron(
        "generate", "--batch-file", file, "--model", tiny, "--ignore-eos", "--json"
    )
    assert code == 130
    results = json.loads(out)["results"]
    assert [r["finish_reason"] for r in results] == ["length", "interrupted"]
    assert [len(r["token_ids"]) for r in results] == [2, 4]


def test_sigint_ends_a_stream_cleanly(endless: Path) -> None:
    process = popen(
        *("generate", "hello", "--model", endless, "--ignore-eos", "--max-new-tokens", "60000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = process.stdout.read(8)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b""
    text = (first + rest).decode()
    assert text.endswith("\n")
    result = expected(endless, "hello", ignore_eos=True, max_new_tokens=len(text) + 8)
    assert result.text.startswith(text[:-1].rstrip("\ufffd"))


def test_reader_that_leaves_ends_it_quietly(endless: Path) -> None:
    process = popen(
        *("generate", "hello", "--model", endless, "--ignore-eos", "--max-new-tokens", "60000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(8)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) != 0


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_c_locale_takes_and_gives_unicode(tiny: Path, encoding: str) -> None:
    prompt = "héllo ☃ 你好"
    # Python must neither coerce the locale nor switch to its UTF-8 mode.
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    process = popen(
        *("generate", prompt, "--model", tiny, "--max-new-tokens", "24", "--ignore-eos"),
        env=env | {"PYTHONIOENCODING": encoding},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = process.communicate(timeout=60)
    text = expected(tiny, prompt, max_new_tokens=24, ignore_eos=True).text
    assert not text.isascii()
    assert (process.returncode, err) == (0, b"")
    assert out == (text + "\n").encode(encoding, "backslashreplace")


def test_openmp_threads_do_not_spin(tiny: Path) -> None:
    process = popen(
        *("score", "--ids", "1,2", "--model", tiny),
        env={"OMP_DISPLAY_ENV": "TRUE"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _, err = process.communicate(timeout=60)
    assert b"OMP_WAIT_POLICY = 'PASSIVE'" in err


# --- chat ---


def test_chat_in_a_pipe_remembers_the_turns(minitron: Callable[..., Any], tiny: Path) -> None:
    lines = ["hi", "", "and?", "/reset", "hi", "/system be brief", "hi", "/exit", "never"]
    code, out, err = minitron(
        "chat", "--model", tiny, "--max-new-tokens", "6", stdin="\n".join(lines)
    )
    assert (code, err) == (0, "")
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def reply(*messages: tuple[str, str]) -> str:
        dialogue = [{"role": role, "content": content} for role, content in messages]
        ids = tokenizer.apply_chat_template(dialogue)
        return expected(tiny, ids, max_new_tokens=6).text

    first = reply(("user", "hi"))
    second = reply(("user", "hi"), ("assistant", first), ("user", "and?"))
    brief = reply(("system", "be brief"), ("user", "hi"))
    assert len({first, second, brief}) == 3
    assert out == f"{first}\n{second}\n{first}\n{brief}\n"
    code, out, _ = minitron(
        *("chat", "--model", tiny, "--max-new-tokens", "6", "--system", "be brief"), stdin="hi"
    )
    assert (code, out) == (0, brief + "\n")


def test_chat_reads_a_turn_once(
    minitron: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    forward = MinitronForCausalLM.forward

    def count(model: MinitronForCausalLM, batch: Any, cache: Any) -> Any:
        rows.append(len(batch.ids))
        return forward(model, batch, cache)

    monkeypatch.setattr(MinitronForCausalLM, "forward", count)
    long = "a long message " * 12
    code, _, err = minitron(
        *("chat", "--model", tiny, "--max-new-tokens", "2"), stdin=f"{long}\nhi\nho\n"
    )
    assert (code, err) == (0, "")
    prompts = [count for count in rows if count > 1]
    assert len(prompts) == 3
    assert max(prompts[1:]) < prompts[0] / 2


def test_chat_needs_a_template(minitron: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path, chat=False)
    code, out, err = minitron("chat", "--model", folder, stdin="hi\n")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "no chat template" in err
    assert str(folder) in err


def test_chat_that_outgrows_the_context(minitron: Callable[..., Any], tiny: Path) -> None:
    code, out, err = minitron(
        *("chat", "--model", tiny, "--max-new-tokens", "1"), stdin="hi\n" + "x" * 600 + "\n"
    )
    assert code == 2
    assert out.count("\n") == 1
    assert err.count("\n") == 1
    assert "the conversation has" in err and "context of 512" in err


def test_interrupted_chat_in_a_pipe(
    minitron: Callable[..., Any], tiny: Path, interrupt_at_step_5: None
) -> None:
    code, out, err = minitron("chat", "--model", tiny, "--ignore-eos", stdin="hi\nthere\n")
    assert (code, err) == (130, "")
    assert out.count("\n") >= 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat_on_a_terminal(tiny: Path) -> None:
    import pty
    import select

    controller, terminal = pty.openpty()
    process = popen(
        *("chat", "--model", tiny, "--max-new-tokens", "6"),
        env={"TERM": "dumb"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown, seen = b"", 0

    def show_until(mark: bytes) -> None:
        nonlocal shown, seen
        deadline = time.monotonic() + 60
        while mark not in shown[seen:]:
            ready, _, _ = select.select([controller], [], [], deadline - time.monotonic())
            assert ready, shown
            shown += os.read(controller, 4096)
        seen = shown.index(mark, seen) + len(mark)

    try:
        show_until(b"> ")
        os.write(controller, b"x" * 600 + b"\n")
        show_until(b"/reset starts over")
        show_until(b"> ")
        os.write(controller, b"hi\n")
        show_until(b"\r\n> ")
        os.write(controller, b"/exit\n")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
    ids = AutoTokenizer.from_pretrained(tiny).apply_chat_template(
        [{"role": "user", "content": "hi"}]
    )
    reply = expected(tiny, ids, max_new_tokens=6).text
    assert reply.encode() in shown.replace(b"\r\n", b"\n")


# --- score ---


def test_score(minitron: Callable[..., Any], tiny: Path, tmp_path: Path) -> None:
    text = "hello wörld"
    ids = AutoTokenizer.from_pretrained(tiny).encode(text)
    assert ids[0] == 0  # the tokenizer adds BOS
    model = MinitronForCausalLM.from_pretrained(tiny)
    logprobs = model.logits(torch.tensor([ids]))[0].double().log_softmax(-1)
    wanted = [logprobs[i, token].item() for i, token in enumerate(ids[1:])]

    code, out, err = minitron("score", "--text", text, "--model", tiny, "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert list(report) == ["ids", "logprobs", "perplexity"]
    assert report["ids"] == ids
    assert report["logprobs"][0] is None
    assert report["logprobs"][1:] == pytest.approx(wanted, abs=1e-4)
    assert report["perplexity"] == pytest.approx(math.exp(-sum(wanted) / len(wanted)), rel=1e-4)

    file = tmp_path / "text"
    file.write_text(text, encoding="utf-8")
    assert minitron("score", "--file", file, "--model", tiny, "--json")[1] == out
    listed = ",".join(map(str, ids))
    assert minitron("score", "--ids", listed, "--model", tiny, "--json")[1] == out

    lines = minitron("score", "--ids", listed, "--model", tiny)[1].splitlines()
    assert len(lines) == len(ids) + 1
    assert lines[0].split("\t")[:2] == ["0", "-"]
    assert lines[2].split("\t") == [str(ids[2]), f"{report['logprobs'][2]:.4f}", '"e"']
    assert lines[-1] == f"perplexity {report['perplexity']:.4f}"


def test_score_of_one_token(minitron: Callable[..., Any], tiny: Path) -> None:
    _, out, _ = minitron("score", "--ids", "7", "--model", tiny, "--json")
    assert json.loads(out) == {"ids": [7], "logprobs": [None], "perplexity": None}


# --- info ---


def test_info_without_a_model(minitron: Callable[..., Any]) -> None:
    code, out, err = minitron("info", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert list(report) == ["versions", "cpu", "cuda", "build"]
    assert report["versions"]["torch"] == metadata.version("torch")
    assert report["versions"]["minitron_kernels"] == metadata.version("minitron_kernels")
    assert report["cpu"]["threads"] == torch.get_num_threads()
    gains = "avx512_vnni" in report["cpu"]["features"]
    assert ("halves" in report["cpu"]["int8_activations"]) == gains
    cuda = report["cuda"]
    assert bool(cuda["devices"]) == torch.cuda.is_available()
    assert (cuda["none_because"] is None) == torch.cuda.is_available()
    code, out, _ = minitron("info")
    assert code == 0
    assert f"torch: {metadata.version('torch')}\n" in out


def test_info_says_what_was_compiled(
    minitron: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("minitron_kernels.native._PACKAGE", tmp_path)
    build = json.loads(minitron("info", "--json")[1])["build"]
    assert build["archs"] == []
    assert "not built" in build["none_because"]
    record = {"archs": ["80"], "nvcc": "13.0", "entries": {"80": {"mk_a": {}, "mk_b": {}}}}
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/build.json").write_text(json.dumps(record))
    assert json.loads(minitron("info", "--json")[1])["build"] == record
    out = minitron("info")[1]
    assert "  archs: 80\n  nvcc: 13.0\n  sm_80: 2 kernels\n" in out


def test_info_never_reads_weights(
    minitron: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minitron_kernels.loaders.safetensors import SafetensorsCheckpoint

    def refuse(*args: Any) -> None:
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(SafetensorsCheckpoint, "load", refuse)
    code, out, _ = minitron("info", tiny, "--json")
    assert code == 0
    model = json.loads(out)["model"]
    size = (tiny / "model.safetensors").stat().st_size
    assert model["config"]["hidden_size"] == 64
    assert list(model["tensor_types"]) == ["F32"]
    assert model["parameters"] * 4 == model["stored_bytes"] == model["weights_bytes"]
    assert 0 < size - model["stored_bytes"] < 4096
    assert model["weights_allocated_bytes"] == 0  # memory-mapped
    assert model["kv_bytes_per_1k_tokens"] == 1024 * 2 * 2 * 1 * 64 * 4
    report = json.loads(minitron("info", tiny, "--dtype", "bfloat16", "--json")[1])["model"]
    assert (
        report["weights_allocated_bytes"] == report["weights_bytes"] == model["weights_bytes"] // 2
    )
    assert report["kv_bytes_per_1k_tokens"] == model["kv_bytes_per_1k_tokens"] // 2


def test_info_of_a_gguf_file(minitron: Callable[..., Any], smollm2_gguf: Path) -> None:
    import gguf

    types, sizes = Counter[str](), Counter[str]()
    for tensor in gguf.GGUFReader(smollm2_gguf).tensors:
        types[tensor.tensor_type.name] += 1
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    model = json.loads(minitron("info", smollm2_gguf, "--json")[1])["model"]
    assert model["tensor_types"] == {
        name: {"count": types[name], "bytes": sizes[name]} for name in sorted(types)
    }
    assert model["parameters"] == 134_515_008
    assert model["kv_bytes_per_1k_tokens"] == 1024 * 2 * 30 * 3 * 64 * 2
    out = minitron("info", smollm2_gguf)[1]
    assert f"count: {types['Q4_1']}\n" in out
    assert "dtype: bfloat16\n" in out


@pytest.fixture
def quantised(minitron: Callable[..., Any], tiny: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint as a Q8_0 file."""
    code, _, err = minitron("quantize", tiny, tmp_path / "q.gguf", "--type", "Q8_0")
    assert code == 0, err
    return tmp_path / "q.gguf"


def test_what_stays_quantised_is_told(minitron: Callable[..., Any], quantised: Path) -> None:
    options = ("--model", quantised, "--device", "cpu", "--max-new-tokens", "4", "--ignore-eos")
    code, out, err = minitron("generate", "Hello", *options, "--stats")
    assert code == 0 and "Q8_0" not in out
    for line in ("weights:\n  Q8_0:\n    count: 16\n", "decode_tokens_per_second: ", "peak_memory"):
        assert line in err
    kept = json.loads(minitron("generate", "Hello", *options, "--json")[1])
    report = json.loads(minitron("info", quantised, "--json")[1])["model"]
    assert kept["weights"]["Q8_0"] == report["kept_quantized"]["Q8_0"]
    assert report["weights_bytes"] == sum(kind["bytes"] for kind in kept["weights"].values())
    assert report["weights_allocated_bytes"] == kept["weights"]["bfloat16"]["bytes"]

    expanded = json.loads(minitron("generate", "Hello", *options, "--expand", "--json")[1])
    assert list(expanded["weights"]) == ["bfloat16"]
    report = json.loads(minitron("info", quantised, "--expand", "--json")[1])["model"]
    assert report["kept_quantized"] == {}
    assert report["weights_bytes"] == expanded["weights"]["bfloat16"]["bytes"]
    assert len(kept["token_ids"]) == len(expanded["token_ids"]) == 4


def test_int8_activations_are_told(
    minitron: Callable[..., Any], quantised: Path, tiny: Path
) -> None:
    options = ("--device", "cpu", "--max-new-tokens", "3", "--ignore-eos", "--json")
    report = json.loads(minitron("generate", "Hello", "--model", quantised, *options)[1])
    assert report["activations"] == "bfloat16"
    options = (*options, "--int8-activations")
    report = json.loads(minitron("generate", "Hello", "--model", quantised, *options)[1])
    assert report["activations"] == "bfloat16, int8 in quantised products"
    code, out, err = minitron("generate", "Hello", "--model", tiny, *options)
    assert (code, out) == (2, "")
    assert "error: int8_activations is for quantised weights, and the model has none" in err


def test_scales_that_are_not_finite_need_an_option(
    minitron: Callable[..., Any], quantised: Path
) -> None:
    from minitron_kernels.loaders.gguf_file import GGUFFile

    tensor = GGUFFile(quantised).tensors["blk.1.ffn_down.weight"]
    with quantised.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\x00\x7c")  # an infinity
    options = ("--model", quantised, "--device", "cpu", "--ids", "7,8")
    code, out, err = minitron("score", *options)
    assert (code, out) == (2, "")
    assert "tensor 'model.layers.1.mlp.down_proj.weight' (Q8_0): stored row 0" in err
    code, _, err = minitron("score", *options, "--allow-nonfinite")
    assert "down_proj" not in err
