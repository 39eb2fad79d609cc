"""Every detector of the emulator finds the fault planted for it, and is silent without the fault.

The kernels are PTX snippets over one warp or two. Each test runs a right kernel and the same with
one line wrong; the report must name the detector, the instruction and the place.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import numpy as np
import pytest

from tests.emulator import (
    Emulator,
    EmulatorError,
    accessible,
    last_counters,
    last_report,
    library,
)

SEEDS = range(6)

# Registers and addresses every snippet may use: %tid, %lane, %warp; %x and %y point to the
# arguments, %xt and %yt to element tid (4 bytes each).
KERNEL = """
.version 8.7
.target {target}
.address_size 64
.extern .func __assertfail
(.param .b64 m, .param .b64 f, .param .b32 l, .param .b64 n, .param .b64 s);
.global .align 1 .b8 text[6] = {{104, 101, 108, 108, 111, 0}};
.visible .entry test(.param .u64 px, .param .u64 py, .param .u32 pn)
{{
    .shared .align 16 .b8 smem[{smem}];
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<32>, %n, %tid, %lane, %warp, %s, %st;
    .reg .f32 %f<16>;
    .reg .b64 %rd<16>, %x, %y, %xt, %yt;
    ld.param.u64 %x, [px];
    ld.param.u64 %y, [py];
    ld.param.u32 %n, [pn];
    mov.u32 %tid, %tid.x;
    and.b32 %lane, %tid, 31;
    shr.u32 %warp, %tid, 5;
    mul.wide.u32 %xt, %tid, 4;
    add.s64 %yt, %y, %xt;
    add.s64 %xt, %x, %xt;
    mov.u32 %s, smem;
    mad.lo.u32 %st, %tid, 4, %s;
    {body}
    ret;
}}
"""


def load(body: str, device: str = "sm_80", target: str | None = None, smem: int = 4096):
    ptx = KERNEL.format(target=target or device, body=body, smem=smem)
    return Emulator(device).load(ptx).kernel("test")


def run(body: str, seed: int = 0, threads: int = 64, device: str = "sm_80", n: int = 0, **options):
    """Output (64 values, poisoned) of a snippet whose input is 0, 1, ..., 63."""
    x = np.arange(64, dtype=np.int32)
    y = np.full(64, -1, dtype=np.int32)
    load(body, device).launch((1,), (threads,), [x, y, n], seed=seed, **options)
    return y


def fault(body: str, kind: str, instruction: str, seeds=SEEDS, **options) -> str:
    """The report of a snippet that must fail, under at least one interleaving."""
    reports = []
    for seed in seeds:
        try:
            run(body, seed=seed, **options)
        except EmulatorError as error:
            reports.append(error)
    assert reports, "no interleaving finds the fault"
    for error in reports:
        assert error.kind == kind, str(error)
        assert instruction in str(error)
        assert "CTA (0, 0, 0), warp" in str(error)
    return str(reports[0])


# --------------------------------------------------------------------------------------------------
# Memory


COPY = "ld.global.u32 %r1, [%xt]; st.global.u32 [%yt], %r1;"


def test_copy_is_right() -> None:
    assert np.array_equal(run(COPY), np.arange(64))


@pytest.mark.parametrize(
    ("body", "instruction", "place"),
    [
        (COPY.replace("[%xt]", "[%xt+4]"), "ld.global.u32 %r1, [%xt+4]", "offset 256"),
        (COPY.replace("[%xt]", "[%xt-4]"), "ld.global.u32 %r1, [%xt-4]", "offset -4"),
        (COPY.replace("[%yt]", "[%yt+4]"), "st.global.u32 [%yt+4], %r1", "'argument 1'"),
        (COPY.replace("[%xt]", "[0]"), "ld.global.u32 %r1, [0]", "read of 4 bytes at 0x0"),
        ("ld.shared.u32 %r1, [%st+4096];", "ld.shared", "the CTA has 4096"),
        ("red.global.add.u32 [%yt+256], 1;", "red.global", "lane 0"),
    ],
)
def test_out_of_bounds(body: str, instruction: str, place: str) -> None:
    assert place in fault(body, "out of bounds", instruction, seeds=[0])


def test_the_report_names_the_lane_out_of_bounds() -> None:
    body = "setp.eq.u32 %p1, %tid, 37; @%p1 add.s64 %xt, %xt, 1000; " + COPY
    report = fault(body, "out of bounds", "ld.global.u32", seeds=[0])
    assert "warp 1, lane 5" in report and "[PTX line" in report


def test_misaligned_vector_access() -> None:
    body = "and.b64 %rd1, %xt, -16; ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];"
    body += "st.global.u32 [%yt], %r1;"
    assert np.array_equal(run(body), np.arange(64) // 4 * 4)
    report = fault(
        body.replace("and.b64 %rd1, %xt, -16", "and.b64 %rd1, %x, -16; add.s64 %rd1, %rd1, 8"),
        "misaligned access",
        "ld.global.v4",
    )
    assert "not a multiple of 16" in report


def test_misaligned_shared_access() -> None:
    fault("st.shared.b64 [%s+4], 0;", "misaligned access", "st.shared.b64")


def test_uninitialised_shared_memory() -> None:
    body = "st.shared.u32 [%st], %tid; ld.shared.u32 %r1, [%st]; st.global.u32 [%yt], %r1;"
    assert np.array_equal(run(body), np.arange(64))
    wrong = body.replace("ld.shared.u32 %r1, [%st]", "ld.shared.u32 %r1, [%st+256]")
    report = fault(wrong, "uninitialised shared memory", "ld.shared.u32 %r1, [%st+256]")
    assert "shared address 0x1" in report
    run(wrong, allow_uninitialised_shared=True)


def test_shared_memory_of_the_previous_block_is_uninitialised() -> None:
    body = """
    mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0;
    @%p1 st.shared.u32 [%st], %tid; ld.shared.u32 %r2, [%st];"""
    x = np.zeros(64, np.int32)
    with pytest.raises(EmulatorError, match=r"never written[\s\S]*CTA \(1, 0, 0\)"):
        load(body).launch((2,), (64,), [x, x, 0], threads=1)


def test_uninitialised_global_memory() -> None:
    kernel = load("ld.global.u32 %r1, [%xt]; st.global.u32 [%yt], %r1;")
    kernel_2 = load("st.global.u32 [%yt], %tid; ld.global.u32 %r1, [%yt];")
    x, y = np.zeros(64, np.int32), np.zeros(64, np.int32)
    kernel.launch((1,), (64,), [x, y, 0], uninitialised=[y])
    kernel_2.launch((1,), (64,), [x, y, 0], uninitialised=[y])
    with pytest.raises(EmulatorError, match="never written") as error:
        kernel.launch((1,), (64,), [x, y, 0], uninitialised=[x])
    assert error.value.kind == "uninitialised global memory"


@pytest.mark.parametrize(
    ("use", "fails"),
    [
        ("st.global.u32 [%yt], %r1;", True),
        ("mov.u32 %r2, %r1; add.u32 %r3, %r2, 1; st.global.u32 [%yt], %r3;", True),
        ("setp.eq.u32 %p2, %r1, 0; @%p2 st.global.u32 [%yt], 0;", True),
        ("mul.wide.u32 %rd1, %r1, 4; add.s64 %rd1, %rd1, %x; ld.global.u32 %r2, [%rd1];", True),
        ("add.u32 %r3, %r1, 1;", False),  # a value nobody uses
        ("@%p1 st.global.u32 [%yt], %r1;", False),  # only lanes that have it
    ],
)
def test_uninitialised_register(use: str, fails: bool) -> None:
    body = "setp.lt.u32 %p1, %tid, 7; @%p1 mov.u32 %r1, 5;" + use
    if not fails:
        run(body)
        return
    report = fault(body, "uninitialised register", "was never written")
    assert "warp 0, lane 7" in report or "warp 1" in report


def test_write_to_constant_memory() -> None:
    x = np.zeros(1, np.int32)
    ptx = KERNEL.format(target="sm_80", smem=16, body="mov.u64 %rd1, c; st.global.u32 [%rd1], 0;")
    ptx = ptx.replace(".visible", ".const .b32 c = 7;\n.visible")
    with pytest.raises(EmulatorError, match="read-only"):
        Emulator().load(ptx).kernel("test").launch((1,), (32,), [x, x, 0])


# --------------------------------------------------------------------------------------------------
# Synchronisation

NEIGHBOUR = """
    st.shared.u32 [%st], %tid;
    bar.sync 0;
    xor.b32 %r1, %tid, {distance}; mad.lo.u32 %r2, %r1, 4, %s; ld.shared.u32 %r3, [%r2];
    st.global.u32 [%yt], %r3;
