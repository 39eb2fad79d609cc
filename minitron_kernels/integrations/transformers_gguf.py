"""GGUF files as transformers models, their matrices as the file stores them.

transformers expands a GGUF file of a Llama or Mistral when it loads it. `from_gguf` makes the same
model with `QuantizedLinear` and `QuantizedEmbedding` in place of nn.Linear and nn.Embedding.
"""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from minitron_kernels import cuda_ops, devices, ops
from minitron_kernels.config import ModelConfig
from minitron_kernels.layers import MatrixModule, as_parameter
from minitron_kernels.loaders.checkpoint import Checkpoint, Weights, open_checkpoint
from minitron_kernels.loaders.hub import resolve
from minitron_kernels.quantized import QuantizedTensor

Tensor = torch.Tensor


class QuantizedLinear(MatrixModule):
    """nn.Linear without bias whose weight [out, in] is a QuantizedTensor; x [..., in]."""

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {getattr(self.weight, 'quant_type', '')}"


class QuantizedEmbedding(MatrixModule):
    """nn.Embedding whose table [V, H] is a QuantizedTensor; rows come out as ``dtype``."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype) -> None:
        super().__init__(rows, cols)
        self.dtype = dtype

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight, self.dtype)

    def extra_repr(self) -> str:
        kind = getattr(self.weight, "quant_type", "")
        return f"{self.num_embeddings}, {self.embedding_dim}, {kind}, dtype={self.dtype}"


class MinitronGGUFForCausalLM(MistralForCausalLM):
    """transformers' Mistral with matrices of a GGUF file; see `from_gguf`."""

    gguf_path: Path | None = None

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Raises NotImplementedError: safetensors has no GGUF blocks, and nothing is expanded."""
        raise NotImplementedError(
            f"the weights are GGUF blocks, which safetensors cannot hold: copy {self.gguf_path}, "
            "or torch.save(model.state_dict()), which keeps them"
        )


def from_gguf(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    patched: bool = True,
    allow_nonfinite: bool = False,
) -> MinitronGGUFForCausalLM:
    """A transformers model of a GGUF file whose quantised matrices stay quantised.

    ``path``: a file (or the first part of a split one), a Hub repository (``repo:QUANT``), or a
    built-in name. ``dtype`` is that of activations, norms and cache (None and "auto": bfloat16, or
    as the file stores its matrices), ``device`` auto, cpu, cuda or cuda:N. ``patched``: `patch` it
    as well.

    On the CPU quantised matrices are views of the memory-mapped file, but those of Q and K, whose
    rows are copied into transformers' order. On a GPU they are packed for the kernels. Embedding
    rows are decoded when they are looked up; a tied output matrix is the table itself. The
    tokenizer is `AutoTokenizer` of this package. The state dict has QuantizedTensors, which
    torch.save writes and load_state_dict takes; save_pretrained raises NotImplementedError.

    Raises ValueError for a bad argument or a damaged file, FileNotFoundError, NotImplementedError
    for a model that is no Llama, MemoryError beforehand if the machine has too little memory.
    """
    from minitron_kernels.integrations.transformers import patch
    from minitron_kernels.model import _dtype

    place = devices.parse(device)
    checkpoint = open_checkpoint(resolve(path))
    torch_type = _dtype(dtype, checkpoint.config)
    weights = Weights(checkpoint, torch_type, allow_nonfinite=allow_nonfinite)
    weights.check(checkpoint.config.weight_shapes())
    weights.check_memory(place)
    model = _empty_model(checkpoint.config, torch_type)
    model.gguf_path = checkpoint.path
    for name in checkpoint.config.weight_shapes():
        _set(model, name, _load(checkpoint, weights, name), torch_type, place)
    model.model.rotary_emb = _rotary(model.config, checkpoint.config).to(place)
    table = model.model.embed_tokens
    if checkpoint.config.tie_word_embeddings:
        if isinstance(table, QuantizedEmbedding):
            model.lm_head = _linear(table.weight)
        model.tie_weights()
    model.requires_grad_(False).eval()
    if patched:
        patch(model)
    return model


def _empty_model(config: ModelConfig, dtype: torch.dtype) -> MinitronGGUFForCausalLM:
    """On the meta device, all matrices dense."""
    plain = dataclasses.replace(config, rope_factors=None)  # see _rotary
    hf = MistralConfig(**{**plain.to_hf(), "dtype": dtype})
    with torch.device("meta"):
        model = MinitronGGUFForCausalLM(hf)
    model.generation_config = GenerationConfig.from_model_config(hf)
    return model


def _rotary(hf: Any, config: ModelConfig) -> nn.Module:
    """transformers' rotary embedding with the frequencies of the file, scaled as it asks."""
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    rotary = MistralRotaryEmbedding(hf)
    if config.rope_factors is not None:
        rotary.inv_freq = rotary.original_inv_freq = config.inv_freq()
    return rotary


def _load(checkpoint: Checkpoint, weights: Weights, name: str) -> Tensor:
    """The weight with its rows in transformers' order."""
    if weights.stays_quantized(name):
        return checkpoint.load_quantized(name, allow_nonfinite=weights.allow_nonfinite)
    return weights.load(name)


def _linear(weight: nn.Parameter) -> QuantizedLinear:
    with torch.device("meta"):
        module = QuantizedLinear(*weight.shape)
    module.weight = weight
    return module


def _set(
    model: nn.Module, name: str, weight: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    """Put a weight where it belongs; the module becomes one for quantised weights if it is such."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(weight, QuantizedTensor):
        setattr(module, leaf, as_parameter(weight.to(device)))
        return
    replacement: MatrixModule
    if isinstance(module, nn.Embedding):
        with torch.device("meta"):
            replacement = QuantizedEmbedding(weight.shape[0], weight.shape[1], dtype)
        replacement.weight = as_parameter(weight)
    else:
        replacement = _linear(as_parameter(weight))
    if cuda_ops.serves(torch.empty(0, dtype=dtype, device=device)):
        replacement.pack(device)
    elif weight.device != device:
        replacement.weight = as_parameter(weight.to(device))
    model.set_submodule(owner, replacement)
