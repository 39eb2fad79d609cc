"""The products with quantised weights at Minitron-8B's shapes, as cases of the accounting.

Tiles are zeros, which no count depends on: kernels decode without branches.
"""

from __future__ import annotations

import ctypes
import math
import re
from collections.abc import Callable

import torch

from bench.accounting import Bar, Case, Plan
from bench.cases import (
    ALL_ARCHS,
    BF16,
    COALESCED,
    HIDDEN,
    MATRICES,
    dtype_id,
    native_case,
    pointers,
    zeros,
)
from bench.sass import MainLoop
from minitron_kernels.block_types import GGML_NUMBERS, QUANT_TYPES
from tests import native_abi as abi

Tensor = torch.Tensor
MAX_DECODE_M = abi.constants()["MK_QUANT_MAX_DECODE_M"]


def packed(kind: str, rows: int, k: int) -> tuple[ctypes.Structure, Tensor]:
    """An empty matrix of tiles, and its memory."""
    number, size = GGML_NUMBERS[kind], ctypes.c_int64()
    abi.check(abi.library().mk_quant_packed_bytes(number, rows, k, ctypes.byref(size)))
    tiles = zeros(size.value, dtype=torch.uint8)
    return abi.structs()["mk_quant_matrix"](tiles=tiles.data_ptr(), type=number, rows=rows), tiles


def stored_bytes(kind: str, rows: int, k: int) -> int:
    return rows * QUANT_TYPES[kind].row_nbytes(k)


