"""Packed matrices decoded by the drawing at the top of csrc/quant/quant_layout.h, in numpy.

It shares no table with the C++ code, so that the two check each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_kernels.block_types import QUANT_TYPES

Array = npt.NDArray[Any]

IDS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8,
       "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}  # fmt: skip
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8,
        "Q2_K": 2, "Q3_K": 3, "Q4_K": 4, "Q5_K": 5, "Q6_K": 6}  # fmt: skip
WITH_MIN = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")
TILE_ROWS, TILE_K = 16, 256


def quarters_of(cols: int) -> list[int]:
    """Quarters of 64 k of each tile of a row."""
    left = -(-cols // 64)
    return [4] * (left // 4) + [left % 4] * (left % 4 > 0)


def scale_bytes(kind: str, quarters: int) -> int:
    if QUANT_TYPES[kind].elements == 32:
        return quarters * 32 * (4 if kind in WITH_MIN else 2)
    return {"Q2_K": 256 + 64, "Q3_K": 128 + 64 + 32, "Q6_K": 256 + 32}.get(kind, 256 + 64)


def tile_bytes(kind: str, quarters: int) -> int:
    return 16 * 64 * quarters * BITS[kind] // 8 + scale_bytes(kind, quarters)


def packed_bytes(kind: str, rows: int, cols: int) -> int:
    return -(-rows // TILE_ROWS) * sum(tile_bytes(kind, c) for c in quarters_of(cols))


def words_of(tile: Array, bits: int, c: int) -> Array:
    """[lane, quarter, word of the quarter, half]: 16-bit halves of each lane's words."""
    if bits == 5:
        four = tile[: c * 512].view(np.uint32).reshape(c, 32, 4).transpose(1, 0, 2)
        fifth = tile[c * 512 : c * 640].view(np.uint32).reshape(32, c, 1)
        words = np.concatenate((four, fifth), 2)
    else:
        pieces = tile[: c * 128 * bits].view(np.uint32).reshape(-1, 32, 4)
        words = pieces.transpose(1, 0, 2).reshape(32, c, bits)
    return np.stack((words & 0xFFFF, words >> 16), -1).astype(int)


