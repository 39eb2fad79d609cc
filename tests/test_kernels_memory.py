"""The memory-bound kernels, on the emulator and a GPU, against the CPU ops and their definitions.

Inputs carry outliers; outputs are poisoned with NaN and padded, and the padding is checked.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import ops, reference, sampling
from tests import native_abi as abi
from tests.emulator import Emulator, EmulatorError
from tests.native_emulator import ARCHS, DEVICES, dtype_id, ptx_of, run, storage_of

Tensor = torch.Tensor
HALVES = (torch.bfloat16, torch.float16)


def on_devices(devices: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "arch",
        [
            pytest.param(d, marks=pytest.mark.gpu)
            if d == "gpu"
            else pytest.param(d, id=f"emu-sm_{d}")
            for d in devices
        ],
    )


archs = on_devices(DEVICES)
# One architecture for each main loop of the tensor-core kernels, and a GPU.
main_loops = on_devices(d for d in DEVICES if d in ("80", "90a", "gpu"))
dtypes = pytest.mark.parametrize("dtype", HALVES, ids=lambda d: str(d).removeprefix("torch."))


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values, one in 64 of them 16 times as large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    outliers = torch.rand(shape, generator=generator) < 1 / 64
    return torch.where(outliers, 16 * x, x).to(dtype)


def strided(x: Tensor, padding: int, offset: int = 0) -> Tensor:
    """x with rows `padding` elements further apart, `offset` into its storage, NaN around it."""
    rows, size = x.flatten(0, -2).shape
    storage = torch.full((offset + rows * (size + padding),), float("nan"), dtype=x.dtype)
    view = storage[offset:].view(rows, size + padding)[:, :size]
    view.copy_(x.flatten(0, -2))
    return view.view(x.shape) if padding == 0 else view.unflatten(0, x.shape[:-1])


def poisoned(x: Tensor, padding: int = 0, offset: int = 0) -> Tensor:
    """An output of x's shape: NaN, or an unlikely integer."""
    if not x.is_floating_point():
        return torch.full_like(x, -123456789)
    return strided(torch.full(x.shape, float("nan"), dtype=x.dtype), padding, offset)


def assert_close(
    got: Tensor, exact: Tensor, rounded: Tensor, name: str, scale: Tensor | None = None
) -> None:
    """DESIGN's rule: at most twice the error of the same op in PyTorch at the input dtype, plus
    one unit of the output dtype; both relative to each element, so that outliers hide nothing.
    `scale`: what an element's error is relative to, where that is not its exact value."""
    if got.numel() == 0:
        return
    assert not got.isnan().any(), f"{name}: {int(got.isnan().sum())} elements are NaN"
    info = torch.finfo(got.dtype)
    scale = (exact if scale is None else scale).abs().double().clamp(min=info.tiny)
    error, rounding = ((t.double() - exact.double()).abs() / scale for t in (got, rounded))
    allowed = 2 * rounding.max() + info.eps
    worst = int(error.argmax())
    assert error.max() <= allowed, (
        f"{name}: element {worst} is {got.flatten()[worst]}, exact {exact.flatten()[worst]}; "
        f"relative error {error.max():.2e}, allowed {allowed:.2e}"
    )


