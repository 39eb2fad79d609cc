"""Safetensors checkpoints: single files, shards, conversion, memory mapping."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minitron_kernels.loaders.checkpoint import Checkpoint, open_checkpoint

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_loads(checkpoint: Checkpoint, weights: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(weights)
    for dtype in DTYPES:
        for name, weight in weights.items():
            loaded = checkpoint.load(name, dtype)
            assert loaded.dtype == dtype and torch.equal(loaded, weight.to(dtype))


@pytest.mark.parametrize("stored", DTYPES)
def test_what_transformers_saves_is_loaded(
    make_hf_model: Callable[..., tuple[Any, Path]], stored: torch.dtype
) -> None:
    model, folder = make_hf_model(dtype=stored)
    assert (folder / "model.safetensors").exists()
    checkpoint = open_checkpoint(folder)
    assert_loads(checkpoint, {n: w.to(stored) for n, w in model.state_dict().items()})
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == checkpoint.config.weight_shapes()
    info = checkpoint.tensors["model.layers.1.mlp.down_proj.weight"]
    weight = model.state_dict()[info.name].to(stored)
    assert info.nbytes == weight.nbytes and info.numel == weight.numel()
    assert info.type == {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[stored]


def test_shards_that_transformers_saves_are_loaded(
    make_hf_model: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    model, folder = make_hf_model()
    model.save_pretrained(tmp_path, max_shard_size="300kB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    checkpoint = open_checkpoint(tmp_path)
    assert_loads(checkpoint, dict(open_and_load(folder)))
    assert {t.file for t in checkpoint.tensors.values()} == set(shards)


def open_and_load(folder: Path) -> list[tuple[str, torch.Tensor]]:
    checkpoint = open_checkpoint(folder)
    return [(name, checkpoint.load(name, torch.float32)) for name in checkpoint.tensors]


def test_links_of_the_hub_cache_are_followed(
    make_hf_model: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    """A snapshot in the Hub's cache is a folder of links to blobs beside it."""
    _, folder = make_hf_model()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for i, name in enumerate(("config.json", "model.safetensors")):
        (tmp_path / "blobs" / str(i)).write_bytes((folder / name).read_bytes())
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{i}")
    assert len(open_and_load(tmp_path / "snapshot")) == len(open_and_load(folder))


def test_a_folder_without_weights_says_what_it_holds(
    make_hf_model: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    _, folder = make_hf_model()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"it holds config\.json, pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_ram_needed_counts_what_is_converted(
    make_hf_model: Callable[..., tuple[Any, Path]],
) -> None:
    model, folder = make_hf_model(dtype=torch.bfloat16)
    numel = sum(w.numel() for w in model.state_dict().values())
    checkpoint = open_checkpoint(folder)
    assert checkpoint.ram_needed(torch.bfloat16) == 0
    assert checkpoint.ram_needed(torch.float32) == 4 * numel
    assert checkpoint.ram_needed(torch.float16) == 2 * numel


def test_weights_of_the_stored_dtype_are_mapped_not_copied(
    make_hf_model: Callable[..., tuple[Any, Path]], tmp_path: Path
) -> None:
    """256 MiB are opened and loaded; memory grows by pages of the file only when they are read."""
    _, folder = make_hf_model()
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    ones = torch.ones(128 << 20, dtype=torch.bfloat16)
    save_file({"big": ones}, tmp_path / "model.safetensors")
    script = f"""
import json, torch
from pathlib import Path
from minitron_kernels.loaders.checkpoint import open_checkpoint

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {{line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}}

checkpoint = open_checkpoint(Path({str(tmp_path)!r}))
before = memory()
weight = checkpoint.load("big", torch.bfloat16)
opened = memory()
assert weight.amin() == 1
del checkpoint
assert weight.amax() == 1  # the mapping lives as long as the tensor
after = memory()
print(json.dumps([[b[k] - a[k] for k in ("RssAnon", "RssFile")] for a, b in
    ((before, opened), (opened, after))]))
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    at_load, at_use = json.loads(out.stdout)
    assert sum(at_load) < 4 << 10  # KiB
    assert at_use[1] > 200 << 10  # the file's own pages, which the kernel can drop
    weight = open_checkpoint(tmp_path).load("big", torch.bfloat16)
    weight[0] = 5  # private: neither the file nor later readers see it
    assert open_checkpoint(tmp_path).load("big", torch.bfloat16)[0] == 1
