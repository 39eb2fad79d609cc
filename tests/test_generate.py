"""The engine: streams, stops, limits, batches, scores, and transformers' call of generate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import AutoTokenizer, LlamaForCausalLM, MinitronForCausalLM, SamplingParams
from minitron_kernels.generate import Engine, _StopText, generate, score, stream
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> MinitronForCausalLM:
    return MinitronForCausalLM.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def spell(tokenizer: Any, text: str) -> dict[str, Any]:
    """Options under which the model writes ``text``, one token each, in a fixed cyclic order.

    A frequency penalty above the gaps between the biases makes it take the tokens in turn.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(set(ids)) == len(text)
    return {
        "logit_bias": {token: 1e6 - 1e3 * i for i, token in enumerate(ids)},
        "frequency_penalty": 1e3 * len(ids),
    }


# ------------------------------------------------------------------------------------------ stops


class SpelledTokens:
    """A stream decoder whose tokens are given texts; the last ``held`` come out only at flush."""

    def __init__(self, texts: list[str], held: str = "") -> None:
        self.texts, self.held = texts, held

    def push(self, token_id: int) -> str:
        return self.texts[token_id]

    def flush(self) -> str:
        return self.held


def run_stop(texts: list[str], stop: list[str], held: str = "") -> tuple[list[str], bool]:
    text = _StopText(SpelledTokens(texts, held), stop)
    out = []
    for i in range(len(texts)):
        certain, hit = text.push(i)
        out.append(certain)
        if hit:
            return out, True
    return [*out, text.flush()], False


@pytest.mark.parametrize(
    ("texts", "stop", "expected"),
    [
        (["ab", "cd"], [], (["ab", "cd", ""], False)),
        (["ab", "cd"], ["bc"], (["a", ""], True)),
        (["ab", "xd"], ["bc"], (["a", "bxd", ""], False)),  # held back, then let go
        (["ab"], ["bc"], (["a", "b"], False)),  # the end lets it go
        (["aab"], ["aab", "ab"], ([""], True)),  # the earliest wins
        (["xaba", "bac"], ["abac"], (["x", "ab"], True)),  # overlapping starts
        (["a", "a", "a", "b"], ["aab"], (["", "", "a", ""], True)),
        (["hello\n", "\nworld"], ["\n\n"], (["hello", ""], True)),
    ],
)
def test_stop_strings_hand_worked(
    texts: list[str], stop: list[str], expected: tuple[list[str], bool]
) -> None:
    assert run_stop(texts, stop) == expected


