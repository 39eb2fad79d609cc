"""Order across the CTAs of a cluster and of copies under way: what the PTX ISA asks for is needed.

mbarriers are used through the generic proxy by everybody, TMA's complete_tx included: what their
initialisation needs is order and no proxy fence. That is bar.sync within a CTA; across CTAs it is
barrier.cluster, or a relaxed one after fence.mbarrier_init. Arrivals and waits are .release.cta and
.acquire.cta unless they say otherwise. Each test runs right snippets, which must pass, and the same
with one thing wrong.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.hopper_snippets import SEEDS, encode_map, faults, last_report, run, wait
from tests.test_emulator_hopper import CLUSTER_SYNC, INIT, TRIP
from tests.test_emulator_hopper_faults import LANDED, LOAD, RACE, STORE, wrong

RELAXED_SYNC = CLUSTER_SYNC.replace("arrive", "arrive.relaxed")
INIT_FENCE = "fence.mbarrier_init.release.cluster;"

# --------------------------------------------------------------------------------------------------
# Initialisation of mbarriers

ARRIVE_THERE = "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r6];"
# Another CTA's mbarrier: an arrival, a copy that it multicasts, bytes that it stores.
USES = {
    "arrive": (64, ARRIVE_THERE),
    "multicast": (
        1,
        """@%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 32;
    add.u32 %r7, %s, 1024; mad.lo.u32 %r7, %rank, 16, %r7; mov.u16 %h1, 3;
    @%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%r7], [%x], 16, [%bar], %h1;""",
    ),
    "st.async": (
        1,
        """@%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256;
    mad.lo.u32 %r5, %tid, 4, %r8;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r5+1024], %r2, [%r6];""",
    ),
}


def of_other_cta(use: str, between: str) -> str:
    count, text = USES[use]
    return f"""
    @%first mbarrier.init.shared.b64 [%bar], {count}; {between}
    xor.b32 %r4, %rank, 1; mapa.shared::cluster.u32 %r6, %bar, %r4;
    mapa.shared::cluster.u32 %r8, %s, %r4; mov.u32 %r2, %tid;
    {text} {wait("%bar", 0, ".acquire.cluster")} st.global.u32 [%yt], 7; {CLUSTER_SYNC}"""


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "between",
    [
        CLUSTER_SYNC,
        f"{INIT_FENCE} {RELAXED_SYNC}",
        f"fence.acq_rel.cluster; {RELAXED_SYNC}",
        f"bar.sync 0; {CLUSTER_SYNC}",
        f"@%first {INIT_FENCE} {RELAXED_SYNC} bar.sync 0;",
    ],
)
def test_mbarrier_that_another_cta_uses(use: str, between: str) -> None:
    for seed in SEEDS:
        assert (run(of_other_cta(use, between), seed, cluster=2) == 7).all()


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "between",
    [
        RELAXED_SYNC,  # orders no memory
        f"fence.proxy.async; {RELAXED_SYNC}",  # of the asynchronous proxy, not of the cluster
        f"fence.acq_rel.cta; {RELAXED_SYNC}",
        # Of another thread's mbarriers the fence says nothing.
        f"setp.eq.u32 %p1, %tid, 32; @%p1 {INIT_FENCE} {RELAXED_SYNC}",
        f"{RELAXED_SYNC} {INIT_FENCE}",
    ],
)
def test_mbarrier_that_another_cta_uses_too_early(use: str, between: str) -> None:
    assert faults(of_other_cta(use, between), cluster=2) == {RACE}
    assert "orders this after its initialisation by warp 0 lane 0 of CTA rank" in last_report[0]


def test_mbarrier_used_before_any_barrier_of_the_cluster() -> None:
    early = of_other_cta("arrive", "bar.sync 0;")
    assert faults(early, cluster=2) <= {RACE, "mbarrier misuse", "out of bounds"}


def test_mbarrier_of_one_lane_used_by_another() -> None:
    """A warp's lanes have no order of their own: __syncwarp, which arrivals at barriers imply."""
    init = "@%first mbarrier.init.shared.b64 [%bar], 1; HERE setp.eq.u32 %p1, %tid, 3;"
    body = init + "@%p1 mbarrier.arrive.shared.b64 _, [%bar];"
    for right in ("bar.warp.sync -1;", "bar.sync 0;"):
        run(body.replace("HERE", right), threads=32)
    assert faults(body.replace("HERE", INIT_FENCE), threads=32) == {RACE}
    assert "initialisation by warp 0 lane 0" in last_report[0]
    own = body.replace("%tid, 3", "%tid, 0").replace("HERE", "")
    run(own, threads=32)