"""


def test_missing_barrier_between_write_and_read() -> None:
    body = NEIGHBOUR.format(distance=32) + "bar.sync 0; st.shared.u32 [%st], 0;"
    for seed in SEEDS:
        assert np.array_equal(run(body, seed=seed), np.arange(64) ^ 32)
    wrong = body.replace("bar.sync 0;", "", 1)
    # Before the other warp wrote there is nothing to race with yet, but nothing to read either.
    for seed in SEEDS:
        with pytest.raises(EmulatorError, match=r"shared-memory race|uninitialised shared memory"):
            run(wrong, seed=seed)
    fault("st.shared.u32 [%st], 0; bar.sync 0;" + wrong, "shared-memory race", "shared.u32")


def test_missing_barrier_between_read_and_next_write() -> None:
    body = NEIGHBOUR.format(distance=32) + "bar.sync 0; st.shared.u32 [%st], 7;"
    first, last = body.split("bar.sync 0; st.shared.u32 [%st], 7;")
    run(body)
    fault(first + "st.shared.u32 [%st], 7;" + last, "shared-memory race", "shared.u32")


def test_missing_syncwarp() -> None:
    body = NEIGHBOUR.format(distance=1).replace("bar.sync 0;", "bar.warp.sync -1;")
    assert np.array_equal(run(body), np.arange(64) ^ 1)
    report = fault(body.replace("bar.warp.sync -1;", ""), "shared-memory race", "ld.shared.u32")
    assert "__syncwarp" in report


def test_lanes_that_write_different_values_to_one_address() -> None:
    run("st.shared.u32 [%s], 3; bar.sync 0;")
    fault(
        "st.shared.u32 [%s], %lane;", "shared-memory race", "st.shared.u32 [%s], %lane", threads=32
    )


def test_byte_writes_of_neighbours_are_no_race() -> None:
    body = """
    add.u32 %r1, %tid, %s; cvt.u16.u32 %h1, %tid; st.shared.u8 [%r1], %h1; bar.sync 0;
    xor.b32 %r2, %tid, 33; add.u32 %r2, %r2, %s; ld.shared.u8 %r3, [%r2];
    st.global.u32 [%yt], %r3;"""
    for seed in SEEDS:
        assert np.array_equal(run(body, seed=seed), np.arange(64) ^ 33)


def test_named_barriers_order_producer_and_consumer() -> None:
    body = """
    setp.eq.u32 %p1, %warp, 0; @%p1 bra $consumer;
    sub.u32 %r1, %st, 128; add.u32 %r4, %lane, 100; st.shared.u32 [%r1], %r4;
    {arrive}
    ret;