@given(
    st.lists(st.text("ab", max_size=3), max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.text("ab", max_size=2),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_equal_a_search_of_all_text_so_far(
    texts: list[str], stop: list[str], held: str
) -> None:
    out, hit = run_stop(texts, stop, held)
    # The request ends with the token that completes a stop string.
    expected, ended = "".join(texts) + held, False
    for n in range(1, len(texts) + 1):
        ends = [at for s in stop if (at := "".join(texts[:n]).find(s)) >= 0]
        if ends:
            expected, ended = "".join(texts[:n])[: min(ends)], True
            break
    if not ended and (ends := [at for s in stop if (at := expected.find(s)) >= 0]):
        expected = expected[: min(ends)]
    assert ("".join(out), hit) == (expected, ended)


def test_stop_string_ends_the_request(model: Any, tokenizer: Any) -> None:
    writes = spell(tokenizer, "abcdef")
    free = generate(model, tokenizer, "x", SamplingParams(max_new_tokens=8, **writes))[0]
    assert (free.text, free.finish_reason) == ("abcdefab", "length")
    for stop, text, count in (("cd", "ab", 4), ("f", "abcde", 6), ("a", "", 1)):
        params = SamplingParams(max_new_tokens=8, stop=(stop,), **writes)
        result = generate(model, tokenizer, "x", params)[0]
        assert (result.text, result.finish_reason) == (text, "stop")
        assert result.token_ids == free.token_ids[:count]
    held = SamplingParams(max_new_tokens=4, stop=("cdz",), **writes)
    assert generate(model, tokenizer, "x", held)[0].text == "abcd"


def test_stop_ids_and_eos(model: Any, tokenizer: Any) -> None:
    writes = spell(tokenizer, "abcdef")
    c = tokenizer.encode("c", add_special_tokens=False)[0]
    result = generate(model, tokenizer, "x", SamplingParams(stop_token_ids=(c,), **writes))[0]
    assert (result.text, result.finish_reason, result.token_ids[-1]) == ("ab", "stop", c)

    eos = model.config.eos_token_ids[0]
    wants_eos: dict[str, Any] = {"logit_bias": {eos: 1e6}, "max_new_tokens": 6}
    result = generate(model, tokenizer, "x", SamplingParams(**wants_eos))[0]
    assert (result.token_ids, result.text, result.finish_reason) == ([eos], "", "stop")
    result = generate(model, tokenizer, "x", SamplingParams(**wants_eos, min_new_tokens=4))[0]
    assert result.token_ids.index(eos) == 4 == len(result.token_ids) - 1
    result = generate(model, tokenizer, "x", SamplingParams(**wants_eos, ignore_eos=True))[0]
    assert (result.token_ids, result.finish_reason) == ([eos] * 6, "length")


def test_lengths(model: Any, tokenizer: Any) -> None:
    prompt = [7] * 10
    for params, count in (
        (SamplingParams(max_new_tokens=1, ignore_eos=True), 1),
        (SamplingParams(max_length=13, ignore_eos=True), 3),
        (SamplingParams(ignore_eos=True), 128),
    ):
        result = generate(model, tokenizer, prompt, params)[0]
        assert (len(result.token_ids), result.finish_reason) == (count, "length")
    context = model.config.max_position_embeddings
    result = generate(
        model, None, [7] * (context - 3), SamplingParams(max_new_tokens=50, ignore_eos=True)
    )[0]
    assert (len(result.token_ids), result.finish_reason) == (3, "length")


# ---------------------------------------------------------------------------------------- streams


def test_stream_tells_what_generate_returns(model: Any, tokenizer: Any) -> None:
    prompts = ["hello", "héllo wörld 你好", "a"]
    params = SamplingParams(max_new_tokens=30, temperature=1.0, seed=3, logprobs=2)
    run = stream(model, tokenizer, prompts, params)
    events = list(run)
    expected = generate(model, tokenizer, prompts, params)
    for i, result in enumerate(expected):
        mine = [e for e in events if e.index == i]
        assert [e.token_id for e in mine] == result.token_ids
        assert "".join(e.text for e in mine) == result.text == run.results[i].text
        assert [e.finish_reason for e in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == result.finish_reason
        assert result.prompt_ids == tokenizer.encode(prompts[i])
        assert result.logprobs is not None and len(result.logprobs) == len(mine)
        body = result.token_ids[:-1] if result.finish_reason == "stop" else result.token_ids
        assert result.text == tokenizer.decode(body, skip_special_tokens=True)


def test_prompts_as_tensors_and_arrays(model: Any, tokenizer: Any) -> None:
    params = SamplingParams(max_new_tokens=2)
    alone = [r.token_ids for r in generate(model, tokenizer, [[5, 6], [7, 8]], params)]
    for prompts in (
        torch.tensor([[5, 6], [7, 8]]),
        np.array([[5, 6], [7, 8]]),
        [torch.tensor([5, 6]), np.array([7, 8])],
    ):
        assert [r.token_ids for r in generate(model, tokenizer, prompts, params)] == alone
    for prompt in (torch.tensor([5, 6]), np.array([5, 6]), [np.int64(5), np.int64(6)], (5, 6)):
        assert [r.token_ids for r in generate(model, tokenizer, prompt, params)] == alone[:1]
    assert score(model, torch.tensor([5, 6, 7])) == score(model, [5, 6, 7])


@pytest.mark.parametrize(
    ("prompts", "params", "told"),
    [
        (None, None, "prompts must be a string, token ids, or a list of these, got NoneType"),
        ({"a": 1}, None, "got dict"),
        (["ab", 3], None, "prompt 1 must be a string or token ids, got '3'"),
        ([[5], [1.5]], None, r"prompt 1 must be a string or token ids, got '\[1.5\]'"),
        ([1.5], None, "prompt 0 must be a string or token ids, got '1.5'"),
        ("ab", {"max_new_tokens": 3}, "params must be SamplingParams, one or a list, got {'max"),
    ],
)
def test_prompts_that_are_none(
    model: Any, tokenizer: Any, prompts: Any, params: Any, told: str
) -> None:
    with pytest.raises(TypeError, match=told):
        generate(model, tokenizer, prompts, params)


def test_other_arguments_of_a_wrong_type(model: Any) -> None:
    with pytest.raises(TypeError, match="ids must be token ids, got 'hello'"):
        score(model, "hello")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="source must be a path or a name, got NoneType"):
        type(model).from_pretrained(None)


def test_closed_stream_keeps_what_was_produced(model: Any, tokenizer: Any) -> None:
    run = stream(model, tokenizer, ["ab", "c"], SamplingParams(max_new_tokens=20, ignore_eos=True))
    for _ in range(6):
        next(run)
    run.close()
    assert [len(r.token_ids) for r in run.results] == [3, 3]
    assert {r.finish_reason for r in run.results} == {"interrupted"}
    assert list(run) == []


def test_more_requests_than_pages_and_rows(model: Any) -> None:
    """Requests wait for pages and for places, in order, and get the answers they get alone."""
    params = SamplingParams(max_new_tokens=9, temperature=1.0, seed=11, ignore_eos=True)
    prompts = [[5 + i] * (1 + 7 * i) for i in range(7)]
    alone = [generate(model, None, [p], params)[0].token_ids for p in prompts]
    engine = Engine(model, None, 96, max_batch_size=3, max_step_tokens=16, prefill_chunk=16)
    results = [engine.add(p, params) for p in prompts]
    started: list[int] = []
    while engine.has_work:
        for event in engine.step():
            if event.index not in started:
                started.append(event.index)
        assert len(engine._running) <= 3
    # prompts longer than one chunk take one step more: the order of admission is what counts
    assert sorted(started) == list(range(7)) and started[0] == 0
    assert engine.cache.allocator.num_free == engine.cache.allocator.num_pages
    chunked = [generate(model, None, [p], params, prefill_chunk=16)[0].token_ids for p in prompts]
    assert [r.token_ids for r in results] == chunked
    assert chunked == alone


def test_dialogue_reads_only_what_is_new(model: Any) -> None:
    params = SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=2)
    engine = Engine(model, None, 160, prefill_chunk=16, keep_last=True)
    prompt = list(range(5, 42))

    def turn(prompt: list[int], read: int) -> list[int]:
        before = engine.timings.prefill_tokens
        result = engine.add(prompt, params)
        while engine.has_work:
            engine.step()
        assert engine.timings.prefill_tokens - before == read
        (alone,) = generate(model, None, [prompt], params, prefill_chunk=16)
        assert (result.token_ids, result.logprobs) == (alone.token_ids, alone.logprobs)
        return result.token_ids

    reply = turn(prompt, read=37)
    prompt += [*reply, 9, 8, 7]
    turn(prompt, read=4)  # of the last token of a reply there is no K and V yet
    turn(prompt, read=1)
    turn(prompt[:20], read=1)
    turn([*prompt[:18], 99, 98], read=2)
    turn([1, 2, 3], read=3)
    kept = engine._kept
    assert engine.cache.allocator.num_free == engine.cache.allocator.num_pages - len(kept[1])

    result = engine.add([1, 2, 3, 4, 5], params)  # ended early: what was read of it is kept
    engine.step()
    engine.step()
    engine.cancel()
    assert not engine.has_work and len(result.token_ids) == 2
    turn([1, 2, 3, 4, 5, *result.token_ids, 6], read=2)


def test_dialogue_gives_way_to_what_needs_its_pages(model: Any) -> None:
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    engine = Engine(model, None, 64, keep_last=True)
    prompts = [[5] * 30, [6] * 60, [7] * 20, [7] * 21, [5] * 31]
    results = [engine.add(prompt, params) for prompt in prompts]
    while engine.has_work:
        engine.step()
    alone = [generate(model, None, [prompt], params)[0].token_ids for prompt in prompts]
    assert [result.token_ids for result in results] == alone


def test_request_larger_than_the_cache_is_refused(model: Any) -> None:
    engine = Engine(model, None, 32)
    with pytest.raises(ValueError, match="needs 138 tokens of cache, the engine has 32"):
        engine.add([7] * 10, SamplingParams())


def test_seed_decides_and_the_batch_does_not(model: Any) -> None:
    def run(seed: int, prompts: list[list[int]]) -> list[list[int]]:
        params = SamplingParams(max_new_tokens=20, temperature=1.0, seed=seed, ignore_eos=True)
        return [r.token_ids for r in generate(model, None, prompts, params)]

    first = run(1, [[9, 10, 11]])[0]
    assert run(1, [[9, 10, 11]])[0] == first != run(2, [[9, 10, 11]])[0]
    assert run(1, [[8], [9, 10, 11], [12] * 40])[1] == first


def test_logprobs_are_those_of_the_logits(model: Any) -> None:
    prompt = [9, 10, 11, 12]
    params = SamplingParams(max_new_tokens=6, logprobs=3, temperature=1.5, seed=2, top_k=9)
    result = generate(model, None, prompt, params)[0]
    ids = torch.tensor([prompt + result.token_ids])
    expected = model.logits(ids)[0].log_softmax(-1)
    assert result.logprobs is not None
    for i, entry in enumerate(result.logprobs):
        row = expected[len(prompt) - 1 + i]
        assert entry["logprob"] == pytest.approx(row[entry["token_id"]].item(), abs=1e-4)
        top = row.topk(3)
        assert [t for t, _ in entry["top"]] == top.indices.tolist()
        assert [p for _, p in entry["top"]] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_score_equals_the_logits(model: Any) -> None:
    ids = torch.randint(5, 200, (1, 70), generator=torch.Generator().manual_seed(0))
    logprobs = model.logits(ids)[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()
    for chunk in (256, 69, 16, 1):
        result = score(model, ids[0].tolist(), chunk=chunk)
        assert result[0] is None
        assert result[1:] == pytest.approx(expected, abs=1e-4)
    assert score(model, [7]) == [None]
    for bad, message in (([], "1..512 tokens, got 0"), ([7] * 513, "got 513"), ([-1], "0..260")):
        with pytest.raises(ValueError, match=message):
            score(model, bad)


# ----------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("", {}, "prompt 0 is empty"),
        ([[5], []], {}, "prompt 1 is empty"),
        ([[5, 261]], {}, r"token id 261; ids lie in 0\.\.260"),
        ([[-1]], {}, "token id -1"),
        ([[5] * 512], {}, "prompt 0 has 512 tokens, which leaves no room .* context of 512"),
        ([[5] * 9], {"max_length": 9}, "prompt 0 has 9 tokens, max_length is 9"),
        ([[5]], {"logit_bias": {999: 1.0}}, "999"),
        ([[5]], {"stop_token_ids": (261,)}, "261"),
    ],
)
def test_bad_request_is_refused_before_anything_runs(
    model: Any, tokenizer: Any, prompts: Any, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, prompts, SamplingParams(**params))


