"""The ops as a model's author writes them in PyTorch: the eager baseline, and what is compiled.

The order of operations and of roundings is that of the Llama code in transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
EPS = 1e-5


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)
    return weight * x32.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    residual += x
    return rms_norm(residual, weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [T, H, D]; cos and sin [T, D] of q's dtype, for the positions of the rows."""
    cos, sin = cos[:, None], sin[:, None]
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_mlp(x: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x + down(silu(gate) * up) of the normalised x."""
    return x + F.linear(silu_and_mul(F.linear(rms_norm(x, norm), gate_up)), down)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """q [B, Hq, S, D], k and v [B, Hk, L, D]; the last query stands on the last key."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal and q.shape[2] > 1:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
        hidden = hidden.triu(k.shape[2] - q.shape[2] + 1)
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """PyTorch's fused attention; shapes as above, causal with as many queries as keys."""
    is_causal = causal and q.shape[2] > 1
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def layer(
    x: Tensor, weights: dict[str, Tensor], cos: Tensor, sin: Tensor, k_cache: Tensor,
    v_cache: Tensor, start: int,
) -> Tensor:  # fmt: skip
    """A decoder layer. x [B, S, H]; caches [B, Hk, L, D] with `start` tokens get S more."""
    batch, new, hidden = x.shape
    kv_heads, dim = k_cache.shape[1], k_cache.shape[3]
    normed = rms_norm(x, weights["input_norm"])
    q = F.linear(normed, weights["q"]).view(batch * new, -1, dim)
    k, v = (F.linear(normed, weights[n]).view(batch * new, kv_heads, dim) for n in ("k", "v"))
    q, k = apply_rope(q, k, cos, sin)
    q, k, v = (t.view(batch, new, -1, dim).transpose(1, 2) for t in (q, k, v))
    end = start + new
    k_cache[:, :, start:end], v_cache[:, :, start:end] = k, v
    out = sdpa(q, k_cache[:, :, :end], v_cache[:, :, :end], causal=True)
    x = x + F.linear(out.transpose(1, 2).reshape(batch, new, -1), weights["o"])
    mlp = swiglu_mlp(
        x.view(batch * new, hidden), weights["post_norm"], weights["gate_up"], weights["down"]
    )
    return mlp.view(batch, new, hidden)
