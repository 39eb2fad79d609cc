"""`minitron quantize`: the encoders, the mixes, the file it writes, and what it refuses."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minitron_kernels import MinitronForCausalLM, block_encoders, quantize
from minitron_kernels.block_encoders import ENCODERS, encode
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.cli import main
from minitron_kernels.config import ModelConfig
from minitron_kernels.loaders.checkpoint import open_checkpoint
from minitron_kernels.loaders.gguf_file import GGUFFile
from minitron_kernels.loaders.tokenizer import Tokenizer
from minitron_kernels.quantize import MIXES, mix_type, storable_type
from tests.gguf_files import TINY_METADATA, random_rows, tiny_tensors, write_gguf
from tests.tiny_checkpoint import write_tiny_checkpoint

SIMPLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_TYPES = ("Q4_K", "Q5_K", "Q6_K")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

Array = npt.NDArray[Any]


def decoded(stored: Array, kind: str) -> Array:
    return quants.dequantize(stored, GGMLQuantizationType[kind])


# ---- encoders ----

DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: 0.02 * rng.standard_normal(n),
    "outliers": lambda rng, n: rng.standard_normal(n) * np.where(rng.random(n) < 0.01, 10, 1),
    "uniform": lambda rng, n: rng.random(n),
    "negative": lambda rng, n: -1 - rng.random(n),
    "long tails": lambda rng, n: rng.standard_t(4, n),
    "few values": lambda rng, n: rng.integers(-3, 4, n) * 0.25,  # ties of +max and -max
    "zeros": lambda rng, n: np.where(rng.random(n) < 0.9, -0.0, rng.standard_normal(n)),
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "tiny": lambda rng, n: 1e-9 * rng.standard_normal(n),
    "large": lambda rng, n: rng.uniform(-60000, 60000, n),
    "scattered": lambda rng, n: rng.standard_normal(n) * 10.0 ** rng.integers(-20, 4, n),
}


@settings(max_examples=120, deadline=None)
@given(
    kind=st.sampled_from(SIMPLE),
    distribution=st.sampled_from(list(DISTRIBUTIONS)),
    rows=st.sampled_from((0, 1, 7, 33)),
    blocks=st.integers(1, 9),
    bfloat16=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_encode_simple_types_gives_ggufs_bits(
    kind: str, distribution: str, rows: int, blocks: int, bfloat16: bool, seed: int
) -> None:
    x = DISTRIBUTIONS[distribution](np.random.default_rng(seed), rows * blocks * 32)
    x = x.astype(np.float32).reshape(rows, blocks * 32)
    if bfloat16:  # as weights are: ties are common
        x = torch.from_numpy(x).bfloat16().float().numpy()
    before = x.copy()
    got = encode(x, kind)
    assert got.shape == (rows, blocks * QUANT_TYPES[kind].nbytes)
    assert (x == before).all()
    if rows:
        assert (got == quants.quantize(x, GGMLQuantizationType[kind])).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_encode_gives_the_same_bits_whatever_is_beside(kind: str) -> None:
    """Chunks of encoding (65536 weights) leave no seam, and rows do not see each other."""
    rng = np.random.default_rng(3)
    x = DISTRIBUTIONS["long tails"](rng, 300 * 512).astype(np.float32).reshape(300, 512)
    whole = encode(x, kind)
    for row in (0, 127, 128, 299):
        assert (encode(x[row : row + 1], kind) == whole[row]).all()
    assert (encode(np.asfortranarray(x), kind) == whole).all()


@pytest.mark.parametrize("distribution", ["normal", "outliers", "uniform", "long tails"])
@pytest.mark.parametrize(
    "kind, factor, fit_factor", [("Q4_K", 1.12, 1.1), ("Q5_K", 1.12, 1.05), ("Q6_K", 1.4, 1.13)]
)
def test_k_types_err_little_more_than_an_exhaustive_search(
    kind: str, factor: float, fit_factor: float, distribution: str
) -> None:
    """Weighted rms error against the best real-valued scales and minima of every group.

    No block can hold those: rounding them to 6 and 8 bits accounts for the larger factor (most in
    Q6_K, where a scale's half unit moves the largest numbers by a third of a step). The search
    alone, before that, is held to the smaller one.
    """
    x = DISTRIBUTIONS[distribution](np.random.default_rng(1), 256 * 8).astype(np.float32)
    group = 16 if kind == "Q6_K" else 32
    groups = x.reshape(-1, group).astype(np.float64)
    if kind == "Q6_K":
        weights = groups**2
        best = [exhaustive_symmetric(g, w) for g, w in zip(groups, weights, strict=True)]
        scales = block_encoders._fit_symmetric(columns(x, group), 32)
        lows = np.zeros_like(scales)
        bounds = (-32, 31)
    else:
        nmax = {"Q4_K": 15, "Q5_K": 31}[kind]
        weights = np.abs(groups) + np.sqrt((groups**2).mean(1, keepdims=True))
        best = [exhaustive_affine(g, w, nmax) for g, w in zip(groups, weights, strict=True)]
        scales, lows = block_encoders._fit_affine(columns(x, group), nmax)
        bounds = (0, nmax)
    s, m = (values.T.reshape(-1, 1).astype(np.float64) for values in (scales, lows))
    fitted = s * np.clip(np.rint((groups + m) / s), *bounds) - m
    stored = decoded(encode(x[None], kind), kind).reshape(groups.shape)
    for got, limit in ((fitted, fit_factor), (stored, factor)):
        ratio = np.sqrt((weights * (got - groups) ** 2).sum() / sum(best))
        assert 0.98 < ratio < limit


def columns(x: Array, group: int) -> Array:
    return np.ascontiguousarray(x.reshape(-1, 256 // group, group).transpose(2, 1, 0))


def exhaustive_affine(x: Array, w: Array, nmax: int) -> float:
    """Least weighted squares over a grid of 40 minima x 80 scales, each fitted by least squares."""
    low = min(x.min(), 0)
    lows = np.linspace(1.25 * low, 0, 40)[:, None, None]
    scales = ((x.max() - low) / nmax * np.linspace(0.6, 1.15, 80))[None, :, None]
    q = np.clip(np.rint((x - lows) / scales), 0, nmax)
    n, sx, sq, sqq, sxq = (a.sum(-1) for a in (w, w * x, w * q, w * q * q, w * q * x))
    with np.errstate(all="ignore"):
        s = (n * sxq - sx * sq) / (n * sqq - sq * sq)
        m = (sqq * sx - sq * sxq) / (n * sqq - sq * sq)
        s, m = np.where(m > 0, sxq / sqq, s), np.minimum(m, 0)
    return float(np.nanmin((w * (s[..., None] * q + m[..., None] - x) ** 2).sum(-1)))


def exhaustive_symmetric(x: Array, w: Array) -> float:
    scales = np.abs(x).max() / 32 * np.linspace(0.55, 1.25, 2000)[:, None]
    q = np.clip(np.rint(x / np.concatenate([scales, -scales])), -32, 31)
    s = (w * q * x).sum(-1, keepdims=True) / (w * q * q).sum(-1, keepdims=True)
    return float((w * (s * q - x) ** 2).sum(-1).min())


# rms error / rms weight of ggml's quantize_row_*_ref (llama.cpp of autumn 2026) on 2 M weights.
GGML_ERRORS = {
    ("Q4_K", "normal"): 0.07135,
    ("Q4_K", "outliers"): 0.09290,
    ("Q4_K", "long tails"): 0.08663,
    ("Q5_K", "normal"): 0.03613,
    ("Q5_K", "outliers"): 0.04663,
    ("Q5_K", "long tails"): 0.04384,
    ("Q6_K", "normal"): 0.01775,
    ("Q6_K", "outliers"): 0.02730,
    ("Q6_K", "long tails"): 0.02286,
}


@pytest.mark.parametrize("kind, distribution", GGML_ERRORS)
def test_k_types_err_as_ggmls_encoders_do(kind: str, distribution: str) -> None:
    x = DISTRIBUTIONS[distribution](np.random.default_rng(0), 1 << 19).astype(np.float32)
    error = decoded(encode(x.reshape(-1, 1024), kind), kind).ravel() - x
    ratio = np.sqrt((error**2).mean()) / np.sqrt((x**2).mean()) / GGML_ERRORS[kind, distribution]
    assert 0.95 < ratio < 1.01


@pytest.mark.parametrize("kind", ENCODERS)
def test_errors_are_below_the_bound_of_ggmls_own_test(kind: str) -> None:
    """tests/test-quantize-fns.cpp: sqrt(sum of squared errors) / n on a cosine, at most 0.002."""
    n = 32 * 128
    x = (0.1 + 2 * np.cos(np.arange(n, dtype=np.float32))).astype(np.float32)
    stored = encode(x[None], kind)
    assert np.sqrt(((decoded(stored, kind) - x) ** 2).sum()) / n < 0.002
    stored[:, 20::2] ^= 0x11  # a lowest bit wrong here and there, and the test would say so
    if kind != "Q8_0":  # whose lowest bit is worth less than the bound
        assert not np.sqrt(((decoded(stored, kind) - x) ** 2).sum()) / n < 0.002


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(K_TYPES),
    distribution=st.sampled_from(list(DISTRIBUTIONS)),
    rows=st.sampled_from((0, 1, 7)),
    blocks=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_k_types_of_any_weights_are_finite_and_near(
    kind: str, distribution: str, rows: int, blocks: int, seed: int
) -> None:
    x = DISTRIBUTIONS[distribution](np.random.default_rng(seed), rows * blocks * 256)
    x = x.astype(np.float32).reshape(rows, blocks * 256)
    stored = encode(x, kind)
    assert stored.shape == (rows, blocks * QUANT_TYPES[kind].nbytes)
    if rows:
        got = decoded(stored, kind).reshape(-1, 256)
        bound = {"Q4_K": 0.12, "Q5_K": 0.06, "Q6_K": 0.04}[kind] * np.abs(x).reshape(-1, 256).max(1)
        smallest = 2.0**-14 * 32  # scales below the least normal half lose their digits
        assert (np.abs(got - x.reshape(-1, 256)) <= np.maximum(bound, smallest)[:, None]).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_zeros_stay_zeros(kind: str) -> None:
    assert not decoded(encode(np.zeros((3, 512), np.float32), kind), kind).any()


@pytest.mark.parametrize("kind", ENCODERS)
def test_weights_below_half_precision_become_zero_not_nan(kind: str) -> None:
    x = np.full((1, 256), 1e-40, np.float32)
    x[0, ::3] = -1e-39
    assert (np.abs(decoded(encode(x, kind), kind)) < 1e-7).all()


def test_encode_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="type: got 'Q3_K', accepted: Q4_0, Q4_1"):
        encode(np.zeros((1, 256), np.float32), "Q3_K")
    with pytest.raises(ValueError, match="rows of 288 are not a multiple of Q4_K's 256"):
        encode(np.zeros((1, 288), np.float32), "Q4_K")


# ---- which type ----


def config_of(layers: int, hidden: int = 4096, heads: int = 32, kv_heads: int = 8) -> ModelConfig:
    return ModelConfig(131072, hidden, 11520, layers, heads, kv_heads, 128, 8192)


# Of 40 layers: the first and last eighth, and every third between.
MORE_BITS_40 = {0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39}


@pytest.mark.parametrize("kind, base", [("Q4_K_M", "Q4_K"), ("Q5_K_M", "Q5_K")])
def test_medium_mixes_give_half_of_the_layers_more_bits(kind: str, base: str) -> None:
    config = config_of(40)
    for module in ("attn_v", "ffn_down"):
        types = [mix_type(f"blk.{i}.{module}.weight", kind, config, False) for i in range(40)]
        assert {i for i in range(40) if types[i] == "Q6_K"} == MORE_BITS_40
        assert {types[i] for i in range(40) if i not in MORE_BITS_40} == {base}
    for module in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert mix_type(f"blk.0.{module}.weight", kind, config, False) == base
    assert mix_type("token_embd.weight", kind, config, False) == base
    assert mix_type("token_embd.weight", kind, config, True) == "Q6_K"
    assert mix_type("output.weight", kind, config, False) == "Q6_K"


def test_small_mix_and_others() -> None:
    config = config_of(40)
    down = [mix_type(f"blk.{i}.ffn_down.weight", "Q4_K_S", config, False) for i in range(40)]
    value = [mix_type(f"blk.{i}.attn_v.weight", "Q4_K_S", config, False) for i in range(40)]
    assert down == ["Q5_K"] * 5 + ["Q4_K"] * 35 and value == ["Q5_K"] * 4 + ["Q4_K"] * 36
    for kind in SIMPLE:
        expected = "Q8_0" if kind == "Q8_0" else "Q6_K"
        assert mix_type("output.weight", kind, config, False) == expected
        assert mix_type("blk.0.attn_v.weight", kind, config, False) == kind
    assert mix_type("output.weight", "Q4_K_M", config_of(4, hidden=576), False) == "Q8_0"
    seventy = config_of(80, 8192, 64, 8)
    assert mix_type("blk.12.attn_v.weight", "Q4_K_M", seventy, False) == "Q6_K"
    assert mix_type("blk.11.attn_v.weight", "Q4_K_M", seventy, False) == "Q5_K"


def test_rows_that_are_not_whole_blocks_fall_back() -> None:
    expected = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "Q4_0": "Q4_0", "F16": "F16"}
    for wanted, fallback in expected.items():
        assert storable_type(wanted, 512) == wanted
        assert storable_type(wanted, 576) == fallback
        assert storable_type(wanted, 100) == "F16"


# ---- files ----


def write_folder(
    folder: Path, dtype: torch.dtype = torch.float32, **changes: Any
) -> dict[str, torch.Tensor]:
    """The tiny checkpoint with rows of whole K blocks and other ``changes`` of its config."""
    folder.mkdir()
    write_tiny_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "torch_dtype": str(dtype).removeprefix("torch.")} | changes
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(11)
    weights = {}
    for name, shape in ModelConfig.from_hf(config).weight_shapes().items():
        weight = torch.randn(shape, generator=generator) * 0.1
        weights[name] = (1 + weight if len(shape) == 1 else weight).to(dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize") / "model"
    write_folder(path)
    return path


@pytest.mark.parametrize("kind", [*MIXES, "Q4_K"])
def test_every_kind_is_read_by_the_gguf_library(folder: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "m.gguf"
    report = quantize.quantize(folder, out, kind)
    reader = gguf.GGUFReader(out)
    source = open_checkpoint(folder)
    mix = "Q4_K_M" if kind == "Q4_K" else kind
    assert reader.get_field("general.file_type").contents() == MIXES[mix].file_type
    assert gguf.LlamaFileType(MIXES[mix].file_type).name.endswith(mix)
    assert reader.get_field("general.quantization_version").contents() == gguf.GGML_QUANT_VERSION
    config = source.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    expected = {names.get_name(n, (".weight",)): n for n in config.weight_shapes()}
    assert {t.name for t in reader.tensors} == set(expected)
    for tensor in reader.tensors:
        weight = source.load(expected[tensor.name], torch.float32).numpy()
        stored_as = "F32" if weight.ndim == 1 else mix_type(tensor.name, mix, config, False)
        assert tensor.tensor_type.name == stored_as
        if count := heads.get(tensor.name.split(".")[-2]):  # halves of a head interleaved
            weight = weight.reshape(count, 2, -1, weight.shape[-1]).swapaxes(1, 2)
        got = quants.dequantize(tensor.data, tensor.tensor_type).ravel()
        error = np.linalg.norm(got - weight.ravel()) / np.linalg.norm(weight)
        bits = {"F32": 99, "F16": 11, "BF16": 8, "Q8_0": 7}.get(stored_as) or int(stored_as[1])
        assert error < 2.0**-bits * (1 if bits > 7 else 2)
    assert report.nbytes == out.stat().st_size
    assert report.parameters == config.num_parameters
    assert sum(report.tensors.values()) == len(reader.tensors)
    assert list(tmp_path.iterdir()) == [out]


IDS = torch.arange(5, 45)[None]


def logits_of(path: Path) -> torch.Tensor:
    return MinitronForCausalLM.from_pretrained(path, dtype="float32", device="cpu").logits(IDS)


def test_float32_file_is_the_same_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits to the last bit: the order of Q's and K's rows, RoPE, norms and head are right."""
    quantize.quantize(folder, tmp_path / "m.gguf", "F32")
    expected = logits_of(folder)
    assert torch.equal(logits_of(tmp_path / "m.gguf"), expected)
    monkeypatch.setattr(quantize, "_pair_order", lambda name, config: None)
    quantize.quantize(folder, tmp_path / "wrong.gguf", "F32")
    assert not torch.allclose(logits_of(tmp_path / "wrong.gguf"), expected, atol=0.1)


def test_transformers_reads_it(folder: Path, tmp_path: Path) -> None:
    """Third-party code, from the file's metadata to its logits."""
    from transformers import AutoModelForCausalLM

    quantize.quantize(folder, tmp_path / "m.gguf", "Q4_K_M")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(IDS).logits
    assert theirs.std() > 0.5
    assert torch.allclose(logits_of(tmp_path / "m.gguf"), theirs, atol=1e-3)


def test_metadata_says_what_the_config_says(folder: Path, tmp_path: Path) -> None:
    quantize.quantize(folder, tmp_path / "m.gguf", "Q8_0")
    wanted, got = open_checkpoint(folder).config, open_checkpoint(tmp_path / "m.gguf").config
    for field in set(vars(wanted)) - {"source", "dtype", "rms_norm_eps"}:
        assert getattr(got, field) == getattr(wanted, field), field
    assert got.rms_norm_eps == np.float32(wanted.rms_norm_eps)
    metadata = GGUFFile(tmp_path / "m.gguf").metadata
    assert metadata["general.name"] == "model"
    assert metadata["llama.rope.dimension_count"] == metadata["llama.attention.key_length"] == 64


def test_tokenizer_is_the_same(folder: Path, tmp_path: Path) -> None:
    quantize.quantize(folder, tmp_path / "m.gguf", "Q8_0")
    wanted, got = Tokenizer.from_file(folder), Tokenizer.from_file(tmp_path / "m.gguf")
    for text in ("Hello world, it's 1234", "<|user|>naïve\n 漢字 🙂<|end|>", "", "  a\tb"):
        assert got.encode(text) == wanted.encode(text)
        assert got.decode(got.encode(text)) == wanted.decode(wanted.encode(text))
    assert got.chat_template == wanted.chat_template
    assert (got.bos_token_id, got.eos_token_id) == (wanted.bos_token_id, wanted.eos_token_id)
    assert got.add_bos is True and got.add_eos is False
    assert got.stop_token_ids == wanted.stop_token_ids


# Of tekken_240718.json and of the tokenizer.json of the NeMo models.
NEMO_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_nemos_tokenizer_is_called_tekken(tmp_path: Path) -> None:
    """A folder with tekken.json; the ids that it lacks are filled with unused tokens."""
    folder, out = tmp_path / "model", tmp_path / "m.gguf"
    write_folder(folder, vocab_size=300)
    (folder / "tokenizer.json").unlink()
    words = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello", b" w"]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for rank, word in enumerate(words)
    ]
    sizes = {"default_vocab_size": 10 + len(words), "default_num_special_tokens": 10}
    config = {"pattern": NEMO_PATTERN, "num_vocab_tokens": len(words), **sizes, "version": "v3"}
    specials = [{"rank": i, "token_str": t} for i, t in enumerate(("<unk>", "<s>", "</s>"))]
    (folder / "tekken.json").write_text(
        json.dumps({"config": config, "vocab": vocab, "special_tokens": specials})
    )
    quantize.quantize(folder, out, "Q8_0")
    metadata = GGUFFile(out).metadata
    assert metadata["tokenizer.ggml.pre"] == "tekken"
    assert len(metadata["tokenizer.ggml.tokens"]) == 300
    assert metadata["tokenizer.ggml.tokens"][299] == "[PAD299]"
    assert metadata["tokenizer.ggml.token_type"][9:12] == [3, 1, 1]
    assert metadata["tokenizer.ggml.token_type"][271:] == [5] * 29
    wanted, got = Tokenizer.from_file(folder), Tokenizer.from_file(out)
    for text in ("hello world", "Hello HELLO helloWorld", "12 naïve</s> 漢"):
        assert got.encode(text) == wanted.encode(text) and got.encode(text)[0] == 1


