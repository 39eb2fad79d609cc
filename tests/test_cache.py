"""The page allocator against a simple model of it, and the cache's checks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels.cache import PageAllocator, PagedKVCache
from minitron_kernels.config import ModelConfig


@given(st.integers(1, 40), st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_allocator_never_hands_out_a_page_twice(
    num_pages: int, steps: list[tuple[bool, int]]
) -> None:
    allocator = PageAllocator(num_pages)
    held: list[list[int]] = []
    for give_back, count in steps:
        used = {p for pages in held for p in pages}
        if give_back and held:
            allocator.free(held.pop(count % len(held)))
        else:
            pages = allocator.allocate(count)
            if pages is None:
                assert count > num_pages - len(used)
                continue
            assert len(pages) == count == len(set(pages)) and not used & set(pages)
            assert all(0 <= p < num_pages for p in pages)
            free = [p for p in range(num_pages) if p not in used]
            has_run = any(set(range(p, p + count)) <= set(free) for p in free) or count == 0
            adjoining = all(b == a + 1 for a, b in pairwise(pages))
            assert adjoining or not has_run
            held.append(pages)
        assert allocator.num_free == num_pages - sum(map(len, held))


def test_pages_that_are_not_out_cannot_be_freed() -> None:
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    assert pages == [0, 1]
    allocator.free([0])
    for page in (0, 3, -1, 4):
        with pytest.raises(ValueError, match=f"page {page} is not allocated"):
            allocator.free([page])
    with pytest.raises(ValueError, match="negative"):
        allocator.allocate(-1)


def test_cache_shape_and_sizes() -> None:
    config = ModelConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=64,
    )
    cache = PagedKVCache(config, 5, 32, torch.float16)
    k, v = cache.layer(2)
    assert k.shape == v.shape == (5, 32, 2, 64) and k.dtype == torch.float16
    assert [cache.pages_for(n) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    stored = cache.k.nbytes + cache.v.nbytes
    assert stored == config.kv_bytes_per_token(2) * 5 * 32
    with pytest.raises(ValueError, match="page_size must be one of"):
        PagedKVCache(config, 5, 24)
    with pytest.raises(ValueError, match="num_pages"):
        PagedKVCache(config, 0)
