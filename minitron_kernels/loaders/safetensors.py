"""Hugging Face checkpoint folders: config.json and safetensors, in one file or sharded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from minitron_kernels.config import ModelConfig
from minitron_kernels.loaders.checkpoint import (
    TORCH_DTYPES,
    FloatCheckpoint,
    TensorInfo,
    check_load,
    convert,
)
from minitron_kernels.loaders.files import MAX_JSON_BYTES, read_json_object, require_file

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsCheckpoint(FloatCheckpoint):
    """A folder with config.json and model.safetensors, or shards under an index (see Checkpoint).

    The safetensors library maps the files into memory (copy on write) and hands out views of them.
    Raises OSError for a missing folder or file, ValueError naming file and field for a corrupt
    file and for an index that does not match its shards or names files elsewhere, and
    NotImplementedError for tensor types other than F32, F16 and BF16.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = ModelConfig.from_hf(
            read_json_object(self.path / "config.json"), str(self.path / "config.json")
        )
        self.tensors: dict[str, TensorInfo] = {}
        self._handles: dict[Path, Any] = {}
        if (single := self.path / _SINGLE).exists():
            self._add(single, None)
        elif (index := self.path / _INDEX).exists():
            shards = _read_index(index)
            for shard, names in shards.items():
                if not (self.path / shard).is_file():
                    raise ValueError(f"{index}: weight_map: {shard}: no such file beside the index")
                self._add(self.path / shard, names)
            self._check_no_duplicates(shards)
        else:
            raise FileNotFoundError(
                f"{self.path}: neither {_SINGLE} nor {_INDEX} is there; it holds "
                f"{', '.join(sorted(p.name for p in self.path.iterdir())[:12])}"
            )

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See Checkpoint.load."""
        info = check_load(self, name, dtype)
        return convert(self._handles[info.file].get_tensor(name), dtype, info)

    def copies(self, name: str, dtype: torch.dtype) -> bool:
        """See Checkpoint.copies."""
        return TORCH_DTYPES[self.tensors[name].type] != dtype

    def _add(self, file: Path, names: list[str] | None) -> None:
        """Open a file and list its tensors: those called ``names``, or all."""
        handle = self._handles[file] = _open(file)
        stored = dict.fromkeys(handle.keys())
        for name in stored if names is None else names:
            if name not in stored:
                raise ValueError(
                    f"{file}: tensor {name!r:.80} is missing, which {_INDEX} says is here"
                )
            view = handle.get_slice(name)
            shape, kind = tuple(view.get_shape()), view.get_dtype()
            if kind not in TORCH_DTYPES:
                raise NotImplementedError(
                    f"{file}: tensor {name!r:.80}: type {kind} is not supported, "
                    f"accepted: {', '.join(TORCH_DTYPES)}"
                )
            nbytes = math.prod(shape) * TORCH_DTYPES[kind].itemsize
            self.tensors[name] = TensorInfo(name, kind, shape, nbytes, file)

    def _check_no_duplicates(self, shards: dict[str, list[str]]) -> None:
        for file, handle in self._handles.items():
            for name in set(handle.keys()).difference(shards[file.name]):
                if (info := self.tensors.get(name)) is not None:
                    raise ValueError(
                        f"{file}: tensor {name!r:.80} is here, and also in {info.file}, where "
                        f"{_INDEX} places it"
                    )


def _open(file: Path) -> Any:
    """A safetensors handle. The library checks the header: offsets, overlaps, shapes, types."""
    from safetensors import SafetensorError, safe_open

    require_file(file)
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    if size < 8 or header > min(size - 8, MAX_JSON_BYTES):
        raise ValueError(
            f"{file}: header of {header} bytes in a file of {size}: truncated, or not safetensors"
        )
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: corrupt safetensors header: {error}") from None


def _read_index(index: Path) -> dict[str, list[str]]:
    """Shard file name -> names of the tensors in it, from model.safetensors.index.json."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: must be an object that is not empty")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        # Only plain names: neither '../x' nor '/x' may make us open a file elsewhere.
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise ValueError(
                f"{index}: weight_map: {name!r:.80}: got {shard!r:.80}, accepted: the "
                "name of a .safetensors file in the same folder"
            )
        shards.setdefault(shard, []).append(name)
    return shards


def _is_plain_name(shard: str) -> bool:
    return shard.endswith(".safetensors") and shard.isprintable() and not set(shard) & set("/\\:")
