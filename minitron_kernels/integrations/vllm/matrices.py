"""The matrices of a layer that is merged and split over ranks; imports nothing of vLLM.

vLLM merges Q, K and V, and gate and up, into one layer each, and gives every rank its rows or its
columns. In a GGUF file the parts may be of different types, and a rank's columns need not be whole
blocks: so a layer is a list of parts, each a matrix of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from minitron_kernels import cuda_ops, ops, quantized_ops
from minitron_kernels.block_types import block_type
from minitron_kernels.quant_packing import pack
from minitron_kernels.quantized import QuantizedTensor

Tensor = torch.Tensor


class Part(NamedTuple):
    """A matrix, dense or quantised, and the zeros that its columns need around x: [left, right]."""

    matrix: Tensor
    padding: tuple[int, int] = (0, 0)


def rows_of(matrix: Tensor, start: int, count: int, total: int | None = None) -> Tensor:
    """``count`` rows from ``start``, and zeros up to ``total`` rows: a view if there are none."""
    if start < 0 or start + count > matrix.shape[0]:
        raise ValueError(f"rows {start}..{start + count - 1} of a matrix of {matrix.shape[0]}")
    rows = matrix[start : start + count]
    missing = 0 if total is None else total - count
    if not missing:
        return rows
    if isinstance(rows, QuantizedTensor):  # blocks of zero bytes are zeros
        blocks = F.pad(rows.blocks, (0, 0, 0, missing))
        return QuantizedTensor(blocks, rows.quant_type, (count + missing, rows.shape[1]))
    return F.pad(rows, (0, 0, 0, missing))


def columns_of(matrix: Tensor, start: int, count: int) -> Part:
    """``count`` columns from ``start``: whole blocks that cover them.

    The columns that a block has too many belong to a neighbour, and meet zeros in x: Part.padding.
    """
    if start < 0 or start + count > matrix.shape[1]:
        raise ValueError(f"columns {start}..{start + count - 1} of a matrix of {matrix.shape[1]}")
    if not isinstance(matrix, QuantizedTensor):
        return Part(matrix[:, start : start + count])
    block = block_type(matrix.quant_type)
    first, last = start // block.elements, -(-(start + count) // block.elements)
    blocks = matrix.blocks[:, first * block.nbytes : last * block.nbytes].contiguous()
    cols = (last - first) * block.elements
    left = start - first * block.elements
    shape = matrix.shape[0], cols
    return Part(QuantizedTensor(blocks, matrix.quant_type, shape), (left, cols - left - count))


def _can_join(a: Part, b: Part) -> bool:
    if a.padding != b.padding or type(a.matrix) is not type(b.matrix):
        return False
    if isinstance(a.matrix, QuantizedTensor) and isinstance(b.matrix, QuantizedTensor):
        return a.matrix.quant_type == b.matrix.quant_type
    return True


def join(parts: list[Part]) -> list[Part]:
    """Neighbours of one type as one matrix: fewer launches."""
    joined: list[Part] = []
    for part in parts:
        if not (joined and _can_join(joined[-1], part)):
            joined.append(part)
            continue
        before = joined[-1].matrix
        both: Tensor
        if isinstance(before, QuantizedTensor) and isinstance(part.matrix, QuantizedTensor):
            blocks = torch.cat([before.blocks, part.matrix.blocks])
            shape = blocks.shape[0], before.shape[1]
            both = QuantizedTensor(blocks, before.quant_type, shape)
        else:
            both = torch.cat([before, part.matrix])
        joined[-1] = Part(both, part.padding)
    return joined


class Matrices(nn.Module):
    """The parts of a layer, one below the other: x [..., K] -> [..., N of all of them].

    Quantised parts stay so: on the CPU as blocks where they lie, on a GPU as tiles, joined where
    they can be. Both are plain uint8 parameters, so that vLLM's compiler sees plain tensors.
    """

    def __init__(self, parts: list[Part], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.dtype = dtype
        has_kernels = cuda_ops.serves(torch.empty(0, dtype=dtype, device=device))
        # For each part: its type (None: dense), rows, columns, and padding.
        self.shapes: list[tuple[str | None, int, int, tuple[int, int]]] = []
        for i, (matrix, padding) in enumerate(join(parts) if has_kernels else parts):
            kind, (rows, cols) = None, matrix.shape
            stored = matrix
            if isinstance(matrix, QuantizedTensor):
                kind = matrix.quant_type
                stored = pack(matrix, device=device).tiles if has_kernels else matrix.blocks
            else:
                stored = matrix.to(dtype)
            self.shapes.append((kind, rows, cols, padding))
            parameter = nn.Parameter(stored.to(device), requires_grad=False)
            self.register_parameter(f"part_{i}", parameter)

    def parts(self) -> list[Tensor]:
        return [getattr(self, f"part_{i}") for i in range(len(self.shapes))]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        products = []
        for stored, (kind, rows, _, padding) in zip(self.parts(), self.shapes, strict=True):
            columns = F.pad(x, padding) if any(padding) else x
            if kind is None:
                products.append(ops.linear(columns, stored))
            else:
                products.append(quantized_ops.linear_stored(columns, stored, kind, rows))
        y = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return y if bias is None else y + bias

    def embedding(self, ids: Tensor) -> Tensor:
        """Rows of the only part: ids [...] -> [..., K]."""
        (stored,) = self.parts()
        ((kind, rows, cols, _),) = self.shapes
        flat = ids.flatten()
        if kind is None:
            found = ops.embedding(flat, stored)
        else:
            found = quantized_ops.embedding_stored(flat, stored, kind, rows, cols, self.dtype)
        return found.view(*ids.shape, cols)
