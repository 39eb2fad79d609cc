"""What the C ABI refuses, and how it says so."""

from __future__ import annotations

import ctypes
import re
import threading
from typing import Any

import pytest

from minitron_kernels import _native
from tests import native_abi as abi
from tests.native_params import POINTER, C, arch_of, make_params

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
    ("linear_quant", "up.tiles", POINTER, "VALUE"),
    ("linear_quant", "up.rows", 6144, "VALUE"),
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
    ("quant_prepare_x", "workspace_bytes", 65 * 4096, "VALUE"),
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


@pytest.mark.parametrize(
    "field, value, status",
    [("up.tiles", None, "NULL"), ("up.tiles", POINTER + 4, "ALIGNMENT"), ("up.type", 0, "VALUE"),
     ("up.type", 4, "VALUE"), ("up.type", C["MK_Q8_0"], "OK"), ("up.rows", 0, "SHAPE"),
     ("up.rows", 3071, "SHAPE"), ("w.rows", 6144, "SHAPE"), ("w.tiles", None, "NULL"),
     ("w.type", C["MK_Q4_0"], "OK"), ("linear.w", POINTER, "VALUE"), ("n", 6143, "SHAPE")],
)  # fmt: skip
def test_gate_and_up_apart(field: str, value: Any, status: str) -> None:
    """Of any two types, [n / 2, k] both; what is wrong with either is named."""
    up = {"tiles": POINTER, "type": C["MK_Q6_K"], "rows": 3072}
    params = make_params("linear_quant_swiglu", **{"w.rows": 3072, "up": up, field: value})
    if status == "OK":
        abi.plan("linear_quant_swiglu", params, "80")
        return
    with pytest.raises(abi.StatusError, match=re.escape(field)) as caught:
        abi.plan("linear_quant_swiglu", params, "80")
    assert caught.value.status == f"MK_ERR_{status}"


def test_block_of_each_type_divides_k() -> None:
    up = {"tiles": POINTER, "type": C["MK_Q6_K"], "rows": 3072}
    params = make_params(
        "linear_quant_swiglu", **{"w.rows": 3072, "w.type": C["MK_Q4_0"], "up": up, "k": 4064}
    )
    with pytest.raises(abi.StatusError, match=r"k must be .* 256, the block of up\.type = Q6_K"):
        abi.plan("linear_quant_swiglu", params, "80")


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
    """None up to 64 rows; above, at least x in 2 bytes, and a smaller one is refused."""
    lib, bytes_ = abi.library(), ctypes.c_int64(-1)
    function = getattr(lib, f"mk_{op.removesuffix('_swiglu')}_workspace_bytes")
    launch = getattr(lib, f"mk_{op}")
    few = make_params(op, **{rows: C["MK_QUANT_MAX_DECODE_M"]})
    abi.check(function(ctypes.byref(few), ctypes.byref(bytes_)))
    assert bytes_.value == 0
    many = {rows: C["MK_QUANT_MAX_DECODE_M"] + 1}
    abi.check(function(ctypes.byref(make_params(op, **many)), ctypes.byref(bytes_)))
    assert 128 * 4096 * 2 < bytes_.value < 128 * 4096 * 3  # rows are rounded up to 64
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
    with pytest.raises(NotImplementedError, match=r"compute capability 7\.0"):
        _native.kernels_for(7, 0)


def test_abi_version_and_status_names() -> None:
    assert abi.library().mk_abi_version() == C["MK_ABI_VERSION"] == _native.ABI_VERSION
    for name, value in C.items():
        if name == "MK_OK" or name.startswith("MK_ERR"):
            assert abi.library().mk_status_name(value).decode() == name
