"""attention of prompts: sequences of equal length, causal, packed."""

from __future__ import annotations

from typing import Any

import torch

from bench import eager, libraries
from bench.harness import Case, Comparison, NotAvailable
from bench.inputs import randn
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig

Tensor = torch.Tensor
MAX_EAGER = 1 << 31  # bytes of logits in fp32: eager code keeps several such matrices


def bench_attention_prefill(
    prefill: tuple[int, int], dtype: str, config: ModelConfig, compare: Comparison
) -> None:
    sequences, length = prefill
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    tokens = sequences * length
    q = randn(tokens, heads, dim, dtype=dtype, device=compare.device)
    k, v = (randn(tokens, kv_heads, dim, dtype=dtype, device=compare.device) for _ in range(2))
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=compare.device) * length
    batched = [t.view(sequences, length, -1, dim).transpose(1, 2) for t in (q, k, v)]

    def back(out: Tensor) -> Tensor:
        return out.transpose(1, 2).reshape(tokens, heads, dim)

    def plain(function: Any) -> Any:
        def call() -> Tensor:
            if 4 * sequences * heads * length**2 > MAX_EAGER:
                raise NotAvailable("its logits would take more than 2 GiB")
            return back(function(*batched, True))

        return call

    pairs = sequences * length * (length + 1) // 2
    compare(
        Case(
            "attention",
            dtype,
            f"{sequences} x {length} causal",
            num_bytes=2 * q.itemsize * (q.numel() + k.numel()),
            flop=4 * pairs * heads * dim,
        ),
        ours=lambda: ops.attention(q, k, v, starts, starts, max_seqlen_q=length),
        eager=plain(eager.attention),
        compiled=plain(compare.compiled(eager.attention)),
        **libraries.sdpa_backends(*batched, back),
        flash_attn=libraries.flash_attn_prefill(q, k, v, sequences),
        flashinfer=libraries.flashinfer_prefill(q, k, v, sequences),
    )
