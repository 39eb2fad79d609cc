"""Writes docs/modelled.md: how long the kernels take at least on GPUs, by counting.

    python -m bench.modelled                  # everything, then docs/modelled.md
    python -m bench.modelled --only decode    # cases with this in their name, printed only
    python -m bench.modelled --only decode --update   # and put into the page
    python -m bench.modelled --format         # docs/modelled.md again from the committed counts

No GPU is used: the emulator executes the compiled kernels and counts (accounting.py tells how).
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, fields
from pathlib import Path
from typing import Any

import click

from bench.accounting import (
    RESOURCES,
    Binary,
    Case,
    Ends,
    Measured,
    Plan,
    issued,
    measure,
    ratios,
    times,
    uncovered_clocks,
)
from bench.case_table import all_cases
from bench.cases import supported
from bench.sass import MainLoop, find_tool
from minitron_kernels import native
from minitron_kernels.architectures import ARCHITECTURES, Architecture
from tests.emulator import CLASSES, Counters

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "modelled.json"
PAGE = ROOT / "docs" / "modelled.md"
# The GPUs of each arch. Launches are planned for the first one.
DEVICES = {
    "80": ("A100",),
    "89": ("L40S", "RTX 4090"),
    "90a": ("H100", "H200"),
    "100a": ("B200",),
}
# In docs/modelled.md: counts and bars, and times.
DETAILED = {arch: names[:1] for arch, names in DEVICES.items()}
TIMED = DETAILED | {"90a": DEVICES["90a"]}

# Why a bar is missed, and by how much at the most, by the start of the case's id and the metric.
FP8_ISSUE = (
    "FFMAs that add 128 k to the fp32 sums are 0.25, scales, barriers and addresses 0.14; the rest "
    "is the outputs', of tiles that take half as long as those of 16 bits"
)
FEW_TILES = (
    "32 tiles of 128 x 256 would leave 68 of 132 SMs idle; those of 128 x 128 are twice as many "
    "bytes from L2 for each MMA"
)
FP8_CAUSAL = (
    "a tile's 3700 warp-instructions take 0.88 of its MMAs' time, which is half that of 16 bits; "
    "masks and outputs of items of 4.5 tiles are the rest"
)
NOTES: dict[tuple[str, str], tuple[float, str]] = {
    ("prefill attention/attention_fp8/1024 x 1024 causal", "others"): (0.07, FP8_CAUSAL),
    ("prefill attention/attention_fp8/1024 x 1024 causal", "peak"): (0.03, FP8_CAUSAL),
    ("GEMM/linear/o 4096 x 4096, M 512", "issue"): (
        0.007,
        "a tile of 128 x 128 has half the MMAs of one of 128 x 256 for the same barriers and "
        "addresses, and a residual to read for 4096 columns of k only",
    ),
    ("GEMM/linear/o 4096 x 4096, M 512", "others"): (0.14, FEW_TILES),
    ("GEMM/linear/o 4096 x 4096, M 512", "peak"): (0.02, FEW_TILES),
    ("GEMM/linear/down 4096 x 11520, M 512", "others"): (0.11, FEW_TILES),
    ("GEMM, FP8/linear_fp8/qkv 6144 x 4096, M 2048", "issue"): (0.004, FP8_ISSUE),
    ("GEMM, FP8/linear_fp8_swiglu/gate_up 23040 x 4096, M 2048", "issue"): (0.02, FP8_ISSUE),
    ("GEMM, FP8/linear_fp8/lm_head 131072 x 4096, M 2048", "issue"): (0.002, FP8_ISSUE),
}

USE = "docs/modelled.md is out of date: run python -m bench.modelled"
QUICK_COST = 3e6  # warp-instructions: less than a second

METHOD = """\
# Modelled times

How long the kernels take at least on an A100 and an L40S, some also on an H100, an H200 and a B200,
from counts. Written by `python -m bench.modelled`. **No line here was measured on a GPU.**

**Counted**, by executing the compiled PTX on the emulator (`tests/emulator`): warp-instructions by
class (without `mov`, which ptxas mostly deletes), 32-byte sectors requested and distinct over the
launch, shared-memory wavefronts. From the compiler: registers, shared memory, and the SASS of the
main loop: instructions per HMMA that every turn executes, and in brackets those that some turn
leaves out (masks, rescaling of the accumulator, but also the loads of a tile that may not exist),
so that the first number is a lower bound.

**Modelled**: the time that each resource needs for what was counted at its published rate
(`minitron_kernels/architectures.py`).

