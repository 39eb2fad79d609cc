"""Packing a matrix of GGUF blocks for the GPU's kernels, and back, beside a plain copy of it.

It is done by the host on every machine. Each direction reads the matrix once and writes it once, as
the copy does; the copy stands as `eager`, so `x eager` is the share of its speed.
"""

from __future__ import annotations

import pytest
import torch

from bench import inputs
from bench.harness import Case, Comparison
from minitron_kernels import _native
from minitron_kernels.block_types import GGML_NUMBERS
from minitron_kernels.config import ModelConfig


def bench_quant_pack(kind: str, config: ModelConfig, compare: Comparison) -> None:
    if compare.settings.device != "cpu":
        pytest.skip("done by the host: measured with --device cpu")
    rows, cols = 2 * config.intermediate_size, config.hidden_size
    threads = torch.get_num_threads()
    number, blocks = GGML_NUMBERS[kind], inputs.quantised(kind, rows, cols).blocks
    tiles = torch.empty(_native.quant_packed_bytes(number, rows, cols), dtype=torch.uint8)
    again, copied = torch.empty_like(blocks), torch.empty_like(blocks)

    def move(function: object, source: torch.Tensor) -> torch.Tensor:
        address, row_bytes = source.data_ptr(), source.shape[1]
        function(address, tiles.data_ptr(), row_bytes, number, rows, cols, threads)  # type: ignore[operator]
        return blocks

    case = Case(f"quant_pack {kind}", "uint8", f"{rows} x {cols}", blocks.nbytes + tiles.nbytes)
    compare(
        case,
        ours=lambda: move(_native.quant_pack, blocks),
        unpack=lambda: move(_native.quant_unpack, again),
        eager=lambda: copied.copy_(blocks),
    )
    assert torch.equal(blocks, again)
