"""QuantizedTensor: a weight matrix in GGUF's blocks, exactly as a file stores them.

The ten block formats are ggml's (ggml/src/ggml-common.h); each decoder below draws its block. All
of them are row-wise: row i of the matrix is row i of the bytes, so that rows can be sliced,
gathered and permuted without decoding anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from minitron_kernels import _native
from minitron_kernels.block_types import GGML_NUMBERS, block_type
from minitron_kernels.cpu_ops import num_threads

Tensor = torch.Tensor


class QuantizedTensor(torch.Tensor):
    """A matrix [N, K] of ``quant_type``, held as the packed bytes ``blocks``, uint8 [N, row bytes].

    It is a torch.Tensor, so that it can be an nn.Parameter (requires_grad=False), live in a state
    dict, be saved, loaded and deep-copied, and move between devices with its module. Its dtype is
    uint8, what is stored: `module.half()` leaves it alone. These keep it packed:

        w[a:b]  w[ids]  w.index_select(0, ids)   rows; slices are views, gathers copy
        w.to(device)  w.clone()  w.detach()  w.copy_(other)  torch.equal(w, other)

    Everything else (arithmetic, w.float(), columns, ...) raises TypeError: nothing is ever expanded
    unless `dequantize` is called. ``==`` is identity. Ops that read the blocks take ``w.blocks``
    and ``w.quant_type``; torch.compile sees both, too.

    Raises TypeError for blocks that are not uint8, ValueError for an unknown type and for sizes
    that do not fit, naming both.
    """

    blocks: Tensor
    quant_type: str

    # Operators reach __torch_dispatch__ directly, in eager mode and under torch.compile.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, blocks: Tensor, quant_type: str, shape: Sequence[int]) -> QuantizedTensor:
        block = block_type(quant_type)
        if not isinstance(blocks, Tensor) or blocks.dtype != torch.uint8:
            got = blocks.dtype if isinstance(blocks, Tensor) else type(blocks).__name__
            raise TypeError(f"blocks must be a uint8 tensor, got {got}")
        if len(shape) != 2:
            raise ValueError(f"shape must be [N, K], got {list(shape)}")
        rows, cols = shape
        expected = (rows, block.row_nbytes(cols))
        if tuple(blocks.shape) != expected:
            raise ValueError(
                f"blocks must be {list(expected)} bytes for a {quant_type} matrix {list(shape)}, "
                f"got {list(blocks.shape)}"
            )
        if not blocks.is_contiguous():
            raise ValueError(f"blocks must be contiguous, got strides {blocks.stride()}")
        self = torch.Tensor._make_wrapper_subclass(
            cls, (rows, cols), dtype=torch.uint8, device=blocks.device
        )
        self.blocks, self.quant_type = blocks, quant_type
        return self

    @classmethod
    def empty(
        cls, quant_type: str, shape: Sequence[int], device: torch.device | str | None = None
    ) -> QuantizedTensor:
        """Uninitialised, for instance on the meta device."""
        rows, cols = shape
        row_nbytes = block_type(quant_type).row_nbytes(cols)
        blocks = torch.empty((rows, row_nbytes), dtype=torch.uint8, device=device)
        return cls(blocks, quant_type, shape)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix as a dense tensor: decoded in fp32 as ggml does, then rounded to ``dtype``.

        Works on any device; temporaries stay small.
        """
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be a floating-point type, got {dtype}")
        return decode(self.blocks, self.quant_type, dtype).view(self.shape)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Stored bytes."""
        return self.blocks.nbytes

    def data_ptr(self) -> int:
        """Raises TypeError: there is no array of N x K elements, and blocks.data_ptr() is meant."""
        raise TypeError("a QuantizedTensor has no data of its own: take blocks.data_ptr()")

    def share_memory_(self) -> QuantizedTensor:
        """Move the blocks to shared memory."""
        self.blocks.share_memory_()
        return self

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        rows, cols = self.shape
        kind = "Parameter of " if isinstance(self, torch.nn.Parameter) else ""
        return (
            f"{kind}QuantizedTensor({self.quant_type}, {rows}x{cols}, "
            f"{self.nbytes / 2**20:.2f} MiB, device='{self.device}')"
        )

    # -- copies and files --

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            copy = type(self)(self.blocks.clone(), self.quant_type, self.shape)
            memo[id(self)] = _as_parameter(copy, isinstance(self, torch.nn.Parameter))
        result: QuantizedTensor = memo[id(self)]
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        is_parameter = isinstance(self, torch.nn.Parameter)
        return rebuild, (self.blocks, self.quant_type, tuple(self.shape), is_parameter)

    # -- torch's protocols for subclasses --

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["blocks"], self.quant_type

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], quant_type: str, shape: Any, stride: Any
    ) -> QuantizedTensor:
        return QuantizedTensor(inner["blocks"], quant_type, shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None or not (args and isinstance(args[0], QuantizedTensor)):
            raise TypeError(
                f"{func} does not take a QuantizedTensor, which stays packed: pass "
                "w.dequantize(dtype), or use an operation of minitron_kernels"
            )
        return handler(func, *args, **(kwargs or {}))


def rebuild(
    blocks: Tensor, quant_type: str, shape: Sequence[int], is_parameter: bool
) -> QuantizedTensor:
    """What a pickled QuantizedTensor is made from again."""
    return _as_parameter(QuantizedTensor(blocks, quant_type, shape), is_parameter)


def _as_parameter(tensor: QuantizedTensor, is_parameter: bool) -> QuantizedTensor:
    if not is_parameter:
        return tensor
    parameter: Any = torch.nn.Parameter(tensor, requires_grad=False)
    return parameter


torch.serialization.add_safe_globals([rebuild])  # torch.load(weights_only=True) calls it


# ---- the operators that keep a matrix packed ----


def _like(w: QuantizedTensor, blocks: Tensor) -> QuantizedTensor:
    with torch.inference_mode(w.is_inference()):  # a view must be of its tensor's kind
        return QuantizedTensor(blocks, w.quant_type, (blocks.shape[0], w.shape[1]))


def _on_blocks(func: Any, w: QuantizedTensor, *args: Any, **kwargs: Any) -> QuantizedTensor:
    kwargs.pop("memory_format", None)
    if kwargs.pop("dtype", None) not in (None, torch.uint8):
        raise TypeError(
            f"a QuantizedTensor cannot change its dtype: dequantize(dtype) expands it ({func})"
        )
    return _like(w, func(w.blocks, *args, **kwargs))


def _to(func: Any, w: QuantizedTensor, *args: Any, **kwargs: Any) -> QuantizedTensor:
    """`w.to(...)` in inference mode, where it comes undivided: w itself if nothing changes."""
    moved = _on_blocks(func, w, *args, **kwargs)
    return w if moved.blocks is w.blocks else moved


def _slice(
    func: Any,
    w: QuantizedTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> QuantizedTensor:
    if dim % 2 == 1:
        if step != 1 or start not in (None, 0) or (end is not None and end < w.shape[1]):
            raise TypeError("a QuantizedTensor has rows only: columns cannot be sliced")
        return _like(w, w.blocks.view_as(w.blocks))
    return _like(w, func(w.blocks, 0, start, end, step).contiguous())


def _index_select(func: Any, w: QuantizedTensor, dim: int, index: Tensor) -> QuantizedTensor:
    if dim % 2 == 1:
        raise TypeError("a QuantizedTensor has rows only: columns cannot be selected")
    return _like(w, func(w.blocks, 0, index))


def _index(func: Any, w: QuantizedTensor, indices: list[Tensor | None]) -> QuantizedTensor:
    if len(indices) != 1 or indices[0] is None or indices[0].ndim != 1:
        raise TypeError("a QuantizedTensor takes one 1-D index tensor, of rows")
    return _like(w, func(w.blocks, indices))


def _copy(func: Any, w: QuantizedTensor, other: Any, non_blocking: bool = False) -> QuantizedTensor:
    if not isinstance(other, QuantizedTensor):
        raise TypeError(f"a QuantizedTensor can only be copied from one, got {type(other)}")
    if (other.quant_type, other.shape) != (w.quant_type, w.shape):
        raise ValueError(
            f"cannot copy {other.quant_type} {list(other.shape)} into "
            f"{w.quant_type} {list(w.shape)}: types and shapes must be equal"
        )
    w.blocks.copy_(other.blocks, non_blocking)
    return w


def _equal(func: Any, w: QuantizedTensor, other: Any) -> bool:
    if not isinstance(other, QuantizedTensor):
        raise TypeError(f"a QuantizedTensor can only be compared with one, got {type(other)}")
    same_kind = (other.quant_type, other.shape) == (w.quant_type, w.shape)
    return same_kind and torch.equal(w.blocks, other.blocks)


def _is_pinned(func: Any, w: QuantizedTensor, *args: Any, **kwargs: Any) -> bool:
    result: bool = func(w.blocks, *args, **kwargs)
    return result


_aten = torch.ops.aten
_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _on_blocks,
    _aten.alias.default: _on_blocks,
    _aten.clone.default: _on_blocks,
    _aten.empty_like.default: _on_blocks,
    _aten._to_copy.default: _on_blocks,
    _aten.to.dtype_layout: _to,
    _aten._pin_memory.default: _on_blocks,
    _aten.is_pinned.default: _is_pinned,
    _aten.slice.Tensor: _slice,
    _aten.index_select.default: _index_select,
    _aten.index.Tensor: _index,
    _aten.copy_.default: _copy,
    _aten.equal.default: _equal,
}


# ---- scales ----


def nonfinite_scale_row(blocks: Tensor, quant_type: str) -> int | None:
    """The first row of ``blocks`` (uint8 [N, row bytes], CPU) with an infinite or NaN scale.

    Only the scales are read: 2 to 4 bytes of a block.
    """
    block = block_type(quant_type)
    rows, row_nbytes = blocks.shape
    cols = row_nbytes // block.nbytes * block.elements
    matrix = blocks.data_ptr(), blocks.stride(0), rows, cols, GGML_NUMBERS[quant_type]
    (row,) = _native.cpu_nonfinite_scales([matrix], num_threads())
    return None if row < 0 else row


# ---- decoding ----

# Elements decoded at a time: temporaries stay in the L2 cache, and below torch's threshold for
# waking its thread pool, which costs more than the work.
_CHUNK_ELEMENTS = 1 << 15
_CHUNK_ELEMENTS_CUDA = 1 << 24


def decode(blocks: Tensor, quant_type: str, dtype: torch.dtype) -> Tensor:
    """Packed bytes of any shape, in whole blocks, to a vector of their weights, on their device."""
    block = block_type(quant_type)
    packed = blocks.reshape(-1, block.nbytes)
    out = torch.empty(len(packed) * block.elements, dtype=dtype, device=blocks.device)
    chunk = _CHUNK_ELEMENTS if blocks.device.type == "cpu" else _CHUNK_ELEMENTS_CUDA
    step = chunk // block.elements
    decoder = _DECODERS[quant_type]
    for start in range(0, len(packed), step):
        weights = decoder(packed[start : start + step])
        out[start * block.elements :][: weights.numel()].view_as(weights).copy_(weights)
    return out


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The half-precision number at a byte offset of every block: fp32 [n, 1]."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _bits(bytes_: Tensor, width: int, count: int) -> Tensor:
    """[n, groups, bytes] -> [n, groups, count, bytes]: the fields of ``width`` bits, lowest first.

    This is the order of every ggml type: a group's bytes hold first the low field of all its
    elements, then the next one.
    """
    shifts = torch.arange(0, width * count, width, dtype=torch.uint8, device=bytes_.device)
    return bytes_[:, :, None] >> shifts[:, None] & (1 << width) - 1


def _q4_0(b: Tensor) -> Tensor:  # d:2 | 16 bytes: elements 0-15 low, 16-31 high | w = d (q - 8)
    q = _bits(b[:, None, 2:], 4, 2).view(-1, 32)
    return _half(b, 0) * (q.float() - 8)


def _q4_1(b: Tensor) -> Tensor:  # d:2 m:2 | 16 bytes as in Q4_0 | w = d q + m
    q = _bits(b[:, None, 4:], 4, 2).view(-1, 32)
    return _half(b, 0) * q + _half(b, 2)


def _fifth_bits(b: Tensor) -> Tensor:  # bit j of the 32-bit word belongs to element j
    return _bits(b[..., None], 1, 8).view(-1, 32)


def _q5_0(b: Tensor) -> Tensor:  # d:2 | 4 bytes: fifth bits | 16 bytes as in Q4_0 | w = d (q - 16)
    q = _bits(b[:, None, 6:], 4, 2).view(-1, 32) | _fifth_bits(b[:, 2:6]) << 4
    return _half(b, 0) * (q.float() - 16)


def _q5_1(b: Tensor) -> Tensor:  # d:2 m:2 | 4 bytes: fifth bits | 16 bytes as in Q4_0 | w = d q + m
    q = _bits(b[:, None, 8:], 4, 2).view(-1, 32) | _fifth_bits(b[:, 4:8]) << 4
    return _half(b, 0) * q + _half(b, 2)


def _q8_0(b: Tensor) -> Tensor:  # d:2 | 32 int8 | w = d q
    return _half(b, 0) * b[:, 2:].contiguous().view(torch.int8)


def _q2_k(b: Tensor) -> Tensor:
    # 16 bytes: scale and min, 4 bits each, of 16 elements | 64 bytes: 2 x 32 bytes of 4 x 2 bits
    # | d:2 dmin:2 | w = d scale q - dmin min
    scale = (_half(b, 80) * (b[:, :16] & 15))[..., None]
    low = (_half(b, 82) * (b[:, :16] >> 4))[..., None]
    q = _bits(b[:, 16:80].reshape(-1, 2, 32), 2, 4).view(-1, 16, 16)
    return scale * q - low


def _q3_k(b: Tensor) -> Tensor:
    # 32 bytes: bit 8 * half + field of byte j is the third bit | 64 bytes as in Q2_K | 12 bytes:
    # 16 scales of 6 bits, biased by 32 | d:2 | w = d (scale - 32) (q - 4)
    packed = b[:, 96:108]
    low = _bits(packed[:, None, :8], 4, 2).view(-1, 16)
    high = _bits(packed[:, None, 8:], 2, 4).view(-1, 16)
    scale = (_half(b, 108) * ((low | high << 4).float() - 32))[..., None]
    third = _bits(b[:, None, :32], 1, 8).view(-1, 16, 16)
    q = _bits(b[:, 32:96].reshape(-1, 2, 32), 2, 4).view(-1, 16, 16) | third << 2
    return scale * (q.float() - 4)


def _scales_and_mins(b: Tensor) -> tuple[Tensor, Tensor]:
    # 12 bytes: 4 x (2 bits of scale 4-7, scale 0-3), 4 x (2 bits of min 4-7, min 0-3),
    # 4 x (low bits of min 4-7, low bits of scale 4-7); first fields are the high bits
    scale, low, both = b[:, :4], b[:, 4:8], b[:, 8:12]
    return (
        torch.cat((scale & 63, both & 15 | scale >> 2 & 48), 1),
        torch.cat((low & 63, both >> 4 | low >> 2 & 48), 1),
    )


def _q4_k(b: Tensor) -> Tensor:
    # d:2 dmin:2 | 12 bytes: 8 scales and mins | 128 bytes: 4 x 32 bytes of 2 x 4 bits
    # | w = d scale q - dmin min
    scale, low = _scales_and_mins(b[:, 4:16])
    q = _bits(b[:, 16:].reshape(-1, 4, 32), 4, 2).view(-1, 8, 32)
    return (_half(b, 0) * scale)[..., None] * q - (_half(b, 2) * low)[..., None]


def _q5_k(b: Tensor) -> Tensor:
    # as Q4_K, with 32 bytes before the low bits: bit i of byte j is the fifth of element 32 i + j
    scale, low = _scales_and_mins(b[:, 4:16])
    q = _bits(b[:, 48:].reshape(-1, 4, 32), 4, 2).view(-1, 8, 32)
    q = q | _bits(b[:, None, 16:48], 1, 8).view(-1, 8, 32) << 4
    return (_half(b, 0) * scale)[..., None] * q - (_half(b, 2) * low)[..., None]


def _q6_k(b: Tensor) -> Tensor:
    # 128 bytes: 2 x 64 bytes of 2 x 4 low bits | 64 bytes: 2 x 32 bytes of 4 x 2 high bits
    # | 16 int8 scales, of 16 elements each | d:2 | w = d scale (q - 32)
    low = _bits(b[:, :128].reshape(-1, 2, 64), 4, 2).view(-1, 16, 16)
    high = _bits(b[:, 128:192].reshape(-1, 2, 32), 2, 4).view(-1, 16, 16)
    scale = _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8)
    return scale[..., None] * ((low | high << 4).float() - 32)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
