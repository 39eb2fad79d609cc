"""The ops of `ops.py` on quantised weights, which are never expanded in memory.

A matrix comes as a QuantizedTensor; torch.compile sees its bytes, its type and its rows, as the ops
registered here take them. What mixes quantised and dense matrices is composed in `ops.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from minitron_kernels import torch_ops
from minitron_kernels.checks import (
    check_cache,
    check_float,
    check_index,
    check_norm,
    check_positions,
    check_range,
    check_rope,
    shape_of,
)
from minitron_kernels.library import Norm, Rope, op
from minitron_kernels.quantized import QuantizedTensor, block_type

Tensor = torch.Tensor


def _check_matrix(name: str, x: Tensor, w: Tensor, kind: str, rows: int) -> None:
    """That ``w``, the stored bytes of a matrix [rows, K], can be multiplied with x [..., K]."""
    block = block_type(kind)
    if w.dtype != torch.uint8:
        raise TypeError(f"the blocks of {name} must be uint8, got {w.dtype}")
    if w.device != x.device:
        raise ValueError(f"{name} is on {w.device} but x is on {x.device}")
    if w.ndim != 2 or w.shape[0] != rows or not w.is_contiguous():
        raise ValueError(f"the blocks of {name} must be [{rows}, row bytes], got {shape_of(w)}")
    cols = w.shape[1] // block.nbytes * block.elements
    if x.ndim < 1 or x.shape[-1] != cols or w.shape[1] % block.nbytes:
        raise ValueError(
            f"the last dimension of x ({shape_of(x)}) must be {name}'s K = {cols} ({kind})"
        )


def _check_products(
    x: Tensor,
    norm_weight: Tensor | None,
    residual: Tensor | None,
    matrices: Sequence[tuple[str, Tensor, str, int]],
) -> None:
    """``matrices``: name, bytes, type and rows of each."""
    tensors = {"x": x}
    if residual is not None:
        tensors["residual"] = residual
    if norm_weight is not None:
        tensors["norm_weight"] = norm_weight
    check_float(**tensors)
    for name, w, kind, rows in matrices:
        _check_matrix(name, x, w, kind, rows)
    if norm_weight is not None:
        check_norm(x, norm_weight)


# ----------------------------------------------------------------------------------------- linear


def linear(
    x: Tensor,
    w: QuantizedTensor,
    residual: Tensor | None,
    norm: Norm | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """See ops.linear."""
    weight, eps = norm if norm is not None else (None, 0.0)
    return _linear(x, w.blocks, w.quant_type, w.shape[0], residual, weight, eps, out_dtype)


def _fake_linear(
    x: Tensor,
    w: Tensor,
    kind: str,
    rows: int,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=out_dtype)


@op(
    "linear_quant(Tensor x, Tensor w, str kind, SymInt rows, Tensor? residual, "
    "Tensor? norm_weight, float eps, ScalarType? out_dtype) -> Tensor",
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
) -> Tensor:
    _check_products(x, norm_weight, residual, [("w", w, kind, rows)])
    shape = (*x.shape[:-1], rows)
    if residual is not None and residual.shape != shape:
        raise ValueError(f"residual must be {'x'.join(map(str, shape))}, got {shape_of(residual)}")
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if out_dtype is not x.dtype and (out_dtype is not torch.float32 or residual is not None):
        raise ValueError(
            f"out_dtype must be x's {x.dtype}, or float32 without residual, got {out_dtype}"
        )
    x = x.reshape(-1, x.shape[-1])
    if norm_weight is not None:
        x = torch_ops.rms_norm(x, norm_weight, eps)
    add = None if residual is None else residual.reshape(-1, rows)
    return torch_ops.matmul_quant(x, w, kind, add=add, out_dtype=out_dtype).view(shape)


# ----------------------------------------------------------------------------------------- swiglu


def linear_swiglu(
    x: Tensor, gate: QuantizedTensor, up: QuantizedTensor, norm: Norm | None
) -> Tensor:
    """silu(gate(x)) * up(x) of x [T, H], normalised first where asked, rounded once -> [T, I]."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {shape_of(gate)} and up {shape_of(up)} must both be [I, H]")
    weight, eps = norm if norm is not None else (None, 0.0)
    return _linear_swiglu(
        x, gate.blocks, gate.quant_type, up.blocks, up.quant_type, gate.shape[0], weight, eps
    )


