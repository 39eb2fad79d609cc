"""vLLM's own classes and engine with the plugin, on the CPU; skipped where vLLM is not installed.

docs/integrations.md tells with which version, and how to install it for this. Each run of the
engine takes half a minute of one core: those are marked slow.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import pickle
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed (docs/integrations.md)", allow_module_level=True)

from minitron_kernels import MinitronForCausalLM, reference
from minitron_kernels.integrations import vllm as integration
from minitron_kernels.integrations.vllm.matrices import Matrices, Part, columns_of
from minitron_kernels.quantized import QuantizedTensor
from tests.test_integration_vllm import ROOT, STEPS, Step, dense, quantized, randn
from tests.test_kernels_memory import assert_close, rope_scale
from tests.test_model_quantized import LAYERS, UNIFORM, write_model

Tensor = torch.Tensor


@pytest.fixture(scope="module")
def vllm_cpu() -> Iterator[None]:
    """This process is one of vLLM's CPU platform, with the plugin registered, twice."""
    import vllm.platforms

    from tests import vllm_cpu

    name = vllm_cpu.platform()
    module, _, cls = name.rpartition(".")
    vllm.platforms._current_platform = getattr(importlib.import_module(module), cls)()
    integration.register()
    integration.register()
    yield


def gguf_config() -> Any:
    from vllm.model_executor.layers.quantization import get_quantization_config

    return get_quantization_config("minitron_gguf").from_config({})


def vllm_config(**options: Any) -> Any:
    from vllm.config import CompilationConfig, DeviceConfig, VllmConfig

    compilation = CompilationConfig(mode=0, custom_ops=["all"])
    device = DeviceConfig(device="cpu")
    return VllmConfig(compilation_config=compilation, device_config=device, **options)


@pytest.fixture
def in_vllm(vllm_cpu: None) -> Iterator[Any]:
    from vllm.config import set_current_vllm_config

    config = vllm_config()
    with set_current_vllm_config(config):
        yield config


def test_everything_is_registered(vllm_cpu: None, caplog: pytest.LogCaptureFixture) -> None:
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER
    from vllm.model_executor.models import ModelRegistry
    from vllm.transformers_utils.config import get_config_parser
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    with caplog.at_level(logging.WARNING):
        integration.register()
    assert "minitron" not in caplog.text
    for name in ("RMSNorm", "SiluAndMul", "RotaryEmbedding", "Llama3RotaryEmbedding"):
        assert op_registry_oot[name].__module__ == f"{integration.__name__}.layers"
    backend = AttentionBackendEnum["MINITRON"].get_class()
    assert backend.get_name() == "MINITRON" and backend.__module__.startswith("minitron_kernels")
    config = get_quantization_config("minitron_gguf")
    assert config.from_config({}).get_name() == "minitron_gguf"
    assert "minitron_gguf" in _LOAD_FORMAT_TO_MODEL_LOADER
    assert type(get_config_parser("minitron_gguf")).__name__ == "MinitronGGUFConfigParser"
    assert "MinitronForCausalLM" in ModelRegistry.get_supported_archs()


def test_vllm_takes_the_commands_of_the_docs(vllm_cpu: None) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    page = (ROOT / "docs/integrations.md").read_text(encoding="utf-8")
    commands = re.findall(r"^vllm serve (\S+) (.+)$", page, re.M)
    assert len(commands) >= 4
    for model, options in commands:
        parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
        args = parser.parse_args(["--model", model, *shlex.split(options)])
        assert args.attention_backend == "MINITRON"
        assert ".gguf" not in model or args.load_format == args.config_format == "minitron_gguf"


