"""NeMo's .nemo archives, or the folder that one unpacks to: model_config.yaml, weights, tokenizer.

The weights are Megatron-Core's (`nemo_weights.py` has their forms): Q, K and V of a layer are one
tensor, gate and up another, and norms have the names of the product that follows them. What is not
split up is a view of the mapped file, inside the tar if that is not compressed; a compressed one is
unpacked to a temporary folder, which is removed as soon as its files are mapped.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron_kernels.config import ModelConfig
from minitron_kernels.loaders.checkpoint import (
    TORCH_DTYPES,
    FloatCheckpoint,
    TensorInfo,
    check_load,
    convert,
)
from minitron_kernels.loaders.nemo_archive import Member, opened
from minitron_kernels.loaders.nemo_weights import Stored, open_weights
from minitron_kernels.loaders.tokenizer import Tokenizer

CONFIG = "model_config.yaml"

_MAX_CONFIG_BYTES = 1 << 20
_MAX_TOKENIZER_BYTES = 256 << 20

_TYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class NemoCheckpoint(FloatCheckpoint):
    """A .nemo file, or the folder with its content (see Checkpoint).

    Raises OSError for a missing file, ValueError naming file and field for a damaged or hostile
    one, NotImplementedError for models and forms that are not read: other architectures than
    Llama's, pipeline-parallel ranks, compressed arrays.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with opened(self.path) as members:
            config = _read_config(members, self.path)
            ranks = open_weights(members, config, self.path)
            tokenizer = None
            with suppress(ValueError, OSError, NotImplementedError):
                tokenizer = _tokenizer(members, self.path)
        embedding = ranks[0].get("embedding.word_embeddings.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ValueError(
                f"{self.path}: tensor embedding.word_embeddings.weight is missing or not a matrix"
            )
        self.config = ModelConfig.from_nemo(
            config,
            vocab_size=embedding.shape[0] * len(ranks),
            dtype=str(embedding.dtype).removeprefix("torch."),
            bos_token_id=tokenizer.bos_token_id if tokenizer else None,
            eos_token_ids=tokenizer.stop_token_ids if tokenizer else (),
            source=f"{self.path}: {CONFIG}",
        )
        kv_heads = self.config.num_key_value_heads
        if kv_heads % len(ranks) or self.config.intermediate_size % len(ranks):
            raise NotImplementedError(
                f"{self.path}: {len(ranks)} ranks share a KV group or a column of the MLP "
                f"({kv_heads} groups, {self.config.intermediate_size} columns)"
            )
        self._ranks = ranks
        self._parts = {name: _part_of(name) for name in self.config.weight_shapes()}
        self.tensors = {
            name: self._describe(name, shape) for name, shape in self.config.weight_shapes().items()
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> NemoCheckpoint:
        """Itself: nothing in it changes, and copies of a model may share the mapped files."""
        return self

    def load(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See Checkpoint.load."""
        info = check_load(self, name, dtype)
        part = self._parts[name]
        ranks = self._ranks[:1] if part.axis is None else self._ranks
        pieces = [part.pick(self._find(rank, part.names).load(), self.config) for rank in ranks]
        stored = pieces[0] if len(pieces) == 1 else torch.cat(pieces, part.axis or 0)
        return convert(stored.contiguous(), dtype, info)

    def copies(self, name: str, dtype: torch.dtype) -> bool:
        """See Checkpoint.copies."""
        part = self._parts[name]
        joined = part.axis is not None and len(self._ranks) > 1
        is_view = self._find(self._ranks[0], part.names).is_view
        split = part.of_qkv and self.config.num_key_value_heads > 1
        is_converted = TORCH_DTYPES[self.tensors[name].type] != dtype
        return joined or split or not is_view or is_converted

    def _describe(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """The tensor under its Hugging Face name; the ranks' parts of it are checked."""
        part = self._parts[name]
        wanted = part.local_shape(self.config, len(self._ranks))
        kinds = set()
        for rank in self._ranks:
            stored = self._find(rank, part.names)
            if stored.shape != wanted:
                raise ValueError(
                    f"{self.path}: tensor {part.names[0]} has shape {list(stored.shape)}, the "
                    f"config asks for {list(wanted)}"
                )
            kinds.add(stored.dtype)
        if len(kinds) > 1 or (dtype := kinds.pop()) not in _TYPES:
            raise NotImplementedError(
                f"{self.path}: tensor {part.names[0]} is {dtype}, accepted: one of "
                f"{', '.join(_TYPES.values())}"
                if not kinds
                else f"{self.path}: tensor {part.names[0]} differs in type between ranks"
            )
        nbytes = math.prod(shape) * dtype.itemsize
        return TensorInfo(name, _TYPES[dtype], shape, nbytes, self.path)

    def _find(self, rank: Mapping[str, Stored], names: Sequence[str]) -> Stored:
        for name in names:
            if name in rank:
                return rank[name]
        raise ValueError(f"{self.path}: tensor {names[0]} is missing")


def _read_config(members: Mapping[str, Member], path: Path) -> dict[str, Any]:
    import yaml

    if CONFIG not in members:
        raise ValueError(f"{path}: {CONFIG} is missing; there: {', '.join(sorted(members)[:12])}")
    source = f"{path}: {CONFIG}"
    text = members[CONFIG].read(_MAX_CONFIG_BYTES, source)
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{source}: must hold a mapping, got {type(config).__name__}")
    return config


# ---- which rows of which tensor


@dataclass(frozen=True)
class _Part:
    """Where a weight lies: Megatron's names for the tensor, its local shape, the rows of it.

    ``axis`` is the one along which the ranks' parts are joined; None: every rank has all of it.
    """

    names: tuple[str, ...]
    axis: int | None
    local_shape: Callable[[ModelConfig, int], tuple[int, ...]]
    pick: Callable[[torch.Tensor, ModelConfig], torch.Tensor]
    of_qkv: bool = False


def _all(stored: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return stored


def _of_qkv(which: int) -> Callable[[torch.Tensor, ModelConfig], torch.Tensor]:
    """Rows of Q (0), K (1) or V (2): each KV group has its query heads, then its K, then its V."""

    def pick(stored: torch.Tensor, config: ModelConfig) -> torch.Tensor:
        queries = config.num_attention_heads // config.num_key_value_heads
        groups = stored.unflatten(0, (-1, queries + 2, config.head_dim))
        first, last = ((0, queries), (queries, queries + 1), (queries + 1, queries + 2))[which]
        return groups[:, first:last].flatten(0, 2)

    return pick


def _of_fc1(which: int) -> Callable[[torch.Tensor, ModelConfig], torch.Tensor]:
    """The gate (0) or up (1) half of the rows."""
    return lambda stored, config: stored.chunk(2)[which]


def _qkv_shape(config: ModelConfig, ranks: int) -> tuple[int, ...]:
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    return heads // ranks * config.head_dim, config.hidden_size


def _vector(config: ModelConfig, ranks: int) -> tuple[int, ...]:
    return (config.hidden_size,)


def _vocabulary(config: ModelConfig, ranks: int) -> tuple[int, ...]:
    return config.vocab_size // ranks, config.hidden_size


_GLOBAL_PARTS = {
    "model.embed_tokens": _Part(("embedding.word_embeddings.weight",), 0, _vocabulary, _all),
    "model.norm": _Part(("decoder.final_layernorm.weight",), None, _vector, _all),
    "lm_head": _Part(("output_layer.weight",), 0, _vocabulary, _all),
}
# The second name of a norm is that of models trained without Transformer Engine.
_LAYER_PARTS = {
    "input_layernorm": _Part(
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        None,
        _vector,
        _all,
    ),
    **{
        f"self_attn.{name}_proj": _Part(
            ("self_attention.linear_qkv.weight",), 0, _qkv_shape, _of_qkv(i), of_qkv=True
        )
        for i, name in enumerate("qkv")
    },
    "self_attn.o_proj": _Part(
        ("self_attention.linear_proj.weight",),
        1,
        lambda c, ranks: (c.hidden_size, c.num_attention_heads // ranks * c.head_dim),
        _all,
    ),
    "post_attention_layernorm": _Part(
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"), None, _vector, _all
    ),
    **{
        f"mlp.{name}_proj": _Part(
            ("mlp.linear_fc1.weight",),
            0,
            lambda c, ranks: (2 * (c.intermediate_size // ranks), c.hidden_size),
            _of_fc1(i),
        )
        for i, name in enumerate(("gate", "up"))
    },
    "mlp.down_proj": _Part(
        ("mlp.linear_fc2.weight",),
        1,
        lambda c, ranks: (c.hidden_size, c.intermediate_size // ranks),
        _all,
    ),
}


def _part_of(name: str) -> _Part:
    """Where the weight of this Hugging Face name lies."""
    module = name.removesuffix(".weight")
    if module in _GLOBAL_PARTS:
        return _GLOBAL_PARTS[module]
    _, _, layer, inner = module.split(".", 3)
    part = _LAYER_PARTS[inner]
    names = tuple(f"decoder.layers.{layer}.{each}" for each in part.names)
    return _Part(names, part.axis, part.local_shape, part.pick, part.of_qkv)


# ---- the tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a .nemo file or of its unpacked folder.

    Raises FileNotFoundError if it holds none (NeMo often names one of the Hub instead), and
    NotImplementedError for one of SentencePiece.
    """
    with opened(path) as members:
        return _tokenizer(members, path)


def _tokenizer(members: Mapping[str, Member], path: Path) -> Tokenizer:
    # NeMo puts a hash before the name: 3f2a..._tokenizer.json
    for ending in ("tekken.json", "tokenizer.json", "tokenizer.model"):
        for name, member in members.items():
            if name.endswith(ending) and "/" not in name:
                return _read_tokenizer(member, ending, f"{path}: {name}", members)
    tokenizer = _read_config(members, path).get("tokenizer")
    told = tokenizer.get("type") if isinstance(tokenizer, dict) else None
    hint = f"; {CONFIG} names {told!r:.80} of the Hub" if told else ""
    raise FileNotFoundError(f"{path}: holds neither tokenizer.json nor tekken.json{hint}")


def _read_tokenizer(
    member: Member, ending: str, what: str, members: Mapping[str, Member]
) -> Tokenizer:
    data = member.read(_MAX_TOKENIZER_BYTES, what)
    if ending == "tokenizer.model":
        if not data.lstrip().startswith(b"{"):
            raise NotImplementedError(f"{what}: SentencePiece tokenizers are not supported")
        ending = "tekken.json"
    with tempfile.TemporaryDirectory(prefix="minitron-nemo-") as folder:
        file = Path(folder) / ending
        file.write_bytes(data)
        for name, other in members.items():
            for side in ("tokenizer_config.json", "special_tokens_map.json"):
                if name.endswith(side) and "/" not in name:
                    (Path(folder) / side).write_bytes(other.read(_MAX_CONFIG_BYTES, name))
        try:
            tokenizer = Tokenizer.from_file(file)
        except (ValueError, NotImplementedError) as error:
            raise type(error)(str(error).replace(str(file), what)) from None
    tokenizer.source = what
    return tokenizer
