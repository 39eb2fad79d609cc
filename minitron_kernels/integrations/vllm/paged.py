"""vLLM's paged cache and batches as the arguments of `ops`; imports nothing of vLLM.

A layer's cache is [blocks, Hk, block, 2D], in any order in memory: the features of K, then those of
V, of each head and token. The kernels read it as two views [blocks, block, Hk, D] where it lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minitron_kernels import cuda_attention, cuda_ops, ops

Tensor = torch.Tensor

HEAD_SIZES = cuda_attention.HEAD_DIMS
BLOCK_SIZES = cuda_attention.PAGE_SIZES


@dataclass
class PagedBatch:
    """The packed queries of a step, prompts and single tokens alike, and where their keys are.

    ``query_start_loc`` [B + 1] delimits each sequence's rows; ``seq_lens`` [B] counts its keys, new
    ones among them; ``block_table`` [B, max_blocks] lists its blocks; all int32. ``slot_mapping``
    int64 [T] is where new keys go (negative: nowhere). The host knows the first ``num_tokens`` rows
    to be real, and the bounds of the rows of each sequence that has any.
    """

    num_tokens: int
    min_query_len: int
    max_query_len: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    workspace: Tensor | None = None  # for the decode kernel; None: the stream's own


def query_bounds(query_start_loc: Tensor) -> tuple[int, int]:
    """The least and the most rows of a sequence, those without rows left out; a CPU tensor."""
    counts = query_start_loc.diff()
    counts = counts[counts > 0]
    if not len(counts):
        return 0, 0
    least, most = counts.aminmax()
    return int(least), int(most)


def cache_views(kv_cache: Tensor, head_size: int) -> tuple[Tensor, Tensor]:
    """K and V, [blocks, block, Hk, D] each, of a layer's cache [blocks, Hk, block, 2D]."""
    if kv_cache.ndim != 4 or kv_cache.shape[3] != 2 * head_size:
        raise ValueError(
            f"kv_cache must be [blocks, heads, block, {2 * head_size}], got {list(kv_cache.shape)}"
        )
    tokens_first = kv_cache.transpose(1, 2)
    return tokens_first[..., :head_size], tokens_first[..., head_size:]


def append(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write rows of key and value [>= T, Hk, D] to the slots [T] of a layer's cache."""
    ops.append_kv(key, value, *cache_views(kv_cache, key.shape[-1]), slot_mapping)


def attend(
    query: Tensor,
    kv_cache: Tensor,
    batch: PagedBatch,
    scale: float,
    window: int | None,
    output: Tensor,
) -> None:
    """Causal attention of query [>= T, Hq, D] over keys that are in the cache, into ``output``."""
    q, out = query[: batch.num_tokens], output[: batch.num_tokens]
    k_cache, v_cache = cache_views(kv_cache, query.shape[-1])
    bounds = batch.min_query_len, batch.max_query_len
    if cuda_attention.serves(q, k_cache):  # no copy of the result, and no allocation
        cuda_attention.attention_kvcache(
            q,
            None,
            k_cache,
            v_cache,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            bounds,
            None,
            True,
            scale,
            window,
            False,
            out=out,
            workspace=batch.workspace,
        )
        return
    result = ops.attention_kvcache(
        q,
        None,
        None,
        k_cache,
        v_cache,
        batch.block_table,
        batch.seq_lens,
        cu_seqlens_q=batch.query_start_loc,
        min_seqlen_q=bounds[0],
        max_seqlen_q=bounds[1],
        softmax_scale=scale,
        window=window,
    )
    assert isinstance(result, Tensor)
    out.copy_(result)


class Workspace:
    """The decode kernel's workspace of one cache group: grown before a step, never during it.

    A step may be captured in a CUDA graph, where nothing can be allocated, and whose address of it
    must stay good: what became too small is kept.
    """

    def __init__(self, device: torch.device, heads: tuple[int, int], head_size: int) -> None:
        """``heads``: of queries, of keys."""
        self.device, self.heads, self.head_size = device, heads, head_size
        self._made: list[Tensor] = []

    def reserve(self, block_table: Tensor, block_size: int, max_query_len: int) -> Tensor | None:
        """For sequences with so many blocks, of which none has more new rows; None on the CPU."""
        if self.device.type != "cuda" and not cuda_ops.emulate:
            return None
        batch, blocks = block_table.shape
        size = cuda_attention.decode_workspace_bytes(
            batch, *self.heads, self.head_size, (blocks, block_size), max(max_query_len, 1)
        )
        if not self._made or self._made[-1].numel() < size:
            size = max(size + size // 4, 1 << 16)
            self._made.append(torch.zeros(size, dtype=torch.uint8, device=self.device))
        return self._made[-1]
