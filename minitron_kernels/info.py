"""What `minitron info` and `--json` report on the machine, the packages and a checkpoint."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minitron_kernels.native import build_info
from minitron_kernels.quantized_ops import is_quantized

if TYPE_CHECKING:
    from minitron_kernels.model import MinitronForCausalLM


# What --int8-activations does to a prompt of quantised weights (docs/generation.md).
_INT8_GAIN = "halves a prompt's instructions (AVX-512 VNNI)"
_NO_INT8_GAIN = "gains little (no AVX-512 VNNI)"


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
    import psutil

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
        "int8_activations": _INT8_GAIN if "avx512_vnni" in flags else _NO_INT8_GAIN,
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


def model_info(path: Path, dtype: str, expand: bool = False) -> dict[str, Any]:
    """Shape, stored types and memory needs of the checkpoint at `path`; weights are not read.

    `dtype` is "auto" (that of the checkpoint) or one of config.DTYPES; `expand` as from_pretrained.
    """
    from minitron_kernels.loaders.checkpoint import Weights, open_checkpoint

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    dtype = config.dtype if dtype == "auto" else dtype
    torch_type: torch.dtype = getattr(torch, dtype)
    weights = Weights(checkpoint, torch_type, expand)
    types: dict[str, dict[str, int]] = {}
    kept: dict[str, dict[str, int]] = {}
    for name, tensor in checkpoint.tensors.items():
        _count(types, tensor.type, tensor.nbytes)
        if weights.stays_quantized(name):
            _count(kept, tensor.type, tensor.nbytes)
    return {
        "path": str(checkpoint.path),
        "config": dataclasses.asdict(config),
        "parameters": config.num_parameters,
        "tensor_types": dict(sorted(types.items())),
        "stored_bytes": sum(entry["bytes"] for entry in types.values()),
        "dtype": dtype,
        "kept_quantized": dict(sorted(kept.items())),
        "weights_bytes": weights.nbytes(),
        # The rest stays in the file, memory-mapped.
        "weights_allocated_bytes": weights.ram_needed(),
        "kv_bytes_per_1k_tokens": 1024 * config.kv_bytes_per_token(torch_type.itemsize),
    }


def weights_info(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """Number and bytes of a model's weights by type: a dtype, or that of quantised blocks."""
    types: dict[str, dict[str, int]] = {}
    for weight in model.parameters():
        dtype = str(weight.dtype).removeprefix("torch.")
        kind = weight.quant_type if is_quantized(weight) else dtype
        _count(types, kind, weight.nbytes)
    return dict(sorted(types.items()))


def activations_info(model: MinitronForCausalLM) -> str:
    """A model's dtype, and whether products with quantised matrices round it."""
    name = str(model.dtype).removeprefix("torch.")
    return f"{name}, int8 in quantised products" if model.int8_activations else name


def _count(types: dict[str, dict[str, int]], kind: str, nbytes: int) -> None:
    entry = types.setdefault(kind, {"count": 0, "bytes": 0})
    entry["count"] += 1
    entry["bytes"] += nbytes


def peak_memory() -> dict[str, int]:
    """Largest resident set of this process and, where CUDA is used, of its allocations, in bytes.

    Memory-mapped weights count as far as they were resident at once.
    """
    try:
        # ru_maxrss would include what the parent process had when it started this one.
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):  # not Linux
        import psutil

        memory = psutil.Process().memory_info()
        peak = getattr(memory, "peak_wset", memory.rss)
    report = {"peak_memory_bytes": peak}
    if torch.cuda.is_initialized():
        report["peak_cuda_memory_bytes"] = torch.cuda.max_memory_allocated()
    return report


def outline(value: Any, indent: str = "") -> Iterator[str]:
    """Nested dicts and lists as indented `key: value` lines; sizes in binary units."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield f"{indent}{key}:"
            yield from outline(item, indent + "  ")
        elif isinstance(item, list | tuple) and item and isinstance(item[0], dict):
            for index, entry in enumerate(item):
                yield f"{indent}{key}[{index}]:"
                yield from outline(entry, indent + "  ")
        else:
            yield f"{indent}{key}: {_shown(key, item)}"


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple | dict):
        return " ".join(map(str, value)) or "none"
    if "bytes" in key and isinstance(value, int):
        return _size(value)
    return str(value)


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
