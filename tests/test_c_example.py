"""examples/rms_norm.c: compiled as C99 with the installed header and library, and run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from minitron_kernels import native
from tests import emulator
from tests.native_emulator import ARCHS

SOURCE = Path(__file__).resolve().parent.parent / "examples" / "rms_norm.c"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("example") / "rms_norm"
    library = Path(native.get_library())
    flags = ["-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{native.get_include()}"]
    libraries = [library, f"-Wl,-rpath,{library.parent}", "-ldl", "-lm"]
    subprocess.run(["gcc", *flags, SOURCE, *libraries, "-o", path], check=True)
    return path


def run(program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_c_example_on_the_emulator(program: Path, arch: str) -> None:
    sm = arch.rstrip("a")
    done = run(program, MK_CUDA_DRIVER=str(emulator.build()), MK_EMU_DEVICE=f"sm_{sm}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"mk_rms_norm_sm{sm}_bf16 grid 3x1x1 block 512x1x1")


def test_c_example_without_a_driver(program: Path) -> None:
    done = run(program, MK_CUDA_DRIVER="/nonexistent/libcuda.so")
    assert done.returncode == 1 and "/nonexistent/libcuda.so" in done.stderr


@pytest.mark.gpu
def test_c_example_on_the_gpu(program: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environment = {k: v for k, v in os.environ.items() if k != "MK_CUDA_DRIVER"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
