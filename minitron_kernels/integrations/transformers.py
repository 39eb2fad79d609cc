"""The kernels inside a transformers model: `patch` a loaded one, or load one `from_gguf`.

    from minitron_kernels.integrations.transformers import patch

    model = LlamaForCausalLM.from_pretrained(...)
    patch(model)

Modules of Llama and Mistral (RMSNorm, MLP, attention, decoder layer) stay the objects they are and
keep their parameters; only their class becomes one derived from it, whose forward calls
`minitron_kernels.ops`. A call that the kernels cannot take (gradients, LoRA in place of a matrix,
hooks on one, a dense mask) runs the original forward, and the logger
``minitron_kernels.integrations.transformers`` says why, once a reason. `unpatch` gives the modules
their classes back.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral

from minitron_kernels import cuda_attention, cuda_ops, ops
from minitron_kernels.checks import DTYPES
from minitron_kernels.integrations.transformers_attention import (
    NAME,
    Appended,
    Layout,
    attend,
    attention_forward,
    is_bounds,
    make_room,
    note,
    register_attention,
    why_not,
)
from minitron_kernels.integrations.transformers_gguf import QuantizedLinear, from_gguf

__all__ = ["PatchReport", "QuantizedLinear", "from_gguf", "patch", "register_attention", "unpatch"]

Tensor = torch.Tensor


@dataclass(frozen=True)
class PatchReport:
    """Names of the modules that `patch` replaced, by kind, and of those it left, and why."""

    replaced: dict[str, list[str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        done = ", ".join(f"{len(names)} {kind}" for kind, names in self.replaced.items())
        lines = [f"replaced: {done or 'nothing'}"]
        lines += [
            f"left {count}, {reason}: {next(n for n, r in self.left.items() if r == reason)}"
            + (", ..." if count > 1 else "")
            for reason, count in Counter(self.left.values()).items()
        ]
        return "\n".join(lines)


# ---------------------------------------------------------------------------- weights of a module


def _has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches, or replaced, what the module computes."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_matrix(module: Any) -> bool:
    """Whether a module is nothing but the product with its weight."""
    if type(module) is nn.Linear:
        return module._parameters["bias"] is None and not _has_hooks(module)
    return type(module) is QuantizedLinear and not _has_hooks(module)


def _weights(module: nn.Module, names: tuple[str, ...]) -> tuple[Tensor, ...] | str:
    """The matrices of a module; or why they are not for the kernels: they may have been changed."""
    found = []
    for name in names:  # part of every call: the dictionaries of torch, as __getattr__ is slow
        child = module._modules[name]
        if child is None or not _is_matrix(child):
            return f"{name} was replaced, or has hooks"
        weight = child._parameters["weight"]
        assert weight is not None
        found.append(weight)
    return tuple(found)


def _about_matrices(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """Why a module's projections cannot be read by the kernels, or None."""
    weights = []
    for name in names:
        child = getattr(module, name)
        if not _is_matrix(child):
            if type(child) is nn.Linear and child.bias is not None:
                return f"{name} has a bias"
            if type(child) in (nn.Linear, QuantizedLinear):
                return f"{name} has hooks, or a forward of its own"
            return f"{name} is a {type(child).__module__}.{type(child).__name__}"
        weights.append(child.weight)
    for name, w in zip(names, weights, strict=True):
        if w.is_meta:
            return f"{name} is on the meta device"
        if not ops.is_quantized(w) and w.dtype not in DTYPES:
            return f"{name} is {w.dtype}"
        if w.device != weights[0].device:
            return f"{name} is on {w.device}, {names[0]} on {weights[0].device}"
    dense = {w.dtype for w in weights if not ops.is_quantized(w)}
    if len(dense) > 1:
        return f"its matrices are of several dtypes: {', '.join(sorted(map(str, dense)))}"
    return None