def pairs_of(w: Array, bits: int) -> Array:
    """The halves' fields as [lane, quarter, s, register a, half]."""
    lanes, c = w.shape[:2]
    a = np.zeros((lanes, c, 4, 4, 2), int)

    def put(s: int, register: int, word: int, bit: int, width: int, to: int = 0) -> None:
        field = w[:, :, word] >> bit & (1 << width) - 1
        a[:, :, s, register] |= field << to

    nibbles = ((0, 0), (2, 4), (1, 8), (3, 12))  # |  a3  |  a1  |  a2  |  a0  |
    for s in range(4):
        if bits == 4:
            for register, bit in nibbles:
                put(s, register, s, bit, 4)
        elif bits == 2:
            for register in range(4):
                put(s, register, s // 2, 8 * (s % 2) + 2 * register, 2)
        elif bits == 3:
            for register, bit in nibbles:
                if s < 3:
                    put(s, register, s, bit, 3)
                else:
                    for word in range(3):
                        put(s, register, word, bit + 3, 1, word)
        elif bits == 6 and s % 2 == 0:
            first = s // 2 * 3
            put(s, 2, first, 10, 6), put(s + 1, 3, first, 6, 4, 2), put(s, 0, first, 0, 6)
            put(s, 3, first + 1, 10, 6), put(s + 1, 1, first + 1, 6, 4), put(s, 1, first + 1, 0, 6)
            put(s + 1, 2, first + 2, 10, 6), put(s + 1, 3, first + 2, 8, 2)
            put(s + 1, 1, first + 2, 6, 2, 4), put(s + 1, 0, first + 2, 0, 6)
    if bits == 5:
        for s in range(2):
            put(s, 2, s, 11, 5), put(s, 1, s, 5, 5), put(s, 0, s, 0, 5)
        put(2, 2, 2, 10, 5), put(2, 1, 2, 5, 5), put(2, 0, 2, 0, 5)
        put(3, 3, 3, 10, 5), put(3, 2, 3, 5, 5), put(3, 0, 3, 0, 5)
        put(1, 3, 4, 10, 5), put(0, 3, 4, 5, 5), put(3, 1, 4, 0, 5)
        for to, (word, bit) in enumerate(((0, 10), (1, 10), (3, 15), (2, 15), (4, 15))):
            put(2, 3, word, bit, 1, to)
    if bits == 8:  # word 2s + h: bytes e = 0, 1, 2, 3 of slot g + 8h
        for s in range(4):
            for h in range(2):
                w32 = w[:, :, 2 * s + h, 0] | w[:, :, 2 * s + h, 1] << 16
                for e in range(4):
                    a[:, :, s, h + e // 2 * 2, e % 2] = w32 >> 8 * e & 255
    return a


def quants_of(tile: Array, kind: str, c: int) -> Array:
    """[packed row, k] of a tile: unsigned, as packed."""
    a = pairs_of(words_of(tile, BITS[kind], c), BITS[kind]).reshape(8, 4, c, 4, 2, 2, 2)
    # g, t, quarter, s, e / 2, h, e % 2 -> g, h (packed row 2g + h), quarter, s, t, e
    return a.transpose(0, 5, 2, 3, 1, 4, 6).reshape(16, 64 * c)


def scales_of(tile: Array, kind: str, c: int) -> tuple[Array, Array | None]:
    """The scale and the minimum of each weight, fp32 [packed row, k], as they enter its value."""
    section = tile[16 * 64 * c * BITS[kind] // 8 :]
    if QUANT_TYPES[kind].elements == 32:
        # g, t = block / 2, d or m, h, block % 2
        halves = section.view(np.float16).reshape(8, c, 2 if kind in WITH_MIN else 1, 2, 2)
        both = halves.astype(np.float32).transpose(2, 0, 3, 1, 4).reshape(-1, 16, 2 * c)
        both = both.repeat(32, 2)
        return both[0], both[1] if kind in WITH_MIN else None
    d = section[-64 if kind in WITH_MIN else -32 :].view(np.float16).astype(np.float32)
    d = d.reshape(16, -1, 1)  # packed row 2g + h, (d, dmin)
    low = None
    if kind in ("Q4_K", "Q5_K"):
        both = section[:256].reshape(8, 4, 2, 2, 2)  # g, t, scale or min, block % 2, h
        scale, low = both.transpose(2, 0, 4, 1, 3).reshape(2, 16, 8)
    elif kind == "Q3_K":
        nibbles = section[:128].view(np.uint16).reshape(8, 4, 2).astype(int)  # g, t, i
        twos = section[128:192].reshape(8, 4, 2).astype(int)
        scale = np.zeros((8, 2, 4, 4), int)  # g, h, t, block % 4
        for h in range(2):
            for later in range(2):
                part = 2 * h + later
                values = nibbles >> 4 * part & 15 | (twos >> 2 * part & 3) << 4
                scale[:, h, :, 2 * later : 2 * later + 2] = values
        scale = scale.reshape(16, 16) - 32
    else:
        bytes_ = section[:256].reshape(8, 4, 2, 4)[..., [0, 2, 1, 3]].astype(int)  # g, t, h, block
        bytes_ = bytes_.transpose(0, 2, 1, 3).reshape(16, 16)
        scale, low = (bytes_ - 128, None) if kind == "Q6_K" else (bytes_ & 15, bytes_ >> 4)
    count = 256 // scale.shape[1]
    scale = (d[:, 0] * scale.astype(np.float32)).repeat(count, 1)
    return scale, None if low is None else (d[:, 1] * low.astype(np.float32)).repeat(count, 1)


def decode(tiles: Array, kind: str, rows: int, cols: int) -> Array:
    """A packed matrix -> fp32 [rows padded to 16, cols padded to 64]: the weights as ggml has them
    (padding: 0 times what 0 stands for)."""
    offset = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "Q3_K": 4, "Q6_K": 32}.get(kind, 0)
    out, at = [], 0
    for _ in range(-(-rows // TILE_ROWS)):
        row = []
        for c in quarters_of(cols):
            tile = tiles[at : at + tile_bytes(kind, c)]
            at += len(tile)
            q = quants_of(tile, kind, c).astype(np.float32) - np.float32(offset)
            scale, low = scales_of(tile, kind, c)
            value = scale * q
            if low is not None:
                value = value + low if QUANT_TYPES[kind].elements == 32 else value - low
            row.append(value)
        out.append(np.concatenate(row, 1))
    assert at == len(tiles)
    return np.concatenate(out)
