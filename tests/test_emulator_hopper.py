"""The emulator's mbarriers, clusters, bulk copies and TMA do what the PTX ISA says.

PTX snippets, each under several interleavings; tiles of tensor maps against numpy. What must be
reported is in test_emulator_hopper_faults.py, wgmma in test_emulator_wgmma.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.emulator import EmulatorError
from tests.hopper_snippets import SEEDS, encode_map, launch, load, run, swizzled, wait

INIT = "@%first mbarrier.init.shared.b64 [%bar], {count}; fence.mbarrier_init.release.cluster; "
INIT += "bar.sync 0;"
CLUSTER_SYNC = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
STORE_AND_READ = """
    st.shared.u32 [%r1], %r2; {arrive} ret;
$consumer: {wait}
    ld.shared.u32 %r3, [%r1]; st.global.u32 [%yt], %r3; """

# --------------------------------------------------------------------------------------------------
# mbarrier

PRODUCER = """
    mad.lo.u32 %r1, %lane, 4, %s; add.u32 %r2, %lane, 100;
    setp.eq.u32 %p1, %warp, 1; @%p1 bra $consumer;"""


@pytest.mark.parametrize(
    ("count", "arrive"),
    [
        (32, "mbarrier.arrive.shared.b64 %rd1, [%bar];"),
        (64, "mbarrier.arrive.release.cta.shared::cta.b64 _, [%bar], 2;"),
        (32, "mbarrier.arrive.noComplete.shared.b64 %rd1, [%bar+8], 1;"
             "mbarrier.arrive.shared.b64 %rd1, [%bar];"),
        (32, "mbarrier.arrive_drop.shared.b64 %rd1, [%bar];"),
        (32, "mbarrier.expect_tx.relaxed.cta.shared.b64 [%bar], 8; mbarrier.arrive.shared.b64 "
             "%rd1, [%bar]; mbarrier.complete_tx.relaxed.cta.shared.b64 [%bar], 8;"),
        (32, "mbarrier.complete_tx.shared.b64 [%bar], 8; mbarrier.arrive.expect_tx.shared.b64 "
             "%rd1, [%bar], 8;"),
        (1, "bar.warp.sync -1; @%leader mbarrier.arrive.shared.b64 _, [%bar];"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("how", ["try", "test"])
def test_mbarrier_hands_data_over(count: int, arrive: str, how: str) -> None:
    waiting = wait("%bar", 0)
    if how == "test":
        waiting = waiting.replace("try_wait", "test_wait")
    init = "@%first mbarrier.init.shared.b64 [%bar+8], 100;" + INIT.format(count=count)
    body = init + PRODUCER + STORE_AND_READ.format(arrive=arrive, wait=waiting)
    for seed in SEEDS:
        assert np.array_equal(run(body, seed=seed)[32:], np.arange(32) + 100)


@pytest.mark.parametrize("cluster", [1, 2])
def test_mbarriers_of_the_blocks_before_are_forgotten(cluster: int) -> None:
    """Blocks that run where others ran initialise theirs by any thread, at the same place."""
    init = "setp.eq.u32 %p1, %tid, 33; @%p1 mbarrier.init.shared.b64 [%bar], 64;" + CLUSTER_SYNC
    body = init + f"mbarrier.arrive.shared.b64 _, [%bar]; {wait('%bar', 0)} st.global.u32 [%yt], 7;"
    for seed in SEEDS:
        assert (run(body, seed=seed, cluster=cluster, grid=16) == 7).all()


def test_mbarrier_states_phases_and_pending_counts() -> None:
    body = (
        INIT.format(count=2)
        + """
    @!%first bra $end;
    mbarrier.arrive.shared.b64 %rd1, [%bar];            // of phase 0, 2 pending
    mbarrier.pending_count.b64 %r1, %rd1; st.global.u32 [%y], %r1;
    mbarrier.test_wait.shared.b64 %p1, [%bar], %rd1; selp.u32 %r2, 1, 0, %p1;
    st.global.u32 [%y+4], %r2;
    mbarrier.arrive.shared.b64 %rd2, [%bar];            // 1 pending: phase 0 is over
    mbarrier.pending_count.b64 %r1, %rd2; st.global.u32 [%y+8], %r1;
    mbarrier.test_wait.shared.b64 %p1, [%bar], %rd1; selp.u32 %r2, 1, 0, %p1;
    st.global.u32 [%y+12], %r2;
    mbarrier.test_wait.parity.shared.b64 %p1, [%bar], 0; selp.u32 %r2, 1, 0, %p1;
    st.global.u32 [%y+16], %r2;
    mbarrier.test_wait.parity.shared.b64 %p1, [%bar], 1; selp.u32 %r2, 1, 0, %p1;
    st.global.u32 [%y+20], %r2;
    mbarrier.arrive_drop.shared.b64 %rd3, [%bar], 1;    // of phase 1; phases from 2 on need 1
    mbarrier.arrive.shared.b64 %rd3, [%bar];
    mbarrier.arrive.shared.b64 %rd3, [%bar];
    mbarrier.pending_count.b64 %r1, %rd3; st.global.u32 [%y+24], %r1;
    mbarrier.test_wait.shared.b64 %p1, [%bar], %rd3; selp.u32 %r2, 1, 0, %p1;
    st.global.u32 [%y+28], %r2;
    mbarrier.inval.shared.b64 [%bar]; st.shared.u64 [%bar], %x;
    $end:"""
    )
    for seed in SEEDS:
        assert run(body, seed=seed)[:8].tolist() == [2, 0, 1, 1, 1, 0, 1, 1]


def test_a_ring_of_stages() -> None:
    """Warp 0 fills two stages over and over, warp 1 reads them; each waits for the other."""
    body = f"""
    setp.lt.u32 %p1, %tid, 4; mad.lo.u32 %r1, %tid, 8, %bar;
    @%p1 mbarrier.init.shared.b64 [%r1], 32; bar.sync 0;
    mov.u32 %r9, 0; mov.u32 %r10, 0; mov.u32 %r11, 0;      // turn, stage, parity; sum in %r12
    mov.u32 %r12, 0; mad.lo.u32 %r2, %lane, 4, %s;
    setp.eq.u32 %p2, %warp, 1;
