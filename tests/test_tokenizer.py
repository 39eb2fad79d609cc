"""Tokenizers against transformers, tiktoken (mistral-common's engine) and llama.cpp's rules."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
import tokenizers
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer as HFAutoTokenizer
from transformers import PreTrainedTokenizerFast

from minitron_kernels.loaders import byte_level
from minitron_kernels.loaders.gguf_file import GGUFFile
from minitron_kernels.loaders.hub import cache_dir
from minitron_kernels.loaders.tokenizer import AutoTokenizer, Tokenizer

TEXTS = {
    "empty": "",
    "english": "Complete the paragraph: our solar system is, isn't it? We'LL see — I'M sure.",
    "code": "def f(x: int) -> str:\n\tif x >= 10_000:\n        return f'{x:>8}'  #\n\n\n  }\r\n",
    "digits": "1 12 123 1234 12345 3.14159e-10 ２０２４ ½ ⅷ 1,000,000",
    "chinese": "太阳系是由太阳和围绕它运行的天体组成的。第１２３页，共456页！",
    "arabic": "النظام الشمسي هو نظام كوكبي يتكون من الشَّمس وجميع ما يدور حولها ١٢٣",
    "accents": "Ünïcödé ÀÉÎ ÀB Straße ǅ İstanbul naïve cafe\u0301 e\u0301\u0302 \u0301x हिन्दी ไทย",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈 ok👍🏽 ™®© ∑∏ ±",
    "spaces": " a  b   c\t\td \n\n\n e\u00a0f\u3000g\u2003\u2003h \r\n\r\n   \n" + " " * 97,
    "specials": "<|im_start|>user\nhi<|im_end|>\n<s>[INST] x [/INST]</s> <|im_end|",
    "controls": "\x00\x01\x1c\x1f\x7f\x85\u200b\ufeff\ufffd\U0010ffff",
}
byte_soup = st.binary(max_size=60).map(lambda data: data.decode("utf-8", "replace"))
mixed = st.lists(
    st.sampled_from(
        [*"aAbsST'é中😀ا\u0301 \t\n\r1½/-_.", "  ", "'s", "ing", " the", "ÀB", "\u3000"]
    ),
    max_size=40,
).map("".join)
any_text = st.one_of(st.text(max_size=60), byte_soup, mixed)
quick = settings(
    max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


# --- references ------------------------------------------------------------------------------

TEKKEN_SHA256 = "eccd1665d2e477697c33cb7f0daa6f6dfefc57a0a6bceb66d4be52952f827516"


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", *arguments], check=True)


@pytest.fixture(scope="session")
def tekken_json() -> Path:
    """The vocabulary of Mistral-NeMo, from the mistral-common wheel."""
    folder = cache_dir() / "tests"
    path = folder / "tekken_240718.json"
    if not path.is_file():
        # Only the data file is used, so the wheel's own Python version does not matter.
        pip(
            *("download", "--no-deps", "--ignore-requires-python", "--only-binary=:all:"),
            *("--dest", str(folder), "mistral-common==1.13.1"),
        )
        with zipfile.ZipFile(next(folder.glob("mistral_common-1.13.1-*.whl"))) as wheel:
            path.write_bytes(wheel.read(f"mistral_common/data/{path.name}"))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == TEKKEN_SHA256
    return path


@pytest.fixture(scope="session")
def tiktoken_nemo(tekken_json: Path) -> Any:
    """tiktoken over that vocabulary, as mistral-common's Tekkenizer sets it up."""
    folder = cache_dir() / "tests" / "tiktoken-0.12.0"
    if not folder.is_dir():
        pip("install", "--no-deps", "--target", str(folder), "tiktoken==0.12.0")
    sys.path.append(str(folder))
    tiktoken = importlib.import_module("tiktoken")
    data = json.loads(tekken_json.read_text())
    ranks = {base64.b64decode(e["token_bytes"]): e["rank"] for e in data["vocab"][:130072]}
    return tiktoken.Encoding(
        "nemo", pat_str=data["config"]["pattern"], mergeable_ranks=ranks, special_tokens={}
    )