def test_the_backend_can_be_sent_to_another_process(vllm_cpu: None) -> None:
    """Which unpickles it before it loads plugins."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    sent = pickle.dumps([AttentionBackendEnum["MINITRON"], AttentionBackendEnum.FLASH_ATTN])
    assert b"integrations.vllm.attention" not in sent
    assert pickle.loads(sent) == [
        AttentionBackendEnum["MINITRON"],
        AttentionBackendEnum.FLASH_ATTN,
    ]


def mismatches(function: Any, base: Any) -> list[str]:
    """What a caller of ``base`` may pass that ``function`` does not take."""
    own, wanted = inspect.signature(function).parameters, inspect.signature(base).parameters
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if any(p.kind in various for p in wanted.values()):  # vLLM's caller decides
        wanted = {n: p for n, p in wanted.items() if p.kind not in various and n in own}
    else:
        wanted = dict(wanted)
        for name, parameter in own.items():
            if name not in wanted and parameter.default is parameter.empty:
                return [f"{name} is not known to vLLM"]
    names = [n for n, p in own.items() if p.kind not in various]
    wrong = []
    for i, (name, parameter) in enumerate(wanted.items()):
        if names[i : i + 1] != [name]:
            wrong.append(f"parameter {i} is {names[i : i + 1]}, not {name}")
        elif parameter.default is not parameter.empty and own[name].default is parameter.empty:
            wrong.append(f"{name} has no default")
    return wrong


def test_signatures_are_those_of_the_base_classes(vllm_cpu: None) -> None:
    """Every method that overrides one of vLLM's takes what that takes; none is left abstract."""
    from minitron_kernels.integrations.vllm import attention, gguf, layers

    checked = []
    for module in (attention, gguf, layers):
        classes = [c for c in vars(module).values() if isinstance(c, type)]
        for cls in (c for c in classes if c.__module__ == module.__name__):
            assert not inspect.isabstract(cls), f"{cls}: {cls.__abstractmethods__}"
            bases = [b for b in cls.__mro__[1:] if b.__module__.startswith("vllm.")]
            for name in (n for n in vars(cls) if callable(getattr(cls, n))):
                base = next((b for b in bases if name in vars(b)), None)
                if base is None:
                    continue
                kinds = [type(vars(c)[name]) for c in (cls, base)]
                assert kinds[0] is kinds[1], f"{cls.__name__}.{name} is bound otherwise: {kinds}"
                wrong = mismatches(getattr(cls, name), getattr(base, name))
                assert not wrong, f"{cls.__name__}.{name}: {wrong}"
                checked.append(f"{cls.__name__}.{name}")
    assert {"MinitronAttentionImpl.forward", "MinitronRMSNorm.forward_cuda"} <= set(checked)
    assert len(checked) > 30


