"""Where a model runs: names of devices, host-to-device copies, and the capture of CUDA graphs.

Names are auto, cpu, cuda and cuda:N. An entry of `families` adds names: by it tests make
"emulated:sm_80" a device like any other (tests/emulated_device.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Tensor = torch.Tensor
Step = Callable[[], tuple[Tensor, ...]]
ACCEPTED = "auto, cpu, cuda, cuda:N"


class Capture(Protocol):
    """Captures steps of a device in graphs; steps of one Capture never run at the same time."""

    def run(self, step: Step) -> tuple[Tensor, ...]:
        """Run the step, not captured, where captured steps run: kernels load, scratch is made."""

    def capture(self, step: Step) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """Record the launches of step(): (its results, which a replay fills; the replay).

        Nothing is computed yet. Raises RuntimeError if the device cannot record the step.
        """


class Family(Protocol):
    """Devices whose names start with one word and a colon."""

    def device(self, name: str) -> torch.device:
        """torch's device of a name; raises ValueError if it is none."""

    def owns(self, device: torch.device) -> bool:
        """Whether a torch device is one of these."""

    def capture(self, device: torch.device) -> Capture:
        """What captures graphs there."""


# By the first word of their names; empty but for tests.
families: dict[str, Family] = {}


def parse(device: torch.device | str | None) -> torch.device:
    """The torch device of a name; None and "auto" are cuda where torch finds it, else cpu.

    Raises ValueError for a name that is none, and for a device that is not there.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, str) and (family := families.get(device.partition(":")[0])):
        return family.device(device)
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not one; accepted: {ACCEPTED}") from error
    if parsed.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device!r} is not supported; accepted: {ACCEPTED}")
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: torch finds no CUDA device; use device cpu")
    return parsed


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free there."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return int(psutil.virtual_memory().available)


def host_buffer(num_bytes: int, device: torch.device) -> Tensor:
    """uint8 [num_bytes] of host memory that copies to ``device`` need not wait for."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on ``device``, without waiting for what the device is doing."""
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def _family_of(device: torch.device) -> Family | None:
    return next((family for family in families.values() if family.owns(device)), None)


def has_graphs(device: torch.device) -> bool:
    """Whether steps can be captured there."""
    return device.type == "cuda" or _family_of(device) is not None


def capture_for(device: torch.device) -> Capture:
    """What captures graphs on a device that has them."""
    family = _family_of(device)
    return CudaCapture(device) if family is None else family.capture(device)


class CudaCapture:
    """Graphs of one CUDA device, on a stream of their own and with one memory pool for all."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, step: Step) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            results = step()
        current.wait_stream(self._stream)
        for result in results:
            result.record_stream(current)
        return results

    def capture(self, step: Step) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # relaxed: other threads may go on using CUDA, and a first launch loads its kernel
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="relaxed"
        ):
            results = step()
        return results, graph.replay
