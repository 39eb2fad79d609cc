"""A whole decoder layer: a decode step of a batch, and a prompt; dense and quantised weights.

The same layer stands beside it in eager PyTorch with dense weights, compiled, and transformers'
own. Quantised weights are expanded for these, as those libraries do it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import eager, inputs, libraries, shapes
from bench.harness import Case, Comparison, NotAvailable
from bench.inputs import randn
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig
from minitron_kernels.layers import Linear, as_parameter
from minitron_kernels.model import Batch, DecoderLayer

Tensor = torch.Tensor


def layer_of(config: ModelConfig, weights: str, dtype: str, compare: Comparison) -> DecoderLayer:
    """With random weights, packed as `from_pretrained` packs them."""
    with torch.device("meta"):
        layer = DecoderLayer(config)
    layer.requires_grad_(False)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        norm.weight = as_parameter(randn(config.hidden_size, dtype=dtype, device=compare.device))
    for module in layer.modules():
        if isinstance(module, Linear):
            n, k = module.weight.shape
            if weights == "dense":
                w = randn(n, k, dtype=dtype, device=compare.device, scale=0.02)
            else:
                w = inputs.quantised(weights, n, k)
            module.weight = as_parameter(w)
    return layer


def dense_weights(layer: DecoderLayer, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """By Hugging Face's names, expanded."""
    return {
        name: (w.dequantize(dtype) if ops.is_quantized(w) else w).to(device)
        for name, w in layer.state_dict().items()
    }


def pack_for_kernels(layer: DecoderLayer, device: str) -> None:
    for module in (layer.self_attn, layer.mlp, layer.self_attn.o_proj, layer.mlp.down_proj):
        module.pack(torch.device(device))


def bench_layer(
    step: tuple[int, int, int], weights: str, dtype: str, config: ModelConfig, compare: Comparison
) -> None:
    batch, new, start = step
    if weights != "dense" and dtype != "bfloat16":
        pytest.skip("quantised weights: one dtype of activations tells enough")
    config = dataclasses.replace(config, num_hidden_layers=1)
    device, end = compare.device, start + new
    ours = layer_of(config, weights, dtype, compare)
    stored = sum(p.nbytes for p in ours.parameters())
    dense = dense_weights(ours, getattr(torch, dtype), device)
    if compare.settings.device != "cpu":
        pack_for_kernels(ours, device)

    x = randn(batch * new, config.hidden_size, dtype=dtype, device=device)
    past = [
        randn(batch, end, config.num_key_value_heads, config.head_dim, dtype=dtype, device=device)
        for _ in range(2)
    ]
    table = inputs.block_table(batch, end, device)
    cache = inputs.paged(past[0], table), inputs.paged(past[1], table)
    tokens = Batch.build(
        table.tolist(), [start] * batch, [[0] * new] * batch, shapes.PAGE_SIZE, device
    )
    rope = ops.Rope(*inputs.rope_tables(config, device), tokens.positions)
    kv_read = 2 * x.itemsize * batch * end * config.num_key_value_heads * config.head_dim
    rows, attended = batch * new, batch * (new * start + new * (new + 1) // 2)
    products = sum(n * k for name, (n, k) in shapes.matrices(config).items() if name != "lm_head")
    width = config.num_attention_heads * config.head_dim
    what = "decode" if new == 1 else "prefill"
    compare(
        Case(
            f"layer, {what}" + ("" if weights == "dense" else f", {weights}"),
            dtype,
            f"batch {batch} new {new} context {end}",
            num_bytes=stored + kv_read + 2 * x.nbytes,
            flop=2 * rows * products + 4 * attended * width,
        ),
        ours=lambda: ours(x, rope, cache, tokens),
        **_in_pytorch(x, dense, rope, past, batch, start, compare),
        transformers=libraries.once(
            lambda: _in_transformers(config, x, dense, rope, past, batch, start)
        ),
    )


def _in_pytorch(
    x: Tensor, dense: dict[str, Tensor], rope: ops.Rope, past: list[Tensor], batch: int,
    start: int, compare: Comparison,
) -> dict[str, Callable[[], Tensor]]:  # fmt: skip
    names = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
    names |= {n: f"self_attn.{n}_proj" for n in "qkvo"} | {"down": "mlp.down_proj"}
    named = {short: dense[f"{name}.weight"] for short, name in names.items()}
    named["gate_up"] = torch.cat([dense[f"mlp.{n}_proj.weight"] for n in ("gate", "up")])
    assert rope.positions is not None
    cos, sin = inputs.eager_tables(rope, rope.positions, x.dtype)
    k_cache, v_cache = (t.transpose(1, 2).contiguous() for t in past)
    x = x.view(batch, -1, x.shape[1])

    def of(function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(x, named, cos, sin, k_cache, v_cache, start).flatten(0, 1)

    return {"eager": of(eager.layer), "compiled": of(compare.compiled(eager.layer))}


def _in_transformers(
    config: ModelConfig, x: Tensor, dense: dict[str, Tensor], rope: ops.Rope, past: list[Tensor],
    batch: int, start: int,
) -> Callable[[], Tensor]:  # fmt: skip
    """MistralDecoderLayer with its fused attention and a cache that is cut back after the call."""
    make = libraries.transformers_module("modeling_mistral", "MistralDecoderLayer")
    hf_config = libraries.transformers_module("configuration_mistral", "MistralConfig")
    from transformers import DynamicCache

    if x.device.type == "cpu" and type(dense["input_layernorm.weight"]) is not Tensor:
        raise NotAvailable("weights are not plain tensors")
    options: dict[str, Any] = config.to_hf()
    settings = hf_config(**options, attn_implementation="sdpa")
    with torch.device("meta"):
        layer = make(settings, layer_idx=0)
    layer = layer.eval().requires_grad_(False)
    layer.load_state_dict(dense, assign=True)
    assert rope.positions is not None
    cos, sin = (t.view(batch, -1, t.shape[1]) for t in
                inputs.eager_tables(rope, rope.positions, x.dtype))  # fmt: skip
    cache = DynamicCache()
    if start:
        cache.update(*(t[:, :start].transpose(1, 2).contiguous() for t in past), 0)
    x3 = x.view(batch, -1, x.shape[1])

    def call() -> Tensor:
        out = layer(x3, position_embeddings=(cos, sin), past_key_values=cache, use_cache=True)
        if start:
            cache.crop(start)
        else:
            cache.layers.clear()
        out = out[0] if isinstance(out, tuple) else out
        return out.flatten(0, 1)

    return call