def rope_scale(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """|a cos| + |b sin| and |b cos| + |a sin|: a rotation's terms before they cancel."""
    x, cos, sin = x.double().abs(), cos.double().abs(), sin.double().abs()
    with_signs = (reference.rotate(x, cos, s, interleaved) for s in (sin, -sin))
    return torch.maximum(*with_signs)


def assert_padding_untouched(x: Tensor, name: str) -> None:
    inside = torch.zeros(storage_of(x).shape, dtype=torch.bool)
    inside.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
    assert storage_of(x)[~inside].isnan().all(), f"{name}: written outside its rows"


# ------------------------------------------------------------------------------------- rms_norm


def norm_params(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor
) -> ctypes.Structure:
    return abi.structs()["mk_rms_norm_params"](
        x=x.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        weight=weight.data_ptr(),
        out=out.data_ptr(),
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        out_stride=out.stride(0),
        rows=x.shape[0],
        hidden=x.shape[1],
        eps=1e-5,
        dtype=dtype_id(x),
    )


def check_norm(
    arch: str, x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, seed: int = 0
) -> None:
    op = "rms_norm" if residual is None else "add_rms_norm"
    total = x if residual is None else residual + x
    tensors = [storage_of(t) for t in (x, weight, out)]
    if residual is not None:
        tensors.append(storage_of(residual))
    run(op, arch, norm_params(x, residual, weight, out), tensors, seed)
    if residual is not None:
        assert torch.equal(residual, total), "residual"
        assert_padding_untouched(residual, "residual")
    exact = reference.rms_norm(total.double(), weight.double(), 1e-5)
    assert_close(out, exact, ops.rms_norm(total, weight, 1e-5), "out")
    assert_padding_untouched(out, "out")


NORM_SHAPES = [(1, 4096), (3, 576), (5, 16384), (2, 1), (7, 100), (300, 128), (4, 1000), (1, 11)]


@archs
@dtypes
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "add"])
@pytest.mark.parametrize("rows, hidden", NORM_SHAPES, ids=lambda n: str(n))
def test_rms_norm(
    arch: str, dtype: torch.dtype, with_residual: bool, rows: int, hidden: int
) -> None:
    x, residual = (values(rows, hidden, dtype=dtype, seed=i) for i in range(2))
    weight = values(hidden, dtype=dtype, seed=2)
    check_norm(arch, x, weight, residual if with_residual else None, poisoned(x))


