"""Products of more than 64 rows with quantised weights: the preparation of x and the GEMM.

quant_cases.py tells how results are compared. The workspace and the outputs are poisoned with NaN,
rows of x are padded with NaN. The plan chooses a tile by the shape: LARGE makes it take the large
one on any device, with tails in both directions; what is smaller takes the small one. MIDDLE takes
the one of 64 rows of x that sm_80 and sm_90 have between them.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import quant_prefill
from bench.quant_decode import zeros
from minitron_kernels import native, reference
from tests import emulator, native_emulator
from tests import native_abi as abi
from tests.linear_cases import Qkv, in_turn
from tests.native_emulator import BUILT, DEVICES, dtype_id, run, storage_of
from tests.quant_cases import (
    K_KINDS,
    KINDS,
    Weights,
    check_linear,
    compare,
    out_of,
    quant_params,
    random_weights,
    run_linear,
)
from tests.test_kernels_memory import (
    HALVES,
    assert_padding_untouched,
    poisoned,
    rope_scale,
    strided,
    values,
)
from tests.test_linear_gemm import changed_library

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LARGE, MIDDLE = (1100, 1500), (300, 1500)  # rows of x and of w
IS_SMALL = "rows32_m64"
HOPPER = {LARGE: "sm90_b16_rows128_m128", MIDDLE: "sm90_b16_rows128_m64"}
AMPERE = {LARGE: "sm80_b16_rows128_m128", MIDDLE: "sm80_b16_rows128_m64"}
hopper = pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
ampere = pytest.mark.skipif("80" not in BUILT, reason="sm_80 is not in this build")


def entry_of(arch: str, x: Tensor, w: Weights) -> str:
    params, _ = quant_params(x, w, out_of("linear_quant", x, w))
    return abi.plan("linear_quant", params, "80" if arch == "gpu" else arch).entry.decode()


def cols_of(kind: str, groups: int, rest: int) -> int:
    """k of `groups` groups of 256, and of `rest` blocks of 32 where the type has those."""
    return 256 * groups + (0 if kind in K_KINDS else 32 * rest)


# ------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("arch, kind, m", in_turn([(k, m) for m in (65, 97, 129) for k in KINDS]))
def test_small_tile(arch: str, kind: str, m: int) -> None:
    """fp32 outputs. n ends inside a tile of 16, k inside a group, a quarter and a half of it."""
    n, groups, rest = {65: (7, int(kind in K_KINDS), 1), 97: (41, 1, 5), 129: (33, 3, 7)}[m]
    k = cols_of(kind, groups, rest)
    x, w = strided(values(m, k, dtype=HALVES[m % 2]), 8), random_weights(kind, n, k, seed=m)
    assert IS_SMALL in entry_of(arch, x, w)
    check_linear("linear_quant", arch, x, w, out_of("linear_quant", x, w, F32), seed=m)


@pytest.mark.parametrize("arch, kind", in_turn([(k,) for k in KINDS]))
def test_small_tile_of_45_groups(arch: str, kind: str) -> None:
    """k of Minitron's down projection."""
    x, w = values(65, 45 * 256, dtype=BF16), random_weights(kind, 33, 45 * 256)
    assert IS_SMALL in entry_of(arch, x, w)
    check_linear("linear_quant", arch, x, w, out_of("linear_quant", x, w, F32), seed=45)


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 2, 7, 8, 16, 17, 32, 33, 64, 65, 129])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", DEVICES)
def test_every_type_and_number_of_rows(arch: str, kind: str, m: int) -> None:
    """On every architecture: odd n, k from one block to 45 groups."""
    per_group = 1 if kind in K_KINDS else 8
    for blocks in (1, 2, 3 * per_group - 1, 45 * per_group):
        k = 256 // per_group * blocks
        x, w = values(m, k, dtype=BF16, seed=m), random_weights(kind, 33, k, seed=blocks)
        check_linear("linear_quant", arch, x, w, out_of("linear_quant", x, w, F32), seed=m)


