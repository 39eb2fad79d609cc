"""The operations that the model is made of. `reference.py` holds their fp32 definitions.

Each is registered as torch.ops.minitron_kernels.<name> with a fake kernel, so that torch.compile
takes it whole (fullgraph, dynamic shapes). An eager call goes straight to the implementation: the
dispatcher would cost more than launching a kernel (bench/bench_call_overhead.py). There are no
gradients: a backward pass through an op raises NotImplementedError, or warns. CPU tensors are
computed by `cpu_ops.py`, CUDA tensors by the compiled kernels (`cuda_ops.py`) where there is one.

Conventions: T tokens of all sequences packed along dimension 0 (no padding), Hq query heads, Hk
key/value heads (Hq a multiple of Hk), D = head_dim. Activations are bfloat16, float16 or float32;
sums are accumulated in fp32. The paged cache is [pages, page, Hk, D]; a *slot* is
page_index * page + offset. Inputs are never modified unless the docstring says so. Bad arguments
raise ValueError or TypeError that name the argument, before anything is written.

On the CPU a row's result does not depend on the other rows of the batch, bit for bit.
"""

from __future__ import annotations

import torch

from minitron_kernels import cuda_ops, quantized_ops, torch_ops
from minitron_kernels.attention import attention, attention_kvcache
from minitron_kernels.attention_fp8 import attention_fp8
from minitron_kernels.checks import (
    check_cache,
    check_float,
    check_index,
    check_norm,
    check_operands,
    check_out_dtype,
    check_packed_qkv,
    check_positions,
    check_rope,
    check_shape,
    on_host,
    shape_of,
)
from minitron_kernels.fp8 import (
    linear_fp8,
    linear_fp8_swiglu,
    quantize_fp8,
    quantize_fp8_weight,
)
from minitron_kernels.library import Norm, Rope, op
from minitron_kernels.packing import (
    PackedGateUp,
    PackedQKV,
    pack_gate_up,
    pack_qkv,
    unpack_gate_up,
    unpack_qkv,
)
from minitron_kernels.quantized_ops import is_quantized

Tensor = torch.Tensor

__all__ = [
    "Norm",
    "PackedGateUp",
    "PackedQKV",
    "Rope",
    "add_rms_norm",
    "append_kv",
    "apply_rope",
    "attention",
    "attention_fp8",
    "attention_kvcache",
    "embedding",
    "is_quantized",
    "linear",
    "linear_fp8",
    "linear_fp8_swiglu",
    "pack_gate_up",
    "pack_qkv",
    "qkv_rope_append",
    "quantize_fp8",
    "quantize_fp8_weight",
    "rms_norm",
    "rope_append",
    "silu_and_mul",
    "swiglu_mlp",
    "unpack_gate_up",
    "unpack_qkv",
]


# ------------------------------------------------------------------------------- norm, rope, act


