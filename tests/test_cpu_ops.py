"""The CPU kernels of norm, activation, embedding, RoPE with append and attention, by every
instruction set; and decode steps played back from a recording.

test_ops.py compares the ops with reference.py. Here is what goes beyond: the same bits from all
instruction sets, thread counts, batches and divisions of a prompt; memory that must not be read.
"""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import MinitronForCausalLM, SamplingParams, _native, cpu_ops, reference
from minitron_kernels.cpu_graphs import MAX_ROWS
from minitron_kernels.generate import Engine, generate
from tests.test_cpu_linear import AVAILABLE, ISAS, assert_same_bits
from tests.test_cpu_linear import random as random_of
from tests.tiny_checkpoint import write_tiny_checkpoint

Tensor = torch.Tensor

random = functools.partial(random_of, dtype=torch.float32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
CALLS = ("cpu_rms_norm", "cpu_silu_and_mul", "cpu_rope_append", "cpu_attention")


def by_isa(isa: str, run: Callable[[], Any]) -> Any:
    """run() with the kernels of an instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(_native, name, functools.partial(getattr(_native, name), isa=ISAS[isa]))
        return run()


def same_by_every_isa(run: Callable[[], Tensor | tuple[Tensor, ...]]) -> None:
    expected = run()
    for isa in AVAILABLE:
        actual = by_isa(isa, run)
        pairs = zip(
            actual if isinstance(actual, tuple) else (actual,),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        )
        for a, e in pairs:
            assert_same_bits(a, e)


class threads:
    """torch's number of threads, for a while."""

    def __init__(self, count: int) -> None:
        self.count, self.before = count, torch.get_num_threads()

    def __enter__(self) -> None:
        torch.set_num_threads(self.count)

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.before)


# ------------------------------------------------------------------------------------- row-wise ops


@each_dtype
@pytest.mark.parametrize("hidden", [1, 7, 16, 33, 576, 4096])
def test_rms_norm_and_silu_have_the_same_bits_everywhere(dtype: torch.dtype, hidden: int) -> None:
    x, weight = random(33, hidden, dtype=dtype), random(hidden, dtype=dtype, seed=1)
    x[3] = math.nan
    x[4, 0] = math.inf
    same_by_every_isa(lambda: cpu_ops.rms_norm(x, weight, 1e-5))
    same_by_every_isa(lambda: cpu_ops.silu_and_mul(torch.cat((x, x.flip(0)), 1)))
    residual = random(33, hidden, dtype=dtype, seed=2)

    def added() -> tuple[Tensor, Tensor]:
        total = residual.clone()
        return cpu_ops.rms_norm(x, weight, 1e-5, total), total

    same_by_every_isa(added)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_rows_do_not_depend_on_threads_or_batch(count: int) -> None:
    x, weight = random(200, 576), random(576, seed=1)
    together = cpu_ops.rms_norm(x, weight, 1e-5)
    with threads(count):
        assert_same_bits(cpu_ops.rms_norm(x, weight, 1e-5), together)
        assert_same_bits(cpu_ops.rms_norm(x[77:78], weight, 1e-5), together[77:78])
        silu = cpu_ops.silu_and_mul(x)
        assert_same_bits(silu[5:6], cpu_ops.silu_and_mul(x[5:6]))


def test_idle_threads_sleep() -> None:
    # CPU time of the whole process: a worker that spins takes all of the pause.
    pause = 0.3
    x, weight = random(4000, 576), random(576, seed=1)
    with threads(3):
        cpu_ops.rms_norm(x, weight, 1e-5)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(pause)
        assert time.process_time() - before < pause / 3


