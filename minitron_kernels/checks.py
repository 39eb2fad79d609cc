"""Checks of the ops' arguments: each names the argument, what it got and what it takes."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from minitron_kernels import cuda_ops

if TYPE_CHECKING:
    from minitron_kernels.ops import Rope
    from minitron_kernels.packing import PackedQKV

Tensor = torch.Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def shape_of(t: Tensor) -> str:
    """As messages have it: "4x128"."""
    return "x".join(map(str, t.shape)) or "scalar"


def _kind(t: object) -> object:
    return t.dtype if isinstance(t, Tensor) else type(t).__name__


def check_dtype(name: str, t: Tensor, dtype: torch.dtype) -> None:
    if not isinstance(t, Tensor) or t.dtype is not dtype:
        raise TypeError(f"{name} must be a {str(dtype)[6:]} tensor, got {_kind(t)}")


def check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, expected {device}")


def on_host(t: Tensor) -> bool:
    """Whether the elements can be looked at without waiting for a GPU."""
    return t.device.type == "cpu" and not cuda_ops.emulate


def check_float(**tensors: Tensor) -> None:
    """All arguments are tensors of one floating dtype, on one device."""
    first = dtype = device = None
    for name, t in tensors.items():  # part of every call: nothing is computed twice
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
        if first is None:
            first, dtype, device = name, t.dtype, t.device
            if dtype not in DTYPES:
                raise TypeError(f"{name} must be bfloat16, float16 or float32, got {dtype}")
        elif t.dtype is not dtype:
            raise TypeError(f"{name} is {t.dtype} but {first} is {dtype}")
        elif t.device != device:
            raise ValueError(f"{name} is on {t.device} but {first} is on {device}")


def check_operands(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, **others: Tensor
) -> None:
    """check_float of what a product takes; norm_weight fits x, which has at least one dimension."""
    tensors = {"x": x, **others}
    if residual is not None:
        tensors["residual"] = residual
    if norm_weight is not None:
        tensors["norm_weight"] = norm_weight
    check_float(**tensors)
    if norm_weight is not None:
        check_norm(x, norm_weight)
    elif x.ndim == 0:
        raise ValueError("x must have at least one dimension")


def check_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape != shape:
        raise ValueError(f"{name} must be {'x'.join(map(str, shape))}, got {shape_of(t)}")


def check_index(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {_kind(t)}")
    check_device(name, t, device)
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {'x'.join(map(str, shape))}, got {shape_of(t)}")


def check_rope(rope: Rope, head_dim: int) -> None:
    for name, t in (("rope.cos", rope.cos), ("rope.sin", rope.sin)):
        if t.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {t.dtype}")
        if t.ndim != 2 or not (0 < 2 * t.shape[1] <= head_dim):
            raise ValueError(
                f"{name} must be [max_position, R/2] with R <= head_dim {head_dim}, "
                f"got {shape_of(t)}"
            )
    if rope.cos.shape != rope.sin.shape:
        raise ValueError(
            f"rope.cos {shape_of(rope.cos)} and rope.sin {shape_of(rope.sin)} differ in shape"
        )


def check_range(name: str, t: Tensor, low: int, high: int) -> None:
    """Every element lies in low..high-1. Of a CUDA tensor only the kernels know: none waits."""
    if t.numel() and on_host(t):
        smallest, largest = (int(v) for v in torch.aminmax(t))
        if low > smallest or largest >= high:
            raise ValueError(f"{name} must lie in {low}..{high - 1}, got {smallest}..{largest}")


def check_cu_seqlens(name: str, cu_seqlens: Tensor, device: torch.device) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {_kind(cu_seqlens)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} must have shape [batch + 1], got {shape_of(cu_seqlens)}")
    check_device(name, cu_seqlens, device)


def starts_of(name: str, cu_seqlens: Tensor, total: int, what: str) -> list[int]:
    """Cumulative lengths as a list, checked: 0, ascending, ending at ``total``."""
    starts: list[int] = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total or not all(a <= b for a, b in pairwise(starts)):
        raise ValueError(
            f"{name} must ascend from 0 to the {total} rows of {what}, "
            f"got {starts[:4]}..{starts[-1]}"
        )
    return starts


def lengths_of(starts: list[int]) -> list[int]:
    return [b - a for a, b in pairwise(starts)]


def check_heads(q: Tensor, k: Tensor, v: Tensor, kv_ndim: int = 3) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must be [T, Hq, D], got {shape_of(q)}")
    if k.ndim != kv_ndim or k.shape != v.shape:
        raise ValueError(f"k is {shape_of(k)} and v is {shape_of(v)}")
    if q.shape[2] != k.shape[-1]:
        raise ValueError(f"head_dim of q ({q.shape[2]}) and of k ({k.shape[-1]}) must be equal")
    if k.shape[-2] <= 0 or q.shape[1] % k.shape[-2] != 0:
        raise ValueError(
            f"query heads ({q.shape[1]}) must be a multiple of key/value heads ({k.shape[-2]})"
        )


def check_window(window: int | None) -> None:
    if window is not None and window <= 0:
        raise ValueError(f"window must be positive or None, got {window}")


def check_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None,
    window: int | None,
) -> None:
    """What attention over packed sequences takes, but for the dtype."""
    check_heads(q, k, v)
    check_window(window)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q has {len(cu_seqlens_q) - 1} sequences, "
            f"cu_seqlens_k {len(cu_seqlens_k) - 1}"
        )
    check_max_seqlen(max_seqlen_q)


def check_norm(x: Tensor, weight: Tensor) -> None:
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    if weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape {x.shape[-1]} (the last of x), got {shape_of(weight)}"
        )


def check_out_dtype(
    x: Tensor, out_dtype: torch.dtype | None, residual: Tensor | None
) -> torch.dtype:
    """The dtype of a product of x: x's (None), or float32 if nothing is added."""
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if out_dtype is not x.dtype and (out_dtype is not torch.float32 or residual is not None):
        raise ValueError(
            f"out_dtype must be x's {x.dtype}, or float32 without residual, got {out_dtype}"
        )
    return out_dtype


