"""Attention of transformers' models by the kernels: what a mask means, where a cache's rows lie.

Both interfaces of transformers that a name of ``attn_implementation`` stands for are here. The
mask function tells each sequence's keys by their first and last column where that says it all: the
causal mask, also in a window, of a batch padded on the left or the right. Its result is an int32
tensor of four dimensions (transformers passes such on as they are), which only `attention_forward`
gets:

    None                      every query sees the keys before it, and the last one all keys
    ends [B, 1, 1, 1]         sequence b has the keys 0 ... ends[b]-1, as in a StaticCache
    bounds [B, 1, 1, 2]       and none before its first one: padding on the left

Any other mask is the dense one of transformers' SDPA, and SDPA computes that call; the reason is
logged.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, masking_utils
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from minitron_kernels import cuda_attention, cuda_ops, ops
from minitron_kernels.checks import DTYPES

Tensor = torch.Tensor

NAME = "minitron"
_PAGE = 16  # rows by which a cache grows are a multiple of it: the kernels' smallest page
_log = logging.getLogger("minitron_kernels.integrations.transformers")


@functools.cache
def _log_once(reason: str) -> None:
    _log.warning("computed by transformers, not by the kernels: %s", reason)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def note(reason: str) -> None:
    """Log, once, why a call is left to transformers; torch.compile calls it while it traces."""
    _log_once(reason)


def why_not(x: Tensor, *weights: Tensor) -> str | None:
    """Why the kernels do not compute with these, or None."""
    if torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in weights)):
        return "gradients may be wanted, which the kernels do not give: use torch.no_grad()"
    if torch.is_autocast_enabled(x.device.type):
        return "autocast chooses the dtypes"
    for w in (x, *weights):
        if not ops.is_quantized(w) and (w.dtype is not x.dtype or w.dtype not in DTYPES):
            return f"x is {x.dtype} and a weight {w.dtype}"
    return None


# ------------------------------------------------------------------------------------------ masks


def _same(f: Any, g: Any) -> bool:
    """Whether two mask functions were made by the same code out of the same things."""
    if not (isinstance(f, FunctionType) and isinstance(g, FunctionType)):
        if isinstance(f, tuple) and isinstance(g, tuple):
            return len(f) == len(g) and all(map(_same, f, g))
        return type(f) is type(g) and isinstance(f, int) and f == g
    if f is g:
        return True
    cells = [[cell.cell_contents for cell in h.__closure__ or ()] for h in (f, g)]
    return f.__code__ is g.__code__ and _same(*map(tuple, cells))


def _is_plain(mask_function: Callable[..., Any], window: int | None) -> bool:
    """Whether a mask function is the causal one, or that of a sliding window."""
    if window is None:
        return mask_function is masking_utils.causal_mask_function
    return _same(mask_function, masking_utils.sliding_window_causal_mask_function(window))


def mask_forward(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """For AttentionMaskInterface; arguments as of `masking_utils.sdpa_mask`, result as above."""
    is_plain = not use_vmap and _is_plain(mask_function, local_size)
    end = q_offset + q_length - kv_offset  # of the keys: the last query stands on the last one
    if is_plain and attention_mask is None:
        if isinstance(end, int) and end == kv_length:
            return None
        ends = torch.zeros((batch_size, 1, 1, 1), dtype=torch.int32, device=device)
        return ends + (end.to(torch.int32) if isinstance(end, Tensor) else end)
    if is_plain and attention_mask is not None and not torch.compiler.is_compiling():
        columns = attention_mask.bool()[:, kv_offset:]
        found, bounds = _bounds(columns, int(end), q_length, kv_length)
        if found:
            return bounds
    kwargs.pop("allow_is_causal_skip", None)
    kwargs.pop("allow_is_bidirectional_skip", None)
    dense: Tensor | None = masking_utils.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    return dense


def _bounds(columns: Tensor, end: int, q_length: int, kv_length: int) -> tuple[bool, Tensor | None]:
    """Whether a padding mask, bool [B, keys], is one run of keys in each row, and its form above.

    Zeros behind the run must be among the queries' own columns: those are padding, which nobody
    looks at, and no query before them sees them. Waits for the device once, or twice.
    """
    if columns.shape[1] >= end and bool(columns[:, :end].all()):
        start = None
    else:
        columns = torch.nn.functional.pad(columns[:, :end], (0, max(end - columns.shape[1], 0)))
        count = columns.sum(1)
        start = torch.where(count > 0, columns.int().argmax(1), end)
        runs = columns[:, 0].int() + (columns[:, 1:] > columns[:, :-1]).sum(1)
        good = (runs <= 1) & ((count == 0) | (start + count >= end - q_length))
        all_good, any_start = torch.stack((good.all(), (start > 0).any())).tolist()
        if not all_good:
            return False, None
        if not any_start:
            start = None
    batch = columns.shape[0]
    if start is None and end == kv_length:
        return True, None
    ends = torch.full((batch,), end, dtype=torch.int32, device=columns.device)
    told = [ends] if start is None else [start.to(torch.int32), ends]
    return True, torch.stack(told, dim=1)[:, None, None]


def is_bounds(mask: Any) -> bool:
    """Whether a mask is ends or bounds, not a dense one."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim != 4:
        return False
    return mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] in (1, 2)


