"""pytest -p tests.pretended_gpu -m gpu: the cases for a GPU, on an emulated device in its place.

What they do around a launch, copies to the GPU and back, waits, pointers in parameters, can be seen
to work with no GPU. Tensors "on the GPU" are CPU tensors that the emulator knows. It knows no
others: a kernel that is given one fails, as it would on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests import emulator

os.environ["MK_CUDA_DRIVER"] = str(emulator.build())
torch.cuda.is_available = lambda: True  # before the tests ask

from minitron_kernels import cuda_attention, cuda_ops  # noqa: E402
from tests import cuda_device, native_emulator  # noqa: E402

Tensor = torch.Tensor

ARCH = "90a" if "90a" in native_emulator.BUILT else native_emulator.BUILT[-1]
_copies: list[torch.UntypedStorage] = []
_waits_are_errors = False


def _cuda(tensor: Tensor) -> Tensor:
    assert not _waits_are_errors, "a copy to the GPU, which waits, where that is an error"
    copy = tensor.clone(memory_format=torch.preserve_format)
    if cuda_device._memory is not None:
        cuda_device._memory.add(copy)
    elif copy.untyped_storage().nbytes():
        storage = copy.untyped_storage()
        emulator.library().emu_region_add(storage.data_ptr(), storage.nbytes(), b"on the GPU")
        _copies.append(storage)
    return copy


def _set_sync_debug_mode(mode: Any) -> None:
    global _waits_are_errors
    _waits_are_errors = mode == "error"


_run = native_emulator.run


def _run_on_gpu(op: str, device: str, *args: Any, **kwargs: Any) -> emulator.Counters | None:
    native_emulator.make_current(ARCH)
    try:
        return _run(op, device, *args, **kwargs)
    except Exception:
        if device == "gpu" and emulator.last_report():
            raise AssertionError(emulator.last_report()) from None
        raise
    finally:
        for storage in _copies:
            emulator.library().emu_region_remove(storage.data_ptr())
        _copies.clear()


@contextmanager
def _cuda_device(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    assert name == "gpu"
    native_emulator.make_current(ARCH)
    monkeypatch.setattr(cuda_ops, "emulate", True)
    cuda_attention.workspaces.clear()
    cuda_device._memory = cuda_device.EmulatedMemory()
    try:
        with cuda_device._memory:
            yield "cuda"
    finally:
        cuda_attention.workspaces.clear()
        cuda_device._memory.forget()
        cuda_device._memory = None


Tensor.cuda = _cuda  # type: ignore[method-assign, assignment]
torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
torch.cuda.get_device_capability = lambda *_: divmod(int(ARCH.rstrip("a")), 10)  # type: ignore[assignment]
torch.cuda.get_sync_debug_mode = lambda: 0
torch.cuda.set_sync_debug_mode = _set_sync_debug_mode
native_emulator.run = _run_on_gpu
cuda_device.cuda_device = _cuda_device
