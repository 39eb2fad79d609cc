"""Attention under flash-attn's names: signatures, layouts and semantics of its version 2.8.

    from minitron_kernels.flash_attn import flash_attn_func  # in place of: from flash_attn import

Tensors are [batch, seqlen, heads, head_dim], or [tokens, heads, head_dim] in the varlen function;
masks are aligned to the bottom right corner. CUDA tensors take the kernels of `ops.attention` and
`ops.attention_kvcache` (bfloat16 and float16, head_dim 64 and 128), CPU tensors PyTorch. Nothing on
the GPU is read back, so that calls can be captured into a CUDA graph. flash_attn_func and
flash_attn_varlen_func take float8_e4m3fn too, with descales fp32 [B, Hk] as flash-attn 3 has them
(q_descale: or [B, Hq]), and then give bfloat16: `ops.attention_fp8`, on a GPU sm_90a's alone.

What is not there raises NotImplementedError and names the argument: the backward pass, dropout,
softcap, ALiBi, cache_leftpad, and windows other than (left, 0), (w, w) or any with causal. Two
things are this package's: the lse of a query that sees no key is -inf (flash-attn 2 gives +inf, 3
-inf), and num_splits is not looked at, because a sequence's length alone decides how its keys are
split, for the same bits in any batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from minitron_kernels import cuda_attention, ops
from minitron_kernels.checks import check_cu_seqlens, check_float, check_index, on_host, shape_of

Tensor = torch.Tensor


class _Mask(NamedTuple):
    """How a query's logits are made: the last arguments of ops' functions."""

    causal: bool
    softmax_scale: float | None
    window: int | None
    return_lse: bool


class _Descales(NamedTuple):
    """What bytes of e4m3 are multiplied with, per sequence and KV head; None: 1."""

    q_descale: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v: q [B, Sq, Hq, D], k and v [B, Sk, Hk, D] -> [B, Sq, Hq, D].

    With ``return_attn_probs`` (out, lse fp32 [B, Hq, Sq], an empty tensor: probabilities belong to
    dropout). ``deterministic`` is about the backward pass; results always are.
    """
    _refuse(dropout_p, softcap, alibi_slopes)
    descales = _Descales(q_descale, k_descale, v_descale)
    is_fp8 = _is_fp8(q, descales)
    _check_inputs(4, is_fp8, q=q, k=k, v=v)
    if q.shape[0] != k.shape[0] or k.shape != v.shape:
        raise ValueError(f"q {shape_of(q)}, k {shape_of(k)} and v {shape_of(v)} differ in shape")
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    mask = _mask(softmax_scale, causal, window_size, seqlen_k, return_attn_probs)
    rows, pages = q.flatten(0, 1), None
    if (
        not is_fp8
        and 0 < seqlen_q <= cuda_attention.MAX_DECODE_ROWS
        and cuda_attention.serves(rows)
    ):
        pages = _Pages.of(k, v)  # for few rows: the decode kernel reads keys once for all of them
    if pages is not None:
        lengths = torch.full((batch,), seqlen_k, dtype=torch.int32, device=q.device)
        out, lse = _attend_pages(q, pages, pages.table(batch), lengths, mask)
    else:
        packed = rows, k.flatten(0, 1), v.flatten(0, 1)
        starts_q, starts_k = (_cu_seqlens(batch, n, q.device) for n in (seqlen_q, seqlen_k))
        result = _attend_packed(packed, (starts_q, starts_k), seqlen_q, mask, descales)
        out, lse = _batched(result, batch, seqlen_q)
    return out if lse is None else (out, lse, q.new_empty(0))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """As `flash_attn_func`, of packed sequences: q [Tq, Hq, D], k and v [Tk, Hk, D] -> [Tq, Hq, D].

    ``cu_seqlens_*`` int32 [B + 1] delimit the sequences; ``max_seqlen_q`` must be no less than the
    longest. With ``block_table`` int32 [B, max_pages] k and v are paged, [pages, page, Hk, D].
    lse is [Hq, Tq].
    """
    _refuse(dropout_p, softcap, alibi_slopes)
    descales = _Descales(q_descale, k_descale, v_descale)
    is_fp8 = _is_fp8(q, descales)
    if is_fp8 and block_table is not None:
        raise NotImplementedError("block_table is not supported with float8_e4m3fn")
    _check_inputs(3, is_fp8, q=q)
    _check_inputs(3 if block_table is None else 4, is_fp8, k=k, v=v)
    if not is_fp8:
        check_float(q=q, k=k, v=v)
    mask = _mask(softmax_scale, causal, window_size, max_seqlen_k, return_attn_probs)
    if block_table is None:
        result = _attend_packed(
            (q, k, v), (cu_seqlens_q, cu_seqlens_k), max_seqlen_q, mask, descales
        )
    else:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
        pages = _Pages.of_paged(k, v)
        result = ops.attention_kvcache(
            q,
            None,
            None,
            pages.k,
            pages.v,
            pages.split(block_table),
            cu_seqlens_k[1:] - cu_seqlens_k[:-1],
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            **mask._asdict(),
        )
    return result if isinstance(result, Tensor) else (*result, q.new_empty(0))


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q [B, Sq, Hq, D] over a cache, to which k and v [B, Sn, Hk, D] are added first.

    The cache is [Bc, Sc, Hk, D], a row of it for each sequence (``cache_batch_idx`` int32 [B]
    tells which), or [pages, page, Hk, D] with ``block_table`` int32 [B, max_pages]. The kernels
    take it if Sc, or the page, is a multiple of 16. ``cache_seqlens`` (int, or int32 [B]) are the
    lengths before k; None, without k: all of the cache. k and v are written in place.

    ``rotary_cos`` and ``_sin`` [positions, R/2] (fp32, or converted to it) rotate k by its place;
    and q by cache_seqlens + its row, or, where there is neither a causal mask nor a window, all of
    it by cache_seqlens. ``num_splits`` is not looked at: the kernel splits by the lengths, so that
    results are the same in every batch. Returns out [B, Sq, Hq, D], and lse fp32 [B, Hq, Sq] if it
    is asked for.
    """
    _refuse(0.0, softcap, alibi_slopes)
    if cache_leftpad is not None:
        raise NotImplementedError("cache_leftpad is not supported; leave it None")
    _check_inputs(4, q=q, k_cache=k_cache, v_cache=v_cache)
    batch, seqlen_q = q.shape[:2]
    if block_table is None:
        if k_cache.shape[1] == 0:
            raise ValueError(f"k_cache {shape_of(k_cache)} has no room")
        pages = _Pages.of(k_cache, v_cache) or _Pages(k_cache, v_cache, 1, 1)
        if cache_batch_idx is not None:
            check_index("cache_batch_idx", cache_batch_idx, (batch,), q.device)
        elif k_cache.shape[0] < batch:
            raise ValueError(f"k_cache has {k_cache.shape[0]} rows for {batch} sequences")
        table, room = pages.table(batch, cache_batch_idx), k_cache.shape[1]
    else:
        if cache_batch_idx is not None:
            raise NotImplementedError("cache_batch_idx is not supported with block_table")
        pages = _Pages.of_paged(k_cache, v_cache)
        if block_table.ndim != 2 or block_table.shape[0] != batch:
            raise ValueError(f"block_table must be [{batch}, pages], got {shape_of(block_table)}")
        table, room = pages.split(block_table), block_table.shape[1] * k_cache.shape[1]
    mask = _mask(softmax_scale, causal, window_size, room, return_softmax_lse)
    lengths = _lengths(cache_seqlens, batch, room, k is not None, q.device)
    new, rope = _check_new(q, k, v, rotary_cos, rotary_sin, rotary_interleaved)
    place = None
    if new is not None and rope is not None and not (mask.causal or mask.window) and seqlen_q > 1:
        place = lengths[:, None].expand(batch, seqlen_q)  # of q; each k still has its own
    elif new is not None and new[0].shape[1] != seqlen_q:
        place = lengths[:, None] + torch.arange(seqlen_q, dtype=torch.int32, device=q.device)
    if new is not None and place is not None:
        _append(new, pages, table, lengths, rope)
        lengths = lengths + new[0].shape[1]
        if rope is not None:
            rope = rope._replace(positions=place.flatten())
        new = None
    out, lse = _attend_pages(q, pages, table, lengths, mask, new, rope)
    return out if lse is None else (out, lse)


# ---------------------------------------------------------------------------------------- caches


class _Pages(NamedTuple):
    """K and V as pages that the kernels take; see `ops.attention_kvcache`."""

    k: Tensor  # [pages, page, Hk, D]
    v: Tensor
    per_row: int  # pages of a sequence's row of the cache, or of a page of the caller's,
    step: int  # and from its first page to the first one of the next

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> _Pages | None:
        """A cache [B, S, Hk, D] without moving it; None if its sizes do not allow that."""
        rows, seqlen, heads, head_dim = k.shape
        row_stride, stride = k.stride()[:2]
        if k.stride() != v.stride() or stride == 0:
            return None
        for page in sorted(cuda_attention.PAGE_SIZES, reverse=True):
            if seqlen % page or row_stride % (page * stride) or not seqlen:
                continue
            per_row, step = seqlen // page, row_stride // (page * stride)
            if rows > 1 and step < per_row:
                return None  # rows that overlap
            size = ((max(rows, 1) - 1) * step + per_row if rows else 0, page, heads, head_dim)
            strides = (page * stride, *k.stride()[1:])
            paged_k, paged_v = (t.as_strided(size, strides) for t in (k, v))
            return cls(paged_k, paged_v, per_row, step)
        return None

    @classmethod
    def of_paged(cls, k: Tensor, v: Tensor) -> _Pages:
        """A paged cache, whose pages are cut where they are larger than those of the kernels."""
        if k.shape[1] in cuda_attention.PAGE_SIZES or not k.shape[1]:
            return cls(k, v, 1, 1)
        return cls.of(k, v) or cls(k, v, 1, 1)

    def table(self, batch: int, rows: Tensor | None = None) -> Tensor:
        """The block table int32 [B, per_row] of the cache's rows (None: 0, 1, ...)."""
        if rows is None:
            rows = torch.arange(batch, dtype=torch.int32, device=self.k.device)
        return self.split(rows[:, None])

    def split(self, block_table: Tensor) -> Tensor:
        """The table [B, n * per_row] of one [B, n] that names uncut pages, or rows."""
        if self.per_row == self.step == 1:
            return block_table
        pages = torch.arange(self.per_row, dtype=block_table.dtype, device=block_table.device)
        return (block_table[:, :, None] * self.step + pages).flatten(1)


