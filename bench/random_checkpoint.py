"""Write a checkpoint of random weights: Minitron-8B's shape, or any other Llama-shaped model's.

    python bench/random_checkpoint.py minitron-8b                      # safetensors, bf16
    python bench/random_checkpoint.py minitron-8b.gguf --type q8_0
    python bench/random_checkpoint.py minitron-8b.gguf --type q4_k_m   # llama.cpp's mix, 5.1 GB
    python bench/random_checkpoint.py tiny --layers 2 --vocab 512 --preset smollm2-135m

Weights are normal with standard deviation 0.02 and norms are 1, so activations stay in range; the
text generated from them is nonsense. Every matrix is a window, at an offset of its own, into one
pool of 33.6 M random values, converted once to each type that occurs: drawing 8.4 G values would
take minutes. The pool is 256 times a prime long, so that no two rows of a matrix are equal. A seed
gives the same weights in every format (up to the rounding of its type). Memory stays under 2 GB.

The tokenizer is a byte-level BPE of just bytes, pairs of letters, and fillers up to vocab_size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import string
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click
import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from tqdm import tqdm

from minitron_kernels.block_encoders import encode
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.config import ModelConfig
from minitron_kernels.quantize import MIXES, mix_type, storable_type

PRESETS = {
    "minitron-8b": ModelConfig(
        vocab_size=131072,
        hidden_size=4096,
        intermediate_size=11520,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=1e6,
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=1e5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_ids=(2,),
    ),
}
# safetensors' and torch's name of the types that its files can hold.
SAFETENSORS_TYPES = {"bf16": ("BF16", "bfloat16"), "f16": ("F16", "float16")}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)

GROUP = 256  # elements that every type stores in whole blocks
POOL_GROUPS = 131101  # a prime, larger than any matrix has rows

Rows = npt.NDArray[np.uint8]


class RandomWeights:
    """Stored rows of random matrices, all cut from one pool."""

    def __init__(self, seed: int) -> None:
        values = np.random.default_rng(seed).standard_normal((POOL_GROUPS, GROUP), np.float32)
        self.values, self.seed = 0.02 * values, seed
        self.pools: dict[str, Rows] = {}

    def pool(self, kind: str) -> Rows:
        """The stored bytes of all the values."""
        if kind not in self.pools:
            encoded = (
                encode(self.values, kind)
                if kind in QUANT_TYPES
                else gguf.quantize(self.values, GGMLQuantizationType[kind]).view(np.uint8)
            )
            self.pools[kind] = encoded.reshape(-1)
        return self.pools[kind]

    def matrix(self, name: str, shape: tuple[int, ...], kind: str) -> Rows:
        """The matrix ``name`` as stored in ``kind``: uint8 [rows, row bytes]."""
        rows, cols = shape
        pool = self.pool(kind)
        digest = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little") % POOL_GROUPS * (pool.size // POOL_GROUPS)
        out = np.empty(rows * row_nbytes(cols, kind), np.uint8)
        done = 0
        while done < out.size:
            piece = pool[start : start + out.size - done]
            out[done : done + piece.size] = piece
            done, start = done + piece.size, 0
        return out.reshape(rows, -1)


def row_nbytes(cols: int, kind: str) -> int:
    """Stored bytes of a row of ``cols`` elements."""
    elements, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return cols // elements * nbytes


# ---- tokenizer ----


@dataclasses.dataclass
class Vocabulary:
    """Tokens by id, the ids of the special ones, and the merges."""

    tokens: list[str]
    special: dict[int, str]
    merges: list[tuple[str, str]]


def make_vocabulary(config: ModelConfig) -> Vocabulary:
    """Bytes first, pairs of lower-case letters next, then fillers that no text encodes to."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = {i: "</s>" if n == 0 else f"</s{n}>" for n, i in enumerate(config.eos_token_ids)}
    if config.bos_token_id is not None:
        special[config.bos_token_id] = "<s>"
    if any(i >= config.vocab_size for i in special):
        raise ValueError(f"--vocab: {config.vocab_size} has no room for token ids {list(special)}")
    alphabet = sorted(ByteLevel.alphabet())
    room = config.vocab_size - len(special) - len(alphabet)
    if room < 0:
        raise ValueError(f"--vocab: got {config.vocab_size}, a byte-level vocabulary needs 260")
    merges = list(itertools.product(string.ascii_lowercase, repeat=2))[:room]
    ordinary: Iterator[str] = itertools.chain(
        alphabet, (a + b for a, b in merges), (f"<filler{i}>" for i in itertools.count())
    )
    tokens = [special.get(i) or next(ordinary) for i in range(config.vocab_size)]
    return Vocabulary(tokens, special, merges)