class _Packed:
    """Weights of several matrices in one for the fused kernels, made again when one was changed."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._value: Any = None

    def get(self, weights: tuple[Tensor, ...], make: Callable[..., Any]) -> Any:
        if torch.compiler.is_compiling() and self._value is not None:
            return self._value
        key = tuple((w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights)
        if key != self._key:
            self._value = make(*weights)
            self._key = tuple(
                (w.data_ptr(), -1 if w.is_inference() else w._version) for w in weights
            )
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> _Packed:
        return _Packed()


def _can_pack(*weights: Tensor) -> bool:
    return cuda_ops.serves(weights[0]) and not any(map(ops.is_quantized, weights))


def _pack_gate_up(gate: Tensor, up: Tensor) -> ops.PackedGateUp:
    """Packed rows, of which the two parameters become views: memory holds them once."""
    packed = ops.pack_gate_up(gate.detach(), up.detach())
    gate.data, up.data = ops.unpack_gate_up(packed)
    return packed


def _gate_up(mlp: Any, gate: Tensor, up: Tensor) -> ops.PackedGateUp | tuple[Tensor, Tensor]:
    packed = getattr(mlp, "_minitron", None)
    if packed is not None and _can_pack(gate, up):
        joined: ops.PackedGateUp = packed.get((gate, up), _pack_gate_up)
        return joined
    return gate, up


def _qkv(
    attention: Any, weights: tuple[Tensor, Tensor, Tensor]
) -> ops.PackedQKV | tuple[Tensor, Tensor, Tensor]:
    packed = getattr(attention, "_minitron_packed", None)
    if packed is not None and _can_pack(*weights):
        pack = functools.partial(ops.pack_qkv, head_dim=attention.head_dim)
        joined: ops.PackedQKV = packed.get(weights, pack)
        return joined
    return weights


# -------------------------------------------------------------------------------------- the classes


def compute_norm(norm: Any, x: Tensor, original: Callable[..., Any]) -> Tensor:
    """The forward of an RMSNorm module; ``original`` is what transformers has for it."""
    reason = why_not(x, norm.weight)
    if reason is not None:
        note(reason)
        result: Tensor = original(x)
        return result
    return ops.rms_norm(x, norm.weight, norm.variance_epsilon)


def compute_mlp(mlp: Any, x: Tensor, original: Callable[..., Any]) -> Tensor:
    """The forward of an MLP module."""
    weights = _for_mlp(mlp, x)
    if isinstance(weights, str):
        note(weights)
        result: Tensor = original(x)
        return result
    return _mlp(mlp, weights, x)


def compute_attention(
    attention: Any,
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    cache: Any,
    kwargs: dict[str, Any],
    original: Callable[..., Any],
) -> tuple[Tensor, Tensor | None]:
    """The forward of an attention module."""
    weights = _for_attention(attention, x, position_embeddings, mask, kwargs)
    if isinstance(weights, str):
        note(weights)
        result: tuple[Tensor, Tensor | None] = original(
            x, position_embeddings, mask, cache, **kwargs
        )
        return result
    assert position_embeddings is not None
    return _attention(attention, weights, x, position_embeddings, mask, cache), None


@functools.cache
def _has_amx() -> bool:
    """Whether this CPU multiplies tiles of bfloat16, which PyTorch does and the kernels do not."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


def _is_for_torch(rows: Tensor, *weights: Tensor) -> bool:
    """Whether PyTorch's products are the faster ones: of many rows, on such a CPU."""
    return (
        rows.shape[0] >= _MANY_ROWS
        and rows.dtype is torch.bfloat16
        and rows.device.type == "cpu"
        and not cuda_ops.emulate
        and not any(map(ops.is_quantized, weights))
        and _has_amx()
    )


_MANY_ROWS = 32  # from where on they may be; no such CPU was measured


