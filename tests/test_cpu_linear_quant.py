"""mk_cpu_linear_quant and mk_cpu_dequantize: the bits that their header promises, by every
instruction set, for all ten types, and nothing read or written outside the rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import _native
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.quantized import QuantizedTensor
from tests.gguf_files import random_rows
from tests.test_cpu_linear import (
    AVAILABLE,
    DTYPES,
    EPILOGUES,
    ISAS,
    SPECIAL,
    assert_same_bits,
    cpu_linear,
    each_dtype,
    each_isa,
    fma,
    python,
    random,
    require,
)
from tests.test_kernels_memory import assert_close

Tensor = torch.Tensor
Array = npt.NDArray[Any]

TYPES = tuple(QUANT_TYPES)
NUMBERS = {kind: int(GGMLQuantizationType[kind]) for kind in TYPES}
each_type = pytest.mark.parametrize("kind", TYPES)
each_x_bits = pytest.mark.parametrize("x_bits", [0, 8])


def matrix(kind: str, n: int, k: int, seed: int = 0, extreme: float = 0.0) -> QuantizedTensor:
    """Random blocks. Of the scales, a share of `extreme` is subnormal, -0 or the largest."""
    rng = np.random.default_rng(seed)
    block = QUANT_TYPES[kind]
    blocks = random_rows(kind, n, k, rng).reshape(-1, block.nbytes)
    for offset in block.scale_offsets:
        chosen = rng.random(len(blocks)) < extreme
        bits = rng.choice([0x0001, 0x8001, 0x03FF, 0x8000, 0x0000, 0x7BFF, 0xFBFF], len(blocks))
        scales = blocks[:, offset : offset + 2].copy().view(np.uint16)[:, 0]
        scales = np.where(chosen, bits.astype(np.uint16), scales)
        blocks[:, offset : offset + 2] = scales[:, None].view(np.uint8)
    return QuantizedTensor(torch.from_numpy(blocks.reshape(n, -1)), kind, (n, k))


class Product:
    """A mk_cpu_quant_product, and its output."""

    def __init__(
        self,
        x: Tensor,
        w: QuantizedTensor,
        *,
        epilogue: str = "none",
        other: Tensor | None = None,
        w_up: QuantizedTensor | None = None,
        out: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        blocks: Tensor | None = None,
    ) -> None:
        dtype = x.dtype if out_dtype is None else out_dtype
        shape = (x.shape[0], w.shape[0])
        self.out = torch.full(shape, float("nan"), dtype=dtype) if out is None else out
        blocks = w.blocks if blocks is None else blocks
        self.native = _native.CpuQuantProduct(
            blocks.data_ptr(),
            blocks.stride(0),
            w.shape[0],
            NUMBERS[w.quant_type],
            self.out.data_ptr(),
            self.out.stride(0),
            epilogue=EPILOGUES[epilogue],
            other=0 if other is None else other.data_ptr(),
            other_stride=0 if other is None else other.stride(0),
            w_up=0 if w_up is None else w_up.blocks.data_ptr(),
            w_up_row_bytes=0 if w_up is None else w_up.blocks.stride(0),
            up_type=0 if w_up is None else NUMBERS[w_up.quant_type],
            out_dtype=0 if out_dtype is None else DTYPES[out_dtype],
        )


def run(
    x: Tensor, products: list[Product], threads: int = 2, isa: int = 0, x_bits: int = 0
) -> None:
    m, k = x.shape
    native = [product.native for product in products]
    stride = x.stride(0)
    dtype = DTYPES[x.dtype]
    _native.cpu_linear_quant(x.data_ptr(), stride, m, k, dtype, native, threads, isa, x_bits)


def linear(
    x: Tensor,
    w: QuantizedTensor,
    *,
    threads: int = 2,
    isa: int = 0,
    x_bits: int = 0,
    **options: Any,
) -> Tensor:
    product = Product(x, w, **options)
    run(x, [product], threads, isa, x_bits)
    return product.out


# ---- the contract, stated once more in numpy ----


def fields(packed: Array, width: int, count: int) -> Array:
    """[n, groups, bytes] -> [n, groups, count, bytes]: the fields of each byte, lowest first."""
    shifts = np.arange(0, width * count, width, dtype=np.uint8)
    result: Array = packed[:, :, None] >> shifts[:, None] & ((1 << width) - 1)
    return result


def parts(w: QuantizedTensor) -> tuple[Array, Array, Array | None]:
    """Integers q [N, K], and scales and minima [N, blocks] in fp32: w = scale q + minimum."""
    kind, block = w.quant_type, QUANT_TYPES[w.quant_type]
    b = w.blocks.numpy().reshape(-1, block.nbytes)

    def half(offset: int) -> Array:
        number: Array = b[:, offset : offset + 2].copy().view(np.float16).astype(np.float32)
        return number

    minimum: Array | None = None
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        header = 4 if kind.endswith("1") else 2
        fifth = 4 if kind.startswith("Q5") else 0
        q = fields(b[:, None, header + fifth :], 4, 2).reshape(-1, 32).astype(np.int64)
        if fifth:
            q += 16 * np.unpackbits(b[:, header : header + 4], axis=1, bitorder="little")
        scale = half(0)
        if header == 4:
            minimum = half(2)
        else:
            q -= 16 if fifth else 8
    elif kind == "Q8_0":
        q, scale = b[:, 2:].view(np.int8).astype(np.int64), half(0)
    elif kind == "Q2_K":
        scale, minimum = half(80) * (b[:, :16] & 15), -(half(82) * (b[:, :16] >> 4))
        q = fields(b[:, 16:80].reshape(-1, 2, 32), 2, 4).reshape(-1, 256).astype(np.int64)
    elif kind == "Q3_K":
        low = fields(b[:, None, 96:104], 4, 2).reshape(-1, 16).astype(np.int64)
        high = fields(b[:, None, 104:108], 2, 4).reshape(-1, 16).astype(np.int64)
        scale = half(108) * (low + 16 * high - 32).astype(np.float32)
        third = fields(b[:, None, :32], 1, 8).reshape(-1, 256).astype(np.int64)
        q = fields(b[:, 32:96].reshape(-1, 2, 32), 2, 4).reshape(-1, 256) + 4 * third - 4
    elif kind in ("Q4_K", "Q5_K"):
        s, m, both = (b[:, i : i + 4] for i in (4, 8, 12))
        scale = half(0) * np.concatenate((s & 63, both & 15 | (s >> 6) << 4), 1)
        minimum = -(half(2) * np.concatenate((m & 63, both >> 4 | (m >> 6) << 4), 1))
        q = fields(b[:, -128:].reshape(-1, 4, 32), 4, 2).reshape(-1, 256).astype(np.int64)
        if kind == "Q5_K":
            q += 16 * fields(b[:, None, 16:48], 1, 8).reshape(-1, 256).astype(np.int64)
    else:
        low = fields(b[:, :128].reshape(-1, 2, 64), 4, 2).reshape(-1, 256).astype(np.int64)
        high = fields(b[:, 128:192].reshape(-1, 2, 32), 2, 4).reshape(-1, 256).astype(np.int64)
        q, scale = low + 16 * high - 32, half(208) * b[:, 192:208].view(np.int8)
    n = w.shape[0]
    scale = scale.astype(np.float32).reshape(n, -1)
    return q.reshape(n, -1), scale, None if minimum is None else minimum.reshape(n, -1)


@each_type
def test_cpu_quant_parts_are_ggmls(kind: str) -> None:
    """The contract below stands on scale * q + minimum being what gguf decodes, bit for bit."""
    w = matrix(kind, 9, 768, extreme=0.2)
    q, scale, minimum = parts(w)
    size = q.shape[1] // scale.shape[1]
    scale, minimum = (None if a is None else a.repeat(size, 1) for a in (scale, minimum))
    with np.errstate(over="ignore"):
        decoded = scale * q.astype(np.float32) + (0 if minimum is None else minimum)
        exact = quants.dequantize(w.blocks.numpy(), GGMLQuantizationType[kind])
    assert np.array_equal(decoded, exact)


def rounded_groups(x: Tensor) -> tuple[Array, Array]:
    """Integers [limbs, M, groups, 256] and units [limbs, M, groups] of x."""
    top = 14 if x.dtype is torch.bfloat16 else 13
    values = x.double().numpy()
    values = np.pad(values, ((0, 0), (0, -x.shape[1] % 256))).reshape(x.shape[0], -1, 256)
    largest = np.abs(values).max(-1)
    finite = np.isfinite(largest)
    values = np.where(finite[..., None], values, 0)
    mantissa, exponent = np.frexp(np.where(finite & (largest > 0), largest, 0.5))
    exponent -= 1
    if x.dtype is torch.bfloat16:
        exponent += mantissa == 255 / 256  # 32640 has no signed byte of 256s
    unit = np.exp2(np.maximum(np.where(largest > 0, exponent, -200), -112) - top)
    scaled = values / unit[..., None]
    limbs, units = [np.rint(scaled)], [unit]
    if x.dtype is not torch.bfloat16:
        limbs.append(np.rint((scaled - limbs[0]) * 2**15))
        units.append(unit * 2.0**-15)
    return np.stack(limbs), np.where(finite, np.stack(units), np.nan)


def rounded_to_bytes(x: Tensor) -> tuple[Array, Array]:
    """Integers [M, blocks of 32, 32] and units [M, blocks] of x."""
    values = x.float().numpy().reshape(x.shape[0], -1, 32)
    largest = np.maximum(np.abs(values).max(-1), np.float32(2.0**-112))
    finite = np.isfinite(largest)
    largest = np.where(finite, largest, np.float32(1))
    values = np.where(finite[..., None], values, np.float32(0))
    integers = np.rint(values * (np.float32(127) / largest)[..., None])
    return integers, np.where(finite, largest / np.float32(127), np.float32("nan"))


@np.errstate(over="ignore", invalid="ignore")
def contract_of_bytes(x: Tensor, w: QuantizedTensor) -> Tensor:
    """[M, N] fp32, of x in 8 bits."""
    q, scale, minimum = parts(w)
    size = q.shape[1] // scale.shape[1]
    integers, units = rounded_to_bytes(x)
    total = np.zeros((x.shape[0], len(q)), np.float32)
    for block in range(integers.shape[1]):
        s = None
        for b in range(32 // size * block, 32 // size * (block + 1)):
            columns = integers[:, block, b * size - 32 * block :][:, :size].astype(np.float64)
            p = (columns @ q[:, b * size : (b + 1) * size].T).astype(np.float32)
            each_scale = np.broadcast_to(scale[:, b], p.shape)
            s = p * each_scale if s is None else fma(p, each_scale, s)
            if minimum is not None:
                x_sum = columns.sum(-1, keepdims=True).astype(np.float32)
                s = fma(*np.broadcast_arrays(x_sum, minimum[:, b]), s)
        assert s is not None
        total = fma(s, np.broadcast_to(units[:, block, None], s.shape), total)
    return torch.from_numpy(total)


@np.errstate(over="ignore", invalid="ignore")
def contract(x: Tensor, w: QuantizedTensor, x_bits: int = 0) -> Tensor:
    """[M, N] fp32."""
    if x_bits == 8:
        return contract_of_bytes(x, w)
    q, scale, minimum = parts(w)
    size = q.shape[1] // scale.shape[1]
    blocks = 256 // size
    totals = []
    for limb, unit in zip(*rounded_groups(x), strict=True):
        total = np.zeros((len(limb), len(q)), np.float32)
        for g in range(limb.shape[1]):
            s = np.zeros_like(total)
            for b in range(blocks * g, min(blocks * (g + 1), scale.shape[1])):
                at = b * size
                columns = limb[:, g, at - 256 * g :][:, :size]
                p = (columns @ q[:, at : at + size].T.astype(np.float64)).astype(np.float32)
                s = fma(p, np.broadcast_to(scale[:, b], p.shape), s)
                if minimum is not None:
                    x_sum = columns.sum(-1, keepdims=True).astype(np.float32)
                    s = fma(*np.broadcast_arrays(x_sum, minimum[:, b]), s)
            total = fma(s, np.broadcast_to(unit[:, g, None].astype(np.float32), s.shape), total)
        totals.append(total)
    return torch.from_numpy(totals[0] if len(totals) == 1 else totals[0] + totals[1])


SHAPES = [  # M, N, blocks of 256 columns; of 32 columns, 8 times as many and 3 less
    (1, 1, 1),
    (1, 77, 2),
    (2, 33, 5),
    (7, 35, 3),
    (8, 17, 7),
    (16, 31, 1),
    (17, 97, 2),
    (33, 7, 6),
    (129, 5, 2),
    (1, 3, 45),
]


def width(kind: str, blocks: int) -> int:
    return 256 * blocks if kind.endswith("K") else 32 * max(1, min(45, 8 * blocks - 3))


@each_x_bits
@each_isa
@each_type
def test_cpu_linear_quant_bits(isa: str, kind: str, x_bits: int) -> None:
    """Every M x odd N x K of 1 to 45 blocks, the three dtypes by turns, extreme scales among."""
    level = require(isa)
    turn = TYPES.index(kind)
    for i, (m, n, blocks) in enumerate(SHAPES):
        dtype = list(DTYPES)[(i + turn) % 3]
        k = width(kind, blocks)
        w = matrix(kind, n, k, seed=i, extreme=0.1 * (i % 2))
        x = random(m, k, dtype=dtype, seed=i)
        got = linear(x, w, isa=level, x_bits=x_bits, out_dtype=torch.float32)
        assert_same_bits(got, contract(x, w, x_bits))


@each_x_bits
@each_dtype
@each_type
def test_cpu_linear_quant_isas_agree(kind: str, dtype: torch.dtype, x_bits: int) -> None:
    """More rows of integers than a block takes, 32-row tiles and a rest, K of 576."""
    k = 768 if kind.endswith("K") else 576
    x, w = random(200, k, dtype=dtype), matrix(kind, 75, k, seed=1)
    results = [linear(x, w, isa=ISAS[isa], x_bits=x_bits) for isa in AVAILABLE]
    for result in results:
        assert_same_bits(result, results[0])


@each_x_bits
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q3_K"])
def test_cpu_linear_quant_contract_can_fail(kind: str, x_bits: int) -> None:
    """The comparison of bits sees a weight's last bit, a scale's, and another unit of x."""
    x, w = random(3, 512, dtype=torch.float32), matrix(kind, 40, 512)
    got = linear(x, w, x_bits=x_bits)
    for byte in {QUANT_TYPES[kind].scale_offsets[0], QUANT_TYPES[kind].nbytes // 2}:
        other = w.clone()
        other.blocks[:, byte] ^= 1
        assert (got != contract(x, other, x_bits)).float().mean() > 0.5
    assert (got != contract(torch.cat([x, 300 * x[:, :1]], 1)[:, 1:], w, x_bits)).any()
    assert (got != contract(x, w, 8 - x_bits)).float().mean() > 0.9


# ---- accuracy ----


@each_dtype
@each_type
@pytest.mark.parametrize("shape", [(1, 65, 16), (17, 33, 4), (129, 9, 1)], ids=str)
def test_cpu_linear_quant_error(kind: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """At most twice that of PyTorch on the expanded matrix, relative to sum |w| |x|: where terms
    cancel, the value itself says nothing of the rounding of its terms."""
    m, n, blocks = shape
    k = width(kind, blocks)
    x, w = random(m, k, dtype=dtype), matrix(kind, n, k, seed=1)
    dense = w.dequantize().double()
    exact, scale = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if dtype is torch.float16:
        exact, scale, x = exact / 64, scale / 64, x / 64  # must not overflow
    rounded = torch.nn.functional.linear(x, w.dequantize(dtype))
    assert_close(linear(x, w), exact, rounded, kind, scale)


@pytest.mark.parametrize("largest", [30.0, 1e3, 1e5])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_cpu_linear_quant_outliers(kind: str, largest: float) -> None:
    """However large an element of a group is, rounding the others to its unit costs less than a
    quarter of what rounding the weights to bfloat16 costs (fp32 results of both)."""
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    x[:, 100::256] *= largest
    x = x.bfloat16()
    w = matrix(kind, 200, 4096)
    dense = w.dequantize()
    exact = x.double() @ dense.double().T
    rounded = x.double() @ dense.bfloat16().double().T
    ours = (linear(x, w, out_dtype=torch.float32).double() - exact).square().mean()
    assert ours.sqrt() < (rounded - exact).square().mean().sqrt() / 4


@each_type
def test_cpu_linear_quant_error_of_bytes(kind: str) -> None:
    """Of an output from normal x in 8 bits: half a percent of the root of sum (w x)^2, which is its
    size where terms are independent; and never more than rounding can do."""
    x, w = torch.randn(40, 2048, generator=torch.Generator().manual_seed(0)), matrix(kind, 96, 2048)
    dense = w.dequantize().double()
    exact, scale = x.double() @ dense.T, (x.double().square() @ dense.square().T).sqrt()
    error, without = (linear(x, w, x_bits=bits).double() - exact for bits in (8, 0))
    share = (error / scale).square().mean().sqrt()
    assert 0.004 < share < 0.0065
    assert (without / scale).square().mean().sqrt() < share / 1000
    largest = x.view(40, -1, 32).abs().amax(-1).double()
    bound = largest / 254 @ dense.abs().view(96, -1, 32).sum(-1).T
    assert (error.abs() <= 1.001 * bound).all()


@pytest.mark.parametrize("largest", [3.0, 30.0, 1e3])
def test_cpu_linear_quant_outliers_of_bytes(largest: float) -> None:
    """Outliers, one in 256 elements, spoil their 32: the mean square of the error is about an
    eighth of what it is where 256 share a unit, as in llama.cpp's Q8_K."""
    x = torch.randn(16, 4096, generator=torch.Generator().manual_seed(0))
    x[:, 100::256] *= largest
    w = matrix("Q8_0", 64, 4096)
    dense = w.dequantize().double()
    groups = x.view(16, -1, 256)
    unit = groups.abs().amax(-1, keepdim=True) / 127
    shared = (groups / unit).round().mul(unit).view_as(x)
    exact = x.double() @ dense.T
    ours = (linear(x, w, x_bits=8).double() - exact).square().mean().sqrt()
    theirs = (shared.double() @ dense.T - exact).square().mean().sqrt()
    assert ours < theirs / (2.6 if largest > 10 else 1.2)


