"""linear_fp8: the matrices of a layer in e4m3, with scales in blocks of 128, by rows of x."""

from __future__ import annotations

import torch.nn.functional as F

from bench import shapes
from bench.harness import Case, Comparison
from bench.inputs import randn
from minitron_kernels import ops, reference
from minitron_kernels.config import ModelConfig


def bench_linear_fp8(matrix: str, m: int, config: ModelConfig, compare: Comparison) -> None:
    """Beside PyTorch's bfloat16 product of the expanded operands."""
    n, k = shapes.matrices(config)[matrix]
    x = randn(m, k, dtype="bfloat16", device=compare.device)
    w = randn(n, k, dtype="bfloat16", device=compare.device, scale=0.02)
    (x8, x_scale), (w8, w_scale) = ops.quantize_fp8(x, 128), ops.quantize_fp8_weight(w, 128)
    x, w = (
        reference.dequantize_fp8(t, scale).bfloat16() for t, scale in ((x8, x_scale), (w8, w_scale))
    )
    moved = m * k + n * k + 2 * m * n + 4 * (x_scale.numel() + w_scale.numel())
    compare(
        Case("linear_fp8", "float8_e4m3fn", f"{matrix} {n} x {k} M {m}", moved, 2 * m * n * k),
        ours=lambda: ops.linear_fp8(x8, w8, x_scale, w_scale),
        eager=lambda: F.linear(x, w),
    )
