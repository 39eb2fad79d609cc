"""The figures of docs/performance.md, by matplotlib: SVG, the same bytes for the same results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import modelled

if TYPE_CHECKING:
    from bench.report import Record, Results

# Told apart also by who is colour-blind (Okabe and Ito); this project's is the first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
STYLE = {
    "svg.hashsalt": "minitron_kernels",
    "svg.fonttype": "none",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
}
OURS = "minitron_kernels"
# In this order they have the colours and marks; whoever is not among them takes the next ones.
KNOWN = ("ours", "eager", "compiled", "sdpa", "torch", "dequantised", "transformers", "grouped")
MARKS = "os^Dv<>P"


def looks(name: str) -> tuple[str, str]:
    """(color, mark) of a candidate, the same in every figure."""
    i = KNOWN.index(name) if name in KNOWN else sum(name.encode())
    return COLORS[i % len(COLORS)], MARKS[i % len(MARKS)]


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw_all(results: Results, folder: Path) -> None:
    with matplotlib.rc_context(STYLE):
        for name, (about, records) in results.ops.items():
            save(bars(about, records), folder / f"{name}-bars.svg")
            save(roofline(about, records), folder / f"{name}-roofline.svg")
            save(scaling(about, records), folder / f"{name}-scaling.svg")
        save(modelled_bars(results.modelled), folder / "modelled.svg")


def label(record: Record) -> str:
    dtype = {"bfloat16": "", "float32": " fp32", "float16": " fp16"}.get(record["dtype"], "")
    return f"{record['op']} {record['shape']}{dtype}"


# ------------------------------------------------------------------------------- against baselines


def bars(about: dict[str, Any], records: list[Record]) -> Figure:
    """Each rival's time over this project's, a line of points for each case in bfloat16."""
    shown = [r for r in records if r["dtype"] == "bfloat16" and len(r["candidates"]) > 1]
    shown = [r for r in shown if not r["op"].startswith("linear ") or r["shape"].endswith("M 1")]
    rivals = list(dict.fromkeys(n for r in shown for n in r["candidates"] if n != "ours"))
    figure = Figure(figsize=(8.5, 0.9 + 0.19 * len(shown)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(shown))[::-1]
    for rival in rivals:
        points = [
            (r["candidates"][rival]["us"] / r["candidates"]["ours"]["us"], y)
            for r, y in zip(shown, places, strict=True)
            if rival in r["candidates"]
        ]
        axes.plot(
            *zip(*points, strict=True), looks(rival)[1], ms=5, label=rival, color=looks(rival)[0],
        )  # fmt: skip
    axes.axvline(1, color=COLORS[0], lw=1.5)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_yticks(places, [label(r) for r in shown], fontsize=7)
    axes.set_ylim(-1, len(shown))
    axes.set_xlabel(f"time over that of {OURS} (right of the line: {OURS} is faster)")
    axes.set_title(f"measured: {about['device']}, bfloat16", fontsize=9)
    figure.legend(loc="outside upper center", ncols=len(rivals))
    return figure


# ----------------------------------------------------------------------------------------- roofline


def roofline(about: dict[str, Any], records: list[Record]) -> Figure:
    """FLOP/s over FLOP per byte of the products and of attention, under the machine's peaks."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    shown = [r for r in records if r["flop"] and r["dtype"] == "bfloat16"]
    kinds = list(dict.fromkeys(_kind(r) for r in shown))
    for i, kind in enumerate(kinds):
        own = [r for r in shown if _kind(r) == kind]
        for name, filled in (("ours", True), ("eager", False)):
            at = [(r["flop"] / r["num_bytes"], r["flop"] / r["candidates"][name]["us"] / 1e6)
                  for r in own if name in r["candidates"]]  # fmt: skip
            color = COLORS[i % len(COLORS)]
            axes.plot(
                *zip(*at, strict=True), "o", ms=5, mec=color, mfc=color if filled else "none",
                label=kind if filled else None,
            )  # fmt: skip
    intensity = [r["flop"] / r["num_bytes"] for r in shown]
    flop, bandwidth = about.get("peak_tflop_s_bfloat16"), about.get("peak_gb_s")
    if flop and bandwidth and intensity:
        x = np.geomspace(min(intensity) / 2, max(intensity) * 2, 200)
        axes.plot(x, np.minimum(flop, x * bandwidth / 1e3), color="black", lw=1)
        knee = flop / bandwidth * 1e3
        axes.annotate(f"{bandwidth:.3g} GB/s", (knee / 6, flop / 6), xytext=(-6, 6),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
        axes.annotate(f"{flop:.3g} TFLOP/s", (x[-1], flop), xytext=(0, 4),
                      textcoords="offset points", ha="right", fontsize=8)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    axes.set_title(
        f"measured: {about['device']}, bfloat16; filled: {OURS}, open: eager PyTorch", fontsize=9
    )
    if shown:
        axes.legend(fontsize=8)
    return figure


def _kind(record: Record) -> str:
    op = str(record["op"])
    if op.startswith("linear "):
        return "linear, quantised"
    return op.replace("attention_kvcache", "attention, decode").replace(", Q4_K", "")


# ------------------------------------------------------------------------------------------ scaling


def scaling(about: dict[str, Any], records: list[Record]) -> Figure:
    """Times over length and batch: products by rows, attention by keys."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    _lines(
        panels[0],
        [r for r in records if r["op"] == "linear" and r["shape"].startswith("gate_up")],
        lambda r: int(r["shape"].rpartition(" M ")[2]),
        "gate_up, rows of x",
    )
    _lines(
        panels[1],
        [
            r
            for r in records
            if r["op"] == "attention_kvcache" and r["shape"].startswith("batch 1 ")
        ],
        lambda r: int(r["shape"].rpartition("context ")[2]),
        "attention, one query: keys",
    )
    _lines(
        panels[2],
        [r for r in records if r["op"] == "attention" and r["shape"].startswith("1 x ")],
        lambda r: int(r["shape"].split(" x ")[1].split()[0]),
        "attention, causal: tokens",
    )
    panels[0].set_ylabel("ms")
    figure.suptitle(f"measured: {about['device']}, bfloat16", fontsize=9)
    return figure


def _lines(axes: Axes, records: list[Record], x_of: Any, title: str) -> None:
    own = sorted((r for r in records if r["dtype"] == "bfloat16"), key=x_of)
    for name in dict.fromkeys(n for r in own for n in r["candidates"]):
        at = [(x_of(r), r["candidates"][name]["us"] / 1e3) for r in own if name in r["candidates"]]
        axes.plot(
            *zip(*at, strict=True), "o-", ms=4, lw=1.8 if name == "ours" else 1,
            color=looks(name)[0], label=OURS if name == "ours" else name,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xticks([x_of(r) for r in own], [str(x_of(r)) for r in own])
    axes.minorticks_off()
    axes.title.set_fontsize(9)
    if own:
        axes.legend(fontsize=7)


# ----------------------------------------------------------------------------------------- modelled

SHOWN = (  # group, the start of the shape: this project's and Triton's kernels at the same shape
    ("prefill attention", "2048 x 2048 full"),
    ("prefill attention", "8192 x 8192 causal"),
    ("GEMM", "gate_up 23040 x 4096, M 2048"),
    ("GEMM, few rows", "o 4096 x 4096, M 16"),
    ("quantised, few rows", "down 4096 x 11520 Q4_0, M 1"),
    ("quantised, few rows", "down 4096 x 11520 Q4_0, M 16"),
    ("row-wise", "2048 x 4096"),
    ("row-wise", "2048 x 11520"),
    ("row-wise", "2048 x (32 + 8) x 128"),
)


def modelled_bars(results: dict[str, Any], device: str = "A100") -> Figure:
    """The time of each resource, this project's kernel above Triton's, on one GPU."""
    rows = [r for r in modelled.rows_of(results, modelled.DEVICES) if r["device"] == device]
    shown = []
    for group, shape in SHOWN:
        here = [r for r in rows if r["group"] == group and r["shape"] == shape]
        here = [
            r for r in here if r["kernel"] not in ("add_rms_norm", "embedding", "quant_prepare_x")
        ]
        if any(r["kernel"].startswith("Triton") for r in here):
            shown += sorted(here, key=lambda r: r["kernel"].startswith("Triton"))
    figure = Figure(figsize=(8.5, 0.8 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    resources = modelled.RESOURCES
    for row, y in zip(shown, range(len(shown))[::-1], strict=True):
        bound = modelled.bound(row)[1]
        best = min(modelled.bound(r)[1] for r in shown if (r["group"], r["shape"]) ==
                   (row["group"], row["shape"]))  # fmt: skip
        for i, resource in enumerate(resources):
            height = 0.8 / len(resources)
            axes.barh(
                y + 0.4 - (i + 0.5) * height, row["times_us"][resource] / best, height,
                color=COLORS[i], label=resource if y == 0 else None,
            )  # fmt: skip
        axes.annotate(f"{modelled.number(bound)} us", (bound / best, y), xytext=(4, -3),
                      textcoords="offset points", fontsize=7)  # fmt: skip
    names = [f"{r['kernel'].split(',')[0]}: {r['shape']}" for r in shown]
    axes.set_yticks(range(len(shown))[::-1], names, fontsize=7)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("time of each resource over the lower of the two bounds; the longest bar binds")
    axes.set_title(f"modelled, not measured: {device}", fontsize=9)
    figure.legend(loc="outside upper center", ncols=len(resources), fontsize=8)
    return figure