@each_isa
@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K", "Q8_0"])
def test_cpu_linear_quant_largest_mantissa(isa: str, kind: str) -> None:
    """Groups whose largest element has a mantissa of ones, of either sign: as 16 bits it would be
    32640, which is no high and low signed byte."""
    x = random(6, 768, dtype=torch.bfloat16)
    for i, largest in enumerate((255.0, -255.0, 255 * 2.0**40, -255 * 2.0**-90, 254.0, 3.3895e38)):
        x[i, 7::256] = largest
        x[i, 9::256] = -largest
    w = matrix(kind, 33, 768)
    for x_bits in (0, 8):
        got = linear(x, w, isa=require(isa), x_bits=x_bits, out_dtype=torch.float32)
        assert_same_bits(got, contract(x, w, x_bits))


@each_x_bits
@each_isa
@each_dtype
def test_cpu_linear_quant_special_x(isa: str, dtype: torch.dtype, x_bits: int) -> None:
    """Rows with an infinity or a NaN are NaN; zeros, subnormals and huge rows have the contract's
    bits; no row disturbs another."""
    level = require(isa)
    x = random(len(SPECIAL) + 2, 640, dtype=dtype)
    for i, value in enumerate(SPECIAL):
        x[i, 5 + 31 * i] = value
    x[-2], x[-1] = 0, x[-1] * 1e-39
    w = matrix("Q8_0", 21, 640)
    got = linear(x, w, isa=level, x_bits=x_bits, out_dtype=torch.float32)
    assert torch.equal(got.isnan().any(1), ~x.isfinite().all(1))
    assert torch.equal(got.isnan().all(1), ~x.isfinite().all(1))
    finite = x.isfinite().all(1)
    assert_same_bits(got[finite], contract(x[finite], w, x_bits))
    assert (got[-2] == 0).all()
    nan = got[~finite].view(torch.int32)
    assert len(nan.unique()) == 1 and len(nan)


