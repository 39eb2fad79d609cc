"""Sampling against exact probabilities, an independent reading of its rule, and transformers."""

from __future__ import annotations

import math
import time
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers.generation import logits_process as hf

from minitron_kernels import sampling
from minitron_kernels.sampling import (
    Sampled,
    SamplingParams,
    SamplingState,
    _process,
    philox_4x32_10,
    sample,
)

# Truncations that leave several tokens, in every combination that a draw can take.
MIXES = {
    "temperature": {"temperature": 1.0},
    "cool": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "top_k+top_p": {"temperature": 1.3, "top_k": 9, "top_p": 0.85},
    "top_p+min_p": {"temperature": 1.2, "top_p": 0.95, "min_p": 0.08},
    "all": {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02},
}


def new_state(prompt: tuple[int, ...] = (), eos: tuple[int, ...] = (), **params) -> SamplingState:
    return SamplingState(SamplingParams(**params), prompt, eos)


def sample_one(logits: list[float] | torch.Tensor, state: SamplingState) -> Sampled:
    return sample(torch.as_tensor(logits, dtype=torch.float32)[None], [state])[0]


# ---- the random numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # philox4x32 lines of Random123's kat_vectors
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    assert philox_4x32_10(counter, key) == expected


# ---- the draw


def hf_probabilities(logits: torch.Tensor, p: SamplingParams) -> np.ndarray:
    """float64 probabilities of what transformers' warpers leave of a row."""
    scores = logits.double()[None] / p.temperature
    if p.top_k:
        scores = hf.TopKLogitsWarper(p.top_k)(None, scores)
    if p.top_p < 1:
        scores = hf.TopPLogitsWarper(p.top_p)(None, scores)
    if p.min_p:
        scores = hf.MinPLogitsWarper(p.min_p)(None, scores)
    return scores.softmax(-1)[0].numpy()