| resource | work | rate, per clock and SM or per second |
|---|---|---|
| tensor pipe | FLOP of the MMAs executed | 2048 (A100), 1024 (L40S), 4096 (H100); FP8 twice |
| exp2 unit | MUFU operations of lanes | 16 |
| issue slots | warp-instructions | 4 |
| shared memory | wavefronts of loads, stores, ldmatrix, cp.async; not TMA's and wgmma's | 1 |
| L2 | sectors requested, as if L1 caught nothing | 7.2, 5, 6.9 TB/s; 64 bytes |
| DRAM | distinct sectors, as if L2 caught every repeated access | 2.04 TB/s, 0.864 TB/s |

Times are of the busiest SM (of L2: at least) when each one takes the next block as it gets free, or
those that the kernel's own list gives it; blocks count by their tiles. Bytes that TMA gives to both
blocks of a cluster are requested from L2 once, but counted at the ports of both SMs. `t` is the
tensor pipe's time. The largest time is the bound, and the last column says what throughput it
admits and its share of the published peak. The clock is the boost clock. L2's 7.2 TB/s are
published for the A100. The H100's 6.9 were measured by others on its PCIe card, which has fewer SMs
and a lower clock, the H200's 9.6 on itself; the rest is believed (`architectures.py`).

**Shared memory of an H100** is busier than these tables say: what TMA moves and wgmma reads makes
no wavefronts here, nor are their bank conflicts counted (their 128-byte swizzles have none). By
hand it is 88 % of the tensor pipe's time for attention (`docs/attention.md`).

**Ends of tiles** of sm_90's products: one of a block's two warpgroups writes its 64 rows while the
other one multiplies, if that has something left. The tensor pipe's time has those clocks in which
it has not, and "of it epilogues" tells them: for the busiest block, with E clocks for the end of a
tile, (tiles - 1) max(0, E - lead) + E, as nothing follows the last one. The lead is what the other
warpgroup has left: 2 stages of tiles of 256 and of 192 columns (1024 and 768 clocks), 3 of 128
(768), 4 of 64 (512), of FP8's half a stage (192, 128, 64). E is the largest of 2 clocks for each
instruction (a warp is alone on its scheduler), 1 for 16 exp2, 8 for each store (to as many rows),
and 1 for 64 bytes of outputs. Instructions are those of a warp that has used wgmma and has none
under way, of which the emulator keeps count: from a tile's last MMA to the next one's first.
Residuals and angles are asked for when the tile begins; of FP8 when it ends, which is 300 clocks
for the first bytes, and 1 for 64. What is done there is counted by launches of one and of two
stages along k: all that does not grow. "-": not counted.

**What it cannot tell**: latencies and stalls, the overlap that a kernel really reaches, clocks
under load, DRAM efficiency (90 to 93 % is the most that is usually seen), misses of L2, launches
(some us, which is what counts for the smallest rows). It is a lower bound on time: a kernel with a
higher bound than another one's is not always slower, but never faster than the bound.

**Large problems** are made of equal units (KV heads with their queries, tiles of queries,
sequences, columns of w), and each count is a + b * units: it is taken at two smaller numbers of
units, with the same kernel, block and shared memory, which gives the rest exactly
(`bench/accounting.py`; a test compares it with whole runs). Inputs of attention are normal, so a
row's largest logit seldom grows by much; that decides how often accumulators are rescaled.