def test_cpu_linear_quant_nonfinite_scales() -> None:
    """A matrix with infinite or NaN scales, loaded at the user's wish, spoils its own rows only."""
    w = matrix("Q4_K", 40, 512)
    clean = w.clone()
    bad = {3: 0x7C00, 9: 0xFC00, 33: 0x7E00}
    for row, bits in bad.items():
        w.blocks[row, :2] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
    x = random(5, 512, dtype=torch.bfloat16)
    got, expected = linear(x, w), linear(x, clean)
    good = [n for n in range(40) if n not in bad]
    assert_same_bits(got[:, good], expected[:, good])
    assert not got[:, list(bad)].isfinite().any()


# ---- independence ----


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 130),
    st.integers(1, 4),
    st.sampled_from(TYPES),
    st.sampled_from(list(DTYPES)),
    st.sampled_from((0, 8)),
    st.data(),
)
def test_cpu_linear_quant_batch_invariance(
    m: int, n: int, blocks: int, kind: str, dtype: torch.dtype, x_bits: int, data: st.DataObject
) -> None:
    """A part of the rows of x and of w alone has the bits that it has in the whole, with other
    strides; nothing between the rows of out is written."""
    k, gap = width(kind, blocks), data.draw(st.integers(0, 9))
    x = random(m, k + gap, dtype=dtype, seed=m)[:, :k]
    w = matrix(kind, n, k, seed=n)
    apart = torch.full((n, w.blocks.shape[1] + gap), 255, dtype=torch.uint8)
    apart[:, : w.blocks.shape[1]] = w.blocks
    whole = torch.full((m, n + gap), 77.0, dtype=dtype)
    threads = data.draw(st.integers(1, 3))
    linear(x, w, out=whole[:, :n], blocks=apart, threads=threads, x_bits=x_bits)
    assert (whole[:, n:] == 77).all()
    rows = slice(i := data.draw(st.integers(0, m - 1)), data.draw(st.integers(i + 1, m)))
    columns = slice(j := data.draw(st.integers(0, n - 1)), data.draw(st.integers(j + 1, n)))
    part = linear(x[rows], w[columns], threads=1, x_bits=x_bits)
    assert_same_bits(part, whole[rows, columns])


