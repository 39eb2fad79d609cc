"""rms_norm: rows of activations."""

from __future__ import annotations

import torch.nn.functional as F

from bench import eager, libraries
from bench.harness import Case, Comparison
from bench.inputs import randn
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig


def bench_rms_norm(rows: int, dtype: str, config: ModelConfig, compare: Comparison) -> None:
    hidden = config.hidden_size
    x = randn(rows, hidden, dtype=dtype, device=compare.device)
    weight = randn(hidden, dtype=dtype, device=compare.device)
    compiled = compare.compiled(eager.rms_norm)
    compare(
        Case("rms_norm", dtype, f"{rows} x {hidden}", x.itemsize * (2 * x.numel() + hidden)),
        ours=lambda: ops.rms_norm(x, weight, eager.EPS),
        eager=lambda: eager.rms_norm(x, weight),
        compiled=lambda: compiled(x, weight),
        torch=lambda: F.rms_norm(x, (hidden,), weight, eager.EPS),
        liger=libraries.liger_rms_norm(x, weight),
        flashinfer=libraries.flashinfer_rms_norm(x, weight),
    )
