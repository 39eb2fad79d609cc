"""PackedQuantizedTensor: made of blocks and turned into them again; a parameter like any other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minitron_kernels import ops
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.layers import Embedding, Linear, SwiGLUMLP
from minitron_kernels.quant_packing import (
    PackedQuantizedTensor,
    pack,
    packed_bytes,
    unpack,
    unpack_pair,
)
from minitron_kernels.quantized import QuantizedTensor
from tests.gguf_files import random_rows

TYPES = tuple(QUANT_TYPES)


def make(kind: str, rows: int = 8, cols: int = 512, seed: int = 0) -> QuantizedTensor:
    blocks = random_rows(kind, rows, cols, np.random.default_rng(seed))
    return QuantizedTensor(torch.from_numpy(blocks), kind, (rows, cols))


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(TYPES),
    rows=st.sampled_from((1, 7, 16, 33, 129)),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocks_come_back_bit_by_bit(kind: str, rows: int, blocks: int, seed: int) -> None:
    cols = blocks * QUANT_TYPES[kind].elements
    w = make(kind, rows, cols, seed)
    packed = pack(w)
    assert packed.shape == w.shape and packed.quant_type == kind
    assert packed.nbytes == packed.tiles.numel() == packed_bytes(kind, w.shape)
    assert torch.equal(unpack(packed), w)
    other = make(kind, rows, cols, seed + 1)
    gate, up = unpack_pair(pack(w, other))
    assert torch.equal(gate, w) and torch.equal(up, other)


@pytest.mark.parametrize("kind", TYPES)
def test_a_pair_is_the_matrix_of_rows_in_turn(kind: str) -> None:
    gate, up = make(kind, 9), make(kind, 9, seed=1)
    rows = torch.stack((gate.blocks, up.blocks), dim=1).flatten(0, 1)
    joined = QuantizedTensor(rows, kind, (18, 512))
    assert torch.equal(pack(gate, up), pack(joined))


def test_it_is_a_parameter_that_moves_and_is_copied() -> None:
    w = make("Q4_K")
    module = nn.Module()
    module.weight = nn.Parameter(pack(w), requires_grad=False)
    assert isinstance(module.weight, PackedQuantizedTensor)
    twin = copy.deepcopy(module).half().to("cpu")
    assert torch.equal(twin.weight, module.weight)
    assert twin.weight.tiles.data_ptr() != module.weight.tiles.data_ptr()
    twin.weight.copy_(pack(make("Q4_K", seed=3)))
    assert not torch.equal(twin.weight, module.weight)
    assert torch.equal(unpack(module.weight), w)
    assert module.to("meta").weight.is_meta
    text = repr(twin.weight)
    assert text == "Parameter of PackedQuantizedTensor(Q4_K, 8x512, 0.00 MiB, device='cpu')"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: torch.add(w, 1), TypeError, r"add.*does not take a PackedQuantizedTensor"),
        (lambda w: w[:2], TypeError, "slice.*does not take"),
        (lambda w: w.float(), TypeError, "cannot change its dtype"),
        (lambda w: w.data_ptr(), TypeError, r"tiles\.data_ptr"),
        (lambda w: w.copy_(pack(make("Q5_K"))), ValueError, r"Q5_K \[8, 512\] and Q4_K"),
        (lambda w: w.copy_(torch.zeros(8, 512)), TypeError, "expected a PackedQuantizedTensor"),
        (lambda w: pack(make("Q4_K"), make("Q4_K", 9)), ValueError, "must both be"),
        (lambda w: pack(make("Q4_K"), make("Q5_K")), ValueError, "of one type"),
        (lambda w: PackedQuantizedTensor(w.tiles[:-1], "Q4_K", (8, 512)), ValueError, "tiles must"),
        (lambda w: PackedQuantizedTensor(w.tiles, "Q5_K", (8, 512)), ValueError, "tiles must be"),
        (lambda w: PackedQuantizedTensor(w.tiles, "Q9_K", (8, 512)), ValueError, "type: got 'Q9_K"),
        (lambda w: PackedQuantizedTensor(w.tiles, "Q4_K", (8, 320)), ValueError, "rows of 320"),
        (lambda w: PackedQuantizedTensor(w.tiles.float(), "Q4_K", (8, 512)), TypeError, "uint8"),
    ],
)  # fmt: skip
def test_everything_else_is_an_error(
    call: Callable[[Any], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(pack(make("Q4_K")))


@pytest.mark.parametrize("make_it", [lambda w: w, pack], ids=["blocks", "tiles"])
def test_it_moves_in_inference_mode(make_it: Callable[[QuantizedTensor], Any]) -> None:
    w = make_it(make("Q4_K", 20, 512))
    with torch.inference_mode():
        assert w.to("cpu") is w and torch.equal(w.to("cpu", copy=True), w)
        moved = w.to("meta")
        with pytest.raises(TypeError, match="does not take a"):
            w.to("meta", torch.float32)
    assert moved.is_meta and type(moved) is type(w) and moved.shape == w.shape
    assert moved.quant_type == "Q4_K"


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("make_it", [lambda w: w, pack], ids=["blocks", "tiles"])
def test_views_in_inference_mode(make_it: Callable[[QuantizedTensor], Any], inside: bool) -> None:
    """Of tensors made outside of it, as a model's weights are, and inside."""
    with torch.inference_mode(inside):
        w = make_it(make("Q4_K", 20, 512))
    with torch.inference_mode():
        views = [w.detach(), torch.ops.aten.alias(w)]
        views += [w.clone()] + ([w[:]] if isinstance(w, QuantizedTensor) else [])
        for view in views:
            assert type(view) is type(w) and torch.equal(view, w)
    assert w.is_inference() == inside == views[0].is_inference()


