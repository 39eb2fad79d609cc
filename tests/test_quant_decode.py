"""mk_linear_quant, mk_linear_quant_swiglu and mk_qkv_rope_append_quant for up to 64 rows of x.

quant_cases.py tells how results are compared. Outputs are poisoned with NaN and padded.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import quant_decode as counts
from bench.sass import find_tool
from minitron_kernels import block_encoders, reference
from minitron_kernels.block_types import GGML_NUMBERS, QUANT_TYPES
from minitron_kernels.quantized import QuantizedTensor
from tests import emulator
from tests import native_abi as abi
from tests.gguf_files import random_rows
from tests.linear_cases import EPS, Qkv, in_turn, magnitude, normalised
from tests.native_emulator import BUILT, DEVICES, dtype_id, run, storage_of
from tests.quant_cases import (
    K_KINDS,
    KINDS,
    Weights,
    check_linear,
    compare,
    out_of,
    random_weights,
    run_linear,
    weights_of,
)
from tests.test_kernels_memory import (
    HALVES,
    archs,
    assert_close,
    poisoned,
    rope_scale,
    rope_struct,
    strided,
    values,
)

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ------------------------------------------------------------------------------------- results

# m, n, blocks; seven, so that each is on every architecture for some type.
SHAPES = [
    (1, 33, 1), (2, 97, 3), (7, 17, 2), (8, 131, 5), (16, 49, 4), (9, 1, 1), (8, 15, 3),
]  # fmt: skip


def cols_of(kind: str, blocks: int) -> int:
    """k of so many blocks: 32 k that are no quarter or tile, or 256."""
    return 256 * blocks if kind in K_KINDS else 32 * (5 * blocks - 4)


@pytest.mark.parametrize(
    "arch, kind, m, n, blocks", in_turn([(kind, *s) for kind in KINDS for s in SHAPES])
)
def test_linear_quant(arch: str, kind: str, m: int, n: int, blocks: int) -> None:
    """fp32 within a few units of the exact sum, both dtypes of x."""
    k = cols_of(kind, blocks)
    w = random_weights(kind, n, k, seed=m)
    for dtype in HALVES:
        x = values(m, k, dtype=dtype, seed=n)
        check_linear("linear_quant", arch, x, w, out_of("linear_quant", x, w, F32), seed=n)


@pytest.mark.parametrize(
    "arch, kind, m", in_turn([(kind, m) for m in (17, 31, 32, 33, 48, 64) for kind in KINDS])
)
def test_rows_in_parts(arch: str, kind: str, m: int) -> None:
    """More than 16 rows: two to four parts of them, the last one shorter or not."""
    k, n = cols_of(kind, 2 + m % 3), 33 + m
    x, w = values(m, k, dtype=HALVES[m // 16 % 2], seed=m), random_weights(kind, n, k, seed=m)
    x = strided(x, 8)
    with emulator.logged_launches() as launches:
        check_linear("linear_quant", arch, x, w, out_of("linear_quant", x, w, F32), seed=n)
    assert arch == "gpu" or len(launches) == 1


@pytest.mark.parametrize("arch, kind, k", in_turn([(kind, 45 * 256) for kind in KINDS]))
def test_linear_quant_of_45_groups(arch: str, kind: str, k: int) -> None:
    """k of Minitron's down projection; 16 rows of it do not fit shared memory at once."""
    w = random_weights(kind, 48, k)
    for m in (1, 16, (17, 32, 64)[KINDS.index(kind) % 3]):
        x = values(m, k, dtype=BF16, seed=m)
        check_linear("linear_quant", arch, x, w, out_of("linear_quant", x, w, F32))


def test_products_of_integer_scales() -> None:
    """q * scale of Q2_K and Q3_K are exact in f16, at both places of a weight in its half; those of
    Q6_K are off by 2^-11 of them at the most, and exact up to 2048."""
    for kind, qs, scales in (
        ("Q2_K", range(4), range(16)), ("Q3_K", range(8), range(-32, 32)),
        ("Q6_K", range(64), range(-128, 128)),
    ):  # fmt: skip
        q, scale = np.meshgrid(np.array(qs), np.array(scales))
        for unit in (2.0**-24, 2.0**-20):
            products = (q * unit).astype(np.float16) * scale.astype(np.float16)
            assert products.dtype == np.float16
            error = np.abs(products.astype(np.float64) / unit - q * scale)
            if kind == "Q6_K":
                assert (error <= 2.0**-11 * np.abs(q * scale)).all() and error.max() == 2
                assert not error[np.abs(q * scale) <= 2048].any()
            else:
                assert not error.any()


