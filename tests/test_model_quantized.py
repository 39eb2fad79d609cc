"""Models whose GGUF matrices stay quantised, against the same file expanded and transformers."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from minitron_kernels import AutoTokenizer, MinitronForCausalLM, SamplingParams
from minitron_kernels.block_encoders import ENCODERS, encode
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.cpu_graphs import DecodeRecordings
from minitron_kernels.generate import GenerationResult, generate
from minitron_kernels.graphs import DecodeRow
from minitron_kernels.loaders.checkpoint import Weights, open_checkpoint
from minitron_kernels.loaders.gguf_file import GGUFFile
from minitron_kernels.quantized import QuantizedTensor
from minitron_kernels.sampling import SamplingState
from tests.gguf_files import SCALE_OFFSETS, RawGGUF, random_rows, raw_tensor, write_gguf
from tests.test_loaders_gguf import in_file_mapping

Tensor = torch.Tensor

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 3,
    "llama.context_length": 256,
    "llama.embedding_length": 256,
    "llama.feed_forward_length": 512,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e4,
}
VOCAB = 331
MATRICES = {  # rows, columns
    "attn_q": (256, 256),
    "attn_k": (128, 256),
    "attn_v": (128, 256),
    "attn_output": (256, 256),
    "ffn_gate": (512, 256),
    "ffn_up": (512, 256),
    "ffn_down": (256, 512),
}
# Types of the matrices of each layer. All ten occur, three in one QKV, two in one MLP; the third
# layer mixes them with floats, and K's rows are in another order than Q's there.
LAYERS = (
    ("Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q2_K", "Q3_K", "Q5_K"),
    ("Q4_1", "Q5_0", "Q5_1", "F16", "Q4_K", "Q4_K", "Q6_K"),
    ("Q5_K", "F16", "Q2_K", "Q3_K", "Q8_0", "BF16", "F32"),
)
UNIFORM = (("Q4_K",) * 7,) * 3  # but for what the output matrix is


def model_rows(kind: str, rows: int, cols: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Stored rows of weights of standard deviation 0.06 or so."""
    values = 0.06 * rng.standard_normal((rows, cols), np.float32)
    if kind in ENCODERS:
        return encode(values, kind).reshape(rows, -1)
    stored = random_rows(kind, rows, cols, rng)
    if kind in QUANT_TYPES:  # of those that nothing here encodes to: any bits, fitting scales
        block = stored.reshape(-1, QUANT_TYPES[kind].nbytes)
        for offset, scale in zip(SCALE_OFFSETS[kind], SCALES[kind], strict=True):
            block[:, offset : offset + 2] = np.array([scale], np.float16).view(np.uint8)
        return stored
    dtype = {"F32": np.float32, "F16": np.float16}.get(kind)
    if dtype is None:  # BF16
        return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)
    return values.astype(dtype).view(np.uint8)


SCALES = {"Q2_K": (0.005, 0.0075), "Q3_K": (0.0015,)}


def write_model(
    path: Path,
    layers: tuple[tuple[str, ...], ...] = LAYERS,
    embedding: str = "Q6_K",
    output: str | None = "Q5_0",
    matrices: dict[str, tuple[int, int]] = MATRICES,
    metadata: dict[str, Any] = METADATA,
) -> Path:
    """A model of random weights; without ``output`` it is tied."""
    rng = np.random.default_rng(5)
    tensors = {"token_embd.weight": (embedding, model_rows(embedding, VOCAB, 256, rng))}
    if output is not None:
        tensors["output.weight"] = (output, model_rows(output, VOCAB, 256, rng))
    norms = ["output_norm.weight"]
    for i, kinds in enumerate(layers):
        for (name, shape), kind in zip(matrices.items(), kinds, strict=True):
            tensors[f"blk.{i}.{name}.weight"] = (kind, model_rows(kind, *shape, rng))
        norms += [f"blk.{i}.attn_norm.weight", f"blk.{i}.ffn_norm.weight"]
    for name in norms:
        weight = (1 + 0.2 * rng.standard_normal(256)).astype(np.float32)
        tensors[name] = ("F32", weight.view(np.uint8))
    write_gguf(path, tensors, metadata)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mixed") / "m.gguf")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tied") / "m.gguf", UNIFORM, "Q4_K", None)


