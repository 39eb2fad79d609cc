"""PTX snippets for the emulated H100: a frame with registers and addresses, and how to run them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.emulator import Counters, Emulator, EmulatorError, Kernel, library

# %x, %y: the arguments; %xt, %yt: element tid (4 bytes) of them, counted over the cluster; %s:
# shared memory, aligned to 1024; %bar: 64 bytes of it for mbarriers, at its end; %map, %map2:
# tensor maps.
FRAME = """
.version 8.7
.target {target}
.address_size 64
.visible .entry test(.param .u64 px, .param .u64 py, .param .align 64 .b8 map[128],
                     .param .align 64 .b8 map2[128]){directives}
{{
    .shared .align 1024 .b8 smem[{smem}];
    .reg .pred %p<16>, %leader, %first;
    .reg .b16 %h<8>;
    .reg .b32 %r<160>, %tid, %lane, %warp, %rank, %s, %bar, %elected;
    .reg .f32 %f<160>;
    .reg .b64 %rd<32>, %x, %y, %xt, %yt, %map, %map2;
    ld.param.u64 %x, [px];
    ld.param.u64 %y, [py];
    mov.b64 %map, map;
    cvta.param.u64 %map, %map;
    mov.b64 %map2, map2;
    cvta.param.u64 %map2, %map2;
    mov.u32 %tid, %tid.x;
    and.b32 %lane, %tid, 31;
    shr.u32 %warp, %tid, 5;
    mov.u32 %rank, %cluster_ctarank;
    mov.u32 %r0, %ntid.x;
    mad.lo.u32 %r0, %r0, %rank, %tid;
    mul.wide.u32 %xt, %r0, 4;
    add.s64 %yt, %y, %xt;
    add.s64 %xt, %x, %xt;
    mov.u32 %s, smem;
    add.u32 %bar, %s, {bar};
    setp.eq.u32 %first, %tid, 0;
    elect.sync %elected|%leader, -1;
    setp.eq.and.u32 %leader, %warp, 0, %leader;
    {body}
    ret;
}}
"""
SEEDS = range(6)


def load(body: str, smem: int = 32 << 10, target: str = "sm_90a", directives: str = "") -> Kernel:
    ptx = FRAME.format(body=body, smem=smem, bar=smem - 64, target=target, directives=directives)
    return Emulator("sm_90").load(ptx).kernel("test")


def launch(
    kernel: Kernel,
    x: np.ndarray,
    y: np.ndarray,
    threads: int = 64,
    cluster: int = 1,
    seed: int = 0,
    maps: Sequence[bytes] = (),
    grid: int = 0,
    **options: Any,
) -> Counters:
    values = [*maps, bytes(128), bytes(128)][:2]
    return kernel.launch(
        (grid or cluster,), (threads,), [x, y, *values], cluster=(cluster,), seed=seed, **options
    )


def run(body: str, seed: int = 0, threads: int = 64, cluster: int = 1, **options: Any) -> Any:
    """What a snippet leaves in y (int32, a value for each thread, poisoned) for x = 0, 1, ..."""
    frame = {k: options.pop(k) for k in ("smem", "target", "directives") if k in options}
    x = options.pop("x", None)
    if x is None:
        x = np.arange(threads * cluster, dtype=np.int32)
    y = np.full(threads * cluster, -1, dtype=np.int32)
    launch(load(body, **frame), x, y, threads, cluster, seed, **options)
    return y


def faults(body: str, seeds: Sequence[int] = SEEDS, every: bool = True, **options: Any) -> set[str]:
    """Kinds of the reports of a snippet that must fail, under each interleaving if `every`."""
    kinds = set()
    for seed in seeds:
        try:
            run(body, seed=seed, **options)
        except EmulatorError as error:
            kinds.add(error.kind)
            last_report[:] = [str(error)]
        else:
            assert not every, f"seed {seed} finds nothing"
    assert kinds, "no interleaving finds the fault"
    return kinds


last_report: list[str] = []  # of the last call of `faults`


def wait(barrier: str, parity: int | str, order: str = "") -> str:
    test = f"mbarrier.try_wait.parity{order}.shared::cta.b64 %p15, [{barrier}], {parity};"
    return "{ AGAIN: " + test + " @!%p15 bra AGAIN; }"


def encode_map(
    array: np.ndarray,
    box: Sequence[int],
    data_type: int,
    swizzle: int = 0,
    fill: int = 0,
    steps: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
) -> bytes:
    """The tensor map of an array (C order; box and dims innermost first)."""
    library().cuInit(0)
    context = ctypes.c_void_p()
    assert library().cuDevicePrimaryCtxRetain(ctypes.byref(context), _ordinal_90()) == 0
    assert library().cuCtxSetCurrent(context) == 0
    rank = array.ndim
    memory = (ctypes.c_uint8 * 256)()
    at = ctypes.addressof(memory) + -ctypes.addressof(memory) % 128
    sizes = (ctypes.c_uint64 * rank)(*(dims or array.shape[::-1]))
    strides = (ctypes.c_uint64 * max(1, rank - 1))(*array.strides[::-1][1:])
    status = library().cuTensorMapEncodeTiled(
        *(ctypes.c_void_p(at), data_type, rank, ctypes.c_void_p(array.ctypes.data)),
        *(sizes, strides, (ctypes.c_uint32 * rank)(*box)),
        (ctypes.c_uint32 * rank)(*(steps or [1] * rank)),
        *(0, swizzle, 0, fill),
    )
    library().cuCtxSetCurrent(None)
    assert status == 0, library().emu_last_report().decode()
    return ctypes.string_at(at, 128)


def _ordinal_90() -> int:
    value = ctypes.c_int()
    count = ctypes.c_int()
    library().cuDeviceGetCount(ctypes.byref(count))
    for device in range(count.value):
        library().cuDeviceGetAttribute(ctypes.byref(value), 75, device)
        if value.value == 9:
            return device
    raise AssertionError("no emulated H100")


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Where the bytes at unswizzled shared addresses are, for a pattern of 0, 32, 64, 128 bytes."""
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[span]
    return address ^ ((address >> 7 & mask) << 4)
