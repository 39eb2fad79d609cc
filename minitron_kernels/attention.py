"""Attention over packed sequences and over a paged KV cache; `ops.py` has the conventions."""

from __future__ import annotations

import math

import torch

from minitron_kernels import cuda_attention, torch_ops
from minitron_kernels.checks import (
    check_cache,
    check_cu_seqlens,
    check_float,
    check_heads,
    check_index,
    check_max_seqlen,
    check_packed,
    check_positions,
    check_rope,
    check_shape,
    check_window,
    shape_of,
)
from minitron_kernels.library import Rope, op

Tensor = torch.Tensor

__all__ = ["attention", "attention_kvcache"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    rope: Rope | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Grouped-query attention over packed sequences (Dao et al. 2022, Ainslie et al. 2023).

    q [Tq, Hq, D], k and v [Tk, Hk, D]; cu_seqlens_*: int32/int64 [B + 1]. In each sequence the last
    query stands on the last key. ``causal`` hides later keys; ``window`` = W hides keys at a
    distance of W or more. softmax_scale defaults to 1/sqrt(D). With ``rope``, q and k are rotated
    by their position in the sequence (rope.positions is not used). A query that sees no key gives
    zeros. Returns out [Tq, Hq, D], with ``return_lse`` also lse fp32 [Hq, Tq] (natural logarithm).

    ``max_seqlen_q``: the most queries that a sequence has (None: Tq is taken for it). On a GPU,
    where cu_seqlens are not read by the host, a close bound makes a smaller launch, and queries
    beyond it are not computed.
    """
    cos, sin, _, interleaved = rope if rope is not None else (None, None, None, False)
    out, lse = _attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        causal,
        softmax_scale,
        window,
        cos,
        sin,
        interleaved,
        return_lse,
    )
    return (out, lse) if return_lse else out


def _fake_attention(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    lse_shape = (q.shape[1], q.shape[0]) if args[-1] else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "SymInt? max_seqlen_q, bool causal, float? softmax_scale, int? window, Tensor? cos, "
    "Tensor? sin, bool interleaved, bool return_lse) -> (Tensor, Tensor)",
    _fake_attention,
)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    causal: bool,
    softmax_scale: float | None,
    window: int | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    check_float(q=q, k=k, v=v)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, window)
    rope = None if cos is None or sin is None else Rope(cos, sin, None, interleaved)
    if rope is not None:
        check_rope(rope, q.shape[2])
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    implementation = (
        cuda_attention.attention if cuda_attention.serves(q) else torch_ops.packed_attention
    )
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    return implementation(
        q, k, v, cu_seqlens, max_seqlen_q, causal, scale, window, rope, return_lse
    )


def attention_kvcache(
    q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    rope: Rope | None = None,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    min_seqlen_q: int = 0,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens over a paged KV cache, optionally rotating and appending K and V.

    q [T, Hq, D]; k_new, v_new [T, Hk, D], or None when the cache holds them already.
    k_cache, v_cache [pages, page, Hk, D]; block_table int32 [B, max_pages], the pages of each
    sequence in order; cache_seqlens int32 [B], tokens of each sequence in the cache *before* this
    call's k_new. cu_seqlens_q int32 [B + 1] delimits the sequences' rows of q (None: one row each).
    With ``rope``, q and k_new are rotated (by rope.positions, or by their place in the sequence if
    None). k_new and v_new are written to the cache, in place. The last query of a sequence stands
    on its last key. Returns out [T, Hq, D], with ``return_lse`` also lse fp32 [Hq, T].

    On a GPU nothing is read back: a sequence that its block table cannot hold, or that names a page
    outside the cache, gives NaN or is cut, and is not an error. Sequences of up to 8 rows take the
    decode kernel, longer ones that for prompts; ``min_seqlen_q`` and ``max_seqlen_q``, bounds of
    the rows of every sequence (those of empty ones aside), tell which may occur (None: T), so that
    the other kernel is not launched. Rows of sequences outside the bounds may be left uncomputed.
    """
    cos, sin, positions, interleaved = rope if rope is not None else (None, None, None, False)
    out, lse = _attention_kvcache(
        q,
        k_new,
        v_new,
        k_cache,
        v_cache,
        block_table,
        cache_seqlens,
        cu_seqlens_q,
        max_seqlen_q,
        min_seqlen_q,
        cos,
        sin,
        positions,
        interleaved,
        causal,
        softmax_scale,
        window,
        return_lse,
    )
    return (out, lse) if return_lse else out


@op(
    "attention_kvcache(Tensor q, Tensor? k_new, Tensor? v_new, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor block_table, Tensor cache_seqlens, Tensor? cu_seqlens_q, "
    "SymInt? max_seqlen_q, SymInt min_seqlen_q, Tensor? cos, Tensor? sin, Tensor? positions, "
    "bool interleaved, bool causal, float? softmax_scale, int? window, bool return_lse) "
    "-> (Tensor, Tensor)",
    _fake_attention,
)
def _attention_kvcache(
    q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int | None,
    min_seqlen_q: int,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    interleaved: bool,
    causal: bool,
    softmax_scale: float | None,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    check_float(q=q, k_cache=k_cache, v_cache=v_cache)
    check_cache(k_cache, v_cache)
    check_heads(q, k_cache, v_cache, kv_ndim=4)
    check_window(window)
    if block_table.ndim != 2:
        raise ValueError(f"block_table must be [B, pages], got {shape_of(block_table)}")
    batch = block_table.shape[0]
    check_index("block_table", block_table, tuple(block_table.shape), q.device)
    check_index("cache_seqlens", cache_seqlens, (batch,), q.device)
    if cu_seqlens_q is None:
        if q.shape[0] != batch:
            raise ValueError(f"q has {q.shape[0]} rows for {batch} sequences")
    else:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
        if len(cu_seqlens_q) != batch + 1:
            raise ValueError(f"cu_seqlens_q must have {batch + 1} entries, got {len(cu_seqlens_q)}")
    check_max_seqlen(max_seqlen_q, min_seqlen_q)
    new = None
    if k_new is not None and v_new is not None:
        new = k_new, v_new
        check_float(q=q, k_new=k_new, v_new=v_new)
        for name, t in (("k_new", k_new), ("v_new", v_new)):
            check_shape(name, t, (q.shape[0], *k_cache.shape[2:]))
    elif k_new is not v_new:
        raise ValueError("k_new and v_new must be given together")
    rope = None if cos is None or sin is None else Rope(cos, sin, positions, interleaved)
    if rope is not None:
        check_rope(rope, q.shape[2])
        if rope.positions is not None:
            check_positions(rope, q.shape[0], q.device)
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    implementation = (
        cuda_attention.attention_kvcache
        if cuda_attention.serves(q, k_cache)
        else torch_ops.paged_attention
    )
    return implementation(
        q,
        new,
        k_cache,
        v_cache,
        block_table,
        cache_seqlens,
        cu_seqlens_q,
        (min_seqlen_q, max_seqlen_q),
        rope,
        causal,
        scale,
        window,
        return_lse,
    )
