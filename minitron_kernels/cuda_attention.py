"""Attention of CUDA tensors by mk_attention and mk_attention_decode; see `cuda_ops.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from minitron_kernels import _native, cuda_ops
from minitron_kernels.cuda_ops import DTYPES, NO_ROPE, call, contiguous_rope, native_rope, pointer

if TYPE_CHECKING:
    from minitron_kernels.ops import Rope

Tensor = torch.Tensor

HEAD_DIMS = (64, 128)
PAGE_SIZES = (16, 32, 64, 128)
MAX_HEADS = 1024
MAX_DECODE_ROWS = 8  # rows of a sequence up to which the decode kernel takes it
COUNTER_BYTES = 4 << 16  # of its workspace, at the start: the rest may hold anything

# causal, window, softmax_scale, dtype, rope: the last fields of both ops' structs.
_Options = tuple[bool, int, float, int, object]


def serves(q: Tensor, k_cache: Tensor | None = None) -> bool:
    """As `cuda_ops.serves`; ``k_cache`` [pages, page, Hk, D] if the keys are paged."""
    heads, head_dim = q.shape[1:]
    limits = [
        (head_dim in HEAD_DIMS, f"attention takes head_dim {HEAD_DIMS}, it is {head_dim}"),
        (heads <= MAX_HEADS, f"attention takes up to {MAX_HEADS} heads, there are {heads}"),
    ]
    if k_cache is not None:
        page, strides = k_cache.shape[1], k_cache.stride()[:3]
        limits += [
            (page in PAGE_SIZES, f"attention takes pages of {PAGE_SIZES} tokens, they have {page}"),
            (
                all(n % 8 == 0 for n in strides),
                f"attention takes caches whose strides are multiples of 8, they are {strides}",
            ),
        ]
    return cuda_ops.serves_within(q, limits)


def as_int32(t: Tensor) -> Tensor:
    return t.to(torch.int32).contiguous()  # both return t itself where they can


def _wide(x: Tensor) -> Tensor:
    """x [T, H, D] so that it can be read 16 bytes at a time; copied only if it must be."""
    row, head, feature = x.stride()
    apart = min(row, head) >= x.shape[2] and row % 8 == 0 and head % 8 == 0  # not expanded
    if apart and feature == 1 and x.data_ptr() % 16 == 0:
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)


def outputs(q: Tensor, return_lse: bool, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse_shape = (q.shape[1], q.shape[0]) if return_lse else (0,)
    return out, torch.empty(lse_shape, dtype=torch.float32, device=q.device)


def _places(cu_seqlens: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The sequence [T] that each row belongs to, and its distance from that one's first row [T]."""
    rows = torch.arange(num_rows, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True, out_int32=True)
    return sequence, rows - cu_seqlens.index_select(0, sequence)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_seqlen_q: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    rope: Rope | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """ops.attention: out, lse. With rope, k is rotated by a launch of its own, q in the kernel."""
    out, lse = outputs(q, return_lse)
    num_rows = q.shape[0]
    largest = num_rows if max_seqlen_q is None else min(max_seqlen_q, num_rows)
    if q.numel() == 0 or largest == 0:
        return out, lse
    q, k, v = _wide(q), _wide(k), _wide(v)
    cu_q, cu_k = as_int32(cu_seqlens[0]), as_int32(cu_seqlens[1])
    turn = NO_ROPE
    if rope is not None:
        cos, sin, _, interleaved = contiguous_rope(rope)
        turn = native_rope(cos, sin, None, interleaved)
        if k.shape[0]:
            places = _places(cu_k, k.shape[0])[1]
            k = cuda_ops.apply_rope(k[:, :0], k, cos, sin, places, interleaved)[1]
    call(
        "attention",
        q,
        *(t.data_ptr() for t in (q, k, v, out)),
        lse.data_ptr() if return_lse else 0,
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        0,
        0,
        *q.stride()[:2],
        0,
        *k.stride()[:2],
        0,
        *v.stride()[:2],
        *out.stride()[:2],
        num_rows,  # lse_stride
        0,
        num_rows,
        k.shape[0],
        cu_q.shape[0] - 1,
        q.shape[1],
        *k.shape[1:],
        0,
        0,
        0,
        largest,
        0,
        0,
        causal,
        window or 0,
        scale,
        DTYPES[q.dtype],
        turn,
    )
    return out, lse