def _append(
    new: tuple[Tensor, Tensor],
    pages: _Pages,
    table: Tensor,
    lengths: Tensor,
    rope: ops.Rope | None,
) -> None:
    """Write k and v [B, Sn, Hk, D] behind the cached keys, k rotated by its place."""
    page, seqlen = pages.k.shape[1], new[0].shape[1]
    place = lengths[:, None] + torch.arange(seqlen, dtype=torch.int32, device=lengths.device)
    column = place // page
    inside = (place >= 0) & (column < table.shape[1])
    if on_host(place) and not torch.compiler.is_compiling() and not bool(inside.all()):
        raise ValueError(f"cache_seqlens: {seqlen} more keys do not fit the cache")
    number = table.gather(1, column.clamp(0, table.shape[1] - 1).long())
    inside &= (number >= 0) & (number < pages.k.shape[0])
    slots = torch.where(inside, number.long() * page + place % page, -1)
    if rope is None:  # turned by nothing: cos 1, sin 0
        one = torch.ones((1, 1), dtype=torch.float32, device=place.device)
        rope = ops.Rope(one, torch.zeros_like(one), torch.zeros_like(place).flatten())
    else:
        rope = rope._replace(positions=place.flatten())
    k, v = (t.flatten(0, 1) for t in new)
    ops.rope_append(k, v, rope, (pages.k, pages.v), slots.flatten())


