"""The accounting's cases of FP8 products: scales for 128 columns of x and 128 x 128 of w."""

from __future__ import annotations

import ctypes

import torch

from bench.accounting import Bar, Case
from bench.cases import (
    COALESCED,
    CONFLICT_FREE,
    gemm_epilogue,
    gemm_work,
    native_case,
    pointers,
    zeros,
)
from tests import native_abi as abi
from tests.emulator import Counters
from tests.native_emulator import dtype_id, run

Tensor = torch.Tensor

E4M3 = torch.float8_e4m3fn
# Of a stage of 128 x 192 a block gets 40 KB, for which L2 gives 28 in clusters of 2, 20 of 4.
_COPIES = {1: 1.0, 2: 1.4, 4: 2.0}


def _scale(rows: int, blocks: int) -> Tensor:
    """Those of a block of k adjoin, as quantize_fp8 writes them."""
    return zeros(blocks, rows, dtype=torch.float32).T


def linear_fp8(name: str, n: int, k: int, m: int) -> Case:
    """A unit: the columns of two tiles where these divide n, else all is one."""
    columns = 384 if n % 384 == 0 else n // 2
    op = "linear_fp8_swiglu" if name == "gate_up" else "linear_fp8"
    has_residual = name in ("o", "down")

    def build(units: int, filled: bool, k: int = k) -> tuple[ctypes.Structure, list[Tensor]]:
        width, blocks = units * columns, k // 128
        x, w = zeros(m, k, dtype=E4M3), zeros(width, k, dtype=E4M3)
        x_scale, w_scale = _scale(m, blocks), _scale(-(-width // 128), blocks)
        out = zeros(m, width // 2 if name == "gate_up" else width)
        residual = zeros(m, width) if has_residual else None
        params = abi.structs()["mk_linear_fp8_params"](
            **pointers(x=x, w=w, x_scale=x_scale, w_scale=w_scale, residual=residual, out=out),
            x_stride=k, w_stride=k, residual_stride=width if has_residual else 0,
            out_stride=out.stride(0), x_scale_stride=1, w_scale_stride=1,
            x_scale_block_stride=m, w_scale_block_stride=w_scale.stride(1), m=m, n=width, k=k,
            out_dtype=dtype_id(out),
        )  # fmt: skip
        tensors = [x.view(torch.uint8), w.view(torch.uint8), x_scale, w_scale, out]
        return params, tensors + ([residual] if residual is not None else [])

    columns_out = n // 2 if name == "gate_up" else n * (2 if has_residual else 1)
    scales = 4 * (m * (k // 128) + -(-n // 128) * (k // 128))

    def of_stages(arch: str, stages: int) -> Counters:
        params, tensors = build(n // columns, True, 128 * stages)
        counters = run(op, arch, params, tensors)
        assert counters is not None
        return counters

    # The other warpgroup has half a stage left, and then waits for its turn.
    epilogue = gemm_epilogue(of_stages, m, n, lambda width: width, has_residual)
    # FFMAs alone are 0.25 of 128 x 192; the rest is what 16-bit products may take.
    bars = [Bar("issue", 0.40, "90a", "_m128_n192")] if m > 64 else [Bar("dram", 1.10)]
    return native_case(
        op,
        build,
        group="GEMM, FP8",
        shape=f"{name} {n} x {k}, M {m}",
        units=n // columns,
        exact_units=n // columns if columns != 384 or m <= 64 else 2,
        compulsory_bytes=m * k + n * k + scales + 2 * m * columns_out,
        flop=2 * m * n * k,
        bars=(*bars, COALESCED, CONFLICT_FREE),
        work=gemm_work(m, n),
        copies=lambda plan: _COPIES[plan.cluster],
        archs=("90a",),
        mma_rate=2,
        # 11000 tiles of lm_head would take minutes.
        epilogue=epilogue if m > 64 and name != "lm_head" else None,
    )


def quantize_fp8(rows: int) -> Case:
    k = 4096

    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        x, out, scales = zeros(units, k), zeros(units, k, dtype=E4M3), _scale(units, k // 128)
        params = abi.structs()["mk_quantize_fp8_params"](
            **pointers(x=x, out=out, scales=scales), x_stride=k, out_stride=k, scales_stride=1,
            scales_block_stride=units, rows=units, k=k, block=128, dtype=dtype_id(x),
        )  # fmt: skip
        return params, [x, out.view(torch.uint8), scales]

    return native_case(
        "quantize_fp8",
        build,
        group="row-wise",
        shape=f"{rows} x {k}, blocks of 128",
        units=rows,
        exact_units=rows,
        compulsory_bytes=rows * (3 * k + 4 * (k // 128)),
        archs=("90a",),
        bars=(Bar("dram", 1.01), CONFLICT_FREE),
    )
