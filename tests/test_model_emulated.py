"""Whole models on the compiled kernels: on emulated GPUs (emulated_device.py), or on a real one.

The CPU path, which the other tests hold against transformers, is what these compare with; emulated
device memory is poisoned with NaN when it is allocated, so that nothing unwritten is read unseen.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitron_kernels import (
    AutoTokenizer,
    MinitronForCausalLM,
    SamplingParams,
    cuda_ops,
    devices,
    quantized_ops,
)
from minitron_kernels.cli import main
from minitron_kernels.config import ModelConfig
from minitron_kernels.generate import Engine, GenerationResult, generate
from minitron_kernels.graphs import DecodeGraphs, DecodeRow, bucket_of
from minitron_kernels.model import Batch
from minitron_kernels.sampling import SamplingState, sample
from tests import emulator
from tests.cuda_device import launches as calls
from tests.emulated_device import EmulatedGPU, emulated
from tests.test_model_quantized import LAYERS, UNIFORM, write_model
from tests.tiny_checkpoint import write_tiny_checkpoint

Tensor = torch.Tensor
HAS_GPU = torch.cuda.is_available()

SHAPES: dict[str, dict[str, Any]] = {
    "gqa2-hd64": {},
    "gqa4-hd128-window": {"head_dim": 128, "num_key_value_heads": 1, "sliding_window": 16},
    "gqa3-odd-sizes-tied": {
        "kind": "llama",
        "hidden_size": 99,
        "intermediate_size": 101,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


@dataclass
class Place:
    """Where a test runs: the device's name, and the emulated GPU if it is one."""

    name: str
    gpu: EmulatedGPU | None


@contextmanager
def at(place: str) -> Iterator[Place]:
    """``place`` is "gpu", or "emu-" and an architecture."""
    if place == "gpu":
        yield Place("cuda", None)
        return
    with emulated(place.removeprefix("emu-")) as gpu:
        yield Place(gpu.name, gpu)


def places(*archs: str, slow: Sequence[str] = ()) -> Any:
    """Parametrize with the GPU of this machine, or with emulated ones."""
    if HAS_GPU:
        params = [pytest.param("gpu", marks=pytest.mark.gpu)]
    else:
        params = [pytest.param(f"emu-{arch}") for arch in archs]
        params += [pytest.param(f"emu-{arch}", marks=pytest.mark.slow) for arch in slow]
    return pytest.mark.parametrize("place", params)


@pytest.fixture(scope="module")
def checkpoints(make_hf_model: Callable[..., Any]) -> Callable[[str], tuple[Any, Path]]:
    made: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in made:
            made[name] = make_hf_model(**SHAPES[name], dtype=torch.bfloat16)
        return made[name]

    return get


def random_ids(count: int, seed: int = 1, vocab: int = 331) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (count,), generator=generator).tolist()


def check_logits(actual: Tensor, eager: Tensor, expected: Tensor) -> None:
    """DESIGN's rule for a whole model: at most twice the error of another one in bfloat16.

    Elementwise against the largest such error: a logit's own can be 0 by luck. And on average.
    """
    actual, eager, expected = actual.double(), eager.double(), expected.double()
    unit = 2.0**-8 * expected.abs().max()
    assert actual.isfinite().all()
    error = (actual - expected).abs().max()
    limit = 2 * (eager - expected).abs().max() + unit
    assert error <= limit, f"error {error:.3g}, limit {limit:.3g}"
    rms = [(x - expected).square().mean().sqrt() for x in (actual, eager)]
    assert rms[0] <= 2 * rms[1], f"rms error {rms[0]:.3g}, the other's {rms[1]:.3g}"


# --------------------------------------------------------------------------------------- loading


@places("sm_80")
def test_weights_are_packed_layer_by_layer(place: str, checkpoints: Any) -> None:
    """Device memory holds the weights once, and while loading one packed matrix twice."""
    _, folder = checkpoints("gqa2-hd64")
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        layer = model.model.layers[1]
        assert layer.self_attn.q_proj is None and layer.mlp.gate_proj is None
        weights = sum(p.nbytes for p in model.parameters())
        assert weights == 2 * model.config.num_parameters
        if where.gpu is not None:
            largest = max(layer.self_attn.packed_weight.nbytes, layer.mlp.packed_weight.nbytes)
            assert where.gpu.bytes >= weights  # it counts
            assert where.gpu.peak_bytes <= weights + largest


