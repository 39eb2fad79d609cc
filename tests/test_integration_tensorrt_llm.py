"""examples/tensorrt_llm_model.py, imported and run on the CPU with stand-ins for TensorRT-LLM.

The stand-ins have the names, parameters and loading rules that were read in TensorRT-LLM's sources
(1.2 and main of autumn 2026). They show that the example is whole and computes Llama's layers; that
TensorRT-LLM runs it, they cannot show.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

Tensor = torch.Tensor
EXAMPLE = Path(__file__).parents[1] / "examples/tensorrt_llm_model.py"
registered: dict[str, type] = {}


def register_auto_model(name: str) -> Callable[[type], type]:
    def decorator(cls: type) -> type:
        registered[name] = cls
        return cls

    return decorator


class ModelConfig:
    """pretrained_config and mapping, as the example reads them."""

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def __init__(self, config: Any, tp_size: int = 1) -> None:
        self.pretrained_config = config
        self.mapping = types.SimpleNamespace(tp_size=tp_size)


class Attention(nn.Module):
    """A causal attention of one sequence, in PyTorch, over transformers' rotation."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        max_position_embeddings: int,
        bias: bool,
        pos_embd_params: Any = None,
        layer_idx: int | None = None,
        dtype: torch.dtype | None = None,
        config: Any = None,
    ) -> None:
        super().__init__()
        assert pos_embd_params.type == "neox" and not bias and layer_idx is not None
        d = config.pretrained_config.head_dim
        self.heads, self.d, self.theta = num_attention_heads, d, pos_embd_params.rope
        rows = (num_attention_heads + 2 * num_key_value_heads) * d
        self.qkv_proj = FusedRows(rows, hidden_size, dtype)
        self.o_proj = FusedRows(hidden_size, num_attention_heads * d, dtype)
        self.kv_heads = num_key_value_heads

    def forward(
        self, position_ids: Tensor, hidden_states: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> Tensor:
        from minitron_kernels import reference

        d, t = self.d, len(hidden_states)
        qkv = (hidden_states @ self.qkv_proj.weight.T).view(t, -1, d)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        angles = position_ids[:, None] / self.theta ** (torch.arange(0, d, 2) / d)
        q, k = (reference.rotate(x, angles.cos(), angles.sin()) for x in (q, k))
        return reference.attend(q, k, v)[0].flatten(1) @ self.o_proj.weight.T


class FusedRows(nn.Module):
    def __init__(self, rows: int, cols: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, cols, dtype=dtype))

    def load_weights(self, weights: list[dict[str, Tensor]]) -> None:
        self.weight.data.copy_(torch.cat([each["weight"] for each in weights]))


class Embedding(nn.Module):
    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        mapping: Any = None,
        tensor_parallel_mode: Any = None,
        gather_output: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids]


class DecoderModel(nn.Module):
    def __init__(self, model_config: ModelConfig) -> None:
        super().__init__()
        self.model_config = model_config


