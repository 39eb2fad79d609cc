"""Times of an op and of what a user would pick instead, taken in turns (METHOD.md).

A `Comparison` is the fixture that a bench function calls with its candidates. Each is called once
and checked against the others; then every round calls all of them, so that a change of the
machine's speed meets all. pytest-benchmark runs the rounds, by a clock that moves only by what this
project's op took, so that its statistics are that op's. A line per case goes to the terminal, and
to the results file as soon as it is known.
"""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import machine
from minitron_kernels import architectures

Tensor = torch.Tensor
Call = Callable[[], Any]

OURS = "minitron_kernels"
MAX_ERROR = 0.05  # relative, in the 2-norm: a candidate beyond it computes something else
CSV_COLUMNS = (
    "commit", "device", "op", "arch", "dtype", "shape", "candidate", "graph", "us", "us_low",
    "us_high", "rounds", "tflop_s", "gb_s", "share_of_peak",
)  # fmt: skip


class NotAvailable(Exception):
    """A candidate that this machine or this case has no use for; the message says why."""


@dataclass(frozen=True)
class Settings:
    """How the benches of a run measure.

    device: cpu, cuda, or emulated (the kernels on the PTX emulator: no time means anything).
    seconds: of measuring, per case; rounds are at least `min_rounds` all the same.
    flush: empty the caches before every call.
    cpu_time: of the calling thread, in place of wall-clock time.
    """

    device: str = "cpu"
    smoke: bool = False
    seconds: float = 1.0
    min_rounds: int = 7
    max_rounds: int = 200
    flush: bool = True
    cpu_time: bool = False
    compile: bool = True
    graphs: bool = True
    results: Path | None = None

    @property
    def sweep(self) -> str:
        return "smoke" if self.smoke or self.device == "emulated" else self.device

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds, on a CPU."""
        return time.thread_time if self.cpu_time else time.perf_counter

    @property
    def torch_device(self) -> str:
        return "cuda" if self.device == "cuda" else "cpu"


class Clock:
    """The time that this project's op has taken so far: pytest-benchmark's timer."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


# ------------------------------------------------------------------------------------ measuring


@dataclass
class Meter:
    """Times single calls on a device, the caches flushed before each."""

    settings: Settings
    _buffer: Tensor | None = field(default=None, init=False)

    def flush(self) -> None:
        if not self.settings.flush or self.settings.smoke:
            return
        if self._buffer is None:
            size = 2 * machine.cache_bytes(self.settings.device)
            device = self.settings.torch_device
            self._buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)
        self._buffer.add_(1)

    def turn(self, calls: dict[str, Call]) -> dict[str, float]:
        """Seconds that each call takes, one after the other."""
        if self.settings.device == "cuda":
            return self._turn_on_gpu(calls)
        took, clock = {}, self.settings.clock
        for name, call in calls.items():
            self.flush()
            started = clock()
            call()
            took[name] = clock() - started
        return took

    def _turn_on_gpu(self, calls: dict[str, Call]) -> dict[str, float]:
        """By events. The flush keeps the GPU busy while the host enqueues the call behind it, so
        that the launch is no part of the time, as long as the host is faster than the flush."""
        events = {}
        for name, call in calls.items():
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush()
            first.record()
            call()
            last.record()
            events[name] = first, last
        torch.cuda.synchronize()
        return {name: first.elapsed_time(last) / 1e3 for name, (first, last) in events.items()}


