"""The build: which compiler, which architectures, what is an error, what is rebuilt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "build_tools"


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """build_tools/cuda.py, with no compiler to be found except those that a test puts there."""
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("CUDA_HOME", "CUDA_PATH", "MK_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    import cuda as module

    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    yield module
    for name in ("cuda", "backend", "native"):
        sys.modules.pop(name, None)


def fake_nvcc(folder: Path, version: str, body: str = "") -> Path:
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "release, V{version}" && exit 0\n{body}\n'
    )
    path.chmod(0o755)
    return path


# ------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize(
    "text, archs",
    [
        ("", ("80", "89", "90a", "100a")),
        ("90a", ("90a",)),
        ("100a 80", ("80", "100a")),
        ("80,89;90a", ("80", "89", "90a")),
        ("none", ()),
    ],
)
def test_requested_archs(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, archs: tuple[str, ...]
) -> None:
    monkeypatch.setenv("MK_ARCHS", text)
    assert cuda.requested_archs() == archs


@pytest.mark.parametrize("text", ["70", "90", "80 sm_90a", "none 80"])
def test_unknown_arch_is_named(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("MK_ARCHS", text)
    wrong = next(word for word in text.split() if word not in cuda.ARCHS)
    with pytest.raises(ValueError, match=f"MK_ARCHS names .*{wrong}.*accepted"):
        cuda.requested_archs()


def test_nvcc_is_searched_in_order(
    cuda: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """CUDA_HOME, PATH, wheels; one that is too old is passed over with a word."""
    assert cuda.find_nvcc() is None
    wheel = fake_nvcc(tmp_path / "nvidia" / "cu13", "13.5.37")
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: spec)
    assert cuda.find_nvcc() == (wheel, "13.5.37")
    old = fake_nvcc(tmp_path / "old", "12.8.93")  # which has no __CUDA_ARCH_SPECIFIC__
    monkeypatch.setenv("PATH", f"{old.parent}:/usr/bin:/bin")
    assert cuda.find_nvcc() == (wheel, "13.5.37")
    assert f"{old} is CUDA 12.8.93: too old" in capsys.readouterr().out
    on_path = fake_nvcc(tmp_path / "path", "12.9.86")
    monkeypatch.setenv("PATH", f"{on_path.parent}:/usr/bin:/bin")
    assert cuda.find_nvcc() == (on_path, "12.9.86")
    home = fake_nvcc(tmp_path / "home", "13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda.find_nvcc() == (home, "13.0.88")


def test_backend_asks_for_the_compiler_only_when_needed(
    cuda: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    import backend

    def wheels() -> list[list[str]]:
        hooks = (backend.get_requires_for_build_wheel, backend.get_requires_for_build_editable)
        return [[r for r in hook() if r.startswith("nvidia")] for hook in hooks]

    # The hooks of setuptools run setup.py, which must not see this test's arguments.
    assert wheels() == [list(cuda.WHEELS)] * 2
    monkeypatch.setenv("MK_ARCHS", "none")
    assert wheels() == [[], []]
    monkeypatch.delenv("MK_ARCHS")
    fake_nvcc(tmp_path, "13.0.88")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert wheels() == [[], []]


def test_no_compiler_is_an_error_that_says_what_to_do(cuda: ModuleType, tmp_path: Path) -> None:
    import native

    with pytest.raises(RuntimeError, match=r"CUDA_HOME.*nvidia-cuda-nvcc.*MK_ARCHS=none"):
        native.build(tmp_path)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------- one entry file

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'mk_b_sm80_bf16' for 'sm_80'
ptxas info    : Function properties for mk_b_sm80_bf16
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 512 bytes smem, 424 bytes cmem[0]
ptxas info    : Compile time = 1.8 ms
ptxas info    : Compiling entry function 'mk_a_sm80_bf16' for 'sm_80'
ptxas info    : Function properties for mk_a_sm80_bf16
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


def compile_entry(source: str, out: Path, nvcc: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOLS / "compile_entry.py", "--arch", "80", "--werror"]
    env = {**os.environ, "MK_NVCC": str(nvcc)}
    env.pop("CXX", None)
    return subprocess.run(
        [*command, "--src", source, "--out", out], cwd=ROOT, env=env, capture_output=True, text=True
    )


def printing(text: str, status: int = 0) -> str:
    """The body of a fake nvcc that writes its outputs and prints text."""
    outputs = 'for a; do case "$p" in -o) echo x > "$a";; -MF) echo "o: csrc/a.cuh" > "$a";; esac; '
    return f"{outputs}p=$a; done\ncat <<'END'\n{text}END\nexit {status}"


def test_record_of_an_entry_file(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "13.0.88", printing(PTXAS.format(stack=0, stores=0, loads=0)))
    out = tmp_path / "a.fatbin"
    assert compile_entry("csrc/a.cu", out, nvcc).returncode == 0
    assert json.loads((tmp_path / "a.fatbin.json").read_text())["entries"] == {
        "mk_b_sm80_bf16": {
            "registers": 40, "smem_bytes": 512, "stack_bytes": 0, "spill_bytes": 0,
        },
        "mk_a_sm80_bf16": {"registers": 8, "smem_bytes": 0, "stack_bytes": 0, "spill_bytes": 0},
    }  # fmt: skip


@pytest.mark.parametrize("stack, stores, loads", [(8, 0, 0), (0, 4, 0), (0, 0, 16)])
def test_spills_are_an_error(tmp_path: Path, stack: int, stores: int, loads: int) -> None:
    text = PTXAS.format(stack=stack, stores=stores, loads=loads)
    nvcc = fake_nvcc(tmp_path, "13.0.88", printing(text))
    done = compile_entry("csrc/a.cu", tmp_path / "a.fatbin", nvcc)
    assert done.returncode == 1
    assert "mk_b_sm80_bf16 (csrc/a.cu for sm_80) spills or uses stack" in done.stderr


def test_failing_entry_names_file_and_arch(tmp_path: Path) -> None:
    nvcc = fake_nvcc(tmp_path, "13.0.88", printing("a.cu(3): error: what went wrong\n", 2))
    done = compile_entry("csrc/a.cu", tmp_path / "a.fatbin", nvcc)
    assert done.returncode == 1
    assert "compiling csrc/a.cu for sm_80 failed" in done.stderr
    assert "what went wrong" in done.stderr


def real_nvcc() -> str:
    sys.path.insert(0, str(TOOLS))
    try:
        import cuda

        found = cuda.find_nvcc()
    finally:
        sys.path.pop(0)
        sys.modules.pop("cuda", None)
    if found is None:
        pytest.skip("no nvcc")
    return str(found.path)


@pytest.mark.parametrize(
    "body, message",
    [
        ("float a[99]; for (int i = 0; i < 99; ++i) a[i] = p[i * n]; p[n] = a[n];", "uses stack"),
        ("int unused; p[0] = 1;", "declared but never referenced"),
        ("p[0] = undeclared;", "undeclared"),
    ],
    ids=["stack", "warning", "error"],
)
def test_what_the_compiler_refuses(tmp_path: Path, body: str, message: str) -> None:
    source = tmp_path / "bad.cu"
    source.write_text(f'extern "C" __global__ void mk_bad(float* p, int n) {{ {body} }}')
    done = compile_entry(str(source), tmp_path / "bad.fatbin", real_nvcc())
    assert done.returncode == 1 and message in done.stderr and "sm_80" in done.stderr


def test_entry_for_the_wrong_arch_does_not_compile(tmp_path: Path) -> None:
    """common/entry.cuh refuses a base architecture and an MK_SM that is not the target."""
    source = tmp_path / "wrong.cu"
    source.write_text('#include "common/entry.cuh"\n')
    for target, sm, message in (
        ("90", "90", "not for the base architecture"),
        ("80", "90", "MK_SM and the architecture that nvcc compiles for differ"),
    ):
        flags = ["-std=c++20", "-ptx", f"-arch=compute_{target}", f"-DMK_SM={sm}"]
        done = subprocess.run(
            [real_nvcc(), *flags, "-Icsrc", "-Iinclude", source, "-o", tmp_path / "x.ptx"],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode and message in done.stderr


# ------------------------------------------------------------------------------------ the whole


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the build reads."""
    for name in ("build_tools", "csrc", "include", "examples", "minitron_kernels"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.fatbin", "kernels")
        shutil.copytree(ROOT / name, tmp_path / "main" / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, tmp_path / "main" / name)
    return tmp_path / "main"


@pytest.mark.slow
def test_incremental_build(checkout: Path) -> None:
    real_nvcc()

    def build(archs: str) -> str:
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=checkout, capture_output=True, text=True, env={**os.environ, "MK_ARCHS": archs},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    kernels = checkout / "minitron_kernels" / "kernels"
    assert "nvcc sm_80 csrc/embedding/entries/embedding.cu" in build("80")
    assert [f.name for f in kernels.glob("*.fatbin")] == ["sm_80.fatbin"]
    assert "no work to do" in build("80")
    (checkout / "csrc/embedding/embedding.cuh").touch()
    lines = [line for line in build("80").splitlines() if line.startswith("[")]
    assert lines == ["[1/1] nvcc sm_80 csrc/embedding/entries/embedding.cu"]
    assert "nvcc" not in "\n".join(build("none").splitlines()[2:])
    assert not list(kernels.glob("*.fatbin"))
    record = json.loads((kernels / "build.json").read_text())
    assert record["archs"] == [] and record["nvcc"] is None and record["entries"] == {}


@pytest.mark.slow
def test_wheel_without_a_toolkit(checkout: Path, tmp_path: Path) -> None:
    """g++ and Python are enough: the compiler comes from PyPI. The wheel holds every product and
    is within the budget of 40 MB."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "MK_"))}
    env["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    if shutil.which("nvcc", path=env["PATH"]):
        pytest.skip("nvcc lies beside g++ and cannot be hidden")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", tmp_path / "w", checkout],
        capture_output=True, text=True, env=env,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-5000:]
    assert "nvidia-cuda-nvcc" in output and "nvcc sm_100a" in output
    (wheel,) = (tmp_path / "w").glob("*.whl")
    assert wheel.stat().st_size < 40e6 and "any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    for name in (
        "libminitron_kernels.so",
        "include/minitron_kernels.h",
        "include/minitron_kernels_fp8.h",
        "kernels/build.json",
        *(f"kernels/sm_{arch}.fatbin" for arch in ("80", "89", "90a", "100a")),
    ):
        assert f"minitron_kernels/{name}" in names
    assert any(n.startswith("minitron_kernels/_native.") and n.endswith(".so") for n in names)
