"""Prints the architecture to build for, of the CUDA device of this machine: 80, 89, 90a or 100a."""

from __future__ import annotations

import sys


def arch_of(major: int, minor: int) -> str | None:
    """The kernels that a compute capability takes: its own, or sm_80's for what has none."""
    own = {(8, 9): "89", (9, 0): "90a", (10, 0): "100a"}
    if (major, minor) in own:
        return own[major, minor]
    return "80" if major >= 8 else None


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print(f"PyTorch {torch.__version__} finds no CUDA device")
        return 1
    arch = arch_of(*torch.cuda.get_device_capability())
    print(arch or "compute capability below 8.0")
    return 0 if arch else 1


if __name__ == "__main__":
    sys.exit(main())