def test_initialisation_needs_no_proxy_fence() -> None:
    """TMA uses its mbarrier through the generic proxy; fence.mbarrier_init fences no proxy."""
    plain = wrong(LOAD, INIT_FENCE, "")
    for seed in SEEDS:
        assert np.array_equal(run(plain, seed), np.arange(64))
    written = "mad.lo.u32 %r2, %tid, 4, %s; st.shared.u32 [%r2], 0;" + LOAD
    assert INIT_FENCE in written
    assert faults(written) == {"missing proxy fence"}


# --------------------------------------------------------------------------------------------------
# Scopes of arrivals and waits

# Each CTA writes into the other one's shared memory, or its own, and arrives there.
SEND = f"""
    {INIT.format(count=64)} {CLUSTER_SYNC}
    mad.lo.u32 %r1, %tid, 4, %s; xor.b32 %r4, %rank, 1;
    mapa.shared::cluster.u32 %r5, %r1, %r4; mapa.shared::cluster.u32 %r6, %bar, %r4;
    mad.lo.u32 %r2, %rank, 1000, %tid; st.shared::cluster.u32 [%r5], %r2; ARRIVE
    WAIT ld.shared.u32 %r3, [%r1]; st.global.u32 [%yt], %r3; {CLUSTER_SYNC}"""
NARROW = "an arrival or a wait of .cta scope, not .cluster, in between"


def arrive(order: str) -> str:
    return f"mbarrier.arrive{order}.shared::cluster.b64 _, [%r6];"


def send(arrival: str, waiting: str) -> str:
    return SEND.replace("ARRIVE", arrival).replace("WAIT", waiting)


ACQUIRE = wait("%bar", 0, ".acquire.cluster")


@pytest.mark.parametrize(
    ("arrival", "waiting"),
    [
        (arrive(".release.cluster"), ACQUIRE),
        ("fence.acq_rel.cluster;" + arrive(".relaxed.cluster"), ACQUIRE),
        ("fence.release.sync_restrict::shared::cta.cluster;" + arrive(".relaxed.cluster"), ACQUIRE),
        (
            arrive(".release.cluster"),
            wait("%bar", 0, ".relaxed.cluster")
            + "fence.acquire.sync_restrict::shared::cluster.cluster;",
        ),
        ("membar.gl;" + arrive(".relaxed.cluster"), wait("%bar", 0, ".relaxed.cluster")
         + "fence.sc.gpu;"),
    ],
)  # fmt: skip
def test_data_handed_to_another_cta(arrival: str, waiting: str) -> None:
    rank, tid = np.divmod(np.arange(128), 64)
    for seed in SEEDS:
        y = run(send(arrival, waiting), seed, cluster=2)
        assert np.array_equal(y, (1 - rank) * 1000 + tid)


@pytest.mark.parametrize(
    ("arrival", "waiting", "is_narrow"),
    [
        (arrive(""), ACQUIRE, True),  # .release.cta by default
        (arrive(".release.cta"), ACQUIRE, True),
        (arrive(".relaxed.cluster"), ACQUIRE, False),
        ("fence.acq_rel.cta;" + arrive(".relaxed.cluster"), ACQUIRE, True),
        (arrive(".relaxed.cluster") + "fence.acq_rel.cluster;", ACQUIRE, False),
        (arrive(".release.cluster"), wait("%bar", 0), True),  # .acquire.cta by default
        (arrive(".release.cluster"), wait("%bar", 0, ".acquire.cta"), True),
        (arrive(".release.cluster"), wait("%bar", 0, ".relaxed.cluster"), False),
    ],
)
def test_data_handed_to_another_cta_with_too_little(
    arrival: str, waiting: str, is_narrow: bool
) -> None:
    assert faults(send(arrival, waiting), cluster=2) == {RACE}
    assert (NARROW in last_report[0]) == is_narrow


def test_cta_scope_is_enough_within_a_cta() -> None:
    body = f"""
    {INIT.format(count=32)} mad.lo.u32 %r1, %lane, 4, %s;
    setp.eq.u32 %p1, %warp, 1; @%p1 bra $consumer;
    st.shared.u32 [%r1], %lane; ARRIVE ret;
$consumer: {wait("%bar", 0)} ld.shared.u32 %r3, [%r1]; st.global.u32 [%yt], %r3;"""
    for order in ("", ".release.cta", ".release.cluster"):
        run(body.replace("ARRIVE", f"mbarrier.arrive{order}.shared.b64 _, [%bar];"))
    fenced = "fence.acq_rel.cta; mbarrier.arrive.relaxed.cta.shared.b64 _, [%bar];"
    run(body.replace("ARRIVE", fenced))
    relaxed = body.replace("ARRIVE", "mbarrier.arrive.relaxed.cta.shared.b64 _, [%bar];")
    assert faults(relaxed) == {RACE}


