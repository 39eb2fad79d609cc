"""Compiles the emulator into a shared library, cached by a hash of its sources and flags."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]


def host_flags() -> list[str]:
    """The widest vector extension of this host; results are the same with any (or none)."""
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    except OSError:
        return []
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= set(flags):
        return ["-march=x86-64-v4", "-mprefer-vector-width=512"]
    if {"avx2", "fma", "bmi2"} <= set(flags):
        return ["-march=x86-64-v3"]
    return []


def build(jobs: int = 2) -> Path:
    """Path of the library, compiled first if no build of these sources is cached.

    The cache folder is MK_EMU_CACHE, else `minitron_kernels` in the user's cache folder. Raises
    subprocess.CalledProcessError with the compiler's output when compilation fails.
    """
    objects, library = _outputs()
    if library.exists() and all(path.exists() for path in objects.values()):
        return library
    compiler, cache = _compiler(), library.parent

    # One build at a time; outputs are made aside and renamed, so that none is ever seen unfinished.
    with (cache / "lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def compile_one(source: Path) -> None:
            if not objects[source].exists():
                output = Path(folder) / f"{source.stem}.o"
                run([compiler, *_flags_of(source), "-c", str(source), "-o", str(output)])
                output.replace(objects[source])

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(compile_one, objects))
        output = Path(folder) / library.name
        run([compiler, "-shared", "-pthread", "-o", str(output), *map(str, objects.values())])
        output.replace(library)
    return library


def objects_of(*stems: str) -> list[Path]:
    """The compiled sources of these names, for a library of a test's own."""
    build()
    return [path for source, path in _outputs()[0].items() if source.stem in stems]


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _flags_of(source: Path) -> list[str]:
    # Sources with target_clones choose at run time (and g++ 12 fails on both together).
    return FLAGS if "target_clones" in source.read_text() else FLAGS + host_flags()


def _headers_of(source: Path) -> list[Path]:
    """What a source includes of this folder."""
    found: dict[str, Path] = {}
    texts = [source.read_text()]
    while texts:
        for name in re.findall(r'^#include "(.+)"', texts.pop(), re.M):
            if name not in found:
                found[name] = SOURCES / name
                texts.append(found[name].read_text())
    return [found[name] for name in sorted(found)]


def _outputs() -> tuple[dict[Path, Path], Path]:
    """Where each source's object is, and the library."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minitron_kernels"
    cache = Path(os.environ.get("MK_EMU_CACHE", default))
    cache.mkdir(parents=True, exist_ok=True)

    def named(stem: str, suffix: str, *content: bytes) -> Path:
        digest = hashlib.sha256(b"\0".join([_compiler().encode(), *content])).hexdigest()[:20]
        return cache / f"{stem}-{digest}{suffix}"

    # The largest sources first, for an even load.
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    objects = {
        source: named(
            source.stem,
            ".o",
            " ".join(_flags_of(source)).encode(),
            *(path.read_bytes() for path in [source, *_headers_of(source)]),
        )
        for source in sources
    }
    return objects, named(
        "libcuda_emulator", ".so", *sorted(o.name.encode() for o in objects.values())
    )


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()


if __name__ == "__main__":
    print(build(os.cpu_count() or 2))