@places("sm_80")
def test_state_dict_of_a_packed_model(place: str, checkpoints: Any) -> None:
    _, folder = checkpoints("gqa4-hd128-window")
    names = dict(MinitronForCausalLM.from_pretrained(folder, device="cpu").state_dict())
    with at(place) as where, torch.no_grad():
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        state = {name: weight.cpu() for name, weight in model.state_dict().items()}
        assert list(state) == list(names)
        assert all(torch.equal(state[name], names[name]) for name in names)
        changed = {name: weight * 2 for name, weight in names.items()}
        assert not model.load_state_dict(changed).missing_keys
        state = {name: weight.cpu() for name, weight in model.state_dict().items()}
        assert all(torch.equal(state[name], changed[name]) for name in names)


# ---------------------------------------------------------------------------------------- logits


@places("sm_80", "sm_90", slow=["sm_89", "sm_100"])
@pytest.mark.parametrize("shape", list(SHAPES))
def test_logits_match_transformers(place: str, shape: str, checkpoints: Any) -> None:
    """Whole prompt, and the same in chunks and single tokens over scattered, poisoned pages."""
    theirs, folder = checkpoints(shape)
    ids = random_ids(45)
    with torch.no_grad():
        eager = theirs(torch.tensor([ids])).logits[0]
        exact = theirs.double()(torch.tensor([ids])).logits[0]
        theirs.bfloat16()
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        whole = model.logits(torch.tensor([ids]))[0].cpu()
        cache = model.new_cache(256)
        parts, start = [], 0
        for count in (1, 9, 8, 17, 1, 1, 8):
            new = ids[start : start + count]
            batch = Batch.build([[11, 3, 7]], [start], [new], cache.page_size, model.device)
            parts.append(model(batch, cache).cpu())
            start += count
        assert start == len(ids)
    check_logits(whole, eager, exact)
    check_logits(torch.cat(parts), eager, exact)


@places("sm_80", "sm_90")
def test_a_planted_fault_is_seen(place: str, checkpoints: Any) -> None:
    """Two features of one head of V exchanged, in one layer of three."""
    theirs, folder = checkpoints("gqa2-hd64")
    ids = random_ids(45)
    with torch.no_grad():
        eager = theirs(torch.tensor([ids])).logits[0]
        exact = theirs.double()(torch.tensor([ids])).logits[0]
        theirs.bfloat16()
    with at(place) as where, torch.no_grad():
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        packed = model.model.layers[1].self_attn.packed_weight
        packed[-2:] = packed[-2:].flip(0)
        logits = model.logits(torch.tensor([ids]))[0].cpu()
    with pytest.raises(AssertionError, match="error"):
        check_logits(logits, eager, exact)


# Shapes of Minitron-8B; the vocabulary and the number of layers are the only small things.
MINITRON_LAYER = ModelConfig(
    vocab_size=256,
    hidden_size=4096,
    intermediate_size=11520,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=1040,
    rope_theta=1e6,
)


@places("sm_80", "sm_90", slow=["sm_89", "sm_100"])
def test_minitron_8b_layer(place: str) -> None:
    """Prefill of 64 tokens, and one token at context 1024, against the CPU path.

    The rule is check_logits's, with the CPU path in float32 for what is exact.
    """
    generator = torch.Generator().manual_seed(0)
    model = MinitronForCausalLM(MINITRON_LAYER).bfloat16()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.copy_(1 + 0.1 * torch.randn(weight.shape, generator=generator))
        else:
            weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)

    prompt = random_ids(64, vocab=256)
    shape = model.new_cache(1024 + 64).k.shape
    prefix = torch.randn(2, *shape, generator=generator).bfloat16()

    def run(model: MinitronForCausalLM) -> Tensor:
        cache = model.new_cache(1024 + 64)
        with torch.inference_mode():
            cache.k.copy_(devices.upload(prefix[0], model.device))
            cache.v.copy_(devices.upload(prefix[1], model.device))
        long, short = list(range(64)), [66, 64, 65, 67]
        prefill = Batch.build([short], [0], [prompt], 16, model.device)
        decode = Batch.build([long], [1023], [[7]], 16, model.device)
        return torch.cat([model(batch, cache).cpu() for batch in (prefill, decode)])

    rounded = run(model)
    exact = run(copy.deepcopy(model).float())
    with at(place) as where:
        model.to(devices.parse(where.name))
        model.pack()
        actual = run(model)
    for tokens in (slice(0, 64), slice(64, 65)):
        check_logits(actual[tokens], rounded[tokens], exact[tokens])


