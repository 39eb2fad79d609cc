"""The weights in a .nemo archive, under Megatron's names, as views of the mapped files.

They come in one of these forms:

    model_weights.ckpt                        one file of torch.save
    mp_rank_00/model_weights.ckpt, ...        one per rank of a tensor-parallel run
    model_weights/.metadata, __0_0.distcp     torch.distributed's checkpoint, layers stacked
    model_weights/NAME/.zarray, 0.0.0, ...    zarr arrays, layers stacked

`torch.load(weights_only=True)` reads files of torch.save onto the meta device, which runs nothing
and tells where in the file each tensor lies. The index of a torch.distributed checkpoint, which it
does not read, is read as inert records. A zip with compressed parts is refused: it could expand.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt
import torch

from minitron_kernels.loaders.nemo_archive import Member

WEIGHTS, SHARDED = "model_weights.ckpt", "model_weights"

_MAX_HEADER_BYTES = 1 << 20
_MAX_PICKLE_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor of one rank; ``load`` gives it as stored, in its shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    is_view: bool = True  # of a mapped file, so that loading allocates nothing


_RANK = re.compile(r"mp_rank_(\d+)/model_weights\.ckpt")
_PIPELINE_RANK = re.compile(r"tp_rank_\d+_pp_rank_\d+/.*")


def open_weights(
    members: Mapping[str, Member], config: Mapping[str, Any], path: Path
) -> list[dict[str, Stored]]:
    """The tensors of each tensor-parallel rank by Megatron's names, without "model."."""
    ranks = sorted(int(match[1]) for name in members if (match := _RANK.fullmatch(name)))
    if WEIGHTS in members:
        return [_torch_file(members[WEIGHTS], f"{path}: {WEIGHTS}")]
    if any(_PIPELINE_RANK.fullmatch(name) for name in members):
        raise NotImplementedError(
            f"{path}: one checkpoint per pipeline-parallel rank is not supported; NeMo's "
            "megatron_change_num_partitions.py writes it as one"
        )
    if ranks:
        size = config.get("tensor_model_parallel_size", len(ranks))
        if ranks != list(range(len(ranks))) or size != len(ranks):
            raise ValueError(
                f"{path}: has ranks {', '.join(map(str, ranks))}, model_config.yaml: "
                f"tensor_model_parallel_size is {size!r:.80}"
            )
        names = [name for name in sorted(members) if _RANK.fullmatch(name)]
        names.sort(key=lambda name: int(name.split("/")[0].removeprefix("mp_rank_")))
        return [_torch_file(members[name], f"{path}: {name}") for name in names]
    if any(name.startswith(f"{SHARDED}/") for name in members):
        return [_sharded(members, path)]
    raise ValueError(f"{path}: has no weights: neither {WEIGHTS}, mp_rank_00/ nor {SHARDED}/")


def _short_name(name: str) -> str:
    """Megatron's name: NeMo puts "model." before it, and "module." if weights are in bf16."""
    return name.removeprefix("model.").removeprefix("module.")


def _torch_file(member: Member, what: str) -> dict[str, Stored]:
    """The tensors of a file of torch.save, as views of it."""
    state = _torch_load(member, what)
    if not isinstance(state, dict):
        raise ValueError(f"{what}: must hold a dict of tensors, got {type(state).__name__}")
    data = member.map()
    return {
        _short_name(name): _stored(tensor, data, f"{what}: tensor {name}")
        for name, tensor in state.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }


def _torch_load(member: Member, what: str) -> Any:
    """What torch.save wrote there, its tensors on the meta device."""
    with member.path.open("rb") as file:
        window = _Window(file, member)
        _check_zip(window, member.size, what)
        window.seek(0)
        try:
            # Transformer Engine's state is a buffer of bytes; it is not looked into.
            with torch.serialization.safe_globals([io.BytesIO]):
                return torch.load(cast(IO[bytes], window), map_location="meta", weights_only=True)
        except Exception as error:
            reason = re.search(r"(Unsupported|GLOBAL|WeightsUnpickler)[^\n]*", str(error))
            told = reason[0] if reason else " ".join(str(error).split()) or repr(error)
            raise ValueError(f"{what}: cannot be read without running code: {told:.300}") from None