@op(
    "linear_swiglu_quant(Tensor x, Tensor gate, str gate_kind, Tensor up, str up_kind, "
    "SymInt rows, Tensor? norm_weight, float eps) -> Tensor",
    lambda x, gate, gate_kind, up, up_kind, rows, norm_weight, eps: x.new_empty((x.shape[0], rows)),
)
def _linear_swiglu(
    x: Tensor,
    gate: Tensor,
    gate_kind: str,
    up: Tensor,
    up_kind: str,
    rows: int,
    norm_weight: Tensor | None,
    eps: float,
) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"x must be [T, H], got {shape_of(x)}")
    matrices = [("gate", gate, gate_kind, rows), ("up", up, up_kind, rows)]
    _check_products(x, norm_weight, None, matrices)
    if norm_weight is not None:
        x = torch_ops.rms_norm(x, norm_weight, eps)
    return torch_ops.matmul_quant(x, gate, gate_kind, swiglu_up=(up, up_kind))


# -------------------------------------------------------------------------------------------- qkv


def qkv_rope_append(
    x: Tensor,
    norm: Norm | None,
    w_qkv: tuple[QuantizedTensor, QuantizedTensor, QuantizedTensor],
    rope: Rope,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
) -> Tensor:
    """See ops.qkv_rope_append."""
    if rope.positions is None:
        raise ValueError("rope.positions is required here")
    weight, eps = norm if norm is not None else (None, 0.0)
    return _qkv_rope_append(
        x,
        weight,
        eps,
        [w.blocks for w in w_qkv],
        [w.quant_type for w in w_qkv],
        [w.shape[0] for w in w_qkv],
        rope.cos,
        rope.sin,
        rope.positions,
        rope.interleaved,
        *cache,
        slots,
    )


def _fake_qkv(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    w: list[Tensor],
    kinds: list[str],
    rows: list[int],
    *args: Tensor,
) -> Tensor:
    head_dim = args[-2].shape[3]
    return x.new_empty((x.shape[0], rows[0] // head_dim, head_dim))


@op(
    "qkv_rope_append_quant(Tensor x, Tensor? norm_weight, float eps, Tensor[] w, str[] kinds, "
    "SymInt[] rows, Tensor cos, Tensor sin, Tensor positions, bool interleaved, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> Tensor",
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
) -> Tensor:
    if x.ndim != 2:
        raise ValueError(f"x must be [T, H], got {shape_of(x)}")
    names = ("wq", "wk", "wv")
    _check_products(x, norm_weight, None, list(zip(names, w, kinds, rows, strict=True)))
    check_float(x=x, k_cache=k_cache, v_cache=v_cache)
    check_cache(k_cache, v_cache)
    num_pages, page, hk, d = k_cache.shape
    for name, count in zip(names[1:], rows[1:], strict=True):
        if count != hk * d:
            raise ValueError(f"{name} must have Hk*D = {hk * d} rows, got {count}")
    if not rows[0] or rows[0] % (hk * d):
        raise ValueError(f"wq must have a multiple of Hk*D = {hk * d} rows, got {rows[0]}")
    rope = Rope(cos, sin, positions, interleaved)
    check_rope(rope, d)
    check_positions(rope, x.shape[0], x.device)
    check_index("slots", slots, (x.shape[0],), x.device)
    check_range("slots", slots, -(1 << 62), num_pages * page)
    if norm_weight is not None:
        x = torch_ops.rms_norm(x, norm_weight, eps)
    q, k, v = (
        torch_ops.matmul_quant(x, blocks, kind).view(x.shape[0], -1, d)
        for blocks, kind in zip(w, kinds, strict=True)
    )
    c, s = cos[positions][:, None], sin[positions][:, None]
    torch_ops.append(torch_ops.rotate(k, c, s, interleaved), v, k_cache, v_cache, slots)
    return torch_ops.rotate(q, c, s, interleaved)


# -------------------------------------------------------------------------------------- embedding


def embedding(ids: Tensor, table: QuantizedTensor, dtype: torch.dtype | None) -> Tensor:
    """See ops.embedding."""
    if dtype is None:
        raise ValueError(f"dtype is required: the rows of a {table.quant_type} table have none")
    rows, cols = table.shape
    return _embedding(ids, table.blocks, table.quant_type, rows, cols, dtype)


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
    return torch_ops.embedding_quant(ids, table, kind, dtype).view(*ids.shape, cols)
