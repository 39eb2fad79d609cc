"""What is wrong with a kernel's use of mbarriers, TMA, clusters and wgmma is reported.

Each test runs a right snippet and the same with one thing wrong; the wrong one must fail under
every interleaving unless the test says otherwise.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.emulator import Emulator, EmulatorError
from tests.hopper_snippets import FRAME, SEEDS, encode_map, faults, last_report, load, run, wait
from tests.test_emulator_hopper import CLUSTER_SYNC, INIT, REMOTE, TRIP

LANDED = "asynchronous copy not waited for"
RACE = "shared-memory race"

# --------------------------------------------------------------------------------------------------
# mbarriers and bulk copies

LOAD = f"""
    {INIT.format(count=1)}
    @!%leader bra $wait;
    mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%x], 256, [%bar];
$wait: {wait("%bar", 0)}
    mad.lo.u32 %r2, %tid, 4, %s; ld.shared.u32 %r3, [%r2]; st.global.u32 [%yt], %r3; bar.sync 0;"""


def wrong(body: str, old: str, new: str) -> str:
    assert body.count(old) >= 1
    return body.replace(old, new)


def test_the_right_snippets_are_right() -> None:
    for seed in SEEDS:
        assert np.array_equal(run(LOAD, seed=seed), np.arange(64))


def test_wrong_parity() -> None:
    """Waiting for the phase before passes at once; for the one after it never ends."""
    early = wrong(LOAD, wait("%bar", 0), wait("%bar", 1))
    assert faults(early) <= {LANDED, RACE, "uninitialised shared memory"}
    late = LOAD + wait("%bar", 1)
    assert faults(late) == {"deadlock"}
    report = last_report[0]
    assert "mbarrier.try_wait" in report and "waits for the mbarrier at shared address" in report
    assert "phase 1 (parity 1), which needs 1 of 1 arrivals and 0 bytes" in report
    polling = late.replace("try_wait", "test_wait")
    assert faults(polling) == {"deadlock"}
    assert faults(wrong(LOAD, wait("%bar", 0), wait("%bar", 2))) == {"mbarrier misuse"}


def test_no_wait_at_all() -> None:
    assert faults(wrong(LOAD, wait("%bar", 0), "")) <= {
        LANDED, RACE, "uninitialised shared memory"
    }  # fmt: skip


def test_waiting_for_the_wrong_mbarrier() -> None:
    """Another copy, which completes on another mbarrier, says nothing of this one."""
    init = "@%first mbarrier.init.shared.b64 [%bar+8], 1;"
    other = """mbarrier.arrive.expect_tx.shared.b64 _, [%bar+8], 256; add.u32 %r9, %s, 1024;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%x], 256, [%bar+8];