@settings(max_examples=25, deadline=None)
@given(
    arch=st.sampled_from(DEVICES),
    dtype=st.sampled_from(HALVES),
    rows=st.integers(0, 9),
    hidden=st.one_of(st.integers(1, 300), st.integers(1, 60).map(lambda n: 8 * n)),
    padding=st.tuples(*[st.sampled_from([0, 1, 8, 24])] * 3),
    offset=st.tuples(*[st.sampled_from([0, 0, 8, 3])] * 3),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rms_norm_strides(
    arch: str,
    dtype: torch.dtype,
    rows: int,
    hidden: int,
    padding: tuple[int, ...],
    offset: tuple[int, ...],
    with_residual: bool,
    seed: int,
) -> None:
    x, residual = (
        strided(values(rows, hidden, dtype=dtype, seed=seed + i), padding[i], offset[i])
        for i in range(2)
    )
    weight = values(hidden, dtype=dtype, seed=seed + 2)
    out = poisoned(values(rows, hidden, dtype=dtype), padding[2], offset[2])
    check_norm(arch, x, weight, residual if with_residual else None, out, seed)


@dtypes
def test_rms_norm_row_bits_depend_on_the_row_only(dtype: torch.dtype) -> None:
    """Alone, in a batch of every launch shape, unaligned, on every arch, for every interleaving."""
    hidden = 1024
    x = values(600, hidden, dtype=dtype)
    weight = values(hidden, dtype=dtype, seed=1)
    results = []
    for arch in DEVICES:
        for seed, (rows, offset) in enumerate([(1, 0), (3, 0), (600, 0), (1, 1), (600, 0)]):
            batch = strided(x[:rows], 0, offset)
            out = poisoned(batch)
            tensors = [storage_of(t) for t in (batch, weight, out)]
            run("rms_norm", arch, norm_params(batch, None, weight, out), tensors, seed)
            results.append(out[0].clone())
    assert all(torch.equal(result, results[0]) for result in results)


def test_rms_norm_in_place() -> None:
    x = values(40, 512, dtype=torch.bfloat16)
    weight = values(512, dtype=torch.bfloat16, seed=1)
    expected = poisoned(x)
    run("rms_norm", "90a", norm_params(x, None, weight, expected), [x, weight, expected])
    run("rms_norm", "90a", norm_params(x, None, weight, x), [x, weight])
    assert torch.equal(x, expected)


# ----------------------------------------------------------------------------------------- rope


def tables(max_position: int, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
    angles = torch.arange(max_position, dtype=torch.float64)[:, None] * theta**-exponents
    return angles.cos().float(), angles.sin().float()


def rope_struct(
    positions: Tensor, rotary_dim: int, interleaved: bool, tables_: tuple[Tensor, Tensor] | None
) -> ctypes.Structure:
    rope = abi.structs()["mk_rope"](
        positions=positions.data_ptr(),
        positions_dtype=dtype_id(positions),
        max_position=1 << 24,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        theta=1e4,
    )
    if tables_:
        rope.cos, rope.sin = (t.data_ptr() for t in tables_)
        rope.table_stride = tables_[0].stride(0)
        rope.max_position = tables_[0].shape[0]
    return rope


def apply_rope_params(
    q: Tensor, k: Tensor, q_out: Tensor, k_out: Tensor, rope: ctypes.Structure
) -> ctypes.Structure:
    pointers = {"q": q, "k": k, "q_out": q_out, "k_out": k_out}
    strides = {}
    for name, t in pointers.items():
        strides[f"{name}_stride"], strides[f"{name}_head_stride"] = t.stride(0), t.stride(1)
    return abi.structs()["mk_apply_rope_params"](
        **{name: t.data_ptr() for name, t in pointers.items()},
        **strides,
        tokens=q.shape[0],
        num_q_heads=q.shape[1],
        num_k_heads=k.shape[1],
        head_dim=q.shape[2],
        dtype=dtype_id(q),
        rope=rope,
    )


ROPE_SHAPES = [  # tokens, query heads, key heads, head_dim, rotary_dim
    (1, 32, 8, 128, 128),
    (3, 9, 3, 64, 64),
    (2, 4, 2, 96, 96),
    (2, 3, 1, 256, 256),
    (5, 2, 1, 128, 32),
    (4, 2, 2, 80, 20),
    (2, 3, 1, 6, 2),
]


@archs
@dtypes
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("tokens, hq, hk, d, r", ROPE_SHAPES, ids=lambda n: str(n))
def test_apply_rope(
    arch: str,
    dtype: torch.dtype,
    interleaved: bool,
    tokens: int,
    hq: int,
    hk: int,
    d: int,
    r: int,
) -> None:
    q, k = (values(tokens, h, d, dtype=dtype, seed=h) for h in (hq, hk))
    q, k = strided(q, 8), strided(k, 16)
    index_dtype = torch.int32 if interleaved else torch.int64
    positions = torch.randint(0, 50, (tokens,), dtype=index_dtype)
    cos, sin = tables(50, r, 1e4)
    q_out, k_out = poisoned(q, 8), poisoned(k)
    params = apply_rope_params(
        q, k, q_out, k_out, rope_struct(positions, r, interleaved, (cos, sin))
    )
    inputs = [storage_of(t) for t in (q, k, q_out, k_out)]
    run("apply_rope", arch, params, [*inputs, positions, cos, sin])
    expected = ops.apply_rope(q, k, cos, sin, positions, interleaved)
    exact = reference.apply_rope(
        q.double(), k.double(), cos.double(), sin.double(), positions, interleaved
    )
    for name, got, e, rounded in zip("qk", (q_out, k_out), exact, expected, strict=True):
        source = q if name == "q" else k
        scale = rope_scale(source, cos[positions.long()], sin[positions.long()], interleaved)
        assert_close(got, e, rounded, name, scale)
        assert torch.equal(got[..., r:], source[..., r:]), name
        assert_padding_untouched(got, name)


@archs
def test_rope_from_theta(arch: str) -> None:
    """Angles up to 2^24 radians, sine and cosine to 2e-7: the vectors nearly cancel when rotated,
    so that fp16 resolves what is left to far better than 2^-11 of the vectors."""
    d = 128
    edges = torch.tensor([8191, 131071, 2**20 + 1, 13128257, 2**24 - 1])
    positions = torch.cat([torch.arange(64), edges, torch.randint(0, 2**24, (200,))])
    inv_freq = (1e4 ** -(torch.arange(0, d, 2, dtype=torch.float64) / d)).float()
    angles = (positions.float()[:, None] * inv_freq).double()  # the angle as fp32 has it
    a, b = (1024 * angles.sin()).half(), (1024 * angles.cos()).half()
    q = torch.cat([a, b], dim=-1)[:, None]
    out, none = poisoned(q), q[:, :0]
    rope = rope_struct(positions, d, False, None)
    run("apply_rope", arch, apply_rope_params(q, none, out, none, rope), [q, out, positions])
    a, b, got = a.double(), b.double(), out[:, 0].double()
    exact = torch.cat(
        [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1
    )
    terms = (a.abs() + b.abs()).repeat(1, 2)
    assert ((got - exact).abs() <= (2e-7 + 2**-23) * terms + 2**-11 * exact.abs()).all()
    assert exact[:, : d // 2].abs().max() < 1, "the first half does not cancel"


def test_apply_rope_in_place_and_position_out_of_range() -> None:
    q = values(3, 2, 64, dtype=torch.bfloat16)
    k = values(3, 1, 64, dtype=torch.bfloat16, seed=1)
    positions = torch.tensor([4, 10, -1])
    cos, sin = tables(10, 64, 1e4)
    expected = ops.apply_rope(q[:1], k[:1], cos, sin, positions[:1])
    params = apply_rope_params(q, k, q, k, rope_struct(positions, 64, False, (cos, sin)))
    run("apply_rope", "80", params, [q, k, positions, cos, sin])
    for got, first in zip((q, k), expected, strict=True):
        torch.testing.assert_close(got[:1], first, atol=0.01, rtol=2**-7)
        assert got[1:].isnan().all()


@archs
@dtypes
@pytest.mark.parametrize("page, hk, d, r", [(16, 8, 128, 128), (4, 3, 64, 64), (8, 2, 24, 12)])
def test_rope_append(arch: str, dtype: torch.dtype, page: int, hk: int, d: int, r: int) -> None:
    """Slots in any order, negative and past the end; nothing else in the cache is written."""
    num_pages, tokens = 5, 6
    k, v = (strided(values(tokens, hk, d, dtype=dtype, seed=i), 8) for i in range(2))
    caches = [torch.full((num_pages, page, hk, d), float("nan"), dtype=dtype) for _ in range(2)]
    slots = torch.tensor([page * num_pages - 1, 0, -1, page + 2, page * num_pages, 1])
    positions = torch.tensor([7, 0, 1, 9, 2, 3], dtype=torch.int32)
    cos, sin = tables(10, r, 1e4)
    strides = caches[0].stride()
    params = abi.structs()["mk_rope_append_params"](
        k=k.data_ptr(),
        v=v.data_ptr(),
        k_cache=caches[0].data_ptr(),
        v_cache=caches[1].data_ptr(),
        slots=slots.data_ptr(),
        k_stride=k.stride(0),
        k_head_stride=k.stride(1),
        v_stride=v.stride(0),
        v_head_stride=v.stride(1),
        cache_page_stride=strides[0],
        cache_stride=strides[1],
        cache_head_stride=strides[2],
        tokens=tokens,
        num_heads=hk,
        head_dim=d,
        num_pages=num_pages,
        page_size=page,
        slots_dtype=dtype_id(slots),
        dtype=dtype_id(k),
        rope=rope_struct(positions, r, False, (cos, sin)),
    )
    tensors = [storage_of(k), storage_of(v), *caches, slots, positions, cos, sin]
    run("rope_append", arch, params, tensors)
    kept = (slots >= 0) & (slots < page * num_pages)
    angles = cos[positions.long()], sin[positions.long()]
    exact, scale = reference.rotate(k.double(), *angles), rope_scale(k, *angles)
    rounded = ops.apply_rope(k, k, cos, sin, positions)[0]
    k_rows, v_rows = (cache.flatten(0, 1) for cache in caches)
    assert_close(k_rows[slots[kept]], exact[kept], rounded[kept], "k_cache", scale[kept])
    assert torch.equal(v_rows[slots[kept]], v[kept])
    untouched = torch.ones(page * num_pages, dtype=torch.bool)
    untouched[slots[kept]] = False
    assert k_rows[untouched].isnan().all() and v_rows[untouched].isnan().all()


# --------------------------------------------------------------------- silu_and_mul, embedding


@archs
@dtypes
@pytest.mark.parametrize(
    "rows, size, padding", [(1, 11520, 0), (5, 1536, 8), (3, 100, 0), (2, 8, 1), (700, 192, 0)]
)
def test_silu_and_mul(arch: str, dtype: torch.dtype, rows: int, size: int, padding: int) -> None:
    gate_up = strided(values(rows, 2 * size, dtype=dtype), padding)
    out = poisoned(gate_up[:, :size], padding)
    params = abi.structs()["mk_silu_and_mul_params"](
        gate_up=gate_up.data_ptr(),
        out=out.data_ptr(),
        gate_up_stride=gate_up.stride(0),
        out_stride=out.stride(0),
        rows=rows,
        size=size,
        dtype=dtype_id(gate_up),
    )
    run("silu_and_mul", arch, params, [storage_of(gate_up), storage_of(out)])
    exact = reference.silu_and_mul(gate_up.double())
    assert_close(out, exact, ops.silu_and_mul(gate_up), "out")
    assert_padding_untouched(out, "out")


def test_silu_and_mul_of_extreme_gates() -> None:
    """The exponential over- and underflows; the limits are silu's own."""
    gate = torch.tensor([-3e38, -1e4, -100, -88, 88, 100, 1e4, 3e38], dtype=torch.bfloat16)
    gate_up = torch.cat([gate, torch.ones(8, dtype=torch.bfloat16)])[None]
    out = poisoned(gate_up[:, :8])
    params = abi.structs()["mk_silu_and_mul_params"](
        gate_up=gate_up.data_ptr(), out=out.data_ptr(), gate_up_stride=16, out_stride=8,
        rows=1, size=8, dtype=dtype_id(out),
    )  # fmt: skip
    run("silu_and_mul", "90a", params, [gate_up, out])
    torch.testing.assert_close(out, ops.silu_and_mul(gate_up), atol=1e-36, rtol=2**-7)


@archs
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["i32", "i64"])
@pytest.mark.parametrize("hidden, padding", [(4096, 0), (576, 8), (100, 0), (7, 3)])
def test_embedding(arch: str, index_dtype: torch.dtype, hidden: int, padding: int) -> None:
    table = strided(values(50, hidden, dtype=torch.bfloat16), padding)
    ids = torch.tensor([3, 49, 0, 50, -1, 3], dtype=index_dtype)
    out = strided(torch.zeros(6, hidden, dtype=torch.bfloat16), padding)
    params = abi.structs()["mk_embedding_params"](
        ids=ids.data_ptr(),
        table=table.data_ptr(),
        out=out.data_ptr(),
        table_stride=table.stride(0),
        out_stride=out.stride(0),
        tokens=6,
        vocab=50,
        hidden=hidden,
        ids_dtype=dtype_id(ids),
        dtype=dtype_id(table),
    )
    run("embedding", arch, params, [storage_of(table), storage_of(out), ids])
    assert torch.equal(out[[0, 1, 2, 5]], table[[3, 49, 0, 3]])
    assert out[3:5].isnan().all()
    assert_padding_untouched(out, "out")


# ------------------------------------------------------------------------------ argmax, sampling

LOGITS = (torch.bfloat16, torch.float16, torch.float32)
logits_dtypes = pytest.mark.parametrize(
    "dtype", LOGITS, ids=lambda d: str(d).removeprefix("torch.")
)


def run_argmax(arch: str, logits: Tensor) -> Tensor:
    out = torch.full((logits.shape[0],), -123, dtype=torch.int64)
    params = abi.structs()["mk_argmax_params"](
        logits=logits.data_ptr(),
        out=out.data_ptr(),
        logits_stride=logits.stride(0),
        rows=logits.shape[0],
        vocab=logits.shape[1],
        dtype=dtype_id(logits),
    )
    run("argmax", arch, params, [storage_of(logits), out])
    return out


@archs
@logits_dtypes
@pytest.mark.parametrize("vocab, padding", [(1, 0), (1000, 0), (8192, 8), (331, 2), (20011, 0)])
def test_argmax(arch: str, dtype: torch.dtype, vocab: int, padding: int) -> None:
    """Rounded to few values, so that most rows have ties: the first one counts."""
    logits = strided(values(4, vocab, dtype=dtype).round(), padding)
    assert torch.equal(run_argmax(arch, logits), logits.argmax(-1))


def test_argmax_of_special_values() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[-inf] * 9, [1, nan, 2, nan] + [0] * 5, [-0.0, 0.0] + [-1] * 7, [-5, inf] + [inf] * 7]
    logits = torch.tensor(rows)
    assert run_argmax("80", logits).tolist() == [0, 1, 0, 1]


def run_sample(
    arch: str, logits: Tensor, params: list[tuple[sampling.SamplingParams, int]]
) -> list[int]:
    """params: of each row, and its step."""
    how = (abi.structs()["mk_sampling"] * len(params))()
    for row, (p, step) in zip(how, params, strict=True):
        row.top_p, row.min_p, row.seed, row.step = p.top_p, p.min_p, p.seed, step
        row.temperature, row.top_k = p.temperature, p.top_k
    device = torch.from_numpy(np.frombuffer(how, dtype=np.uint8).copy())
    out = torch.full((len(params),), -123, dtype=torch.int64)
    c_params = abi.structs()["mk_sample_params"](
        logits=logits.data_ptr(),
        sampling=device.data_ptr(),
        out=out.data_ptr(),
        logits_stride=logits.stride(0),
        rows=logits.shape[0],
        vocab=logits.shape[1],
        dtype=dtype_id(logits),
    )
    run("sample", arch, c_params, [storage_of(logits), device, out])
    return out.tolist()


def expected_tokens(logits: Tensor, params: list[tuple[sampling.SamplingParams, int]]) -> list[int]:
    states = []
    for p, step in params:
        state = sampling.SamplingState(p, [])
        state.step = step
        states.append(state)
    return [s.token_id for s in sampling.sample(logits, states)]


RULES = {
    "plain": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
    "flat": {"temperature": 50.0, "top_p": 0.95, "top_k": 300},
    "sharp": {"temperature": 0.05, "top_p": 0.99},
    "greedy": {"temperature": 0.0},
}


@archs
@logits_dtypes
@pytest.mark.parametrize("rule", RULES)
def test_sample_equals_the_cpu_sampler(arch: str, dtype: torch.dtype, rule: str) -> None:
    """The same tokens for the same seeds; ties (rounded logits) and vocabularies of all kinds."""

    def options(seed: int) -> sampling.SamplingParams:
        return sampling.SamplingParams(**{"temperature": 0.9, "seed": seed, **RULES[rule]})

    for vocab, ties in ((331, False), (1024, True), (6000, False)):
        logits = values(6, vocab, dtype=dtype, seed=vocab) * 2
        logits = logits.round() if ties else logits
        params = [(options(1 + i * 0x1_2345_6789), 7 * i) for i in range(len(logits))]
        assert run_sample(arch, logits, params) == expected_tokens(logits, params)


def test_sample_from_a_full_vocabulary() -> None:
    """131072 logits in bf16, hence many ties; each rule of RULES on its own row."""
    logits = values(len(RULES), 131072, dtype=torch.bfloat16, seed=5)
    params = [
        (sampling.SamplingParams(**{"temperature": 0.8, "seed": 2**63 + i, **rule}), i)
        for i, rule in enumerate(RULES.values())
    ]
    assert run_sample("90a", logits, params) == expected_tokens(logits, params)


def test_sample_distribution_covers_the_kept_tokens() -> None:
    """4 equal logits, top_k 3: the first three ids, about equally often."""
    logits = torch.full((240, 16), -1.0)
    logits[:, 4:8] = 1.0
    params = [(sampling.SamplingParams(temperature=1.0, seed=9, top_k=3), i) for i in range(240)]
    counts = torch.tensor(run_sample("90a", logits, params)).bincount(minlength=16)
    assert counts[[4, 5, 6]].sum() == 240 and counts[[4, 5, 6]].min() > 50


def test_sample_of_logits_that_are_not_finite() -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor([[0.0, nan] * 4, [1.0, inf] * 4, [-inf] * 8, [-inf, 3.0] * 4])
    for temperature in (0.0, 1.0):
        p = sampling.SamplingParams(temperature=temperature, seed=1)
        *bad, good = run_sample("80", logits, [(p, i) for i in range(4)])
        assert bad == [-1, -1, -1] and good % 2 == 1


# --------------------------------------------------------------------------------- bytes moved


@pytest.mark.parametrize("arch", ARCHS)
def test_each_op_moves_the_compulsory_bytes(arch: str) -> None:
    """Distinct 32-byte sectors read and written are those of the tensors, to the last one; what is
    requested on top of that is shared tables and weights, bounded here."""
    dtype, rows, hidden = torch.bfloat16, 64, 4096
    x, residual, out = (values(rows, hidden, dtype=dtype, seed=i) for i in range(3))
    weight = values(hidden, dtype=dtype)
    positions, ids = torch.arange(rows), torch.arange(rows)
    cos, sin = tables(rows, 128, 1e6)
    q, k = x.view(rows, 32, 128), residual.view(rows, 32, 128)
    rope = rope_struct(positions, 128, False, (cos, sin))
    gate_up = values(rows, 2 * hidden, dtype=dtype)
    cases = [
        ("rms_norm", norm_params(x, None, weight, out), [x, weight], [out]),
        (
            "add_rms_norm",
            norm_params(x, residual, weight, out),
            [x, residual, weight],
            [out, residual],
        ),
        ("apply_rope", apply_rope_params(q, k, q, k, rope), [q, k, cos, sin, positions], [q, k]),
        (
            "silu_and_mul",
            abi.structs()["mk_silu_and_mul_params"](
                gate_up=gate_up.data_ptr(), out=out.data_ptr(), gate_up_stride=2 * hidden,
                out_stride=hidden, rows=rows, size=hidden, dtype=dtype_id(out),
            ),
            [gate_up],
            [out],
        ),
        (
            "embedding",
            abi.structs()["mk_embedding_params"](
                ids=ids.data_ptr(), table=x.data_ptr(), out=out.data_ptr(), table_stride=hidden,
                out_stride=hidden, tokens=rows, vocab=rows, hidden=hidden, ids_dtype=dtype_id(ids),
                dtype=dtype_id(out),
            ),
            [x, ids],
            [out],
        ),
    ]  # fmt: skip
    for op, params, read, written in cases:
        counters = run(op, arch, params, [*read, *written])
        sectors = [sum(t.nbytes for t in tensors) // 32 for tensors in (read, written)]
        print(
            f"{op:14} sm_{arch:5} compulsory {sectors[0]:6} + {sectors[1]:6} sectors, moved "
            f"{counters.unique_read_sectors:6} + {counters.unique_write_sectors:6}, requested "
            f"{counters.read_sectors:6} + {counters.write_sectors:6}"
        )
        assert abs(counters.unique_read_sectors - sectors[0]) <= len(read), op
        assert abs(counters.unique_write_sectors - sectors[1]) <= len(written), op
        assert counters.write_sectors == counters.unique_write_sectors, op
        assert counters.read_sectors <= 2.1 * sectors[0], op


# ------------------------------------------------------------------------------ planted faults


def run_changed(
    op: str, params: ctypes.Structure, tensors: list[Tensor], old: str, new: str
) -> None:
    """The op on the emulated A100, with every `old` in its PTX replaced by `new`."""
    plan = abi.plan(op, params, "80")
    entry = plan.entry.decode()
    (text,) = (t for t in ptx_of("80") if f".entry {entry}(" in t)
    before, name, after = text.partition(f".entry {entry}(")
    body, brace, rest = after.partition("\n}\n")
    assert re.search(old, body), f"{old} is not in {entry}"
    changed = before + name + re.sub(old, new, body) + brace + rest
    kernel = Emulator("sm_80").load(changed).kernel(entry)
    kernel.launch(plan.grid[:], plan.block[:], [bytes(params)], regions=tensors)


def test_a_missing_barrier_is_found() -> None:
    x, weight = values(1, 4096, dtype=torch.bfloat16), values(4096, dtype=torch.bfloat16)
    out = poisoned(x)
    params = norm_params(x, None, weight, out)
    with pytest.raises(EmulatorError, match=r"shared memory|shared-memory race"):
        run_changed("rms_norm", params, [x, weight, out], r"bar(rier)?\.sync[^;]*;", "")


@pytest.mark.parametrize(
    "old, new",
    [
        (r"0fBFB8AA3B", "0fBFB8A03B"),  # log2(e), off by 4e-5 of itself: too small to be seen
        (r"0fBFB8AA3B", "0fBFB20000"),  # off by 4 %
        (r"st\.global\.v4", "// st.global.v4"),  # nothing is stored
    ],
    ids=["harmless", "constant", "store"],
)
def test_a_wrong_result_is_found(old: str, new: str) -> None:
    gate_up = values(2, 256, dtype=torch.bfloat16)
    out = poisoned(gate_up[:, :128])
    params = abi.structs()["mk_silu_and_mul_params"](
        gate_up=gate_up.data_ptr(), out=out.data_ptr(), gate_up_stride=256, out_stride=128,
        rows=2, size=128, dtype=dtype_id(out),
    )  # fmt: skip
    run_changed("silu_and_mul", params, [gate_up, out], old, new)
    exact, rounded = reference.silu_and_mul(gate_up.double()), ops.silu_and_mul(gate_up)
    if new == "0fBFB8A03B":
        assert_close(out, exact, rounded, "out")
    else:
        with pytest.raises(AssertionError, match="out"):
            assert_close(out, exact, rounded, "out")