def test_pre_tokenizers_are_told_apart(tmp_path: Path) -> None:
    from minitron_kernels.loaders import byte_level
    from minitron_kernels.loaders.gguf_writer import tokenizer_pairs

    vocab = {char: i for i, char in enumerate(byte_level.encode_bytes(bytes(range(256))))}
    for name, rules in byte_level.PRE_TOKENIZERS.items():
        backend = byte_level.build(vocab, [], rules.splits, False, "x")
        pairs = tokenizer_pairs(Tokenizer(backend, "x", special_ids={}, add_bos=False), 256)
        assert pairs[1].endswith(struct.pack("<Q", len(name)) + name.encode())
    odd = byte_level.build(vocab, [], [r"\d\d"], False, "x")
    with pytest.raises(NotImplementedError, match="x: the pre-tokenizer cuts text unlike any of d"):
        tokenizer_pairs(Tokenizer(odd, "x", special_ids={}, add_bos=False), 256)
    with pytest.raises(ValueError, match="x: token id 255, but the model's vocab_size is 255"):
        tokenizer_pairs(Tokenizer(backend, "x", special_ids={}, add_bos=False), 255)


def test_tied_embeddings_and_rope_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    write_folder(tmp_path / "model", tie_word_embeddings=True, rope_scaling=scaling)
    quantize.quantize(tmp_path / "model", tmp_path / "m.gguf", "Q4_K_M")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert checkpoint.config.tie_word_embeddings and "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.tensors["model.embed_tokens.weight"].type == "Q6_K"
    wanted = open_checkpoint(tmp_path / "model").config.rope_factors
    assert wanted is not None and checkpoint.config.rope_factors == pytest.approx(wanted, rel=1e-6)