$wait:"""
    both = init + wrong(LOAD, "$wait:", other) + wait("%bar+8", 0)
    run(both)
    swapped = both.replace(wait("%bar", 0), wait("%bar+8", 0), 1)
    assert faults(swapped) <= {LANDED, RACE}


@pytest.mark.parametrize("count", [240, 128])
def test_too_few_bytes_expected(count: int) -> None:
    assert faults(wrong(LOAD, "[%bar], 256;", f"[%bar], {count};")) == {"mbarrier misuse"}
    assert "more bytes arrived than were expected" in last_report[0]


def test_too_many_bytes_expected() -> None:
    assert faults(wrong(LOAD, "[%bar], 256;", "[%bar], 272;")) == {"deadlock"}
    assert "0 of 1 arrivals and 16 bytes" in last_report[0]


def test_arrivals_that_do_not_add_up() -> None:
    twice = LOAD + "@%leader mbarrier.arrive.shared.b64 _, [%bar];" * 2
    once = LOAD + "@%leader mbarrier.arrive.shared.b64 _, [%bar], 2;"
    run(twice)  # a phase each
    assert faults(once) == {"mbarrier misuse"}
    assert "too many" in last_report[0]
    few = wrong(LOAD, "[%bar], 1;", "[%bar], 2;")
    assert faults(few) == {"deadlock"} and "1 of 2 arrivals" in last_report[0]
    complete = INIT.format(count=64) + "mbarrier.arrive.noComplete.shared.b64 %rd1, [%bar];"
    assert faults(complete) == {"mbarrier misuse"}


def test_mbarrier_before_its_initialisation() -> None:
    assert faults(wrong(LOAD, "bar.sync 0;\n    @!%leader", "@!%leader"), every=False) <= {
        "mbarrier misuse", RACE
    }  # fmt: skip
    assert faults("mbarrier.arrive.shared.b64 _, [%bar];") == {"mbarrier misuse"}


@pytest.mark.parametrize(
    "access", ["st.shared.u32 [%bar+4], 0;", "ld.shared.u64 %rd1, [%bar];",
               "mbarrier.init.shared.b64 [%bar], 1;"]
)  # fmt: skip
def test_ordinary_access_to_an_mbarrier(access: str) -> None:
    body = INIT.format(count=1) + "@!%first bra $end;" + access + "$end:"
    assert faults(body) == {"mbarrier misuse"}
    run(INIT.format(count=1) + "@!%first bra $end; mbarrier.inval.shared.b64 [%bar];"
        "st.shared.u32 [%bar+4], 0; $end:")  # fmt: skip


def test_state_of_an_earlier_phase() -> None:
    body = INIT.format(count=1) + "@!%first bra $end; mbarrier.arrive.shared.b64 %rd1, [%bar];"
    more = "mbarrier.arrive.shared.b64 %rd2, [%bar];"
    test = "mbarrier.test_wait.shared.b64 %p1, [%bar], %rd1; $end:"
    run(body + test)
    assert faults(body + more + test) == {"mbarrier misuse"}


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("[%s], [%x], 256", "[%s+8], [%x], 256", "misaligned access"),
        ("[%s], [%x], 256", "[%s], [%x+4], 256", "misaligned access"),
        ("[%s], [%x], 256", "[%s], [%x], 250", "bad bulk copy"),
        ("[%s], [%x], 256", "[%s], [%x+16], 256", "out of bounds"),
        ("[%s], [%x], 256", "[%s+32640], [%x], 256", "out of bounds"),
        ("[%x], 256, [%bar]", "[%x], 256, [%bar+4]", "misaligned access"),
        ("[%x], 256, [%bar]", "[%x], 256, [%bar+8]", "mbarrier misuse"),
    ],
)
def test_bad_bulk_operands(old: str, new: str, kind: str) -> None:
    assert faults(wrong(LOAD, old, new)) == {kind}


def test_copy_over_data_in_use() -> None:
    """The second copy needs word from all who read the first."""
    read = "ld.shared.u32 %r3, [%r2]; st.global.u32 [%yt], %r3; bar.sync 0;"
    again = """@!%leader bra $end;
    mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%x], 256, [%bar];