def _dense(mask: Tensor | None, q: Tensor, keys: int, window: int | None) -> Tensor:
    """None, ends or bounds as the bool [B, 1, S, keys] that SDPA takes."""
    device, seqlen = q.device, q.shape[2]
    ends = torch.full((q.shape[0],), keys, device=device) if mask is None else mask[:, 0, 0, -1]
    column = torch.arange(keys, device=device)
    row = ends[:, None, None] - seqlen + torch.arange(seqlen, device=device)[:, None]
    seen = column <= row
    if mask is not None and mask.shape[-1] == 2:
        seen = seen & (column >= mask[:, 0, 0, 0, None, None])
    if window is not None:
        seen = seen & (column > row - window)
    return seen[:, None]


# ---------------------------------------------------------------------------------- rows of a cache


class Rows(NamedTuple):
    """K and V [R, Hk, D] of a batch; the keys of sequence b start at row b * ``step``."""

    k: Tensor
    v: Tensor
    step: int
    room: int  # rows of a sequence that there are

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Rows:
        """k and v [B, Hk, T, D], where they lie if their strides allow that, else copied."""
        batch, heads, keys, head_dim = k.shape
        sequence, head, row, feature = k.stride()
        in_place = (
            v.stride() == k.stride()
            and feature == 1
            and row > 0
            and sequence % row == 0
            and (batch == 1 or sequence // row >= keys)
        )
        if not in_place:
            k, v = (t.transpose(1, 2).reshape(batch * keys, heads, head_dim) for t in (k, v))
            return cls(k, v, keys, keys)
        step = keys if batch == 1 else sequence // row
        size = ((batch - 1) * step + keys, heads, head_dim)
        k, v = (t.as_strided(size, (row, head, 1)) for t in (k, v))
        return cls(k, v, step, keys)

    def pages(self) -> int | None:
        """The page size by which the decode kernel can read them, if there is one."""
        sizes = reversed(cuda_attention.PAGE_SIZES)
        return next((p for p in sizes if not (self.step % p or self.room % p)), None)


class Layout(NamedTuple):
    """Which keys the queries of each sequence see, as `ops.attention` or `attention_kvcache` take.

    Keys that belong to nobody (padding, room for more) are sequences of their own, without queries.
    """

    seqlen: int
    cu_q: Tensor
    cu_k: Tensor
    page: int = 0  # 0: for ops.attention
    table: Tensor | None = None  # else [B, pages], and cu_k holds the lengths [B]

    @classmethod
    def of(
        cls, q: Tensor, rows: Rows, batch: int, total: int | None, mask: Tensor | None
    ) -> Layout:
        """Of q [B * S, Hq, D]; ``total`` keys in each sequence where the mask is None."""
        seqlen, device = q.shape[0] // batch, q.device
        each = torch.arange(batch + 1, dtype=torch.int32, device=device)
        cu_q = each * seqlen
        if mask is None:
            assert total is not None
            ends = torch.full((batch,), total, dtype=torch.int32, device=device)
        else:
            ends = mask[:, 0, 0, -1]
        has_starts = mask is not None and mask.shape[-1] == 2
        page = None if has_starts or seqlen > cuda_attention.MAX_DECODE_ROWS else rows.pages()
        if page is not None and cuda_attention.serves(q):
            width = -(-(rows.room if total is None else min(total, rows.room)) // page)
            first = each[:-1, None] * (rows.step // page)
            table = first + torch.arange(width, dtype=torch.int32, device=device)
            return cls(seqlen, cu_q, ends, page, table)
        if mask is None and total == rows.step and rows.k.shape[0] == batch * rows.step:
            return cls(seqlen, cu_q, each * rows.step)
        base = each[:-1] * rows.step
        starts = base + mask[:, 0, 0, 0] if mask is not None and has_starts else base
        edges = torch.stack((starts, base + ends), dim=1).flatten()
        cu_k = torch.nn.functional.pad(torch.nn.functional.pad(edges, (1, 0)), (0, 1))
        cu_k[-1:] = rows.k.shape[0]
        return cls(seqlen, cu_q.repeat_interleave(2), cu_k)


def attend(q: Tensor, rows: Rows, layout: Layout, scale: float, window: int | None) -> Tensor:
    """q [B * S, Hq, D] over the keys that a layout names -> [B * S, Hq, D]."""
    if layout.table is not None:
        paged_k, paged_v = (t.unflatten(0, (-1, layout.page)) for t in (rows.k, rows.v))
        out = ops.attention_kvcache(
            q,
            None,
            None,
            paged_k,
            paged_v,
            layout.table,
            layout.cu_k,
            cu_seqlens_q=None if layout.seqlen == 1 else layout.cu_q,
            min_seqlen_q=layout.seqlen,
            max_seqlen_q=layout.seqlen,
            softmax_scale=scale,
            window=window,
        )
    else:
        out = ops.attention(
            q,
            rows.k,
            rows.v,
            layout.cu_q,
            layout.cu_k,
            max_seqlen_q=layout.seqlen,
            softmax_scale=scale,
            window=window,
        )
    assert isinstance(out, Tensor)
    return out


class _Buffer(NamedTuple):
    """Room for the keys of a DynamicLayer, [B, room, Hk, D], and its views that the layer has.

    A step writes into the room instead of copying all keys. Only who holds the very views of the
    last step may: a layer that was cropped, reordered or copied has others, and gets a new buffer.
    """

    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor


class Appended(NamedTuple):
    """A cache's rows; the new ones of a call go behind ``past`` keys of each sequence."""

    rows: Rows
    past: int | Tensor


def make_room(
    cache: Cache | None, index: int, shape: tuple[int, int, int, int], like: Tensor
) -> Appended | None:
    """Rows for new keys [B, S, Hk, D] of layer ``index``, which the cache then counts as its own.

    Caches other than DynamicCache and StaticCache give None: their `update` is to be called.
    """
    batch, seqlen, heads, head_dim = shape
    if cache is None:
        k, v = (like.new_empty((batch * seqlen, heads, head_dim)) for _ in range(2))
        return Appended(Rows(k, v, seqlen, seqlen), 0)
    if getattr(cache, "offloading", False) or len(cache.layers) <= index:
        return None
    layer: Any = cache.layers[index]
    if type(cache).update is not Cache.update:
        return None
    if type(layer) is StaticLayer:
        return _room_in_static(layer, shape, like)
    if type(layer) is DynamicLayer and not torch.compiler.is_compiling():
        return _room_in_dynamic(layer, shape, like)
    return None


def _room_in_static(layer: Any, shape: tuple[int, int, int, int], like: Tensor) -> Appended | None:
    batch, seqlen, heads, head_dim = shape
    if not layer.is_initialized:
        nothing = like.new_empty((batch, heads, 0, head_dim))
        layer.lazy_initialization(nothing, nothing)
    keys = layer.keys
    if (keys.shape[0], keys.shape[1], keys.shape[3]) != (batch, heads, head_dim):
        return None
    if keys.dtype is not like.dtype or keys.device != like.device:
        return None
    past = layer.cumulative_length.clone()
    on_host = past.device.type == "cpu" and not cuda_ops.emulate
    if on_host and not torch.compiler.is_compiling() and int(past) + seqlen > keys.shape[2]:
        raise ValueError(
            f"StaticCache has room for {keys.shape[2]} tokens, {int(past) + seqlen} are needed"
        )
    layer.cumulative_length.add_(seqlen)
    return Appended(Rows.of(keys, layer.values), past)


def _room_in_dynamic(layer: Any, shape: tuple[int, int, int, int], like: Tensor) -> Appended | None:
    batch, seqlen, heads, head_dim = shape
    if not layer.is_initialized:
        nothing = like.new_empty((batch, heads, 0, head_dim))
        layer.lazy_initialization(nothing, nothing)
    keys, values = layer.keys, layer.values
    past = 0
    if keys.numel():
        past = keys.shape[2]
        if tuple(keys.shape) != (batch, heads, past, head_dim) or keys.shape != values.shape:
            return None
        if keys.dtype is not like.dtype or keys.device != like.device:
            return None
    total = past + seqlen
    buffer: _Buffer | None = layer.__dict__.get("_minitron_buffer")
    is_ours = buffer is not None and buffer.keys is keys and buffer.values is values
    if buffer is None or not is_ours or total > buffer.k.shape[1]:
        room = -(-(total + min(max(total // 2, 64), 1024)) // _PAGE) * _PAGE
        k, v = (like.new_empty((batch, room, heads, head_dim)) for _ in range(2))
        if past:
            k[:, :past].copy_(keys.transpose(1, 2))
            v[:, :past].copy_(values.transpose(1, 2))
    else:
        k, v = buffer.k, buffer.v
    layer.keys, layer.values = (t[:, :total].transpose(1, 2) for t in (k, v))
    layer._minitron_buffer = _Buffer(k, v, layer.keys, layer.values)
    room = k.shape[1]
    return Appended(Rows(k.flatten(0, 1), v.flatten(0, 1), room, room), past)


# ------------------------------------------------------------------------------------- the function


def _refusal(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float, kwargs: Any
) -> str | None:
    """Why SDPA is to compute a call, or None."""
    if mask is not None and not is_bounds(mask):
        return "the mask is not a causal one with padding on one side"
    if dropout:
        return "dropout is wanted"
    if kwargs.get("position_bias") is not None:
        return "position_bias is given"
    if k.shape != v.shape or q.shape[3] != k.shape[3]:
        return "keys and values differ in shape"
    return why_not(q, k, v)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """For AttentionInterface: query [B, Hq, S, D], key and value [B, Hk, T, D] -> [B, S, Hq, D].

    What the kernels do not take (dense masks, gradients, dropout) goes to transformers' SDPA, and
    ``output_attentions`` to its eager attention; each reason is logged once.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    batch, heads, seqlen, head_dim = query.shape
    keys = key.shape[2]
    if attention_mask is not None and attention_mask.ndim == 2:  # of flash-attn's mask function
        columns = attention_mask.bool()
        found, attention_mask = _bounds(columns, keys, seqlen, keys)
        if not found:
            attention_mask = columns[:, None, None] & _dense(None, query, keys, sliding_window)
    if not causal and (attention_mask is None or is_bounds(attention_mask)):
        raise NotImplementedError("attention that is not causal: its mask must be given densely")
    if kwargs.get("output_attentions"):
        note("output_attentions is set, and only eager attention has them")
        return _eager(module, query, key, value, attention_mask, dropout, scaling, sliding_window)
    reason = _refusal(module, query, key, value, attention_mask, dropout, kwargs)
    if reason is not None:
        note(reason)
        if attention_mask is None or is_bounds(attention_mask):
            attention_mask = _dense(attention_mask, query, keys, sliding_window)
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=False, **kwargs
        )
        return out, None
    rows = Rows.of(key, value)
    q = query.transpose(1, 2).reshape(batch * seqlen, heads, head_dim)
    layout = Layout.of(q, rows, batch, keys if attention_mask is None else None, attention_mask)
    scale = head_dim**-0.5 if scaling is None else scaling
    out = attend(q, rows, layout, scale, sliding_window)
    return out.view(batch, seqlen, heads, head_dim), None


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """Attention with its weights [B, Hq, S, T], in plain PyTorch."""
    if mask is None or is_bounds(mask):
        mask = _dense(mask, query, key.shape[2], window)
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    logits = query @ key.transpose(2, 3) * scale
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    else:
        logits = logits + mask
    weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
    dropped = torch.nn.functional.dropout(weights, dropout, module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights


def register_attention() -> str:
    """Make "minitron" a value of ``attn_implementation``; returns that name.

    Registers the function and, which matters as much, its mask function: without one transformers
    passes no mask at all, and padded batches are silently wrong. Raises NotImplementedError for a
    version of transformers whose mask functions have other arguments.
    """
    check_version()
    AttentionInterface.register(NAME, attention_forward)
    masking_utils.AttentionMaskInterface.register(NAME, mask_forward)
    return NAME


@functools.cache
def check_version() -> None:
    """Raise NotImplementedError unless the hooks of this transformers are those known here."""
    import transformers

    if "q_offset" not in inspect.signature(masking_utils.sdpa_mask).parameters:
        raise NotImplementedError(
            f"transformers {transformers.__version__}: its mask functions take other arguments; "
            "tested are 5.18 and 5.23"
        )
