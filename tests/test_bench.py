"""The benches: each file runs, measures what it says, and notices a wrong result."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import harness, machine
from bench.harness import Case, Comparison, NotAvailable, Recorder, Settings

ROOT = Path(__file__).resolve().parent.parent
BENCHES = sorted(path.name for path in (ROOT / "bench").glob("bench_*.py"))


def run_pytest(*args: str | Path, cwd: Path = ROOT) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *map(str, args)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what the smoke run of all benches said, its results file)."""
    out = tmp_path_factory.mktemp("smoke") / "ops.jsonl"
    as_json = out.with_name("benchmark.json")
    said = run_pytest("bench", "--smoke", "--out", out, f"--benchmark-json={as_json}")
    return said, out


def test_every_bench_runs(smoke: tuple[str, Path]) -> None:
    said, out = smoke
    told = json.loads(out.with_name("benchmark.json").read_text())["benchmarks"]
    assert {Path(entry["fullname"].partition("::")[0]).name for entry in told} == set(BENCHES)
    assert " failed" not in said and " skipped" not in said


def test_every_case_has_a_line_and_a_record(smoke: tuple[str, Path]) -> None:
    said, out = smoke
    about, records = harness.read(out)
    assert about["device"] == machine.name("cpu") and about["versions"]["torch"]
    lines = re.findall(r"^.* \| .* us \(.*\) \| .* GB/s \| .* % of peak.*$", said, re.MULTILINE)
    assert len(lines) == len(records) >= len(BENCHES)
    ops = {re.split("[ ,]", record["op"])[0] for record in records}
    assert ops == {
        "rms_norm", "add_rms_norm", "apply_rope", "silu_and_mul", "attention", "attention_kvcache",
        "linear", "linear_fp8", "swiglu_mlp", "layer", "quant_pack",
    }  # fmt: skip
    for record in records:
        assert {"ours", "eager"} <= set(record["candidates"]), record["op"]
        assert record["num_bytes"] > 0
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(record["candidates"]) for record in records)
    assert {row["commit"] for row in rows} == {about["commit"] or ""}


def test_pytest_benchmarks_statistics_are_those_of_our_op(smoke: tuple[str, Path]) -> None:
    _, out = smoke
    _, records = harness.read(out)
    told = json.loads(out.with_name("benchmark.json").read_text())["benchmarks"]
    of_ops = [entry for entry in told if "candidates" in entry["extra_info"]]
    assert len(of_ops) == len(records)
    for entry, record in zip(of_ops, records, strict=True):
        ours = record["candidates"]["ours"]["us"]
        assert 1e6 * entry["stats"]["median"] == pytest.approx(ours, rel=1e-3)


# ------------------------------------------------------------------------------------ the harness


class Rounds:
    """In the place of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}

    def pedantic(self, function: Any, rounds: int) -> None:
        for _ in range(rounds):
            function()


CASE = Case("op", "float32", "3", num_bytes=12.0, flop=6.0)


def compare(settings: Settings, **candidates: Any) -> tuple[dict[str, Any], list[str]]:
    told: list[str] = []
    comparison = Comparison(settings, Rounds(), Recorder(settings, told.append))
    return comparison(CASE, **candidates), told


def no_op() -> torch.Tensor:
    return torch.ones(3)


def test_a_wrong_result_is_an_error_in_a_smoke_run_and_left_out_of_others() -> None:
    def wrong() -> torch.Tensor:
        return torch.tensor([1.0, 1.0, 1.2])

    with pytest.raises(ValueError, match="eager gives another result"):
        compare(Settings(smoke=True), ours=no_op, eager=wrong)
    settings = Settings(seconds=0.0, flush=False)
    record, told = compare(settings, ours=no_op, eager=no_op, other=wrong)
    assert set(record["candidates"]) == {"ours", "eager"}
    assert "another result" in record["left_out"]["other"] and "other" in told[-1]


def test_a_candidate_that_is_not_there_is_left_out() -> None:
    def absent() -> torch.Tensor:
        raise NotAvailable("not installed")

    record, _ = compare(Settings(smoke=True), ours=no_op, eager=no_op, other=absent)
    assert record["left_out"] == {"other": "not installed"}


def test_candidates_take_turns() -> None:
    order = []

    def named(name: str) -> Any:
        return lambda: (order.append(name), torch.ones(3))[1]

    record, _ = compare(
        Settings(seconds=0.0, min_rounds=3, flush=False), ours=named("a"), eager=named("b")
    )
    assert order == ["a", "b"] * (len(order) // 2)
    assert record["candidates"]["ours"]["rounds"] == 3


def test_shares_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: 6 FLOP at 1 TFLOP/s take 6 ps, 12 bytes at 1 TB/s 12 ps."""
    monkeypatch.setattr(machine, "peaks", lambda *_: (1e12, 1e12))
    comparison = Comparison(Settings(), Rounds(), Recorder(Settings()))
    times = {"ours": [1e-9, 3e-9, 2e-9], "eager": [4e-9], "other": [1e-9]}
    record = comparison._record(CASE, times, {})
    ours = record["candidates"]["ours"]
    assert ours["us"] == pytest.approx(2e-3) and ours["share_of_peak"] == pytest.approx(
        12e-12 / 2e-9
    )
    assert (ours["us_low"], ours["us_high"]) == pytest.approx((1.5e-3, 2.5e-3))
    assert ours["gb_s"] == pytest.approx(6) and ours["tflop_s"] == pytest.approx(3e-3)
    told = harness.line(record)
    assert "2.00 x eager" in told and "0.50 x best (other)" in told