$turn: mad.lo.u32 %r3, %r10, 8, %bar; mad.lo.u32 %r4, %r10, 128, %r2;
    @%p2 bra $consume;
    xor.b32 %r5, %r11, 1; add.u32 %r6, %r3, 16; {wait("%r6", "%r5")}
    add.u32 %r7, %r9, %lane; st.shared.u32 [%r4], %r7; mbarrier.arrive.shared.b64 _, [%r3];
    bra.uni $next;
$consume: {wait("%r3", "%r11")}
    ld.shared.u32 %r7, [%r4]; mad.lo.u32 %r12, %r12, 3, %r7;
    mbarrier.arrive.shared.b64 _, [%r3+16];
$next: add.u32 %r9, %r9, 1; xor.b32 %r10, %r10, 1; setp.eq.u32 %p3, %r10, 0;
    @%p3 xor.b32 %r11, %r11, 1; setp.lt.u32 %p4, %r9, 11; @%p4 bra $turn;
    @%p2 st.global.u32 [%yt], %r12;"""
    expected = np.zeros(32, np.int32)
    for turn in range(11):
        expected = expected * 3 + turn + np.arange(32, dtype=np.int32)
    for seed in SEEDS:
        assert np.array_equal(run(body, seed=seed)[32:], expected)


def test_cp_async_arrives_on_an_mbarrier() -> None:
    for noinc, count in (("", 64), (".noinc", 32)):
        arrive = f"cp.async.mbarrier.arrive{noinc}.shared.b64 [%bar];"
        if not noinc:  # counts itself in and out: the threads arrive themselves
            arrive += "mbarrier.arrive.shared.b64 _, [%bar], 2;"
        body = (
            INIT.format(count=count)
            + PRODUCER
            + f"cp.async.ca.shared.global [%r1], [%xt], 4; {arrive} ret; $consumer:"
            + wait("%bar", 0)
            + "ld.shared.u32 %r3, [%r1]; st.global.u32 [%yt], %r3;"
        )
        for seed in SEEDS:
            assert np.array_equal(run(body, seed=seed)[32:], np.arange(32))


def test_setmaxnreg_waits_for_registers() -> None:
    """384 threads: 168 registers each; two warpgroups go to 240 when the third has given some."""
    body = """
    setp.ge.u32 %p1, %tid, 128; @%p1 bra $consumer;
    setmaxnreg.dec.sync.aligned.u32 24; bra.uni $done;