# CTA 0 fills both CTAs' buffers twice; each consumer (warp 1) says to it that it has read: as
# published GEMMs do, with an arrival of no more than .cta scope.
RELEASE = f"""
    setp.eq.u32 %p1, %tid, 0; @%p1 mbarrier.init.shared.b64 [%bar], 1;
    @%p1 mbarrier.init.shared.b64 [%bar+8], 2; {INIT_FENCE} {RELAXED_SYNC}
    mov.u16 %h1, 3; mov.u32 %r2, 0; setp.eq.u32 %p2, %warp, 1; @%p2 bra $consumer;
    @!%first bra $end;
    mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 128;
    setp.ne.u32 %p3, %rank, 0; @%p3 bra $second;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%s], [%x], 128, [%bar], %h1;
    {wait("%bar+8", 0)}
$second: {wait("%bar", 0)} mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 128;
    @%p3 bra $end;
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%s], [%x+128], 128, [%bar], %h1;
    bra.uni $end;
$consumer: {wait("%bar", 0)}
    mad.lo.u32 %r1, %lane, 4, %s; ld.shared.u32 %r3, [%r1]; bar.warp.sync -1;
    mapa.shared::cluster.u32 %r6, %bar, 0; setp.eq.u32 %p4, %lane, 0;
    @%p4 mbarrier.arrive.shared::cluster.b64 _, [%r6+8];
    {wait("%bar", 1)} ld.shared.u32 %r4, [%r1]; mad.lo.u32 %r3, %r3, 100, %r4;
    st.global.u32 [%yt], %r3;
$end: {CLUSTER_SYNC}"""


def test_a_buffer_may_be_overwritten_after_an_arrival_of_cta_scope() -> None:
    expected = np.arange(32) * 100 + np.arange(32) + 32
    for seed in SEEDS:
        y = run(RELEASE, seed, cluster=2).reshape(2, 2, 32)
        assert (y[:, 1] == expected).all() and (y[:, 0] == -1).all()
    relaxed = RELEASE.replace("arrive.shared::cluster", "arrive.relaxed.cta.shared::cluster")
    assert faults(relaxed, cluster=2) <= {RACE}
    early = RELEASE.replace("ld.shared.u32 %r3, [%r1]; bar.warp.sync -1;", "").replace(
        f"{wait('%bar', 1)} ld", f"ld.shared.u32 %r3, [%r1]; {wait('%bar', 1)} ld"
    )
    assert faults(early, cluster=2) <= {RACE, LANDED}


# --------------------------------------------------------------------------------------------------
# The end of a CTA

ENDS = f"""
    {INIT.format(count=1)} mad.lo.u32 %r1, %tid, 4, %s; st.shared.u32 [%r1], %tid; {CLUSTER_SYNC}
    setp.eq.u32 %p1, %rank, 0; mapa.shared::cluster.u32 %r5, %r1, 0;
    mapa.shared::cluster.u32 %r6, %bar, 0; @%p1 bra $zero; USE
$zero: """


@pytest.mark.parametrize(
    "use",
    [
        "ld.shared::cluster.u32 %r7, [%r5];",
        "st.shared::cluster.u32 [%r5], 1;",
        "atom.shared::cluster.add.u32 %r7, [%r5], 1;",
        "@%first mbarrier.arrive.shared::cluster.b64 _, [%r6];",
    ],
)
def test_cta_that_ends_while_others_use_its_memory(use: str) -> None:
    """Found whichever of them is first."""
    body = ENDS.replace("USE", use)
    for seed in SEEDS:
        run(body + CLUSTER_SYNC, seed, cluster=2)
    assert faults(body, cluster=2) <= {RACE, "out of bounds"}
    assert "the CTA ends" in last_report[0] or "which has ended" in last_report[0]
    # A relaxed barrier says nothing of what was before it.
    assert faults(body + RELAXED_SYNC, cluster=2) == {RACE}
    assert "nothing says that warp" in last_report[0]


def test_cta_that_waits_for_the_last_arrival_may_end() -> None:
    arrives = "@%first mbarrier.arrive{}.shared::cluster.b64 _, [%r6];"
    for order in ("", ".release.cluster", ".relaxed.cluster"):
        body = ENDS.replace("USE", arrives.format(order)) + "@%p1 bra $go; ret; $go: {}"
        for seed in SEEDS:
            run(body.replace("{}", wait("%bar", 0)), seed, cluster=2)


# --------------------------------------------------------------------------------------------------
# Copies under way

COPY = LOAD[LOAD.index("cp.async") : LOAD.index("$wait:")]