@ampere
@pytest.mark.parametrize("kind", [pytest.param(k, id=f"emu-sm_80-{k}") for k in KINDS])
def test_middle_tile(kind: str) -> None:
    """Of sm_80; w ends inside a strip, x inside a tile, k inside a group."""
    (m, n), k = MIDDLE, cols_of(kind, 1, KINDS.index(kind) + 1)
    x, w = strided(values(m, k, dtype=BF16), 8), random_weights(kind, n, k)
    assert AMPERE[MIDDLE] in entry_of("80", x, w)
    check_linear("linear_quant", "80", x, w, out_of("linear_quant", x, w, F32), seed=k)


@pytest.mark.parametrize("arch, kind", in_turn([(k,) for k in KINDS]))
def test_large_tile(arch: str, kind: str) -> None:
    m, n = LARGE
    k = cols_of(kind, 2, KINDS.index(kind) + 1)
    x, w = strided(values(m, k, dtype=BF16), 16), random_weights(kind, n, k)
    assert IS_SMALL not in entry_of(arch, x, w)
    check_linear("linear_quant", arch, x, w, out_of("linear_quant", x, w, F32), seed=k)


@pytest.mark.parametrize("arch, kind, op", in_turn([
    (kind, op) for kind in KINDS for op in ("linear_quant", "linear_quant_swiglu")
]))  # fmt: skip
def test_norm_and_epilogues(arch: str, kind: str, op: str) -> None:
    """bf16 outputs: those of f16 overflow with the extreme scales."""
    m, n, k = 70, 66, cols_of(kind, 2, 3)
    x, w = values(m, k, dtype=BF16), random_weights(kind, n, k)
    norm_weight = values(k, dtype=BF16, seed=3)
    residual = values(m, n, dtype=BF16, seed=4) if op == "linear_quant" else None
    check_linear(op, arch, x, w, out_of(op, x, w), norm_weight, residual, seed=1)


@hopper
@pytest.mark.parametrize("kind, op, shape", [
    pytest.param(kind, op, shape, id=f"emu-sm_90a-{kind}-{op}-m{shape[0]}")
    for kind, op, shape in (
        ("Q4_K", "linear_quant", LARGE), ("Q6_K", "linear_quant_swiglu", LARGE),
        ("Q5_0", "linear_quant", MIDDLE), ("Q3_K", "linear_quant_swiglu", MIDDLE),
        ("Q4_0", "linear_quant", MIDDLE), ("Q4_1", "linear_quant_swiglu", MIDDLE),
        ("Q5_1", "linear_quant", MIDDLE), ("Q8_0", "linear_quant_swiglu", MIDDLE),
        ("Q2_K", "linear_quant", MIDDLE), ("Q5_K", "linear_quant_swiglu", MIDDLE),
    )
])  # fmt: skip
def test_epilogues_of_wgmma_tiles(kind: str, op: str, shape: tuple[int, int]) -> None:
    """With a norm and, of linear_quant, a residual; rows of outputs at any address."""
    (m, n), k = shape, cols_of(kind, 1, 3)
    x, w = values(m, k, dtype=BF16), random_weights(kind, n, k)
    assert HOPPER[shape] in entry_of("90a", x, w)
    out = strided(out_of(op, x, w), 3)
    residual = strided(values(m, n, dtype=BF16, seed=4), 5) if op == "linear_quant" else None
    check_linear(op, "90a", x, w, out, values(k, dtype=BF16, seed=3), residual, seed=2)


@settings(max_examples=30, deadline=None)
@given(
    arch=st.sampled_from(DEVICES),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(HALVES),
    m=st.integers(17, 150),
    n=st.integers(1, 100),
    groups=st.integers(1, 5),
    rest=st.integers(0, 7),
    padding=st.sampled_from([0, 1, 8]),
    offset=st.sampled_from([0, 3, 8]),
    has_norm=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    arch: str, kind: str, dtype: torch.dtype, m: int, n: int, groups: int, rest: int, padding: int,
    offset: int, has_norm: bool, seed: int,
) -> None:  # fmt: skip
    """Rows of x at any address; fp32 outputs."""
    k = cols_of(kind, groups, rest)
    x = strided(values(m, k, dtype=dtype, seed=seed), padding, offset)
    w = random_weights(kind, n, k, seed)
    norm_weight = values(k, dtype=dtype, seed=seed + 1) if has_norm else None
    out = out_of("linear_quant", x, w, F32)
    check_linear("linear_quant", arch, x, w, out, norm_weight=norm_weight, seed=seed)


