"""The ops of CUDA tensors that have a compiled kernel: outputs are allocated, the C ABI is called.

Arguments have been checked by `ops.py`; what only the device knows (ids, positions, slots, lengths,
page numbers) is checked there, as include/minitron_kernels.h says, and never read back: no op waits
for the GPU, and all can be captured into a CUDA graph. Kernels run on torch's current stream.
Attention is in `cuda_attention.py`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from minitron_kernels import _native

if TYPE_CHECKING:
    from minitron_kernels.ops import Norm, Rope
    from minitron_kernels.sampling import SamplingState

Tensor = torch.Tensor

_log = logging.getLogger(__name__)
DTYPES = {
    torch.bfloat16: _native.BF16,
    torch.float16: _native.F16,
    torch.float32: _native.F32,
    torch.int32: _native.I32,
    torch.int64: _native.I64,
}
SAMPLING = np.dtype(  # mk_sampling
    [
        ("top_p", "<f8"),
        ("min_p", "<f8"),
        ("seed", "<u8"),
        ("step", "<u4"),
        ("temperature", "<f4"),
        ("top_k", "<i4"),
        ("reserved", "<i4"),
    ]
)
MAX_NORM_ROWS = 64  # MK_LINEAR_MAX_NORM_M: more rows are normalised by a launch of their own
# Tests set these to run CPU tensors through the kernels, on the emulator (MK_CUDA_DRIVER), and on
# one of its streams (to capture them in a graph).
emulate = False
emulated_stream = 0


@functools.cache
def _log_fallback(reason: str) -> None:
    _log.warning("computed by PyTorch, not by a kernel: %s", reason)


def call(name: str, like: Tensor, *args: object) -> None:
    """Enqueue mk_<name> on the current stream of the device of ``like``."""
    function: Callable[..., None] = getattr(_native, name)
    if not like.is_cuda:
        function(*args, emulated_stream)
        return
    index = like.device.index
    if index == torch.cuda.current_device():
        function(*args, torch._C._cuda_getCurrentRawStream(index))
    else:
        with torch.cuda.device(index):
            function(*args, torch._C._cuda_getCurrentRawStream(index))


def serves(x: Tensor) -> bool:
    """Whether the kernels take tensors like x; if not, and x is on a GPU, the reason is logged."""
    if not x.is_cuda:
        return emulate and x.dtype in (torch.bfloat16, torch.float16)
    if x.dtype not in (torch.bfloat16, torch.float16):
        _log_fallback(f"kernels take bfloat16 and float16, the tensors are {x.dtype}")
        return False
    return True


def serves_within(x: Tensor, limits: Sequence[tuple[bool, str]]) -> bool:
    """As `serves`, of a kernel with limits: (whether one is kept, what it is)."""
    if not serves(x):
        return False
    for kept, limit in limits:
        if not kept:
            _log_fallback(limit)
            return False
    return True


def serves_qkv(x: Tensor, rows: int, k_cache: Tensor) -> bool:
    """As `serves`, for qkv_rope_append with packed weights of so many rows."""
    head_dim = k_cache.shape[3]
    heads = rows // head_dim
    good = head_dim % 16 == 0 and head_dim <= 256
    limits = [
        (good, f"qkv_rope_append takes head_dim 16, 32, ... 256, it is {head_dim}"),
        (heads <= 1024, f"qkv_rope_append takes up to 1024 heads, there are {heads}"),
    ]
    return serves_within(x, limits)


def serves_logits(logits: Tensor) -> bool:
    """As `serves`, for argmax and sample, which take float32 too."""
    return logits.is_cuda or emulate


def rows_of(x: Tensor) -> Tensor:
    """x [..., H] as [rows, H] with adjoining elements, copied only if it must be."""
    if x.ndim == 2 and x.stride(1) == 1:
        return x
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    """A contiguous output of x's shape (empty_like, the cheaper call, keeps a transposition)."""
    if x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows, weight, out = rows_of(x), weight.contiguous(), _empty(x)
    call(
        "rms_norm",
        x,
        rows.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows.stride(0),
        rows.shape[1],
        rows.shape[0],
        rows.shape[1],
        eps,
        DTYPES[x.dtype],
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Also updates residual, which may have any strides: one it cannot view is copied back."""
    rows, total, weight = rows_of(x), rows_of(residual), weight.contiguous()
    out = _empty(x)
    call(
        "add_rms_norm",
        x,
        rows.data_ptr(),
        total.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows.stride(0),
        total.stride(0),
        rows.shape[1],
        rows.shape[0],
        rows.shape[1],
        eps,
        DTYPES[x.dtype],
    )
    if total.data_ptr() != residual.data_ptr():
        residual.copy_(total.view(residual.shape))
    return out


def native_rope(cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> object:
    """mk_rope of contiguous tensors, which must live until the launch."""
    return _native.Rope(
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0),
        pointer(positions),
        _native.I32 if positions is None else DTYPES[positions.dtype],
        cos.shape[0],
        2 * cos.shape[1],
        interleaved,
    )


NO_ROPE: object = _native.Rope(0, 0, 0, 0, 0, 0, 0)


def contiguous_rope(rope: Rope) -> Rope:
    cos, sin, positions, _ = rope
    positions = None if positions is None else positions.contiguous()
    return rope._replace(cos=cos.contiguous(), sin=sin.contiguous(), positions=positions)


def pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _features_adjoin(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    q, k = _features_adjoin(q), _features_adjoin(k)
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    q_out, k_out = _empty(q), _empty(k)
    call(
        "apply_rope",
        q,
        *(t.data_ptr() for t in (q, k, q_out, k_out)),
        *(stride for t in (q, k, q_out, k_out) for stride in t.stride()[:2]),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        DTYPES[q.dtype],
        native_rope(cos, sin, positions, interleaved),
    )
    return q_out, k_out


def rope_append(
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
    cos, sin, positions = (t.contiguous() for t in (cos, sin, positions))
    _append(k, v, k_cache, v_cache, slots, native_rope(cos, sin, positions, interleaved))


def _append(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, rope: object
) -> None:
    """mk_rope_append, k rotated by an mk_rope."""
    k, v, slots = _features_adjoin(k), _features_adjoin(v), slots.contiguous()
    num_pages, page, heads, head_dim = k_cache.shape
    call(
        "rope_append",
        k,
        *(t.data_ptr() for t in (k, v, k_cache, v_cache, slots)),
        *k.stride()[:2],
        *v.stride()[:2],
        *k_cache.stride()[:3],
        k.shape[0],
        heads,
        head_dim,
        num_pages,
        page,
        DTYPES[slots.dtype],
        DTYPES[k.dtype],
        rope,
    )


def lasting_zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count] zeros to keep from call to call, in place on the current stream.

    While torch.compile warms a CUDA graph up (mode "reduce-overhead"), all that its thread
    allocates is of the graph's memory, which others get again: so another thread asks for these.
    """
    if device.type != "cuda":
        return torch.empty(count, dtype=dtype, device=device).zero_()
    with ThreadPoolExecutor(1) as other:  # whose current stream is the default one
        made = other.submit(lambda: torch.empty(count, dtype=dtype, device=device)).result()
    stream = torch.cuda.current_stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    made.record_stream(stream)
    return made.zero_()


_zero_positions: dict[tuple[torch.device, int], list[Tensor]] = {}


def _zeros(count: int, device: torch.device) -> Tensor:
    """Positions 0, int32 [count]: one tensor for all calls on a stream, as another would have to
    wait for it; replaced by a larger one on demand.

    Those that were replaced are kept: a captured graph may have their address. What a graph's own
    capture would make holds zeros only once that graph runs, and is not kept for others.
    """
    stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
    made = _zero_positions.setdefault((device, stream), [])
    if made and made[-1].shape[0] >= count:
        return made[-1][:count]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=device)
    made.append(lasting_zeros(max(count, 1 << 16), torch.int32, device))
    return made[-1][:count]