$consumer: setmaxnreg.inc.sync.aligned.u32 240;
$done: st.global.u32 [%yt], 1;"""
    for seed in SEEDS:
        assert (run(body, seed=seed, threads=384) == 1).all()
    # 48 + 2 * 232 would be all of the SM's, but the launch has 168 * 384 of them.
    more = body.replace("u32 24;", "u32 48;").replace("u32 240;", "u32 232;")
    with pytest.raises(EmulatorError, match="deadlock"):
        run(more, threads=384)
    assert (run(more.replace("u32 48;", "u32 40;"), threads=384) == 1).all()


# --------------------------------------------------------------------------------------------------
# Clusters


@pytest.mark.parametrize("size", [2, 4, 8])
def test_distributed_shared_memory(size: int) -> None:
    """Each thread reads, by an address of mapa, what its neighbour CTA wrote; then adds to it."""
    body = f"""
    mad.lo.u32 %r1, %tid, 4, %s; mad.lo.u32 %r2, %rank, 1000, %tid; st.shared.u32 [%r1], %r2;
    {CLUSTER_SYNC}
    mov.u32 %r3, %cluster_nctarank; add.u32 %r4, %rank, 1; rem.u32 %r4, %r4, %r3;
    mapa.shared::cluster.u32 %r5, %r1, %r4; ld.shared::cluster.u32 %r6, [%r5];
    st.global.u32 [%yt], %r6;
    {CLUSTER_SYNC}
    atom.shared::cluster.add.u32 %r7, [%r5], 7; st.shared::cluster.u32 [%r5+1024], %r6;
    {CLUSTER_SYNC}
    cvt.u64.u32 %rd1, %r1; cvta.shared.u64 %rd1, %rd1; mapa.u64 %rd2, %rd1, %r4;
    ld.u32 %r8, [%rd2]; ld.shared.u32 %r9, [%r1+1024];
    add.u32 %r8, %r8, %r9; sub.u32 %r8, %r8, %r6; sub.u32 %r8, %r8, %r2;
    ld.global.u32 %r6, [%yt]; add.u32 %r6, %r6, %r8; st.global.u32 [%yt], %r6;
    getctarank.shared::cluster.u32 %r10, %r5; setp.ne.u32 %p1, %r10, %r4; @%p1 trap;
    isspacep.shared::cta %p2, %rd2; isspacep.shared::cluster %p3, %rd2;
    @%p2 trap; @!%p3 trap;
    {CLUSTER_SYNC}"""
    rank, tid = np.divmod(np.arange(64 * size), 64)
    for seed in SEEDS:
        assert np.array_equal(run(body, seed, 64, size), (rank + 1) % size * 1000 + tid + 7)


def test_cluster_coordinates() -> None:
    body = """
    mov.u32 %r1, %cluster_ctaid.x; mov.u32 %r2, %clusterid.x; mov.u32 %r3, %nclusterid.x;
    mad.lo.u32 %r4, %r2, 10, %r1; mad.lo.u32 %r4, %r3, 100, %r4;
    mov.u32 %r5, %ctaid.x; mul.wide.u32 %rd1, %r5, 4; add.s64 %rd1, %rd1, %y;
    st.global.u32 [%rd1], %r4;"""
    y = np.zeros(8, np.int32)
    launch(load(body), y, y, 32, cluster=4, grid=8)
    assert y.tolist() == [200, 201, 202, 203, 210, 211, 212, 213]
    fixed = load(body, directives=" .reqnctapercluster 2, 1, 1")
    launch(fixed, y, y, 32, cluster=1, grid=8)
    assert y.tolist() == [400, 401, 410, 411, 420, 421, 430, 431]


REMOTE = f"""
    {INIT.format(count="COUNT")} {CLUSTER_SYNC}
    mad.lo.u32 %r1, %tid, 4, %s; xor.b32 %r4, %rank, 1;
    mapa.shared::cluster.u32 %r5, %r1, %r4; mapa.shared::cluster.u32 %r6, %bar, %r4;
    mad.lo.u32 %r2, %rank, 1000, %tid; SEND {wait("%bar", 0, ".acquire.cluster")}
    ld.shared.u32 %r3, [%r1]; st.global.u32 [%yt], %r3; {CLUSTER_SYNC}"""


@pytest.mark.parametrize(
    ("count", "send"),
    [
        (64, "st.shared::cluster.u32 [%r5], %r2;"
             "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];"),
        (1, "@%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;"
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r5], %r2, [%r6];"),
        (1, f"st.shared.u32 [%r1], 0; {CLUSTER_SYNC}"
            "@%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;"
            "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32"
            " [%r5], %r2, [%r6];"),
        (1, "st.shared.u32 [%r1+1024], %r2; fence.proxy.async.shared::cta; bar.sync 0;"
            "@%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256; add.u32 %r7, %s, 1024;"
            "@%first cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
            "[%r5], [%r7], 256, [%r6];"),
    ],
    ids=["arrive", "st.async", "red.async", "bulk"],
)  # fmt: skip
def test_data_sent_to_another_cta(count: int, send: str) -> None:
    body = REMOTE.replace("COUNT", str(count)).replace("SEND", send)
    rank, tid = np.divmod(np.arange(128), 64)
    for seed in SEEDS:
        assert np.array_equal(run(body, seed, 64, 2), (1 - rank) * 1000 + tid)


# By name; `old` and `new` are unsigned.
REDUCTIONS = {
    "add": lambda old, new: old + new,
    "min": np.minimum,
    "max": np.maximum,
    "inc": lambda old, new: np.where(old >= new, 0, old + 1),
    "dec": lambda old, new: np.where((old == 0) | (old > new), new, old - 1),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@pytest.mark.parametrize(
    ("op", "kind"),
    [
        *((op, "b32" if op in ("and", "or", "xor") else "u32") for op in REDUCTIONS),
        *((op, "s32") for op in ("add", "min", "max")),
    ],
)
def test_reductions_sent_to_another_cta(op: str, kind: str) -> None:
    send = f"""mul.lo.u32 %r7, %tid, 7; sub.u32 %r7, %r7, %rank; st.shared.u32 [%r1], %r7;
    {CLUSTER_SYNC} @%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
    red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.{op}.{kind}
    [%r5], %r2, [%r6];"""
    rank, tid = np.divmod(np.arange(128), 64)
    dtype = np.int32 if kind == "s32" else np.uint32
    with np.errstate(over="ignore"):
        old, new = (v.astype(dtype) for v in (7 * tid - rank, (1 - rank) * 1000 + tid))
        expected = REDUCTIONS[op](old, new).astype(dtype).view(np.int32)
    body = REMOTE.replace("COUNT", "1").replace("SEND", send)
    for seed in SEEDS:
        assert np.array_equal(run(body, seed, 64, 2), expected)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("b64", "%rd2"),
        ("v2.f32", "{%f1, %f2}"),
        ("v2.b64", "{%rd2, %rd3}"),
        ("v4.b32", "{%r2, %r7, %r8, %r9}"),
    ],
)
def test_vectors_sent_to_another_cta(kind: str, values: str) -> None:
    words = {"b64": 2, "v2.f32": 2}.get(kind, 4)
    send = f"""@%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], {256 * words};
    add.u32 %r7, %r2, 1; add.u32 %r8, %r2, 2; add.u32 %r9, %r2, 3;
    mov.b64 %rd2, {{%r2, %r7}}; mov.b64 %rd3, {{%r8, %r9}}; mov.b32 %f1, %r2; mov.b32 %f2, %r7;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.{kind} [%r5], {values}, [%r6];"""
    # A lane's words lie side by side, and their sum says that each is in its place.
    read = " ".join(
        f"ld.shared.u32 %r10, [%r1+{4 * i}]; mad.lo.u32 %r11, %r10, {i + 1}, %r11;"
        for i in range(words)
    )
    body = REMOTE.replace("COUNT", "1").replace("SEND", send)
    body = body.replace("mad.lo.u32 %r1, %tid, 4, %s", f"mad.lo.u32 %r1, %tid, {4 * words}, %s")
    body = body.replace("ld.shared.u32 %r3, [%r1]; ", f"mov.u32 %r11, 0; {read} mov.u32 %r3, %r11;")
    rank, tid = np.divmod(np.arange(128), 64)
    expected = sum((i + 1) * ((1 - rank) * 1000 + tid + i) for i in range(words))
    for seed in SEEDS:
        assert np.array_equal(run(body, seed, 64, 2), expected)


def test_multicast() -> None:
    """Each CTA of four loads a quarter for all."""
    body = f"""
    {INIT.format(count=1)} {CLUSTER_SYNC}
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
    mad.lo.u32 %r1, %rank, 64, %s; mul.wide.u32 %rd1, %rank, 64; add.s64 %rd1, %rd1, %x;
    mov.u16 %h1, 15;
    @%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%r1], [%rd1], 64, [%bar], %h1;
    {wait("%bar", 0)}
    mad.lo.u32 %r2, %tid, 4, %s; ld.shared.u32 %r3, [%r2]; st.global.u32 [%yt], %r3;
    {CLUSTER_SYNC}"""
    for seed in SEEDS:
        assert np.array_equal(run(body, seed, 64, 4), np.tile(np.arange(64), 4))


# --------------------------------------------------------------------------------------------------
# Bulk copies

TRIP = f"""
    {INIT.format(count=1)}
    @!%leader bra $wait;
    mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
    createpolicy.fractional.L2::evict_first.b64 %rd3, 1.0;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint
        [%s], [%x], 128, [%bar], %rd3;
    add.u32 %r1, %s, 128; add.s64 %rd1, %x, 128;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1], 128, [%bar];
