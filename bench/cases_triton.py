"""Triton's kernels as cases of the accounting, beside this project's: what a Triton user has."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import language as tl

from bench import triton_peers
from bench.accounting import Binary, Case, Plan, compiled
from bench.cases import (
    ALL_ARCHS,
    GROUP,
    HEAD_DIM,
    HIDDEN,
    KV_HEADS,
    MLP,
    Q_HEADS,
    SOFTMAX_SCALE,
    attention_flop,
    causal_work,
    normal,
    zeros,
)
from tests.emulator import Counters, Emulator, triton_cases, triton_kernels


@dataclass(frozen=True, eq=False)
class TritonKernel:
    """A Triton kernel with its tile, compiled for each architecture. build(units) -> Problem
    without reference: that the emulator runs Triton's code rightly is what test_emulator_triton
    shows."""

    kernel: Any
    constexprs: dict[str, Any]
    build: Callable[[int], Any]
    num_warps: int
    num_stages: int

    @functools.cache  # noqa: B019  kernels live as long as the process
    def compiled(self, arch: str) -> Any:
        case = triton_cases.Case(
            self.kernel.__name__, self.kernel, self.constexprs, lambda _: self.build(1),
            num_warps=self.num_warps, num_stages=self.num_stages,
        )  # fmt: skip
        return triton_cases.compile_case(case, int(arch.rstrip("a")))

    def plan(self, arch: str, units: int) -> Plan:
        compiled = self.compiled(arch)
        return Plan(compiled.name, self.build(units).grid, compiled.block, compiled.smem)

    def run(self, arch: str, units: int) -> Counters:
        compiled, problem = self.compiled(arch), self.build(units)
        kernel = Emulator(f"sm_{arch.rstrip('a')}").load(compiled.ptx).kernel(compiled.name)
        args, regions = compiled.args(problem), compiled.regions(problem)
        return kernel.launch(
            problem.grid, compiled.block, args, smem=compiled.smem, regions=regions
        )

    def binary(self, arch: str, plan: Plan) -> Binary:
        tool = "ptxas" if arch in ("80", "89") else "ptxas-blackwell"  # as Triton picks them
        ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
        with tempfile.TemporaryDirectory() as folder:
            ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
            kernel = self.compiled(arch)
            ptx.write_text(kernel.ptx)
            command = [ptxas, "-v", f"--gpu-name=sm_{arch}", ptx, "-o", cubin]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
            registers = int(re.search(r"Used (\d+) registers", said)[1])
            return compiled(kernel.name, kernel.ptx, registers, 0, cubin)


def attention_constexprs(causal: bool, tile: tuple[int, int]) -> dict[str, Any]:
    shape = {"GROUP": GROUP, "CAUSAL": causal, "HEAD_DIM": HEAD_DIM}
    return {**shape, "BLOCK_M": tile[0], "BLOCK_N": tile[1]}


def attention_options(rows: int, causal: bool) -> dict[str, Any]:
    return {
        "group": "prefill attention",
        "shape": f"{rows} x {rows} {'causal' if causal else 'full'}",
        "compulsory_bytes": 2 * 2 * rows * HEAD_DIM * (Q_HEADS + KV_HEADS),
        "flop": attention_flop(rows, causal),
        "work": causal_work(rows, Q_HEADS) if causal else None,
    }


def triton_attention(rows: int, causal: bool) -> Case:
    """A unit is a KV head with its 4 query heads."""
    tile, warps, stages = (128, 64), 8, 2

    def build(units: int) -> triton_cases.Problem:
        same = {"units": units, "dim": 1, "filled": True}
        q = normal(rows, units * GROUP, HEAD_DIM, seed=1, **same)
        k, v = (normal(rows, units, HEAD_DIM, seed=s, **same) for s in (2, 3))
        out, scale = zeros(*q.shape), SOFTMAX_SCALE * math.log2(math.e)
        strides = [q.stride(0), k.stride(0)]
        grid = (units * GROUP, rows // tile[0], 1)
        return triton_cases.Problem([q, k, v, out, rows, *strides, scale], grid, out, out)

    constexprs = attention_constexprs(causal, tile)
    kernel = TritonKernel(triton_peers.flash_attention, constexprs, build, warps, stages)
    return triton_case(kernel, tile, units=KV_HEADS, **attention_options(rows, causal))


def triton_attention_tma(rows: int, causal: bool) -> Case:
    """On sm_90: wgmma, tensor maps. A unit is a KV head where the mask is causal; without one 128
    queries of all heads."""
    tile, warps, stages = (128, 128), 8, 2

    def build(units: int) -> triton_cases.Problem:
        kv_heads, queries = (units, rows) if causal else (KV_HEADS, tile[0] * units)
        dim = 1 if causal else 0
        q = normal(queries, kv_heads * GROUP, HEAD_DIM, units=units, dim=dim, filled=True, seed=1)
        same = {"units": units if causal else 1, "dim": 1, "filled": True}
        k, v = (normal(rows, kv_heads, HEAD_DIM, seed=s, **same) for s in (2, 3))
        out = zeros(*q.shape)
        args = [
            triton_cases.Descriptor(t.view(len(t), -1), (block, HEAD_DIM))
            for t, block in ((q, tile[0]), (k, tile[1]), (v, tile[1]), (out, tile[0]))
        ]
        scale = SOFTMAX_SCALE * math.log2(math.e)
        grid = (kv_heads * GROUP, queries // tile[0], 1)
        return triton_cases.Problem([*args, rows, scale], grid, out, out)

    constexprs = attention_constexprs(causal, tile)
    kernel = TritonKernel(triton_peers.flash_attention_tma, constexprs, build, warps, stages)
    units = KV_HEADS if causal else rows // tile[0]
    options = attention_options(rows, causal)
    return triton_case(kernel, tile, units=units, archs=("90a",), **options)


def triton_matmul(
    name: str, n: int, k: int, m: int, tile: tuple[int, int, int], warps: int, stages: int
) -> Case:
    """No epilogue; w as [k, n]. A unit is a column of tiles."""

    def build(units: int) -> triton_cases.Problem:
        width = units * tile[1]
        x, w, out = zeros(m, k), zeros(k, width), zeros(m, width)
        grid = (-(-m // tile[0]), units, 1)
        return triton_cases.Problem([x, w, out, m, width, k], grid, out, out)

    constexprs = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
    constexprs |= {"ACC": tl.float32, "PRECISION": "tf32"}
    return triton_case(
        TritonKernel(triton_kernels.matmul, constexprs, build, warps, stages),
        tile,
        group="GEMM, few rows" if m <= 16 else "GEMM",
        shape=f"{name} {n} x {k}, M {m}",
        units=n // tile[1],
        compulsory_bytes=2 * (m * k + n * k + m * n),
        flop=2 * m * n * k,
    )


def triton_matmul_tma(
    name: str, n: int, k: int, m: int, tile: tuple[int, int, int], warps: int, stages: int
) -> Case:
    """On sm_90: wgmma, tensor maps, a program for each tile. No epilogue. A unit is a column of
    tiles."""

    def build(units: int) -> triton_cases.Problem:
        width = units * tile[1]
        x, w, out = zeros(m, k), zeros(width, k), zeros(m, width)
        blocks = (tile[0], tile[2]), (tile[1], tile[2]), tile[:2]
        args = [triton_cases.Descriptor(t, b) for t, b in zip((x, w, out), blocks, strict=True)]
        grid = (-(-m // tile[0]) * units, 1, 1)
        return triton_cases.Problem([*args, m, width, k], grid, out, out)

    constexprs = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
    constexprs |= {"ACC": tl.float32, "FLATTEN": False, "SPECIALIZE": False}
    return triton_case(
        TritonKernel(triton_kernels.matmul_descriptors, constexprs, build, warps, stages),
        tile,
        group="GEMM",
        shape=f"{name} {n} x {k}, M {m}",
        units=n // tile[1],
        compulsory_bytes=2 * (m * k + n * k + m * n),
        flop=2 * m * n * k,
        archs=("90a",),
    )


def triton_int4_matmul(
    name: str, n: int, k: int, m: int, tile: tuple[int, int, int], warps: int, stages: int
) -> Case:
    """4 bits a weight and a bf16 scale for 32, as Q4_0 has them. A unit is a column of tiles."""
    group = 32

    def build(units: int) -> triton_cases.Problem:
        width = units * tile[1]
        x, out = zeros(m, k), zeros(m, width)
        packed, scales = zeros(width, k // 2, dtype=torch.uint8), zeros(width, k // group)
        grid = (-(-m // tile[0]), units, 1)
        return triton_cases.Problem([x, packed, scales, out, m, width, k], grid, out, out)

    constexprs = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tile, strict=True))
    return triton_case(
        TritonKernel(
            triton_kernels.int4_matmul, constexprs | {"GROUP": group}, build, warps, stages
        ),
        tile,
        group="quantised, few rows",
        shape=f"{name} {n} x {k} Q4_0, M {m}",
        units=n // tile[1],
        compulsory_bytes=n * k // 2 + 2 * (n * k // group + m * k + m * n),
        flop=2 * m * n * k,
    )


# Row-wise, in the manner of liger-kernel: a program for each row.


def triton_rows(rows: int, shape: str, moved: int, kernel: TritonKernel) -> Case:
    return triton_case(
        kernel,
        (),
        group="row-wise",
        shape=shape,
        units=rows,
        exact_units=rows,
        compulsory_bytes=moved,
        archs=ALL_ARCHS if rows == 2048 else ("80",),
    )


def triton_rms_norm(rows: int) -> Case:
    def build(units: int) -> triton_cases.Problem:
        x, w, out = zeros(units, HIDDEN), zeros(HIDDEN), zeros(units, HIDDEN)
        return triton_cases.Problem([x, w, out, HIDDEN, HIDDEN, 1e-5], (units, 1, 1), out, out)

    kernel = TritonKernel(triton_peers.rms_norm, {"BLOCK": HIDDEN}, build, 8, 1)
    moved = 2 * HIDDEN * (2 * rows + 1)
    return triton_rows(rows, f"{rows} x {HIDDEN}", moved, kernel)


def triton_silu_and_mul(rows: int) -> Case:
    def build(units: int) -> triton_cases.Problem:
        gate, up, out = (zeros(units, MLP) for _ in range(3))
        return triton_cases.Problem([gate, up, out, MLP, MLP], (units, 1, 1), out, out)

    block = triton.next_power_of_2(MLP)
    kernel = TritonKernel(triton_peers.silu_and_mul, {"BLOCK": block}, build, 16, 1)
    return triton_rows(rows, f"{rows} x {MLP}", 2 * 3 * rows * MLP, kernel)


def triton_apply_rope(rows: int) -> Case:
    """cos and sin [T, D/2] of the activations' dtype, looked up beforehand."""

    def build(units: int) -> triton_cases.Problem:
        q, k = zeros(units, Q_HEADS, HEAD_DIM), zeros(units, KV_HEADS, HEAD_DIM)
        cos, sin = zeros(units, HEAD_DIM // 2), zeros(units, HEAD_DIM // 2)
        args = [q, k, cos, sin, q.stride(0), k.stride(0)]
        return triton_cases.Problem(args, (units, 1, 1), q, q)

    constexprs = {"HEADS": Q_HEADS, "KV_HEADS": KV_HEADS, "HALF": HEAD_DIM // 2}
    kernel = TritonKernel(triton_peers.apply_rope, constexprs, build, 4, 1)
    moved = 2 * 2 * rows * (Q_HEADS + KV_HEADS) * HEAD_DIM + 2 * rows * HEAD_DIM
    return triton_rows(rows, f"{rows} x (32 + 8) x 128", moved, kernel)


def triton_case(kernel: TritonKernel, tile: tuple[int, ...], **options: Any) -> Case:
    size = f" {'x'.join(map(str, tile))}" if tile else ""
    name = f"Triton {kernel.kernel.__name__}{size}, {kernel.num_warps} warps"
    options.setdefault("archs", ("80",))  # tl.dot of sm_90 and later is wgmma and tcgen05
    return Case(
        kernel=name,
        plan=kernel.plan,
        run=kernel.run,
        binary=kernel.binary,
        **options,
    )