@each_isa
@each_type
def test_cpu_linear_quant_few_rows(isa: str, kind: str) -> None:
    """One and two rows of x, which have a kernel of their own, have the contract's bits and those
    that they have among five: all dtypes, a short last group, rows of w past the last 16, scales
    at the ends of their range."""
    level = require(isa)
    w = matrix(kind, 45, width(kind, 3), extreme=0.2)
    for dtype in DTYPES:
        x = random(5, w.shape[1], dtype=dtype)
        for x_bits in (0, 8):
            options: dict[str, Any] = {"isa": level, "x_bits": x_bits, "out_dtype": torch.float32}
            whole = linear(x, w, **options)
            assert_same_bits(whole, contract(x, w, x_bits))
            for rows in (slice(0, 1), slice(3, 4), slice(2, 4), slice(3, 5)):
                for count in (45, 33, 16, 5):
                    part = linear(x[rows], w[:count], **options)
                    assert_same_bits(part, whole[rows, :count])


@each_x_bits
@each_dtype
@pytest.mark.parametrize("m", [1, 5, 230])
def test_cpu_linear_quant_threads_and_products(dtype: torch.dtype, m: int, x_bits: int) -> None:
    """All ten types in one call, by 1, 2, 3 and 200 threads: each has the bits of its own call."""
    x = random(m, 768, dtype=dtype)
    matrices = [matrix(kind, 20 + 31 * i, 768, seed=i) for i, kind in enumerate(TYPES)]
    alone = [linear(x, w, threads=1, x_bits=x_bits) for w in matrices]
    for threads in (1, 2, 3, 200):
        products = [Product(x, w) for w in matrices]
        run(x, products, threads, x_bits=x_bits)
        for product, expected in zip(products, alone, strict=True):
            assert_same_bits(product.out, expected)


