"""How fast a model runs, for `minitron bench`: tokens/s, latencies, memory, share of the bound.

A *side* runs the same prompts of random ids: this package, or with ``compare`` transformers or
llama.cpp on the same weights (`bench_peers.py`). Sides take turns, so that a change of the
machine's speed meets all; the first run of each is a warm-up.

A decode step reads every weight once, and each sequence's K and V; no step is faster than memory
delivers them. Bandwidth is measured on a CPU and published for a GPU (`architectures.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from minitron_kernels import architectures
from minitron_kernels.config import ModelConfig
from minitron_kernels.generate import Engine, affordable_tokens
from minitron_kernels.info import activations_info, cpu_info, peak_memory, versions, weights_info
from minitron_kernels.loaders.files import check_folder
from minitron_kernels.model import MinitronForCausalLM
from minitron_kernels.sampling_params import SamplingParams

OURS = "minitron_kernels"
PERCENTILES = (50, 90, 99)
PAGE_SIZE = 16
PLOT_TYPES = (".svg", ".png", ".pdf")
Prompts = Sequence[Sequence[int]]
Clock = Callable[[], float]  # seconds


@dataclass
class RunTimes:
    """Of one run of a batch, in seconds.

    Steps that read any prompt are prefill, others decode. ``first``: of each request, from the
    start to its first token; ``gaps``: between one token of a request and its next.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)


class Side(Protocol):
    """What runs prompts of token ids greedily, ``new_tokens`` for each; ValueError if it cannot."""

    name: str
    version: str | None  # where `versions` does not tell it

    def run(self, prompts: Prompts, new_tokens: int) -> RunTimes: ...


