"""PackedQuantizedTensor: a quantised matrix in the order in which the CUDA kernels read it.

Packing happens in host memory and moves bits only: `unpack` gives the blocks back as they were.
csrc/quant/quant_layout.h draws the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from minitron_kernels import _native, cpu_ops
from minitron_kernels.block_types import GGML_NUMBERS, block_type
from minitron_kernels.quantized import QuantizedTensor

Tensor = torch.Tensor


def packed_bytes(quant_type: str, shape: Sequence[int]) -> int:
    """Size of a packed matrix [N, K]; at most 3 % more than its blocks if K is a multiple of 64."""
    rows, cols = shape
    block_type(quant_type).row_nbytes(cols)  # names what is wrong with them
    size: int = _native.quant_packed_bytes(GGML_NUMBERS[quant_type], rows, cols)
    return size


class PackedQuantizedTensor(torch.Tensor):
    """A matrix [N, K] of ``quant_type`` as ``tiles``, uint8 [packed_bytes], on any device.

    `pack` makes one. Like QuantizedTensor it can be a parameter, be copied, moved and compared, and
    nothing else; modules that hold one have the blocks it was made of in their state dicts.

    Raises TypeError for tiles that are not uint8, ValueError for an unknown type and a wrong size.
    """

    tiles: Tensor
    quant_type: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, tiles: Tensor, quant_type: str, shape: Sequence[int]) -> PackedQuantizedTensor:
        if not isinstance(tiles, Tensor) or tiles.dtype != torch.uint8:
            got = tiles.dtype if isinstance(tiles, Tensor) else type(tiles).__name__
            raise TypeError(f"tiles must be a uint8 tensor, got {got}")
        if len(shape) != 2:
            raise ValueError(f"shape must be [N, K], got {list(shape)}")
        expected = packed_bytes(quant_type, shape)
        if tuple(tiles.shape) != (expected,) or not tiles.is_contiguous():
            raise ValueError(
                f"tiles must be {expected} adjoining bytes for a {quant_type} matrix "
                f"{list(shape)}, got {list(tiles.shape)}"
            )
        self = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.uint8, device=tiles.device
        )
        self.tiles, self.quant_type = tiles, quant_type
        return self

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Stored bytes."""
        return self.tiles.nbytes

    def data_ptr(self) -> int:
        """Raises TypeError: there is no array of N x K elements, and tiles.data_ptr() is meant."""
        raise TypeError("a PackedQuantizedTensor has no data of its own: take tiles.data_ptr()")

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        rows, cols = self.shape
        kind = "Parameter of " if isinstance(self, torch.nn.Parameter) else ""
        return (
            f"{kind}PackedQuantizedTensor({self.quant_type}, {rows}x{cols}, "
            f"{self.nbytes / 2**20:.2f} MiB, device='{self.device}')"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedQuantizedTensor:
        if id(self) not in memo:
            copy: Any = _like(self, self.tiles.clone())
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, requires_grad=False)
            memo[id(self)] = copy
        result: PackedQuantizedTensor = memo[id(self)]
        return result

    def __tensor_flatten__(self) -> tuple[list[str], str]:
        return ["tiles"], self.quant_type

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], quant_type: str, shape: Any, stride: Any
    ) -> PackedQuantizedTensor:
        return PackedQuantizedTensor(inner["tiles"], quant_type, shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None or not (args and isinstance(args[0], PackedQuantizedTensor)):
            raise TypeError(
                f"{func} does not take a PackedQuantizedTensor, which the kernels read: pass "
                "unpack(w).dequantize(dtype), or use an operation of minitron_kernels"
            )
        return handler(func, *args, **(kwargs or {}))


def _like(w: PackedQuantizedTensor, tiles: Tensor) -> PackedQuantizedTensor:
    with torch.inference_mode(w.is_inference()):  # a view must be of its tensor's kind
        return PackedQuantizedTensor(tiles, w.quant_type, w.shape)


def _on_tiles(func: Any, w: PackedQuantizedTensor, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("memory_format", None)
    if kwargs.pop("dtype", None) not in (None, torch.uint8):
        raise TypeError(f"a PackedQuantizedTensor cannot change its dtype ({func})")
    return _like(w, func(w.tiles, *args, **kwargs))


def _to(func: Any, w: PackedQuantizedTensor, *args: Any, **kwargs: Any) -> PackedQuantizedTensor:
    """As QuantizedTensor's."""
    moved: PackedQuantizedTensor = _on_tiles(func, w, *args, **kwargs)
    return w if moved.tiles is w.tiles else moved


def _check_same(w: PackedQuantizedTensor, other: Any) -> None:
    if not isinstance(other, PackedQuantizedTensor):
        raise TypeError(f"expected a PackedQuantizedTensor, got {type(other)}")
    if (other.quant_type, other.shape) != (w.quant_type, w.shape):
        raise ValueError(
            f"{other.quant_type} {list(other.shape)} and {w.quant_type} {list(w.shape)} differ: "
            "types and shapes must be equal"
        )


def _copy(
    func: Any, w: PackedQuantizedTensor, other: Any, non_blocking: bool = False
) -> PackedQuantizedTensor:
    _check_same(w, other)
    w.tiles.copy_(other.tiles, non_blocking)
    return w


def _equal(func: Any, w: PackedQuantizedTensor, other: Any) -> bool:
    _check_same(w, other)
    return torch.equal(w.tiles, other.tiles)


_aten = torch.ops.aten
_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _on_tiles,
    _aten.alias.default: _on_tiles,
    _aten.clone.default: _on_tiles,
    _aten.empty_like.default: _on_tiles,
    _aten._to_copy.default: _on_tiles,
    _aten.to.dtype_layout: _to,
    _aten.copy_.default: _copy,
    _aten.equal.default: _equal,
}


# ---- packing ----


def pack(
    w: QuantizedTensor,
    up: QuantizedTensor | None = None,
    device: torch.device | None = None,
) -> PackedQuantizedTensor:
    """The tiles of ``w``, on ``device`` (None: where w is).

    With ``up``, of w's type and shape [I, K]: of the matrix [2I, K] with row i of w as row 2i and
    row i of up as row 2i + 1.
    """
    rows, cols = w.shape
    if up is not None:
        if (up.quant_type, up.shape) != (w.quant_type, w.shape):
            raise ValueError(
                f"gate {w.quant_type} {list(w.shape)} and up {up.quant_type} {list(up.shape)} "
                "must both be [I, H] of one type"
            )
        rows *= 2
    tiles = torch.empty(packed_bytes(w.quant_type, (rows, cols)), dtype=torch.uint8)
    blocks = [each.blocks.cpu() for each in (w, up) if each is not None]
    _move(_native.quant_pack, blocks, tiles, w.quant_type, (rows, cols))
    target = w.device if device is None else device
    return PackedQuantizedTensor(tiles.to(target), w.quant_type, (rows, cols))


def unpack(w: PackedQuantizedTensor) -> QuantizedTensor:
    """The blocks that `pack` was given, on w's device."""
    return _unpack(w, 1)[0]


def unpack_pair(w: PackedQuantizedTensor) -> tuple[QuantizedTensor, QuantizedTensor]:
    """The two matrices that `pack` was given."""
    gate, up = _unpack(w, 2)
    return gate, up


def _unpack(w: PackedQuantizedTensor, count: int) -> list[QuantizedTensor]:
    rows, cols = w.shape
    shape = (rows // count, block_type(w.quant_type).row_nbytes(cols))
    blocks = [torch.empty(shape, dtype=torch.uint8) for _ in range(count)]
    _move(_native.quant_unpack, blocks, w.tiles.cpu(), w.quant_type, (rows, cols))
    return [
        QuantizedTensor(each.to(w.device), w.quant_type, (rows // count, cols)) for each in blocks
    ]


def _move(
    function: Callable[..., None],
    blocks: list[Tensor],
    tiles: Tensor,
    quant_type: str,
    shape: tuple[int, int],
) -> None:
    """mk_quant_pack or mk_quant_unpack of host memory."""
    rows, cols = shape
    up = blocks[1] if len(blocks) > 1 else None
    function(
        blocks[0].data_ptr(),
        tiles.data_ptr(),
        blocks[0].shape[1],
        GGML_NUMBERS[quant_type],
        rows,
        cols,
        cpu_ops.num_threads(),
        blocks_up=0 if up is None else up.data_ptr(),
        row_up_bytes=0 if up is None else up.shape[1],
    )
