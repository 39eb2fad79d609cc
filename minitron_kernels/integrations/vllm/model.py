"""The architecture MinitronForCausalLM of vLLM; imported by it when a model has that name."""

from __future__ import annotations

from vllm.model_executor.models.llama import LlamaForCausalLM


class MinitronForCausalLM(LlamaForCausalLM):
    """vLLM's Llama, whose layers, attention and matrices are those registered here."""