@pytest.fixture(scope="session")
def tekken(tekken_json: Path) -> Tokenizer:
    return Tokenizer.from_file(tekken_json)


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_gguf: Path) -> Mapping[str, Any]:
    return GGUFFile(smollm2_gguf).metadata


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: Mapping[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_metadata, "smollm2.gguf")


@pytest.fixture(scope="session")
def smollm2_hf(smollm2_metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """SmolLM2 from the parts that its published tokenizer.json has: digits apart, then GPT-2."""
    tokens = smollm2_metadata["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in smollm2_metadata["tokenizer.ggml.merges"]]
    tok = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in tokens[:17]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        chat_template=smollm2_metadata["tokenizer.chat_template"],
    )


@pytest.fixture(scope="session")
def nemo_metadata(tekken: Tokenizer, tekken_json: Path) -> dict[str, Any]:
    """The NeMo vocabulary as a GGUF converter writes it, merges found by the textbook method."""
    ranks = {
        byte_level.decode_chars(str(tekken.convert_ids_to_tokens(id))): id
        for id in range(1000, tekken.vocab_size)
    }
    merges = []
    for token, rank in ranks.items():
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:  # BPE with the merges known before this token
            best = min(
                range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank)
            )
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(byte_level.encode_bytes, parts)))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": tekken.convert_ids_to_tokens(range(tekken.vocab_size)),
        "tokenizer.ggml.token_type": [3] * 1000 + [1] * len(ranks),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


class LlamaCppBPE:
    """llama.cpp's tokenizer, written down plainly: split on specials, split on regexes, merge."""

    def __init__(self, metadata: Mapping[str, Any], *expressions: str, whole: bool = False) -> None:
        tokens = metadata["tokenizer.ggml.tokens"]
        types = metadata["tokenizer.ggml.token_type"]
        self.vocab = {t: i for i, t in enumerate(tokens)}
        self.ranks = {
            tuple(m.split(" ")): i for i, m in enumerate(metadata["tokenizer.ggml.merges"])
        }
        specials = sorted(
            (t for t, k in zip(tokens, types, strict=True) if k in (2, 3, 4)), key=len
        )
        self.specials = re.compile("(" + "|".join(map(re.escape, reversed(specials))) + ")")
        self.expressions = [regex.compile(e) for e in expressions]
        self.whole = whole

    def __call__(self, text: str) -> list[int]:
        ids = []
        for fragment in self.specials.split(text):
            if self.specials.fullmatch(fragment):
                ids.append(self.vocab[fragment])
                continue
            words = [fragment] if fragment else []
            for expression in self.expressions:
                words = [piece for word in words for piece in self.split(expression, word)]
            for word in words:
                ids += self.merge(byte_level.encode_bytes(word.encode()))
        return ids

    @staticmethod
    def split(expression: regex.Pattern[str], word: str) -> list[str]:
        pieces, end = [], 0
        for match in expression.finditer(word):
            pieces += [word[end : match.start()], match.group()]
            end = match.end()
        return [piece for piece in [*pieces, word[end:]] if piece]

    def merge(self, word: str) -> list[int]:
        if self.whole and word in self.vocab:
            return [self.vocab[word]]
        parts = list(word)
        while len(parts) > 1:
            pairs = [self.ranks.get(pair, 1 << 30) for pair in pairwise(parts)]
            if min(pairs) == 1 << 30:
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.vocab[part] for part in parts if part in self.vocab]


# --- tekken.json -----------------------------------------------------------------------------


def has_special(text: str) -> bool:
    return re.search(r"<unk>|</?s>|<pad>|\[/?[A-Z_]+\]|<SPECIAL_", text) is not None


@pytest.mark.parametrize("name", TEXTS.keys() - {"specials"})
def test_tekken_ids_equal_mistral_common(tekken: Tokenizer, tiktoken_nemo: Any, name: str) -> None:
    ids = tekken.encode(TEXTS[name])
    assert ids == [1] + [rank + 1000 for rank in tiktoken_nemo.encode_ordinary(TEXTS[name])]
    assert tekken.decode(ids, skip_special_tokens=True) == TEXTS[name]