def chi_squared(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value that `counts` were drawn so; tokens expected fewer than 5 times are pooled."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    present = expected > 0
    assert observed[~present].sum() == 0, "a token of probability 0 was drawn"
    return stats.chisquare(observed[present], expected[present]).pvalue


def draws(logits: torch.Tensor, params: dict, num_seeds: int, num_steps: int) -> np.ndarray:
    states = [new_state(seed=1000 + i, **params) for i in range(num_seeds)]
    rows = logits.expand(num_seeds, -1)
    ids = [s.token_id for _ in range(num_steps) for s in sample(rows, states)]
    return np.bincount(ids, minlength=len(logits))


@pytest.mark.parametrize("params", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(("num_seeds", "num_steps"), [(50, 80), (4000, 1)])
def test_draws_follow_exact_probabilities(params, num_seeds, num_steps):
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(3))
    probabilities = hf_probabilities(logits, SamplingParams(**params))
    assert np.count_nonzero(probabilities) > 3
    counts = draws(logits, params, num_seeds, num_steps)
    assert set(counts.nonzero()[0]) <= set(probabilities.nonzero()[0])
    assert chi_squared(counts, probabilities) > 1e-3


def test_chi_squared_rejects_a_wrong_temperature():
    logits = 2 * torch.randn(40, generator=torch.Generator().manual_seed(3))
    counts = draws(logits, {"temperature": 1.0}, 50, 80)
    assert chi_squared(counts, hf_probabilities(logits, SamplingParams(temperature=0.9))) < 1e-6


def draw_by_the_rule(logits: torch.Tensor, p: SamplingParams, seed: int, step: int) -> int:
    """Steps 1 to 6 of the module's docstring, read literally, in Python integers."""
    scaled = logits / torch.tensor(p.temperature)
    exps = (scaled - scaled.max()).exp().tolist()
    weights = [int(e * 2.0**40) for e in exps]
    order = sorted(range(len(weights)), key=lambda i: (-scaled[i].item(), i))
    if p.top_k:
        order = order[: p.top_k]
    if p.top_p < 1:
        limit = int(p.top_p * float(sum(weights[i] for i in order)))
        before = list(accumulate((weights[i] for i in order), initial=0))
        order = [t for n, t in enumerate(order) if n == 0 or before[n] < limit]
    kept = sorted(i for i in order if weights[i] >= int(p.min_p * 2**40))
    out = philox_4x32_10((step, 0, 0, 0), (seed % 2**32, seed // 2**32))
    target = (out[1] * 2**32 + out[0]) * sum(weights[i] for i in kept) // 2**64
    running = 0
    for i in kept:
        running += weights[i]
        if running > target:
            return i
    raise AssertionError("the weights end before the target")


@settings(max_examples=300, deadline=None)
@given(
    # Multiples of 1/2 tie often, in the largest, at the cut of top_k and at that of top_p.
    halves=st.lists(st.one_of(st.integers(-12, 12), st.just(-math.inf)), min_size=1, max_size=30),
    temperature=st.sampled_from([1e-5, 0.1, 0.7, 1.0, 1.5, 30.0]),
    top_k=st.integers(0, 40),
    top_p=st.one_of(st.just(1.0), st.floats(1e-13, 1.0, exclude_min=True)),
    min_p=st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0.0, 1.0)),
    seed=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**32 - 1),
)
def test_draw_equals_its_rule(halves, temperature, top_k, top_p, min_p, seed, step):
    logits = torch.tensor(halves, dtype=torch.float32) / 2
    if logits.isneginf().all():
        logits[0] = 0
    state = new_state(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    state.step = step
    expected = draw_by_the_rule(logits, state.params, seed, step)
    assert sample_one(logits, state).token_id == expected
    assert (state.step, state.counts) == (step + 1, Counter([expected]))


@pytest.mark.parametrize("params", [{"top_k": 1000, "top_p": 0.9}, {"top_p": 0.95}, {}], ids=str)
def test_draw_equals_its_rule_at_full_vocabulary(params):
    logits = 3 * torch.randn(131072, generator=torch.Generator().manual_seed(0))
    for seed in range(2):
        state = new_state(temperature=1.0, seed=seed, **params)
        expected = draw_by_the_rule(logits, state.params, seed, 0)
        assert sample_one(logits, state).token_id == expected


@pytest.mark.parametrize("params", [{"top_k": 50}, {"top_p": 0.95}, {"top_k": 50, "top_p": 0.9}])
def test_only_tokens_that_may_be_kept_are_sorted(params, monkeypatch):
    lengths = []
    sort = np.sort
    monkeypatch.setattr(np, "sort", lambda x, *args: lengths.append(len(x)) or sort(x, *args))
    logits = 3 * torch.randn(131072, generator=torch.Generator().manual_seed(0))
    sample_one(logits, new_state(temperature=0.7, **params))
    assert len(lengths) == 1
    assert lengths[0] <= (50 if "top_k" in params else 131072 // 8)


@pytest.mark.parametrize(("r", "expected"), [(0, 1), (2**63 - 1, 1), (2**63, 3), (2**64 - 1, 3)])
def test_draw_at_the_edges_of_a_token(r, expected, monkeypatch):
    """Tokens 1 and 3 have half of the range each; 0, 2 and 4 have none of it, ends included."""
    monkeypatch.setattr(sampling, "_random_64", lambda seed, step: r)
    logits = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]
    assert sample_one(logits, new_state(temperature=1.0)).token_id == expected


def test_draw_truncation_is_a_special_case_of_none():
    """top_k = V and the largest top_p below 1 take the sorting path, and give the same tokens."""
    logits = torch.randn(24, 5003, generator=torch.Generator().manual_seed(1))
    plain = [new_state(temperature=1.0, seed=i) for i in range(24)]
    for params in ({"top_k": 5003}, {"top_k": 2**31 - 1}, {"top_p": math.nextafter(1, 0)}):
        sorting = [new_state(temperature=1.0, seed=i, **params) for i in range(24)]
        assert sample(logits, sorting) == sample(logits, plain)
        for state in plain:
            state.step = 0


def test_greedy_takes_the_lowest_of_equal_ids():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        logits = torch.randn(3, 131072, generator=torch.Generator().manual_seed(2)).to(dtype)
        for row, ids in enumerate([(0, 131071), (70000, 70001), (5, 99999)]):
            logits[row, list(ids)] = 20
        got = [s.token_id for s in sample(logits, [new_state() for _ in range(3)])]
        assert got == [0, 70000, 5], dtype


def test_seed_reproduces_a_request_and_seeds_differ():
    logits = torch.zeros(20, 1000)

    def ids(seeds: list[int | None]) -> list[list[int]]:
        states = [new_state(temperature=1.0, seed=seed) for seed in seeds]
        steps = [sample(logits[: len(seeds)], states) for _ in range(4)]
        return [[step[i].token_id for step in steps] for i in range(len(seeds))]

    seeds = [*range(18), 2**32, 2**64 - 1]  # 0 and 2**32 differ in the high word of the key only
    first = ids(seeds)
    assert first == ids(seeds)
    assert len({tuple(f) for f in first}) == 20
    assert all(len(set(f)) > 1 for f in first), "the step does not enter the draw"
    torch.manual_seed(5)
    unseeded = ids([None, None])
    assert unseeded[0] != unseeded[1]
    torch.manual_seed(5)
    assert ids([None, None]) == unseeded


def test_state_seed_reproduces_an_unseeded_request():
    logits = torch.zeros(1, 5000)
    unseeded = new_state(temperature=1.0)
    seeded = new_state(temperature=1.0, seed=unseeded.seed)
    assert [sample(logits, [unseeded]) for _ in range(5)] == [
        sample(logits, [seeded]) for _ in range(5)
    ]


# ---- the batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [33, 50021])
def test_batch_does_not_change_a_request(vocab, dtype):
    options = [
        {},
        {"logprobs": 3},
        {"repetition_penalty": 1.4, "logprobs": 0},
        {"logit_bias": {7: 4.0}, "min_new_tokens": 2},
        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
        *[{"seed": i, "logprobs": i % 4, **mix} for i, mix in enumerate(MIXES.values())],
        {"temperature": 0.9, "top_p": 0.5, "repetition_penalty": 0.8, "seed": 2**63},
    ]
    logits = torch.randn(2, len(options), vocab, generator=torch.Generator().manual_seed(4))
    logits = logits.to(dtype)

    def states() -> list[SamplingState]:
        return [new_state((1, 2, 3), (0,), **o) for o in options]

    together, reversed_, alone = states(), states(), states()
    for step in logits:
        results = sample(step, together)
        assert sample(step.flip(0), reversed_[::-1])[::-1] == results
        assert [sample(step[i : i + 1].clone(), [s])[0] for i, s in enumerate(alone)] == results


def test_batch_does_not_decide_how_float64_rounds():
    logits = torch.tensor([[1.0, 1.0 + 1e-12]] * 2, dtype=torch.float64)  # equal in fp32
    assert sample(logits[:1], [new_state()]) == [Sampled(0)]
    assert sample(logits, [new_state(), new_state(logit_bias={1: 1.0})]) == [Sampled(0), Sampled(1)]


def test_sample_does_not_modify_logits():
    logits = torch.randn(2, 100)
    before = logits.clone()
    sample(logits, [new_state(logit_bias={1: 5.0}), new_state(temperature=1.0, top_k=3)])
    assert torch.equal(logits, before)


def test_sample_of_nothing():
    assert sample(torch.empty(0, 100), []) == []


# ---- processors


def test_repetition_penalty_by_hand():
    state = new_state(prompt=(0, 1, 1), repetition_penalty=2.0)
    state.advance(3)
    row = torch.tensor([4.0, -3.0, 1.5, 1.0])
    _process(row, state)
    assert row.tolist() == [2.0, -6.0, 1.5, 0.5]  # once per token, however often it occurred


def test_presence_and_frequency_penalty_by_hand():
    state = new_state(prompt=(0,), presence_penalty=0.5, frequency_penalty=0.25)
    for token in (1, 2, 2, 2):
        state.advance(token)
    row = torch.tensor([4.0, 4.0, 4.0, 4.0])
    _process(row, state)
    assert row.tolist() == [4.0, 3.25, 2.75, 4.0]  # the prompt does not count


def test_processors_apply_in_order():
    """(2 / 2 - 1 - 1) + 8 = 7: any other order gives another number."""
    state = new_state(
        repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0, logit_bias={0: 8.0}
    )
    state.advance(0)
    row = torch.tensor([2.0])
    _process(row, state)
    assert row.tolist() == [7.0]


@pytest.mark.parametrize("penalty", [0.7, 1.1, 3.0])
def test_processors_equal_transformers(penalty):
    generator = torch.Generator().manual_seed(6)
    logits = 4 * torch.randn(200, generator=generator)
    prompt = torch.randint(200, (30,), generator=generator).tolist()
    output = torch.randint(200, (5,), generator=generator).tolist()
    eos = (3, prompt[0])
    state = new_state(
        tuple(prompt), eos, repetition_penalty=penalty, logit_bias={9: -2.5}, min_new_tokens=9
    )
    for token in output:
        state.advance(token)
    row = logits.clone()
    _process(row, state)

    ids = torch.tensor([prompt + output])
    expected = hf.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[None])
    expected = hf.SequenceBiasLogitsProcessor([[[9], -2.5]])(ids, expected)
    expected = hf.MinNewTokensLengthLogitsProcessor(30, 9, list(eos))(ids, expected)
    assert torch.equal(row, expected[0])