def _attend_packed(
    packed: tuple[Tensor, Tensor, Tensor],
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlen_q: int,
    mask: _Mask,
    descales: _Descales,
) -> Tensor | tuple[Tensor, Tensor]:
    """out, and lse if it is asked for, of q [Tq, Hq, D], k and v."""
    options = mask._asdict()
    if packed[0].dtype is torch.float8_e4m3fn:
        options |= descales._asdict()
        return ops.attention_fp8(*packed, *cu_seqlens, max_seqlen_q=max_seqlen_q, **options)
    return ops.attention(*packed, *cu_seqlens, max_seqlen_q=max_seqlen_q, **options)


def _attend_pages(
    q: Tensor,
    pages: _Pages,
    table: Tensor,
    lengths: Tensor,
    mask: _Mask,
    new: tuple[Tensor, Tensor] | None = None,
    rope: ops.Rope | None = None,
) -> tuple[Tensor, Tensor | None]:
    """out [B, Sq, Hq, D] and lse [B, Hq, Sq]; ``new``: k, v [B, Sq, Hk, D]."""
    batch, seqlen = q.shape[:2]
    k, v = (None, None) if new is None else (t.flatten(0, 1) for t in new)
    result = ops.attention_kvcache(
        q.flatten(0, 1),
        k,
        v,
        pages.k,
        pages.v,
        table,
        lengths,
        rope,
        cu_seqlens_q=None if seqlen == 1 else _cu_seqlens(batch, seqlen, q.device),
        max_seqlen_q=seqlen,
        min_seqlen_q=seqlen,
        **mask._asdict(),
    )
    return _batched(result, batch, seqlen)


