"""The ops on quantised weights, and on mixtures with dense ones, against the dense ops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minitron_kernels import ops, quantized_ops, torch_ops
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.quantized import QuantizedTensor
from tests.test_model_quantized import model_rows

Tensor = torch.Tensor
TYPES = tuple(QUANT_TYPES)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(kind: str, rows: int, cols: int, seed: int = 0) -> QuantizedTensor:
    blocks = model_rows(kind, rows, cols, np.random.default_rng(seed))
    return QuantizedTensor(torch.from_numpy(blocks), kind, (rows, cols))


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_close(actual: Tensor, expected: Tensor, magnitude: Tensor) -> None:
    """To fp32 sums of ``magnitude`` = sum |w| |x|, and one rounding to the output's type.

    Elementwise: sums cancel, so that their own size says nothing.
    """
    assert actual.shape == expected.shape
    unit = torch.finfo(actual.dtype).eps
    error = (actual.double() - expected).abs()
    limit = 2.0**-17 * magnitude + unit * expected.abs() + 1e-30
    assert (error <= limit).all(), f"{(error / limit).max():.2f} of what is allowed"


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(kind: str, dtype: torch.dtype) -> None:
    w, cols = make(kind, 37, 512), 512
    dense = w.dequantize().double()
    weight = randn(cols, dtype=dtype)
    for shape in ((512,), (1, 512), (2, 3, 512), (0, 512)):
        x = randn(*shape, dtype=dtype)
        y, size = x.double() @ dense.T, x.double().abs() @ dense.T.abs()
        assert_close(ops.linear(x, w), y, size)
        residual = randn(*shape[:-1], 37, dtype=dtype)
        assert_close(ops.linear(x, w, residual), y + residual.double(), size + residual.abs())
        wide = ops.linear(x, w, out_dtype=torch.float32)
        assert wide.dtype == torch.float32
        assert_close(wide, y, size)
        normed = ops.rms_norm(x, weight, 1e-5)
        assert torch.equal(ops.linear(x, w, norm=ops.Norm(weight, 1e-5)), ops.linear(normed, w))
    strided = randn(5, 1024, dtype=dtype)[:, ::2]
    assert torch.equal(ops.linear(strided, w), ops.linear(strided.contiguous(), w))


@pytest.mark.parametrize("kind", TYPES)
def test_what_no_kernel_serves_is_decoded(kind: str) -> None:
    """PyTorch's way, of float32 tensors on a GPU, gives what the CPU's products give."""
    w, up, x, add = make(kind, 37, 512), make("Q4_K", 37, 512, 1), randn(3, 512), randn(3, 37)
    for extra, other in ((add, None), (None, (up.blocks, "Q4_K")), (None, None)):
        y = torch_ops.decoded_matmul(x, w.blocks, kind, extra, other)
        expected = torch_ops.matmul_quant(x, w.blocks, kind, add=extra, swiglu_up=other)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_planted_fault_is_seen() -> None:
    w, x = make("Q4_K", 8, 512), randn(2, 512)
    dense = w.dequantize().double()
    y, size = x.double() @ dense.T, x.double().abs() @ dense.T.abs()
    w.blocks[3, 70] ^= 1  # the lowest bit of one weight
    with pytest.raises(AssertionError, match="of what is allowed"):
        assert_close(ops.linear(x, w), y, size)


MIXES = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize("quantised", MIXES)
def test_swiglu_takes_any_mixture(quantised: tuple[bool, bool, bool]) -> None:
    stored = make("Q4_1", 96, 64), make("Q5_0", 96, 64, 1), make("Q8_0", 64, 96, 2)
    dense = [w.dequantize() for w in stored]
    gate, up, down = (a if q else b for a, b, q in zip(stored, dense, quantised, strict=True))
    x, residual, norm = randn(3, 64), randn(3, 64), ops.Norm(randn(64), 1e-5)
    expected = ops.swiglu_mlp(x, (dense[0], dense[1]), dense[2], norm, residual)
    actual = ops.swiglu_mlp(x, (gate, up), down, norm, residual)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    if not (quantised[0] or quantised[1]):
        packed = ops.pack_gate_up(dense[0], dense[1])
        actual = ops.swiglu_mlp(x, packed, down, norm, residual)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_swiglu_takes_gate_and_up_in_one_matrix() -> None:
    w, down, x = make("Q6_K", 192, 256), make("Q4_0", 256, 96), randn(3, 256)
    assert torch.equal(ops.swiglu_mlp(x, w, down), ops.swiglu_mlp(x, (w[:96], w[96:]), down))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("quantised", MIXES)
def test_qkv_takes_any_mixture(quantised: tuple[bool, bool, bool], interleaved: bool) -> None:
    stored = make("Q4_K", 256, 256), make("Q6_K", 128, 256, 1), make("Q5_1", 128, 256, 2)
    dense = [w.dequantize() for w in stored]
    wq, wk, wv = (a if q else b for a, b, q in zip(stored, dense, quantised, strict=True))
    angles = torch.arange(64)[:, None] / 1e4 ** (torch.arange(32) / 32)
    positions = torch.tensor([3, 9, 0, 40])
    rope = ops.Rope(angles.cos(), angles.sin(), positions, interleaved)
    slots = torch.tensor([5, 17, -1, 2])
    x, norm = randn(4, 256), ops.Norm(randn(256), 1e-5)
    got, expected = ([torch.zeros(2, 16, 2, 64) for _ in range(2)] for _ in range(2))
    q = ops.qkv_rope_append(x, norm, (wq, wk, wv), rope, (got[0], got[1]), slots)
    q0 = ops.qkv_rope_append(
        x, norm, (dense[0], dense[1], dense[2]), rope, (expected[0], expected[1]), slots
    )
    for a, b in ((q, q0), (got[0], expected[0]), (got[1], expected[1])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_is_the_decoded_rows(kind: str, dtype: torch.dtype) -> None:
    table = make(kind, 50, 256)
    dense = table.dequantize(dtype)
    for ids in (torch.tensor([3, 49, 0, 3]), torch.tensor([[7], [8]], dtype=torch.int32)):
        rows = ops.embedding(ids, table, dtype)
        assert rows.dtype == dtype and torch.equal(rows, dense[ids])
    assert ops.embedding(torch.tensor([], dtype=torch.int64), table, dtype).shape == (0, 256)


def int8(x: Tensor) -> Tensor:
    """Each 32 elements of a row rounded to multiples of 1/127 of their largest."""
    blocks = x.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    return (blocks * (127 / largest)).round().mul(largest / 127).flatten(-2)


def test_int8_activations_round_x_alone() -> None:
    """linear, swiglu_mlp and qkv_rope_append with the option are those of rounded x, without."""
    x, w = randn(5, 256), make("Q6_K", 40, 256)
    residual, norm = randn(5, 40), ops.Norm(randn(256), 1e-5)
    close = {"rtol": 1e-5, "atol": 2e-5}
    normed = ops.rms_norm(x, *norm)
    y = ops.linear(x, w, residual, norm=norm, int8_activations=True)
    torch.testing.assert_close(y, ops.linear(int8(normed), w, residual), **close)
    assert (y - ops.linear(normed, w, residual)).abs().max() > 1e-3
    up, down = make("Q4_1", 40, 256, 1), randn(8, 40)
    y = ops.swiglu_mlp(x, (w, up), down, int8_activations=True)  # a dense matrix takes x as it is
    torch.testing.assert_close(y, ops.swiglu_mlp(int8(x), (w, up), down), **close)
    y = ops.swiglu_mlp(x, (w.dequantize(), up), down, int8_activations=True)
    gate, up_x = ops.linear(x, w.dequantize()), ops.linear(int8(x), up)
    expected = ops.silu_and_mul(torch.cat([gate, up_x], -1)) @ down.T
    torch.testing.assert_close(y, expected, **close)
    rope = ROPE._replace(cos=torch.ones(4, 16))
    for qkv in ((Q, K, K), (Q, K, K.dequantize())):
        caches = [(torch.zeros(1, 16, 1, 32), torch.zeros(1, 16, 1, 32)) for _ in range(2)]
        q = ops.qkv_rope_append(x[:2], norm, qkv, rope, caches[0], SLOTS, int8_activations=True)
        rounded = int8(normed[:2])
        expected = ops.qkv_rope_append(rounded, None, qkv, rope, caches[1], SLOTS)
        torch.testing.assert_close(q, expected, **close)
        torch.testing.assert_close(caches[0][0], caches[1][0], **close)
        is_rounded = torch.allclose(caches[0][1], caches[1][1], **close)
        assert is_rounded == isinstance(qkv[2], QuantizedTensor)  # a dense one takes x as it is


@pytest.mark.parametrize(
    "call",
    [
        lambda: ops.linear(X, DENSE, int8_activations=True),
        lambda: ops.swiglu_mlp(X, DENSE, randn(256, 4), int8_activations=True),
        lambda: ops.qkv_rope_append(
            X, None, (randn(64, 256), randn(32, 256), randn(32, 256)), ROPE, CACHE, SLOTS,
            int8_activations=True,
        ),
    ],
)  # fmt: skip
def test_int8_activations_are_for_quantised_weights(call: Callable[[], Tensor]) -> None:
    with pytest.raises(ValueError, match="int8_activations is for quantised weights"):
        call()


def test_int8_activations_are_for_the_cpu() -> None:
    x, w = X.to("meta"), make("Q4_K", 8, 256)
    with pytest.raises(ValueError, match="int8_activations is for CPU tensors, but x is on meta"):
        quantized_ops.check_int8_activations(x)
    compiled = torch.compile(
        lambda x: ops.linear(x, w, int8_activations=True), backend="eager", fullgraph=True
    )
    x = randn(3, 256)
    assert torch.equal(compiled(x), ops.linear(x, w, int8_activations=True))


W = make("Q4_K", 8, 256)
DENSE, X = torch.zeros(8, 256), torch.zeros(2, 256)
Q, K = make("Q4_K", 64, 256), make("Q8_0", 32, 256)
ROPE = ops.Rope(torch.zeros(4, 16), torch.zeros(4, 16), torch.zeros(2, dtype=torch.int64))
CACHE = torch.zeros(1, 16, 1, 32), torch.zeros(1, 16, 1, 32)
SLOTS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.linear(X[:, :128], W), ValueError, r"x \(2x128\) must be w's K = 256 \(Q4_K"),
        (lambda: ops.linear(X.int(), W), TypeError, "x must be bfloat16, float16 or float32"),
        (lambda: ops.linear(X, W, torch.zeros(2, 7)), ValueError, "residual must be 2x8, got 2x7"),
        (lambda: ops.linear(X, W, X[:, :8].half()), TypeError, "residual is torch.float16 but x"),
        (lambda: ops.linear(X, W, out_dtype=torch.half), ValueError, "out_dtype must be x's"),
        (lambda: ops.linear(X, W, norm=ops.Norm(X[0, 1:], 0)), ValueError, "weight must have"),
        (lambda: ops.linear(X, W.to("meta")), ValueError, "w is on meta but x is on cpu"),
        (lambda: ops.swiglu_mlp(X, (W, W[:7]), W), ValueError, "gate 8x256 and up 7x256"),
        (lambda: ops.swiglu_mlp(X, (W, DENSE[:7]), W), ValueError, "gate 8x256 and up 7x256"),
        (lambda: ops.swiglu_mlp(X[0], (W, W), W), ValueError, r"x must be \[T, H\]"),
        (lambda: ops.swiglu_mlp(X, (W, W), W), ValueError, r"x \(2x8\) must be w's K = 256"),
        (lambda: ops.embedding(SLOTS, W), ValueError, "dtype is required"),
        (lambda: ops.embedding(SLOTS + 7, W, torch.half), ValueError, r"ids must lie in 0\.\.7"),
        (lambda: ops.embedding(SLOTS, W, torch.int8), TypeError, "dtype must be bfloat16"),
        (lambda: ops.embedding(SLOTS, DENSE, torch.half), TypeError, "table is torch.float32"),
        (lambda: ops.embedding(X, W, torch.half), TypeError, "ids must be an int32"),
        (
            lambda: ops.qkv_rope_append(X, None, (Q[:48], K, K), ROPE, CACHE, SLOTS),
            ValueError,
            r"wq must have a multiple of Hk\*D = 32 rows, got 48",
        ),
        (
            lambda: ops.qkv_rope_append(X, None, (Q, K, K[:16]), ROPE, CACHE, SLOTS),
            ValueError,
            r"wv must have Hk\*D = 32 rows, got 16",
        ),
        (
            lambda: ops.qkv_rope_append(X, None, (Q, K, K), ROPE, CACHE, SLOTS + 15),
            ValueError,
            "slots must lie in",
        ),
        (
            lambda: ops.qkv_rope_append(X, None, (Q, K, K), ops.Rope(*ROPE[:2]), CACHE, SLOTS),
            ValueError,
            "positions is required",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
    assert not CACHE[0].any() and not CACHE[1].any()