def test_min_new_tokens_masks_stop_ids():
    logits = [5.0, 4.0, 3.0]
    # The bias of 0 keeps the processors running when the mask must no longer be there.
    state = new_state(eos=(0,), stop_token_ids=[1], min_new_tokens=2, logit_bias={2: 0.0})
    assert [sample_one(logits, state).token_id for _ in range(3)] == [2, 2, 0]
    assert state.stop_ids == {0, 1}
    ignoring = new_state(eos=(0,), stop_token_ids=[1], min_new_tokens=2, ignore_eos=True)
    assert ignoring.stop_ids == {1}
    assert [sample_one(logits, ignoring).token_id for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logit_bias_bans_and_forces(temperature):
    logits = [5.0, 4.0, 3.0]
    for bias, expected in (({0: -math.inf, 1: -math.inf}, 2), ({1: 100}, 1)):
        state = new_state(temperature=temperature, seed=1, logit_bias=bias)
        assert {sample_one(logits, state).token_id for _ in range(20)} == {expected}


# ---- log-probabilities


def test_logprobs_are_those_of_the_raw_logits():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    exact = logits[0].double().log_softmax(-1).tolist()
    state = new_state(logprobs=3, temperature=0.5, logit_bias={0: 100.0}, seed=0)
    (result,) = sample(logits, [state])
    assert result.token_id == 0
    assert result.logprob == pytest.approx(exact[0], abs=1e-6)
    assert [token for token, _ in result.top_logprobs] == [1, 3, 2]  # equal ones by id
    assert [lp for _, lp in result.top_logprobs] == pytest.approx(
        [exact[1], exact[3], exact[2]], abs=1e-6
    )


def test_logprobs_counts():
    logits = torch.randn(3, 4)
    off, none, many = sample(logits, [new_state(logprobs=n) for n in (None, 0, 9)])
    assert (off.logprob, off.top_logprobs) == (None, None)
    assert isinstance(none.logprob, float) and none.top_logprobs == []
    assert sorted(token for token, _ in many.top_logprobs) == [0, 1, 2, 3]
    assert sum(math.exp(lp) for _, lp in many.top_logprobs) == pytest.approx(1, abs=1e-6)


def test_logprobs_of_a_certain_token():
    """log(1) = -0.0 or 0.0 must come before everything else."""
    (result,) = sample(torch.tensor([[-math.inf, 0.0, -200.0]]), [new_state(logprobs=3)])
    assert [token for token, _ in result.top_logprobs] == [1, 2, 0]
    assert [lp for _, lp in result.top_logprobs] == [0.0, -200.0, -math.inf]


# ---- errors

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-1, NAN, INF, 1e-6, "1", None, True]),
        ("top_k", [-1, 1.5, "3", None, True, 2**31]),
        ("top_p", [0, -0.1, 1.1, NAN, "1", None]),
        ("min_p", [-0.1, 1.1, NAN, None]),
        ("repetition_penalty", [0, -1, INF, NAN, None]),
        ("presence_penalty", [INF, NAN, "0", None]),
        ("frequency_penalty", [-INF, NAN, None]),
        ("seed", [-1, 2**64, 1.0, "1", True]),
        ("stop", ["text", ("",), (1,), 5, None]),
        ("stop_token_ids", [(-1,), ("1",), 2, (True,)]),
        ("max_new_tokens", [0, -1, 1.0, True]),
        ("max_length", [0, -1, 1.0]),
        ("min_new_tokens", [-1, 1.0, None]),
        ("ignore_eos", [1, "yes", None]),
        ("logit_bias", [{-1: 1.0}, {1: NAN}, {1: INF}, {"1": 1.0}, {1: "2"}, [1], None]),
        ("logprobs", [-1, True, 1.0]),
    ],
)
def test_params_refuse(field, values):
    for value in values:
        with pytest.raises(ValueError, match=field):
            SamplingParams(**{field: value})


