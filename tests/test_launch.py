"""The choice of an architecture, the driver, and launches through it."""

from __future__ import annotations

import ast
import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_kernels import _native, native
from tests import emulator
from tests import native_abi as abi
from tests.native_emulator import (
    ARCHS,
    copy_of_library,
    emulated_library,
    make_current,
    move_pointers,
)
from tests.native_params import BUFFER, POINTER, C, make_params

# ------------------------------------------------------------------------- parameters on a GPU


def pointers_of(value: Any) -> list[int]:
    """All pointers in a struct, those in its arrays of structs, too."""
    if isinstance(value, ctypes.Structure):
        found = [
            [getattr(value, name)] if kind is ctypes.c_void_p else pointers_of(getattr(value, name))
            for name, kind in value._fields_
        ]
        return [p for part in found for p in part if p]
    inner = value if isinstance(value, ctypes.Array) else []
    return [p for each in inner for p in pointers_of(each)]


@pytest.mark.parametrize("op", abi.OPS)
def test_all_pointers_move_to_a_gpu(op: str) -> None:
    """What tests on a GPU do with parameters: one that stayed would be an illegal address there."""
    params, copy = make_params(op), torch.zeros(64)
    assert set(pointers_of(params)) == {POINTER}
    move_pointers(params, [(BUFFER, copy)])
    assert set(pointers_of(params)) == {copy.data_ptr()}


# -------------------------------------------------------------------------------- architectures


def kernels_for(lib: ctypes.CDLL, major: int, minor: int) -> str:
    arch = ctypes.c_char_p()
    abi.check(lib.mk_kernels_for(major, minor, ctypes.byref(arch)), lib)
    return arch.value.decode()


@pytest.mark.parametrize(
    "archs, capabilities",
    [
        (
            ARCHS,
            {(8, 0): "80", (8, 6): "80", (8, 7): "80", (8, 9): "89", (9, 0): "90a", (10, 0): "100a",
             (10, 3): "80", (11, 0): "80", (12, 0): "80", (12, 1): "80"},
        ),
        (("80",), {(8, 0): "80", (8, 9): "80", (9, 0): "80", (10, 0): "80"}),
        (("90a",), {(9, 0): "90a"}),
    ],
)  # fmt: skip
def test_choice_of_architecture(
    tmp_path: Path, archs: tuple[str, ...], capabilities: dict[tuple[int, int], str]
) -> None:
    lib = abi.load(copy_of_library(tmp_path / "package", archs))
    for (major, minor), expected in capabilities.items():
        assert kernels_for(lib, major, minor) == expected
    unsupported = [(7, 5), *([] if "80" in archs else [(8, 0), (8, 9), (10, 0), (12, 0)])]
    for major, minor in unsupported:
        with pytest.raises(abi.StatusError, match=f"{major}.{minor}.*{' '.join(archs)}") as caught:
            kernels_for(lib, major, minor)
        assert caught.value.status == "MK_ERR_UNSUPPORTED"


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with the emulator as the driver, unless the environment says otherwise."""
    env = {**os.environ, "MK_CUDA_DRIVER": str(emulator.build()), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )


# Defines launch(lib): rms_norm of 2 x 64 ones, whose result is ones.
PRELUDE = """
import ctypes, torch
from tests import emulator, native_abi as abi
from tests.native_emulator import make_current
x = torch.ones(2, 64, dtype=torch.bfloat16)
out = torch.zeros_like(x)
params = abi.params_type("rms_norm")(
    x=x.data_ptr(), weight=x.data_ptr(), out=out.data_ptr(), x_stride=64, out_stride=64,
    rows=2, hidden=64, eps=0.0, dtype=1)
def launch(lib):
    with emulator.accessible(x=x, out=out):
        abi.check(lib.mk_rms_norm(ctypes.byref(params), None), lib)
    assert torch.equal(out, x)
