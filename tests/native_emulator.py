"""Runs ops of the C ABI on the emulator, one device per architecture, and on a GPU if there is one.

The emulator takes the driver's place under a second copy of the library (a process has one driver
per copy), so that emulated and real launches can happen side by side.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_kernels import native
from tests import emulator
from tests import native_abi as abi

ARCHS = tuple(abi.DEVICES)  # in the order of the emulator's device ordinals
BUILT = tuple(arch for arch in ARCHS if arch in native.build_info()["archs"])
# What tests run on: every built architecture on the emulator, and the GPU.
DEVICES = (*BUILT, *(("gpu",) if torch.cuda.is_available() else ()))
# Those whose tensor-core kernels have sm_80's main loops, in other tiles; sm_90a has its own.
ALIKE = tuple(arch for arch in BUILT if arch != "90a")

DTYPES = {torch.bfloat16: "MK_BF16", torch.float16: "MK_F16", torch.float32: "MK_F32"}
DTYPES |= {torch.int32: "MK_I32", torch.int64: "MK_I64", torch.float8_e4m3fn: "MK_E4M3"}


def dtype_id(tensor: torch.Tensor) -> int:
    return abi.constants()[DTYPES[tensor.dtype]]


def on_own_and_alike(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Each case on sm_90a, on one of ALIKE, which take turns, and on a GPU if there is one. The
    architecture comes before the case's own arguments."""
    chosen = []
    for i, case in enumerate(cases):
        name = "-".join(str(a).removeprefix("torch.") for a in case)
        turn = ALIKE[i % len(ALIKE)] if ALIKE else None
        chosen += [
            pytest.param(arch, *case, id=f"emu-sm_{arch}-{name}")
            for arch in BUILT
            if arch in (turn, "90a")
        ]
        if "gpu" in DEVICES:
            chosen.append(pytest.param("gpu", *case, id=f"gpu-{name}", marks=pytest.mark.gpu))
    return chosen


def storage_of(x: torch.Tensor) -> torch.Tensor:
    """All of the memory that x is a view of, as a vector."""
    count = x.untyped_storage().nbytes() // x.element_size()
    return torch.as_strided(x, (count,), (1,), 0)


def kernel_file(arch: str) -> Path:
    return Path(native.get_library()).parent / "kernels" / f"sm_{arch}.fatbin"


def ptx_of(arch: str) -> list[str]:
    """The PTX texts inside a kernel file, which are stored as they are and end with a 0."""
    found = re.findall(rb"\.version \d+\.\d+\s+\.target[^\0]*", kernel_file(arch).read_bytes())
    return [text.decode() for text in found]


def copy_of_library(folder: Path, archs: Sequence[str] = BUILT) -> Path:
    """A copy of the library with the kernels of `archs` beside it."""
    (folder / "kernels").mkdir(parents=True)
    for arch in archs:
        (folder / "kernels" / f"sm_{arch}.fatbin").symlink_to(kernel_file(arch))
    return Path(shutil.copy2(native.get_library(), folder))


def make_current(arch: str) -> None:
    """Make the emulated device of an architecture current on this thread."""
    driver = emulator.library()
    context = ctypes.c_void_p()
    assert driver.cuInit(0) == 0
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ARCHS.index(arch)) == 0
    assert driver.cuCtxSetCurrent(context) == 0


def load_emulated(path: Path, archs: Sequence[str] = BUILT) -> ctypes.CDLL:
    """A library with the emulator as its driver, and the kernels of `archs` loaded."""
    lib = abi.load(path)
    previous = os.environ.get("MK_CUDA_DRIVER")
    os.environ["MK_CUDA_DRIVER"] = str(emulator.build())
    try:
        for arch in archs:
            make_current(arch)
            abi.check(lib.mk_load(), lib)
    finally:
        if previous is None:
            del os.environ["MK_CUDA_DRIVER"]
        else:
            os.environ["MK_CUDA_DRIVER"] = previous
    return lib


