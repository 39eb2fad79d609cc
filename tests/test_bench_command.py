"""`minitron bench`: what it counts, who it compares with, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_kernels import MinitronForCausalLM, architectures, bench, bench_peers
from minitron_kernels.bench import Ours, RunTimes, Workload
from minitron_kernels.cli import main

SIZES = ["--prompt", "20", "--generate", "5", "--repeat", "2"]


@pytest.fixture(scope="module")
def model(tiny: Path) -> MinitronForCausalLM:
    return MinitronForCausalLM.from_pretrained(tiny)


def run(capfd: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, Any]:
    assert main(["bench", *map(str, args), *SIZES, "--json"]) == 0
    report: dict[str, Any] = json.loads(capfd.readouterr().out)
    return report


def test_report(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = run(capfd, tiny, "--batch", "1,3")
    assert (report["prompt"], report["generate"], report["repeat"]) == (20, 5, 2)
    assert report["bandwidth_source"] == "measured" and report["bandwidth_bytes_per_second"] > 1e8
    assert [(row["side"], row["batch"]) for row in report["rows"]] == [
        ("minitron_kernels", 1), ("minitron_kernels", 3),
    ]  # fmt: skip
    for row in report["rows"]:
        gaps = row["inter_token_latency"]
        assert 0 < gaps["p50"] <= gaps["p90"] <= gaps["p99"]
        assert 0 < row["time_to_first_token"] <= row["time_to_last_first_token"]
        assert min(row["prefill_tokens_per_second"], row["decode_tokens_per_second"]) > 0
        assert row["peak_memory_bytes"] > 50 << 20 and row["share_of_bandwidth_bound"] > 0


def test_table_and_plot(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "bench.svg"
    assert main(["bench", str(tiny), *SIZES, "--batch", "2", "--plot", str(figure)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].endswith("prompt 20, 5 new tokens, medians of 2")
    assert lines[3].split()[:2] == ["minitron_kernels", "2"] and len(lines[3].split()) == 10
    assert "<svg" in figure.read_text()


def test_processor_time_leaves_out_waiting(model: MinitronForCausalLM) -> None:
    """By a clock that stands still no second passes."""
    times = Ours(model, clock=lambda: 5.0).run([[1, 2, 3]], 4)
    assert times.prefill_seconds == times.decode_seconds == 0 and times.gaps == [0, 0, 0]
    assert (times.prefill_tokens, times.decode_tokens) == (3, 3)


def test_tokens_and_gaps_of_a_batch(model: MinitronForCausalLM) -> None:
    """4 tokens of each request follow its first; steps of prompts and others are told apart."""
    side, workload = Ours(model), Workload(prompt=30, generate=5)
    for _ in range(2):  # the engine goes on being used
        times = side.run(workload.prompts(3, model.config.vocab_size), 5)
        assert (times.prefill_tokens, times.decode_tokens) == (90, 12)
        assert len(times.first) == 3 and len(times.gaps) == 12
        assert sum(times.gaps) / 3 <= times.decode_seconds * 1.5 + 0.05


def test_sides_generate_the_same_number_of_tokens(model: MinitronForCausalLM) -> None:
    prompts = Workload(prompt=7, generate=4).prompts(2, model.config.vocab_size)
    ours, theirs = Ours(model).run(prompts, 4), bench_peers.Transformers(model).run(prompts, 4)
    for name in ("prefill_tokens", "decode_tokens"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert len(ours.gaps) == len(theirs.gaps) and len(theirs.first) == 2


def test_compare_with_transformers(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = run(capfd, tiny, "--batch", "2", "--compare", "transformers")
    assert [row["side"] for row in report["rows"]] == ["minitron_kernels", "transformers"]
    assert report["rows"][1]["decode_tokens_per_second"] > 0
    assert report["rows"][1]["share_of_bandwidth_bound"] is None


class FakeLlama:
    """llama_cpp.Llama's methods that are called; each token takes 2 ms."""

    def __init__(self, path: str, **options: Any) -> None:
        assert path.endswith(".gguf") and options["n_gpu_layers"] == 0
        self.seen: list[list[int]] = []

    def reset(self) -> None:
        self.seen.clear()

    def eval(self, ids: list[int]) -> None:
        self.seen.append(ids)
        time.sleep(0.002)

    def sample(self, temp: float) -> int:
        assert temp == 0.0
        return 7