def write_tokenizer(folder: Path, config: ModelConfig) -> None:
    """tokenizer.json and tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = make_vocabulary(config)
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=vocabulary.merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in vocabulary.special.values()])
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if config.bos_token_id is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", config.bos_token_id)]
        )
        settings["bos_token"] = "<s>"
    if config.eos_token_ids:
        settings["eos_token"] = "</s>"
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", settings)


def add_gguf_tokenizer(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """The same vocabulary as metadata."""
    vocabulary = make_vocabulary(config)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(
        [control if i in vocabulary.special else normal for i in range(config.vocab_size)]
    )
    if vocabulary.merges:
        writer.add_token_merges([f"{a} {b}" for a, b in vocabulary.merges])
    writer.add_add_bos_token(config.bos_token_id is not None)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    if config.eos_token_ids:
        writer.add_eos_token_id(config.eos_token_ids[0])


# ---- files ----


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def write_safetensors_folder(
    folder: Path,
    config: ModelConfig,
    kind: str,
    seed: int,
    shard_nbytes: int,
    tokenizer: str | None,
) -> None:
    """A folder as transformers saves it, with shards of at most ``shard_nbytes`` bytes of data."""
    type_name, torch_name = SAFETENSORS_TYPES[kind]
    config = dataclasses.replace(config, dtype=torch_name)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_hf())
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)},
    )
    if tokenizer is None:
        write_tokenizer(folder, config)
    else:
        for file in TOKENIZER_FILES:
            if (source := Path(tokenizer) / file).is_file():
                shutil.copyfile(source, folder / file)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in config.weight_shapes().items():
        nbytes = 2 * int(np.prod(shape))
        if shards[-1] and filled + nbytes > shard_nbytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += nbytes
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]
    else:
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        }
        write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": 2 * config.num_parameters}, "weight_map": weight_map},
        )
    weights = RandomWeights(seed)
    one = np.array([1], "<f2").view(np.uint8) if kind == "f16" else np.array((0x80, 0x3F), np.uint8)
    with tqdm(total=2 * config.num_parameters, unit="B", unit_scale=True) as bar:
        for file, shard in zip(files, shards, strict=True):
            with (folder / file).open("wb") as stream:
                write_safetensors_header(stream, shard, type_name)
                for name, shape in shard.items():
                    ones = len(shape) == 1
                    data = (
                        np.tile(one, shape[0]) if ones else weights.matrix(name, shape, type_name)
                    )
                    data.tofile(stream)
                    bar.update(data.nbytes)


def write_safetensors_header(
    stream: BinaryIO, shapes: dict[str, tuple[int, ...]], type_name: str
) -> None:
    """Length, then JSON padded to 8 bytes: name -> type, shape and place of the 2-byte elements."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": type_name, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    stream.write(struct.pack("<Q", len(raw)) + raw)