@quick
@given(text=any_text)
def test_tekken_ids_equal_mistral_common_random(
    tekken: Tokenizer, tiktoken_nemo: Any, text: str
) -> None:
    assume(not has_special(text))
    ids = tekken.encode(text, add_special_tokens=False)
    assert ids == [rank + 1000 for rank in tiktoken_nemo.encode_ordinary(text)]
    assert tekken.decode(ids) == text


@quick
@given(ranks=st.lists(st.integers(0, 130071), max_size=8))
def test_tekken_ids_equal_mistral_common_joined_tokens(
    tekken: Tokenizer, tiktoken_nemo: Any, ranks: list[int]
) -> None:
    text = tiktoken_nemo.decode(ranks)
    assume(not has_special(text))
    assert tekken.decode([rank + 1000 for rank in ranks]) == text
    ids = tekken.encode(text, add_special_tokens=False)
    assert ids == [rank + 1000 for rank in tiktoken_nemo.encode_ordinary(text)]


def test_tekken_every_token_decodes_as_in_mistral_common(
    tekken: Tokenizer, tiktoken_nemo: Any
) -> None:
    expected = [tiktoken_nemo.decode([rank]) for rank in range(130072)]
    assert [tekken.decode([1000 + rank]) for rank in range(130072)] == expected


def test_tekken_special_tokens(tekken: Tokenizer) -> None:
    # Ids as mistral-common 1.13.1's Tekkenizer gives them for the same file.
    assert (tekken.vocab_size, tekken.unk_token_id, tekken.bos_token_id) == (131072, 0, 1)
    assert (tekken.eos_token_id, tekken.pad_token_id, tekken.stop_token_ids) == (2, 11, (2,))
    assert tekken.encode("hello wörld") == [1, 29706, 1285, 3238, 1543]
    assert tekken.encode("太阳系 123\n\n  x") == [
        *(1, 22289, 108733, 14516, 1032, 1049, 1050, 1051, 1267, 1032, 2460)
    ]
    assert tekken.encode("[INST]a[/INST]</s>") == [1, 3, 1097, 4, 2]
    assert tekken.convert_ids_to_tokens([10, 19, 20, 999]) == [
        *("[IMG]", "[TOOL_CONTENT]", "<SPECIAL_20>", "<SPECIAL_999>")
    ]
    assert tekken.decode([1, 3, 1097]) == "<s>[INST]a"


# --- GGUF ------------------------------------------------------------------------------------

# The same sequence of expressions as in llama.cpp's llm_tokenizer_bpe, in its own spelling.
LLAMA_CPP_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA_CPP_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def nemo_gguf(nemo_metadata: Mapping[str, Any]) -> tuple[Tokenizer, LlamaCppBPE]:
    oracle = LlamaCppBPE(nemo_metadata, LLAMA_CPP_TEKKEN, whole=True)
    return Tokenizer.from_gguf(nemo_metadata, "nemo.gguf"), oracle


@pytest.mark.parametrize("name", TEXTS)
def test_gguf_tekken_ids_equal_llama_cpp_rules(
    nemo_gguf: tuple[Tokenizer, LlamaCppBPE], name: str
) -> None:
    tokenizer, oracle = nemo_gguf
    assert tokenizer.encode(TEXTS[name]) == [1, *oracle(TEXTS[name])]
    assert tokenizer.decode(oracle(TEXTS[name])) == TEXTS[name]


@quick
@given(text=any_text)
def test_gguf_tekken_ids_equal_llama_cpp_rules_random(
    nemo_gguf: tuple[Tokenizer, LlamaCppBPE], text: str
) -> None:
    tokenizer, oracle = nemo_gguf
    assert tokenizer.encode(text, add_special_tokens=False) == oracle(text)


@pytest.mark.parametrize("name", TEXTS)
def test_gguf_smollm2_ids_equal_transformers(
    smollm2: Tokenizer, smollm2_hf: PreTrainedTokenizerFast, name: str
) -> None:
    ids = smollm2.encode(TEXTS[name])
    assert ids == smollm2_hf.encode(TEXTS[name])
    assert smollm2.decode(ids) == smollm2_hf.decode(ids)
    assert smollm2.decode(ids, skip_special_tokens=True) == smollm2_hf.decode(
        ids, skip_special_tokens=True
    )


