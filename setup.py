"""Metadata is in pyproject.toml; this file adds the native build (build_tools/native.py)."""

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).resolve().parent / "build_tools"))

import native


class BuildNative(build_ext):
    def run(self):
        package = Path(native.ROOT if self.inplace else self.build_lib) / "minitron_kernels"
        self.native_files = native.build(package)

    def get_outputs(self):
        return [str(path) for path in getattr(self, "native_files", [])]

    def get_output_mapping(self):
        return {}  # an inplace build writes straight into the source tree


setup(
    ext_modules=[Extension("minitron_kernels._native", ["csrc/python/native.cpp"])],
    cmdclass={"build_ext": BuildNative},
)
