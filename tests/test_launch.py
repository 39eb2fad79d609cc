"""The C ABI around the kernels: validation, plans, the choice of architecture, launching."""

from __future__ import annotations

import ast
import copy
import ctypes
import itertools
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import _native, native
from tests import emulator
from tests import native_abi as abi
from tests.native_emulator import (
    ARCHS,
    copy_of_library,
    emulated_library,
    make_current,
    move_pointers,
)

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
    **WORKSPACE,
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
    "x": POINTER, "norm_weight": POINTER, "x_stride": 4096, "m": 17, "k": 4096, "eps": 1e-5,
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


def pointers_of(value: Any) -> list[int]:
    """All pointers in a struct, those in its arrays of structs, too."""
    if isinstance(value, ctypes.Structure):
        found = [
            [getattr(value, name)] if kind is ctypes.c_void_p else pointers_of(getattr(value, name))
            for name, kind in value._fields_
        ]
        return [p for part in found for p in part if p]
    inner = value if isinstance(value, ctypes.Array) else []
    return [p for each in inner for p in pointers_of(each)]


@pytest.mark.parametrize("op", abi.OPS)
def test_all_pointers_move_to_a_gpu(op: str) -> None:
    """What tests on a GPU do with parameters: one that stayed would be an illegal address there."""
    params, copy = make_params(op), torch.zeros(64)
    assert set(pointers_of(params)) == {POINTER}
    move_pointers(params, [(BUFFER, copy)])
    assert set(pointers_of(params)) == {copy.data_ptr()}


# ----------------------------------------------------------------------------------- validation

