"""The ops' computations where the CUDA kernels do not serve: of CPU tensors by the CPU kernels, of
CUDA tensors in PyTorch.

Arguments have been checked by `ops.py`, but for what only a look into index tensors tells, which is
checked here, before anything is written. A row of a CPU result does not depend on the rest of the
batch, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from minitron_kernels import _native, cpu_ops
from minitron_kernels.block_types import GGML_NUMBERS, QUANT_TYPES
from minitron_kernels.checks import lengths_of, starts_of
from minitron_kernels.quantized import decode

if TYPE_CHECKING:
    from minitron_kernels.ops import Rope

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in fp32, round to x's dtype, multiply (transformers' order)."""
    if x.is_cpu:
        return cpu_ops.rms_norm(x, weight, eps)
    x32 = x.float()
    squares = x32.square()  # its memory is used again: this is memory-bound
    scale = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(x32, scale, out=squares).to(x.dtype).mul_(weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x; rms_norm of it."""
    if x.is_cpu and residual.is_contiguous():
        return cpu_ops.rms_norm(x, weight, eps, residual)
    residual += x
    return rms_norm(residual, weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    if gate_up.is_cpu:
        return cpu_ops.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    return cpu_ops.embedding(ids, table) if table.is_cpu else F.embedding(ids, table)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, D] rotated by the tables' rows ``positions``: a new tensor."""
    if x.is_cpu:
        return cpu_ops.rotated(x, cos, sin, positions, interleaved)
    return rotate(x, cos[positions][:, None], sin[positions][:, None], interleaved)


def rope_append(
    k: Tensor, v: Tensor, rope: Rope, cache: tuple[Tensor, Tensor], slots: Tensor
) -> None:
    """Write k, rotated, and v [T, Hk, D] to the slots of the cache; a negative slot is skipped."""
    cos, sin, positions, interleaved = rope
    assert positions is not None
    if k.is_cpu:
        cpu_ops.rope_append(None, None, (k, v), cos, sin, positions, interleaved, cache, slots)
    else:
        append(rotated(k, cos, sin, positions, interleaved), v, *cache, slots)


def qkv_rope_append(
    qkv: tuple[Tensor, Tensor, Tensor],
    rope: Rope,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
    pair_order: bool = False,
) -> Tensor:
    """rope_append of k and v; q, rotated, perhaps in its own memory.

    ``pair_order``: q and k come in the order of a PackedQKV's rows.
    """
    q, k, v = qkv
    cos, sin, positions, interleaved = rope
    assert positions is not None
    if q.is_cpu:
        out = q if q.is_contiguous() else torch.empty(q.shape, dtype=q.dtype)
        cpu_ops.rope_append(
            q, out, (k, v), cos, sin, positions, interleaved, cache, slots, pair_order
        )
        return out
    if pair_order:
        q, k = (from_pairs(t, 2 * cos.shape[1], interleaved) for t in (q, k))
    rope_append(k, v, rope, cache, slots)
    return rotated(q, cos, sin, positions, interleaved)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [T, H, D], cos and sin [T, 1, R/2] fp32 -> x rotated in fp32 and rounded once."""
    half = cos.shape[-1]
    x32 = x.float()
    if interleaved:
        a, b = x32[..., 0 : 2 * half : 2], x32[..., 1 : 2 * half : 2]
    else:
        a, b = x32[..., :half], x32[..., half : 2 * half]
    y = torch.empty_like(x32) if 2 * half == x.shape[-1] else x32.clone()
    first, second = (
        (y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2])
        if interleaved
        else (y[..., :half], y[..., half : 2 * half])
    )
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return y.to(x.dtype)


def from_pairs(x: Tensor, rotary_dim: int, interleaved: bool) -> Tensor:
    """x [T, H, D] in pair order (see PackedQKV) -> in the order of features."""
    if interleaved:
        return x
    first, second = x[..., :rotary_dim:2], x[..., 1:rotary_dim:2]
    return torch.cat((first, second, x[..., rotary_dim:]), dim=-1)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def matmul(
    x: Tensor,
    w: Tensor,
    *,
    add: Tensor | None = None,
    swiglu_up: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x [M, K] @ w [N, K]^T, + add [M, N], or silu(x @ w^T) * (x @ swiglu_up^T).

    ``out_dtype``: x's dtype (None) or float32.

    CPU tensors go to mk_cpu_linear (csrc/cpu), whose sums and epilogues are fp32, rounded once, and
    whose every row's bits depend on that row alone. PyTorch's do not: MKL sums in an order that
    depends on M, so that a sequence would get other bits in a batch than alone.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if x.device.type != "cpu":
        y = F.linear(x, w)
        if swiglu_up is not None:
            return F.silu(y, inplace=True).mul_(F.linear(x, swiglu_up))
        return (y if add is None else y.add_(add)).to(out_dtype)
    x, w = _rows(x), _rows(w)
    out = torch.empty((x.shape[0], w.shape[0]), dtype=out_dtype)
    epilogue, other, up = _native.EPILOGUE_NONE, out, w
    if swiglu_up is not None:
        epilogue, up = _native.EPILOGUE_SWIGLU, _rows(swiglu_up)
    elif add is not None:
        epilogue, other = _native.EPILOGUE_ADD, _rows(add)
    _native.cpu_linear(
        x.data_ptr(),
        w.data_ptr(),
        out.data_ptr(),
        x.stride(0),
        w.stride(0),
        out.stride(0),
        x.shape[0],
        w.shape[0],
        w.shape[1],
        cpu_ops.DTYPES[x.dtype],
        cpu_ops.num_threads(),
        epilogue,
        0 if other is out else other.data_ptr(),
        0 if other is out else other.stride(0),
        0 if up is w else up.data_ptr(),
        0 if up is w else up.stride(0),
        out_dtype=cpu_ops.DTYPES[out_dtype],
    )
    return out


def matmul_quant(
    x: Tensor,
    w: Tensor,
    kind: str,
    *,
    add: Tensor | None = None,
    swiglu_up: tuple[Tensor, str] | None = None,
    out_dtype: torch.dtype | None = None,
    int8_activations: bool = False,
) -> Tensor:
    """As `matmul`, of a quantised matrix: its blocks, uint8 [N, row bytes], and their type.

    CPU tensors go to mk_cpu_linear_quant, which reads the blocks as stored. Others are decoded in
    every call: the CUDA kernels take all but what they do not serve.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if not x.is_cpu:
        return decoded_matmul(x, w, kind, add, swiglu_up).to(out_dtype)
    out = torch.empty((x.shape[0], w.shape[0]), dtype=out_dtype)
    epilogue, up, up_kind = _native.EPILOGUE_NONE, None, kind
    if swiglu_up is not None:
        epilogue, (up, up_kind) = _native.EPILOGUE_SWIGLU, swiglu_up
    elif add is not None:
        epilogue, add = _native.EPILOGUE_ADD, _rows(add)
    product = _native.CpuQuantProduct(
        w.data_ptr(),
        w.shape[1],
        w.shape[0],
        GGML_NUMBERS[kind],
        out.data_ptr(),
        out.stride(0),
        epilogue,
        0 if add is None else add.data_ptr(),
        0 if add is None else add.stride(0),
        0 if up is None else up.data_ptr(),
        0 if up is None else up.shape[1],
        GGML_NUMBERS[up_kind],
        cpu_ops.DTYPES[out_dtype],
    )
    _cpu_products(x, [product], int8_activations)
    return out


def decoded_matmul(
    x: Tensor, w: Tensor, kind: str, add: Tensor | None, swiglu_up: tuple[Tensor, str] | None
) -> Tensor:
    """matmul_quant in PyTorch, on any device, in fp32."""
    x = x.float()
    y = F.linear(x, decode(w, kind, torch.float32).view(-1, x.shape[1]))
    if swiglu_up is not None:
        up = decode(*swiglu_up, torch.float32).view(-1, x.shape[1])
        return F.silu(y, inplace=True).mul_(F.linear(x, up))
    return y if add is None else y.add_(add)


def matmuls_quant(
    x: Tensor, matrices: Sequence[tuple[Tensor, str]], int8_activations: bool = False
) -> list[Tensor]:
    """x [M, K] @ w^T for several quantised matrices, with x read once."""
    if not x.is_cpu:
        return [matmul_quant(x, w, kind) for w, kind in matrices]
    outs = [torch.empty((x.shape[0], w.shape[0]), dtype=x.dtype) for w, _ in matrices]
    products = [
        _native.CpuQuantProduct(
            w.data_ptr(),
            w.shape[1],
            w.shape[0],
            GGML_NUMBERS[kind],
            out.data_ptr(),
            out.stride(0),
        )
        for (w, kind), out in zip(matrices, outs, strict=True)
    ]
    _cpu_products(x, products, int8_activations)
    return outs


def _cpu_products(x: Tensor, products: list[_native.CpuQuantProduct], int8: bool) -> None:
    x = _rows(x)
    m, k = x.shape
    _native.cpu_linear_quant(
        x.data_ptr(),
        x.stride(0),
        m,
        k,
        cpu_ops.DTYPES[x.dtype],
        products,
        cpu_ops.num_threads(),
        x_bits=8 if int8 else 0,
    )


def embedding_quant(ids: Tensor, table: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` of a table's blocks, uint8 [V, row bytes], decoded: [ids, H] of ``dtype``."""
    ids = ids.reshape(-1).contiguous()
    if not table.is_cpu:
        return decode(table.index_select(0, ids), kind, dtype).view(len(ids), -1)
    block = QUANT_TYPES[kind]
    out = torch.empty((len(ids), table.shape[1] // block.nbytes * block.elements), dtype=dtype)
    _native.cpu_dequantize(
        table.data_ptr(),
        table.shape[1],
        table.shape[0],
        out.shape[1],
        GGML_NUMBERS[kind],
        out.data_ptr(),
        out.stride(0),
        len(ids),
        cpu_ops.DTYPES[dtype],
        cpu_ops.num_threads(),
        ids.data_ptr(),
        _native.I32 if ids.dtype == torch.int32 else _native.I64,
    )
    return out


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None
) -> Tensor:
    """One sequence on PyTorch's SDPA: q [Lq, Hq, D], k, v [Lk, Hk, D] -> [Lq, Hq, D]."""
    (lq, hq, d), (lk, hk, _) = q.shape, k.shape
    kt, vt = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if lq == 1 and (window is None or lk <= window):
        # The queries of a KV group share K and V: let them be the rows of one matrix.
        out = F.scaled_dot_product_attention(q.view(1, hk, hq // hk, d), kt, vt, scale=scale)
        return out.reshape(1, hq, d)
    mask = None
    is_causal = causal and lq == lk and window is None
    if (causal and lq > 1 and not is_causal) or window is not None:
        distance = torch.arange(lk - lq, lk, device=q.device)[:, None]
        distance = distance - torch.arange(lk, device=q.device)
        mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            mask &= distance.abs() < window
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], kt, vt, mask, 0.0, is_causal, scale=scale, enable_gqa=hq != hk
    )
    return out[0].transpose(0, 1)


def _lse(q: Tensor, k: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    """log-sum-exp of the scaled, masked logits of one sequence, fp32 [Hq, Lq]."""
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("qhd,khd->hqk", q.float(), k.float().repeat_interleave(group, 1)) * scale
    distance = torch.arange(k.shape[0] - q.shape[0], k.shape[0], device=q.device)[:, None]
    distance = distance - torch.arange(k.shape[0], device=q.device)
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance.abs() >= window)
    return torch.logsumexp(logits.masked_fill(hidden, -math.inf), dim=-1)


def attend_into(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
) -> None:
    """attend, with queries that see no key (more queries than keys) set to 0 and lse -inf."""
    blind = q.shape[0] - k.shape[0] if causal else 0 if k.shape[0] else q.shape[0]
    if window is not None and not causal:
        blind = max(blind, q.shape[0] - k.shape[0] - window + 1)
    blind = min(max(blind, 0), q.shape[0])
    out[:blind] = 0
    if lse is not None:
        lse[:, :blind] = -math.inf
    if blind == q.shape[0]:
        return
    out[blind:] = attend(q[blind:], k, v, causal, scale, window)
    if lse is not None:
        lse[:, blind:] = _lse(q[blind:], k, causal, scale, window)


def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write rows of k, v [T, Hk, D] into the slots of the cache; a negative slot is skipped."""
    page = k_cache.shape[1]
    if slots.device.type == "cpu" and slots.numel() and k_cache.is_contiguous():
        rows: list[int] = slots.tolist()
        first = rows[0]
        if first >= 0 and rows == list(range(first, first + len(rows))):  # as in most prompts
            for cache, new in ((k_cache, k), (v_cache, v)):
                cache.view(-1, *k.shape[1:])[first : first + len(rows)].copy_(new)
            return
    kept = slots >= 0
    if not kept.all():
        k, v, slots = k[kept], v[kept], slots[kept]
    slots = slots.long()
    at = slots // page, slots % page
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.index_put_(at, new)


def cached_rows(cache: Tensor, pages: Sequence[int], num_tokens: int) -> Tensor:
    """The first num_tokens rows of a sequence's pages, [L, Hk, D]; no copy when they adjoin."""
    page = cache.shape[1]
    used = pages[: -(-num_tokens // page)]
    if all(b == a + 1 for a, b in pairwise(used)):
        first = used[0] if used else 0
        return cache[first : first + len(used)].flatten(0, 1)[:num_tokens]
    return cache[torch.tensor(used, device=cache.device)].flatten(0, 1)[:num_tokens]


def _new_attention(q: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse; the latter is empty if it is not wanted."""
    lse_shape = (q.shape[1], q.shape[0]) if return_lse else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=q.device)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _check_counts(counts: list[int], bounds: tuple[int, int | None]) -> None:
    """The lengths lie in min_seqlen_q ... max_seqlen_q; empty sequences do not matter."""
    smallest, largest = bounds[0], max(counts, default=0) if bounds[1] is None else bounds[1]
    if not all(smallest <= n <= largest for n in counts if n):
        raise ValueError(
            f"max_seqlen_q {largest} and min_seqlen_q {smallest}: a sequence has "
            f"{max(counts)} rows of q, another {min(n for n in counts if n)}"
        )


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlen_q: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    rope: Rope | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """ops.attention: out, lse."""
    if rope is not None or not q.is_cpu:  # else the kernel looks
        starts_q = starts_of("cu_seqlens_q", cu_seqlens[0], q.shape[0], "q")
        starts_k = starts_of("cu_seqlens_k", cu_seqlens[1], k.shape[0], "k")
        lengths = list(zip(lengths_of(starts_q), lengths_of(starts_k), strict=True))
        _check_counts([lq for lq, _ in lengths], (0, max_seqlen_q))
    if rope is not None:
        cos, sin, _, interleaved = rope
        if not all(lq <= lk <= cos.shape[0] for lq, lk in lengths):
            raise ValueError(
                f"with rope every sequence needs queries <= keys <= max_position {cos.shape[0]}"
            )
        for_q = [p for lq, lk in lengths for p in range(lk - lq, lk)]
        for_k = [p for _, lk in lengths for p in range(lk)]
        q = rotated(q, cos, sin, torch.tensor(for_q, device=q.device), interleaved)
        k = rotated(k, cos, sin, torch.tensor(for_k, device=q.device), interleaved)
    if q.is_cpu:
        return cpu_ops.attention(
            q,
            k,
            v,
            cu_seqlens[0],
            (0, max_seqlen_q),
            causal,
            scale,
            window,
            return_lse,
            cu_seqlens_k=cu_seqlens[1],
        )
    out, lse = _new_attention(q, return_lse)
    for i in range(len(lengths)):
        rows_q = slice(starts_q[i], starts_q[i + 1])
        rows_k = slice(starts_k[i], starts_k[i + 1])
        lse_i = lse[:, rows_q] if return_lse else None
        attend_into(out[rows_q], lse_i, q[rows_q], k[rows_k], v[rows_k], causal, scale, window)
    return out, lse


def paged_attention(
    q: Tensor,
    new: tuple[Tensor, Tensor] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    bounds: tuple[int, int | None],
    rope: Rope | None,
    causal: bool,
    scale: float,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """ops.attention_kvcache: out, lse. ``bounds`` are its min_seqlen_q and max_seqlen_q."""
    if q.is_cpu and new is None and rope is None:  # the kernel looks at all that follows
        return cpu_ops.attention(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q,
            bounds,
            causal,
            scale,
            window,
            return_lse,
            block_table=block_table,
            seqlens_k=cache_seqlens,
        )
    num_pages, page = k_cache.shape[:2]
    batch, max_pages = block_table.shape
    starts = list(range(batch + 1))
    if cu_seqlens_q is not None:
        starts = starts_of("cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
    counts = lengths_of(starts)
    _check_counts(counts, bounds)
    before: list[int] = cache_seqlens.tolist()
    tables: list[list[int]] = block_table.tolist()
    total = [n + (m if new is not None else 0) for n, m in zip(before, counts, strict=True)]
    for i in range(batch):
        if before[i] < 0 or total[i] > max_pages * page:
            raise ValueError(
                f"cache_seqlens[{i}]: {total[i]} tokens do not fit block_table's "
                f"{max_pages} x {page}"
            )
        if not all(0 <= p < num_pages for p in tables[i][: -(-total[i] // page)]):
            raise ValueError(f"block_table[{i}] names a page outside 0..{num_pages - 1}")
    if rope is not None:
        cos, sin, positions, interleaved = rope
        if positions is None:
            places = [p for n, m in zip(total, counts, strict=True) for p in range(n - m, n)]
            if places and not 0 <= min(places) <= max(places) < cos.shape[0]:
                raise ValueError(
                    f"rope: the rows stand at {min(places)}..{max(places)}, the tables have "
                    f"positions 0..{cos.shape[0] - 1}"
                )
            positions = torch.tensor(places, dtype=torch.int64, device=q.device)
        q = rotated(q, cos, sin, positions, interleaved)
    if new is not None:
        slots = torch.tensor(
            [
                tables[i][p // page] * page + p % page
                for i in range(batch)
                for p in range(before[i], total[i])
            ],
            dtype=torch.int64,
            device=q.device,
        )
        if rope is None:
            append(*new, k_cache, v_cache, slots)
        else:
            turn = rope._replace(positions=positions)
            rope_append(*new, turn, (k_cache, v_cache), slots)
    if q.is_cpu:
        return cpu_ops.attention(
            q,
            k_cache,
            v_cache,
            cu_seqlens_q,
            bounds,
            causal,
            scale,
            window,
            return_lse,
            block_table=block_table,
            seqlens_k=cache_seqlens,
            is_appended=new is not None,
        )
    if batch == 1 and not return_lse and 0 < q.shape[0] <= total[0]:
        k, v = (cached_rows(c, tables[0], total[0]) for c in (k_cache, v_cache))
        out = attend(q, k, v, causal, scale, window)  # as it is, with no copy
        return out.contiguous(), q.new_empty(0, dtype=torch.float32)
    out, lse = _new_attention(q, return_lse)
    for i in range(batch):
        own = slice(starts[i], starts[i + 1])
        k, v = (cached_rows(c, tables[i], total[i]) for c in (k_cache, v_cache))
        lse_i = lse[:, own] if return_lse else None
        attend_into(out[own], lse_i, q[own], k, v, causal, scale, window)
    return out, lse