$end: """ + wait("%bar", 1)
    run(wrong(LOAD, read, read + again))
    assert faults(wrong(LOAD, read, read.replace("bar.sync 0;", "") + again), every=False) <= {
        RACE, LANDED
    }  # fmt: skip


def test_a_copy_that_nobody_waits_for() -> None:
    body = wrong(LOAD, wait("%bar", 0), "")
    assert faults(body[: body.index("$wait:")] + "$wait:") == {LANDED}
    assert "the CTA ends" in last_report[0]


STORE = TRIP.replace(
    "STORE", "cp.async.bulk.global.shared::cta.bulk_group [%y], [%s], 256;"
).replace(".read", "")


def test_missing_proxy_fence_before_a_bulk_store() -> None:
    for seed in SEEDS:
        assert np.array_equal(run(STORE, seed=seed), np.arange(64) + 5)
    fence = "fence.proxy.async.shared::cta; "
    assert faults(wrong(STORE, fence, "")) == {"missing proxy fence"}
    assert "fence.proxy.async" in last_report[0]
    # By the thread that issues the copy, after the barrier, it does as well; before one's own
    # store it does not.
    run(wrong(STORE, fence + "bar.sync 0;", "bar.sync 0; " + fence))
    early = STORE.replace(fence, "").replace("st.shared.u32 [%r2]", fence + "st.shared.u32 [%r2]")
    assert faults(early) == {"missing proxy fence"}
    assert faults(wrong(STORE, "bar.sync 0;\n    @!%leader bra $end;", "@!%leader bra $end;")) <= {
        RACE, "missing proxy fence"
    }  # fmt: skip


def test_missing_proxy_fence_before_a_copy_over_written_data() -> None:
    body = "mad.lo.u32 %r2, %tid, 4, %s; st.shared.u32 [%r2], 0;" + LOAD
    assert faults(body) == {"missing proxy fence"}
    run(wrong(body, "bar.sync 0;\n    @!%leader", "fence.proxy.async; bar.sync 0;\n    @!%leader"))


@pytest.mark.parametrize("read", ["", ".read"])
def test_source_overwritten_before_the_store_was_waited_for(read: str) -> None:
    waits = f"cp.async.bulk.wait_group{read} 0;"
    body = wrong(STORE, "cp.async.bulk.wait_group 0;", waits + "st.shared.u32 [%s], 0;")
    run(body)
    assert faults(wrong(body, waits + "st.shared.u32 [%s], 0;",
                        "st.shared.u32 [%s], 0;" + waits)) == {RACE}  # fmt: skip
    assert "a bulk copy of warp 0 reads" in last_report[0]
    # Not committed, or one group may stay: not waited for.
    assert faults(wrong(body, "cp.async.bulk.commit_group;", "")) == {RACE}
    assert faults(wrong(body, f"group{read} 0", f"group{read} 1")) == {RACE}


def test_store_not_waited_for_at_the_end() -> None:
    assert faults(wrong(STORE, "cp.async.bulk.wait_group 0;", "")) == {LANDED}


def test_bulk_stores_are_seen_when_they_were_waited_for() -> None:
    """With .read alone the bytes may still be on their way: the load finds the old ones."""
    read = "ld.global.u32 %r3, [%y]; st.global.u32 [%y+252], %r3;"
    done = wrong(STORE, "wait_group 0;", "wait_group 0;" + read)
    assert run(done)[63] == 5
    early = wrong(STORE, "wait_group 0;", "wait_group.read 0; ld.global.u32 %r3, [%y];"
                  "st.shared.u32 [%s+1024], %r3; cp.async.bulk.wait_group 0;"
                  "ld.shared.u32 %r3, [%s+1024]; st.global.u32 [%y+252], %r3;")  # fmt: skip
    assert run(early)[63] == -1


# --------------------------------------------------------------------------------------------------
# Tensor maps


def tensor(at: str = "[%s], [%map, {0, 0}], [%bar]", dims: int = 2) -> str:
    return LOAD.replace(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%s], [%x], 256, [%bar]",
        f"cp.async.bulk.tensor.{dims}d.shared::cluster.global.mbarrier::complete_tx::bytes {at}",
    )


def test_bad_tensor_operands() -> None:
    array = np.arange(64, dtype=np.int32).reshape(8, 8)
    tensor_map = encode_map(array, [8, 8], 3)
    options = {"maps": [tensor_map], "regions": [array]}
    assert np.array_equal(run(tensor(), **options), np.arange(64))
    for at, kind in [
        ("[%s+16], [%map, {0, 0}], [%bar]", "misaligned access"),
        ("[%s], [%map+32, {0, 0}], [%bar]", "misaligned access"),
        ("[%s], [%map2, {0, 0}], [%bar]", "bad tensor map"),
        ("[%s], [%map, {0, 2}], [%bar]", None),
    ]:
        if kind:
            assert faults(tensor(at), **options) == {kind}
        else:
            run(tensor(at), **options)
    assert faults(tensor("[%s], [%map, {0, 0, 0}], [%bar]", 3), **options) == {"bad tensor map"}
    assert faults(tensor(), maps=[tensor_map]) == {"out of bounds"}  # the array is no argument


# --------------------------------------------------------------------------------------------------
# Clusters


def test_remote_access_needs_the_cluster_barrier() -> None:
    body = f"""
    mad.lo.u32 %r1, %tid, 4, %s; st.shared.u32 [%r1], %rank; {CLUSTER_SYNC}
    xor.b32 %r4, %rank, 1; mapa.shared::cluster.u32 %r5, %r1, %r4;
    ld.shared::cluster.u32 %r6, [%r5]; st.global.u32 [%yt], %r6; {CLUSTER_SYNC}"""
    for seed in SEEDS:
        run(body, seed, cluster=2)
    first = body.replace(CLUSTER_SYNC, "", 1)
    assert faults(first, cluster=2) <= {"uninitialised shared memory", RACE, "out of bounds"}
    relaxed = body.replace("cluster.arrive.aligned", "cluster.arrive.relaxed.aligned", 1)
    assert faults(relaxed, cluster=2) == {RACE}
    assert "wrote with no barrier in between" in last_report[0]
    # Without the last one a CTA may end while the other still reads its memory.
    last = body[: body.rindex(CLUSTER_SYNC)]
    assert faults(last, cluster=2) <= {RACE, "out of bounds"}
    plain = body.replace("ld.shared::cluster.u32", "ld.shared.u32")
    assert faults(plain, cluster=2) == {"out of bounds"}
    assert faults(body.replace("xor.b32 %r4, %rank, 1", "mov.u32 %r4, 2"), cluster=2) == {
        "out of bounds"
    }


def test_cluster_barrier_misuse() -> None:
    arrive, wait_ = "barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"
    run((arrive + wait_) * 3, cluster=2)
    assert faults(arrive * 2, cluster=2) == {"barrier misuse"}
    assert faults(wait_, cluster=2) == {"barrier misuse"}
    one = f"setp.eq.u32 %p1, %rank, 1; @%p1 bra $end; {arrive} {wait_} $end:"
    run(one, cluster=2)  # those that have exited are not waited for
    spin = one.replace("$end:", "") + f"bra.uni $out; $end: {wait('%bar', 0)} $out:"
    stuck = "@%first mbarrier.init.shared.b64 [%bar], 1; bar.sync 0;" + spin
    assert faults(stuck, cluster=2) == {"deadlock"}


def test_remote_arrival_without_release_publishes_nothing() -> None:
    send = "st.shared::cluster.u32 [%r5], %r2;"
    send += "mbarrier.arrive.{}.cluster.shared::cluster.b64 _, [%r6];"
    body = REMOTE.replace("COUNT", "64")
    run(body.replace("SEND", send.format("release")), cluster=2)
    assert faults(body.replace("SEND", send.format("relaxed")), cluster=2) == {RACE}


def test_setmaxnreg_misuse() -> None:
    assert faults("setmaxnreg.dec.sync.aligned.u32 240;", threads=384) == {"setmaxnreg misuse"}
    grow = "setmaxnreg.inc.sync.aligned.u32 240;"
    assert faults(grow, threads=384) == {"deadlock"}  # nobody gives any
    for bad in ("20", "100", "264"):
        with pytest.raises(EmulatorError, match="unknown instruction"):
            load(f"setmaxnreg.dec.sync.aligned.u32 {bad};")


# --------------------------------------------------------------------------------------------------
# wgmma

D = ", ".join(f"%f{i}" for i in range(4))
ZERO = "".join(f"mov.f32 %f{i}, 0f00000000;" for i in range(4))
FILL = """
    mad.lo.u32 %r1, %tid, 16, %s; st.shared.v4.u32 [%r1], {%r2, %r2, %r2, %r2};
    st.shared.v4.u32 [%r1+2048], {%r2, %r2, %r2, %r2};"""
# A: 64 rows, B: 8 columns, unswizzled, at 0 and 2048: descriptors in %rd1 and %rd2.
SETUP = f"""
    mov.u32 %r2, 0x3f803f80; {FILL} fence.proxy.async.shared::cta; bar.sync 0;
    cvt.u64.u32 %rd1, %s; shr.u64 %rd1, %rd1, 4;
    or.b64 %rd1, %rd1, {(128 << 12 | 256 >> 4 << 32)}; add.s64 %rd2, %rd1, 128;"""
MMA = f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{D}}}, %rd1, %rd2, 1, 1, 1, 0, 0;"
FENCE, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
WAIT = "wgmma.wait_group.sync.aligned 0;"
OUT = "st.global.f32 [%yt], %f3;"
RIGHT = SETUP + ZERO + FENCE + MMA + COMMIT + WAIT + OUT
UNFINISHED = "wgmma not waited for"


def wgmma_faults(body: str, **options: int) -> set[str]:
    return faults(body, threads=128, **options)


def test_wgmma_snippet_is_right() -> None:
    for seed in SEEDS:
        assert (run(RIGHT, seed, 128).view(np.float32) == 16).all()


@pytest.mark.parametrize(
    ("between", "kind"),
    [
        ("add.f32 %f5, %f3, %f3;", UNFINISHED),
        ("mov.f32 %f5, %f3;", None),  # compilers move accumulators about
        ("mov.f32 %f5, %f3; add.f32 %f6, %f5, %f5;", UNFINISHED),
        ("mov.b64 %rd5, {%f2, %f3}; mov.b64 {%f8, %f9}, %rd5; add.f32 %f6, %f9, %f9;", UNFINISHED),
        ("mov.f32 %f2, 0f00000000;", UNFINISHED),
        ("@%first mov.f32 %f2, 0f00000000;", UNFINISHED),
        ("add.f32 %f5, %f5, %f5;", None),
    ],
)
@pytest.mark.parametrize("committed", [True, False])
def test_accumulator_touched_before_the_wait(
    between: str, kind: str | None, committed: bool
) -> None:
    start = SETUP + ZERO + "mov.f32 %f5, %f0;" + FENCE + MMA
    middle = COMMIT + between if committed else between + COMMIT
    body = start + middle + WAIT + OUT
    if kind is None:
        run(body, threads=128)
        return
    assert wgmma_faults(body) == {kind}
    assert re.search(r"%f\d+ is (read|overwritten)", last_report[0])


def test_wait_group_that_lets_one_group_go_on() -> None:
    two = SETUP + ZERO + FENCE + MMA + COMMIT
    two += MMA.replace(D, "%f4, %f5, %f6, %f7").replace(", 1, 1, 1, 0, 0", ", 0, 1, 1, 0, 0")
    two += COMMIT + "wgmma.wait_group.sync.aligned {};" + "st.global.f32 [%yt], {};"
    run(two.replace("{}", "1", 1).replace("{}", "%f3") + WAIT, threads=128)
    late = two.replace("{}", "1", 1).replace("{}", "%f7")
    assert wgmma_faults(late + WAIT) == {UNFINISHED}


def test_operand_registers_overwritten_before_the_wait() -> None:
    a = "mov.b32 %r4, %r2; mov.b32 %r5, %r2; mov.b32 %r6, %r2; mov.b32 %r7, %r2;"
    mma = MMA.replace("%rd1", "{%r4, %r5, %r6, %r7}").replace("1, 1, 1, 0, 0", "1, 1, 1, 0")
    body = SETUP + a + ZERO + FENCE + mma + COMMIT + "HERE" + WAIT + OUT
    assert (run(body.replace("HERE", "add.u32 %r8, %r6, 1;"), 0, 128).view(np.float32) == 16).all()
    assert wgmma_faults(body.replace("HERE", "mov.b32 %r6, 0;")) == {UNFINISHED}
    assert "which a wgmma under way reads" in last_report[0]


def test_missing_wgmma_fence() -> None:
    missing = {"missing wgmma.fence"}
    assert wgmma_faults(wrong(RIGHT, FENCE, "")) == missing
    assert wgmma_faults(SETUP + FENCE + ZERO + MMA + COMMIT + WAIT + OUT) == missing
    again = RIGHT.replace(OUT, "mul.f32 %f1, %f1, %f1; HERE" + MMA + COMMIT + WAIT + OUT)
    run(again.replace("HERE", FENCE), threads=128)
    assert wgmma_faults(again.replace("HERE", "")) == missing
    assert "%f1 was written" in last_report[0]
    # The accumulators of one wgmma go on into the next.
    run(RIGHT.replace(COMMIT, MMA + COMMIT), threads=128)


def test_loops_carry_registers_round() -> None:
    body = (
        SETUP + ZERO + "mov.u32 %r9, 0; $again:" + FENCE + MMA + COMMIT + "HERE add.u32 %r9, "
        "%r9, 1; setp.lt.u32 %p1, %r9, 3; @%p1 bra $again;" + WAIT + OUT
    )
    assert (run(body.replace("HERE", ""), 0, 128).view(np.float32) == 48).all()
    assert (run(body.replace("HERE", WAIT + "mul.f32 %f3, %f3, 0f3F800000;"), 0, 128) > 0).all()
    assert wgmma_faults(body.replace("HERE", "mul.f32 %f3, %f3, 0f3F800000;")) == {UNFINISHED}


def test_operand_in_shared_memory_overwritten_before_the_wait() -> None:
    store = "st.shared.u32 [%s+2048], 0;"
    good = RIGHT.replace(WAIT, WAIT + "bar.sync 0; @%first " + store)
    run(good, threads=128)
    early = RIGHT.replace(WAIT, "bar.sync 0; @%first " + store + WAIT)
    assert wgmma_faults(early) == {RACE}
    assert "a wgmma of warpgroup 0 reads" in last_report[0]
    # One's own wait is not the other warps'... but wgmma ends for the four together.
    alone = RIGHT.replace(WAIT, WAIT + "@%first " + store)
    for seed in SEEDS:
        run(alone, seed, 128)


def test_a_stage_released_before_the_wait_is_overwritten_by_a_copy() -> None:
    """A fifth warp copies over B when the warpgroup says that it is done."""
    release = "@%leader mbarrier.arrive.shared.b64 _, [%bar];"
    copy = f"""
    {wait("%bar", 0)}
    @!%p14 bra $out;
    mbarrier.arrive.expect_tx.shared.b64 _, [%bar+8], 128; add.u32 %r9, %s, 2048;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%x], 128, [%bar+8];
