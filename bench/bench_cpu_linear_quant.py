"""mk_cpu_linear_quant for every type of GGUF blocks on this CPU, beside the dense product.

    python bench/bench_cpu_linear_quant.py --threads 2

Weights take turns, so that a shape reads as many as a model has between two uses (--weights-mb) and
caches do not flatter it. The least time of all rounds is printed, or with --cpu-time that of the
calling thread (--threads 1), which a busy machine disturbs less: GB/s are of stored weights, and
mk_cpu_linear's beside it of the same matrix in bfloat16.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch

from minitron_kernels import _native
from minitron_kernels.quantized import QUANT_TYPES

SHAPES = {  # K, N
    "smollm2-135m": [(576, 576), (576, 1536), (1536, 576)],
    "minitron-8b": [(4096, 4096), (4096, 11520), (11520, 4096)],
}
NUMBERS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8} | {
    f"Q{bits}_K": 8 + bits for bits in range(2, 7)
}


def least_time(
    runs: list[Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> float:
    """Seconds of one of `runs`, which take turns."""
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < deadline:
        started = clock()
        for run in runs:
            run()
        best = min(best, (clock() - started) / len(runs))
    return best


def quantised(kind: str, k: int, n: int) -> torch.Tensor:
    """Random blocks with scales of 0.01."""
    block = QUANT_TYPES[kind]
    blocks = torch.randint(0, 256, (n * k // block.elements, block.nbytes), dtype=torch.uint8)
    for offset in block.scale_offsets:
        blocks[:, offset : offset + 2] = torch.tensor([0.01]).half().view(torch.uint8)
    return blocks.view(n, -1)


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(list(SHAPES)))
@click.option("--type", "kinds", multiple=True, type=click.Choice(list(QUANT_TYPES)))
@click.option("-m", "rows", multiple=True, type=int, help="rows of x")
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=0.5, show_default=True, help="per line")
@click.option(
    "--weights-mb", default=64, show_default=True, help="weights that a shape cycles over"
)
@click.option("--cpu-time", is_flag=True, help="of the calling thread")
def main(
    models: tuple[str, ...],
    kinds: tuple[str, ...],
    rows: tuple[int, ...],
    threads: int,
    seconds: float,
    weights_mb: int,
    cpu_time: bool,
) -> None:
    torch.manual_seed(0)
    clock = time.thread_time if cpu_time else time.perf_counter
    print(f"{_native.cpu_isa()}, {threads} threads; least times")
    print(
        f"{'type and shape':34} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'dense bf16 us':>14} {'x':>5}"
    )
    for model in models or SHAPES:
        for k, n in SHAPES[model]:
            copies = max(1, weights_mb * 2**20 // (n * k * 2))
            dense = [torch.randn(n, k).bfloat16() for _ in range(copies)]
            for m in rows or (1, 8, 128):
                x = torch.randn(m, k).bfloat16()
                out = torch.empty(m, n, dtype=torch.bfloat16)
                at, to = x.data_ptr(), out.data_ptr()

                def run_dense(
                    w: torch.Tensor,
                    at: int = at,
                    to: int = to,
                    size: tuple[int, int, int] = (m, n, k),
                ) -> None:
                    m, n, k = size
                    _native.cpu_linear(
                        at, w.data_ptr(), to, k, k, n, m, n, k, _native.BF16, threads
                    )

                dense_runs = [lambda w=w, f=run_dense: f(w) for w in dense]
                dense_time = least_time(dense_runs, seconds, clock)
                for kind in kinds or QUANT_TYPES:
                    if k % QUANT_TYPES[kind].elements:
                        continue
                    packed = [quantised(kind, k, n) for _ in range(copies)]
                    products = [
                        _native.CpuQuantProduct(w.data_ptr(), w.shape[1], n, NUMBERS[kind], to, n)
                        for w in packed
                    ]
                    runs = [
                        lambda p=p, at=at, m=m, k=k: _native.cpu_linear_quant(
                            at, k, m, k, _native.BF16, [p], threads
                        )
                        for p in products
                    ]
                    used = least_time(runs, seconds, clock)
                    print(
                        f"{kind:5} M {m} N {n} K {k}".ljust(34),
                        f"{used * 1e6:9.1f} {2e-9 * m * n * k / used:8.1f}",
                        f"{packed[0].nbytes / used * 1e-9:6.1f} {dense_time * 1e6:14.1f}",
                        f"{dense_time / used:5.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
