"""mk_linear_quant_swiglu of gate and up that are two matrices, of one type or of two.

Results are held against silu(gate) * up in fp64 of the fp32 products that mk_linear_quant gives:
half a unit of the output and the error of fp32 arithmetic are allowed. Gate and up rounded in
between would be off by more, as would rows that meet another one's. Outputs are poisoned with NaN
and padded.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import quant_decode as counts
from minitron_kernels.quant_packing import pack
from minitron_kernels.quantized import QuantizedTensor
from tests import emulator
from tests import native_abi as abi
from tests.linear_cases import in_turn
from tests.native_emulator import BUILT, DEVICES, run, storage_of
from tests.quant_cases import (
    K_KINDS,
    KINDS,
    Weights,
    out_of,
    quant_params,
    random_weights,
    run_linear,
)
from tests.test_kernels_memory import (
    HALVES,
    assert_padding_untouched,
    poisoned,
    strided,
    values,
)

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
OP = "linear_quant_swiglu"

# Each type as gate and as up; K types beside each other, beside types with blocks of 32, and alike.
PAIRS = [
    ("Q4_K", "Q6_K"), ("Q6_K", "Q5_K"), ("Q5_K", "Q2_K"), ("Q2_K", "Q3_K"), ("Q3_K", "Q4_K"),
    ("Q4_0", "Q8_0"), ("Q8_0", "Q5_1"), ("Q5_1", "Q4_1"), ("Q4_1", "Q5_0"), ("Q5_0", "Q4_0"),
    ("Q4_K", "Q8_0"), ("Q5_0", "Q6_K"), ("Q3_K", "Q3_K"),
]  # fmt: skip


def cols_of(pair: tuple[str, str], groups: int, rest: int) -> int:
    """k of `groups` groups of 256, and of `rest` blocks of 32 where both types have those."""
    return 256 * groups + (0 if set(pair) & set(K_KINDS) else 32 * rest)


def weights_of(pair: tuple[str, str], rows: int, k: int, seed: int = 0) -> tuple[Weights, Weights]:
    gate, up = (random_weights(kind, rows, k, seed + i) for i, kind in enumerate(pair))
    return gate, up


def params_of(
    x: Tensor, w: tuple[Weights, Weights], out: Tensor, norm_weight: Tensor | None = None
) -> tuple[ctypes.Structure, list[Tensor]]:
    gate, up = w
    params, tensors = quant_params(x, gate, out, norm_weight)
    params.linear.n, params.up = 2 * gate.blocks.shape[0], up.native()
    return params, [*tensors, storage_of(up.tiles)]


def entry_of(arch: str, x: Tensor, w: tuple[Weights, Weights]) -> str:
    params, _ = params_of(x, w, out_of("linear_quant", x, w[0]))
    return abi.plan(OP, params, "80" if arch == "gpu" else arch).entry.decode()


def swiglu(
    arch: str,
    x: Tensor,
    w: tuple[Weights, Weights],
    norm_weight: Tensor | None = None,
    out: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    out = out_of("linear_quant", x, w[0]) if out is None else out
    run(OP, arch, *params_of(x, w, out, norm_weight), seed)
    assert_padding_untouched(out, "out")
    return out


def products(
    arch: str, x: Tensor, w: tuple[Weights, Weights], norm_weight: Tensor | None = None
) -> list[Tensor]:
    """Gate and up in fp32."""
    outs = []
    for each in w:
        out = out_of("linear_quant", x, each, F32)
        run_linear("linear_quant", arch, x, each, out, norm_weight)
        outs.append(out)
    return outs


def compare(out: Tensor, gate: Tensor, up: Tensor) -> None:
    """`out` against silu(gate) * up of the fp32 products, rounded once."""
    gate, up = gate.double(), up.double()
    exact = torch.nn.functional.silu(gate) * up
    limits = torch.finfo(out.dtype)
    unit = limits.eps * 2.0 ** exact.abs().clamp_min(limits.tiny).log2().floor()
    # Of 2^(x log2 e), its argument's rounding too; below fp32's least power silu is 0.
    allowed = unit / 2 + exact.abs() * 2.0**-21 * (4 + gate.abs()) + (gate * up).abs() * 2.0**-120
    is_finite = exact.abs() < 0.99 * limits.max
    assert is_finite.float().mean() > 0.5 and not out.isnan().any()
    error = (out.double() - exact).abs()
    worst = int(torch.where(is_finite, error / allowed, 0).argmax())
    assert (error <= allowed)[is_finite].all(), (
        f"element {worst} is {out.flatten()[worst]}, exact {exact.flatten()[worst]}; "
        f"{(error / allowed).flatten()[worst]:.2f} times the error allowed"
    )
    assert (out.double().abs() >= 0.98 * limits.max)[~is_finite].all()


def inputs(m: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Small enough for most products of two sums to fit float16."""
    return values(m, k, dtype=dtype, seed=seed) * 2**-6


