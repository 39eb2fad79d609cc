"""mk_cpu_linear against PyTorch's F.linear (MKL in float32, oneDNN in bfloat16) on this CPU.

    OMP_NUM_THREADS=2 python bench/bench_cpu_linear.py --threads 2

Both run in one process, taking turns on every shape, so that a change of the machine's speed meets
both; the least time of all rounds is printed. Weights take turns as well, so that a shape reads as
many of them as a model has between two uses (--weights-mb) and caches do not flatter either side.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F

from minitron_kernels import _native

SHAPES = {  # K, N
    "smollm2-135m": [(576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152)],
    "minitron-8b": [(4096, 4096), (4096, 1024), (4096, 11520), (11520, 4096)],
}
DTYPES = {"float32": _native.F32, "bfloat16": _native.BF16, "float16": _native.F16}


def cpu_linear(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, threads: int) -> None:
    dtype = DTYPES[str(x.dtype).removeprefix("torch.")]
    (m, k), n = x.shape, w.shape[0]
    _native.cpu_linear(x.data_ptr(), w.data_ptr(), out.data_ptr(), k, k, n, m, n, k, dtype, threads)


def least_times(
    runs: list[Callable[[int], object]], num_weights: int, seconds: float
) -> list[float]:
    """The least time of one call of each, in seconds."""
    best = [float("inf")] * len(runs)
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < deadline:
        for i, run in enumerate(runs):
            started = time.perf_counter()
            for j in range(num_weights):
                run(j)
            best[i] = min(best[i], (time.perf_counter() - started) / num_weights)
        rounds += 1
    return best


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, type=click.Choice(list(SHAPES)))
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(list(DTYPES)))
@click.option("-m", "rows", multiple=True, type=int, help="rows of x")
@click.option("--threads", default=2, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="per shape")
@click.option(
    "--weights-mb", default=64, show_default=True, help="weights that a shape cycles over"
)
def main(
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    rows: tuple[int, ...],
    threads: int,
    seconds: float,
    weights_mb: int,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {_native.cpu_isa()}, {threads} threads; least times")
    print(f"{'op':38} {'us':>9} {'GFLOP/s':>8} {'GB/s':>6} {'F.linear us':>12} {'x':>5}")
    for name in dtypes or ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        for model in models or SHAPES:
            for k, n in SHAPES[model]:
                num_weights = max(1, weights_mb * 2**20 // (n * k * dtype.itemsize))
                weights = [torch.randn(n, k).to(dtype) for _ in range(num_weights)]
                for m in rows or (1, 4, 8, 16, 512):
                    x, out = torch.randn(m, k).to(dtype), torch.empty(m, n, dtype=dtype)
                    used = weights if m < 64 else weights[:1]
                    ours, theirs = least_times(
                        [
                            lambda j, x=x, w=used, out=out: cpu_linear(x, w[j], out, threads),
                            lambda j, x=x, w=used: F.linear(x, w[j]),
                        ],
                        len(used),
                        seconds,
                    )
                    torch.testing.assert_close(
                        out, F.linear(x, used[-1]), rtol=2e-2, atol=2e-2 * k**0.5
                    )
                    gflops = 2e-9 * m * n * k / ours
                    gbytes = 1e-9 * (n * k + m * (n + k)) * dtype.itemsize / ours
                    print(
                        f"{f'cpu_linear {name} M {m} K {k} N {n}':38} {1e6 * ours:9.1f} "
                        f"{gflops:8.1f} {gbytes:6.1f} {1e6 * theirs:12.1f} {theirs / ours:5.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