@pytest.fixture(scope="session")
def smollm2_oracle(smollm2_metadata: Mapping[str, Any]) -> LlamaCppBPE:
    return LlamaCppBPE(smollm2_metadata, r"\p{N}", LLAMA_CPP_GPT2)


@quick
@given(text=any_text)
def test_gguf_smollm2_ids_equal_both_references_random(
    smollm2: Tokenizer, smollm2_hf: PreTrainedTokenizerFast, smollm2_oracle: LlamaCppBPE, text: str
) -> None:
    assert smollm2.encode(text) == smollm2_hf.encode(text) == smollm2_oracle(text)


def test_gguf_smollm2_equals_transformers_gguf_loader(
    smollm2: Tokenizer, smollm2_gguf: Path
) -> None:
    """transformers' own conversion of the file (which forgets that digits stand alone)."""
    hf = HFAutoTokenizer.from_pretrained(str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name)
    for name in TEXTS.keys() - {"digits", "code", "chinese", "arabic"}:
        assert smollm2.encode(TEXTS[name]) == hf.encode(TEXTS[name]), name
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "chat_template"):
        assert getattr(smollm2, name) == getattr(hf, name), name


@pytest.mark.parametrize(
    "pre, pieces",
    {
        "default": "It|'|s| IT|'|S| |120|45|x| | £| £| a|+=|b| ÀB|\n |/|\n",
        "gpt-2": "It|'s| IT|'|S| 12045|x| | £| £| a|+=|b| ÀB|\n| /|\n",
        "smollm": "It|'s| IT|'|S| |1|2|0|4|5|x| | £| £| a|+=|b| ÀB|\n| /|\n",
        "qwen2": "It|'s| IT|'S| |1|2|0|4|5|x| | £| £| a|+=|b| ÀB|\n| /\n",
        "llama-bpe": "It|'s| IT|'S| |120|45|x| | £| £| a|+=|b| ÀB|\n| /\n",
        # A contraction is no case of its own; beyond ASCII every letter counts as upper and lower.
        "tekken": "It|'s| IT|'S| |1|2|0|4|5|x| | £| £| a|+=|b| À|B|\n| /\n",
    }.items(),
)
def test_gguf_pre_tokenizers_by_hand(pre: str, pieces: str) -> None:
    rules = byte_level.PRE_TOKENIZERS[pre]
    tok = byte_level.build({"a": 0}, [], rules.splits, rules.ignore_merges, "test")
    text = "It's IT'S 12045x  £ £ a+=b ÀB\n /\n"
    got = tok.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in got] == pieces.split("|")


def tiny_metadata(**changes: Any) -> dict[str, Any]:
    """A valid GGUF vocabulary: the bytes, "ab", "abc", and one token of each special type."""
    tokens = [byte_level.encode_bytes(bytes([b])) for b in range(256)]
    tokens += ["ab", "abc", "<unk>", "<s>", "</s>", "é user", "spare", "xyz"]
    metadata = {
        "model": "gpt2",
        "pre": "llama-bpe",
        "tokens": tokens,
        "token_type": [1] * 258 + [2, 3, 3, 4, 5, 1],
        "merges": ["a b", "ab c"],
        "bos_token_id": 259,
        "eos_token_id": 260,
        "unknown_token_id": 258,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in metadata.items() if v is not None}


def tiny(**changes: Any) -> Tokenizer:
    return Tokenizer.from_gguf(tiny_metadata(**changes), "tiny.gguf")