# ------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("arch, gate, up", in_turn(PAIRS))
def test_rows_of_any_number(arch: str, gate: str, up: str) -> None:
    """129 rows, and the same bits of 1, 8, 16, 17 and 64 of them; rows of w that fill no tile, k
    that ends inside a group, a quarter and a half of it; with a norm and without."""
    i = PAIRS.index((gate, up))
    rows, k, dtype = 33 + 2 * i, cols_of((gate, up), 3, i + 1), HALVES[i % 2]
    x, w = inputs(129, k, dtype, i), weights_of((gate, up), rows, k)
    norm_weight = values(k, dtype=dtype, seed=9) * 2**-6 if i % 3 else None
    whole = swiglu(arch, x, w, norm_weight)
    compare(whole, *products(arch, x, w, norm_weight))
    for seed, m in enumerate((1, 8, 16, 17, 64)):
        out = swiglu(arch, x[-m:], w, norm_weight, seed=seed)
        assert torch.equal(out, whole[-m:]), m


SHAPES = {  # rows of x, rows of gate: with tails in both directions, of strips and of clusters
    "80": {(1100, 759): "rows128_m128", (300, 759): "rows128_m64"},
    "89": {(1100, 759): "rows64_m128"},
    "90a": {(1100, 759): "rows128_m128", (300, 759): "rows128_m64"},
    "100a": {(1100, 759): "rows128_m128"},
}


@pytest.mark.parametrize("arch, m, rows, pair", [
    pytest.param(arch, m, rows, pair, id=f"emu-sm_{arch}-m{m}-{'-'.join(pair)}")
    for arch in BUILT
    for i, (m, rows) in enumerate(SHAPES[arch])
    for pair in (PAIRS[(3 * BUILT.index(arch) + i) % 5], PAIRS[5 + (BUILT.index(arch) + i) % 5])
])  # fmt: skip
def test_tiles_of_prompts(arch: str, m: int, rows: int, pair: tuple[str, str]) -> None:
    """Larger tiles; rows of outputs at any address, and the bits of few rows."""
    k = cols_of(pair, 1, 3)
    x, w = inputs(m, k, BF16), weights_of(pair, rows, k)
    assert SHAPES[arch][m, rows] in entry_of(arch, x, w)
    out = strided(out_of("linear_quant", x, w[0]), 3)
    swiglu(arch, x, w, out=out, seed=3)
    compare(out, *products(arch, x, w))
    assert torch.equal(swiglu(arch, x[-16:], w), out[-16:])


@pytest.mark.parametrize("arch, kind", in_turn([(kind,) for kind in KINDS]))
def test_equal_types_have_the_bits_of_rows_by_turns(arch: str, kind: str) -> None:
    k = cols_of((kind, kind), 2, 5)
    gate, up = weights_of((kind, kind), 41, k)
    both = Weights.__new__(Weights)
    both.tiles = pack(gate.blocks, up.blocks).tiles
    both.blocks = QuantizedTensor(torch.cat([gate.blocks.blocks, up.blocks.blocks]), kind, (82, k))
    for m in (7, 16, 70):
        x = inputs(m, k, BF16, m)
        out = out_of(OP, x, both)
        run_linear(OP, arch, x, both, out)
        assert torch.equal(swiglu(arch, x, (gate, up)), out)


@settings(max_examples=40, deadline=None)
@given(
    arch=st.sampled_from(DEVICES),
    gate=st.sampled_from(KINDS),
    up=st.sampled_from(KINDS),
    dtype=st.sampled_from(HALVES),
    m=st.one_of(st.integers(1, 16), st.integers(17, 90)),
    rows=st.integers(1, 150),
    groups=st.integers(1, 5),
    rest=st.integers(0, 7),
    padding=st.tuples(*[st.sampled_from([0, 1, 8])] * 2),
    offset=st.tuples(*[st.sampled_from([0, 3, 8])] * 2),
    has_norm=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    arch: str, gate: str, up: str, dtype: torch.dtype, m: int, rows: int, groups: int, rest: int,
    padding: tuple[int, ...], offset: tuple[int, ...], has_norm: bool, seed: int,
) -> None:  # fmt: skip
    k = cols_of((gate, up), groups, rest)
    x = strided(inputs(m, k, dtype, seed), padding[0], offset[0])
    w = weights_of((gate, up), rows, k, seed)
    norm_weight = values(k, dtype=dtype, seed=seed + 2) * 2**-6 if has_norm else None
    out = poisoned(out_of("linear_quant", x, w[0]), padding[1], offset[1])
    swiglu(arch, x, w, norm_weight, out, seed)
    compare(out, *products(arch, x, w, norm_weight))