$consumer:
    bar.sync 1, 64;
    ld.shared.u32 %r2, [%st]; st.global.u32 [%yt], %r2;"""
    right = body.format(arrive="bar.arrive 1, 64;")
    for seed in SEEDS:
        assert np.array_equal(run(right, seed=seed)[:32], np.arange(32) + 100)
    # Arriving before the data is there publishes nothing.
    early = body.format(arrive="").replace("st.shared", "bar.arrive 1, 64; st.shared", 1)
    for seed in SEEDS:
        with pytest.raises(EmulatorError, match=r"shared-memory race|uninitialised shared memory"):
            run(early, seed=seed)
    with pytest.raises(EmulatorError) as error:
        run(body.format(arrive=""))
    assert error.value.kind == "deadlock" and "bar.sync 1, 64" in str(error.value)


ASYNC = """
    cp.async.ca.shared.global [%st], [%xt], 4;
    cp.async.commit_group;
    cp.async.ca.shared.global [%st+256], [%xt], 4;
    cp.async.commit_group;
    cp.async.wait_group {left};
    {barrier}
    xor.b32 %r1, %tid, 32; mad.lo.u32 %r2, %r1, 4, %s; ld.shared.u32 %r3, [%r2+{offset}];
    st.global.u32 [%yt], %r3;
