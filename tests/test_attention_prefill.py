"""mk_attention, on the emulator and a GPU, against reference.attend in fp64.

Outputs, pages, tails of pages and the gaps between rows are poisoned with NaN. An element's error
is relative to sum over keys of weight * |v|: what the weighted mean cancels says nothing about it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import ops, reference
from tests import native_abi as abi
from tests.emulator import Counters
from tests.native_emulator import (
    ARCHS,
    BUILT,
    DEVICES,
    dtype_id,
    faulty_library,
    on_own_and_alike,
    run,
    storage_of,
)
from tests.test_kernels_memory import (
    HALVES,
    archs,
    assert_close,
    assert_padding_untouched,
    dtypes,
    main_loops,
    poisoned,
    rope_struct,
    strided,
    tables,
    values,
)

Tensor = torch.Tensor
NAN = float("nan")
MAX_POSITION = 1024


@dataclass(frozen=True)
class Rope:
    rotary_dim: int
    interleaved: bool = False
    given_positions: bool = False  # else a query's place in its sequence


@dataclass(frozen=True)
class Case:
    """Options of one call; everything random is drawn from `seed`."""

    lengths: Sequence[tuple[int, int]]  # queries and keys of each sequence
    heads: tuple[int, int] = (2, 1)
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    rope: Rope | None = None
    page: int = 0  # 0: packed
    padding: int = 0  # elements between rows
    skip: int = 0
    add: bool = False  # seqlens_k without the new keys
    seed: int = 0

    @property
    def softmax_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass
class Inputs:
    case: Case
    q: Tensor
    k: list[Tensor]  # of each sequence
    v: list[Tensor]
    positions: Tensor
    cos: Tensor
    sin: Tensor

    @property
    def q_starts(self) -> list[int]:
        return starts([n for n, _ in self.case.lengths])


def starts(lengths: Sequence[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def make_inputs(case: Case) -> Inputs:
    """A sequence's data depend on its own number and lengths only, not on the others'."""
    (hq, hk), d = case.heads, case.head_dim
    q, k, v, positions = [], [], [], []
    for b, (lq, lk) in enumerate(case.lengths):
        seed = case.seed + 7919 * (b + 1)
        q.append(values(lq, hq, d, dtype=case.dtype, seed=seed))
        k.append(values(lk, hk, d, dtype=case.dtype, seed=seed + 1))
        v.append(values(lk, hk, d, dtype=case.dtype, seed=seed + 2))
        place = torch.arange(lk - lq, lk)
        if case.rope and case.rope.given_positions:
            place = (3 * place + 5) % MAX_POSITION
        positions.append(place)
    cos, sin = tables(MAX_POSITION, case.rope.rotary_dim if case.rope else 2, 1e4)
    return Inputs(case, torch.cat(q), k, v, torch.cat(positions), cos, sin)


# ------------------------------------------------------------------------------- what is expected


def hidden_keys(case: Case, lq: int, lk: int) -> Tensor:
    distance = torch.arange(lk - lq, lk)[:, None] - torch.arange(lk)
    hidden = torch.zeros(lq, lk, dtype=torch.bool)
    if case.causal:
        hidden |= distance < 0
    if case.window is not None:
        hidden |= distance.abs() >= case.window
    return hidden


def sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention in the dtype."""
    hidden = hidden_keys(case, len(q), len(k))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, ~hidden, scale=case.softmax_scale, enable_gqa=True
    )[0].transpose(0, 1)
    return out.masked_fill(hidden.all(-1)[:, None, None], 0.0)


