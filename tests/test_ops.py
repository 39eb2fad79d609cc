"""Every op of the CPU path against reference.py, by the tolerance rule of the design.

An op passes when its error against the fp64 reference is at most twice the error of the same op
composed of plain PyTorch in the input dtype, plus one unit of the output dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import ops, reference, torch_ops

Tensor = torch.Tensor
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 33, 129]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal values with a few outliers of 20 times the size."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator)
    spikes = torch.rand(shape, generator=generator) < 0.01
    return torch.where(spikes, 20 * x, x).to(dtype)


def check(actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The tolerance rule: ``exact`` fp64, ``eager`` PyTorch's own answer in actual's dtype."""
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    error = (actual.double() - exact).abs()
    unit = torch.finfo(actual.dtype).eps * exact.abs().clamp(min=torch.finfo(actual.dtype).tiny)
    limit = 2 * (eager.double() - exact).abs().max() + unit
    worst = (error - limit).max()
    assert worst <= 0, f"error {error.max():.3e} exceeds its limit by {worst:.3e}"


def wide(*tensors: Any) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) else t for t in tensors]


# ------------------------------------------------------------------------------- norm, rope, act


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [1, 7, 576, 4096])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_rms_norm(dtype: torch.dtype, hidden: int, rows: int) -> None:
    x, w = randn(rows, hidden, dtype=dtype), randn(hidden, dtype=dtype, seed=1)
    exact = reference.rms_norm(*wide(x, w), 1e-5)
    actual = ops.rms_norm(x, w, 1e-5)
    if rows:
        # Hugging Face's rounding order, bit for bit: normalise, round, multiply. The fp32 scale is
        # that of the exact mean, where PyTorch's own has the rounding errors of an fp32 sum.
        mean = x.double().square().mean(-1, keepdim=True)
        scale = torch.rsqrt(mean + torch.tensor(1e-5).double()).float()
        assert torch.equal(actual, w * (x.float() * scale).to(dtype))
        x32 = x.float()
        hf = w * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
        check(actual, exact, hf)
    assert actual.shape == x.shape and actual.dtype == dtype


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_rms_norm_random_shapes_and_strides(data: st.DataObject) -> None:
    rows, hidden = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 300))
    step = data.draw(st.integers(1, 3))
    x = randn(rows, hidden * step)[:, ::step][:, :hidden]
    assert x.stride(1) == step or hidden == 1
    w = randn(hidden, seed=1)
    check(
        ops.rms_norm(x, w, 1e-5),
        reference.rms_norm(*wide(x, w), 1e-5),
        F.rms_norm(x, (hidden,), w, 1e-5),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_updates_the_residual_only(dtype: torch.dtype) -> None:
    x, residual, w = (randn(33, 64, dtype=dtype, seed=i) for i in range(3))
    x, w = x.contiguous(), w[0].contiguous()
    x_before, sum_before = x.clone(), x + residual
    y = ops.add_rms_norm(x, residual, w, 1e-5)
    assert torch.equal(residual, sum_before) and torch.equal(x, x_before)
    assert torch.equal(y, ops.rms_norm(sum_before, w, 1e-5))


def table(positions: int, rotated: int, theta: float = 1e4) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] / theta ** (torch.arange(rotated // 2) * 2 / rotated)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rotated"), [(64, 64), (128, 128), (96, 64), (2, 2)])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_apply_rope(
    dtype: torch.dtype, interleaved: bool, head_dim: int, rotated: int, index: torch.dtype
) -> None:
    q, k = randn(9, 4, head_dim, dtype=dtype), randn(9, 2, head_dim, dtype=dtype, seed=1)
    cos, sin = table(50, rotated)
    positions = torch.tensor([0, 1, 2, 49, 48, 7, 7, 3, 11], dtype=index)
    before = q.clone()
    actual = ops.apply_rope(q, k, cos, sin, positions, interleaved)
    exact = reference.apply_rope(*wide(q, k, cos, sin), positions, interleaved)
    narrow = reference.apply_rope(q, k, cos, sin, positions, interleaved)
    for a, e, n in zip(actual, exact, narrow, strict=True):
        check(a, e, n.to(dtype))
    assert torch.equal(q, before)


def test_rope_pairings_are_permutations_of_each_other() -> None:
    q, k = randn(5, 2, 64), randn(5, 1, 64, seed=1)
    cos, sin = table(5, 64)
    positions = torch.arange(5)
    order = torch.arange(64).view(32, 2).T.flatten()  # half-split feature i holds pair order
    half = ops.apply_rope(q[..., order], k[..., order], cos, sin, positions)
    pairs = ops.apply_rope(q, k, cos, sin, positions, interleaved=True)
    assert torch.equal(half[0], pairs[0][..., order])
    assert torch.equal(half[1], pairs[1][..., order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_silu_and_mul(dtype: torch.dtype, size: int) -> None:
    x = randn(5, 2 * size, dtype=dtype)
    gate, up = x.chunk(2, -1)
    check(ops.silu_and_mul(x), reference.silu_and_mul(x.double()), F.silu(gate) * up)


# ----------------------------------------------------------------------------------------- linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, *SIZES])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 7), (129, 576), (192, 129)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear(dtype: torch.dtype, m: int, n: int, k: int, with_residual: bool) -> None:
    x, w = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1)
    residual = randn(m, n, dtype=dtype, seed=2) if with_residual else None
    before = None if residual is None else residual.clone()
    actual = ops.linear(x, w, residual)
    eager = F.linear(x, w)
    if residual is not None:
        eager = eager + residual
        assert before is not None and torch.equal(residual, before)
    assert actual.dtype == dtype and actual.shape == (m, n)
    if m:
        check(actual, reference.linear(*wide(x, w, residual)), eager)


@pytest.mark.parametrize("epilogue", ["none", "residual"])
@given(st.integers(2, 150), st.integers(1, 130), st.integers(1, 130))
@settings(max_examples=25, deadline=None)
def test_linear_rows_do_not_depend_on_the_batch(epilogue: str, m: int, n: int, k: int) -> None:
    x, w, r = randn(m, k), randn(n, k, seed=1), randn(m, n, seed=2)
    residual = r if epilogue == "residual" else None
    together = ops.linear(x, w, residual)
    for i in {0, m // 2, m - 1}:
        row = slice(i, i + 1)
        alone = ops.linear(x[row], w, None if residual is None else residual[row])
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 33])
def test_linear_gives_float32_of_sums_that_it_rounds_otherwise(dtype: torch.dtype, m: int) -> None:
    x, w, weight = randn(m, 129, dtype=dtype), randn(70, 129, dtype=dtype), randn(129, dtype=dtype)
    for norm in (None, ops.Norm(weight, 1e-5)):
        logits = ops.linear(x, w, norm=norm, out_dtype=torch.float32)
        assert logits.dtype == torch.float32 and logits.shape == (m, 70)
        assert torch.equal(logits.to(dtype), ops.linear(x, w, norm=norm))
        rows = x if norm is None else ops.rms_norm(x, *norm)
        assert torch.equal(logits, ops.linear(rows, w, out_dtype=torch.float32))
        if m:
            exact = reference.linear(*wide(rows, w))
            check(logits, exact, F.linear(rows.float(), w.float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("packed", [False, True])
def test_swiglu_mlp(dtype: torch.dtype, tokens: int, packed: bool) -> None:
    hidden, inter = 64, 101
    x, residual = randn(tokens, hidden, dtype=dtype), randn(tokens, hidden, dtype=dtype, seed=1)
    gate, up = (randn(inter, hidden, dtype=dtype, seed=s) / 8 for s in (2, 3))
    down, weight = randn(hidden, inter, dtype=dtype, seed=4) / 8, randn(hidden, dtype=dtype, seed=5)
    matrices = torch.cat((gate, up)) if packed else (gate, up)
    actual = ops.swiglu_mlp(x, matrices, down, ops.Norm(weight, 1e-5), residual)
    normed = ops.rms_norm(x, weight, 1e-5)
    eager = residual + F.linear(F.silu(F.linear(normed, gate)) * F.linear(normed, up), down)
    exact = reference.swiglu_mlp(
        x.double(),
        (gate.double(), up.double()),
        down.double(),
        ops.Norm(weight.double(), 1e-5),
        residual.double(),
    )
    check(actual, exact, eager)


@pytest.mark.parametrize("packed", [False, True])
def test_swiglu_mlp_in_float32(packed: bool) -> None:
    """The sums that a bfloat16 result is rounded from; nothing is added to them."""
    half = {"dtype": torch.bfloat16}
    x, gate, up = randn(9, 64, **half), randn(101, 64, **half), randn(101, 64, seed=1, **half)
    down, norm = randn(64, 101, seed=2, **half), ops.Norm(randn(64, seed=3, **half), 1e-5)
    matrices = ops.pack_gate_up(gate, up) if packed else (gate, up)
    sums = ops.swiglu_mlp(x, matrices, down, norm, out_dtype=torch.float32)
    assert sums.dtype == torch.float32 and not torch.equal(sums, sums.bfloat16().float())
    assert torch.equal(sums.bfloat16(), ops.swiglu_mlp(x, matrices, down, norm))
    with pytest.raises(ValueError, match="out_dtype"):
        ops.swiglu_mlp(x, matrices, down, norm, x, out_dtype=torch.float32)


def test_swiglu_rows_do_not_depend_on_the_batch() -> None:
    x, gate, up, down = (randn(*s) for s in ((97, 48), (75, 48), (75, 48), (48, 75)))
    together = ops.swiglu_mlp(x, (gate, up), down)
    for i in range(0, 97, 8):
        assert torch.equal(together[i : i + 1], ops.swiglu_mlp(x[i : i + 1], (gate, up), down))


def test_packed_gate_up_gives_the_same_bits() -> None:
    x, gate, up, down = (randn(*s) for s in ((9, 48), (75, 48), (75, 48), (48, 75)))
    packed = ops.pack_gate_up(gate, up)
    assert torch.equal(packed.weight[2:4], torch.stack((gate[1], up[1])))
    for a, b in zip(ops.unpack_gate_up(packed), (gate, up), strict=True):
        assert torch.equal(a, b)
    norm = ops.Norm(randn(48, seed=1), 1e-5)
    expected = ops.swiglu_mlp(x, (gate, up), down, norm, x)
    assert torch.equal(ops.swiglu_mlp(x, packed, down, norm, x), expected)


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([(16, 16), (24, 8), (64, 64), (6, 2)]),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_packed_qkv_gives_the_same_bits(
    group: int, hk: int, dims: tuple[int, int], interleaved: bool
) -> None:
    (d, rotated), hidden, tokens = dims, 40, 5
    wq, wk, wv = (randn(h * d, hidden, seed=h) for h in (group * hk, hk, hk))
    packed = ops.pack_qkv(wq, wk, wv, d, rotated, interleaved)
    for a, b in zip(ops.unpack_qkv(packed), (wq, wk, wv), strict=True):
        assert torch.equal(a, b)
    first = 1 if interleaved else rotated // 2  # the partner of feature 0
    assert torch.equal(packed.weight[:2], wq[[0, first]])
    rope = ops.Rope(*table(20, rotated), torch.tensor([3, 0, 19, 7, 7]), interleaved)
    results = []
    for w in (packed, (wq, wk, wv)):
        cache = torch.zeros(2, 16, hk, d), torch.zeros(2, 16, hk, d)
        slots = torch.tensor([0, 31, -1, 8, 9])
        norm = ops.Norm(randn(hidden), 1e-5)
        q = ops.qkv_rope_append(randn(tokens, hidden), norm, w, rope, cache, slots)
        results.append((q, *cache))
    assert all(map(torch.equal, *results))


def test_embedding_gathers_rows_and_refuses_others() -> None:
    weight = randn(20, 8)
    ids = torch.tensor([19, 0, 3, 3], dtype=torch.int32)
    assert torch.equal(ops.embedding(ids, weight), weight[ids.long()])
    for bad in (20, -1):
        with pytest.raises(ValueError, match=r"ids must lie in 0\.\.19"):
            ops.embedding(torch.tensor([bad]), weight)


# -------------------------------------------------------------------------------------- attention


def sdpa_eager(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, scale: float | None = None
) -> Tensor:
    """One sequence as a model author would write it, in the input dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    distance = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
    distance = distance - torch.arange(k.shape[0])
    if causal:
        logits = logits.masked_fill(distance < 0, -math.inf)
    if window is not None:
        logits = logits.masked_fill(distance.abs() >= window, -math.inf)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1).nan_to_num(0), v)


def cu_seqlens(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


ATTENTION_CASES = [
    # queries, keys per sequence; Hq, Hk, D; causal; window
    ([1], [1], 1, 1, 64, True, None),
    ([7, 33, 129], [7, 33, 129], 4, 2, 64, True, None),
    ([7, 33, 129], [7, 33, 129], 4, 1, 128, False, None),
    ([1, 1, 5], [33, 129, 40], 9, 3, 64, True, None),
    ([1, 5, 40], [33, 20, 40], 4, 4, 64, True, 8),
    ([12, 3], [12, 30], 2, 2, 64, False, 5),
    ([10, 0, 4], [4, 5, 0], 4, 2, 64, True, None),  # more queries than keys; empty ones
    ([10, 4], [4, 0], 4, 2, 64, False, 3),
    ([], [], 2, 1, 64, True, None),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention(dtype: torch.dtype, case: Any) -> None:
    len_q, len_k, hq, hk, d, causal, window = case
    q = randn(sum(len_q), hq, d, dtype=dtype)
    k, v = (randn(sum(len_k), hk, d, dtype=dtype, seed=s) for s in (1, 2))
    cu_q, cu_k = cu_seqlens(len_q), cu_seqlens(len_k)
    out, lse = ops.attention(
        q, k, v, cu_q, cu_k, causal=causal, window=window, softmax_scale=0.1, return_lse=True
    )
    if not len_q:
        assert out.shape == (0, hq, d) and lse.shape == (hq, 0)
        return
    exact, exact_lse = reference.attention(
        *wide(q, k, v), cu_q, cu_k, causal=causal, window=window, softmax_scale=0.1
    )
    eager = torch.cat(
        [
            sdpa_eager(qs, ks, vs, causal, window, 0.1)
            for qs, ks, vs in zip(q.split(len_q), k.split(len_k), v.split(len_k), strict=True)
        ]
    )
    check(out, exact, eager)
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    seen = ~exact_lse.isinf()
    assert torch.allclose(lse[seen].double(), exact_lse[seen], rtol=1e-5, atol=1e-5)


def test_attention_rotates_q_and_k_by_their_place() -> None:
    len_q, len_k = [3, 9], [8, 9]
    q, k, v = randn(12, 4, 64), randn(17, 2, 64, seed=1), randn(17, 2, 64, seed=2)
    rope = ops.Rope(*table(20, 64))
    cu_q, cu_k = cu_seqlens(len_q), cu_seqlens(len_k)
    exact, _ = reference.attention(
        *wide(q, k, v), cu_q, cu_k, rope=ops.Rope(*wide(rope.cos, rope.sin))
    )
    eager, _ = reference.attention(q, k, v, cu_q, cu_k, rope=rope)
    check(ops.attention(q, k, v, cu_q, cu_k, rope=rope), exact, eager)


class PagedCase:
    """Sequences of random K/V, in contiguous tensors and scattered over a NaN-poisoned cache."""

    def __init__(
        self, lengths: list[int], added: list[int], hk: int, d: int, page: int, dtype: torch.dtype
    ) -> None:
        self.lengths, self.added = lengths, added
        total = [n + m for n, m in zip(lengths, added, strict=True)]
        self.k = [randn(n, hk, d, dtype=dtype, seed=i) for i, n in enumerate(total)]
        self.v = [randn(n, hk, d, dtype=dtype, seed=100 + i) for i, n in enumerate(total)]
        width = max(1, max(-(-n // page) for n in total))
        num_pages = width * len(total) + 3
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(3)).tolist()
        self.table = torch.tensor(
            [order[i * width : (i + 1) * width] for i in range(len(total))], dtype=torch.int32
        )
        shape = (num_pages, page, hk, d)
        self.k_cache = torch.full(shape, math.nan, dtype=dtype)
        self.v_cache = torch.full(shape, math.nan, dtype=dtype)
        for i, n in enumerate(lengths):
            for p in range(n):
                at = self.table[i, p // page], p % page
                self.k_cache[at], self.v_cache[at] = self.k[i][p], self.v[i][p]
        self.seqlens = torch.tensor(lengths, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page", [16, 32, 64, 128])
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("window", [None, 9])
def test_attention_kvcache(dtype: torch.dtype, page: int, append: bool, window: int | None) -> None:
    hq, hk, d = 6, 2, 64
    added = [1, 5, 33, 1] if append else [0, 0, 0, 0]
    counts = [1, 5, 33, 1]
    case = PagedCase([0, 40, 100, 129] if append else [1, 45, 133, 130], added, hk, d, page, dtype)
    q = randn(sum(counts), hq, d, dtype=dtype, seed=7)
    k_new = torch.cat([k[n:] for k, n in zip(case.k, case.lengths, strict=True)])
    v_new = torch.cat([v[n:] for v, n in zip(case.v, case.lengths, strict=True)])
    out = ops.attention_kvcache(
        q,
        k_new if append else None,
        v_new if append else None,
        case.k_cache,
        case.v_cache,
        case.table,
        case.seqlens,
        cu_seqlens_q=cu_seqlens(counts),
        window=window,
    )
    pairs = list(zip(q.split(counts), case.k, case.v, strict=True))
    exact = torch.cat([reference.attend(*wide(*t), window=window)[0] for t in pairs])
    eager = torch.cat([sdpa_eager(*t, True, window) for t in pairs])
    check(out, exact, eager)
    if append:  # and now they are in the cache
        last = case.lengths[2] + 32
        at = case.table[2, last // page], last % page
        assert torch.equal(case.k_cache[at], case.k[2][last])


def test_attention_kvcache_rotates_q_and_the_new_k() -> None:
    case = PagedCase([20, 0], [1, 3], 2, 64, 16, torch.float32)
    q = randn(4, 4, 64, seed=9)
    cos, sin = table(64, 64)
    new = torch.cat([case.k[0][20:], case.k[1]])
    v_new = torch.cat([case.v[0][20:], case.v[1]])
    positions = torch.tensor([20, 0, 1, 2])
    rotated_q, rotated_k = ops.apply_rope(q, new, cos, sin, positions)
    out = ops.attention_kvcache(
        q,
        new,
        v_new,
        case.k_cache,
        case.v_cache,
        case.table,
        case.seqlens,
        ops.Rope(cos, sin),
        cu_seqlens_q=cu_seqlens([1, 3]),
    )
    keys = [torch.cat([case.k[0][:20], rotated_k[:1]]), rotated_k[1:]]
    expected = torch.cat(
        [
            reference.attend(*wide(qs, ks, vs))[0]
            for qs, ks, vs in zip(rotated_q.split([1, 3]), keys, case.v, strict=True)
        ]
    )
    assert torch.allclose(out.double(), expected, atol=1e-5)


def test_sequences_in_adjoining_and_scattered_pages_agree_bitwise() -> None:
    case = PagedCase([77], [0], 2, 64, 16, torch.float32)
    q = randn(1, 4, 64)
    scattered = ops.attention_kvcache(
        q, None, None, case.k_cache, case.v_cache, case.table, case.seqlens
    )
    used = case.table[0, :5].long()
    adjoining = ops.attention_kvcache(
        q,
        None,
        None,
        case.k_cache[used],
        case.v_cache[used],
        torch.arange(5, dtype=torch.int32)[None],
        case.seqlens,
    )
    assert torch.equal(scattered, adjoining)


def test_qkv_rope_append_writes_its_slots_only() -> None:
    hidden, hq, hk, d, tokens = 48, 4, 2, 64, 5
    x, weight = randn(tokens, hidden), randn(hidden, seed=1)
    wq, wk, wv = (randn(h * d, hidden, seed=s) / 8 for h, s in ((hq, 2), (hk, 3), (hk, 4)))
    k_cache, v_cache = (torch.full((4, 16, hk, d), math.nan) for _ in range(2))
    slots = torch.tensor([3, 63, -1, 17, 0], dtype=torch.int32)
    positions = torch.tensor([5, 6, 7, 8, 0])
    rope = ops.Rope(*table(20, d), positions)
    q = ops.qkv_rope_append(
        x, ops.Norm(weight, 1e-5), (wq, wk, wv), rope, (k_cache, v_cache), slots
    )
    normed = reference.rms_norm(*wide(x, weight), 1e-5)
    exact_q, exact_k = reference.apply_rope(
        reference.linear(normed, wq.double()).view(tokens, hq, d),
        reference.linear(normed, wk.double()).view(tokens, hk, d),
        *wide(rope.cos, rope.sin),
        positions,
    )
    assert torch.allclose(q.double(), exact_q, rtol=1e-4, atol=1e-4)
    kept = slots >= 0
    flat_k, flat_v = k_cache.view(-1, hk, d), v_cache.view(-1, hk, d)
    rows = slots[kept].long()
    assert torch.allclose(flat_k[rows].double(), exact_k[kept], rtol=1e-4, atol=1e-4)
    exact_v = reference.linear(normed, wv.double()).view(tokens, hk, d)
    assert torch.allclose(flat_v[rows].double(), exact_v[kept], rtol=1e-4, atol=1e-4)
    others = torch.ones(64, dtype=torch.bool)
    others[rows] = False
    assert flat_k[others].isnan().all() and flat_v[others].isnan().all()


# ------------------------------------------------------ what serves CUDA tensors without a kernel


@pytest.mark.parametrize("case", ATTENTION_CASES[:-1], ids=str)
def test_attention_in_pytorch(case: Any) -> None:
    len_q, len_k, hq, hk, d, causal, window = case
    for i, (lq, lk) in enumerate(zip(len_q, len_k, strict=True)):
        q = randn(lq, hq, d, seed=i)
        k, v = randn(lk, hk, d, seed=10 + i), randn(lk, hk, d, seed=20 + i)
        out, lse = torch.full_like(q, math.nan), torch.full((hq, lq), math.nan)
        torch_ops.attend_into(out, lse, q, k, v, causal, 0.1, window)
        exact, exact_lse = reference.attend(*wide(q, k, v), causal, 0.1, window)
        if lq:
            check(out, exact, sdpa_eager(q, k, v, causal, window, 0.1))
        assert torch.allclose(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_and_append_in_pytorch(interleaved: bool) -> None:
    x, v = randn(5, 2, 96), randn(5, 2, 96, seed=1)
    cos, sin = table(50, 64)
    positions, slots = torch.tensor([0, 49, 7, 7, 3]), torch.tensor([3, -1, 63, 17, 0])
    turned = torch_ops.rotate(x, cos[positions][:, None], sin[positions][:, None], interleaved)
    expected = ops.apply_rope(x, x, cos, sin, positions, interleaved)[0]
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-5)
    order = torch.arange(96)
    order[:64] = torch.arange(64).view(2, 32).T.flatten()
    pairs = x if interleaved else x[..., order]
    assert torch.equal(torch_ops.from_pairs(pairs, 64, interleaved), x)
    caches = [torch.full((2, 4, 16, 2, 96), math.nan) for _ in range(2)]
    torch_ops.append(x, v, *caches[0], slots)
    ops.rope_append(
        x,
        v,
        ops.Rope(torch.ones(50, 32), torch.zeros(50, 32), positions),
        (caches[1][0], caches[1][1]),
        slots,
    )
    assert torch.equal(caches[0].nan_to_num(9), caches[1].nan_to_num(9))


# ------------------------------------------------------------------------------------ bad arguments


def _cache(pages: int = 4) -> Tensor:
    return torch.zeros(pages, 16, 2, 64)


def _kvcache(**change: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "q": randn(2, 4, 64),
        "k_new": None,
        "v_new": None,
        "k_cache": _cache(),
        "v_cache": _cache(),
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([20, 5], dtype=torch.int32),
    }
    return ops.attention_kvcache(**arguments | change)


def _append(**change: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "x": randn(2, 48),
        "norm": None,
        "w_qkv": (randn(256, 48), randn(128, 48), randn(128, 48)),
        "rope": ops.Rope(*table(20, 64), torch.tensor([0, 1])),
        "cache": (_cache(), _cache()),
        "slots": torch.tensor([0, 1]),
    }
    return ops.qkv_rope_append(**arguments | change)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "norm weight length": (
        lambda: ops.rms_norm(randn(2, 8), randn(7), 1e-5), ValueError, "weight must have shape 8",
    ),
    "norm dtype": (
        lambda: ops.rms_norm(randn(2, 8), randn(8).half(), 1e-5), TypeError, "weight is torch.f",
    ),
    "norm int": (
        lambda: ops.rms_norm(torch.ones(2, 8, dtype=torch.int32), randn(8), 1e-5), TypeError,
        "x must be bfloat16",
    ),
    "not a tensor": (lambda: ops.silu_and_mul([1.0, 2.0]), TypeError, "gate_up must be a tensor"),
    "residual shape": (
        lambda: ops.add_rms_norm(randn(2, 8), randn(3, 8), randn(8), 1e-5), ValueError,
        "residual must have x's shape 2x8",
    ),
    "odd gate_up": (lambda: ops.silu_and_mul(randn(2, 7)), ValueError, "even last dimension"),
    "linear K": (lambda: ops.linear(randn(2, 8), randn(4, 9)), ValueError, "must be w's K = 9"),
    "linear residual": (
        lambda: ops.linear(randn(2, 8), randn(4, 8), randn(2, 5)), ValueError, "must be 2x4",
    ),
    "mlp down": (
        lambda: ops.swiglu_mlp(randn(2, 8), randn(12, 8), randn(8, 7)), ValueError,
        "w_down must be",
    ),
    "position too large": (
        lambda: ops.apply_rope(
            randn(1, 2, 64), randn(1, 1, 64), *table(4, 64), torch.tensor([4])
        ), ValueError, r"positions must lie in 0\.\.3, got 4",
    ),
    "positions float": (
        lambda: ops.apply_rope(randn(1, 2, 64), randn(1, 1, 64), *table(4, 64), torch.ones(1)),
        TypeError, "positions must be an int32 or int64",
    ),
    "rope too wide": (
        lambda: ops.apply_rope(
            randn(1, 2, 64), randn(1, 1, 64), *table(4, 66), torch.tensor([0])
        ), ValueError, "R <= head_dim 64",
    ),
    "heads": (
        lambda: ops.attention(
            randn(3, 3, 64), randn(3, 2, 64), randn(3, 2, 64), cu_seqlens([3]), cu_seqlens([3])
        ), ValueError, "query heads .3. must be a multiple",
    ),
    "linear logits": (
        lambda: ops.linear(randn(2, 8), randn(4, 8), out_dtype=torch.bfloat16), ValueError,
        "out_dtype must be x's torch.float32",
    ),
    "logits with a residual": (
        lambda: ops.linear(
            randn(2, 8).half(), randn(4, 8).half(), randn(2, 4).half(), out_dtype=torch.float32
        ), ValueError, "or float32 without residual",
    ),
    "linear norm": (
        lambda: ops.linear(randn(2, 8), randn(4, 8), norm=ops.Norm(randn(7), 1e-5)), ValueError,
        "weight must have shape 8",
    ),
    "odd packed gate and up": (
        lambda: ops.swiglu_mlp(randn(2, 8), ops.PackedGateUp(randn(7, 8)), randn(8, 3)),
        ValueError, "packed gate and up must be",
    ),
    "packed for another rope": (
        lambda: _append(
            w_qkv=ops.pack_qkv(randn(256, 48), randn(128, 48), randn(128, 48), 64, 32)
        ), ValueError, "packed for rotary_dim 32, interleaved False; rope has 64",
    ),
    "packed for other heads": (
        lambda: _append(w_qkv=ops.pack_qkv(randn(256, 48), randn(64, 48), randn(64, 48), 64)),
        ValueError, "k_cache has 2 heads of 64, w_qkv 1 of 64",
    ),
    "packing of odd shapes": (
        lambda: ops.pack_qkv(randn(256, 48), randn(100, 48), randn(100, 48), 64), ValueError,
        "wk must be .heads [*] 64, 48.",
    ),
    "gate and up differ": (
        lambda: ops.pack_gate_up(randn(4, 8), randn(5, 8)), ValueError, "must both be",
    ),
    "max_seqlen_q": (
        lambda: _kvcache(
            q=randn(4, 4, 64), cu_seqlens_q=cu_seqlens([1, 3]), max_seqlen_q=2
        ), ValueError, "max_seqlen_q 2",
    ),
    "min_seqlen_q": (
        lambda: _kvcache(q=randn(3, 4, 64), cu_seqlens_q=cu_seqlens([1, 2]), min_seqlen_q=2),
        ValueError, "min_seqlen_q 2",
    ),
    "rope is short": (
        lambda: _kvcache(rope=ops.Rope(*table(19, 64))), ValueError, "the rows stand at 4..19",
    ),
    "cu_seqlens end": (
        lambda: ops.attention(
            randn(3, 2, 64), randn(3, 2, 64), randn(3, 2, 64), cu_seqlens([2]), cu_seqlens([3])
        ), ValueError, "cu_seqlens_q must ascend from 0 to the 3 rows",
    ),
    "cu_seqlens falls": (
        lambda: ops.attention(
            randn(3, 2, 64), randn(3, 2, 64), randn(3, 2, 64),
            torch.tensor([0, 4, 3]), torch.tensor([0, 2, 3]),
        ), ValueError, "cu_seqlens_q must ascend",
    ),
    "window": (lambda: _kvcache(window=0), ValueError, "window must be positive"),
    "seqlens beyond table": (
        lambda: _kvcache(cache_seqlens=torch.tensor([33, 5])), ValueError, r"cache_seqlens\[0\]",
    ),
    "negative seqlen": (
        lambda: _kvcache(cache_seqlens=torch.tensor([3, -5])), ValueError, r"cache_seqlens\[1\]",
    ),
    "page out of range": (
        lambda: _kvcache(block_table=torch.tensor([[0, 4], [2, 3]])), ValueError,
        r"block_table\[0\] names a page outside 0\.\.3",
    ),
    "rows and sequences": (lambda: _kvcache(q=randn(3, 4, 64)), ValueError, "3 rows for 2"),
    "cache dtype": (lambda: _kvcache(k_cache=_cache().half()), TypeError, "k_cache is torch.f"),
    "k without v": (lambda: _kvcache(k_new=randn(2, 2, 64)), ValueError, "given together"),
    "slot out of range": (
        lambda: _append(slots=torch.tensor([0, 64])), ValueError, "slots must lie in",
    ),
    "wk rows": (
        lambda: _append(w_qkv=(randn(256, 48), randn(64, 48), randn(128, 48))), ValueError,
        "wk must have Hk[*]D = 128 rows",
    ),
    "cache rank": (
        lambda: _append(cache=(torch.zeros(4, 2, 64), _cache())), ValueError, "k_cache must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments_are_named(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()