def test_cpu_linear_quant_many_passes() -> None:
    """More rows than rounded x holds at a time, with an addend and a second product."""
    x, w = random(1700, 8192, dtype=torch.float32), matrix("Q4_0", 8, 8192)
    other = random(1700, 8, dtype=torch.float32, seed=2)
    products = [Product(x, w, epilogue="add", other=other), Product(x, w)]
    run(x, products)
    for rows in (slice(0, 700), slice(700, 1700), slice(1699, 1700)):
        part = linear(x[rows], w, epilogue="add", other=other[rows])
        assert_same_bits(part, products[0].out[rows])
    assert_same_bits(products[1].out[1690:], linear(x[1690:], w))


# ---- epilogues ----


@each_isa
@each_dtype
@pytest.mark.parametrize("m", [1, 9])
def test_cpu_linear_quant_epilogues(isa: str, dtype: torch.dtype, m: int) -> None:
    """In fp32 on the sum, rounded once, with the dense product's silu; gate and up of two types."""
    level = require(isa)
    x, other = random(m, 512, dtype=dtype) / 16, random(m, 43, dtype=dtype, seed=1)
    w, w_up = matrix("Q4_K", 43, 512), matrix("Q5_1", 43, 512, seed=1)
    y, up = (linear(x, each, isa=level, out_dtype=torch.float32) for each in (w, w_up))
    flat = y.reshape(-1, 1)
    silu = cpu_linear(flat, torch.ones(1, 1), epilogue="silu", isa=level).view_as(y)
    cases: list[tuple[str, dict[str, Any], Tensor]] = [
        ("none", {}, y),
        ("silu", {}, silu),
        ("mul", {"other": other}, y * other.float()),
        ("add", {"other": other}, y + other.float()),
        ("swiglu", {"w_up": w_up}, silu * up),
    ]
    for epilogue, options, expected in cases:
        got = linear(x, w, epilogue=epilogue, isa=level, **options)
        assert_same_bits(got, expected.to(dtype))
    in_place = other.clone()
    linear(x, w, epilogue="add", other=in_place, out=in_place)
    assert_same_bits(in_place, (y + other.float()).to(dtype))


