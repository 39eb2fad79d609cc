"""GGUF checkpoints: a model's weights, in one file or the parts of a split one.

Quantised matrices are expanded by `load`, or handed out as stored by `load_quantized`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.config import ModelConfig
from minitron_kernels.cpu_ops import num_threads
from minitron_kernels.loaders.checkpoint import (
    TORCH_DTYPES,
    TensorInfo,
    check_finite,
    check_load,
    check_load_quantized,
    check_scale_row,
    convert,
)
from minitron_kernels.loaders.gguf_file import GGUFFile, GGUFTensor, ScaleScan, open_parts
from minitron_kernels.quantized import QuantizedTensor, decode

# Elements decoded between two looks at whether they are finite.
_CHECK_ELEMENTS = 1 << 15

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


class GGUFCheckpoint:
    """A Llama-shaped model in a GGUF file or in all parts of a split one (see Checkpoint).

    ``files`` are the parts, in order; ``metadata`` is that of the first. Of Q and K, whose rows the
    converter to GGUF permutes for consecutive RoPE pairs, loading restores the half-split order of
    Hugging Face. Files that are open already, and a scan of their scales that has begun, may be
    given.
    """

    def __init__(
        self,
        path: Path,
        files: Sequence[GGUFFile] | None = None,
        scales: ScaleScan | None = None,
    ) -> None:
        self.path = Path(path)
        self.files = files = open_parts(self.path) if files is None else files
        self._scales = scales
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
            if self._scales is None:
                self._scales = ScaleScan(self.files, num_threads())
            check_scale_row(self._scales.first_row(stored_name), info)
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


def _all_tensors(files: Sequence[GGUFFile]) -> Iterator[tuple[GGUFFile, GGUFTensor]]:
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