def test_fallbacks_are_told(tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "model", hidden_size=320, intermediate_size=500)
    report = quantize.quantize(tmp_path / "model", tmp_path / "m.gguf", "Q4_K_M")
    told = {record.getMessage() for record in caplog.records}
    assert "rows of 320 cannot be Q4_K: Q5_0 instead (matrices: 10)" in told
    assert "rows of 500 cannot be Q6_K: F16 instead (matrices: 1)" in told
    assert report.tensors == {"Q5_0": 10, "Q4_K": 2, "Q8_0": 2, "F16": 2, "F32": 5}
    caplog.clear()
    quantize.quantize(folder, tmp_path / "n.gguf", "Q4_K_M")
    assert not caplog.records


def test_pure_gives_all_matrices_one_type(folder: Path, tmp_path: Path) -> None:
    report = quantize.quantize(folder, tmp_path / "m.gguf", "Q4_K_M", pure=True)
    assert report.tensors == {"Q4_K": 16, "F32": 5}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("per_file", [0, 5])
def test_a_float_gguf_file_is_a_source(tmp_path: Path, dtype: str, per_file: int) -> None:
    """Whole or split: stored order of rows and all metadata stay, types of values included."""
    tensors = tiny_tensors(dtype)
    metadata = TINY_METADATA | {
        "general.file_type": 1,
        "x.flag": True,
        "x.list": [1, -2],
        "x.s": "é",
    }
    source = write_gguf(tmp_path / "in.gguf", tensors, metadata, per_file)[0]
    quantize.quantize(source, tmp_path / "out.gguf", "Q8_0")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    before = gguf.GGUFReader(source)
    for key, field in before.fields.items():
        if not key.startswith(("GGUF.", "split.", "general.file_type")):
            kept = reader.get_field(key)
            assert kept.types == field.types and kept.contents() == field.contents()
    assert not any(key.startswith("split.") for key in reader.fields)
    for tensor in reader.tensors:
        stored = tensors[tensor.name][1]
        if "norm" in tensor.name:
            assert (tensor.data.view(np.uint8).ravel() == stored.ravel()).all()
        else:
            weight = quants.dequantize(stored, GGMLQuantizationType[dtype])
            assert (tensor.data == quants.quantize(weight, GGMLQuantizationType.Q8_0)).all()