def check(inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Every element of every sequence, and that what is skipped was left alone."""
    case = inputs.case
    exacts, rounded, scales, kept = [], [], [], []
    for b, (lq, _) in enumerate(case.lengths):
        rows = slice(inputs.q_starts[b], inputs.q_starts[b + 1])
        if lq <= case.skip:
            assert out[rows].isnan().all() and lse[:, rows].isnan().all(), "a skipped sequence"
            continue
        q, k, v = inputs.q[rows], inputs.k[b], inputs.v[b]
        exact_q = q.double()
        if case.rope:
            p = inputs.positions[rows]
            angles = inputs.cos.double()[p], inputs.sin.double()[p]
            exact_q = reference.rotate(exact_q, *angles, case.rope.interleaved)
            q = ops.apply_rope(q, q, inputs.cos, inputs.sin, p, case.rope.interleaved)[0]
        masks = case.causal, case.softmax_scale, case.window
        exact, exact_lse = reference.attend(exact_q, k.double(), v.double(), *masks)
        scale, _ = reference.attend(exact_q, k.double(), v.double().abs(), *masks)
        exacts.append(exact)
        rounded.append(sdpa(case, q, k, v))
        scales.append(scale)
        kept += range(rows.start, rows.stop)
        # lse is fp32; only the rotated q is rounded to the dtype before
        rounded_lse = reference.attend(q.double(), k.double(), v.double(), *masks)[1]
        assert (lse[:, rows].isneginf() == exact_lse.isneginf()).all(), "lse of blind queries"
        error, rounding = (
            (t.double() - exact_lse).nan_to_num(0.0).abs().max() if t.numel() else torch.zeros(())
            for t in (lse[:, rows], rounded_lse)
        )
        heads = k.double().abs().repeat_interleave(q.shape[1] // k.shape[1], 1)
        terms = torch.einsum("qhd,khd->qhk", exact_q.abs(), heads) * case.softmax_scale
        terms = terms.max() if terms.numel() else 0.0  # of a logit, before they cancel
        assert error <= 2 * rounding + 1e-6 * (terms + 8), f"lse is {error:.1e} off"
    if kept:
        assert_close(
            out[kept], *(torch.cat(t) for t in (exacts, rounded)), "out", torch.cat(scales)
        )


# ------------------------------------------------------------------------------------ the kernel


def paged(tensors: list[Tensor], case: Case) -> tuple[Tensor, Tensor]:
    """A cache that holds the sequences in pages of random order with spare ones between, NaN in
    all that is not a key, and its block table, -1 where a sequence has no page."""
    page, (_, hk), d = case.page, case.heads, case.head_dim
    counts = [-(-len(t) // page) for t in tensors]
    total = sum(counts) + 3
    order = torch.randperm(total, generator=torch.Generator().manual_seed(case.seed)).tolist()
    cache = strided(torch.full((total, page, hk, d), NAN, dtype=case.dtype), 0)
    table = torch.full((len(tensors), max(counts, default=0) + 1), -1, dtype=torch.int32)
    for b, t in enumerate(tensors):
        for i in range(counts[b]):
            rows = t[i * page : (i + 1) * page]
            number = order.pop()
            cache[number, : len(rows)] = rows
            table[b, i] = number
    return cache, table


@dataclass
class Call:
    """The op's parameters and every tensor they point to."""

    params: ctypes.Structure
    tensors: list[Tensor]
    out: Tensor
    lse: Tensor
    table: Tensor | None = None  # block table
    caches: Sequence[Tensor] = ()


def heads_of(**tensors: Tensor) -> dict[str, int]:
    """The fields of params that tell where [..., tokens, heads, D] lie."""
    fields = {}
    for name, t in tensors.items():
        fields |= {name: t.data_ptr(), f"{name}_stride": t.stride(-3)}
        fields[f"{name}_head_stride"] = t.stride(-2)
    return fields


def make_call(inputs: Inputs) -> Call:
    case = inputs.case
    (hq, hk), d = case.heads, case.head_dim
    q = strided(inputs.q, case.padding)
    out = poisoned(inputs.q, case.padding)
    lse = torch.full((hq, len(q) + case.padding), NAN)
    lq, lk = ([n[i] for n in case.lengths] for i in (0, 1))
    cu_q = torch.tensor(starts(lq), dtype=torch.int32)
    fields: dict[str, int | float | ctypes.Structure] = {}
    if case.page:
        (k, table), (v, _) = (paged(t, case) for t in (inputs.k, inputs.v))
        counted = [k_ - q_ for q_, k_ in case.lengths] if case.add else lk
        seqlens = torch.tensor(counted, dtype=torch.int32)
        fields |= {"seqlens_k": seqlens.data_ptr(), "block_table": table.data_ptr()}
        fields |= {"block_table_stride": table.stride(0), "max_pages": table.shape[1] - 1}
        fields |= {"num_pages": len(k), "page_size": case.page, "seqlens_k_add": case.add}
        fields |= {"k_page_stride": k.stride(0), "v_page_stride": v.stride(0)}
        index = [seqlens, table]
    else:
        # 70 rows of NaN behind the last key: a tile may not look at them
        tail = torch.full((70, hk, d), NAN, dtype=case.dtype)
        k, v = (strided(torch.cat([*t, tail]), case.padding) for t in (inputs.k, inputs.v))
        index, table = [torch.tensor(starts(lk), dtype=torch.int32)], None
        fields |= {"cu_seqlens_k": index[0].data_ptr(), "tokens_k": sum(lk)}
    if case.rope:
        position = inputs.positions.to(torch.int32 if case.rope.interleaved else torch.int64)
        rope = rope_struct(
            position, case.rope.rotary_dim, case.rope.interleaved, (inputs.cos, inputs.sin)
        )
        if not case.rope.given_positions:
            rope.positions, rope.positions_dtype = None, 0
        index += [position, inputs.cos, inputs.sin]
        fields["rope"] = rope
    params = abi.structs()["mk_attention_params"](
        **heads_of(q=q, k=k, v=v, out=out),
        lse=lse.data_ptr(),
        cu_seqlens_q=cu_q.data_ptr(),
        lse_stride=lse.stride(0),
        tokens_q=len(q),
        batch=len(case.lengths),
        num_q_heads=hq,
        num_kv_heads=hk,
        head_dim=d,
        max_seqlen_q=max(lq, default=0),
        skip_seqlen_q=case.skip,
        causal=case.causal,
        window=case.window or 0,
        softmax_scale=case.softmax_scale,
        dtype=dtype_id(q),
        **fields,
    )
    tensors = [storage_of(t) for t in (q, k, v, out, lse, cu_q, *index)]
    return Call(params, tensors, out, lse, table, [k, v])


def launch(inputs: Inputs, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    return launch_call("attention", make_call(inputs), device, seed)


def launch_call(op: str, call: Call, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """out and lse, and that nothing beside them was written."""
    run(op, device, call.params, call.tensors, seed)
    assert_padding_untouched(call.out, "out")
    tokens = len(call.out)
    assert call.lse[:, tokens:].isnan().all(), "lse: written outside its rows"
    return call.out, call.lse[:, :tokens]


def run_and_check(case: Case, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    inputs = make_inputs(case)
    out, lse = launch(inputs, device, seed)
    check(inputs, out, lse)
    return out, lse


# --------------------------------------------------------------------------------- against PyTorch

MIXED = [(33, 33), (0, 5), (129, 200), (1, 70), (7, 0), (40, 12)]


@archs
@dtypes
@pytest.mark.parametrize("head_dim", [64, 128], ids=["hd64", "hd128"])
@pytest.mark.parametrize("page", [0, 16], ids=["packed", "page16"])
def test_attention(arch: str, dtype: torch.dtype, head_dim: int, page: int) -> None:
    """A mixed batch: empty sequences, one query, no key, more queries than keys, several tiles."""
    run_and_check(Case(MIXED, (2, 1), head_dim, dtype, page=page, padding=8), arch)


SHAPES = {
    "minitron": Case([(150, 150)], (32, 8), 128),
    "smollm2": Case([(150, 150)], (9, 3), 64),
    "full": Case([(130, 190), (64, 64)], (4, 4), 128, causal=False),
    "window": Case([(200, 300)], (2, 2), 128, window=70),
    "window of one": Case([(66, 80)], (2, 2), 64, window=1),
    "window, full": Case([(100, 190)], (2, 1), 64, window=33, causal=False),
    "window, few keys": Case([(90, 30)], (2, 1), 64, window=20, causal=False),
    "window, pages": Case([(150, 400)], (2, 1), 128, window=100, page=16),
    "chunk": Case([(20, 277), (130, 131)], (8, 1), 128, page=32, add=True),
    "skip": Case([(1, 90), (9, 9), (8, 100), (0, 0), (40, 40)], (2, 1), 64, page=64, skip=8),
    "large pages": Case([(65, 300), (3, 129)], (2, 1), 128, torch.float16, page=128),
    "sharp": Case([(70, 130)], (2, 1), 128, scale=1.0),
    "flat": Case([(70, 130)], (2, 1), 128, torch.float16, scale=1e-4),
    "rope": Case([(70, 130), (3, 3)], (2, 1), 128, rope=Rope(128)),
    "rope, interleaved": Case([(70, 130)], (3, 3), 64, rope=Rope(64, True, True)),
    "rope, partial": Case([(70, 130)], (2, 1), 128, torch.float16, rope=Rope(32, False, True)),
    "rope, odd": Case([(40, 50)], (2, 1), 64, rope=Rope(18, True)),
    "rope, no keys": Case(
        [(5, 0), (3, 3), (2, 0)], (2, 1), 64, causal=False, rope=Rope(64, False, True)
    ),
    "rope, pages": Case([(130, 131), (9, 40)], (2, 1), 128, page=16, add=True, rope=Rope(128)),
}


@pytest.mark.parametrize("arch, name", on_own_and_alike([(name,) for name in SHAPES]))
def test_attention_shapes(arch: str, name: str) -> None:
    run_and_check(SHAPES[name], arch, seed=len(name))


@settings(max_examples=40, deadline=None)
@given(
    arch=st.sampled_from(DEVICES),
    lengths=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 200)), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (5, 1)]),
    head_dim=st.sampled_from([64, 128]),
    dtype=st.sampled_from(HALVES),
    causal=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 220)),
    page=st.sampled_from([0, 16, 32, 64, 128]),
    padding=st.sampled_from([0, 8, 24]),
    scale=st.one_of(st.none(), st.floats(0.01, 0.5)),
    rotary=st.one_of(
        st.none(), st.tuples(st.integers(1, 32).map(lambda n: 2 * n), st.booleans(), st.booleans())
    ),
    skip=st.sampled_from([0, 0, 8]),
    seed=st.integers(0, 1000),
)
def test_attention_anything(
    arch: str, rotary: tuple[int, bool, bool] | None, lengths: list[tuple[int, int]], **options: ...
) -> None:
    if rotary and not rotary[2]:  # places in the sequence are positions in the tables: not negative
        lengths = [(min(lq, lk), lk) for lq, lk in lengths]
    case = Case(lengths, rope=Rope(*rotary) if rotary else None, **options)
    run_and_check(case, arch, seed=case.seed)


