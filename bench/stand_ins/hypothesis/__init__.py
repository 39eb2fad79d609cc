"""Stands for hypothesis where it is not installed (on_gpu.sh): its tests are skipped, no others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


class _Anything:
    """Whatever is called or looked up of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Anything:
        return self

    def __getattr__(self, name: str) -> _Anything:
        return self

    def __or__(self, other: Any) -> _Anything:
        return self


strategies = HealthCheck = assume = note = example = _Anything()


def given(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return pytest.mark.skip(reason="hypothesis is not installed")


def settings(*args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    return lambda test: test