def _stored(tensor: torch.Tensor, data: npt.NDArray[np.uint8], what: str) -> Stored:
    """A tensor on the meta device as a view of the file that it was read from."""
    if not tensor.is_contiguous():
        raise NotImplementedError(f"{what:.200}: is stored transposed or with gaps")
    size = tensor.element_size()
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise NotImplementedError(
            f".nemo files need a torch.load that tells where tensors lie, as torch 2.13 has; this "
            f"is {torch.__version__}"
        )
    start = offset + tensor.storage_offset() * size
    if not 0 <= start <= start + tensor.nbytes <= len(data):
        raise ValueError(f"{what:.200}: lies outside of the file")
    part = data[start : start + tensor.nbytes]
    is_aligned = part.ctypes.data % size == 0

    def load() -> torch.Tensor:
        stored = part if is_aligned else part.copy()
        return torch.from_numpy(stored).view(tensor.dtype).view(tensor.shape)

    return Stored(tensor.dtype, tuple(tensor.shape), load, is_aligned)


class _Window(io.RawIOBase):
    """A member of the archive as a file of its own."""

    def __init__(self, file: IO[bytes], member: Member) -> None:
        self._file, self._member, self._at = file, member, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._member.size)[whence]
        if self._at < 0:
            raise ValueError("a position before the start")
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._member.size - self._at))
        self._file.seek(self._member.offset + self._at)
        data = self._file.read(count)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _check_zip(window: _Window, size: int, what: str) -> None:
    """torch.save compresses nothing and is little endian; then sizes are those of the file."""
    order = b"little"
    try:
        with zipfile.ZipFile(window) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.filename.endswith("/byteorder") and entry.file_size < 16:
                    order = archive.read(entry)
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, UnicodeError) as error:
        raise ValueError(f"{what}: not a file of torch.save, or truncated: {error}") from None
    for entry in entries:
        stored = entry.compress_type == zipfile.ZIP_STORED
        if not stored or entry.file_size != entry.compress_size or entry.file_size > size:
            raise ValueError(f"{what}: {entry.filename!r:.80} is compressed, or too large")
        if entry.filename.endswith(".pkl") and entry.file_size > _MAX_PICKLE_BYTES:
            raise ValueError(f"{what}: {entry.filename!r:.80} has {entry.file_size} bytes")
    if order != b"little":
        raise NotImplementedError(f"{what}: is not little endian")


# ---- sharded weights


