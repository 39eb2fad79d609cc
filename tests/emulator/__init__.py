"""PTX emulator: runs compiled kernels on the CPU and says what is wrong with them (README.md)."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .build import build

try:
    from numpy.lib.array_utils import byte_bounds
except ImportError:  # numpy 1
    from numpy import byte_bounds

CLASSES = [
    "fp32",
    "fp64",
    "fp16",
    "mufu",
    "alu",
    "cvt",
    "mma",
    "shared",
    "global",
    "copy",
    "local",
    "sync",
    "control",
    "mov",
]
MEMORY = [
    "read_requests",
    "read_sectors",
    "read_bytes",
    "unique_read_sectors",
    "write_requests",
    "write_sectors",
    "write_bytes",
    "unique_write_sectors",
    "shared_requests",
    "shared_wavefronts",
    "shared_wavefronts_min",
    "between_mmas",
]


class EmulatorError(RuntimeError):
    """What a kernel or a launch did wrong. `kind` is the detector, the message the full report."""

    def __init__(self, kind: str, report: str) -> None:
        super().__init__(report)
        self.kind = kind


@dataclass
class Counters:
    """Of one launch. `issued` and `lanes`: warp- and lane-instructions by class.

    Global memory in 32-byte sectors: per request (`read_sectors`), and distinct over the launch
    (`unique_read_sectors`). `shared_wavefronts_min` is what the shared-memory requests would take
    without bank conflicts. `between_mmas`: instructions, mov left out, of warps that have used
    wgmma and have none under way.
    """

    issued: dict[str, int] = field(default_factory=dict)
    lanes: dict[str, int] = field(default_factory=dict)
    read_requests: int = 0
    read_sectors: int = 0
    read_bytes: int = 0
    unique_read_sectors: int = 0
    write_requests: int = 0
    write_sectors: int = 0
    write_bytes: int = 0
    unique_write_sectors: int = 0
    shared_requests: int = 0
    shared_wavefronts: int = 0
    shared_wavefronts_min: int = 0
    between_mmas: int = 0

    @property
    def instructions(self) -> int:
        return sum(self.issued.values())


class _Region(ctypes.Structure):
    _fields_ = (
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("track_initialised", ctypes.c_uint64),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The emulator's shared library, built on first use."""
    lib = ctypes.CDLL(str(build()))
    for name in ("error", "error_kind", "module_kernels", "profile", "last_report", "log_launches"):
        getattr(lib, f"emu_{name}").restype = ctypes.c_char_p
    lib.emu_region_add.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p]
    lib.emu_region_remove.argtypes = [ctypes.c_void_p]
    lib.emu_set_seed.argtypes = [ctypes.c_uint64]
    lib.emu_module_kernels.argtypes = lib.emu_module_unload.argtypes = [ctypes.c_void_p]
    lib.emu_profile.argtypes = lib.emu_kernel_static_smem.argtypes = [ctypes.c_void_p]
    return lib


def _check(status: int) -> None:
    if status:
        lib = library()
        raise EmulatorError(lib.emu_error_kind().decode(), lib.emu_error().decode())


def _extent(array: Any) -> tuple[int, int]:
    """Address and bytes spanned by a numpy array or torch tensor."""
    if isinstance(array, np.ndarray):
        low, high = byte_bounds(array) if array.size else (array.ctypes.data,) * 2
        return low, high - low
    if array.numel() == 0:
        return array.data_ptr(), 0
    span = sum((n - 1) * s for n, s in zip(array.shape, array.stride(), strict=True)) + 1
    return array.data_ptr(), span * array.element_size()


_CounterArray = ctypes.c_uint64 * (2 * len(CLASSES) + len(MEMORY))


def _counters(values: ctypes.Array[ctypes.c_uint64]) -> Counters:
    n = len(CLASSES)
    return Counters(
        dict(zip(CLASSES, values[:n], strict=True)),
        dict(zip(CLASSES, values[n : 2 * n], strict=True)),
        **dict(zip(MEMORY, values[2 * n :], strict=True)),
    )


