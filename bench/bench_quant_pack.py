"""mk_quant_pack and mk_quant_unpack in GB/s of GGUF blocks, beside a plain copy of them.

    python bench/bench_quant_pack.py --threads 2

A matrix of --mb megabytes, larger than caches, is packed, unpacked and copied (by PyTorch) in turn;
the least time of all rounds counts. Both directions read the matrix once and write it once, as the
copy does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click
import torch

from minitron_kernels import _native
from minitron_kernels.quantized import GGML_NUMBERS, QUANT_TYPES

COLS = 4096


def least_times(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """The least time of each, in seconds."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            started = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - started)
    return best


@click.command(help=__doc__)
@click.option("--type", "kinds", multiple=True, type=click.Choice(list(QUANT_TYPES)))
@click.option("--threads", default=2, show_default=True)
@click.option("--mb", default=128, show_default=True, help="size of the matrix")
@click.option("--rounds", default=5, show_default=True)
def main(kinds: tuple[str, ...], threads: int, mb: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    print(
        f"{threads} threads, matrices of {mb} MB\ntype   pack  unpack  copy (GB/s)   tiles/blocks"
    )
    for kind in kinds or QUANT_TYPES:
        number, row_bytes = GGML_NUMBERS[kind], QUANT_TYPES[kind].row_nbytes(COLS)
        rows = max(1, (mb << 20) // row_bytes)
        blocks = torch.randint(0, 256, (rows, row_bytes), dtype=torch.uint8)
        tiles = torch.empty(_native.quant_packed_bytes(number, rows, COLS), dtype=torch.uint8)
        again = torch.empty_like(blocks)

        def move(
            function: Callable[..., None],
            source: torch.Tensor,
            args: tuple[int, ...] = (tiles.data_ptr(), row_bytes, number, rows, COLS, threads),
        ) -> None:
            function(source.data_ptr(), *args)

        pack, unpack, copy = least_times(
            [
                lambda m=move, b=blocks: m(_native.quant_pack, b),
                lambda m=move, b=again: m(_native.quant_unpack, b),
                lambda a=again, b=blocks: a.copy_(b),
            ],
            rounds,
        )
        assert torch.equal(blocks, again)
        speeds = "  ".join(f"{blocks.nbytes / t / 1e9:5.2f}" for t in (pack, unpack, copy))
        print(f"{kind}  {speeds}               {tiles.nbytes / blocks.nbytes:.3f}")


if __name__ == "__main__":
    main()
