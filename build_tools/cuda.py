"""Where the CUDA compiler is, and which architectures are asked for."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ARCHS = ("80", "89", "90a", "100a")

# The compiler wheels, all of one version: nvcc and ptxas, its device-code front end (cicc),
# its internal headers, and cuda_runtime.h. Kernels include no other CUDA header.
WHEELS = tuple(
    f"{name}==13.5.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime")
)

# The first toolkit that tells device code its exact architecture (common/entry.cuh); sm_100a is
# known since 12.8.
MIN_VERSION = (12, 9)


class Nvcc(NamedTuple):
    path: Path
    version: str


def requested_archs() -> tuple[str, ...]:
    """MK_ARCHS as a tuple in the order of ARCHS; () for "none". ValueError names what is wrong."""
    text = os.environ.get("MK_ARCHS", "").replace(",", " ").replace(";", " ").strip()
    if not text:
        return ARCHS
    if text == "none":
        return ()
    unknown = sorted(set(text.split()) - set(ARCHS))
    if unknown:
        raise ValueError(
            f"MK_ARCHS names {' '.join(unknown)}; accepted: none, or some of {' '.join(ARCHS)}"
        )
    return tuple(arch for arch in ARCHS if arch in text.split())


def _version(nvcc: Path) -> str | None:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    found = re.search(r"\bV(\d+\.\d+\.\d+)", text.stdout)
    return found.group(1) if found else None


def _candidates() -> list[Path]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    found = [Path(home) / "bin" / "nvcc" for home in homes if home]
    on_path = shutil.which("nvcc")
    if on_path:
        found.append(Path(on_path))
    spec = importlib.util.find_spec("nvidia")
    folders = (spec and spec.submodule_search_locations) or ()
    return found + [Path(folder) / "cu13" / "bin" / "nvcc" for folder in folders]


def find_nvcc() -> Nvcc | None:
    """The first usable nvcc of CUDA_HOME, CUDA_PATH, PATH and the installed compiler wheels."""
    for path in _candidates():
        version = _version(path)
        if version is None:
            continue
        if tuple(map(int, version.split(".")[:2])) >= MIN_VERSION:
            return Nvcc(path, version)
        print(f"{path} is CUDA {version}: too old (needs 12.9), not used", flush=True)
    return None