def test_a_wrong_signature_is_seen() -> None:
    """The check above can fail."""

    def base(a: int, b: int, c: int = 0) -> None: ...

    def reordered(b: int, a: int, c: int = 0) -> None: ...

    def strict(a: int, b: int, c: int) -> None: ...

    def more(a: int, b: int, c: int = 0, *, d: int) -> None: ...

    assert not mismatches(base, base)
    for wrong in (reordered, strict, more):
        assert mismatches(wrong, base)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"head_size": 64, "block_size": 128, "dtype": torch.float16}, None),
        ({"has_sliding_window": True}, None),
        ({"block_size": 48}, None),  # vLLM cuts such blocks into those of 16
        ({"kv_cache_dtype": "bfloat16"}, None),
        ({"block_size": 8}, "block_size"),
        ({"head_size": 96}, "head_size"),
        ({"dtype": torch.float32}, "dtype"),
        ({"kv_cache_dtype": "float16"}, "the cache must have the model's dtype"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"use_mla": True}, "MLA"),
        ({"has_sink": True}, "sinks"),
        ({"attn_type": "encoder_only"}, "attention type"),
        ({"use_non_causal": True}, "non-causal"),
        ({"use_batch_invariant": True}, "batch invariance"),
        ({"use_dcp": True}, "DCP"),
        ({"device_capability": (7, 5)}, "compute capability"),
    ],
    ids=str,
)
def test_vllm_asks_what_the_backend_can(
    vllm_cpu: None, changed: dict[str, Any], reason: str | None
) -> None:
    from vllm.platforms.interface import DeviceCapability

    from minitron_kernels.integrations.vllm.attention import MinitronAttentionBackend

    question: dict[str, Any] = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": (8, 0),
        "attn_type": "decoder",
    } | changed
    question["device_capability"] = DeviceCapability(*question["device_capability"])
    reasons = MinitronAttentionBackend.validate_configuration(**question)
    assert not reasons if reason is None else any(reason in each for each in reasons), reasons


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rms_norm_against_vllms(in_vllm: Any, dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.layernorm import RMSNorm

    norm = RMSNorm(192, eps=1e-5, dtype=dtype)
    assert type(norm).__name__ == "MinitronRMSNorm" and norm._forward_method == norm.forward_cpu
    norm.weight.data.copy_(1 + 0.2 * randn(192))
    x, residual = 3 * randn(7, 192, dtype=dtype), randn(7, 192, dtype=dtype, seed=1)
    weight = norm.weight.data.double()
    exact = reference.rms_norm(x.double(), weight, 1e-5)
    assert_close(norm(x), exact, norm.forward_native(x), "normalised")
    _, native_sum = norm.forward_native(x.clone(), residual.clone())
    mine = residual.clone()
    out, total = norm(x, mine)
    assert total is mine and torch.equal(total, native_sum)
    exact = reference.rms_norm(total.double(), weight, 1e-5)
    rounded = norm.forward_native(total)  # vLLM normalises the sum before it is rounded
    assert_close(out, exact, rounded, "normalised sum")
    unlike = RMSNorm(192, eps=1e-5, var_hidden_size=64, dtype=dtype)  # left to vLLM
    assert torch.equal(unlike(x), unlike.forward_native(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_silu_and_mul_against_vllms(in_vllm: Any, dtype: torch.dtype) -> None:
    from vllm.model_executor.layers.activation import SiluAndMul

    layer = SiluAndMul()
    assert type(layer).__name__ == "MinitronSiluAndMul"
    x = 3 * randn(3, 5, 128, dtype=dtype)
    assert_close(layer(x), reference.silu_and_mul(x.double()), layer.forward_native(x), "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("llama3", [False, True])
@pytest.mark.parametrize("rotary_dim", [64, 32])
def test_rotary_embedding_against_vllms(
    in_vllm: Any, dtype: torch.dtype, neox: bool, llama3: bool, rotary_dim: int
) -> None:
    from vllm.model_executor.layers.rotary_embedding import (
        Llama3RotaryEmbedding,
        RotaryEmbedding,
    )

    sizes = (64, rotary_dim, 128, 1e4, neox, dtype)
    layer = Llama3RotaryEmbedding(*sizes, 8.0, 1.0, 4.0, 64) if llama3 else RotaryEmbedding(*sizes)
    assert type(layer).__name__.startswith("Minitron")
    qkv = randn(9, (4 + 2 + 2) * 64, dtype=dtype)
    q, k, _ = qkv.split((256, 128, 128), dim=-1)  # views, as in vLLM's models
    positions = torch.tensor([0, 1, 2, 3, 100, 101, 7, 127, 5])
    before = qkv.clone()
    got = layer(positions, q, k)
    assert torch.equal(qkv, before)
    native = layer.forward_native(positions, q, k)
    cos, sin = layer.cos_sin_cache.double()[positions].chunk(2, dim=-1)
    for mine, theirs, x in zip(got, native, (q, k), strict=True):
        heads = x.reshape(9, -1, 64).double()
        exact = reference.rotate(heads, cos, sin, not neox).view(mine.shape)
        terms = rope_scale(heads, cos, sin, not neox).view(mine.shape)
        assert_close(mine, exact, theirs, "rotated", terms)
    only_q, nothing = layer(positions, q)
    assert nothing is None and torch.equal(only_q, got[0])


def test_layers_are_compiled_whole(in_vllm: Any) -> None:
    """As vLLM compiles its models: one graph of plain tensors, in which the kernels are calls."""
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    norm, activation = RMSNorm(256), SiluAndMul()
    rope = RotaryEmbedding(64, 64, 128, 1e4, True, torch.float32)
    parts = [Part(quantized(kind, 256, 256)) for kind in ("Q4_K", "Q6_K")]
    merged, cut = (
        Matrices(each, torch.float32, torch.device("cpu"))
        for each in (parts, [columns_of(quantized("Q6_K", 64, 256), 128, 128)])
    )

    def block(x: Tensor, residual: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        x, residual = norm(x, residual)
        q, k = rope(positions, activation(merged(x)), x)
        return q, k, residual, cut(norm(q)[:, :128])

    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        assert not any(type(t) is QuantizedTensor for t in inputs)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (5, 9):
        x, residual, positions = (
            randn(tokens, 256),
            randn(tokens, 256, seed=3),
            torch.arange(tokens),
        )
        with torch.no_grad():
            expected = block(x, residual.clone(), positions)
            actual = compiled(x, residual.clone(), positions)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    calls = [str(n.target) for n in graphs[-1].graph.nodes if n.op == "call_function"]
    for name in ("rms_norm", "add_rms_norm", "linear_quant", "silu_and_mul", "apply_rope"):
        assert f"minitron_kernels.{name}.default" in calls


def common_metadata(step: Step, **changed: Any) -> Any:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    fields: dict[str, Any] = {
        "query_start_loc": step.starts,
        "query_start_loc_cpu": step.starts,
        "seq_lens": step.seq_lens,
        "num_reqs": len(step.counts),
        "num_actual_tokens": sum(step.counts),
        "max_query_len": max(step.counts),
        "max_seq_len": max(step.total),
        "block_table_tensor": step.table,
        "slot_mapping": step.slots,
    }
    return CommonAttentionMetadata(**fields | changed)


@pytest.mark.parametrize("layout", ["LBHNC", "BLNHC"])
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_vllms_attention_layer(vllm_cpu: None, case: Any, layout: str) -> None:
    """Its Attention module and its custom ops, with our backend's builder and implementation."""
    from vllm.config import AttentionConfig, set_current_vllm_config
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.attention import Attention

    total, counts, heads, head_size, block, window = case
    step = Step(total, counts, heads, head_size, block, torch.float32, layout)
    config = vllm_config(attention_config=AttentionConfig(backend="MINITRON"))
    with set_current_vllm_config(config):
        layer = Attention(
            heads[0], head_size, 0.11, heads[1], per_layer_sliding_window=window, prefix="one"
        )
        backend = layer.get_attn_backend()
        config.cache_config.block_size = block
        config.model_config = types.SimpleNamespace(get_num_attention_heads=lambda _: heads[0])
        spec = types.SimpleNamespace(block_size=block, num_kv_heads=heads[1], head_size=head_size)
        builder = backend.get_builder_cls()(spec, ["one"], config, torch.device("cpu"))
        batch = builder.build(0, common_metadata(step))
        layer.kv_cache = step.cache.clone()
        config.model_config = None
        slots = {"one": step.slots}
        with set_forward_context({"one": batch}, config, num_tokens=9, slot_mapping=slots):
            out = layer(*(t[:-1].flatten(1) for t in (step.q, step.new_k, step.new_v)))
    output = torch.cat((out.view(-1, heads[0], head_size), torch.full_like(step.q[-1:], 7.0)))
    step.check(layer.kv_cache, output, window)
    other = builder.update_block_table(batch, step.table.flip(0), step.slots)
    assert torch.equal(other.block_table, step.table.flip(0)) and other.seq_lens is batch.seq_lens
    with pytest.raises(NotImplementedError, match="causal"):
        builder.build(0, common_metadata(step, causal=False))


@pytest.mark.parametrize(
    "argument",
    [
        {"alibi_slopes": [0.5, 0.25]},
        {"logits_soft_cap": 30.0},
        {"attn_type": "encoder_only"},
        {"kv_cache_dtype": "fp8"},
    ],
    ids=lambda a: next(iter(a)),
)
def test_the_implementation_refuses(in_vllm: Any, argument: dict[str, Any]) -> None:
    from minitron_kernels.integrations.vllm.attention import MinitronAttentionImpl

    with pytest.raises(NotImplementedError, match="MINITRON"):
        MinitronAttentionImpl(2, 64, 0.125, 2, **argument)


# ------------------------------------------------------------------- GGUF matrices in vLLM's layers


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """vLLM's layers that are made now are those of this rank of two."""
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    for module in (linear, vocab_parallel_embedding):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 2)


def load(layer: Any, weights: dict[Any, Tensor]) -> Any:
    """As vLLM's loader does: each matrix with its shard, then what follows on loading."""
    for shard, weight in weights.items():
        arguments = (weight,) if shard is None else (weight, shard)
        layer.weight.weight_loader(layer.weight, *arguments)
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def product(x: Tensor, *weights: Tensor) -> Tensor:
    return x.double() @ torch.cat([dense(w) for w in weights]).double().T


def close(actual: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["split heads of K", "one head of K for both"])
def test_two_ranks_split_qkv_by_heads(
    in_vllm: Any, monkeypatch: pytest.MonkeyPatch, kv_heads: int
) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    rows = kv_heads * 64
    q, k, v = (
        quantized("Q4_K", 256, 256),
        quantized("Q4_K", rows, 256),
        quantized("Q6_K", rows, 256),
    )
    x = randn(5, 256)
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        layer = QKVParallelLinear(256, 64, 4, kv_heads, bias=False, quant_config=gguf_config())
        load(layer, {"q": q, "k": k, "v": v})
        own = slice(rank * 64, rank * 64 + 64) if kv_heads == 2 else slice(0, 64)
        close(layer(x)[0], product(x, q[rank * 128 : rank * 128 + 128], k[own], v[own]))


def test_two_ranks_split_the_mlp(in_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """768 columns in two cut through a block of 256."""
    from vllm.model_executor.layers.linear import (
        MergedColumnParallelLinear,
        RowParallelLinear,
    )

    gate, up = quantized("Q4_K", 768, 256), quantized("Q5_0", 768, 256)
    down = quantized("Q6_K", 256, 768)
    x, hidden = randn(5, 256), randn(5, 768)
    total = torch.zeros(5, 256)
    for rank in (0, 1):
        as_rank(monkeypatch, rank)
        own = slice(rank * 384, rank * 384 + 384)
        options = {"bias": False, "quant_config": gguf_config()}
        merged = MergedColumnParallelLinear(256, [768, 768], **options)
        close(load(merged, {0: gate, 1: up})(x)[0], product(x, gate[own], up[own]))
        last = RowParallelLinear(768, 256, reduce_results=False, **options)
        total += load(last, {None: down})(hidden[:, own])[0]
    close(total, product(hidden, down))


def test_two_ranks_split_the_vocabulary(in_vllm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 331 tokens, padded to 384; the LM head is tied."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    table, x = quantized("Q6_K", 331, 256), randn(3, 256)
    for rank, count in ((0, 192), (1, 139)):
        as_rank(monkeypatch, rank)
        embedding = VocabParallelEmbedding(331, 256, quant_config=gguf_config())
        head = ParallelLMHead(331, 256, quant_config=gguf_config()).tie_weights(embedding)
        load(embedding, {None: table})
        head.quant_method.process_weights_after_loading(head)
        assert head.matrices is embedding.matrices
        own = dense(table)[rank * 192 :][:count]
        found = embedding.quant_method.embedding(embedding, torch.tensor([[0, count - 1, 191]]))
        last = own[191] if rank == 0 else torch.zeros(256)
        assert torch.equal(found[0], torch.stack((own[0], own[count - 1], last)))
        logits = head.quant_method.apply(head, x)
        close(logits[:, :count], x.double() @ own.double().T)
        assert not logits[:, count:].any()


def test_a_matrix_that_was_not_loaded_is_named(in_vllm: Any) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    options = {"bias": False, "quant_config": gguf_config(), "disable_tp": True}
    layer = MergedColumnParallelLinear(256, [64, 64], prefix="layers.3.mlp", **options)
    with pytest.raises(ValueError, match=r"layers.3.mlp: matrices \[1\] of 2 were not loaded"):
        load(layer, {0: quantized("Q4_K", 64, 256)})
    with pytest.raises(NotImplementedError, match="merged matrix"):
        layer.weight.weight_loader(layer.weight, quantized("Q4_K", 128, 256))


# -------------------------------------------------------------------------------- vLLM's engine

PROMPTS = [list(range(3, 40)), list(range(50, 61)), [7, 9] * 30, [1]]
ENGINES = {
    "one batch": {},
    # Chunks of prompts run beside single tokens of others; blocks of equal prefixes are shared.
    "chunked": {"max_num_batched_tokens": 24, "max_num_seqs": 3, "block_size": 32},
    "vLLM's own layers": {"compilation_config": {"custom_ops": ["none"]}},
    "two ranks": {"tensor_parallel_size": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("tied", [False, True], ids=["mixed", "tied"])
def test_the_engine_gives_our_tokens(tmp_path: Path, engine: str, tied: bool) -> None:
    """LLM.generate of a GGUF file of mixed types, against the thin model on the same file."""
    from tests import vllm_cpu

    kinds = (UNIFORM, "Q4_K", None) if tied else (LAYERS, "Q6_K", "Q5_0")
    path = write_model(tmp_path / "m.gguf", *kinds)
    vllm_cpu.write_plugins(tmp_path)
    to = tmp_path / "ids.json"
    request = {
        "model": str(path), "prompts": PROMPTS, "max_tokens": 12, "engine": ENGINES[engine],
        "to": str(to),
    }  # fmt: skip
    finished = subprocess.run(
        [sys.executable, "-m", "tests.vllm_cpu", json.dumps(request)],
        cwd=ROOT,
        env=vllm_cpu.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    tokens = json.loads(to.read_text(encoding="utf-8"))
    model = MinitronForCausalLM.from_pretrained(path, dtype="float32", device="cpu")
    for ids, got in zip(PROMPTS, tokens, strict=True):
        expected = model.generate(torch.tensor([ids]), max_new_tokens=12)
        assert got == expected[0, len(ids) :].tolist()
