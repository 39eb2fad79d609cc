"""Calls of the CPU kernels: from tensors that `ops.py` has checked to the C ABI (csrc/cpu).

What an index tensor holds is checked by the kernels, before they write anything. The number of
threads is torch's. Calls cost a few microseconds, most of them here: no tensor is made or looked at
more often than needed.
"""

from __future__ import annotations

import torch

from minitron_kernels import _native
from minitron_kernels.native import MAX_THREADS

Tensor = torch.Tensor

DTYPES = {
    torch.bfloat16: _native.BF16,
    torch.float16: _native.F16,
    torch.float32: _native.F32,
    torch.int32: _native.I32,
    torch.int64: _native.I64,
}
_MOST = 2**31 - 1


def num_threads() -> int:
    """torch's, as far as the kernels take so many."""
    return min(torch.get_num_threads(), MAX_THREADS)


def _adjoining(t: Tensor) -> Tensor:
    """With the elements of a row next to each other."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _rows(x: Tensor) -> Tensor:
    """[..., H] as rows [R, H]."""
    return _adjoining(x if x.ndim == 2 else x.reshape(-1, x.shape[-1]))


def _strides(t: Tensor) -> tuple[int, int]:
    """Between tokens, between heads."""
    return t.stride(0), t.stride(1)


def _int32(t: Tensor) -> Tensor:
    return t if t.dtype is torch.int32 and t.is_contiguous() else t.int().contiguous()


# ------------------------------------------------------------------------------------- row-wise ops


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """ops.rms_norm, or with ``residual`` (whose rows a view must give) ops.add_rms_norm."""
    out = torch.empty(x.shape, dtype=x.dtype)
    hidden = x.shape[-1]
    if not out.numel():
        return out
    rows, weight = _rows(x), _adjoining(weight)
    sums = None if residual is None else residual.view(-1, hidden)
    _native.cpu_rms_norm(
        rows.data_ptr(),
        0 if sums is None else sums.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows.stride(0),
        0 if sums is None else sums.stride(0),
        hidden,
        rows.shape[0],
        hidden,
        eps,
        DTYPES[x.dtype],
        num_threads(),
    )
    return out


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """ops.silu_and_mul."""
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype)
    if out.numel():
        rows = _rows(gate_up)
        _native.cpu_silu_and_mul(
            rows.data_ptr(),
            out.data_ptr(),
            rows.stride(0),
            size,
            rows.shape[0],
            size,
            DTYPES[out.dtype],
            num_threads(),
        )
    return out


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """ops.embedding; raises ValueError for an id out of range."""
    vocab, hidden = table.shape
    table, ids = _adjoining(table), ids.contiguous()
    out = torch.empty((*ids.shape, hidden), dtype=table.dtype)
    _native.cpu_embedding(
        ids.data_ptr(),
        table.data_ptr(),
        out.data_ptr(),
        table.stride(0),
        hidden,
        ids.numel(),
        vocab,
        hidden,
        DTYPES[ids.dtype],
        DTYPES[table.dtype],
        num_threads(),
    )
    return out


# --------------------------------------------------------------------------------------------- rope


def rope_append(
    q: Tensor | None,
    q_out: Tensor | None,
    kv: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    cache: tuple[Tensor, Tensor] | None = None,
    slots: Tensor | None = None,
    pair_order: bool = False,
) -> None:
    """q_out = q [T, Hq, D] rotated (they may be one); k rotated, and v, to the slots of the cache.

    ``pair_order``: q and k come in the order of a PackedQKV's rows.
    """
    cos, sin = _adjoining(cos), _adjoining(sin)
    if sin.stride(0) != cos.stride(0):
        cos, sin = cos.contiguous(), sin.contiguous()
    positions = positions.contiguous()
    tokens = positions.shape[0]
    heads = kv_heads = num_pages = page = head_dim = 0
    q_at = q_out_at = k_at = v_at = k_cache_at = v_cache_at = slots_at = 0
    q_strides = q_out_strides = k_strides = v_strides = (0, 0)
    cache_strides = (0, 0, 0)
    slots_dtype = _native.I32
    dtype = torch.float32
    if q is not None and q_out is not None:
        q = _adjoining(q)
        _, heads, head_dim = q.shape
        dtype = q.dtype
        q_at, q_out_at = q.data_ptr(), q_out.data_ptr()
        q_strides, q_out_strides = _strides(q), _strides(q_out)
    if kv is not None and cache is not None and slots is not None:
        k, v = _adjoining(kv[0]), _adjoining(kv[1])
        k_cache, v_cache = cache
        slots = slots.contiguous()
        num_pages, page, kv_heads, head_dim = k_cache.shape
        dtype, slots_dtype = k.dtype, DTYPES[slots.dtype]
        k_at, v_at, slots_at = k.data_ptr(), v.data_ptr(), slots.data_ptr()
        k_cache_at, v_cache_at = k_cache.data_ptr(), v_cache.data_ptr()
        k_strides, v_strides = _strides(k), _strides(v)
        cache_strides = k_cache.stride(0), k_cache.stride(1), k_cache.stride(2)
    _native.cpu_rope_append(
        q_at,
        q_out_at,
        k_at,
        v_at,
        k_cache_at,
        v_cache_at,
        slots_at,
        *q_strides,
        *q_out_strides,
        *k_strides,
        *v_strides,
        *cache_strides,
        tokens,
        heads,
        kv_heads,
        head_dim,
        num_pages,
        page,
        slots_dtype,
        DTYPES[dtype],
        pair_order,
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0),
        positions.data_ptr(),
        DTYPES[positions.dtype],
        cos.shape[0],
        2 * cos.shape[1],
        interleaved,
        num_threads(),
    )


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, D], rotated: a new tensor."""
    out = torch.empty(x.shape, dtype=x.dtype)
    rope_append(x, out, None, cos, sin, positions, interleaved)
    return out


