"""A model class for TensorRT-LLM's PyTorch backend whose norms and MLP are this package's kernels.

    python examples/tensorrt_llm_model.py nvidia/Mistral-NeMo-Minitron-8B-Base "our solar system is"

TensorRT-LLM finds the class by the architecture that config.json names (`register_auto_model`).
Attention stays TensorRT-LLM's, with its paged cache, its scheduler and rotary embedding fused; each
layer's second half is one call, torch.ops.minitron_kernels.swiglu_mlp: norm, gate and up with their
activation, down, residual; two launches up to 64 tokens.

For one GPU. The names are those of TensorRT-LLM 1.2, and of its main branch, which has moved some.
Not tested on hardware: tests/test_integration_tensorrt_llm.py imports and runs it on a CPU, with
stand-ins for TensorRT-LLM's classes.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from tensorrt_llm._torch.model_config import ModelConfig
from tensorrt_llm._torch.models.modeling_utils import (
    DecoderModel,
    DecoderModelForCausalLM,
    register_auto_model,
)
from tensorrt_llm._torch.modules.decoder_layer import DecoderLayer
from tensorrt_llm._torch.modules.embedding import Embedding
from tensorrt_llm._torch.modules.linear import TensorParallelMode
from tensorrt_llm.functional import PositionEmbeddingType
from torch import nn
from transformers import MistralConfig

try:
    from tensorrt_llm._torch.attention_backend import AttentionMetadata
    from tensorrt_llm._torch.attention_backend.interface import (
        PositionalEmbeddingParams,
        RopeParams,
    )
    from tensorrt_llm._torch.modules.attention import Attention
except ImportError:  # the main branch of autumn 2026
    from tensorrt_llm._torch.attention.attention import Attention
    from tensorrt_llm._torch.attention.backends import AttentionMetadata
    from tensorrt_llm._torch.attention.backends.interface import (
        PositionalEmbeddingParams,
        RopeParams,
    )

from minitron_kernels import ops  # registers torch.ops.minitron_kernels

Tensor = torch.Tensor


class MinitronRMSNorm(nn.Module):
    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=config.torch_dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.minitron_kernels.rms_norm(x, self.weight, self.eps)


class Matrix(nn.Module):
    """A weight [N, K] that the loader fills by its name; no product of its own."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, cols, dtype=dtype))


class PackedGateUp(Matrix):
    """Gate and up in the order of rows that the kernel reads; the loader passes both."""

    def load_weights(self, weights: list[dict[str, Any]]) -> None:
        gate, up = (each["weight"][:].to(self.weight) for each in weights)
        self.weight.data.copy_(ops.pack_gate_up(gate, up).weight)


class MinitronMLP(nn.Module):
    def __init__(self, config: MistralConfig) -> None:
        super().__init__()
        hidden, inner, dtype = config.hidden_size, config.intermediate_size, config.torch_dtype
        # The loader knows gate_up_proj as the place of gate_proj and up_proj.
        self.gate_up_proj = PackedGateUp(2 * inner, hidden, dtype)
        self.down_proj = Matrix(hidden, inner, dtype)

    def forward(self, x: Tensor, norm: MinitronRMSNorm) -> Tensor:
        """x + mlp(norm(x)) of x [tokens, hidden]."""
        return torch.ops.minitron_kernels.swiglu_mlp(
            x, self.gate_up_proj.weight, None, self.down_proj.weight, norm.weight, norm.eps, x
        )


class MinitronAttention(Attention):
    """TensorRT-LLM's, told to rotate q and k itself."""

    def __init__(self, model_config: ModelConfig[MistralConfig], layer_idx: int) -> None:
        config = model_config.pretrained_config
        super().__init__(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            bias=False,
            pos_embd_params=PositionalEmbeddingParams(
                type=PositionEmbeddingType.rope_gpt_neox, rope=RopeParams.from_config(config)
            ),
            layer_idx=layer_idx,
            dtype=config.torch_dtype,
            config=model_config,
        )


class MinitronDecoderLayer(DecoderLayer):
    def __init__(self, model_config: ModelConfig[MistralConfig], layer_idx: int) -> None:
        super().__init__()
        config = model_config.pretrained_config
        self.input_layernorm = MinitronRMSNorm(config)
        self.self_attn = MinitronAttention(model_config, layer_idx)
        self.post_attention_layernorm = MinitronRMSNorm(config)
        self.mlp = MinitronMLP(config)

    def forward(
        self,
        position_ids: Tensor,
        hidden_states: Tensor,
        attn_metadata: AttentionMetadata,
        **kwargs: Any,
    ) -> Tensor:
        attended = self.self_attn(
            position_ids=position_ids,
            hidden_states=self.input_layernorm(hidden_states),
            attn_metadata=attn_metadata,
            **kwargs,
        )
        return self.mlp(hidden_states + attended, self.post_attention_layernorm)


class MinitronModel(DecoderModel):
    def __init__(self, model_config: ModelConfig[MistralConfig]) -> None:
        super().__init__(model_config)
        config = model_config.pretrained_config
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            dtype=config.torch_dtype,
            mapping=model_config.mapping,
            tensor_parallel_mode=TensorParallelMode.COLUMN,
            gather_output=True,
        )
        self.layers = nn.ModuleList(
            MinitronDecoderLayer(model_config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = MinitronRMSNorm(config)

    def forward(
        self,
        attn_metadata: AttentionMetadata,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("either input_ids or inputs_embeds must be given")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            x = layer(position_ids=position_ids, hidden_states=x, attn_metadata=attn_metadata)
        return self.norm(x)


@register_auto_model("MistralForCausalLM")  # in place of TensorRT-LLM's own class
class MinitronForCausalLM(DecoderModelForCausalLM[MinitronModel, MistralConfig]):
    def __init__(self, model_config: ModelConfig[MistralConfig]) -> None:
        if model_config.mapping.tp_size != 1:
            raise NotImplementedError("this example does not split the MLP: it is for one GPU")
        config = model_config.pretrained_config
        super().__init__(
            MinitronModel(model_config),
            config=model_config,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )


def main(model: str, prompt: str) -> None:
    from tensorrt_llm import LLM, SamplingParams

    llm = LLM(model=model)
    print(llm.generate(prompt, SamplingParams(max_tokens=32)).outputs[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