def test_params_refuse_contradictions():
    with pytest.raises(ValueError, match=r"max_new_tokens=5 and max_length=9"):
        SamplingParams(max_new_tokens=5, max_length=9)
    with pytest.raises(ValueError, match=r"min_new_tokens=6 is more than max_new_tokens=5"):
        SamplingParams(min_new_tokens=6, max_new_tokens=5)


def test_params_accept():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        seed=2**64 - 1,
        stop=["a"],
        stop_token_ids=[1],
    )
    assert (params.stop, params.stop_token_ids) == (("a",), (1,))
    assert SamplingParams(temperature=0, seed=0).temperature == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        ([0.0, NAN, 1.0], {}, "NaN"),
        ([0.0, INF, 1.0], {}, "infinity"),
        ([-INF, -INF, -INF], {}, "every logit is -inf"),
        ([0.0, -INF, -INF], {"logit_bias": {0: -INF}}, "leave no token"),
        ([0.0, NAN, 1.0], {"top_k": 1, "top_p": 0.5, "logprobs": 1}, "NaN"),
    ],
)
def test_sample_refuses_non_finite_rows(row, params, message, temperature):
    good, bad = new_state(), new_state(temperature=temperature, seed=0, **params)
    with pytest.raises(ValueError, match=rf"logits\[1\].*{message}"):
        sample(torch.tensor([[1.0, 2.0, 3.0], row]), [good, bad])
    assert (good.step, bad.step) == (0, 0)