# ------------------------------------------------------------------------------------ generation

MIXED = [
    SamplingParams(max_new_tokens=6, ignore_eos=True),
    SamplingParams(max_new_tokens=3, ignore_eos=True, logprobs=2),
    SamplingParams(max_new_tokens=5, ignore_eos=True, temperature=0.9, top_k=40, seed=5),
    SamplingParams(max_new_tokens=6, ignore_eos=True, temperature=1.0, top_p=0.9, seed=6),
    SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=0.7, repetition_penalty=1.3,
                   frequency_penalty=0.1, logit_bias={5: -3.0}, seed=7, logprobs=0),
]  # fmt: skip
PROMPTS = [random_ids(n, seed=n) for n in (33, 1, 7, 12, 18)]


def told(results: list[GenerationResult]) -> list[Any]:
    return [(r.token_ids, r.logprobs, r.finish_reason) for r in results]


@places("sm_80", "sm_90", slow=["sm_89", "sm_100"])
def test_batches_graphs_and_chunks_change_no_bit(place: str, checkpoints: Any) -> None:
    """Every prompt alone and uncaptured is what all together give, captured or not."""
    _, folder = checkpoints("gqa2-hd64")
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        options = {"prefill_chunk": 16}
        alone = [
            generate(model, None, [p], s, cuda_graphs=False, **options)[0]
            for p, s in zip(PROMPTS, MIXED, strict=True)
        ]
        if where.gpu is not None:
            where.gpu.syncs.clear()
        for graphs in (False, True):
            together = generate(model, None, PROMPTS, MIXED, cuda_graphs=graphs, **options)
            assert told(together) == told(alone)
        if where.gpu is not None:
            assert set(where.gpu.syncs) == {"tolist"}, "only results are waited for"
            assert sum(c.num_replays for c in where.gpu.captures) > 0


@places("sm_80", "sm_89", "sm_90", "sm_100")
def test_a_decode_step_is_five_launches_a_layer(place: str, checkpoints: Any) -> None:
    """In a graph, with one wait for the device: that which reads the tokens."""
    _, folder = checkpoints("gqa2-hd64")
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        engine = Engine(model, None, 256, max_batch_size=3, cuda_graphs=True)
        for i in range(3):
            engine.add(random_ids(4 + i, seed=i), params)
        engine.step()
        for step in range(4):
            if where.gpu is not None:
                where.gpu.syncs.clear()
            assert len(engine.step()) == 3
            if where.gpu is not None:
                assert where.gpu.syncs == ["tolist"], f"step {step}"
        if where.gpu is not None:
            (capture,) = where.gpu.captures
            # and the embedding, the LM head with the last norm, the sampling
            assert capture.num_launches == [5 * model.config.num_hidden_layers + 3]
            assert capture.num_replays == 3


# What a layer of a decode step launches, in this order.
LAYER = ["qkv_rope_append", "attention_decode", "linear", "linear_swiglu", "linear"]
QUANTISED = {"qkv_rope_append": "qkv_rope_append_quant", "linear": "linear_quant",
             "linear_swiglu": "linear_quant_swiglu"}  # fmt: skip
# One kernel serves all dense products, one all quantised ones.
DENSE = ["linear", "attention_decode", "linear", "linear", "linear"]


