"""The operations that the model is made of. `reference.py` holds their fp32 definitions.

Each is registered as torch.ops.minitron_kernels.<name> with a fake kernel, so that torch.compile
takes it whole (fullgraph, dynamic shapes). An eager call goes straight to the implementation: the
dispatcher would cost more than launching a kernel (bench/bench_call_overhead.py). CPU tensors are
computed by `torch_ops.py`, CUDA tensors by the compiled kernels (`cuda_ops.py`) where there is one.

Conventions: T tokens of all sequences packed along dimension 0 (no padding), Hq query heads, Hk
key/value heads (Hq a multiple of Hk), D = head_dim. Activations are bfloat16, float16 or float32;
sums are accumulated in fp32. The paged cache is [pages, page, Hk, D]; a *slot* is
page_index * page + offset. Inputs are never modified unless the docstring says so. Bad arguments
raise ValueError or TypeError that name the argument, before anything is computed or written.

A row's result does not depend on the other rows of the batch (bit for bit in float32 on the CPU).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F

from minitron_kernels import cuda_ops, torch_ops

Tensor = torch.Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Norm(NamedTuple):
    """An RMSNorm that rides on the op after it."""

    weight: Tensor  # [H]
    eps: float


class Rope(NamedTuple):
    """Rotary tables and the position of every token.

    ``cos``, ``sin``: fp32 [max_position, R/2], R <= D rotated features. ``positions``: int32/int64
    [T], or None where an op can tell them from the sequence lengths. ``interleaved``: pairs are
    features (2i, 2i+1), as in GGUF's llama; else (i, i + R/2), as in Hugging Face's.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None = None
    interleaved: bool = False


# ---------------------------------------------------------------------------------- registration

