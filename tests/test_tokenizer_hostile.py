"""Damaged and hostile tokenizer files: a ValueError naming file and field, never a crash."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels.loaders.tokenizer import Tokenizer
from tests.test_tokenizer import (
    quick,
    small_byte_level,
    small_sentencepiece,
    tiny,
    tiny_metadata,
)


def tokens_with(index: int, value: Any) -> list[Any]:
    tokens = tiny_metadata()["tokenizer.ggml.tokens"]
    tokens[index] = value
    return tokens


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": None}, r"ggml\.model is missing"),
        ({"model": 3}, r"ggml\.model must be str, got int"),
        ({"pre": 3}, r"ggml\.pre must be str"),
        ({"tokens": None}, r"ggml\.tokens is missing"),
        ({"tokens": "abc"}, r"ggml\.tokens must be list, got str"),
        ({"tokens": tokens_with(7, 7)}, r"ggml\.tokens\[7\] must be str, got int"),
        ({"tokens": tokens_with(98, "a")}, r"ggml\.tokens\[98\] repeats 'a'"),
        ({"token_type": [1, 1]}, r"ggml\.token_type has 2 entries, for 264 tokens"),
        ({"token_type": ["1"] * 264}, r"ggml\.token_type\[0\] must be int"),
        ({"merges": None}, r"ggml\.merges is missing"),
        ({"merges": [1]}, r"ggml\.merges\[0\] must be str"),
        ({"merges": ["a b", "b c"]}, r"ggml\.merges\[1\] is 'b c'"),
        ({"merges": ["nope a"]}, r"ggml\.merges\[0\] is 'nope a'"),
        ({"merges": [""]}, r"ggml\.merges\[0\] is ''"),
        ({"merges": ["ab"]}, r"ggml\.merges\[0\] is 'ab'"),
        ({"bos_token_id": 264}, r"ggml\.bos_token_id is 264, but there are 264 tokens"),
        ({"padding_token_id": -1}, r"ggml\.padding_token_id is -1"),
        ({"unknown_token_id": "0"}, r"ggml\.unknown_token_id must be int"),
        ({"eos_token_id": True}, r"ggml\.eos_token_id must be int, got bool"),
        ({"add_bos_token": 1}, r"ggml\.add_bos_token must be bool"),
        ({"bos_token_id": None}, r"ggml\.bos_token_id is missing"),
        ({"eos_token_id": None, "add_eos_token": True}, r"ggml\.eos_token_id is missing"),
    ],
)
def test_gguf_malformed_metadata_names_file_and_key(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^tiny\.gguf: tokenizer\." + words):
        tiny(**changes)


@pytest.mark.parametrize(
    "changes, words",
    [({"model": "llama"}, "model is 'llama'"), ({"pre": "falcon"}, "pre is 'falcon'.*tekken")],
)
def test_gguf_other_tokenizers_are_not_implemented(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotImplementedError, match=words):
        tiny(**changes)


json_value = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just("abc")
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(quick, max_examples=500)
@given(data=st.data())
def test_gguf_any_metadata_loads_or_is_refused(data: st.DataObject) -> None:
    metadata = tiny_metadata()
    for key in data.draw(st.sets(st.sampled_from(sorted(metadata)), max_size=3)):
        if isinstance(metadata[key], list) and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(metadata[key]) - 1))
            metadata[key][at] = data.draw(json_value)
        else:
            metadata[key] = data.draw(json_value)
    try:
        tokenizer = Tokenizer.from_gguf(metadata, "tiny.gguf")
    except (ValueError, NotImplementedError) as error:
        assert "tiny.gguf: tokenizer.ggml." in str(error)
    else:
        tokenizer.decode(tokenizer.encode("abc <s>"))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": 1}', b'{"version": "1.0"}'],
    ids=repr,
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tekken.json"])
def test_malformed_json_files_are_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / name))):
        Tokenizer.from_file(tmp_path)


@settings(quick, max_examples=200)
@given(data=st.data())
def test_any_tokenizer_json_loads_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Mutations of a valid file: replace what stands at a random path, or drop it."""
    content = json.loads(small_sentencepiece().to_str())
    node: Any = content
    while True:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        inner = node[key]
        if isinstance(inner, (dict, list)) and inner and data.draw(st.booleans()):
            node = inner
            continue
        node[key] = data.draw(json_value)
        break
    path = tmp_path_factory.mktemp("mutated") / "tokenizer.json"
    path.write_text(json.dumps(content))
    try:
        tokenizer = Tokenizer.from_file(path)
        tokenizer.decode(tokenizer.encode("a it<s>é", return_tensors=None))
    except ValueError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token must be a string"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be bool"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be str"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', "decoder must be dict"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": 3}}', r"decoder\['5'\]"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"5": {"content": "<s>"}}}',
            r"decoder\['5'\] is '<s>', whose id in tokenizer.json",
        ),
        ("tokenizer_config.json", '{"extra_special_tokens": "x"}', "extra_special_tokens must be"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id must hold token ids"),
        ("generation_config.json", '{"eos_token_id": [-2]}', "eos_token_id must hold token ids"),
        ("special_tokens_map.json", "{", "not valid JSON"),
    ],
)
def test_malformed_side_files_are_refused(
    tmp_path: Path, file: str, content: str, words: str
) -> None:
    small_byte_level(["<s>", "</s>"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / file))}.*{words}"):
        Tokenizer.from_file(tmp_path)


def tekken_data() -> dict[str, Any]:
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"abc"]
    return {
        "config": {
            "pattern": r"\w+|\W",
            "default_vocab_size": 268,
            "default_num_special_tokens": 10,
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)
        ],
        "special_tokens": [{"rank": i, "token_str": t} for i, t in enumerate(["<unk>", "<s>"])],
    }


def test_tekken_small_file_with_its_own_specials(tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tekken_data()))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.encode("abc ab<SPECIAL_9>") == [1, 267, 42, 266, 9]
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (None, 268)


@pytest.mark.parametrize(
    "path, value, words",
    [
        (("config",), None, "config is missing"),
        (("config", "pattern"), 3, "config: pattern must be str"),
        (("config", "pattern"), "(", "cannot build the tokenizer"),
        (("config", "default_vocab_size"), 10**12, "do not fit a vocab of 258 entries"),
        (("config", "default_vocab_size"), 5, "do not fit"),
        (("config", "default_num_special_tokens"), -5, "do not fit"),
        (("config", "default_num_special_tokens"), True, "must be int, got bool"),
        (("vocab",), {}, "vocab must be list"),
        (("vocab", 3), 3, r"vocab\[3\]"),
        (("vocab", 3, "token_bytes"), "%%%", r"vocab\[3\]"),
        (("vocab", 3, "token_bytes"), "", r"vocab\[3\] is out of order"),
        (("vocab", 3, "rank"), 9, r"vocab\[3\] is out of order"),
        (("vocab", 3, "token_bytes"), "AA==", r"vocab\[3\] repeats the bytes of rank 0"),
        (("special_tokens", 1, "rank"), 10, r"special_tokens\[1\] needs a 'rank' below 10"),
        (("special_tokens", 1, "token_str"), None, r"special_tokens\[1\]"),
        (("special_tokens", 1, "token_str"), "<unk>", "special_tokens repeat"),
        (("special_tokens", 1, "token_str"), "abc", "special_tokens repeat"),
    ],
)
def test_tekken_malformed_file_names_field(
    tmp_path: Path, path: tuple[Any, ...], value: Any, words: str
) -> None:
    data = tekken_data()
    node: Any = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file = tmp_path / "tekken.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}: .*{words}"):
        Tokenizer.from_file(file)