def test_threads_and_progress_change_nothing(folder: Path, tmp_path: Path) -> None:
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(quantize, "_CHUNK_ELEMENTS", 3000)
        quantize.quantize(folder, tmp_path / "a.gguf", "Q4_K_M", num_threads=3, progress=True)
    quantize.quantize(folder, tmp_path / "b.gguf", "Q4_K_M", num_threads=1)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_memory_is_bounded_by_chunks_not_tensors(tmp_path: Path) -> None:
    tensors = tiny_tensors("F16")
    rng = np.random.default_rng(0)
    del tensors["output.weight"]  # tied
    tensors["token_embd.weight"] = ("F16", random_rows("F16", 65536, 256, rng))  # fp32: 64 MB
    write_gguf(tmp_path / "in.gguf", tensors)
    del tensors
    tracemalloc.start()
    quantize.quantize(tmp_path / "in.gguf", tmp_path / "out.gguf", "Q8_0", num_threads=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 24 << 20


# ---- what it refuses, and what it leaves behind ----


def refused(
    tmp_path: Path, source: Path, message: str, kind: str = "Q4_K_M", **options: Any
) -> None:
    """ValueError or OSError with `message`, and not a file more than before."""
    before = sorted(tmp_path.rglob("*"))
    out = options.pop("out", tmp_path / "out.gguf")
    with pytest.raises((ValueError, OSError, NotImplementedError), match=message):
        quantize.quantize(source, out, kind, **options)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", ["", "q4_k_m", "Q3_K_M", "IQ4_XS", "Q4_K_L", "../Q8_0"])
def test_unknown_types_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    refused(tmp_path, folder, rf"type: got '{kind}', accepted: F32, F16, BF16, Q8_0", kind)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M", "F16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, kind: str, value: float) -> None:
    source = tmp_path / "model"
    weights = write_folder(source, torch.bfloat16)
    weights["model.layers.1.mlp.up_proj.weight"][300, 17] = value
    save_file(weights, source / "model.safetensors")
    message = (
        r"model\.safetensors: tensor 'blk\.1\.ffn_up\.weight': the weight in row 300, column 17 "
        "is not finite"
    )
    refused(tmp_path, source, message, kind)


