"""The paged KV cache: fixed pages of key/value rows, handed out to sequences and taken back.

One pair of tensors holds all layers, [layers, pages, page, Hk, D]; a sequence owns a list of pages
(vLLM's PagedAttention, Kwon et al. 2023). Pages are handed out as one adjoining run whenever there
is one, so that what reads a sequence's rows in order finds them in order in memory.
"""

from __future__ import annotations

import torch

from minitron_kernels.config import ModelConfig

PAGE_SIZES = (16, 32, 64, 128)


class PageAllocator:
    """Hands out page indices 0..num_pages-1; first fit, so that freed runs are used again."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = [True] * num_pages
        self.num_free = num_pages

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages, adjoining if possible; None (nothing taken) if so many are not free."""
        if count < 0:
            raise ValueError(f"count must not be negative, got {count}")
        if count > self.num_free:
            return None
        run = self._adjoining(count)
        pages = run if run is not None else [p for p, f in enumerate(self._free) if f][:count]
        for page in pages:
            self._free[page] = False
        self.num_free -= count
        return pages

    def _adjoining(self, count: int) -> list[int] | None:
        length = 0
        for page, free in enumerate(self._free):
            length = length + 1 if free else 0
            if length >= count:
                return list(range(page - count + 1, page + 1)) if count else []
        return [] if count == 0 else None

    def free(self, pages: list[int]) -> None:
        """Take pages back; each must be one that is handed out."""
        for page in pages:
            if not 0 <= page < self.num_pages or self._free[page]:
                raise ValueError(f"page {page} is not allocated")
            self._free[page] = True
            self.num_free += 1


class PagedKVCache:
    """K and V of all layers, and the allocator of their pages.

    ``k`` and ``v``: [layers, num_pages, page_size, Hk, D] of ``dtype`` on ``device``, not
    initialised: rows that no sequence has written are never read.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {page_size}")
        if num_pages < 1:
            raise ValueError(f"num_pages must be positive, got {num_pages}")
        self.page_size = page_size
        self.allocator = PageAllocator(num_pages)
        shape = (
            config.num_hidden_layers,
            num_pages,
            page_size,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(K, V) of one layer, each [pages, page, Hk, D]."""
        return self.k[index], self.v[index]
