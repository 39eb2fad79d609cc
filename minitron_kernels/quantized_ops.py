"""The ops of `ops.py` on quantised weights, which are never expanded in memory.

A matrix comes as a QuantizedTensor, or as a PackedQuantizedTensor, which CUDA kernels read; blocks
on a GPU are packed at first use. The ops registered here take a matrix as torch.compile sees it:
its bytes (blocks are two-dimensional, tiles are not), its type and its number of rows. What mixes
quantised and dense matrices is composed in `ops.py`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from minitron_kernels import cuda_ops, cuda_quantized, torch_ops
from minitron_kernels.block_types import QUANT_TYPES, block_type
from minitron_kernels.checks import (
    check_cache,
    check_float,
    check_index,
    check_operands,
    check_out_dtype,
    check_positions,
    check_range,
    check_rope,
    check_shape,
    shape_of,
)
from minitron_kernels.cuda_quantized import Tiles
from minitron_kernels.library import Norm, Rope, op
from minitron_kernels.quant_packing import (
    PackedQuantizedTensor,
    pack,
    packed_bytes,
    unpack,
    unpack_pair,
)
from minitron_kernels.quantized import QuantizedTensor

Tensor = torch.Tensor
Matrix = QuantizedTensor | PackedQuantizedTensor
_MATRICES = (QuantizedTensor, PackedQuantizedTensor)

_log = logging.getLogger(__name__)


def is_quantized(w: object) -> TypeGuard[Matrix]:
    """Whether w is a QuantizedTensor or a PackedQuantizedTensor."""
    return isinstance(w, _MATRICES)


def _stored(w: Matrix) -> tuple[Tensor, str, int]:
    """Bytes, type and rows."""
    return w.blocks if isinstance(w, QuantizedTensor) else w.tiles, w.quant_type, w.shape[0]


def _check_matrix(name: str, x: Tensor, w: Tensor, kind: str, rows: int) -> None:
    """That ``w``, the stored bytes of a matrix [rows, K], can be multiplied with x [..., K]."""
    block = QUANT_TYPES.get(kind)
    if (  # part of every call: blocks that fit are found good first
        block is not None
        and x.ndim
        and w.shape == (rows, x.shape[-1] * block.nbytes // block.elements)
        and not x.shape[-1] % block.elements
        and w.dtype is torch.uint8
        and w.is_contiguous()
        and w.device == x.device
    ):
        return
    block = block_type(kind)
    if w.dtype != torch.uint8:
        raise TypeError(f"the bytes of {name} must be uint8, got {w.dtype}")
    if w.device != x.device:
        raise ValueError(f"{name} is on {w.device} but x is on {x.device}")
    if not w.is_contiguous() or (w.ndim != 1 and (w.ndim != 2 or w.shape[0] != rows)):
        raise ValueError(f"the blocks of {name} must be [{rows}, row bytes], got {shape_of(w)}")
    if x.ndim < 1:
        raise ValueError("x must have at least one dimension")
    if w.ndim == 1:
        if w.numel() != packed_bytes(kind, (rows, x.shape[-1])):
            raise ValueError(
                f"{name}, {w.numel()} bytes of {kind} tiles, is no matrix of {rows} rows of the "
                f"last dimension of x ({shape_of(x)})"
            )
        return
    cols = w.shape[1] // block.nbytes * block.elements
    if x.shape[-1] != cols or w.shape[1] % block.nbytes:
        raise ValueError(
            f"the last dimension of x ({shape_of(x)}) must be {name}'s K = {cols} ({kind})"
        )


_tiles_of_blocks = WeakTensorKeyDictionary()


@functools.cache
def _log_packing() -> None:
    _log.warning(
        "quantised weights on a GPU are packed at first use, and both forms are kept: "
        "model.pack() packs a model without"
    )


def _tiles(w: Tensor, kind: str, rows: int, cols: int) -> Tiles:
    """The matrix as the kernels read it; what is packed here lives as long as the blocks."""
    if w.ndim == 1:
        return Tiles(w, kind, rows)
    version = 0 if w.is_inference() else w._version
    packed_version, packed = _tiles_of_blocks.get(w, (None, None))
    if packed is None or packed_version != version:
        _log_packing()
        packed = pack(QuantizedTensor(w, kind, (rows, cols)))
        _tiles_of_blocks[w] = version, packed
    return Tiles(packed.tiles, kind, rows)


def _blocks(w: Tensor, kind: str, rows: int, cols: int) -> Tensor:
    """The matrix as PyTorch decodes it."""
    return w if w.ndim == 2 else unpack(PackedQuantizedTensor(w, kind, (rows, cols))).blocks


def _check_products(
    x: Tensor,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    matrices: Sequence[tuple[str, Tensor, str, int]],
) -> None:
    """``matrices``: name, bytes, type and rows of each."""
    check_operands(x, residual, norm_weight)
    for name, w, kind, rows in matrices:
        _check_matrix(name, x, w, kind, rows)


def check_int8_activations(x: Tensor) -> None:
    """Raise ValueError unless activations x can be rounded to 8 bits."""
    if not x.is_cpu:
        raise ValueError(f"int8_activations is for CPU tensors, but x is on {x.device}")


# ----------------------------------------------------------------------------------------- linear


def linear(
    x: Tensor,
    w: Matrix,
    residual: Tensor | None,
    norm: Norm | None,
    out_dtype: torch.dtype | None,
    int8_activations: bool = False,
) -> Tensor:
    """See ops.linear."""
    weight, eps = norm if norm is not None else (None, 0.0)
    return _linear(x, *_stored(w), residual, weight, eps, out_dtype, int8_activations)


def _fake_linear(
    x: Tensor,
    w: Tensor,
    kind: str,
    rows: int,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    int8_activations: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=out_dtype)


@op(
    "linear_quant(Tensor x, Tensor w, str kind, SymInt rows, Tensor? residual, "
    "Tensor? norm_weight, float eps, ScalarType? out_dtype, bool int8_activations=False) -> Tensor",
    _fake_linear,
)
def _linear(
    x: Tensor,
    w: Tensor,
    kind: str,
    rows: int,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
    int8_activations: bool = False,
) -> Tensor:
    if int8_activations:
        check_int8_activations(x)
    _check_products(x, norm_weight, residual, [("w", w, kind, rows)])
    shape = (*x.shape[:-1], rows)
    if residual is not None:
        check_shape("residual", residual, shape)
    out_dtype = check_out_dtype(x, out_dtype, residual)
    cols = x.shape[-1]
    if cuda_ops.serves(x):
        tiles = _tiles(w, kind, rows, cols)
        x, norm_weight = cuda_quantized.normed(x, norm_weight, eps)
        return cuda_quantized.linear(x, tiles, residual, norm_weight, eps, out_dtype)
    x = x.reshape(-1, cols)
    if norm_weight is not None:
        x = torch_ops.rms_norm(x, norm_weight, eps)
    add = None if residual is None else residual.reshape(-1, rows)
    w = _blocks(w, kind, rows, cols)
    y = torch_ops.matmul_quant(
        x, w, kind, add=add, out_dtype=out_dtype, int8_activations=int8_activations
    )
    return y.view(shape)


def linear_stored(x: Tensor, w: Tensor, kind: str, rows: int) -> Tensor:
    """x [..., K] @ w^T of a matrix by its stored bytes (blocks or tiles), type and rows.

    For runtimes whose compilers take plain tensors only.
    """
    return _linear(x, w, kind, rows, None, None, 0.0, None)


# ----------------------------------------------------------------------------------------- swiglu


def linear_swiglu(
    x: Tensor,
    gate: Matrix,
    up: Matrix | None,
    norm: Norm | None,
    int8_activations: bool = False,
) -> Tensor:
    """silu(gate(x)) * up(x) of x [T, H], normalised first where asked -> [T, I].

    ``up`` None: gate is packed with it (`quant_packing.pack`). The result is rounded once.
    """
    weight, eps = norm if norm is not None else (None, 0.0)
    w, kind, rows = _stored(gate)
    if up is None:
        return _linear_swiglu(x, w, kind, None, kind, rows // 2, weight, eps, int8_activations)
    if gate.shape != up.shape:
        raise ValueError(f"gate {shape_of(gate)} and up {shape_of(up)} must both be [I, H]")
    return _linear_swiglu(x, w, kind, *_stored(up), weight, eps, int8_activations)


@op(
    "linear_swiglu_quant(Tensor x, Tensor gate, str gate_kind, Tensor? up, str up_kind, "
    "SymInt rows, Tensor? norm_weight, float eps, bool int8_activations=False) -> Tensor",
    lambda x, gate, gate_kind, up, up_kind, rows, *args: x.new_empty((x.shape[0], rows)),
)
def _linear_swiglu(
    x: Tensor,
    gate: Tensor,
    gate_kind: str,
    up: Tensor | None,
    up_kind: str,
    rows: int,
    norm_weight: Tensor | None,
    eps: float,
    int8_activations: bool = False,
) -> Tensor:
    """``up`` None: gate is the tiles of both."""
    if int8_activations:
        check_int8_activations(x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, H], got {shape_of(x)}")
    matrices = [("gate", gate, gate_kind, rows)]
    if up is None:
        matrices = [("gate_up", gate, gate_kind, 2 * rows)]
    else:
        matrices.append(("up", up, up_kind, rows))
    _check_products(x, norm_weight, None, matrices)
    cols = x.shape[1]
    if cuda_ops.serves(x):
        x, norm_weight = cuda_quantized.normed(x, norm_weight, eps)
        if up is None:
            tiles = Tiles(gate, gate_kind, 2 * rows)
            return cuda_quantized.linear_swiglu(x, tiles, None, norm_weight, eps)
        both = _tiles(gate, gate_kind, rows, cols), _tiles(up, up_kind, rows, cols)
        return cuda_quantized.linear_swiglu(x, *both, norm_weight, eps)
    if norm_weight is not None:
        x = torch_ops.rms_norm(x, norm_weight, eps)
    if up is None:
        pair = PackedQuantizedTensor(gate, gate_kind, (2 * rows, cols))
        gate, up = (each.blocks for each in unpack_pair(pair))
    gate, up = _blocks(gate, gate_kind, rows, cols), _blocks(up, up_kind, rows, cols)
    return torch_ops.matmul_quant(
        x, gate, gate_kind, swiglu_up=(up, up_kind), int8_activations=int8_activations
    )


# -------------------------------------------------------------------------------------------- qkv


def qkv_rope_append(
    x: Tensor,
    norm: Norm | None,
    w_qkv: tuple[Matrix, Matrix, Matrix],
    rope: Rope,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
    int8_activations: bool = False,
) -> Tensor:
    """See ops.qkv_rope_append. The kernel takes pairs that are interleaved."""
    if rope.positions is None:
        raise ValueError("rope.positions is required here")
    weight, eps = norm if norm is not None else (None, 0.0)
    data, kinds, rows = (list(each) for each in zip(*map(_stored, w_qkv), strict=True))
    return _qkv_rope_append(
        x,
        weight,
        eps,
        data,
        kinds,
        rows,
        rope.cos,
        rope.sin,
        rope.positions,
        rope.interleaved,
        *cache,
        slots,
        int8_activations,
    )


def _fake_qkv(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    w: list[Tensor],
    kinds: list[str],
    rows: list[int],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    k_cache: Tensor,
    *args: object,
) -> Tensor:
    head_dim = k_cache.shape[3]
    return x.new_empty((x.shape[0], rows[0] // head_dim, head_dim))


@op(
    "qkv_rope_append_quant(Tensor x, Tensor? norm_weight, float eps, Tensor[] w, str[] kinds, "
    "SymInt[] rows, Tensor cos, Tensor sin, Tensor positions, bool interleaved, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, bool int8_activations=False) -> Tensor",
    _fake_qkv,
)
def _qkv_rope_append(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    w: list[Tensor],
    kinds: list[str],
    rows: list[int],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    int8_activations: bool = False,
) -> Tensor:
    if int8_activations:
        check_int8_activations(x)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, H], got {shape_of(x)}")
    names = ("wq", "wk", "wv")
    _check_products(x, norm_weight, None, list(zip(names, w, kinds, rows, strict=True)))
    check_float(x=x, k_cache=k_cache, v_cache=v_cache)
    check_cache(k_cache, v_cache)
    hk, d = k_cache.shape[2:]
    for name, count in zip(names[1:], rows[1:], strict=True):
        if count != hk * d:
            raise ValueError(f"{name} must have Hk*D = {hk * d} rows, got {count}")
    if not rows[0] or rows[0] % (hk * d):
        raise ValueError(f"wq must have a multiple of Hk*D = {hk * d} rows, got {rows[0]}")
    rope = Rope(cos, sin, positions, interleaved)
    check_rope(rope, d)
    check_positions(rope, x.shape[0], x.device)
    check_index("slots", slots, (x.shape[0],), x.device)
    stored = [(*each, x.shape[1]) for each in zip(w, kinds, rows, strict=True)]
    if cuda_ops.serves_qkv(x, sum(rows), k_cache):
        tiles = [_tiles(*each) for each in stored]
        x, norm_weight = cuda_quantized.normed(x, norm_weight, eps)
        args = x, norm_weight, eps, tiles, rope, k_cache, v_cache, slots
        if interleaved:  # the rows are in pair order as they are
            return cuda_quantized.qkv_rope_append(*args)
        return cuda_quantized.qkv_then_rope(*args)
    if norm_weight is not None:
        x = torch_ops.rms_norm(x, norm_weight, eps)
    matrices = [(_blocks(*each), each[1]) for each in stored]
    products = torch_ops.matmuls_quant(x, matrices, int8_activations)
    q, k, v = (y.view(x.shape[0], -1, d) for y in products)
    return torch_ops.qkv_rope_append((q, k, v), rope, (k_cache, v_cache), slots)


# -------------------------------------------------------------------------------------- embedding


def embedding(ids: Tensor, table: Matrix, dtype: torch.dtype | None) -> Tensor:
    """See ops.embedding."""
    if dtype is None:
        raise ValueError(f"dtype is required: the rows of a {table.quant_type} table have none")
    return _embedding(ids, *_stored(table), table.shape[1], dtype)


@op(
    "embedding_quant(Tensor ids, Tensor table, str kind, SymInt rows, SymInt cols, "
    "ScalarType dtype) -> Tensor",
    lambda ids, table, kind, rows, cols, dtype: ids.new_empty((*ids.shape, cols), dtype=dtype),
)
def _embedding(
    ids: Tensor, table: Tensor, kind: str, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    like = torch.empty(0, cols, dtype=dtype, device=table.device)
    check_float(dtype=like)
    _check_matrix("table", like, table, kind, rows)
    check_index("ids", ids, tuple(ids.shape), table.device)
    check_range("ids", ids, 0, rows)
    if cuda_ops.serves(like):
        return cuda_quantized.embedding(ids, _tiles(table, kind, rows, cols), cols, dtype)
    table = _blocks(table, kind, rows, cols)
    return torch_ops.embedding_quant(ids, table, kind, dtype).view(*ids.shape, cols)


def embedding_stored(
    ids: Tensor, table: Tensor, kind: str, rows: int, cols: int, dtype: torch.dtype
) -> Tensor:
    """Rows of a table by its stored bytes; see linear_stored."""
    return _embedding(ids, table, kind, rows, cols, dtype)