@pytest.mark.parametrize("m", [8, 16])
def test_rounds_of_chunks(m: int) -> None:
    """Rows of x that do not fit, and more pairs of tiles than a round has."""
    k, arch = 20 * 256, BUILT[0]
    rows = 16 * (4 * abi.device(arch).num_sms + 1)
    x, w = inputs(16, k, BF16), weights_of(("Q4_0", "Q8_0"), 48, k)
    # Those of the first and the last pairs of a long one
    wide = [random_weights(kind, 1, k) for kind in ("Q4_0", "Q8_0")]
    for i, each in enumerate(w):
        size = each.tiles.numel()
        tiles = torch.zeros(size * rows // 48, dtype=torch.uint8)
        tiles[:size], tiles[-size:] = each.tiles, each.tiles
        wide[i].tiles = tiles
        wide[i].blocks = QuantizedTensor(
            torch.zeros(rows, each.blocks.blocks.shape[1], dtype=torch.uint8), each.kind, (rows, k)
        )
    out, few = swiglu(arch, x[:m], (wide[0], wide[1])), swiglu(arch, x[:1], w)
    compare(few, *products(arch, x[:1], w))
    assert torch.equal(out[:1, :48], few) and torch.equal(out[:1, -48:], few)
    assert (out[:, 48:-48] == 0).all()


def test_no_rows_are_no_launch() -> None:
    x, w = torch.empty(0, 256, dtype=BF16), weights_of(("Q4_K", "Q6_K"), 16, 256)
    params, _ = params_of(x, w, torch.empty(0, 16, dtype=BF16))
    assert abi.plan(OP, params, "80").grid[0] == 0


# -------------------------------------------------------------------------------------- counters


@pytest.mark.skipif("80" not in BUILT, reason="sm_80 is not in this build")
@pytest.mark.parametrize("gate, up", [
    pytest.param(*pair, id=f"emu-sm_80-{'-'.join(pair)}", marks=marks)
    for pair, marks in ((("Q4_K", "Q6_K"), []), (("Q4_0", "Q8_0"), pytest.mark.slow),
                        (("Q4_K", "Q4_K"), pytest.mark.slow))
])  # fmt: skip
def test_instructions_and_bytes_per_weight(gate: str, up: str) -> None:
    """Beside one matrix with rows by turns, the mean of both types: the start of a second loop more
    for each warp; one matrix of 8 rows gains 5 % by sums that take the place of x, and so by x that
    is read once; two, in chunks, have none of that. Each byte of w comes from DRAM once, without
    bank conflicts but of x's sums."""
    rows, k = counts.N, counts.K

    def lanes(counters: emulator.Counters | None) -> float:
        assert counters is not None
        return counts.lanes_per_weight(counters) / 2

    for m in (1, 8):
        x = values(m, k, dtype=BF16)
        by_turns = []
        for kind in (gate, up):
            both = counts.zeros(kind, 2 * rows, k)
            by_turns.append(lanes(run_linear(OP, "80", x, both, out_of(OP, x, both))))
        w = counts.zeros(gate, rows, k), counts.zeros(up, rows, k)
        counters = run(OP, "80", *params_of(x, w, out_of("linear_quant", x, w[0])))
        assert counters is not None
        apart, mean = lanes(counters), sum(by_turns) / 2
        print(f"{gate} and {up}, M = {m}: {apart:.3f}, by turns {mean:.3f}")
        assert apart <= (1.05 if m == 1 else 1.105) * mean
        stored = w[0].tiles.numel() + w[1].tiles.numel()
        assert counters.unique_read_sectors * 32 <= 1.001 * (stored + x.nbytes)
        assert counters.unique_write_sectors == m * rows * 2 // 32
        assert counters.shared_wavefronts <= 1.01 * counters.shared_wavefronts_min


# ---------------------------------------------------------------------------------- can it fail


def test_comparison_sees_rounded_products_and_exchanged_matrices() -> None:
    x, w = inputs(9, 512, BF16), weights_of(("Q4_K", "Q6_K"), 40, 512)
    gate, up = products(BUILT[0], x, w)
    out = swiglu(BUILT[0], x, w)
    compare(out, gate, up)
    rounded = torch.nn.functional.silu(gate.bfloat16().float()) * up.bfloat16().float()
    for wrong in (rounded.bfloat16(), swiglu(BUILT[0], x, (w[1], w[0])), out.roll(1, 1)):
        with pytest.raises(AssertionError, match="times the error allowed"):
            compare(wrong, gate, up)
