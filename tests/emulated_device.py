"""Devices "emulated:sm_80" and so on: whole models on the kernels, with no GPU.

    with emulated("sm_80") as gpu:
        model = MinitronForCausalLM.from_pretrained(source, device=gpu.name)

Host memory is the emulator's device memory, and torch has no such device, so tensors "on" it are
CPU tensors whose memory was asked for with the device cpu:0, which torch treats as the CPU and
passes on to us. While the context lasts, two modes of torch watch every call:

- device memory is registered with the emulator when a tensor is made, and forgotten when it is
  freed: a kernel that touches anything else, host memory included, fails;
- new memory is poisoned with NaN or -77;
- an op that mixes host and device tensors fails, as on CUDA;
- what makes the host wait for the device is noted in ``syncs``;
- launches on the current stream can be captured in a graph and replayed (`minitron_kernels.devices`
  asks for it); while they are, everything but allocations, views and launches fails.

The tensors tell their device as cpu:0; is_cuda is False, and cuda_ops.emulate is set.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten

from minitron_kernels import cuda_attention, cuda_ops, devices
from tests import emulator

Tensor = torch.Tensor

DEVICE = torch.device("cpu:0")
ORDINALS = {"sm_80": 0, "sm_89": 1, "sm_90": 2, "sm_100": 3}
_GET_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]
_EMPTY = ("aten::empty.", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
_COPIES = ("aten::copy_", "aten::to.", "aten::_to_copy")
_WAITS = ("aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")
_READS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")


def _poison(tensor: Tensor) -> None:
    tensor.fill_(float("nan") if tensor.is_floating_point() else -77)


def _is_non_blocking(args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking")) or any(a is True for a in args)


class EmulatedGPU(TorchDispatchMode):
    """One emulated device of this process; see `emulated`."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.arch = arch
        self.name = f"emulated:{arch}"
        self.captures: list[EmulatedCapture] = []
        self.syncs: list[str] = []  # reads of device memory by the host, by the op's name
        self.bytes = self.peak_bytes = 0  # of device memory in use, as of the last allocation
        self._storages: dict[int, tuple[StorageWeakRef, int, int]] = {}  # address, bytes
        self._captured: list[Tensor] | None = None  # allocated under capture
        self._reading = False

    # ---- memory

    def is_on_device(self, tensor: Tensor) -> bool:
        tensor = getattr(tensor, "blocks", getattr(tensor, "tiles", tensor))  # of quantised ones
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return found is not None and not found[0].expired()

    def _forget_freed(self) -> None:
        for key, (reference, address, size) in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
                self.bytes -= size
                if size:
                    emulator.library().emu_region_remove(address)

    def _add(self, tensor: Tensor) -> None:
        self._forget_freed()
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        address, size = storage.data_ptr(), storage.nbytes()
        if size:
            emulator.library().emu_region_add(address, size, b"tensor")
        self._storages[storage._cdata] = (StorageWeakRef(storage), address, size)
        self.bytes += size
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        if self._captured is not None:
            self._captured.append(tensor)

    def close(self) -> None:
        for _, address, size in self._storages.values():
            if size:
                emulator.library().emu_region_remove(address)
        self._storages.clear()

    # ---- every op of PyTorch

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(kind not in (torch.Tensor, torch.nn.Parameter) for kind in types):
            return NotImplemented  # a wrapper: what it does with its bytes comes back here
        kwargs = kwargs or {}
        name = function._schema.name + "." + function._schema.overload_name
        inputs = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        on_device = [t for t in inputs if self.is_on_device(t)]
        on_host = [t for t in inputs if t.ndim and not self.is_on_device(t)]
        target = kwargs.get("device")
        is_copy = name.startswith(_COPIES)
        if target is None:
            to_device = self.is_on_device(args[0]) if is_copy else bool(on_device)
        else:
            to_device = target == DEVICE
        if on_device and on_host and not is_copy:
            raise RuntimeError(f"{name}: some tensors are on {self.name}, others on the host")
        if is_copy and on_device and not to_device:
            self._note(name)
        elif is_copy and on_host and to_device and not _is_non_blocking(args, kwargs):
            self._note(name + " of pageable memory")
        elif on_device and name.startswith(_WAITS):
            self._note(name)
        if (
            is_copy
            and target == DEVICE
            and on_device
            and kwargs.get("dtype")
            in (
                None,
                args[0].dtype,
            )
        ):
            return args[0]

        result = function(*args, **kwargs)
        results = [r for r in tree_flatten(result)[0] if isinstance(r, Tensor)]
        own = {t.untyped_storage()._cdata for t in inputs}
        is_new = any(r.untyped_storage()._cdata not in own for r in results)
        computes = (is_new or function._schema.is_mutable) and not name.startswith(_EMPTY)
        if self._captured is not None and (on_device or to_device) and computes:
            raise RuntimeError(f"{name}: not allowed while a stream is captured")
        if to_device:
            for tensor in results:
                if is_new and name.startswith(_EMPTY):
                    _poison(tensor)
                self._add(tensor)
        return result

    def _note(self, name: str) -> None:
        if self._captured is not None:
            raise RuntimeError(f"{name}: waits for the device while a stream is captured")
        if not self._reading:
            self.syncs.append(name)

    # ---- a family of minitron_kernels.devices

    def device(self, name: str) -> torch.device:
        if name != self.name:
            raise ValueError(f"device {name!r} is not there; emulated now: {self.name}")
        return DEVICE

    def owns(self, device: torch.device) -> bool:
        return device == DEVICE

    def capture(self, device: torch.device) -> EmulatedCapture:
        return EmulatedCapture(self)