MIXES = [("Q4_K", "Q4_K", "Q6_K"), ("Q2_K", "Q3_K", "Q5_K"), ("Q4_0", "Q8_0", "Q5_1")]


def run_qkv(arch: str, qkv: Qkv, w: tuple[Weights, ...], seed: int = 0, entry: str = "") -> None:
    """qkv_rope_append_quant of `qkv`, whose own w is not looked at. `entry`: part of its name."""
    strides = qkv.k_cache.stride()
    base = abi.structs()["mk_qkv_rope_append_params"](
        x=qkv.x.data_ptr(), q=qkv.q.data_ptr(), k_cache=qkv.k_cache.data_ptr(),
        v_cache=qkv.v_cache.data_ptr(), slots=qkv.slots.data_ptr(), x_stride=qkv.x.stride(0),
        q_stride=qkv.q.stride(0), q_head_stride=qkv.q.stride(1), cache_page_stride=strides[0],
        cache_stride=strides[1], cache_head_stride=strides[2], tokens=qkv.x.shape[0],
        hidden=qkv.x.shape[1], num_q_heads=qkv.heads[0], num_kv_heads=qkv.heads[1],
        head_dim=qkv.head_dim, num_pages=qkv.k_cache.shape[0], page_size=qkv.k_cache.shape[1],
        eps=1e-5, slots_dtype=dtype_id(qkv.slots), dtype=dtype_id(qkv.x),
        rope=abi.structs()["mk_rope"](
            cos=qkv.angles[0].data_ptr(), sin=qkv.angles[1].data_ptr(),
            table_stride=qkv.angles[0].stride(0), positions=qkv.positions.data_ptr(),
            positions_dtype=dtype_id(qkv.positions), max_position=len(qkv.angles[0]),
            rotary_dim=qkv.rotary_dim, interleaved=qkv.interleaved,
        ),
    )  # fmt: skip
    matrices = (abi.structs()["mk_quant_matrix"] * 3)(*(m.native() for m in w))
    params = abi.structs()["mk_qkv_rope_append_quant_params"](qkv=base, w=matrices)
    size = ctypes.c_int64()
    lib = abi.library()
    abi.check(
        lib.mk_qkv_rope_append_quant_workspace_bytes(ctypes.byref(params), ctypes.byref(size))
    )
    workspace = torch.full((size.value,), 0xFF, dtype=torch.uint8)
    params.workspace, params.workspace_bytes = workspace.data_ptr(), size.value
    tensors = [qkv.x, qkv.q, qkv.k_cache, qkv.v_cache, qkv.slots, qkv.positions, *qkv.angles]
    if entry:
        assert entry in abi.plan("qkv_rope_append_quant", params, arch).entry.decode()
    run(
        "qkv_rope_append_quant", arch, params,
        [*map(storage_of, tensors), *(m.tiles for m in w), workspace], seed,
    )  # fmt: skip


@pytest.mark.parametrize("arch, mix, dtype", in_turn([
    (mix, HALVES[i % 2]) for i, mix in enumerate(MIXES)
]))  # fmt: skip
def test_qkv_of_three_types(arch: str, mix: tuple[str, ...], dtype: torch.dtype) -> None:
    check_qkv(arch, mix, dtype, tokens=77, heads=(3, 1))


@hopper
@pytest.mark.parametrize(
    "tokens, tile", [(300, MIDDLE), (700, LARGE)], ids=["emu-sm_90a-m300", "emu-sm_90a-m700"]
)
def test_qkv_of_three_types_of_wgmma_tiles(tokens: int, tile: tuple[int, int]) -> None:
    """Each matrix ends inside a strip, and fills no whole clusters of them."""
    i = int(tile == LARGE)
    check_qkv("90a", MIXES[i], HALVES[i], tokens, (15, 4), HOPPER[tile])


