"""The table of docs/native.md: what the product of 512 rows of x and quantised w issues.

    python -m bench.quant_prefill [--kind Q4_K] [--arch 80 --arch 90a] [--rows 4096]

The emulator executes the kernels at K 4096 and N 11520 (or `rows`) and counts; nothing here has run
on a GPU.
What is counted does not depend on the values, so w is zeros. Instructions are those of warps, over
the time that the tensor cores take for the MMAs: of one of an SM's four schedulers, which issues
one a clock. They are PTX, without mov, which ptxas mostly deletes.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import click
import torch

from bench.accounting import mma_flop
from bench.cases import ptx_by_entry
from bench.quant_decode import K, N, zeros
from minitron_kernels.architectures import ARCHITECTURES
from tests import native_abi as abi
from tests.native_emulator import run
from tests.quant_cases import KINDS, out_of, quant_params
from tests.test_kernels_memory import values

M = 512
GPUS = {"80": "A100", "89": "L40S", "90a": "H100", "100a": "B200"}


class Issued(NamedTuple):
    """Over the tensor cores' time: instructions of a scheduler, wavefronts of shared memory."""

    scaling: float
    rest: float
    shared: float
    mma: float
    wavefronts: float


def issued(kind: str, arch: str, n: int = N, k: int = K, m: int = M) -> tuple[str, Issued]:
    """The kernel's entry, and what it takes."""
    x, w = values(m, k, dtype=torch.bfloat16), zeros(kind, n, k)
    params, tensors = quant_params(x, w, out_of("linear_quant", x, w))
    entry = abi.plan("linear_quant", params, arch).entry.decode()
    counters = run("linear_quant", arch, params, tensors)
    assert counters is not None
    flop_per_clock = ARCHITECTURES[GPUS[arch]].tensor_flop / 4
    time = counters.issued["mma"] * mma_flop(ptx_by_entry(arch)[entry]) / flop_per_clock
    shared, mma, scaling = (counters.issued[c] / time for c in ("shared", "mma", "fp32"))
    rest = (counters.instructions - counters.issued["mov"]) / time - shared - mma - scaling
    return entry, Issued(scaling, rest, shared, mma, counters.shared_wavefronts * 4 / time)


def line(kind: str, arch: str, n: int = N, k: int = K) -> str:
    entry, i = issued(kind, arch, n, k)
    cells = [kind, f"sm_{arch}", re.sub(r"mk_quant_gemm_sm\d+_b16_", "", entry)]
    numbers = (i.scaling, i.rest, i.shared, i.mma, i.scaling + i.rest, i.wavefronts)
    return f"| {' | '.join(cells + [f'{v:.2f}' for v in numbers])} |"


@click.command(help=__doc__)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS)
@click.option("--arch", "archs", multiple=True, type=click.Choice(list(GPUS)), default=list(GPUS))
@click.option("--rows", type=int, default=N, help="Rows of w.", show_default=True)
def main(kinds: tuple[str, ...], archs: tuple[str, ...], rows: int) -> None:
    print(
        "| type | arch | tile | scales and sums (fp32) | unpacking, addresses, the rest | "
        "shared memory | MMA | without these two | wavefronts |"
    )
    print("|---" * 9 + "|")
    for kind in kinds:
        for arch in archs:
            print(line(kind, arch, rows), flush=True)


if __name__ == "__main__":
    main()