"""


def test_fallback_is_noted_once(tmp_path: Path) -> None:
    path = copy_of_library(tmp_path / "package", ["80"])
    code = (
        f"{PRELUDE}\nlib = abi.load({str(path)!r})\nmake_current('90a')\nlaunch(lib)\nlaunch(lib)"
    )
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no kernels of its own") == 1
    assert "9.0" in done.stderr and "sm_80, compiled from PTX" in done.stderr


def test_device_without_kernels_is_an_error(tmp_path: Path) -> None:
    path = copy_of_library(tmp_path / "package", ["100a"])
    done = in_new_process(f"{PRELUDE}\nmake_current('90a')\nlaunch(abi.load({str(path)!r}))")
    assert "MK_ERR_UNSUPPORTED" in done.stderr and "9.0" in done.stderr and "100a" in done.stderr


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_damaged_kernel_file(tmp_path: Path, damage: str) -> None:
    path = copy_of_library(tmp_path / "package", ["80"])
    file = path.parent / "kernels" / "sm_80.fatbin"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1000] if damage == "truncated" else b"x" * 1000)
    done = in_new_process(f"{PRELUDE}\nmake_current('80')\nlaunch(abi.load({str(path)!r}))")
    assert "sm_80.fatbin is damaged at byte" in done.stderr


def test_kernels_that_the_driver_does_not_take(tmp_path: Path) -> None:
    path = copy_of_library(tmp_path / "package", ["80"])
    file = path.parent / "kernels" / "sm_80.fatbin"
    header = file.read_bytes()[:8] + (64).to_bytes(8, "little")
    file.unlink()
    file.write_bytes(header + bytes(64))
    done = in_new_process(f"{PRELUDE}\nmake_current('80')\nlaunch(abi.load({str(path)!r}))")
    assert re.search(r"sm_80.fatbin: cuLibraryLoadData: CUDA_\w+ .*CUDA up to 13\.0;", done.stderr)


# -------------------------------------------------------------------------- driver and launches

NATIVE_CALL = """
from minitron_kernels import _native
try:
    _native.load()
except RuntimeError as error:
    print(error)
"""


def test_import_without_a_driver_and_clear_error() -> None:
    done = in_new_process(NATIVE_CALL, MK_CUDA_DRIVER="/nonexistent/libcuda.so")
    assert done.returncode == 0 and "/nonexistent/libcuda.so" in done.stdout


def test_driver_that_is_none() -> None:
    done = in_new_process(NATIVE_CALL, MK_CUDA_DRIVER="libm.so.6")
    assert "libm.so.6 has no cu" in done.stdout and "CUDA 12" in done.stdout


def test_no_current_context() -> None:
    assert "no CUDA context is current" in in_new_process(NATIVE_CALL).stdout


def test_a_thread_without_a_context_gets_the_runtimes() -> None:
    """As one that makes no call of the CUDA runtime before its first launch: device 0's primary
    context, if it is in use; a context that is current stays."""
    code = f"""{PRELUDE}
import threading
from minitron_kernels import _native
make_current("80")  # device 0's, in this thread only
found = []
def work():
    launch(abi.library())
    found.append(_native.current_device()["sm"])
thread = threading.Thread(target=work)
thread.start()
thread.join()
make_current("89")
launch(abi.library())
print(found, _native.current_device()["sm"])
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[80]", "89"], done.stdout + done.stderr


