"""bench/random_checkpoint.py: the same model in every format, readable by others."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from bench.random_checkpoint import POOL_GROUPS, PRESETS, main
from minitron_kernels.loaders.checkpoint import Checkpoint, open_checkpoint
from minitron_kernels.loaders.tokenizer import Tokenizer

TINY = {
    "--layers": 2,
    "--hidden": 64,
    "--intermediate": 96,
    "--heads": 4,
    "--kv-heads": 2,
    "--head-dim": 32,
    "--vocab": 1200,
    "--context": 256,
}


def write(output: Path, *options: str) -> Result:
    shape = [str(item) for pair in TINY.items() for item in pair]
    return CliRunner().invoke(main, [str(output), *shape, *options])


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.load(name, torch.float32) for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random") / "f16"
    result = write(path, "--type", "f16", "--shard-gb", "0.0002")
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.parametrize(
    "name, kind, tolerance",
    [
        ("bf16", "bf16", 2**-8),
        ("m.gguf", "f16", 0),
        ("m.gguf", "bf16", 2**-8),
        ("m.gguf", "q8_0", 0.01),
        ("m.gguf", "q4_0", 0.14),
        ("m.gguf", "q4_k_m", 0.12),
        ("m.gguf", "q6_k", 0.04),
    ],
)
def test_every_format_holds_the_same_weights(
    folder: Path, tmp_path: Path, name: str, kind: str, tolerance: float
) -> None:
    """Errors are relative to the largest weight of a block, which is the scale of its type."""
    result = write(tmp_path / name, "--type", kind)
    assert result.exit_code == 0, result.output
    expected, got = weights(open_checkpoint(folder)), weights(open_checkpoint(tmp_path / name))
    assert set(got) == set(expected)
    for weight_name, weight in expected.items():
        assert got[weight_name].shape == weight.shape
        largest = weight.reshape(-1, 32).abs().amax(1, keepdim=True)
        error = (got[weight_name] - weight).reshape(-1, 32).abs() / largest
        assert error.max() <= tolerance


def test_seeds_differ_and_repeat(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "same", "--type", "f16")
    write(tmp_path / "other", "--type", "f16", "--seed", "1")
    base, same, other = (
        weights(open_checkpoint(p)) for p in (folder, tmp_path / "same", tmp_path / "other")
    )
    for name, weight in base.items():
        assert torch.equal(weight, same[name])
        assert torch.equal(weight, other[name]) == ("norm" in name)
        if "norm" not in name:
            assert abs(weight.std() / 0.02 - 1) < 0.05 and abs(weight.mean()) < 0.002


def test_rows_of_the_largest_matrix_differ() -> None:
    """Rows repeat only where a whole number of pools lies between them: the prime divides none."""
    assert all(POOL_GROUPS % n for n in range(2, math.isqrt(POOL_GROUPS) + 1))
    for rows, *cols in PRESETS["minitron-8b"].weight_shapes().values():
        assert not cols or (cols[0] % POOL_GROUPS != 0 and rows < POOL_GROUPS)


def test_transformers_reads_the_folder_and_agrees_on_tokens(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state, expected = model.state_dict(), weights(open_checkpoint(folder))
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    with torch.no_grad():
        logits = model(torch.arange(3, 200)[None]).logits
    assert logits.isfinite().all() and 0.01 < logits.std() < 100

    assert write(tmp_path / "m.gguf").exit_code == 0
    hf, own = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(folder)
    from_gguf = Tokenizer.from_file(tmp_path / "m.gguf")
    for text in ("Complete the paragraph: our solar system is", "  naïve\n漢字 🙂 it's 1234"):
        ids = hf(text)["input_ids"]
        assert ids[0] == 1 and ids == own.encode(text) == from_gguf.encode(text)
        assert from_gguf.decode(ids[1:]) == text
    assert own.decode([1199]) == from_gguf.decode([1199]) == hf.decode([1199])


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("m", ["--type", "q8_0"], "only for OUTPUTs that end in .gguf"),
        ("m", ["--kv-heads", "3"], "must be a multiple"),
        ("m", ["--vocab", "200"], "a byte-level vocabulary needs 260"),
        (".", [], "already there"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, name: str, options: list[str], message: str) -> None:
    (tmp_path / "file").touch()
    result = write(tmp_path / name, *options)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