@archs
@pytest.mark.parametrize("source", ["random", "encoded"])
def test_error_of_q6_k(arch: str, source: str) -> None:
    """Of fp32 outputs, beside the same products of weights rounded to bf16 and to f16: 0.22 to 0.24
    of the first error, 1.7 to 1.95 of the second one."""
    k, n = 1024, 256
    if source == "random":
        rows = random_rows("Q6_K", n, k, np.random.default_rng(1))
        w = weights_of(QuantizedTensor(torch.from_numpy(rows), "Q6_K", (n, k)))
    else:
        rows = block_encoders.encode(
            torch.randn(n, k, generator=torch.Generator().manual_seed(1)).numpy(), "Q6_K"
        )
        w = weights_of(QuantizedTensor(torch.from_numpy(rows), "Q6_K", (n, k)))
    x = torch.randn(8, k, generator=torch.Generator().manual_seed(2)).to(BF16)
    out = out_of("linear_quant", x, w, F32)
    run_linear("linear_quant", arch, x, w, out)
    exact = x.double() @ w.dense.T
    error = (out.double() - exact).square().mean().sqrt()
    for dtype, least, most in ((BF16, 0.18, 0.26), (F16, 1.5, 2.0)):
        rounded = x.double() @ w.dense.to(dtype).double().T
        ratio = float(error / (rounded - exact).square().mean().sqrt())
        print(f"{source}: {ratio:.3f} of the error of weights in {dtype}")
        assert least <= ratio <= most


@archs
@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_sums_in_the_place_of_x(arch: str, kind: str) -> None:
    """8 groups of k, one for each warp, and up to three rows of tiles for a block: sums take the
    place of x, and have more rows than it or fewer."""
    k = 2048 if kind in K_KINDS else 2048 - 32
    n = 16 * (2 * abi.device(arch).num_sms + 2) - 3
    w, norm_weight = random_weights(kind, n, k), values(k, dtype=BF16, seed=2)
    for m, has_norm in ((1, False), (8, True)):
        x = values(m, k, dtype=BF16, seed=m)
        out = out_of("linear_quant", x, w)
        check_linear("linear_quant", arch, x, w, out, norm_weight if has_norm else None)


@pytest.mark.parametrize("arch, kind, op", in_turn([
    (kind, op) for kind in KINDS for op in ("linear_quant", "linear_quant_swiglu")
]))  # fmt: skip
def test_norm_residual_and_swiglu(arch: str, kind: str, op: str) -> None:
    k = 768
    w, norm_weight = random_weights(kind, 70, k), values(k, dtype=BF16, seed=2)
    for m, has_norm in ((5, True), (11, True), (3, False), (21, True), (50, False)):
        x = values(m, k, dtype=BF16, seed=m)
        residual = values(m, 70, dtype=BF16, seed=3) if op == "linear_quant" else None
        check_linear(op, arch, x, w, out_of(op, x, w), norm_weight if has_norm else None, residual)