"""


def test_async_copies_land_when_they_are_waited_for() -> None:
    for left, offset in [(0, 256), (0, 0), (1, 0)]:
        body = ASYNC.format(left=left, offset=offset, barrier="bar.sync 0;")
        assert np.array_equal(run(body), np.arange(64) ^ 32)
    for left, offset in [(1, 256), (2, 0)]:
        body = ASYNC.format(left=left, offset=offset, barrier="bar.sync 0;")
        report = fault(body, "asynchronous copy not waited for", "ld.shared.u32")
        assert "lane" in report
    # Having waited for one's own copies says nothing about another warp's.
    for seed in SEEDS:
        with pytest.raises(EmulatorError):
            run(ASYNC.format(left=0, offset=0, barrier=""), seed=seed)


def test_async_copy_with_zero_fill() -> None:
    body = """
    setp.lt.u32 %p1, %tid, 10; selp.u32 %r4, 4, 0, %p1;
    cp.async.ca.shared.global [%st], [%xt], 4, %r4; cp.async.wait_all;
    ld.shared.u32 %r3, [%st]; st.global.u32 [%yt], %r3;"""
    assert np.array_equal(run(body), np.where(np.arange(64) < 10, np.arange(64), 0))


def test_divergent_barrier() -> None:
    body = "setp.lt.u32 %p1, %lane, 16; {branch} bar.sync 0; $after: st.global.u32 [%yt], 1;"
    run(body.format(branch=""))
    report = fault(body.format(branch="@%p1 bra $after;"), "divergent barrier", "bar.sync 0")
    assert "0xffff" in report
    fault(
        "setp.lt.u32 %p1, %lane, 16; @%p1 bar.sync 0; st.global.u32 [%yt], 1;",
        "divergent barrier",
        "bar.sync",
    )


def test_lanes_may_leave_before_a_barrier() -> None:
    body = "setp.ge.u32 %p1, %tid, 40; @%p1 bra $end; bar.sync 0; st.global.u32 [%yt], 1; $end:"
    for seed in SEEDS:
        assert run(body, seed=seed).tolist() == [1] * 40 + [-1] * 24


def test_barrier_that_only_some_warps_reach() -> None:
    body = "setp.eq.u32 %p1, %warp, 1; {branch} bar.sync 0, 64; $end:"
    run(body.format(branch=""))
    with pytest.raises(EmulatorError, match="deadlock"):
        run(body.format(branch="@%p1 bra $end;"))


def test_barrier_misuse() -> None:
    fault("bar.sync 0, 33;", "barrier misuse", "bar.sync 0, 33")
    fault("bar.sync 16;", "barrier misuse", "bar.sync 16")


@pytest.mark.parametrize(
    ("mask", "what"), [("0xffff", "not in its mask"), ("-1", "must take part")]
)
def test_wrong_lane_mask_in_shfl(mask: str, what: str) -> None:
    right = "shfl.sync.bfly.b32 %r1, %tid, 1, 0x1f, -1; st.global.u32 [%yt], %r1;"
    assert np.array_equal(run(right), np.arange(64) ^ 1)
    shuffle = f"shfl.sync.bfly.b32 %r1, %tid, 1, 0x1f, {mask};"
    body = "mov.u32 %r1, 0; " + shuffle + " add.u32 %r1, %r1, 1; st.global.u32 [%yt], %r1;"
    if mask == "-1":  # half the warp goes round the shuffle
        body = "setp.lt.u32 %p1, %lane, 16; @%p1 bra $after;" + body.replace(
            "add.u32", "$after: add.u32"
        ).replace("mov.u32 %r1, 0;", "")
        body = "mov.u32 %r1, 0;" + body
    assert what in fault(body, "wrong lane mask", "shfl.sync.bfly")


def test_shfl_that_reads_a_lane_outside_the_mask() -> None:
    body = """
    setp.ge.u32 %p1, %lane, 16; @%p1 bra $after;
    shfl.sync.bfly.b32 %r1, %tid, {distance}, 0x1f, 0xffff; st.global.u32 [%yt], %r1;
