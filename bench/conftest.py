"""pytest for benches: options, sweeps, and the fixture `compare` (METHOD.md)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import pytest
import torch

from bench import harness
from bench.harness import Comparison, Recorder, Settings
from bench.shapes import MINITRON, SMALL, SWEEPS
from minitron_kernels.config import ModelConfig

RECORDER = pytest.StashKey[Recorder]()
SETTINGS = pytest.StashKey[Settings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("minitron_kernels")
    add = group.addoption
    add("--device", choices=("cpu", "cuda", "emulated"), help="default: cuda where there is one")
    add("--smoke", action="store_true", help="small shapes, one round, everything an error")
    add("--seconds", type=float, default=1.0, help="of measuring, per case")
    add("--warm", action="store_true", help="leave the caches as the last call left them")
    add("--no-compile", action="store_true", help="without torch.compile")
    add("--no-graphs", action="store_true", help="without CUDA graphs")
    add("--threads", type=int, help="of the CPU; default: PyTorch's")
    add("--cpu-time", action="store_true",
        help="processor time of one thread: on a machine that others use")  # fmt: skip
    add("--only", action="append", default=[], metavar="SWEEP=VALUE[,VALUE]",
        help="values of a sweep, such as dtype=bfloat16 or m=1,8")  # fmt: skip
    add("--out", type=Path, metavar="FILE.jsonl", help="results, and the same as .csv; appended")


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    device = option("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if option("--threads"):
        torch.set_num_threads(option("--threads"))
    if option("--cpu-time") and (device != "cpu" or torch.get_num_threads() != 1):
        raise pytest.UsageError("--cpu-time needs --device cpu --threads 1")
    settings = Settings(
        device=device,
        smoke=option("--smoke"),
        seconds=option("--seconds"),
        flush=not option("--warm"),
        cpu_time=option("--cpu-time"),
        compile=not option("--no-compile"),
        graphs=not option("--no-graphs"),
        results=option("--out"),
    )
    config.stash[SETTINGS] = settings
    config.stash[RECORDER] = Recorder(settings, write=lambda text: _tell(config, text))


def _tell(config: pytest.Config, text: str) -> None:
    """On the terminal at once, whatever pytest captures."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{text}", end="", flush=True)


def _chosen(options: list[str]) -> dict[str, list[str]]:
    return {name: values.split(",") for name, _, values in (o.partition("=") for o in options)}


def _label(value: Any) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sweeps = SWEEPS[metafunc.config.stash[SETTINGS].sweep]
    chosen = _chosen(metafunc.config.getoption("--only"))
    if unknown := chosen.keys() - sweeps.keys():
        raise pytest.UsageError(f"--only: no sweep {min(unknown)!r}; there are {', '.join(sweeps)}")
    for name in (n for n in sweeps if n in metafunc.fixturenames):
        values = [v for v in sweeps[name] if name not in chosen or _label(v) in chosen[name]]
        metafunc.parametrize(name, values, ids=_label)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "compare" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=harness.clock))


@pytest.fixture
def config(request: pytest.FixtureRequest) -> ModelConfig:
    """The model whose shapes are measured."""
    return SMALL if request.config.stash[SETTINGS].sweep == "smoke" else MINITRON


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Comparison]:
    settings = request.config.stash[SETTINGS]
    torch.manual_seed(0)
    comparison = Comparison(settings, benchmark, request.config.stash[RECORDER])
    with torch.no_grad():
        if settings.device != "emulated":
            yield comparison
            return
        from tests.cuda_device import ARCHS, cuda_device

        with cuda_device(next(iter(ARCHS)), monkeypatch):
            yield comparison