# ---- rows of w ----


def dequantize(
    w: QuantizedTensor, dtype: torch.dtype, ids: Tensor | None = None, isa: int = 0
) -> Tensor:
    tokens = w.shape[0] if ids is None else len(ids)
    out = torch.full((tokens, w.shape[1]), 55.0, dtype=dtype)
    ids_dtype = _native.I32 if ids is not None and ids.dtype is torch.int32 else _native.I64
    _native.cpu_dequantize(
        w.blocks.data_ptr(),
        w.blocks.stride(0),
        w.shape[0],
        w.shape[1],
        NUMBERS[w.quant_type],
        out.data_ptr(),
        out.stride(0),
        tokens,
        DTYPES[dtype],
        2,
        0 if ids is None else ids.data_ptr(),
        ids_dtype,
        isa,
    )
    return out


@each_isa
@each_dtype
@each_type
def test_cpu_dequantize(isa: str, dtype: torch.dtype, kind: str) -> None:
    """gguf's bits, rounded once; rows gathered by either kind of ids, NaN outside the matrix."""
    level = require(isa)
    w = matrix(kind, 45, width(kind, 3), extreme=0.2)
    exact = quants.dequantize(w.blocks.numpy(), GGMLQuantizationType[kind])
    expected = torch.from_numpy(exact).to(dtype)
    assert_same_bits(dequantize(w, dtype, isa=level), expected)
    for ids_dtype in (torch.int32, torch.int64):
        ids = torch.tensor([44, 0, 7, 7, *range(30), 45, -1], dtype=ids_dtype)
        got = dequantize(w, dtype, ids, isa=level)
        assert_same_bits(got[:-2], expected[ids[:-2].long()])
        assert got[-2:].isnan().all()


