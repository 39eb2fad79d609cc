"""GGUF files for tests: written by the gguf package, or byte by byte where they must be wrong."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

# Byte offsets of the half-precision scales in a block of each quantised type (docs/gguf.md, ggml).
SCALE_OFFSETS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
DENSE_TYPES = ("F32", "F16", "BF16")
ALL_TYPES = (*SCALE_OFFSETS, *DENSE_TYPES)

TINY_METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 256,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
}


def random_rows(kind: str, rows: int, cols: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Random stored rows, uint8 [rows, row bytes]: any bits, but finite scales and values."""
    if kind in DENSE_TYPES:
        values = rng.standard_normal((rows, cols), np.float32)
        if kind == "BF16":
            return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)
        return values.astype(np.float16 if kind == "F16" else np.float32).view(np.uint8)
    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * cols // elements, nbytes), dtype=np.uint8)
    for offset in SCALE_OFFSETS[kind]:
        scales = rng.standard_normal((len(blocks), 1)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks.reshape(rows, -1)


Tensors = Mapping[str, tuple[str, npt.NDArray[np.uint8]]]


def tiny_tensors(kind: str, seed: int = 0) -> dict[str, tuple[str, npt.NDArray[np.uint8]]]:
    """All tensors of TINY_METADATA's model: name -> (type, stored rows); matrices of ``kind``."""
    rng = np.random.default_rng(seed)
    shapes = {
        "token_embd": 40,
        "blk.0.attn_q": 256,
        "blk.0.attn_k": 128,
        "blk.0.attn_v": 128,
        "blk.0.attn_output": 256,
        "blk.0.ffn_gate": 256,
        "blk.0.ffn_up": 256,
        "blk.0.ffn_down": 256,
        "output": 40,
    }
    tensors = {f"{n}.weight": (kind, random_rows(kind, r, 256, rng)) for n, r in shapes.items()}
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors[f"{name}.weight"] = ("F32", random_rows("F32", 1, 256, rng)[0])
    return tensors


def write_gguf(
    path: Path, tensors: Tensors, metadata: Mapping[str, Any] = TINY_METADATA, per_file: int = 0
) -> list[Path]:
    """Write a GGUF file, or a split one of ``per_file`` tensors a part; the files, in order."""
    writer = GGUFWriter(path, metadata["general.architecture"], split_max_tensors=per_file)
    for key, value in metadata.items():
        if key == "general.architecture":  # the writer puts it there itself
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (kind, rows) in tensors.items():
        raw = np.ascontiguousarray(rows)
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(path.parent.glob(f"{path.stem}-*-of-*.gguf"))
    return parts or [path]


@dataclass
class RawGGUF:
    """A GGUF file put together by hand, every field of which can be made wrong."""

    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None  # None: as many as there are
    num_pairs: int | None = None
    pairs: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""

    def header(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_pairs = len(self.pairs) if self.num_pairs is None else self.num_pairs
        head = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_pairs)
        return head + b"".join(self.pairs) + b"".join(self.tensors)

    def write(self, path: Path) -> Path:
        header = self.header()
        path.write_bytes(header + b"\0" * (-len(header) % 32) + self.data)
        return path


def raw_string(text: str | bytes, length: int | None = None) -> bytes:
    """A GGUF string, of a claimed ``length`` that may be wrong."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def raw_pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A metadata entry: key, value type, stored value."""
    return raw_string(key) + struct.pack("<I", kind) + value


def raw_tensor(
    name: str | bytes, dims: list[int], kind: int, offset: int, num_dims: int | None = None
) -> bytes:
    """An entry of the tensor table; ``dims`` innermost first, ``num_dims`` what it claims."""
    count = len(dims) if num_dims is None else num_dims
    return raw_string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, kind, offset)