# op, changed field, value, status; the message must name the field
BAD: list[tuple[str, str, Any, str]] = [
    ("rms_norm", "x", None, "NULL"),
    ("rms_norm", "weight", None, "NULL"),
    ("rms_norm", "out", POINTER + 1, "ALIGNMENT"),
    ("rms_norm", "residual", POINTER, "VALUE"),
    ("rms_norm", "x_stride", 4095, "STRIDE"),
    ("rms_norm", "out_stride", -4096, "STRIDE"),
    ("rms_norm", "rows", -1, "SHAPE"),
    ("rms_norm", "rows", (1 << 30) + 1, "SHAPE"),
    ("rms_norm", "hidden", 0, "SHAPE"),
    ("rms_norm", "hidden", 16385, "SHAPE"),
    ("rms_norm", "eps", -1e-5, "VALUE"),
    ("rms_norm", "eps", float("nan"), "VALUE"),
    ("rms_norm", "dtype", 0, "DTYPE"),
    ("rms_norm", "dtype", C["MK_F32"], "DTYPE"),
    ("add_rms_norm", "residual", None, "NULL"),
    ("add_rms_norm", "residual_stride", 1, "STRIDE"),
    ("apply_rope", "q", None, "NULL"),
    ("apply_rope", "k_out", None, "NULL"),
    ("apply_rope", "q_stride", 127, "STRIDE"),
    ("apply_rope", "k_head_stride", 64, "STRIDE"),
    ("apply_rope", "num_q_heads", 1025, "SHAPE"),
    ("apply_rope", "head_dim", 257, "SHAPE"),
    ("apply_rope", "tokens", -1, "SHAPE"),
    ("apply_rope", "dtype", C["MK_I32"], "DTYPE"),
    ("apply_rope", "rope.cos", None, "NULL"),
    ("apply_rope", "rope.sin", POINTER + 2, "ALIGNMENT"),
    ("apply_rope", "rope.table_stride", 63, "STRIDE"),
    ("apply_rope", "rope.positions", None, "NULL"),
    ("apply_rope", "rope.positions_dtype", C["MK_F32"], "DTYPE"),
    ("apply_rope", "rope.max_position", 0, "SHAPE"),
    ("apply_rope", "rope.rotary_dim", 3, "SHAPE"),
    ("apply_rope", "rope.rotary_dim", 130, "SHAPE"),
    ("apply_rope", "rope.interleaved", 2, "VALUE"),
    ("rope_append", "v", None, "NULL"),
    ("rope_append", "k_cache", None, "NULL"),
    ("rope_append", "v_cache", POINTER + 1, "ALIGNMENT"),
    ("rope_append", "slots", None, "NULL"),
    ("rope_append", "slots_dtype", 0, "DTYPE"),
    ("rope_append", "cache_page_stride", 0, "STRIDE"),
    ("rope_append", "cache_stride", 1, "STRIDE"),
    ("rope_append", "cache_head_stride", 127, "STRIDE"),
    ("rope_append", "num_heads", 0, "SHAPE"),
    ("rope_append", "page_size", 0, "SHAPE"),
    ("silu_and_mul", "gate_up", None, "NULL"),
    ("silu_and_mul", "gate_up_stride", 23039, "STRIDE"),
    ("silu_and_mul", "size", 0, "SHAPE"),
    ("silu_and_mul", "size", (1 << 20) + 1, "SHAPE"),
    ("embedding", "ids", None, "NULL"),
    ("embedding", "table", None, "NULL"),
    ("embedding", "ids_dtype", C["MK_BF16"], "DTYPE"),
    ("embedding", "vocab", 0, "SHAPE"),
    ("embedding", "table_stride", 4095, "STRIDE"),
    ("argmax", "logits", None, "NULL"),
    ("argmax", "out", POINTER + 4, "ALIGNMENT"),
    ("argmax", "vocab", (1 << 19) + 1, "SHAPE"),
    ("argmax", "dtype", C["MK_I64"], "DTYPE"),
    ("attention", "q", None, "NULL"),
    ("attention", "q", POINTER + 8, "ALIGNMENT"),
    ("attention", "k", POINTER + 2, "ALIGNMENT"),
    ("attention", "v", None, "NULL"),
    ("attention", "out", None, "NULL"),
    ("attention", "lse", POINTER + 2, "ALIGNMENT"),
    ("attention", "cu_seqlens_q", None, "NULL"),
    ("attention", "cu_seqlens_k", None, "NULL"),
    ("attention", "q_stride", 127, "STRIDE"),
    ("attention", "q_stride", 4100, "STRIDE"),
    ("attention", "k_stride", 1 << 31, "STRIDE"),
    ("attention", "v_head_stride", 132, "STRIDE"),
    ("attention", "out_stride", -4096, "STRIDE"),
    ("attention", "lse_stride", 299, "STRIDE"),
    ("attention", "tokens_q", -1, "SHAPE"),
    ("attention", "tokens_k", -1, "SHAPE"),
    ("attention", "batch", 65536, "SHAPE"),
    ("attention", "num_q_heads", 33, "SHAPE"),
    ("attention", "num_kv_heads", 0, "SHAPE"),
    ("attention", "head_dim", 96, "SHAPE"),
    ("attention", "page_size", 48, "SHAPE"),
    ("attention", "max_seqlen_q", 65535 * 128 + 1, "SHAPE"),
    ("attention", "skip_seqlen_q", -1, "SHAPE"),
    ("attention", "causal", 2, "VALUE"),
    ("attention", "window", -1, "VALUE"),
    ("attention", "softmax_scale", 0.0, "VALUE"),
    ("attention", "softmax_scale", float("inf"), "VALUE"),
    ("attention", "dtype", C["MK_F32"], "DTYPE"),
    ("attention", "rope.cos", None, "NULL"),
    ("attention", "rope.rotary_dim", 130, "SHAPE"),
    ("attention", "rope.table_stride", 63, "STRIDE"),
    ("sample", "sampling", None, "NULL"),
    ("sample", "logits_stride", 999, "STRIDE"),
    *(
        (op, *bad)
        for op in ("linear", "linear_swiglu")
        for bad in (
            ("x", None, "NULL"),
            ("w", None, "NULL"),
            ("out", None, "NULL"),
            ("w", POINTER + 1, "ALIGNMENT"),
            ("norm_weight", POINTER + 1, "ALIGNMENT"),
            ("x_stride", 4095, "STRIDE"),
            ("w_stride", 0, "STRIDE"),
            ("m", -1, "SHAPE"),
            ("n", 0, "SHAPE"),
            ("n", (1 << 24) + 2, "SHAPE"),
            ("k", 0, "SHAPE"),
            ("k", (1 << 14) + 1, "SHAPE"),
            ("eps", -1.0, "VALUE"),
            ("dtype", C["MK_F32"], "DTYPE"),
        )
    ),
    ("linear", "out", POINTER + 1, "ALIGNMENT"),
    ("linear", "out_stride", 6143, "STRIDE"),
    ("linear", "residual_stride", 6143, "STRIDE"),
    ("linear", "residual", POINTER + 1, "ALIGNMENT"),
    ("linear", "out_dtype", C["MK_F32"], "DTYPE"),  # with residual
    ("linear", "out_dtype", C["MK_F16"], "DTYPE"),
    ("linear_swiglu", "out_stride", 3071, "STRIDE"),
    ("linear_swiglu", "n", 6143, "SHAPE"),
    ("linear_swiglu", "residual", POINTER, "VALUE"),
    ("qkv_rope_append", "x", None, "NULL"),
    ("qkv_rope_append", "w", None, "NULL"),
    ("qkv_rope_append", "q", None, "NULL"),
    ("qkv_rope_append", "k_cache", None, "NULL"),
    ("qkv_rope_append", "v_cache", POINTER + 1, "ALIGNMENT"),
    ("qkv_rope_append", "slots", None, "NULL"),
    ("qkv_rope_append", "slots_dtype", C["MK_F32"], "DTYPE"),
    ("qkv_rope_append", "rope.cos", None, "NULL"),
    ("qkv_rope_append", "rope.sin", None, "NULL"),
    ("qkv_rope_append", "rope.positions", None, "NULL"),
    ("qkv_rope_append", "rope.rotary_dim", 130, "SHAPE"),
    ("qkv_rope_append", "rope.table_stride", 63, "STRIDE"),
    ("qkv_rope_append", "tokens", -1, "SHAPE"),
    ("qkv_rope_append", "hidden", 0, "SHAPE"),
    ("qkv_rope_append", "num_q_heads", 0, "SHAPE"),
    ("qkv_rope_append", "num_kv_heads", 1025, "SHAPE"),
    ("qkv_rope_append", "head_dim", 120, "SHAPE"),
    ("qkv_rope_append", "head_dim", 272, "SHAPE"),
    ("qkv_rope_append", "num_pages", -1, "SHAPE"),
    ("qkv_rope_append", "page_size", 0, "SHAPE"),
    ("qkv_rope_append", "x_stride", 1, "STRIDE"),
    ("qkv_rope_append", "q_stride", 127, "STRIDE"),
    ("qkv_rope_append", "q_head_stride", 0, "STRIDE"),
    ("qkv_rope_append", "cache_page_stride", 0, "STRIDE"),
    ("qkv_rope_append", "cache_stride", 1, "STRIDE"),
    ("qkv_rope_append", "cache_head_stride", 127, "STRIDE"),
    ("qkv_rope_append", "eps", float("inf"), "VALUE"),
    ("qkv_rope_append", "dtype", C["MK_I32"], "DTYPE"),
    ("attention_decode", "q", None, "NULL"),
    ("attention_decode", "q", POINTER + 8, "ALIGNMENT"),
    ("attention_decode", "v_new", None, "NULL"),
    ("attention_decode", "k_cache", None, "NULL"),
    ("attention_decode", "out", POINTER + 2, "ALIGNMENT"),
    ("attention_decode", "lse", POINTER + 2, "ALIGNMENT"),
    ("attention_decode", "seqlens_k", None, "NULL"),
    ("attention_decode", "block_table", None, "NULL"),
    ("attention_decode", "workspace", None, "NULL"),
    ("attention_decode", "workspace", POINTER + 8, "ALIGNMENT"),
    ("attention_decode", "workspace_bytes", 1 << 18, "VALUE"),
    ("attention_decode", "cu_seqlens_q", POINTER + 1, "ALIGNMENT"),
    ("attention_decode", "q_stride", 127, "STRIDE"),
    ("attention_decode", "q_stride", 4100, "STRIDE"),
    ("attention_decode", "k_new_head_stride", 132, "STRIDE"),
    ("attention_decode", "cache_stride", 1028, "STRIDE"),
    ("attention_decode", "cache_page_stride", 0, "STRIDE"),
    ("attention_decode", "lse_stride", 2, "STRIDE"),
    ("attention_decode", "block_table_stride", 127, "STRIDE"),
    ("attention_decode", "tokens", -1, "SHAPE"),
    ("attention_decode", "batch", 65536, "SHAPE"),
    ("attention_decode", "batch", 8193, "SHAPE"),
    ("attention_decode", "num_q_heads", 33, "SHAPE"),
    ("attention_decode", "num_kv_heads", 0, "SHAPE"),
    ("attention_decode", "head_dim", 96, "SHAPE"),
    ("attention_decode", "page_size", 48, "SHAPE"),
    ("attention_decode", "max_pages", -1, "SHAPE"),
    ("attention_decode", "max_seqlen_q", 0, "SHAPE"),
    ("attention_decode", "max_seqlen_q", 9, "SHAPE"),
    ("attention_decode", "causal", 2, "VALUE"),
    ("attention_decode", "window", -1, "SHAPE"),
    ("attention_decode", "softmax_scale", float("inf"), "VALUE"),
    ("attention_decode", "dtype", C["MK_F32"], "DTYPE"),
    ("attention_decode", "rope.cos", None, "NULL"),
    ("attention_decode", "rope.rotary_dim", 130, "SHAPE"),
    ("attention_decode", "rope.interleaved", 2, "VALUE"),
    ("attention_decode", "rope.positions_dtype", C["MK_F32"], "DTYPE"),
    ("attention_decode", "rope.table_stride", 63, "STRIDE"),
    *(
        (op, *bad)
        for op in ("linear_quant", "linear_quant_swiglu")
        for bad in (
            ("x", None, "NULL"),
            ("linear.w", POINTER, "VALUE"),
            ("w.tiles", None, "NULL"),
            ("w.tiles", POINTER + 8, "ALIGNMENT"),
            ("w.type", 0, "VALUE"),
            ("w.type", 4, "VALUE"),
            ("w.type", 15, "VALUE"),
            ("w.rows", 6143, "SHAPE"),
            ("out", None, "NULL"),
            ("norm_weight", POINTER + 1, "ALIGNMENT"),
            ("x_stride", 4095, "STRIDE"),
            ("m", -1, "SHAPE"),
            ("n", 0, "SHAPE"),
            ("k", 4064, "SHAPE"),
            ("k", (1 << 14) + 256, "SHAPE"),
            ("eps", -1.0, "VALUE"),
            ("dtype", C["MK_F32"], "DTYPE"),
        )
    ),
    ("linear_quant", "out_stride", 6143, "STRIDE"),
    ("linear_quant", "residual_stride", 6143, "STRIDE"),
    ("linear_quant", "out_dtype", C["MK_F32"], "DTYPE"),  # with residual
    ("linear_quant_swiglu", "out_stride", 3071, "STRIDE"),
    ("linear_quant_swiglu", "residual", POINTER, "VALUE"),
    ("qkv_rope_append_quant", "x", None, "NULL"),
    ("qkv_rope_append_quant", "qkv.w", POINTER, "VALUE"),
    ("qkv_rope_append_quant", "w[0].tiles", POINTER + 2, "ALIGNMENT"),
    ("qkv_rope_append_quant", "w[1].type", 1, "VALUE"),
    ("qkv_rope_append_quant", "w[1].rows", 4096, "SHAPE"),
    ("qkv_rope_append_quant", "w[2].tiles", None, "NULL"),
    ("qkv_rope_append_quant", "hidden", 4064, "SHAPE"),
    ("qkv_rope_append_quant", "q", None, "NULL"),
    ("qkv_rope_append_quant", "k_cache", None, "NULL"),
    ("qkv_rope_append_quant", "slots_dtype", C["MK_F32"], "DTYPE"),
    ("qkv_rope_append_quant", "rope.cos", None, "NULL"),
    ("qkv_rope_append_quant", "tokens", -1, "SHAPE"),
    ("qkv_rope_append_quant", "head_dim", 120, "SHAPE"),
    ("qkv_rope_append_quant", "q_stride", 127, "STRIDE"),
    ("quant_prepare_x", "x", None, "NULL"),
    ("quant_prepare_x", "workspace", None, "NULL"),
    ("quant_prepare_x", "workspace", POINTER + 8, "ALIGNMENT"),
    ("quant_prepare_x", "workspace_bytes", 17 * 4096, "VALUE"),
    ("quant_prepare_x", "k", 4080, "SHAPE"),
    ("quant_prepare_x", "m", -1, "SHAPE"),
    ("quant_prepare_x", "x_stride", 4095, "STRIDE"),
    ("quant_prepare_x", "dtype", C["MK_F32"], "DTYPE"),
    ("embedding_quant", "ids", None, "NULL"),
    ("embedding_quant", "embedding.table", POINTER, "VALUE"),
    ("embedding_quant", "table.tiles", None, "NULL"),
    ("embedding_quant", "table.tiles", POINTER + 4, "ALIGNMENT"),
    ("embedding_quant", "table.type", 9, "VALUE"),
    ("embedding_quant", "table.rows", 999, "SHAPE"),
    ("embedding_quant", "hidden", 4064, "SHAPE"),
    ("embedding_quant", "vocab", 0, "SHAPE"),
    ("embedding_quant", "out", None, "NULL"),
    ("embedding_quant", "out_stride", 4095, "STRIDE"),
    ("embedding_quant", "ids_dtype", C["MK_BF16"], "DTYPE"),
    ("embedding_quant", "dtype", C["MK_F32"], "DTYPE"),
    ("quantize_fp8", "x", None, "NULL"),
    ("quantize_fp8", "out", None, "NULL"),
    ("quantize_fp8", "scales", None, "NULL"),
    ("quantize_fp8", "scales", POINTER + 2, "ALIGNMENT"),
    ("quantize_fp8", "x_stride", 4095, "STRIDE"),
    ("quantize_fp8", "out_stride", 4095, "STRIDE"),
    ("quantize_fp8", "scales_stride", 0, "STRIDE"),
    ("quantize_fp8", "scales_block_stride", 0, "STRIDE"),
    ("quantize_fp8", "rows", -1, "SHAPE"),
    ("quantize_fp8", "k", 0, "SHAPE"),
    ("quantize_fp8", "block", 64, "VALUE"),
    ("quantize_fp8", "dtype", C["MK_F32"], "DTYPE"),
    *(
        (op, *case)
        for op in ("linear_fp8", "linear_fp8_swiglu")
        for case in (
            ("x", None, "NULL"),
            ("x", POINTER + 8, "ALIGNMENT"),
            ("w", None, "NULL"),
            ("w", POINTER + 1, "ALIGNMENT"),
            ("x_scale", None, "NULL"),
            ("w_scale", None, "NULL"),
            ("x_scale", POINTER + 2, "ALIGNMENT"),
            ("out", None, "NULL"),
            ("x_stride", 4095, "STRIDE"),
            ("x_stride", 4104, "STRIDE"),
            ("w_stride", 4104, "STRIDE"),
            ("x_stride", 1 << 40, "STRIDE"),
            ("x_scale_stride", -1, "STRIDE"),
            ("w_scale_block_stride", -1, "STRIDE"),
            ("m", -1, "SHAPE"),
            ("n", 0, "SHAPE"),
            ("k", 0, "SHAPE"),
            ("k", (1 << 20) + 1, "SHAPE"),
            ("out_dtype", 0, "DTYPE"),
            ("out_dtype", C["MK_F32"], "DTYPE"),
        )
    ),
    ("attention_fp8", "q", None, "NULL"),
    ("attention_fp8", "q", POINTER + 8, "ALIGNMENT"),
    ("attention_fp8", "k", None, "NULL"),
    ("attention_fp8", "v", POINTER + 4, "ALIGNMENT"),
    ("attention_fp8", "out", POINTER + 2, "ALIGNMENT"),
    ("attention_fp8", "lse", POINTER + 2, "ALIGNMENT"),
    ("attention_fp8", "cu_seqlens_q", None, "NULL"),
    ("attention_fp8", "cu_seqlens_k", None, "NULL"),
    ("attention_fp8", "q_descale", POINTER + 2, "ALIGNMENT"),
    ("attention_fp8", "q_stride", 4104, "STRIDE"),
    ("attention_fp8", "k_stride", 1 << 31, "STRIDE"),
    ("attention_fp8", "v_head_stride", 136, "STRIDE"),
    ("attention_fp8", "v_head_stride", 64, "STRIDE"),
    ("attention_fp8", "out_stride", 127, "STRIDE"),
    ("attention_fp8", "out_head_stride", 132, "STRIDE"),
    ("attention_fp8", "lse_stride", 299, "STRIDE"),
    ("attention_fp8", "v_descale_stride", -1, "STRIDE"),
    ("attention_fp8", "head_dim", 64, "SHAPE"),
    ("attention_fp8", "num_q_heads", 31, "SHAPE"),
    ("attention_fp8", "num_kv_heads", 0, "SHAPE"),
    ("attention_fp8", "num_q_descales", 3, "SHAPE"),
    ("attention_fp8", "batch", 65536, "SHAPE"),
    ("attention_fp8", "tokens_q", -1, "SHAPE"),
    ("attention_fp8", "tokens_k", -1, "SHAPE"),
    ("attention_fp8", "max_seqlen_q", -1, "SHAPE"),
    ("attention_fp8", "causal", 2, "VALUE"),
    ("attention_fp8", "window", -1, "VALUE"),
    ("attention_fp8", "softmax_scale", 0.0, "VALUE"),
    ("attention_fp8", "out_dtype", C["MK_F32"], "DTYPE"),
    ("linear_fp8", "out_stride", 6143, "STRIDE"),
    ("linear_fp8", "residual", POINTER + 1, "ALIGNMENT"),
    ("linear_fp8", "residual_stride", 6143, "STRIDE"),
    ("linear_fp8_swiglu", "out_stride", 3071, "STRIDE"),
    ("linear_fp8_swiglu", "n", 6143, "SHAPE"),
    ("linear_fp8_swiglu", "residual", POINTER, "VALUE"),
]


