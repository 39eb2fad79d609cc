"""The examples in C and C++: compiled with the installed header and library, and run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from minitron_kernels import native
from tests import emulator
from tests.native_emulator import ARCHS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
COMPILERS = {".c": ("gcc", "-std=c99"), ".cpp": ("g++", "-std=c++17")}
PLANS = {  # what each prints first
    "rms_norm.c": "mk_rms_norm_sm{sm}_bf16 grid 3x1x1 block 512x1x1",
    "linear_quant.cpp": "mk_quant_decode_sm{sm}_b16_m8 grid 3x1x1 block 256x1x1",
}


@pytest.fixture(scope="module", params=PLANS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = EXAMPLES / request.param
    path = tmp_path_factory.mktemp("example") / source.name
    library = Path(native.get_library())
    flags = ["-pedantic", "-Wall", "-Wextra", "-Werror", f"-I{native.get_include()}"]
    libraries = [library, f"-Wl,-rpath,{library.parent}", "-ldl", "-lm"]
    compiler = COMPILERS[source.suffix]
    subprocess.run([*compiler, *flags, source, *libraries, "-o", path], check=True)
    return path


def run(program: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program], capture_output=True, text=True, env={**os.environ, **environment}
    )


@pytest.mark.parametrize("arch", ARCHS)
def test_example_on_the_emulator(program: Path, arch: str) -> None:
    sm = arch.rstrip("a")
    done = run(program, MK_CUDA_DRIVER=str(emulator.build()), MK_EMU_DEVICE=f"sm_{sm}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(PLANS[program.name].format(sm=sm))


def test_example_without_a_driver(program: Path) -> None:
    done = run(program, MK_CUDA_DRIVER="/nonexistent/libcuda.so")
    assert done.returncode == 1 and "/nonexistent/libcuda.so" in done.stderr


@pytest.mark.gpu
def test_example_on_the_gpu(program: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    environment = {k: v for k, v in os.environ.items() if k != "MK_CUDA_DRIVER"}
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
