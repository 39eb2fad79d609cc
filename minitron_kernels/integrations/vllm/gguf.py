"""GGUF files in vLLM: its config parser, model loader, quantisation and model class.

Weights stay quantised: the loader hands out a file's blocks under their Hugging Face names, and the
quantisation keeps what a rank needs of each as `matrices.Matrices`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import (
    QUANTIZATION_METHODS,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models import ModelRegistry
from vllm.transformers_utils.config import get_config_parser, register_config_parser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from minitron_kernels.integrations.vllm import ARCHITECTURE, GGUF
from minitron_kernels.integrations.vllm.matrices import Matrices, Part, columns_of, rows_of
from minitron_kernels.loaders.checkpoint import Checkpoint, open_checkpoint
from minitron_kernels.loaders.hub import resolve

Tensor = torch.Tensor

_QKV = {"q": 0, "k": 1, "v": 2}


class MinitronLinearMethod(LinearMethodBase):
    """A layer's matrices, collected while vLLM loads them, then kept as `Matrices`."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """A parameter that stands for the matrices until all are there."""
        # The dtype of what is loaded into it, so that vLLM does not warn.
        weight: Any = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        weight.parts = dict[int, Part]()
        weight.sizes = input_size_per_partition, tuple(output_partition_sizes)
        weight.matrices = None
        layer.params_dtype = params_dtype

        def load(weight: Any, loaded: Tensor, shard_id: int | str | None = None) -> None:
            index = _QKV[shard_id] if isinstance(shard_id, str) else shard_id or 0
            if shard_id is None and len(output_partition_sizes) > 1:
                raise NotImplementedError("a merged matrix, which no GGUF file of a Llama has")
            weight.parts[index] = _part_of(layer, weight, loaded, shard_id, index)

        weight.weight_loader = load
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: Any) -> None:
        weight: Any = layer.weight
        if weight.matrices is None:  # of tied embeddings, the second finds them
            _, rows = weight.sizes
            missing = [i for i in range(len(rows)) if i not in weight.parts]
            if missing:
                prefix = getattr(layer, "prefix", None) or type(layer).__name__
                raise ValueError(f"{prefix}: matrices {missing} of {len(rows)} were not loaded")
            parts = [weight.parts[i] for i in range(len(rows))]
            weight.matrices = Matrices(parts, layer.params_dtype, weight.device)
            weight.parts = {}
        layer.matrices = weight.matrices

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        result: Tensor = layer.matrices(x, bias)
        return result


def _part_of(
    layer: Any, weight: Any, loaded: Tensor, shard_id: int | str | None, index: int
) -> Part:
    """What this rank keeps of a loaded matrix [N, K]."""
    cols, row_counts = weight.sizes
    rows, rank = row_counts[index], layer.tp_rank
    if isinstance(layer, VocabParallelEmbedding):
        own = layer.shard_indices
        return Part(rows_of(loaded, own.org_vocab_start_index, own.num_org_elements, rows))
    if loaded.shape[0] != rows:
        if shard_id in ("k", "v"):
            rank //= layer.num_kv_head_replicas
        loaded = rows_of(loaded, rank * rows, rows)
    if loaded.shape[1] != cols:
        return columns_of(loaded, rank * cols, cols)
    return Part(loaded)


class MinitronEmbeddingMethod(MinitronLinearMethod):
    """Of the token embeddings and the LM head."""

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        result: Tensor = layer.matrices.embedding(input_)
        return result


class MinitronGGUFConfig(QuantizationConfig):
    def get_name(self) -> str:
        return GGUF

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MinitronGGUFConfig:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, VocabParallelEmbedding):
            return MinitronEmbeddingMethod()
        return MinitronLinearMethod() if isinstance(layer, LinearBase) else None


class MinitronGGUFConfigParser(ConfigParserBase):
    """The config of the model in a GGUF file, as transformers' class."""

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], Any]:
        from transformers import MistralConfig

        fields = open_checkpoint(resolve(model, revision)).config.to_hf()
        fields |= {
            "architectures": [ARCHITECTURE],
            "quantization_config": {"quant_method": GGUF},
            "rope_parameters": {"rope_type": "default", "rope_theta": fields.pop("rope_theta")},
            "dtype": fields.pop("torch_dtype"),
        }
        return fields, MistralConfig(**fields)


class MinitronGGUFLoader(BaseModelLoader):
    def download_model(self, model_config: Any) -> None:
        _resolved(model_config)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        checkpoint = open_checkpoint(_resolved(model_config))
        load: Any = model.load_weights
        load(weights_of(checkpoint, model_config.dtype))


def _resolved(model_config: Any) -> Path:
    return resolve(model_config.model_weights or model_config.model, model_config.revision)


def weights_of(checkpoint: Checkpoint, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its Hugging Face name, quantised matrices as they are stored."""
    for name, info in checkpoint.tensors.items():
        if info.is_quantized_matrix:
            yield name, checkpoint.load_quantized(name)
        else:
            yield name, checkpoint.load(name, dtype)


def register() -> None:
    if GGUF not in QUANTIZATION_METHODS:
        register_quantization_config(GGUF)(MinitronGGUFConfig)
        register_model_loader(GGUF)(MinitronGGUFLoader)
    try:
        get_config_parser(GGUF)
    except ValueError:
        register_config_parser(GGUF)(MinitronGGUFConfigParser)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(
            ARCHITECTURE, "minitron_kernels.integrations.vllm.model:MinitronForCausalLM"
        )