# ----------------------------------------------------------------------------------- same numbers


@archs
def test_pages_change_no_bit(arch: str) -> None:
    case = Case([(140, 300), (3, 65)], (4, 2), 128, window=150)
    expected = launch(make_inputs(case), arch)
    for page in (16, 32, 64, 128):
        got = launch(make_inputs(replace(case, page=page)), arch)
        assert all(map(torch.equal, got, expected)), page


@archs
@pytest.mark.parametrize("head_dim", [64, 128], ids=["hd64", "hd128"])
def test_a_row_does_not_depend_on_the_batch(arch: str, head_dim: int) -> None:
    """The first sequence alone, with others, with others whose K and V are NaN, and with another
    interleaving of warps: the same bits."""
    first = (150, 170)
    alone = launch(make_inputs(Case([first], (2, 1), head_dim)), arch)
    many = make_inputs(Case([first, (70, 20), (300, 300)], (2, 1), head_dim, page=16))
    for poison in (False, True):
        if poison:
            for t in (*many.k[1:], *many.v[1:]):
                t.fill_(NAN)
        got = launch(many, arch, seed=5)
        assert torch.equal(got[0][: first[0]], alone[0])
        assert torch.equal(got[1][:, : first[0]], alone[1])


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"emu-sm_{a}")
def test_interleavings_change_no_bit(arch: str) -> None:
    inputs = make_inputs(Case([(129, 260)], (2, 1), 128, window=90))
    expected = launch(inputs, arch)
    for seed in range(1, 6):
        for got, first in zip(launch(inputs, arch, seed), expected, strict=True):
            assert torch.equal(got, first), seed