def pieces_of(data: bytes) -> list[bytes]:
    """The fatbins of a kernel file, one per entry file."""
    found = []
    while data:
        _magic, _version, header, payload = struct.unpack_from("<IHHQ", data)
        found.append(data[: header + payload])
        data = data[header + payload :]
    return found


def faulty_library(folder: Path, arch: str, entry: str, old: str, new: str) -> ctypes.CDLL:
    """The library, on the emulator, with every `old` in the PTX of an entry replaced by `new`,
    which must not be longer. Its kernels are those of the entry's file only."""
    (piece,) = (p for p in pieces_of(kernel_file(arch).read_bytes())
                if f".entry {entry}(".encode() in p)  # fmt: skip
    # The last one: line information holds the text, too.
    before, name, after = piece.rpartition(f".entry {entry}(".encode())
    body, end, rest = after.partition(b"\n}\n")

    def replace(match: re.Match[bytes]) -> bytes:
        text = match.expand(new.encode())
        assert len(text) <= len(match[0])
        return text.ljust(len(match[0]))

    changed, count = re.subn(old.encode(), replace, body)
    assert count, f"{old} is not in {entry}"
    path = copy_of_library(folder / "package", [arch])
    file = path.parent / "kernels" / f"sm_{arch}.fatbin"
    file.unlink()
    file.write_bytes(before + name + changed + end + rest)
    return load_emulated(path, [arch])


@functools.cache
def emulated_library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        return load_emulated(copy_of_library(Path(folder) / "package"))


def move_pointers(
    params: ctypes.Structure, moves: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Pointers into the first tensor of a pair now point into the second, in all that is inside."""
    for name, kind in params._fields_:
        value = getattr(params, name)
        for inner in value if isinstance(value, ctypes.Array) else [value]:
            if isinstance(inner, ctypes.Structure):
                move_pointers(inner, moves)
        if kind is not ctypes.c_void_p or not value:
            continue
        for old, new in moves:
            offset = value - old.data_ptr()
            if 0 <= offset < max(old.nbytes, 1):
                setattr(params, name, new.data_ptr() + offset)


@contextlib.contextmanager
def _on_gpu(params: ctypes.Structure, tensors: list[torch.Tensor]) -> Iterator[None]:
    """Copies of the tensors on the GPU, with the pointers of `params` moved to them."""
    copies = [t.cuda() for t in tensors]
    move_pointers(params, list(zip(tensors, copies, strict=True)))
    yield
    torch.cuda.synchronize()
    for host, copy in zip(tensors, copies, strict=True):
        host.copy_(copy)


def run(
    op: str,
    device: str,
    params: ctypes.Structure,
    tensors: list[torch.Tensor],
    seed: int = 0,
    lib: ctypes.CDLL | None = None,
) -> emulator.Counters | None:
    """mk_<op> on one of DEVICES; counters of the launch on an emulated one.

    `tensors`: all memory that it may touch. `seed`: the interleaving of warps on the emulator.
    `lib`: of load_emulated, in place of the installed library.
    Raises StatusError, and on the emulator with what the kernel did wrong.
    """
    if device == "gpu":
        moved = type(params).from_buffer_copy(params)
        with _on_gpu(moved, [storage_of(t) for t in tensors]):
            abi.check(getattr(abi.library(), f"mk_{op}")(ctypes.byref(moved), None))
        return None
    lib = lib or emulated_library()
    make_current(device)
    emulator.set_seed(seed)
    arrays = {f"tensor {i}": storage_of(t) for i, t in enumerate(tensors) if t.numel()}
    with emulator.accessible(**arrays):
        status = getattr(lib, f"mk_{op}")(ctypes.byref(params), None)
        if status and emulator.last_report():
            raise AssertionError(emulator.last_report())
        abi.check(status, lib)
    return emulator.last_counters()