def rope_case(dtype: torch.dtype, d: int, rotated: int, tokens: int) -> dict[str, Tensor]:
    angles = torch.arange(300)[:, None] / 1e4 ** (torch.arange(rotated // 2) * 2 / rotated)
    generator = torch.Generator().manual_seed(d)
    return {
        "q": random(tokens, 4, d, dtype=dtype),
        "k": random(tokens, 2, d, dtype=dtype, seed=1),
        "v": random(tokens, 2, d, dtype=dtype, seed=2),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(0, 300, (tokens,), generator=generator),
        "slots": torch.randperm(64, generator=generator)[:tokens].int() - 1,
    }


def run_rope(case: dict[str, Tensor], interleaved: bool, pair_order: bool) -> tuple[Tensor, ...]:
    q = torch.full_like(case["q"], math.nan)
    cache = tuple(
        torch.full((4, 16, *case["k"].shape[1:]), math.nan, dtype=q.dtype) for _ in range(2)
    )
    cpu_ops.rope_append(
        case["q"], q, (case["k"], case["v"]), case["cos"], case["sin"], case["positions"],
        interleaved, cache, case["slots"], pair_order,
    )  # fmt: skip
    return q, *cache


@each_dtype
@pytest.mark.parametrize(("d", "rotated"), [(64, 64), (128, 128), (96, 64), (80, 80), (6, 4)])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pair_order", [False, True])
def test_rope_append(
    dtype: torch.dtype, d: int, rotated: int, interleaved: bool, pair_order: bool
) -> None:
    case = rope_case(dtype, d, rotated, 33)
    q, k_cache, v_cache = run_rope(case, interleaved, pair_order)
    order = torch.arange(d)  # features of the input, as rope's pairing wants them
    if pair_order and not interleaved:
        order[:rotated] = torch.arange(rotated).view(-1, 2).T.reshape(-1)
    exact = reference.apply_rope(
        *(case[n][..., order].double() for n in ("q", "k")),
        case["cos"].double(),
        case["sin"].double(),
        case["positions"],
        interleaved,
    )
    kept = case["slots"] >= 0
    at = case["slots"][kept].long()
    flat_k, flat_v = (c.view(64, 2, d) for c in (k_cache, v_cache))
    for actual, expected in ((q, exact[0]), (flat_k[at], exact[1][kept])):
        size = case["q"].abs().max()  # a sum of two products may cancel
        error = (actual.double() - expected).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * expected.abs() + 2e-7 * size).all()
    assert_same_bits(flat_v[at], case["v"][kept])
    others = torch.ones(64, dtype=torch.bool)
    others[at] = False
    assert flat_k[others].isnan().all() and flat_v[others].isnan().all()
    same_by_every_isa(lambda: run_rope(case, interleaved, pair_order))

    in_place = case["q"].clone()
    cpu_ops.rope_append(
        in_place, in_place, None, case["cos"], case["sin"], case["positions"], interleaved,
        pair_order=pair_order,
    )  # fmt: skip
    assert_same_bits(in_place, q)


def test_embedding_takes_rows_and_refuses_others() -> None:
    table = random(50, 33, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 49], [7, 7]])
    assert_same_bits(cpu_ops.embedding(ids, table), table[ids])
    assert cpu_ops.embedding(ids[:0], table).shape == (0, 2, 33)
    for bad in (-1, 50):
        with pytest.raises(ValueError, match=r"ids must lie in 0\.\.49"):
            cpu_ops.embedding(torch.tensor([3, bad], dtype=torch.int32), table)


# ---------------------------------------------------------------------------------------- attention