# ---- what is touched ----

GUARD = """
import sys
from tests.test_cpu_linear import before_guard_page
from tests.test_cpu_linear_quant import *
isa = ISAS[sys.argv[1]]
for kind in TYPES:
    for m, n, blocks in ((1, 5, 1), (3, 33, 2), (8, 16, 1)):
        keep, k = [], width(kind, blocks)
        w = matrix(kind, n, k)
        rows = before_guard_page(w.blocks, keep)
        for dtype in DTYPES:
            x = random(m, k, dtype=dtype)
            out = before_guard_page(torch.zeros(m, n, dtype=dtype), keep)
            linear(before_guard_page(x, keep), w, blocks=rows, out=out, isa=isa)
            assert_same_bits(out, linear(x, w))
        guarded = QuantizedTensor(rows, kind, (n, k))
        assert_same_bits(dequantize(guarded, torch.float32, isa=isa), dequantize(w, torch.float32))
    if sys.argv[2] == kind:
        linear(x, w, blocks=rows[1:], isa=isa)
print("done")
"""


@each_isa
def test_cpu_linear_quant_reads_nothing_past_the_end(isa: str) -> None:
    require(isa)
    result = python(GUARD, isa, "none")
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_cpu_linear_quant_guard_page_works(kind: str) -> None:
    """The same script, told that the matrix has a row more, dies by a segmentation fault."""
    assert python(GUARD, AVAILABLE[-1], kind).returncode == -11


# ---- arguments ----


def test_cpu_linear_quant_empty() -> None:
    """No rows, no columns of out, no products: nothing happens. K = 0: zeros."""
    w = matrix("Q4_0", 3, 64)
    linear(torch.empty(0, 64), w)
    run(torch.ones(2, 64), [])
    assert linear(torch.ones(2, 64), QuantizedTensor.empty("Q4_0", (0, 64))).shape == (2, 0)
    nothing = QuantizedTensor(torch.empty(3, 0, dtype=torch.uint8), "Q4_K", (3, 0))
    assert (linear(torch.empty(2, 0), nothing) == 0).all()
    assert dequantize(w, torch.float32, torch.empty(0, dtype=torch.int64)).shape == (0, 64)