def tile_loads(kind: str) -> dict[int, int]:
    """Loads of a lane from global memory for a tile of 256 k, by bits (csrc/quant/quant_layout.h):
    those of the scales and pieces of 16 bytes, and of the simple types also those for tiles of
    fewer quarters. No two types have the same."""
    bits = int(kind[1])
    if kind == "Q3_K":
        return {128: 3, 32: 2, 16: 1}
    if kind == "Q6_K":
        return {128: 6, 64: 1, 32: 1}
    if kind in ("Q2_K", "Q4_K", "Q5_K"):
        return {128: bits, 64: 2}
    short = 4 * (bits // 4)  # and the fifths of bits, and the scales
    words = 4 if kind.endswith("_1") else 2
    whole = {128: bits + 1} if words == 4 else {128: bits, 64: 1}
    return whole | {128: whole[128] + short, 32: words + (4 if bits == 5 else 0)}


def decode_loop(kind: str) -> Callable[[MainLoop], bool]:
    """The loop over tiles of a type, two a turn, of quant_decode_sm80.cuh: that with the nearest
    loads, as ptxas may share some between whole tiles and others (not those of 8 bytes, which are
    scales). Loops with other numbers of MMAs convert x."""

    def distance(loads: dict[int, int], other: str) -> int:
        wanted = tile_loads(other)
        apart = {w: abs(loads.get(w, 0) - 2 * wanted.get(w, 0)) for w in (16, 32, 64, 128)}
        return sum(apart.values()) + apart[64]

    def is_meant(loop: MainLoop) -> bool:
        nearest = min(QUANT_TYPES, key=lambda other: distance(loop.loads, other))
        return loop.hmma % 36 == 0 and nearest == kind

    return is_meant


def no_loop(_: MainLoop) -> bool:
    """The GEMMs' loops read shared memory only, and do not tell their types."""
    return False


def tiles_of_blocks(m: int, n: int) -> Callable[[Plan], list[float]]:
    """Tiles that each block multiplies: one, or what its cluster takes on sm_90."""

    def work(plan: Plan) -> list[float]:
        blocks = math.prod(plan.grid)
        tile = re.search(r"_sm90_b16_rows128_m(\d+)$", plan.entry)
        if not tile:
            return [1.0] * blocks
        tiles = -(-m // int(tile[1])) * -(-n // (128 * plan.cluster))
        clusters = blocks // plan.cluster
        return [float(-(-(tiles - b // plan.cluster) // clusters)) for b in range(blocks)]

    return work


def copies_of_x(kind: str) -> Callable[[Plan], float]:
    """Blocks that a byte from L2 goes to: of x those of the cluster, of w one."""

    def copies(plan: Plan) -> float:
        if plan.cluster == 1:
            return 1.0
        x = int(plan.entry.rpartition("_m")[2]) * (512 + 64)
        w = packed(kind, 128, 256)[1].numel()
        return (x + w) / (x / plan.cluster + w)

    return copies


def linear_quant(name: str, kind: str, m: int) -> Case:
    """A unit is 256 rows of w. gate_up has the norm and the activation, down and o the residual."""
    n, k = MATRICES[name]
    few = m <= MAX_DECODE_M
    op = "linear_quant_swiglu" if name == "gate_up" else "linear_quant"

    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        width = units * 256
        x = torch.ones(m, k, dtype=BF16) if filled else zeros(m, k)
        out = zeros(m, width // 2 if name == "gate_up" else width)
        norm = zeros(k) if name == "gate_up" else None
        residual = None if name == "gate_up" else zeros(m, width)
        w, tiles = packed(kind, width, k)
        linear = abi.structs()["mk_linear_params"](
            **pointers(x=x, norm_weight=norm, residual=residual, out=out), x_stride=k,
            out_stride=out.stride(0), residual_stride=0 if residual is None else width,
            m=m, n=width, k=k, eps=1e-5, dtype=dtype_id(x), out_dtype=dtype_id(out),
        )  # fmt: skip
        params = abi.structs()["mk_linear_quant_params"](linear=linear, w=w)
        tensors = [t for t in (x, tiles, out, norm, residual) if t is not None]
        if not few:
            size = ctypes.c_int64()
            sized = abi.library().mk_linear_quant_workspace_bytes
            abi.check(sized(ctypes.byref(params), ctypes.byref(size)))
            workspace = zeros(size.value, dtype=torch.uint8)
            params.workspace, params.workspace_bytes = workspace.data_ptr(), size.value
            tensors.append(workspace)
        return params, tensors

    columns_out = n // 2 if name == "gate_up" else 2 * n  # and the residual
    archs: tuple[str, ...] = ("80",) if few else ("80", "90a")
    if (m, name, kind) == (1, "down", "Q4_K"):
        archs = ALL_ARCHS
    return native_case(
        op,
        build,
        group="quantised, few rows" if few else "quantised GEMM",
        shape=f"{name} {n} x {k} {kind}, M {m}",
        units=n // 256,
        exact_units=2,
        compulsory_bytes=stored_bytes(kind, n, k) + 2 * m * (k + columns_out),
        flop=2 * m * n * k,
        archs=archs,
        work=tiles_of_blocks(m, n),
        copies=copies_of_x(kind),
        loop=decode_loop(kind) if few else no_loop,
        bars=(Bar("dram", 1.05), COALESCED) if few else (COALESCED,),
    )


def quant_prepare_x(m: int) -> Case:
    """What precedes a product of more than 64 rows, once for all that read the same x."""

    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        x, norm = zeros(units, HIDDEN), zeros(HIDDEN)
        size = ctypes.c_int64()
        linear = abi.structs()["mk_linear_params"](m=units, n=16, k=HIDDEN, dtype=dtype_id(x))
        sizing = abi.structs()["mk_linear_quant_params"](linear=linear)
        sized = abi.library().mk_linear_quant_workspace_bytes
        abi.check(sized(ctypes.byref(sizing), ctypes.byref(size)))
        workspace = zeros(size.value, dtype=torch.uint8)
        params = abi.structs()["mk_quant_prepare_x_params"](
            **pointers(x=x, norm_weight=norm, workspace=workspace), workspace_bytes=size.value,
            x_stride=HIDDEN, m=units, k=HIDDEN, eps=1e-5, dtype=dtype_id(x),
        )  # fmt: skip
        return params, [x, norm, workspace]

    return native_case(
        "quant_prepare_x",
        build,
        group="row-wise",
        shape=f"{m} x {HIDDEN}",
        units=m,
        exact_units=m,
        compulsory_bytes=2 * HIDDEN * (2 * m + 1),
    )