$out: {wait("%bar+8", 0)} ret;"""
    head = f"""
    @%first mbarrier.init.shared.b64 [%bar], 1; @%first mbarrier.init.shared.b64 [%bar+8], 1;
    setp.eq.u32 %p13, %warp, 4; setp.eq.and.u32 %p14, %lane, 0, %p13; mov.u32 %r2, 0x3f803f80;
    @%p13 bra $filled; {FILL} $filled: fence.proxy.async.shared::cta; bar.sync 0;
    @!%p13 bra $group; {copy}
$group:"""
    rest = SETUP.partition("bar.sync 0;")[2] + ZERO + FENCE + MMA + COMMIT
    right = head + rest + WAIT + release + OUT
    for seed in SEEDS:
        run(right, seed, 160)
    assert faults(head + rest + release + WAIT + OUT, threads=160) == {RACE}


def test_missing_proxy_fence_before_wgmma() -> None:
    body = RIGHT.replace("fence.proxy.async.shared::cta;", "")
    assert wgmma_faults(body) == {"missing proxy fence"}
    run(body.replace("bar.sync 0;", "bar.sync 0; fence.proxy.async;"), threads=128)
    assert wgmma_faults(body.replace("bar.sync 0;", "bar.sync 0; fence.proxy.async.global;")) == {
        "missing proxy fence"
    }
    assert wgmma_faults(RIGHT.replace("bar.sync 0;", "")) <= {
        RACE, "uninitialised shared memory"
    }  # fmt: skip


def test_wgmma_operands_not_loaded_yet() -> None:
    start = f"""
    @%first mbarrier.init.shared.b64 [%bar], 1; fence.mbarrier_init.release.cluster;
    mov.u32 %r2, 0x3f803f80; {FILL} fence.proxy.async.shared::cta; bar.sync 0;
    @!%leader bra $go;
    mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256; add.u32 %r9, %s, 2048;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9], [%x], 256, [%bar];