class _Norm(nn.Module):
    """Llama's and Mistral's RMSNorm."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return compute_norm(self, hidden_states, super().forward)


def _norm_of(norm: Any) -> ops.Norm:
    return ops.Norm(norm.weight, norm.variance_epsilon)


_GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
_QKV = ("q_proj", "k_proj", "v_proj")
_QKVO = (*_QKV, "o_proj")


def _for_mlp(mlp: nn.Module, x: Tensor) -> tuple[Tensor, ...] | str:
    """The matrices, if this call is for the kernels, or why not."""
    weights = _weights(mlp, _GATE_UP_DOWN)
    if isinstance(weights, str):
        return weights
    return why_not(x, *weights) or weights


class _MLP(nn.Module):
    """Their MLP; gate and up are packed on a GPU."""

    gate_proj: Any
    up_proj: Any
    down_proj: Any

    def forward(self, x: Tensor) -> Tensor:
        return compute_mlp(self, x, super().forward)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """With gate and up as matrices of their own, not as rows of the packed one."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name in ("gate_proj", "up_proj"):
            weight = state.get(f"{prefix}{name}.weight")
            if weight is not None and not weight.is_contiguous() and not kwargs.get("keep_vars"):
                state[f"{prefix}{name}.weight"] = weight.contiguous()
        return state