class _Attributes(TorchFunctionMode):
    """Answers what only Python's methods of tensors tell: their device, and reads by the host."""

    def __init__(self, gpu: EmulatedGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        gpu, name = self._gpu, getattr(function, "__name__", "")
        if name == "__get__":
            if function == _GET_DEVICE and gpu.is_on_device(args[0]):
                return DEVICE
        elif name in _READS and isinstance(args[0], Tensor) and gpu.is_on_device(args[0]):
            gpu._note(name)
            gpu._reading = True
            try:
                return function(*args, **(kwargs or {}))
            finally:
                gpu._reading = False
        elif name in ("cpu", "to") and gpu.is_on_device(args[0]):
            target = torch.device("cpu") if name == "cpu" else _target(args, kwargs or {})
            if target is not None and target != DEVICE:
                # torch sees nothing to do here, as the memory is the host's.
                gpu._note(name)
                with _disable_current_modes():
                    moved = args[0].clone()
                return function(moved, *args[1:], **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _target(args: Any, kwargs: Any) -> torch.device | None:
    """The device that Tensor.to is asked for."""
    for value in (*args[1:], kwargs.get("device"), kwargs.get("other")):
        if isinstance(value, (str, torch.device)):
            return torch.device(value)
        if isinstance(value, Tensor):
            return value.device
    return None


class EmulatedCapture:
    """`devices.Capture` by the emulator's driver."""

    @property
    def num_launches(self) -> list[int]:
        return [len(launches) for launches in self.launches]

    def __init__(self, gpu: EmulatedGPU) -> None:
        self._gpu = gpu
        self.launches: list[list[emulator.Launch]] = []  # of each graph that was captured
        self.num_replays = 0
        stream = ctypes.c_void_p()
        _check(emulator.library().cuStreamCreate(ctypes.byref(stream), 0))
        self._stream = stream
        gpu.captures.append(self)

    def run(self, step: devices.Step) -> tuple[Tensor, ...]:
        cuda_ops.emulated_stream = self._stream.value
        try:
            return step()
        finally:
            cuda_ops.emulated_stream = 0

    def capture(self, step: devices.Step) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        driver, gpu = emulator.library(), self._gpu
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuStreamBeginCapture_v2(self._stream, 0))
        gpu._captured = []
        try:
            with emulator.logged_launches() as launches:
                results = self.run(step)
        finally:
            held, gpu._captured = gpu._captured, None
            _check(driver.cuStreamEndCapture(self._stream, ctypes.byref(graph)))
        _check(
            driver.cuGraphInstantiateWithFlags(
                ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
            )
        )
        count = ctypes.c_size_t()
        _check(driver.cuGraphGetNodes(graph, None, ctypes.byref(count)))
        assert count.value == len(launches)
        self.launches.append(launches)

        def replay() -> None:
            # The graph owns this memory, and must write what it reads of it.
            with torch.inference_mode():
                for tensor in held:
                    _poison(tensor)
            self.num_replays += 1
            _check(driver.cuGraphLaunch(executable, None))

        return results, replay


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUresult {status}: {emulator.last_report()}")


@contextmanager
def emulated(arch: str) -> Iterator[EmulatedGPU]:
    """Make "emulated:<arch>" (sm_80, sm_89, sm_90, sm_100) a device while the context lasts.

    Other CPU tensors of bfloat16 or float16 must not be given to the ops meanwhile.
    """
    os.environ.setdefault("MK_CUDA_DRIVER", str(emulator.build()))
    driver = emulator.library()
    context = ctypes.c_void_p()
    _check(driver.cuInit(0))
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), ORDINALS[arch]))
    _check(driver.cuCtxSetCurrent(context))
    gpu = EmulatedGPU(arch)
    was = cuda_ops.emulate
    devices.families["emulated"] = gpu
    cuda_ops.emulate = True
    try:
        with gpu, _Attributes(gpu):
            yield gpu
    except RuntimeError as error:
        if emulator.last_report():
            raise AssertionError(emulator.last_report()) from error
        raise
    finally:
        cuda_ops.emulate = was
        cuda_attention.workspaces.clear()  # they are this device's
        del devices.families["emulated"]
        gpu.close()
