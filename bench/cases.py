"""This project's kernels at Minitron-8B's shapes, as cases of the accounting.

Each case is made of units that hold the same numbers (accounting.py). Inputs that steer branches
(q and k of attention, whose largest logits decide on rescaling) are normal; all others are 0, which
no count depends on and which costs no memory until it is touched.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bench.accounting import Bar, Binary, Case, Epilogue, Plan, compiled
from bench.sass import MainLoop
from bench.shapes import MINITRON, PAGE_SIZE, matrices
from minitron_kernels import native
from tests import attn_schedule
from tests import native_abi as abi
from tests.emulator import Counters
from tests.native_emulator import dtype_id, kernel_file, ptx_of, run

Tensor = torch.Tensor
BF16 = torch.bfloat16
HIDDEN, MLP, VOCAB = MINITRON.hidden_size, MINITRON.intermediate_size, MINITRON.vocab_size
Q_HEADS, KV_HEADS = MINITRON.num_attention_heads, MINITRON.num_key_value_heads
HEAD_DIM, MATRICES = MINITRON.head_dim, matrices(MINITRON)
GROUP = Q_HEADS // KV_HEADS
MAX_POSITION = 8200  # the longest context and a few tokens more
ALL_ARCHS = ("80", "89", "90a", "100a")
SOFTMAX_SCALE = HEAD_DIM**-0.5
ALIGNMENT = 256

# (params, tensors that the launch may touch)
Build = Callable[[int, bool], tuple[ctypes.Structure, list[Tensor]]]

COALESCED = Bar("sectors", 1.01)  # an index that is read alone takes a sector
CONFLICT_FREE = Bar("wavefronts", 1.005)  # 1.00 in main loops; prologues count too
TENSOR_BOUND = Bar("others", 1.0, "90a")  # the tensor pipe is the slowest
PREFILL_BARS = (TENSOR_BOUND, Bar("peak", 0.80, "90a", is_least=True), COALESCED, CONFLICT_FREE)


def zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Zeros whose pages the system provides when they are touched, aligned as a GPU's allocator
    does it: sectors are counted by address."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + ALIGNMENT, dtype=np.uint8))
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size].view(dtype).view(shape)


def normal(*shape: int, units: int, dim: int, filled: bool, seed: int) -> Tensor:
    """Normal values, the same in each of `units` equal parts of dimension `dim`."""
    if not filled:
        return zeros(*shape)
    part = [n // units if i == dim else n for i, n in enumerate(shape)]
    x = torch.randn(part, generator=torch.Generator().manual_seed(seed)).to(BF16)
    return torch.cat([x] * units, dim)


def pointers(**tensors: Tensor | None) -> dict[str, int | None]:
    return {name: None if t is None else t.data_ptr() for name, t in tensors.items()}


# --------------------------------------------------------------------------- this project's kernels


def native_case(
    op: str, build: Build, loop: Callable[[MainLoop], bool] | None = None, **options: Any
) -> Case:
    """build(units, filled) -> params and tensors; `filled`: with numbers, for a launch. `loop`:
    the one meant, of a kernel with several (sass.main_loop)."""

    def plan(arch: str, units: int) -> Plan:
        params, _tensors = build(units, False)
        p = abi.plan(op, params, arch)
        shape = tuple(p.grid), tuple(p.block), p.smem_bytes, math.prod(p.cluster)
        return Plan(p.entry.decode(), *shape)

    def count(arch: str, units: int) -> Counters:
        params, tensors = build(units, True)
        counters = run(op, arch, params, tensors)
        assert counters is not None
        return counters

    def binary(arch: str, plan: Plan) -> Binary:
        return native_binary(arch, plan, loop)

    return Case(kernel=op, plan=plan, run=count, binary=binary, **options)


def supported(case: Case, arch: str) -> bool:
    """Whether this build has the case's kernel."""
    try:
        entry = case.plan(arch, case.units).entry
    except abi.StatusError as e:
        if e.status != "MK_ERR_UNSUPPORTED":
            raise
        return False
    return is_peer(case) or entry in native.build_info()["entries"].get(arch, {})


def is_peer(case: Case) -> bool:
    return case.kernel.startswith("Triton")