def load(path: Path, dtype: str = "float32", **options: Any) -> MinitronForCausalLM:
    return MinitronForCausalLM.from_pretrained(path, dtype=dtype, device="cpu", **options)


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)


def dense(weight: Tensor) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight.float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("which", ["mixed", "tied"])
def test_logits_and_greedy_ids_equal_the_expanded_models(
    request: pytest.FixtureRequest, which: str
) -> None:
    path = request.getfixturevalue(which)
    ours, expanded = load(path), load(path, expand=True)
    kinds = {w.quant_type for w in ours.parameters() if isinstance(w, QuantizedTensor)}
    assert kinds == (set(QUANT_TYPES) if which == "mixed" else {"Q4_K"})
    assert not any(isinstance(w, QuantizedTensor) for w in expanded.parameters())
    for length in (1, 7, 33, 129):
        ids = random_ids(2, length)
        error = relative_error(ours.logits(ids), expanded.logits(ids))
        assert error <= 1e-5, f"{length} tokens: relative error {error:.2e}"
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 9, 40)]
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=2)
    compare_greedy(generate(ours, None, prompts, params), generate(expanded, None, prompts, params))


def compare_greedy(actual: list[GenerationResult], expected: list[GenerationResult]) -> None:
    """The ids are the same, and not by luck: the runner-up is further away than the two paths."""
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.logprobs is not None and theirs.logprobs is not None
        assert ours.token_ids == theirs.token_ids
        for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
            (_, best), (_, second) = b["top"]
            distance = max(abs(p - q) for (_, p), (_, q) in zip(a["top"], b["top"], strict=True))
            assert best - second > 2 * distance


def test_a_planted_fault_is_seen(mixed: Path) -> None:
    """One wrong nibble of one matrix, or pairs taken for halves, is more than the tolerance."""
    ours, expected = load(mixed), load(mixed, expand=True).logits(random_ids(1, 33))
    attention = ours.model.layers[0].self_attn
    attention.interleaved = False
    assert relative_error(ours.logits(random_ids(1, 33)), expected) > 1e-3
    attention.interleaved = True
    ours.model.layers[1].mlp.gate_proj.weight.blocks[3, 40] ^= 0xF0
    assert relative_error(ours.logits(random_ids(1, 33)), expected) > 1e-4


def test_bfloat16_is_as_close_as_pytorchs(mixed: Path) -> None:
    """DESIGN's rule: at most twice the error of PyTorch in bfloat16 on the expanded weights."""
    ids = random_ids(2, 64)
    eager, exact = transformers_model(mixed, torch.bfloat16), transformers_model(mixed)
    with torch.no_grad():
        expected, theirs = exact(ids).logits, eager(ids).logits.float()
    actual = load(mixed, "bfloat16").logits(ids)
    unit = 2.0**-8 * expected.abs().max()
    assert (actual - expected).abs().max() <= 2 * (theirs - expected).abs().max() + unit
    rms = lambda t: t.square().mean().sqrt()  # noqa: E731
    assert rms(actual - expected) <= 2 * rms(theirs - expected)


def test_int8_activations(mixed: Path) -> None:
    """Off by a percent or so, in prompts and in steps alike; with the same bits in a batch; off
    again when it is put off."""
    exact, ours = load(mixed, "bfloat16"), load(mixed, "bfloat16", int8_activations=True)
    ids = random_ids(3, 40)
    expected, actual = exact.logits(ids), ours.logits(ids)
    assert 1e-3 < relative_error(actual, expected) < 0.05
    assert torch.equal(ours.logits(ids[:1, :7]), actual[:1, :7])
    prompts = [row.tolist() for row in ids]
    params = SamplingParams(max_new_tokens=12, ignore_eos=True)
    together = generate(ours, None, prompts, params)
    for prompt, result in zip(prompts, together, strict=True):
        (alone,) = generate(ours, None, [prompt], params, cuda_graphs=False)  # no recorded steps
        assert alone.token_ids == result.token_ids
        teacher = ours.logits(torch.tensor([prompt + result.token_ids]))
        assert teacher[0, len(prompt) - 1 : -1].argmax(-1).tolist() == result.token_ids
    ours.set_int8_activations(False)
    assert torch.equal(ours.logits(ids), expected)