$go: """
    rest = SETUP.partition("bar.sync 0;")[2] + ZERO + FENCE + MMA + COMMIT + WAIT + OUT
    waiting = wait("%bar", 0)
    run(start + waiting + rest, threads=128)
    assert wgmma_faults(start + rest.replace(OUT, waiting + OUT)) <= {LANDED, RACE}
    # Only one of the four warps waits: the others may be early.
    one = "setp.ne.u32 %p9, %warp, 0; @%p9 bra $on;" + waiting + "$on:"
    assert wgmma_faults(start + one + rest.replace(OUT, waiting + OUT)) <= {LANDED, RACE}


def test_bad_descriptors() -> None:
    swizzle = 1 << 62
    for change, kind in [
        (f"or.b64 %rd1, %rd1, {swizzle}; add.s64 %rd1, %rd1, 8;", "misaligned access"),
        ("add.s64 %rd1, %rd1, 16000;", "out of bounds"),
        ("cvt.u64.u32 %rd5, %lane; add.s64 %rd1, %rd1, %rd5;", "bad wgmma"),
        (f"or.b64 %rd1, %rd1, {1 << 49};", "not modelled"),
        ("cvt.u64.u32 %rd5, %warp; shl.b64 %rd5, %rd5, 3; add.s64 %rd1, %rd1, %rd5;", "bad wgmma"),
    ]:
        assert wgmma_faults(SETUP + change + RIGHT[len(SETUP) :]) == {kind}, change


@pytest.mark.parametrize("extra", [WAIT, FENCE, COMMIT])
def test_a_warp_alone_waits_fences_or_commits(extra: str) -> None:
    """The four warps of a warpgroup execute the same of these, or none does."""
    one = "setp.ne.u32 %p9, %warp, 2; @%p9 bra $on;" + extra + "$on:"
    start = SETUP + ZERO + FENCE + MMA + COMMIT
    end = MMA + COMMIT + WAIT + OUT
    run(start + WAIT + extra + FENCE + end, threads=128)
    assert wgmma_faults(start + one + FENCE + end) == {"bad wgmma"}
    assert "have not executed the same" in last_report[0]


def test_wgmma_of_half_a_warpgroup() -> None:
    part = "setp.ge.u32 %p9, %warp, 3; @%p9 bra $end;"
    body = SETUP + part + ZERO + FENCE + MMA + COMMIT + WAIT + OUT + "$end:"
    assert wgmma_faults(body) == {"deadlock"}
    assert "wgmma.wait_group" in last_report[0]
    assert faults(RIGHT, threads=96) == {"wrong lane mask"}
    lanes = RIGHT.replace(MMA, "setp.lt.u32 %p9, %lane, 16; @%p9 " + MMA)
    assert wgmma_faults(lanes) == {"wrong lane mask"}


def test_uncommitted_wgmma_is_not_waited_for() -> None:
    assert wgmma_faults(RIGHT.replace(COMMIT, "")) == {"bad wgmma"}


@pytest.mark.parametrize(
    "instruction",
    [
        MMA,
        FENCE,
        "setmaxnreg.dec.sync.aligned.u32 40;",
    ],
)
def test_instructions_of_sm_90a_alone(instruction: str) -> None:
    load(instruction)
    with pytest.raises(EmulatorError, match=r"needs \.target sm_90a, this is sm_90"):
        load(instruction, target="sm_90")


@pytest.mark.parametrize(
    "instruction",
    [
        "mbarrier.try_wait.shared.b64 %p1, [%bar], %rd1;",
        "cp.async.bulk.commit_group;",
        "fence.proxy.async;",
        "barrier.cluster.arrive;",
        "mapa.shared::cluster.u32 %r1, %s, 0;",
    ],
)
def test_instructions_of_sm_90(instruction: str) -> None:
    load(instruction, target="sm_90")
    ptx = FRAME.format(body=instruction, smem=4096, bar=0, target="sm_80", directives="")
    ptx = re.sub(r"(elect\.sync|setp\.eq\.and).*", "", ptx)
    with pytest.raises(EmulatorError, match="needs sm_90"):
        Emulator("sm_80").load(ptx).kernel("test")


@pytest.mark.parametrize(
    "shape",
    [
        "m64n12k16.f32.bf16.bf16",
        "m64n264k16.f32.bf16.bf16",
        "m64n8k32.f32.bf16.bf16",
        "m64n8k16.f32.bf16.f16",
        "m128n8k16.f32.bf16.bf16",
        "m64n8k16.s32.bf16.bf16",
    ],
)
def test_no_such_wgmma(shape: str) -> None:
    with pytest.raises(EmulatorError, match="unknown instruction"):
        load(MMA.replace("m64n8k16.f32.bf16.bf16", shape))


def test_wgmma_of_bytes_is_k_major() -> None:
    """The transposing immediates are there for 16-bit types alone."""
    right = MMA.replace("m64n8k16.f32.bf16.bf16", "m64n8k32.f32.e4m3.e4m3")
    right = right.replace(", 1, 1, 1, 0, 0;", ", 1, 1, 1;")
    load(right)
    for more in (", 1, 1, 1, 0, 0;", ", 1, 1, 1, 1;"):
        with pytest.raises(EmulatorError, match="number of operands"):
            load(right.replace(", 1, 1, 1;", more))
