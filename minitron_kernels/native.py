"""Where the native layer is, for other projects, and what was built into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_THREADS = 256  # that a CPU kernel takes: csrc/cpu/pool.h

_PACKAGE = Path(__file__).resolve().parent


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{what} {path} does not exist: the native layer is not built (pip install . builds it)"
        )
    return path


def get_include() -> str:
    """The folder of the C ABI's headers, minitron_kernels.h and minitron_kernels_fp8.h (C99)."""
    installed = _PACKAGE / "include"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "include"
    return str(_existing(folder / "minitron_kernels.h", "the header").parent)


def get_library() -> str:
    """The path of libminitron_kernels.so, which exports the C ABI and is not linked to CUDA.

    It finds its kernels in the folder ``kernels`` beside it.
    """
    return str(_existing(_PACKAGE / "libminitron_kernels.so", "the library"))


def build_info() -> dict[str, Any]:
    """The build record.

    ``archs``: GPU architectures with kernels, e.g. ["80", "90a"]; empty for MK_ARCHS=none.
    ``nvcc``: the compiler's version, or None. ``seconds``: duration of the last (perhaps
    incremental) build; ``compile_seconds``: of all kernel files, one after the other.
    ``entries``: arch -> kernel name -> its file, registers per thread, static smem_bytes,
    stack_bytes and spill_bytes, as ptxas reported them.
    """
    record = _existing(_PACKAGE / "kernels" / "build.json", "the build record")
    info: dict[str, Any] = json.loads(record.read_text())
    return info
