"""GGUF checkpoints: every tensor type, the row order of Q and K, splits, memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from minitron_kernels.loaders.checkpoint import Weights, open_checkpoint
from minitron_kernels.loaders.gguf_file import BLOCK_TYPES, GGUFFile, part_paths
from minitron_kernels.quantized import QuantizedTensor
from tests.gguf_files import (
    ALL_TYPES,
    DENSE_TYPES,
    SCALE_OFFSETS,
    TINY_METADATA,
    random_rows,
    tiny_tensors,
    write_gguf,
)

V_PROJ = "model.layers.0.self_attn.v_proj.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def write_with_v_proj(path: Path, kind: str, rows: int, cols: int) -> np.ndarray:
    """A tiny model whose V matrix is [rows, cols] of ``kind``; returns the stored rows."""
    stored = random_rows(kind, rows, cols, np.random.default_rng(7))
    write_gguf(path, tiny_tensors("F16") | {"blk.0.attn_v.weight": (kind, stored)})
    return stored


def test_block_types_are_ggmls() -> None:
    assert sorted(b.name for b in BLOCK_TYPES.values()) == sorted(ALL_TYPES)
    for kind, block in BLOCK_TYPES.items():
        assert GGMLQuantizationType[block.name] == kind
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType(kind)] == (block.elements, block.nbytes)


# 129 x 768 elements are more than three chunks of decoding, none of which ends with a row.
@pytest.mark.parametrize("rows, cols", [(1, 256), (7, 768), (129, 768), (3, 65536)])
@pytest.mark.parametrize("kind", ALL_TYPES)
def test_load_decodes_as_gguf_does(tmp_path: Path, kind: str, rows: int, cols: int) -> None:
    stored = write_with_v_proj(tmp_path / "m.gguf", kind, rows, cols)
    expected = torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType[kind]))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    info = checkpoint.tensors[V_PROJ]
    assert (info.type, info.shape, info.nbytes) == (kind, (rows, cols), stored.nbytes)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = checkpoint.load(V_PROJ, dtype)
        assert loaded.dtype == dtype and loaded.is_contiguous()
        wanted = expected.to(dtype)
        if not wanted.isfinite().all():  # large scales overflow float16
            pytest.fail("the test's own blocks must be representable")
        assert torch.equal(loaded, wanted)


@pytest.mark.parametrize("kind", ALL_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_q_and_k_rows_are_in_half_split_order(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    tensors = tiny_tensors(kind)
    write_gguf(tmp_path / "m.gguf", tensors)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    head_dim = 64
    for name, stored_name, heads in ((Q_PROJ, "attn_q", 4), (K_PROJ, "attn_k", 2)):
        stored = tensors[f"blk.0.{stored_name}.weight"][1]
        decoded = quants.dequantize(stored, GGMLQuantizationType[kind])
        expected = np.empty_like(decoded)
        for head in range(heads):
            for pair in range(head_dim // 2):
                for half in (0, 1):
                    expected[head * head_dim + half * head_dim // 2 + pair] = decoded[
                        head * head_dim + 2 * pair + half
                    ]
        loaded = checkpoint.load(name, dtype)
        assert torch.equal(loaded, torch.from_numpy(expected).to(dtype))


def test_all_weights_of_a_llama_are_named_and_shaped_as_in_transformers(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_tensors("Q4_K"))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    config = checkpoint.config
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == config.weight_shapes()
    assert config.vocab_size == 40 and config.head_dim == 64
    assert not config.tie_word_embeddings


def test_missing_output_matrix_means_tied_embeddings(tmp_path: Path) -> None:
    tensors = tiny_tensors("Q8_0")
    del tensors["output.weight"]
    write_gguf(tmp_path / "m.gguf", tensors)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.tie_word_embeddings
    assert "lm_head.weight" not in checkpoint.tensors


def test_rope_freqs_go_to_the_config(tmp_path: Path) -> None:
    factors = np.linspace(1, 8, 32, dtype=np.float32)
    tensors = {"rope_freqs.weight": ("F32", factors.view(np.uint8)), **tiny_tensors("Q8_0")}
    write_gguf(tmp_path / "m.gguf", tensors)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.rope_factors == tuple(factors.tolist())
    assert not any("rope" in name for name in checkpoint.tensors)


def test_metadata_round_trips_in_every_type(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    expected: dict[str, object] = {"general.architecture": "llama"}
    for kind, value in {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
        "string": "Ġstraße 漢字 \0 end",
    }.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
        expected[f"x.{kind}"] = value
    for name, values in {
        "strings": ["", "a", "Ġé"],
        "ints": [-1, 2, 3],
        "floats": [0.5, -1.25],
        "bools": [True, False],
    }.items():
        writer.add_array(f"x.{name}", values)
        expected[f"x.{name}"] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert metadata == expected
    assert [type(metadata[key]) for key in expected] == [type(v) for v in expected.values()]


@pytest.mark.parametrize("named", [0, 1, -1])
def test_a_split_file_opens_by_any_of_its_parts(tmp_path: Path, named: int) -> None:
    tensors = tiny_tensors("Q5_K")
    write_gguf(tmp_path / "whole.gguf", tensors)
    parts = write_gguf(tmp_path / "split.gguf", tensors, per_file=5)
    assert len(parts) == 3
    assert part_paths(parts[named]) == parts
    whole, split = open_checkpoint(tmp_path / "whole.gguf"), open_checkpoint(parts[named])
    assert split.config.head_dim == whole.config.head_dim == 64
    assert {t.file for t in split.tensors.values()} == set(parts)
    assert set(split.tensors) == set(whole.tensors)
    for name in whole.tensors:
        assert torch.equal(split.load(name, torch.float32), whole.load(name, torch.float32))


@pytest.mark.parametrize("kind", [*DENSE_TYPES, "Q6_K"])
def test_same_dtype_is_a_view_of_the_file_and_costs_nothing(tmp_path: Path, kind: str) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_tensors(kind))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        loaded = {name: checkpoint.load(name, dtype) for name in checkpoint.tensors}
        copied = sum(
            t.untyped_storage().nbytes()
            for t in loaded.values()
            if not in_file_mapping(t, tmp_path / "m.gguf")
        )
        assert checkpoint.ram_needed(dtype) == copied
    stored_as = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(kind)
    if stored_as is not None:
        view = checkpoint.load(V_PROJ, stored_as)
        assert in_file_mapping(view, tmp_path / "m.gguf")
        before = (tmp_path / "m.gguf").read_bytes()
        view.zero_()  # reaches neither the file nor anyone who opens it
        assert (tmp_path / "m.gguf").read_bytes() == before


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", SCALE_OFFSETS)
def test_load_quantized_keeps_the_stored_blocks(
    tmp_path: Path, kind: str, interleaved: bool
) -> None:
    """Views of the file, but for Q and K in half-split order; what they decode to is load's."""
    path = tmp_path / "m.gguf"
    tensors = tiny_tensors(kind)
    write_gguf(path, tensors)
    checkpoint = open_checkpoint(path)
    names = [name for name, info in checkpoint.tensors.items() if info.is_quantized_matrix]
    assert len(names) == 9  # all but the norms
    loaded = {n: checkpoint.load_quantized(n, interleaved=interleaved) for n in names}
    for name, w in loaded.items():
        assert isinstance(w, QuantizedTensor) and w.quant_type == kind
        copied = name in (Q_PROJ, K_PROJ) and not interleaved
        assert in_file_mapping(w.blocks, path) != copied
        if name in (Q_PROJ, K_PROJ) and interleaved:
            stored = tensors[f"blk.0.attn_{name.split('.')[-2][0]}.weight"][1]
            assert (w.blocks.numpy() == stored).all()
        else:
            assert torch.equal(w.dequantize(), checkpoint.load(name, torch.float32))
    norms = sum(i.nbytes for n, i in checkpoint.tensors.items() if n not in names)
    for dtype, dense in ((torch.float32, 0), (torch.bfloat16, norms // 2)):
        copies = sum(w.nbytes for w in loaded.values() if not in_file_mapping(w.blocks, path))
        needed = checkpoint.ram_needed(dtype, keep_quantized=True, interleaved=interleaved)
        assert needed == copies + dense
        assert needed < checkpoint.ram_needed(dtype)
    before = path.read_bytes()
    loaded[V_PROJ].blocks.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", SCALE_OFFSETS)
@pytest.mark.parametrize("which", [0, -1])
def test_nonfinite_scales_are_rejected_by_name(tmp_path: Path, kind: str, which: int) -> None:
    tensors = tiny_tensors(kind)
    rows = tensors["blk.0.attn_q.weight"][1]
    offset = SCALE_OFFSETS[kind][which]
    rows[77, offset : offset + 2] = np.array([np.nan], "<f2").view(np.uint8)
    write_gguf(tmp_path / "m.gguf", tensors)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=rf"m\.gguf: tensor '{Q_PROJ}' \({kind}\): stored row 77 "):
        checkpoint.load_quantized(Q_PROJ)
    w = checkpoint.load_quantized(Q_PROJ, allow_nonfinite=True)
    assert int((~w.dequantize().isfinite()).any(1).sum()) == 1
    assert checkpoint.load_quantized(K_PROJ).shape == (128, 256)


def test_load_quantized_takes_quantised_matrices_only(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_tensors("F16"))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf: .*v_proj.weight' is F16 \[128, 256\], not a "):
        checkpoint.load_quantized(V_PROJ)
    with pytest.raises(ValueError, match=r"m\.gguf: no tensor 'nope'"):
        checkpoint.load_quantized("nope")


def in_file_mapping(tensor: torch.Tensor, file: Path) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file)):
            start, end = (int(x, 16) for x in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return True
    return False


def test_peak_memory_of_decoding_is_one_output_and_a_chunk(tmp_path: Path) -> None:
    """In a process of its own: the high-water mark of a 32 MiB matrix, plus at most 8 MiB."""
    write_with_v_proj(tmp_path / "m.gguf", "Q4_K", 4096, 4096)
    script = f"""
import torch
from pathlib import Path
from minitron_kernels.loaders.checkpoint import open_checkpoint

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

checkpoint = open_checkpoint(Path({str(tmp_path / "m.gguf")!r}))
checkpoint.load("model.layers.0.self_attn.o_proj.weight", torch.bfloat16)
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
before = memory("VmRSS")
checkpoint.load({V_PROJ!r}, torch.bfloat16)
print(memory("VmHWM") - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    file_mib = 4096 * 4096 // 256 * 144 / 2**20  # pages of the mapping, which can be dropped
    assert 32 <= float(out.stdout) <= 32 + file_mib + 8


def test_header_of_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    """Minitron's vocabulary: 131072 tokens and 269443 merges, read in well under 0.3 s."""
    metadata = TINY_METADATA | {
        "tokenizer.ggml.tokens": [f"tok{i}" for i in range(131072)],
        "tokenizer.ggml.token_type": [1] * 131072,
        "tokenizer.ggml.merges": [f"a{i} b{i}" for i in range(269443)],
    }
    write_gguf(tmp_path / "m.gguf", {}, metadata)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        file = GGUFFile(tmp_path / "m.gguf")
        seconds.append(time.perf_counter() - start)
    assert file.metadata["tokenizer.ggml.merges"][-1] == "a269442 b269442"
    print(f"header with 400k strings: {min(seconds):.3f} s")
    assert min(seconds) < 1.0  # 0.3 s on an idle core; shared machines are slower


def test_check_memory_names_need_and_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_tensors("Q4_K"))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    cpu = torch.device("cpu")
    Weights(checkpoint, torch.float32).check_memory(cpu)
    monkeypatch.setattr(type(checkpoint), "ram_needed", lambda self, dtype, **options: 3 << 50)
    with pytest.raises(MemoryError, match=r"m\.gguf.*bfloat16 need 3145728\.0 GiB.*available"):
        Weights(checkpoint, torch.bfloat16).check_memory(cpu)


def test_load_rejects_unknown_names_and_dtypes(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_tensors("F16"))
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"m\.gguf: no tensor 'nope'"):
        checkpoint.load("nope", torch.float32)
    with pytest.raises(ValueError, match=r"dtype: got torch\.int8, accepted: float32"):
        checkpoint.load(V_PROJ, torch.int8)
