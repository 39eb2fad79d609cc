"""PEP 517 backend: setuptools', which also asks for the CUDA compiler wheels where no nvcc is."""

from __future__ import annotations

from typing import Any

import cuda
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks not overridden here)


def _compiler_wheels() -> list[str]:
    return list(cuda.WHEELS) if cuda.requested_archs() and cuda.find_nvcc() is None else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _compiler_wheels()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _compiler_wheels()
