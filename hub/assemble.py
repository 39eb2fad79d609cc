"""Assemble a kernel repository of the Hugging Face Hub from wheels, or from a built source tree.

    python hub/assemble.py OUT dist/minitron_kernels-0.1.0-cp311-*.whl [more wheels ...]

OUT/build gets a variant for the CPU and, if the build has CUDA kernels, one for CUDA. Wheels of one
version for several Pythons go into the same variants: they differ in the extension module alone,
whose name tells its Python. metadata.json lists the architectures that the build record
(kernels/build.json) has, and no others.

Variants are named torch-stable-abi26: nothing is linked to PyTorch, whose version 2.6 is the oldest
that the package takes. That of CUDA has the version of nvcc in its name, whose driver it needs.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import click

HUB = Path(__file__).resolve().parent
SOURCES = HUB / "torch-ext" / "minitron_kernels"
NAME = "minitron-kernels"
FRAMEWORK = "torch-stable-abi26"
KERNELS_MINVER = "0.17.0"


def package_in(source: Path, scratch: Path) -> tuple[Path, str]:
    """The package's folder and version: of a wheel, which is unpacked, or of a source tree."""
    if source.is_dir():
        import tomllib

        project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
        return source / "minitron_kernels", project["version"]
    name, version, *_ = source.stem.split("-")
    if source.suffix != ".whl" or name != "minitron_kernels":
        raise click.UsageError(f"{source} is no wheel of minitron_kernels and no source tree")
    folder = scratch / source.stem
    with zipfile.ZipFile(source) as wheel:
        wheel.extractall(folder)
    return folder / "minitron_kernels", version


def declared_archs(build: dict[str, Any]) -> list[str]:
    """CUDA architectures as metadata.json writes them: 80 is 8.0+PTX, 90a is 9.0a.

    The kernels for 80 are there as PTX, too, and serve newer GPUs that have none of their own.
    """
    told = []
    for arch in build["archs"]:
        digits = arch.rstrip("af")
        told.append(f"{digits[:-1]}.{arch[len(digits) - 1 :]}" + ("+PTX" if arch == "80" else ""))
    return told


def metadata(backend: str, version: str, archs: list[str] | None, files: Path) -> dict[str, Any]:
    """metadata.json; the id is one of these files' contents."""
    digest = hashlib.sha256()
    for path in sorted(p for p in files.rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(files)).encode() + path.read_bytes())
    told: dict[str, Any] = {"type": backend}
    if archs is not None:
        told["archs"] = archs
    return {
        "id": f"minitron_kernels_{backend}_{digest.hexdigest()[:12]}",
        "name": NAME,
        "version": int(version.partition(".")[0]) + 1,  # as build.toml: 1 while it is 0.x
        "kernels-minver": KERNELS_MINVER,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": told,
    }


def write_variant(out: Path, packages: list[Path], version: str, backend: str) -> Path:
    """One folder below OUT/build."""
    build = json.loads((packages[0] / "kernels" / "build.json").read_text())
    tag, archs = "cpu", None
    if backend == "cuda":
        archs = declared_archs(build)
        major, minor, *_ = build["nvcc"].split(".")
        tag = f"cu{major}{minor}"
    variant = out / "build" / f"{FRAMEWORK}-{tag}-{platform.machine()}-linux"
    if variant.exists():
        raise click.UsageError(f"{variant} exists already")
    ignored = shutil.ignore_patterns("__pycache__", *(["*.fatbin"] if backend == "cpu" else []))
    for package in packages:
        shutil.copytree(package, variant / "minitron_kernels", ignore=ignored, dirs_exist_ok=True)
    if backend == "cpu":
        record = {**build, "archs": [], "nvcc": None, "entries": {}}
        (variant / "minitron_kernels/kernels/build.json").write_text(json.dumps(record, indent=1))
    for source in sorted(SOURCES.glob("*.py")):
        shutil.copy(source, variant)
    (variant / "VERSION").write_text(version + "\n")
    told = metadata(backend, version, archs, variant)
    (variant / "metadata.json").write_text(json.dumps(told, indent=2) + "\n")
    return variant


def assemble(out: Path, sources: list[Path]) -> list[Path]:
    """The variants' folders. Raises click.UsageError for sources that do not go together."""
    with tempfile.TemporaryDirectory() as scratch:
        found = [package_in(source, Path(scratch)) for source in sources]
        packages, versions = [p for p, _ in found], {v for _, v in found}
        records = [json.loads((p / "kernels/build.json").read_text())["archs"] for p in packages]
        if len(versions) != 1 or any(record != records[0] for record in records):
            raise click.UsageError(
                f"the wheels are of versions {sorted(versions)} and architectures {records}: "
                "they must be of one"
            )
        version = versions.pop()
        backends = ["cpu", "cuda"] if records[0] else ["cpu"]
        variants = [write_variant(out, packages, version, backend) for backend in backends]
    for name in ("build.toml", "README.md"):
        shutil.copy(HUB / name, out)
    shutil.copytree(HUB / "torch-ext", out / "torch-ext", dirs_exist_ok=True)
    return variants


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(out: Path, sources: tuple[Path, ...]) -> None:
    for variant in assemble(out, list(sources)):
        size = sum(p.stat().st_size for p in variant.rglob("*") if p.is_file())
        print(f"{variant} ({size / 2**20:.1f} MiB)")


if __name__ == "__main__":
    main()