class DecoderModelForCausalLM(nn.Module):
    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def __init__(
        self, model: nn.Module, *, config: ModelConfig, hidden_size: int, vocab_size: int
    ) -> None:
        super().__init__()
        self.model = model
        self.lm_head = FusedRows(vocab_size, hidden_size, config.pretrained_config.torch_dtype)

    def forward(self, attn_metadata: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.model(
            attn_metadata=attn_metadata, input_ids=input_ids, position_ids=position_ids,
            inputs_embeds=None, spec_metadata=None, lora_params=None,
        )  # fmt: skip
        return x @ self.lm_head.weight.T

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """The rule of TensorRT-LLM's loader for modules that have parameters of their own."""
        fused = {
            "qkv_proj": ["q_proj", "k_proj", "v_proj"],
            "gate_up_proj": ["gate_proj", "up_proj"],
        }

        def below(prefix: str) -> dict[str, Tensor]:
            found = {k: v for k, v in weights.items() if k.startswith(f"{prefix}.")}
            return {k[len(prefix) + 1 :]: v for k, v in found.items()}

        for name, module in self.named_modules():
            if not module._parameters:
                continue
            parent, _, last = name.rpartition(".")
            if last in fused:
                module.load_weights([below(f"{parent}.{part}") for part in fused[last]])
            elif hasattr(module, "load_weights"):
                module.load_weights([below(name)])
            else:
                for key, parameter in module._parameters.items():
                    parameter.data.copy_(below(name)[key])


def stand_ins(is_main_branch: bool) -> dict[str, types.ModuleType]:
    backend = "attention.backends" if is_main_branch else "attention_backend"
    rope = types.SimpleNamespace(from_config=lambda c: c.rope_parameters["rope_theta"])
    contents: dict[str, dict[str, Any]] = {
        "": {},
        "_torch": {},
        "_torch.model_config": {"ModelConfig": ModelConfig},
        "_torch.models": {},
        "_torch.models.modeling_utils": {
            "DecoderModel": DecoderModel,
            "DecoderModelForCausalLM": DecoderModelForCausalLM,
            "register_auto_model": register_auto_model,
        },
        "_torch.modules": {},
        "_torch.modules.decoder_layer": {"DecoderLayer": nn.Module},
        "_torch.modules.embedding": {"Embedding": Embedding},
        "_torch.modules.linear": {"TensorParallelMode": types.SimpleNamespace(COLUMN="column")},
        "functional": {"PositionEmbeddingType": types.SimpleNamespace(rope_gpt_neox="neox")},
        f"_torch.{backend}": {"AttentionMetadata": object},
        f"_torch.{backend}.interface": {
            "PositionalEmbeddingParams": types.SimpleNamespace,
            "RopeParams": rope,
        },
    }
    if is_main_branch:
        contents |= {"_torch.attention": {}, "_torch.attention.attention": {"Attention": Attention}}
    else:
        contents["_torch.modules.attention"] = {"Attention": Attention}
    modules = {}
    for name, values in contents.items():
        full = f"tensorrt_llm.{name}".rstrip(".")
        modules[full] = types.ModuleType(full)
        modules[full].__path__ = []  # a package
        vars(modules[full]).update(values)
    return modules


@pytest.fixture(params=[False, True], ids=["1.2", "main"])
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    for name, module in stand_ins(request.param).items():
        monkeypatch.setitem(sys.modules, name, module)
    registered.clear()
    spec = importlib.util.spec_from_file_location("tensorrt_llm_model", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tensorrt_llm_model", module)
    spec.loader.exec_module(module)
    return module


def test_it_is_registered_for_the_models_architecture(example: types.ModuleType) -> None:
    assert registered == {"MistralForCausalLM": example.MinitronForCausalLM}


def test_logits_equal_transformers(
    example: types.ModuleType, make_hf_model: Callable[..., tuple[Any, Path]]
) -> None:
    hf, _ = make_hf_model("mistral")
    config = hf.config
    config.torch_dtype = torch.float32
    model = registered["MistralForCausalLM"](ModelConfig(config))
    model.load_weights(hf.state_dict())
    ids = torch.arange(3, 40)
    with torch.inference_mode():
        logits = model(object(), ids, torch.arange(len(ids)))
        expected = hf(ids[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():  # and the comparison can fail
        model.model.layers[1].mlp.gate_up_proj.weight[0] *= 2
        assert not torch.allclose(model(object(), ids, torch.arange(len(ids))), expected, atol=1e-4)


def test_it_refuses_to_be_split(
    example: types.ModuleType, make_hf_model: Callable[..., tuple[Any, Path]]
) -> None:
    config = make_hf_model("mistral")[0].config
    with pytest.raises(NotImplementedError, match="one GPU"):
        example.MinitronForCausalLM(ModelConfig(config, tp_size=2))


def test_it_calls_the_registered_ops(example: types.ModuleType) -> None:
    source = inspect.getsource(example)
    for name in ("rms_norm", "swiglu_mlp"):
        assert f"torch.ops.minitron_kernels.{name}(" in source
