"""The model against transformers, on small random Mistral and Llama models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_kernels import MinitronForCausalLM, SamplingParams
from minitron_kernels.generate import generate
from minitron_kernels.model import Batch

SHAPES: dict[str, dict[str, Any]] = {
    "mistral-gqa2-hd64": {"kind": "mistral"},
    "mistral-gqa4-hd128": {
        "kind": "mistral",
        "head_dim": 128,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "mistral-window": {"kind": "mistral", "sliding_window": 16},
    "llama-mha-tied": {"kind": "llama", "num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama-gqa3-odd-sizes": {
        "kind": "llama",
        "hidden_size": 99,
        "intermediate_size": 101,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "llama-llama3-rope": {
        "kind": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "llama-linear-rope": {
        "kind": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
}


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request: pytest.FixtureRequest, make_hf_model: Callable[..., Any]) -> tuple[Any, Path]:
    return make_hf_model(**SHAPES[request.param])


def random_ids(batch: int, length: int, vocab: int = 331, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 7, 33, 129])
def test_logits_match_transformers_in_fp32(pair: tuple[Any, Path], length: int) -> None:
    theirs, folder = pair
    ours = MinitronForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    ids = random_ids(2, length)
    with torch.no_grad():
        expected = theirs(ids).logits
    error = (ours.logits(ids) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


def test_logits_match_transformers_in_bf16(pair: tuple[Any, Path]) -> None:
    """DESIGN's tolerance rule: at most twice the error of the same model run by PyTorch in bf16."""
    theirs, folder = pair
    ours = MinitronForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    ids = random_ids(2, 100)
    with torch.no_grad():
        rounded = copy.deepcopy(theirs).to(torch.bfloat16)
        actual, eager = ours.logits(ids).double(), rounded(ids).logits.double()
        expected = rounded.double()(ids).logits  # exact arithmetic on the rounded weights
    unit = 2.0**-8 * expected.abs().max()
    limit = 2 * (eager - expected).abs().max() + unit
    assert (actual - expected).abs().max() <= limit
    rms = lambda t: t.square().mean().sqrt()  # noqa: E731
    assert rms(actual - expected) <= 2 * rms(eager - expected)


def test_greedy_tokens_equal_transformers(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    ours = MinitronForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    for length in (1, 9, 40):
        ids = random_ids(1, length, seed=length)
        with torch.no_grad():
            expected = theirs.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=2)
        assert torch.equal(ours.generate(ids, max_new_tokens=24), expected)


