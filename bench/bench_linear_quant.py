"""linear with a matrix of GGUF blocks of each type.

What stands beside it is what PyTorch makes of a GGUF file: the product with the weights expanded
beforehand (`eager`: two to seven times the memory), and expanded for each call (`dequantised`).
"""

from __future__ import annotations

import torch.nn.functional as F

from bench import inputs, shapes
from bench.harness import Case, Comparison
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig
from minitron_kernels.quant_packing import pack
from minitron_kernels.quantized import QuantizedTensor


def bench_linear_quant(
    kind: str, quant_matrix: str, quant_m: int, config: ModelConfig, compare: Comparison
) -> None:
    n, k = shapes.matrices(config)[quant_matrix]
    x = inputs.randn(quant_m, k, dtype="bfloat16", device=compare.device)
    blocks = inputs.quantised(kind, n, k)
    dense = blocks.dequantize(x.dtype).to(compare.device)
    stored = QuantizedTensor(blocks.blocks.to(compare.device), kind, (n, k))
    w = blocks if compare.settings.device == "cpu" else pack(blocks, device=x.device)
    moved = blocks.nbytes + 2 * quant_m * (n + k)
    flop = 2 * quant_m * n * k
    compare(
        Case(f"linear {kind}", "bfloat16", f"{quant_matrix} {n} x {k} M {quant_m}", moved, flop),
        ours=lambda: ops.linear(x, w),
        eager=lambda: F.linear(x, dense),
        dequantised=lambda: F.linear(x, stored.dequantize(x.dtype)),
    )
