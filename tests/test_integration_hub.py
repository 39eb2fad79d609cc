"""The kernel repository of hub/, assembled and loaded by Hugging Face's `kernels`."""

from __future__ import annotations

import copy
import json
import logging
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import click
import pytest
import torch
from kernels import (
    KernelizeFallback,
    LocalLayerRepository,
    Mode,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)
from kernels._rust import Build, Metadata
from kernels.variants import parse_variant
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralMLP

from minitron_kernels import build_info
from minitron_kernels.integrations import transformers_attention
from tests.transformers_models import check, padding, random_ids, random_model

ROOT = Path(__file__).parents[1]
LAYERS = ("RMSNorm", "SwiGLUMLP", "MinitronAttention")
script = runpy.run_path(str(ROOT / "hub" / "assemble.py"))
assemble: Callable[..., list[Path]] = script["assemble"]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    assemble(out, [ROOT])
    return out


@pytest.fixture
def names() -> Iterator[None]:
    """Classes of transformers named for the mapping, while a test runs."""
    classes = {
        MistralMLP: "SwiGLUMLP",
        LlamaMLP: "SwiGLUMLP",
        MistralAttention: "MinitronAttention",
        LlamaAttention: "MinitronAttention",
    }
    for cls, name in classes.items():
        replace_kernel_forward_from_hub(cls, name)
    yield
    for cls in classes:
        del cls.kernel_layer_name, cls.kernel_condition


def mapping(repository: Path) -> dict[str, Any]:
    return {name: {"cpu": LocalLayerRepository(repository, layer_name=name)} for name in LAYERS}


@pytest.mark.parametrize("kind", ["llama", "mistral"])
@torch.no_grad()
def test_kernelized_logits_equal_transformers(
    kind: str, repository: Path, names: None, caplog: Any
) -> None:
    model, ids = random_model(kind), random_ids(3, 17)
    mask = padding(ids, "left")
    stock = [model(ids).logits, model(ids, attention_mask=mask).logits]
    exact = copy.deepcopy(model).double()
    expected = [exact(ids).logits, exact(ids, attention_mask=mask).logits]
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)
    transformers_attention._log_once.cache_clear()
    with use_kernel_mapping(mapping(repository), inherit_mapping=False):
        others = KernelizeFallback.NO_LAYER  # of the names that transformers gives
        kernelize(model, mode=Mode.INFERENCE, device="cpu", use_fallback=others)
    replaced = Counter(m.forward.__qualname__ for m in model.modules() if "forward" in m.__dict__)
    counts = {"RMSNorm": 5, "SwiGLUMLP": 2, "MinitronAttention": 2}
    assert {name: replaced[f"{name}.forward"] for name in LAYERS} == counts
    with caplog.at_level(logging.WARNING, "minitron_kernels"):
        actual = model(ids).logits
        assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), tokens)
    assert not [r for r in caplog.records if r.name.startswith("minitron_kernels")]
    assert not torch.equal(actual, stock[0])
    check(actual, stock[0], expected[0])
    # transformers' dense mask: SDPA, after our projections and rotation
    check(model(ids, attention_mask=mask).logits, stock[1], expected[1], mask)


def test_layers_take_only_what_they_can(repository: Path, names: None) -> None:
    """Training stays transformers'; gradients of an inference model, too."""
    model, ids = random_model("llama"), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    for mode in (Mode.TRAINING, Mode.INFERENCE):
        with use_kernel_mapping(mapping(repository), inherit_mapping=False):
            kernelize(model, mode=mode, device="cpu")
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        for p, grad in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, grad)


def test_metadata_tells_the_truth(repository: Path) -> None:
    archs = build_info()["archs"]
    variants = sorted((repository / "build").iterdir())
    assert len(variants) == (2 if archs else 1)
    for variant in variants:
        told = Metadata.read_from_file(variant / "metadata.json")
        parse_variant(variant.name)
        assert str(told.name) == "minitron-kernels" and told.license == "Apache-2.0"
        fatbins = {p.stem.removeprefix("sm_") for p in variant.rglob("*.fatbin")}
        record = json.loads((variant / "minitron_kernels/kernels/build.json").read_text())
        assert fatbins == set(record["archs"])
        if "-cpu-" in variant.name:
            assert not fatbins and told.backend.archs is None
        else:
            assert fatbins == set(archs)
            plain = [a.removesuffix("+PTX").replace(".", "") for a in told.backend.archs]
            assert plain == archs
        assert list(variant.glob("minitron_kernels/_native.*.so"))
        assert not list(variant.rglob("__pycache__"))
    assert [str(b) for b in Build.open(repository).general.backends]
    ids = {Metadata.read_from_file(v / "metadata.json").id for v in variants}
    assert len(ids) == len(variants)


