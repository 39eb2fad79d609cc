"""What a model asks of a checkpoint, whatever its format: names, shapes, types, and the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.config import ModelConfig
from minitron_kernels.devices import free_memory
from minitron_kernels.loaders.hub import is_nemo
from minitron_kernels.quantized import QuantizedTensor, nonfinite_scale_row

if TYPE_CHECKING:
    from minitron_kernels.parallel import Shard

# The types that GGUF and safetensors share, and that load() returns.
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """One stored weight, under its Hugging Face name."""

    name: str  # e.g. model.layers.0.self_attn.q_proj.weight
    type: str  # as stored: BF16, F16, F32, Q4_K, ...
    shape: tuple[int, ...]  # torch order: [out, in]
    nbytes: int  # as stored
    file: Path

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_quantized_matrix(self) -> bool:
        """Whether `Checkpoint.load_quantized` takes it."""
        return self.type in QUANT_TYPES and len(self.shape) == 2


class Checkpoint(Protocol):
    """An opened checkpoint: headers are read and checked, weights stay on disk until loaded."""

    path: Path
    config: ModelConfig
    tensors: dict[str, TensorInfo]

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The weight ``name`` as a contiguous CPU tensor of ``dtype`` and its stored shape.

        ``dtype`` is float32, float16 or bfloat16. Where the file stores just these bytes the
        tensor is a view of the memory-mapped file (private mapping: writing to it never reaches
        the file), and its values are not looked at; otherwise it is converted, and a value that
        is not finite in ``dtype`` raises ValueError. So does an unknown name.
        """
        ...

    def load_quantized(
        self, name: str, *, interleaved: bool = False, allow_nonfinite: bool = False
    ) -> QuantizedTensor:
        """The quantised matrix ``name`` as its stored blocks: a view of the memory-mapped file.

        The rows of Q and K of a GGUF file, where consecutive ones are a RoPE pair, are copied into
        Hugging Face's half-split order, unless ``interleaved`` asks for them as they are. Raises
        ValueError for a tensor that is no quantised matrix (see TensorInfo.is_quantized_matrix)
        and, unless ``allow_nonfinite``, for one with a block scale that is infinite or NaN.
        """
        ...

    def copies(self, name: str, dtype: torch.dtype) -> bool:
        """Whether `load` allocates the weight, and does not return a view of the mapped file."""
        ...

    def ram_needed(
        self, dtype: torch.dtype, *, keep_quantized: bool = False, interleaved: bool = False
    ) -> int:
        """Bytes that loading every tensor as ``dtype`` allocates (memory-mapped views: none).

        With ``keep_quantized``, of loading quantised matrices by `load_quantized`.
        """
        ...


