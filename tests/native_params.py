"""Valid parameters of every op of the C ABI, for tests that change some of them."""

from __future__ import annotations

import copy
import ctypes
import re
from typing import Any

import torch

from tests import native_abi as abi

C = abi.constants()
BUFFER = torch.zeros(1 << 16, dtype=torch.int64)  # what pointers of valid parameters point to
POINTER = BUFFER.data_ptr()

ROPE = {
    "cos": POINTER, "sin": POINTER, "table_stride": 64, "positions": POINTER,
    "positions_dtype": C["MK_I64"], "max_position": 8192, "rotary_dim": 128,
}  # fmt: skip
VALID: dict[str, dict[str, Any]] = {
    "rms_norm": {
        "x": POINTER, "weight": POINTER, "out": POINTER, "x_stride": 4096, "out_stride": 4096,
        "rows": 3, "hidden": 4096, "eps": 1e-5, "dtype": C["MK_BF16"],
    },
    "apply_rope": {
        **dict.fromkeys(("q", "k", "q_out", "k_out"), POINTER),
        **dict.fromkeys(("q_stride", "q_out_stride"), 4096),
        **dict.fromkeys(("k_stride", "k_out_stride"), 1024),
        **dict.fromkeys(
            ("q_head_stride", "k_head_stride", "q_out_head_stride", "k_out_head_stride"), 128
        ),
        "tokens": 3, "num_q_heads": 32, "num_k_heads": 8, "head_dim": 128, "dtype": C["MK_BF16"],
        "rope": ROPE,
    },
    "rope_append": {
        **dict.fromkeys(("k", "v", "k_cache", "v_cache", "slots"), POINTER),
        "k_stride": 1024, "k_head_stride": 128, "v_stride": 1024, "v_head_stride": 128,
        "cache_page_stride": 16384, "cache_stride": 1024, "cache_head_stride": 128, "tokens": 3,
        "num_heads": 8, "head_dim": 128, "num_pages": 4, "page_size": 16,
        "slots_dtype": C["MK_I64"], "dtype": C["MK_F16"], "rope": ROPE,
    },
    "silu_and_mul": {
        "gate_up": POINTER, "out": POINTER, "gate_up_stride": 23040, "out_stride": 11520,
        "rows": 3, "size": 11520, "dtype": C["MK_BF16"],
    },
    "embedding": {
        "ids": POINTER, "table": POINTER, "out": POINTER, "table_stride": 4096, "out_stride": 4096,
        "tokens": 3, "vocab": 1000, "hidden": 4096, "ids_dtype": C["MK_I32"],
        "dtype": C["MK_BF16"],
    },
    "argmax": {
        "logits": POINTER, "out": POINTER, "logits_stride": 1000, "rows": 3, "vocab": 1000,
        "dtype": C["MK_F32"],
    },
}  # fmt: skip
VALID["attention_decode"] = {
    **dict.fromkeys(("q", "k_new", "v_new", "k_cache", "v_cache", "out", "lse"), POINTER),
    **dict.fromkeys(("cu_seqlens_q", "seqlens_k", "block_table", "workspace"), POINTER),
    "workspace_bytes": 1 << 40, "q_stride": 4096, "out_stride": 4096,
    **dict.fromkeys(("k_new_stride", "v_new_stride", "cache_stride"), 1024),
    **{f"{t}_head_stride": 128 for t in ("q", "k_new", "v_new", "cache", "out")},
    "cache_page_stride": 65536, "lse_stride": 3, "block_table_stride": 128, "tokens": 3, "batch": 3,
    "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "num_pages": 400, "page_size": 64,
    "max_pages": 128, "max_seqlen_q": 1, "causal": 1, "softmax_scale": 128**-0.5,
    "dtype": C["MK_BF16"], "rope": ROPE,
}  # fmt: skip
VALID["add_rms_norm"] = {**VALID["rms_norm"], "residual": POINTER, "residual_stride": 4096}
VALID["sample"] = {**VALID["argmax"], "sampling": POINTER}
VALID["linear"] = {
    "x": POINTER, "w": POINTER, "norm_weight": POINTER, "residual": POINTER, "out": POINTER,
    "x_stride": 4096, "w_stride": 4096, "residual_stride": 6144, "out_stride": 6144,
    "m": 3, "n": 6144, "k": 4096, "eps": 1e-5, "dtype": C["MK_BF16"], "out_dtype": C["MK_BF16"],
}  # fmt: skip
VALID["linear_swiglu"] = {**VALID["linear"], "residual": None, "out_dtype": 0}
VALID["qkv_rope_append"] = {
    **dict.fromkeys(("x", "w", "norm_weight", "q", "k_cache", "v_cache", "slots"), POINTER),
    "x_stride": 4096, "w_stride": 4096, "q_stride": 4096, "q_head_stride": 128,
    "cache_page_stride": 16384, "cache_stride": 1024, "cache_head_stride": 128, "tokens": 3,
    "hidden": 4096, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "num_pages": 4,
    "page_size": 16, "eps": 1e-5, "slots_dtype": C["MK_I64"], "dtype": C["MK_F16"], "rope": ROPE,
}  # fmt: skip
VALID["attention"] = {
    **dict.fromkeys(("q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k"), POINTER),
    "q_stride": 4096, "out_stride": 4096, "k_stride": 1024, "v_stride": 1024, "lse_stride": 300,
    **{f"{t}_head_stride": 128 for t in ("q", "k", "v", "out")}, "tokens_q": 300, "tokens_k": 400,
    "batch": 3, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "max_seqlen_q": 200,
    "causal": 1, "softmax_scale": 128**-0.5, "dtype": C["MK_BF16"], "rope": ROPE,
}  # fmt: skip

