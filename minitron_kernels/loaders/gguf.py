"""GGUF files: a bounds-checked header reader, and checkpoints over one or several files.

The format is that of ggml's docs/gguf.md. The header is read here and not by gguf.GGUFReader, which
trusts the counts and offsets it finds (a hostile file makes it allocate or crash) and needs 20 s
and more for a vocabulary of 131k tokens and 269k merges; this one checks all of them and needs
0.3 s. Quantised matrices are expanded by `load`, or handed out as stored by `load_quantized`.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minitron_kernels.config import ModelConfig
from minitron_kernels.loaders.checkpoint import (
    TORCH_DTYPES,
    TensorInfo,
    check_finite,
    check_load,
    check_load_quantized,
    check_scales,
    convert,
    require_file,
)
from minitron_kernels.quantized import (
    GGML_NUMBERS,
    QUANT_TYPES,
    BlockType,
    QuantizedTensor,
    decode,
)

# Tensor types by their number in the file.
BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    **{number: QUANT_TYPES[name] for name, number in GGML_NUMBERS.items()},
    30: BlockType("BF16", 1, 2),
}

# Far above what published models have (20 MB, 2k tensors, 60 keys, 1.2M array items): a hostile
# header, which grows up to 36-fold when parsed, costs some hundred megabytes at the most.
_MAX_HEADER_BYTES = 32 << 20
_MAX_TENSORS = _MAX_PAIRS = 1 << 16
_MAX_ARRAY_ITEMS = 1 << 22  # over all arrays of the file
_MAX_DIMS = 4
# Elements decoded between two looks at whether they are finite.
_CHECK_ELEMENTS = 1 << 15

_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING, _ARRAY = 8, 9
# Reserve no swap for a private mapping, so that it may be larger than memory. Linux's value, for
# the Python versions that do not name it.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor as the header describes it; ``offset`` is in bytes from the start of the file."""

    name: str
    type: BlockType
    shape: tuple[int, ...]  # torch order: the innermost dimension, along which blocks run, last
    offset: int

    @property
    def rows(self) -> int:
        """Number of rows: the product of all dimensions but the last."""
        return int(np.prod(self.shape[:-1], dtype=object))

    @property
    def row_nbytes(self) -> int:
        """Stored bytes of a row."""
        return self.type.row_nbytes(self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Stored bytes of the tensor."""
        return self.rows * self.row_nbytes


class GGUFFile:
    """One GGUF file, version 2 or 3, little endian, memory-mapped.

    ``metadata`` maps keys to int, float, bool, str or a list of one of them; ``tensors`` maps the
    file's own names to their descriptions. Raises OSError when the file cannot be read, ValueError
    naming file and field when any count, length, type, offset or string is impossible, and
    NotImplementedError for tensor types other than BLOCK_TYPES.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        require_file(self.path)
        with self.path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{self.path}: not a GGUF file (it does not start with 'GGUF')")
            # Private and writable: torch accepts views of it, and writing never reaches the file.
            self._map = mmap.mmap(
                file.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        reader = _HeaderReader(self.path, self._map)
        self.version = reader.version()
        num_tensors = reader.count("tensor count", min_bytes=33, most=_MAX_TENSORS)
        num_pairs = reader.count("metadata count", min_bytes=13, most=_MAX_PAIRS)
        self.metadata, self._pairs = _read_metadata(reader, num_pairs)
        self.tensors = _read_tensors(reader, num_tensors, _alignment(self.path, self.metadata))

    def raw_pair(self, key: str) -> bytes:
        """A metadata entry as stored: key, value type and value."""
        return self._map[self._pairs[key]]

    def rows(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor, uint8 [rows, row_nbytes], a view of the mapped file."""
        tensor = self.tensors[name]
        data = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        return data.reshape(tensor.rows, tensor.row_nbytes)


class _HeaderReader:
    """A cursor over the header. Everything it returns lies inside the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.pos = path, data, 4
        self.end = min(len(data), _MAX_HEADER_BYTES)
        self.array_items_left = _MAX_ARRAY_ITEMS

    def error(self, field: str, problem: str) -> ValueError:
        return ValueError(f"{self.path}: {field:.120}: {problem}")

    def take(self, nbytes: int, field: str) -> bytes:
        start = self.pos
        if nbytes > self.end - start:
            where = "the file" if self.end == len(self.data) else "the largest header accepted"
            raise self.error(
                field,
                f"{nbytes} bytes at offset {start} reach past the end of {where} ({self.end})",
            )
        self.pos = start + nbytes
        return self.data[start : self.pos]

    def u32(self, field: str) -> int:
        return int.from_bytes(self.take(4, field), "little")

    def u64(self, field: str) -> int:
        return int.from_bytes(self.take(8, field), "little")

    def count(self, field: str, min_bytes: int, most: int) -> int:
        """A number of items, ``most`` at the most, of at least ``min_bytes`` in what is left."""
        count = self.u64(field)
        if count * min_bytes > self.end - self.pos:
            raise self.error(
                field, f"{count} items cannot fit in the {self.end - self.pos} bytes that follow"
            )
        if count > most:
            raise self.error(field, f"{count} items, more than the {most} accepted")
        return count

    def string(self, field: str) -> str:
        return self.decode(self.take(self.u64(field), field), field)

    def decode(self, raw: bytes, field: str) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(field, f"not valid UTF-8: {raw[:40]!r}") from None

    def strings(self, count: int, field: str) -> list[str]:
        """Strings of an array. The loop is written out: it runs 400k times for Minitron's file."""
        data, pos, end, unpack = self.data, self.pos, self.end, _U64.unpack_from
        raw = []
        for i in range(count):
            if end - pos < 8 or (length := unpack(data, pos)[0]) > end - pos - 8:
                raise self.error(f"{field}[{i}]", f"string at offset {pos} reaches past the end")
            start = pos + 8
            pos = start + length
            raw.append(data[start:pos])
        self.pos = pos
        try:
            return [item.decode() for item in raw]
        except UnicodeDecodeError:
            return [self.decode(item, f"{field}[{i}]") for i, item in enumerate(raw)]

    def scalars(self, kind: int, count: int, field: str) -> list[Any]:
        dtype = _SCALARS[kind]
        values = np.frombuffer(self.take(count * dtype.itemsize, field), dtype)
        if dtype == np.bool_ and values.view(np.uint8).max(initial=0) > 1:
            raise self.error(field, "a bool must be stored as 0 or 1")
        return values.tolist()

    def value(self, field: str) -> Any:
        kind = self.u32(field)
        if kind == _STRING:
            return self.string(field)
        if kind == _ARRAY:
            item = self.u32(field)
            if item != _STRING and item not in _SCALARS:
                raise self.error(field, f"unknown array item type {item}")
            min_bytes = 8 if item == _STRING else _SCALARS[item].itemsize
            count = self.count(field, min_bytes, most=self.array_items_left)
            self.array_items_left -= count
            return (
                self.strings(count, field) if item == _STRING else self.scalars(item, count, field)
            )
        if kind in _SCALARS:
            return self.scalars(kind, 1, field)[0]
        raise self.error(field, f"unknown value type {kind}")

    def version(self) -> int:
        version = self.u32("version")
        if version not in (2, 3):
            if version.to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3"):
                raise self.error("version", "a big-endian file; only little-endian ones are read")
            raise self.error("version", f"got {version}, accepted: 2, 3")
        return version


def _read_metadata(reader: _HeaderReader, count: int) -> tuple[dict[str, Any], dict[str, slice]]:
    """The values by key, and where in the file key and value stand."""
    metadata: dict[str, Any] = {}
    places: dict[str, slice] = {}
    for i in range(count):
        start = reader.pos
        key = reader.string(f"metadata key {i}")
        if key in metadata:
            raise reader.error(key, "the key occurs twice")
        metadata[key] = reader.value(key)
        places[key] = slice(start, reader.pos)
    return metadata, places


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(
            f"{path}: general.alignment: got {alignment!r:.80}, accepted: a power of two from 8 up"
        )
    return alignment


def _read_tensors(reader: _HeaderReader, count: int, alignment: int) -> dict[str, GGUFTensor]:
    tensors: dict[str, GGUFTensor] = {}
    for i in range(count):
        name = reader.string(f"name of tensor {i}")
        if name in tensors:
            raise reader.error(f"tensor {name!r}", "the name occurs twice")
        tensors[name] = _read_tensor(reader, name, alignment)
    data_start = -(-reader.pos // alignment) * alignment
    size = len(reader.data)
    placed: dict[str, GGUFTensor] = {}
    for name, tensor in tensors.items():
        offset = data_start + tensor.offset
        if offset + tensor.nbytes > size:
            raise reader.error(
                f"tensor {name!r}",
                f"{tensor.nbytes} bytes at offset {offset} reach past the end of the file ({size})",
            )
        placed[name] = GGUFTensor(name, tensor.type, tensor.shape, offset)
    previous: GGUFTensor | None = None
    for tensor in sorted(placed.values(), key=lambda t: t.offset):
        if previous is not None and tensor.offset < previous.offset + previous.nbytes:
            raise reader.error(
                f"tensor {tensor.name!r}", f"its data overlaps those of {previous.name!r:.80}"
            )
        previous = tensor
    return placed


def _read_tensor(reader: _HeaderReader, name: str, alignment: int) -> GGUFTensor:
    """One entry of the tensor table; the offset is still relative to the data section."""
    field = f"tensor {name!r}"
    if not 1 <= (num_dims := reader.u32(field)) <= _MAX_DIMS:
        raise reader.error(field, f"got {num_dims} dimensions, accepted: 1 to {_MAX_DIMS}")
    shape = tuple(reader.u64(field) for _ in range(num_dims))[::-1]
    if 0 in shape:
        raise reader.error(field, f"shape {list(shape)} has an empty dimension")
    kind, offset = reader.u32(field), reader.u64(field)
    if (block := BLOCK_TYPES.get(kind)) is None:
        raise _unknown_type(reader, field, kind)
    try:
        block.row_nbytes(shape[-1])
    except ValueError as error:
        raise reader.error(field, str(error)) from None
    if offset % alignment:
        raise reader.error(field, f"offset {offset} is not a multiple of {alignment}")
    return GGUFTensor(name, block, shape, offset)


def _unknown_type(reader: _HeaderReader, field: str, kind: int) -> Exception:
    from gguf import GGMLQuantizationType

    accepted = ", ".join(block.name for block in BLOCK_TYPES.values())
    try:
        name = GGMLQuantizationType(kind).name
    except ValueError:
        return reader.error(field, f"unknown tensor type {kind}, accepted: {accepted}")
    return NotImplementedError(
        f"{reader.path}: {field}: type {name} is not supported, accepted: {accepted}"
    )


# ---- checkpoints ----

_PART = re.compile(r"(?P<stem>.+)-(?P<no>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAMES = {hf: gguf for gguf, hf in _HF_NAMES.items()}
_TENSOR_NAME = re.compile(r"(?:blk\.(?P<layer>0|[1-9][0-9]{0,4})\.)?(?P<module>\w+)\.weight")
_GLOBAL_MODULES = ("token_embd", "output_norm", "output")
_ROPE_FREQS = "rope_freqs.weight"


def part_paths(path: Path) -> list[Path]:
    """All files of the split GGUF that ``path`` is a part of, in order; ``[path]`` if unsplit.

    Part 1 holds the metadata. The files are not looked at.
    """
    path = Path(path)
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["no"]) <= count:
        raise ValueError(f"{path}: the name says part {match['no']} of {match['count']}")
    return [
        path.with_name(f"{match['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    ]


class GGUFCheckpoint:
    """A Llama-shaped model in a GGUF file or in all parts of a split one (see Checkpoint).

    ``files`` are the parts, in order; ``metadata`` is that of the first. Of Q and K, whose rows the
    converter to GGUF permutes for consecutive RoPE pairs, loading restores the half-split order of
    Hugging Face.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.files = files = _open_parts(self.path)
        self.metadata = files[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._stored: dict[str, tuple[GGUFFile, str]] = {}  # by Hugging Face name
        rope_freqs: list[float] | None = None
        unknown: list[str] = []
        for file, tensor in _all_tensors(files):
            if tensor.name == _ROPE_FREQS:
                rope_freqs = _read_vector(file, tensor)
                continue
            name = _hf_name(tensor.name)
            if name is None:
                unknown.append(f"{file.path}: tensor {tensor.name!r:.80}")
                continue
            self._stored[name] = file, tensor.name
            self.tensors[name] = TensorInfo(
                name, tensor.type.name, tensor.shape, tensor.nbytes, file.path
            )
        self.config = ModelConfig.from_gguf(
            self.metadata, self.tensors, str(files[0].path), rope_freqs
        )
        if unknown:  # of another architecture, which the config would have named, it is no news
            raise NotImplementedError(
                f"{unknown[0]} is not part of a Llama model without biases, the only kind supported"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> GGUFCheckpoint:
        """Itself: nothing in it changes, and copies of a model may share the open files."""
        return self

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See Checkpoint.load. Quantised types are decoded as gguf.quants does, then rounded."""
        info = check_load(self, name, dtype)
        file, stored_name = self._stored[name]
        rows = file.rows(stored_name)
        if heads := self._permuted_heads(name):
            rows = _unpermute_rows(rows, heads, info)
        if stored_dtype := TORCH_DTYPES.get(info.type):
            return convert(torch.from_numpy(rows).view(stored_dtype).view(info.shape), dtype, info)
        return _dequantize(rows, dtype, info)

    def load_quantized(
        self, name: str, *, interleaved: bool = False, allow_nonfinite: bool = False
    ) -> QuantizedTensor:
        """See Checkpoint.load_quantized."""
        info = check_load_quantized(self, name)
        file, stored_name = self._stored[name]
        rows = file.rows(stored_name)
        blocks = torch.from_numpy(rows)
        if not allow_nonfinite:
            check_scales(blocks, info)
        if (heads := self._permuted_heads(name)) and not interleaved:
            blocks = torch.from_numpy(_unpermute_rows(rows, heads, info))
        return QuantizedTensor(blocks, info.type, info.shape)

    def copies(self, name: str, dtype: torch.dtype) -> bool:
        """See Checkpoint.copies."""
        return TORCH_DTYPES.get(self.tensors[name].type) != dtype or self._permuted_heads(name) > 0

    def ram_needed(
        self, dtype: torch.dtype, *, keep_quantized: bool = False, interleaved: bool = False
    ) -> int:
        """See Checkpoint.ram_needed."""
        total = 0
        for name, info in self.tensors.items():
            if keep_quantized and info.is_quantized_matrix:
                total += 0 if interleaved or not self._permuted_heads(name) else info.nbytes
            elif self.copies(name, dtype):
                total += info.numel * dtype.itemsize
        return total

    def _permuted_heads(self, name: str) -> int:
        """Number of heads whose rows the converter permuted; 0 for other weights."""
        if name.endswith("self_attn.q_proj.weight"):
            return self.config.num_attention_heads
        if name.endswith("self_attn.k_proj.weight"):
            return self.config.num_key_value_heads
        return 0


def _open_parts(path: Path) -> list[GGUFFile]:
    """The files of a checkpoint, held against what their names and metadata say of the split."""
    require_file(path)
    paths = part_paths(path)
    for no, part in enumerate(paths, start=1):
        if not part.exists():
            raise FileNotFoundError(f"{part}: part {no} of {len(paths)} is missing")
    files = [GGUFFile(part) for part in paths]
    if len(files) > 1:
        for no, file in enumerate(files):
            _expect(file, "split.count", len(files))
            _expect(file, "split.no", no)
    elif (count := files[0].metadata.get("split.count", 1)) not in (0, 1):
        raise ValueError(
            f"{path}: split.count: the file is one of {count!r:.80} parts; "
            "their names must end in -00001-of-0000N.gguf"
        )
    total = sum(len(file.tensors) for file in files)
    _expect(files[0], "split.tensors.count", total, default=total)
    return files


def _expect(file: GGUFFile, key: str, expected: int, default: int | None = None) -> None:
    if (got := file.metadata.get(key, default)) != expected:
        raise ValueError(f"{file.path}: {key}: got {got!r:.80}, expected {expected}")


def _all_tensors(files: list[GGUFFile]) -> Iterator[tuple[GGUFFile, GGUFTensor]]:
    seen: dict[str, GGUFFile] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if name in seen:
                raise ValueError(f"{file.path}: tensor {name!r:.80} is also in {seen[name].path}")
            seen[name] = file
            yield file, tensor


def _hf_name(name: str) -> str | None:
    """The Hugging Face name of a tensor: blk.3.ffn_up.weight is model.layers.3.mlp.up_proj.weight.

    None for a tensor that no Llama has.
    """
    match = _TENSOR_NAME.fullmatch(name)
    if match is None or (module := _HF_NAMES.get(match["module"])) is None:
        return None
    layer = match["layer"]
    if (layer is None) != (match["module"] in _GLOBAL_MODULES):
        return None
    return f"{module}.weight" if layer is None else f"model.layers.{layer}.{module}.weight"


def gguf_name(name: str) -> str:
    """The inverse of `_hf_name`, for the names in ModelConfig.weight_shapes."""
    module = name.removesuffix(".weight")
    if (match := re.fullmatch(r"model\.layers\.([0-9]+)\.(.+)", module)) is not None:
        return f"blk.{match[1]}.{_GGUF_NAMES[match[2]]}.weight"
    return f"{_GGUF_NAMES[module]}.weight"


def _read_vector(file: GGUFFile, tensor: GGUFTensor) -> list[float]:
    if tensor.type.name != "F32" or len(tensor.shape) != 1:
        raise ValueError(
            f"{file.path}: tensor {tensor.name!r}: got {tensor.type.name} {list(tensor.shape)}, "
            "accepted: an F32 vector"
        )
    return file.rows(tensor.name).view("<f4").ravel().tolist()


def _unpermute_rows(
    rows: npt.NDArray[np.uint8], heads: int, info: TensorInfo
) -> npt.NDArray[np.uint8]:
    """Undo the row order of llama.cpp's converter, on stored bytes: blocks run along the columns.

    The converter interleaves the two halves of every head, so that RoPE pairs become neighbours:
    stored row (head, i, half) is row (head, half, i) of the Hugging Face matrix.
    """
    if len(info.shape) != 2 or len(rows) % (2 * heads):
        raise ValueError(
            f"{info.file}: tensor {info.name!r}: shape {list(info.shape)} does not divide into "
            f"{heads} heads of even size"
        )
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _dequantize(rows: npt.NDArray[np.uint8], dtype: torch.dtype, info: TensorInfo) -> torch.Tensor:
    """Decode packed rows, uint8 [rows, row bytes], into a new tensor of ``dtype``, in chunks."""
    block = QUANT_TYPES[info.type]
    packed = torch.from_numpy(rows).view(-1)
    step = _CHECK_ELEMENTS // block.elements * block.nbytes
    out = torch.empty(info.numel, dtype=dtype)
    for i, start in enumerate(range(0, len(packed), step)):
        chunk = decode(packed[start : start + step], info.type, torch.float32)
        low, high = chunk.aminmax()
        check_finite(float(low), float(high), dtype, info)
        out[i * _CHECK_ELEMENTS :][: len(chunk)] = chunk
    return out.view(info.shape)
