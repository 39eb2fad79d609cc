"""What a run was measured on: names, clocks, caches, and the peaks that shares are of."""

from __future__ import annotations

import functools
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minitron_kernels import architectures, bench, info

ROOT = Path(__file__).resolve().parent.parent
EMULATED = "emulated"  # the arch of records whose times mean nothing
CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,clocks_event_reasons.active"


def name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    if device == "emulated":
        return "PTX emulator"
    about = info.cpu_info()
    threads = about["threads"]
    return f"{about['name']}, {threads} thread{'s' * (threads > 1)}"


def arch(device: str) -> str:
    """ "sm_90", "avx512", or "emulated"."""
    if device == "cuda":
        return "sm_{}{}".format(*torch.cuda.get_device_capability())
    if device == "emulated":
        return EMULATED
    from minitron_kernels import _native

    return str(_native.cpu_isa())


def describe(device: str, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """The head of a results file."""
    found: dict[str, Any] = {
        "device": name(device),
        "commit": commit(),
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "versions": info.versions() | {"cuda": torch.version.cuda},
        "threads": torch.get_num_threads(),
        "clock": "processor time" if clock is time.thread_time else "wall clock",
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "cache_bytes": cache_bytes(device),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
    if device != "emulated":
        for dtype in ("bfloat16", "float32", "float8_e4m3fn"):
            flop, num_bytes = peaks(device, dtype, clock)
            found[f"peak_tflop_s_{dtype}"] = flop and flop / 1e12
            found["peak_gb_s"] = num_bytes and num_bytes / 1e9
    return found


def commit() -> str | None:
    """Of the source tree, with a + if it was changed; None outside of a repository."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        changed = bool(git("status", "--porcelain", "-uno"))
        return git("rev-parse", "--short=12", "HEAD") + "+" * changed or None
    except OSError:
        return None


def clocks(device: str) -> dict[str, str] | None:
    """The GPU's clocks, power, temperature and what throttles it, as nvidia-smi tells them now."""
    if device != "cuda":
        return None
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return dict(zip(CLOCKS.split(","), (v.strip() for v in told.split(",")), strict=False))


@functools.cache
def cache_bytes(device: str) -> int:
    """Of the last-level cache, 32 MiB if nobody tells."""
    if device == "cuda":
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20))
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes) or 32 << 20


@functools.cache
def peaks(
    device: str, dtype: str, clock: Callable[[], float] = time.perf_counter
) -> tuple[float | None, float | None]:
    """(FLOP/s of matrix products, bytes/s of memory): published for a GPU of the table, measured
    for a CPU, by PyTorch's product of 2048 x 2048 matrices and by reading memory. None: unknown,
    or it does not matter (fp32 on a GPU, bytes). Products of 8-bit floats have twice the rate of
    bf16 on a GPU, and are fp32's on a CPU."""
    is_fp8 = dtype.startswith("float8")
    if device == "emulated":
        return None, None
    if device == "cuda":
        gpu = architectures.find(name(device))
        if gpu is None:
            return None, None
        flop = gpu.tensor_tflop_s * (2e12 if is_fp8 else 1e12)
        return (None if dtype == "float32" else flop), gpu.dram_tb_s * 1e12
    return _cpu_flop("float32" if is_fp8 else dtype, clock), bench.read_bandwidth(clock=clock)


@functools.cache
def _cpu_flop(dtype: str, clock: Callable[[], float]) -> float | None:
    if not getattr(torch, dtype).is_floating_point:
        return None
    size = 2048
    x, y = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = clock()
        torch.mm(x, y)
        best = min(best, clock() - started)
    return 2 * size**3 / best