PACKED = {"tiles": POINTER, "type": C["MK_Q4_K"]}
WORKSPACE = {"workspace": POINTER, "workspace_bytes": 1 << 40}
VALID["linear_quant"] = {
    "linear": {**VALID["linear"], "w": None, "w_stride": 0}, "w": {**PACKED, "rows": 6144},
    "up": {}, **WORKSPACE,
}  # fmt: skip
VALID["linear_quant_swiglu"] = {
    **VALID["linear_quant"],
    "linear": {**VALID["linear_quant"]["linear"], "residual": None, "out_dtype": 0},
}
VALID["qkv_rope_append_quant"] = {
    "qkv": {**VALID["qkv_rope_append"], "w": None, "w_stride": 0}, **WORKSPACE,
    "w": [{"tiles": POINTER, "type": C[f"MK_{t}"], "rows": n}
          for t, n in (("Q4_K", 4096), ("Q5_0", 1024), ("Q6_K", 1024))],
}  # fmt: skip
VALID["quant_prepare_x"] = {
    "x": POINTER, "norm_weight": POINTER, "x_stride": 4096, "m": 65, "k": 4096, "eps": 1e-5,
    "dtype": C["MK_BF16"], **WORKSPACE,
}  # fmt: skip
VALID["embedding_quant"] = {
    "embedding": {**VALID["embedding"], "table": None, "table_stride": 0},
    "table": {**PACKED, "rows": 1000},
}
VALID["quantize_fp8"] = {
    "x": POINTER, "out": POINTER, "scales": POINTER, "x_stride": 4096, "out_stride": 4096,
    "scales_stride": 1, "scales_block_stride": 3, "rows": 3, "k": 4096, "block": 128,
    "dtype": C["MK_BF16"],
}  # fmt: skip
VALID["linear_fp8"] = {
    **dict.fromkeys(("x", "w", "x_scale", "w_scale", "residual", "out"), POINTER),
    "x_stride": 4096, "w_stride": 4096, "residual_stride": 6144, "out_stride": 6144,
    "x_scale_stride": 1, "x_scale_block_stride": 3, "w_scale_stride": 32,
    "w_scale_block_stride": 1, "m": 3, "n": 6144, "k": 4096, "out_dtype": C["MK_BF16"],
}  # fmt: skip
VALID["attention_fp8"] = {
    **dict.fromkeys(("q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k"), POINTER),
    **dict.fromkeys(("q_descale", "k_descale", "v_descale"), POINTER),
    "q_stride": 4096, "out_stride": 4096, "k_stride": 1024, "v_stride": 1024, "lse_stride": 300,
    **{f"{t}_head_stride": 128 for t in ("q", "k", "v", "out")}, "tokens_q": 300, "tokens_k": 400,
    **{f"{t}_descale_stride": 8 for t in "qkv"}, "num_q_descales": 8,
    "batch": 3, "num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "max_seqlen_q": 200,
    "causal": 1, "softmax_scale": 128**-0.5, "out_dtype": C["MK_BF16"],
}  # fmt: skip
VALID["linear_fp8_swiglu"] = {**VALID["linear_fp8"], "residual": None}
# The op's struct within its struct, whose fields make_params takes by their bare names too.
INNER = {"linear_quant": "linear", "linear_quant_swiglu": "linear", "qkv_rope_append_quant": "qkv",
         "embedding_quant": "embedding"}  # fmt: skip


def ops_of(arch: str) -> list[str]:
    """The ops that have kernels for an architecture."""
    return [op for op in abi.OPS if arch == "90a" or op not in abi.FP8_OPS]


def arch_of(op: str) -> str:
    """The lowest architecture with kernels of an op."""
    return "90a" if op in abi.FP8_OPS else "80"


def fields_of(op: str) -> dict[str, Any]:
    """Valid fields of an op, those of the struct within included."""
    return {**VALID[op].get(INNER.get(op, ""), {}), **VALID[op]}


def make_struct(kind: Any, value: Any) -> Any:
    """A structure of a dict, an array of a list, anything else as it is."""
    if isinstance(value, list):
        return kind(*(make_struct(kind._type_, v) for v in value))
    if not isinstance(value, dict):
        return value
    kinds = dict(kind._fields_)
    return kind(**{name: make_struct(kinds[name], v) for name, v in value.items()})


def make_params(op: str, **changes: Any) -> ctypes.Structure:
    """Valid parameters of an op with fields changed: "x", "rope.cos", "w[1].type", ..."""
    fields = copy.deepcopy(VALID[op])
    for path, value in changes.items():
        *outer, name = re.findall(r"\w+", path)
        if op in INNER and (outer or [name])[0] not in fields:
            outer = [INNER[op], *outer]
        target: Any = fields
        for step in outer:
            target = target[int(step) if step.isdigit() else step]
        target[name] = value
    return make_struct(abi.params_type(op), fields)