**Bars**: DRAM bytes over compulsory ones <= 1.03 for decode attention, 1.10 for products with at
most 64 rows; sectors as if each access used whole ones (1.01: an index that is read alone takes a
sector); no bank conflicts in main loops (1.005: the whole kernel is counted, but see above); issue
slots over tensor time on the A100 <= 0.40 for attention, 0.44 causal, 0.28 for products with tiles
of 128 x 256, on the H100 <= 0.46, 0.52 and, for all products of more than 64 rows, 0.15 (FP8's with
tiles of 128 x 192: 0.40). On the H100 the tensor pipe is the slowest resource of attention for
prompts and of bf16 products of more than 64 rows ("slowest other / t" <= 1), and what the bound
admits is at least 80 and 85 % of the peak. An H200's counts are the H100's; its times differ by
what L2 and DRAM give. A bar that is missed has its reason, which holds for a miss of its size only.
Triton's kernels (`bench/triton_peers.py`, and the matrix product of
`tests/emulator/triton_kernels.py`) go through the same accounting.
"""

Row = dict[str, Any]

MEMORY_COUNTERS = tuple(
    f.name for f in fields(Counters) if f.name not in ("issued", "lanes", "between_mmas")
)


def stored(case: Case, arch: str, m: Measured) -> Row:
    """What the results file keeps of a measurement: what was counted. All else is derived."""
    c = m.counters
    loop = asdict(m.binary.loop) if m.binary.loop else None
    if loop:
        del loop["loads"]  # they tell loops apart
    return {
        "case": case.id, "arch": arch, "entry": m.plan.entry, "grid": list(m.plan.grid),
        "block": list(m.plan.block), "smem": m.plan.smem_bytes, "emulated": list(m.emulated_units),
        **({"cluster": m.plan.cluster} if m.plan.cluster > 1 else {}),
        "registers": m.binary.registers, "static_smem": m.binary.smem_bytes,
        "mma_flop": m.binary.mma_flop,
        "loop": loop,
        "issued": {k: n for k, n in c.issued.items() if n}, "exp2_lanes": c.lanes["mufu"],
        "memory": [getattr(c, name) for name in MEMORY_COUNTERS],
        **({"ends": list(astuple(m.ends))} if m.ends else {}),
    }  # fmt: skip


def loaded(row: Row) -> Measured:
    """`stored` undone, but for the lanes of other instructions than exp2."""
    zero = dict.fromkeys(CLASSES, 0)
    counters = Counters(
        zero | row["issued"], zero | {"mufu": row["exp2_lanes"]},
        **dict(zip(MEMORY_COUNTERS, row["memory"], strict=True)),
    )  # fmt: skip
    loop = MainLoop(**row["loop"]) if row["loop"] else None
    binary = Binary(row["registers"], row["static_smem"], row["mma_flop"], loop)
    shape = tuple(row["grid"]), tuple(row["block"]), row["smem"], row.get("cluster", 1)
    plan = Plan(row["entry"], *shape)
    ends = Ends(*row["ends"]) if "ends" in row else None
    return Measured(plan, binary, counters, tuple(row["emulated"]), ends)


def derived(case: Case, arch: str, m: Measured, gpu: Architecture) -> Row:
    """Everything that a page says of a case on a GPU."""
    metrics = ratios(m, case, gpu)
    threads = math.prod(m.plan.block)
    smem = m.plan.smem_bytes + m.binary.smem_bytes
    return {
        "group": case.group, "kernel": case.kernel, "shape": case.shape, "device": gpu.name,
        "entry": m.plan.entry, "grid": m.plan.grid, "threads": threads, "smem_bytes": smem,
        "registers": m.binary.registers,
        "blocks_per_sm": gpu.occupancy(threads, m.binary.registers, smem),
        "compulsory_bytes": case.compulsory_bytes, "flop": case.flop, "mma_rate": case.mma_rate,
        "issued": issued(m.counters),
        "sass_loop": asdict(m.binary.loop) if m.binary.loop else None,
        "metrics": metrics, "times_us": times(m, case, gpu),
        "uncovered_us": uncovered_clocks(m, case) / (gpu.clock_ghz * 1e3),
        "bars": [asdict(bar) for bar in case.bars if bar.applies(arch, m.plan.entry)],
    }  # fmt: skip


def rows_of(results: dict[str, Any], devices: dict[str, tuple[str, ...]]) -> list[Row]:
    """The derived rows of stored ones, in the order of the cases, on the GPUs of each arch."""
    kept = {(row["case"], row["arch"]): row for row in results["rows"]}
    return [
        derived(case, arch, loaded(kept[case.id, arch]), ARCHITECTURES[name])
        for case in all_cases()
        for arch in case.archs
        if (case.id, arch) in kept
        for name in devices[arch]
    ]


def produce(runs: list[tuple[Case, str]]) -> Iterator[Row]:
    """The stored row of each case on an architecture."""
    for number, (case, arch) in enumerate(runs, 1):
        told = f"[{number}/{len(runs)}] {case.id} sm_{arch}"
        if not supported(case, arch):
            click.echo(f"{told}: not in this build")
            continue
        start = time.perf_counter()
        measured = measure(case, arch)
        took = time.perf_counter() - start
        gpu = ARCHITECTURES[DEVICES[arch][0]]
        bound_told = bound_text(derived(case, arch, measured, gpu))
        click.echo(f"{told}: {took:.1f} s, {bound_told}")
        yield stored(case, arch, measured)


def is_quick(case: Case) -> bool:
    """Takes less than about a second."""
    return all(supported(case, a) and case.cost(a) < QUICK_COST for a in case.archs)


# ----------------------------------------------------------------------------------------- the page


def bound(row: Row) -> tuple[str, float]:
    """The busiest resource and its time, us."""
    return max(row["times_us"].items(), key=lambda item: item[1])


def number(x: float | None, digits: int = 3) -> str:
    if x is None:
        return "-"
    if x == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:.{places}f}"


def ratio(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"


def bound_text(row: Row) -> str:
    resource, us = bound(row)
    return f"modelled {number(us)} us ({resource})"


def throughput(row: Row) -> str:
    """What the bound lets through, of useful work, and its share of the peak: TFLOP/s or GB/s of
    compulsory bytes, whichever comes nearer to its peak."""
    gpu: Architecture = ARCHITECTURES[row["device"]]
    _, us = bound(row)
    gb_s, tflop_s = row["compulsory_bytes"] / us / 1e3, row["flop"] / us / 1e6
    of_memory, of_arithmetic = (
        gb_s / gpu.dram_tb_s / 1e3,
        tflop_s / (gpu.tensor_tflop_s * row["mma_rate"]),
    )
    if of_memory >= of_arithmetic:
        return f"{number(gb_s)} GB/s, {100 * of_memory:.0f} %"
    return f"{number(tflop_s)} TFLOP/s, {100 * of_arithmetic:.0f} %"


COUNTED = ("dram", "sectors", "wavefronts", "issue")  # columns of the counts
METRIC_NAMES = {
    "dram": "DRAM / compulsory",
    "sectors": "sector / requested bytes",
    "wavefronts": "wavefronts / minimum",
    "issue": "issue / t, PTX",
    "others": "slowest other / t",
    "peak": "of peak at the bound",
}


def missed(row: Row) -> list[Row]:
    """Bars that a row's metrics do not meet; what a kernel does not use meets all."""
    return [bar for bar in row["bars"] if excess(row, bar) > 0]


