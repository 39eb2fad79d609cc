"""The `minitron` command, given what it cannot take: one line that says so, and exit code 2."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_kernels import MinitronForCausalLM
from tests.cli_process import popen


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["generate", "hi", "--wrong"], "--wrong"),
        (["frobnicate"], "frobnicate"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "hi", "--dtype", "int3"], "int3"),
        (["generate", "hi", "--device", "abacus"], "abacus"),
        (["generate", "hi", "--num-threads", "0"], "--num-threads"),
        (["generate", "hi", "--num-threads", "257"], "1<=x<=256"),
        (["generate", "hi", "--model", ""], "model source is empty"),
        (["generate", "hi", "--top-p", "2"], "top_p"),
        (["generate", "hi", "--temperature", "nan"], "temperature"),
        (["generate", "hi", "--max-new-tokens", "0"], "max_new_tokens"),
        (["generate", "hi", "--min-new-tokens", "9", "--max-new-tokens", "4"], "min_new_tokens"),
        (["generate", "hi", "--stop", ""], "stop"),
        (["generate", "hi", "--logit-bias", "5:1"], "ID=VALUE"),
        (["generate", "hi", "--logit-bias", "999999=1"], "999999"),
        (["generate", "hi", "--logprobs", "1"], "--json"),
        (["generate", "hi", "--batch-file", "/nonexistent/x"], "/nonexistent/x"),
        (["generate", "hi", "--batch-file", __file__], "--batch-file"),
        (["generate", "x" * 600], "512"),
        (["generate", "hi\udcff"], "UTF-8"),
        (["generate", "hi", "--model", "/nonexistent/model.gguf"], "/nonexistent/model.gguf"),
        (["generate", "hi", "--model", "smollm2-135"], "smollm2-135m"),
        (["generate", "hi", "--model", "{tiny}", "--revision", "v1"], "revision"),
        (["score"], "--text"),
        (["score", "--text", "a", "--ids", "1"], "--ids"),
        (["score", "--text", ""], "empty"),
        (["score", "--ids", "1,two"], "1,two"),
        (["score", "--ids", "1,999999"], "ids"),
        (["score", "--file", "/nonexistent/text"], "/nonexistent/text"),
        (["score", "--file", "/dev/zero"], "256 MiB"),
        (["score", "--text", "x" * 600], "512"),
        (["info", "/nonexistent"], "/nonexistent"),
        (["info", "{tiny}", "--dtype", "int3"], "int3"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistake_is_one_line_and_exit_code_2(
    minitron: Callable[..., Any], tiny: Path, args: list[str], named: str
) -> None:
    args = [arg.format(tiny=tiny) for arg in args]
    if args[0] in ("generate", "score") and "--model" not in args:
        args += ["--model", str(tiny)]
    for as_json in ([], ["--json"]):
        if as_json and named in ("--json", "frobnicate"):  # no mistake then, or another one
            continue
        code, out, err = minitron(*args, *as_json)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert named in err


def test_traceback_on_request(
    minitron: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MK_TRACEBACK", "1")
    code, _, err = minitron("info", "/nonexistent")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("error: ")


def test_bug_is_not_reported_as_a_mistake(
    minitron: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(MinitronForCausalLM, "forward", broken)
    with pytest.raises(AssertionError, match="a bug"):
        minitron("generate", "hi", "--model", tiny)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA: tried to allocate 1 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory_is_told(
    minitron: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhausted(*args: Any) -> None:
        raise error

    monkeypatch.setattr(MinitronForCausalLM, "forward", exhausted)
    code, out, err = minitron("generate", "hi", "--model", tiny, "--json")
    assert (code, out) == (2, "")
    assert err.startswith("error: out of memory") and err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="there is no /dev/full")
def test_full_disk_under_the_output_is_told(tiny: Path) -> None:
    for args in (["--json"], []):
        with Path("/dev/full").open("w") as full:
            process = popen(
                *("score", "--ids", "1,2", "--model", tiny, *args),
                stdout=full,
                stderr=subprocess.PIPE,
            )
            err = process.communicate(timeout=60)[1]
        assert (process.returncode, err) == (
            2,
            b"error: standard output: No space left on device\n",
        )


@pytest.mark.parametrize(
    ("closed", "message"),
    [(0, b"error: the prompt is empty\n"), (1, b"error: standard output is closed\n")],
)
def test_closed_streams(tiny: Path, closed: int, message: bytes) -> None:
    process = popen(
        *("generate", "--model", tiny),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: os.close(closed),
    )
    err = process.communicate(timeout=60)[1]
    assert (process.returncode, err) == (2, message)


def test_a_variable_of_torchrun_that_is_no_number(
    minitron: Callable[..., Any], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    assert minitron("score", "--ids", "1,2", "--model", tiny)[0] == 0
