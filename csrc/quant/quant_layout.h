// How a packed matrix of GGUF weights lies in memory: shared by the host (pack, unpack, plans) and
// the kernels. MK_QUANT_LAYOUT_VERSION (minitron_kernels.h) changes when this file's offsets do.
//
// Tiles of 16 rows x 256 k, row of tiles after row of tiles; the last one of a row may be shorter,
// in quarters of 64 k. Rows are padded to 16 and k to 64 with zeros (scales too).
//
//            256 k   256 k   rest          The tile is A of 16 (4 a quarter) mma.m16n8k16, one for
//   rows    +-------+-------+----+         each `step` of 16 k. Lane 4g + t of a warp holds of it
//   0-15    | (0,0) | (0,1) |(0,2)|          h = 0, 1    slot g + 8h: packed row 16 T + 2g + h
//   16-31   | (1,0) | ...                    e = 0 ... 3 k = 256 j + 16 step + 4t + e
//           +-------+-------+----+         in the registers a[h] (e = 0, 1) and a[2 + h] (e = 2, 3)
//
// So k within a step is not in the order of the PTX ISA's picture, but x comes in the same one
// (quant_x.cuh). Packed rows 2i and 2i + 1 are one lane's: a rotation's pair, or gate and up.
//
// A pair of weights (e even in the low, e odd in the high half of a register) is taken out of a
// word by a shift and an and. The 11 low bits of an f16 are linear in its value, so small integers
// q need no conversion: "x1" is q at bit 0, q * 2^-24, "x16" is q at bit 4. The pairs a[0], a[1]
// are x1 and a[2], a[3] are x16 (8-bit ones: x1). Below, each half of a word is drawn from bit 15
// down to bit 0; s = step % 4 (in the quarter), "a1" is the pair of a[1] of that word's step:
//
//   4 bits  word s      |  a3  |  a1  |  a2  |  a0  |                      1 word a step
//   8 bits  word 2s + h: bytes e = 0, 1, 2, 3 of row slot g + 8h           2 words a step
//   5 bits  words 0, 1  | a2:5 |B| a1:5 | a0:5 |    s = 0, 1               5 words a quarter
//           word 2      |B| a2:5 | a1:5 | a0:5 |    s = 2
//           word 3      |B| a3:5 | a2:5 | a0:5 |    s = 3
//           word 4      |B| a3 of s = 1 | a3 of s = 0 | a1 of s = 3 |
//           the bits B make a3 of s = 2: its bits 0 ... 4 are of words 0, 1, 3, 2, 4
//   6 bits  word 0      | a2:6 | a3' bits 2-5 | a0:6 |    s even           3 words for 2 steps
//           word 1      | a3:6 | a1' bits 0-3 | a1:6 |    s even           (' is of s odd)
//           word 2      | a2':6 | a3' bits 0-1 : 2 | a1' bits 4-5 : 2 | a0':6 |
//   3 bits  words 0-2   as 4 bits, s = 0, 1, 2; the free fourth bits of word i are bit i of the
//                       fields of the word of s = 3                        3 words a quarter
//   2 bits  | a3':2 | a2':2 | a1':2 | a0':2 | a3:2 | a2:2 | a1:2 | a0:2 |  1 word for 2 steps
//
// A tile's sections, each a multiple of 16 bytes, c quarters long (K types: 4):
//   quants   for each piece of 4 words: lane 0's 16 bytes, lane 1's, ... (one load of a warp);
//            of 5 bits only words 0-3 of each quarter, then word 4 of lane 0: quarters 0 ... c - 1,
//            of lane 1, ...
//   scales   of g = 0: t = 0, 1, ..., of g = 1, ... Blocks have 32 k; of Q2_K, Q3_K, Q6_K 16 k.
//     simple types   t < c: f16 d of (slot g: blocks 2t, 2t + 1; slot g + 8: blocks 2t, 2t + 1);
//                    then of Q4_1, Q5_1 f16 m in the same order: 8 or 16 bytes
//     Q4_K, Q5_K     bytes: scales of block 2t of slots g, g + 8, of block 2t + 1 of g, g + 8;
//                    then the minima so: 8 bytes
//     Q2_K, Q6_K     bytes of blocks 4t + (0, 2, 1, 3) of slot g, then of slot g + 8: 8 bytes.
//                    Q2_K: scale in bits 0-3, minimum in bits 4-7. Q6_K: scale + 128
//     Q3_K           scales of 6 bits: 4 bytes a lane of their bits 0-3, then 2 bytes a lane of
//                    their bits 4-5. Of blocks 4t, 4t + 1 in the halves of the word:
//                    | g + 8, next two : 4 | g + 8 : 4 | g, blocks 4t + 2, 4t + 3 : 4 | g : 4 |
//                    and in the two bytes, in the same order: | 2 | 2 | 2 | 2 |
//   K types: f16 d (Q2_K, Q4_K, Q5_K: d, dmin) of slot g, then of slot g + 8, for g = 0 ... 7
#pragma once

