"""What a call costs before the kernel runs: C ABI, Python binding, ops.rms_norm, torch.ops.

    pytest bench/bench_call_overhead.py --benchmark-columns=min,median --benchmark-sort=name

On a GPU the calls enqueue a kernel on one row. Without one the emulator is the driver and the batch
is empty: every layer checks it and nothing is launched, so that what differs is each layer's own
cost.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from minitron_kernels import _native, cuda_ops, native, ops

HIDDEN, BF16, EPS = 4096, 1, 1e-5


class RMSNormParams(ctypes.Structure):
    """mk_rms_norm_params of include/minitron_kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "residual", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("x_stride", "residual_stride", "out_stride")),
        ("rows", ctypes.c_int32),
        ("hidden", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("dtype", ctypes.c_int32),
    )


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[torch.Tensor, ...]]:
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        from tests import emulator, native_emulator

        os.environ.setdefault("MK_CUDA_DRIVER", str(emulator.build()))
        native_emulator.make_current("80")
    monkeypatch.setattr(cuda_ops, "emulate", not on_gpu)
    device, rows = ("cuda", 1) if on_gpu else ("cpu", 0)
    x = torch.ones(rows, HIDDEN, dtype=torch.bfloat16, device=device)
    yield x, torch.ones(HIDDEN, dtype=torch.bfloat16, device=device), torch.empty_like(x)
    if on_gpu:
        torch.cuda.synchronize()


def c_call(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    function = ctypes.CDLL(native.get_library()).mk_rms_norm
    pointers = (x.data_ptr(), None, w.data_ptr(), out.data_ptr())
    params = RMSNormParams(*pointers, HIDDEN, 0, HIDDEN, x.shape[0], HIDDEN, EPS, BF16)
    by_reference = ctypes.byref(params)
    return lambda: function(by_reference, None)


def binding(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    args = (x.data_ptr(), w.data_ptr(), out.data_ptr(), HIDDEN, HIDDEN, x.shape[0], HIDDEN, EPS)
    return lambda: _native.rms_norm(*args, BF16, 0)


def eager(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    return lambda: ops.rms_norm(x, w, EPS)


def dispatched(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.ops.minitron_kernels.rms_norm(x, w, EPS)


@pytest.mark.parametrize("layer", [c_call, binding, eager, dispatched], ids=lambda f: f.__name__)
def bench_call(
    layer: Callable[..., Any], tensors: Any, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    call = layer(*tensors)
    status = call()
    assert isinstance(status, torch.Tensor) or not status
    rounds = 1 if request.config.getoption("--smoke") else 200
    benchmark.pedantic(call, rounds=rounds, iterations=500, warmup_rounds=1)
