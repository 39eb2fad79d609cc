"""Tokenizers: tokenizer.json folders, GGUF metadata and Mistral's tekken.json, behind one class.

All three end up in the Rust `tokenizers` library. What differs is who defines the right answer:
transformers for a Hugging Face folder, llama.cpp for GGUF, mistral-common for tekken.json.

One known difference from llama.cpp: where the texts of two control tokens *overlap* in a prompt,
llama.cpp gives the longer one precedence, this library the one further left. The vocabularies of
the models here have no such pair.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import tokenizers
from tokenizers import AddedToken

from minitron_kernels.loaders import byte_level
from minitron_kernels.loaders.hub import is_nemo
from minitron_kernels.loaders.stream_decoder import (
    ByteStreamDecoder,
    StreamDecoder,
    WindowStreamDecoder,
)

if TYPE_CHECKING:
    import torch

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_LITERAL_TYPES = (_UNKNOWN, _CONTROL, _USER_DEFINED)  # text as it stands
_TEXT_TYPES = (_NORMAL, _BYTE)  # text in the byte-level alphabet
_GGUF = "tokenizer.ggml"

# mistral-common's names for the first specials of tekken files that do not list their own.
_TEKKEN_SPECIALS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)

# --- small helpers ---------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _read_json_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_optional_json(path: Path) -> dict[str, Any]:
    return _read_json_object(path) if path.is_file() else {}


def _field(mapping: Mapping[str, Any], key: str, kind: type, source: str) -> Any:
    """`mapping[key]` checked to be of `kind`, or None when the key is absent or null."""
    value = mapping.get(key)
    # bool is an int in Python, but an id or a size written as `true` is a mistake.
    if value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        return value
    raise ValueError(f"{source}: {key} must be {kind.__name__}, got {type(value).__name__}")


def _required(mapping: Mapping[str, Any], key: str, kind: type, source: str) -> Any:
    value = _field(mapping, key, kind, source)
    if value is None:
        raise ValueError(f"{source}: {key} is missing")
    return value


def _list_of(mapping: Mapping[str, Any], key: str, kind: type, source: str) -> list[Any]:
    values: list[Any] = _required(mapping, key, list, source)
    for index, value in enumerate(values):
        if type(value) is not kind:
            got = type(value).__name__
            raise ValueError(f"{source}: {key}[{index}] must be {kind.__name__}, got {got}")
    return values


# --- results ---------------------------------------------------------------------------------


class BatchEncoding(dict[str, Any]):
    """`{"input_ids": ..., "attention_mask": ...}`, also readable as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: torch.device | str) -> BatchEncoding:
        """A copy whose tensors are on `device`; lists stay as they are."""
        moved = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.items()}
        return BatchEncoding(moved)


# --- the tokenizer ---------------------------------------------------------------------------


