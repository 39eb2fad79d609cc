"""mk_attention_decode on the emulator and a GPU: attention of a few new tokens over a paged cache.

Caches are NaN wherever no query may look: pages of no sequence, tails, what lies before the window.
Outputs are NaN beforehand, and what is not to be written must still be NaN.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import reference
from tests import emulator
from tests import native_abi as abi
from tests.native_emulator import (
    DEVICES,
    dtype_id,
    faulty_library,
    on_own_and_alike,
    run,
    storage_of,
)
from tests.test_kernels_memory import (
    HALVES,
    assert_close,
    assert_padding_untouched,
    main_loops,
    rope_scale,
    rope_struct,
    strided,
    tables,
    values,
)

Tensor = torch.Tensor
NAN = float("nan")
UNUSED_PAGES = 3


@dataclasses.dataclass
class Case:
    """Sequences of lengths keys, of which the last new queries' own are appended if `append`.

    Everything about a sequence is drawn from its seed alone, so that it can be put into any batch.
    """

    lengths: Sequence[int]
    queries: Sequence[int]
    heads: tuple[int, int] = (32, 8)
    head_dim: int = 128
    page: int = 64
    dtype: torch.dtype = torch.bfloat16
    append: bool = False
    rotary: int = 0  # 0: q and k_new as they are
    interleaved: bool = False
    positions: torch.dtype | None = None  # of rope.positions, which then are shifted by 3
    window: int = 0
    causal: bool = True
    scale: float | None = None
    max_queries: int | None = None
    spare_pages: int = 0  # columns of the block table that no sequence uses
    padding: int = 0  # elements between rows, a multiple of 8
    seeds: Sequence[int] | None = None

    def __post_init__(self) -> None:
        hq, hk = self.heads
        d, dtype = self.head_dim, self.dtype
        self.batch = len(self.lengths)
        self.seeds = self.seeds or range(self.batch)
        self.max_queries = self.max_queries or max(1, *self.queries)
        self.scale = self.scale or d**-0.5
        self.tokens = sum(self.queries)
        self.starts = [0, *itertools.accumulate(self.queries)]
        self.cos, self.sin = tables(max([*self.lengths, 1]) + 8, self.rotary or 2, 1e4)

        drawn = [
            self._draw(*args) for args in zip(self.lengths, self.queries, self.seeds, strict=True)
        ]
        self.keys, self.vals = ([s[i] for s in drawn] for i in (1, 2))  # new ones not rotated
        self.q = strided(torch.cat([s[0] for s in drawn]).reshape(-1, hq * d), self.padding)
        self.q = self.q.unflatten(1, (hq, d))
        self.k_new, self.v_new = (
            strided(self._new(of_all).reshape(-1, hk * d), self.padding).unflatten(1, (hk, d))
            for of_all in (self.keys, self.vals)
        )

        used = [-(-n // self.page) for n in self.lengths]
        self.max_pages = max([*used, 1]) + self.spare_pages
        self.num_pages = sum(used) + UNUSED_PAGES
        generator = torch.Generator().manual_seed(sum(self.lengths) + self.batch)
        order = torch.randperm(self.num_pages, generator=generator, dtype=torch.int32)
        self.k_cache, self.v_cache = (
            torch.full((self.num_pages, self.page, hk, d), NAN, dtype=dtype) for _ in range(2)
        )
        self.table = torch.full((self.batch, self.max_pages + 3), -1, dtype=torch.int32)
        self.table = self.table[:, : self.max_pages]  # rows further apart than they are long
        self.seqlens = torch.zeros(self.batch, dtype=torch.int32)
        taken = 0
        for b, (n, m) in enumerate(zip(self.lengths, self.queries, strict=True)):
            self.table[b, : used[b]] = order[taken : taken + used[b]]
            taken += used[b]
            cached = n - m if self.append else n
            self.seqlens[b] = cached
            first = max(0, n - m - self.window + 1) if self.window else 0  # seen by some query
            for cache, all_ in ((self.k_cache, self.keys), (self.v_cache, self.vals)):
                place = torch.arange(first, cached)
                pages = self.table[b, place // self.page].long()
                cache[pages, place % self.page] = all_[b][first:cached]
            self.table[b, : first // self.page] = -7  # not to be looked up
        self.out = strided(torch.full((self.tokens, hq * d), NAN, dtype=dtype), self.padding)
        self.out = self.out.unflatten(1, (hq, d))
        self.lse = torch.full((hq, self.tokens + 3), NAN)[:, : self.tokens]
        self.cu_seqlens = torch.tensor(self.starts, dtype=torch.int32)
        self.place = torch.cat(
            [torch.zeros(0, dtype=torch.long)]
            + [torch.arange(n - m, n) for n, m in zip(self.lengths, self.queries, strict=True)]
        )
        if self.positions is not None:
            self.place = (self.place + 3).to(self.positions)
        empty = self.params(workspace=False)
        size = ctypes.c_int64()
        abi.check(
            abi.library().mk_attention_decode_workspace_bytes(
                ctypes.byref(empty), ctypes.byref(size)
            )
        )
        self.workspace = torch.zeros(size.value // 4, dtype=torch.float32)
        self.num_counters = self.batch * hk * -(-hq // hk * self.max_queries // 32)

    def _draw(self, length: int, queries: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        hq, hk = self.heads
        shapes = ((queries, hq), (length, hk), (length, hk))
        return tuple(
            values(*shape, self.head_dim, dtype=self.dtype, seed=1000 * seed + i)
            for i, shape in enumerate(shapes)
        )

    def _new(self, of_all: list[Tensor]) -> Tensor:
        """Of keys or values of all sequences, those of the last tokens, which have queries."""
        ends = zip(of_all, self.lengths, self.queries, strict=True)
        return torch.cat([x[max(n - m, 0) :] for x, n, m in ends])

    def params(self, workspace: bool = True) -> ctypes.Structure:
        rope = rope_struct(self.place, max(self.rotary, 2), self.interleaved, (self.cos, self.sin))
        if self.positions is None:
            rope.positions = None
        if not self.rotary:
            rope.cos = rope.sin = None
        strides: dict[str, int] = {}
        for name, t in (
            ("q", self.q),
            ("k_new", self.k_new),
            ("v_new", self.v_new),
            ("out", self.out),
        ):
            strides[f"{name}_stride"], strides[f"{name}_head_stride"] = t.stride()[:2]
        cache = self.k_cache.stride()
        return abi.structs()["mk_attention_decode_params"](
            q=self.q.data_ptr(),
            k_new=self.k_new.data_ptr() if self.append else None,
            v_new=self.v_new.data_ptr() if self.append else None,
            k_cache=self.k_cache.data_ptr(),
            v_cache=self.v_cache.data_ptr(),
            out=self.out.data_ptr(),
            lse=self.lse.data_ptr(),
            cu_seqlens_q=self.cu_seqlens.data_ptr(),
            seqlens_k=self.seqlens.data_ptr(),
            block_table=self.table.data_ptr(),
            workspace=self.workspace.data_ptr() if workspace and self.workspace.numel() else None,
            workspace_bytes=self.workspace.nbytes if workspace else 0,
            **strides,
            cache_page_stride=cache[0],
            cache_stride=cache[1],
            cache_head_stride=cache[2],
            lse_stride=self.lse.stride(0),
            block_table_stride=self.table.stride(0),
            tokens=self.tokens,
            batch=self.batch,
            num_q_heads=self.heads[0],
            num_kv_heads=self.heads[1],
            head_dim=self.head_dim,
            num_pages=self.num_pages,
            page_size=self.page,
            max_pages=self.max_pages,
            max_seqlen_q=self.max_queries,
            causal=self.causal,
            window=self.window,
            softmax_scale=self.scale,
            dtype=dtype_id(self.q),
            rope=rope,
        )

    def tensors(self) -> list[Tensor]:
        named = (
            self.q, self.k_new, self.v_new, self.k_cache, self.v_cache, self.out, self.lse,
            self.cu_seqlens, self.seqlens, self.table, self.workspace, self.place, self.cos,
            self.sin,
        )  # fmt: skip
        return [storage_of(t) for t in named]

    def run(self, arch: str, seed: int = 0) -> emulator.Counters | None:
        return run("attention_decode", arch, self.params(), self.tensors(), seed)

    def is_served(self, b: int) -> bool:
        return 0 < self.queries[b] <= self.max_queries

    # ---- what is expected ----

    def rotated(self, x: Tensor, b: int) -> Tensor:
        """x [queries of b, heads, D], rotated, in its own dtype."""
        if not self.rotary:
            return x
        place = self.place[self.starts[b] : self.starts[b + 1]].long()
        return reference.rotate(x, self.cos[place], self.sin[place], self.interleaved).to(x.dtype)

    def check(self) -> None:
        """out and lse against fp64, by the error of PyTorch's attention in the dtype."""
        got, exact, rounded, scale = [], [], [], []
        got_lse, exact_lse, rounded_lse, scale_lse = [], [], [], []
        for b in range(self.batch):
            of_b = slice(self.starts[b], self.starts[b + 1])
            if not self.is_served(b):
                assert self.out[of_b].isnan().all() and self.lse[:, of_b].isnan().all()
                continue
            q, k, v = self.q[of_b], self.keys[b], self.vals[b]
            old = self.lengths[b] - self.queries[b]

            def keys(x: Tensor, b: int = b, old: int = old) -> Tensor:
                new = self.rotated(x[old:], b) if self.append and old >= 0 else x[max(old, 0) :]
                return torch.cat([x[: max(old, 0)], new])

            wide_q, wide_k = self.rotated(q.double(), b), keys(k.double())
            options = (self.causal, self.scale, self.window or None)
            out, lse = reference.attend(wide_q, wide_k, v.double(), *options)
            size, _ = reference.attend(wide_q, wide_k, v.double().abs(), *options)
            low_q, low_k = self.rotated(q, b), keys(k)
            got.append(self.out[of_b])
            exact.append(out)
            rounded.append(sdpa(low_q, low_k, v, *options))
            scale.append(size)
            got_lse.append(self.lse[:, of_b].T)
            exact_lse.append(lse.T)
            rounded_lse.append(
                reference.attend(low_q.float(), low_k.float(), v.float(), *options)[1].T
            )
            # A score's error goes with its terms before they cancel; so does that of the sum.
            sizes = (wide_q.abs(), wide_k.abs(), v.double(), self.causal, abs(self.scale))
            scale_lse.append(reference.attend(*sizes, self.window or None)[1].T.abs().clamp(min=1))
        if not got:
            return
        columns = [torch.cat(x) for x in (got, exact, rounded, scale)]
        assert_close(*columns[:3], "out", columns[3])
        got_lse, exact_lse, rounded_lse, scale_lse = (
            torch.cat(x) for x in (got_lse, exact_lse, rounded_lse, scale_lse)
        )
        unseen = exact_lse.isinf()
        assert (got_lse[unseen] == -math.inf).all() and (columns[0][unseen] == 0).all()
        # PyTorch's error is that of an fp32 sum; a tensor core cuts one off for every 16 features.
        error, rounding = (
            ((x - exact_lse).abs() / scale_lse)[~unseen].max() if (~unseen).any() else 0
            for x in (got_lse, rounded_lse)
        )
        unit = torch.finfo(torch.float32).eps
        assert error <= 2 * rounding + (self.head_dim // 16 + 1) * unit, "lse"
        assert_padding_untouched(self.out.flatten(1), "out")
        assert_padding_untouched(self.lse, "lse")
        assert not self.workspace[: self.num_counters].view(torch.int32).any(), "counters"

    def check_cache(self) -> None:
        """New keys and values are where the block table says; everything else is as it was."""
        before = dataclasses.replace(self)
        for got, old, is_k in (
            (self.k_cache, before.k_cache, True),
            (self.v_cache, before.v_cache, False),
        ):
            for b in filter(self.is_served, range(self.batch) if self.append else ()):
                new = (self.keys if is_k else self.vals)[b][self.lengths[b] - self.queries[b] :]
                place = torch.arange(self.lengths[b] - self.queries[b], self.lengths[b])
                slots = self.table[b, place // self.page].long(), place % self.page
                if is_k and self.rotary:
                    exact = self.rotated(new.double(), b)
                    at = self.place[self.starts[b] : self.starts[b + 1]].long()
                    scale = rope_scale(new, self.cos[at], self.sin[at], self.interleaved)
                    assert_close(got[slots], exact, self.rotated(new, b), "k_cache", scale)
                    old[slots] = got[slots]
                else:
                    old[slots] = new
            same = (got == old) | (got.isnan() & old.isnan())
            assert same.all(), "the cache was written elsewhere"


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, window: int | None) -> Tensor:
    """PyTorch's attention in the dtype of q; rows that see nothing are 0."""
    group = q.shape[1] // k.shape[1]
    distance = torch.arange(len(q))[:, None] + (len(k) - len(q)) - torch.arange(len(k))
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window:
        seen &= distance.abs() < window
    if not len(k):
        return torch.zeros_like(q)
    q, k, v = (t.transpose(0, 1) for t in (q, *(t.repeat_interleave(group, 1) for t in (k, v))))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
    return out.transpose(0, 1).nan_to_num(0.0) * seen.any(1)[:, None, None]


# ------------------------------------------------------------------------------------- results

MINITRON = {"heads": (32, 8), "head_dim": 128}
SMOLLM2 = {"heads": (9, 3), "head_dim": 64}
CASES = {
    # lengths around tiles, splits and pages; 0 keys; sequences without queries
    "minitron": {
        "lengths": [1, 7, 33, 129, 1025], "queries": [1] * 5, **MINITRON, "page": 64, "rotary": 128,
        "append": True,
    },
    "smollm2": {
        "lengths": [33, 0, 16, 800, 5], "queries": [1, 1, 1, 1, 0], **SMOLLM2, "page": 16, "rotary":
        64, "padding": 8,
    },
    "speculative": {
        "lengths": [8, 40, 500, 300, 9], "queries": [8, 5, 8, 1, 9], **MINITRON, "page": 32,
        "rotary": 128, "append": True, "max_queries": 8, "positions": torch.int64,
    },
    "window": {
        "lengths": [1000, 90, 100, 300], "queries": [3, 1, 2, 3], **SMOLLM2, "page": 16, "window":
        70, "rotary": 64, "append": True, "interleaved": True,
    },
    "wide group": {
        "lengths": [700, 20], "queries": [7, 2], "heads": (16, 1), "head_dim": 64, "page": 128,
        "rotary": 20, "append": True, "positions": torch.int32, "max_queries": 8, "padding": 24,
    },
    "not causal": {
        "lengths": [300, 60, 2], "queries": [4, 3, 4], "heads": (6, 3), "head_dim": 128, "page": 32,
        "causal": False, "scale": 0.3,
    },
    "not causal, window": {
        "lengths": [300, 60], "queries": [4, 3], "heads": (4, 4), "head_dim": 64, "page": 16,
        "causal": False, "window": 20, "rotary": 16, "append": True, "spare_pages": 40,
    },
}  # fmt: skip


# Minitron's shapes in both dtypes.
TURNS = [(HALVES[i % 2], name) for i, name in enumerate(("minitron", *CASES))]


@pytest.mark.parametrize("arch, dtype, name", on_own_and_alike(TURNS))
def test_attention_decode(arch: str, dtype: torch.dtype, name: str) -> None:
    case = Case(**CASES[name], dtype=dtype)
    case.run(arch, seed=len(name))
    case.check()
    case.check_cache()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_attention_decode_of_any_shape(data: st.DataObject) -> None:
    head_dim = data.draw(st.sampled_from([64, 128]), "head_dim")
    max_queries = data.draw(st.integers(1, 8), "max_queries")
    batch = data.draw(st.integers(1, 3), "batch")
    group = data.draw(st.sampled_from([1, 2, 3, 4, 5, 8]), "group")
    hk = data.draw(st.integers(1, 2), "kv_heads")
    queries = data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch), "queries")
    lengths = [
        data.draw(st.one_of(st.integers(n, 40), st.integers(n, 700), st.just(512)), "length")
        for n in queries
    ]
    case = Case(
        lengths, queries, (group * hk, hk), head_dim, max_queries=max_queries,
        page=data.draw(st.sampled_from([16, 32, 64, 128]), "page"),
        dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float16]), "dtype"),
        append=data.draw(st.booleans(), "append"),
        rotary=data.draw(st.sampled_from([0, head_dim, head_dim // 4, 6]), "rotary"),
        interleaved=data.draw(st.booleans(), "interleaved"),
        positions=data.draw(st.sampled_from([None, torch.int32, torch.int64]), "positions"),
        window=data.draw(st.sampled_from([0, 0, 1, 17, 300, 2**31 - 1]), "window"),
        causal=data.draw(st.booleans(), "causal"),
        scale=data.draw(st.sampled_from([None, 0.5, -0.1]), "scale"),
        spare_pages=data.draw(st.sampled_from([0, 1, 100]), "spare_pages"),
        padding=data.draw(st.sampled_from([0, 8, 40]), "padding"),
    )  # fmt: skip
    case.run(data.draw(st.sampled_from(DEVICES), "arch"), data.draw(st.integers(0, 99), "seed"))
    case.check()
    case.check_cache()


@pytest.mark.parametrize("arch", DEVICES[-1:], ids=lambda a: a if a == "gpu" else f"emu-sm_{a}")
def test_lengths_up_to_131072(arch: str) -> None:
    """32 splits of 4096 keys, and a page number per warp's tile beyond what its lanes hold."""
    case = Case([131072], [1], heads=(4, 1), head_dim=64, page=128, rotary=64, append=True)
    case.run(arch)
    case.check()
    case.check_cache()


@main_loops
def test_appended_keys_have_the_bits_of_rope_append(arch: str) -> None:
    """Rotated in every way: halves, neighbours, part of the head, tables that are not aligned."""
    for rotary, interleaved, dtype in itertools.product(
        (128, 48, 20), (False, True), (torch.bfloat16, torch.float16)
    ):
        case = Case(
            [20, 9], [5, 4], heads=(4, 2), page=16, dtype=dtype, append=True, rotary=rotary,
            interleaved=interleaved, padding=8,
        )  # fmt: skip
        expected = [c.clone() for c in (case.k_cache, case.v_cache)]
        place = torch.cat([torch.arange(15, 20), torch.arange(5, 9)])
        rows = torch.tensor([0] * 5 + [1] * 4)
        slots = case.table[rows, place // 16].long() * 16 + place % 16
        params = abi.structs()["mk_rope_append_params"](
            k=case.k_new.data_ptr(), v=case.v_new.data_ptr(), k_cache=expected[0].data_ptr(),
            v_cache=expected[1].data_ptr(), slots=slots.data_ptr(),
            k_stride=case.k_new.stride(0), k_head_stride=128, v_stride=case.v_new.stride(0),
            v_head_stride=128, cache_page_stride=16 * 2 * 128, cache_stride=2 * 128,
            cache_head_stride=128, tokens=9, num_heads=2, head_dim=128, num_pages=case.num_pages,
            page_size=16, slots_dtype=dtype_id(slots), dtype=dtype_id(case.k_new),
            rope=rope_struct(place, rotary, interleaved, (case.cos, case.sin)),
        )  # fmt: skip
        others = [storage_of(t) for t in (case.k_new, case.v_new)]
        run("rope_append", arch, params, [*others, *expected, slots, place, case.cos, case.sin])
        case.run(arch)
        for got, bits in zip((case.k_cache, case.v_cache), expected, strict=True):
            assert torch.equal(got.view(torch.int16), bits.view(torch.int16))


# ------------------------------------------------------------------------------- what is not there


@main_loops
def test_page_numbers_out_of_range_give_nan(arch: str) -> None:
    """In the rows that see such a page; a sequence beside them is as ever. Nothing is appended to a
    page that does not exist."""
    case = Case([200] * 3, [4] * 3, heads=(4, 2), head_dim=64, page=16, window=40, append=True)
    case.table[0, 10] = case.num_pages  # keys 160 ... 175
    case.table[1, 12] = -1  # the new ones
    case.run(arch)
    assert case.out[:8].isnan().all() and case.lse[:, :8].isnan().all()
    assert not case.out[8:].isnan().any()


@main_loops
def test_hidden_pages_out_of_range_are_harmless(arch: str) -> None:
    """The window of 40 begins at key 175 for query 0, at 176 and later for the others: only query 0
    sees the page of keys 160 ... 175."""
    case = Case([218], [4], heads=(4, 2), head_dim=64, page=16, window=40)
    case.table[0, 10] = 1 << 30
    case.run(arch)
    assert case.out.isnan().all(-1).all(-1).tolist() == [True, False, False, False]
    assert not case.out[1:].isnan().any()


@main_loops
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("seqlen", [-1, 65, 2**31 - 1])
def test_lengths_out_of_range_give_nan(arch: str, seqlen: int, append: bool) -> None:
    """More keys than the block table has room for, or fewer than none: nothing is appended, and
    other sequences are not touched."""
    case = Case([64, 30], [2, 2], heads=(4, 2), head_dim=64, page=16, append=append)
    before = [cache[case.table[0].long()] for cache in (case.k_cache, case.v_cache)]
    case.seqlens[0] = seqlen
    case.run(arch)
    assert case.out[:2].isnan().all() and case.lse[:, :2].isnan().all()
    assert not case.out[2:].isnan().any() and not case.lse[:, 2:].isnan().any()
    for cache, old in zip((case.k_cache, case.v_cache), before, strict=True):
        assert torch.equal(cache[case.table[0].long()].nan_to_num(7), old.nan_to_num(7))


@main_loops
def test_query_ranges_out_of_bounds_are_left_alone(arch: str) -> None:
    case = Case([64, 30, 5], [2, 2, 1], heads=(4, 2), head_dim=64, page=16)
    case.cu_seqlens[3] = 1000
    case.cu_seqlens[0] = -1
    case.run(arch)
    assert case.out[:2].isnan().all() and case.out[4:].isnan().all()
    assert not case.out[2:4].isnan().any()


@main_loops
def test_position_out_of_range_gives_nan(arch: str) -> None:
    case = Case(
        [30, 30], [1, 1], heads=(4, 2), head_dim=64, page=16, rotary=64, positions=torch.int32
    )
    case.place[1] = len(case.cos)
    case.run(arch)
    assert not case.out[0].isnan().any() and case.out[1].isnan().all()


@main_loops
def test_without_lse_and_with_one_query_each(arch: str) -> None:
    """cu_seqlens_q NULL, lse NULL: the same bits."""
    case = Case([300, 800, 1], [1] * 3, heads=(4, 2), head_dim=64, page=16, rotary=64, append=True)
    other = dataclasses.replace(case)
    case.run(arch)
    params = other.params()
    params.lse = params.cu_seqlens_q = None
    run("attention_decode", arch, params, other.tensors())
    assert torch.equal(case.out, other.out) and other.lse.isnan().all()


def test_pages_that_overlap_have_no_tensor_map() -> None:
    """TMA does not take a cache whose pages share rows; the bits are those of sm_80."""
    case = Case([300, 90], [1, 1], heads=(4, 2), head_dim=64, page=32)
    outs = []
    for arch in ("80", "90a"):
        params = case.params()
        params.cache_page_stride //= 2
        params.num_pages = 2 * params.num_pages - 1
        case.k_cache.nan_to_num_(0.5)
        case.v_cache.nan_to_num_(0.25)
        run("attention_decode", arch, params, case.tensors())
        outs.append(case.out.clone())
        assert not outs[-1].isnan().any()
    assert torch.equal(*outs)


# -------------------------------------------------------------------------------- the same bits


def test_bits_depend_on_the_sequence_only() -> None:
    """Alone and in any batch, on every arch, with any interleaving and order of arrival, in blocks
    of 8 rows and of 32, and whether a block takes one split or several."""
    lengths, queries, seeds = [1600, 40, 500, 1], [2, 1, 2, 1], [5, 6, 7, 8]
    common = {"heads": (4, 1), "head_dim": 64, "page": 16, "rotary": 64, "append": True}
    batch = Case(lengths, queries, seeds=seeds, **common)
    batch.run("80", 1)
    batch.check()
    for number, arch in enumerate(DEVICES):
        order = [2, 0, 3, 1][number:] + [2, 0, 3, 1][:number]
        other = Case(
            [lengths[i] for i in order], [queries[i] for i in order],
            seeds=[seeds[i] for i in order], max_queries=(2, 8)[number % 2],
            spare_pages=30 * number, **common,
        )  # fmt: skip
        other.run(arch, seed=10 + number)
        for place, i in enumerate(order):
            got = other.out[other.starts[place] : other.starts[place + 1]]
            assert torch.equal(got, batch.out[batch.starts[i] : batch.starts[i + 1]]), (arch, i)
    alone = Case(lengths[:1], queries[:1], seeds=seeds[:1], **common)
    alone.run("80", 99)
    assert torch.equal(alone.out, batch.out[:2]) and torch.equal(alone.lse, batch.lse[:, :2])


@main_loops
def test_one_block_may_take_several_splits(arch: str) -> None:
    """A batch that fills the device gives each sequence fewer blocks than it has splits."""
    many = Case([1100] + [1] * 600, [1] * 601, heads=(8, 8), head_dim=64, page=128)
    alone = dataclasses.replace(many, lengths=[1100], queries=[1], seeds=None)
    if arch != "gpu":
        grids = [abi.plan("attention_decode", c.params(), arch).grid[:] for c in (many, alone)]
        assert grids == [[8, 1, 601], [8, 4, 1]]
    for case in (many, alone):
        case.run(arch)
    assert torch.equal(many.out[:1], alone.out)
    alone.check()


@main_loops
def test_order_of_arrival_has_no_influence_and_the_workspace_is_reused(arch: str) -> None:
    """Each launch leaves its counters 0; results of an earlier launch in it do no harm."""
    case = Case([1300, 900], [1, 1], heads=(8, 2), head_dim=64, page=32)
    results = []
    for seed in range(6):
        case.out.fill_(NAN)
        case.run(arch, seed)
        assert not case.workspace[: case.num_counters].view(torch.int32).any()
        results.append(case.out.clone())
    assert all(torch.equal(result, results[0]) for result in results)
    case.check()


@main_loops
def test_launches_of_all_shapes_share_a_workspace(arch: str) -> None:
    """What a small batch left in it lies where a large one has no counter, and the reverse."""
    cases = [Case([1100] * n, [1] * n, heads=(8, 8), head_dim=64, page=128) for n in (1, 60, 2)]
    shared = max((c.workspace for c in cases), key=len)
    for case in cases:
        case.workspace = shared
        case.run(arch)
        case.check()


# -------------------------------------------------------------------------------- memory traffic


def compulsory_sectors(case: Case) -> int:
    """32-byte sectors of K, V, q, out, and of the new keys and values, each once."""
    row = case.heads[1] * case.head_dim * 2 // 32
    group = case.heads[0] // case.heads[1]
    old = sum(case.seqlens.tolist())
    new = sum(case.queries) if case.append else 0
    return row * (2 * old + 4 * new + 2 * group * case.tokens)


@pytest.mark.parametrize(
    "arch, context, batch",
    [
        ("80", 1024, 1),
        ("80", 1024, 8),
        ("80", 8192, 1),
        ("90a", 1024, 8),
        ("90a", 8192, 1),
        pytest.param("80", 1024, 64, marks=pytest.mark.slow),
        pytest.param("80", 8192, 8, marks=pytest.mark.slow),
        pytest.param("90a", 8192, 8, marks=pytest.mark.slow),
    ],
)
def test_each_key_and_value_is_read_once(arch: str, context: int, batch: int) -> None:
    """With partial results, tables and indices at most 3 % more than the compulsory traffic; all
    loads of the cache in whole 256-byte rows; no bank conflict."""
    case = Case([context] * batch, [1] * batch, **MINITRON, page=64, rotary=128)
    counters = case.run(arch)
    moved = counters.unique_read_sectors + counters.unique_write_sectors
    ratio = moved / compulsory_sectors(case)
    requested = counters.read_sectors / counters.unique_read_sectors
    per_byte = counters.instructions / (2 * 2 * sum(case.lengths) * 8 * 128)
    print(
        f"sm_{arch} context {context} batch {batch}: DRAM / compulsory {ratio:.4f}, requested / "
        f"distinct {requested:.3f}, shared wavefronts / minimum "
        f"{counters.shared_wavefronts / counters.shared_wavefronts_min:.4f}, warp-instructions per "
        f"byte of K and V {per_byte:.4f}"
    )
    assert ratio <= 1.03
    assert requested <= 1.05
    assert counters.shared_wavefronts <= 1.01 * counters.shared_wavefronts_min
    # An SM of A100 or H100 takes 13 bytes a clock from DRAM, and issues 4 instructions.
    assert 13 * per_byte <= 0.25 * 4


def test_main_loop_is_free_of_bank_conflicts() -> None:
    """The difference of two lengths with the same splits and tiles at the edges."""
    for arch, head_dim, queries in itertools.product(("80", "90a"), (64, 128), (1, 8)):
        counts = []
        for length in (4096, 4096 + 640):
            case = Case([16384], [queries], (4, 1), head_dim, 128)
            case.seqlens[0] = 3 * length
            counts.append(case.run(arch))
        wavefronts = counts[1].shared_wavefronts - counts[0].shared_wavefronts
        assert wavefronts == counts[1].shared_wavefronts_min - counts[0].shared_wavefronts_min > 0


# ------------------------------------------------------------------------------- planted faults

# What is changed, and how the emulator or the comparison objects (nothing: it may not).
FAULTS = {
    "none": (r"ex2", "ex2", ""),
    "no exponential": (r"ex2\.approx\.ftz\.f32", "mov.f32", r"^out: \d+ elements are NaN"),
    "no transposition": (r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16", "mov.b32", "^out: element"),
    "waits too little": (
        r"cp\.async\.wait_group 2",
        "cp.async.wait_group 3",
        "^asynchronous copy not waited for",
    ),
    "no barrier": (r"bar(rier)?\.sync[^;]*;", "", "^uninitialised shared memory"),
    "nobody combines": (
        r"atom\.global\.add\.u32 (%r\d+),[^;]*;",
        r"mov.u32 \1, 0;",
        r"^out: \d+ elements are NaN",
    ),
}
TMA = r"cp\.async\.bulk\.tensor\.4d[^;]*;"
FAULTS_SM90 = {
    "none": (r"ex2", "ex2", ""),
    "nothing is copied": (TMA, "", "^deadlock"),
    "waits for another unit": (
        r"(try_wait[^;]*\+) 0\]",
        r"\1 8]",
        "^(shared-memory race.* no wait for its mbarrier|asynchronous copy not waited for)",
    ),
    "no wait": (
        r"(mbarrier\.try_wait[^;]*;) selp\.b32 (%r\d+), 1, 0, p;",
        r"mov.u32 \2, 1;",
        "^shared-memory race.* no wait for its mbarrier",
    ),
    "fewer bytes": (
        r"(expect_tx[^;]*), %r\d+;",
        r"\1, 64;",
        "^mbarrier misuse.* more bytes arrived",
    ),
    "no barrier": (r"bar(rier)?\.sync[^;]*;", "", "^uninitialised shared memory"),
    "no fence": (r"fence\.proxy\.async[^;]*;", "", "^missing proxy fence"),
    "no wait for the launch before": (
        r"griddepcontrol\.wait;",
        "",
        "^access before griddepcontrol.wait",
    ),
    "hints from L1": (  # what is read again may be stale
        r"ld\.global\.cg\.b32",
        "ld.global.b32",
        "^access before griddepcontrol.wait",
    ),
    "edges are not waited for": (
        r"cp\.async\.mbarrier\.arrive[^;]*;",
        "",
        "^asynchronous copy not waited for",
    ),
}


@pytest.mark.parametrize(
    "arch, fault", [("80", fault) for fault in FAULTS] + [("90a", fault) for fault in FAULTS_SM90]
)
def test_planted_faults_are_found(arch: str, fault: str, tmp_path: Path) -> None:
    # sm_90: 11 tiles of the warp that writes an edge first, so that TMA comes there again
    case = Case([1100 if arch == "80" else 700], [1], **MINITRON, rotary=128)
    entry = abi.plan("attention_decode", case.params(), arch).entry.decode()
    old, new, found = (FAULTS if arch == "80" else FAULTS_SM90)[fault]
    lib = faulty_library(tmp_path, arch, entry, old, new)

    def attempt() -> None:
        run("attention_decode", arch, case.params(), case.tensors(), lib=lib)
        case.check()

    if not found:
        attempt()
    else:
        with pytest.raises(AssertionError, match=found):
            attempt()
