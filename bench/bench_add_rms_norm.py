"""add_rms_norm: the residual added in place, then normalised."""

from __future__ import annotations

from bench import eager, libraries
from bench.harness import Case, Comparison
from bench.inputs import randn
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig


def bench_add_rms_norm(rows: int, dtype: str, config: ModelConfig, compare: Comparison) -> None:
    hidden = config.hidden_size
    # Small, as it is added in every round; each candidate has a residual of its own.
    x = randn(rows, hidden, dtype=dtype, device=compare.device, scale=1e-3)
    weight = randn(hidden, dtype=dtype, device=compare.device)
    residual = randn(rows, hidden, dtype=dtype, device=compare.device)
    own = [residual.clone() for _ in range(4)]
    compiled = compare.compiled(eager.add_rms_norm)
    compare(
        Case("add_rms_norm", dtype, f"{rows} x {hidden}", x.itemsize * (4 * x.numel() + hidden)),
        ours=lambda: ops.add_rms_norm(x, own[0], weight, eager.EPS),
        eager=lambda: eager.add_rms_norm(x, own[1], weight),
        compiled=lambda: compiled(x, own[2], weight),
        flashinfer=libraries.flashinfer_add_rms_norm(x, own[3], weight),
    )