@pytest.mark.parametrize("kind", [*SIMPLE, *K_TYPES, "F16"])
def test_weights_beyond_a_types_range_are_refused(tmp_path: Path, kind: str) -> None:
    source = tmp_path / "model"
    weights = write_folder(source)
    weights["lm_head.weight"][20, 9] = 3e38
    weights["lm_head.weight"][20, 10] = -3e38
    save_file(weights, source / "model.safetensors")
    refused(tmp_path, source, r"tensor 'output\.weight'.* too large for", kind, pure=True)


def test_quantised_sources_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "in.gguf", tiny_tensors("Q4_1"))
    refused(tmp_path, tmp_path / "in.gguf", r"tensor 'token_embd\.weight' is Q4_1 already")


def test_incomplete_sources_are_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors("F16")
    del tensors["blk.0.attn_q.weight"]
    write_gguf(tmp_path / "in.gguf", tensors)
    refused(tmp_path, tmp_path / "in.gguf", rf"in\.gguf: tensor {Q_PROJ} is missing")
    source = tmp_path / "model"
    weights = write_folder(source)
    del weights[Q_PROJ]
    save_file(weights, source / "model.safetensors")
    refused(tmp_path, source, f"tensor {Q_PROJ} is missing")
    weights[Q_PROJ] = torch.zeros(256, 255)
    save_file(weights, source / "model.safetensors")
    refused(tmp_path, source, r"q_proj.* has shape \[256, 255\], the config asks for \[256, 256\]")
    (source / "tokenizer.json").unlink()
    weights[Q_PROJ] = torch.zeros(256, 256)
    save_file(weights, source / "model.safetensors")
    refused(tmp_path, source, "holds neither tokenizer.json nor tekken.json")