MANY = [(20 + i % 9, 40 + i) for i in range(150)]  # more than twice as many as an H100's clusters


@pytest.mark.parametrize("heads", [(2, 1), (3, 1)], ids=["pairs of heads", "pairs of tiles"])
def test_many_items_of_a_block(heads: tuple[int, int]) -> None:
    """sm_90's blocks take one item after another: here up to 3 or 7 of one tile or two."""
    if "90a" not in BUILT:
        pytest.skip("sm_90a is not in this build")
    case = Case(MANY, heads, 64)
    plan = abi.plan("attention", make_call(make_inputs(case)).params, "90a")
    assert plan.grid[:] == [132, 1, 1] and plan.cluster[:] == [2, 1, 1]
    out, lse = run_and_check(case, "90a")
    for seed in (1, 2):
        assert all(map(torch.equal, launch(make_inputs(case), "90a", seed), (out, lse)))
    for count in (1, 70):  # fewer sequences, another block and place in its list
        few_out, few_lse = launch(make_inputs(replace(case, lengths=MANY[:count])), "90a")
        assert torch.equal(few_out, out[: len(few_out)])
        assert torch.equal(few_lse, lse[:, : len(few_out)])


def test_tiles_by_tma_and_by_copies_are_the_same() -> None:
    """sm_90 takes whole tiles by TMA, one box or one a page; where rows of K and V overlap there is
    no tensor map, and all comes by cp.async. Head 1's row r is head 0's row r + 1 here."""
    if "90a" not in BUILT:
        pytest.skip("sm_90a is not in this build")
    inputs = make_inputs(Case([(100, 500)], (2, 2), 128, causal=False))
    rows = values(501, 128, dtype=torch.bfloat16, seed=3)
    inputs.k = inputs.v = [torch.stack((rows[:-1], rows[1:]), 1)]
    copies = {}
    outs = []
    for name, page in (("boxes", 0), ("pages", 32), ("overlap", 0)):
        inputs.case = replace(inputs.case, page=page)
        call = make_call(inputs)
        if name == "overlap":
            call.params.k = call.params.v = rows.data_ptr()
            call.params.k_stride = call.params.k_head_stride = 128
            call.params.v_stride = call.params.v_head_stride = 128
            call.tensors.append(rows)
        counters = run("attention", "90a", call.params, call.tensors)
        assert counters is not None
        copies[name] = counters.issued["copy"]
        outs.append(call.out)
    check(inputs, outs[0], call.lse[:, :100])
    assert all(torch.equal(out, outs[0]) for out in outs)
    # Of Q and of the last tile, 500 % 128 rows; of all four tiles.
    assert copies["boxes"] <= copies["pages"] < copies["overlap"] / 2, copies


