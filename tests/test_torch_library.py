"""The ops as torch sees them: schemas, fake kernels, compilation in one graph of dynamic shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minitron_kernels import ops
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.layers import RMSNorm, SwiGLUMLP
from minitron_kernels.quantized import QuantizedTensor
from tests.gguf_files import random_rows

Tensor = torch.Tensor
HEADS, KV_HEADS, D, HIDDEN, PAGE = 4, 2, 64, 48, 16


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def table() -> tuple[Tensor, Tensor]:
    angles = torch.arange(64)[:, None] / 1e4 ** (torch.arange(D // 2) * 2 / D)
    return angles.cos(), angles.sin()


def caches() -> tuple[Tensor, Tensor]:
    return randn(8, PAGE, KV_HEADS, D), randn(8, PAGE, KV_HEADS, D)


def blocks(kind: str, rows: int, cols: int) -> Tensor:
    """The stored bytes of a random quantised matrix."""
    return torch.from_numpy(random_rows(kind, rows, cols, np.random.default_rng(rows)))


def matrix(w: Tensor, kind: str) -> QuantizedTensor:
    block = QUANT_TYPES[kind]
    return QuantizedTensor(w, kind, (w.shape[0], w.shape[1] // block.nbytes * block.elements))


def arguments(t: int) -> dict[str, tuple[Any, ...]]:
    """Arguments of every registered op, for t tokens; an op in two forms has a second name."""
    cos, sin = table()
    positions, x = torch.arange(t), randn(t, HIDDEN)
    gate, up, down = randn(40, HIDDEN), randn(40, HIDDEN), randn(HIDDEN, 40)
    q, k, v = randn(t, HEADS, D), randn(t, KV_HEADS, D), randn(t, KV_HEADS, D)
    cu = torch.tensor([0, 1, t], dtype=torch.int32)
    rope = (cos, sin, positions, False)
    paged = (
        torch.tensor([[3, 1], [5, 0]], dtype=torch.int32),
        torch.tensor([4, 2], dtype=torch.int32),
    )
    wq, wk, wv = randn(HEADS * D, HIDDEN), randn(KV_HEADS * D, HIDDEN), randn(KV_HEADS * D, HIDDEN)
    weight = randn(HIDDEN)
    wide, kinds = randn(t, 256), ["Q4_0", "Q8_0", "Q3_K"]
    matrices = [
        blocks(kind, rows * D, 256)
        for kind, rows in zip(kinds, (HEADS, KV_HEADS, KV_HEADS), strict=True)
    ]
    fp8 = (
        *(m.to(torch.float8_e4m3fn) for m in (wide, randn(40, 256))), randn(t, 2), randn(1, 2),
    )  # fmt: skip
    packed_qkv = ops.pack_qkv(wq, wk, wv, D).weight
    packed_gate_up = ops.pack_gate_up(gate, up).weight
    return {
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, randn(t, HIDDEN), weight, 1e-5),
        "apply_rope": (q, k, cos, sin, positions, False),
        "silu_and_mul": (randn(t, 2 * HIDDEN),),
        "linear": (x, gate, randn(t, 40), weight, 1e-5, None),
        "linear logits": (x.bfloat16(), gate.bfloat16(), None, None, 0.0, torch.float32),
        "swiglu_mlp": (x, gate, up, down, weight, 1e-5, x),
        "swiglu_mlp packed": (x, packed_gate_up, None, down, weight, 1e-5, x),
        "swiglu_mlp sums": (
            *(each.bfloat16() for each in (x, gate, up, down)), None, 0.0, None, torch.float32,
        ),
        "attention": (q, k, v, cu, cu, t, True, None, None, cos, sin, False, True),
        "attention_fp8": (
            *(each.to(torch.float8_e4m3fn) for each in (q, k, v)), cu, cu, None, randn(KV_HEADS),
            randn(2, KV_HEADS), torch.float16, t, True, None, None, True,
        ),
        "rope_append": (k, v, *rope, *caches(), positions),
        "append_kv": (k, v, *caches(), positions),
        "qkv_rope_append": (x, weight, 1e-5, wq, wk, wv, *rope, *caches(), positions),
        "qkv_rope_append packed": (
            x, weight, 1e-5, packed_qkv, None, None, *rope, *caches(), positions,
        ),
        "attention_kvcache": (
            q, k, v, *caches(), *paged, cu, t, 0, cos, sin, None, False, True, None, None, False,
        ),
        "embedding": (torch.arange(t), randn(70, HIDDEN)),
        "linear_quant": (
            wide, blocks("Q4_K", 40, 256), "Q4_K", 40, randn(t, 40), wide[0].clone(), 1e-5, None,
        ),
        "linear_swiglu_quant": (
            wide, blocks("Q5_0", 40, 256), "Q5_0", blocks("Q2_K", 40, 256), "Q2_K", 40, None, 0.0,
        ),
        "qkv_rope_append_quant": (
            wide, None, 0.0, matrices, kinds, [len(w) for w in matrices], *rope, *caches(),
            positions,
        ),
        "embedding_quant": (
            torch.arange(t), blocks("Q6_K", 70, 256), "Q6_K", 70, 256, torch.bfloat16,
        ),
        "quantize_fp8_blocks": (wide,),
        "quantize_fp8": (wide, torch.tensor([0.01])),
        "linear_fp8": (*fp8, randn(t, 40).bfloat16(), torch.bfloat16),
        "linear_fp8_swiglu": (*fp8, torch.float16),
    }  # fmt: skip


NAMES = list(arguments(2))


def test_every_registered_op_is_tested() -> None:
    registered = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("minitron_kernels::")
    }
    assert registered == {name.partition(" ")[0] for name in NAMES}


@pytest.mark.parametrize("name", [n for n in NAMES if n != "embedding_quant"])  # no floats
def test_a_backward_pass_says_that_there_is_none(name: str) -> None:
    args = arguments(2)[name]
    next(a for a in args if isinstance(a, Tensor) and a.is_floating_point()).requires_grad_()
    result = public(name)(*args)
    outputs = result if isinstance(result, tuple) else (result,)
    op = getattr(torch.ops.minitron_kernels, name.partition(" ")[0]).default
    if not op._schema.is_mutable:
        for y in outputs if name != "quantize_fp8" else outputs[:1]:  # the other is an argument
            with pytest.raises(NotImplementedError, match=r"no backward pass.*torch\.no_grad"):
                y.backward(torch.ones_like(y), retain_graph=True)
    elif result is not None:
        with pytest.warns(UserWarning, match="autograd kernel was not registered"):
            outputs[0].backward(torch.ones_like(outputs[0]))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.minitron_kernels, name.partition(" ")[0]).default
    args = arguments(9)[name]
    checks: dict[str, Any] = {}
    if any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in args):
        # Whether arguments are left as they were is asked by allclose, which has no float8.
        every = torch.testing._internal.optests.generate_tests.DEFAULT_TEST_UTILS
        checks["test_utils"] = [check for check in every if check != "test_schema"]
    torch.library.opcheck(op, args, **checks)


def public(name: str) -> Callable[..., Any]:
    """The function a user calls, over the registered op's arguments."""
    pack: dict[str, Callable[..., Any]] = {
        "linear": lambda x, w, r, weight, eps, _: ops.linear(x, w, r, norm=(weight, eps)),
        "linear logits": lambda x, w, *_: ops.linear(x, w, out_dtype=torch.float32),
        "swiglu_mlp": lambda x, g, u, d, w, eps, r: ops.swiglu_mlp(x, (g, u), d, (w, eps), r),
        "swiglu_mlp packed": lambda x, g, u, d, w, eps, r: ops.swiglu_mlp(
            x, ops.PackedGateUp(g), d, (w, eps), r
        ),
        "swiglu_mlp sums": lambda x, g, u, d, *_: ops.swiglu_mlp(
            x, (g, u), d, out_dtype=torch.float32
        ),
        "attention": lambda q, k, v, a, b, n, causal, scale, window, c, s, i, lse: ops.attention(
            q, k, v, a, b, max_seqlen_q=n, rope=ops.Rope(c, s, None, i), return_lse=lse
        ),
        "rope_append": lambda k, v, c, s, p, i, kc, vc, slots: ops.rope_append(
            k, v, ops.Rope(c, s, p, i), (kc, vc), slots
        ),
        "qkv_rope_append": lambda x, w, eps, wq, wk, wv, c, s, p, i, kc, vc, slots: (
            ops.qkv_rope_append(
                x, ops.Norm(w, eps), (wq, wk, wv), ops.Rope(c, s, p, i), (kc, vc), slots
            )
        ),
        "qkv_rope_append packed": lambda x, w, eps, packed, _, __, c, s, p, i, kc, vc, slots: (
            ops.qkv_rope_append(
                x,
                ops.Norm(w, eps),
                ops.PackedQKV(packed, HEADS, KV_HEADS, D, D),
                ops.Rope(c, s, p, i),
                (kc, vc),
                slots,
            )
        ),
        "attention_kvcache": lambda q, k, v, kc, vc, bt, n, cu, m, _, c, s, *__: (
            ops.attention_kvcache(
                q, k, v, kc, vc, bt, n, ops.Rope(c, s), cu_seqlens_q=cu, max_seqlen_q=m
            )
        ),
        "linear_quant": lambda x, w, kind, _, r, weight, eps, __: ops.linear(
            x, matrix(w, kind), r, norm=(weight, eps)
        ),
        "linear_swiglu_quant": lambda x, g, g_kind, u, u_kind, *_: ops.swiglu_mlp(
            x, (matrix(g, g_kind), matrix(u, u_kind)), torch.ones(3, 40)
        ),
        "qkv_rope_append_quant": lambda x, w, eps, all_w, kinds, _, c, s, p, i, kc, vc, slots: (
            ops.qkv_rope_append(
                x,
                None,
                tuple(map(matrix, all_w, kinds)),
                ops.Rope(c, s, p, i),
                (kc, vc),
                slots,
            )
        ),
        "embedding_quant": lambda ids, table, kind, _, __, dtype: ops.embedding(
            ids, matrix(table, kind), dtype
        ),
        "quantize_fp8_blocks": lambda x: ops.quantize_fp8(x, 128),
        "quantize_fp8": lambda x, scale: ops.quantize_fp8(x, scale=scale),
        "attention_fp8": lambda q, k, v, a, b, _, k_descale, v_descale, dtype, n, *__: (
            ops.attention_fp8(
                q,
                k,
                v,
                a,
                b,
                k_descale=k_descale,
                v_descale=v_descale,
                out_dtype=dtype,
                max_seqlen_q=n,
                return_lse=True,
            )
        ),
    }
    return pack.get(name) or getattr(ops, name)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_with_dynamic_shapes(name: str) -> None:
    function = public(name)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    compiled_once = 0
    for tokens in (9, 14, 5):
        eager_args, compiled_args = arguments(tokens)[name], arguments(tokens)[name]
        expected, actual = function(*eager_args), compiled(*compiled_args)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        for a, b in zip(compiled_args, eager_args, strict=True):  # and what is written in place
            if isinstance(a, Tensor):
                assert torch.equal(a, b)
        # (dynamo hands over a graph twice when it has a float argument)
        compiled_once = compiled_once or len(graphs)
        assert len(graphs) == compiled_once, f"recompiled for {tokens} tokens"
    nodes = [str(n.target) for n in graphs[-1].graph.nodes if n.op == "call_function"]
    assert f"minitron_kernels.{name.partition(' ')[0]}.default" in nodes