class Paged:
    """Sequences of random keys over scattered pages of a cache that is NaN elsewhere."""

    def __init__(
        self, lengths: list[int], hq: int, hk: int, d: int, page: int, dtype: torch.dtype
    ) -> None:
        self.lengths, self.page = lengths, page
        self.k = [random(n, hk, d, dtype=dtype, seed=10 + i) for i, n in enumerate(lengths)]
        self.v = [random(n, hk, d, dtype=dtype, seed=50 + i) for i, n in enumerate(lengths)]
        self.q = [random(n, hq, d, dtype=dtype, seed=90 + i) for i, n in enumerate(lengths)]
        width = max(1, max(-(-n // page) for n in lengths))
        pages = width * len(lengths) + 2
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
        self.table = order[: width * len(lengths)].view(len(lengths), width).int()
        self.k_cache, self.v_cache = (
            torch.full((pages, page, hk, d), math.nan, dtype=dtype) for _ in range(2)
        )
        for i, n in enumerate(lengths):
            for p in range(n):
                at = self.table[i, p // page], p % page
                self.k_cache[at], self.v_cache[at] = self.k[i][p], self.v[i][p]

    def run(
        self, rows: list[tuple[int, int, int]], causal: bool = True, window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries first ... last-1 of sequences, which then have ``last`` keys: (i, first, last)"""
        q = torch.cat([self.q[i][first:last] for i, first, last in rows])
        cu = torch.tensor([0, *(last - first for _, first, last in rows)]).cumsum(0).int()
        return cpu_ops.attention(
            q, self.k_cache, self.v_cache, cu, (0, None), causal, 0.1, window, True,
            block_table=torch.stack([self.table[i] for i, _, _ in rows]),
            seqlens_k=torch.tensor([last for _, _, last in rows]),
        )  # fmt: skip


def assert_attention_close(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None
) -> None:
    """At most twice the error of fp32 PyTorch, plus rounding to the dtype: the design's rule."""
    exact = reference.attend(q.double(), k.double(), v.double(), causal, 0.1, window)[0]
    eager = reference.attend(q.float(), k.float(), v.float(), causal, 0.1, window)[0]
    error = (out.double() - exact).abs()
    unit = torch.finfo(out.dtype).eps * exact.abs()
    assert (error <= 2 * (eager.double() - exact).abs().max() + unit + 1e-7).all()


SHAPES = [  # Hq, Hk, D
    (9, 3, 64),  # SmolLM2-135M
    (32, 8, 128),  # Minitron-8B
    (5, 1, 80),
    (2, 2, 7),
]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 70), (False, 40)])
def test_attention_by_every_isa(
    dtype: torch.dtype, shape: tuple[int, int, int], causal: bool, window: int | None
) -> None:
    case = Paged([1, 7, 150, 261], *shape, 16, dtype)
    rows = [(0, 0, 1), (1, 0, 7), (2, 149, 150), (3, 200, 261)]
    out, _ = case.run(rows, causal, window)
    assert out.isfinite().all()
    at = 0
    for i, first, last in rows:
        own = out[at : at + last - first]
        at += last - first
        assert_attention_close(own, case.q[i][first:last], case.k[i], case.v[i], causal, window)
    same_by_every_isa(lambda: case.run(rows, causal, window))


def test_attention_close_fails_when_one_key_is_wrong() -> None:
    case = Paged([150], 4, 2, 64, 16, torch.float32)
    case.k_cache[case.table[0, 3], 2] *= 1.01
    with pytest.raises(AssertionError):
        out, _ = case.run([(0, 100, 150)])
        assert_attention_close(out, case.q[0][100:], case.k[0], case.v[0], True, None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=4),
    st.sampled_from([(9, 3, 64), (4, 1, 33), (2, 2, 128), (12, 2, 16)]),
    st.sampled_from([16, 32, 128]),
    st.sampled_from(DTYPES),
    st.sampled_from([None, 1, 33, 200]),
    st.integers(1, 3),
    st.data(),
)
def test_a_row_has_the_same_bits_in_any_prompt_batch_and_thread_count(
    lengths: list[int],
    shape: tuple[int, int, int],
    page: int,
    dtype: torch.dtype,
    window: int | None,
    count: int,
    data: Any,
) -> None:
    case = Paged(lengths, *shape, page, dtype)
    together, lse = case.run([(i, 0, n) for i, n in enumerate(lengths)], True, window)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    cut = [data.draw(st.integers(0, n - 1)) for n in lengths]
    with threads(count):
        ends = list(zip(cut, lengths, strict=True))
        pieces, piece_lse = case.run([(i, c, n) for i, (c, n) in enumerate(ends)], True, window)
        rows = [s + j for s, (c, n) in zip(starts, ends, strict=True) for j in range(c, n)]
        assert_same_bits(pieces, together[rows])
        assert_same_bits(piece_lse, lse[:, rows])
        for i, c in enumerate(cut):  # one query, as when decoding
            alone, alone_lse = case.run([(i, c, c + 1)], True, window)
            at = slice(starts[i] + c, starts[i] + c + 1)
            assert_same_bits(alone, together[at])
            assert_same_bits(alone_lse, lse[:, at])


def test_long_sequences_are_divided_without_changing_a_bit() -> None:
    """Decoding with few heads divides the keys among threads, and joins the parts."""
    case = Paged([4000], 4, 1, 64, 64, torch.bfloat16)
    with threads(1):
        alone = case.run([(0, 3990, 4000)])
    for count in (2, 3, 7):
        with threads(count):
            for _ in range(5):
                for a, b in zip(case.run([(0, 3990, 4000)]), alone, strict=True):
                    assert_same_bits(a, b)
    assert_attention_close(alone[0], case.q[0][3990:], case.k[0], case.v[0], True, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_keys_that_a_query_does_not_see_do_not_matter(bad: float) -> None:
    case = Paged([140], 6, 2, 64, 16, torch.float32)
    expected, _ = case.run([(0, 0, 140)])
    expected_far, _ = case.run([(0, 100, 140)], True, 20)
    at = case.table[0, 130 // 16], 130 % 16
    case.k_cache[at] = case.v_cache[at] = bad
    got, _ = case.run([(0, 0, 140)])
    assert_same_bits(got[:130], expected[:130])
    assert not got[130:].isfinite().any()
    at = case.table[0, 79 // 16], 79 % 16
    case.k_cache[at] = case.v_cache[at] = bad  # behind the window of query 100 - 20 + 1
    far, _ = case.run([(0, 100, 140)], True, 20)
    assert_same_bits(far[:30], expected_far[:30])


def test_packed_keys_have_the_bits_of_paged_ones() -> None:
    case = Paged([33, 129], 4, 2, 64, 16, torch.bfloat16)
    cu = torch.tensor([0, 33, 162])
    packed = cpu_ops.attention(
        torch.cat(case.q), torch.cat(case.k), torch.cat(case.v), cu, (0, None), True, 0.1, None,
        True, cu_seqlens_k=cu,
    )  # fmt: skip
    for a, b in zip(packed, case.run([(0, 0, 33), (1, 0, 129)]), strict=True):
        assert_same_bits(a, b)


GUARD = """
import sys, torch
from minitron_kernels import cpu_ops, _native
from tests.test_cpu_linear import ISAS, before_guard_page, random
import functools
past = sys.argv[2] == "past"
for name in ("cpu_rms_norm", "cpu_silu_and_mul", "cpu_rope_append", "cpu_attention"):
    setattr(_native, name, functools.partial(getattr(_native, name), isa=ISAS[sys.argv[1]]))
keep = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for d in (7, 24, 64):
        k, v, q = (before_guard_page(random(n, 1, d, dtype=dtype), keep) for n in (37, 37, 37))
        cos = before_guard_page(torch.ones(1, d // 2), keep)
        sin = before_guard_page(torch.ones(1, d // 2), keep)
        x, w = before_guard_page(random(3, 2 * d, dtype=dtype), keep), random(2 * d, dtype=dtype)
        w = before_guard_page(w, keep)
        cpu_ops.rms_norm(x, w, 1e-5)
        cpu_ops.silu_and_mul(x)
        zeros = torch.zeros(37, dtype=torch.int32)
        if past:
            k = k.as_strided((37, 1, d), (d + 1, d, 1))
        cpu_ops.rotated(q, cos, sin, zeros, False)
        cpu_ops.rotated(q, cos, sin, zeros, True)
        cu = torch.tensor([0, 37], dtype=torch.int32)
        for n in (1, 37):
            cuq = torch.tensor([0, n], dtype=torch.int32)
            cpu_ops.attention(q[37 - n :], k, v, cuq, (0, None), True, 0.1, None, False,
                              cu_seqlens_k=cu)
print("done")
"""


@pytest.mark.parametrize("isa", AVAILABLE)
def test_nothing_is_read_past_the_end_of_a_tensor(isa: str) -> None:
    root = Path(__file__).resolve().parent.parent
    run = [sys.executable, "-c", GUARD, isa, "inside"]
    done = subprocess.run(run, cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "seqlens": (
        lambda: cpu_ops.attention(
            random(1, 2, 8), random(2, 16, 1, 8), random(2, 16, 1, 8), None, (0, None), True, 1.0,
            None, False, block_table=torch.zeros(1, 2, dtype=torch.int32),
            seqlens_k=torch.tensor([33]),
        ), ValueError, r"cache_seqlens\[0\]: 33 tokens do not fit block_table's 2 x 16",
    ),
    "starts": (
        lambda: cpu_ops.attention(
            random(3, 2, 8), random(3, 1, 8), random(3, 1, 8), torch.tensor([0, 2, 1]), (0, None),
            True, 1.0, None, False, cu_seqlens_k=torch.tensor([0, 2, 3]),
        ), ValueError, "cu_seqlens_q must ascend from 0 to the 3 rows of q, got 0..1",
    ),
    "position": (
        lambda: cpu_ops.rotated(
            random(1, 2, 8), torch.ones(4, 4), torch.ones(4, 4), torch.tensor([4]), False
        ), ValueError, r"positions must lie in 0\.\.3, got 4\.\.4",
    ),
    "isa": (
        lambda: _native.cpu_silu_and_mul(0, 0, 0, 0, 0, 1, _native.F32, 1, 9), ValueError,
        "isa must be",
    ),
    "threads": (
        lambda: _native.cpu_silu_and_mul(0, 0, 0, 0, 0, 1, _native.F32, 0), ValueError,
        "num_threads must be 1 ... 256",
    ),
    "dtype": (
        lambda: _native.cpu_rms_norm(0, 0, 0, 0, 0, 0, 0, 0, 1, 1e-5, _native.I32, 1), TypeError,
        "dtype must be MK_BF16",
    ),
    "null": (
        lambda: _native.cpu_rms_norm(0, 0, 0, 0, 8, 0, 8, 1, 8, 1e-5, _native.F32, 1), ValueError,
        "weight is NULL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments_are_named(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


# -------------------------------------------------------------------------------- recorded decoding


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> MinitronForCausalLM:
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    return MinitronForCausalLM.from_pretrained(folder, device="cpu")


PROMPTS = [[5, 6, 7], list(range(40)), [9], [100, 3, 17, 60]]


def test_recorded_steps_give_the_same_tokens(tiny: MinitronForCausalLM) -> None:
    params = [
        SamplingParams(max_new_tokens=20, ignore_eos=True),
        SamplingParams(max_new_tokens=9, ignore_eos=True, temperature=0.8, seed=3, top_k=20),
        SamplingParams(max_new_tokens=15, ignore_eos=True, repetition_penalty=1.3, logprobs=2),
        SamplingParams(max_new_tokens=4, ignore_eos=True),
    ]
    eager = generate(tiny, None, PROMPTS, params, cuda_graphs=False)
    recorded = generate(tiny, None, PROMPTS, params)
    for a, b in zip(eager, recorded, strict=True):
        assert a.token_ids == b.token_ids and a.logprobs == b.logprobs


def test_each_batch_size_and_thread_count_is_recorded_once(tiny: MinitronForCausalLM) -> None:
    engine = Engine(tiny, None, 512)
    for prompt, count in zip(PROMPTS, (4, 8, 12, 16), strict=True):
        engine.add(prompt, SamplingParams(max_new_tokens=count, ignore_eos=True))
    with threads(2):
        while engine.has_work:
            engine.step()
        recordings = engine._recordings
        assert recordings is not None
        assert sorted(recordings._recorded) == [(n, 2, False) for n in (1, 2, 3, 4)]
    engine.add(PROMPTS[0], SamplingParams(max_new_tokens=4, ignore_eos=True))
    with threads(1):
        while engine.has_work:
            engine.step()
    assert (1, 1, False) in recordings._recorded


def test_replayed_logits_have_the_bits_of_the_step(tiny: MinitronForCausalLM) -> None:
    logits = []
    for graphs in (False, None):
        engine = Engine(tiny, None, 256, cuda_graphs=graphs)
        seen: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            original = generate.__globals__["sample"]

            def spy(
                x: Tensor, states: Any, seen: list[Tensor] = seen, original: Any = original
            ) -> Any:
                seen.append(x.clone())
                return original(x, states)

            patch.setitem(generate.__globals__, "sample", spy)
            engine.add(PROMPTS[1], SamplingParams(max_new_tokens=40, ignore_eos=True))
            while engine.has_work:
                engine.step()
        logits.append(torch.cat(seen))
    assert_same_bits(logits[0], logits[1])


def test_large_batches_are_not_recorded(tiny: MinitronForCausalLM) -> None:
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    prompts = [[i + 5, 7] for i in range(MAX_ROWS + 1)]
    engine = Engine(tiny, None, 1024)
    results = [engine.add(p, params) for p in prompts]
    while engine.has_work:
        engine.step()
    assert engine._recordings is not None and not engine._recordings._recorded
    assert [r.token_ids for r in results] == [
        generate(tiny, None, [p], params)[0].token_ids for p in prompts
    ]


def test_steps_with_other_operations_are_not_recorded(
    tiny: MinitronForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight that must be copied in every call: a recording would hold the copy's address."""
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    expected = generate(tiny, None, PROMPTS[:1], params)[0].token_ids
    weight = tiny.lm_head.weight
    with pytest.MonkeyPatch.context() as patch, caplog.at_level("DEBUG"):
        strided = torch.nn.Parameter(weight.T.contiguous().T, requires_grad=False)
        patch.setitem(tiny.lm_head._parameters, "weight", strided)
        engine = Engine(tiny, None, 64)
        result = engine.add(PROMPTS[0], params)
        while engine.has_work:
            engine.step()
        assert engine._recordings is not None and not engine._recordings._recorded
    assert "without recorded steps" in caplog.text
    assert result.token_ids == expected


def test_recordings_nest_not_and_replay_errors() -> None:
    first, second = _native.CpuRecording(), _native.CpuRecording()
    ids, table, out = torch.tensor([1]), torch.ones(3, 4), torch.zeros(1, 4)

    def call() -> None:
        _native.cpu_embedding(
            ids.data_ptr(), table.data_ptr(), out.data_ptr(), 4, 4, 1, 3, 4, _native.I64,
            _native.F32, 1,
        )  # fmt: skip

    first.start()
    with pytest.raises(RuntimeError, match="recording already"):
        second.start()
    call()
    first.stop()
    call()
    assert len(first) == 1 and len(second) == 0
    table += 1
    first.replay()
    assert out.eq(2).all()
    ids += 7
    with pytest.raises(ValueError, match=r"ids must lie in 0\.\.2"):
        first.replay()