@pytest.mark.parametrize("op, field, value, status", BAD)
def test_bad_parameter_is_named(op: str, field: str, value: Any, status: str) -> None:
    """By the plan and by the launch alike, and before a driver is looked for."""
    params = make_params(op, **{field: value})
    launch = getattr(abi.library(), f"mk_{op}")
    for call in (
        lambda: abi.plan(op, params, "80"),
        lambda: abi.check(launch(ctypes.byref(params), None)),
    ):
        with pytest.raises(abi.StatusError) as caught:
            call()
        assert caught.value.status == f"MK_ERR_{status}"
        assert field in caught.value.message


def test_theta_is_checked_without_tables() -> None:
    params = make_params("apply_rope", **{"rope.cos": None, "rope.sin": None, "rope.theta": 1.0})
    with pytest.raises(abi.StatusError, match=r"rope\.theta"):
        abi.plan("apply_rope", params, "80")


@pytest.mark.parametrize("op", abi.OPS)
def test_null_arguments(op: str) -> None:
    launch, plan = (getattr(abi.library(), f"mk_{op}{suffix}") for suffix in ("", "_plan"))
    params, result = make_params(op), abi.structs()["mk_plan"]()
    device = abi.device(arch_of(op))
    arguments = [ctypes.byref(x) for x in (params, device, result)]
    assert launch(None, None) == C["MK_ERR_NULL"]
    for i in range(3):
        with_null = [None if i == j else a for j, a in enumerate(arguments)]
        assert plan(*with_null) == C["MK_ERR_NULL"]
    assert plan(*arguments) == C["MK_OK"]