def check_positions(rope: Rope, num_tokens: int, device: torch.device) -> None:
    if rope.positions is None:
        raise ValueError("rope.positions is required here")
    check_index("positions", rope.positions, (num_tokens,), device)


def check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.ndim != 4:
            raise ValueError(f"{name} must be [pages, page, Hk, D], got {shape_of(t)}")
        if t.stride(3) != 1:
            raise ValueError(f"the features of {name} must adjoin, their stride is {t.stride(3)}")
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache {shape_of(k_cache)} and v_cache {shape_of(v_cache)} differ in shape"
        )
    if k_cache.stride() != v_cache.stride():
        raise ValueError(
            f"k_cache and v_cache differ in strides: {k_cache.stride()}, {v_cache.stride()}"
        )


def check_max_seqlen(max_seqlen_q: int | None, min_seqlen_q: int = 0) -> None:
    if max_seqlen_q is not None and max_seqlen_q < max(min_seqlen_q, 0):
        raise ValueError(
            f"max_seqlen_q must be at least 0 and min_seqlen_q {min_seqlen_q}, got {max_seqlen_q}"
        )


def check_packed_qkv(w: PackedQKV, rope: Rope, k_cache: Tensor) -> None:
    """That the weight was packed for this rope, and fits the cache."""
    if w.rotary_dim != 2 * rope.cos.shape[-1] or w.interleaved != rope.interleaved:
        raise ValueError(
            f"w_qkv was packed for rotary_dim {w.rotary_dim}, interleaved {w.interleaved}; "
            f"rope has {2 * rope.cos.shape[-1]}, {rope.interleaved}"
        )
    rows = (w.num_q_heads + 2 * w.num_kv_heads) * w.head_dim
    if w.weight.ndim != 2 or w.weight.shape[0] != rows:
        raise ValueError(f"w_qkv.weight must have {rows} rows, got {shape_of(w.weight)}")
    if k_cache.ndim == 4 and tuple(k_cache.shape[2:]) != (w.num_kv_heads, w.head_dim):
        raise ValueError(
            f"k_cache has {k_cache.shape[2]} heads of {k_cache.shape[3]}, w_qkv "
            f"{w.num_kv_heads} of {w.head_dim}"
        )
