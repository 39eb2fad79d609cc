"""swiglu_mlp: norm, gate and up, SiLU * mul, down, residual."""

from __future__ import annotations

from bench import eager, shapes
from bench.harness import Case, Comparison
from bench.inputs import randn
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig


def bench_swiglu_mlp(m: int, dtype: str, config: ModelConfig, compare: Comparison) -> None:
    hidden, inter = config.hidden_size, config.intermediate_size
    device = compare.device
    x, norm = (randn(*s, dtype=dtype, device=device) for s in ((m, hidden), (hidden,)))
    sizes = shapes.matrices(config)
    gate_up, down = (
        randn(*sizes[n], dtype=dtype, device=device, scale=0.02) for n in ("gate_up", "down")
    )
    # As the model holds them: packed where the kernels of a GPU compute.
    w = gate_up if compare.settings.device == "cpu" else ops.pack_gate_up(*gate_up.chunk(2))
    compiled = compare.compiled(eager.swiglu_mlp)
    compare(
        Case(
            "swiglu_mlp",
            dtype,
            f"{m} x {hidden}, inner {inter}",
            num_bytes=x.itemsize * (2 * m * hidden + 3 * hidden * inter),
            flop=6 * m * hidden * inter,
        ),
        ours=lambda: ops.swiglu_mlp(x, w, down, ops.Norm(norm, eager.EPS), residual=x),
        eager=lambda: eager.swiglu_mlp(x, norm, gate_up, down),
        compiled=lambda: compiled(x, norm, gate_up, down),
    )