class Tokenizer:
    """Text <-> token ids, with the rules of where the vocabulary came from.

    Build it with `from_file`, `from_gguf` or `from_tekken`. The text of a control token inside a
    prompt maps to its id, as in transformers and llama.cpp's command line.

    Attributes:
        source: the file or folder, for messages.
        bos_token_id, eos_token_id, unk_token_id, pad_token_id: ids, or None where undefined.
        stop_token_ids: every id that ends a generation, sorted: end of text, end of turn.
        add_bos, add_eos: whether `encode` adds those by default; None means that the
            post-processor inside tokenizer.json decides.
        chat_template: Jinja2 source, or None.
    """

    def __init__(
        self,
        tok: tokenizers.Tokenizer,
        source: str,
        *,
        special_ids: Mapping[str, int],
        stop_token_ids: Iterable[int] = (),
        add_bos: bool | None = None,
        add_eos: bool | None = None,
        chat_template: str | None = None,
        literal_bytes: Mapping[int, bytes] | None = None,
    ) -> None:
        """Use the class methods; `literal_bytes` are ids whose text is not byte-level."""
        self._tok = tok
        self.source = source
        self.bos_token_id = special_ids.get("bos")
        self.eos_token_id = special_ids.get("eos")
        self.unk_token_id = special_ids.get("unk")
        self.pad_token_id = special_ids.get("pad")
        eos = () if self.eos_token_id is None else (self.eos_token_id,)
        self.stop_token_ids = tuple(sorted({*stop_token_ids, *eos}))
        self.add_bos, self.add_eos = add_bos, add_eos
        self.chat_template = chat_template
        self._skipped = frozenset(
            id for id, token in tok.get_added_tokens_decoder().items() if token.special
        )
        decoder = json.loads(tok.decoder.__getstate__()) if tok.decoder is not None else {}
        steps = decoder.get("decoders", [decoder])
        self._is_byte_level = [step.get("type") for step in steps] == ["ByteLevel"]
        self._bytes_of = dict(literal_bytes or {})  # and a cache of the ids decoded so far

    # -- loading --

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Load a folder with tokenizer.json or tekken.json, either file, a .gguf or a .nemo file.

        Beside tokenizer.json these are read where present: tokenizer_config.json,
        special_tokens_map.json, chat_template.jinja, generation_config.json, config.json.

        Raises:
            FileNotFoundError: no such file, or no tokenizer in the folder.
            ValueError: the file is malformed; names file and field.
            NotImplementedError: a GGUF tokenizer of another kind.
        """
        path = Path(path)
        if is_nemo(path):
            from minitron_kernels.loaders.nemo import read_tokenizer

            return read_tokenizer(path)
        if path.is_dir():
            for name in ("tokenizer.json", "tekken.json"):
                if (path / name).is_file():
                    return cls.from_file(path / name)
            raise FileNotFoundError(f"{path}: holds neither tokenizer.json nor tekken.json")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder")
        if path.suffix == ".gguf":
            from minitron_kernels.loaders.gguf_file import GGUFFile, part_paths

            return cls.from_gguf(GGUFFile(part_paths(path)[0]).metadata, str(path))
        if "tekken" in path.name:
            return cls.from_tekken(path)
        return cls._from_tokenizer_json(path)

    @classmethod
    def _from_tokenizer_json(cls, path: Path) -> Tokenizer:
        """The rules of transformers' PreTrainedTokenizerFast, over the same files."""
        text = _read_text(path)
        with byte_level.rust_errors_as_value_error(f"{path}: not a valid tokenizer.json"):
            tok = tokenizers.Tokenizer.from_str(text)
            tok.no_padding()
            tok.no_truncation()

        folder = path.parent
        config_path = folder / "tokenizer_config.json"
        config = _read_optional_json(config_path)
        special_tokens = {**_read_optional_json(folder / "special_tokens_map.json"), **config}
        _add_configured_tokens(tok, special_tokens, str(config_path))

        special_ids: dict[str, int] = {}
        for name in ("bos", "eos", "unk", "pad"):
            key = f"{name}_token"
            content = _token_content(special_tokens.get(key), key, str(config_path))
            if content and (id := tok.token_to_id(content)) is not None:
                special_ids[name] = id

        add_bos = _field(config, "add_bos_token", bool, str(config_path))
        add_eos = _field(config, "add_eos_token", bool, str(config_path))
        if add_bos is not None or add_eos is not None:  # either replaces the post-processor
            add_bos = bool(add_bos) and "bos" in special_ids
            add_eos = bool(add_eos) and "eos" in special_ids

        return cls(
            tok,
            str(path),
            special_ids=special_ids,
            stop_token_ids=_model_stop_ids(folder),
            add_bos=add_bos,
            add_eos=add_eos,
            chat_template=_folder_chat_template(folder, config),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], source: str) -> Tokenizer:
        """Build from GGUF metadata (`tokenizer.ggml.*`) with llama.cpp's rules.

        `tokenizer.ggml.model` must be gpt2 (byte-level BPE) with a `pre` of default, gpt-2,
        smollm, qwen2, llama-bpe or tekken. Unlike llama.cpp, a file that asks for BOS or EOS but
        names no such token is refused (llama.cpp assumes id 11).

        Raises:
            ValueError: a key is missing, of the wrong type, or contradicts the vocabulary.
            NotImplementedError: another model or pre-tokenizer.
        """
        model = _required(metadata, f"{_GGUF}.model", str, source)
        if model != "gpt2":
            raise NotImplementedError(
                f"{source}: {_GGUF}.model is {model!r}; only 'gpt2' (byte-level BPE) is supported"
            )
        pre_name = _field(metadata, f"{_GGUF}.pre", str, source) or "default"
        pre = byte_level.PRE_TOKENIZERS.get(pre_name)
        if pre is None:
            raise NotImplementedError(
                f"{source}: {_GGUF}.pre is {pre_name!r}; supported are "
                f"{', '.join(byte_level.PRE_TOKENIZERS)}"
            )
        vocab, types = _gguf_vocab(metadata, source)
        merges = byte_level.parse_merges(
            _list_of(metadata, f"{_GGUF}.merges", str, source), vocab, f"{source}: {_GGUF}.merges"
        )
        special_ids = _gguf_special_ids(metadata, len(vocab), source)
        add_bos = _field(metadata, f"{_GGUF}.add_bos_token", bool, source)
        add_bos = pre.add_bos if add_bos is None else add_bos
        add_eos = bool(_field(metadata, f"{_GGUF}.add_eos_token", bool, source))
        for name, wanted in (("bos", add_bos), ("eos", add_eos)):
            if wanted and name not in special_ids:
                raise ValueError(f"{source}: {_GGUF}.{name}_token_id is missing, but it is added")

        stops = {vocab[text] for text in byte_level.END_OF_GENERATION & vocab.keys()}
        for id in stops:
            types[id] = _CONTROL
        stops |= {special_ids[name] for name in ("eot", "eom") if name in special_ids}

        tok = byte_level.build(vocab, merges, pre.splits, pre.ignore_merges, source)
        # llama.cpp finds these texts in a prompt, and prints them as they stand; it prints unused
        # tokens as nothing.
        texts = list(vocab)
        unusual = [id for id, type in enumerate(types) if type != _NORMAL]
        literal = {texts[id]: id for id in unusual if types[id] in _LITERAL_TYPES}
        _add_tokens(
            tok,
            [
                AddedToken(text, special=types[id] != _USER_DEFINED, normalized=False)
                for text, id in literal.items()
            ],
        )
        literal_bytes = {id: b"" for id in unusual if types[id] not in _TEXT_TYPES}
        literal_bytes |= {id: text.encode() for text, id in literal.items()}
        return cls(
            tok,
            source,
            special_ids=special_ids,
            stop_token_ids=stops,
            add_bos=add_bos,
            add_eos=add_eos,
            chat_template=_field(metadata, "tokenizer.chat_template", str, source),
            literal_bytes=literal_bytes,
        )

    @classmethod
    def from_tekken(cls, path: str | Path) -> Tokenizer:
        """Load mistral-common's tekken.json: ids are the special tokens, then rank + their count.

        BOS is added by default. Raises ValueError (file and field) for a malformed file.
        """
        path = Path(path)
        source = str(path)
        data = _read_json_object(path)
        config = _required(data, "config", dict, source)
        in_config = f"{source}: config"
        pattern = _required(config, "pattern", str, in_config)
        vocab_size = _required(config, "default_vocab_size", int, in_config)
        num_special = _required(config, "default_num_special_tokens", int, in_config)
        entries = _required(data, "vocab", list, source)
        num_ranks = vocab_size - num_special
        if num_special < 3 or not 256 <= num_ranks <= len(entries):
            raise ValueError(
                f"{source}: default_vocab_size {vocab_size} and default_num_special_tokens "
                f"{num_special} do not fit a vocab of {len(entries)} entries"
            )
        ranks = _tekken_ranks(entries[:num_ranks], source)
        specials = _tekken_specials(data, num_special, source)

        vocab = {byte_level.encode_bytes(t): num_special + rank for t, rank in ranks.items()}
        vocab |= {token: id for id, token in enumerate(specials)}
        if len(vocab) != vocab_size:
            raise ValueError(f"{source}: special_tokens repeat texts of the vocabulary")
        tok = byte_level.build(vocab, byte_level.merges_from_ranks(ranks), [pattern], True, source)
        _add_tokens(tok, [AddedToken(token, special=True, normalized=False) for token in specials])
        names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
        special_ids = {n: specials.index(text) for n, text in names.items() if text in specials}
        return cls(
            tok,
            source,
            special_ids=special_ids,
            add_bos="bos" in special_ids,
            add_eos=False,
            literal_bytes={id: token.encode() for id, token in enumerate(specials)},
        )

    # -- properties --

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tok.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that `skip_special_tokens` leaves out, sorted."""
        return sorted(self._skipped)

    @property
    def bos_token(self) -> str | None:
        """Text of the BOS token."""
        return self._special_token(self.bos_token_id)

    @property
    def eos_token(self) -> str | None:
        """Text of the EOS token."""
        return self._special_token(self.eos_token_id)

    @property
    def unk_token(self) -> str | None:
        """Text of the unknown token."""
        return self._special_token(self.unk_token_id)

    @property
    def pad_token(self) -> str | None:
        """Text of the padding token."""
        return self._special_token(self.pad_token_id)

    def _special_token(self, id: int | None) -> str | None:
        return None if id is None else self._tok.id_to_token(id)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Id of each token text; for others the unknown token's id, or None."""
        if isinstance(tokens, str):
            id = self._tok.token_to_id(tokens)
            return self.unk_token_id if id is None else id
        return [self.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        """Token text of each id, as the vocabulary has it; None for ids it does not have."""
        if isinstance(ids, int):
            return self._tok.id_to_token(ids)
        return [self._tok.id_to_token(id) for id in _as_id_list(ids)]

    # -- text to ids --

    @overload
    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    @overload
    def encode(
        self, text: str, add_special_tokens: bool = ..., *, return_tensors: Literal["pt"]
    ) -> torch.Tensor: ...

    @overload
    def encode(
        self, text: str, add_special_tokens: bool = ..., return_tensors: str | None = ...
    ) -> list[int] | torch.Tensor: ...

    def encode(
        self, text: str, add_special_tokens: bool = True, return_tensors: str | None = None
    ) -> list[int] | torch.Tensor:
        """Token ids of `text`: list[int], or an int64 tensor [1, S] with return_tensors="pt".

        Raises TypeError if `text` is not a str, ValueError if it is not valid Unicode.
        """
        _check_return_tensors(return_tensors)
        ids = self._encode(text, add_special_tokens)
        if return_tensors is None:
            return ids
        import torch

        return torch.tensor([ids], dtype=torch.int64)

    def __call__(
        self,
        text: str | Sequence[str],
        add_special_tokens: bool = True,
        padding: bool = False,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """`input_ids` and `attention_mask` of one text or several.

        Lists per text (one flat list for a single str), or int64 tensors [B, S] with
        return_tensors="pt". `padding=True` pads on the left with the pad token (EOS where there is
        none); the mask is 0 there.

        Raises ValueError for tensors of unequal lengths without padding.
        """
        _check_return_tensors(return_tensors)
        texts = [text] if isinstance(text, str) else text
        rows = [self._encode(item, add_special_tokens) for item in texts]
        masks = [[1] * len(row) for row in rows]
        if padding:
            pad = self.eos_token_id if self.pad_token_id is None else self.pad_token_id
            if pad is None:
                raise ValueError(f"padding=True: {self.source} has neither a pad nor an EOS token")
            longest = max(map(len, rows), default=0)
            masks = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
            rows = [[pad] * (longest - len(row)) + row for row in rows]
        if return_tensors is None:
            if isinstance(text, str):
                return BatchEncoding(input_ids=rows[0], attention_mask=masks[0])
            return BatchEncoding(input_ids=rows, attention_mask=masks)
        if len({len(row) for row in rows}) > 1:
            raise ValueError(
                "return_tensors='pt' needs texts of equal token counts, got "
                f"{[len(row) for row in rows]}; pass padding=True"
            )
        import torch

        return BatchEncoding(
            input_ids=torch.tensor(rows, dtype=torch.int64),
            attention_mask=torch.tensor(masks, dtype=torch.int64),
        )

    def _encode(self, text: Any, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode: {error}") from error
        by_post_processor = add_special_tokens and self.add_bos is None
        with byte_level.rust_errors_as_value_error(f"{self.source}: cannot encode"):
            ids = self._tok.encode(text, add_special_tokens=by_post_processor).ids
        if add_special_tokens and self.add_bos and self.bos_token_id is not None:
            ids = [self.bos_token_id, *ids]
        if add_special_tokens and self.add_eos and self.eos_token_id is not None:
            ids = [*ids, self.eos_token_id]
        return ids

    # -- ids to text --

    def decode(
        self, token_ids: int | Sequence[int] | torch.Tensor, skip_special_tokens: bool = False
    ) -> str:
        """Text of one id, a list of ids or a 0-D or 1-D tensor.

        Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary (padding of the embedding
        matrix) decode to nothing. Raises ValueError for ids that are no unsigned 32-bit integers.
        """
        ids = _as_id_list(token_ids)
        if not self._is_byte_level:
            with byte_level.rust_errors_as_value_error(f"{self.source}: cannot decode"):
                return self._tok.decode(ids, skip_special_tokens=skip_special_tokens)
        to_bytes = self._token_bytes_shown if skip_special_tokens else self._token_bytes
        return b"".join(map(to_bytes, ids)).decode("utf-8", "replace")

    def batch_decode(
        self, sequences: Sequence[Any] | torch.Tensor, skip_special_tokens: bool = False
    ) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    def stream_decoder(self, skip_special_tokens: bool = False) -> StreamDecoder:
        """A decoder for tokens that arrive one by one; see `StreamDecoder`."""
        if self._is_byte_level:
            return ByteStreamDecoder(
                self._token_bytes_shown if skip_special_tokens else self._token_bytes
            )
        skipped = self._skipped if skip_special_tokens else ()
        return WindowStreamDecoder(self.decode, self._tok.id_to_token, skipped)

    def _token_bytes(self, id: int) -> bytes:
        data = self._bytes_of.get(id)
        if data is None:
            data = self._bytes_of[id] = byte_level.decode_chars(self._tok.id_to_token(id) or "")
        return data

    def _token_bytes_shown(self, id: int) -> bytes:
        return b"" if id in self._skipped else self._token_bytes(id)

    # -- chat --

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_tensors: str | None = None,
        **variables: Any,
    ) -> Any:
        """Render `messages` (each with "role" and "content") by the model's own chat template.

        Returns the ids (list[int], or int64 [1, S] with return_tensors="pt"), or the text when
        `tokenize` is False. The template writes its own BOS, so none is added. `variables`
        (`tools`, `documents`, ...) are handed to the template. It runs in a sandbox with a limit on
        the work it may do.

        Raises:
            TypeError: messages is not a list of mappings.
            ValueError: no chat template, or it fails; with the template's own words.
        """
        if self.chat_template is None:
            raise ValueError(f"{self.source} has no chat template")
        if isinstance(messages, Mapping) or not all(isinstance(m, Mapping) for m in messages):
            raise TypeError('messages must be a list of {"role": ..., "content": ...} mappings')
        from minitron_kernels.loaders import chat_template  # jinja2: 0.04 s of a start

        special_tokens = {
            name: text
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if (text := getattr(self, name)) is not None
        }
        try:
            text = chat_template.render(
                self.chat_template,
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None, **special_tokens, **variables},
            )
        except Exception as error:  # whatever a template does wrong is the file's fault
            raise ValueError(f"{self.source}: chat template: {error}") from error
        if not tokenize:
            return text
        return self.encode(text, add_special_tokens=False, return_tensors=return_tensors)


class AutoTokenizer:
    """Counterpart of transformers' class of this name."""

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> Tokenizer:
        """Load the tokenizer of a folder, .gguf file, Hub id or built-in name.

        What `source` may be, and errors, as in `minitron_kernels.loaders.hub.resolve`; further
        errors as in `Tokenizer.from_file`.
        """
        from minitron_kernels.loaders import hub

        return Tokenizer.from_file(hub.resolve(source, revision))


# --- parts of the loaders --------------------------------------------------------------------


def _add_tokens(tok: tokenizers.Tokenizer, tokens: list[AddedToken]) -> None:
    """Register tokens; the library wants special and other ones separately."""
    tok.add_special_tokens([token for token in tokens if token.special])
    tok.add_tokens([token for token in tokens if not token.special])


def _token_content(value: Any, key: str, source: str) -> str | None:
    """Text of a special token in tokenizer_config.json: a string, or an object with "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise ValueError(f"{source}: {key} must be a string, got {type(value).__name__}")


def _add_configured_tokens(
    tok: tokenizers.Tokenizer, config: Mapping[str, Any], source: str
) -> None:
    """Add what tokenizer_config.json knows and tokenizer.json lacks, as transformers does."""
    declared = _field(config, "added_tokens_decoder", dict, source) or {}
    for id, entry in sorted(declared.items(), key=lambda item: (len(item[0]), item[0])):
        field = f"{source}: added_tokens_decoder[{id!r}]"
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str):
            raise ValueError(f"{field} must be an object with a string 'content'")
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        known = {flag: entry[flag] for flag in flags if isinstance(entry.get(flag), bool)}
        _add_tokens(tok, [AddedToken(content, **known)])
        actual = tok.token_to_id(content)
        if str(actual) != id:
            raise ValueError(f"{field} is {content!r}, whose id in tokenizer.json is {actual}")
    named = [
        _token_content(config.get(f"{name}_token"), f"{name}_token", source)
        for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
    ]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = config.get(key) or []
        if not isinstance(extra, (list, dict)):
            raise ValueError(f"{source}: {key} must be a list, got {type(extra).__name__}")
        extra = extra.values() if isinstance(extra, dict) else extra
        named += [_token_content(token, key, source) for token in extra]
    known_tokens = {token.content for token in tok.get_added_tokens_decoder().values()}
    _add_tokens(
        tok,
        [
            AddedToken(token, special=True, normalized=False)
            for token in dict.fromkeys(named)
            if token and token not in known_tokens
        ],
    )


def _model_stop_ids(folder: Path) -> list[int]:
    """`eos_token_id` (one or several) of generation_config.json, else of config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = _read_optional_json(folder / name).get("eos_token_id")
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if not all(type(id) is int and id >= 0 for id in ids):
            raise ValueError(f"{folder / name}: eos_token_id must hold token ids, got {ids}")
        return ids
    return []


def _folder_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's: a string, or named ones with a default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is None or isinstance(template, str):
        return template
    got = type(template).__name__
    raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template must be str, got {got}")


def _gguf_vocab(metadata: Mapping[str, Any], source: str) -> tuple[dict[str, int], list[int]]:
    """Token text -> id, and the type of each id."""
    tokens = _list_of(metadata, f"{_GGUF}.tokens", str, source)
    vocab = dict(zip(tokens, range(len(tokens)), strict=True))
    if len(vocab) != len(tokens) or "" in vocab:
        vocab = {}
        for id, token in enumerate(tokens):
            if vocab.setdefault(token or f"[EMPTY_{id}]", id) != id:
                raise ValueError(f"{source}: {_GGUF}.tokens[{id}] repeats {token!r}")
    types = [_NORMAL] * len(vocab)
    if f"{_GGUF}.token_type" in metadata:
        types = list(_list_of(metadata, f"{_GGUF}.token_type", int, source))
    if len(types) != len(vocab):
        raise ValueError(
            f"{source}: {_GGUF}.token_type has {len(types)} entries, for {len(vocab)} tokens"
        )
    return vocab, types


def _gguf_special_ids(metadata: Mapping[str, Any], num_tokens: int, source: str) -> dict[str, int]:
    """The ids that the file names, of bos, eos, eot, eom, unk and pad."""
    special_ids = {}
    in_file = {name: name for name in ("bos", "eos", "eot", "eom")}
    for name, name_in_file in (in_file | {"unk": "unknown", "pad": "padding"}).items():
        key = f"{_GGUF}.{name_in_file}_token_id"
        id = _field(metadata, key, int, source)
        if id is not None and not 0 <= id < num_tokens:
            raise ValueError(f"{source}: {key} is {id}, but there are {num_tokens} tokens")
        if id is not None:
            special_ids[name] = id
    return special_ids


def _tekken_ranks(entries: list[Any], source: str) -> dict[bytes, int]:
    """Token bytes -> rank; the entries must be in rank order, single bytes first."""
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(entries):
        field = f"{source}: vocab[{rank}]"
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
            entry_rank = entry["rank"]
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{field} needs 'rank' and base64 'token_bytes': {error!r}") from error
        if entry_rank != rank or not token or (rank < 256) != (len(token) == 1):
            raise ValueError(f"{field} is out of order: rank {entry_rank!r}, bytes {token!r}")
        if ranks.setdefault(token, rank) != rank:
            raise ValueError(f"{field} repeats the bytes of rank {ranks[token]}")
    return ranks


def _tekken_specials(data: Mapping[str, Any], count: int, source: str) -> list[str]:
    """The `count` special tokens in id order; ids without a name are <SPECIAL_n>."""
    entries = _field(data, "special_tokens", list, source)
    if entries is None:
        entries = [{"rank": id, "token_str": text} for id, text in enumerate(_TEKKEN_SPECIALS)]
    specials = [f"<SPECIAL_{id}>" for id in range(count)]
    for index, entry in enumerate(entries):
        id = entry.get("rank") if isinstance(entry, dict) else None
        text = entry.get("token_str") if isinstance(entry, dict) else None
        if type(id) is not int or not 0 <= id < count or not isinstance(text, str) or not text:
            raise ValueError(
                f"{source}: special_tokens[{index}] needs a 'rank' below {count} and a 'token_str'"
            )
        specials[id] = text
    return specials


def _as_id_list(token_ids: int | Sequence[int] | torch.Tensor) -> list[int]:
    if hasattr(token_ids, "tolist"):  # torch or numpy
        token_ids = token_ids.tolist()
    ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
    for id in ids:
        if not isinstance(id, int):
            raise TypeError(f"token_ids must be a flat list of int, got {type(id).__name__} in it")
        if not 0 <= id < 1 << 32:
            raise ValueError(f"token_ids must be at least 0 and below 2**32, got {id}")
    return ids


def _check_return_tensors(return_tensors: str | None) -> None:
    if return_tensors not in (None, "pt"):
        raise ValueError(f"return_tensors must be None or 'pt', got {return_tensors!r}")
