"""Products a nanosecond of one core with GGUF blocks in its L2 cache, by type and rows of x.

    python -m bench.cpu_quant_rates --only Q4_K,Q6_K --isa avx2

x is bfloat16, and takes 16 bits as integers, or 8 (in brackets). Rounding x counts, 1 / 512 of the
products. Each is the best of --repeat calls by the thread's own clock: on a machine that others
use, the rate of a core that was left alone.
"""

from __future__ import annotations

import time

import click
import torch

from bench import inputs
from minitron_kernels import _native
from minitron_kernels.block_types import GGML_NUMBERS

N, K = 512, 1024
ISAS = {"auto": 0, "baseline": 1, "avx2": 2, "avx512": 3, "avx512bf16": 4}  # mk_cpu_isa


def rate(kind: str, m: int, x_bits: int, isa: int, repeat: int) -> float:
    """Products a nanosecond."""
    w, x = inputs.quantised(kind, N, K).blocks, torch.randn(m, K, dtype=torch.bfloat16)
    out = torch.empty(m, N, dtype=torch.bfloat16)
    number = GGML_NUMBERS[kind]
    product = _native.CpuQuantProduct(w.data_ptr(), w.stride(0), N, number, out.data_ptr(), N)
    seconds = []
    for _ in range(max(10, repeat // m)):
        start = time.thread_time()
        _native.cpu_linear_quant(x.data_ptr(), K, m, K, _native.BF16, [product], 1, isa, x_bits)
        seconds.append(time.thread_time() - start)
    return m * N * K / min(seconds) * 1e-9


@click.command(help=__doc__)
@click.option("--only", default=",".join(GGML_NUMBERS), help="types")
@click.option("--rows", default="1,2,8,31,128", show_default=True)
@click.option("--isa", type=click.Choice(list(ISAS)), default="auto", show_default=True)
@click.option("--repeat", default=2000, show_default=True, help="calls, fewer with more rows")
def main(only: str, rows: str, isa: str, repeat: int) -> None:
    counts = [int(m) for m in rows.split(",")]
    print("| type |", *(f"M {m} |" for m in counts), "\n|---" + "|---" * len(counts) + "|")
    for kind in only.split(","):
        cells = [[rate(kind, m, bits, ISAS[isa], repeat) for bits in (0, 8)] for m in counts]
        print(f"| {kind} |", *(f"{exact:.0f} ({of_bytes:.0f}) |" for exact, of_bytes in cells))


if __name__ == "__main__":
    main()