def check_qkv(
    arch: str, mix: tuple[str, ...], dtype: torch.dtype, tokens: int, heads: tuple[int, int],
    entry: str = "",
) -> None:  # fmt: skip
    """Against fp32 products of the three matrices, rotated in fp64; these against exact ones."""
    hidden, d = 512, 80
    qkv = Qkv.random(
        tokens, hidden, heads, d, 64, dtype=dtype, interleaved=mix[0] == "Q2_K", padding=8
    )
    qkv.x.mul_(2**-6)
    w = tuple(
        random_weights(kind, h * d, hidden, seed=i)
        for i, (kind, h) in enumerate(zip(mix, (heads[0], heads[1], heads[1]), strict=True))
    )
    run_qkv(arch, qkv, w, seed=3, entry=entry)
    products = []
    for matrix in w:
        out = out_of("linear_quant", qkv.x, matrix, F32)
        run_linear("linear_quant", arch, qkv.x, matrix, out)
        compare("linear_quant", qkv.x, matrix, out)
        products.append(out.double().unflatten(1, (-1, d)))
    cos, sin = (t[qkv.positions.long()] for t in qkv.angles)
    kept = (qkv.slots >= 0) & (qkv.slots < qkv.k_cache.shape[0] * qkv.k_cache.shape[1])
    for name, y in zip(("q", "k_cache", "v_cache"), products, strict=True):
        got, scale = getattr(qkv, name), y.abs()
        assert_padding_untouched(got, name)
        if name != "v_cache":
            ordered = torch.empty_like(y)
            ordered[..., qkv.features()] = y
            y = reference.rotate(ordered, cos, sin, qkv.interleaved)
            scale = rope_scale(ordered, cos, sin, qkv.interleaved)
        if name != "q":
            rows = got.flatten(0, 1)
            untouched = torch.ones(len(rows), dtype=torch.bool)
            untouched[qkv.slots[kept]] = False
            assert rows[untouched].isnan().all()
            got, y, scale = rows[qkv.slots[kept]], y[kept], scale[kept]
        finite = y.abs() < torch.finfo(dtype).max
        error = (got.double() - y).abs()[finite]
        allowed = torch.finfo(dtype).eps * scale[finite] + torch.finfo(dtype).tiny
        assert finite.float().mean() > 0.5 and (error <= allowed).all(), name


# ---------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("arch, kind", in_turn([(k,) for k in KINDS]))
def test_rows_have_the_same_bits_in_any_batch(arch: str, kind: str) -> None:
    """A row's outputs in 17 to 1100 rows, of all tiles and in parts; any order of warps."""
    m, n = LARGE
    x, w = (
        values(m, 288 if kind not in K_KINDS else 256, dtype=BF16),
        random_weights(kind, n, 288 if kind not in K_KINDS else 256),
    )
    whole = out_of("linear_quant", x, w, F32)
    run_linear("linear_quant", arch, x, w, whole)
    names = {entry_of(arch, x, w)}
    has_middle = arch in ("80", "90a")
    for rows in (17, 65, *([MIDDLE[0]] if has_middle else [])):
        part = x[-rows:]
        names.add(entry_of(arch, part, w))
        out = out_of("linear_quant", part, w, F32)
        run_linear("linear_quant", arch, part, w, out, seed=rows)
        assert torch.equal(out, whole[-rows:])
    assert len(names) == (4 if has_middle else 3)


