"""What a command does of its start before torch is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from minitron_kernels import startup
from minitron_kernels.cli import main
from minitron_kernels.loaders.gguf_file import GGUFFile, ScaleScan
from tests.cli_process import ROOT
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


SLOW_LIBRARY = """
#include <fcntl.h>
#include <unistd.h>
__attribute__((constructor)) static void wait_for_a_file(void) {
    for (int i = 0; i < 6000 && access("read", F_OK); ++i) usleep(10000);
    creat("loaded", 0600);
}
"""
WHILE_LOADING = """
import importlib.util
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from minitron_kernels import startup

os.chdir(sys.argv[2])
torch = SimpleNamespace(submodule_search_locations=["."])
importlib.util.find_spec = lambda name: torch
opened = startup.OpenedGGUF.read(Path(sys.argv[1]), scan_scales=True, num_threads=2)
names = sorted(thread.name for thread in threading.enumerate())
print(names, opened.scales._found, Path("loaded").exists())
Path("read").touch()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux's loader")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_start_does_not_wait_for_the_library(quantised: Path, tmp_path: Path) -> None:
    """The file and its tokenizer are read while the library is loading, the scales afterwards."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "slow.c").write_text(SLOW_LIBRARY)
    build = ["gcc", "-shared", "-fPIC", "-o", "lib/libtorch_cpu.so", "slow.c"]
    subprocess.run(build, cwd=tmp_path, check=True)
    program = [sys.executable, "-c", WHILE_LOADING, quantised, tmp_path]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "['MainThread', 'libtorch', 'scales'] None False\n"
    assert (tmp_path / "loaded").exists()


GENERATE = """
import sys

from minitron_kernels import cli
from minitron_kernels.loaders import gguf_file

opened = []
init = gguf_file.GGUFFile.__init__
gguf_file.GGUFFile.__init__ = lambda self, path: (opened.append(path), init(self, path))[1]
arguments = ["generate", "Hi", "--model", sys.argv[1], "--max-new-tokens", "3", "--ignore-eos"]
assert cli.main(arguments) == 0
heavy = "transformers", "huggingface_hub", "gguf", "safetensors", "sympy", "torch._dynamo"
own = "bench", "info", "quantize", "scoring", "parallel", "reference", "loaders.safetensors"
names = *heavy, *(f"minitron_kernels.{name}" for name in own)
print(len(opened), [name for name in names if name in sys.modules])
"""


def test_generate_reads_the_header_once_and_imports_what_it_needs(quantised: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", GENERATE, quantised], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("1 []\n"), run.stdout


def test_mistake_that_is_found_while_torch_loads(quantised: Path, tmp_path: Path) -> None:
    """The process ends in order while threads of its own are inside the library's start."""
    data = quantised.read_bytes()
    key = data.index(b"tokenizer.ggml.model")
    value = data.index(b"gpt2", key)
    (tmp_path / "bad.gguf").write_bytes(data[:value] + b"gptX" + data[value + 4 :])
    command = [sys.executable, "-m", "minitron_kernels", "generate", "Hi", "--model"]
    for _ in range(3):
        run = subprocess.run([*command, tmp_path / "bad.gguf"], capture_output=True, check=False)
        assert (run.returncode, run.stdout) == (2, b""), run.stderr
        assert run.stderr.startswith(b"error: ") and run.stderr.count(b"\n") == 1


INTERRUPTED_TORCH = """
import os
import signal

try:
    os.kill(os.getpid(), signal.SIGINT)
    print("ignored")
except KeyboardInterrupt:
    print("raised where C++ calls Python")
"""


def test_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    folder = write_tiny_checkpoint(tmp_path)
    (tmp_path / "torch.py").write_text(INTERRUPTED_TORCH)
    run = subprocess.run(
        [sys.executable, "-m", "minitron_kernels", "score", "--ids", "1", "--model", folder],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        check=False,
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, b"", b"")


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


def test_scale_scan_ends_when_it_is_interrupted(
    quantised: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted, calls = threading.Event(), []

    def slow(matrices: list[Any], num_threads: int) -> list[int]:
        calls.append(len(matrices))
        interrupted.wait(60)
        return [-1] * len(matrices)

    monkeypatch.setattr("minitron_kernels._native.cpu_nonfinite_scales", slow)
    scan = ScaleScan([GGUFFile(quantised)], 1)
    done = scan._done

    class InterruptedOnce:
        def wait(self) -> None:
            if not scan._ends:
                raise KeyboardInterrupt
            interrupted.set()
            assert done.wait(60)

        def set(self) -> None:
            done.set()

    monkeypatch.setattr(scan, "_done", InterruptedOnce())
    with pytest.raises(KeyboardInterrupt):
        scan.first_row("output.weight")
    assert done.is_set()
    assert len(calls) == 1


def test_scale_scan_waits_for_what_is_loading(quantised: Path) -> None:
    loaded = threading.Event()
    loading = threading.Thread(target=loaded.wait)
    loading.start()
    scan = ScaleScan([GGUFFile(quantised)], 1, after=loading)
    assert "scales" in {thread.name for thread in threading.enumerate()}
    loaded.set()
    assert scan.first_row("output.weight") is None