$wait: {wait("%bar", 0)}
    mad.lo.u32 %r2, %tid, 4, %s; ld.shared.u32 %r3, [%r2]; add.u32 %r3, %r3, 5;
    st.shared.u32 [%r2], %r3; fence.proxy.async.shared::cta; bar.sync 0;
    @!%leader bra $end;
    STORE
    cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0;
$end:"""


@pytest.mark.parametrize("read", ["", ".read"])
def test_bulk_copies_there_and_back(read: str) -> None:
    store = "cp.async.bulk.global.shared::cta.bulk_group [%y], [%s], 256;"
    body = TRIP.replace("STORE", store).replace(".read", read)
    for seed in SEEDS:
        assert np.array_equal(run(body, seed=seed), np.arange(64) + 5)


@pytest.mark.parametrize(
    ("op", "dtype", "name"),
    [
        ("add.u32", np.uint32, "add"),
        ("min.s32", np.int32, "minimum"),
        ("max.s32", np.int32, "maximum"),
        ("xor.b32", np.uint32, "bitwise_xor"),
        ("add.f32", np.float32, "add"),
        ("add.noftz.f16", np.float16, "add"),
    ],
)
def test_bulk_reductions(op: str, dtype: type, name: str) -> None:
    store = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [%y], [%s], 256;"
    body = TRIP.replace("STORE", store)
    rng = np.random.default_rng(1)
    x = rng.integers(0, 1000, 256 // np.dtype(dtype).itemsize).astype(dtype)
    y = rng.integers(0, 1000, x.size).astype(dtype)
    if dtype in (np.float32, np.float16):  # the snippet adds 5 to the bits
        sent = (x.view(np.int32) + 5).view(dtype)
    else:
        sent = x + dtype(5)
    expected = getattr(np, name)(y, sent)
    launch(load(body), x, y)
    assert np.array_equal(y, expected)


def test_prefetches_move_nothing() -> None:
    array = np.arange(64, dtype=np.int32).reshape(8, 8)
    body = """
    @!%leader bra $end;
    cp.async.bulk.prefetch.L2.global [%x], 256;
    cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%map, {0, -3}];
    prefetch.tensormap [%map]; prefetch.global.L2 [%x];