def _batched(
    result: Tensor | tuple[Tensor, Tensor], batch: int, seqlen: int
) -> tuple[Tensor, Tensor | None]:
    """out [B, S, Hq, D] and lse [B, Hq, S] of packed ones."""
    out, lse = (result, None) if isinstance(result, Tensor) else result
    if lse is not None:
        lse = lse.unflatten(1, (batch, seqlen)).transpose(0, 1).contiguous()
    return out.unflatten(0, (batch, seqlen)), lse


def _cu_seqlens(batch: int, seqlen: int, device: torch.device) -> Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device).mul_(seqlen)


# ---------------------------------------------------------------------------------------- checks


def _refuse(dropout_p: float, softcap: float, alibi_slopes: Tensor | None) -> None:
    """What flash-attn has and these functions have not."""
    for name, got, off in (
        ("dropout_p", dropout_p, 0.0),
        ("softcap", softcap, 0.0),
        ("alibi_slopes", alibi_slopes, None),
    ):
        if got is not off and (isinstance(got, Tensor) or got != off):
            what = f"a tensor {shape_of(got)}" if isinstance(got, Tensor) else got
            raise NotImplementedError(f"{name} is not supported: got {what}, accepted is {off}")


def _is_fp8(q: Tensor, descales: _Descales) -> bool:
    is_fp8 = isinstance(q, Tensor) and q.dtype is torch.float8_e4m3fn
    for name, t in descales._asdict().items():
        if t is not None and not is_fp8:
            raise ValueError(f"{name} goes with tensors of float8_e4m3fn; leave it None")
    return is_fp8


def _check_inputs(ndim: int, is_fp8: bool = False, /, **tensors: Tensor) -> None:
    if not is_fp8:  # else ops.attention_fp8 looks
        check_float(**tensors)
    for name, t in tensors.items():
        if t.ndim != ndim:
            shape = "[batch, seqlen, heads, head_dim]" if ndim == 4 else "[tokens, heads, head_dim]"
            raise ValueError(f"{name} must be {shape}, got {shape_of(t)}")
        if t.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(
                f"{name} requires grad, and there is no backward pass: use torch.no_grad()"
            )


def _mask(
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    seqlen_k: int,
    return_lse: bool,
) -> _Mask:
    """flash-attn's window [i - left, i + right], -1 for no limit, as one that ops know."""
    left, right = (-1 if n < 0 or n >= seqlen_k else n for n in window_size)
    if causal:
        right = 0
    if right not in (0, left):
        raise NotImplementedError(
            f"window_size {tuple(window_size)} without causal is not supported; accepted are "
            "(left, 0) and (w, w)"
        )
    return _Mask(right == 0, softmax_scale, None if left < 0 else left + 1, return_lse)


def _lengths(
    cache_seqlens: int | Tensor | None, batch: int, room: int, has_new: bool, device: torch.device
) -> Tensor:
    """cache_seqlens as a tensor [B]."""
    if isinstance(cache_seqlens, Tensor):
        check_index("cache_seqlens", cache_seqlens, (batch,), device)
        return cache_seqlens
    if cache_seqlens is None:
        if has_new:
            raise ValueError("cache_seqlens must be given where k and v are")
        cache_seqlens = room
    if not 0 <= cache_seqlens <= room:
        raise ValueError(f"cache_seqlens must lie in 0..{room}, got {cache_seqlens}")
    return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=device)


def _check_new(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
) -> tuple[tuple[Tensor, Tensor] | None, ops.Rope | None]:
    """The new k and v, and their rope."""
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if k is None or v is None:
        if cos is not None:
            raise ValueError("rotary_cos and rotary_sin are for k and v, which are None")
        return None, None
    _check_inputs(4, k=k, v=v)
    check_float(q=q, k=k, v=v)
    if k.shape != v.shape or k.shape[0] != q.shape[0]:
        raise ValueError(f"k {shape_of(k)} and v {shape_of(v)} must both be [{q.shape[0]}, Sn, ...")
    rope = None if cos is None or sin is None else ops.Rope(cos.float(), sin.float(), None)
    return (k, v), None if rope is None else rope._replace(interleaved=interleaved)