def test_architectures_as_metadata_writes_them() -> None:
    assert script["declared_archs"]({"archs": ["80", "89", "90a", "100a"]}) == [
        "8.0+PTX",
        "8.9",
        "9.0a",
        "10.0a",
    ]


def test_the_package_beside_the_layers_is_loaded(repository: Path, tmp_path: Path) -> None:
    """In a process that has not imported another one."""
    program = f"""
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
kernel = get_local_kernel(Path({str(repository)!r}))
import minitron_kernels
assert Path(minitron_kernels.__file__).is_relative_to({str(repository)!r})
norm = torch.nn.RMSNorm(8)
norm.variance_epsilon = 1e-6
norm.requires_grad_(False)
print(kernel.layers.RMSNorm.forward(norm, torch.full((1, 8), 3.0))[0, 0].item())
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(1.0)


def test_another_version_is_refused(repository: Path, tmp_path: Path) -> None:
    program = f"""
import importlib.metadata
from pathlib import Path
import minitron_kernels
importlib.metadata.version = lambda name, v=importlib.metadata.version: (
    "9.9" if name == "minitron_kernels" else v(name)
)
from kernels import get_local_kernel
get_local_kernel(Path({str(repository)!r}))
"""
    environment = {"PYTHONPATH": f"{ROOT}:{':'.join(sys.path)}", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ImportError: minitron_kernels 9.9 is imported already" in run.stderr


def fake_wheel(folder: Path, python: str, archs: list[str], version: str = "0.1.0") -> Path:
    path = folder / f"minitron_kernels-{version}-{python}-{python}-linux_x86_64.whl"
    with ZipFile(path, "w") as wheel:
        record = {"archs": archs, "nvcc": "13.0.88" if archs else None, "entries": {}}
        wheel.writestr("minitron_kernels/kernels/build.json", json.dumps(record))
        wheel.writestr("minitron_kernels/__init__.py", "")
        wheel.writestr(f"minitron_kernels/_native.{python}.so", python)
        for arch in archs:
            wheel.writestr(f"minitron_kernels/kernels/sm_{arch}.fatbin", arch)
    return path


def test_wheels_of_several_pythons_go_together(tmp_path: Path) -> None:
    wheels = [fake_wheel(tmp_path, f"cp3{n}", ["80", "90a"]) for n in (11, 12)]
    cpu, cuda = assemble(tmp_path / "out", wheels)
    for variant in (cpu, cuda):
        found = {p.name for p in (variant / "minitron_kernels").glob("_native.*")}
        assert found == {"_native.cp311.so", "_native.cp312.so"}
    assert "cu130" in cuda.name
    told = Metadata.read_from_file(cuda / "metadata.json")
    assert told.backend.archs == ["8.0+PTX", "9.0a"]
    (only,) = assemble(tmp_path / "none", [fake_wheel(tmp_path, "cp313", [])])
    assert "-cpu-" in only.name


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (("cp312", ["80"]), "they must be of one"),
        (("cp312", ["80", "90a"], "0.2.0"), "they must be of one"),
        (None, "is no wheel of minitron_kernels"),
    ],
)
def test_what_does_not_go_together(second: Any, message: str, tmp_path: Path) -> None:
    wheels = [fake_wheel(tmp_path, "cp311", ["80", "90a"])]
    if second is None:
        other = tmp_path / "other-1.0-py3-none-any.whl"
        other.write_bytes(b"")
        wheels.append(other)
    else:
        wheels.append(fake_wheel(tmp_path, *second))
    with pytest.raises(click.UsageError, match=message):
        assemble(tmp_path / "out", wheels)