@pytest.mark.parametrize("arch, kind", in_turn([(k,) for k in KINDS]))
def test_rows_have_the_bits_of_the_decode_kernel(arch: str, kind: str) -> None:
    """Rows alone, by 16 and by 64 against those of 65, with a norm; k ends inside a group."""
    k = cols_of(kind, 5, 3)
    dtype = HALVES[KINDS.index(kind) % 2]
    x, w = values(65, k, dtype=dtype), random_weights(kind, 40, k, seed=3)
    norm_weight = values(k, dtype=dtype, seed=9)
    whole = out_of("linear_quant", x, w, F32)
    run_linear("linear_quant", arch, x, w, whole, norm_weight=norm_weight)
    for m in (1, 16, 64):
        out = out_of("linear_quant", x[:m], w, F32)
        try:
            run_linear("linear_quant", arch, x[:m], w, out, norm_weight=norm_weight, seed=m)
        except abi.StatusError as error:
            if error.status != "MK_ERR_UNSUPPORTED":
                raise
            pytest.skip("this build has no kernel for up to 64 rows")
        assert torch.equal(out, whole[:m])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("arch", BUILT[:1], ids=lambda a: f"emu-sm_{a}")
def test_rows_of_any_size_have_the_bits_of_the_decode_kernel(arch: str, dtype: torch.dtype) -> None:
    """Rows from the smallest to the largest numbers, of elements 2^40 apart; those whose squares
    fp32 does not hold among them."""
    m, k = 65, 4096
    rng = torch.Generator().manual_seed(5)
    least, most = (-130, 126) if dtype == BF16 else (-24, 14)
    rows = torch.linspace(least, most, m).round()[:, None]
    spread = torch.randint(-40, 1, (m, k), generator=rng)
    x = (values(m, k, dtype=torch.float64, seed=6) * 2.0 ** (rows + spread)).to(dtype)
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    w = random_weights("Q4_1", 16, k, seed=4)
    whole = out_of("linear_quant", x, w, F32)
    run_linear("linear_quant", arch, x, w, whole)
    for first, count in ((0, 16), (16, 48), (64, 1)):
        part = x[first : first + count]
        out = out_of("linear_quant", part, w, F32)
        run_linear("linear_quant", arch, part, w, out, seed=first)
        assert torch.equal(out.nan_to_num(7.0), whole[first : first + count].nan_to_num(7.0))


@pytest.mark.parametrize("arch", BUILT, ids=lambda a: f"emu-sm_{a}")
def test_row_with_a_nan_gives_nans_and_zeros_give_zeros(arch: str) -> None:
    x, w = values(70, 512, dtype=BF16), random_weights("Q4_K", 30, 512)
    x[3, 100], x[4, 5], x[7] = float("nan"), float("-inf"), 0
    out = out_of("linear_quant", x, w, F32)
    run_linear("linear_quant", arch, x, w, out)
    assert out[3].isnan().all() and out[4].isnan().all()
    assert not out[[i for i in range(70) if i not in (3, 4)]].isnan().any()
    assert (out[7] == 0).all()


# ------------------------------------------------------------------------------------ counters


def counted(x: Tensor, w: Weights) -> tuple[emulator.Counters, float, float]:
    """On sm_80: the counters; instructions of the whole kernel but MMAs, shared memory's and moves
    (which mostly vanish in SASS), over the time of the MMAs, 8 clocks each of one of the SM's four
    schedulers; and the wavefronts of shared memory."""
    counters = run_linear("linear_quant", "80", x, w, out_of("linear_quant", x, w))
    assert counters is not None
    time = 8 * counters.issued["mma"]
    left_out = sum(counters.issued[c] for c in ("mma", "shared", "mov"))
    assert counters.issued["mma"] == x.shape[0] * w.blocks.shape[0] * x.shape[1] // 2048 * 9 // 8
    assert counters.shared_wavefronts == counters.shared_wavefronts_min
    issued = (counters.instructions - left_out) / time
    return counters, issued, counters.shared_wavefronts * 4 / time


def on_sm_80(quick: tuple[str, ...]) -> list[Any]:
    """All types; slow but for these."""
    marks = {kind: [] if kind in quick else [pytest.mark.slow] for kind in KINDS}
    return [pytest.param(kind, id=f"emu-sm_80-{kind}", marks=marks[kind]) for kind in KINDS]