def test_compare_with_llama_cpp(
    model: MinitronForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("llama_cpp")
    module.Llama, module.__version__ = FakeLlama, "0.3"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    side = bench_peers.LlamaCpp(Path("m.gguf"), model)
    times = side.run([[1, 2, 3]], 5)
    assert side.version == "0.3" and side._llama.seen == [[1, 2, 3], [7], [7], [7], [7]]
    assert (times.prefill_tokens, times.decode_tokens, len(times.gaps)) == (3, 4, 4)
    assert times.decode_seconds == pytest.approx(sum(times.gaps)) and min(times.gaps) > 0.002
    with pytest.raises(ValueError, match="one sequence at a time"):
        side.run([[1], [2]], 5)
    with pytest.raises(ValueError, match="reads GGUF files"):
        bench_peers.LlamaCpp(Path("folder"), model).run([[1]], 5)


def test_what_a_side_cannot_run_is_told(model: MinitronForCausalLM) -> None:
    class Unable:
        name = "unable"
        version = None

        def run(self, prompts: Any, new_tokens: int) -> RunTimes:
            raise ValueError("not today")

    report = bench.run(model, Workload(9, 3, (1,), 1), peers=lambda: [Unable()])
    assert report["rows"][1] == {"side": "unable", "batch": 1, "error": "not today"}
    assert "not today" in bench.table(report)[-1]


@pytest.mark.parametrize(
    "args, said",
    [
        (["--batch", "1,x"], "not integers with commas"),
        (["--batch", "0"], "batch sizes must be positive"),
        (["--generate", "1"], "generate must be at least 2, got 1"),
        (["--repeat", "0"], "repeat must be at least 1, got 0"),
        (["--prompt", "510", "--generate", "9"], "519 tokens exceed the model's context of 512"),
        (["--compare", "vllm"], "cannot compare with 'vllm'"),
        (["--plot", "x.gif"], "must end with one of .svg"),
        (["--plot", "/nowhere/x.svg"], "cannot write /nowhere/x.svg: no such folder"),
        (["--cpu-time", "--num-threads", "2"], "--cpu-time needs --device cpu --num-threads 1"),
    ],
)
def test_mistakes(
    args: list[str], said: str, tiny: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(tiny), *args]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error


def test_a_package_that_is_not_there(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for option, told in (
        ("--compare=llama-cpp", "llama-cpp-python"),
        ("--plot=x.svg", "matplotlib"),
    ):
        assert main(["bench", str(tiny), option]) == 2
        assert f"pip install {told}" in capfd.readouterr().err


# ------------------------------------------------------------------------------------- arithmetic


def test_bytes_of_a_step_by_hand(model: MinitronForCausalLM) -> None:
    """All weights but the embedding table, and 2 layers of K and V of one head of 64."""
    config = model.config
    weights = 4 * (config.num_parameters - config.vocab_size * config.hidden_size)
    assert bench.step_bytes(model, 3, 100) == weights + 3 * 100 * 2 * 2 * 64 * 4


def test_summary_by_hand() -> None:
    runs = [
        RunTimes(100, 0.5, 10, 1.0, [0.2, 0.4], [0.01] * 5 + [0.02] * 4 + [0.1]),
        RunTimes(100, 1.0, 10, 2.0, [0.3, 0.5], [0.01] * 10),
    ]
    told = bench.summary(runs, bound=0.004)
    assert told["prefill_tokens_per_second"] == 150 and told["decode_tokens_per_second"] == 7.5
    assert told["inter_token_latency"] == {"p50": 0.01, "p90": 0.02, "p99": 0.1}
    assert told["share_of_bandwidth_bound"] == pytest.approx(0.4)
    assert told["time_to_first_token"] == pytest.approx(0.35)
    assert told["time_to_last_first_token"] == pytest.approx(0.45)
    assert told["spread"]["prefill"] == pytest.approx(100 / 150)


def test_percentile() -> None:
    values = [float(n) for n in range(1, 101)]
    assert [bench.percentile(values, p) for p in (50, 90, 99)] == [50, 90, 99]
    assert bench.percentile([3.0], 50) == bench.percentile([3.0], 99) == 3.0


@pytest.mark.parametrize(
    "told, name",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
    ],
)
def test_names_of_gpus(told: str, name: str | None) -> None:
    found = architectures.find(told)
    assert (found and found.name) == name


def test_bandwidth_of_a_gpu_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert bench.bandwidth(torch.device("cuda")) == (4.8e12, "published")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert bench.bandwidth(torch.device("cuda")) == (None, "published")
