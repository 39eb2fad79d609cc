"""The platform of `vllm_cpu.py`; imports vLLM."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform


class Platform(CpuPlatform):
    """vLLM's CPU platform, which takes the backend that was asked for, as on CUDA."""

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        path: str = selected_backend.get_path()
        return path
