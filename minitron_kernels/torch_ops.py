"""The ops' computations in PyTorch: of CPU tensors, and of CUDA tensors that no kernel serves.

Arguments have been checked by `ops.py`. Rows do not depend on the rest of the batch (bit for bit in
float32 on the CPU).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
_log = logging.getLogger(__name__)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise in fp32, round to x's dtype, multiply (transformers' order)."""
    x32 = x.float()
    y = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


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


def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    """Dtypes of CPU tensors whose matrix products go to oneDNN directly, with its epilogues."""
    try:
        if not torch.backends.mkldnn.is_available():
            raise AttributeError("oneDNN is switched off")
        bf16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        assert torch.ops.mkldnn._linear_pointwise
    except AttributeError as error:
        _log.warning("CPU rows will depend on their batch: torch has no oneDNN linear (%s)", error)
        return ()
    return (torch.float32, torch.bfloat16) if bf16 else (torch.float32,)


_ONEDNN_DTYPES = _onednn_dtypes()


def matmul(
    x: Tensor,
    w: Tensor,
    *,
    silu: bool = False,
    mul: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """x [M, K] @ w [N, K]^T, then at most one epilogue: silu(y), y * mul or y + add ([M, N] each).

    Every row's bits are independent of M. torch's own float32 path is not like that: MKL's order of
    summation changes with M, so that a sequence would get other bits in a batch than alone, and
    elementwise kernels treat the last few elements of a tensor by another exp. oneDNN's matmul is,
    from M = 2 on, and applies the epilogue to its fp32 sums.
    """
    if x.device.type != "cpu" or x.dtype not in _ONEDNN_DTYPES or not x.numel():
        y = F.linear(x, w)
        if silu:
            return F.silu(y, inplace=True)
        return y.mul_(mul) if mul is not None else y.add_(add) if add is not None else y
    single = x.shape[0] == 1 and x.dtype is torch.float32
    if single:
        x = x.expand(2, -1).contiguous()
    other = mul if mul is not None else add
    if other is None:
        kind = "swish" if silu else "none"
        y = torch.ops.mkldnn._linear_pointwise(x, w, None, kind, [], "")
    else:
        other = other.expand(2, -1).contiguous() if single else other.contiguous()
        kind = "mul" if mul is not None else "add"
        y = torch.ops.mkldnn._linear_pointwise.binary(x, other, w, None, kind)
    return y[:1] if single else y


def _attend(
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
    out[blind:] = _attend(q[blind:], k, v, causal, scale, window)
    if lse is not None:
        lse[:, blind:] = _lse(q[blind:], k, causal, scale, window)


def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write rows of k, v [T, Hk, D] into the slots of the cache; a negative slot is skipped."""
    if slots.device.type == "cpu" and slots.numel() and int(slots.min()) < 0:
        kept = slots >= 0
        k, v, slots = k[kept], v[kept], slots[kept]
    slots = slots.long()
    k_cache.view(-1, *k.shape[1:]).index_copy_(0, slots, k)
    v_cache.view(-1, *v.shape[1:]).index_copy_(0, slots, v)


def cached_rows(cache: Tensor, pages: Sequence[int], num_tokens: int) -> Tensor:
    """The first num_tokens rows of a sequence's pages, [L, Hk, D]; no copy when they adjoin."""
    page = cache.shape[1]
    used = pages[: -(-num_tokens // page)]
    if all(b == a + 1 for a, b in pairwise(used)):
        first = used[0] if used else 0
        return cache[first : first + len(used)].flatten(0, 1)[:num_tokens]
    return cache[torch.tensor(used, device=cache.device)].flatten(0, 1)[:num_tokens]