class Workspaces:
    """Workspaces of mk_attention_decode: one for each stream, grown on demand.

    Streams may run at the same time; kernels on one stream never do. One that became too small is
    kept only if a captured graph has its address.
    """

    def __init__(self) -> None:
        self._of_stream: dict[tuple[torch.device, int], Tensor] = {}
        self._captured: dict[int, Tensor] = {}  # by address

    def get(self, q: Tensor, num_bytes: int) -> Tensor:
        """At least ``num_bytes`` for a launch on the current stream of q's device, 0 at first.

        Where a graph is captured on a stream that has none so large, as is usual after calls on
        another one, it is the graph's own, whose counters each of its runs sets to 0: 256 KiB more
        to write than if the call had been made once on this stream before.
        """
        stream, captures = cuda_ops.emulated_stream, True  # the emulator does not tell
        if q.is_cuda:
            stream = torch._C._cuda_getCurrentRawStream(q.device.index)
            captures = torch.cuda.is_current_stream_capturing()
        space = self._of_stream.get((q.device, stream))
        if space is None or space.numel() < num_bytes:
            if q.is_cuda and captures:
                space = torch.empty(num_bytes, dtype=torch.uint8, device=q.device)
                space[:COUNTER_BYTES].zero_()
                return space
            size = max(num_bytes + num_bytes // 4, 1 << 16)  # so that it seldom grows
            space = cuda_ops.lasting_zeros(size, torch.uint8, q.device)
            self._of_stream[q.device, stream] = space
        if captures:
            self._captured[space.data_ptr()] = space
        return space

    def clear(self) -> None:
        self._of_stream.clear()
        self._captured.clear()


workspaces = Workspaces()


def attention_kvcache(
    q: Tensor,
    new: tuple[Tensor, Tensor] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens_q: Tensor | None,
    bounds: tuple[int, int | None],
    rope: Rope | None,
    causal: bool,
    scale: float,
    window: int | None,
    return_lse: bool,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ops.attention_kvcache: out, lse. ``bounds`` are its min_seqlen_q and max_seqlen_q.

    A sequence's kernel depends on its own rows of q alone: that of decoding up to MAX_DECODE_ROWS,
    else that of prompts; the bounds tell which can occur. Decoding rotates and appends by itself;
    before the other kernel K is rotated, and K and V are appended, by a launch of their own.

    ``out``: written instead of a new tensor, of q's shape with adjoining features. ``workspace``:
    `decode_workspace_bytes` of uint8, 0 at first, in place of the stream's own; launches that share
    one must not overlap.
    """
    out, lse = outputs(q, return_lse, out)
    num_rows, (smallest, largest) = q.shape[0], bounds
    if cu_seqlens_q is None:
        smallest = largest = 1
    largest = num_rows if largest is None else min(largest, num_rows)
    if q.numel() == 0 or largest == 0:
        return out, lse
    q, block_table, cache_seqlens = _wide(q), as_int32(block_table), as_int32(cache_seqlens)
    if new is not None:
        new = _wide(new[0]), _wide(new[1])
    turn = NO_ROPE
    if rope is not None:
        rope = contiguous_rope(rope)
        turn = native_rope(*rope)
    cache = k_cache, v_cache, block_table, cache_seqlens
    options = causal, window or 0, scale, DTYPES[q.dtype], turn
    cu_seqlens = None if cu_seqlens_q is None else as_int32(cu_seqlens_q)
    if cu_seqlens is not None and largest > MAX_DECODE_ROWS:
        if new is not None:
            _append(new, *cache, cu_seqlens, rope)
        skipped = 0 if smallest > MAX_DECODE_ROWS else MAX_DECODE_ROWS
        _prefill(q, *cache, cu_seqlens, out, lse, largest, skipped, new is not None, options)
    if smallest <= MAX_DECODE_ROWS:
        rows = min(largest, MAX_DECODE_ROWS)
        _decode(q, new, *cache, cu_seqlens, out, lse, rows, options, workspace)
    return out, lse


def decode_workspace_bytes(
    batch: int, heads: int, kv_heads: int, head_dim: int, pages: tuple[int, int], rows: int
) -> int:
    """Workspace for ``batch`` sequences of up to ``pages`` = (number, tokens each), and ``rows``
    new tokens at the most.
    """
    rows = min(rows, MAX_DECODE_ROWS)
    size: int = _native.attention_decode_workspace_bytes(
        batch, heads, kv_heads, head_dim, *pages, rows
    )
    return size


def _append(
    new: tuple[Tensor, Tensor],
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens: Tensor,
    rope: Rope | None,
) -> None:
    """Rotate the new k and write new k and v [T, Hk, D] behind their sequences' cached tokens."""
    num_pages, page = k_cache.shape[:2]
    batch, max_pages = block_table.shape
    if max_pages == 0:
        return
    sequence, place = _places(cu_seqlens, new[0].shape[0])
    inside = sequence < batch  # no row behind the last sequence
    sequence = sequence.clamp(max=batch - 1)
    place = place + cache_seqlens.index_select(0, sequence)
    column = place // page
    inside &= (place >= 0) & (column < max_pages)
    entry = sequence * max_pages + column.clamp(0, max_pages - 1)
    number = block_table.view(-1).index_select(0, entry)
    inside &= (number >= 0) & (number < num_pages)
    slots = torch.where(inside, number.long() * page + place % page, -1)
    if rope is None:  # turned by nothing: cos 1, sin 0
        cos = torch.ones((1, 1), dtype=torch.float32, device=place.device)
        sin, positions, interleaved = torch.zeros_like(cos), torch.zeros_like(place), False
    else:
        cos, sin, _, interleaved = rope
        positions = place if rope.positions is None else rope.positions
    cuda_ops.rope_append(*new, cos, sin, positions, interleaved, k_cache, v_cache, slots)


def _prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    skip_seqlen_q: int,
    seqlens_add: bool,
    options: _Options,
) -> None:
    """mk_attention on pages."""
    num_pages, page, kv_heads, head_dim = k_cache.shape
    batch, max_pages = block_table.shape
    call(
        "attention",
        q,
        *(t.data_ptr() for t in (q, k_cache, v_cache, out)),
        lse.data_ptr() if lse.ndim == 2 else 0,
        cu_seqlens.data_ptr(),
        0,
        cache_seqlens.data_ptr(),
        block_table.data_ptr(),
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        *out.stride()[:2],
        q.shape[0],  # lse_stride
        max_pages,
        q.shape[0],
        0,
        batch,
        q.shape[1],
        kv_heads,
        head_dim,
        num_pages,
        page,
        max_pages,
        max_seqlen_q,
        skip_seqlen_q,
        seqlens_add,
        *options,
    )


def _decode(
    q: Tensor,
    new: tuple[Tensor, Tensor] | None,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    cu_seqlens: Tensor | None,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    options: _Options,
    workspace: Tensor | None = None,
) -> None:
    """mk_attention_decode."""
    num_pages, page, kv_heads, head_dim = k_cache.shape
    batch, max_pages = block_table.shape
    if workspace is None:
        num_bytes = decode_workspace_bytes(
            batch, q.shape[1], kv_heads, head_dim, (max_pages, page), max_seqlen_q
        )
        workspace = workspaces.get(q, num_bytes)
    k_new, v_new = new if new is not None else (None, None)
    call(
        "attention_decode",
        q,
        q.data_ptr(),
        pointer(k_new),
        pointer(v_new),
        *(t.data_ptr() for t in (k_cache, v_cache, out)),
        lse.data_ptr() if lse.ndim == 2 else 0,
        pointer(cu_seqlens),
        cache_seqlens.data_ptr(),
        block_table.data_ptr(),
        workspace.data_ptr(),
        workspace.numel(),
        *q.stride()[:2],
        *((0, 0) if k_new is None else k_new.stride()[:2]),
        *((0, 0) if v_new is None else v_new.stride()[:2]),
        *k_cache.stride()[:3],
        *out.stride()[:2],
        q.shape[0],  # lse_stride
        max_pages,
        q.shape[0],
        batch,
        q.shape[1],
        kv_heads,
        head_dim,
        num_pages,
        page,
        max_pages,
        max_seqlen_q,
        *options,
    )
