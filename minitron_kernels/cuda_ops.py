"""The ops of CUDA tensors that have a compiled kernel: outputs are allocated, the C ABI is called.

Arguments have been checked by `ops.py`; what only the device knows (ids, positions, slots) is
checked there, as include/minitron_kernels.h says. Kernels run on torch's current stream.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from minitron_kernels import _native

if TYPE_CHECKING:
    from minitron_kernels.sampling import SamplingState

Tensor = torch.Tensor

_log = logging.getLogger(__name__)
_DTYPES = {
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
# Tests set these to run CPU tensors through the kernels, on the emulator (MK_CUDA_DRIVER), and on
# one of its streams (to capture them in a graph).
emulate = False
emulated_stream = 0


@functools.cache
def _log_fallback(reason: str) -> None:
    _log.warning("computed by PyTorch, not by a kernel: %s", reason)


def _call(name: str, like: Tensor, *args: object) -> None:
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


def serves_logits(logits: Tensor) -> bool:
    """As `serves`, for argmax and sample, which take float32 too."""
    return logits.is_cuda or emulate


def _rows(x: Tensor) -> Tensor:
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
    rows, out = _rows(x), _empty(x)
    _call(
        "rms_norm",
        x,
        rows.data_ptr(),
        weight.contiguous().data_ptr(),
        out.data_ptr(),
        rows.stride(0),
        rows.shape[1],
        rows.shape[0],
        rows.shape[1],
        eps,
        _DTYPES[x.dtype],
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Also updates residual, which may have any strides: one it cannot view is copied back."""
    rows, total = _rows(x), _rows(residual)
    out = _empty(x)
    _call(
        "add_rms_norm",
        x,
        rows.data_ptr(),
        total.data_ptr(),
        weight.contiguous().data_ptr(),
        out.data_ptr(),
        rows.stride(0),
        total.stride(0),
        rows.shape[1],
        rows.shape[0],
        rows.shape[1],
        eps,
        _DTYPES[x.dtype],
    )
    if total.data_ptr() != residual.data_ptr():
        residual.copy_(total.view(residual.shape))
    return out


def _rope(cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> object:
    return _native.Rope(
        cos.data_ptr(),
        sin.data_ptr(),
        cos.stride(0),
        positions.data_ptr(),
        _DTYPES[positions.dtype],
        cos.shape[0],
        2 * cos.shape[1],
        interleaved,
    )


def _features_adjoin(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    q, k = _features_adjoin(q), _features_adjoin(k)
    cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    q_out, k_out = _empty(q), _empty(k)
    _call(
        "apply_rope",
        q,
        *(t.data_ptr() for t in (q, k, q_out, k_out)),
        *(stride for t in (q, k, q_out, k_out) for stride in t.stride()[:2]),
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        _DTYPES[q.dtype],
        _rope(cos, sin, positions, interleaved),
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
    k, v = _features_adjoin(k), _features_adjoin(v)
    cos, sin, positions, slots = (t.contiguous() for t in (cos, sin, positions, slots))
    num_pages, page, heads, head_dim = k_cache.shape
    _call(
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
        _DTYPES[slots.dtype],
        _DTYPES[k.dtype],
        _rope(cos, sin, positions, interleaved),
    )


def silu_and_mul(gate_up: Tensor) -> Tensor:
    rows, size = _rows(gate_up), gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    _call(
        "silu_and_mul",
        gate_up,
        rows.data_ptr(),
        out.data_ptr(),
        rows.stride(0),
        size,
        rows.shape[0],
        size,
        _DTYPES[gate_up.dtype],
    )
    return out


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    ids, table = ids.contiguous(), _features_adjoin(table)
    hidden = table.shape[1]
    out = torch.empty((*ids.shape, hidden), dtype=table.dtype, device=table.device)
    _call(
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
        _DTYPES[ids.dtype],
        _DTYPES[table.dtype],
    )
    return out


def argmax(logits: Tensor) -> Tensor:
    """logits [B, V] of any floating dtype -> ids int64 [B], the lowest of equal ones."""
    logits = _features_adjoin(logits)
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    _call(
        "argmax",
        logits,
        logits.data_ptr(),
        out.data_ptr(),
        logits.stride(0),
        *logits.shape,
        _DTYPES[logits.dtype],
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
    _call(
        "sample",
        logits,
        logits.data_ptr(),
        sampling.data_ptr(),
        out.data_ptr(),
        logits.stride(0),
        *logits.shape,
        _DTYPES[logits.dtype],
    )
    return out
