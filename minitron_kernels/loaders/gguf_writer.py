"""GGUF files: the header, and a model's metadata as llama.cpp's converter writes it.

A metadata entry is handled as the bytes that the file holds (`Pair`), so that entries of another
file are copied unchanged, whatever their types.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

from minitron_kernels.config import ModelConfig
from minitron_kernels.loaders import byte_level
from minitron_kernels.loaders.gguf_file import BLOCK_TYPES
from minitron_kernels.loaders.tokenizer import Tokenizer

ALIGNMENT = 32
_TYPE_IDS = {block.name: number for number, block in BLOCK_TYPES.items()}
_INT32, _UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 5, 4, 6, 7, 8, 9

Pair = bytes


@dataclass(frozen=True)
class TensorHead:
    """What the header says of a tensor."""

    name: str
    type: str
    shape: tuple[int, ...]  # torch order

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        block = BLOCK_TYPES[_TYPE_IDS[self.type]]
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * block.row_nbytes(self.shape[-1])


def padding(position: int) -> int:
    """Bytes from ``position`` to the next multiple of ALIGNMENT."""
    return -position % ALIGNMENT


def header(pairs: Sequence[Pair], tensors: Iterable[TensorHead]) -> bytes:
    """All that stands before the tensors' data, which follow in order, each padded."""
    table = []
    offset = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        place = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _TYPE_IDS[tensor.type], offset)
        table.append(_string(tensor.name) + place)
        offset += tensor.nbytes + padding(tensor.nbytes)
    raw = struct.pack("<4sIQQ", b"GGUF", 3, len(table), len(pairs)) + b"".join([*pairs, *table])
    return raw + b"\0" * padding(len(raw))


# ---- metadata entries ----


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def string(key: str, value: str) -> Pair:
    """An entry that holds a string."""
    return _string(key) + struct.pack("<I", _STRING) + _string(value)


def uint32(key: str, value: int) -> Pair:
    """An entry that holds an unsigned integer."""
    return _string(key) + struct.pack("<II", _UINT32, value)


def float32(key: str, value: float) -> Pair:
    """An entry that holds a number."""
    return _string(key) + struct.pack("<If", _FLOAT32, value)


def boolean(key: str, value: bool) -> Pair:
    """An entry that holds true or false."""
    return _string(key) + struct.pack("<I?", _BOOL, value)


def strings(key: str, values: Sequence[str]) -> Pair:
    """An entry that holds a list of strings."""
    head = _string(key) + struct.pack("<IIQ", _ARRAY, _STRING, len(values))
    return head + b"".join(map(_string, values))


def int32s(key: str, values: Sequence[int]) -> Pair:
    """An entry that holds a list of integers."""
    head = _string(key) + struct.pack("<IIQ", _ARRAY, _INT32, len(values))
    return head + struct.pack(f"<{len(values)}i", *values)


# ---- a model's entries ----


def model_pairs(config: ModelConfig, name: str) -> list[Pair]:
    """`general.*` and `llama.*`; RoPE factors, if any, go to rope_freqs.weight."""
    pairs = [
        string("general.architecture", "llama"),
        string("general.type", "model"),
        string("general.name", name),
        uint32("llama.block_count", config.num_hidden_layers),
        uint32("llama.context_length", config.max_position_embeddings),
        uint32("llama.embedding_length", config.hidden_size),
        uint32("llama.feed_forward_length", config.intermediate_size),
        uint32("llama.attention.head_count", config.num_attention_heads),
        uint32("llama.attention.head_count_kv", config.num_key_value_heads),
        uint32("llama.attention.key_length", config.head_dim),
        uint32("llama.attention.value_length", config.head_dim),
        float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps),
        float32("llama.rope.freq_base", config.rope_theta),
        uint32("llama.rope.dimension_count", config.head_dim),
        uint32("llama.vocab_size", config.vocab_size),
    ]
    if config.sliding_window is not None:
        pairs.append(uint32("llama.attention.sliding_window", config.sliding_window))
    return pairs