# Launches through the driver symbols (by code that loaded the library as its libcuda).


@contextmanager
def accessible(**arrays: Any) -> Iterator[None]:
    """Lets kernels launched through the driver API touch these arrays, known by their names."""
    bases = []
    try:
        for name, array in arrays.items():
            base, size = _extent(array)
            library().emu_region_add(base, size, name.encode())
            bases.append(base)
        yield
    finally:
        for base in bases:
            library().emu_region_remove(base)


@dataclass(frozen=True)
class Launch:
    """A kernel that was enqueued. `is_dependent`: with programmatic stream serialization."""

    kernel: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    smem: int
    is_dependent: bool


@contextmanager
def logged_launches() -> Iterator[list[Launch]]:
    """The launches through the driver API while the context lasts; complete at its end."""
    found: list[Launch] = []
    library().emu_log_launches(1)
    try:
        yield found
    finally:
        for line in library().emu_log_launches(0).decode().splitlines():
            kernel, *numbers = line.split()
            n = [int(x) for x in numbers]
            found.append(Launch(kernel, tuple(n[:3]), tuple(n[3:6]), n[6], bool(n[7])))


def set_seed(seed: int) -> None:
    """The interleaving of the driver launches that follow."""
    library().emu_set_seed(seed)


def last_counters() -> Counters:
    """Of the last driver launch that succeeded."""
    values = _CounterArray()
    library().emu_last_counters(values)
    return _counters(values)


def last_report() -> str:
    """Why the last driver call failed; empty after a successful launch."""
    return library().emu_last_report().decode()


def _is_array(value: Any) -> bool:
    return (isinstance(value, np.ndarray) and value.ndim > 0) or hasattr(value, "data_ptr")


class Emulator:
    """An emulated GPU: sm_80 (A100), sm_89 (L40S), sm_90 (H100) or sm_100 (B200)."""

    def __init__(self, device: str = "sm_80") -> None:
        values = (ctypes.c_int * 4)()
        if library().emu_device(device.encode(), values):
            raise ValueError(f"device: got {device!r}, known are sm_80, sm_89, sm_90, sm_100")
        self.device = device
        self.capability, self.sms, self.smem_per_cta, self.smem_per_sm = values

    def load(self, image: str | bytes) -> Module:
        """PTX text, or the bytes of a fatbin with uncompressed PTX. Raises EmulatorError."""
        return Module(self, image.encode() if isinstance(image, str) else bytes(image))


class Module:
    def __init__(self, emulator: Emulator, image: bytes) -> None:
        self.emulator = emulator
        handle = ctypes.c_void_p()
        size = ctypes.c_uint64(len(image))
        lib = library()
        _check(lib.emu_module_load(emulator.device.encode(), image, size, ctypes.byref(handle)))
        self._handle = handle
        weakref.finalize(self, lib.emu_module_unload, handle)

    @property
    def kernels(self) -> list[str]:
        return library().emu_module_kernels(self._handle).decode().split()

    def kernel(self, name: str) -> Kernel:
        return Kernel(self, name)

    def variable(self, name: str) -> np.ndarray:
        """The bytes of a .global or .const variable, as a view."""
        address, size = ctypes.c_uint64(), ctypes.c_uint64()
        found = library().emu_module_variable(
            self._handle, name.encode(), ctypes.byref(address), ctypes.byref(size)
        )
        if found:
            raise KeyError(name)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size.value).from_address(address.value))


