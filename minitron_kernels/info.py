"""What `minitron info` and `--json` report on the machine, the packages and a checkpoint."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from minitron_kernels.loaders.checkpoint import open_checkpoint
from minitron_kernels.native import build_info


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages that matter here; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in (
        "minitron_kernels",
        "torch",
        "numpy",
        "safetensors",
        "tokenizers",
        "gguf",
        "huggingface_hub",
        "transformers",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def cpu_info() -> dict[str, Any]:
    """The processor, the threads that PyTorch uses, the instruction sets, and memory in bytes."""
    fields: dict[str, str] = {}
    with suppress(OSError):  # not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    # Those that matrix kernels look for; x86 calls them flags, Arm features.
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    wanted = "avx2 fma f16c avx512f avx512bw avx512_vnni avx512_bf16 avx512_fp16 amx_bf16 amx_int8"
    wanted += " asimd asimddp i8mm bf16 sve"
    memory = psutil.virtual_memory()
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "features": [flag for flag in wanted.split() if flag in flags],
        "memory_bytes": memory.total,
        "available_memory_bytes": memory.available,
    }


def cuda_info() -> dict[str, Any]:
    """The CUDA devices, and the reason when there are none."""
    devices = []
    reason = None
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "multiprocessors": properties.multi_processor_count,
                    "memory_bytes": properties.total_memory,
                }
            )
    elif torch.version.cuda is None:
        reason = f"this PyTorch ({torch.__version__}) is built without CUDA"
    else:
        try:
            ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
            reason = "the NVIDIA driver finds no usable device"
        except OSError as error:
            reason = f"no NVIDIA driver: {error}"
    return {"torch_cuda": torch.version.cuda, "devices": devices, "none_because": reason}


def build() -> dict[str, Any]:
    """`native.build_info`, or, where nothing was built, no archs and the reason."""
    try:
        return build_info()
    except FileNotFoundError as error:
        return {"archs": [], "none_because": str(error)}


def model_info(path: Path, dtype: str) -> dict[str, Any]:
    """Shape, stored types and memory needs of the checkpoint at `path`; weights are not read.

    `dtype` is "auto" (that of the checkpoint) or one of config.DTYPES.
    """
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    dtype = config.dtype if dtype == "auto" else dtype
    itemsize = getattr(torch, dtype).itemsize
    types: dict[str, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        entry = types.setdefault(tensor.type, {"count": 0, "bytes": 0})
        entry["count"] += 1
        entry["bytes"] += tensor.nbytes
    return {
        "path": str(checkpoint.path),
        "config": dataclasses.asdict(config),
        "parameters": config.num_parameters,
        "tensor_types": dict(sorted(types.items())),
        "stored_bytes": sum(entry["bytes"] for entry in types.values()),
        "dtype": dtype,
        "weights_bytes": config.num_parameters * itemsize,
        # The rest stays in the file, memory-mapped.
        "weights_allocated_bytes": checkpoint.ram_needed(getattr(torch, dtype)),
        "kv_bytes_per_1k_tokens": 1024 * config.kv_bytes_per_token(itemsize),
    }


def peak_memory() -> dict[str, int]:
    """Largest resident set of this process and, where CUDA is used, of its allocations, in bytes.

    Memory-mapped weights count as far as they were resident at once.
    """
    try:
        # ru_maxrss would include what the parent process had when it started this one.
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # not Linux
        memory = psutil.Process().memory_info()
        peak = getattr(memory, "peak_wset", memory.rss)
    report = {"peak_memory_bytes": peak}
    if torch.cuda.is_initialized():
        report["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated()
    return report
