"""Build the native layer with ninja: kernels, libminitron_kernels.so and the _native extension.

Everything is compiled below build/native, and only what changed. The products go into the package:

    libminitron_kernels.so      C ABI: validation, plans, launches (plain C++, not linked to CUDA)
    _native.<abi>.so            pybind11 over the C ABI
    kernels/sm_<arch>.fatbin    one fatbin after the other, one per entry file
    kernels/build.json          the build record: what was built, by what, and what ptxas said
    include/*.h                 (not in an inplace build, which leaves them where they are)
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import cuda

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path("build/native")  # relative to ROOT, where every command runs

# Entry file below csrc/ -> the architectures it is compiled for.
ENTRY_FILES: dict[str, tuple[str, ...]] = {
    "attention/entries/attn_decode.cu": ("80", "89", "100a"),
    "attention/entries/attn_decode_sm90.cu": ("90a",),
    "attention/entries/attn_prefill.cu": ("80", "89", "100a"),
    "attention/entries/attn_prefill_fp8_sm90.cu": ("90a",),
    "attention/entries/attn_prefill_sm90.cu": ("90a",),
    "embedding/entries/embedding.cu": cuda.ARCHS,
    "linear/entries/linear_fp8_sm90.cu": ("90a",),
    "linear/entries/linear_gemm.cu": ("80", "89", "100a"),
    "linear/entries/linear_gemm_sm90.cu": ("90a",),
    "linear/entries/linear_skinny.cu": ("80", "89", "100a"),
    "linear/entries/linear_skinny_sm90.cu": ("90a",),
    "quant/entries/quant_decode.cu": cuda.ARCHS,
    "quant/entries/quant_embedding.cu": cuda.ARCHS,
    "quant/entries/quant_gemm.cu": cuda.ARCHS,
    "quant/entries/quant_gemm_sm90.cu": ("90a",),
    "quant/entries/quant_prepare.cu": cuda.ARCHS,
    "quantize_fp8/entries/quantize_fp8.cu": ("90a",),
    "rms_norm/entries/rms_norm.cu": cuda.ARCHS,
    "rope/entries/rope.cu": cuda.ARCHS,
    "sampling/entries/sampling.cu": cuda.ARCHS,
    "silu_and_mul/entries/silu_and_mul.cu": cuda.ARCHS,
}

# Instruction set, as the names of files below csrc/cpu end -> the flags of x86-64 compilers. Tuned
# for any processor, GCC would load a vector again for each of its uses.
_CPU_ISA_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c -mtune=haswell",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mfma -mtune=icelake-server",
    "avx512bf16": "-mavx512f -mavx512bw -mavx512vl -mavx512bf16 -mfma -mtune=icelake-server",
    "avx512vnni": "-mavx512f -mavx512bw -mavx512vl -mavx512vnni -mfma -mtune=icelake-server",
}

HEADERS = ("minitron_kernels.h", "minitron_kernels_fp8.h")
LIBRARY = "libminitron_kernels.so"
EXTENSION = f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"

_RULES = """\
ninja_required_version = 1.8
builddir = build/native
cxxflags = -std=c++17 -O2 -g1 -fPIC -fvisibility=hidden -Wall -Wextra {werror} -Icsrc -Iinclude

rule cxx
  command = $$MK_CXX $cxxflags $extra -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = g++ $in

rule library
  command = $$MK_CXX -shared -Wl,-soname,{library} -Wl,--no-undefined $
      -Wl,--version-script=csrc/launch/exports.map $in -o $out -ldl -pthread
  description = link $out

rule extension
  command = $$MK_CXX -shared -Wl,-rpath,'$$ORIGIN' $in -o $out
  description = link $out

rule entry
  command = $$MK_PYTHON build_tools/compile_entry.py --arch $arch --src $in --out $out $
      --nvcc-version $nvcc {entry_werror}
  depfile = $out.d
  deps = gcc
  description = nvcc sm_$arch $in
"""


def _fatbin(source: str, arch: str) -> Path:
    return BUILD / f"sm_{arch}" / f"{Path(source).stem}.fatbin"


def _cpu_flags(stem: str) -> str:
    """Flags of a file below csrc/cpu: its name ends in the instruction set it is compiled for."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    isa = _CPU_ISA_FLAGS.get(stem.rpartition("_")[2], "") if x86 else ""
    return f"-O3 -ffp-contract=off {isa}".rstrip()