@functools.cache
def ptx_by_entry(arch: str) -> dict[str, str]:
    found = {}
    for text in ptx_of(arch):
        parts = re.split(r"\.entry (\w+)\(", text)
        found |= dict(zip(parts[1::2], parts[2::2], strict=True))
    return found


def native_binary(arch: str, plan: Plan, loop: Callable[[MainLoop], bool] | None = None) -> Binary:
    use = native.build_info()["entries"][arch][plan.entry]
    ptx = ptx_by_entry(arch)[plan.entry]
    file = kernel_file(arch)
    return compiled(plan.entry, ptx, use["registers"], use["smem_bytes"], file, loop)


def rope_struct(positions: Tensor, cos: Tensor, sin: Tensor) -> ctypes.Structure:
    return abi.structs()["mk_rope"](
        **pointers(cos=cos, sin=sin, positions=positions), table_stride=cos.stride(0),
        positions_dtype=dtype_id(positions), max_position=cos.shape[0], rotary_dim=HEAD_DIM,
        theta=1e6,
    )  # fmt: skip


def rope_tables() -> tuple[Tensor, Tensor]:
    """Angle 0: no rotation, at the cost of any."""
    half = HEAD_DIM // 2
    return torch.ones(MAX_POSITION, half), torch.zeros(MAX_POSITION, half)


def causal_work(rows: int, heads: int) -> Callable[[Plan], list[float]]:
    """Keys that each tile of queries sees, longest tiles first, each for all heads."""

    def work(plan: Plan) -> list[float]:
        tiles = math.prod(plan.grid) // heads
        tile = rows / tiles
        return [tile * (i + 1) for i in reversed(range(tiles)) for _ in range(heads)]

    return work


def prefill_work(
    lengths: Sequence[tuple[int, int]], causal: bool, heads: int
) -> Callable[[Plan], list[float]]:
    """Tiles of keys that each block has to do: one for each tile of queries and head, or, on sm_90,
    one for each SM, with the items that its cluster takes by the kernel's own list."""

    def work(plan: Plan) -> list[float]:
        if plan.cluster == 1:
            ((rows, _keys),) = lengths
            return causal_work(rows, heads)(plan) if causal else [1.0] * math.prod(plan.grid)
        clusters = plan.grid[0] // plan.cluster
        dealt = attn_schedule.tiles_by_cluster(
            tuple(lengths), causal, (heads, heads // GROUP), clusters
        )
        return [float(sum(tiles)) for tiles in dealt for _ in range(plan.cluster)]

    return work


def attention_flop(rows: int, causal: bool) -> int:
    pairs = rows * (rows + 1) // 2 if causal else rows * rows
    return 4 * pairs * HEAD_DIM * Q_HEADS


def prefill(rows: int, causal: bool, paged: bool = False, rope: bool = False) -> Case:
    """`rope`: Q is rotated on the way; else it comes rotated, as from qkv_rope_append. A unit is a
    KV head with its 4 query heads where the mask is causal; without a mask 128 queries of all
    heads."""

    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        kv_heads, queries = (units, rows) if causal else (KV_HEADS, 128 * units)
        dim = 1 if causal else 0
        q = normal(queries, kv_heads * GROUP, HEAD_DIM, units=units, dim=dim, filled=filled, seed=1)
        same = {"units": units if causal else 1, "dim": 1, "filled": filled}
        k, v = (normal(rows, kv_heads, HEAD_DIM, seed=s, **same) for s in (2, 3))
        out = zeros(*q.shape)
        cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (queries, rows))
        positions, (cos, sin) = torch.arange(queries, dtype=torch.int32), rope_tables()
        tensors = [q, k, v, out, cu_q, cu_k, positions, cos, sin]
        where: dict[str, Any] = {"cu_seqlens_k": cu_k.data_ptr(), "tokens_k": rows}
        if paged:
            seqlens, table = torch.tensor([rows], dtype=torch.int32), block_table(1, rows)
            tensors += [seqlens, table]
            where = {
                **pointers(seqlens_k=seqlens, block_table=table),
                "block_table_stride": table.stride(0), "num_pages": table.numel(),
                "page_size": PAGE_SIZE, "max_pages": table.shape[1],
                "k_page_stride": PAGE_SIZE * k.stride(0), "v_page_stride": PAGE_SIZE * v.stride(0),
            }  # fmt: skip
        params = abi.structs()["mk_attention_params"](
            **pointers(q=q, k=k, v=v, out=out, cu_seqlens_q=cu_q), **where,
            q_stride=q.stride(0), q_head_stride=HEAD_DIM,
            k_stride=k.stride(0), k_head_stride=HEAD_DIM,
            v_stride=v.stride(0), v_head_stride=HEAD_DIM,
            out_stride=out.stride(0), out_head_stride=HEAD_DIM,
            tokens_q=queries, batch=1, num_q_heads=kv_heads * GROUP, num_kv_heads=kv_heads,
            head_dim=HEAD_DIM, max_seqlen_q=queries, causal=causal, softmax_scale=SOFTMAX_SCALE,
            dtype=dtype_id(q), rope=rope_struct(positions, cos, sin) if rope else no_rope,
        )  # fmt: skip
        return params, tensors

    no_rope = abi.structs()["mk_rope"]()
    mask = "causal" if causal else "full"
    paging = f", pages of {PAGE_SIZE}" if paged else ""
    return native_case(
        "attention",
        build,
        group="prefill attention",
        shape=f"{rows} x {rows} {mask}{paging}{', rotating Q' if rope else ''}",
        units=KV_HEADS if causal else rows // 128,
        exact_units=2,
        compulsory_bytes=2 * rows * HEAD_DIM * 2 * (Q_HEADS + KV_HEADS),
        flop=attention_flop(rows, causal),
        archs=("80", "89", "90a") if rows <= 8192 else ("90a",),
        bars=(
            Bar("issue", 0.44 if causal else 0.40, "80"),
            Bar("issue", 0.52 if causal else 0.46, "90a"),
            *PREFILL_BARS,
        ),
        work=prefill_work([(rows, rows)], causal, Q_HEADS),
    )


