"""Every op in plain PyTorch, in fp32 (fp64 where the inputs are): the definitions that tests use.

Signatures, shapes and argument meanings are those of `minitron_kernels.ops`; nothing here is fast.
Each result is in the arithmetic's dtype: callers compare before rounding to the input dtype.
"""

from __future__ import annotations

import math

import torch

from minitron_kernels.ops import Norm, Rope

Tensor = torch.Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), with no rounding in between (Zhang & Sennrich 2019)."""
    x = _wide(x)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); the op writes the second over ``residual``."""
    total = _wide(x) + _wide(residual)
    return rms_norm(total, weight, eps), total


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate x [T, H, D] by cos, sin [T, R/2]; the first R features, the others pass (RoFormer)."""
    x = _wide(x)
    half = cos.shape[-1]
    c, s = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    head, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]
        head = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
    else:
        a, b = head[..., :half], head[..., half:]
        head = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
    return torch.cat((head, rest), dim=-1)


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    cos, sin = cos[positions.long()], sin[positions.long()]
    return rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = _wide(gate_up).chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def linear(x: Tensor, w: Tensor, residual: Tensor | None = None) -> Tensor:
    y = _wide(x) @ _wide(w).T
    return y if residual is None else y + _wide(residual)


def dequantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """What e4m3 x [R, K] stands for, in the dtype of scale, which is one element, [R, 1],
    [R, ceil(K/128)] or, of 128 x 128 blocks, [ceil(R/128), ceil(K/128)]."""
    wide = scale.reshape(1, 1) if scale.numel() == 1 else scale
    if wide.shape[0] not in (1, x.shape[0]):
        wide = wide.repeat_interleave(128, 0)[: x.shape[0]]
    if wide.shape[1] != 1:
        wide = wide.repeat_interleave(128, 1)[:, : x.shape[1]]
    return x.to(scale.dtype) * wide


def linear_fp8(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, residual: Tensor | None = None
) -> Tensor:
    return linear(dequantize_fp8(x, x_scale), dequantize_fp8(w, w_scale), residual)


def linear_fp8_swiglu(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    y = linear_fp8(x, w, x_scale, w_scale)
    return silu_and_mul(torch.cat((y[:, ::2], y[:, 1::2]), dim=-1))


def swiglu_mlp(
    x: Tensor,
    w_gate_up: Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    if norm is not None:
        x = rms_norm(x, norm.weight, norm.eps)
    if not isinstance(w_gate_up, Tensor):
        w_gate_up = torch.cat(tuple(w_gate_up))
    return linear(silu_and_mul(linear(x, w_gate_up)), w_down, residual)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence: q [Lq, Hq, D], k, v [Lk, Hk, D] -> out [Lq, Hq, D], lse [Hq, Lq].

    The last query is aligned with the last key; a query that sees no key gives 0 and lse -inf.
    """
    q, k, v = _wide(q), _wide(k), _wide(v)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    # distance of key j behind query i, with the last query standing on the last key
    i = torch.arange(q.shape[0])[:, None] + (k.shape[0] - q.shape[0])
    distance = i - torch.arange(k.shape[0])[None, :]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden |= distance < 0
    if window is not None:
        hidden |= distance.abs() >= window
    logits = logits.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    p = torch.exp(logits - lse[..., None]).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", p, v), lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    rope: Rope | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns (out [Tq, Hq, D], lse [Hq, Tq])."""
    outs, lses = [], []
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        qb, kb = (t[s[b] : s[b + 1]] for t, s in ((q, starts_q), (k, starts_k)))
        if rope is not None:
            n = kb.shape[0]
            positions = torch.arange(n)
            kb = rotate(kb, rope.cos[positions], rope.sin[positions], rope.interleaved)
            positions = torch.arange(n - qb.shape[0], n)
            qb = rotate(qb, rope.cos[positions], rope.sin[positions], rope.interleaved)
        out, lse = attend(qb, kb, v[starts_k[b] : starts_k[b + 1]], causal, softmax_scale, window)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses, dim=1)
