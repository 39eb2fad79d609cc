"""Random inputs of the benches."""

from __future__ import annotations

import torch

from bench.shapes import PAGE_SIZE
from minitron_kernels import ops
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.config import ModelConfig
from minitron_kernels.quantized import QuantizedTensor

Tensor = torch.Tensor


def randn(*shape: int, dtype: str, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=device) * scale).to(getattr(torch, dtype))


def quantised(kind: str, rows: int, cols: int) -> QuantizedTensor:
    """Blocks of random bits on the host, with scales that keep products near those of `randn`."""
    block = QUANT_TYPES[kind]
    count = rows * cols // block.elements
    blocks = torch.randint(0, 256, (count, block.nbytes), dtype=torch.uint8)
    scale = torch.tensor([1e-4 if block.elements == 256 else 2e-3]).half().view(torch.uint8)
    for offset in block.scale_offsets:
        blocks[:, offset : offset + 2] = scale
    return QuantizedTensor(blocks.view(rows, -1), kind, (rows, cols))


def rope_tables(config: ModelConfig, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [max_position, D/2]."""
    angles = torch.arange(config.max_position_embeddings).float()[:, None] * config.inv_freq()
    return angles.cos().to(device), angles.sin().to(device)


def eager_tables(rope: ops.Rope, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D] of a dtype, as eager code takes them."""
    at = positions.long()
    cos, sin = (torch.cat([t[at]] * 2, -1).to(dtype) for t in (rope.cos, rope.sin))
    return cos, sin


def num_pages(length: int) -> int:
    return -(-length // PAGE_SIZE)


def block_table(sequences: int, length: int, device: str) -> Tensor:
    """[B, pages], each sequence's pages scattered over the cache."""
    pages = sequences * num_pages(length)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    return order.to(torch.int32).view(sequences, -1).to(device)


def paged(x: Tensor, table: Tensor) -> Tensor:
    """x [B, L, Hk, D] laid out as a paged cache [pages, page, Hk, D]."""
    sequences, length, heads, dim = x.shape
    cache = x.new_zeros(table.numel(), PAGE_SIZE, heads, dim)
    padded = x.new_zeros(sequences, table.shape[1] * PAGE_SIZE, heads, dim)
    padded[:, :length] = x
    cache[table.flatten().long()] = padded.view(-1, PAGE_SIZE, heads, dim)
    return cache