class Kernel:
    def __init__(self, module: Module, name: str) -> None:
        self.module = module
        self.name = name
        self._handle = ctypes.c_void_p()
        lib = library()
        _check(lib.emu_kernel(module._handle, name.encode(), ctypes.byref(self._handle)))
        sizes = (ctypes.c_uint32 * 512)()
        count = lib.emu_kernel_params(self._handle, sizes, 512)
        self.param_bytes = list(sizes[:count])
        self.static_smem: int = lib.emu_kernel_static_smem(self._handle)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        smem: int = 0,
        cluster: Sequence[int] | None = None,
        seed: int = 0,
        *,
        regions: Sequence[Any] = (),
        uninitialised: Sequence[Any] = (),
        threads: int = 0,
        allow_uninitialised_shared: bool = False,
        check_races: bool = True,
        max_instructions: int = 1_000_000_000,
    ) -> Counters:
        """Runs the kernel to its end.

        args: numpy arrays and torch CPU tensors (passed as pointers, accessible up to their last
        element), None (a null pointer), numpy scalars, Python numbers (converted to the parameter's
        size; floats of 4 or 8 bytes), bytes or ctypes structures. `regions`: further arrays the
        kernel may touch. `uninitialised`: those of either whose contents must not be read before
        the kernel has written them. `seed` picks an interleaving of warps and CTAs; `threads` is
        the number of host threads (0: all). A CTA that executes more than `max_instructions`
        warp-instructions hangs. Raises EmulatorError.
        """
        if len(args) != len(self.param_bytes):
            raise ValueError(f"args: {self.name} takes {len(self.param_bytes)}, got {len(args)}")
        fresh = {_extent(a)[0] for a in uninitialised}
        buffers = [
            self._pack(a, n, i) for i, (a, n) in enumerate(zip(args, self.param_bytes, strict=True))
        ]
        arrays = {f"argument {i}": a for i, a in enumerate(args) if _is_array(a)}
        arrays |= {f"region {i}": a for i, a in enumerate(regions)}
        table = (_Region * max(1, len(arrays)))()
        for row, (name, array) in zip(table, arrays.items(), strict=False):
            base, size = _extent(array)
            row.base, row.bytes, row.name = base, size, name.encode()
            row.track_initialised = base in fresh
        dims = (ctypes.c_uint32 * 9)(*_three(grid), *_three(block), *_three(cluster or (1,)))
        pointers = (ctypes.c_void_p * max(1, len(buffers)))(*(ctypes.addressof(b) for b in buffers))
        counters = _CounterArray()
        options = (1 if allow_uninitialised_shared else 0) | (0 if check_races else 2)
        _check(
            library().emu_launch(
                self._handle, dims, ctypes.c_uint32(smem), ctypes.c_uint64(seed), threads, options,
                ctypes.c_uint64(max_instructions),
                pointers, table, ctypes.c_uint64(len(arrays)), counters,
            )
        )  # fmt: skip
        return _counters(counters)

    def profile(self) -> list[tuple[int, int, str, int, str]]:
        """Of the last launch, per instruction: issued, lanes, class, source line, PTX text."""
        rows = []
        for line in library().emu_profile(self._handle).decode().splitlines():
            issued, lanes, cls, source, text = line.split("\t", 4)
            rows.append((int(issued), int(lanes), cls, int(source), text))
        return rows

    def _pack(self, value: Any, size: int, index: int) -> ctypes.Array[ctypes.c_char]:
        if value is None:
            data = bytes(8)
        elif _is_array(value):
            data = _extent_pointer(value).to_bytes(8, "little")
        elif isinstance(value, bool | int):
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        elif isinstance(value, float):
            data = (np.float32 if size == 4 else np.float64)(value).tobytes()
        elif isinstance(value, np.generic | np.ndarray):
            data = value.tobytes()
        else:
            data = bytes(value)
        if len(data) != size:
            raise ValueError(f"args[{index}]: parameter takes {size} bytes, got {len(data)}")
        return ctypes.create_string_buffer(data, max(size, 1))


def _extent_pointer(array: Any) -> int:
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def _three(dims: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*dims, 1, 1, 1)[:3]
    return x, y, z