@ampere
@pytest.mark.parametrize("kind", on_sm_80(("Q4_K", "Q6_K")))
def test_large_tile_meets_the_bars(kind: str) -> None:
    """No more than the MMAs' time; w and x are read from DRAM once."""
    m, n, k = 1152, 1536, 2048
    x, w = values(m, k, dtype=BF16), random_weights(kind, n, k)
    assert AMPERE[LARGE] in entry_of("80", x, w)
    counters, issued, wavefronts = counted(x, w)
    print(f"{kind}: {issued:.3f} of the MMAs' time issued, {wavefronts:.3f} in shared memory")
    assert issued <= 1.0 and wavefronts <= 1.0
    read = m * k * 2 * 9 // 8 + w.tiles.numel()
    assert counters.unique_read_sectors <= 1.01 * read / 32


@hopper
@pytest.mark.parametrize("kind", [
    pytest.param(k, id=f"emu-sm_90a-{k}", marks=[] if k == "Q6_K" else pytest.mark.slow)
    for k in ("Q2_K", "Q3_K", "Q6_K")
])  # fmt: skip
def test_wgmma_tile_meets_the_bars(kind: str) -> None:
    """Of the types with a scale for 16 k, which are multiplied with the weights."""
    m, n = LARGE
    entry, i = quant_prefill.issued(kind, "90a", n, 2048, m)
    assert HOPPER[LARGE] in entry
    print(f"{kind}: {i.scaling + i.rest:.3f} of the MMAs' time issued")
    assert i.scaling + i.rest <= 0.85


@ampere
@pytest.mark.parametrize("kind", on_sm_80(("Q4_K", "Q6_K")))
def test_middle_tile_at_its_own_shape(kind: str) -> None:
    """512 rows of Minitron's o. Types of 32 k, whose P is scaled, are at the bar."""
    m, n, k = 512, 4096, 1024
    x, w = values(m, k, dtype=BF16), random_weights(kind, n, k)
    assert AMPERE[MIDDLE] in entry_of("80", x, w)
    _, issued, wavefronts = counted(x, w)
    print(f"{kind}: {issued:.3f} of the MMAs' time issued, {wavefronts:.3f} in shared memory")
    is_16 = kind in ("Q2_K", "Q3_K", "Q6_K")
    assert issued <= (1.0 if is_16 else 1.07)
    assert wavefronts <= (1.26 if kind == "Q8_0" else 1.13 if kind == "Q6_K" else 1.07)


@ampere
@pytest.mark.parametrize("kind", on_sm_80(("Q4_K",)))
def test_small_tile_costs_what_the_plan_takes(kind: str) -> None:
    """kSmallCost of quant_gemm_plan.cpp: wavefronts, which bind it, per MMA's time."""
    x, w = values(128, 2048, dtype=BF16), random_weights(kind, 1024, 2048)
    assert IS_SMALL in entry_of("80", x, w)
    _, issued, wavefronts = counted(x, w)
    print(f"{kind}: {issued:.3f} of the MMAs' time issued, {wavefronts:.3f} in shared memory")
    assert 1.75 <= wavefronts <= 2.15 and issued <= 1.85


@pytest.mark.parametrize("m, n, k, tile", [
    (512, 4096, 4096, MIDDLE), (512, 4096, 11520, MIDDLE), (2048, 4096, 4096, LARGE),
    (2048, 4096, 11520, LARGE), (512, 11520, 4096, LARGE), (512, 23040, 4096, LARGE),
])  # fmt: skip
def test_tiles_of_minitron_on_sm_80(m: int, n: int, k: int, tile: tuple[int, int]) -> None:
    w = zeros("Q4_K", n, k)
    assert AMPERE[tile] in entry_of("80", torch.empty(m, k, dtype=BF16), w)


def test_large_tile_has_registers_to_spare() -> None:
    for arch, entries in native.build_info()["entries"].items():
        for name, use in entries.items():
            if "quant_gemm" in name:
                assert use["registers"] <= 252 and use["spill_bytes"] == 0, (arch, name)


# ------------------------------------------------------------------------------ planted faults


