"""Byte-level BPE: GPT-2's alphabet of bytes, llama.cpp's rules for it, and how to build one.

The pre-tokenizer expressions are llama.cpp's, even where they differ from the model's own
tokenizer.json: its tekken tells upper from lower case in ASCII only, and knows no marks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers


def _byte_alphabet() -> str:
    """GPT-2's printable stand-in for each byte 0..255, as a string indexed by the byte.

    Printable Latin-1 stands for itself; the other 68 bytes take U+0100 and up, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


_CHAR_OF_BYTE = _byte_alphabet()
_BYTE_OF_CHAR = {char: byte for byte, char in enumerate(_CHAR_OF_BYTE)}


def encode_bytes(data: bytes) -> str:
    """Bytes -> the text of the byte-level token."""
    # Latin-1 maps byte b to U+00bb, which `translate` looks up by position in the alphabet.
    return data.decode("latin-1").translate(_CHAR_OF_BYTE)


def decode_chars(token: str) -> bytes:
    """Text of a byte-level token -> bytes; text outside the alphabet stands for its own UTF-8."""
    try:
        return bytes(map(_BYTE_OF_CHAR.__getitem__, token))
    except KeyError:
        return token.encode()


class PreTokenizer(NamedTuple):
    """What llama.cpp (src/llama-vocab.cpp) derives from `tokenizer.ggml.pre`."""

    splits: tuple[str, ...]  # each splits every piece that the one before left
    ignore_merges: bool = False  # a piece that is a token is taken whole, whatever the merges say
    add_bos: bool = False  # where the file has no add_bos_token


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _SPACE
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))*((?=[\p{L}])([^A-Z]))+"
    r"|[^\r\n\p{L}\p{N}]?((?=[\p{L}])([^a-z]))+((?=[\p{L}])([^A-Z]))*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _SPACE
)

PRE_TOKENIZERS = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    "qwen2": PreTokenizer((_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
}

# llama.cpp recognises the tokens that end a generation by their text, and takes them for control
# tokens whatever the file says. The fill-in-the-middle pad, repository and file marks are among
# them.
END_OF_GENERATION = {
    *("</s>", "<eos>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>"),
    *("<EOT>", "_<EOT>", "[EOT]", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
}


@contextmanager
def rust_errors_as_value_error(what: str) -> Iterator[None]:
    """Turn any error of the Rust library, panics included, into a ValueError that says `what`."""
    try:
        yield
    except BaseException as error:
        # A Rust panic arrives as pyo3's PanicException, which is not an Exception.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{what}: {error}") from error
        raise


def parse_merges(lines: list[str], vocab: Mapping[str, int], field: str) -> list[tuple[str, str]]:
    """GGUF merges ("left right") as pairs; the first of equal ones counts.

    Raises ValueError, naming `field` and the index, unless left, right and left + right are tokens.
    """
    pairs: dict[tuple[str, str], None] = {}
    for index, line in enumerate(lines):
        cut = line.find(" ", 1)
        left, right = line[:cut], line[cut + 1 :]
        if cut < 0 or not (left in vocab and right in vocab and left + right in vocab):
            raise ValueError(f"{field}[{index}] is {line!r}: not two tokens that make a third")
        pairs[left, right] = None
    return list(pairs)


def merges_from_ranks(tokens: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """BPE merges equivalent to tiktoken's ranks; `tokens` in rank order.

    tiktoken joins the two neighbours whose concatenation is the token of lowest rank, whichever
    way that token splits. So every split into two tokens is a merge, and their order is the rank's.
    """
    text = {token: encode_bytes(token) for token in tokens}
    return [
        (text[left], text[right])
        for token in tokens
        for cut in range(1, len(token))
        if (left := token[:cut]) in text and (right := token[cut:]) in text
    ]


def build(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    splits: Sequence[str],
    ignore_merges: bool,
    source: str,
) -> tokenizers.Tokenizer:
    """The byte-level BPE tokenizer; raises ValueError (naming `source`) where they do not fit."""
    with rust_errors_as_value_error(f"{source}: cannot build the tokenizer"):
        tok = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore_merges))
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated") for split in splits]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tok.decoder = decoders.ByteLevel()
    return tok