def product(**changes: Any) -> None:
    """A call with `changes`, of m 2, n 3, k 64."""
    x, w, out = torch.ones(2, 64), matrix("Q4_0", 3, 64), torch.zeros(2, 3)
    call: dict[str, Any] = {"m": 2, "k": 64, "dtype": _native.F32, "num_threads": 1}
    arguments: dict[str, Any] = {
        "w": w.blocks.data_ptr(),
        "w_row_bytes": 36,
        "n": 3,
        "type": 2,
        "out": out.data_ptr(),
        "out_stride": 3,
    }
    call.update(
        (key, changes.pop(key)) for key in list(changes) if key in (*call, "x", "isa", "x_bits")
    )
    arguments.update(changes)
    x_pointer = call.pop("x", x.data_ptr())
    products = [_native.CpuQuantProduct(**arguments)]
    _native.cpu_linear_quant(x_pointer, 64, products=products, **call)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dtype": 9}, TypeError, "dtype must be MK_BF16"),
    ({"m": -1}, ValueError, "m must be"),
    ({"k": 48}, ValueError, "k must be a multiple of 32, the block of products.0..type = Q4_0"),
    ({"type": 12}, ValueError, "k must be a multiple of 256"),
    ({"type": 9}, ValueError, "products.0..type must be one of mk_quant_type"),
    ({"num_threads": 0}, ValueError, "num_threads must be"),
    ({"isa": 7}, ValueError, "isa must be"),
    ({"x_bits": 16}, ValueError, "x_bits must be 0 or 8, got 16"),
    ({"x": 0}, ValueError, "x is NULL"),
    ({"w": 0}, ValueError, r"products.0..w is NULL"),
    ({"out": 0}, ValueError, r"products.0..out is NULL"),
    ({"w_row_bytes": 35}, ValueError, r"w_row_bytes must be at least the 36 bytes"),
    ({"out_stride": 2}, ValueError, r"products.0..out_stride must be at least"),
    ({"out_dtype": _native.BF16}, TypeError, r"out_dtype must be dtype"),
    ({"epilogue": 5}, ValueError, r"epilogue must be"),
    ({"epilogue": _native.EPILOGUE_ADD}, ValueError, r"products.0..other is NULL"),
    ({"other": 64}, ValueError, r"other must be NULL for epilogue 0"),
    ({"w_up": 64}, ValueError, r"w_up must be NULL for epilogue 0"),
    ({"epilogue": _native.EPILOGUE_SWIGLU}, ValueError, r"up_type must be one of"),
    ({"epilogue": _native.EPILOGUE_SWIGLU, "up_type": 8}, ValueError, r"w_up is NULL"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: "-".join(map(str, c[0])))
def test_cpu_linear_quant_bad_arguments(
    case: tuple[dict[str, Any], type[Exception], str],
) -> None:
    changes, error, message = case
    product()
    with pytest.raises(error, match=message):
        product(**changes)


def test_cpu_dequantize_bad_arguments() -> None:
    w, out = matrix("Q4_0", 3, 64), torch.zeros(3, 64)

    def call(**changes: Any) -> None:
        arguments: dict[str, Any] = {
            "w": w.blocks.data_ptr(),
            "w_row_bytes": 36,
            "rows": 3,
            "k": 64,
            "type": 2,
            "out": out.data_ptr(),
            "out_stride": 64,
            "tokens": 3,
            "dtype": _native.F32,
            "num_threads": 1,
        }
        _native.cpu_dequantize(**(arguments | changes))

    call()
    checks: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"tokens": 4}, ValueError, "tokens must be at most rows"),
        ({"dtype": 0}, TypeError, "dtype must be"),
        ({"type": 1}, ValueError, "type must be one of"),
        ({"w": 0}, ValueError, "w is NULL"),
        ({"out": 0}, ValueError, "out is NULL"),
        ({"ids": out.data_ptr(), "ids_dtype": 3}, TypeError, "ids_dtype must be"),
    ]
    for changes, error, message in checks:
        with pytest.raises(error, match=message):
            call(**changes)