@pytest.mark.parametrize(
    "old, new, count, found",
    [
        (rb"bar\.sync[^;]*;", rb"", 0, "shared.memory|not waited for"),
        (rb"(cp\.async\.wait_group) [1-9];", rb"\1 9;", 0, "asynchronous copy not waited for"),
        (rb"mma\.sync", rb"//a.sync", 0, "times the error allowed|NaN|ninitialised"),
    ],
    ids=["emu-sm_80-barrier", "emu-sm_80-wait", "emu-sm_80-mma"],
)
def test_planted_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes, count: int, found: str
) -> None:
    x, w = values(65, 768, dtype=BF16), random_weights("Q6_K", 70, 768)
    monkeypatch.setenv("MK_CUDA_DRIVER", str(emulator.build()))
    lib = changed_library(tmp_path, entry_of("80", x, w), old, new, count)
    monkeypatch.setattr(native_emulator, "emulated_library", lambda: lib)
    with pytest.raises(AssertionError, match=found):
        check_linear("linear_quant", "80", x, w, out_of("linear_quant", x, w, F32))


@hopper
@pytest.mark.parametrize(
    "old, new, found",
    [
        (rb"wgmma\.wait_group\.sync\.aligned 1;", b"", "^wgmma not waited for"),
        (rb"wgmma\.wait_group\.sync\.aligned 0;", b"", "^wgmma not waited for"),
        (rb"wgmma\.fence\.sync\.aligned;", b"", "^missing wgmma.fence"),
        (rb"(mbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[%r\d+ \+ 0\]), %r\d+;", rb"\1, 1;",
         "^mbarrier misuse|^uninitialised shared memory|^asynchronous copy not waited for"),
        (rb"mbarrier\.arrive\.shared::cluster\.b64 _, \[%r\d+ \+ 0\];", b"", "^deadlock"),
        (rb"mbarrier\.arrive\.shared::cta\.b64 _, \[%r\d+ \+ 0\];", b"", "^deadlock"),
        (rb"bar\.warp\.sync[^;]*;", b"", "shared.memory race"),
        (rb"bar\.sync[^;]*;", b"", "shared.memory race|uninitialised"),
    ],
    ids=["emu-sm_90a-wait", "emu-sm_90a-last-wait", "emu-sm_90a-fence", "emu-sm_90a-parity",
         "emu-sm_90a-release", "emu-sm_90a-release-w", "emu-sm_90a-scales", "emu-sm_90a-outputs"],
)  # fmt: skip
def test_planted_fault_of_wgmma_tile_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes, found: str
) -> None:
    """In clusters, with more stages of x and slots of w than the rings have."""
    x, w = values(1100, 768, dtype=BF16), random_weights("Q6_K", 1500, 768)
    entry = entry_of("90a", x, w)
    assert HOPPER[LARGE] in entry
    monkeypatch.setenv("MK_CUDA_DRIVER", str(emulator.build()))
    lib = changed_library(tmp_path, entry, old, new, 0, "90a")
    monkeypatch.setattr(native_emulator, "emulated_library", lambda: lib)
    with pytest.raises(AssertionError, match=found):
        check_linear("linear_quant", "90a", x, w, out_of("linear_quant", x, w, F32))


def test_comparison_sees_a_changed_weight() -> None:
    """One bit of one quant, in the tile's first word."""
    x, w = values(65, 256, dtype=BF16), random_weights("Q4_K", 16, 256)
    w.tiles.view(-1)[0] ^= 8
    out = out_of("linear_quant", x, w, F32)
    with pytest.raises(AssertionError, match="times the error allowed"):
        check_linear("linear_quant", "80", x, w, out)


def test_empty_input_launches_nothing() -> None:
    w = random_weights("Q4_K", 16, 256)
    x = values(65, 256, dtype=BF16)
    params, _ = quant_params(x, w, poisoned(torch.empty(65, 16)))
    assert np.prod(abi.plan("linear_quant", params, "80").grid[:]) > 0
    prepare = abi.structs()["mk_quant_prepare_x_params"](m=0, k=256, dtype=dtype_id(x))
    assert abi.plan("quant_prepare_x", prepare, "80").grid[0] == 0