class FloatCheckpoint(Checkpoint):
    """A checkpoint of a format that has no quantised matrices."""

    def load_quantized(
        self, name: str, *, interleaved: bool = False, allow_nonfinite: bool = False
    ) -> QuantizedTensor:
        """See Checkpoint.load_quantized: raises ValueError for every name."""
        info = check_load_quantized(self, name)
        raise AssertionError(f"{info.type} passed for a quantised type")

    def ram_needed(
        self, dtype: torch.dtype, *, keep_quantized: bool = False, interleaved: bool = False
    ) -> int:
        """See Checkpoint.ram_needed."""
        return sum(
            info.numel * dtype.itemsize
            for name, info in self.tensors.items()
            if self.copies(name, dtype)
        )


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder of config.json and safetensors, a GGUF file (any part of a split one) or .nemo.

    A folder with model_config.yaml in the place of config.json is an unpacked .nemo file.

    Raises OSError when the path is missing, ValueError for a corrupt or incomplete checkpoint
    and NotImplementedError for a model or tensor type this package has no code for.
    """
    path = Path(path)
    if is_nemo(path):
        from minitron_kernels.loaders.nemo import NemoCheckpoint

        return NemoCheckpoint(path)
    if path.is_dir():
        from minitron_kernels.loaders.safetensors import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: name the folder that holds it and its config.json instead")
    from minitron_kernels.loaders.gguf import GGUFCheckpoint

    return GGUFCheckpoint(path)


@dataclass(frozen=True)
class Weights:
    """The weights of a checkpoint as a model is to hold them.

    Quantised matrices stay as stored unless ``expand``; all else becomes ``dtype``.
    """

    checkpoint: Checkpoint
    dtype: torch.dtype
    expand: bool = False
    allow_nonfinite: bool = False
    shard: Shard | None = None  # the part that a process has of them (parallel.ShardWeights)

    def stays_quantized(self, name: str) -> bool:
        """Whether `load` gives a QuantizedTensor."""
        return not self.expand and self.checkpoint.tensors[name].is_quantized_matrix

    def is_interleaved(self, name: str) -> bool:
        """Whether `load` gives Q or K of a layer in the row order of GGUF: if both stay quantised.

        They can be used where they lie so, with ``Rope.interleaved``.
        """
        both = name.replace(".k_proj.", ".q_proj."), name.replace(".q_proj.", ".k_proj.")
        return all(self.stays_quantized(each) for each in both)

    def load(self, name: str) -> torch.Tensor:
        """The weight, on the CPU. Raises as Checkpoint.load and Checkpoint.load_quantized do."""
        keep = self.stays_quantized(name)
        is_quantized = self.checkpoint.tensors[name].is_quantized_matrix
        if not keep and not (is_quantized and self.allow_nonfinite):
            return self.checkpoint.load(name, self.dtype)
        matrix = self.checkpoint.load_quantized(
            name, interleaved=self.is_interleaved(name), allow_nonfinite=self.allow_nonfinite
        )
        return matrix if keep else matrix.dequantize(self.dtype)

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ValueError unless all weights are there, of these shapes. None is read."""
        for name, shape in shapes.items():
            info = self.checkpoint.tensors.get(name)
            if info is None:
                raise ValueError(f"{self.checkpoint.path}: tensor {name} is missing")
            if tuple(info.shape) != shape:
                raise ValueError(
                    f"{info.file}: tensor {name} has shape {list(info.shape)}, "
                    f"the config asks for {list(shape)}"
                )

    def nbytes(self) -> int:
        """Bytes of all weights as they are held, memory-mapped ones included."""
        return sum(
            info.nbytes if self.stays_quantized(name) else info.numel * self.dtype.itemsize
            for name, info in self.checkpoint.tensors.items()
        )

    def ram_needed(self) -> int:
        """Bytes of main memory that loading allocates (memory-mapped weights: none)."""
        return self.checkpoint.ram_needed(
            self.dtype, keep_quantized=not self.expand, interleaved=True
        )

    def free_memory(self, device: torch.device) -> int:
        """Bytes of a device's memory that the weights may take."""
        return free_memory(device)

    def check_memory(self, device: torch.device) -> None:
        """Raise MemoryError, naming need and have, when they do not fit on a device."""
        is_cpu = device.type == "cpu"
        need, have = self.ram_needed() if is_cpu else self.nbytes(), self.free_memory(device)
        if need > have:
            raise MemoryError(
                f"{self.checkpoint.path}: the weights as {dtype_name(self.dtype)} need "
                f"{need / 2**30:.1f} GiB of memory{'' if is_cpu else f' on {device}'}, and "
                f"{have / 2**30:.1f} GiB are available"
            )


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def check_load(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> TensorInfo:
    """The arguments of ``Checkpoint.load``, checked; returns what the checkpoint says of it."""
    if dtype not in TORCH_DTYPES.values():
        accepted = ", ".join(dtype_name(d) for d in TORCH_DTYPES.values())
        raise ValueError(f"dtype: got {dtype}, accepted: {accepted}")
    return _find(checkpoint, name)


def check_load_quantized(checkpoint: Checkpoint, name: str) -> TensorInfo:
    """The argument of ``Checkpoint.load_quantized``, checked."""
    info = _find(checkpoint, name)
    if not info.is_quantized_matrix:
        raise ValueError(
            f"{info.file}: tensor {name!r} is {info.type} {list(info.shape)}, not a quantised "
            f"matrix ({', '.join(QUANT_TYPES)})"
        )
    return info


def _find(checkpoint: Checkpoint, name: str) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise ValueError(f"{checkpoint.path}: no tensor {name!r}")
    return info


def convert(stored: torch.Tensor, dtype: torch.dtype, info: TensorInfo) -> torch.Tensor:
    """``stored`` itself if it is of ``dtype``, else a converted copy whose values are checked."""
    converted = stored.to(dtype)
    if converted is stored or not stored.numel():
        return converted
    low, high = converted.aminmax()  # one pass, no temporaries; NaN propagates
    check_finite(float(low), float(high), dtype, info)
    return converted


def check_finite(low: float, high: float, dtype: torch.dtype, info: TensorInfo) -> None:
    """Raise ValueError unless the extremes ``low`` and ``high`` are finite as ``dtype``."""
    limit = torch.finfo(dtype).max
    if not (-limit <= low and high <= limit):
        raise ValueError(
            f"{info.file}: tensor {info.name!r} ({info.type}) has values that are not finite "
            f"as {dtype_name(dtype)}: minimum {low}, maximum {high}"
        )


def check_scales(blocks: torch.Tensor, info: TensorInfo, first_row: int = 0) -> None:
    """Raise ValueError for a block scale that is infinite or NaN.

    ``blocks``: the stored rows of a quantised matrix from ``first_row`` on.
    """
    row = nonfinite_scale_row(blocks, info.type)
    check_scale_row(None if row is None else first_row + row, info)


def check_scale_row(row: int | None, info: TensorInfo) -> None:
    """Raise ValueError if there is a stored ``row`` with a scale that is infinite or NaN."""
    if row is not None:
        raise ValueError(
            f"{info.file}: tensor {info.name!r} ({info.type}): stored row {row} has a "
            "block scale that is not finite (allow_nonfinite loads it anyway)"
        )
