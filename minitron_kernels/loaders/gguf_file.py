"""GGUF files: a bounds-checked header reader, over one or several files, and a look at all scales.

The format is that of ggml's docs/gguf.md. The header is read here and not by gguf.GGUFReader, which
trusts the counts and offsets it finds (a hostile file makes it allocate or crash) and needs 20 s
and more for a vocabulary of 131k tokens and 269k merges; this one checks all of them and needs
0.3 s. Nothing here needs torch, so that it can be done while torch is being imported.
"""

from __future__ import annotations

import mmap
import re
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_kernels import _native
from minitron_kernels.block_types import GGML_NUMBERS, QUANT_TYPES, BlockType
from minitron_kernels.loaders.files import require_file

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


# ---- several files ----

_PART = re.compile(r"(?P<stem>.+)-(?P<no>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")


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


def open_parts(path: Path) -> list[GGUFFile]:
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


# ---- scales ----

_MATRICES_A_CALL = 8  # after which a scan can be ended


class ScaleScan:
    """Looks for infinite and NaN scales in all quantised matrices of files, in a thread of its own.

    The thread needs the interpreter for a moment only, so that it may as well run while Python
    imports something. It begins when the thread ``after`` has ended.
    """

    def __init__(
        self, files: Sequence[GGUFFile], num_threads: int, after: threading.Thread | None = None
    ) -> None:
        self._found: dict[str, int] | None = None
        self._error: BaseException | None = None
        self._ends = False
        self._done = threading.Event()
        # A daemon: a program that ends early does not wait. It holds what it reads.
        self._thread = threading.Thread(
            target=self._run, args=(files, num_threads, after), name="scales", daemon=True
        )
        self._thread.start()

    def _run(
        self, files: Sequence[GGUFFile], num_threads: int, after: threading.Thread | None
    ) -> None:
        try:
            if after is not None:
                after.join()
            names, matrices, held = [], [], []
            for file in files:
                for name, tensor in file.tensors.items():
                    if tensor.type.name in QUANT_TYPES and len(tensor.shape) == 2:
                        held.append(data := file.rows(name))
                        names.append(name)
                        number = GGML_NUMBERS[tensor.type.name]
                        rows, row_nbytes = data.shape
                        where = data.ctypes.data, row_nbytes, rows
                        matrices.append((*where, tensor.shape[-1], number))
            found: list[int] = []
            while len(found) < len(matrices) and not self._ends:
                part = matrices[len(found) : len(found) + _MATRICES_A_CALL]
                found += _native.cpu_nonfinite_scales(part, num_threads)
            self._found = dict(zip(names, found, strict=False))
        except BaseException as error:  # for the thread that asks
            self._error = error
        finally:
            self._done.set()

    def first_row(self, name: str) -> int | None:
        """The first stored row of a tensor with such a scale; waits until all have been seen."""
        try:
            self._done.wait()  # unlike join(), which may be interrupted once only
        except BaseException:  # Ctrl-C; an interpreter that ended now would abort in the thread
            self._ends = True
            self._done.wait()
            raise
        if self._error is not None:
            raise self._error
        assert self._found is not None
        row = self._found[name]
        return None if row < 0 else row