@places("sm_90")
@pytest.mark.parametrize("rows", [1, 17, pytest.param(32, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize("weights", ["dense", "uniform", "apart"])
def test_pdl_chains_all_launches_of_a_decode_step(
    place: str, weights: str, rows: int, checkpoints: Any, gguf_files: Any
) -> None:
    """Each launch of the graph may start while the one before it still runs (griddepcontrol.wait in
    all of them: test_ptx.py), five a layer."""
    if weights == "dense":
        folder = checkpoints("gqa2-hd64")[1]
    else:
        folder = gguf_files(weights)
    params = SamplingParams(max_new_tokens=3, ignore_eos=True)
    with at(place) as where:
        if where.gpu is None:
            pytest.skip("a GPU keeps no log of launches")
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        engine = Engine(model, None, 64 * rows, max_batch_size=rows, cuda_graphs=True)
        for i in range(rows):
            engine.add(random_ids(2, seed=i), params)
        with calls() as functions:
            for _ in range(3):
                engine.step()
        (launches,) = where.gpu.captures[0].launches
    assert all(launch.is_dependent for launch in launches)
    if weights == "dense":
        layer, last = DENSE, ["linear"]
    else:
        last = ["quant_decode"]
        layer = [*last, "attention_decode", *(3 * last)]
    layers = model.config.num_hidden_layers * layer
    ops = [re.fullmatch(r"mk_([a-z_]+)_sm90_.*", launch.kernel)[1] for launch in launches]
    assert ops[1:] == [*layers, *last, "sample"] and ops[0].startswith("embedding")
    # Which product each of the launches is, the functions tell that made them.
    names = [*(model.config.num_hidden_layers * LAYER), "linear"]
    if weights != "dense":
        names = [QUANTISED.get(name, name) for name in names]
    step = [*names, "sample"]
    assert functions[-len(step) :] == step


@places(slow=["sm_80", "sm_89"])
@given(data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_batch_changes_no_bit(place: str, checkpoints: Any, data: st.DataObject) -> None:
    """Random prompts, chunks, pages, batch sizes, orders of warps: as alone and uncaptured."""
    _, folder = checkpoints(data.draw(st.sampled_from(list(SHAPES))))
    lengths = data.draw(st.lists(st.integers(1, 70), min_size=1, max_size=12))
    prompts = [random_ids(n, seed=i) for i, n in enumerate(lengths)]
    params = [
        SamplingParams(max_new_tokens=data.draw(st.integers(1, 6)), ignore_eos=True,
                       temperature=data.draw(st.sampled_from([0.0, 1.0])), seed=i, logprobs=0)
        for i in range(len(prompts))
    ]  # fmt: skip
    options = {
        "prefill_chunk": data.draw(st.sampled_from([1, 7, 8, 9, 32, 512])),
        "page_size": data.draw(st.sampled_from([16, 32, 64, 128])),
    }
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        emulator.set_seed(data.draw(st.integers(0, 1000)))
        size = data.draw(st.integers(1, 20))
        together = generate(
            model, None, prompts, params, max_batch_size=size, cuda_graphs=True, **options
        )
        emulator.set_seed(0)
        for i in data.draw(st.sets(st.sampled_from(range(len(prompts))), min_size=1, max_size=3)):
            alone = generate(model, None, [prompts[i]], params[i], cuda_graphs=False, **options)
            assert told(alone) == told(together[i : i + 1])


@places("sm_80", "sm_90")
@pytest.mark.parametrize("shape", ["gqa3-odd-sizes-tied"])
@pytest.mark.parametrize("rows, per_layer, others", [(17, 5, 3), (65, 7, 4)])
def test_many_rows(
    place: str, shape: str, rows: int, per_layer: int, others: int, checkpoints: Any
) -> None:
    """Other kernels from 17 rows on, launches for the norms from 65 on; no bit changes."""
    _, folder = checkpoints(shape)
    prompts = [random_ids(1 + i % 4, seed=i) for i in range(rows)]
    params = [
        SamplingParams(max_new_tokens=4, ignore_eos=True, temperature=i % 2, seed=i)
        for i in range(rows)
    ]
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        together = generate(model, None, prompts, params, max_batch_size=72, cuda_graphs=True)
        if where.gpu is not None:
            launches = per_layer * model.config.num_hidden_layers + others
            assert where.gpu.captures[0].num_launches == [launches]
        for i in (0, 3, 16):
            alone = generate(model, None, [prompts[i]], params[i], cuda_graphs=False)
            assert told(alone) == told(together[i : i + 1])


@places("sm_80")
def test_logits_that_are_not_finite_are_an_error(place: str, checkpoints: Any) -> None:
    _, folder = checkpoints("gqa2-hd64")
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        engine = Engine(model, None, 64, cuda_graphs=True)
        engine.add(PROMPTS[2], SamplingParams(max_new_tokens=9, ignore_eos=True))
        for _ in range(4):
            engine.step()
        model.model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match=r"logits\[0\]: holds NaN"):
            engine.step()


@places("sm_80")
def test_replays_follow_their_buffers(place: str, checkpoints: Any) -> None:
    """A captured step, replayed for other rows, gives the bits of the step that is not captured.

    Positions, pages, the number of rows and how they are sampled change between the replays.
    """
    _, folder = checkpoints("gqa4-hd128-window")
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        tables = {"a": [3, 9], "b": [0, 5], "c": [7, 1], "d": [2, 4]}
        lengths = {"a": 20, "b": 3, "c": 17, "d": 11}

        def fill() -> Any:
            cache = model.new_cache(160)
            for name, pages in tables.items():
                ids = random_ids(lengths[name], seed=ord(name))
                model(Batch.build([pages], [0], [ids], 16, model.device), cache)
            return cache

        def rows(names: str, seed: int) -> list[Any]:
            params = SamplingParams(temperature=0.8 if seed % 2 else 0.0, seed=seed)
            return [
                DecodeRow(5 + seed, lengths[n], tables[n], SamplingState(params, [1]))
                for n in names
            ]

        captured, plain = (DecodeGraphs(model, fill(), 4) for _ in range(2))
        plain._can_capture = False
        for seed, names in enumerate(["abcd", "dcba", "bca", "cab", "abcd", "ad", "b", "db"]):
            ours, theirs = (g.run(rows(names, seed)) for g in (captured, plain))
            assert [t.tolist() for t in ours] == [t.tolist() for t in theirs]
        if where.gpu is not None:
            assert [c.num_replays for c in where.gpu.captures] == [5, 0]  # of sizes 4 and 2


@places("sm_80")
def test_sampling_in_a_graph_is_the_cpu_samplers(
    place: str, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = checkpoints("gqa2-hd64")
    seen: list[tuple[list[int], Tensor, list[SamplingState]]] = []
    plain = DecodeGraphs.run

    def record(self: DecodeGraphs, rows: Any) -> Any:
        tokens, logits = plain(self, rows)
        states = []
        for row in rows:
            state = SamplingState(row.state.params, [])
            state.step = row.state.step
            states.append(state)
        seen.append((tokens.tolist(), logits.cpu(), states))
        return tokens, logits

    monkeypatch.setattr(DecodeGraphs, "run", record)
    params = [
        SamplingParams(max_new_tokens=8, ignore_eos=True, temperature=t, top_k=k, top_p=p, seed=i)
        for i, (t, k, p) in enumerate([(0.0, 0, 1.0), (1.0, 0, 1.0), (1.5, 20, 1.0), (1.2, 0, 0.7)])
    ]
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        generate(model, None, PROMPTS[:4], params, cuda_graphs=True)
    assert len(seen) == 7
    for tokens, logits, states in seen:
        assert [s.token_id for s in sample(logits, states)] == tokens


@places("sm_80")
def test_a_step_that_cannot_be_captured_runs_uncaptured(
    place: str,
    checkpoints: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, folder = checkpoints("gqa2-hd64")
    params = SamplingParams(max_new_tokens=6, ignore_eos=True)
    plain = cuda_ops.sample

    def waits(logits: Tensor, sampling: Tensor) -> Tensor:
        logits[0, 0].item()
        return plain(logits, sampling)

    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(folder, device=where.name)
        expected = generate(model, None, [PROMPTS[2]], params)
        monkeypatch.setattr(cuda_ops, "sample", waits)
        got = generate(model, None, [PROMPTS[2]], params, cuda_graphs=True)
    assert told(got) == told(expected)
    assert caplog.text.count("a step cannot be captured") == 1


@places("sm_80", slow=["sm_89", "sm_90"])
def test_smollm2_greedy_tokens_equal_the_cpus(place: str, smollm2_gguf: Path) -> None:
    """32 tokens of prompt and 8 greedy ones, bfloat16.

    Greedy ids can be compared because at every step the runner-up is further from the winner than
    the two paths' logits are from each other, twice; this is asserted.
    """
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf)
    prompt = tokenizer.encode("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,")[-32:]
    assert len(prompt) == 32
    params = SamplingParams(max_new_tokens=8, ignore_eos=True, logprobs=5)

    def run(device: str) -> GenerationResult:
        model = MinitronForCausalLM.from_pretrained(smollm2_gguf, dtype="bfloat16", device=device)
        return generate(model, None, [prompt], params)[0]

    expected = run("cpu")
    with at(place) as where:
        actual = run(where.name)
    check_greedy(expected, actual)


def check_greedy(expected: GenerationResult, actual: GenerationResult) -> None:
    assert expected.logprobs is not None and actual.logprobs is not None
    for theirs, ours in zip(expected.logprobs, actual.logprobs, strict=True):
        (_, best), (_, second) = theirs["top"][:2]
        found = dict(map(tuple, ours["top"]))
        distance = max(abs(found[token] - value) for token, value in theirs["top"][:2])
        assert best - second > 2 * distance, f"lead {best - second:.3f}, paths {distance:.3f} apart"
    assert actual.token_ids == expected.token_ids


# ----------------------------------------------------------------------------- quantised weights


@pytest.fixture(scope="module")
def gguf_files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """ "mixed": all ten types and floats, three types in a QKV; "uniform": Q4_K, tied.

    "typed" is mixed less the floats beside a quantised gate, which need a torch.cat; in each layer
    of "apart" Q, K and V, and gate and up, are of different types.
    """
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            path = tmp_path_factory.mktemp(name) / "m.gguf"
            typed = (*LAYERS[:2], (*LAYERS[2][:5], "Q5_1", "F32"))
            options = {
                "mixed": (LAYERS,),
                "typed": (typed,),
                "apart": ((LAYERS[0],) * 3,),
                "uniform": (UNIFORM, "Q4_K", None),
            }[name]
            made[name] = write_model(path, *options)
        return made[name]

    return get


@places("sm_80")
def test_quantised_weights_are_packed_on_the_host(place: str, gguf_files: Any) -> None:
    """The device never holds more than the packed weights; the state dict has the file's blocks."""
    path = gguf_files("mixed")
    on_cpu = MinitronForCausalLM.from_pretrained(path, device="cpu")
    expected = dict(on_cpu.state_dict())
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(path, device=where.name)
        weights = sum(p.nbytes for p in model.parameters())
        assert weights <= 1.03 * sum(p.nbytes for p in on_cpu.parameters())
        if where.gpu is not None:
            assert weights <= where.gpu.peak_bytes <= weights + (1 << 16)
        layer = model.model.layers[1]  # gate and up of one type; those of layer 0 differ
        assert layer.mlp.gate_proj is None and layer.self_attn.q_proj is not None
        state = {name: weight.cpu() for name, weight in model.state_dict().items()}
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        for weight in model.parameters():
            getattr(weight, "tiles", weight).zero_()
        model.load_state_dict(expected)
        state = {name: weight.cpu() for name, weight in model.state_dict().items()}
        assert all(torch.equal(state[name], expected[name]) for name in expected)


@places("sm_80", "sm_90", slow=["sm_89", "sm_100"])
@pytest.mark.parametrize("file", ["mixed", "uniform"])
def test_logits_of_quantised_weights(place: str, file: str, gguf_files: Any) -> None:
    """Whole prompt, and in chunks and single tokens, against the file expanded to float32."""
    path, ids = gguf_files(file), random_ids(45)
    exact = MinitronForCausalLM.from_pretrained(path, dtype="float32", device="cpu", expand=True)
    expected = exact.logits(torch.tensor([ids]))[0]
    eager = exact.bfloat16().logits(torch.tensor([ids]))[0]
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(path, device=where.name)
        whole = model.logits(torch.tensor([ids]))[0].cpu()
        cache = model.new_cache(256)
        parts, start = [], 0
        for count in (1, 9, 8, 17, 1, 1, 8):
            new = ids[start : start + count]
            batch = Batch.build([[11, 3, 7]], [start], [new], cache.page_size, model.device)
            parts.append(model(batch, cache).cpu())
            start += count
    check_logits(whole, eager, expected)
    check_logits(torch.cat(parts), eager, expected)


@places("sm_80", slow=["sm_89", "sm_90", "sm_100"])
def test_quantised_batches_graphs_and_chunks_change_no_bit(place: str, gguf_files: Any) -> None:
    path = gguf_files("typed")
    prompts = [random_ids(n, seed=n) for n in (1, 7, 33)]
    params = SamplingParams(max_new_tokens=5, ignore_eos=True, logprobs=2)
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(path, device=where.name)
        options: dict[str, Any] = {"prefill_chunk": 16}
        alone = [
            generate(model, None, [p], params, cuda_graphs=False, **options)[0] for p in prompts
        ]
        batch = generate(model, None, prompts, params, cuda_graphs=True, **options)
    assert told(batch) == told(alone)


@places("sm_80", slow=["sm_89", "sm_90", "sm_100"])
def test_greedy_tokens_of_quantised_weights_equal_the_cpus(place: str, gguf_files: Any) -> None:
    """Compared as in test_smollm2_greedy_tokens_equal_the_cpus. 25 rows at first, then 2."""
    path = gguf_files("typed")
    prompts = [random_ids(5, seed=45), random_ids(20, seed=8)]  # whose tokens have clear leads
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=5)
    on_cpu = MinitronForCausalLM.from_pretrained(path, device="cpu")
    expected = generate(on_cpu, None, prompts, params)
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(path, device=where.name)
        actual = generate(model, None, prompts, params)
    for theirs, ours in zip(expected, actual, strict=True):
        check_greedy(theirs, ours)


@places("sm_80")
@pytest.mark.parametrize("file", ["uniform", "apart"])
def test_launches_of_a_decode_step_with_quantised_weights(
    place: str, file: str, gguf_files: Any
) -> None:
    """As many as with dense ones, of whatever types the matrices are."""
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    with at(place) as where:
        model = MinitronForCausalLM.from_pretrained(gguf_files(file), device=where.name)
        engine = Engine(model, None, 256, max_batch_size=3, cuda_graphs=True)
        for i in range(3):
            engine.add(random_ids(4 + i, seed=i), params)
        for _ in range(4):
            assert len(engine.step()) == 3
        if where.gpu is not None:
            (capture,) = where.gpu.captures
            assert capture.num_launches == [5 * model.config.num_hidden_layers + 3]


@places("sm_80")
def test_blocks_moved_by_hand(
    place: str, gguf_files: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """They are packed at first use, which is told once; pack() has the same bits."""
    path, ids = gguf_files("mixed"), torch.tensor([random_ids(9)])
    model = MinitronForCausalLM.from_pretrained(path, device="cpu")
    with at(place) as where:
        packed = MinitronForCausalLM.from_pretrained(path, device=where.name)
        model.to(packed.device)
        quantized_ops._log_packing.cache_clear()
        expected = packed.logits(ids).cpu()
        assert not caplog.records
        # Q and K of a layer, and dense weights, are packed in other orders: other roundings.
        assert (model.logits(ids).cpu() - expected).abs().max() <= 0.02 * expected.abs().max()
        assert caplog.text.count("packed at first use") == 1
        model.pack()
        assert torch.equal(model.logits(ids).cpu(), expected)


# ---------------------------------------------------------------------------------- command line


@places("sm_80")
@pytest.mark.parametrize("graphs", ["--cuda-graphs", "--no-cuda-graphs"])
def test_command_line(
    place: str, graphs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_checkpoint(tmp_path)
    words = ["generate", "hello", "--model", str(tmp_path), "--max-new-tokens", "5", "--ignore-eos"]
    words += ["--dtype", "bfloat16", "--json"]
    with at(place) as where:
        assert main([*words, "--device", where.name, graphs]) == 0
        if where.gpu is not None:
            assert bool(where.gpu.captures) == (graphs == "--cuda-graphs")
    ours = json.loads(capsys.readouterr().out)
    assert len(ours["token_ids"]) == 5


def test_emulated_devices_are_for_tests_only(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"device 'emulated:sm_80' .*accepted: auto, cpu, cuda"):
        MinitronForCausalLM.from_pretrained(tmp_path, device="emulated:sm_80")
    if not HAS_GPU:
        with emulated("sm_80"), pytest.raises(ValueError, match="emulated now: emulated:sm_80"):
            MinitronForCausalLM.from_pretrained(tmp_path, device="emulated:sm_89")


# ------------------------------------------------------------------------------- without a device


def test_graphs_where_there_are_none(checkpoints: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, folder = checkpoints("gqa2-hd64")
    model = MinitronForCausalLM.from_pretrained(folder, device="cpu")
    with caplog.at_level(logging.WARNING):
        Engine(model, None, 64)
        assert not caplog.text
        Engine(model, None, 64, cuda_graphs=True)
    assert "without CUDA graphs: the model is on cpu" in caplog.text


def test_sizes_of_batches() -> None:
    assert [bucket_of(n, 64) for n in (1, 2, 3, 5, 8, 9, 16, 17, 63, 64)] == [
        1, 2, 4, 8, 8, 16, 16, 24, 64, 64,
    ]  # fmt: skip
    assert [bucket_of(n, 5) for n in (3, 5)] == [4, 5]
