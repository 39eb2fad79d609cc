"""The ten quantised types of ggml: the sizes of their blocks, and where the scales are in them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """A ggml tensor type: rows are made of blocks of ``elements`` weights in ``nbytes`` bytes."""

    name: str
    elements: int
    nbytes: int
    scale_offsets: tuple[int, ...] = ()  # of the half-precision scales and minima in a block

    def row_nbytes(self, cols: int) -> int:
        """Stored bytes of a row of ``cols`` elements; ValueError unless it is whole blocks."""
        if cols % self.elements:
            raise ValueError(
                f"rows of {cols} are not a multiple of {self.name}'s {self.elements} elements"
            )
        return cols // self.elements * self.nbytes


QUANT_TYPES = {
    block.name: block
    for block in (
        BlockType("Q4_0", 32, 18, (0,)),
        BlockType("Q4_1", 32, 20, (0, 2)),
        BlockType("Q5_0", 32, 22, (0,)),
        BlockType("Q5_1", 32, 24, (0, 2)),
        BlockType("Q8_0", 32, 34, (0,)),
        BlockType("Q2_K", 256, 84, (80, 82)),
        BlockType("Q3_K", 256, 110, (108,)),
        BlockType("Q4_K", 256, 144, (0, 2)),
        BlockType("Q5_K", 256, 176, (0, 2)),
        BlockType("Q6_K", 256, 210, (208,)),
    )
}


# ggml's number of each type: in GGUF files and in the C ABI (mk_quant_type).
GGML_NUMBERS = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q5_1": 7,
    "Q8_0": 8,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 12,
    "Q5_K": 13,
    "Q6_K": 14,
}


def block_type(quant_type: str) -> BlockType:
    """The quantised type of this name; ValueError naming those accepted."""
    block = QUANT_TYPES.get(quant_type) if isinstance(quant_type, str) else None
    if block is None:
        raise ValueError(f"type: got {quant_type!r:.80}, accepted: {', '.join(QUANT_TYPES)}")
    return block