@settings(max_examples=60, deadline=None)
@given(
    arch=st.sampled_from(DEVICES),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(HALVES),
    m=st.one_of(st.integers(0, 16), st.integers(17, 64)),
    n=st.integers(1, 300),
    blocks=st.integers(1, 8),
    padding=st.tuples(*[st.sampled_from([0, 1, 8, 24])] * 2),
    offset=st.tuples(*[st.sampled_from([0, 0, 8, 3])] * 2),
    has_norm=st.booleans(),
    is_f32=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_linear_quant_strides(
    arch: str,
    kind: str,
    dtype: torch.dtype,
    m: int,
    n: int,
    blocks: int,
    padding: tuple[int, ...],
    offset: tuple[int, ...],
    has_norm: bool,
    is_f32: bool,
    seed: int,
) -> None:
    k = QUANT_TYPES[kind].elements * blocks
    w = random_weights(kind, n, k, seed)
    x = strided(values(m, k, dtype=dtype, seed=seed), padding[0], offset[0])
    out_dtype = F32 if is_f32 or dtype == F16 else dtype  # random sums may be too large for f16
    out = poisoned(out_of("linear_quant", x, w, out_dtype), padding[1], offset[1])
    norm_weight = strided(values(1, k, dtype=dtype, seed=seed + 2), 0, offset[1])[0]
    check_linear("linear_quant", arch, x, w, out, norm_weight if has_norm else None, None, seed)


@archs
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_of_any_size(arch: str, dtype: torch.dtype) -> None:
    """Each row is scaled by itself: huge, tiny, zero and denormal rows beside each other; an
    infinity or a NaN gives a row of NaNs, and leaves the others alone."""
    k, w = 512, random_weights("Q4_K", 33, 512)
    x = values(9, k, dtype=F32)
    huge, tiny = (2.0**100, 2.0**-100) if dtype == BF16 else (2.0**10, 2.0**-20)
    factors = torch.tensor([1, huge, tiny, 0, -1, huge / 16, tiny * 16, 1, 1.0])[:, None]
    rows = (x * factors).to(dtype)
    if dtype == F16:
        rows = rows.clamp(-65504, 65504)
    out = out_of("linear_quant", rows, w, F32)
    rows[7, 100], rows[8, 3] = float("inf"), float("nan")
    run_linear("linear_quant", arch, rows, w, out)
    assert out[7:].isnan().all()
    assert (out[3] == 0).all()
    finite = rows[:7].double() @ w.dense.T
    error = (out[:7].double() - finite).abs()
    small = torch.finfo(F32).tiny if dtype == BF16 else 0.0
    assert (error <= 2.0**-20 * (rows[:7].double().abs() @ w.terms.T) + small).all()


@archs
@pytest.mark.parametrize("dtype", HALVES)
def test_rows_of_equal_elements(arch: str, dtype: torch.dtype) -> None:
    """The longest rows for their largest element, of every exponent of f16 and as many of bf16."""
    exponents = torch.linspace(-24, 15, 40) if dtype == F16 else torch.linspace(-120, 100, 40)
    rows = (1.75 * 2.0 ** exponents.round().double())[:, None].expand(-1, 1024).to(dtype)
    w = random_weights("Q4_0", 17, 1024)
    for x in rows.split(8):
        check_linear("linear_quant", arch, x, w, out_of("linear_quant", x, w, F32))


@archs
def test_extreme_blocks(arch: str) -> None:
    """The largest and least q and integer scales: -128 of Q8_0 and of Q6_K's scales among them."""
    for kind in KINDS:
        block = QUANT_TYPES[kind]
        rows = torch.zeros(64, 3 * block.nbytes, dtype=torch.uint8)
        rows[0::4], rows[1::4], rows[2::4] = 0xFF, 0x80, 0x7F
        for offset in block.scale_offsets:
            scales = rows.view(-1, block.nbytes)[:, offset : offset + 2]
            scales.copy_(torch.tensor([0.0, 0.5 / 64], dtype=F16).view(torch.uint8)[2:].expand(
                len(scales), 2))  # fmt: skip
        w = weights_of(QuantizedTensor(rows, kind, (64, 3 * block.elements)))
        x = values(3, 3 * block.elements, dtype=BF16)
        check_linear("linear_quant", arch, x, w, out_of("linear_quant", x, w, F32))


# ------------------------------------------------------------------------------------------ qkv


def qkv_params(case: Qkv, w: list[Weights]) -> tuple[ctypes.Structure, list[Tensor]]:
    strides = case.k_cache.stride()
    qkv = abi.structs()["mk_qkv_rope_append_params"](
        **{n: getattr(case, n).data_ptr() for n in ("x", "q", "k_cache", "v_cache", "slots")},
        norm_weight=None if case.norm_weight is None else case.norm_weight.data_ptr(),
        x_stride=case.x.stride(0), q_stride=case.q.stride(0), q_head_stride=case.q.stride(1),
        cache_page_stride=strides[0], cache_stride=strides[1], cache_head_stride=strides[2],
        tokens=case.x.shape[0], hidden=case.x.shape[1],
        num_q_heads=case.heads[0], num_kv_heads=case.heads[1], head_dim=case.head_dim,
        num_pages=case.k_cache.shape[0], page_size=case.k_cache.shape[1], eps=EPS,
        slots_dtype=dtype_id(case.slots), dtype=dtype_id(case.x),
        rope=rope_struct(case.positions, case.rotary_dim, case.interleaved, case.angles),
    )  # fmt: skip
    params = abi.structs()["mk_qkv_rope_append_quant_params"](qkv=qkv)
    for i, each in enumerate(w):
        params.w[i] = each.native()
    tensors = [case.x, case.q, case.k_cache, case.v_cache, *(each.tiles for each in w)]
    tensors += [] if case.norm_weight is None else [case.norm_weight]
    return params, [*map(storage_of, tensors), case.slots, case.positions, *case.angles]


@pytest.mark.parametrize(
    "arch, kinds, tokens, hidden, heads, d",
    in_turn([
        (("Q4_K", "Q4_K", "Q6_K"), 1, 768, (4, 2), 64),
        (("Q5_0", "Q8_0", "Q4_1"), 5, 576, (9, 3), 64),
        (("Q2_K", "Q3_K", "Q5_K"), 16, 512, (2, 1), 128),
        (("Q4_0", "Q5_1", "Q4_0"), 9, 96, (3, 1), 16),
        (("Q6_K", "Q6_K", "Q6_K"), 8, 256, (2, 2), 32),
        (("Q4_K", "Q5_K", "Q6_K"), 17, 512, (2, 1), 64),
        (("Q8_0", "Q3_K", "Q4_0"), 37, 256, (3, 1), 80),
        (("Q2_K", "Q5_0", "Q4_1"), 64, 256, (2, 2), 32),
    ]),
)  # fmt: skip
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_qkv_of_three_types(
    arch: str,
    kinds: tuple[str, ...],
    tokens: int,
    hidden: int,
    heads: tuple[int, int],
    d: int,
    interleaved: bool,
) -> None:
    case = Qkv.random(
        tokens, hidden, heads, d, d,
        dtype=BF16, interleaved=interleaved, has_norm=True, padding=8, seed=tokens,
    )  # fmt: skip
    counts = (heads[0], heads[1], heads[1])
    w = [
        random_weights(kind, count * d, hidden, i)
        for i, (kind, count) in enumerate(zip(kinds, counts, strict=True))
    ]
    check_qkv(case, w, arch)


def check_qkv(case: Qkv, matrices: list[Weights], arch: str) -> None:
    """Runs it, and compares q and the caches, all of them, with the exact results."""
    params, tensors = qkv_params(case, matrices)
    run("qkv_rope_append_quant", arch, params, tensors, seed=1)
    assert case.norm_weight is not None
    w = torch.cat([each.dense for each in matrices])
    x = normalised(arch, case.x, case.norm_weight)
    (hq, hk), d = case.heads, case.head_dim
    cos, sin = (t[case.positions.long()] for t in case.angles)
    kept = (case.slots >= 0) & (case.slots < case.k_cache.shape[0] * case.k_cache.shape[1])

    def heads(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = y.unflatten(1, (hq + 2 * hk, d))
        ordered = torch.empty_like(y)
        ordered[..., case.features()] = y
        return ordered[:, :hq], ordered[:, hq : hq + hk], y[:, hq + hk :]

    exact, scale = heads(x.double() @ w.T), heads(magnitude(x, w))
    rounded = heads(x @ w.to(x.dtype).T)
    for i, name in enumerate(("q", "k_cache", "v_cache")):
        e, r, s = exact[i], rounded[i], scale[i]
        if name == "v_cache":
            s = s + e.abs()
        else:
            s = rope_scale(s, cos, sin, case.interleaved)
            s = s + rope_scale(e, cos, sin, case.interleaved)
            e = reference.rotate(e, cos, sin, case.interleaved)
            r = reference.rotate(r, cos, sin, case.interleaved).to(r.dtype)
        got = getattr(case, name)
        if name != "q":
            rows = got.flatten(0, 1)
            untouched = torch.ones(len(rows), dtype=torch.bool)
            untouched[case.slots[kept]] = False
            assert rows[untouched].isnan().all(), f"{name}: another slot was written"
            got, e, r, s = rows[case.slots[kept]], e[kept], r[kept], s[kept]
        assert_close(got, e, r, name, s)


# ----------------------------------------------------------------------------------- same bits


@pytest.mark.parametrize("arch, kind", in_turn([(kind,) for kind in KINDS]))
def test_bits_depend_on_the_row_only(arch: str, kind: str) -> None:
    """Alone or among others, at another place, by elements or by 16 bytes, for any interleaving."""
    k, n = (768 if kind in K_KINDS else 736), 130
    x, w = values(64, k, dtype=BF16), random_weights(kind, n, k)
    whole = out_of("linear_quant", x, w, F32)
    run_linear("linear_quant", arch, x, w, whole)
    places = [(0, 1, 0), (3, 8, 0), (25, 9, 0), (62, 2, 1), (16, 16, 0), (30, 17, 0), (7, 45, 1)]
    for seed, (first, m, offset) in enumerate(places):
        rows = strided(x[first : first + m], 0, offset)
        out = out_of("linear_quant", rows, w, F32)
        run_linear("linear_quant", arch, rows, w, out, seed=seed)
        assert torch.equal(out, whole[first : first + m]), (first, m, offset)


@pytest.mark.parametrize("arch, dtype, k", in_turn([
    (dtype, k) for dtype in HALVES for k in (1024, 3072, 4096)
]))  # fmt: skip
def test_shares_kept_in_registers_have_the_bits_of_others(
    arch: str, dtype: torch.dtype, k: int
) -> None:
    """Of whole quads of 1024 k, shares of rows stay in registers: of one to four quads, of one to
    four warps or of two blocks, normalised or not, huge and tiny rows among them. Rows that are not
    aligned are read twice, in loops."""
    w, norm_weight = random_weights("Q4_K", 33, k), values(k, dtype=dtype, seed=2)
    plain = values(16, k, dtype=F32)
    extreme = plain.clone()
    extreme[0] *= 2.0**100 if dtype == BF16 else 2.0**9
    extreme[4] *= 2.0**-100 if dtype == BF16 else 2.0**-18
    for m, has_norm in ((1, True), (2, False), (3, False), (5, True), (5, False), (8, False),
                        (11, False), (16, True)):  # fmt: skip
        outs = []
        for offset in (0, 1):
            rows = strided((plain if has_norm else extreme)[:m].to(dtype), 8, offset)
            out = out_of("linear_quant", rows, w, F32)
            norm = strided(norm_weight[None], 0, offset)[0] if has_norm else None
            if offset == 0:
                check_linear("linear_quant", arch, rows, w, out, norm, seed=m)
            else:
                run_linear("linear_quant", arch, rows, w, out, norm, seed=m)
            outs.append(out)
        assert torch.equal(*outs), (m, has_norm)


def test_rounds_of_chunks() -> None:
    """Rows of x that do not fit, and more rows of w than a round has: each round converts x again,
    when the last one's sums are stored."""
    k = 20 * 256
    tiles = 8 * (abi.device(BUILT[0]).num_sms // 2) + 1
    x, w = values(32, k, dtype=BF16), random_weights("Q4_0", 16 * tiles, k)
    whole, half = (out_of("linear_quant", x[:m], w, F32) for m in (32, 8))
    run_linear("linear_quant", BUILT[0], x, w, whole)
    run_linear("linear_quant", BUILT[0], x[:8], w, half)
    assert torch.equal(whole[:8], half)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_bits_are_those_of_all_devices_whose_tensor_cores_sum_alike(kind: str) -> None:
    """They have 108 to 148 SMs and 99 to 227 KB: other rounds, and chunks of k on one of them.
    mma.sync sums 8 products at once before sm_90, and 16 from it on."""
    k = 23 * 256
    x, w = values(17, k, dtype=BF16), random_weights(kind, 16 * 120, k)
    for alike in (set(BUILT) & {"80", "89"}, set(BUILT) - {"80", "89"}):
        outs = []
        for arch in sorted(alike):
            for m in (17, 8, 1):
                out = out_of("linear_quant", x[:m], w, F32)
                run_linear("linear_quant", arch, x[:m], w, out)
                outs.append(out)
        for out in outs[1:]:
            assert torch.equal(out, outs[0][: len(out)])


@settings(max_examples=20, deadline=None)
@given(
    arch=st.sampled_from(DEVICES),
    dtype=st.sampled_from(HALVES),
    m=st.integers(1, 16),
    blocks=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_norm_has_the_bits_of_rms_norm(
    arch: str, dtype: torch.dtype, m: int, blocks: int, seed: int
) -> None:
    k = 32 * blocks
    x, norm_weight = (values(*s, k, dtype=dtype, seed=seed) for s in ((m,), ()))
    w = random_weights("Q5_1", 19, k, seed)
    fused, after = (out_of("linear_quant", x, w, F32) for _ in range(2))
    run_linear("linear_quant", arch, x, w, fused, norm_weight, seed=seed)
    run_linear("linear_quant", arch, normalised(arch, x, norm_weight), w, after)
    assert torch.equal(fused, after)


# ---------------------------------------------------------------------------- plans, counters


@settings(max_examples=200, deadline=None)
@given(
    arch=st.sampled_from(list(abi.DEVICES)),
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 64),
    n=st.one_of(st.integers(1, 2**24), st.integers(1, 20000)),
    blocks=st.integers(1, 4096),
)
def test_plan_fits(arch: str, kind: str, m: int, n: int, blocks: int) -> None:
    pointer, k = 1 << 20, QUANT_TYPES[kind].elements * blocks
    bf16 = abi.constants()["MK_BF16"]
    linear = abi.structs()["mk_linear_params"](
        x=pointer, out=pointer, x_stride=k, out_stride=n, m=m, n=n, k=k, dtype=bf16, out_dtype=bf16
    )
    params = abi.structs()["mk_linear_quant_params"](linear=linear)
    params.w = abi.structs()["mk_quant_matrix"](tiles=pointer, type=GGML_NUMBERS[kind], rows=n)
    plan, device = abi.plan("linear_quant", params, arch), abi.device(arch)
    assert plan.entry.decode().endswith("_m16" if m > 8 else "_m8")
    assert plan.smem_bytes <= device.smem_per_block
    tiles, parts = ceil_div(n, 16), ceil_div(m, 16)
    assert plan.grid[1] == parts  # of rows of x
    assert 1 <= plan.grid[0] <= min(device.num_sms // parts, tiles)
    assert ceil_div(tiles, plan.grid[0]) == ceil_div(tiles, device.num_sms // parts)
    assert plan.cluster[0] == 1 or (device.sm >= 90 and m > 4 and plan.cluster[0] == 2)
    assert plan.grid[0] % plan.cluster[0] == 0


# Lane-instructions per weight (PTX, without mov), K 4096, N 11520: the bar at m = 1, and how many
# times as many m = 8 takes at the most.
BARS = {
    "Q4_0": 1.6, "Q4_1": 1.6, "Q8_0": 1.6, "Q4_K": 1.6, "Q5_0": 2.2, "Q5_1": 2.2, "Q5_K": 2.2,
    "Q6_K": 2.2, "Q2_K": 2.6, "Q3_K": 2.6,
}  # fmt: skip
GROWTH = 1.15
# What sm_80 reaches.
BUDGET = {
    "Q4_0": (1.47, 1.66), "Q4_1": (1.46, 1.65), "Q8_0": (1.39, 1.58), "Q4_K": (1.53, 1.72),
    "Q5_0": (1.87, 2.06), "Q5_1": (1.87, 2.06), "Q5_K": (1.92, 2.11), "Q6_K": (2.07, 2.26),
    "Q2_K": (1.88, 2.07), "Q3_K": (2.08, 2.27),
}  # fmt: skip


@pytest.mark.parametrize("arch, kind", [
    pytest.param(
        arch, kind, id=f"emu-sm_{arch}-{kind}",
        marks=[] if arch == "80" or kind in ("Q4_0", "Q6_K") else pytest.mark.slow,
    )
    for arch in BUILT for kind in KINDS
])  # fmt: skip
def test_instructions_and_bytes_per_weight(arch: str, kind: str) -> None:
    """What is read and executed does not depend on the values."""
    bar = BARS[kind]
    for m, budget in zip((1, 8), BUDGET[kind], strict=True):
        c, params = counts.count(kind, m, arch)
        lanes = counts.lanes_per_weight(c)
        print(f"{kind} m {m}: {lanes:.3f}")
        assert lanes <= bar, f"m {m}: {lanes:.3f} lane-instructions"
        assert lanes <= budget or arch != "80", f"m {m}: {lanes:.3f} lane-instructions"
        bar = GROWTH * lanes
        assert c.unique_read_sectors * 32 <= 1.03 * counts.compulsory_bytes(kind, m)
        assert c.unique_write_sectors == m * counts.N * 2 // 32
        # Each byte of w once; after its last tile a warp loads 16 bytes of each piece of one more,
        # and scales, which are a quarter of small tiles (and on sm_100 runs are of 10 tiles).
        assert 1 <= counts.requested_tiles(kind, m, arch, c) <= 1.09
        # Only the block sums are stored with conflicts, two wavefronts for 4 groups of a block.
        plan = abi.plan("linear_quant", params, arch)
        conflicts = c.shared_wavefronts - c.shared_wavefronts_min
        assert conflicts <= 0.5 * plan.grid[0] * m * counts.K / 256


@pytest.mark.parametrize("arch, kind, m", [
    pytest.param(
        arch, kind, m, id=f"emu-sm_{arch}-{kind}-{m}",
        marks=[] if (arch, kind, m) == ("90a", "Q4_K", 32) else pytest.mark.slow,
    )
    for arch in BUILT for kind in ("Q4_K", "Q6_K") for m in (17, 32, 64)
])  # fmt: skip
def test_bytes_and_conflicts_of_rows_in_parts(arch: str, kind: str, m: int) -> None:
    """w crosses DRAM once, and goes to each part: a part costs what its rows alone do. Only block
    sums are stored with conflicts."""
    c, _ = counts.count(kind, m, arch)
    parts = ceil_div(m, 16)
    lanes, alone = (counts.lanes_per_weight(counts.count(kind, r, arch)[0] if r != m else c)
                    for r in (m, ceil_div(m, parts)))  # fmt: skip
    print(
        f"sm_{arch} {kind} m {m}: {lanes:.2f}, {parts} times {lanes / parts:.2f}; alone {alone:.2f}"
    )
    # On sm_90 9 rows alone are converted by clusters, which read them once.
    most = 1.035 if (arch, m) == ("90a", 17) else 1.02
    assert lanes <= most * parts * alone
    assert c.unique_read_sectors * 32 <= 1.03 * counts.compulsory_bytes(kind, m)
    assert c.unique_write_sectors == m * counts.N * 2 // 32
    assert c.shared_wavefronts <= 1.01 * c.shared_wavefronts_min


@pytest.mark.skipif(not find_tool("cuobjdump"), reason="cuobjdump is not installed")
@pytest.mark.parametrize("arch", [
    pytest.param(arch, id=f"emu-sm_{arch}", marks=[] if arch == "80" else pytest.mark.slow)
    for arch in BUILT
])  # fmt: skip
def test_loop_over_tiles_in_sass(arch: str) -> None:
    """Found for each type, two tiles of 18 MMAs (and as many for the second 8 tokens) a turn."""
    for kind in KINDS:
        for tokens in (8, 16):
            loop = counts.sass_loop(kind, tokens, arch)
            assert loop is not None, (kind, tokens)
            assert loop.hmma == 2 * 18 * tokens // 8
            print(f"sm_{arch} {kind} {tokens}: {loop.instructions} instructions")
            assert tokens == 16 or loop.instructions * 32 / 8192 <= BARS[kind], kind


# ---------------------------------------------------------------------------------- can it fail


def test_comparison_sees_one_wrong_bit() -> None:
    """The lowest bit of one quant of 4096."""
    x, w = values(3, 4096, dtype=BF16), random_weights("Q4_0", 16, 4096)
    blocks = w.blocks.blocks.clone()
    blocks[5, 18 * 7 + 4] ^= 0x01
    wrong = weights_of(QuantizedTensor(blocks, "Q4_0", (16, 4096)))
    out = out_of("linear_quant", x, w, F32)
    run_linear("linear_quant", BUILT[0], x, wrong, out)
    with pytest.raises(AssertionError, match="times the error allowed"):
        compare("linear_quant", x, w, out)
    compare("linear_quant", x, wrong, out)