@dataclass(frozen=True)
class _Piece:
    """A block of a tensor, which begins at ``offsets``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    is_view: bool = True


def _sharded(members: Mapping[str, Member], path: Path) -> dict[str, Stored]:
    """The tensors of a sharded checkpoint, those of stacked layers one by one."""
    if f"{SHARDED}/.metadata" in members:
        arrays = _distributed_arrays(members, path)
    else:
        arrays = _zarr_arrays(members, path)
    stored = {}
    for name, (shape, dtype, pieces) in arrays.items():
        what = f"{path}: tensor {name}"
        short = _short_name(name)
        if not _is_stacked(name):
            stored[short] = _joined(shape, dtype, pieces, what)
            continue
        by_layer: dict[int, list[_Piece]] = {}
        for piece in pieces:
            for i in range(piece.sizes[0] if piece.sizes else 0):
                load = _layer(piece.load, i)
                own = _Piece(piece.offsets[1:], piece.sizes[1:], load, piece.is_view)
                by_layer.setdefault(piece.offsets[0] + i, []).append(own)
        _, layers, rest = short.partition("decoder.layers.")
        for i, parts in by_layer.items():
            stored[f"{layers}{i}.{rest}"] = _joined(shape[1:], dtype, parts, what)
    return stored


def _is_stacked(name: str) -> bool:
    """Whether a tensor holds this weight of all layers."""
    _, layers, rest = _short_name(name).partition("decoder.layers.")
    return bool(layers) and not rest.split(".")[0].isdigit()


def _layer(load: Callable[[], torch.Tensor], index: int) -> Callable[[], torch.Tensor]:
    return lambda: load()[index]


def _joined(
    shape: tuple[int, ...], dtype: torch.dtype, pieces: Sequence[_Piece], what: str
) -> Stored:
    """The tensor that the pieces make up."""
    for piece in pieces:
        ends = [o + n for o, n in zip(piece.offsets, piece.sizes, strict=True)]
        if (
            len(ends) != len(shape)
            or min(piece.offsets, default=0) < 0
            or any(end > size for end, size in zip(ends, shape, strict=True))
        ):
            raise ValueError(f"{what:.200}: a piece lies outside of the shape {list(shape)}")
    if len(pieces) == 1 and pieces[0].sizes == shape:
        return Stored(dtype, shape, pieces[0].load, pieces[0].is_view)
    if len({p.offsets for p in pieces}) != len(pieces) or (
        sum(math.prod(p.sizes) for p in pieces) != math.prod(shape)
    ):
        raise ValueError(f"{what:.200}: pieces are missing, or there twice")

    def load() -> torch.Tensor:
        whole = torch.empty(shape, dtype=dtype)
        for piece in pieces:
            ranges = zip(piece.offsets, piece.sizes, strict=True)
            whole[tuple(slice(o, o + n) for o, n in ranges)] = piece.load()
        return whole

    return Stored(dtype, shape, load, is_view=False)


_Array = tuple[tuple[int, ...], torch.dtype, list[_Piece]]

_ZARR_TYPES = {"<f4": torch.float32, "<f2": torch.float16, "bfloat16": torch.bfloat16}


def _zarr_arrays(members: Mapping[str, Member], path: Path) -> dict[str, _Array]:
    """Shape, type and chunks of the zarr arrays (version 2) that are not compressed."""
    arrays: dict[str, _Array] = {}
    for header, member in members.items():
        match = re.fullmatch(rf"{SHARDED}/(.+)/\.zarray", header)
        if match is None:
            continue
        name, what = match[1], f"{path}: {header}"
        if not name.endswith("weight"):  # optimizer and Transformer Engine states
            continue
        try:
            head = json.loads(member.read(_MAX_HEADER_BYTES, what))
            shape, sizes = tuple(head["shape"]), tuple(head["chunks"])
            compressor, filters, order = head["compressor"], head["filters"], head["order"]
            dtype = _ZARR_TYPES[head["dtype"]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{what}: not a zarr header that is read here: {error!r}") from None
        if compressor is not None or filters or order != "C":
            raise NotImplementedError(f"{what}: compressed arrays are not read")
        if len(shape) != len(sizes) or not all(
            type(n) is int and n > 0 and s % n == 0
            for s, n in zip((*shape, *sizes), (*sizes, *sizes), strict=True)
        ):
            raise ValueError(f"{what}: shape {shape!r:.80} is not one of chunks {sizes!r:.80}")
        grid = [s // n for s, n in zip(shape, sizes, strict=True)]
        if math.prod(grid) > len(members):
            raise ValueError(f"{what}: chunks are missing")
        separator = head.get("dimension_separator", ".")
        pieces = []
        for index in np.ndindex(*grid):
            chunk = f"{SHARDED}/{name}/{separator.join(map(str, index)) or '0'}"
            if chunk not in members:
                raise ValueError(f"{path}: {chunk} is missing")
            if members[chunk].size != math.prod(sizes) * dtype.itemsize:
                raise ValueError(f"{path}: {chunk} has {members[chunk].size} bytes")
            offsets = tuple(int(i) * n for i, n in zip(index, sizes, strict=True))
            pieces.append(_Piece(offsets, sizes, _raw(members[chunk], dtype, sizes)))
        arrays[name] = shape, dtype, pieces
    if not arrays:
        raise ValueError(f"{path}: {SHARDED}/ holds neither .metadata nor arrays of zarr")
    return arrays


def _raw(member: Member, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    data = member.map()
    return lambda: torch.from_numpy(data).view(dtype).view(shape)


def _distributed_arrays(members: Mapping[str, Member], path: Path) -> dict[str, _Array]:
    """Shape, type and pieces of the tensors of a torch.distributed checkpoint.

    Its index is a pickle, of which the classes are replaced by records that do nothing; each piece
    is a file of torch.save inside a larger one.
    """
    what = f"{path}: {SHARDED}/.metadata"
    index = _read_records(members[f"{SHARDED}/.metadata"].read(_MAX_PICKLE_BYTES, what), what)
    arrays: dict[str, _Array] = {}
    try:
        for name, entry in index.state["state_dict_metadata"].items():
            if "chunks" in entry.state and name.endswith("weight"):
                arrays[name] = _sizes(entry.state["size"]), torch.float32, []
        for key, place in index.state["storage_data"].items():
            if key.state["fqn"] not in arrays:
                continue
            shape, _, pieces = arrays[key.state["fqn"]]
            file = members[f"{SHARDED}/{place.state['relative_path']}"]
            start, size = place.state["offset"], place.state["length"]
            if not 0 <= start <= start + size <= file.size:
                raise ValueError(f"{what}: a piece of {key.state['fqn']!r:.80} is not in its file")
            member = Member(file.path, file.offset + start, size)
            label = f"{path}: {place.state['relative_path']}: {key.state['fqn']}"
            tensor = _torch_load(member, label)
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{label:.200}: is no tensor")
            data, offsets = member.map(), _sizes(key.state["offset"])
            # Layer by layer, so that reading one does not copy all.
            parts = tensor.split(1) if tensor.ndim and _is_stacked(key.state["fqn"]) else [tensor]
            for i, part in enumerate(parts):
                stored = _stored(part, data, label)
                at = (offsets[0] + i, *offsets[1:]) if offsets else ()
                pieces.append(_Piece(at, stored.shape, stored.load, stored.is_view))
            arrays[key.state["fqn"]] = shape, tensor.dtype, pieces
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{what}: not the index of a checkpoint: {error!r:.200}") from None
    return arrays


def _sizes(value: Any) -> tuple[int, ...]:
    sizes = value.args[0] if isinstance(value, _Record) else value
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise TypeError(f"sizes must be integers, got {sizes!r:.80}")
    return tuple(sizes)


class _Record:
    """What stands for an object of a pickle: the arguments it was made of, and its state."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        return id(self)


# What an index names: anything else has no place there, although it would do nothing either.
_RECORD_PACKAGES = ("torch", "megatron", "pathlib", "collections")


def _read_records(data: bytes, what: str) -> _Record:
    """A pickle, without an import: every class and function in it becomes a class of records."""

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            # Python 3.11.0 to 3.11.3 write a member of an enumeration as getattr(class, name).
            is_member = (module, name) == ("builtins", "getattr")
            if module.split(".")[0] not in _RECORD_PACKAGES and not is_member:
                raise ValueError(f"{what}: names {module}.{name:.80}, which no index does")
            return type(name, (_Record,), {})

    try:
        index = Reader(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises whatever its operations do
        told = str(error) if str(error).startswith(what) else f"{what}: damaged: {error!r:.200}"
        raise ValueError(told) from None
    if not isinstance(index, _Record):
        raise ValueError(f"{what}: not the index of a checkpoint")
    return index
