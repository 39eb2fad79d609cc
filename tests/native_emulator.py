"""Runs ops of the C ABI on the emulator: the plan of the library, the kernel that ships."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from minitron_kernels import native
from tests import native_abi as abi
from tests.emulator import Counters, Emulator, Module

ARCHS = tuple(abi.DEVICES)
DTYPES = {torch.bfloat16: "MK_BF16", torch.float16: "MK_F16", torch.float32: "MK_F32"}
DTYPES |= {torch.int32: "MK_I32", torch.int64: "MK_I64"}


def dtype_id(tensor: torch.Tensor) -> int:
    return abi.constants()[DTYPES[tensor.dtype]]


@functools.cache
def module(arch: str) -> Module:
    file = Path(native.get_library()).parent / "kernels" / f"sm_{arch}.fatbin"
    return Emulator(f"sm_{arch.rstrip('a')}").load(file.read_bytes())


def _frequencies(params: ctypes.Structure) -> bytes:
    """What the rope kernels take after their parameters (csrc/rope/rope_tiles.h)."""
    rope = params.rope
    frequencies = torch.zeros(128, dtype=torch.float64)
    if not rope.cos:
        half = rope.rotary_dim // 2
        exponents = torch.arange(half, dtype=torch.float64) * -2 / rope.rotary_dim
        frequencies[:half] = float(rope.theta) ** exponents
    return frequencies.float().numpy().tobytes()


def run(
    op: str, arch: str, params: ctypes.Structure, tensors: list[torch.Tensor], seed: int = 0
) -> Counters:
    """One launch of an op. `tensors`: all memory that it may touch. Raises EmulatorError."""
    plan = abi.plan(op, params, arch)
    if 0 in plan.grid[:]:
        return Counters()
    args = bytes(params) + (_frequencies(params) if hasattr(params, "rope") else b"")
    kernel = module(arch).kernel(plan.entry.decode())
    return kernel.launch(
        plan.grid[:], plan.block[:], [args], plan.smem_bytes, seed=seed, regions=tensors
    )
