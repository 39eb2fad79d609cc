"""The model: a Llama-shaped decoder over packed tokens and a paged KV cache, in one file.

All maths goes through `minitron_kernels.ops`. Parameter names are Hugging Face's, so a state dict
fits either. Tokens of all sequences are packed along one dimension; a `Batch` says which rows
belong to which sequence and where their K and V go, so that one forward pass serves prompts and
single new tokens alike:

    ids [T] -> embed [T, H] -> layers x (qkv_rope_append, attention_kvcache, linear + residual,
    swiglu_mlp + norm + residual) -> norm -> logits [len(rows), V]
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from minitron_kernels import cuda_ops, devices, ops
from minitron_kernels.cache import PAGE_SIZES, PagedKVCache
from minitron_kernels.config import DTYPES, ModelConfig
from minitron_kernels.layers import (
    Embedding,
    Linear,
    MatrixModule,
    Packable,
    RMSNorm,
    SwiGLUMLP,
    as_parameter,
)
from minitron_kernels.quantized import QuantizedTensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from minitron_kernels.loaders.checkpoint import Checkpoint, Weights
    from minitron_kernels.parallel import Shard

Tensor = torch.Tensor

_log = logging.getLogger(__name__)


@dataclass
class Batch:
    """The packed rows of one step, and which sequences they belong to; index tensors are int32.

    ``ids`` [T]; ``positions`` and ``slots`` [T] say where each row stands in its sequence and in
    the cache (a negative slot: nowhere). ``cu_seqlens_q`` [B + 1] delimits each sequence's rows
    (None: one each); ``seqlens`` [B] is its length with them; ``block_table`` [B, max_pages] lists
    its pages. ``rows`` are those whose logits are wanted (None: all). The least and the largest
    number of rows of a sequence are known to the host, so that nobody asks the device.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens_q: Tensor | None
    seqlens: Tensor
    block_table: Tensor
    rows: Tensor | None
    min_seqlen_q: int
    max_seqlen_q: int

    @classmethod
    def build(
        cls,
        pages: Sequence[Sequence[int]],
        starts: Sequence[int],
        ids: Sequence[Sequence[int]],
        page_size: int,
        device: torch.device | str,
        rows: Sequence[int] | None = None,
    ) -> Batch:
        """Sequence i owns ``pages[i]``, has ``starts[i]`` tokens cached and gets ``ids[i]``.

        Everything goes to the device in one copy, which nobody waits for.
        """
        counts = [len(new) for new in ids]
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        positions: list[int] = []
        slots: list[int] = []
        for own, start, end in zip(pages, starts, lengths, strict=True):
            positions += range(start, end)
            slots += [own[p // page_size] * page_size + p % page_size for p in range(start, end)]
        width = max(map(len, pages), default=0)
        parts: list[Iterable[int]] = [
            chain.from_iterable(ids),
            positions,
            slots,
            accumulate(counts, initial=0),
            lengths,
            chain.from_iterable([*own, *[0] * (width - len(own))] for own in pages),
            rows or (),
        ]
        arrays = [np.fromiter(part, dtype=np.int32) for part in parts]
        packed = devices.upload(torch.from_numpy(np.concatenate(arrays)), torch.device(device))
        new, places, where, starts_q, seqlens, table, wanted = packed.split(
            [len(array) for array in arrays]
        )
        return cls(
            ids=new,
            positions=places,
            slots=where,
            cu_seqlens_q=None if counts == [1] * len(counts) else starts_q,
            seqlens=seqlens,
            block_table=table.view(len(pages), width),
            rows=None if rows is None else wanted,
            min_seqlen_q=min(filter(None, counts), default=0),
            max_seqlen_q=max(counts, default=0),
        )


class Attention(Packable):
    """Causal attention over the cache, from x [T, H] to x + its result.

    ``interleaved``: features 2i and 2i+1 of a head of Q and K are a RoPE pair, as in a GGUF file,
    whose rows of Q and K are then used where they lie; else features i and i + D/2, as in Hugging
    Face's checkpoints. Whichever it is, state dicts have Hugging Face's order.
    """

    matrices = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.interleaved = False
        self.register_state_dict_post_hook(_half_split_rows)
        hidden, d = config.hidden_size, config.head_dim
        self.window = config.sliding_window
        self.shape = (config.num_attention_heads, config.num_key_value_heads, d)
        self.q_proj = Linear(hidden, config.num_attention_heads * d)
        self.k_proj = Linear(hidden, config.num_key_value_heads * d)
        self.v_proj = Linear(hidden, config.num_key_value_heads * d)
        self.o_proj = Linear(config.num_attention_heads * d, hidden)

    def pack(self, device: torch.device | None = None) -> None:
        """As Packable.pack; quantised matrices are interleaved then, as their kernel takes them."""
        apart = self.packed_weight is None
        if apart and not self.interleaved and all(map(ops.is_quantized, self.weights())):
            state = {f"{name}.weight": getattr(self, name).weight for name in self.matrices}
            _reorder(state, "", self.shape[2], to_interleaved=True)
            for name in ("q_proj", "k_proj"):
                getattr(self, name).weight = as_parameter(state[f"{name}.weight"])
            self.interleaved = True
        super().pack(device)

    def _pack(self, *weights: Tensor) -> Tensor:
        wq, wk, wv = weights
        d = self.shape[2]
        return ops.pack_qkv(wq, wk, wv, head_dim=d, interleaved=self.interleaved).weight

    def _unpack(self) -> tuple[Tensor, ...]:
        return ops.unpack_qkv(self._packed())

    def _packed(self) -> ops.PackedQKV:
        assert self.packed_weight is not None
        d = self.shape[2]
        return ops.PackedQKV(
            self.packed_weight, *self.shape, rotary_dim=d, interleaved=self.interleaved
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.interleaved:  # state_dict is torch's copy, of which the children get their parts
            _reorder(state_dict, prefix, self.shape[2], to_interleaved=True)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, x: Tensor, norm: ops.Norm, rope: ops.Rope, kv: tuple[Tensor, Tensor], batch: Batch
    ) -> Tensor:
        w_qkv: ops.PackedQKV | tuple[Tensor, Tensor, Tensor]
        if self.packed_weight is None:
            w_qkv = self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        else:
            w_qkv = self._packed()
        if rope.interleaved != self.interleaved:
            rope = rope._replace(interleaved=self.interleaved)
        int8 = self.int8_activations
        q = ops.qkv_rope_append(x, norm, w_qkv, rope, kv, batch.slots, int8_activations=int8)
        out = ops.attention_kvcache(
            q,
            None,
            None,
            *kv,
            batch.block_table,
            batch.seqlens,
            cu_seqlens_q=batch.cu_seqlens_q,
            min_seqlen_q=batch.min_seqlen_q,
            max_seqlen_q=batch.max_seqlen_q,
            window=self.window,
        )
        assert isinstance(out, Tensor)
        return self.o_proj(out.flatten(1), residual=x)


def _half_split_rows(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """What is saved of an interleaved Attention has the rows of Q and K in Hugging Face's order."""
    assert isinstance(module, Attention)
    if module.interleaved:
        _reorder(state_dict, prefix, module.shape[2], to_interleaved=False)


def _reorder(
    state_dict: dict[str, Any], prefix: str, head_dim: int, *, to_interleaved: bool
) -> None:
    """Exchange the rows of Q and K in a state dict for a copy in the other order of RoPE pairs.

    What does not divide into heads is left as it is: its shape is an error already.
    """
    pairs = (2, head_dim // 2) if to_interleaved else (head_dim // 2, 2)
    for name in ("q_proj", "k_proj"):
        weight = state_dict.get(f"{prefix}{name}.weight")
        if isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] % head_dim == 0:
            rows = torch.arange(weight.shape[0], device=weight.device)
            rows = rows.view(-1, *pairs).transpose(1, 2).reshape(-1)
            state_dict[f"{prefix}{name}.weight"] = weight.detach().index_select(0, rows)


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then that + mlp(norm of it); x [T, H]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLUMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rope: ops.Rope, kv: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        x = self.self_attn(x, self.input_layernorm.as_norm(), rope, kv, batch)
        return self.mlp(x, self.post_attention_layernorm.as_norm(), residual=x)


class Decoder(nn.Module):
    """What state dicts call ``model``; MinitronForCausalLM.forward runs it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MinitronForCausalLM(nn.Module):
    """A causal language model of Llama's architecture, for inference.

    Build it with `from_pretrained`; `generate` has the call of transformers' method. For streams,
    text in and out, or many prompts see `minitron_kernels.generate`.
    """

    checkpoint: Checkpoint | None = None
    int8_activations = False

    def __init__(self, config: ModelConfig, shard: Shard | None = None) -> None:
        super().__init__()
        self.config, self.shard = config, shard
        # What is in this process: all of it, or its shard (see `parallel`).
        self.own_config = own = config if shard is None else shard.config
        self.model = Decoder(own)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(own.hidden_size, own.vocab_size)
        if shard is not None:
            shard.prepare(self)
        self._rope: ops.Rope | None = None
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str] | Checkpoint,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        progress: bool | None = None,
        expand: bool = False,
        allow_nonfinite: bool = False,
        int8_activations: bool = False,
        tensor_parallel: bool | ProcessGroup = False,
        torch_dtype: torch.dtype | str | None = None,
        device_map: torch.device | str | None = None,
    ) -> MinitronForCausalLM:
        """Load a model.

        ``source``: a folder with config.json and safetensors, a .gguf or .nemo file, a Hub id (also
        ``repo:QUANT`` and ``repo/file.gguf`` for GGUF repositories), a built-in name (smollm2-135m,
        minitron-8b, minitron-8b:Q4_K_M) or an open checkpoint; ``revision`` is a Hub repository's.
        ``dtype`` (None, "auto": as stored, bfloat16 for quantised GGUF) and ``device`` (None,
        "auto": cuda if there is one, else cpu) also go by transformers' names torch_dtype and
        device_map. ``progress`` shows a bar (None: on a terminal, when there is much to do).

        Quantised matrices of a GGUF file stay so (`QuantizedTensor`), and ``dtype`` is that of
        activations, norms and cache; ``expand`` decodes them to it. An infinite or NaN block scale
        is an error unless ``allow_nonfinite``. Other weights stored in the wanted dtype, and on the
        CPU quantised ones, stay memory-mapped; the rest is converted one tensor at a time. On a GPU
        weights are packed for the fused kernels (see `pack`), layer by layer.

        ``int8_activations`` has `set_int8_activations` called.

        With ``tensor_parallel`` the processes that torchrun started (True), or those of a process
        group, share the model: each reads its part only, all must make the same calls and get the
        same results (see `parallel`). An error of one is raised in all.

        Raises ValueError for a bad argument or a damaged file (naming file and field),
        FileNotFoundError, NotImplementedError for an unsupported model, MemoryError beforehand if
        the machine has too little memory.
        """
        from minitron_kernels.loaders.checkpoint import Weights, open_checkpoint
        from minitron_kernels.loaders.hub import resolve

        if not (isinstance(source, str | PathLike) or hasattr(source, "tensors")):
            raise TypeError(f"source must be a path or a name, got {type(source).__name__}")
        device = devices.parse(_one_of("device", device, "device_map", device_map))
        wanted_dtype = _one_of("dtype", dtype, "torch_dtype", torch_dtype)

        def open_weights() -> Weights:
            checkpoint = (
                open_checkpoint(resolve(source, revision))
                if isinstance(source, str | PathLike)
                else source
            )
            torch_type = _dtype(wanted_dtype, checkpoint.config)
            return Weights(checkpoint, torch_type, expand, allow_nonfinite)

        if tensor_parallel is not False:
            from minitron_kernels import parallel

            if (group := parallel.group_of(tensor_parallel)) is not None:
                if int8_activations:
                    raise NotImplementedError("int8_activations is for a model of one process")
                with parallel.together(group):
                    weights = parallel.ShardWeights.of(open_weights(), group)
                    return cls._loaded(weights, parallel.own_device(device, group), progress)
        model = cls._loaded(open_weights(), device, progress)
        if int8_activations:
            model.set_int8_activations(True)
        return model

    @classmethod
    def _loaded(
        cls, weights: Weights, device: torch.device, progress: bool | None
    ) -> MinitronForCausalLM:
        weights.check_memory(device)
        with torch.device("meta"):
            model = cls(weights.checkpoint.config, weights.shard)
        model.checkpoint = weights.checkpoint
        model._load(weights, device, progress)
        return model

    def _load(self, weights: Weights, device: torch.device, progress: bool | None) -> None:
        from tqdm import tqdm

        shapes = self.config.weight_shapes()
        weights.check(shapes)
        tensors = weights.checkpoint.tensors
        if progress is None and weights.ram_needed() < 1 << 28 and device.type == "cpu":
            progress = False
        for i, layer in enumerate(self.model.layers):
            attention = layer.get_submodule("self_attn")
            assert isinstance(attention, Attention)
            q_proj = f"model.layers.{i}.self_attn.q_proj.weight"
            attention.interleaved = weights.is_interleaved(q_proj)
        with tqdm(
            total=sum(tensors[name].nbytes for name in shapes),
            desc="loading weights",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=None if progress is None else not progress,
            leave=False,
        ) as bar:
            for name in shapes:
                self._set(name, weights.load(name), weights.dtype, device)
                bar.update(tensors[name].nbytes)

    def _set(self, name: str, weight: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        """Put a weight in its place on the device, packed with the others of its module."""
        has_kernels = cuda_ops.serves(torch.empty(0, dtype=dtype, device=device))
        if not (has_kernels and isinstance(weight, QuantizedTensor)):  # it is packed on the host
            weight = weight.to(device)
        owner, _, leaf = name.rpartition(".")
        parent, _, child = owner.rpartition(".")
        module, packable = self.get_submodule(owner), self.get_submodule(parent)
        setattr(module, leaf, as_parameter(weight))
        del weight  # so that packing is what holds it last
        if not has_kernels:
            return
        if isinstance(packable, Packable) and child in packable.matrices:
            if not packable.is_partly_on_meta:
                packable.pack(device)
        elif isinstance(module, MatrixModule):
            module.pack(device)

    def pack(self) -> None:
        """Pack the weights for the fused kernels, one layer after the other.

        from_pretrained has done so where kernels compute; it is for a model that came to a GPU by
        ``to``. A packed model computes on the CPU as well, and its state_dict() has the names and
        shapes of an unpacked one (Q and K are copies there, gate and up strided views). Quantised
        matrices are packed where kernels compute only, and are copies in the state_dict().
        """
        has_kernels = cuda_ops.serves(self.model.norm.weight)
        for module in self.modules():
            if isinstance(module, Packable):
                if has_kernels or not any(map(ops.is_quantized, module.weights())):
                    module.pack()
            elif has_kernels and isinstance(module, MatrixModule):
                module.pack()

    def set_int8_activations(self, on: bool) -> None:
        """Let products with quantised matrices round activations to 8 bits (see `ops.linear`).

        For the CPU: prompts take about half the time then, but an activation is off by up to 1/254
        of the largest of its 32. Raises ValueError for a model on a GPU, and for one without
        quantised matrices, NotImplementedError for one that several processes share.
        """
        if on and self.shard is not None:
            raise NotImplementedError("int8_activations is for a model of one process")
        if on and self.device.type != "cpu":
            raise ValueError(f"int8_activations is for the CPU, and the model is on {self.device}")
        if on and not any(map(ops.is_quantized, self.parameters())):
            raise ValueError("int8_activations is for quantised weights, and the model has none")
        for module in self.modules():
            if isinstance(module, MatrixModule):
                module.int8_activations = on and ops.is_quantized(module.weight)
            elif isinstance(module, Packable):  # o_proj is a Linear of its own
                own = module.weights() if isinstance(module, Attention) else module.parameters()
                module.int8_activations = on and any(map(ops.is_quantized, own))
        self.int8_activations = on
        _log.info("activations are rounded to 8 bits: %s", on)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.norm.weight.dtype

    def new_cache(self, num_tokens: int, page_size: int = 16) -> PagedKVCache:
        """An empty cache with room for ``num_tokens`` tokens (whole pages)."""
        pages = max(1, -(-num_tokens // page_size))
        return PagedKVCache(self.own_config, pages, page_size, self.dtype, self.device)

    def _rope_for(self, positions: Tensor) -> ops.Rope:
        if self._rope is None or self._rope.cos.device != self.device:
            angles = torch.arange(self.config.max_position_embeddings).float()[:, None]
            angles = angles * self.config.inv_freq()
            self._rope = ops.Rope(angles.cos().to(self.device), angles.sin().to(self.device))
        return self._rope._replace(positions=positions)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: PagedKVCache) -> Tensor:
        """Logits fp32 [len(batch.rows), V] of a batch whose K and V go to ``cache``."""
        rope = self._rope_for(batch.positions)
        x = self.model.embed_tokens(batch.ids, self.dtype)
        for i, layer in enumerate(self.model.layers):
            x = layer(x, rope, cache.layer(i), batch)
        if batch.rows is not None:
            x = ops.embedding(batch.rows, x)  # rows of x
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        norm = self.model.norm.as_norm()
        logits = ops.linear(
            x,
            head.weight,
            norm=norm,
            out_dtype=torch.float32,
            int8_activations=head.int8_activations,
        )
        return logits if self.shard is None else self.shard.join(logits)

    def logits(self, ids: Tensor) -> Tensor:
        """Logits fp32 [B, S, V] of unpadded sequences ``ids`` [B, S], with a cache of their own.

        Raises ValueError for more tokens than the model's context.
        """
        if ids.ndim != 2 or ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"ids must be [B, S] with S <= {self.config.max_position_embeddings}, "
                f"got {list(ids.shape)}"
            )
        b, s = ids.shape
        per_sequence = self.new_cache(0).pages_for(s)
        cache = self.new_cache(max(1, b * per_sequence) * PAGE_SIZES[0])
        pages = [list(range(i * per_sequence, (i + 1) * per_sequence)) for i in range(b)]
        batch = Batch.build(pages, [0] * b, ids.tolist(), cache.page_size, self.device)
        return self(batch, cache).view(b, s, -1)

    def generate(
        self, inputs: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continue token ids ``inputs`` [B, S], as transformers' method of this name does.

        ``attention_mask`` [B, S] marks left padding with 0. Options: those of `SamplingParams`,
        do_sample, pad_token_id, eos_token_id, input_ids (for inputs), cuda_graphs (see `Engine`).
        Greedy unless do_sample or a temperature is given; without max_length and max_new_tokens,
        128 new tokens at the most. Returns int64 [B, S + longest continuation], shorter ones padded
        on the right. Raises TypeError for an unknown option, NotImplementedError for one that is
        known and has no code, ValueError for what contradicts or does not fit.
        """
        from minitron_kernels.generate import generate_ids

        return generate_ids(self, inputs, attention_mask, options)


def _one_of(name: str, value: Any, other_name: str, other: Any) -> Any:
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name} ({value}) and {other_name} ({other}) contradict each other")
    return value if value is not None else other


def _dtype(dtype: torch.dtype | str | None, config: ModelConfig) -> torch.dtype:
    name = config.dtype if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
    name = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}.get(
        name, name
    )
    if name not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; accepted: auto, {', '.join(DTYPES)}")
    parsed: torch.dtype = getattr(torch, name)
    return parsed
