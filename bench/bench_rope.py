"""apply_rope of Q and K, by tables of cos and sin."""

from __future__ import annotations

import torch

from bench import eager, inputs, libraries
from bench.harness import Case, Comparison
from bench.inputs import randn
from minitron_kernels import ops
from minitron_kernels.config import ModelConfig


def bench_rope(rows: int, dtype: str, config: ModelConfig, compare: Comparison) -> None:
    heads, kv_heads, dim = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    q, k = (randn(rows, h, dim, dtype=dtype, device=compare.device) for h in (heads, kv_heads))
    rope = ops.Rope(*inputs.rope_tables(config, compare.device))
    positions = torch.arange(rows, dtype=torch.int32, device=compare.device)
    cos, sin = inputs.eager_tables(rope, positions, q.dtype)
    moved = 2 * q.itemsize * (q.numel() + k.numel()) + 4 * rows * (1 + dim)
    compiled = compare.compiled(eager.apply_rope)
    compare(
        Case("apply_rope", dtype, f"{rows} x ({heads} + {kv_heads}) x {dim}", moved),
        ours=lambda: ops.apply_rope(q, k, rope.cos, rope.sin, positions),
        eager=lambda: eager.apply_rope(q, k, cos, sin),
        compiled=lambda: compiled(q, k, cos, sin),
        liger=libraries.liger_rope(q, k, cos, sin),
    )
