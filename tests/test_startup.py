"""What a command does of its start before torch is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from minitron_kernels import startup
from minitron_kernels.cli import main
from minitron_kernels.loaders.gguf_file import GGUFFile, ScaleScan
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("startup")
    assert (
        main(["quantize", str(write_tiny_checkpoint(folder)), f"{folder}/q.gguf", "--type=Q8_0"])
        == 0
    )
    return folder / "q.gguf"


PROGRAM = """
import sys
import threading
from pathlib import Path

from minitron_kernels import cli
from minitron_kernels.sampling_params import SamplingParams
from minitron_kernels.startup import OpenedGGUF

opened = OpenedGGUF.read(Path(sys.argv[1]), scan_scales=True, num_threads=2)
assert "torch" not in sys.modules
for thread in threading.enumerate():
    if thread.name == "libtorch":
        thread.join()
assert "libtorch_cpu.so" in Path("/proc/self/maps").read_text()
rows = {name: opened.scales.first_row(name) for name in ("output.weight", "blk.0.ffn_up.weight")}
import torch

print(rows, opened.tokenizer.encode("Hi"), float(torch.ones(3).sum()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_start_reads_a_file_before_torch_is_there(quantised: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, quantised], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    from minitron_kernels.loaders.tokenizer import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(quantised).encode("Hi")
    expected = {"output.weight": None, "blk.0.ffn_up.weight": None}
    assert run.stdout == f"{expected} {ids} 3.0\n"


def test_torch_library_that_is_not_there_is_left_to_the_import(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: None)
    startup.load_torch_library()


def test_scale_scan_tells_its_error(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = ScaleScan([GGUFFile(quantised)], 0)
    with pytest.raises(ValueError, match="num_threads must be 1"):
        scan.first_row("output.weight")
