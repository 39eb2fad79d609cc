"""silu_and_mul: silu(gate) * up of gate and up side by side."""

from __future__ import annotations

from bench import eager, libraries
from bench.harness import Case, Comparison
from bench.inputs import randn
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig


def bench_silu_and_mul(rows: int, dtype: str, config: ModelConfig, compare: Comparison) -> None:
    size = config.intermediate_size
    x = randn(rows, 2 * size, dtype=dtype, device=compare.device)
    compiled = compare.compiled(eager.silu_and_mul)
    compare(
        Case("silu_and_mul", dtype, f"{rows} x {size}", 3 * x.itemsize * rows * size),
        ours=lambda: ops.silu_and_mul(x),
        eager=lambda: eager.silu_and_mul(x),
        compiled=lambda: compiled(x),
        liger=libraries.liger_silu_and_mul(x),
        flashinfer=libraries.flashinfer_silu_and_mul(x),
    )