def test_native_module_on_every_architecture() -> None:
    """From Python to the kernel and back, with one process using all devices in turn."""
    code = """
import torch
from minitron_kernels import _native, ops
from tests import emulator
from tests.native_emulator import ARCHS, make_current
x, w = torch.randn(3, 576).bfloat16(), torch.randn(576).bfloat16()
for arch in ARCHS * 2:
    make_current(arch)
    device = _native.current_device()
    assert device["sm"] == int(arch.rstrip("a"))
    assert device["clusters_of_4"] == (32 if arch == "90a" else 0)
    out = torch.full_like(x, float("nan"))
    with emulator.accessible(x=x, w=w, out=out):
        _native.rms_norm(x=x.data_ptr(), weight=w.data_ptr(), out=out.data_ptr(), x_stride=576,
                         out_stride=576, rows=3, hidden=576, eps=1e-5, dtype=_native.BF16, stream=0)
    torch.testing.assert_close(out, ops.rms_norm(x, w, 1e-5), atol=0, rtol=2**-7)
    print(arch, device)
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*ARCHS, *ARCHS]


def test_print_plan_once_per_shape() -> None:
    code = f"{PRELUDE}\nlib = abi.library()\nmake_current('90a')\n" + "launch(lib)\n" * 3
    assert in_new_process(code).stderr == ""
    lines = in_new_process(code, MK_PRINT_PLAN="1").stderr.splitlines()
    plan = "mk_rms_norm_sm90_bf16 grid 2x1x1 block 32x1x1 smem 0 pdl"
    assert lines == [f"rms_norm bf16 rows 2 hidden 64 -> {plan}"]


def test_first_launches_from_many_threads() -> None:
    code = f"""{PRELUDE}
import threading
lib, errors = abi.library(), []
def work(arch):
    try:
        make_current(arch)
        for _ in range(20):
            abi.check(lib.mk_rms_norm(ctypes.byref(params), None), lib)
    except Exception as error:
        errors.append(error)
threads = [threading.Thread(target=work, args=(a,)) for a in ("80", "89", "90a", "100a") * 2]
with emulator.accessible(x=x, out=out):
    for t in threads: t.start()
    for t in threads: t.join()
assert not errors, errors
assert torch.equal(out, x)
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr


def test_first_launch_under_graph_capture() -> None:
    """Nothing runs while capturing; each replay of the graph computes."""
    code = f"""{PRELUDE}
lib, driver = abi.library(), emulator.library()
make_current("90a")
stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
assert driver.cuStreamCreate(ctypes.byref(stream), 0) == 0
assert driver.cuStreamBeginCapture_v2(stream, 0) == 0
abi.check(lib.mk_rms_norm(ctypes.byref(params), stream), lib)
assert driver.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0
assert not out.any()
flags = ctypes.c_ulonglong(0)
assert driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, flags) == 0
for _ in range(2):
    out.zero_()
    with emulator.accessible(x=x, out=out):
        assert driver.cuGraphLaunch(executable, stream) == 0
    assert torch.equal(out, x)
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr


def test_a_fault_in_a_kernel_is_a_driver_error() -> None:
    """The output is not accessible: the launch fails and the report names the kernel."""
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    out = torch.zeros_like(x)
    params = abi.params_type("rms_norm")(
        x=x.data_ptr(), weight=x.data_ptr(), out=out.data_ptr(), x_stride=64, out_stride=64,
        rows=2, hidden=64, eps=1e-5, dtype=C["MK_BF16"],
    )  # fmt: skip
    lib = emulated_library()
    make_current("80")
    with emulator.accessible(x=x), pytest.raises(abi.StatusError, match="cuLaunchKernelEx"):
        abi.check(lib.mk_rms_norm(ctypes.byref(params), None), lib)
    assert "mk_rms_norm_sm80_bf16" in emulator.last_report() and not out.any()


def test_library_paths() -> None:
    for header in ("minitron_kernels.h", "minitron_kernels_fp8.h"):
        assert (Path(native.get_include()) / header).is_file()
    assert Path(native.get_library()).name == "libminitron_kernels.so"


def test_stub_names_what_the_module_has() -> None:
    """_native.pyi, for type checkers, against the module: names and order of the arguments."""
    stub = ast.parse((Path(native.__file__).parent / "_native.pyi").read_text())
    functions = {node.name: node.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    others = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    classes = {node.name for node in stub.body if isinstance(node, ast.ClassDef)}
    public = {name for name in dir(_native) if not name.startswith("_")}
    assert public == {*functions, *others, *classes}
    for name, args in functions.items():
        signature = getattr(_native, name).__doc__.partition(") -> ")[0]
        in_module = re.findall(r"[(,] (?:\*, )?(\w+):", signature.replace("(", "( ", 1))
        assert in_module == [a.arg for a in [*args.args, *args.kwonlyargs]], name
