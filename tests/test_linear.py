"""mk_linear, mk_linear_swiglu and mk_qkv_rope_append for few rows, on the emulator and a GPU.

linear_cases.py tells how results are compared. Outputs are poisoned with NaN and padded.
"""

from __future__ import annotations

import ctypes
import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import native_abi as abi
from tests.linear_cases import (
    Qkv,
    canonical,
    check_linear,
    in_turn,
    linear_params,
    magnitude,
    normalised,
    run_linear,
)
from tests.native_emulator import ARCHS, BUILT, DEVICES
from tests.test_kernels_memory import (
    HALVES,
    archs,
    assert_close,
    assert_padding_untouched,
    dtypes,
    main_loops,
    poisoned,
    strided,
    values,
)

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def out_of(op: str, x: Tensor, w: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    columns = w.shape[0] // 2 if op == "linear_swiglu" else w.shape[0]
    return poisoned(torch.empty(x.shape[0], columns, dtype=dtype or x.dtype))


# ------------------------------------------------------------------------------------- results

SHAPES = [  # op, m, n, k
    ("linear", 1, 4096, 4096),
    ("linear", 16, 4096, 4096),
    ("linear", 8, 1024, 11520),
    ("linear", 3, 576, 576),
    ("linear", 16, 576, 1536),
    ("linear", 9, 1921, 128),
    ("linear", 5, 3001, 584),
    ("linear", 7, 33, 1000),
    ("linear", 1, 1, 1),
    ("linear", 2, 129, 7),
    ("linear", 16, 7, 129),
    ("linear_swiglu", 1, 3072, 576),
    ("linear_swiglu", 16, 2304, 4096),
    ("linear_swiglu", 4, 258, 33),
    ("linear_swiglu", 13, 2, 1032),
]


@pytest.mark.parametrize(
    "arch, dtype, op, m, n, k", in_turn([(d, *s) for s in SHAPES for d in HALVES])
)
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
def test_linear(
    arch: str, dtype: torch.dtype, op: str, m: int, n: int, k: int, has_norm: bool
) -> None:
    x, w = values(m, k, dtype=dtype), values(n, k, dtype=dtype, seed=1)
    norm_weight = values(k, dtype=dtype, seed=2) if has_norm else None
    check_linear(op, arch, x, w, out_of(op, x, w), norm_weight, seed=n)


@archs
@dtypes
def test_linear_sums_in_the_canonical_order(arch: str, dtype: torch.dtype) -> None:
    """fp32 logits, bit by bit, for an odd number of columns and a k that ends inside a stage."""
    if arch == "gpu":
        pytest.skip("the order is the same, but an MMA may drop low bits that the model keeps")
    x, w = values(11, 712, dtype=dtype), values(1301, 712, dtype=dtype, seed=1)
    out = out_of("linear", x, w, F32)
    check_linear("linear", arch, x, w, out)
    assert torch.equal(out, canonical(arch, x, w))


@settings(max_examples=60, deadline=None)
@given(
    arch=st.sampled_from(DEVICES),
    dtype=st.sampled_from(HALVES),
    op=st.sampled_from(["linear", "linear_swiglu"]),
    m=st.integers(0, 16),
    n=st.integers(1, 300),
    k=st.one_of(st.integers(1, 300), st.integers(1, 200).map(lambda i: 8 * i)),
    padding=st.tuples(*[st.sampled_from([0, 1, 8, 24])] * 4),
    offset=st.tuples(*[st.sampled_from([0, 0, 8, 3])] * 4),
    has_norm=st.booleans(),
    has_residual=st.booleans(),
    is_f32=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_linear_strides(
    arch: str,
    dtype: torch.dtype,
    op: str,
    m: int,
    n: int,
    k: int,
    padding: tuple[int, ...],
    offset: tuple[int, ...],
    has_norm: bool,
    has_residual: bool,
    is_f32: bool,
    seed: int,
) -> None:
    n = 2 * n if op == "linear_swiglu" else n
    x, w = (
        strided(values(rows, k, dtype=dtype, seed=seed + i), padding[i], offset[i])
        for i, rows in enumerate((m, n))
    )
    plain = op == "linear"
    out_dtype = F32 if plain and is_f32 and not has_residual else dtype
    out = poisoned(out_of(op, x, w, out_dtype), padding[2], offset[2])
    residual = None
    if plain and has_residual:
        residual = strided(values(m, n, dtype=dtype, seed=seed + 3), padding[3], offset[3])
    norm_weight = strided(values(1, k, dtype=dtype, seed=seed + 2), 0, offset[3])[0]
    check_linear(op, arch, x, w, out, norm_weight if has_norm else None, residual, seed)


@archs
@dtypes
def test_linear_adds_the_residual_in_place(arch: str, dtype: torch.dtype) -> None:
    x, w = values(5, 264, dtype=dtype), values(77, 264, dtype=dtype, seed=1)
    residual = values(5, 77, dtype=dtype, seed=2)
    out = out_of("linear", x, w)
    check_linear("linear", arch, x, w, out, residual=residual)
    run_linear("linear", arch, x, w, residual, residual=residual)
    assert torch.equal(residual, out)


@main_loops
@dtypes
def test_swiglu_of_extreme_gates(arch: str, dtype: torch.dtype) -> None:
    """The exponential over- and underflows; the limits are silu's own."""
    gates = torch.tensor([-6e4, -1e4, -100, -88, 0, 88, 100, 1e4, 6e4], dtype=dtype)
    x = torch.ones(1, 8, dtype=dtype)
    w = torch.zeros(2 * len(gates), 8, dtype=dtype)
    w[::2, 0], w[1::2, 0] = gates, 1
    out = out_of("linear_swiglu", x, w)
    run_linear("linear_swiglu", arch, x, w, out)
    expected = torch.nn.functional.silu(gates.double())
    torch.testing.assert_close(out[0].double(), expected, atol=1e-36, rtol=2**-8)


# ----------------------------------------------------------------------------------- same bits


@archs
@dtypes
def test_linear_bits_depend_on_the_row_only(arch: str, dtype: torch.dtype) -> None:
    """Alone or among others, at another place, by elements or by 16 bytes, for any interleaving;
    and with a block of rows of its own when there are more than 16, which elements get."""
    k, n = 1288, 130
    x, w = values(20, k, dtype=dtype), values(n, k, dtype=dtype, seed=1)
    whole = out_of("linear", x[:16], w, F32)
    run_linear("linear", arch, x[:16], w, whole)
    for seed, (first, m, offset) in enumerate([(0, 1, 0), (3, 8, 0), (5, 9, 0), (2, 3, 1)]):
        rows = strided(x[first : first + m], 0, offset)
        out = out_of("linear", rows, w, F32)
        run_linear("linear", arch, rows, w, out, seed=seed)
        assert torch.equal(out, whole[first : first + m]), (first, m, offset)
    many = strided(x, 0, 1)
    out = out_of("linear", many, w, F32)
    run_linear("linear", arch, many, w, out)
    assert torch.equal(out[:16], whole)


@settings(max_examples=20, deadline=None)
@given(
    arch=st.sampled_from(DEVICES),
    dtype=st.sampled_from(HALVES),
    m=st.one_of(st.integers(1, 16), st.integers(17, 64)),
    k=st.one_of(st.integers(1, 600), st.integers(1, 2048).map(lambda i: 8 * i)),
    offset=st.sampled_from([0, 0, 1]),
    seed=st.integers(0, 2**16),
)
def test_norm_has_the_bits_of_rms_norm(
    arch: str, dtype: torch.dtype, m: int, k: int, offset: int, seed: int
) -> None:
    x = strided(values(m, k, dtype=dtype, seed=seed), 0, offset)
    w, norm_weight = (values(*s, k, dtype=dtype, seed=seed + 1) for s in ((19,), ()))
    fused, after = (out_of("linear", x, w, F32) for _ in range(2))
    run_linear("linear", arch, x, w, fused, norm_weight, seed=seed)
    run_linear("linear", arch, normalised(arch, x, norm_weight), w, after)
    assert torch.equal(fused, after)


# ----------------------------------------------------------------------------- qkv_rope_append

QKV_SHAPES = [  # tokens, hidden, (query heads, key heads), head_dim, rotary_dim
    (1, 512, (32, 8), 128, 128),
    (16, 1024, (4, 1), 128, 128),
    (5, 576, (9, 3), 64, 64),
    (16, 200, (2, 2), 16, 2),
    (3, 129, (3, 1), 96, 20),
    (9, 264, (1, 1), 256, 64),
]


@pytest.mark.parametrize(
    "arch, dtype, interleaved, tokens, hidden, heads, d, r",
    in_turn([(dt, i, *s) for s in QKV_SHAPES for dt in HALVES for i in (False, True)]),
)
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
def test_qkv_rope_append(
    arch: str,
    dtype: torch.dtype,
    interleaved: bool,
    tokens: int,
    hidden: int,
    heads: tuple[int, int],
    d: int,
    r: int,
    has_norm: bool,
) -> None:
    case = Qkv.random(
        tokens, hidden, heads, d, r,
        dtype=dtype, interleaved=interleaved, has_norm=has_norm, padding=8, seed=tokens,
    )  # fmt: skip
    case.check(arch, seed=hidden)


@archs
def test_qkv_of_a_position_out_of_range_is_nan(arch: str) -> None:
    """Q and K of that token; its V, and the other tokens, are as without it."""
    case = Qkv.random(6, 64, (2, 1), 32, 16, dtype=BF16)
    case.slots = torch.arange(6, dtype=torch.int32)
    case.positions = case.positions.long()
    case.check(arch)
    expected = [t.clone() for t in (case.q, case.k_cache, case.v_cache)]
    case.positions[2], case.positions[4] = -1, 60
    case.run(arch)
    for got, before in zip((case.q, case.k_cache.flatten(0, 1)[:6]), expected[:2], strict=True):
        assert got[[2, 4], :, :16].isnan().all()
        same = torch.tensor([0, 1, 3, 5])
        assert torch.equal(got[same], before.view(-1, *got.shape[1:])[same])
        assert torch.equal(got[..., 16:], before.view(-1, *got.shape[1:])[: len(got), :, 16:])
    slots = case.v_cache.flatten(0, 1)[:6]
    assert torch.equal(slots, expected[2].flatten(0, 1)[:6])


def test_qkv_of_more_rows_than_16_by_elements() -> None:
    """Rows that are no multiples of 16 bytes apart, in three blocks of 16."""
    Qkv.random(37, 100, (2, 1), 32, 32, dtype=F16, padding=1).check(BUILT[0])


# ---------------------------------------------------------------------------------------- plans


# Names of the kernels for few rows.
SKINNY = {arch: re.compile("_m64_n(32|48|96)$" if arch == "90a" else "_m16$") for arch in ARCHS}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def skinny_strips(plan: ctypes.Structure, n: int) -> tuple[int, int]:
    """Of sm_90's plan: strips of the busiest block, and their columns."""
    columns = int(plan.entry.decode().rpartition("_n")[2])
    return ceil_div(ceil_div(n, columns), plan.grid[0]), columns


@settings(max_examples=200, deadline=None)
@given(
    arch=st.sampled_from(list(abi.DEVICES)),
    m=st.one_of(st.integers(1, 16), st.integers(1, 2**30)),
    n=st.one_of(st.integers(1, 2**24), st.integers(1, 20000)),
    k=st.integers(1, 2**20),
    offset=st.sampled_from([0, 8]),
)
def test_skinny_plan_fits_and_spreads(arch: str, m: int, n: int, k: int, offset: int) -> None:
    """Every size fits the device, and no SM has many more strips of 8 columns than the average."""
    pointer = 1 << 20
    params = abi.structs()["mk_linear_params"](
        x=pointer, w=pointer + offset, out=pointer, x_stride=k, w_stride=k, out_stride=n,
        m=m, n=n, k=k, dtype=abi.constants()["MK_BF16"], out_dtype=abi.constants()["MK_BF16"],
    )  # fmt: skip
    if m <= 64 and k <= 1 << 14:
        params.norm_weight = pointer
    plan, device = abi.plan("linear", params, arch), abi.device(arch)
    is_aligned = k % 8 == 0 and offset == 0
    is_skinny = m <= (64 if arch == "90a" else 16) or not is_aligned
    assert bool(SKINNY[arch].search(plan.entry.decode())) == is_skinny
    assert plan.smem_bytes <= device.smem_per_block
    if not is_skinny:
        return
    assert 1 <= plan.grid[0] <= device.num_sms and plan.grid[1] <= 65535
    assert plan.grid[0] % plan.cluster[0] == 0
    if arch == "90a":
        assert plan.cluster[0] == (2 if is_aligned and m > 16 else 1)
        # The blocks have equal numbers of strips, but for the last ones.
        strips, columns = skinny_strips(plan, n)
        assert strips * columns * plan.grid[0] < n + (strips + 2) * columns
        return
    warps = plan.block[0] // 32
    assert 1 <= warps <= 8
    busiest = warps * ceil_div(ceil_div(n, 8 * warps), plan.grid[0])
    assert busiest * device.num_sms <= max(1.5 * ceil_div(n, 8), 8 * device.num_sms)


def test_skinny_plan_of_minitron_uses_nearly_all_sms() -> None:
    """On sm_90 nine of ten, from 32 rows on as many as get all that DRAM gives."""
    for arch in abi.DEVICES:
        num_sms = abi.device(arch).num_sms
        for n, m in itertools.product((4096, 6144, 23040, 131072), (1, 16, 64)):
            x, w, out = torch.empty(m, 64), torch.empty(n, 64), torch.empty(m, n)
            params = linear_params(x, w.bfloat16(), out.bfloat16())
            params.dtype = params.out_dtype = abi.constants()["MK_BF16"]
            plan = abi.plan("linear", params, arch)
            if arch == "90a":
                strips, columns = skinny_strips(plan, n)
                assert plan.grid[0] >= num_sms * (0.9 if m <= 16 else 0.65), (arch, n)
                assert strips * columns * plan.grid[0] <= 1.05 * n
            elif m <= 16:
                warps = plan.block[0] // 32
                busiest = warps * ceil_div(ceil_div(n, 8 * warps), plan.grid[0])
                assert busiest * num_sms <= 1.3 * n / 8, (arch, n)


# ------------------------------------------------------------------------------------- counters

COUNTED = [  # of a layer of Minitron-8B
    (op, m, n, k, has_norm)
    for op, n, k, has_norm in (
        ("linear", 6144, 4096, True),
        ("linear", 4096, 4096, False),
        ("linear", 4096, 11520, False),
        ("linear_swiglu", 23040, 4096, True),
    )
    for m in ((1,) if n > 6144 else (1, 8, 16))
]


@pytest.mark.parametrize("op, m, n, k, has_norm", COUNTED, ids=lambda v: str(v))
def test_each_weight_is_read_once_without_conflicts(
    op: str, m: int, n: int, k: int, has_norm: bool
) -> None:
    """What the kernel reads does not depend on the values."""
    if "80" not in BUILT:
        pytest.skip("sm_80 is not in this build")
    x, w = values(m, k, dtype=BF16), torch.ones(n, k, dtype=BF16)
    norm_weight = values(k, dtype=BF16) if has_norm else None
    out = out_of(op, x, w)
    c = run_linear(op, "80", x, w, out, norm_weight)
    assert c is not None
    x_sectors, w_sectors, norm_sectors = x.nbytes // 32, w.nbytes // 32, has_norm * k // 16
    assert c.unique_read_sectors == x_sectors + w_sectors + norm_sectors
    assert c.unique_write_sectors == out.nbytes // 32
    # x goes from L2 to each block once per tile; with the norm once more, and the norm's weight to
    # each warp that has rows of x.
    plan = abi.plan(op, linear_params(x, w, out, norm_weight), "80")
    blocks, warps = plan.grid[0], plan.block[0] // 32
    tiles = ceil_div(n, 8 * warps)
    rereads = tiles * x_sectors
    if has_norm:
        rereads += blocks * x_sectors + tiles * min(m, warps) * norm_sectors
    assert c.read_sectors <= w_sectors + rereads
    assert c.shared_wavefronts == c.shared_wavefronts_min
    instructions = (c.instructions - c.issued["mov"]) / (n * k / 1000)
    assert instructions < (260 if has_norm else 160), "A100 has 600 issue slots per 1000 weights"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch, op, m, n, k, has_norm",
    in_turn([(op, m, n, k, norm) for op, _, n, k, norm in COUNTED[::3] for m in (1, 2, 16)]),
)
def test_linear_of_a_whole_layer(
    arch: str, op: str, m: int, n: int, k: int, has_norm: bool
) -> None:
    """Minitron-8B's projections at their full sizes."""
    x, w = values(m, k, dtype=BF16), values(n, k, dtype=BF16, seed=1)
    norm_weight = values(k, dtype=BF16, seed=2) if has_norm else None
    residual = values(m, n, dtype=BF16, seed=3) if op == "linear" and not has_norm else None
    check_linear(op, arch, x, w, out_of(op, x, w), norm_weight, residual)


@pytest.mark.slow
@pytest.mark.parametrize("arch, tokens", in_turn([(1,), (5,), (16,), (2,)]))
def test_qkv_of_a_whole_layer(arch: str, tokens: int) -> None:
    Qkv.random(tokens, 4096, (32, 8), 128, 128, dtype=BF16, has_norm=True).check(arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch, m", in_turn([(1,), (16,)]))
def test_logits_of_a_whole_vocabulary(arch: str, m: int) -> None:
    """131072 columns (of a short k), fp32, bit by bit."""
    x, w = values(m, 256, dtype=BF16), values(131072, 256, dtype=BF16, seed=1)
    out = out_of("linear", x, w, F32)
    check_linear("linear", arch, x, w, out)
    assert arch == "gpu" or torch.equal(out, canonical(arch, x, w))


# ---------------------------------------------------------------------------------- can it fail


def test_comparison_sees_one_wrong_product() -> None:
    """One weight of 4096 taken as 0, in one column."""
    x, w = values(3, 4096, dtype=BF16), values(64, 4096, dtype=BF16, seed=1)
    wrong = w.clone()
    column = 5
    at = int(w[column].abs().argmax())
    wrong[column, at] = 0
    out = out_of("linear", x, w)
    run_linear("linear", BUILT[0], x, wrong, out)
    exact = x.double() @ w.double().T
    scale = magnitude(x, w) + exact.abs()
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(out, exact, x @ w.T, "out", scale)
    right = torch.arange(64) != column
    assert_close(out[:, right], exact[:, right], (x @ w.T)[:, right], "out", scale[:, right])


def test_comparison_sees_a_gate_and_up_exchanged() -> None:
    x, w = values(2, 64, dtype=F16), values(32, 64, dtype=F16, seed=1)
    swapped = w.view(16, 2, 64).flip(1).reshape(32, 64)
    out = out_of("linear_swiglu", x, w)
    check_linear("linear_swiglu", BUILT[0], x, w, out)
    wrong = out_of("linear_swiglu", x, w)
    run_linear("linear_swiglu", BUILT[0], x, swapped, wrong)
    assert not torch.allclose(out.float(), wrong.float(), rtol=0.1)
    assert_padding_untouched(wrong, "out")


def test_comparison_sees_a_wrong_rotation() -> None:
    case = Qkv.random(4, 64, (1, 1), 64, 64, dtype=BF16)
    case.angles[1][int(case.positions[0]), 9] *= -1
    case.run(BUILT[0])
    case.angles[1][int(case.positions[0]), 9] *= -1
    case.run = lambda arch, seed=0: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="relative error"):
        case.check(BUILT[0])