def _mlp(
    mlp: Any,
    weights: tuple[Tensor, ...],
    x: Tensor,
    norm: ops.Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(rows.shape)
    gate, up, down = weights
    if _is_for_torch(rows, *weights):
        if norm is not None:
            rows = ops.rms_norm(rows, *norm)
        hidden = F.silu(F.linear(rows, gate), inplace=True).mul_(F.linear(rows, up))
        out = F.linear(hidden, down)
        return (out if added is None else out.add_(added)).view(x.shape)
    return ops.swiglu_mlp(rows, _gate_up(mlp, gate, up), down, norm, added).view(x.shape)


class _Attention(nn.Module):
    """Their attention: projections, RoPE and the cache's new rows in one op, attention, o_proj."""

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    o_proj: Any
    _minitron: _Shared

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        return compute_attention(
            self,
            hidden_states,
            position_embeddings,
            attention_mask,
            past_key_values,
            kwargs,
            super().forward,
        )


def _for_attention(
    attention: Any, x: Tensor, position_embeddings: Any, mask: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, ...] | str:
    """The matrices, if this call is for the kernels, or why not."""
    if kwargs.get("output_attentions"):
        return "output_attentions is set, and only eager attention has them"
    if mask is not None and not isinstance(mask, Tensor):
        return f"the mask is a {type(mask).__name__}"
    if kwargs.get("is_causal") is False or not attention.is_causal:
        return "attention is not to be causal"
    if attention.training and attention.attention_dropout:
        return "dropout is wanted"
    if position_embeddings is None or position_embeddings[0].shape[-1] != attention.head_dim:
        return "position_embeddings do not cover a whole head"
    weights = _weights(attention, _QKVO)
    if isinstance(weights, str):
        return weights
    return why_not(x, *weights) or weights


class _Step:
    """What all layers of one forward pass share: rotary tables, places in the cache, lengths."""

    def __init__(self, cos: Tensor, sin: Tensor, mask: Tensor | None, batch: int) -> None:
        self.cos, self.mask = cos, mask
        self.layers: set[int] = set()
        half = cos.shape[-1] // 2
        tables = [t[..., :half].flatten(0, 1).float().contiguous() for t in (cos, sin)]
        positions = torch.arange(len(tables[0]), dtype=torch.int32, device=cos.device)
        if cos.shape[0] != batch:
            positions = positions.repeat(batch)
        self.rope = ops.Rope(tables[0], tables[1], positions)
        self._places: dict[tuple[int, ...], tuple[Tensor, Layout]] = {}

    def rotated(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k [B * S, heads, D], turned by their positions."""
        cos, sin, positions, _ = self.rope
        assert positions is not None
        return ops.apply_rope(q, k, cos, sin, positions)

    def places(self, q_shape: tuple[int, int, int, int], at: Appended) -> tuple[Tensor, Layout]:
        """Slots of the new keys, and the layout; q is [B, S, Hq, D]."""
        batch, seqlen, heads, head_dim = q_shape
        rows, past = at
        known = past if isinstance(past, int) else -1
        key = rows.step, rows.room, rows.k.shape[0], known
        found = self._places.get(key)
        if found is None:
            device = rows.k.device
            new = torch.arange(seqlen, dtype=torch.int32, device=device) + past
            first = torch.arange(batch, dtype=torch.int32, device=device) * rows.step
            # (what a StaticCache has no room for would fall into another head's rows)
            if known < 0:
                new = torch.where(new < rows.room, new, -rows.k.shape[0])
            slots = (first[:, None] + new).flatten().int()
            mask = self.mask
            if mask is None and isinstance(past, Tensor):
                ends = (past + seqlen).to(torch.int32).expand(batch)
                mask = ends[:, None, None, None]
            like = rows.k.new_empty((1, heads, head_dim)).expand(batch * seqlen, heads, head_dim)
            total = None if known < 0 else known + seqlen
            found = slots, Layout.of(like, rows, batch, total, mask)
            self._places[key] = found
        return found


class _Shared:
    """Of the attention modules of one model: what was before `patch`, and the latest step."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.attn_implementation = config._attn_implementation
        self.step: _Step | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        copy = _Shared.__new__(_Shared)
        copy.config = memo.get(id(self.config), self.config)
        copy.attn_implementation, copy.step = self.attn_implementation, None
        return copy


def _step_of(attention: Any, cos: Tensor, sin: Tensor, mask: Tensor | None, batch: int) -> _Step:
    """The step of a layer's call: the latest, if that began with the very same tensors."""
    shared: _Shared | None = getattr(attention, "_minitron", None)
    if shared is None or torch.compiler.is_compiling():
        return _Step(cos, sin, mask, batch)
    step, index = shared.step, attention.layer_idx
    if step is None or step.cos is not cos or step.mask is not mask or index in step.layers:
        shared.step = step = _Step(cos, sin, mask, batch)
    step.layers.add(index)
    return step


def _attention(
    attention: Any,
    weights: tuple[Tensor, ...],
    x: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    mask: Tensor | None,
    cache: Any,
    norm: ops.Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """x [B, S, H], normalised first where asked, through attention and o_proj (+ residual)."""
    batch, seqlen, hidden = x.shape
    wq, wk, wv, wo = weights
    d, index = attention.head_dim, attention.layer_idx
    heads, kv_heads = wq.shape[0] // d, wk.shape[0] // d
    window = None
    if isinstance(attention, mistral.MistralAttention):
        window = attention.config.sliding_window
    step = _step_of(attention, *position_embeddings, mask, batch)
    rows = x.reshape(-1, hidden)
    at = None
    if mask is None or is_bounds(mask):
        at = make_room(cache, index, (batch, seqlen, kv_heads, d), x)
    if at is None:
        qkv = _projected(attention, (wq, wk, wv), rows, norm)
        out = _by_update(attention, qkv, step, (batch, seqlen), mask, cache, window)
    else:
        slots, layout = step.places((batch, seqlen, heads, d), at)
        kept = at.rows.k[None], at.rows.v[None]
        if _is_for_torch(rows, wq, wk, wv):
            q, k, v = _projected(attention, (wq, wk, wv), rows, norm)
            ops.rope_append(k, v, step.rope, kept, slots)
            q = step.rotated(q, k[:, :0])[0]
        else:
            qkv_weights = _qkv(attention, (wq, wk, wv))
            q = ops.qkv_rope_append(rows, norm, qkv_weights, step.rope, kept, slots)
        out = attend(q, at.rows, layout, attention.scaling, window).flatten(1)
    added = None if residual is None else residual.reshape(rows.shape)
    if _is_for_torch(out, wo):
        out = F.linear(out, wo)
        return (out if added is None else out.add_(added)).view(batch, seqlen, -1)
    return ops.linear(out, wo, added).view(batch, seqlen, -1)


def _projected(
    attention: Any, weights: tuple[Tensor, ...], rows: Tensor, norm: ops.Norm | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Q [B * S, Hq, D], K and V [B * S, Hk, D] of x [B * S, H], not rotated."""
    if _is_for_torch(rows, *weights):
        if norm is not None:
            rows = ops.rms_norm(rows, *norm)
        products = [F.linear(rows, w) for w in weights]
    else:
        products = [ops.linear(rows, w, norm=norm) for w in weights]
    q, k, v = (y.unflatten(-1, (-1, attention.head_dim)) for y in products)
    return q, k, v


def _by_update(
    attention: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    step: _Step,
    shape: tuple[int, int],
    mask: Tensor | None,
    cache: Any,
    window: int | None,
) -> Tensor:
    """As transformers goes about it, for other caches and masks: [B * S, Hq * D]."""
    q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in (*step.rotated(*qkv[:2]), qkv[2]))
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx)
    out, _ = attention_forward(
        attention, q, k, v, mask, scaling=attention.scaling, sliding_window=window
    )
    return out.reshape(shape[0] * shape[1], -1)


class _DecoderLayer(nn.Module):
    """Their decoder layer: norms and residual sums ride on the products."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        x, attention, mlp = hidden_states, self.self_attn, self.mlp
        norms = self.input_layernorm, self.post_attention_layernorm
        parts = attention, mlp, *norms
        if all(map(_is_ours, parts)) and not any(map(_has_hooks, parts)):
            first, second = map(_norm_of, norms)
            of_mlp = _for_mlp(mlp, x)
            of_attention = _for_attention(attention, x, position_embeddings, attention_mask, kwargs)
            if (
                not isinstance(of_mlp, str)
                and not isinstance(of_attention, str)
                and why_not(x, first.weight, second.weight) is None
            ):
                assert position_embeddings is not None
                places = position_embeddings, attention_mask, past_key_values
                x = _attention(attention, of_attention, x, *places, first, x)
                return _mlp(mlp, of_mlp, x, second, x)
        original: Tensor = super().forward(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        return original


_KINDS: dict[type, tuple[str, type]] = {
    llama.LlamaRMSNorm: ("RMSNorm", _Norm),
    mistral.MistralRMSNorm: ("RMSNorm", _Norm),
    llama.LlamaMLP: ("MLP", _MLP),
    mistral.MistralMLP: ("MLP", _MLP),
    llama.LlamaAttention: ("attention", _Attention),
    mistral.MistralAttention: ("attention", _Attention),
    llama.LlamaDecoderLayer: ("decoder layer", _DecoderLayer),
    mistral.MistralDecoderLayer: ("decoder layer", _DecoderLayer),
}


@functools.cache
def _class_for(original: type) -> type:
    """The class that a module of class ``original`` gets."""
    return type(f"Minitron{original.__name__}", (_KINDS[original][1], original), {})


def _original(module: nn.Module) -> type | None:
    """The class that a patched module had; None for other modules."""
    for parent in type(module).__mro__[1:]:
        if parent in _KINDS and _class_for(parent) is type(module):
            return parent
    return None


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module, (_Norm, _MLP, _Attention, _DecoderLayer))


# ------------------------------------------------------------------------------- patch and unpatch


def _refusal(kind: str, module: Any) -> str | None:
    """Why a module is left as it is, or None."""
    if "forward" in module.__dict__:
        return "it has a forward of its own (of a kernel, or of accelerate's offloading)"
    if module.training:
        return "it is in training mode, and the kernels compute no gradients: model.eval() first"
    if kind == "RMSNorm":
        if module.weight.dtype not in DTYPES:
            return f"its weight is {module.weight.dtype}"
        return "it is on the meta device" if module.weight.is_meta else None
    if kind == "MLP":
        if module.config.hidden_act not in ("silu", "swish"):
            return f"its activation is {module.config.hidden_act}, the kernels have silu"
        return _about_matrices(module, _GATE_UP_DOWN)
    reason = _about_matrices(module, _QKVO)
    if reason is not None:
        return reason
    d = module.head_dim
    if d % 2 or d > 256:
        return f"head_dim is {d}, the kernels take even ones up to 256"
    if cuda_ops.serves(module.o_proj.weight) and d not in cuda_attention.HEAD_DIMS:
        return f"head_dim is {d}, attention on a GPU takes {cuda_attention.HEAD_DIMS}"
    heads, kv_heads = (getattr(module, n).weight.shape[0] // d for n in ("q_proj", "k_proj"))
    if heads % kv_heads:
        return f"{heads} query heads are no multiple of {kv_heads} heads of keys"
    return None


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, type]]:
    """Modules that have a kind, children first: name, module, kind, class without `patch`."""
    for name, module in reversed(list(model.named_modules())):
        original = _original(module) or type(module)
        if original in _KINDS:
            yield name, module, _KINDS[original][0], original


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if not any(True for _ in _modules(model)):
        raise TypeError(
            f"model must have modules of transformers' Llama or Mistral, "
            f"{type(model).__module__}.{type(model).__name__} has none"
        )


def patch(model: nn.Module) -> PatchReport:
    """Let the kernels compute in a loaded Llama- or Mistral-type model, in place.

    RMSNorm, MLP, attention (with RoPE and the cache) and decoder layers are replaced wherever they
    are, so the model may have any head. DynamicCache, StaticCache and no cache are written in
    place, other caches by their `update`; masks are those of attn_implementation "minitron" (see
    `register_attention`), which the config says until `unpatch`. On a GPU gate and up are packed at
    the first call, their parameters becoming views, and Q, K and V as a copy. Everything else of
    the model, its state dict and `save_pretrained` included, is as before.

    The report tells what was replaced and why anything was left. A second call looks again at what
    the first one left. Raises TypeError for anything but a model with such modules,
    NotImplementedError for a version of transformers with other hooks.
    """
    _check_model(model)
    register_attention()
    report = PatchReport()
    shared: dict[int, _Shared] = {}
    for name, module, kind, original in _modules(model):
        if type(module) is original:
            if kind == "decoder layer":
                reason = None if _has_our_parts(module) else "parts of it were left"
            else:
                reason = _refusal(kind, module)
            if reason is not None:
                report.left[name] = reason
                continue
            if kind == "attention":
                config: Any = module.config
                if id(config) not in shared:
                    shared[id(config)] = _shared_of(model, config) or _Shared(config)
                module.__dict__["_minitron"] = shared[id(config)]
                module.__dict__["_minitron_packed"] = _Packed()
                config._attn_implementation_internal = NAME
            elif kind == "MLP":
                module.__dict__["_minitron"] = _Packed()
            module.__class__ = _class_for(original)  # type: ignore[arg-type]
        report.replaced.setdefault(kind, []).append(name)
    return PatchReport(
        {kind: names[::-1] for kind, names in report.replaced.items()},
        dict(reversed(report.left.items())),
    )


def _has_our_parts(layer: Any) -> bool:
    parts = layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
    return all(map(_is_ours, parts)) and "forward" not in layer.__dict__


def _shared_of(model: nn.Module, config: Any) -> _Shared | None:
    """What an earlier `patch` left for the attention modules of this config."""
    for module in model.modules():
        if isinstance(module, _Attention) and module.config is config:
            return module._minitron
    return None


def unpatch(model: nn.Module) -> None:
    """Give the modules back their classes, bit for bit; without effect on a model not patched."""
    _check_model(model)
    for _, module, kind, original in _modules(model):
        if type(module) is original:
            continue
        module.__class__ = original
        shared = module.__dict__.pop("_minitron", None)
        module.__dict__.pop("_minitron_packed", None)
        if kind == "attention":
            if shared.config._attn_implementation == NAME:
                shared.config._attn_implementation_internal = shared.attn_implementation
        elif kind == "MLP":
            for name in ("gate_proj", "up_proj"):
                weight = getattr(module, name).weight
                if not ops.is_quantized(weight) and not weight.is_contiguous():
                    weight.data = weight.data.contiguous()