#include <cstdint>

#include "minitron_kernels.h"

namespace mk {

constexpr int kQuantTileRows = 16;
constexpr int kQuantTileK = 256;
constexpr int kQuantQuarterK = 64;

// CASE(type) for each type that has kernels.
#define MK_FOR_EACH_QUANT_TYPE(CASE) \
    CASE(MK_Q4_0)                    \
    CASE(MK_Q4_1)                    \
    CASE(MK_Q5_0)                    \
    CASE(MK_Q5_1)                    \
    CASE(MK_Q8_0)                    \
    CASE(MK_Q2_K)                    \
    CASE(MK_Q3_K)                    \
    CASE(MK_Q4_K)                    \
    CASE(MK_Q5_K)                    \
    CASE(MK_Q6_K)

struct QuantFormat {
    int block_k, block_bytes;  // of a GGUF block
    int bits;                  // of a weight
    int scale_k;               // weights that share a scale: 16 or 32
    bool has_min;              // w = scale * q - min (Q4_1, Q5_1: + min), else scale * (q - offset)
    int offset;                // of q as it is packed
};
constexpr QuantFormat quant_format(int type) {
    switch (type) {
        case MK_Q4_0:
            return {32, 18, 4, 32, false, 8};
        case MK_Q4_1:
            return {32, 20, 4, 32, true, 0};
        case MK_Q5_0:
            return {32, 22, 5, 32, false, 16};
        case MK_Q5_1:
            return {32, 24, 5, 32, true, 0};
        case MK_Q8_0:
            return {32, 34, 8, 32, false, 128};
        case MK_Q2_K:
            return {256, 84, 2, 16, true, 0};
        case MK_Q3_K:
            return {256, 110, 3, 16, false, 4};
        case MK_Q4_K:
            return {256, 144, 4, 32, true, 0};
        case MK_Q5_K:
            return {256, 176, 5, 32, true, 0};
        case MK_Q6_K:
            return {256, 210, 6, 16, false, 32};
        default:
            return {};
    }
}

// ---- sizes, in bytes ----

// 64 k that a row of tiles has, and that its tile j has.
constexpr int quant_row_quarters(int k) { return (k + kQuantQuarterK - 1) / kQuantQuarterK; }
constexpr int quant_row_tiles(int k) { return (k + kQuantTileK - 1) / kQuantTileK; }
constexpr int quant_tile_quarters(int k, int j) {
    const int left = quant_row_quarters(k) - 4 * j;
    return left < 4 ? left : 4;
}

// The quants of a quarter are bits * 64 / 32 words a lane, less word 4 of 5 bits.
constexpr int quant_words(int type) { return quant_format(type).bits; }  // of a lane and quarter
constexpr int quant_fifths_offset(int quarters) { return quarters * 512; }
constexpr int quant_scales_offset(int type, int quarters) {
    return quarters * 128 * quant_words(type);
}
constexpr int quant_scales_bytes(int type, int quarters) {  // without the K types' d
    const QuantFormat f = quant_format(type);
    if (f.block_k == 32) return quarters * (f.has_min ? 128 : 64);
    return type == MK_Q3_K ? 192 : 256;
}
constexpr int quant_halves_offset(int type, int quarters) {
    return quant_scales_offset(type, quarters) + quant_scales_bytes(type, quarters);
}
constexpr int quant_tile_bytes(int type, int quarters) {
    const QuantFormat f = quant_format(type);
    const int halves = f.block_k == 32 ? 0 : f.has_min ? 64 : 32;
    return quant_halves_offset(type, quarters) + halves;
}
constexpr int64_t quant_row_tile_bytes(int type, int k) {
    const int quarters = quant_row_quarters(k);
    return static_cast<int64_t>(quarters / 4) * quant_tile_bytes(type, 4) +
           (quarters % 4 ? quant_tile_bytes(type, quarters % 4) : 0);
}
constexpr int quant_row_of_tiles(int rows) { return (rows + kQuantTileRows - 1) / kQuantTileRows; }
constexpr int64_t quant_packed_bytes(int type, int rows, int k) {
    return quant_row_of_tiles(rows) * quant_row_tile_bytes(type, k);
}
// Tile j of row of tiles T is at T * quant_row_tile_bytes + j * quant_tile_bytes(type, 4).

// The slot of packed row p in its tile.
constexpr int quant_slot(int p) { return p % 16 / 2 + p % 2 * 8; }

// What a sum of products is multiplied with in the end: small integers as f16 patterns are 2^-24 of
// their value, the integer scales of Q4_K and Q5_K another 2^-24.
constexpr float kTwo24 = 16777216.f;
constexpr float quant_unit(int type) {
    const QuantFormat f = quant_format(type);
    return f.block_k == 256 && f.scale_k == 32 ? kTwo24 * kTwo24 : kTwo24;
}

// ---- where each number is ----

// Bits [from, from + width) of a number are bits [bit, bit + width) at a place.
struct QuantBits {
    int at, bit, width, from;
};
struct QuantField {
    int count = 0;
    QuantBits bits[5] = {};
};

// Weight (h, e) of a lane and step, 0 ... 15 in the tile. `at`: which of the lane's words in the
// tile, quant_words(type) a quarter. (q is unsigned: of Q8_0 the stored byte + 128.)
constexpr QuantField quant_field(int type, int step, int h, int e) {
    const int s = step % 4, half = e % 2 * 16, a = h + e / 2 * 2;
    const int word = step / 4 * quant_words(type);
    switch (quant_words(type)) {
        case 8:
            return {1, {{word + 2 * s + h, 8 * e, 8, 0}}};
        case 4:
            return {1, {{word + s, half + (a % 2 * 2 + a / 2) * 4, 4, 0}}};
        case 2:
            return {1, {{word + s / 2, half + (s % 2 * 4 + a) * 2, 2, 0}}};
        case 3: {
            const int bit = half + (a % 2 * 2 + a / 2) * 4;
            if (s < 3) return {1, {{word + s, bit, 3, 0}}};
            return {3,
                    {{word, bit + 3, 1, 0}, {word + 1, bit + 3, 1, 1}, {word + 2, bit + 3, 1, 2}}};
        }
        case 6: {
            const int w = word + s / 2 * 3;
            if (s % 2 == 0) return {1, {{w + a % 2, half + a / 2 * 10, 6, 0}}};
            switch (a) {
                case 0:
                    return {1, {{w + 2, half, 6, 0}}};
                case 1:
                    return {2, {{w + 1, half + 6, 4, 0}, {w + 2, half + 6, 2, 4}}};
                case 2:
                    return {1, {{w + 2, half + 10, 6, 0}}};
                default:
                    return {2, {{w + 2, half + 8, 2, 0}, {w, half + 6, 4, 2}}};
            }
        }
        default: {                    // 5 bits
            const int places[4][4] = {// bits 16 * word + bit of a[0] ... a[3] of s; -1: the bits B
                                      {0, 5, 11, 64 + 5},
                                      {16 + 0, 16 + 5, 16 + 11, 64 + 10},
                                      {32 + 0, 32 + 5, 32 + 10, -1},
                                      {48 + 0, 64 + 0, 48 + 5, 48 + 10}};
            const int place = places[s][a];
            if (place >= 0) return {1, {{word + place / 16, half + place % 16, 5, 0}}};
            return {5,
                    {{word, half + 10, 1, 0},
                     {word + 1, half + 10, 1, 1},
                     {word + 3, half + 15, 1, 2},
                     {word + 2, half + 15, 1, 3},
                     {word + 4, half + 15, 1, 4}}};
        }
    }
}

// Byte offset in a tile of `quarters` of a lane's word.
constexpr int quant_word_offset(int type, int quarters, int lane, int word) {
    const int words = quant_words(type);
    if (words != 5) return (word / 4 * 32 + lane) * 16 + word % 4 * 4;
    const int quarter = word / 5, i = word % 5;
    if (i < 4) return (quarter * 32 + lane) * 16 + i * 4;
    return quant_fifths_offset(quarters) + (lane * quarters + quarter) * 4;
}

// Byte offset of an f16: d (or, is_min, m or dmin) of a slot. `block`: of the simple types, 0 ...
// 2 * quarters - 1.
constexpr int quant_half_offset(int type, int quarters, int slot, int block, bool is_min) {
    const QuantFormat f = quant_format(type);
    const int g = slot % 8, h = slot / 8;
    if (f.block_k == 32) {
        return quant_scales_offset(type, quarters) +
               (g * quarters + block / 2) * (f.has_min ? 16 : 8) + is_min * 8 + h * 4 +
               block % 2 * 2;
    }
    return quant_halves_offset(type, quarters) +
           (f.has_min ? g * 8 + h * 4 + is_min * 2 : g * 4 + h * 2);
}

// The integer scale or minimum of a block of a K type. `at`: byte offset in the tile. (Unsigned: of
// Q6_K the stored byte + 128; Q3_K's 6 bits are as stored.)
constexpr QuantField quant_scale_field(int type, int slot, int block, bool is_min) {
    const int g = slot % 8, h = slot / 8, scales = quant_scales_offset(type, 4);
    if (quant_format(type).scale_k == 32) {
        return {1, {{scales + (4 * g + block / 2) * 8 + is_min * 4 + block % 2 * 2 + h, 0, 6, 0}}};
    }
    const int lane = 4 * g + block / 4, i = block % 4;
    if (type == MK_Q3_K) {
        const int part = h * 2 + i / 2;  // of the four of a half
        return {2,
                {{scales + lane * 4 + i % 2 * 2 + part / 2, part % 2 * 4, 4, 0},
                 {scales + 128 + lane * 2 + i % 2, part * 2, 2, 4}}};
    }
    const int at = scales + lane * 8 + h * 4 + i % 2 * 2 + i / 2;
    if (type == MK_Q2_K) return {1, {{at, is_min * 4, 4, 0}}};
    return {1, {{at, 0, 8, 0}}};
}

static_assert(quant_packed_bytes(MK_Q4_0, 16, 256) == 16 * 8 * 18);
static_assert(quant_packed_bytes(MK_Q5_1, 16, 64) == 16 * 2 * 24);
static_assert(quant_packed_bytes(MK_Q8_0, 16, 192) == 16 * 6 * 34);
static_assert(quant_packed_bytes(MK_Q2_K, 16, 256) == 16 * 84);
static_assert(quant_packed_bytes(MK_Q3_K, 16, 256) == 16 * 110);
static_assert(quant_packed_bytes(MK_Q4_K, 16, 256) == 16 * 148);
static_assert(quant_packed_bytes(MK_Q5_K, 16, 256) == 16 * 180);
static_assert(quant_packed_bytes(MK_Q6_K, 16, 256) == 16 * 210);

}  // namespace mk