$after:"""
    assert run(body.format(distance=8))[:16].tolist() == [i ^ 8 for i in range(16)]
    fault(body.format(distance=16), "wrong lane mask", "shfl.sync")


def test_ldmatrix_needs_the_whole_warp() -> None:
    body = """
    mad.lo.u32 %r9, %lane, 16, %s; st.shared.v4.b32 [%r9], {{%r9, %r9, %r9, %r9}}; bar.warp.sync -1;
    setp.lt.u32 %p1, %lane, 16; {guard} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r1}}, [%r9];"""
    run(body.format(guard=""), threads=32)
    fault(body.format(guard="@%p1"), "wrong lane mask", "ldmatrix", threads=32)


# --------------------------------------------------------------------------------------------------
# Launches, modules, the program itself


def test_too_much_shared_memory() -> None:
    x = np.zeros(1, np.int32)
    for device, limit in [("sm_80", 163), ("sm_89", 99), ("sm_90", 227), ("sm_100", 227)]:
        kernel = load("", device, smem=1024)
        kernel.launch((1,), (32,), [x, x, 0], smem=(limit - 1) * 1024)
        with pytest.raises(EmulatorError, match=f"the device has {limit * 1024}") as error:
            kernel.launch((1,), (32,), [x, x, 0], smem=limit * 1024)
        assert error.value.kind == "bad launch"


def test_too_many_threads() -> None:
    x = np.zeros(1, np.int32)
    with pytest.raises(EmulatorError, match="more than 1024 threads"):
        load("").launch((1,), (1025,), [x, x, 0])
    with pytest.raises(EmulatorError, match="clusters need sm_90"):
        load("").launch((2,), (32,), [x, x, 0], cluster=(2,))


@pytest.mark.parametrize(
    ("target", "device", "fits"),
    [
        ("sm_80", "sm_100", True),
        ("sm_90", "sm_89", False),
        ("sm_90a", "sm_90", True),
        ("sm_90a", "sm_100", False),
        ("sm_100f", "sm_100", True),
        ("sm_100a", "sm_90", False),
    ],
)
def test_wrong_target(target: str, device: str, fits: bool) -> None:
    if fits:
        load("", device, target)
        return
    with pytest.raises(EmulatorError, match=f"{target}, the device is {device}") as error:
        load("", device, target)
    assert error.value.kind == "wrong target"


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 %r1, %r2;",
        "add.q32 %r1, %tid, %tid;",
        "add.s32.sideways %r1, %tid, %tid;",
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 "
        "{%f1, %f2, %f3, %f4}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%f1, %f2, %f3, %f4};",  # sm_89
        "add.f32x2 %rd1, %rd2, %rd3;",  # sm_100
        "mov.u32 %r1, %nonsense;",
    ],
)
def test_unknown_instruction(instruction: str) -> None:
    with pytest.raises(EmulatorError, match="unknown instruction at PTX line") as error:
        load(instruction)
    assert error.value.kind == "unknown instruction"
    assert instruction.split()[0] in str(error.value)


def test_trap_and_assert() -> None:
    fault("trap;", "trap", "trap")
    body = """
    mov.u64 %rd1, text; cvta.global.u64 %rd1, %rd1;
    {{ .param .b64 m; .param .b64 f; .param .b32 l; .param .b64 n; .param .b64 s;
    st.param.b64 [m], %rd1; st.param.b64 [f], %rd1; st.param.b32 [l], 42; st.param.b64 [n], %rd1;
    st.param.b64 [s], 1;
    {guard} call.uni __assertfail, (m, f, l, n, s); }}"""
    report = fault(body.format(guard=""), "assertion failed", "__assertfail")
    assert "hello at hello:42 in hello" in report
    run("setp.gt.u32 %p1, %tid, 99;" + body.format(guard="@%p1"))


def test_line_information_is_in_the_report() -> None:
    body = ".loc 1 77 5\n ld.global.u32 %r1, [%xt+4096];"
    ptx = KERNEL.format(target="sm_80", body=body, smem=16).replace(
        ".address_size 64", '.address_size 64\n.file 1 "kernel.cu"'
    )
    x = np.zeros(64, np.int32)
    with pytest.raises(EmulatorError, match=r"kernel\.cu:77"):
        Emulator().load(ptx).kernel("test").launch((1,), (64,), [x, x, 0])


def test_a_lost_spin_lock_does_not_hang_the_warp() -> None:
    # Lane 31 sets the flag that the others spin on; lowest-pc-first scheduling alone would hang.
    body = """
    setp.ne.u32 %p1, %lane, 31; @%p1 bra $spin; st.volatile.shared.u32 [%s], 1; bra.uni $done;