def append_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """rope_append by the angle 0, whose cosine is 1: k as it is, but for the sign of a zero."""
    zeros = _zeros(k.shape[0], k.device)
    rotary_dim = 16 if k.shape[2] % 16 == 0 else 2
    rope = _native.Rope(0, 0, 0, zeros.data_ptr(), _native.I32, 1, rotary_dim, False, 2.0)
    _append(k, v, k_cache, v_cache, slots, rope)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    rows, size = rows_of(gate_up), gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    call(
        "silu_and_mul",
        gate_up,
        rows.data_ptr(),
        out.data_ptr(),
        rows.stride(0),
        size,
        rows.shape[0],
        size,
        DTYPES[gate_up.dtype],
    )
    return out


def _normed(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """x [T, K] and the norm that is left to the product: above MAX_NORM_ROWS a launch before it."""
    if weight is not None and x.shape[0] > MAX_NORM_ROWS:
        return rms_norm(x, weight, eps), None
    return x, None if weight is None else weight.contiguous()


def _product(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """out [T, N] = norm(x [T, K]) @ w^T + residual, in one launch."""
    w = _features_adjoin(w)
    call(
        "linear",
        x,
        x.data_ptr(),
        w.data_ptr(),
        pointer(norm_weight),
        pointer(residual),
        out.data_ptr(),
        x.stride(0),
        w.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        x.shape[0],
        *w.shape,
        eps,
        DTYPES[x.dtype],
        DTYPES[out.dtype],
    )


def linear(
    x: Tensor,
    w: Tensor,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(x [..., K]) @ w [N, K]^T + residual, in x's dtype or out_dtype."""
    size = w.shape[0]
    out = torch.empty((*x.shape[:-1], size), dtype=out_dtype or x.dtype, device=x.device)
    rows, norm_weight = _normed(rows_of(x), norm_weight, eps)
    added = None if residual is None else rows_of(residual)
    _product(rows, w, out.view(rows.shape[0], size), added, norm_weight, eps)
    return out


def linear_swiglu(x: Tensor, w: Tensor, norm_weight: Tensor | None, eps: float) -> Tensor:
    """silu(gate) * up [T, I] of norm(x [T, H]) and a PackedGateUp's weight."""
    rows, norm_weight = _normed(rows_of(x), norm_weight, eps)
    w = _features_adjoin(w)
    size = w.shape[0] // 2
    out = torch.empty((x.shape[0], size), dtype=x.dtype, device=x.device)
    call(
        "linear_swiglu",
        x,
        rows.data_ptr(),
        w.data_ptr(),
        pointer(norm_weight),
        out.data_ptr(),
        rows.stride(0),
        w.stride(0),
        size,
        x.shape[0],
        *w.shape,
        eps,
        DTYPES[x.dtype],
    )
    return out


def gate_up_silu(
    x: Tensor, gate: Tensor, up: Tensor, norm_weight: Tensor | None, eps: float
) -> Tensor:
    """As `linear_swiglu`, of two matrices: two products and silu_and_mul."""
    rows, norm_weight = _normed(rows_of(x), norm_weight, eps)
    size = gate.shape[0]
    gate_up = torch.empty((x.shape[0], 2 * size), dtype=x.dtype, device=x.device)
    for w, out in ((gate, gate_up[:, :size]), (up, gate_up[:, size:])):
        _product(rows, w, out, None, norm_weight, eps)
    return silu_and_mul(gate_up)


def qkv_rope_append(
    x: Tensor,
    norm: Norm | None,
    w: Tensor,
    rope: Rope,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """Q [T, Hq, D] of norm(x [T, H]) and a PackedQKV's weight; K and V go to the cache."""
    norm_weight, eps = (None, 0.0) if norm is None else norm
    rows, norm_weight = _normed(rows_of(x), norm_weight, eps)
    w, slots, rope = _features_adjoin(w), slots.contiguous(), contiguous_rope(rope)
    num_pages, page, kv_heads, head_dim = k_cache.shape
    q_heads = w.shape[0] // head_dim - 2 * kv_heads
    q = torch.empty((x.shape[0], q_heads, head_dim), dtype=x.dtype, device=x.device)
    call(
        "qkv_rope_append",
        x,
        rows.data_ptr(),
        w.data_ptr(),
        pointer(norm_weight),
        *(t.data_ptr() for t in (q, k_cache, v_cache, slots)),
        rows.stride(0),
        w.stride(0),
        q_heads * head_dim,
        head_dim,
        *k_cache.stride()[:3],
        *x.shape,
        q_heads,
        kv_heads,
        head_dim,
        num_pages,
        page,
        eps,
        DTYPES[slots.dtype],
        DTYPES[x.dtype],
        native_rope(*rope),
    )
    return q


def qkv_then_rope(
    x: Tensor,
    norm: Norm | None,
    matrices: tuple[Tensor, Tensor, Tensor],
    rope: Rope,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
) -> Tensor:
    """As `qkv_rope_append`, of (wq, wk, wv): three products, rope_append and apply_rope."""
    norm_weight, eps = (None, 0.0) if norm is None else norm
    rows, norm_weight = _normed(rows_of(x), norm_weight, eps)
    head_dim = k_cache.shape[3]
    projected = []
    for w in matrices:
        y = torch.empty((x.shape[0], w.shape[0]), dtype=x.dtype, device=x.device)
        _product(rows, w, y, None, norm_weight, eps)
        projected.append(y.view(x.shape[0], w.shape[0] // head_dim, head_dim))
    return rotated_q(projected, rope, k_cache, v_cache, slots)


def rotated_q(
    qkv: Sequence[Tensor], rope: Rope, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> Tensor:
    """rope_append of k and v [T, Hk, D], then q [T, Hq, D], rotated: two launches."""
    q, k, v = qkv
    cos, sin, positions, interleaved = rope
    assert positions is not None
    rope_append(k, v, cos, sin, positions, interleaved, k_cache, v_cache, slots)
    return apply_rope(q, k[:, :0], cos, sin, positions, interleaved)[0]


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    ids, table = ids.contiguous(), _features_adjoin(table)
    hidden = table.shape[1]
    out = torch.empty((*ids.shape, hidden), dtype=table.dtype, device=table.device)
    call(
        "embedding",
        table,
        ids.data_ptr(),
        table.data_ptr(),
        out.data_ptr(),
        table.stride(0),
        hidden,
        ids.numel(),
        table.shape[0],
        hidden,
        DTYPES[ids.dtype],
        DTYPES[table.dtype],
    )
    return out


def argmax(logits: Tensor) -> Tensor:
    """logits [B, V] of any floating dtype -> ids int64 [B], the lowest of equal ones."""
    logits = _features_adjoin(logits)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    call(
        "argmax",
        logits,
        logits.data_ptr(),
        out.data_ptr(),
        logits.stride(0),
        *logits.shape,
        DTYPES[logits.dtype],
    )
    return out


def sampling_rows(states: Sequence[SamplingState]) -> np.ndarray:
    """The next draw of each state as an array of mk_sampling."""
    rows = [
        (
            s.params.top_p,
            s.params.min_p,
            s.seed,
            s.step,
            s.params.temperature,
            min(s.params.top_k, 2**31 - 1),
            0,
        )
        for s in states
    ]
    return np.array(rows, dtype=SAMPLING)


def sample(logits: Tensor, sampling: Tensor) -> Tensor:
    """One draw for each row of logits [B, V] by the rule of sampling.py; ids int64 [B], or -1.

    ``sampling``: uint8 [B * SAMPLING.itemsize], the bytes of `sampling_rows`.
    """
    logits = _features_adjoin(logits)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    call(
        "sample",
        logits,
        logits.data_ptr(),
        sampling.data_ptr(),
        out.data_ptr(),
        logits.stride(0),
        *logits.shape,
        DTYPES[logits.dtype],
    )
    return out
