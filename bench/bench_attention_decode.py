"""attention_kvcache of one new token per sequence over a paged cache that holds its K and V.

PyTorch has no paged cache: its candidates read K and V laid out as it likes them.
"""

from __future__ import annotations

import torch

from bench import eager, libraries
from bench.harness import Case, Comparison
from bench.inputs import block_table, paged, randn
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig

Tensor = torch.Tensor


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Eager attention with the queries of a KV head as rows of one matrix, so that K and V are not
    repeated: what one writes for speed. [B, Hq, 1, D], [B, Hk, L, D]."""
    batch, heads, _, dim = q.shape
    rows = q.view(batch, k.shape[1], -1, dim)
    weights = (rows @ k.transpose(-1, -2) * dim**-0.5).softmax(-1, dtype=torch.float32)
    return (weights.to(q.dtype) @ v).view(batch, heads, 1, dim)


def bench_attention_decode(
    decode: tuple[int, int], dtype: str, config: ModelConfig, compare: Comparison
) -> None:
    batch, context = decode
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    device = compare.device
    q = randn(batch, heads, dim, dtype=dtype, device=device)
    k, v = (randn(batch, context, kv_heads, dim, dtype=dtype, device=device) for _ in range(2))
    table = block_table(batch, context, device)
    k_cache, v_cache = paged(k, table), paged(v, table)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    own_layout = [t.transpose(1, 2).contiguous() for t in (k, v)]
    q4 = q[:, :, None]

    def ours() -> Tensor:
        out = ops.attention_kvcache(
            q, None, None, k_cache, v_cache, table, lengths, min_seqlen_q=1, max_seqlen_q=1
        )
        assert isinstance(out, Tensor)
        return out

    compiled = compare.compiled(grouped)
    compare(
        Case(
            "attention_kvcache",
            dtype,
            f"batch {batch} context {context}",
            num_bytes=q.itemsize * (2 * q.numel() + k.numel() + v.numel()),
            flop=4 * batch * context * heads * dim,
        ),
        ours=ours,
        eager=lambda: eager.attention(q4, *own_layout, True)[:, :, 0],
        grouped=lambda: grouped(q4, *own_layout)[:, :, 0],
        compiled=lambda: compiled(q4, *own_layout)[:, :, 0],
        **libraries.sdpa_backends(q4, *own_layout, lambda out: out[:, :, 0]),
        flash_attn=libraries.flash_attn_decode(q, k, v),
        flashinfer=libraries.flashinfer_decode(q, k_cache, v_cache, table, context),
    )