class Ours:
    """This package's engine, one for each batch size: what it captures or records is kept."""

    name = OURS
    version: str | None = None

    def __init__(
        self,
        model: MinitronForCausalLM,
        cuda_graphs: bool | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.model, self.cuda_graphs, self.clock = model, cuda_graphs, clock
        self._engine: tuple[tuple[int, int], Engine] | None = None  # (batch, length) and its

    def _engine_for(self, batch: int, length: int) -> Engine:
        if self._engine is None or self._engine[0] != (batch, length):
            self._engine = None  # frees its cache
            needs = [-(-length // PAGE_SIZE) * PAGE_SIZE] * batch
            tokens = affordable_tokens(self.model, needs)
            if tokens < sum(needs):
                raise ValueError(f"the KV cache of {batch} x {length} tokens does not fit memory")
            engine = Engine(
                self.model, None, tokens, max_batch_size=batch, page_size=PAGE_SIZE,
                cuda_graphs=self.cuda_graphs,
            )  # fmt: skip
            self._engine = (batch, length), engine
        return self._engine[1]

    def run(self, prompts: Prompts, new_tokens: int) -> RunTimes:
        engine = self._engine_for(len(prompts), len(prompts[0]) + new_tokens)
        params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        for prompt in prompts:
            engine.add(prompt, params)
        times, last = RunTimes(), dict[int, float]()
        started = now = self.clock()
        while engine.has_work:
            before, prompt_tokens = now, engine.timings.prefill_tokens
            events = engine.step()
            now = self.clock()
            if prompt_tokens := engine.timings.prefill_tokens - prompt_tokens:
                times.prefill_tokens += prompt_tokens
                times.prefill_seconds += now - before
            else:
                times.decode_tokens += len(events)
                times.decode_seconds += now - before
            for event in events:
                if event.index in last:
                    times.gaps.append(now - last[event.index])
                else:
                    times.first.append(now - started)
                last[event.index] = now
        return times


# ------------------------------------------------------------------------------------- the bound


@functools.cache
def read_bandwidth(
    num_bytes: int = 512 << 20, repeat: int = 5, clock: Clock = time.perf_counter
) -> float:
    """Bytes/s at which this CPU reads memory with PyTorch's threads: the best of several sums over
    a buffer that no cache holds."""
    buffer = torch.ones(num_bytes // 4)
    best = float("inf")
    for _ in range(repeat):
        started = clock()
        buffer.sum()
        best = min(best, clock() - started)
    return num_bytes / best


def bandwidth(device: torch.device, clock: Clock = time.perf_counter) -> tuple[float | None, str]:
    """(bytes/s, "measured" or "published"); None for a GPU that the table does not know."""
    if device.type != "cuda":
        return read_bandwidth(clock=clock), "measured"
    gpu = architectures.find(torch.cuda.get_device_name(device))
    return None if gpu is None else gpu.dram_tb_s * 1e12, "published"


def step_bytes(model: MinitronForCausalLM, batch: int, context: float) -> float:
    """Bytes that a decode step reads at least: all matrices, the rows of the embedding that it
    looks up left out, and K and V of ``context`` tokens of each sequence."""
    config: ModelConfig = model.config
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tie_word_embeddings:
        weights -= model.model.embed_tokens.weight.nbytes
    return weights + batch * context * config.kv_bytes_per_token(model.dtype.itemsize)


# -------------------------------------------------------------------------------------- measuring


@dataclass
class Workload:
    """``prompt`` tokens a sequence, ``generate`` new ones; each batch size ``repeat`` times."""

    prompt: int = 512
    generate: int = 128
    batches: Sequence[int] = (1, 8, 64)
    repeat: int = 5

    def __post_init__(self) -> None:
        for name in ("prompt", "generate", "repeat"):
            value, least = getattr(self, name), 2 if name == "generate" else 1
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.batches or min(self.batches) < 1:
            raise ValueError(f"batch sizes must be positive, got {list(self.batches)}")

    def prompts(self, batch: int, vocab_size: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(batch)
        low, high = min(10, vocab_size - 1), min(1000, vocab_size)
        ids: list[list[int]] = torch.randint(
            low, high, (batch, self.prompt), generator=generator
        ).tolist()
        return ids


def run(
    model: MinitronForCausalLM,
    workload: Workload,
    *,
    peers: Callable[[], Sequence[Side]] = tuple,
    cuda_graphs: bool | None = None,
    clock: Clock = time.perf_counter,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a model; ``peers`` makes the sides to compare with, once memory has been measured.

    Returns a dict: the workload, the device, and under "rows" one for each batch size and side. A
    batch that a side cannot run has the reason in its row's "error". ``clock``: time.process_time
    on a CPU that others use, with one thread and sides by the same clock.
    """
    context = model.config.max_position_embeddings
    if workload.prompt + workload.generate > context:
        total = workload.prompt + workload.generate
        raise ValueError(f"{total} tokens exceed the model's context of {context}")
    speed, source = bandwidth(model.device, clock)
    ours = Ours(model, cuda_graphs, clock)
    rows = []
    memory = {}
    for batch in workload.batches:  # before others' weights are in memory
        progress(f"warm-up, batch {batch}")
        prompts = workload.prompts(batch, model.config.vocab_size)
        memory[batch] = _peak_of(ours, prompts, workload.generate)
    sides: list[Side] = [ours, *peers()]
    for batch in workload.batches:
        prompts = workload.prompts(batch, model.config.vocab_size)
        times: dict[str, list[RunTimes]] = {side.name: [] for side in sides}
        errors: dict[str, str] = {}
        for i in range(workload.repeat + 1):
            for side in sides:
                progress(f"batch {batch}, run {i} of {workload.repeat}, {side.name}")
                if side.name in errors:
                    continue
                try:
                    measured = side.run(prompts, workload.generate)
                except (ValueError, NotImplementedError, MemoryError) as error:
                    errors[side.name] = str(error)
                    continue
                if i:  # the first is a warm-up
                    times[side.name].append(measured)
        bound = None
        if speed is not None:
            mean_context = workload.prompt + workload.generate / 2
            bound = step_bytes(model, batch, mean_context) / speed
        for side in sides:
            row: dict[str, Any] = {"side": side.name, "batch": batch}
            if side.name in errors:
                row["error"] = errors[side.name]
            else:
                row |= summary(times[side.name], bound if side is ours else None)
            if side is ours and memory[batch] is not None:
                row["peak_memory_bytes"] = memory[batch]
            rows.append(row)
    loaded = model.checkpoint
    return {
        "model": model.config.source if loaded is None else loaded.path.name,
        "device": _device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights_info(model),
        "activations": activations_info(model),
        "threads": torch.get_num_threads(),
        "clock": "processor time" if clock is time.process_time else "wall clock",
        "bandwidth_bytes_per_second": speed,
        "bandwidth_source": source,
        "versions": versions() | {s.name: s.version for s in sides if s.version},
        **asdict(workload),
        "rows": rows,
    }


def summary(runs: Sequence[RunTimes], bound: float | None) -> dict[str, Any]:
    """Medians over runs; latencies in seconds, percentiles over the tokens of all runs.

    ``bound``: seconds that a decode step takes at least.
    """
    prefill = [r.prefill_tokens / r.prefill_seconds for r in runs]
    decode = [r.decode_tokens / r.decode_seconds for r in runs if r.decode_seconds]
    gaps = sorted(gap for r in runs for gap in r.gaps)
    middle = percentile(gaps, 50) if gaps else None
    return {
        "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode) if decode else None,
        "time_to_first_token": statistics.median(t for r in runs for t in r.first),
        "time_to_last_first_token": statistics.median(max(r.first) for r in runs),
        "inter_token_latency": {f"p{p}": percentile(gaps, p) for p in PERCENTILES if gaps},
        "share_of_bandwidth_bound": bound / middle if bound and middle else None,
        "spread": {"prefill": _spread(prefill), "decode": _spread(decode)},
    }


def percentile(ordered: Sequence[float], p: float) -> float:
    """The least of the ascending values that p % of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * p / 100) - 1)]


def _spread(values: Sequence[float]) -> float | None:
    """(largest - least) / median."""
    return (max(values) - min(values)) / statistics.median(values) if values else None


def _peak_of(side: Ours, prompts: Prompts, new_tokens: int) -> int | None:
    """The largest memory in use during a run, in bytes; None if it cannot run."""
    device = side.model.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # Linux: from now on, not since the process began
        Path("/proc/self/clear_refs").write_text("5")
    try:
        side.run(prompts, new_tokens)
    except (ValueError, MemoryError):
        return None
    report = peak_memory()
    return report.get("peak_cuda_memory_bytes", report["peak_memory_bytes"])


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_info()['name']} ({device.type})"


# ------------------------------------------------------------------------------------- what is told


def table(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    lines = [
        "{model}, {dtype}, {device}, {threads} threads, {clock}; prompt {prompt}, {generate} new "
        "tokens, medians of {repeat}".format(**report),
        f"{'':16} {'batch':>5} {'prefill':>9} {'decode':>9} {'first':>8} "
        f"{'p50':>8} {'p90':>8} {'p99':>8} {'memory':>8} {'bound':>6}",
        f"{'':16} {'':5} {'tokens/s':>9} {'tokens/s':>9} {'ms':>8} "
        f"{'ms':>8} {'ms':>8} {'ms':>8} {'GiB':>8} {'%':>6}",
    ]
    for row in report["rows"]:
        start = f"{row['side']:16} {row['batch']:5}"
        if "error" in row:
            lines.append(f"{start} {row['error']}")
            continue
        gaps = row["inter_token_latency"]
        memory, share = row.get("peak_memory_bytes"), row["share_of_bandwidth_bound"]
        cells = [
            _cell(row["prefill_tokens_per_second"], 9),
            _cell(row["decode_tokens_per_second"], 9),
            _cell(1e3 * row["time_to_first_token"], 8),
            *(_cell(1e3 * gaps[f"p{p}"] if gaps else None, 8, 2) for p in PERCENTILES),
            _cell(memory and memory / 2**30, 8, 2),
            _cell(share and 100 * share, 6, 0),
        ]
        lines.append(" ".join([start, *cells]))
    return lines


def _cell(value: float | None, width: int, digits: int = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def check_plot(path: Path) -> None:
    """Raises ValueError or OSError where `plot` would, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib (pip install matplotlib)")
    if path.suffix not in PLOT_TYPES:
        raise ValueError(f"{path} must end with one of {', '.join(PLOT_TYPES)}")
    check_folder(path)


def plot(report: dict[str, Any], path: Path) -> None:
    """Decode tokens/s and inter-token latency over the batch size, as a figure of matplotlib."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, latency = figure.subplots(1, 2)
    rows = [row for row in report["rows"] if "error" not in row]
    for side in dict.fromkeys(row["side"] for row in rows):
        own = [row for row in rows if row["side"] == side]
        batches = [row["batch"] for row in own]
        speed.plot(batches, [r["decode_tokens_per_second"] for r in own], "o-", label=side)
        gaps = [r["inter_token_latency"] for r in own]
        (drawn,) = latency.plot(batches, [1e3 * g["p50"] for g in gaps], "o-", label=side)
        latency.fill_between(
            batches, *([1e3 * g[p] for g in gaps] for p in ("p50", "p99")),
            alpha=0.15, color=drawn.get_color(),
        )  # fmt: skip
    for axes, title in ((speed, "decode, tokens/s"), (latency, "between tokens, ms: p50 to p99")):
        axes.set(title=title, xlabel="batch", ylim=(0, None))
        axes.set_xticks(report["batches"])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    speed.legend()
    figure.suptitle(f"{report['model']}, {report['device']}", fontsize=9)
    figure.savefig(path)
