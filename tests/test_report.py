"""bench/report.py: the page of the recorded results, and of results made up here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench import modelled, report
from bench.report import Results

ROOT = Path(__file__).resolve().parent.parent
PAGE = report.PAGE.read_text()
MODELLED_COUNTS = json.loads((report.RESULTS / "modelled.json").read_text())


def entry(us: float, **more: Any) -> dict[str, Any]:
    return {
        "us": us, "us_low": us - 1, "us_high": us + 1, "rounds": 9, "tflop_s": None, "gb_s": 10.0,
        "share_of_peak": 0.5, **more,
    }  # fmt: skip


def record(op: str, shape: str, flop: float = 0.0, **candidates: float) -> dict[str, Any]:
    more = {"tflop_s": 3.5} if flop else {}
    return {
        "op": op, "arch": "sm_90", "dtype": "bfloat16", "shape": shape, "flop": flop,
        "num_bytes": 1e6, "candidates": {k: entry(us, **more) for k, us in candidates.items()},
        "left_out": {"liger": "not installed"} if op == "rms_norm" else {}, "clocks": None,
    }  # fmt: skip


MACHINE = {
    "device": "NVIDIA H100 80GB HBM3", "commit": "abc", "when": "2030-01-01 00:00 UTC",
    "versions": {"torch": "2.11", "transformers": None}, "peak_tflop_s_bfloat16": 989.0,
    "peak_tflop_s_float32": None, "peak_gb_s": 3350.0,
}  # fmt: skip
RECORDS = [
    record("rms_norm", "64 x 4096", ours=10.0, eager=42.0, compiled=12.5),
    record("linear", "gate_up 23040 x 4096 M 8", 1e9, ours=20.0, eager=30.0),
    record("linear", "gate_up 23040 x 4096 M 64", 8e9, ours=40.0, eager=30.0),
    record("linear Q4_K", "down 4096 x 11520 M 1", 1e8, ours=20.0, eager=50.0, dequantised=500.0),
    record("attention_kvcache", "batch 1 context 1024", 1e8, ours=5.0, eager=9.0, sdpa=7.0),
    record("attention", "1 x 2048 causal", 1e10, ours=50.0, sdpa=70.0),
]
MODEL = {
    "model": "/models/m.gguf", "device": "NVIDIA H100", "dtype": "bfloat16", "threads": 16,
    "weights": {"Q4_K": {"count": 3, "bytes": 9}}, "bandwidth_bytes_per_second": 3.35e12,
    "bandwidth_source": "published", "prompt": 512, "generate": 128, "batches": [1], "repeat": 5,
    "clock": "wall clock", "versions": {"torch": "2.11", "llama-cpp": "0.3", "gguf": "1"}, "rows": [
        {
            "side": "minitron_kernels", "batch": 1, "prefill_tokens_per_second": 12345.0,
            "decode_tokens_per_second": 234.5, "time_to_first_token": 0.04,
            "inter_token_latency": {"p50": 0.004, "p99": 0.005}, "share_of_bandwidth_bound": 0.61,
            "peak_memory_bytes": 6 << 30,
        },
        {"side": "llama-cpp", "batch": 8, "error": "one sequence at a time"},
    ],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results as a run on a GPU leaves them."""
    lines = [{"machine": MACHINE}, *RECORDS]
    (tmp_path / "ops-h100.jsonl").write_text("\n".join(map(json.dumps, lines[:-1])))
    (tmp_path / "ops-rest.jsonl").write_text("\n".join(map(json.dumps, [lines[0], lines[-1]])))
    (tmp_path / "model-h100.json").write_text(json.dumps(MODEL))
    (tmp_path / "modelled.json").write_text(modelled.dump(MODELLED_COUNTS))
    return tmp_path


def measured_and_modelled(page: str) -> tuple[str, str]:
    measured, modelled_part = page.split("\n## Modelled\n")
    return measured, modelled_part


def test_page_of_made_up_results(folder: Path) -> None:
    page = report.page(Results.read(folder))
    measured, modelled_part = measured_and_modelled(page)
    assert "No GPU has been measured" not in measured
    assert measured.count("### NVIDIA H100 80GB HBM3") == 1, "two files of one machine"
    assert "| rms_norm | bfloat16 | 64 x 4096 | 10.0 (9.00-11.0) | 10.0 | 3 | 4.20 | 1.25 |" in page
    product = "| linear | bfloat16 | gate_up 23040 x 4096 M 64 | 40.0 (39.0-41.0) | 3.50 | 10.0 "
    assert f"{product}| 20 | 0.75 | - |" in page
    assert "| linear Q4_K |" in page and "| 2.50 | 25.00 |" in page
    assert "- liger: not installed (rms_norm)" in measured
    assert "| minitron_kernels | 1 | 12345 | 234 | 40.0 | p50 4.00, p99 5.00 | 6.00 | 61 |" in page
    assert "| llama-cpp | 8 | one sequence at a time |" in page
    assert "memory, published: 3350 GB/s; torch 2.11, llama-cpp 0.3." in page
    assert (
        "Modelled: nothing below was measured" in modelled_part and "Measured" not in modelled_part
    )


def test_figures_of_made_up_results(folder: Path) -> None:
    report.write(Results.read(folder), folder / "page.md")
    for path in re.findall(r"\]\((\S+\.svg)\)", (folder / "page.md").read_text()):
        svg = (folder / path).read_text()
        assert "<svg" in svg and len(svg) < 200_000
        assert ("modelled" in svg.lower()) == path.endswith("modelled.svg")
    first = (folder / "performance" / "nvidia-h100-80gb-hbm3-bars.svg").read_bytes()
    report.write(Results.read(folder), folder / "page.md")
    assert (folder / "performance" / "nvidia-h100-80gb-hbm3-bars.svg").read_bytes() == first


def test_times_of_the_emulator_are_refused(folder: Path) -> None:
    with (folder / "ops-h100.jsonl").open("a") as file:
        file.write("\n" + json.dumps(RECORDS[0] | {"arch": "emulated"}))
    with pytest.raises(ValueError, match="mean nothing"):
        Results.read(folder)


def test_results_of_a_few_ops_only(folder: Path) -> None:
    """A run that was cut off has a page as well."""
    (folder / "ops-rest.jsonl").unlink()
    (folder / "ops-h100.jsonl").write_text(
        json.dumps({"machine": MACHINE}) + "\n" + json.dumps(RECORDS[0])
    )
    report.write(Results.read(folder), folder / "page.md")
    assert "rms_norm" in (folder / "page.md").read_text()


# ------------------------------------------------------------------------------- the page itself


def test_page_is_what_the_script_makes_of_the_results() -> None:
    assert report.page(Results.read(report.RESULTS)) == PAGE, "run python -m bench.report"


def test_page_has_its_figures() -> None:
    figures = re.findall(r"\]\((\S+\.svg)\)", PAGE)
    assert figures
    for path in figures:
        assert 0 < (report.PAGE.parent / path).stat().st_size < 200_000


def test_measured_and_modelled_stand_apart() -> None:
    measured, modelled_part = measured_and_modelled(PAGE)
    gpus = "A100|L40S|RTX 4090|H100|H200|B200"
    if "No GPU has been measured" in measured:
        assert not re.search(gpus, measured)
    assert set(re.findall(gpus, modelled_part)) == set(gpus.split("|"))
    assert "Triton" in modelled_part


def test_recorded_results_are_small() -> None:
    for path in report.RESULTS.iterdir():
        assert path.stat().st_size < 200_000, path
