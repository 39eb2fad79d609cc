"""The shapes that benches and modelled times share: Mistral-NeMo-Minitron-8B's, and the sweeps.

A bench function gets a value of a sweep by naming it as an argument (conftest.py). `smoke` runs the
same code in seconds at sizes that tell nothing.
"""

from __future__ import annotations

from typing import Any

from minitron_kernels.config import ModelConfig

MINITRON = ModelConfig(
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
)
SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=128,
    rope_theta=1e6,
)

PAGE_SIZE = 16
KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Name -> [N, K] of the matrices that a layer and the head multiply with."""
    hidden, inter = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    return {
        "qkv": (q + 2 * kv, hidden),
        "o": (hidden, q),
        "gate_up": (2 * inter, hidden),
        "down": (hidden, inter),
        "lm_head": (config.vocab_size, hidden),
    }


# rows: of activations. m: rows of x in a product. prefill: (sequences, tokens of each). decode:
# (sequences, tokens that each has in the cache). step: (sequences, new tokens of each, tokens
# before them), of a layer with weights of such a type.
SWEEPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "cuda": {
        "dtype": ("bfloat16", "float16"),
        "rows": (1, 8, 64, 512, 2048, 8192),
        "m": (1, 8, 16, 64, 512, 2048, 8192),
        "matrix": ("qkv", "o", "gate_up", "down", "lm_head"),
        "kind": KINDS,
        "quant_m": (1, 8, 16, 64, 512, 2048),
        "quant_matrix": ("gate_up", "down"),
        "prefill": ((1, 1024), (1, 2048), (1, 8192), (8, 2048)),
        "decode": tuple((b, n) for n in (1024, 8192) for b in (1, 8, 64)),
        "step": ((1, 1, 1024), (8, 1, 1024), (64, 1, 1024), (1, 512, 0), (1, 2048, 0)),
        "weights": ("dense", "Q4_K", "Q8_0"),
    },
    "cpu": {
        "dtype": ("bfloat16", "float32"),
        "rows": (1, 64, 512),
        "m": (1, 8, 64, 512),
        "matrix": ("o", "gate_up", "down"),
        "kind": KINDS,
        "quant_m": (1, 8, 128),
        "quant_matrix": ("down",),
        "prefill": ((1, 128), (1, 512), (1, 2048)),
        "decode": ((1, 256), (1, 1024), (1, 4096), (8, 1024)),
        "step": ((1, 1, 1024), (8, 1, 1024), (1, 512, 0)),
        "weights": ("dense", "Q4_K"),
    },
    "smoke": {
        "dtype": ("bfloat16",),
        "rows": (3,),
        "m": (2,),
        "matrix": ("o", "gate_up"),
        "kind": KINDS,
        "quant_m": (2,),
        "quant_matrix": ("o",),
        "prefill": ((2, 40),),
        "decode": ((2, 40),),
        "step": ((2, 1, 30), (1, 20, 0)),
        "weights": ("dense", "Q4_K"),
    },
}