def test_left_padded_batch_equals_transformers(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    ours = MinitronForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    ids = random_ids(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    mask[2, :5] = 0
    ids[mask == 0] = 0
    with torch.no_grad():
        expected = theirs.generate(
            ids, attention_mask=mask, max_length=40, do_sample=False, pad_token_id=0
        )
    actual = ours.generate(ids, attention_mask=mask, max_length=40, pad_token_id=0)
    assert torch.equal(actual, expected)


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [random_ids(1, n, seed=n)[0].tolist() for n in lengths]


def test_ragged_batch_equals_one_by_one_bitwise(pair: tuple[Any, Path]) -> None:
    """In fp32 a prompt's tokens and logprobs do not depend on what else is in the batch."""
    ours = MinitronForCausalLM.from_pretrained(pair[1], dtype="float32", device="cpu")
    prompts = prompts_of([1, 2, 7, 33, 64, 129])
    params = [
        SamplingParams(max_new_tokens=n, logprobs=2, temperature=t, seed=5)
        for n, t in zip([9, 3, 12, 1, 6, 7], [0, 1, 0, 0.7, 0, 1], strict=True)
    ]
    options = {"prefill_chunk": 48}
    alone = [
        generate(ours, None, [p], s, **options)[0] for p, s in zip(prompts, params, strict=True)
    ]
    for batch_size in (2, 64):
        together = generate(ours, None, prompts, params, max_batch_size=batch_size, **options)
        for a, b in zip(alone, together, strict=True):
            assert a.token_ids == b.token_ids
            assert a.logprobs == b.logprobs


def test_chunked_prefill_and_decode_equal_whole_prefill(pair: tuple[Any, Path]) -> None:
    """Logits of a sequence fed in pieces, over scattered pages, are those of one pass."""
    ours = MinitronForCausalLM.from_pretrained(pair[1], dtype="float32", device="cpu")
    ids = random_ids(1, 100)[0]
    whole = ours.logits(ids[None])[0]
    cache = ours.new_cache(256)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    pages = [11, 3, 4, 9, 0, 15, 7]
    parts, start = [], 0
    for count in (1, 37, 16, 1, 1, 40, 4):
        part = ids[start : start + count].tolist()
        parts.append(ours(Batch.build([pages], [start], [part], cache.page_size, "cpu"), cache))
        start += count
    error = (torch.cat(parts) - whole).abs().max() / whole.abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


def test_state_dict_has_transformers_names(pair: tuple[Any, Path]) -> None:
    theirs, folder = pair
    ours = MinitronForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    expected = {n: w for n, w in theirs.state_dict().items() if n in ours.state_dict()}
    missing = set(theirs.state_dict()) - set(expected)
    assert missing <= {"lm_head.weight"}
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_packed_model_computes_and_saves_as_before(pair: tuple[Any, Path]) -> None:
    """pack() changes no bit of the logits, and neither names nor values of the state dict."""
    ours = MinitronForCausalLM.from_pretrained(pair[1], dtype="float32", device="cpu")
    ids = random_ids(2, 40)
    logits, state = ours.logits(ids), copy.deepcopy(ours.state_dict())
    ours.pack()
    assert ours.model.layers[0].mlp.up_proj is None
    assert torch.equal(ours.logits(ids), logits)
    assert list(ours.state_dict()) == list(state)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, state[name]), name


@pytest.mark.parametrize("assign", [False, True])
def test_packed_model_loads_a_state_dict(pair: tuple[Any, Path], assign: bool) -> None:
    _, folder = pair
    ours = MinitronForCausalLM.from_pretrained(folder, dtype="float32", device="cpu")
    ids = random_ids(1, 20)
    logits, state = ours.logits(ids), copy.deepcopy(ours.state_dict())
    ours.pack()
    for weight in ours.parameters():
        weight.zero_()
    assert not ours.logits(ids).any()
    ours.load_state_dict(state, assign=assign)
    assert torch.equal(ours.logits(ids), logits)

    absent = "model.layers.1.self_attn.k_proj.weight"
    wrong = "model.layers.0.mlp.up_proj.weight"
    found = ours.load_state_dict({n: w for n, w in state.items() if n != absent}, strict=False)
    assert found.missing_keys == [absent] and not found.unexpected_keys
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp.* must both be"):
        ours.load_state_dict({**state, wrong: state[wrong][1:]})


def test_weights_in_their_stored_dtype_are_mapped_not_copied(
    make_hf_model: Callable[..., Any],
) -> None:
    _, folder = make_hf_model(dtype=torch.bfloat16, hidden_size=512, intermediate_size=2048)
    ours = MinitronForCausalLM.from_pretrained(folder, device="cpu")
    assert ours.dtype == torch.bfloat16
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            first, last = (int(x, 16) for x in line.split()[0].split("-"))
            mapped.append(range(first, last))
    weight = ours.model.layers[0].mlp.gate_proj.weight
    assert any(weight.data_ptr() in r for r in mapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"hidden_size": 128}, "has shape"),
        ({"num_attention_heads": 3}, "multiple of num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"head_dim": "64"}, "head_dim"),
    ],
)
def test_config_that_does_not_fit_is_refused(
    make_hf_model: Callable[..., Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    _, folder = make_hf_model()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, NotImplementedError), match=message) as caught:
        MinitronForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"device": "cpu", "device_map": "cuda"}, "contradict"),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "contradict"),
    ],
)
def test_bad_arguments_are_named(
    make_hf_model: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    _, folder = make_hf_model()
    with pytest.raises(ValueError, match=message):
        MinitronForCausalLM.from_pretrained(folder, **options)
