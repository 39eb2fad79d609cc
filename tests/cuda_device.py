"""The device that tests of CUDA tensors run on: a GPU, or the emulator with CPU tensors.

On the emulator every tensor that is made is known to it, new memory is poisoned, and ops may not
look at what is in a tensor: on a GPU that would wait for it, and could not be captured in a graph.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from minitron_kernels import cuda_attention, cuda_ops, cuda_quantized, native
from tests import emulator, native_emulator

Tensor = torch.Tensor
# The archs whose kernels are built, by the names of the emulator's devices.
ARCHS = {f"sm_{a.removesuffix('a')}": a for a in native.build_info()["archs"]}
PARAMS = [pytest.param(name, id=f"emu-{name}") for name in ARCHS]
if torch.cuda.is_available():
    PARAMS = [pytest.param("gpu", marks=pytest.mark.gpu)]

_aten = torch.ops.aten
HOST_READS = {
    _aten._local_scalar_dense.default,  # item, int(), bool()
    _aten.nonzero.default,  # also indexing by a mask
    _aten.masked_select.default,
    _aten.unique_dim.default,
    _aten._unique2.default,
    _aten.equal.default,
}


class EmulatedMemory(TorchDispatchMode):
    """Tells the emulator of every storage, and poisons new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.reads_forbidden = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.reads_forbidden and func in HOST_READS:
            raise AssertionError(f"the host reads what is in a tensor: {func}")
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
                if "empty" in func.name() and tensor.numel():
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 77)
        return result

    def add(self, tensor: Tensor) -> None:
        if is_traceable_wrapper_subclass(tensor):  # quantised: what it wraps has come by itself
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages and storage.nbytes():
            self.storages[storage.data_ptr()] = storage  # kept: its address is not used again
            emulator.library().emu_region_add(storage.data_ptr(), storage.nbytes(), b"tensor")

    def forget(self) -> None:
        for address in self.storages:
            emulator.library().emu_region_remove(address)
        self.storages.clear()


_memory: EmulatedMemory | None = None


@contextlib.contextmanager
def cuda_device(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """torch's device to make tensors on; ``name``: gpu, or one of ARCHS."""
    global _memory
    cuda_attention.workspaces.clear()
    if name == "gpu":
        yield "cuda"
        return
    os.environ.setdefault("MK_CUDA_DRIVER", str(emulator.build()))
    native_emulator.make_current(ARCHS[name])
    monkeypatch.setattr(cuda_ops, "emulate", True)
    _memory = EmulatedMemory()
    try:
        with _memory:
            yield "cpu"
    finally:
        cuda_attention.workspaces.clear()
        _memory.forget()
        _memory = None


def on(tensor: Tensor, device: str) -> Tensor:
    """The tensor on the device under test, accessible to kernels there."""
    if device == "cuda":
        return tensor.cuda()
    assert _memory is not None
    assert not _memory.reads_forbidden, "a copy to a GPU waits for it: make it before"
    _memory.add(tensor)
    return tensor


@contextlib.contextmanager
def no_host_reads(device: str) -> Iterator[None]:
    """An error where an op would wait for the GPU."""
    if device == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return
    assert _memory is not None

    def fail(*_: Any) -> Any:
        raise AssertionError("the host reads what is in a tensor: tolist or numpy")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(Tensor, name, fail)
        patch.setattr(_memory, "reads_forbidden", True)
        yield


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """CPU tensors are computed by the CPU's ops."""
    was, cuda_ops.emulate = cuda_ops.emulate, False
    try:
        yield
    finally:
        cuda_ops.emulate = was


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the C functions that are called."""
    names: list[str] = []
    call = cuda_ops.call

    def counting(name: str, *args: Any) -> None:
        names.append(name)
        call(name, *args)

    with pytest.MonkeyPatch.context() as patch:
        for module in (cuda_ops, cuda_attention, cuda_quantized):
            patch.setattr(module, "call", counting)
        yield names


def on_device(value: Any, device: str) -> Any:
    """Tensors of an argument, also in a tuple, on the device; copies with their strides."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage().clone()
        copy = torch.empty(0, dtype=value.dtype).set_(
            storage, value.storage_offset(), value.shape, value.stride()
        )
        return on(copy, device)
    if isinstance(value, tuple):
        parts = [on_device(v, device) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _tensors(value: Any) -> list[Tensor]:
    return [t.cpu() for t in tree_leaves(value) if isinstance(t, Tensor)]


def both(
    function: Callable[..., Any], device: str, *args: Any, **kwargs: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(kernel's outputs, CPU's outputs, kernel's versions of the tensor arguments)."""
    mine = [on_device(a, device) for a in args]
    named = {k: on_device(v, device) for k, v in kwargs.items()}
    with no_host_reads(device):
        got = function(*mine, **named)
    with on_cpu():
        expected = function(*args, **kwargs)
    return _tensors(got), _tensors(expected), _tensors(mine)
