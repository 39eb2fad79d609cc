"""The way of CUDA tensors: ops, cuda_ops, the native layer, a kernel; against the CPU's answers.

Without a GPU the emulator stands for the driver of this process, and CPU tensors for CUDA's. The
kernels' own tests are in test_kernels_memory.py; here it is pointers, strides and allocation.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from minitron_kernels import cuda_ops, ops, sampling
from tests import emulator

Tensor = torch.Tensor
HAS_GPU = torch.cuda.is_available()
ORDINALS = {"sm_80": 0, "sm_89": 1, "sm_90": 2, "sm_100": 3}


@pytest.fixture(
    params=[pytest.param("gpu", marks=pytest.mark.gpu)]
    if HAS_GPU
    else [pytest.param(d, id=f"emu-{d}") for d in ORDINALS]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """torch's device to make tensors on; on the emulator every tensor made is known to it."""
    if request.param == "gpu":
        yield "cuda"
        return
    os.environ.setdefault("MK_CUDA_DRIVER", str(emulator.build()))
    driver = emulator.library()
    context = ctypes.c_void_p()
    assert driver.cuInit(0) == 0
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ORDINALS[request.param]) == 0
    assert driver.cuCtxSetCurrent(context) == 0

    def known(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            tensor = function(*args, **kwargs)
            tensor.fill_(float("nan") if tensor.is_floating_point() else -77)
            return on(tensor, "cpu")

        return make

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, known(getattr(torch, name)))
    monkeypatch.setattr(cuda_ops, "emulate", True)
    yield "cpu"
    for tensor in _known:
        driver.emu_region_remove(tensor.untyped_storage().data_ptr())
    _known.clear()


_known: list[Tensor] = []


def on(tensor: Tensor, device: str) -> Tensor:
    """The tensor on the device under test, accessible to kernels there."""
    if device == "cuda":
        return tensor.cuda()
    storage = tensor.untyped_storage()
    emulator.library().emu_region_add(storage.data_ptr(), storage.nbytes(), b"tensor")
    _known.append(tensor)
    return tensor


def both(
    function: Callable[..., Any], device: str, *args: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(kernel's outputs, CPU's outputs, kernel's versions of the tensor arguments)."""
    mine = [on(a.clone(), device) if isinstance(a, Tensor) else a for a in args]
    got = function(*mine)
    was, cuda_ops.emulate = cuda_ops.emulate, False
    expected = function(*args)
    cuda_ops.emulate = was

    def tensors(value: Any) -> list[Tensor]:
        values = value if isinstance(value, tuple) else (value,)
        return [t.cpu() for t in values if isinstance(t, Tensor)]

    return tensors(got), tensors(expected), [t.cpu() for t in mine if isinstance(t, Tensor)]


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        # Both round fp32 results once: at most one unit in the last place apart.
        torch.testing.assert_close(a, b, rtol=torch.finfo(b.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 576), (0, 64), (64,), (7, 33)])
def test_norms(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    got, expected, _ = both(ops.rms_norm, device, x, weight, 1e-5)
    close(got, expected)
    residual = randn(*shape, 2, dtype=dtype)[..., 1]  # strided: copied and copied back
    got, expected, _ = both(ops.rms_norm, device, residual, weight, 1e-5)
    close(got, expected)
    target = residual.clone()
    got, expected, arguments = both(ops.add_rms_norm, device, x, target, weight, 1e-5)
    close(got, expected)
    close([arguments[1]], [target])


def test_add_rms_norm_writes_a_strided_residual(device: str) -> None:
    x, weight = randn(6, 64), randn(64)
    wide = on(randn(6, 128), device)
    total = wide[:, ::2]
    expected = (x.to(total.device) + total).cpu()
    copies: list[Tensor] = []
    if device == "cpu":  # the kernel reads a copy that only the op knows of
        plain = Tensor.contiguous

        def known(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            copy = plain(self, *args, **kwargs)
            copies.append(on(copy, device))
            return copy

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "contiguous", known)
            ops.add_rms_norm(on(x, device), total, on(weight, device), 1e-5)
    else:
        ops.add_rms_norm(x.cuda(), total, weight.cuda(), 1e-5)
    assert torch.equal(total.cpu(), expected)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rope_and_append(device: str, interleaved: bool, index: torch.dtype) -> None:
    angles = torch.arange(40)[:, None] / 1e4 ** (torch.arange(32) / 32)
    cos, sin = angles.cos(), angles.sin()
    q, k, v = randn(9, 4, 64), randn(9, 2, 64), randn(9, 2, 64) + 1
    positions = torch.tensor([0, 39, 3, 3, 4, 5, 6, 7, 8], dtype=index)
    got, expected, _ = both(ops.apply_rope, device, q, k, cos, sin, positions, interleaved)
    close(got, expected)

    caches = torch.full((3, 16, 2, 64), 5.0).bfloat16(), torch.full((3, 16, 2, 64), 6.0).bfloat16()
    slots = torch.tensor([0, 47, -1, 16, 17, 18, 1, 2, 3], dtype=index)

    def append(*args: Any) -> None:
        k, v, cos, sin, positions, k_cache, v_cache, slots = args
        rope = ops.Rope(cos, sin, positions, interleaved)
        ops.rope_append(k, v, rope, (k_cache, v_cache), slots)

    *_, arguments = both(append, device, k, v, cos, sin, positions, *caches, slots)
    close(arguments[5:7], list(caches))
    assert not (caches[0] == 5).all()


def test_silu_and_embedding(device: str) -> None:
    for shape in ((4, 3, 96), (1, 2), (0, 64)):
        got, expected, _ = both(ops.silu_and_mul, device, randn(*shape))
        close(got, expected)
    table = randn(50, 72)
    for ids in (torch.tensor([[3, 49], [0, 3]]), torch.tensor([7], dtype=torch.int32)):
        got, expected, _ = both(ops.embedding, device, ids, table)
        close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_equals_the_cpu_sampler(device: str, dtype: torch.dtype) -> None:
    logits = 4 * randn(24, 1031, dtype=dtype)
    logits[3, 50] = logits[3, 900] = 40.0  # a tie: the lower id
    mine = on(logits.clone(), device)
    assert cuda_ops.argmax(mine).tolist() == logits.argmax(-1).tolist()

    def states() -> list[sampling.SamplingState]:
        options: list[dict[str, Any]] = [
            {},
            {"top_k": 7},
            {"top_p": 0.8},
            {"min_p": 0.05},
            {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
            {"top_k": 1},
        ]
        return [
            sampling.SamplingState(
                sampling.SamplingParams(temperature=0.5 + 0.1 * (i % 9), seed=i, **options[i % 6]),
                [1],
            )
            for i in range(24)
        ]

    rows = torch.from_numpy(cuda_ops.sampling_rows(states()).view(np.uint8))
    got = cuda_ops.sample(mine, on(rows, device))
    was, cuda_ops.emulate = cuda_ops.emulate, False
    expected = [s.token_id for s in sampling.sample(logits, states())]
    cuda_ops.emulate = was
    assert got.tolist() == expected


def test_float32_falls_back_with_its_reason(device: str, caplog: pytest.LogCaptureFixture) -> None:
    x = randn(2, 64, dtype=torch.float32)
    if device == "cuda":
        cuda_ops._log_fallback.cache_clear()
        ops.rms_norm(x.cuda(), x[0].cuda(), 1e-5)
        assert "the tensors are torch.float32" in caplog.text
    else:
        assert not cuda_ops.serves(x)