_LIBRARY = torch.library.Library("minitron_kernels", "DEF")
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _op(
    schema: str, fake: Callable[..., object]
) -> Callable[[Callable[_Args, _Result]], Callable[_Args, _Result]]:
    """Register a function as an op of CPU and CUDA tensors; ``fake`` tells its outputs' shapes."""

    def register(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CPU")
        _LIBRARY.impl(name, function, "CUDA")
        torch.library.register_fake(f"minitron_kernels::{name}", fake, lib=_LIBRARY)
        registered = getattr(torch.ops.minitron_kernels, name).default

        @functools.wraps(function)
        def call(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
            if torch.compiler.is_compiling():
                result: _Result = registered(*args, **kwargs)
                return result
            return function(*args, **kwargs)

        return call

    return register


# ---------------------------------------------------------------------------------------- checks


def _shape(t: Tensor) -> str:
    return "x".join(map(str, t.shape)) or "scalar"


def _check_float(**tensors: Tensor) -> None:
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


def _check_index(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {got}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, expected {device}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {'x'.join(map(str, shape))}, got {_shape(t)}")


def _check_rope(rope: Rope, head_dim: int) -> None:
    for name, t in (("rope.cos", rope.cos), ("rope.sin", rope.sin)):
        if t.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {t.dtype}")
        if t.ndim != 2 or not (0 < 2 * t.shape[1] <= head_dim):
            raise ValueError(
                f"{name} must be [max_position, R/2] with R <= head_dim {head_dim}, got {_shape(t)}"
            )
    if rope.cos.shape != rope.sin.shape:
        raise ValueError(
            f"rope.cos {_shape(rope.cos)} and rope.sin {_shape(rope.sin)} differ in shape"
        )


def _check_range(name: str, t: Tensor, low: int, high: int) -> None:
    """Every element lies in low..high-1 (on the host: an index error names the argument)."""
    if t.numel() and t.device.type == "cpu":
        smallest, largest = (int(v) for v in torch.aminmax(t))
        if low > smallest or largest >= high:
            raise ValueError(f"{name} must lie in {low}..{high - 1}, got {smallest}..{largest}")


def _starts(name: str, cu_seqlens: Tensor, total: int, what: str) -> list[int]:
    """Cumulative lengths as a list, checked: 0, ascending, ending at ``total``."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} must have shape [batch + 1], got {_shape(cu_seqlens)}")
    starts: list[int] = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != total or not all(a <= b for a, b in pairwise(starts)):
        raise ValueError(
            f"{name} must ascend from 0 to the {total} rows of {what}, "
            f"got {starts[:4]}..{starts[-1]}"
        )
    return starts


def _lengths(starts: list[int]) -> list[int]:
    return [b - a for a, b in pairwise(starts)]


def _check_heads(q: Tensor, k: Tensor, v: Tensor, kv_ndim: int = 3) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must be [T, Hq, D], got {_shape(q)}")
    if k.ndim != kv_ndim or k.shape != v.shape:
        raise ValueError(f"k is {_shape(k)} and v is {_shape(v)}")
    if q.shape[2] != k.shape[-1]:
        raise ValueError(f"head_dim of q ({q.shape[2]}) and of k ({k.shape[-1]}) must be equal")
    if k.shape[-2] <= 0 or q.shape[1] % k.shape[-2] != 0:
        raise ValueError(
            f"query heads ({q.shape[1]}) must be a multiple of key/value heads ({k.shape[-2]})"
        )


def _check_window(window: int | None) -> None:
    if window is not None and window <= 0:
        raise ValueError(f"window must be positive or None, got {window}")


# ------------------------------------------------------------------------------- norm, rope, act


def _check_norm(x: Tensor, weight: Tensor) -> None:
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    if weight.ndim != 1 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape {x.shape[-1]} (the last of x), got {_shape(weight)}"
        )


@_op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda x, weight, eps: x.new_empty(x.shape),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in Hugging Face's rounding order.

    x [..., H], weight [H], of one dtype. The row is normalised in fp32, rounded to x's dtype and
    then multiplied with the weight (Zhang & Sennrich 2019; transformers' LlamaRMSNorm).
    """
    _check_float(x=x, weight=weight)
    _check_norm(x, weight)
    if cuda_ops.serves(x):
        return cuda_ops.rms_norm(x, weight, eps)
    return torch_ops.rms_norm(x, weight, eps)


@_op(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    lambda x, residual, weight, eps: x.new_empty(x.shape),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place; returns rms_norm(residual, weight, eps).

    x and residual [..., H] of one dtype; the sum is rounded to it before it is normalised.
    """
    _check_float(x=x, residual=residual, weight=weight)
    if x.shape != residual.shape:
        raise ValueError(f"residual must have x's shape {_shape(x)}, got {_shape(residual)}")
    _check_norm(x, weight)
    if cuda_ops.serves(x):
        return cuda_ops.add_rms_norm(x, residual, weight, eps)
    residual += x
    return torch_ops.rms_norm(residual, weight, eps)


def _rope_rows(rope: Rope, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin of every token, [T, 1, R/2]."""
    _check_positions(rope, num_tokens, device)
    return rope.cos[rope.positions][:, None], rope.sin[rope.positions][:, None]


def _check_positions(rope: Rope, num_tokens: int, device: torch.device) -> None:
    if rope.positions is None:
        raise ValueError("rope.positions is required here")
    _check_index("positions", rope.positions, (num_tokens,), device)
    _check_range("positions", rope.positions, 0, rope.cos.shape[0])


@_op(
    "apply_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, "
    "bool interleaved=False) -> (Tensor, Tensor)",
    lambda q, k, cos, sin, positions, interleaved=False: (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
    ),
)
def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotary embedding of packed q [T, Hq, D] and k [T, Hk, D]; returns rotated copies.

    cos, sin: fp32 [max_position, R/2]; features past R pass unchanged. positions: int32/int64 [T].
    ``interleaved`` pairs features (2i, 2i+1), else (i, i + R/2) (Su et al. 2021).
    """
    _check_float(q=q, k=k)
    for name, t in (("q", q), ("k", k)):
        if t.ndim != 3:
            raise ValueError(f"{name} must be [T, H, D], got {_shape(t)}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q {_shape(q)} and k {_shape(k)} must agree in tokens and head_dim")
    rope = Rope(cos, sin, positions, interleaved)
    _check_rope(rope, q.shape[2])
    _check_positions(rope, q.shape[0], q.device)
    if cuda_ops.serves(q):
        return cuda_ops.apply_rope(q, k, cos, sin, positions, interleaved)
    c, s = cos[positions][:, None], sin[positions][:, None]
    return torch_ops.rotate(q, c, s, interleaved), torch_ops.rotate(k, c, s, interleaved)


@_op(
    "silu_and_mul(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2I] (gate first) -> [..., I] (Shazeer 2020)."""
    _check_float(gate_up=gate_up)
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2 != 0:
        raise ValueError(f"gate_up must have an even last dimension, got {_shape(gate_up)}")
    if cuda_ops.serves(gate_up):
        return cuda_ops.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


# ----------------------------------------------------------------------------------------- linear


@_op(
    "linear(Tensor x, Tensor w, Tensor? residual=None) -> Tensor",
    lambda x, w, residual=None: x.new_empty((*x.shape[:-1], w.shape[0])),
)
def linear(x: Tensor, w: Tensor, residual: Tensor | None = None) -> Tensor:
    """x [..., K] @ w [N, K]^T (+ residual [..., N]) -> [..., N], in x's dtype."""
    _check_float(x=x, w=w)
    if w.ndim != 2:
        raise ValueError(f"w must be [N, K], got {_shape(w)}")
    if x.ndim < 1 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"the last dimension of x ({_shape(x)}) must be w's K = {w.shape[1]}")
    if residual is not None:
        _check_float(x=x, residual=residual)
        if residual.shape != (*x.shape[:-1], w.shape[0]):
            raise ValueError(
                f"residual must be {'x'.join(map(str, (*x.shape[:-1], w.shape[0])))}, "
                f"got {_shape(residual)}"
            )
    rows = x.reshape(-1, x.shape[-1])
    add = None if residual is None else residual.reshape(-1, w.shape[0])
    return torch_ops.matmul(rows, w, add=add).view(*x.shape[:-1], w.shape[0])


def swiglu_mlp(
    x: Tensor,
    w_gate_up: Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) (+ residual), x optionally RMS-normalised first (Shazeer 2020).

    x [T, H]; w_gate_up [2I, H] with gate's rows first, or the pair (gate [I, H], up [I, H]);
    w_down [H, I]; residual [T, H]. Returns a new [T, H].
    """
    gate, up = w_gate_up.chunk(2) if isinstance(w_gate_up, Tensor) else w_gate_up
    weight, eps = norm if norm is not None else (None, 0.0)
    return _swiglu_mlp(x, gate, up, w_down, weight, eps, residual)


@_op(
    "swiglu_mlp(Tensor x, Tensor gate, Tensor up, Tensor w_down, Tensor? norm_weight, float eps, "
    "Tensor? residual) -> Tensor",
    lambda x, gate, up, w_down, norm_weight, eps, residual: x.new_empty(
        (x.shape[0], w_down.shape[0])
    ),
)
def _swiglu_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    w_down: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
) -> Tensor:
    tensors = {"x": x, "gate": gate, "up": up, "w_down": w_down}
    _check_float(**tensors if residual is None else {**tensors, "residual": residual})
    if x.ndim != 2:
        raise ValueError(f"x must be [T, H], got {_shape(x)}")
    if gate.ndim != 2 or gate.shape != up.shape or gate.shape[1] != x.shape[1]:
        raise ValueError(f"gate {_shape(gate)} and up {_shape(up)} must both be [I, {x.shape[1]}]")
    if w_down.ndim != 2 or w_down.shape[1] != gate.shape[0]:
        raise ValueError(f"w_down must be [H, {gate.shape[0]}], got {_shape(w_down)}")
    if residual is not None and residual.shape != (x.shape[0], w_down.shape[0]):
        raise ValueError(f"residual must be {x.shape[0]}x{w_down.shape[0]}")
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    return torch_ops.matmul(torch_ops.matmul(x, gate, swiglu_up=up), w_down, add=residual)


# -------------------------------------------------------------------------------------- attention


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
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Grouped-query attention over packed sequences (Dao et al. 2022, Ainslie et al. 2023).

    q [Tq, Hq, D], k and v [Tk, Hk, D]; cu_seqlens_*: int32/int64 [B + 1]. In each sequence the last
    query stands on the last key. ``causal`` hides later keys; ``window`` = W hides keys at a
    distance of W or more. softmax_scale defaults to 1/sqrt(D). With ``rope``, q and k are rotated
    by their position in the sequence (rope.positions is not used). A query that sees no key gives
    zeros. Returns out [Tq, Hq, D], with ``return_lse`` also lse fp32 [Hq, Tq] (natural logarithm).
    """
    cos, sin, _, interleaved = rope if rope is not None else (None, None, None, False)
    out, lse = _attention(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
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


@_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "bool causal, float? softmax_scale, int? window, Tensor? cos, Tensor? sin, bool interleaved, "
    "bool return_lse) -> (Tensor, Tensor)",
    _fake_attention,
)
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    softmax_scale: float | None,
    window: int | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    _check_float(q=q, k=k, v=v)
    _check_heads(q, k, v)
    _check_window(window)
    starts_q = _starts("cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
    starts_k = _starts("cu_seqlens_k", cu_seqlens_k, k.shape[0], "k")
    if len(starts_q) != len(starts_k):
        raise ValueError(
            f"cu_seqlens_q has {len(starts_q) - 1} sequences, cu_seqlens_k {len(starts_k) - 1}"
        )
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    if cos is not None and sin is not None:
        lengths = list(zip(_lengths(starts_q), _lengths(starts_k), strict=True))
        _check_rope(Rope(cos, sin), q.shape[2])
        if not all(lq <= lk <= cos.shape[0] for lq, lk in lengths):
            raise ValueError(
                f"with rope every sequence needs queries <= keys <= max_position {cos.shape[0]}"
            )
        for_q = [p for lq, lk in lengths for p in range(lk - lq, lk)]
        for_k = [p for _, lk in lengths for p in range(lk)]
        q = torch_ops.rotate(q, cos[for_q][:, None], sin[for_q][:, None], interleaved)
        k = torch_ops.rotate(k, cos[for_k][:, None], sin[for_k][:, None], interleaved)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = _fake_attention(q, return_lse)[1]
    for i in range(len(starts_q) - 1):
        rows_q = slice(starts_q[i], starts_q[i + 1])
        rows_k = slice(starts_k[i], starts_k[i + 1])
        lse_i = lse[:, rows_q] if return_lse else None
        torch_ops.attend_into(
            out[rows_q], lse_i, q[rows_q], k[rows_k], v[rows_k], causal, scale, window
        )
    return out, lse


def _check_cache(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.ndim != 4:
            raise ValueError(f"{name} must be [pages, page, Hk, D], got {_shape(t)}")
        if not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    if k_cache.shape != v_cache.shape:
        raise ValueError(f"k_cache {_shape(k_cache)} and v_cache {_shape(v_cache)} differ in shape")


def rope_append(
    k: Tensor, v: Tensor, rope: Rope, cache: tuple[Tensor, Tensor], slots: Tensor
) -> None:
    """Rotate k, and write k and v [T, Hk, D] to the slots of a paged cache.

    rope.positions int32/int64 [T]; cache = (k_cache, v_cache), each [pages, page, Hk, D], written
    in place at ``slots`` (int32/int64 [T]); a negative slot is skipped.
    """
    if rope.positions is None:
        raise ValueError("rope.positions is required here")
    _rope_append(k, v, rope.cos, rope.sin, rope.positions, rope.interleaved, *cache, slots)


@_op(
    "rope_append(Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, bool interleaved, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    lambda *args: None,
)
def _rope_append(
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> None:
    _check_float(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    _check_cache(k_cache, v_cache)
    num_pages, page, hk, d = k_cache.shape
    for name, t in (("k", k), ("v", v)):
        if t.ndim != 3 or t.shape[1:] != (hk, d) or t.shape[0] != k.shape[0]:
            raise ValueError(f"{name} must be {k.shape[0]}x{hk}x{d}, got {_shape(t)}")
    rope = Rope(cos, sin, positions, interleaved)
    _check_rope(rope, d)
    _check_positions(rope, k.shape[0], k.device)
    _check_index("slots", slots, (k.shape[0],), k.device)
    _check_range("slots", slots, -(1 << 62), num_pages * page)
    if cuda_ops.serves(k):
        cuda_ops.rope_append(k, v, cos, sin, positions, interleaved, k_cache, v_cache, slots)
        return
    rotated = torch_ops.rotate(k, cos[positions][:, None], sin[positions][:, None], interleaved)
    torch_ops.append(rotated, v, k_cache, v_cache, slots)


def qkv_rope_append(
    x: Tensor,
    norm: Norm | None,
    w_qkv: tuple[Tensor, Tensor, Tensor],
    rope: Rope,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
) -> Tensor:
    """RMSNorm, Q/K/V projection and RoPE of x; K and V go to the cache, Q [T, Hq, D] is returned.

    x [T, H]; w_qkv = (wq [Hq*D, H], wk [Hk*D, H], wv [Hk*D, H]); cache = (k_cache, v_cache), each
    [pages, page, Hk, D], written in place at ``slots`` (int32/int64 [T]; negative: skipped).
    """
    if rope.positions is None:
        raise ValueError("rope.positions is required here")
    weight, eps = norm if norm is not None else (None, 0.0)
    return _qkv_rope_append(
        x,
        weight,
        eps,
        *w_qkv,
        rope.cos,
        rope.sin,
        rope.positions,
        rope.interleaved,
        *cache,
        slots,
    )


def _fake_qkv(x: Tensor, norm_weight: Tensor, eps: float, wq: Tensor, *args: Tensor) -> Tensor:
    head_dim = args[-3].shape[3]
    return x.new_empty((x.shape[0], wq.shape[0] // head_dim, head_dim))


@_op(
    "qkv_rope_append(Tensor x, Tensor? norm_weight, float eps, Tensor wq, Tensor wk, Tensor wv, "
    "Tensor cos, Tensor sin, Tensor positions, bool interleaved, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor slots) -> Tensor",
    _fake_qkv,
)
def _qkv_rope_append(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    rope = Rope(cos, sin, positions, interleaved)
    _check_float(x=x, wq=wq, wk=wk, wv=wv, k_cache=k_cache, v_cache=v_cache)
    _check_cache(k_cache, v_cache)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, H], got {_shape(x)}")
    num_pages, page, hk, d = k_cache.shape
    for name, w in (("wk", wk), ("wv", wv)):
        if w.shape[0] != hk * d:
            raise ValueError(f"{name} must have Hk*D = {hk * d} rows, got {_shape(w)}")
    if wq.shape[0] <= 0 or wq.shape[0] % (hk * d) != 0:
        raise ValueError(f"wq must have a multiple of Hk*D = {hk * d} rows, got {_shape(wq)}")
    _check_rope(rope, d)
    _check_positions(rope, x.shape[0], x.device)
    _check_index("slots", slots, (x.shape[0],), x.device)
    _check_range("slots", slots, -(1 << 62), num_pages * page)
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps)
    q, k, v = (linear(x, w).view(x.shape[0], -1, d) for w in (wq, wk, wv))
    if cuda_ops.serves(x):
        cuda_ops.rope_append(k, v, cos, sin, positions, interleaved, k_cache, v_cache, slots)
        return cuda_ops.apply_rope(q, k[:, :0], cos, sin, positions, interleaved)[0]
    c, s = cos[positions][:, None], sin[positions][:, None]
    torch_ops.append(torch_ops.rotate(k, c, s, interleaved), v, k_cache, v_cache, slots)
    return torch_ops.rotate(q, c, s, interleaved)


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


@_op(
    "attention_kvcache(Tensor q, Tensor? k_new, Tensor? v_new, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor block_table, Tensor cache_seqlens, Tensor? cu_seqlens_q, "
    "Tensor? cos, Tensor? sin, Tensor? positions, bool interleaved, bool causal, "
    "float? softmax_scale, int? window, bool return_lse) -> (Tensor, Tensor)",
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
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    interleaved: bool,
    causal: bool,
    softmax_scale: float | None,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    rope = None if cos is None or sin is None else Rope(cos, sin, positions, interleaved)
    _check_float(q=q, k_cache=k_cache, v_cache=v_cache)
    _check_cache(k_cache, v_cache)
    _check_heads(q, k_cache, v_cache, kv_ndim=4)
    _check_window(window)
    num_pages, page, hk, d = k_cache.shape
    if block_table.ndim != 2:
        raise ValueError(f"block_table must be [B, pages], got {_shape(block_table)}")
    batch, max_pages = block_table.shape
    _check_index("block_table", block_table, (batch, max_pages), q.device)
    _check_index("cache_seqlens", cache_seqlens, (batch,), q.device)
    if cu_seqlens_q is None:
        if q.shape[0] != batch:
            raise ValueError(f"q has {q.shape[0]} rows for {batch} sequences")
        starts = list(range(batch + 1))
    else:
        starts = _starts("cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
        if len(starts) != batch + 1:
            raise ValueError(f"cu_seqlens_q must have {batch + 1} entries, got {len(starts)}")
    if (k_new is None) != (v_new is None):
        raise ValueError("k_new and v_new must be given together")
    before: list[int] = cache_seqlens.tolist()
    tables: list[list[int]] = block_table.tolist()
    counts = _lengths(starts)
    added = counts if k_new is not None else [0] * batch
    for i in range(batch):
        length = before[i] + added[i]
        if before[i] < 0 or length > max_pages * page:
            raise ValueError(
                f"cache_seqlens[{i}]: {length} tokens do not fit block_table's {max_pages} x {page}"
            )
        if not all(0 <= p < num_pages for p in tables[i][: -(-length // page)]):
            raise ValueError(f"block_table[{i}] names a page outside 0..{num_pages - 1}")
    if rope is not None:
        _check_rope(rope, d)
        if rope.positions is None:
            last = [n + m for n, m in zip(before, added, strict=True)]
            places = [p for n, m in zip(last, counts, strict=True) for p in range(n - m, n)]
            rope = rope._replace(positions=torch.tensor(places, device=q.device))
        rows = _rope_rows(rope, q.shape[0], q.device)
        q = torch_ops.rotate(q, *rows, interleaved)
    if k_new is not None and v_new is not None:
        _check_float(q=q, k_new=k_new, v_new=v_new)
        for name, t in (("k_new", k_new), ("v_new", v_new)):
            if tuple(t.shape) != (q.shape[0], hk, d):
                raise ValueError(f"{name} must be {q.shape[0]}x{hk}x{d}, got {_shape(t)}")
        slots = [
            tables[i][p // page] * page + p % page
            for i in range(batch)
            for p in range(before[i], before[i] + added[i])
        ]
        k_new = k_new if rope is None else torch_ops.rotate(k_new, *rows, interleaved)
        torch_ops.append(k_new, v_new, k_cache, v_cache, torch.tensor(slots, device=q.device))
    scale = 1 / math.sqrt(d) if softmax_scale is None else softmax_scale
    lse = _fake_attention(q, return_lse)[1]
    if batch == 1 and not return_lse and 0 < q.shape[0] <= before[0] + added[0]:
        k, v = (
            torch_ops.cached_rows(c, tables[0], before[0] + added[0]) for c in (k_cache, v_cache)
        )
        out = torch_ops.attend(q, k, v, causal, scale, window)  # as it is, with no copy
        return out.contiguous(), lse
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for i in range(batch):
        own = slice(starts[i], starts[i + 1])
        length = before[i] + added[i]
        k, v = (torch_ops.cached_rows(c, tables[i], length) for c in (k_cache, v_cache))
        lse_i = lse[:, own] if return_lse else None
        torch_ops.attend_into(out[own], lse_i, q[own], k, v, causal, scale, window)
    return out, lse


@_op(
    "embedding(Tensor ids, Tensor table) -> Tensor",
    lambda ids, table: table.new_empty((*ids.shape, table.shape[1])),
)
def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """Rows ``ids`` (int32/int64 [T]) of table [V, H] -> [T, H]; an id out of range is an error."""
    _check_float(table=table)
    _check_index("ids", ids, tuple(ids.shape), table.device)
    _check_range("ids", ids, 0, table.shape[0])
    if cuda_ops.serves(table):
        return cuda_ops.embedding(ids, table)
    return F.embedding(ids, table)