# Queries and keys of each sequence: chunks of long prompts beside the first ones of others.
CHUNKS = ((512, 1024), (512, 8192), (512, 512), (512, 4096))


def prefill_chunks() -> Case:
    """A unit is a KV head with its 4 query heads; all are run, because what a block's walk through
    its list takes is not affine in their number."""
    queries, keys = (sum(n) for n in zip(*CHUNKS, strict=True))

    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        same: dict[str, Any] = {"units": units, "dim": 1, "filled": filled}
        q = normal(queries, units * GROUP, HEAD_DIM, seed=1, **same)
        k, v = (normal(keys, units, HEAD_DIM, seed=s, **same) for s in (2, 3))
        out = zeros(*q.shape)
        cu_q, cu_k = (
            torch.tensor([0, *n], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            for n in zip(*CHUNKS, strict=True)
        )
        params = abi.structs()["mk_attention_params"](
            **pointers(q=q, k=k, v=v, out=out, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k),
            q_stride=q.stride(0), q_head_stride=HEAD_DIM,
            k_stride=k.stride(0), k_head_stride=HEAD_DIM,
            v_stride=v.stride(0), v_head_stride=HEAD_DIM,
            out_stride=out.stride(0), out_head_stride=HEAD_DIM,
            tokens_q=queries, tokens_k=keys, batch=len(CHUNKS), num_q_heads=units * GROUP,
            num_kv_heads=units, head_dim=HEAD_DIM, max_seqlen_q=max(CHUNKS)[0], causal=1,
            softmax_scale=SOFTMAX_SCALE, dtype=dtype_id(q),
        )  # fmt: skip
        return params, [q, k, v, out, cu_q, cu_k]

    behind = ", ".join(str(n) for _, n in CHUNKS)
    pairs = sum(q * k - q * (q - 1) // 2 for q, k in CHUNKS)
    return native_case(
        "attention",
        build,
        group="prefill attention",
        shape=f"chunks of {CHUNKS[0][0]} of {behind} causal",
        units=KV_HEADS,
        exact_units=KV_HEADS,
        compulsory_bytes=2 * 2 * HEAD_DIM * (queries * Q_HEADS + keys * KV_HEADS),
        flop=4 * pairs * HEAD_DIM * Q_HEADS,
        archs=("90a",),
        bars=(Bar("issue", 0.52, "90a"), *PREFILL_BARS),
        work=prefill_work(CHUNKS, True, Q_HEADS),
    )


def prefill_fp8(rows: int, causal: bool) -> Case:
    """As `prefill`, of e4m3 with a descale for each head, to bf16."""

    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        kv_heads, queries = (units, rows) if causal else (KV_HEADS, 128 * units)
        dim = 1 if causal else 0
        q = normal(queries, kv_heads * GROUP, HEAD_DIM, units=units, dim=dim, filled=filled, seed=1)
        same = {"units": units if causal else 1, "dim": 1, "filled": filled}
        k, v = (normal(rows, kv_heads, HEAD_DIM, seed=s, **same) for s in (2, 3))
        out = zeros(*q.shape)
        q, k, v = (
            zeros(*t.shape, dtype=torch.float8_e4m3fn).copy_(t) if filled else t for t in (q, k, v)
        )
        descale = torch.ones(kv_heads)
        cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (queries, rows))
        params = abi.structs()["mk_attention_fp8_params"](
            **pointers(q=q, k=k, v=v, out=out, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k),
            **pointers(q_descale=descale, k_descale=descale, v_descale=descale),
            q_stride=q.stride(0), q_head_stride=HEAD_DIM,
            k_stride=k.stride(0), k_head_stride=HEAD_DIM,
            v_stride=v.stride(0), v_head_stride=HEAD_DIM,
            out_stride=out.stride(0), out_head_stride=HEAD_DIM,
            tokens_q=queries, tokens_k=rows, batch=1, num_q_heads=kv_heads * GROUP,
            num_kv_heads=kv_heads, num_q_descales=kv_heads, head_dim=HEAD_DIM,
            max_seqlen_q=queries, causal=causal, softmax_scale=SOFTMAX_SCALE,
            out_dtype=dtype_id(out),
        )  # fmt: skip
        return params, [q, k, v, out, descale, cu_q, cu_k]

    return native_case(
        "attention_fp8",
        build,
        group="prefill attention",
        shape=f"{rows} x {rows} {'causal' if causal else 'full'}",
        units=KV_HEADS if causal else rows // 128,
        exact_units=2,
        compulsory_bytes=rows * HEAD_DIM * (Q_HEADS + 2 * Q_HEADS + 2 * KV_HEADS),
        flop=attention_flop(rows, causal),
        archs=("90a",),
        bars=PREFILL_BARS,
        work=prefill_work([(rows, rows)], causal, Q_HEADS),
        mma_rate=2,
    )


def block_table(batch: int, keys: int) -> Tensor:
    """[batch, pages] with the pages of all sequences in a scattered order, the same in each. Rows
    are 32-byte sectors apart, so that each sequence reads as many."""
    pages = -(-keys // PAGE_SIZE)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(4))
    table = zeros(batch, -(-pages // 8) * 8, dtype=torch.int32)[:, :pages]
    return table.copy_(order + pages * torch.arange(batch)[:, None])


def decode(batch: int, context: int, appends: bool = True) -> Case:
    """One new token per sequence behind `context` keys: rotated, appended and attended, or, where
    another kernel did the first two, attended. A unit is a sequence. The block table has room for
    the longest context."""

    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        table = block_table(units, context + 1)
        by_sequence = {"units": units, "dim": 0, "filled": filled}
        q = normal(units, Q_HEADS, HEAD_DIM, seed=1, **by_sequence)
        k_new, v_new = (normal(units, KV_HEADS, HEAD_DIM, seed=s, **by_sequence) for s in (2, 3))
        cache_shape = (table.numel(), PAGE_SIZE, KV_HEADS, HEAD_DIM)
        k, v = (normal(*cache_shape, seed=s, **by_sequence) for s in (4, 5))
        out = zeros(units, Q_HEADS, HEAD_DIM)
        seqlens = torch.full((units,), context, dtype=torch.int32)
        positions, (cos, sin) = torch.full((units,), context, dtype=torch.int32), rope_tables()
        params = abi.structs()["mk_attention_decode_params"](
            **pointers(q=q, k_new=k_new, v_new=v_new, k_cache=k, v_cache=v, out=out),
            **pointers(seqlens_k=seqlens, block_table=table),
            q_stride=q.stride(0), q_head_stride=HEAD_DIM,
            k_new_stride=k_new.stride(0), k_new_head_stride=HEAD_DIM,
            v_new_stride=v_new.stride(0), v_new_head_stride=HEAD_DIM,
            cache_page_stride=k.stride(0), cache_stride=k.stride(1), cache_head_stride=HEAD_DIM,
            out_stride=out.stride(0), out_head_stride=HEAD_DIM,
            block_table_stride=table.stride(0), tokens=units, batch=units, num_q_heads=Q_HEADS,
            num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, num_pages=table.numel(), page_size=PAGE_SIZE,
            max_pages=table.shape[1], max_seqlen_q=1, causal=1, softmax_scale=SOFTMAX_SCALE,
            dtype=dtype_id(q), rope=rope_struct(positions, cos, sin),
        )  # fmt: skip
        if not appends:
            params.k_new = params.v_new = params.rope.cos = params.rope.sin = None
        size = ctypes.c_int64()
        sized = abi.library().mk_attention_decode_workspace_bytes
        abi.check(sized(ctypes.byref(params), ctypes.byref(size)))
        workspace = zeros(max(size.value, 16), dtype=torch.uint8)
        params.workspace, params.workspace_bytes = workspace.data_ptr(), size.value
        tensors = [q, k_new, v_new, k, v, out, seqlens, table, positions, cos, sin, workspace]
        return params, tensors

    archs: tuple[str, ...] = ("80", "89", "90a") if context <= 8192 else ("90a",)
    if (context, batch) == (1024, 8):
        archs = ALL_ARCHS
    new = 2 * HEAD_DIM * (2 * Q_HEADS + 2 * 2 * KV_HEADS)  # q, out; k and v read and written
    return native_case(
        "attention_decode",
        build,
        group="decode attention",
        shape=f"context {context}, batch {batch}",
        units=batch,
        exact_units=2,
        compulsory_bytes=batch * (new + 2 * 2 * context * KV_HEADS * HEAD_DIM),
        flop=batch * 4 * (context + 1) * HEAD_DIM * Q_HEADS,
        bars=(Bar("dram", 1.03), COALESCED, CONFLICT_FREE),
        archs=archs,
    )


def gemm_work(rows: int, columns: int) -> Callable[[Plan], list[float]]:
    """Tiles that each block makes: one, or, on sm_90, in turn with the others (a cluster's blocks
    as many as each other; csrc/linear/linear_gemm_sm90.cuh)."""

    def work(plan: Plan) -> list[float]:
        blocks = math.prod(plan.grid)
        tile = re.search(r"_sm90_\w+_m(\d+)_n(\d+)$", plan.entry)
        if not tile:
            return [1.0] * blocks
        tiles = max(-(-rows // int(tile[1])) * -(-columns // int(tile[2])), blocks)
        return [float(-(-(tiles - block) // blocks)) for block in range(blocks)]

    return work


L2_LATENCY = 300  # clocks, rounded up from what people measure


def gemm_epilogue(
    run: Callable[[str, int], Counters], rows: int, columns: int, lead: Callable[[int], float],
    reads: bool = False, part: int = 1,
) -> Epilogue:  # fmt: skip
    """lead: of a tile's columns. reads: residuals are asked for when the sums are there. run: of
    one part of the columns out of `part`, a whole number of tiles."""

    def width(plan: Plan) -> int:
        return int(plan.entry.rpartition("_n")[2])

    def tiles(plan: Plan) -> tuple[int, int]:
        each = gemm_work(rows, columns)(plan)
        return int(sum(each)) // part, int(max(each))

    return Epilogue(run, tiles, lambda plan: lead(width(plan)), L2_LATENCY * reads, reads)


# Stages that warpgroup 1 is ahead (csrc/linear/linear_gemm_sm90.cuh), by columns of a tile; each
# takes it two clocks a column.
_GEMM_LEAD = {256: 2, 192: 2, 128: 3, 64: 4}

# sm_90: of a stage of 128 x 256 a block gets 48 KB, for which L2 gives 32 in clusters of 2, 24 of
# 4 (of narrower tiles a little more); and of 64 rows of x and 32 columns of w, few rows, 12 KB for
# 8.
_GEMM_COPIES = {1: 1.0, 2: 1.5, 4: 2.0}


def linear(name: str, n: int, k: int, m: int) -> Case:
    """A unit: the columns of a KV head and its queries for qkv, 1024 for lm_head, else 256. Few
    rows: the norm and the residual ride along, as in a decode step."""
    few = m <= 64
    op = {"qkv": "qkv_rope_append", "gate_up": "linear_swiglu"}.get(name, "linear")
    columns = {"qkv": n // KV_HEADS, "lm_head": 1024}.get(name, 256)
    out_dtype = torch.float32 if name == "lm_head" else BF16

    def build(units: int, filled: bool, k: int = k) -> tuple[ctypes.Structure, list[Tensor]]:
        width = units * columns
        x, w, norm = zeros(m, k), zeros(width, k), zeros(k) if few else None
        common: dict[str, Any] = {"x_stride": k, "w_stride": k, "dtype": dtype_id(x), "eps": 1e-5}
        if name == "qkv":
            q, slots = zeros(m, units * GROUP, HEAD_DIM), torch.arange(m)
            caches = [zeros(-(-m // PAGE_SIZE), PAGE_SIZE, units, HEAD_DIM) for _ in range(2)]
            positions, (cos, sin) = torch.arange(m, dtype=torch.int32), rope_tables()
            params = abi.structs()["mk_qkv_rope_append_params"](
                **pointers(x=x, w=w, norm_weight=norm, q=q, k_cache=caches[0], v_cache=caches[1]),
                **pointers(slots=slots), **common, q_stride=q.stride(0), q_head_stride=HEAD_DIM,
                cache_page_stride=caches[0].stride(0), cache_stride=caches[0].stride(1),
                cache_head_stride=HEAD_DIM, tokens=m, hidden=k, num_q_heads=units * GROUP,
                num_kv_heads=units, head_dim=HEAD_DIM, num_pages=caches[0].shape[0],
                page_size=PAGE_SIZE, slots_dtype=dtype_id(slots),
                rope=rope_struct(positions, cos, sin),
            )  # fmt: skip
            tensors = [x, w, q, *caches, slots, positions, cos, sin]
        else:
            out = zeros(m, width // 2 if name == "gate_up" else width, dtype=out_dtype)
            residual = zeros(m, width) if name in ("o", "down") else None
            norm = norm if name == "gate_up" else None
            params = abi.structs()["mk_linear_params"](
                **pointers(x=x, w=w, norm_weight=norm, residual=residual, out=out), **common,
                out_stride=out.stride(0), residual_stride=width if residual is not None else 0,
                m=m, n=width, k=k, out_dtype=dtype_id(out),
            )  # fmt: skip
            tensors = [x, w, out, *([] if residual is None else [residual])]
        return params, tensors + ([] if norm is None else [norm])

    columns_out = n // 2 if name == "gate_up" else n * (2 if name in ("o", "down") else 1)
    bars = [Bar("dram", 1.10)]
    if not few:
        bars = [Bar("issue", 0.28, "80", "_m128_n256"), Bar("issue", 0.15, "90a")]
        bars += [TENSOR_BOUND, Bar("peak", 0.85, "90a", is_least=True)]

    part = 8 if name == "lm_head" else 1  # 8192 tiles would take minutes

    def of_stages(arch: str, stages: int) -> Counters:
        params, tensors = build(n // columns // part, True, 64 * stages)
        counters = run(op, arch, params, tensors)
        assert counters is not None
        return counters

    def lead(width: int) -> int:
        return 2 * width * _GEMM_LEAD[width]

    epilogue = gemm_epilogue(of_stages, m, n, lead, part=part)
    archs: tuple[str, ...] = ("90a",) if 16 < m <= 64 else ("80", "89", "90a")
    if name == "lm_head" and m == 512:
        archs = ("80", "89")
    if m == 1 and name == "o":
        archs = ALL_ARCHS
    return native_case(
        op,
        build,
        group="GEMM, few rows" if few else "GEMM",
        shape=f"{name} {n} x {k}, M {m}",
        units=n // columns,
        exact_units=n // columns if few else 2,
        compulsory_bytes=2 * (m * k + n * k) + m * columns_out * out_dtype.itemsize,
        flop=2 * m * n * k,
        bars=(*bars, COALESCED, CONFLICT_FREE),
        work=None if few else gemm_work(m, n),
        copies=lambda plan: _GEMM_COPIES[plan.cluster],
        archs=archs,
        epilogue=None if few else epilogue,
    )


# Row-wise kernels. A unit is a row (they are small enough to run whole).


def rows_case(op: str, rows: int, shape: str, moved: int, build: Build) -> Case:
    return native_case(
        op,
        build,
        group="row-wise",
        shape=shape,
        units=rows,
        exact_units=rows,
        compulsory_bytes=moved,
        bars=(COALESCED,),
        archs=ALL_ARCHS if rows == 2048 else ("80", "89"),
    )


def rms_norm(rows: int, add: bool) -> Case:
    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        x, out, weight = zeros(units, HIDDEN), zeros(units, HIDDEN), zeros(HIDDEN)
        residual = zeros(units, HIDDEN) if add else None
        params = abi.structs()["mk_rms_norm_params"](
            **pointers(x=x, residual=residual, weight=weight, out=out), x_stride=HIDDEN,
            residual_stride=HIDDEN if add else 0, out_stride=HIDDEN, rows=units, hidden=HIDDEN,
            eps=1e-5, dtype=dtype_id(x),
        )  # fmt: skip
        return params, [x, weight, out, *([] if residual is None else [residual])]

    moved = 2 * HIDDEN * (rows * (4 if add else 2) + 1)
    return rows_case(
        "add_rms_norm" if add else "rms_norm", rows, f"{rows} x {HIDDEN}", moved, build
    )


def apply_rope(rows: int) -> Case:
    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        q, k = zeros(units, Q_HEADS, HEAD_DIM), zeros(units, KV_HEADS, HEAD_DIM)
        positions, (cos, sin) = torch.arange(units, dtype=torch.int32), rope_tables()
        params = abi.structs()["mk_apply_rope_params"](
            **pointers(q=q, k=k, q_out=q, k_out=k), q_stride=q.stride(0), q_head_stride=HEAD_DIM,
            k_stride=k.stride(0), k_head_stride=HEAD_DIM, q_out_stride=q.stride(0),
            q_out_head_stride=HEAD_DIM, k_out_stride=k.stride(0), k_out_head_stride=HEAD_DIM,
            tokens=units, num_q_heads=Q_HEADS, num_k_heads=KV_HEADS, head_dim=HEAD_DIM,
            dtype=dtype_id(q), rope=rope_struct(positions, cos, sin),
        )  # fmt: skip
        return params, [q, k, positions, cos, sin]

    tables = rows * (4 + 4 * HEAD_DIM)
    moved = 2 * 2 * rows * (Q_HEADS + KV_HEADS) * HEAD_DIM + tables
    return rows_case("apply_rope", rows, f"{rows} x (32 + 8) x 128", moved, build)


def silu_and_mul(rows: int) -> Case:
    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        gate_up, out = zeros(units, 2 * MLP), zeros(units, MLP)
        params = abi.structs()["mk_silu_and_mul_params"](
            **pointers(gate_up=gate_up, out=out), gate_up_stride=2 * MLP, out_stride=MLP,
            rows=units, size=MLP, dtype=dtype_id(out),
        )  # fmt: skip
        return params, [gate_up, out]

    return rows_case("silu_and_mul", rows, f"{rows} x {MLP}", 2 * 3 * rows * MLP, build)


def embedding(rows: int) -> Case:
    def build(units: int, filled: bool) -> tuple[ctypes.Structure, list[Tensor]]:
        ids = torch.arange(units, dtype=torch.int64) * (VOCAB // 2048)
        table, out = zeros(VOCAB, HIDDEN), zeros(units, HIDDEN)
        params = abi.structs()["mk_embedding_params"](
            **pointers(ids=ids, table=table, out=out), table_stride=HIDDEN, out_stride=HIDDEN,
            tokens=units, vocab=VOCAB, hidden=HIDDEN, ids_dtype=dtype_id(ids), dtype=dtype_id(out),
        )  # fmt: skip
        return params, [ids, table, out]

    moved = rows * (8 + 2 * 2 * HIDDEN)
    return rows_case("embedding", rows, f"{rows} x {HIDDEN}", moved, build)
