"""The ops' computations in PyTorch: of CPU tensors, and of CUDA tensors that no kernel serves.

Arguments have been checked by `ops.py`. A row of a CPU result does not depend on the rest of the
batch, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from minitron_kernels import _native

Tensor = torch.Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in fp32, round to x's dtype, multiply (transformers' order)."""
    x32 = x.float()
    squares = x32.square()  # its memory is used again: this is memory-bound
    scale = squares.mean(-1, keepdim=True).add_(eps).rsqrt_()
    return torch.mul(x32, scale, out=squares).to(x.dtype).mul_(weight)


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


_DTYPES = {
    torch.bfloat16: _native.BF16,
    torch.float16: _native.F16,
    torch.float32: _native.F32,
}


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def matmul(
    x: Tensor, w: Tensor, *, add: Tensor | None = None, swiglu_up: Tensor | None = None
) -> Tensor:
    """x [M, K] @ w [N, K]^T, + add [M, N], or silu(x @ w^T) * (x @ swiglu_up^T).

    CPU tensors go to mk_cpu_linear (csrc/cpu), whose sums and epilogues are fp32, rounded once, and
    whose every row's bits depend on that row alone. PyTorch's do not: MKL sums in an order that
    depends on M, so that a sequence would get other bits in a batch than alone.
    """
    if x.device.type != "cpu":
        y = F.linear(x, w)
        if swiglu_up is not None:
            return F.silu(y, inplace=True).mul_(F.linear(x, swiglu_up))
        return y if add is None else y.add_(add)
    x, w = _rows(x), _rows(w)
    out = torch.empty((x.shape[0], w.shape[0]), dtype=x.dtype)
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
        _DTYPES[x.dtype],
        torch.get_num_threads(),
        epilogue,
        0 if other is out else other.data_ptr(),
        0 if other is out else other.stride(0),
        0 if up is w else up.data_ptr(),
        0 if up is w else up.stride(0),
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
    """_attend, with queries that see no key (more queries than keys) set to 0 and lse -inf."""
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
    caches = tuple(cache.view(-1, *k.shape[1:]) for cache in (k_cache, v_cache))
    if slots.device.type == "cpu" and slots.numel():
        rows: list[int] = slots.tolist()
        first = rows[0]
        if first >= 0 and rows == list(range(first, first + len(rows))):  # as in most prompts
            for cache, new in zip(caches, (k, v), strict=True):
                cache[first : first + len(rows)].copy_(new)
            return
    kept = slots >= 0
    if not kept.all():
        k, v, slots = k[kept], v[kept], slots[kept]
    for cache, new in zip(caches, (k, v), strict=True):
        cache.index_copy_(0, slots.long(), new)


def cached_rows(cache: Tensor, pages: Sequence[int], num_tokens: int) -> Tensor:
    """The first num_tokens rows of a sequence's pages, [L, Hk, D]; no copy when they adjoin."""
    page = cache.shape[1]
    used = pages[: -(-num_tokens // page)]
    if all(b == a + 1 for a, b in pairwise(used)):
        first = used[0] if used else 0
        return cache[first : first + len(used)].flatten(0, 1)[:num_tokens]
    return cache[torch.tensor(used, device=cache.device)].flatten(0, 1)[:num_tokens]