@pytest.mark.parametrize(
    "op, rows, k",
    [("linear_quant", "m", "k"), ("linear_quant_swiglu", "m", "k"),
     ("qkv_rope_append_quant", "tokens", "hidden")],
)  # fmt: skip
def test_workspace_of_quantised_products(op: str, rows: str, k: str) -> None:
    """None up to 16 rows; above, at least x in 2 bytes, and a smaller one is refused."""
    lib, bytes_ = abi.library(), ctypes.c_int64(-1)
    function = getattr(lib, f"mk_{op.removesuffix('_swiglu')}_workspace_bytes")
    launch = getattr(lib, f"mk_{op}")
    few = make_params(op, **{rows: C["MK_QUANT_MAX_DECODE_M"]})
    abi.check(function(ctypes.byref(few), ctypes.byref(bytes_)))
    assert bytes_.value == 0
    many = {rows: C["MK_QUANT_MAX_DECODE_M"] + 1}
    abi.check(function(ctypes.byref(make_params(op, **many)), ctypes.byref(bytes_)))
    assert 64 * 4096 * 2 < bytes_.value < 64 * 4096 * 3  # rows are rounded up to 64
    for field, value, status in (
        ("workspace", None, "NULL"),
        ("workspace", POINTER + 8, "ALIGNMENT"),
        ("workspace_bytes", bytes_.value - 1, "VALUE"),
    ):
        params = make_params(op, **many, **{field: value})
        with pytest.raises(abi.StatusError, match=field) as caught:
            abi.check(launch(ctypes.byref(params), None))
        assert caught.value.status == f"MK_ERR_{status}"
    assert function(None, ctypes.byref(bytes_)) == C["MK_ERR_NULL"]
    assert function(ctypes.byref(few), None) == C["MK_ERR_NULL"]
    for change in ({rows: -1}, {k: 0}):
        params = make_params(op, **change)
        assert function(ctypes.byref(params), ctypes.byref(bytes_)) == C["MK_ERR_SHAPE"]