@pytest.mark.parametrize("who", ["%leader", "%p1"])
@pytest.mark.parametrize(
    "access", ["st.shared.u32 [%s+16], 3;", "ld.shared.u32 %r9, [%s+16];",
               "atom.shared.add.u32 %r9, [%s+16], 3;"]
)  # fmt: skip
def test_destination_touched_before_the_copy_is_there(who: str, access: str) -> None:
    """By the thread that asked for it, or by one that has heard of it."""
    touch = f"setp.eq.u32 %p1, %tid, 40; bar.sync 0; @{who} {access} bar.sync 0;"
    body = LOAD.replace("@!%leader bra $wait;", "@!%leader bra $issued;")
    early = wrong(body, COPY, COPY + "$issued: " + touch)
    assert faults(early) <= {LANDED, RACE}
    late = wrong(body, COPY, COPY + "$issued: ").replace("bar.sync 0;", "") + touch
    late = late.replace("@%first mbarrier.init.shared.b64 [%bar], 1;",
                        "@%first mbarrier.init.shared.b64 [%bar], 1; bar.sync 0;")  # fmt: skip
    run(late)


def test_tensor_destination_overwritten_before_the_copy_is_there() -> None:
    array = np.arange(64, dtype=np.int32).reshape(8, 8)
    options = {"maps": [encode_map(array, [8, 8], 3)], "regions": [array]}
    tensor = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
    tensor += "[%s], [%map, {0, 0}], [%bar];\n"
    right = wrong(LOAD, COPY, tensor)
    assert np.array_equal(run(right, **options), np.arange(64))
    assert faults(wrong(right, tensor, tensor + "st.shared.u32 [%s+252], 0;"), **options) == {
        LANDED
    }


def test_source_of_a_tensor_store_reused_before_the_wait() -> None:
    array = np.zeros((8, 8), np.int32)
    options = {"maps": [encode_map(array, [8, 8], 3)], "regions": [array]}
    store = "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%map, {0, 0}], [%s];"
    body = TRIP.replace("STORE", store)
    waits, clear = "cp.async.bulk.wait_group.read 0;", "st.shared.u32 [%s+128], 0;"
    run(wrong(body, waits, waits + clear), **options)
    assert faults(wrong(body, waits, clear + waits), **options) == {RACE}
    # By a copy into the same place.
    again = """mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 128;
    cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%s], [%x], 128, [%bar];"""
    once_more = "$end: " + wait("%bar", 1)
    run(wrong(body, waits + "\n$end:", waits + again + once_more), **options)
    early = wrong(body, waits + "\n$end:", again + waits + once_more)
    assert faults(early, **options) == {RACE}
    assert "a bulk copy of warp 0 reads" in last_report[0]


def test_source_of_a_reduction_reused_before_the_wait() -> None:
    reduce = STORE.replace("cp.async.bulk.global", "cp.reduce.async.bulk.global").replace(
        "bulk_group [%y]", "bulk_group.add.u32 [%y]"
    )
    waits = "cp.async.bulk.wait_group 0;"
    run(wrong(reduce, waits, waits + "st.shared.u32 [%s], 0;"))
    assert faults(wrong(reduce, waits, "st.shared.u32 [%s], 0;" + waits)) == {RACE}


# From CTA 1's shared memory to CTA 0's, whose mbarrier tells; CTA 0 passes the word on.
ACROSS = f"""
    {INIT.format(count=1)} mad.lo.u32 %r1, %tid, 4, %s; st.shared.u32 [%r1+1024], %tid;
    fence.proxy.async.shared::cta; {CLUSTER_SYNC}
    setp.eq.u32 %p1, %rank, 0; @%p1 bra $target;
    mapa.shared::cluster.u32 %r5, %s, 0; mapa.shared::cluster.u32 %r6, %bar, 0;
    add.u32 %r7, %s, 1024;
    @%first cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes
        [%r5], [%r7], 256, [%r6]; EARLY {CLUSTER_SYNC} LATE ret;
$target: @%first mbarrier.arrive.expect_tx.shared.b64 _, [%bar], 256; BEFORE
    {wait("%bar", 0)} ld.shared.u32 %r3, [%r1]; st.global.u32 [%yt], %r3; {CLUSTER_SYNC}"""


def test_copy_between_ctas_overwritten_before_it_is_there() -> None:
    def body(**parts: str) -> str:
        text = ACROSS
        for name in ("EARLY", "LATE", "BEFORE"):
            text = text.replace(name, parts.get(name, ""))
        return text

    clear = "@%first st.shared.u32 [%s+1024], 0;"
    for seed in SEEDS:
        assert np.array_equal(run(body(LATE=clear), seed, cluster=2)[:64], np.arange(64))
    assert faults(body(EARLY=clear), cluster=2) == {RACE}
    assert "a bulk copy of warp 0 reads" in last_report[0]
    assert faults(body(BEFORE="@%first st.shared.u32 [%s], 9;"), cluster=2) <= {LANDED, RACE}
