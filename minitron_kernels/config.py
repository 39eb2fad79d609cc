"""The shape of a Llama-type model, read from a config.json, GGUF metadata or NeMo's YAML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HF_MODEL_TYPES = ("mistral", "llama")
GGUF_ARCHITECTURES = ("llama", "mistral")
DTYPES = ("bfloat16", "float16", "float32")

# Bounds that no published model comes near: a corrupt file must not make us allocate by them.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 1 << 12


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of Llama's architecture: pre-norm, RoPE (half-split), GQA, SwiGLU, no biases."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # Divisors of the head_dim/2 inverse frequencies (Llama-3 and linear scaling), or None.
    rope_factors: tuple[float, ...] | None = None
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "bfloat16"
    source: str = "config"  # named in error messages

    def __post_init__(self) -> None:
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            limit = _MAX_LAYERS if field == "num_hidden_layers" else _MAX_SIZE
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
                raise ValueError(
                    f"{self.source}: {field} must be an integer in 1..{limit}, got {value!r}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.source}: num_attention_heads ({self.num_attention_heads}) must be a "
                f"multiple of num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"{self.source}: head_dim must be even for RoPE, got {self.head_dim}")
        for field in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, field)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{self.source}: {field} must be a positive number, got {value!r}")
        if self.rope_factors is not None:
            if len(self.rope_factors) != self.head_dim // 2:
                raise ValueError(
                    f"{self.source}: rope_factors must have head_dim/2 = {self.head_dim // 2} "
                    f"values, got {len(self.rope_factors)}"
                )
            if not all(0 < f < math.inf for f in self.rope_factors):
                raise ValueError(f"{self.source}: rope_factors must be positive and finite")
        if self.sliding_window is not None and self.sliding_window <= 0:
            raise ValueError(
                f"{self.source}: sliding_window must be positive or null, got {self.sliding_window}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(
                f"{self.source}: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}"
            )

    @property
    def num_parameters(self) -> int:
        """Number of distinct weights (a tied output matrix is counted once)."""
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (
            qkv + self.num_attention_heads * self.head_dim + 3 * self.intermediate_size + 2
        )
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + self.hidden_size

    def kv_bytes_per_token(self, dtype_bytes: int = 2) -> int:
        """Bytes of K and V that one token adds to the cache over all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim * dtype_bytes

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name -> shape of every weight that a checkpoint of this config holds."""
        hidden, inter = self.hidden_size, self.intermediate_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}."
            shapes |= {
                layer + "input_layernorm.weight": (hidden,),
                layer + "self_attn.q_proj.weight": (q, hidden),
                layer + "self_attn.k_proj.weight": (kv, hidden),
                layer + "self_attn.v_proj.weight": (kv, hidden),
                layer + "self_attn.o_proj.weight": (hidden, q),
                layer + "post_attention_layernorm.weight": (hidden,),
                layer + "mlp.gate_proj.weight": (inter, hidden),
                layer + "mlp.up_proj.weight": (inter, hidden),
                layer + "mlp.down_proj.weight": (hidden, inter),
            }
        return shapes

    def inv_freq(self) -> torch.Tensor:
        """RoPE's inverse frequencies, fp32 [head_dim / 2], in the arithmetic of transformers."""
        import torch

        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        inv_freq = 1.0 / (self.rope_theta**exponents)
        if self.rope_factors is not None:
            inv_freq = inv_freq / torch.tensor(self.rope_factors, dtype=torch.float32)
        return inv_freq

    def to_hf(self) -> dict[str, Any]:
        """The config.json that describes this model (no rope scaling: it is kept as factors)."""
        if self.rope_factors is not None:
            raise NotImplementedError("a config with rope_factors cannot be written as config.json")
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "sliding_window": self.sliding_window,
            "hidden_act": "silu",
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) if self.eos_token_ids else None,
            "pad_token_id": self.pad_token_id,
            "torch_dtype": self.dtype,
        }

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read a config.json of model type mistral or llama.

        Raises ValueError for a missing or impossible field and NotImplementedError for a model
        this package does not compute (other types, biases, other activations, other RoPE kinds).
        """
        get = _Reader(data, source)
        model_type = data.get("model_type")
        if model_type not in HF_MODEL_TYPES:
            raise NotImplementedError(
                f"{source}: model_type {model_type!r} is not supported; "
                f"accepted: {', '.join(HF_MODEL_TYPES)}"
            )
        if (act := data.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise NotImplementedError(
                f"{source}: hidden_act {act!r} is not supported; only silu is"
            )
        for bias in ("attention_bias", "mlp_bias"):
            if data.get(bias):
                raise NotImplementedError(f"{source}: {bias} is not supported")
        heads, hidden = get.integer("num_attention_heads"), get.integer("hidden_size")
        head_dim = data.get("head_dim")
        if head_dim is None:
            if heads <= 0 or hidden % heads:
                raise ValueError(
                    f"{source}: hidden_size ({hidden}) is not a multiple of num_attention_heads "
                    f"({heads}), and head_dim is not given"
                )
            head_dim = hidden // heads
        # transformers 5 moved rope_theta and rope_scaling into rope_parameters.
        rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"{source}: rope_parameters must be an object, got {rope!r}")
        theta = rope.get("rope_theta", data.get("rope_theta"))
        theta = 10000.0 if theta is None else get.as_number("rope_theta", theta)
        if (partial := rope.get("partial_rotary_factor", 1.0)) != 1.0:
            raise NotImplementedError(
                f"{source}: partial_rotary_factor {partial!r} is not supported"
            )
        if not isinstance(head_dim, int) or not 0 < head_dim <= _MAX_SIZE:
            raise ValueError(f"{source}: head_dim must be a positive integer, got {head_dim!r}")
        max_positions = get.integer("max_position_embeddings", 2048)
        dtype = data.get("dtype") or data.get("torch_dtype") or "float32"
        return cls(
            vocab_size=get.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=get.integer("intermediate_size"),
            num_hidden_layers=get.integer("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=get.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=get.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_factors=_hf_rope_factors(rope, theta, head_dim, max_positions, source),
            tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
            sliding_window=get.integer("sliding_window", None),
            bos_token_id=get.integer("bos_token_id", None),
            eos_token_ids=_token_ids(data.get("eos_token_id"), "eos_token_id", source),
            pad_token_id=get.integer("pad_token_id", None),
            dtype=str(dtype).removeprefix("torch."),
            source=source,
        )

    @classmethod
    def from_gguf(
        cls,
        metadata: Mapping[str, Any],
        tensors: Mapping[str, Any],
        source: str = "gguf",
        rope_freqs: Sequence[float] | None = None,
    ) -> ModelConfig:
        """Read the metadata of a GGUF file of architecture llama.

        ``tensors`` maps Hugging Face names to anything with a ``shape`` (torch order): a missing
        lm_head.weight means tied embeddings. ``rope_freqs`` is the content of rope_freqs.weight.
        """
        arch = metadata.get("general.architecture")
        if arch not in GGUF_ARCHITECTURES:
            raise NotImplementedError(
                f"{source}: general.architecture {arch!r} is not supported; "
                f"accepted: {', '.join(GGUF_ARCHITECTURES)}"
            )
        get = _Reader(metadata, source)
        for feature in ("expert_count", "attention.sliding_window_pattern"):
            if metadata.get(f"{arch}.{feature}"):
                raise NotImplementedError(f"{source}: {arch}.{feature} is not supported")
        hidden = get.integer(f"{arch}.embedding_length")
        heads = get.integer(f"{arch}.attention.head_count")
        if hidden <= 0 or heads <= 0:
            raise ValueError(f"{source}: embedding_length and head_count must be positive")
        head_dim = get.integer(f"{arch}.attention.key_length", hidden // heads)
        value_dim = get.integer(f"{arch}.attention.value_length", head_dim)
        rope_dim = get.integer(f"{arch}.rope.dimension_count", head_dim)
        if not head_dim == value_dim == rope_dim:
            raise NotImplementedError(
                f"{source}: key_length {head_dim}, value_length {value_dim} and "
                f"rope.dimension_count {rope_dim} must be equal"
            )
        factors = None if rope_freqs is None else tuple(float(f) for f in rope_freqs)
        scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
        if scaling == "linear":
            factor = get.number(f"{arch}.rope.scaling.factor")
            factors = tuple(factor * f for f in (factors or (1.0,) * (head_dim // 2)))
        elif scaling != "none":
            raise NotImplementedError(f"{source}: {arch}.rope.scaling.type {scaling!r}")
        embedding = tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ValueError(f"{source}: token_embd.weight is missing or not a matrix")
        eos = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
        return cls(
            vocab_size=int(embedding.shape[0]),
            hidden_size=hidden,
            intermediate_size=get.integer(f"{arch}.feed_forward_length"),
            num_hidden_layers=get.integer(f"{arch}.block_count"),
            num_attention_heads=heads,
            num_key_value_heads=get.integer(f"{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=get.integer(f"{arch}.context_length"),
            rms_norm_eps=get.number(f"{arch}.attention.layer_norm_rms_epsilon"),
            rope_theta=get.number(f"{arch}.rope.freq_base", 10000.0),
            rope_factors=factors,
            tie_word_embeddings="lm_head.weight" not in tensors,
            sliding_window=get.integer(f"{arch}.attention.sliding_window", None) or None,
            bos_token_id=get.integer("tokenizer.ggml.bos_token_id", None),
            eos_token_ids=_token_ids(
                list(dict.fromkeys(i for i in eos if i is not None)), "eos_token_id", source
            ),
            pad_token_id=get.integer("tokenizer.ggml.padding_token_id", None),
            dtype="bfloat16",
            source=source,
        )

    @classmethod
    def from_nemo(
        cls,
        data: Mapping[str, Any],
        *,
        vocab_size: int,
        dtype: str,
        bos_token_id: int | None = None,
        eos_token_ids: tuple[int, ...] = (),
        source: str = "model_config.yaml",
    ) -> ModelConfig:
        """Read the model_config.yaml of a .nemo archive of Megatron's GPT model.

        What it does not say (vocabulary, type, special tokens) is told by the other files. A field
        that is missing has NeMo's default, which for several is a model that is not computed here.
        Raises ValueError for a missing or impossible field and NotImplementedError as from_hf does.
        """
        numbers = {}
        for field in ("layernorm_epsilon", "rotary_base", "seq_len_interpolation_factor"):
            with suppress(TypeError, ValueError):  # YAML takes 1e-5, without a point, for text
                numbers[field] = float(data[field]) if isinstance(data.get(field), str) else None
        get = _Reader({**data, **{k: v for k, v in numbers.items() if v is not None}}, source)
        for field, default, accepted in _NEMO_KINDS:
            value = data.get(field)
            value = default if value is None else value
            if value not in accepted:
                wanted = ", ".join(map(str, accepted))
                raise NotImplementedError(
                    f"{source}: {field} {value!r:.80} is not supported; accepted: {wanted}"
                )
        heads, hidden = get.integer("num_attention_heads"), get.integer("hidden_size")
        head_dim = get.integer("kv_channels", None)
        if head_dim is None:
            if heads <= 0 or hidden % heads:
                raise ValueError(
                    f"{source}: hidden_size ({hidden}) is not a multiple of num_attention_heads "
                    f"({heads}), and kv_channels is not given"
                )
            head_dim = hidden // heads
        factor = get.number("seq_len_interpolation_factor", 1.0)
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden,
            intermediate_size=get.integer("ffn_hidden_size"),
            num_hidden_layers=get.integer("num_layers"),
            num_attention_heads=heads,
            num_key_value_heads=get.integer("num_query_groups", heads),
            head_dim=head_dim,
            max_position_embeddings=get.integer("max_position_embeddings"),
            rms_norm_eps=get.number("layernorm_epsilon", 1e-5),
            rope_theta=get.number("rotary_base", 10000.0),
            rope_factors=None if factor == 1 else (factor,) * (head_dim // 2),
            tie_word_embeddings=bool(data.get("share_embeddings_and_output_weights", True)),
            sliding_window=_nemo_window(data.get("window_size"), source),
            bos_token_id=bos_token_id,
            eos_token_ids=eos_token_ids,
            dtype=dtype,
            source=source,
        )


# Field of model_config.yaml, NeMo's default, and the values that mean what is computed here.
_NEMO_KINDS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("position_embedding_type", "learned_absolute", ("rope",)),
    ("normalization", "layernorm", ("rmsnorm",)),
    ("activation", "gelu", ("fast-swiglu", "swiglu")),
    ("bias", True, (False,)),
    ("transformer_block_type", "pre_ln", ("pre_ln",)),
    ("rotary_percentage", 1.0, (1.0,)),
    ("rotary_interleaved", False, (False,)),
    ("num_moe_experts", 0, (0,)),
    ("qk_layernorm", False, (False,)),
    ("layernorm_zero_centered_gamma", False, (False,)),
    ("scale_positional_embedding", False, (False,)),  # Llama 3.1's scaling of RoPE
)


def _nemo_window(value: Any, source: str) -> int | None:
    """Keys that a query sees, itself included; NeMo counts those to its left and to its right."""
    if value is None or value == [-1, 0] or value == [-1, -1]:
        return None
    if not (
        isinstance(value, list)
        and len(value) == 2
        and all(type(side) is int for side in value)
        and value[0] >= 0
        and value[1] == 0
    ):
        raise ValueError(f"{source}: window_size must be [keys to the left, 0], got {value!r:.80}")
    left: int = value[0]
    return left + 1


_REQUIRED: Any = object()


class _Reader:
    """Typed access to a mapping from a file, with errors that name file and field."""

    def __init__(self, data: Mapping[str, Any], source: str) -> None:
        self.data, self.source = data, source

    def _get(self, key: str, default: Any) -> Any:
        value = self.data.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ValueError(f"{self.source}: field {key!r} is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self._get(key, default)
        if value is not default and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{self.source}: field {key!r} must be an integer, got {value!r:.80}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        return self.as_number(key, self._get(key, default))

    def as_number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{self.source}: field {key!r} must be a number, got {value!r:.80}")
        return float(value)


def _token_ids(value: Any, field: str, source: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(
            f"{source}: {field} must be a token id or a list of them, got {value!r:.80}"
        )
    return tuple(ids)


def _hf_rope_factors(
    rope: Mapping[str, Any], theta: float, head_dim: int, max_positions: int, source: str
) -> tuple[float, ...] | None:
    """Divisors of the inverse frequencies for rope types linear and llama3 (Llama 3.1's rule)."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    get = _Reader(rope, f"{source}: rope_parameters")
    if kind not in ("linear", "llama3"):
        raise NotImplementedError(
            f"{source}: rope_type {kind!r} is not supported; accepted: default, linear, llama3"
        )
    factor = get.number("factor")
    if not factor >= 1:
        raise ValueError(f"{source}: rope factor must be at least 1, got {factor!r}")
    if kind == "linear":
        return (factor,) * (head_dim // 2)
    low, high = get.number("low_freq_factor"), get.number("high_freq_factor")
    original = get.number("original_max_position_embeddings", max_positions)
    if not 0 < low < high:
        raise ValueError(
            f"{source}: rope needs 0 < low_freq_factor < high_freq_factor, got {low!r} and {high!r}"
        )
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / head_dim)
        # 1 at high frequencies (kept), 0 at low ones (divided by factor), linear in between.
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)
