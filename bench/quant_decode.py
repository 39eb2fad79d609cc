"""The tables of docs/native.md: what products with few rows of x and quantised w take per weight.

    python -m bench.quant_decode [--kind Q4_K] [--arch 80 --arch 90a] [--m 17 --m 32]

The emulator executes the kernels and counts; nothing here has run on a GPU. What is counted does
not depend on the values, so w is zeros. SASS: of a turn of the type's loop over tiles, for the 8192
weights of two and a warp, with all that ptxas puts into it.
"""

from __future__ import annotations

import ctypes

import click
import torch

from bench import sass
from bench.cases_quant import decode_loop
from minitron_kernels.block_types import GGML_NUMBERS, QUANT_TYPES
from minitron_kernels.quantized import QuantizedTensor
from tests import emulator
from tests import native_abi as abi
from tests.native_emulator import BUILT, kernel_file, run
from tests.quant_cases import KINDS, Weights, out_of, quant_params
from tests.test_kernels_memory import values

N, K = 11520, 4096
ROWS = (1, 8, 16)

# Lane-instructions per weight of llama.cpp's mmvq on sm_89, counted in the same way: at M = 1 and
# per weight at M = 8.
LLAMA_CPP = {
    "Q4_0": (5.8, 14.0), "Q5_0": (8.9, 18.0), "Q8_0": (6.7, 19.0), "Q2_K": (10.2, 32.0),
    "Q3_K": (16.5, 45.0), "Q4_K": (8.8, 36.7), "Q5_K": (9.9, 38.0), "Q6_K": (13.7, 45.0),
}  # fmt: skip


def zeros(kind: str, n: int, k: int) -> Weights:
    """A packed matrix of zeros; only what a launch needs."""
    block = QUANT_TYPES[kind]
    size = ctypes.c_int64()
    abi.check(abi.library().mk_quant_packed_bytes(GGML_NUMBERS[kind], n, k, ctypes.byref(size)))
    w = Weights.__new__(Weights)
    rows = torch.zeros(n, k // block.elements * block.nbytes, dtype=torch.uint8)
    w.blocks = QuantizedTensor(rows, kind, (n, k))
    w.tiles = torch.zeros(size.value, dtype=torch.uint8)
    return w


def count(kind: str, m: int, arch: str = "80") -> tuple[emulator.Counters, ctypes.Structure]:
    """Counters of mk_linear_quant in bf16, and the struct it was called with."""
    x, w = values(m, K, dtype=torch.bfloat16), zeros(kind, N, K)
    params, tensors = quant_params(x, w, out_of("linear_quant", x, w))
    counters = run("linear_quant", arch, params, tensors)
    assert counters is not None
    return counters, params


def lanes_per_weight(counters: emulator.Counters) -> float:
    """Executed PTX instructions of lanes, without mov, which ptxas mostly deletes."""
    return (sum(counters.lanes.values()) - counters.lanes["mov"]) / (N * K)


def compulsory_bytes(kind: str, m: int) -> int:
    """The stored blocks, and x."""
    block = QUANT_TYPES[kind]
    return N * K // block.elements * block.nbytes + m * K * 2


def requested_tiles(kind: str, m: int, arch: str, counters: emulator.Counters) -> float:
    """Bytes of w that loads ask for, over its tiles: what is read less x, which each block reads,
    or each cluster."""
    x, w = values(m, K, dtype=torch.bfloat16), zeros(kind, N, K)
    params, _ = quant_params(x, w, out_of("linear_quant", x, w))
    plan = abi.plan("linear_quant", params, arch)
    readers = plan.grid[0] // plan.cluster[0]
    return (counters.read_sectors * 32 - readers * x.nbytes) / w.tiles.numel()


def sass_loop(kind: str, tokens: int, arch: str) -> sass.MainLoop | None:
    """The loop of the kernel for up to `tokens` rows, two tiles a turn."""
    name = f"mk_quant_decode_sm{arch.rstrip('a')}_b16_m{tokens}"
    return sass.main_loop(sass.functions(kernel_file(arch))[name], decode_loop(kind))


def sass_per_weight(kind: str, tokens: int, arch: str) -> str:
    loop = sass_loop(kind, tokens, arch)
    return "-" if loop is None else f"{loop.instructions * 32 / 8192:.2f}"


def line(kind: str, archs: tuple[str, ...], rows: tuple[int, ...] = ROWS) -> str:
    cells, read = [kind], set()
    for m in rows:
        lanes = []
        for arch in archs:
            counters, _ = count(kind, m, arch)
            lanes.append(f"{lanes_per_weight(counters):.2f}")
            read.add(f"{counters.unique_read_sectors * 32 / compulsory_bytes(kind, m):.3f}")
        cells.append(", ".join(lanes))
    cells.append(", ".join(sass_per_weight(kind, 8, arch) for arch in archs))
    cells.append(" ... ".join(sorted({min(read), max(read)})))
    cells += [f"{v:.1f}" for v in LLAMA_CPP[kind]] if kind in LLAMA_CPP else ["", ""]
    return f"| {' | '.join(cells)} |"


@click.command(help=__doc__)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS)
@click.option("--arch", "archs", multiple=True, type=click.Choice(BUILT), default=BUILT)
@click.option("--m", "rows_of_x", multiple=True, type=click.IntRange(1, 64), default=ROWS)
def main(kinds: tuple[str, ...], archs: tuple[str, ...], rows_of_x: tuple[int, ...]) -> None:
    rows = [f"M = {m}" for m in rows_of_x]
    click.echo(f"PTX and SASS on {', '.join(f'sm_{arch}' for arch in archs)}:\n")
    click.echo(
        f"| type | {' | '.join(rows)} | SASS loop, M <= 8 | DRAM bytes read / (blocks + x) | "
        "llama.cpp, M = 1 | M = 8 |"
    )
    click.echo("|---" * (len(rows) + 5) + "|")
    for kind in kinds:
        click.echo(line(kind, archs, rows_of_x))


if __name__ == "__main__":
    main()