def _ninja_file(archs: tuple[str, ...], nvcc_version: str) -> str:
    """The build graph. Paths that change from build to build come by the environment instead:
    ninja rebuilds whatever has a new command line."""
    werror = os.environ.get("MK_WERROR") == "1"  # for CI: other compilers have other warnings
    lines = [
        _RULES.format(
            library=LIBRARY,
            werror="-Werror" if werror else "",
            entry_werror="--werror" if werror else "",
        )
    ]
    objects = []
    for source in sorted(p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*.cpp")):
        if source.parts[1] == "python":
            continue
        objects.append(BUILD / "host" / f"{'_'.join(source.parts[1:])}.o")
        lines.append(f"build {objects[-1]}: cxx {source}")
        if source.parts[1] == "cpu":
            lines.append(f"  extra = {_cpu_flags(source.stem)}")
    library, extension = BUILD / LIBRARY, BUILD / EXTENSION
    inputs = " ".join(map(str, objects))
    lines.append(f"build {library}: library {inputs} | csrc/launch/exports.map")
    module = BUILD / "python" / f"{EXTENSION}.o"
    lines.append(f"build {module}: cxx csrc/python/native.cpp")
    include = sysconfig.get_path("include")
    lines.append(f"  extra = -isystem {include} -isystem $$MK_PYBIND11_INCLUDE")
    lines.append(f"build {extension}: extension {module} {library}")
    for source, entry_archs in ENTRY_FILES.items():
        for arch in archs:
            if arch in entry_archs:
                out = _fatbin(source, arch)
                lines.append(f"build {out}: entry csrc/{source} | build_tools/compile_entry.py")
                lines.append(f"  arch = {arch}\n  nvcc = {nvcc_version}")
    return "\n".join(lines) + "\n"


def _write_if_changed(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != data:
        path.write_bytes(data)


def _record(archs: tuple[str, ...], nvcc: cuda.Nvcc | None, seconds: float) -> dict[str, object]:
    entries: dict[str, dict[str, object]] = {arch: {} for arch in archs}
    compile_seconds = 0.0
    for source, entry_archs in ENTRY_FILES.items():
        for arch in set(archs) & set(entry_archs):
            built = json.loads((ROOT / f"{_fatbin(source, arch)}.json").read_text())
            compile_seconds += built["seconds"]
            for name, use in built["entries"].items():
                entries[arch][name] = {"file": f"csrc/{source}", **use}
    return {
        "archs": list(archs),
        "nvcc": nvcc.version if nvcc else None,
        "seconds": round(seconds, 1),  # of this build, which may have been incremental
        "compile_seconds": round(compile_seconds, 1),  # of all entry files, one after the other
        "entries": {arch: dict(sorted(found.items())) for arch, found in entries.items()},
    }


def _pybind11_include() -> str:
    """pybind11's headers: of its wheel among the build requirements, else those that torch has."""
    try:
        import pybind11

        return str(pybind11.get_include())
    except ImportError:
        torch = importlib.util.find_spec("torch")
        folders = torch.submodule_search_locations if torch else None
        for folder in folders or []:
            if (Path(folder) / "include" / "pybind11" / "pybind11.h").exists():
                return str(Path(folder) / "include")
        raise RuntimeError("pybind11 was not found: pip install pybind11") from None


def _environment(nvcc: cuda.Nvcc | None) -> dict[str, str]:
    return os.environ | {
        "MK_CXX": os.environ.get("CXX", "g++"),
        "MK_NVCC": str(nvcc.path) if nvcc else "",
        "MK_PYTHON": sys.executable,
        "MK_PYBIND11_INCLUDE": _pybind11_include(),
    }


def _ninja() -> str:
    """The ninja program: of the wheel among the build requirements, or on PATH."""
    try:
        import ninja

        return str(Path(ninja.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if not found:
            raise RuntimeError("ninja was not found: pip install ninja") from None
        return found


def build(package: Path) -> list[Path]:
    """Build everything and put it into the folder ``package``; returns the files put there."""
    archs = cuda.requested_archs()
    nvcc = cuda.find_nvcc() if archs else None
    if archs and nvcc is None:
        raise RuntimeError(
            "no CUDA compiler was found on CUDA_HOME, PATH or among the Python packages. "
            f"pip install {' '.join(f'{w!r}' for w in cuda.WHEELS)}, or set MK_ARCHS=none for a "
            "build without GPU kernels"
        )
    what = f"{' '.join(archs)} with nvcc {nvcc.version}" if nvcc else "none (MK_ARCHS=none)"
    print(f"minitron_kernels: GPU architectures {what}", flush=True)

    start = time.perf_counter()
    graph = ROOT / BUILD / "build.ninja"
    _write_if_changed(graph, _ninja_file(archs, nvcc.version if nvcc else "").encode())
    command = [_ninja(), "-f", str(BUILD / "build.ninja")]
    if os.environ.get("MK_JOBS"):
        command += ["-j", os.environ["MK_JOBS"]]
    if subprocess.run(command, cwd=ROOT, env=_environment(nvcc)).returncode:
        raise SystemExit("error: the native build of minitron_kernels failed; the reason is above")

    files = [package / LIBRARY, package / EXTENSION]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # a process that runs it keeps it
        shutil.copy2(ROOT / BUILD / file.name, file)
    if package.parent != ROOT:
        (package / "include").mkdir(parents=True, exist_ok=True)
        for header in HEADERS:
            files.append(package / "include" / header)
            shutil.copy2(ROOT / "include" / header, files[-1])
    kernels = package / "kernels"
    for stale in kernels.glob("*.fatbin"):
        if stale.stem.removeprefix("sm_") not in archs:
            stale.unlink()
    for arch in archs:
        parts = [s for s, entry_archs in ENTRY_FILES.items() if arch in entry_archs]
        files.append(kernels / f"sm_{arch}.fatbin")
        data = b"".join((ROOT / _fatbin(source, arch)).read_bytes() for source in parts)
        _write_if_changed(files[-1], data)
    files.append(kernels / "build.json")
    record = _record(archs, nvcc, time.perf_counter() - start)
    _write_if_changed(files[-1], (json.dumps(record, indent=1) + "\n").encode())
    return files