def write_gguf_file(path: Path, config: ModelConfig, kind: str, seed: int) -> None:
    """A GGUF file as llama.cpp's converter writes it: norms in F32, rows of Q and K permuted."""
    weights = RandomWeights(seed)
    mix = kind.upper()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random weights")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(MIXES[mix].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_gguf_tokenizer(writer, config)
    shapes = config.weight_shapes()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    total = 0
    types: dict[str, str] = {}
    for name, shape in shapes.items():
        stored_name = names.get_name(name, try_suffixes=(".weight",)) or name
        types[name] = "F32"
        if len(shape) == 2:
            wanted = mix_type(stored_name, mix, config, config.tie_word_embeddings)
            types[name] = storable_type(wanted, shape[-1])
        stored_shape = (*shape[:-1], row_nbytes(shape[-1], types[name]))
        nbytes = int(np.prod(stored_shape))
        total += nbytes
        writer.add_tensor_info(
            stored_name,
            stored_shape,
            np.dtype(np.uint8),
            nbytes,
            raw_dtype=GGMLQuantizationType[types[name]],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    with tqdm(total=total, unit="B", unit_scale=True) as bar:
        for name, shape in shapes.items():
            data: npt.NDArray[Any] = (
                np.ones(shape, np.float32)
                if len(shape) == 1
                else weights.matrix(name, shape, types[name])
            )
            if num_heads := heads.get(name.split(".")[-2]):
                # Halves of a head interleaved: llama.cpp rotates neighbouring rows.
                halves = data.reshape(num_heads, 2, config.head_dim // 2, -1)
                data = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(data.shape)
            writer.write_tensor_data(data)
            bar.update(data.nbytes)
    writer.close()


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.option(
    "--type",
    "kind",
    type=click.Choice([m.lower() for m in MIXES]),
    default="bf16",
    show_default=True,
)
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), default="minitron-8b", show_default=True
)
@click.option("--config", "config_path", type=click.Path(path_type=Path, exists=True))
@click.option("--layers", "num_hidden_layers", type=int)
@click.option("--hidden", "hidden_size", type=int)
@click.option("--intermediate", "intermediate_size", type=int)
@click.option("--heads", "num_attention_heads", type=int)
@click.option("--kv-heads", "num_key_value_heads", type=int)
@click.option("--head-dim", "head_dim", type=int)
@click.option("--vocab", "vocab_size", type=int)
@click.option("--context", "max_position_embeddings", type=int)
@click.option("--tied/--untied", "tie_word_embeddings", default=None)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--shard-gb", type=float, default=5.0, show_default=True, help="safetensors only")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False),
    help="safetensors only: a folder whose tokenizer files are copied",
)
def main(
    output: Path,
    kind: str,
    preset: str,
    config_path: Path | None,
    seed: int,
    shard_gb: float,
    tokenizer: str | None,
    **overrides: Any,
) -> None:
    """Write random weights to OUTPUT: a GGUF file if it ends in .gguf, else a safetensors folder.

    The shape is that of --preset, or of --config (a config.json), with the other options' changes.
    """
    try:
        config = PRESETS[preset]
        if config_path is not None:
            config = ModelConfig.from_hf(json.loads(config_path.read_bytes()), str(config_path))
        changes = {field: value for field, value in overrides.items() if value is not None}
        config = dataclasses.replace(config, **changes, source="options")
        if output.suffix == ".gguf":
            if output.exists():
                raise ValueError(f"{output}: already there")
            if tokenizer is not None:
                raise ValueError("--tokenizer: only for safetensors folders")
            write_gguf_file(output, config, kind, seed)
        else:
            if output.exists() and (not output.is_dir() or any(output.iterdir())):
                raise ValueError(f"{output}: already there, and not an empty folder")
            if kind not in SAFETENSORS_TYPES:
                raise ValueError(f"--type: {kind} is only for OUTPUTs that end in .gguf")
            write_safetensors_folder(output, config, kind, seed, int(shard_gb * 1e9), tokenizer)
    except (ValueError, NotImplementedError) as error:
        raise click.UsageError(str(error)) from None


if __name__ == "__main__":
    main()
