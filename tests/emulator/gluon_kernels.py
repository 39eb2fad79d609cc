"""Warp-specialised device code in Triton's Gluon, for the H100: who loads and who multiplies is
written down here, barriers, registers and the switch between roles are Triton's own."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _load(a_desc, b_desc, a_tiles, b_tiles, full, empty, row, col, k):
    """One warp fills the stages in turn, each when it has been released."""
    stages: gl.constexpr = a_tiles.shape[0]
    block_k: gl.constexpr = a_tiles.shape[2]
    stage = 0
    phase = 1
    for start in range(0, k, block_k):
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(full.index(stage), a_desc.block_type.nbytes + b_desc.block_type.nbytes)
        tma.async_load(a_desc, [row, start], full.index(stage), a_tiles.index(stage))
        tma.async_load(b_desc, [col, start], full.index(stage), b_tiles.index(stage))
        stage += 1
        if stage == stages:
            stage = 0
            phase ^= 1


@gluon.jit
def _multiply(out_desc, a_tiles, b_tiles, full, empty, row, col, k):
    """The other warps multiply what has come and store the tile."""
    stages: gl.constexpr = a_tiles.shape[0]
    block_k: gl.constexpr = a_tiles.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[gl.num_warps(), 1],
        instr_shape=[16, out_desc.block_shape[1], 16],
    )
    acc = gl.zeros(out_desc.block_shape, gl.float32, layout)
    stage = 0
    phase = 0
    for _ in range(0, k, block_k):
        mbarrier.wait(full.index(stage), phase)
        b = b_tiles.index(stage).permute((1, 0))
        acc = warpgroup_mma(a_tiles.index(stage), b, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
        stage += 1
        if stage == stages:
            stage = 0
            phase ^= 1
    tile = gl.allocate_shared_memory(out_desc.dtype, out_desc.block_shape, out_desc.layout)
    tile.store(acc.to(out_desc.dtype))
    fence_async_shared()
    tma.async_store(out_desc, [row, col], tile)
    tma.store_wait(0)


@gluon.jit
def matmul_specialised(a_desc, b_desc, out_desc, m, n, k, STAGES: gl.constexpr):
    """a[m, k] @ b[n, k]^T, a tile a program."""
    row = gl.program_id(0) * a_desc.block_shape[0]
    col = gl.program_id(1) * b_desc.block_shape[0]
    a_tiles = gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_shape, a_desc.layout)  # noqa: RUF005
    b_tiles = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_shape, b_desc.layout)  # noqa: RUF005
    full = mbarrier.allocate_mbarrier(batch=STAGES)
    empty = mbarrier.allocate_mbarrier(batch=STAGES)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (out_desc, a_tiles, b_tiles, full, empty, row, col, k)),
            (_load, (a_desc, b_desc, a_tiles, b_tiles, full, empty, row, col, k)),
        ],
        [1],
        [24],
    )
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(i))
        mbarrier.invalidate(empty.index(i))
