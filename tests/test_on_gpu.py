"""bench/on_gpu.sh: its steps on the emulator, its short list of tests, what a cut run leaves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bench import harness
from bench.device_arch import arch_of
from bench.machine import EMULATED
from tests import native_abi
from tests.native_emulator import BUILT

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "on_gpu.sh"
needs_kernels = pytest.mark.skipif("80" not in BUILT, reason="sm_80 is not in this build")


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")


@needs_kernels
def test_dry_run(tmp_path: Path) -> None:
    """Every kind of step ends well, and leaves its results behind."""
    done = run(tmp_path, "--dry-run")
    summary = (tmp_path / "summary.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary in done.stdout
    steps = dict(re.findall(r"^ *\d+s  ([\w-]+): (done|FAILED|cut off)", summary, re.MULTILINE))
    assert steps == dict.fromkeys(("tests-short", "dry", "model-Q4_K"), "done"), summary
    assert "finished" in summary.splitlines()[-1]

    about, records = harness.read(tmp_path / "ops-dry.jsonl")
    assert about["device"] == "PTX emulator" and {r["arch"] for r in records} == {EMULATED}
    assert {r["op"] for r in records} == {"attention_kvcache", "linear Q4_K"}
    assert "decode_tokens_per_second" in (tmp_path / "model-Q4_K.json").read_text()
    assert 'failures="0"' in (tmp_path / "tests-short.xml").read_text()
    assert (tmp_path / "environment.txt").stat().st_size
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 1 << 20


def test_a_run_out_of_time_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "--dry-run", "--minutes", "0")
    assert done.returncode == 0
    assert (tmp_path / "summary.txt").read_text().count("no time left") == 3


def test_without_a_device_it_ends_with_the_reason(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1 and "no CUDA device" in done.stdout
    assert run(tmp_path, "--wet-run").returncode == 2


def test_without_hypothesis_other_tests_run() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT / "bench" / "stand_ins")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:hypothesispytest",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "-q", "tests/test_cache.py"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "hypothesis is not installed" in done.stdout, done.stdout
    assert re.search(r"\b\d+ passed", done.stdout)


def test_architectures_of_devices() -> None:
    known = {(8, 0): "80", (8, 6): "80", (8, 9): "89", (9, 0): "90a", (10, 0): "100a"}
    assert {capability: arch_of(*capability) for capability in known} == known
    assert arch_of(12, 0) == "80" and arch_of(7, 5) is None


# What the short list must hold for each op of the C ABI: a part of a test's name.
TESTS_OF = {
    "rms_norm": "test_norms",
    "add_rms_norm": "test_norms",
    "apply_rope": "test_rope_and_append",
    "rope_append": "test_rope_and_append",
    "silu_and_mul": "test_silu_and_embedding",
    "embedding": "test_silu_and_embedding",
    "argmax": "test_argmax",
    "sample": "test_sampling_equals_the_cpu_sampler",
    "linear": "test_linear_of_any_strides",
    "linear_swiglu": "test_swiglu_mlp",
    "qkv_rope_append": "test_qkv_rope_append",
    "attention_decode": "test_attention_kvcache",
    "attention": "test_attention",
    "embedding_quant": "test_rows_have_ggufs_bits",
    "quant_prepare_x": "test_large_tile",
    "linear_quant": "test_norm_residual_and_swiglu",
    "linear_quant_swiglu": "test_norm_residual_and_swiglu",
    "qkv_rope_append_quant": "test_qkv_of_three_types",
    "quantize_fp8": "test_quantize_edges",
    "attention_fp8": "test_attention_fp8",
    "linear_fp8": "test_writes_vectors",
    "linear_fp8_swiglu": "test_writes_vectors",
}


def short_list() -> tuple[list[str], str]:
    """Files of the short list, and which of their tests."""
    text = SCRIPT.read_text()
    files = re.search(r"^short_tests=\(([^)]*)\)", text, re.MULTILINE)
    groups = re.search(r"^short_groups=\(([^)]*)\)", text, re.MULTILINE)
    names = re.search(r"^short_names=\"([^\"]*)\"", text, re.MULTILINE)
    assert files and groups and names
    assert len(groups[1].split()) == len(re.findall(r'"[^"]+"', files[1]))
    return files[1].replace('"', "").split(), " ".join(names[1].split())


def run_pretended(names: str, *options: str) -> str:
    """The short list's tests of these names on an emulated device in the place of the GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.pretended_gpu",
        "-p",
        "no:cacheprovider",
    ]
    command += ["-q", "-m", "gpu and not slow", "-k", names, *options, *short_list()[0]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@needs_kernels
def test_what_surrounds_a_launch_works_on_a_gpu() -> None:
    """Of each way to it a case: pointers in a struct, and in an array of structs; tensors."""
    told = run_pretended("(test_qkv_of_three_types and Q6_K and not 768) or test_swiglu_mlp")
    assert re.search(r"gpu \d{2}\b", told), told


@pytest.mark.slow
@needs_kernels
def test_the_short_list_passes_on_an_emulated_device() -> None:
    found = re.search(r"gpu (\d+)\b", run_pretended(short_list()[1]))
    assert found and int(found[1]) > 100


def test_the_short_list_has_every_op() -> None:
    """As pytest collects it where torch finds a device."""
    told = run_pretended(short_list()[1], "--collect-only")
    found = Counter(re.findall(r"::(\w+)\[.*\bgpu\b", told))
    assert set(TESTS_OF) == set(native_abi.OPS)
    assert {op: t for op, t in TESTS_OF.items() if not found[t]} == {}
    assert sum(found.values()) <= 250, "a short list"