def test_sample_refuses_bad_arguments():
    with pytest.raises(TypeError, match="floating point"):
        sample(torch.zeros(1, 5, dtype=torch.int64), [new_state()])
    for shape in ((5,), (2, 5), (1, 1, 5)):
        with pytest.raises(ValueError, match=r"logits must be \[1, V\]"):
            sample(torch.zeros(shape), [new_state()])
    for state, name in (
        (new_state(prompt=(5,)), "prompt_ids"),
        (new_state(eos=(5,)), "eos_ids"),
        (new_state(stop_token_ids=(5,)), "stop_token_ids"),
        (new_state(logit_bias={5: 1.0}), "logit_bias"),
    ):
        with pytest.raises(ValueError, match=f"{name}: token id 5 is outside the vocabulary of 5"):
            sample(torch.zeros(1, 5), [state])
    with pytest.raises(ValueError, match="prompt_ids: token id -1 is negative"):
        new_state(prompt=(-1,))


def test_sample_speed_is_printed():
    logits = 3 * torch.randn(1, 131072)
    for name, params in {"greedy": {}, **MIXES}.items():
        state = new_state(seed=0, **params)
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            sample(logits, [state])
            seconds.append(time.perf_counter() - start)
        print(f"sample, vocabulary 131072, {name}: {min(seconds) * 1e3:.2f} ms")