def excess(row: Row, bar: Row) -> float:
    """By how much the bar is missed, if that is positive."""
    value = row["metrics"][bar["metric"]]
    if value is None:
        return 0
    over: float = value - bar["limit"]
    return -over if bar["is_least"] else over


def verdict(row: Row, bar: Row) -> str:
    """ "0.390 (bar 0.40: met)"."""
    told = f"missed by {number(excess(row, bar), 2)}" if bar in missed(row) else "met"
    return f"{ratio(row['metrics'][bar['metric']])} (bar {bar['limit']:g}: {told})"


def missed_lines(rows: list[Row]) -> list[str]:
    lines = ["| kernel | shape | device | metric | modelled | why |", "|---|---|---|---|---|---|"]
    for row in rows:
        for bar in missed(row):
            metric = bar["metric"]
            cells = [row["kernel"], row["shape"], row["device"], METRIC_NAMES[metric]]
            cells += [verdict(row, bar), note(row, bar)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def note(row: Row, bar: Row) -> str:
    """Why the row misses the bar; "" if nobody has written it down, or of a smaller miss."""
    case = f"{row['group']}/{row['kernel']}/{row['shape']}"
    for (start, metric), (most, text) in NOTES.items():
        if metric == bar["metric"] and case.startswith(start) and excess(row, bar) <= most:
            return text
    return ""


def count_lines(rows: list[Row]) -> list[str]:
    """Rows of one group. Where the tensor pipe can bind, instructions stand over its time t; else
    over the bytes."""
    by_tensor = any(row["metrics"]["issue"] and row["times_us"]["tensor pipe"]
                    > row["times_us"]["DRAM"] for row in rows)  # fmt: skip
    tensor_names = ("issue / t, SASS loop", "SASS per HMMA", "exp2 / t", "shared / t")
    metrics = [k for k in COUNTED if by_tensor or k != "issue"]
    names = [
        "kernel", "shape", "device", *(METRIC_NAMES[k] for k in metrics),
        *(tensor_names if by_tensor else ["warp-instructions per KB"]),
        "sectors per request", "registers", "threads", "smem", "blocks per SM", "blocks",
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        m, loop = row["metrics"], row["sass_loop"]
        bars = {bar["metric"]: bar for bar in row["bars"]}
        cells = [row["kernel"], row["shape"], row["device"]]
        cells += [verdict(row, bars[k]) if k in bars else ratio(m[k]) for k in metrics]
        if by_tensor:
            per_hmma = number(m["sass_per_hmma"])
            if loop and loop["conditional"]:
                per_hmma += f" (+ {loop['conditional'] / loop['hmma']:.2f})"
            cells += [ratio(m["issue_sass"]), per_hmma, ratio(m["exp2"]), ratio(m["shared"])]
        else:
            cells.append(number(1024 * row["issued"] / row["compulsory_bytes"]))
        cells += [
            number(m["sectors_per_request"]), str(row["registers"]), str(row["threads"]),
            f"{row['smem_bytes'] / 1024:.4g} K", str(row["blocks_per_sm"]),
            str(math.prod(row["grid"])),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def time_lines(rows: list[Row]) -> list[str]:
    has_epilogues = any(row["uncovered_us"] for row in rows)
    names = ["kernel", "shape", "device", *RESOURCES, "bound", "at the bound"]
    if has_epilogues:
        names.insert(4, "of it epilogues")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [row["kernel"], row["shape"], row["device"]]
        cells += [number(row["times_us"][r]) for r in RESOURCES]
        if has_epilogues:
            cells.insert(4, number(row["uncovered_us"] or None))
        lines.append(f"| {' | '.join([*cells, bound_text(row), throughput(row)])} |")
    return lines


def grouped(rows: list[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return groups


def page(results: dict[str, Any]) -> str:
    """docs/modelled.md: the text, then the tables of the results."""
    rows = rows_of(results, DETAILED)
    bars = sum(len(row["bars"]) for row in rows)
    misses = sum(len(missed(row)) for row in rows)
    lines = [METHOD]
    lines += [f"Compiled by nvcc {results['nvcc']}; peers by Triton {results['triton']}.", ""]
    told = "; not:" if misses else "."
    lines += ["## Bars", "", f"{bars - misses} of {bars} are met{told}"]
    lines += ["", *missed_lines(rows), ""] if misses else [""]
    timed = grouped(rows_of(results, TIMED))
    for group, members in grouped(rows).items():
        lines += [f"## {group[0].upper()}{group[1:]}", "", "Modelled times, us:", ""]
        lines += [*time_lines(timed[group]), "", "Counts:", "", *count_lines(members), ""]
    return "\n".join(lines)


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """`new` in the place of what `old` holds of the same, in the order of the cases."""
    rows = {(row["case"], row["arch"]): row for row in [*old, *new]}
    order = [(case.id, arch) for case in all_cases() for arch in case.archs]
    return [rows[key] for key in order if key in rows]


def dump(results: dict[str, Any]) -> str:
    """JSON with a row on each line, so that a changed count is a changed line."""
    head = json.dumps({k: v for k, v in results.items() if k != "rows"})
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in results["rows"])
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}\n'


def write_page(results: dict[str, Any]) -> None:
    RESULTS.write_text(dump(results))
    PAGE.write_text(page(results))
    click.echo(f"wrote {os.path.relpath(PAGE)}")


@click.command(help=__doc__)
@click.option("--only", default="", help="Cases whose name holds this text.")
@click.option("--quick", is_flag=True, help="Cases that take about a second, printed only.")
@click.option("--arch", "archs", multiple=True, type=click.Choice(list(DEVICES)), default=DEVICES)
@click.option("--missing", is_flag=True, help="Only cases that the results do not hold yet.")
@click.option("--update", is_flag=True, help="Replace the rows of the chosen cases in the page.")
@click.option("--format", "only_format", is_flag=True, help="Only write the page again.")
def main(
    only: str, quick: bool, archs: tuple[str, ...], missing: bool, update: bool, only_format: bool
) -> None:
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": []}
    if only_format:
        write_page(results)
        return
    if not find_tool("cuobjdump"):
        raise click.ClickException("pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    have = {(row["case"], row["arch"]) for row in results["rows"]}
    runs = [
        (case, arch)
        for case in all_cases()
        for arch in case.archs
        if only in case.id and arch in archs
        if (is_quick(case) or not quick) and not (missing and (case.id, arch) in have)
    ]
    partial = bool(only) or quick or set(archs) != set(DEVICES)
    if partial and not (update or missing):
        rows = list(produce(runs))
        for members in grouped(rows_of({"rows": rows}, DEVICES)).values():
            click.echo("\n".join([*time_lines(members), *count_lines(members)]))
        return
    versions = {
        "nvcc": native.build_info()["nvcc"],
        "triton": importlib.metadata.version("triton"),
    }
    kept = results["rows"] if partial or missing else []
    for row in produce(runs):  # kept at once: a run takes minutes, and may be cut off
        kept = merged(kept, [row])
        RESULTS.write_text(dump({**versions, "rows": kept}))
    write_page({**versions, "rows": kept})


if __name__ == "__main__":
    main()