$spin: ld.volatile.shared.u32 %r1, [%s]; setp.eq.u32 %p2, %r1, 0; @%p2 bra $spin;
$done: st.global.u32 [%yt], %lane;"""
    init = "setp.eq.u32 %p3, %lane, 0; @%p3 st.volatile.shared.u32 [%s], 0; bar.warp.sync -1;"
    assert run(init + body, threads=32)[:32].tolist() == list(range(32))


def test_hang() -> None:
    with pytest.raises(EmulatorError, match="no end after") as error:
        run("$again: add.u32 %r1, %tid, 1; bra.uni $again;", max_instructions=10_000)
    assert error.value.kind == "hang"


# --------------------------------------------------------------------------------------------------
# The driver symbols


@pytest.fixture
def driver() -> Iterator[ctypes.CDLL]:
    """The library as a libcuda, with a context on its first device."""
    lib = library()
    context = ctypes.c_void_p()
    assert lib.cuInit(0) == 0
    assert lib.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert lib.cuCtxSetCurrent(context) == 0
    yield lib
    assert lib.cuCtxSetCurrent(None) == 0


def driver_kernel(driver: ctypes.CDLL, body: str) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    ptx = KERNEL.format(target="sm_80", smem=16, body=body).encode()
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), ptx) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"absent") == 500
    assert driver.cuModuleGetFunction(ctypes.byref(function), module, b"test") == 0
    return module, function


class Arguments:
    """kernelParams of the test kernel; keeps what they point to alive."""

    def __init__(self, x: int, y: int) -> None:
        self.values = ctypes.c_uint64(x), ctypes.c_uint64(y), ctypes.c_uint32(0)
        self.pointers = (ctypes.c_void_p * 3)(*(ctypes.addressof(v) for v in self.values))


SHAPE = (1, 1, 1, 64, 1, 1, 0)


def test_driver_launch_reports_the_fault(driver: ctypes.CDLL) -> None:
    module, function = driver_kernel(driver, COPY.replace("[%xt]", "[%xt+4]"))
    x, y = np.arange(65, dtype=np.int32), np.zeros(64, np.int32)
    arguments = Arguments(x.ctypes.data, y.ctypes.data)
    params = arguments.pointers
    with accessible(x=x, y=y):
        assert driver.cuLaunchKernel(function, *SHAPE, None, params, None) == 0
        assert np.array_equal(y, x[1:]) and last_report() == ""
        assert last_counters().read_bytes == 256
    with accessible(x=x[:64], y=y):
        status = driver.cuLaunchKernel(function, *SHAPE, None, params, None)
        assert status == 700 and "offset 256 of 'x'" in last_report()
    name = ctypes.c_char_p()
    assert driver.cuGetErrorName(status, ctypes.byref(name)) == 0
    assert name.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"
    assert driver.cuModuleUnload(module) == 0


def test_driver_memory_streams_and_graphs(driver: ctypes.CDLL) -> None:
    module, function = driver_kernel(driver, COPY)
    x, y, stream = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_void_p()
    for pointer in (x, y):
        assert driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(256)) == 0
    arguments = Arguments(x.value, y.value)
    launch = (function, *SHAPE)
    # Memory fresh from cuMemAlloc holds nothing.
    assert driver.cuLaunchKernel(*launch, None, arguments.pointers, None) == 719
    assert "never written" in last_report()
    host = np.arange(64, dtype=np.int32)
    size = ctypes.c_size_t(256)
    assert driver.cuMemcpyHtoD_v2(x, ctypes.c_void_p(host.ctypes.data), size) == 0
    assert driver.cuMemsetD32_v2(y, 7, ctypes.c_size_t(64)) == 0

    assert driver.cuStreamCreate(ctypes.byref(stream), 0) == 0
    assert driver.cuStreamBeginCapture_v2(stream, 0) == 0
    assert driver.cuLaunchKernel(*launch, stream, arguments.pointers, None) == 0
    assert driver.cuStreamSynchronize(stream) == 900  # not while capturing
    graph, instance, back = ctypes.c_void_p(), ctypes.c_void_p(), np.zeros(64, np.int32)
    assert driver.cuStreamEndCapture(stream, ctypes.byref(graph)) == 0
    assert driver.cuGraphInstantiateWithFlags(ctypes.byref(instance), graph, 0) == 0
    to_host = ctypes.c_void_p(back.ctypes.data), y, size
    assert driver.cuMemcpyDtoH_v2(*to_host) == 0 and (back == 7).all()
    arguments.values[0].value = 0  # the capture took its own copy
    assert driver.cuGraphLaunch(instance, stream) == 0
    assert driver.cuMemcpyDtoH_v2(*to_host) == 0 and np.array_equal(back, host)
    for destroy, handle in [
        (driver.cuGraphExecDestroy, instance),
        (driver.cuGraphDestroy, graph),
        (driver.cuStreamDestroy_v2, stream),
        (driver.cuMemFree_v2, x),
        (driver.cuMemFree_v2, y),
        (driver.cuModuleUnload, module),
    ]:
        assert destroy(handle) == 0
    assert driver.cuMemFree_v2(x) == 1


def test_driver_devices_and_entry_points(driver: ctypes.CDLL) -> None:
    count, value, ordinal = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    assert driver.cuDeviceGetCount(ctypes.byref(count)) == 0
    capabilities = []
    for device in range(count.value):
        major_minor = []
        for attribute in (75, 76):
            assert driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) == 0
            major_minor.append(value.value)
        capabilities.append(tuple(major_minor))
    if "MK_EMU_DEVICE" not in os.environ:
        assert capabilities == [(8, 0), (8, 9), (9, 0), (10, 0)]
    assert driver.cuDeviceGetAttribute(ctypes.byref(value), 97, 0) == 0
    assert driver.cuCtxGetDevice(ctypes.byref(ordinal)) == 0 and ordinal.value == 0
    assert driver.cuCtxSetCurrent(None) == 0
    assert driver.cuCtxGetDevice(ctypes.byref(ordinal)) == 201
    entry, status = ctypes.c_void_p(), ctypes.c_int()
    for name, found in [(b"cuMemAlloc", True), (b"cuInit", True), (b"cuNothing", False)]:
        code = driver.cuGetProcAddress_v2(
            name, ctypes.byref(entry), 13000, ctypes.c_uint64(0), ctypes.byref(status)
        )
        assert (code == 0) == found == bool(entry.value)
    assert driver.cuModuleLoadData(ctypes.byref(entry), b"nonsense") == 201


def test_driver_refuses_bad_modules_and_launches(driver: ctypes.CDLL) -> None:
    module = ctypes.c_void_p()
    newer = KERNEL.format(target="sm_90a", smem=16, body="").encode()
    assert driver.cuModuleLoadData(ctypes.byref(module), newer) == 209
    assert "the device is sm_80" in last_report()
    assert driver.cuModuleLoadData(ctypes.byref(module), b".version 8.0\n.target x;") == 218
    module, function = driver_kernel(driver, "")
    arguments = Arguments(0, 0)
    params = arguments.pointers
    assert driver.cuLaunchKernel(function, 1, 1, 1, 2048, 1, 1, 0, None, params, None) == 1
    big = (1, 1, 1, 32, 1, 1, 100 << 10)
    assert (
        driver.cuLaunchKernel(function, *big, None, params, None) == 701
    )  # more than 48 KB: asked for?
    assert driver.cuFuncSetAttribute(function, 8, 100 << 10) == 0
    assert driver.cuLaunchKernel(function, *big, None, params, None) == 0
    assert driver.cuFuncSetAttribute(function, 8, 164 << 10) == 1
    assert driver.cuModuleUnload(module) == 0