def test_a_results_file_that_was_cut_off_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ops.jsonl"
    record = {"op": "a", "arch": "b", "dtype": "c", "shape": "d", "candidates": {}}
    later = record | {"candidates": {"ours": 1}}
    lines = [json.dumps(v) for v in ({"machine": {"device": "x"}}, record, later, later)]
    path.write_text("\n".join(lines)[:-5])
    assert harness.read(path) == ({"device": "x"}, [later])


def test_processor_time_leaves_out_waiting() -> None:
    def waits() -> torch.Tensor:
        time.sleep(0.02)
        return torch.ones(3)

    for cpu_time in (False, True):
        settings = Settings(seconds=0.0, min_rounds=3, flush=False, cpu_time=cpu_time)
        record, _ = compare(settings, ours=waits, eager=waits)
        assert (record["candidates"]["ours"]["us"] >= 20_000) != cpu_time


def test_the_flush_is_larger_than_the_cache() -> None:
    meter = harness.Meter(Settings())
    meter.flush()
    assert meter._buffer is not None
    assert meter._buffer.nbytes >= 2 * machine.cache_bytes("cpu") >= 2 << 20


def test_a_graph_is_captured_where_the_call_was_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory that an op keeps is that of a stream."""
    streams: list[Any] = []

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    class Graph:
        def replay(self) -> None:
            pass

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        streams.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream=None: on(stream))
    calls: list[int] = []
    harness.captured(lambda: calls.append(len(streams)))
    assert calls == [1, 2] and streams[0] is streams[1]


def test_a_turn_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The events stand around the call alone, the flush before them; all are read at the end."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")

        def elapsed_time(self, last: Any) -> float:
            done.append("read")
            return 3.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    meter = harness.Meter(Settings(device="cuda"))
    monkeypatch.setattr(meter, "flush", lambda: done.append("flush"))
    took = meter.turn({"ours": lambda: done.append("ours"), "eager": lambda: done.append("eager")})
    assert took == {"ours": 0.003, "eager": 0.003}
    turns = [["flush", "event", name, "event"] for name in ("ours", "eager")]
    assert done == [*turns[0], *turns[1], "wait", "read", "read"]


# -------------------------------------------------------------------------------------- METHOD.md

METHOD = (ROOT / "bench" / "METHOD.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", METHOD, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if not line.startswith("#")
]
# Run by other tests: all benches above, the page and the script in their own files.
ELSEWHERE = ("pytest bench --", "python -m bench.report", "bench/on_gpu.sh", "pip download")


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(ELSEWHERE)])
def test_method_command(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As written, but for its size."""
    words = shlex.split(command)
    if words[0] == "pytest":
        assert "bench_" in run_pytest(*words[1:], "--collect-only")  # run by the smoke run above
    elif words[:3] == ["python", "-m", "bench.whole_model"]:
        small = ["--small", "--prompt", "20", "--generate", "4", "--repeat", "1", "--device", "cpu"]
        done = subprocess.run([sys.executable, *words[1:], *small], cwd=ROOT, capture_output=True)
        assert done.returncode == 0 and b"tokens/s" in done.stdout, done.stderr[-2000:]
    elif words[0] == "python":
        done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True)
        assert done.returncode == 0 and b"modelled" in done.stdout, done.stderr[-2000:]
    else:
        from minitron_kernels.cli import main
        from tests.tiny_checkpoint import write_tiny_checkpoint

        tiny = write_tiny_checkpoint(tmp_path)
        monkeypatch.setattr("minitron_kernels.loaders.hub._smollm2", lambda: tiny)
        monkeypatch.chdir(tmp_path)
        small = ["--prompt", "20", "--generate", "4", "--batch", "1,2", "--repeat", "1"]
        assert words[0] == "minitron" and main([*words[1:], *small]) == 0
        assert "tokens/s" in capfd.readouterr().out and (tmp_path / "bench.svg").stat().st_size


def test_method_names_what_is_there() -> None:
    named = set(re.findall(r"`((?:bench|docs|minitron_kernels)/[\w./-]+\w)`", METHOD))
    assert len(named) >= 6 and all((ROOT / path).exists() for path in named)