# ---------------------------------------------------------------------------------------- attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    bounds: tuple[int, int | None],
    causal: bool,
    scale: float,
    window: int | None,
    return_lse: bool,
    *,
    cu_seqlens_k: Tensor | None = None,
    block_table: Tensor | None = None,
    seqlens_k: Tensor | None = None,
    is_appended: bool = False,
) -> tuple[Tensor, Tensor]:
    """out and lse of packed keys (with cu_seqlens_k) or of a paged cache (with the other two).

    ``bounds``: no sequence has less or more queries. ``is_appended``: seqlens_k does not count the
    keys of these queries.
    """
    q = _adjoining(q)
    tokens, heads, head_dim = q.shape
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype)
    lse = torch.empty((heads, tokens) if return_lse else (0,), dtype=torch.float32)
    if cu_seqlens_q is not None:
        cu_seqlens_q = _int32(cu_seqlens_q)
    page_strides, page, num_pages, pages, tokens_k, table_stride = (0, 0), 0, 0, 0, 0, 0
    cu_k_at = seqlens_at = table_at = 0
    if block_table is None or seqlens_k is None:
        assert cu_seqlens_k is not None
        k, v, cu_seqlens_k = _adjoining(k), _adjoining(v), _int32(cu_seqlens_k)
        tokens_k, kv_heads, batch = k.shape[0], k.shape[1], len(cu_seqlens_k) - 1
        k_strides, v_strides = _strides(k), _strides(v)
        cu_k_at = cu_seqlens_k.data_ptr()
    else:
        block_table, seqlens_k = _int32(block_table), _int32(seqlens_k)
        batch, pages = block_table.shape
        num_pages, page, kv_heads, _ = k.shape
        page_strides = k.stride(0), v.stride(0)
        k_strides, v_strides = (k.stride(1), k.stride(2)), (v.stride(1), v.stride(2))
        table_stride = pages
        seqlens_at, table_at = seqlens_k.data_ptr(), block_table.data_ptr()
    _native.cpu_attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr() if return_lse else 0,
        0 if cu_seqlens_q is None else cu_seqlens_q.data_ptr(),
        cu_k_at,
        seqlens_at,
        table_at,
        *_strides(q),
        page_strides[0],
        *k_strides,
        page_strides[1],
        *v_strides,
        heads * head_dim,
        head_dim,
        tokens,
        table_stride,
        tokens,
        tokens_k,
        batch,
        heads,
        kv_heads,
        head_dim,
        num_pages,
        page,
        pages,
        _MOST if bounds[1] is None else bounds[1],
        max(bounds[0] - 1, 0),
        is_appended,
        causal,
        0 if window is None else min(window, _MOST),
        scale,
        DTYPES[q.dtype],
        num_threads(),
    )
    return out, lse
