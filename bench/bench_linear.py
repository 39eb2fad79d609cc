"""linear: the matrices of a layer and of the head, by rows of x."""

from __future__ import annotations

import torch.nn.functional as F

from bench import shapes
from bench.harness import Case, Comparison
from bench.inputs import randn
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig


def bench_linear(matrix: str, m: int, dtype: str, config: ModelConfig, compare: Comparison) -> None:
    n, k = shapes.matrices(config)[matrix]
    x = randn(m, k, dtype=dtype, device=compare.device)
    w = randn(n, k, dtype=dtype, device=compare.device, scale=0.02)
    moved = x.itemsize * (m * k + n * k + m * n)
    compare(
        Case("linear", dtype, f"{matrix} {n} x {k} M {m}", moved, 2 * m * n * k),
        ours=lambda: ops.linear(x, w),
        eager=lambda: F.linear(x, w),
    )
