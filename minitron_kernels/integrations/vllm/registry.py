"""The name of the attention backend in vLLM's registry; `attention.py` is imported on first use."""

from __future__ import annotations

import copyreg
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from minitron_kernels.integrations.vllm import BACKEND

_CLASS = f"{__package__}.attention.MinitronAttentionBackend"


def member() -> Any:
    """The backend in vLLM's enumeration, which gets it at the first call."""
    if BACKEND not in AttentionBackendEnum.__members__:
        register_backend(BACKEND, _CLASS)
    return AttentionBackendEnum.__members__[BACKEND]


def _reduce(backend: Any) -> tuple[Any, tuple[Any, ...]]:
    if backend.name == BACKEND:
        return member, ()
    return AttentionBackendEnum, (backend.value,)


def register() -> None:
    """vLLM sends its configuration to processes that read it before they load plugins.

    There a pickled member of an enumeration is looked up by its value, in vain: so ours is pickled
    as a call of `member`.
    """
    member()
    copyreg.pickle(AttentionBackendEnum, _reduce)