def test_recorded_steps_follow_int8_activations(mixed: Path) -> None:
    model = load(mixed, "bfloat16")
    cache = model.new_cache(64)
    recordings = DecodeRecordings(model, cache)
    pages = cache.allocator.allocate(1)
    assert pages is not None
    row = DecodeRow(token_id=5, position=0, pages=pages, state=SamplingState(SamplingParams(), [5]))
    exact = [recordings.run([row]).clone() for _ in range(2)]
    model.set_int8_activations(True)
    rounded = [recordings.run([row]).clone() for _ in range(2)]
    assert torch.equal(*exact) and torch.equal(*rounded)
    assert not torch.equal(exact[0], rounded[0])
    assert torch.equal(rounded[0], model.logits(torch.tensor([[5]]))[0])


def test_int8_activations_need_quantised_weights(mixed: Path) -> None:
    with pytest.raises(ValueError, match="int8_activations is for quantised weights"):
        load(mixed, expand=True, int8_activations=True)


def transformers_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with the weights of our state dict, expanded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = load(path)
    config = ours.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_theta=config.rope_theta,
            tie_word_embeddings=False,
        )
    )
    theirs.load_state_dict({name: dense(weight) for name, weight in ours.state_dict().items()})
    return theirs.to(dtype).eval()


def test_the_state_dict_is_transformers(mixed: Path) -> None:
    """Names and row order: transformers computes the same from it."""
    ids = random_ids(2, 33)
    with torch.no_grad():
        expected = transformers_model(mixed)(ids).logits
    assert relative_error(load(mixed).logits(ids), expected) <= 1e-5


def test_rows_of_q_and_k_stay_where_they_lie(mixed: Path) -> None:
    """Quantised matrices are views of the file: loading copies none, even of Q and K."""
    ours = load(mixed)
    for name, weight in ours.named_parameters():
        if isinstance(weight, QuantizedTensor) and name != "model.layers.2.self_attn.q_proj.weight":
            assert in_file_mapping(weight.blocks, mixed), name
    assert [layer.self_attn.interleaved for layer in ours.model.layers] == [True, True, False]
    weight = ours.model.layers[0].self_attn.q_proj.weight
    saved = ours.state_dict()["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(saved, QuantizedTensor) and saved.quant_type == "Q4_K"
    rows = torch.arange(256).view(4, 32, 2).transpose(1, 2).reshape(-1)
    assert torch.equal(saved, weight[rows]) and not torch.equal(saved, weight)


def through_a_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Tensor] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(mixed: Path, assign: bool) -> None:
    ours = load(mixed)
    ids = random_ids(1, 20)
    logits, state = ours.logits(ids), through_a_file(ours.state_dict())
    for weight in ours.parameters():
        (weight.blocks if isinstance(weight, QuantizedTensor) else weight).zero_()
    assert not ours.logits(ids).any()
    ours.load_state_dict(state, assign=assign)
    assert torch.equal(ours.logits(ids), logits)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, state[name]), name

    fresh = MinitronForCausalLM(ours.config)  # in Hugging Face's order, as nothing says otherwise
    fresh.load_state_dict(state, assign=True)
    fresh.to(torch.float32)
    assert relative_error(fresh.logits(ids), logits) <= 1e-5
    for name, weight in fresh.state_dict().items():
        assert torch.equal(weight, state[name]), name


def test_a_weight_of_another_type_or_shape_is_refused(mixed: Path) -> None:
    ours = load(mixed)
    state = ours.state_dict()
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        w = state[name]
        assert isinstance(w, QuantizedTensor)
        other = QuantizedTensor.empty("Q5_K", w.shape)
        for wrong in (other, w[1:], w[:-32], w.dequantize()):
            with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
                ours.load_state_dict({**state, name: wrong})
    plain = MinitronForCausalLM(ours.config)
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        plain.load_state_dict(state)