@pytest.mark.parametrize("op, rows", [("linear", "m"), ("qkv_rope_append", "tokens")])
def test_norm_is_for_few_rows(op: str, rows: str) -> None:
    most = C["MK_LINEAR_MAX_NORM_M"]
    abi.plan(op, make_params(op, **{rows: most}), "80")
    with pytest.raises(abi.StatusError, match=f"norm_weight must be NULL.*{rows} = {most + 1}"):
        abi.plan(op, make_params(op, **{rows: most + 1}), "80")


def test_errors_are_per_thread() -> None:
    launch = abi.library().mk_rms_norm
    assert launch(None, None) == C["MK_ERR_NULL"]
    seen = []
    thread = threading.Thread(target=lambda: seen.append(abi.library().mk_last_error()))
    thread.start()
    thread.join()
    assert seen == [b""] and b"params" in abi.library().mk_last_error()


def test_python_exceptions() -> None:
    arguments = {
        "x": POINTER, "weight": POINTER, "out": POINTER, "x_stride": 8, "out_stride": 8,
        "rows": 2, "hidden": 8, "eps": 1e-5, "dtype": _native.BF16,
    }  # fmt: skip
    for change, error in (
        ({"hidden": 0}, ValueError),
        ({"dtype": _native.I32}, TypeError),
        ({"x": 0}, ValueError),
        ({"x": -1}, TypeError),
        ({"rows": 1 << 31}, TypeError),
    ):
        with pytest.raises(error):
            _native.rms_norm(**{**arguments, **change}, stream=0)
    with pytest.raises(NotImplementedError, match=r"device\.sm"):
        _native.rms_norm_plan(**arguments, sm=70, num_sms=80, smem_per_block=1 << 16)


def test_abi_version_and_status_names() -> None:
    assert abi.library().mk_abi_version() == C["MK_ABI_VERSION"] == _native.ABI_VERSION
    for name, value in C.items():
        if name == "MK_OK" or name.startswith("MK_ERR"):
            assert abi.library().mk_status_name(value).decode() == name


# ---------------------------------------------------------------------------------------- plans

# Fields whose values choose among the kernels of an op, where that is not alignment.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "attention_decode": [
        {"head_dim": d, "max_seqlen_q": n, "rope.rotary_dim": 64} for d in (64, 128) for n in (2, 3)
    ],
    "attention": [{"head_dim": d, "rope.rotary_dim": 64} for d in (64, 128)],
    "attention_fp8": [{}],
    "embedding_quant": [{}],
    "linear_fp8": [{}],
    "linear_fp8_swiglu": [{}],
    "linear_quant": [{"m": 8}, {"m": 16}],
    "linear_quant_swiglu": [{"m": 8}, {"m": 16}],
    "qkv_rope_append_quant": [{"tokens": 8}, {"tokens": 16}],
}
# Of products: rows, columns and how many of the matrix one is, stride of the output.
PRODUCTS = {
    "linear": ("m", "n", 1, "out_stride"),
    "linear_swiglu": ("m", "n", 1, "out_stride"),
    "qkv_rope_append": ("tokens", "num_q_heads", 128, "q_stride"),
}
PRODUCTS |= dict.fromkeys(("linear_fp8", "linear_fp8_swiglu"), PRODUCTS["linear"])
PLANNED: dict[str, set[str]] = {arch: set() for arch in ARCHS}


