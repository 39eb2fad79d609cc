// What mk_quant_prepare_x leaves in the workspace, and the tiles and arguments of the GEMM that
// reads it: shared by the plans and the kernels.
#pragma once

#include "quant/quant_tiles.h"

namespace mk {

// ---- the workspace ----
//
//   x16      [m / 64][k / 64][8 tiles of 8 rows][2 x 32 k][32 lanes][16 bytes]
//   sums     [m / 64][k / 256][8 tiles of 8 rows][32 lanes][16 bytes]
//   unscale  [m] floats
//
// as quant_x.cuh defines them, each 16 bytes as lane 4g + t of B takes them for row g of 8. On
// sm_90 the 512 bytes of those lanes lie as wgmma takes them without a swizzle: [step of 16 k][k %
// 16 < 8 as B's rows, and the others][8 rows][16 bytes], which ldmatrix turns into the lanes'
// pieces. m is rounded up to 64 and k to 64 or 256: what lies past them is 0.

constexpr int kPreparedRows = 64;
constexpr int kPreparedX16Bytes = kPreparedRows * kQuantQuarterK * 2;  // of 64 rows and 64 k
constexpr int kPreparedSumsBytes = kPreparedRows * 64;                 // of 64 rows and 256 k

constexpr int64_t prepared_row_blocks(int m) {
    return (int64_t{m} + kPreparedRows - 1) / kPreparedRows;
}
constexpr int64_t prepared_x16_bytes(int m, int k) {
    return prepared_row_blocks(m) * quant_row_quarters(k) * kPreparedX16Bytes;
}
constexpr int64_t prepared_sums_bytes(int m, int k) {
    return prepared_row_blocks(m) * quant_row_tiles(k) * kPreparedSumsBytes;
}
constexpr int64_t prepared_bytes(int m, int k) {
    return prepared_x16_bytes(m, k) + prepared_sums_bytes(m, k) +
           prepared_row_blocks(m) * kPreparedRows * 4;
}

// Kernels count its pieces of 16 bytes in 32 bits.
constexpr int64_t kPreparedMaxBytes = int64_t{16} << 32;

struct PreparedX {
    uint8_t* x16;
    uint8_t* sums;
    float* unscale;
    int32_t quarters, groups;  // of 64 k and of 256 k, of a row
    int32_t halves;            // of 32 k
};
inline PreparedX prepared_x(void* workspace, int m, int k) {
    auto* const x16 = static_cast<uint8_t*>(workspace);
    uint8_t* const sums = x16 + prepared_x16_bytes(m, k);
    return {x16,
            sums,
            reinterpret_cast<float*>(sums + prepared_sums_bytes(m, k)),
            quant_row_quarters(k),
            quant_row_tiles(k),
            (k + 31) / 32};
}

struct QuantPrepareArgs {
    Product product;  // without w
    PreparedX to;
};
constexpr int kPrepareRows = 8;  // of a block, and its warps: the N of an MMA

// ---- the GEMM: quant_gemm_sm80.cuh ----

// A block multiplies `rows` rows of w by `tokens` rows of x, a warp warp_rows by warp_tokens.
struct QuantGemmTile {
    int rows, tokens;
    int warp_rows, warp_tokens;
    int stages;  // of x, 64 k each
    int groups;  // of w and of x's sums, 256 k each
    int blocks_per_sm;
};
constexpr int quant_gemm_threads(const QuantGemmTile& t) {
    return t.rows / t.warp_rows * (t.tokens / t.warp_tokens) * 32;
}

// Shared memory in this order: stages of x; groups of x's sums; of each row of tiles its groups of
// w and two sets of their scales. So only what one warp needs depends on the type: of
// gate and up, each the rows of half the warps, they differ.
constexpr int quant_gemm_x_bytes(const QuantGemmTile& t) { return t.tokens * kQuantQuarterK * 2; }
constexpr int quant_gemm_sums_bytes(const QuantGemmTile& t) { return t.tokens * 64; }  // of a group
// Of a tile of w: 16 bytes of each g, 160 bytes apart for the four quarters: written by lanes 4g +
// t and read for one t, both without bank conflicts.
constexpr int kQuantGemmScalePitch = 160;
constexpr int kQuantGemmScaleBytes = 4 * kQuantGemmScalePitch;
// In place of all that, at the end: the outputs, [tokens][rows] floats.
constexpr int quant_gemm_pitch(const QuantGemmTile& t) { return t.rows * 4 + 16; }

constexpr int kQuantGemmTypes[] = {MK_Q4_0, MK_Q4_1, MK_Q5_0, MK_Q5_1, MK_Q8_0,
                                   MK_Q2_K, MK_Q3_K, MK_Q4_K, MK_Q5_K, MK_Q6_K};
constexpr int quant_gemm_row_bytes(const QuantGemmTile& t) {  // of a row of tiles, of any type
    int most = 0;
    for (const int type : kQuantGemmTypes) {
        const int bytes = t.groups * quant_tile_bytes(type, 4) + 2 * kQuantGemmScaleBytes;
        most = bytes > most ? bytes : most;
    }
    return most;
}
constexpr int quant_gemm_smem_bytes(const QuantGemmTile& t) {
    const int outputs = t.tokens * (quant_gemm_pitch(t) + kQuantEpilogueRowBytes);
    const int bytes = t.stages * quant_gemm_x_bytes(t) + t.groups * quant_gemm_sums_bytes(t) +
                      t.rows / kQuantTileRows * quant_gemm_row_bytes(t);
    return bytes > outputs ? bytes : outputs;
}

//   large   prompts. Warps of 32 x 64: 64 sums of the group and 64 of all k a thread
//   middle  on A100 N = 4096: of 512 rows of x the large one makes 128 blocks, for 108 SMs. As many
//           bytes of x from shared memory, but each weight is unpacked for 32 tokens, not for 64
//   small   few rows of w
struct QuantGemmTiles {
    QuantGemmTile large, middle, small;
};
constexpr QuantGemmTiles kQuantGemmSm80 = {
    {128, 128, 32, 64, 4, 2, 1}, {128, 64, 32, 32, 4, 2, 1}, {32, 64, 16, 32, 4, 3, 2}};
constexpr QuantGemmTiles kQuantGemmSm89 = {
    {64, 128, 32, 32, 2, 2, 1}, {}, {32, 64, 16, 32, 2, 2, 2}};
constexpr QuantGemmTiles kQuantGemmSm100 = {
    {128, 128, 32, 64, 4, 2, 1}, {}, {32, 64, 16, 32, 4, 3, 3}};  // sm_90: the small one
constexpr const QuantGemmTiles& quant_gemm_tiles(int sm) {
    return sm == 80 ? kQuantGemmSm80 : sm == 89 ? kQuantGemmSm89 : kQuantGemmSm100;
}

constexpr bool quant_gemm_tile_fits(const QuantGemmTile& t, int kilobytes) {
    return t.blocks_per_sm * (quant_gemm_smem_bytes(t) + 1024) <= kilobytes * 1024;
}
static_assert(quant_gemm_tile_fits(kQuantGemmSm80.large, 164));
static_assert(quant_gemm_tile_fits(kQuantGemmSm80.middle, 164));
static_assert(quant_gemm_tile_fits(kQuantGemmSm80.small, 164));
static_assert(quant_gemm_tile_fits(kQuantGemmSm89.large, 100));
static_assert(quant_gemm_tile_fits(kQuantGemmSm89.small, 100));
static_assert(quant_gemm_tile_fits(kQuantGemmSm100.large, 228));
static_assert(quant_gemm_tile_fits(kQuantGemmSm100.small, 228));

// ---- on Hopper: quant_gemm_sm90.cuh ----

// A block multiplies kQuantGemmRowsSm90 rows of w by `tokens` rows of x: two warpgroups have 64
// rows each, a third one copies.
struct QuantGemmTileSm90 {
    int tokens;
    int stages;  // of x, 64 k each, or its sums of 256 k
    int slots;   // of w, 256 k each
};
constexpr int kQuantGemmRowsSm90 = 128;
constexpr int kQuantGemmThreadsSm90 = 384;
constexpr int kQuantGemmWarpsSm90 = kQuantGemmRowsSm90 / kQuantTileRows;  // that multiply
constexpr QuantGemmTileSm90 kQuantGemmTilesSm90[] = {{128, 5, 2}, {64, 10, 3}};

// Shared memory in this order: stages of x, slots of w, scales of each warp's tile;
// of each warpgroup kQuantStagedTokens rows of its outputs, and where the rows go; the totals of
// the rows of x from 64 on; barriers.
constexpr int kQuantStagedTokens = 32;
constexpr int kQuantStagedPitch = 64 * 4 + 16;  // in other banks for rows 2, 4 and 6 further
constexpr int kQuantRowPitchSm90 = kQuantEpilogueRowBytes + 8;  // and 2^-e of the row
constexpr int quant_gemm_x_bytes(const QuantGemmTileSm90& t) {
    return t.tokens * kQuantQuarterK * 2;
}
constexpr int kQuantGemmSlotBytes = kQuantGemmWarpsSm90 * quant_tile_bytes(MK_Q8_0, 4);
constexpr int quant_gemm_group_out_bytes(const QuantGemmTileSm90& t) {
    return kQuantStagedTokens * kQuantStagedPitch + t.tokens * kQuantRowPitchSm90;
}
constexpr int quant_gemm_totals_bytes(const QuantGemmTileSm90& t) {
    return (t.tokens - 64) * kQuantGemmRowsSm90 * 4;
}
constexpr int quant_gemm_barriers_at(const QuantGemmTileSm90& t) {
    return t.stages * quant_gemm_x_bytes(t) + t.slots * kQuantGemmSlotBytes +
           kQuantGemmWarpsSm90 * kQuantGemmScaleBytes + 2 * quant_gemm_group_out_bytes(t) +
           quant_gemm_totals_bytes(t);
}
constexpr int quant_gemm_smem_bytes(const QuantGemmTileSm90& t) {
    return quant_gemm_barriers_at(t) + 16 * (t.stages + t.slots);
}
static_assert(quant_gemm_smem_bytes(kQuantGemmTilesSm90[0]) <= 227 << 10 &&
              quant_gemm_smem_bytes(kQuantGemmTilesSm90[1]) <= 227 << 10);

// Rows of x that the blocks of a strip of w share while they are in L2, as in linear_tiles.h.
constexpr int kQuantGemmGroupRows = 2048;

struct QuantGemmMatrix {
    const uint8_t* tiles;
    int64_t row_tile_bytes;
    int32_t type, rows;
    int32_t tile_bytes;   // of 256 k
    float unit;           // quant_unit
    int32_t first_row;    // of the output's columns
    int32_t first_strip;  // of the grid
};

struct QuantGemmArgs {
    PreparedX x;
    int32_t m;
    int32_t strips;   // of w
    int32_t cluster;  // blocks that share rows of x, on sm_90
    int32_t num_matrices;
    int32_t is_pair;       // gate and up: a strip has as many rows of each, half the tile's
    QuantGemmMatrix w[3];  // Q, K and V
    Outputs to;
};

}  // namespace mk
