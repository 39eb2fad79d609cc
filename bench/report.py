"""Writes docs/performance.md and its figures from bench/results/.

    python -m bench.report

Reads ops-*.jsonl (what `pytest bench --out` wrote; those of one machine make one section),
model-*.json (`minitron bench --json`), and the counts of `python -m bench.modelled`. What was
measured and what is modelled stand apart; times of the emulator, which mean nothing, are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench import harness, modelled
from bench.machine import EMULATED
from minitron_kernels.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
FIGURES = "performance"  # the folder of figures beside the page

PEAKS = ("peak_tflop_s_bfloat16", "peak_tflop_s_float32", "peak_gb_s")

Record = dict[str, Any]

INTRODUCTION = """\
# Performance

Written by `python -m bench.report` from `bench/results/`; how everything is measured is in
`bench/METHOD.md`. Two kinds of numbers stand here, and never in one table:

- **measured**: times on the machine that is named, all candidates in one process and in turn;
- **modelled**: how long a GPU takes at least, from instructions and bytes that the emulator
  counted. No GPU was used.
"""

MEASURED = """\
Times are medians, with the quartiles in brackets. `% of peak` is the time that the busier of
arithmetic and memory would take at its peak over the time taken. `x NAME` is NAME's time over this
project's: above 1, this project is faster. The caches are emptied before every call.
"""

MODELLED = """\
**Modelled: nothing below was measured.** Each cell is the least time of a kernel in microseconds,
the resource that binds, and the share of that GPU's limit (its peak of arithmetic, or its bandwidth
for the bytes that must move) which is reached at that bound. Triton's kernels
(`bench/triton_peers.py`) went through the same accounting; those with matrix products are of sm_80,
attention and a product also of sm_90, with TMA and wgmma. What the model leaves out (latencies,
what really overlaps, clocks under load) is in `docs/modelled.md`, with every resource and counter.
Tensor-pipe times of sm_90 and sm_100 are at the peak rate of wgmma and tcgen05, which mma.sync does
not reach.
"""


@dataclass(frozen=True)
class Results:
    """What the page is made of."""

    ops: dict[str, tuple[dict[str, Any], list[Record]]]  # by the machine's name, as in file names
    models: dict[str, dict[str, Any]]
    modelled: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Results:
        ops: dict[str, tuple[dict[str, Any], list[Record]]] = {}
        for path in sorted(folder.glob("ops-*.jsonl")):
            about, records = harness.read(path)
            if any(record["arch"] == EMULATED for record in records):
                raise ValueError(f"{path} holds times of the emulator, which mean nothing")
            name = re.sub(r"\W+", "-", about["device"].lower())
            if name not in ops:
                ops[name] = about, []
            for key in PEAKS:  # of a CPU: measured by each run, and the best is the peak
                ops[name][0][key] = max(a.get(key) or 0 for a in (about, ops[name][0])) or None
            ops[name][1].extend(records)
        models = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("model-*.json"))}
        return cls(ops, models, json.loads((folder / "modelled.json").read_text()))


def table(names: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(names)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def number(value: float | None, digits: int = 3) -> str:
    return modelled.number(value, digits)


# ----------------------------------------------------------------------------------- measured: ops


def op_of(record: Record) -> str:
    """The op without what is only one of its variants: "linear Q4_K" is "linear"."""
    return str(record["op"]).partition(",")[0].partition(" ")[0]


def time_cell(entry: dict[str, Any]) -> str:
    return f"{number(entry['us'])} ({number(entry['us_low'])}-{number(entry['us_high'])})"


def share_of_peak(record: Record, about: dict[str, Any]) -> float | None:
    """Of ours: the time that the busier of arithmetic and memory takes at its peak, over its."""
    dtype = record["dtype"] if f"peak_tflop_s_{record['dtype']}" in about else "bfloat16"
    peaks = ("flop", 1e6, f"peak_tflop_s_{dtype}"), ("num_bytes", 1e3, "peak_gb_s")  # per us
    bounds = [record[work] / (unit * about[k]) for work, unit, k in peaks if about.get(k)]
    return max(bounds) / record["candidates"]["ours"]["us"] if bounds else None


def op_table(records: list[Record], about: dict[str, Any]) -> list[str]:
    """One op: a row for each case, a column for each rival that some case has."""
    rivals = list(dict.fromkeys(n for r in records for n in r["candidates"] if n != "ours"))
    has_flop = any(r["flop"] for r in records)
    names = ["op", "dtype", "shape", "us", *(["TFLOP/s"] if has_flop else []), "GB/s", "% of peak"]
    rows = []
    for record in records:
        ours = record["candidates"]["ours"]
        share = share_of_peak(record, about)
        cells = [record["op"], record["dtype"], record["shape"], time_cell(ours)]
        cells += [number(ours["tflop_s"])] if has_flop else []
        cells += [number(ours["gb_s"]), "-" if share is None else f"{100 * share:.0f}"]
        for rival in rivals:
            entry = record["candidates"].get(rival)
            cells.append("-" if entry is None else f"{entry['us'] / ours['us']:.2f}")
        rows.append(cells)
    return table([*names, *(f"x {rival}" for rival in rivals)], rows)


def machine_text(about: dict[str, Any]) -> str:
    versions = about["versions"]
    parts = [f"{about['device']}, {about['when']}, commit {about['commit']}"]
    parts.append(f"times: {about.get('clock', 'wall clock')}")
    parts.append(", ".join(f"{k} {versions[k]}" for k in ("torch", "transformers") if versions[k]))
    peaks = [
        f"{number(about[key])} {unit}"
        for key, unit in (
            ("peak_tflop_s_bfloat16", "TFLOP/s in bfloat16"),
            ("peak_tflop_s_float32", "TFLOP/s in float32"),
            ("peak_gb_s", "GB/s"),
        )
        if about.get(key)
    ]
    return "; ".join(parts) + f". Peaks: {', '.join(peaks)}."


def left_out(records: list[Record]) -> list[str]:
    """Which candidates were not there, and why."""
    reasons: dict[str, set[str]] = {}
    for record in records:
        for name, why in record["left_out"].items():
            reasons.setdefault(f"{name}: {why}", set()).add(op_of(record))
    return [f"- {reason} ({', '.join(sorted(ops))})" for reason, ops in sorted(reasons.items())]


def ops_section(name: str, about: dict[str, Any], records: list[Record]) -> list[str]:
    lines = [f"### {about['device']}", "", machine_text(about), ""]
    for figure in ("bars", "roofline", "scaling"):
        lines += [f"![{figure}]({FIGURES}/{name}-{figure}.svg)", ""]
    by_op: dict[str, list[Record]] = {}
    for record in records:
        by_op.setdefault(op_of(record), []).append(record)
    for op, members in by_op.items():
        lines += [f"#### {op}", "", *op_table(members, about), ""]
    if reasons := left_out(records):
        lines += ["Left out:", "", *reasons, ""]
    return lines


# -------------------------------------------------------------------------- measured: whole models


def model_table(report: dict[str, Any]) -> list[str]:
    names = [
        "",
        "batch",
        "prefill tokens/s",
        "decode tokens/s",
        "first token ms",
        "between tokens ms",
    ]
    names += ["memory GiB", "% of bandwidth bound"]
    rows = []
    for row in report["rows"]:
        if "error" in row:
            rows.append([row["side"], str(row["batch"]), row["error"], *["-"] * 5])
            continue
        gaps = row["inter_token_latency"]
        share, memory = row["share_of_bandwidth_bound"], row.get("peak_memory_bytes")
        rows.append(
            [
                row["side"],
                str(row["batch"]),
                number(row["prefill_tokens_per_second"]),
                number(row["decode_tokens_per_second"]),
                number(1e3 * row["time_to_first_token"]),
                ", ".join(f"{p} {number(1e3 * gaps[p])}" for p in gaps),
                "-" if memory is None else f"{memory / 2**30:.2f}",
                "-" if share is None else f"{100 * share:.0f}",
            ]
        )
    return table(names, rows)


def model_section(report: dict[str, Any]) -> list[str]:
    weights = ", ".join(f"{n['count']} {kind}" for kind, n in report["weights"].items())
    speed = report["bandwidth_bytes_per_second"]
    names = {"torch", *(row["side"] for row in report["rows"])}
    versions = [f"{n} {v}" for n, v in report["versions"].items() if n in names and v]
    return [
        f"#### {Path(report['model']).name}, {report['dtype']}",
        "",
        "{device}, {threads} threads, times: {clock}; prompt of {prompt}, {generate} new tokens, "
        "medians of {repeat} runs; ".format(**report)
        + f"weights: {weights}; memory, {report['bandwidth_source']}: "
        f"{number(speed and speed / 1e9)} GB/s; {', '.join(versions)}.",
        "",
        *model_table(report),
        "",
    ]


# ---------------------------------------------------------------------------------------- modelled


def modelled_cell(row: Record) -> str:
    resource, us = modelled.bound(row)
    return f"{number(us)}, {resource}, {modelled.throughput(row).rpartition(', ')[2]}"


def modelled_section(results: dict[str, Any]) -> list[str]:
    rows = modelled.rows_of(results, modelled.DEVICES)
    lines = ["## Modelled", "", MODELLED]
    lines += [f"Compiled by nvcc {results['nvcc']}; peers by Triton {results['triton']}.", ""]
    lines += [f"![modelled]({FIGURES}/modelled.svg)", ""]
    for group, members in modelled.grouped(rows).items():
        cells: dict[tuple[str, str], dict[str, str]] = {}
        for row in members:
            case = (row["kernel"], row["shape"])
            cells.setdefault(case, {})[row["device"]] = modelled_cell(row)
        gpus = [g for g in ARCHITECTURES if any(g in by_gpu for by_gpu in cells.values())]
        body = [[*case, *(by_gpu.get(g, "-") for g in gpus)] for case, by_gpu in cells.items()]
        lines += [f"### {group[0].upper()}{group[1:]}", ""]
        lines += [*table(["kernel", "shape", *gpus], body), ""]
    return lines


def page(results: Results) -> str:
    lines = [INTRODUCTION, "## Measured", "", MEASURED]
    if not any(about["device"].startswith("NVIDIA") for about, _ in results.ops.values()):
        lines += ["No GPU has been measured yet (`bench/on_gpu.sh` does).", ""]
    for name, (about, records) in results.ops.items():
        lines += ops_section(name, about, records)
    if results.models:
        lines += ["### Whole models", ""]
        lines += ["By `minitron bench`; the other sides ran in turn, on the same weights.", ""]
        for report in results.models.values():
            lines += model_section(report)
    return "\n".join([*lines, *modelled_section(results.modelled)]).rstrip() + "\n"


def write(results: Results, target: Path) -> None:
    from bench import plots

    target.write_text(page(results))
    plots.draw_all(results, target.parent / FIGURES)


@click.command(help=__doc__)
@click.option("--results", default=RESULTS, type=click.Path(path_type=Path), show_default=False)
@click.option("--out", default=PAGE, type=click.Path(path_type=Path), show_default=False)
def main(results: Path, out: Path) -> None:
    write(Results.read(results), out)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