def captured(call: Call) -> Call:
    """The call as a CUDA graph; raises what a call that cannot be captured raises."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):  # where scratch memory was made
        call()
    return graph.replay


def relative_error(result: Any, expected: Any) -> float:
    """In the 2-norm, of all tensors of a result together."""

    def flat(value: Any) -> Tensor:
        parts = value if isinstance(value, tuple) else (value,)
        return torch.cat([t.detach().float().flatten().cpu() for t in parts])

    got, want = flat(result), flat(expected)
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


# -------------------------------------------------------------------------------------- a case


@dataclass(frozen=True)
class Case:
    """flop: of the matrix products by definition. num_bytes: read and written at least once."""

    op: str
    dtype: str
    shape: str
    num_bytes: float
    flop: float = 0.0


class Comparison:
    """The fixture `compare` of a bench function."""

    def __init__(self, settings: Settings, benchmark: Any, recorder: Recorder) -> None:
        self.settings, self._benchmark, self._recorder = settings, benchmark, recorder
        self.device = settings.torch_device
        self._meter = Meter(settings)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch.compile of it; in a smoke run without the minutes that code generation takes."""
        if not self.settings.compile or self.settings.device == "emulated":
            return _refuse("not asked for")
        torch._dynamo.reset()
        backend = "eager" if self.settings.smoke else "inductor"
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    def __call__(self, case: Case, **candidates: Call) -> dict[str, Any]:
        """Measure this project's op (the candidate `ours`) and the others; returns the record.

        A candidate that raises is left out with its reason, and so is one whose result differs; in
        a smoke run these are errors, but for what is not there at all (NotAvailable).
        """
        calls, reasons = self._ready(case, candidates)
        if self.settings.graphs and self.settings.device == "cuda":
            for name, call in list(calls.items()):
                try:
                    calls[f"{name}, graph"] = captured(call)
                except RuntimeError as error:
                    reasons[f"{name}, graph"] = _one_line(error)
        rounds = self._rounds(calls)
        times: dict[str, list[float]] = {name: [] for name in calls}

        def turn() -> None:
            for name, seconds in self._meter.turn(calls).items():
                times[name].append(seconds)
            clock.now += times["ours"][-1]

        self._benchmark.pedantic(turn, rounds=rounds)
        record = self._record(case, times, reasons)
        self._benchmark.extra_info.update(record)
        self._recorder.add(record)
        return record

    def _ready(
        self, case: Case, candidates: dict[str, Call]
    ) -> tuple[dict[str, Call], dict[str, str]]:
        """(the candidates that compute what ours does, why others do not)."""
        expected = candidates["ours"]()
        calls, reasons = {"ours": candidates.pop("ours")}, {}
        for name, call in candidates.items():
            try:
                error = relative_error(call(), expected)
                if error > MAX_ERROR:
                    raise ValueError(f"{case.op}: {name} gives another result, by {error:.3f}")
                calls[name] = call
            except NotAvailable as why:
                reasons[name] = str(why)
            except Exception as error:
                if self.settings.smoke:
                    raise
                reasons[name] = _one_line(error)
        return calls, reasons

    def _rounds(self, calls: dict[str, Call]) -> int:
        s = self.settings
        if s.smoke:
            return 1
        self._meter.turn(calls)  # warm-up
        started = time.perf_counter()
        self._meter.turn(calls)
        needed = time.perf_counter() - started
        return int(min(max(s.seconds / needed, s.min_rounds), s.max_rounds))

    def _record(
        self, case: Case, times: dict[str, list[float]], reasons: dict[str, str]
    ) -> dict[str, Any]:
        s = self.settings
        peak_flop, peak_bytes = machine.peaks(s.device, case.dtype, s.clock)
        entries = {}
        for name, seconds in times.items():
            median = statistics.median(seconds)
            low, high = quartiles(seconds)
            bounds = [n / p for n, p in ((case.flop, peak_flop), (case.num_bytes, peak_bytes)) if p]
            entries[name] = {
                "us": 1e6 * median, "us_low": 1e6 * low, "us_high": 1e6 * high,
                "rounds": len(seconds),
                "tflop_s": case.flop / median / 1e12 if case.flop else None,
                "gb_s": case.num_bytes / median / 1e9,
                # Of the time that the busier of arithmetic and memory takes at its peak.
                "share_of_peak": max(bounds) / median if bounds else None,
            }  # fmt: skip
        return {
            "op": case.op, "arch": machine.arch(self.settings.device), "dtype": case.dtype,
            "shape": case.shape, "flop": case.flop, "num_bytes": case.num_bytes,
            "candidates": entries, "left_out": reasons,
            "clocks": machine.clocks(self.settings.device),
        }  # fmt: skip


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _refuse(reason: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        raise NotAvailable(reason)

    return call


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


# -------------------------------------------------------------------------------------- results


def line(record: dict[str, Any]) -> str:
    """op arch dtype shape | us | TFLOP/s | GB/s | % of peak | x eager | x best baseline."""
    entries = record["candidates"]
    what = " ".join(record[key] for key in ("op", "arch", "dtype", "shape"))
    if record["arch"] == machine.EMULATED:
        others = ", ".join(name for name in entries if name != "ours")
        return f"{what} | emulated: no time | same result as {others}"
    ours = entries["ours"]
    rivals = {k: v for k, v in entries.items() if k not in ("ours", "ours, graph")}
    cells = [
        what,
        f"{ours['us']:.1f} us ({ours['us_low']:.1f}-{ours['us_high']:.1f})",
        _number(ours["tflop_s"], "TFLOP/s"),
        _number(ours["gb_s"], "GB/s"),
        _number(ours["share_of_peak"] and 100 * ours["share_of_peak"], "% of peak"),
    ]
    if "ours, graph" in entries:
        cells[1] += f", in a graph {entries['ours, graph']['us']:.1f}"
    if "eager" in entries:
        cells.append(f"{entries['eager']['us'] / ours['us']:.2f} x eager")
    if rivals:
        best = min(rivals, key=lambda name: rivals[name]["us"])
        mine = min(entries[k]["us"] for k in ("ours", "ours, graph") if k in entries)
        cells.append(f"{rivals[best]['us'] / mine:.2f} x best ({best})")
    return " | ".join(cells)


def _number(value: float | None, unit: str) -> str:
    return f"- {unit}" if value is None else f"{value:.3g} {unit}"


class Recorder:
    """Prints and keeps the records of a run: JSON lines, the machine first, and a table in CSV."""

    def __init__(self, settings: Settings, write: Callable[[str], None] = print) -> None:
        self._settings, self._write = settings, write
        self._machine: dict[str, Any] | None = None

    def add(self, record: dict[str, Any]) -> None:
        self._write(line(record))
        for name, why in record["left_out"].items():
            self._write(f"    without {name}: {why}")
        path = self._settings.results
        if path is None:
            return
        if self._machine is None:
            self._machine = machine.describe(self._settings.device, self._settings.clock)
            path.parent.mkdir(parents=True, exist_ok=True)
            _append(path, {"machine": self._machine})
        _append(path, _rounded(record))
        self._append_csv(path.with_suffix(".csv"), record)

    def _append_csv(self, path: Path, record: dict[str, Any]) -> None:
        assert self._machine is not None
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            table = csv.DictWriter(file, CSV_COLUMNS, extrasaction="ignore")
            if is_new:
                table.writeheader()
            for name, entry in record["candidates"].items():
                candidate, graph, _ = name.partition(", graph")
                row = {**self._machine, **_rounded(record), **_rounded(entry)}
                row |= {"candidate": OURS if candidate == "ours" else candidate}
                table.writerow(row | {"graph": bool(graph)})


def _append(path: Path, value: Any) -> None:
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def _rounded(value: Any) -> Any:
    """Floats of four significant digits: what is recorded is not known better."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(machine, records) of a results file; a line that a cut run left half written is skipped.

    Of a case that was measured twice the last record counts.
    """
    about: dict[str, Any] = {}
    records: dict[tuple[str, ...], dict[str, Any]] = {}
    for text in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            value = json.loads(text)
            if "machine" in value:
                about = about or value["machine"]
            else:
                records[tuple(value[k] for k in ("op", "arch", "dtype", "shape"))] = value
    return about, list(records.values())


def architecture(about: dict[str, Any]) -> architectures.Architecture | None:
    """The row of the table that a results file's machine is."""
    return architectures.find(about.get("device", ""))
