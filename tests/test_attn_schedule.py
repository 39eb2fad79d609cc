"""Which block of sm_90's attention for prompts does what, and when, by the kernel's own header,
compiled for the CPU."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import attn_schedule

Lengths = Sequence[tuple[int, int]]  # queries and keys of each sequence

RANDOM = random.Random(1)
PROMPTS = [(n, n) for n in RANDOM.sample(range(100, 4000), 8)]
CHUNKS = [(512, 512 * 2**i) for i in range(7)]

# Lengths, whether causal, window; what the busiest cluster may have over the mean.
BATCHES: dict[str, tuple[Lengths, bool, int, float]] = {
    "a prompt of 1024": ([(1024, 1024)], True, 0, 1.05),
    "a prompt of 8192": ([(8192, 8192)], True, 0, 1.01),
    "a chunk of 2048 of 8192": ([(2048, 8192)], True, 0, 1.05),
    "full": ([(2048, 2048)], False, 0, 1.05),
    "window": ([(8192, 8192)], True, 4096, 1.01),
    "window on both sides": ([(8192, 8192)], False, 4096, 1.04),
    "prompts": (PROMPTS, True, 0, 1.01),
    "full prompts": (PROMPTS, False, 0, 1.01),
    "chunks behind contexts of 0 to 32k": ([*CHUNKS, (512, 700)], True, 0, 1.01),
    "one long context, first": ([(512, 32768)] + [(512, 1024)] * 15, True, 0, 1.01),
    "one long context, last": ([(512, 1024)] * 15 + [(512, 32768)], True, 0, 1.01),
    "one full prompt of 8192, last": ([(1024, 1024)] * 15 + [(8192, 8192)], False, 0, 1.01),
    "full behind a long context, last": ([(1024, 1024)] * 15 + [(1024, 8192)], False, 0, 1.02),
    # Less than the longest item has is not to be had: 32 of 64 tiles, 1024 of 1.
    "prompts of 128 and a chunk of 8192": ([(128, 128)] * 64 + [(256, 8192)], True, 0, 1.385),
    "300 short ones": (
        [(RANDOM.randrange(1, 300), RANDOM.randrange(300, 2300)) for _ in range(300)], True, 0, 1.01
    ),
}  # fmt: skip


def check(lengths: Lengths, causal: bool, window: int, limit: float, **options: object) -> None:
    """Each item is one cluster's; a cluster's are the longest first, but for what a class of the
    list may differ by; and the busiest cluster has at most `limit` times the mean."""
    dealt = attn_schedule.items(lengths, causal=causal, window=window, **options)  # type: ignore[arg-type]
    found = sorted(item for mine in dealt for item in mine)
    units = [range(-(-queries // 128)) for queries, _ in lengths]
    wanted = [(s, u, h) for s, of in enumerate(units) for u in of for h in range(16)]
    assert found == wanted, "an item is missing, or done twice"
    tiles = [
        [attn_schedule.tiles(*lengths[s], unit, causal, window) for s, unit, _ in mine]
        for mine in dealt
    ]
    for mine in tiles:
        for first, after in pairwise(mine):
            assert after <= first * 17 / 16, f"not the longest first: {mine}"
    sums = [sum(mine) for mine in tiles]
    found_limit = max(sums) * len(sums) / sum(sums)
    assert found_limit <= limit, f"the busiest cluster has {found_limit:.3f} of the mean"


@pytest.mark.parametrize("name", BATCHES)
def test_items_are_dealt_out_evenly_the_longest_first(name: str) -> None:
    check(*BATCHES[name])


# A text of the header, what stands there instead, and what is noticed.
FAULTS = {
    "one sequence's shortest first": (
        "a prompt of 1024", "tiles.num_units - 1 - nth", "nth", "longest first"
    ),
    "a unit's number for its tiles": (
        "one long context, first", "tiles.most(), fewest(class_) - 1), 0)",
        "tiles.num_units, fewest(class_) - 1), 0)", "longest first|missing",
    ),
    "all items as long as each other": (
        "prompts of 128 and a chunk of 8192",
        "load_ = 4 * __reduce_max_sync(kAll, count > 0 ? min(tiles.most(), above) : 0) + 1;",
        "load_ = 1; (void)above;", "the busiest",
    ),
    "rounds that all begin at cluster 0": (
        "a chunk of 2048 of 8192", "num_given_ += num_clusters_;\n        is_backwards_ = ",
        "num_given_ += num_clusters_;\n        is_backwards_ = is_backwards_ || ", "the busiest",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_of_the_list_is_found(fault: str) -> None:
    batch, old, new, message = FAULTS[fault]
    with pytest.raises(AssertionError, match=message):
        check(*BATCHES[batch], changed=(old, new))


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 1500), st.integers(0, 3000)), min_size=1, max_size=70
    ),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 100, 700]),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 1), (9, 3), (32, 8)]),
    clusters=st.sampled_from([1, 3, 57, 66, 96]),
    skip=st.sampled_from([0, 0, 8]),
)
def test_each_item_is_one_cluster_s(
    lengths: Lengths, causal: bool, window: int, heads: tuple[int, int], clusters: int, skip: int
) -> None:
    dealt = attn_schedule.items(
        lengths, causal=causal, window=window, heads=heads, clusters=clusters, skip=skip
    )
    pairs = heads[0] // heads[1] % 2 == 0
    rows, head_units = (128, heads[0] // 2) if pairs else (256, heads[0])
    wanted = [
        (sequence, unit, head)
        for sequence, (queries, _) in enumerate(lengths)
        if queries > skip
        for unit in range(-(-queries // rows))
        for head in range(head_units)
    ]
    assert sorted(item for mine in dealt for item in mine) == wanted
    for mine in dealt:
        tiles = [attn_schedule.tiles(*lengths[s], u, causal, window, rows) for s, u, _ in mine]
        assert all(b <= a * 17 / 16 + 1 for a, b in pairwise(tiles))