def test_out_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.gguf"
    taken.write_bytes(b"precious")
    refused(tmp_path, folder, r"taken\.gguf: already there; --force", out=taken)
    assert taken.read_bytes() == b"precious"
    refused(tmp_path, folder, "is a folder; name a file", out=tmp_path, force=True)
    refused(tmp_path, folder, "no such folder", out=tmp_path / "missing" / "out.gguf")
    refused(tmp_path, folder, "no such folder", out=taken / "out.gguf")
    refused(tmp_path, tmp_path / "nowhere", "nowhere")
    os.mkfifo(pipe := tmp_path / "pipe.gguf")
    refused(tmp_path, folder, "is no regular file", out=pipe, force=True)
    assert pipe.is_fifo()
    quantize.quantize(folder, taken, "Q8_0", force=True)
    assert open_checkpoint(taken).config.hidden_size == 256


def test_too_little_disk_is_told_beforehand(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda path: usage)
    refused(tmp_path, folder, r"out\.gguf: needs 0\.00 GB of disk, 0\.00 GB are free")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    calls = 0

    def encode_some(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 7:
            raise error
        return original(*arguments)

    original = quantize._encode
    monkeypatch.setattr(quantize, "_encode", encode_some)
    kept = tmp_path / "out.gguf"
    kept.write_bytes(b"precious")
    with pytest.raises(type(error)):
        quantize.quantize(folder, kept, "Q8_0", force=True)
    assert kept.read_bytes() == b"precious" and list(tmp_path.iterdir()) == [kept]


def test_a_file_size_limit_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """A real failure of write(), in a process whose files may have 100 kB."""
    script = (
        "import resource, sys; from minitron_kernels.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); sys.exit(main())"
    )
    command = ["quantize", str(folder), str(tmp_path / "out.gguf"), "--type", "Q8_0"]
    run = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1] == f"error: {tmp_path}/out.gguf: File too large"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    tensors = tiny_tensors("F16")
    del tensors["output.weight"]  # tied
    zeros = np.zeros((1 << 18, 512), np.uint8)  # 67 M weights: some seconds
    write_gguf(tmp_path / "in.gguf", tensors | {"token_embd.weight": ("F16", zeros)})
    script = "import sys; from minitron_kernels.cli import main; sys.exit(main())"
    command = [
        "quantize",
        str(tmp_path / "in.gguf"),
        str(tmp_path / "out.gguf"),
        "--type",
        "Q5_K_M",
    ]
    run = subprocess.Popen([sys.executable, "-c", script, *command], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out*")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(tmp_path.glob(".out.gguf.*.part"))
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130, stderr
    assert [p.name for p in tmp_path.iterdir()] == ["in.gguf"]


# ---- the command ----


def test_command(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.gguf"
    assert main(["quantize", str(folder), str(out), "--type", "Q4_K_M", "--num-threads", "2"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith(f"{out}: 0.00 GB, ") and "tensors: 5 F32, 13 Q4_K, 3 Q6_K" in printed
    again = ["quantize", str(folder), str(out), "--type", "Q8_0", "--json"]
    assert main(again) == 2
    assert capfd.readouterr().err == f"error: {out}: already there; --force replaces it\n"
    assert main([*again, "--force"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["nbytes"] == out.stat().st_size and report["tensors"] == {"Q8_0": 16, "F32": 5}
    assert main(["quantize", str(folder), str(out), "--type", "Q9", "--force"]) == 2
    assert "type: got 'Q9', accepted: F32" in capfd.readouterr().err
