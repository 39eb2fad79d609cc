"""Plans: that they fit their architecture, and name each kernel of the build."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import native
from tests import native_abi as abi
from tests.native_emulator import ARCHS, emulated_library, make_current
from tests.native_params import POINTER, VALID, C, arch_of, fields_of, make_params, ops_of

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
        for m in (65, 300, 8192):  # each tile of the GEMM
            reached.add(check_plan(op, make_params(op, **{rows: m}), arch).entry.decode())
    few_rows = {"m": 65, "w.rows": 256, "linear.n": 256}  # of w: the small tile, on Hopper too
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