def test_layers_compute_and_save_as_before() -> None:
    """Where no kernel reads tiles they are unpacked: the results have the same bits."""
    x, ids = torch.randn(3, 256, generator=torch.Generator().manual_seed(1)), torch.arange(5)
    for kinds in (("Q4_K", "Q4_K", "Q8_0"), ("Q6_K", "Q2_K", "Q5_1")):
        gate, up, down = kinds
        mlp = SwiGLUMLP(256, 64)
        for name, kind, shape in (
            ("gate_proj", gate, (64, 256)),
            ("up_proj", up, (64, 256)),
            ("down_proj", down, (256, 64)),
        ):
            getattr(mlp, name).weight = nn.Parameter(make(kind, *shape), requires_grad=False)
        expected, state = mlp(x), dict(mlp.state_dict())
        mlp.pack()
        mlp.down_proj.pack()
        assert (mlp.packed_weight is None) == (gate != up)
        assert torch.equal(mlp(x), expected)
        saved = mlp.state_dict()
        assert list(saved) == list(state)
        assert all(torch.equal(saved[name], state[name]) for name in state)
        for weight in mlp.parameters():
            weight.tiles.zero_()
        assert not mlp(x).any()
        mlp.load_state_dict(state)
        assert torch.equal(mlp(x), expected)
        with pytest.raises(RuntimeError, match=r"gate_proj|packed_weight|must both"):
            mlp.load_state_dict({**state, "gate_proj.weight": make("Q3_K", 64, 256)})

    linear, table = Linear(256, 40), Embedding(40, 256)
    for module in (linear, table):
        module.weight = nn.Parameter(make("Q6_K", 40, 256), requires_grad=False)
    expected_y, expected_rows = linear(x), table(ids, torch.bfloat16)
    linear.pack()
    table.pack()
    assert torch.equal(linear(x), expected_y)
    assert torch.equal(table(ids, torch.bfloat16), expected_rows)


def test_tiles_of_another_matrix_are_refused() -> None:
    w = pack(make("Q4_K", 8, 512))
    with pytest.raises(ValueError, match=r"no matrix of 8 rows of the last dimension of x \(2x256"):
        ops.linear(torch.zeros(2, 256), w)