@main_loops
def test_chunks_equal_the_whole_prompt(arch: str) -> None:
    """A prompt in pieces over the same keys: each within the tolerance of what the whole has."""
    whole = make_inputs(Case([(300, 300)], (4, 2), 128, page=16))
    check(whole, *launch(whole, arch))
    for first, last in ((0, 100), (100, 101), (101, 300)):
        piece = make_inputs(Case([(last - first, last)], (4, 2), 128, page=16))
        piece.q = whole.q[first:last]
        piece.k, piece.v = [whole.k[0][:last]], [whole.v[0][:last]]
        check(piece, *launch(piece, arch))


@main_loops
def test_a_growing_maximum_is_rescaled(arch: str) -> None:
    """Logits that climb by up to 300 from tile to tile, or fall, or climb in one row of a warp
    only: the conditional rescale against the exact softmax."""
    for direction in (1.0, -1.0):
        inputs = make_inputs(Case([(64, 640)], (2, 1), 64, torch.float16, causal=False, scale=1.0))
        ramp = torch.linspace(0, 4, 640)[:, None] * direction
        inputs.k[0][:, 0, :8] = (inputs.k[0][:, 0, :8].float() / 16 + ramp).half()
        inputs.q[:, :, 8:] /= 8
        inputs.q[1:, :, :8] = inputs.q[1:, :, :8].clamp(-0.1, 0.1)
        inputs.q[0, :, :8] = 8.0
        check(inputs, *launch(inputs, arch))


