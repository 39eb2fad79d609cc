"""The quantised ops of CUDA tensors: as `cuda_ops.py`, of matrices packed into tiles.

A matrix [N, K] is the tensor of its tiles (csrc/quant/quant_layout.h draws them), its type's name
and N. K is told by x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from minitron_kernels import _native
from minitron_kernels.block_types import GGML_NUMBERS
from minitron_kernels.cuda_ops import (
    DTYPES,
    call,
    contiguous_rope,
    native_rope,
    pointer,
    rms_norm,
    rotated_q,
    rows_of,
)

if TYPE_CHECKING:
    from minitron_kernels.library import Rope

Tensor = torch.Tensor
MAX_NORM_K = 1 << 14


class Tiles(NamedTuple):
    """A packed matrix."""

    data: Tensor  # uint8 [bytes]
    kind: str
    rows: int

    def native(self) -> object:
        """mk_quant_matrix of it."""
        return _native.QuantMatrix(self.data.data_ptr(), GGML_NUMBERS[self.kind], self.rows)


_NO_MATRIX = _native.QuantMatrix(0, 0, 0)


def _workspace(x: Tensor) -> Tensor | None:
    """Scratch of a product of x [M, K]; None where there is one launch, which needs none."""
    if x.shape[0] <= _native.QUANT_MAX_DECODE_M:
        return None
    size = _native.quant_workspace_bytes(*x.shape)
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _scratch(workspace: Tensor | None) -> tuple[int, int]:
    return pointer(workspace), 0 if workspace is None else workspace.numel()


def normed(x: Tensor, norm_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """x [..., K] and the norm that is left to the product: all but that of very long rows."""
    if norm_weight is not None and x.shape[-1] > MAX_NORM_K:
        return rms_norm(x, norm_weight, eps), None
    return x, None if norm_weight is None else norm_weight.contiguous()


def _product(
    x: Tensor,
    w: Tiles,
    out: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> None:
    workspace = _workspace(x)
    call(
        "linear_quant",
        x,
        x.data_ptr(),
        w.native(),
        pointer(norm_weight),
        pointer(residual),
        out.data_ptr(),
        *_scratch(workspace),
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        x.shape[0],
        w.rows,
        x.shape[1],
        eps,
        DTYPES[x.dtype],
        DTYPES[out.dtype],
    )


def linear(
    x: Tensor,
    w: Tiles,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """norm(x [..., K]) @ w [N, K]^T + residual: one launch up to 64 rows, else two."""
    out = torch.empty((*x.shape[:-1], w.rows), dtype=out_dtype, device=x.device)
    rows = rows_of(x)
    added = None if residual is None else rows_of(residual)
    _product(rows, w, out.view(rows.shape[0], w.rows), added, norm_weight, eps)
    return out


def linear_swiglu(
    x: Tensor, gate: Tiles, up: Tiles | None, norm_weight: Tensor | None, eps: float
) -> Tensor:
    """silu(gate) * up [T, I] of norm(x [T, H]), of any two types; up None: the rows of gate are
    gate 0, up 0, gate 1, ..."""
    n = gate.rows if up is None else 2 * gate.rows
    rows = rows_of(x)
    out = torch.empty((x.shape[0], n // 2), dtype=x.dtype, device=x.device)
    workspace = _workspace(rows)
    call(
        "linear_quant_swiglu",
        x,
        rows.data_ptr(),
        gate.native(),
        _NO_MATRIX if up is None else up.native(),
        pointer(norm_weight),
        out.data_ptr(),
        *_scratch(workspace),
        rows.stride(0),
        n // 2,
        rows.shape[0],
        n,
        rows.shape[1],
        eps,
        DTYPES[x.dtype],
    )
    return out


def qkv_rope_append(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    matrices: Sequence[Tiles],
    rope: Rope,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Q [T, Hq, D] of norm(x [T, H]); K and V go to the cache. Q's and K's rows in pair order."""
    rows, slots, rope = rows_of(x), slots.contiguous(), contiguous_rope(rope)
    num_pages, page, kv_heads, head_dim = k_cache.shape
    q_heads = matrices[0].rows // head_dim
    q = torch.empty((x.shape[0], q_heads, head_dim), dtype=x.dtype, device=x.device)
    workspace = _workspace(rows)
    call(
        "qkv_rope_append_quant",
        x,
        rows.data_ptr(),
        *(w.native() for w in matrices),
        pointer(norm_weight),
        *(t.data_ptr() for t in (q, k_cache, v_cache, slots)),
        *_scratch(workspace),
        rows.stride(0),
        q_heads * head_dim,
        head_dim,
        *k_cache.stride()[:3],
        *rows.shape,
        q_heads,
        kv_heads,
        head_dim,
        num_pages,
        page,
        eps,
        DTYPES[slots.dtype],
        DTYPES[x.dtype],
        native_rope(*rope),
    )
    return q


def qkv_then_rope(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    matrices: Sequence[Tiles],
    rope: Rope,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """As `qkv_rope_append`, of rows in another order: three products, rope_append, apply_rope."""
    rows, head_dim = rows_of(x), k_cache.shape[3]
    projected = []
    for w in matrices:
        y = torch.empty((x.shape[0], w.rows), dtype=x.dtype, device=x.device)
        _product(rows, w, y, None, norm_weight, eps)
        projected.append(y.view(x.shape[0], w.rows // head_dim, head_dim))
    return rotated_q(projected, rope, k_cache, v_cache, slots)


def embedding(ids: Tensor, table: Tiles, cols: int, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` of a table [V, cols], decoded."""
    ids = ids.contiguous()
    out = torch.empty((*ids.shape, cols), dtype=dtype, device=ids.device)
    call(
        "embedding_quant",
        out,
        ids.data_ptr(),
        table.native(),
        out.data_ptr(),
        cols,
        ids.numel(),
        table.rows,
        cols,
        DTYPES[ids.dtype],
        DTYPES[dtype],
    )
    return out