@op(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda x, weight, eps: x.new_empty(x.shape),
)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension in Hugging Face's rounding order.

    x [..., H], weight [H], of one dtype. The row is normalised in fp32, rounded to x's dtype and
    then multiplied with the weight (Zhang & Sennrich 2019; transformers' LlamaRMSNorm).
    """
    check_float(x=x, weight=weight)
    check_norm(x, weight)
    if cuda_ops.serves(x):
        return cuda_ops.rms_norm(x, weight, eps)
    return torch_ops.rms_norm(x, weight, eps)


@op(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor",
    lambda x, residual, weight, eps: x.new_empty(x.shape),
)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """residual += x, in place; returns rms_norm(residual, weight, eps).

    x and residual [..., H] of one dtype; the sum is rounded to it before it is normalised.
    """
    check_float(x=x, residual=residual, weight=weight)
    if x.shape != residual.shape:
        raise ValueError(f"residual must have x's shape {shape_of(x)}, got {shape_of(residual)}")
    check_norm(x, weight)
    if cuda_ops.serves(x):
        return cuda_ops.add_rms_norm(x, residual, weight, eps)
    return torch_ops.add_rms_norm(x, residual, weight, eps)


@op(
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
    check_float(q=q, k=k)
    for name, t in (("q", q), ("k", k)):
        if t.ndim != 3:
            raise ValueError(f"{name} must be [T, H, D], got {shape_of(t)}")
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ValueError(f"q {shape_of(q)} and k {shape_of(k)} must agree in tokens and head_dim")
    rope = Rope(cos, sin, positions, interleaved)
    check_rope(rope, q.shape[2])
    check_positions(rope, q.shape[0], q.device)
    if cuda_ops.serves(q):
        return cuda_ops.apply_rope(q, k, cos, sin, positions, interleaved)
    rotated_q, rotated_k = (torch_ops.rotated(t, cos, sin, positions, interleaved) for t in (q, k))
    return rotated_q, rotated_k


@op(
    "silu_and_mul(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2)),
)
def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2I] (gate first) -> [..., I] (Shazeer 2020)."""
    check_float(gate_up=gate_up)
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2 != 0:
        raise ValueError(f"gate_up must have an even last dimension, got {shape_of(gate_up)}")
    if cuda_ops.serves(gate_up):
        return cuda_ops.silu_and_mul(gate_up)
    return torch_ops.silu_and_mul(gate_up)


# ----------------------------------------------------------------------------------------- linear


def linear(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None = None,
    *,
    norm: Norm | None = None,
    out_dtype: torch.dtype | None = None,
    int8_activations: bool = False,
) -> Tensor:
    """x [..., K] @ w [N, K]^T (+ residual [..., N]) -> [..., N], x optionally normalised first.

    w is dense, of x's dtype, or a QuantizedTensor. ``out_dtype``: x's (None), or float32 for sums
    that are not rounded, as logits want them; this one takes no residual. ``int8_activations``
    rounds x, as it enters the product with a QuantizedTensor on the CPU, to 8 bits: each 32
    elements of a row to multiples of 1/127 of their largest, which takes half as many products.
    """
    if is_quantized(w):
        return quantized_ops.linear(x, w, residual, norm, out_dtype, int8_activations)
    if int8_activations:
        raise ValueError("int8_activations is for quantised weights, and w is dense")
    weight, eps = norm if norm is not None else (None, 0.0)
    return _linear(x, w, residual, weight, eps, out_dtype)


def _fake_linear(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=out_dtype)


@op(
    "linear(Tensor x, Tensor w, Tensor? residual, Tensor? norm_weight, float eps, "
    "ScalarType? out_dtype) -> Tensor",
    _fake_linear,
)
def _linear(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> Tensor:
    check_operands(x, residual, norm_weight, w=w)
    if w.ndim != 2:
        raise ValueError(f"w must be [N, K], got {shape_of(w)}")
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"the last dimension of x ({shape_of(x)}) must be w's K = {w.shape[1]}")
    if residual is not None:
        check_shape("residual", residual, (*x.shape[:-1], w.shape[0]))
    out_dtype = check_out_dtype(x, out_dtype, residual)
    if cuda_ops.serves(x):
        return cuda_ops.linear(x, w, residual, norm_weight, eps, out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    if norm_weight is not None:
        rows = torch_ops.rms_norm(rows, norm_weight, eps)
    add = None if residual is None else residual.reshape(-1, w.shape[0])
    y = torch_ops.matmul(rows, w, add=add, out_dtype=out_dtype)
    return y.view(*x.shape[:-1], w.shape[0])


def swiglu_mlp(
    x: Tensor,
    w_gate_up: PackedGateUp | Tensor | tuple[Tensor, Tensor],
    w_down: Tensor,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    int8_activations: bool = False,
) -> Tensor:
    """down(silu(gate(x)) * up(x)) (+ residual), x optionally RMS-normalised first (Shazeer 2020).

    x [T, H]; w_gate_up a PackedGateUp, [2I, H] with gate's rows first, or the pair (gate [I, H],
    up [I, H]); w_down [H, I]; residual [T, H]. Each matrix is dense or a QuantizedTensor of a type
    of its own. Returns a new [T, H] of ``out_dtype``, as in `linear`; ``int8_activations`` is for
    the quantised ones among them, as there.

    On a GPU packed weights take two launches (and the norm one more when T > 64): gate and up are
    not written to memory, and silu(gate) * up is rounded once. Unpacked ones take four, with gate
    and up rounded in between; quantised ones take two as packed ones do (four when T > 64).
    """
    gate, up = _gate_up(w_gate_up)
    if is_quantized(gate) or is_quantized(up) or is_quantized(w_down):
        hidden = _quantized_swiglu(x, gate, up, norm, int8_activations)
        int8_activations &= is_quantized(w_down)
        return linear(
            hidden, w_down, residual, out_dtype=out_dtype, int8_activations=int8_activations
        )
    if int8_activations:
        raise ValueError("int8_activations is for quantised weights, and all of these are dense")
    weight, eps = norm if norm is not None else (None, 0.0)
    return _swiglu_mlp(x, gate, up, w_down, weight, eps, residual, out_dtype)


def _gate_up(w: PackedGateUp | Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    if isinstance(w, PackedGateUp):
        return w.weight, None
    if isinstance(w, Tensor):
        return w[: w.shape[0] // 2], w[w.shape[0] // 2 :]
    return w


def _quantized_swiglu(
    x: Tensor, gate: Tensor, up: Tensor | None, norm: Norm | None, int8_activations: bool
) -> Tensor:
    """silu(gate(x)) * up(x), where one of them, or the matrix after them, is quantised."""
    if is_quantized(gate) and (up is None or is_quantized(up)):
        return quantized_ops.linear_swiglu(x, gate, up, norm, int8_activations)
    if up is None:
        gate, up = unpack_gate_up(PackedGateUp(gate))
    if gate.shape != up.shape:
        raise ValueError(f"gate {shape_of(gate)} and up {shape_of(up)} must both be [I, H]")
    both = [
        linear(x, w, norm=norm, int8_activations=int8_activations and is_quantized(w))
        for w in (gate, up)
    ]
    return silu_and_mul(torch.cat(both, dim=-1))


@op(
    "swiglu_mlp(Tensor x, Tensor gate, Tensor? up, Tensor w_down, Tensor? norm_weight, float eps, "
    "Tensor? residual, ScalarType? out_dtype=None) -> Tensor",
    lambda x, gate, up, w_down, norm_weight, eps, residual, out_dtype=None: x.new_empty(
        (x.shape[0], w_down.shape[0]), dtype=out_dtype
    ),
)
def _swiglu_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor | None,
    w_down: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``up`` None: gate is packed, its rows are gate 0, up 0, gate 1, ..."""
    packed = gate
    if up is None:
        if gate.ndim != 2 or gate.shape[0] % 2:
            raise ValueError(f"the packed gate and up must be [2I, H], got {shape_of(gate)}")
        gate, up = unpack_gate_up(PackedGateUp(packed))
    check_operands(x, residual, norm_weight, gate=gate, up=up, w_down=w_down)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, H], got {shape_of(x)}")
    if gate.ndim != 2 or gate.shape != up.shape or gate.shape[1] != x.shape[1]:
        raise ValueError(
            f"gate {shape_of(gate)} and up {shape_of(up)} must both be [I, {x.shape[1]}]"
        )
    if w_down.ndim != 2 or w_down.shape[1] != gate.shape[0]:
        raise ValueError(f"w_down must be [H, {gate.shape[0]}], got {shape_of(w_down)}")
    if residual is not None:
        check_shape("residual", residual, (x.shape[0], w_down.shape[0]))
    out_dtype = check_out_dtype(x, out_dtype, residual)
    if cuda_ops.serves(x):
        if packed is not gate:
            hidden = cuda_ops.linear_swiglu(x, packed, norm_weight, eps)
        else:
            hidden = cuda_ops.gate_up_silu(x, gate, up, norm_weight, eps)
        return cuda_ops.linear(hidden, w_down, residual, out_dtype=out_dtype)
    if norm_weight is not None:
        x = torch_ops.rms_norm(x, norm_weight, eps)
    hidden = torch_ops.matmul(x, gate, swiglu_up=up)
    return torch_ops.matmul(hidden, w_down, add=residual, out_dtype=out_dtype)


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


@op(
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
    check_float(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    check_cache(k_cache, v_cache)
    hk, d = k_cache.shape[2:]
    for name, t in (("k", k), ("v", v)):
        check_shape(name, t, (*k.shape[:1], hk, d))
    rope = Rope(cos, sin, positions, interleaved)
    check_rope(rope, d)
    check_positions(rope, k.shape[0], k.device)
    check_index("slots", slots, (k.shape[0],), k.device)
    if cuda_ops.serves(k):
        cuda_ops.rope_append(k, v, cos, sin, positions, interleaved, k_cache, v_cache, slots)
        return
    torch_ops.rope_append(k, v, rope, (k_cache, v_cache), slots)


@op(
    "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    lambda *args: None,
)
def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Write k and v [T, Hk, D], rotated already, to the slots of a paged cache; see rope_append.

    k and v may have more rows than there are slots: those behind are not written.
    """
    check_float(k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    check_cache(k_cache, v_cache)
    hk, d = k_cache.shape[2:]
    for name, t in (("k", k), ("v", v)):
        if t.ndim != 3 or t.shape[1:] != (hk, d):
            raise ValueError(f"{name} must be [T, {hk}, {d}], got {shape_of(t)}")
    if slots.ndim != 1 or slots.shape[0] > min(k.shape[0], v.shape[0]):
        raise ValueError(
            f"slots must be [T] for the {k.shape[0]} rows of k and {v.shape[0]} of v, "
            f"got {shape_of(slots)}"
        )
    check_index("slots", slots, tuple(slots.shape), k.device)
    k, v = k[: slots.shape[0]], v[: slots.shape[0]]
    if cuda_ops.serves(k):
        cuda_ops.append_kv(k, v, k_cache, v_cache, slots)
        return
    capacity = k_cache.shape[0] * k_cache.shape[1]
    if on_host(slots) and slots.numel() and int(slots.max()) >= capacity:
        raise ValueError(f"slots must be below the cache's {capacity}, got {int(slots.max())}")
    torch_ops.append(k, v, k_cache, v_cache, slots)


def qkv_rope_append(
    x: Tensor,
    norm: Norm | None,
    w_qkv: PackedQKV | tuple[Tensor, Tensor, Tensor],
    rope: Rope,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
    *,
    int8_activations: bool = False,
) -> Tensor:
    """RMSNorm, Q/K/V projection and RoPE of x; K and V go to the cache, Q [T, Hq, D] is returned.

    x [T, H]; w_qkv a PackedQKV or (wq [Hq*D, H], wk [Hk*D, H], wv [Hk*D, H]), each dense or a
    QuantizedTensor of a type of its own; cache = (k_cache, v_cache), each [pages, page, Hk, D],
    written in place at ``slots`` (int32/int64 [T]; negative: skipped). ``int8_activations`` is for
    the quantised ones among the matrices, as in `linear`.

    On a GPU packed weights take one launch (and the norm one more when T > 64), in which q and k
    are rounded once, after the rotation. Unpacked ones take five, with q and k rounded before it.
    """
    if rope.positions is None:
        raise ValueError("rope.positions is required here")
    weight, eps = norm if norm is not None else (None, 0.0)
    if isinstance(w_qkv, PackedQKV):
        check_packed_qkv(w_qkv, rope, cache[0])
        wq, wk, wv = w_qkv.weight, None, None
    else:
        wq, wk, wv = w_qkv
        if any(map(is_quantized, w_qkv)):
            return _quantized_qkv(x, norm, w_qkv, rope, cache, slots, int8_activations)
    if int8_activations:
        raise ValueError("int8_activations is for quantised weights, and all of these are dense")
    return _qkv_rope_append(
        x,
        weight,
        eps,
        wq,
        wk,
        wv,
        rope.cos,
        rope.sin,
        rope.positions,
        rope.interleaved,
        *cache,
        slots,
    )


def _quantized_qkv(
    x: Tensor,
    norm: Norm | None,
    w_qkv: tuple[Tensor, Tensor, Tensor],
    rope: Rope,
    cache: tuple[Tensor, Tensor],
    slots: Tensor,
    int8_activations: bool,
) -> Tensor:
    """qkv_rope_append, where one of the matrices is quantised."""
    wq, wk, wv = w_qkv
    if is_quantized(wq) and is_quantized(wk) and is_quantized(wv):
        matrices = wq, wk, wv
        return quantized_ops.qkv_rope_append(
            x, norm, matrices, rope, cache, slots, int8_activations
        )
    d = cache[0].shape[3]
    products = [
        linear(x, w, norm=norm, int8_activations=int8_activations and is_quantized(w))
        for w in w_qkv
    ]
    q, k, v = (product.unflatten(-1, (-1, d)) for product in products)
    rope_append(k, v, rope, cache, slots)
    assert rope.positions is not None
    return apply_rope(q, k[:, :0], rope.cos, rope.sin, rope.positions, rope.interleaved)[0]


def _fake_qkv(x: Tensor, norm_weight: Tensor | None, eps: float, *args: Tensor) -> Tensor:
    wq, wk = args[:2]
    hk, head_dim = args[-2].shape[2:]
    heads = wq.shape[0] // head_dim - (2 * hk if wk is None else 0)
    return x.new_empty((x.shape[0], heads, head_dim))


@op(
    "qkv_rope_append(Tensor x, Tensor? norm_weight, float eps, Tensor wq, Tensor? wk, Tensor? wv, "
    "Tensor cos, Tensor sin, Tensor positions, bool interleaved, Tensor(a!) k_cache, "
    "Tensor(b!) v_cache, Tensor slots) -> Tensor",
    _fake_qkv,
)
def _qkv_rope_append(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    wq: Tensor,
    wk: Tensor | None,
    wv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """``wk`` and ``wv`` None: wq is a PackedQKV's weight."""
    rope = Rope(cos, sin, positions, interleaved)
    matrices = {"wq": wq}
    if wk is not None and wv is not None:
        matrices |= {"wk": wk, "wv": wv}
    check_operands(x, None, norm_weight, **matrices, k_cache=k_cache, v_cache=v_cache)
    check_cache(k_cache, v_cache)
    if x.ndim != 2:
        raise ValueError(f"x must be [T, H], got {shape_of(x)}")
    hk, d = k_cache.shape[2:]
    for name, w in matrices.items():
        if w.ndim != 2 or w.shape[1] != x.shape[1]:
            raise ValueError(f"{name} must be [heads * {d}, {x.shape[1]}], got {shape_of(w)}")
        if name != "wq" and w.shape[0] != hk * d:
            raise ValueError(f"{name} must have Hk*D = {hk * d} rows, got {shape_of(w)}")
    rows_q = wq.shape[0] - (0 if wk is not None else 2 * hk * d)
    if rows_q <= 0 or rows_q % (hk * d) != 0:
        raise ValueError(
            f"wq must have a multiple of Hk*D = {hk * d} rows"
            f"{'' if wk is not None else ', and as many for K and V'}, got {shape_of(wq)}"
        )
    check_rope(rope, d)
    check_positions(rope, x.shape[0], x.device)
    check_index("slots", slots, (x.shape[0],), x.device)
    norm = None if norm_weight is None else Norm(norm_weight, eps)
    if wk is None or wv is None:
        if cuda_ops.serves_qkv(x, wq.shape[0], k_cache):
            return cuda_ops.qkv_rope_append(x, norm, wq, rope, k_cache, v_cache, slots)
    elif cuda_ops.serves(x):
        return cuda_ops.qkv_then_rope(x, norm, (wq, wk, wv), rope, k_cache, v_cache, slots)
    if norm is not None:
        x = torch_ops.rms_norm(x, *norm)
    if wk is None or wv is None:
        y = torch_ops.matmul(x, wq).view(x.shape[0], -1, d)
        q, k, v = y.split((rows_q // d, hk, hk), dim=1)
    else:
        q, k, v = (torch_ops.matmul(x, w).view(x.shape[0], -1, d) for w in (wq, wk, wv))
    return torch_ops.qkv_rope_append((q, k, v), rope, (k_cache, v_cache), slots, wk is None)


# -------------------------------------------------------------------------------------- embedding


def embedding(ids: Tensor, table: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows ``ids`` (int32/int64 [T]) of table [V, H] -> [T, H]; an id out of range is an error.

    The rows of a QuantizedTensor are decoded in fp32 and rounded to ``dtype``, which others have.
    """
    if is_quantized(table):
        return quantized_ops.embedding(ids, table, dtype)
    if dtype is not None and dtype != table.dtype:
        raise TypeError(f"dtype is {dtype} but table is {table.dtype}")
    return _embedding(ids, table)


@op(
    "embedding(Tensor ids, Tensor table) -> Tensor",
    lambda ids, table: table.new_empty((*ids.shape, table.shape[1])),
)
def _embedding(ids: Tensor, table: Tensor) -> Tensor:
    check_float(table=table)
    check_index("ids", ids, tuple(ids.shape), table.device)
    if cuda_ops.serves(table):
        return cuda_ops.embedding(ids, table)
    return torch_ops.embedding(ids, table)
