"""Small random models of transformers, and what patched ones are held against."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from minitron_kernels.integrations.transformers import patch, unpatch

Tensor = torch.Tensor
VOCAB = 101
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CLASSES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "mistral": (MistralForCausalLM, MistralConfig),
}


def random_model(kind: str = "mistral", seed: int = 0, **options: Any) -> Any:
    """fp32, with weights large enough for logits that tell tokens apart."""
    model_class, config_class = CLASSES[kind]
    extra = {"sliding_window": None} if kind == "mistral" else {}
    torch.manual_seed(seed)
    model = model_class(config_class(**(SHAPE | extra | options))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            else:
                weight.mul_(5)
    return model


@contextmanager
def patched(model: Any) -> Iterator[Any]:
    report = patch(model)
    assert not report.left, str(report)
    try:
        yield model
    finally:
        unpatch(model)


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padding(ids: Tensor, side: str) -> Tensor:
    """An attention mask whose rows have 0, 3, 6, ... tokens of padding."""
    mask = torch.ones_like(ids)
    for i in range(len(ids)):
        if side == "left":
            mask[i, : 3 * i] = 0
        elif side == "right" and i:
            mask[i, -3 * i :] = 0
    return mask


def check(actual: Tensor, stock: Tensor, exact: Tensor, mask: Tensor | None = None) -> None:
    """DESIGN's rule: at most twice the error that transformers makes in the same dtype.

    Against its largest error, one unit of it being that of float32 at the largest logit.
    """
    if mask is not None:
        actual, stock, exact = (t[mask.bool()] for t in (actual, stock, exact))
    assert actual.isfinite().all()
    unit = torch.finfo(torch.float32).eps * exact.abs().max()
    limit = 2 * (stock.double() - exact).abs().max() + unit
    error = (actual.double() - exact).abs().max()
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"


@torch.no_grad()
def all_logits(model: Any, ids: Tensor, mask: Tensor | None, cache: str, chunks: int = 1) -> Tensor:
    """Logits [B, S, V], read in so many chunks."""
    past = None
    if cache == "static":
        past = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 7)
        for layer in past.layers:  # an emulated device has no part in .to(device)
            layer.cumulative_length = layer.cumulative_length.to(ids.device, copy=True)
    elif cache == "dynamic":
        past = DynamicCache(config=model.config)
    elif cache == "lazy":
        past = DynamicCache()
    logits, start = [], 0
    for part in ids.tensor_split(chunks, dim=1):
        end = start + part.shape[1]
        options: dict[str, Any] = {} if mask is None else {"attention_mask": mask[:, :end]}
        if past is not None:
            options["past_key_values"] = past
        if mask is not None:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
        logits.append(model(part, use_cache=past is not None, **options).logits)
        start = end
    return torch.cat(logits, dim=1)


def in_double(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What `all_logits` gives in float64, from a copy."""
    return all_logits(copy.deepcopy(model).double(), *args, **kwargs)


def compiled(model: Any) -> tuple[Any, list[torch.fx.GraphModule]]:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend), graphs


def ops_in(graphs: list[torch.fx.GraphModule]) -> set[str]:
    calls = [str(n.target) for g in graphs for n in g.graph.nodes if n.op == "call_function"]
    return {c.split(".")[1] for c in calls if c.startswith("minitron_kernels.")}
