"""bench/compare_llama_cpp.py, without llama.cpp."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.tiny_checkpoint import write_tiny_checkpoint

BENCH = Path(__file__).parents[1] / "bench"


def test_compare_llama_cpp_says_that_it_is_missing() -> None:
    command = [sys.executable, BENCH / "compare_llama_cpp.py", "m.gguf", "--llama-python", "false"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "llama-cpp-python cannot be imported by false" in result.stderr


def test_comparison_side_answers_in_lines(tmp_path: Path) -> None:
    """This package's side: loaded, then a run, in processes of their own."""
    path = write_tiny_checkpoint(tmp_path)
    command = [sys.executable, BENCH / "comparison.py", "minitron_kernels", path, "--threads", "1"]
    result = subprocess.run(
        command, input="[[5, 6, 7], 2]\n", capture_output=True, text=True, check=True
    )
    loaded, ran = (json.loads(line) for line in result.stdout.splitlines())
    assert loaded["load_seconds"] > 0
    assert all(rate > 0 for rate in ran["timing"]) and len(ran["timing"]) == 2
    assert ran["peak_bytes"] > 1 << 20