def test_deepcopy_and_moves_keep_it_quantised(mixed: Path) -> None:
    ours = load(mixed)
    ids = random_ids(1, 20)
    logits = ours.logits(ids)
    twin = copy.deepcopy(ours)
    assert torch.equal(twin.logits(ids), logits)
    twin.model.layers[0].mlp.down_proj.weight.blocks.zero_()
    assert torch.equal(ours.logits(ids), logits)
    assert torch.equal(ours.to("cpu").logits(ids), logits)
    assert ours.to(torch.bfloat16).dtype == torch.bfloat16
    half = ours.logits(ids)
    assert relative_error(half, logits) < 0.05
    assert isinstance(ours.model.layers[0].mlp.down_proj.weight, QuantizedTensor)
    ours.pack()
    assert torch.equal(ours.logits(ids), half)


def test_a_batch_changes_no_bit(mixed: Path) -> None:
    ours = load(mixed)
    prompts = [random_ids(1, n, seed=n)[0].tolist() for n in (1, 2, 7, 33, 64)]
    params = SamplingParams(max_new_tokens=6, ignore_eos=True, logprobs=2)
    alone = [generate(ours, None, [prompt], params, prefill_chunk=48)[0] for prompt in prompts]
    batch = generate(ours, None, prompts, params, prefill_chunk=48)
    assert [(r.token_ids, r.logprobs) for r in batch] == [(r.token_ids, r.logprobs) for r in alone]


@pytest.mark.parametrize("name", ["token_embd", "blk.1.ffn_up", "blk.0.attn_q"])
def test_scales_that_are_not_finite(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / "m.gguf")
    clean = load(path)
    kind = {"token_embd": "Q6_K", "blk.1.ffn_up": "Q4_K", "blk.0.attn_q": "Q4_K"}[name]
    tensor = GGUFFile(path).tensors[f"{name}.weight"]
    with path.open("r+b") as file:  # the first block of row 5
        file.seek(tensor.offset + 5 * tensor.row_nbytes + SCALE_OFFSETS[kind][0])
        file.write(np.array([np.nan], np.float16).tobytes())
    hf_name = {
        "token_embd": "model.embed_tokens.weight",
        "blk.1.ffn_up": "model.layers.1.mlp.up_proj.weight",
        "blk.0.attn_q": "model.layers.0.self_attn.q_proj.weight",
    }[name]
    for expand in (False, True):
        with pytest.raises(ValueError, match=rf"m\.gguf: tensor '{hf_name}' .*not finite"):
            load(path, expand=expand)
        ours = load(path, expand=expand, allow_nonfinite=True)
        weight = dense(dict(ours.state_dict())[hf_name])
        expected = dense(dict(clean.state_dict())[hf_name])
        found = weight.isnan().sum(1)
        assert found.count_nonzero() == 1 and found.max() == 256
        assert torch.equal(weight[found == 0], expected[found == 0])


def test_what_a_file_kept_quantised_costs(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(mixed)
    kept = Weights(checkpoint, torch.bfloat16)
    ours = load(mixed, "bfloat16")
    assert kept.nbytes() == sum(weight.nbytes for weight in ours.parameters())
    allocated = sum(
        weight.nbytes
        for name, weight in ours.named_parameters()
        if not in_file_mapping(getattr(weight, "blocks", weight), mixed)
    )
    copied = ours.model.layers[2].self_attn.q_proj.weight.nbytes  # K beside it is no block
    assert kept.ram_needed() == allocated - copied
    expanded = Weights(checkpoint, torch.bfloat16, expand=True)
    assert expanded.nbytes() == 2 * checkpoint.config.num_parameters > 2 * kept.nbytes()


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    tensor = raw_tensor("blk.0.ffn_up.weight", [320, 4], 12, 0)
    path = RawGGUF(tensors=[tensor], data=bytes(4 * 144)).write(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match=r"ffn_up.*rows of 320 are not a multiple of Q4_K's 256"):
        load(path)


def test_smollm2(smollm2_gguf: Path) -> None:
    """The real model: Q4_1 matrices, a tied Q8_0 table."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_gguf)
    ours, expanded = load(smollm2_gguf), load(smollm2_gguf, expand=True)
    text = "Complete the paragraph: our solar system is"
    ids = torch.tensor([tokenizer.encode(text)])
    assert relative_error(ours.logits(ids), expanded.logits(ids)) <= 1e-5
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=2)
    run: Callable[[Any], list[GenerationResult]] = lambda m: generate(m, tokenizer, text, params)  # noqa: E731
    compare_greedy(run(ours), run(expanded))
