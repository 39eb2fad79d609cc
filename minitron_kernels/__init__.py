"""CUDA kernels and text generation for Mistral-NeMo-Minitron-8B and other Llama-shaped models.

Names are imported on first use: `import minitron_kernels` loads nothing heavy. The functions
generate, stream and score live in `minitron_kernels.generate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitron_kernels.config import ModelConfig
    from minitron_kernels.flash_attn import (
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
    )
    from minitron_kernels.generate import GenerationResult, TokenEvent
    from minitron_kernels.loaders.tokenizer import AutoTokenizer, Tokenizer
    from minitron_kernels.model import MinitronForCausalLM
    from minitron_kernels.native import build_info, get_include, get_library
    from minitron_kernels.quantized import QuantizedTensor
    from minitron_kernels.sampling_params import SamplingParams

    LlamaForCausalLM = MistralForCausalLM = AutoModelForCausalLM = MinitronForCausalLM

_HOME = {
    "ModelConfig": "config",
    "flash_attn_func": "flash_attn",
    "flash_attn_varlen_func": "flash_attn",
    "flash_attn_with_kvcache": "flash_attn",
    "GenerationResult": "generate",
    "TokenEvent": "generate",
    "AutoTokenizer": "loaders.tokenizer",
    "Tokenizer": "loaders.tokenizer",
    "MinitronForCausalLM": "model",
    "QuantizedTensor": "quantized",
    "SamplingParams": "sampling_params",
    "build_info": "native",
    "get_include": "native",
    "get_library": "native",
}
# Names under which code written for transformers asks for the model.
_ALIASES = dict.fromkeys(
    ("LlamaForCausalLM", "MistralForCausalLM", "AutoModelForCausalLM"), "MinitronForCausalLM"
)

__all__ = [
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "GenerationResult",
    "LlamaForCausalLM",
    "MinitronForCausalLM",
    "MistralForCausalLM",
    "ModelConfig",
    "QuantizedTensor",
    "SamplingParams",
    "TokenEvent",
    "Tokenizer",
    "build_info",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_include",
    "get_library",
]


def __getattr__(name: str) -> Any:
    target = _ALIASES.get(name, name)
    if target not in _HOME:
        raise AttributeError(f"module 'minitron_kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minitron_kernels.{_HOME[target]}"), target)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