$end: st.global.u32 [%yt], 3;"""
    y = run(body, maps=[encode_map(array, [8, 8], 3)], regions=[array])
    assert (y == 3).all()


# --------------------------------------------------------------------------------------------------
# Tensor maps

TYPES = {"u8": 0, "u32": 2, "s32": 3, "u64": 4, "f16": 6, "f32": 7, "f64": 8}
NUMPY = {
    "u8": np.uint8, "u32": np.uint32, "s32": np.int32, "u64": np.uint64,
    "f16": np.float16, "f32": np.float32, "f64": np.float64,
}  # fmt: skip


def tile_of(array: np.ndarray, box: list[int], at: list[int], fill: float) -> np.ndarray:
    """The box at these coordinates (innermost first), filled outside of the array."""
    tile = np.full(box[::-1], fill, array.dtype)
    for index in itertools.product(*(range(n) for n in box[::-1])):
        place = tuple(i + a for i, a in zip(index, at[::-1], strict=True))
        if all(0 <= p < n for p, n in zip(place, array.shape, strict=True)):
            tile[index] = array[place]
    return tile


def tensor_load(rank: int, at: list[int], bytes_: int, dump: int) -> str:
    coordinates = ", ".join(map(str, at))
    return f"""
    {INIT.format(count=1)}
    @%first prefetch.tensormap [%map];
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], {bytes_};
    @%first cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
        [%s], [%map, {{{coordinates}}}], [%bar];
    {wait("%bar", 0)}
    mov.u32 %r1, %tid; setp.ge.u32 %p1, %r1, {dump // 16}; @%p1 bra $end;
$copy: mad.lo.u32 %r2, %r1, 16, %s; mul.wide.u32 %rd1, %r1, 16; add.s64 %rd1, %rd1, %y;
    ld.shared.v4.u32 {{%r3, %r4, %r5, %r6}}, [%r2];
    st.global.v4.u32 [%rd1], {{%r3, %r4, %r5, %r6}};
    add.u32 %r1, %r1, 64; setp.lt.u32 %p1, %r1, {dump // 16}; @%p1 bra $copy;
$end:"""


@pytest.mark.parametrize("fill", [0, 1])
@pytest.mark.parametrize(
    ("kind", "shape", "box", "at", "swizzle"),
    [
        ("f32", (100,), [64], [10], 0),
        ("f32", (100,), [64], [-7], 0),
        ("f16", (40, 64), [64, 16], [0, 8], 128),
        ("f16", (40, 64), [64, 16], [-8, 30], 128),
        ("f16", (40, 64), [32, 24], [48, -3], 64),
        ("f16", (40, 64), [16, 32], [56, 20], 32),
        ("u8", (40, 96), [64, 16], [48, 33], 64),
        ("f64", (9, 5, 6), [4, 3, 4], [3, -1, 7], 32),
        ("s32", (4, 5, 6, 8), [8, 4, 3, 2], [-4, 3, 4, 3], 32),
        ("f16", (3, 4, 3, 5, 16), [8, 2, 3, 2, 2], [8, 4, -1, 3, 2], 0),
    ],
)
def test_tensor_tiles(
    kind: str, shape: tuple[int, ...], box: list[int], at: list[int], swizzle: int, fill: int
) -> None:
    dtype = NUMPY[kind]
    if fill and not issubclass(dtype, np.floating):
        pytest.skip("integers have no NaN")
    rng = np.random.default_rng(0)
    array = rng.integers(1, 100, shape).astype(dtype)
    code = {0: 0, 32: 1, 64: 2, 128: 3}[swizzle]
    tensor_map = encode_map(array, box, TYPES[kind], code, fill)
    tile = tile_of(array, box, at, np.nan if fill else 0)
    y = np.zeros(tile.nbytes, np.uint8)
    body = tensor_load(len(box), at, tile.nbytes, tile.nbytes)
    for seed in range(2):
        y[:] = 0xEE
        x = np.zeros(1, np.int32)
        counters = launch(load(body), x, y, seed=seed, maps=[tensor_map], regions=[array])
        got = y[swizzled(np.arange(tile.nbytes), swizzle)].view(dtype).reshape(tile.shape)
        assert np.array_equal(got, tile, equal_nan=True)
        inside = tile_of(np.ones(shape, np.int8), box, at, 0).sum() * array.itemsize
        assert counters.read_bytes == inside


def test_tensor_multicast() -> None:
    """Either CTA of two loads half of a swizzled tile for both."""
    array = np.arange(16 * 32, dtype=np.int32).reshape(16, 32)
    tensor_map = encode_map(array, [32, 8], 3, 3)
    body = f"""
    {INIT.format(count=1)} {CLUSTER_SYNC}
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 2048;
    mad.lo.u32 %r1, %rank, 1024, %s; shl.b32 %r2, %rank, 3; mov.u16 %h1, 3;
    @%first cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes
        .multicast::cluster [%r1], [%map, {{0, %r2}}], [%bar], %h1;
    {wait("%bar", 0)}
    mad.lo.u32 %r3, %tid, 32, %s;
    ld.shared.u32 %r5, [%r3]; st.global.u32 [%yt], %r5; {CLUSTER_SYNC}"""
    body = body.replace("bytes\n        .multicast", "bytes.multicast")
    at = swizzled(np.arange(2048), 128)
    image = np.zeros(2048, np.uint8)
    image[at] = array.view(np.uint8).ravel()
    expected = image.view(np.int32)[np.arange(64) * 8]
    for seed in SEEDS:
        y = run(body, seed, 64, 2, maps=[tensor_map], regions=[array])
        assert np.array_equal(y, np.tile(expected, 2))


def test_a_row_narrower_than_the_swizzle_takes_a_whole_one() -> None:
    array = np.arange(16 * 32, dtype=np.float16).reshape(16, 32)
    tensor_map = encode_map(array, [32, 16], 6, 3)
    body = "bar.sync 0;" + tensor_load(2, [0, 0], 16 * 64, 16 * 128)
    y = np.zeros(16 * 128, np.uint8)
    kernel = load(body)
    launch(kernel, y[:4], y, maps=[tensor_map], regions=[array], allow_uninitialised_shared=True)
    rows = y[swizzled(np.arange(2048), 128)].reshape(16, 128)[:, :64]
    assert np.array_equal(rows.copy().view(np.float16), array)


def test_steps_pick_every_other_element() -> None:
    array = np.arange(12 * 16, dtype=np.float32).reshape(12, 16)
    tensor_map = encode_map(array, [16, 8], 7, steps=[1, 3])
    y = np.zeros(3 * 64, np.uint8)
    launch(load(tensor_load(2, [0, 2], 192, 192)), y[:4], y, maps=[tensor_map], regions=[array])
    assert np.array_equal(y.view(np.float32).reshape(3, 16), array[2:10:3])


STORES = [  # type, operation, box, where it is put (innermost first)
    ("f32", "", [64], [-7]),
    ("f16", "", [16, 3, 4], [-4, 4, -1]),
    ("s32", "", [8, 4, 3, 2], [3, -2, 2, 1]),
    ("f16", "", [8, 2, 3, 2, 2], [4, 1, -1, 2, -1]),
    *(("u32", op, [8, 3, 4], [4, 4, -1]) for op in REDUCTIONS),
    ("s32", "min", [64], [90]),
    ("u64", "add", [4, 3, 2, 2], [-1, 1, 1, -1]),
    ("f16", "max", [8, 2, 3, 2, 2], [4, 1, -1, 2, -1]),
    ("f32", "add", [8, 3, 4], [-4, 4, 2]),
]


@pytest.mark.parametrize(("kind", "op", "box", "at"), STORES)
def test_tensor_stores_of_any_rank(kind: str, op: str, box: list[int], at: list[int]) -> None:
    rng = np.random.default_rng(0)
    shape = {1: (100,), 3: (5, 6, 16), 4: (3, 4, 5, 8), 5: (2, 3, 4, 3, 8)}[len(box)]
    source = rng.integers(0, 100, box[::-1]).astype(NUMPY[kind])
    target = rng.integers(0, 100, shape).astype(NUMPY[kind])
    maps = [encode_map(array, box, TYPES[kind]) for array in (source, target)]
    copy = f"cp.reduce.async.bulk.tensor.{len(box)}d" if op else f"cp.async.bulk.tensor.{len(box)}d"
    copy += f".global.shared::cta{'.' + op if op else ''}.tile.bulk_group"
    zeros, coordinates = (", ".join(map(str, c)) for c in ([0] * len(box), at))
    body = f"""
    {INIT.format(count=1)}
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], {source.nbytes};
    @%first cp.async.bulk.tensor.{len(box)}d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%s], [%map, {{{zeros}}}], [%bar];
    {wait("%bar", 0)}
    @!%leader bra $end;
    {copy} [%map2, {{{coordinates}}}], [%s];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