def test_layers_compile_with_inductor() -> None:
    norm, mlp = RMSNorm(HIDDEN, 1e-5), SwiGLUMLP(HIDDEN, 40)
    for i, parameter in enumerate(mlp.parameters()):
        parameter.data = randn(*parameter.shape) / (i + 4)
    norm.requires_grad_(False)
    mlp.requires_grad_(False)

    def block(x: Tensor) -> Tensor:
        return mlp(2 * x, norm.as_norm(), residual=x) + norm(x)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for tokens in (3, 8):
        x = randn(2, tokens, HIDDEN)
        torch.testing.assert_close(compiled(x), block(x))


def test_layers_equal_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=40, num_attention_heads=4)
    theirs = torch.nn.ModuleDict({"norm": LlamaRMSNorm(HIDDEN, 1e-5), "mlp": LlamaMLP(config)})
    ours = torch.nn.ModuleDict({"norm": RMSNorm(HIDDEN, 1e-5), "mlp": SwiGLUMLP(HIDDEN, 40)})
    theirs["norm"].weight.data = randn(HIDDEN)
    ours.load_state_dict(theirs.state_dict())
    x = randn(2, 5, HIDDEN)
    with torch.no_grad():
        # The mean is exact here, and an fp32 sum there: a unit in the last place of the scale.
        torch.testing.assert_close(ours["norm"](x), theirs["norm"](x), rtol=3e-7, atol=0)
        torch.testing.assert_close(ours["mlp"](x), theirs["mlp"](x), rtol=1e-5, atol=1e-6)