def tokenizer_pairs(tokenizer: Tokenizer, vocab_size: int) -> list[Pair]:
    """`tokenizer.*` of a byte-level BPE vocabulary, filled up to ``vocab_size`` with unused tokens.

    Raises NotImplementedError for a tokenizer of another kind, or one that splits text in a way
    that llama.cpp has no name for; ValueError for more tokens than ``vocab_size``.
    """
    backend = tokenizer._tok
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise NotImplementedError(
            f"{tokenizer.source}: a {model.get('type')} vocabulary; only byte-level BPE can be "
            "written to GGUF"
        )
    pre = _pre_tokenizer_name(tokenizer)
    by_id = {id: text for text, id in backend.get_vocab(with_added_tokens=True).items()}
    if by_id and max(by_id) >= vocab_size:
        raise ValueError(
            f"{tokenizer.source}: token id {max(by_id)}, but the model's vocab_size is {vocab_size}"
        )
    types = [_TOKEN_UNUSED if id not in by_id else _TOKEN_NORMAL for id in range(vocab_size)]
    for id, token in backend.get_added_tokens_decoder().items():
        types[id] = _TOKEN_CONTROL if token.special else _TOKEN_USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    pairs = [
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", pre),
        strings("tokenizer.ggml.tokens", [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]),
        int32s("tokenizer.ggml.token_type", types),
        strings("tokenizer.ggml.merges", merges),
    ]
    for key, special_id in (
        ("bos", tokenizer.bos_token_id),
        ("eos", tokenizer.eos_token_id),
        ("unknown", tokenizer.unk_token_id),
        ("padding", tokenizer.pad_token_id),
    ):
        if special_id is not None:
            pairs.append(uint32(f"tokenizer.ggml.{key}_token_id", special_id))
    around = tokenizer.encode("a")
    adds_bos = bool(around) and around[0] == tokenizer.bos_token_id
    adds_eos = bool(around) and around[-1] == tokenizer.eos_token_id
    pairs += [
        boolean("tokenizer.ggml.add_bos_token", adds_bos),
        boolean("tokenizer.ggml.add_eos_token", adds_eos),
    ]
    if tokenizer.chat_template is not None:
        pairs.append(string("tokenizer.chat_template", tokenizer.chat_template))
    return pairs


_TOKEN_NORMAL, _TOKEN_CONTROL, _TOKEN_USER_DEFINED, _TOKEN_UNUSED = 1, 3, 4, 5

# Text on which all pre-tokenizers that llama.cpp knows differ from each other. Upper-case letters
# beyond ASCII and combining marks are left out: llama.cpp's tekken treats them unlike Mistral's.
_PROBE = (
    "Hello world, don't DON'T we'LL helloWorld XMLHttp straße naïve 漢字かな 1 12 1234567 3.14\n"
    "  indented\n\n\n\ttabs \t x  \r\n  a/b //c/\n/d ..\n... (x) [y]; €5 $a+b=c <t> a_b ~|^` 🙂!\n "
)


def _pre_tokenizer_name(tokenizer: Tokenizer) -> str:
    """llama.cpp's name of the rules by which a tokenizer cuts text before it merges."""
    own = tokenizer._tok.pre_tokenizer
    wanted = [] if own is None else [piece for piece, _ in own.pre_tokenize_str(_PROBE)]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for name, rules in byte_level.PRE_TOKENIZERS.items():
        splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in rules.splits]
        candidate: Any = pre_tokenizers.Sequence([*splits, to_bytes])
        if [piece for piece, _ in candidate.pre_tokenize_str(_PROBE)] == wanted:
            return name
    raise NotImplementedError(
        f"{tokenizer.source}: the pre-tokenizer cuts text unlike any of "
        f"{', '.join(byte_level.PRE_TOKENIZERS)}, which GGUF files can name here"
    )