def check_plan(op: str, params: ctypes.Structure, arch: str) -> ctypes.Structure:
    plan = abi.plan(op, params, arch)
    assert 1 <= plan.block[0] * plan.block[1] * plan.block[2] <= 1024
    assert 0 <= plan.grid[0] < 1 << 31 and all(1 <= n < 1 << 16 for n in plan.grid[1:])
    assert 0 <= plan.smem_bytes <= abi.device(arch).smem_per_block
    assert all(g % c == 0 for g, c in zip(plan.grid, plan.cluster, strict=True))
    assert plan.cluster[:] == [1, 1, 1] or arch in ("90a", "100a")
    assert plan.pdl == (arch in ("90a", "100a"))
    entry = plan.entry.decode()
    assert entry in native.build_info()["entries"][arch]
    use = native.build_info()["entries"][arch][entry]
    threads = plan.block[0] * plan.block[1]
    assert -(-threads // 32) * 32 * use["registers"] <= 65536, "does not fit the register file"
    PLANNED[arch].add(entry)
    return plan


@pytest.mark.parametrize("arch", ARCHS)
def test_plan_and_entries_match(arch: str) -> None:
    """Every plan names an entry that exists; every entry is the plan of some parameters."""
    if arch not in native.build_info()["archs"]:
        pytest.skip(f"sm_{arch} is not in this build")
    reached = set()
    for op in ops_of(arch):
        halves = [C["MK_BF16"], C["MK_F16"]]
        first = next(f for f in ("x", "q", "k", "gate_up", "table", "logits") if f in fields_of(op))
        unaligned = [{}, {first: POINTER + 4}]
        for dtype in [*halves, C["MK_F32"]] if op in ("argmax", "sample") else halves:
            dtypes = {f: dtype for f in ("dtype", "out_dtype") if f in fields_of(op)}
            for change in VARIANTS.get(op, unaligned):
                change = {**dtypes, **change}
                plan = check_plan(op, make_params(op, **change), arch)
                reached.add(plan.entry.decode())
            if op in PRODUCTS:
                rows, columns, width, stride = PRODUCTS[op]
                for m, n in itertools.product((17, 65, 256, 8192), (256, 4096, 23040)):  # each tile
                    change = {rows: m, columns: n // width, stride: n, **dtypes}
                    change |= {f: None for f in ("norm_weight", "residual") if f in fields_of(op)}
                    reached.add(check_plan(op, make_params(op, **change), arch).entry.decode())
    for op in ("linear_quant", "linear_quant_swiglu", "qkv_rope_append_quant"):
        rows = "tokens" if op.startswith("qkv") else "m"
        for m in (17, 8192):  # both tiles of the GEMM
            reached.add(check_plan(op, make_params(op, **{rows: m}), arch).entry.decode())
    few_rows = {"m": 17, "w.rows": 256, "linear.n": 256}  # of w: the small tile, on Hopper too
    reached.add(
        check_plan("linear_quant", make_params("linear_quant", **few_rows), arch).entry.decode()
    )
    assert reached == set(native.build_info()["entries"][arch])


def test_plans_of_a_smaller_device_fit() -> None:
    """sm_80's kernels serve an RTX 3090 and an RTX 5090, too, where a block has 99 KB of shared
    memory, not 163."""
    rows = {op: fields[0] for op, fields in PRODUCTS.items()}
    rows |= {"linear_quant": "m", "linear_quant_swiglu": "m", "qkv_rope_append_quant": "tokens"}
    for sms, op in itertools.product((82, 170), ops_of("80")):
        device = abi.structs()["mk_device"](80, sms, 99 << 10)
        changes: list[dict[str, Any]] = [{}]
        if op in rows:
            product = {"residual": None} if "residual" in fields_of(op) else {}
            normed = [{rows[op]: m, **product} for m in (1, 16, 17, 64)]
            alone = {**product, "norm_weight": None}
            changes = normed + [{rows[op]: m, **alone} for m in (1, 16, 17, 64, 65, 256, 8192)]
        if op in PRODUCTS:
            _, columns, width, stride = PRODUCTS[op]
            changes = [
                {**c, columns: n // width, stride: n} for c in changes for n in (256, 4096, 23040)
            ]
        for change in changes:
            plan = abi.plan(op, make_params(op, **change), device)
            assert plan.smem_bytes <= device.smem_per_block, (op, change)
            assert plan.entry.decode() in native.build_info()["entries"]["80"]


@settings(max_examples=300, deadline=None)
@given(
    arch=st.sampled_from(native.build_info()["archs"] or ["80"]),
    op=st.sampled_from(["rms_norm", "add_rms_norm", "silu_and_mul", "embedding"]),
    rows=st.one_of(st.integers(0, 300), st.integers(0, 2**30)),
    size=st.one_of(st.integers(1, 16384), st.just(4096), st.just(11520)),
)
def test_row_plans_cover_every_vector(arch: str, op: str, rows: int, size: int) -> None:
    name = {"silu_and_mul": "size"}.get(op, "hidden")
    strides = {f: 2 * size for f in VALID[op] if f.endswith("stride")}
    row_field = "tokens" if op == "embedding" else "rows"
    plan = check_plan(op, make_params(op, **{name: size, row_field: rows}, **strides), arch)
    vectors = -(-size // 8)
    if op.endswith("rms_norm"):
        assert plan.block[0] % 32 == 0 and 4 * plan.block[0] >= vectors
        assert plan.grid[0] * plan.block[1] >= min(rows, 1) and plan.grid[0] <= max(rows, 0)
    else:
        assert plan.grid[0] == rows and 4 * plan.grid[1] * plan.block[0] >= vectors


@settings(max_examples=200, deadline=None)
@given(
    arch=st.sampled_from(native.build_info()["archs"] or ["80"]),
    tokens=st.integers(0, 10**6),
    heads=st.tuples(st.integers(0, 128), st.integers(0, 128)),
    head_dim=st.integers(1, 128).map(lambda n: 2 * n),
    data=st.data(),
)
def test_rope_plans(
    arch: str, tokens: int, heads: tuple[int, int], head_dim: int, data: st.DataObject
) -> None:
    rotary_dim = 2 * data.draw(st.integers(1, head_dim // 2))
    strides = {f: 1024 * head_dim for f in VALID["apply_rope"] if f.endswith("stride")}
    params = make_params(
        "apply_rope", tokens=tokens, num_q_heads=heads[0], num_k_heads=heads[1],
        head_dim=head_dim, **strides, **{"rope.rotary_dim": rotary_dim, "rope.table_stride": 128},
    )  # fmt: skip
    plan = check_plan("apply_rope", params, arch)
    assert plan.block[0] * 16 >= head_dim
    assert plan.grid[0] == (tokens if sum(heads) else 0)
    assert plan.grid[1] * plan.block[1] * 4 >= sum(heads)


def test_few_rows_get_more_threads() -> None:
    few, many = (abi.plan("rms_norm", make_params("rms_norm", rows=n), "90a") for n in (1, 8192))
    assert few.block[0] == 512 and many.block[0] == 128
    assert many.grid[0] <= 132 * 5 < 8192, "persistent blocks"


@pytest.mark.parametrize("op", abi.OPS)
def test_empty_input_launches_nothing(op: str) -> None:
    rows = next(field for field in ("tokens", "m", "rows", "tokens_q") if field in fields_of(op))
    pointers = {f: None for f, v in fields_of(op).items() if v == POINTER}
    params = make_params(op, **{rows: 0}, **pointers)
    arch = arch_of(op)
    assert abi.plan(op, params, arch).grid[0] == 0
    lib = emulated_library()  # which makes others current when it is loaded
    make_current(arch)
    abi.check(getattr(lib, f"mk_{op}")(ctypes.byref(params), None))


def test_plan_format() -> None:
    plan = abi.plan("rms_norm", make_params("rms_norm"), "90a")
    text = ctypes.create_string_buffer(200)
    length = abi.library().mk_plan_format(ctypes.byref(plan), text, ctypes.c_size_t(200))
    expected = "mk_rms_norm_sm90_bf16 grid 3x1x1 block 512x1x1 smem 0 pdl"
    assert text.value.decode() == expected and length == len(expected)
    assert abi.library().mk_plan_format(ctypes.byref(plan), text, ctypes.c_size_t(8)) == length
    assert text.value == b"mk_rms_"


# -------------------------------------------------------------------------------- architectures


def kernels_for(lib: ctypes.CDLL, major: int, minor: int) -> str:
    arch = ctypes.c_char_p()
    abi.check(lib.mk_kernels_for(major, minor, ctypes.byref(arch)), lib)
    return arch.value.decode()


@pytest.mark.parametrize(
    "archs, capabilities",
    [
        (
            ARCHS,
            {(8, 0): "80", (8, 6): "80", (8, 7): "80", (8, 9): "89", (9, 0): "90a", (10, 0): "100a",
             (10, 3): "80", (11, 0): "80", (12, 0): "80", (12, 1): "80"},
        ),
        (("80",), {(8, 0): "80", (8, 9): "80", (9, 0): "80", (10, 0): "80"}),
        (("90a",), {(9, 0): "90a"}),
    ],
)  # fmt: skip
def test_choice_of_architecture(
    tmp_path: Path, archs: tuple[str, ...], capabilities: dict[tuple[int, int], str]
) -> None:
    lib = abi.load(copy_of_library(tmp_path / "package", archs))
    for (major, minor), expected in capabilities.items():
        assert kernels_for(lib, major, minor) == expected
    unsupported = [(7, 5), *([] if "80" in archs else [(8, 0), (8, 9), (10, 0), (12, 0)])]
    for major, minor in unsupported:
        with pytest.raises(abi.StatusError, match=f"{major}.{minor}.*{' '.join(archs)}") as caught:
            kernels_for(lib, major, minor)
        assert caught.value.status == "MK_ERR_UNSUPPORTED"


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code with the emulator as the driver, unless the environment says otherwise."""
    env = {**os.environ, "MK_CUDA_DRIVER": str(emulator.build()), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120
    )


# Defines launch(lib): rms_norm of 2 x 64 ones, whose result is ones.
PRELUDE = """
import ctypes, torch
from tests import emulator, native_abi as abi
from tests.native_emulator import make_current
x = torch.ones(2, 64, dtype=torch.bfloat16)
out = torch.zeros_like(x)
params = abi.params_type("rms_norm")(
    x=x.data_ptr(), weight=x.data_ptr(), out=out.data_ptr(), x_stride=64, out_stride=64,
    rows=2, hidden=64, eps=0.0, dtype=1)
def launch(lib):
    with emulator.accessible(x=x, out=out):
        abi.check(lib.mk_rms_norm(ctypes.byref(params), None), lib)
    assert torch.equal(out, x)
"""


def test_fallback_is_noted_once(tmp_path: Path) -> None:
    path = copy_of_library(tmp_path / "package", ["80"])
    code = (
        f"{PRELUDE}\nlib = abi.load({str(path)!r})\nmake_current('90a')\nlaunch(lib)\nlaunch(lib)"
    )
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no kernels of its own") == 1
    assert "9.0" in done.stderr and "sm_80, compiled from PTX" in done.stderr


def test_device_without_kernels_is_an_error(tmp_path: Path) -> None:
    path = copy_of_library(tmp_path / "package", ["100a"])
    done = in_new_process(f"{PRELUDE}\nmake_current('90a')\nlaunch(abi.load({str(path)!r}))")
    assert "MK_ERR_UNSUPPORTED" in done.stderr and "9.0" in done.stderr and "100a" in done.stderr


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_damaged_kernel_file(tmp_path: Path, damage: str) -> None:
    path = copy_of_library(tmp_path / "package", ["80"])
    file = path.parent / "kernels" / "sm_80.fatbin"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-1000] if damage == "truncated" else b"x" * 1000)
    done = in_new_process(f"{PRELUDE}\nmake_current('80')\nlaunch(abi.load({str(path)!r}))")
    assert "sm_80.fatbin is damaged at byte" in done.stderr


def test_kernels_that_the_driver_does_not_take(tmp_path: Path) -> None:
    path = copy_of_library(tmp_path / "package", ["80"])
    file = path.parent / "kernels" / "sm_80.fatbin"
    header = file.read_bytes()[:8] + (64).to_bytes(8, "little")
    file.unlink()
    file.write_bytes(header + bytes(64))
    done = in_new_process(f"{PRELUDE}\nmake_current('80')\nlaunch(abi.load({str(path)!r}))")
    assert re.search(r"sm_80.fatbin: cuLibraryLoadData: CUDA_\w+ .*CUDA up to 13\.0;", done.stderr)


# -------------------------------------------------------------------------- driver and launches

NATIVE_CALL = """
from minitron_kernels import _native
try:
    _native.load()
except RuntimeError as error:
    print(error)
"""


def test_import_without_a_driver_and_clear_error() -> None:
    done = in_new_process(NATIVE_CALL, MK_CUDA_DRIVER="/nonexistent/libcuda.so")
    assert done.returncode == 0 and "/nonexistent/libcuda.so" in done.stdout


def test_driver_that_is_none() -> None:
    done = in_new_process(NATIVE_CALL, MK_CUDA_DRIVER="libm.so.6")
    assert "libm.so.6 has no cu" in done.stdout and "CUDA 12" in done.stdout


def test_no_current_context() -> None:
    assert "no CUDA context is current" in in_new_process(NATIVE_CALL).stdout


def test_a_thread_without_a_context_gets_the_runtimes() -> None:
    """As one that makes no call of the CUDA runtime before its first launch: device 0's primary
    context, if it is in use; a context that is current stays."""
    code = f"""{PRELUDE}
import threading
from minitron_kernels import _native
make_current("80")  # device 0's, in this thread only
found = []
def work():
    launch(abi.library())
    found.append(_native.current_device()["sm"])
thread = threading.Thread(target=work)
thread.start()
thread.join()
make_current("89")
launch(abi.library())
print(found, _native.current_device()["sm"])
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[80]", "89"], done.stdout + done.stderr


def test_native_module_on_every_architecture() -> None:
    """From Python to the kernel and back, with one process using all devices in turn."""
    code = """
import torch
from minitron_kernels import _native, ops
from tests import emulator
from tests.native_emulator import ARCHS, make_current
x, w = torch.randn(3, 576).bfloat16(), torch.randn(576).bfloat16()
for arch in ARCHS * 2:
    make_current(arch)
    device = _native.current_device()
    assert device["sm"] == int(arch.rstrip("a"))
    assert device["clusters_of_4"] == (32 if arch == "90a" else 0)
    out = torch.full_like(x, float("nan"))
    with emulator.accessible(x=x, w=w, out=out):
        _native.rms_norm(x=x.data_ptr(), weight=w.data_ptr(), out=out.data_ptr(), x_stride=576,
                         out_stride=576, rows=3, hidden=576, eps=1e-5, dtype=_native.BF16, stream=0)
    torch.testing.assert_close(out, ops.rms_norm(x, w, 1e-5), atol=0, rtol=2**-7)
    print(arch, device)
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [*ARCHS, *ARCHS]


def test_print_plan_once_per_shape() -> None:
    code = f"{PRELUDE}\nlib = abi.library()\nmake_current('90a')\n" + "launch(lib)\n" * 3
    assert in_new_process(code).stderr == ""
    lines = in_new_process(code, MK_PRINT_PLAN="1").stderr.splitlines()
    plan = "mk_rms_norm_sm90_bf16 grid 2x1x1 block 32x1x1 smem 0 pdl"
    assert lines == [f"rms_norm bf16 rows 2 hidden 64 -> {plan}"]


def test_first_launches_from_many_threads() -> None:
    code = f"""{PRELUDE}
import threading
lib, errors = abi.library(), []
def work(arch):
    try:
        make_current(arch)
        for _ in range(20):
            abi.check(lib.mk_rms_norm(ctypes.byref(params), None), lib)
    except Exception as error:
        errors.append(error)
threads = [threading.Thread(target=work, args=(a,)) for a in ("80", "89", "90a", "100a") * 2]
with emulator.accessible(x=x, out=out):
    for t in threads: t.start()
    for t in threads: t.join()
assert not errors, errors
assert torch.equal(out, x)
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr


def test_first_launch_under_graph_capture() -> None:
    """Nothing runs while capturing; each replay of the graph computes."""
    code = f"""{PRELUDE}
lib, driver = abi.library(), emulator.library()
make_current("90a")
stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
assert driver.cuStreamCreate(ctypes.byref(stream), 0) == 0
assert driver.cuStreamBeginCapture_v2(stream, 0) == 0
abi.check(lib.mk_rms_norm(ctypes.byref(params), stream), lib)
assert driver.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0
assert not out.any()
flags = ctypes.c_ulonglong(0)
assert driver.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, flags) == 0
for _ in range(2):
    out.zero_()
    with emulator.accessible(x=x, out=out):
        assert driver.cuGraphLaunch(executable, stream) == 0
    assert torch.equal(out, x)
"""
    done = in_new_process(code)
    assert done.returncode == 0, done.stderr


def test_a_fault_in_a_kernel_is_a_driver_error() -> None:
    """The output is not accessible: the launch fails and the report names the kernel."""
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    out = torch.zeros_like(x)
    params = abi.params_type("rms_norm")(
        x=x.data_ptr(), weight=x.data_ptr(), out=out.data_ptr(), x_stride=64, out_stride=64,
        rows=2, hidden=64, eps=1e-5, dtype=C["MK_BF16"],
    )  # fmt: skip
    lib = emulated_library()
    make_current("80")
    with emulator.accessible(x=x), pytest.raises(abi.StatusError, match="cuLaunchKernelEx"):
        abi.check(lib.mk_rms_norm(ctypes.byref(params), None), lib)
    assert "mk_rms_norm_sm80_bf16" in emulator.last_report() and not out.any()


def test_library_paths() -> None:
    for header in ("minitron_kernels.h", "minitron_kernels_fp8.h"):
        assert (Path(native.get_include()) / header).is_file()
    assert Path(native.get_library()).name == "libminitron_kernels.so"


def test_stub_names_what_the_module_has() -> None:
    """_native.pyi, for type checkers, against the module: names and order of the arguments."""
    stub = ast.parse((Path(native.__file__).parent / "_native.pyi").read_text())
    functions = {node.name: node.args for node in stub.body if isinstance(node, ast.FunctionDef)}
    others = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    classes = {node.name for node in stub.body if isinstance(node, ast.ClassDef)}
    public = {name for name in dir(_native) if not name.startswith("_")}
    assert public == {*functions, *others, *classes}
    for name, args in functions.items():
        signature = getattr(_native, name).__doc__.partition(") -> ")[0]
        in_module = re.findall(r"[(,] (?:\*, )?(\w+):", signature.replace("(", "( ", 1))
        assert in_module == [a.arg for a in [*args.args, *args.kwonlyargs]], name