def test_text_needs_a_tokenizer(model: Any) -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generate(model, None, "hello")
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        generate(model, None, [[5]], SamplingParams(stop=("x",)))
    with pytest.raises(ValueError, match="params has 2 entries for 1 prompts"):
        generate(model, None, [[5]], [SamplingParams()] * 2)


def test_cache_that_does_not_fit_is_a_memory_error(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    memory = type("memory", (), {"available": 100_000})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(MemoryError, match=r"needs 0\.00 GiB, 0\.00 GiB is free"):
        generate(model, None, [[5] * 200], SamplingParams(max_new_tokens=100))
    # Two that fit one after the other are run one after the other.
    results = generate(model, None, [[5]] * 3, SamplingParams(max_new_tokens=20, ignore_eos=True))
    assert [len(r.token_ids) for r in results] == [20, 20, 20]


# --------------------------------------------------------------------------- transformers' generate


def test_model_card_snippet(folder: Path) -> None:
    """The snippet of the model card with its import lines changed, and nothing else."""
    path, dtype, device = folder, torch.float32, "cpu"
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = LlamaForCausalLM.from_pretrained(path, torch_dtype=dtype, device_map=device)
    prompt = "Complete the paragraph:"
    inputs = tokenizer.encode(prompt, return_tensors="pt").to(model.device)
    outputs = model.generate(inputs, max_length=30)
    text = tokenizer.decode(outputs[0])
    assert outputs.shape == (1, 30) and outputs.dtype == torch.int64
    assert torch.equal(outputs[:, : inputs.shape[1]], inputs)
    assert text.startswith("<s>Complete the paragraph:")


def test_generate_takes_a_batch_encoding(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer(["hello world", "a"], return_tensors="pt", padding=True)
    together = model.generate(**inputs, max_new_tokens=5, pad_token_id=0)
    for i, text in enumerate(["hello world", "a"]):
        alone = model.generate(tokenizer.encode(text, return_tensors="pt"), max_new_tokens=5)
        assert together[i, -5:].tolist()[: alone.shape[1]] == alone[0, -5:].tolist()


def test_generate_pads_what_ends_early(model: Any) -> None:
    eos = model.config.eos_token_ids[0]
    ids = torch.tensor([[9, 10], [11, 12]])
    free = model.generate(ids, max_new_tokens=4, eos_token_id=[])
    ends_at_once = int(free[0, 2])
    assert ends_at_once != int(free[1, 2])
    out = model.generate(ids, max_new_tokens=4, eos_token_id=ends_at_once, pad_token_id=3)
    assert out[0, 2:].tolist() == [ends_at_once, 3, 3, 3]
    out = model.generate(ids, max_new_tokens=4, eos_token_id=ends_at_once)
    assert out[0, 2:].tolist() == [ends_at_once] * 4  # padded with the end token, as there
    assert eos in model.config.eos_token_ids


def test_do_sample(model: Any) -> None:
    ids = torch.tensor([[9, 10]])
    greedy = model.generate(ids, max_new_tokens=12)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), greedy)
    assert torch.equal(model.generate(ids, max_new_tokens=12, temperature=None), greedy)
    assert torch.equal(model.generate(ids, max_new_tokens=12, cuda_graphs=False), greedy)
    torch.manual_seed(0)
    first = model.generate(ids, max_new_tokens=12, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=True), first)
    assert not torch.equal(first, greedy)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_beams": 4}, TypeError, "unknown option 'num_beams'"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "do_sample=True contradicts"),
        ({"do_sample": False, "temperature": 0.5}, ValueError, "do_sample=False contradicts"),
        ({"max_length": 2}, ValueError, "inputs have 2 tokens, max_length is 2"),
        ({"max_length": 9, "max_new_tokens": 3}, ValueError, "max_length"),
        ({"return_dict_in_generate": True}, NotImplementedError, "return_dict_in_generate"),
        ({"input_ids": torch.tensor([[1]])}, ValueError, "either as inputs or as input_ids"),
        ({"attention_mask": torch.tensor([[1, 0]])}, ValueError, r"attention_mask\[0\]"),
        ({"attention_mask": torch.tensor([[1]])}, ValueError, "attention_mask has shape"),
        ({"attention_mask": torch.tensor([[0, 0]])}, ValueError, "prompt 0 is empty"),
        ({"top_p": math.nan}, ValueError, "top_p"),
    ],
)
def test_bad_options_of_generate(
    model: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        model.generate(torch.tensor([[9, 10]]), **options)
    if "input_ids" not in options:
        with pytest.raises(ValueError, match="inputs must be an integer tensor"):
            model.generate(torch.tensor([[9.0]]))