$end:"""
    expected = target.copy()
    places = list(zip(at[::-1], source.shape, target.shape, strict=True))
    part = source[tuple(slice(max(0, -a), min(n, size - a)) for a, n, size in places)]
    inside = expected[tuple(slice(max(0, a), min(a + n, size)) for a, n, size in places)]
    assert 0 < part.size < source.size
    inside[:] = REDUCTIONS[op](inside, part) if op else part
    x = np.zeros(1, np.int32)
    launch(load(body), x, x, maps=maps, regions=[source, target])
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("op", ["", "add", "max"])
@pytest.mark.parametrize("swizzle", [0, 128])
def test_tensor_stores_are_clipped(op: str, swizzle: int) -> None:
    source = np.arange(16 * 32, dtype=np.int32).reshape(16, 32) + 1
    target = np.full((20, 48), 100, np.int32)
    maps = [encode_map(array, [32, 16], 3, 3 if swizzle else 0) for array in (source, target)]
    action = (
        f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{op}.tile"
        if op
        else ("cp.async.bulk.tensor.2d.global.shared::cta.tile")
    )
    body = f"""
    {INIT.format(count=1)}
    @%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 2048;
    @%first cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes
        [%s], [%map, {{0, 0}}], [%bar];
    {wait("%bar", 0)}
    @!%leader bra $end;
    {action}.bulk_group [%map2, {{32, -4}}], [%s];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
$end:"""
    expected = target.copy()
    part = source[4:, :16]
    inside = expected[:12, 32:]
    inside[:] = part if not op else inside + part if op == "add" else np.maximum(inside, part)
    x = np.zeros(1, np.int32)
    launch(load(body), x, x, maps=maps, regions=[source, target])
    assert np.array_equal(target, expected)