@pytest.mark.parametrize(
    "pre, add_bos, add_eos, expected",
    [
        ("llama-bpe", None, None, [259, 97]),  # llama.cpp's default by pre-tokenizer
        ("tekken", None, None, [259, 97]),
        ("smollm", None, None, [97]),
        ("gpt-2", None, None, [97]),
        (None, None, None, [97]),
        ("llama-bpe", False, None, [97]),  # the file's flag wins
        ("smollm", True, None, [259, 97]),
        ("smollm", True, True, [259, 97, 260]),
        ("tekken", False, True, [97, 260]),
    ],
)
def test_gguf_bos_and_eos_rules(
    pre: str | None, add_bos: bool | None, add_eos: bool | None, expected: list[int]
) -> None:
    tokenizer = tiny(pre=pre, add_bos_token=add_bos, add_eos_token=add_eos)
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_gguf_token_types_follow_llama_cpp() -> None:
    tokenizer = tiny()
    assert tokenizer.encode("<unk>é user</s>ab", add_special_tokens=False) == [258, 261, 260, 256]
    # Control and unknown tokens are special, user-defined ones are text; unused ones print nothing.
    assert tokenizer.all_special_ids == [258, 259, 260]
    assert tokenizer.decode([259, 261, 262, 257, 258]) == "<s>é userabc<unk>"
    assert tokenizer.decode([259, 261, 262, 257, 258], skip_special_tokens=True) == "é userabc"
    # A whole piece that is a token needs no merges, where llama.cpp ignores them.
    for pre in ("llama-bpe", "tekken"):
        assert tiny(pre=pre).encode("xyz", add_special_tokens=False) == [263]
    assert tiny(pre="smollm").encode("xyz") == [120, 121, 122]


def test_gguf_stop_tokens_follow_llama_cpp(smollm2: Tokenizer) -> None:
    assert tiny().stop_token_ids == (260,)
    assert tiny(eos_token_id=None).stop_token_ids == (260,)  # "</s>" by its text
    assert tiny(eot_token_id=97, eom_token_id=98).stop_token_ids == (97, 98, 260)
    # <|endoftext|>, <|im_end|> and <reponame>, which llama.cpp counts among them
    assert smollm2.stop_token_ids == (0, 2, 4)
    # End-of-text tokens are control tokens even where the file says otherwise.
    types = [1] * 258 + [2, 3, 1, 4, 5, 1]
    assert 260 in tiny(token_type=types).all_special_ids


def test_gguf_optional_keys() -> None:
    tokens = tiny_metadata()["tokenizer.ggml.tokens"]
    tokens[255] = ""  # llama.cpp names empty tokens after their index
    tokenizer = tiny(token_type=None, tokens=tokens, merges=["a b", "ab c", "a b"])
    assert tokenizer.convert_ids_to_tokens(255) == "[EMPTY_255]"
    assert tokenizer.encode("<s>abc", add_special_tokens=False) == [60, 115, 62, 257]
    assert tokenizer.chat_template is None and tokenizer.pad_token_id is None


# --- Hugging Face folders --------------------------------------------------------------------


def small_byte_level(specials: list[AddedToken | str]) -> tokenizers.Tokenizer:
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator(TEXTS.values(), trainer)
    tok.add_special_tokens(specials)
    return tok