# ---------------------------------------------------------------------------- what is out of range


@archs
def test_page_numbers_out_of_range_give_nan(arch: str) -> None:
    """To the queries that see one of its keys, and to no other."""
    inputs = make_inputs(Case([(150, 150), (60, 60)], (2, 1), 128, page=16))
    call = make_call(inputs)
    exact = launch(inputs, arch)[0]
    call.table[0, 3] = len(call.caches[0])  # keys 48 ... 63
    call.table[1, 2] = -7  # keys 32 ... 47
    run("attention", arch, call.params, call.tensors)
    is_nan = call.out.isnan().all(-1).all(-1)
    assert is_nan[48:150].all() and is_nan[150 + 32 :].all()
    assert torch.equal(call.out[:48], exact[:48])
    assert torch.equal(call.out[150 : 150 + 32], exact[150 : 150 + 32])
    assert call.lse[:, : len(is_nan)].isnan().eq(is_nan).all()


@main_loops
def test_pages_before_the_window_are_not_looked_at(arch: str) -> None:
    """They may have been given to another sequence: here the table has no page there."""
    inputs = make_inputs(Case([(30, 400)], (2, 1), 128, window=100, page=16))
    call = make_call(inputs)
    call.table[0, : (400 - 30 - 99) // 16] = -1
    for seed in (0, 1):
        call.out.fill_(NAN)
        run("attention", arch, call.params, call.tensors, seed)
        check(inputs, call.out, call.lse[:, :30])


@main_loops
def test_more_keys_than_the_block_table_has_pages_for(arch: str) -> None:
    inputs = make_inputs(Case([(20, 64)], (2, 1), 64, page=16, causal=False))
    call = make_call(inputs)
    call.params.max_pages = 3
    run("attention", arch, call.params, call.tensors)
    assert call.out.isnan().all()


@main_loops
def test_positions_out_of_range_give_nan(arch: str) -> None:
    inputs = make_inputs(Case([(6, 50)], (2, 1), 64, rope=Rope(32, False, True)))
    inputs.positions[2], inputs.positions[4] = MAX_POSITION, -1
    out, _ = launch(inputs, arch)
    assert out.isnan().any(-1).any(-1).tolist() == [False, False, True, False, True, False]


@main_loops
def test_optional_lse_and_empty_inputs(arch: str) -> None:
    inputs = make_inputs(Case([(20, 40)], (2, 1), 64))
    call = make_call(inputs)
    call.params.lse, call.params.lse_stride = None, 0
    run("attention", arch, call.params, call.tensors)
    assert torch.equal(call.out, launch(inputs, arch)[0]) and call.lse.isnan().all()
    for field in ("tokens_q", "batch", "max_seqlen_q"):
        call = make_call(inputs)
        setattr(call.params, field, 0)
        run("attention", arch, call.params, call.tensors)
        assert call.out.isnan().all()
    no_keys = make_inputs(Case([(20, 0)], (2, 1), 64))
    out, lse = launch(no_keys, arch)
    assert not out.any() and lse.isneginf().all()


# -------------------------------------------------------------------------------------- counters


def count(
    arch: str, causal: bool, head_dim: int = 128, tokens: int = 1024, hq: int = 32
) -> Counters:
    case = Case([(tokens, tokens)], (hq, max(hq // 4, 1)), head_dim, causal=causal)
    inputs = make_inputs(case)
    for t in (inputs.q, *inputs.k):  # normal, without outliers: references move as in real models
        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(0)))
    call = make_call(inputs)
    call.params.lse = None
    counters = run("attention", arch, call.params, call.tensors)
    assert counters is not None
    return counters


MMA_CLOCKS = {"80": 8, "90a": 64}  # m16n8k16; a warp's part of m64n128k16, which four share


def issue_over_tensor_time(arch: str, counters: Counters) -> float:
    """Warp-instructions but mov, over the clocks of the MMAs, of four sub-cores both."""
    return (counters.instructions - counters.issued["mov"]) / (
        MMA_CLOCKS[arch] * counters.issued["mma"]
    )


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"emu-sm_{a}")
@pytest.mark.parametrize("head_dim", [64, 128], ids=["hd64", "hd128"])
def test_memory_accesses_are_full_and_free_of_conflicts(arch: str, head_dim: int) -> None:
    counters = count(arch, causal=True, head_dim=head_dim, tokens=300, hq=4)
    assert counters.shared_wavefronts == counters.shared_wavefronts_min
    assert counters.write_sectors == counters.unique_write_sectors
    # Q once, K and V for 3 tiles of queries of 4 heads; and the lengths, by each warp. On sm_90 two
    # heads' blocks fetch K and V together, but for the keys after the last whole tile.
    keys = 2 * (128 + 256 + 256) + 4 * 44 if arch == "90a" else 4 * (128 + 256 + 300)
    tensors = (300 * 4 + 2 * keys) * head_dim * 2 // 32
    assert tensors <= counters.read_sectors <= tensors + 12 * 8 * 6  # 12 blocks of up to 8 warps


# FlashAttention-2: .47 full, .50 causal; FlashAttention-3: .53 full.
ISSUE_BARS = [("80", False, 0.40), ("80", True, 0.44), ("90a", False, 0.46), ("90a", True, 0.52)]
issue_bars = pytest.mark.parametrize(
    "arch, causal, bar",
    [pytest.param(a, c, b, id=f"{a}-{'causal' if c else 'full'}") for a, c, b in ISSUE_BARS],
)


def check_issue_slots(arch: str, causal: bool, bar: float, hq: int) -> None:
    if arch not in BUILT:
        pytest.skip(f"sm_{arch} is not in this build")
    counters = count(arch, causal, hq=hq)
    found = issue_over_tensor_time(arch, counters)
    print(f"issue/t {found:.3f}, {counters.instructions - counters.issued['mov']} instructions")
    assert found <= bar
    assert counters.shared_wavefronts == counters.shared_wavefronts_min


@pytest.mark.slow
@issue_bars
def test_issue_slots_at_1024(arch: str, causal: bool, bar: float) -> None:
    check_issue_slots(arch, causal, bar, 32)


@issue_bars
def test_issue_slots_of_four_heads(arch: str, causal: bool, bar: float) -> None:
    """A quick guard of test_issue_slots_at_1024."""
    check_issue_slots(arch, causal, bar, 4)


# --------------------------------------------------------------------------------- planted faults


# Architecture, what is changed in the kernel's PTX, the case that must notice, and how (nothing: it
# may not).
TWO_BLOCKS = Case([(64, 400)], (2, 1), 64, torch.float16, causal=False, scale=0.5)
MANY_ITEMS = Case(MANY, (2, 1), 64)
FAULTS = {
    # References follow at 9, not at 8: all the same; at 128: weights overflow the dtype.
    "nothing": ("", r"0f41000000", "0f41100000", TWO_BLOCKS, ""),
    "rescaled too late": (
        "",
        r"0f41000000",
        "0f43000000",
        TWO_BLOCKS,
        r"^out: \d+ elements are NaN",
    ),
    "no barrier": (
        "",
        r"bar\.sync[^;]*;",
        "",
        TWO_BLOCKS,
        r"^shared-memory race in \w+sm80|^barrier misuse in \w+sm90",
    ),
    "copies not waited for": (
        "",
        r"cp\.async\.wait_group \d;",
        "cp.async.wait_group 2;",
        TWO_BLOCKS,
        "^asynchronous copy not waited for",
    ),
    "wrong lanes": (
        "80",
        r"(shfl\.sync\.bfly\.b32.*), (?:%r\d+|2), ",
        r"\1, 4, ",
        TWO_BLOCKS,
        "^lse is .* off",
    ),
    "no proxy fence": ("90a", r"fence\.proxy\.async[^;]*;", "", TWO_BLOCKS, "^missing proxy fence"),
    "no wgmma fence": ("90a", r"wgmma\.fence[^;]*;", "", TWO_BLOCKS, "^missing wgmma.fence"),
    "wgmma not waited for": (
        "90a",
        r"wgmma\.wait_group\.sync\.aligned 1;",
        "wgmma.wait_group.sync.aligned 2;",
        TWO_BLOCKS,
        "^wgmma not waited for",
    ),
    "K's slots are V's": (
        "90a",
        r"(mbarrier\.arrive[^;]*\+ )48\]",
        r"\g<1>64]",
        TWO_BLOCKS,
        "^deadlock",
    ),
    "no slot is freed": (
        "90a",
        r"mbarrier\.arrive\.shared::cluster[^;]*;",
        "",
        TWO_BLOCKS,
        "^deadlock",
    ),
    "arrivals at home only": (
        "90a",
        r"mapa\.shared::cluster\.u32 (%r\d+), (%r\d+), %r\d+;",
        r"mov.u32 \1, \2;",
        TWO_BLOCKS,
        "^shared-memory race.* write to shared",
    ),
    "a slot that the other block still reads": (
        "90a",
        r"mbarrier\.try_wait\.parity[^;]*\+ (?:48|64)\][^;]*; selp\.b32 (%r\d+), 1, 0, p;",
        r"mov.u32 \1, 1;",
        TWO_BLOCKS,
        "^mbarrier misuse.* too many",
    ),
    "no multicast": (
        "90a",
        r"\.multicast::cluster (.*), %rs\d+;",
        r" \1;",
        TWO_BLOCKS,
        "^deadlock",
    ),
    "blocks that do not meet": (
        "90a",
        r"barrier\.cluster\.(arrive|wait)[^;]*;",
        "",
        TWO_BLOCKS,
        "^shared-memory race.* after its initialisation",
    ),
    "output overwritten under its store": (
        "90a",
        r"cp\.async\.bulk\.wait_group\.read 0;",
        "",
        MANY_ITEMS,
        "^shared-memory race.* which a bulk copy of warp",
    ),
    "an item's Q over the last one's": (
        "90a",
        r"mbarrier\.try_wait\.parity\.shared::cta\.b64 p, "
        r"\[%r\d+ \+ 8\][^;]*; selp\.b32 (%r\d+), 1, 0, p;",
        r"mov.u32 \1, 1;",
        MANY_ITEMS,
        # Of the clusters that fail the host's threads are first at one or another.
        "^shared-memory race.* no barrier in between|^mbarrier misuse.*: too many",
    ),
}


@pytest.mark.parametrize(
    "arch, fault",
    [
        pytest.param(arch, name, id=f"{arch}-{name}")
        for arch in ("80", "90a")
        for name, (only, *_) in FAULTS.items()
        if only in ("", arch)
    ],
)
def test_a_planted_fault_is_found(arch: str, fault: str, tmp_path: Path) -> None:
    """Changes in the kernel's PTX: the emulator or the comparison objects."""
    if arch not in BUILT:
        pytest.skip(f"sm_{arch} is not in this build")
    _, old, new, case, found = FAULTS[fault]
    inputs = make_inputs(case)
    call = make_call(inputs)
    entry = abi.plan("attention", call.params, arch).entry.decode()
    lib = faulty_library(tmp_path, arch, entry, old, new)

    with pytest.raises(AssertionError, match=found) if found else nullcontext():
        run("attention", arch, call.params, call.tensors, lib=lib)
        check(inputs, call.out, call.lse)