def small_sentencepiece() -> tokenizers.Tokenizer:
    """Llama-2's kind: spaces as ▁, one put in front, unknown bytes as <0xNN>."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{b:02X}>": 3 + b for b in range(256)}
    vocab |= {t: 259 + i for i, t in enumerate(["▁", *"abcdeité", "▁a", "▁▁", "it", "▁it"])}
    merges = [("▁", "a"), ("▁", "▁"), ("i", "t"), ("▁", "it")]
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tok.add_special_tokens(["<unk>", "<s>", "</s>"])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tok


def hf_folders() -> dict[str, dict[str, Any]]:
    """What a folder may hold: arguments of PreTrainedTokenizerFast."""
    strip = AddedToken("<mask>", lstrip=True, rstrip=True, special=True, normalized=False)
    plain = small_byte_level(["<s>", "</s>", strip, AddedToken("é¡ ÿ", special=False)])
    with_bos = small_byte_level(["<s>", "</s>"])
    with_bos.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(t, with_bos.token_to_id(t)) for t in ("<s>", "</s>")],
    )
    truncating = small_byte_level(["<s>", "</s>"])
    truncating.enable_truncation(3)
    truncating.enable_padding(length=9, pad_id=5)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return {
        "plain": {"tokenizer_object": plain, **named},
        "post-processor": {"tokenizer_object": with_bos, **named},
        "add_bos": {"tokenizer_object": plain, **named, "add_bos_token": True},
        "no_bos": {"tokenizer_object": with_bos, **named, "add_bos_token": False},
        "add_eos": {"tokenizer_object": plain, **named, "add_eos_token": True},
        "bos without token": {"tokenizer_object": plain, "add_bos_token": True},
        "sentencepiece": {"tokenizer_object": small_sentencepiece(), **named, "unk_token": "<unk>"},
        "extra tokens": {
            "tokenizer_object": plain,
            **named,
            "pad_token": "<pad>",
            "extra_special_tokens": ["<|one|>", "<|two|>"],
        },
    }


@pytest.fixture(scope="module", params=hf_folders().keys())
def hf_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(**hf_folders()[request.param]).save_pretrained(folder)
    return Tokenizer.from_file(folder), PreTrainedTokenizerFast.from_pretrained(folder)


def test_hf_folder_ids_equal_transformers(
    hf_pair: tuple[Tokenizer, PreTrainedTokenizerFast],
) -> None:
    ours, theirs = hf_pair
    for text in [*TEXTS.values(), "a <mask> b", "<|one|><pad>it's<|two|>", "<s>é¡ ÿ</s>", " it"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False)
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "bos_token"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.vocab_size == len(theirs)
    assert set(ours.all_special_ids) == set(theirs.all_special_ids) | {
        id for id, token in theirs.added_tokens_decoder.items() if token.special
    }


@settings(quick, max_examples=100)
@given(data=st.data())
def test_hf_folder_decode_equals_transformers_random_ids(
    hf_pair: tuple[Tokenizer, PreTrainedTokenizerFast], data: st.DataObject
) -> None:
    ours, theirs = hf_pair
    ids = data.draw(st.lists(st.integers(0, len(theirs) + 5), max_size=20))
    for skip in (False, True):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_hf_folder_truncation_in_the_file_is_not_applied(tmp_path: Path) -> None:
    tok = small_byte_level(["<s>", "</s>"])
    expected = tok.encode(TEXTS["english"]).ids
    tok.enable_truncation(3)
    tok.enable_padding(length=200)
    tok.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_file(tmp_path).encode(TEXTS["english"]) == expected


def test_hf_folder_stop_ids_and_templates(tmp_path: Path) -> None:
    small_byte_level(["<s>", "</s>", "<|eot|>"]).save(str(tmp_path / "tokenizer.json"))
    bare = Tokenizer.from_file(tmp_path)
    assert (bare.stop_token_ids, bare.bos_token_id, bare.chat_template) == ((), None, None)

    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_file(tmp_path).stop_token_ids == (7,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.stop_token_ids == (8, 9, tokenizer.eos_token_id)
    assert tokenizer.eos_token == "</s>"

    templates = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Tokenizer.from_file(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "J"


def test_from_file_takes_folders_files_and_names_what_is_missing(
    tmp_path: Path, smollm2_gguf: Path, smollm2: Tokenizer
) -> None:
    assert Tokenizer.from_file(smollm2_gguf).encode("hi there") == smollm2.encode("hi there")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tekken\.json"):
        Tokenizer.from_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Tokenizer.from_file(tmp_path / "absent.gguf")


# --- the class -------------------------------------------------------------------------------


def test_call_pads_on_the_left(smollm2: Tokenizer, smollm2_hf: PreTrainedTokenizerFast) -> None:
    texts = ["The solar system", "a", ""]
    smollm2_hf.padding_side = "left"
    expected = smollm2_hf(texts, padding=True, return_tensors="pt")
    batch = smollm2(texts, padding=True, return_tensors="pt").to("cpu")
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert batch.input_ids.dtype == batch.attention_mask.dtype == torch.int64
    assert {**smollm2(texts)} == {**smollm2_hf(texts, return_token_type_ids=False)}
    assert smollm2("a b").input_ids == smollm2.encode("a b")
    assert smollm2(texts[:1], return_tensors="pt").input_ids.shape == (1, 3)
    with pytest.raises(ValueError, match="padding=True"):
        smollm2(texts, return_tensors="pt")
    with pytest.raises(ValueError, match="neither a pad nor an EOS"):
        tiny(eos_token_id=None)(["a", "ab"], padding=True)
    with pytest.raises(AttributeError):
        _ = batch.token_type_ids


def test_encode_and_decode_argument_forms(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("our solar system")
    tensor = smollm2.encode("our solar system", return_tensors="pt")
    assert tensor.dtype == torch.int64 and tensor.tolist() == [ids]
    assert smollm2.decode(tensor[0]) == smollm2.decode(ids) == "our solar system"
    assert smollm2.decode(ids[0]) == smollm2.decode(tensor[0, 0]) == "our"
    assert smollm2.batch_decode(tensor) == smollm2.batch_decode([ids]) == ["our solar system"]
    assert smollm2.decode([]) == smollm2.decode([10**6]) == ""
    assert smollm2.convert_tokens_to_ids(["our", "no such token"]) == [ids[0], 0]
    assert smollm2.convert_tokens_to_ids("our") == ids[0]
    assert smollm2.convert_ids_to_tokens(ids) == ["our", "Ġsolar", "Ġsystem"]
    assert smollm2.convert_ids_to_tokens(10**6) is None
    assert len(smollm2) == smollm2.vocab_size == 49152
    for call, error, message in [
        (lambda: smollm2.encode(b"x"), TypeError, "text must be a str, got bytes"),
        (lambda: smollm2(["x", 1]), TypeError, "text must be a str, got int"),
        (lambda: smollm2.encode("\ud800"), ValueError, "not valid Unicode"),
        (lambda: smollm2.encode("x", return_tensors="np"), ValueError, "'np'"),
        (lambda: smollm2.decode([-1]), ValueError, "got -1"),
        (lambda: smollm2.decode([1 << 32]), ValueError, "got 4294967296"),
        (lambda: smollm2.decode(tensor), TypeError, "flat list"),
        (lambda: smollm2.decode([1.5]), TypeError, "float"),
    ]:
        with pytest.raises(error, match=message):
            call()


# --- streaming -------------------------------------------------------------------------------


def check_stream(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    decoder = tokenizer.stream_decoder(skip_special_tokens=skip)
    for _ in range(2):  # flush starts afresh
        pieces = [decoder.push(id) for id in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids, skip)


@quick
@given(ids=st.lists(st.one_of(st.integers(0, 16), st.integers(17, 300), st.integers(0, 49200))))
def test_stream_decoder_concatenates_to_decode(smollm2: Tokenizer, ids: list[int]) -> None:
    check_stream(smollm2, ids, False)
    check_stream(smollm2, ids, True)


@settings(quick, max_examples=100)
@given(data=st.data())
def test_stream_decoder_concatenates_to_decode_hf(
    hf_pair: tuple[Tokenizer, PreTrainedTokenizerFast], data: st.DataObject
) -> None:
    tokenizer, _ = hf_pair
    last = tokenizer.vocab_size - 1
    near_end = st.integers(max(0, last - 15), last)
    ids = data.draw(st.lists(st.one_of(st.integers(0, 3), near_end, st.integers(0, last))))
    check_stream(tokenizer, ids, False)
    check_stream(tokenizer, ids, True)


def test_stream_decoder_keeps_spaces_and_byte_runs_of_sentencepiece(tmp_path: Path) -> None:
    small_sentencepiece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_file(tmp_path)
    a, b, it, no_token = [*tokenizer.convert_tokens_to_ids(["▁a", "b", "▁it"]), 999]
    first, second = (3 + byte for byte in "ñ".encode())
    decoder = tokenizer.stream_decoder(skip_special_tokens=True)
    ids = [1, a, no_token, it, first, 1, second, b, first, b]
    pieces = ["", "a", "", " it", "", "", "", "ñb", "", "\ufffdb"]
    assert [decoder.push(id) for id in ids] == pieces
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(pieces)


@pytest.mark.parametrize("name", TEXTS)
def test_stream_decoder_emits_whole_characters_at_once(tekken: Tokenizer, name: str) -> None:
    decoder, shown, sent = tekken.stream_decoder(), "", b""
    for id in tekken.encode(TEXTS[name], add_special_tokens=False):
        sent += byte_level.decode_chars(str(tekken.convert_ids_to_tokens(id)))
        shown += decoder.push(id)
        # All complete characters so far, and nothing else.
        assert shown == sent.decode("utf-8", "ignore")
    assert decoder.flush() == "" and shown == TEXTS[name]


def test_stream_decoder_ends_with_a_replacement_for_half_a_character(tekken: Tokenizer) -> None:
    decoder = tekken.stream_decoder()
    first, second = (1000 + byte for byte in "é".encode())
    assert [decoder.push(first), decoder.push(second), decoder.push(first)] == ["", "é", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.push(second) == "\ufffd"


# --- chat templates --------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief — 简短."},
    {"role": "user", "content": "Say <|im_end|> twice\n"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": ""},
]


@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[:1], []], ids=len)
@pytest.mark.parametrize("prompt", [True, False])
def test_chat_template_equals_transformers(
    smollm2: Tokenizer, smollm2_hf: PreTrainedTokenizerFast, messages: list[Any], prompt: bool
) -> None:
    text = smollm2.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    if messages:  # transformers refuses an empty conversation
        assert text == smollm2_hf.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False
        )
    ids = smollm2.apply_chat_template(messages, add_generation_prompt=prompt)
    assert ids == smollm2_hf.encode(text, add_special_tokens=False)
    tensor = smollm2.apply_chat_template(messages, prompt, return_tensors="pt")
    assert tensor.tolist() == [ids]


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{% if tools %}{{ tools|tojson }}{% endif %}",
        "{%- for m in messages %}\n    {{- m.content | trim }}\n{%- endfor %}\n"
        "  {% if 1 %}\nx\n{% endif %}",
        "{{ messages | tojson(indent=2) }}{{ {'b': '<é>', 'a': 1} | tojson(sort_keys=true) }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
        "{{ ns.n }}{{ '-' * 20 }}{{ extra }}{{ strftime_now('%Y') | length }}{{ undefined_name }}",
    ],
)
def test_chat_template_helpers_equal_transformers(
    smollm2_hf: PreTrainedTokenizerFast, template: str
) -> None:
    tokenizer = tiny()
    tokenizer.chat_template = template
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>"}}]
    expected = PreTrainedTokenizerFast(
        tokenizer_object=smollm2_hf.backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=None,
    ).apply_chat_template(*(CHAT,), chat_template=template, tools=tools, extra="E", tokenize=False)
    got = tokenizer.apply_chat_template(CHAT, False, tokenize=False, tools=tools, extra="E")
    assert got == expected


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{% for %}", "chat template"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|__class__"),
        ("{{ messages.append({}) }}", "unsafe|not safely callable"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe|__init__"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ 'a' * 100000000000 }}", "too large"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "too large"),
        ("{{ range(10000000000) | list }}", "too big"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "stopped after",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n-1), f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "stopped after",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_chat_template_mistakes_and_attacks_are_value_errors(
    monkeypatch: pytest.MonkeyPatch, template: str, words: str
) -> None:
    monkeypatch.setattr("minitron_kernels.loaders.chat_template._MAX_STEPS", 200_000)
    tokenizer = tiny()
    tokenizer.chat_template = template
    trace = sys.gettrace()
    with pytest.raises(ValueError, match=rf"tiny\.gguf.*({words})"):
        tokenizer.apply_chat_template(CHAT)
    assert sys.gettrace() is trace


def test_chat_template_arguments() -> None:
    with pytest.raises(ValueError, match=r"tiny\.gguf has no chat template"):
        tiny().apply_chat_template(CHAT)
    tokenizer = tiny()
    tokenizer.chat_template = "x"
    for messages in ("hi", CHAT[0], ["hi"]):
        with pytest.raises(TypeError, match="messages must be a list"):
            tokenizer.apply_chat_template(messages)  # type: ignore[arg-type]
