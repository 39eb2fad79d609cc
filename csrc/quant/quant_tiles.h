// Tiles of the products with quantised weights and what the kernels take, shared by the plan and
// the device code.
#pragma once

#include "linear/linear_tiles.h"
#include "quant/quant_layout.h"

namespace mk {

constexpr int kQuantEpilogueRowBytes = 32;  // at most, of an Epilogue::Row

// ---- up to 64 rows of x: quant_decode_sm80.cuh ----

// A packed matrix, or one of several that make one: rows of tiles first ... end - 1 are its. Of
// gate and up both begin at 0.
struct QuantDecodeMatrix {
    int32_t end, first;
    int32_t type;
    float unit;  // quant_unit
    int32_t row_tile_bytes;
    int32_t tile_bytes;  // of 256 k
    int64_t step;        // from a block's row of tiles to its next one
    const uint8_t* tiles;
};
constexpr int kMaxQuantDecodeMatrices = 3;  // Q, K, V

constexpr int kQuantTokens = 8;  // of an MMA
constexpr int quant_token_tiles(int m) { return m > kQuantTokens ? 2 : 1; }

// More than 16 rows of x go in parts, as equal as they can be, of which a block has one
// (blockIdx.y). All blocks run at once: w crosses DRAM once, and L2 gives it to each of the parts.
constexpr int kQuantPartRows = 16;
constexpr int quant_parts(int m) { return (m + kQuantPartRows - 1) / kQuantPartRows; }
constexpr int quant_part_rows(int m) { return (m + quant_parts(m) - 1) / quant_parts(m); }
static_assert(quant_part_rows(kQuantPartRows + 1) > kQuantTokens);  // those of 8 have one part

// 8 warps of up to 255 registers: the ten types together take up to 245 (12 warps of 168 spill in
// some of the entries, 16 of 128 in all). With a tile each on its way they
// have 18 KB of Q4_K in flight, what H100 needs for its DRAM; A100 needs 13 KB.
constexpr int kQuantWarps = 8;
constexpr int kQuantThreads = 32 * kQuantWarps;

// Bytes of w that a block asks L2 for before it waits for x (and of more than 8 rows, before it
// converts a chunk): while that is done, 2 us or so, DRAM has work.
constexpr int kQuantPrefetchBytes = 64 << 10;

// Shared memory in this order:
//   896 B    of each row: where its outputs go, 2^-e, the largest sums of squares of its shares,
//            its norm scale
//   8 KB     scales of two tiles of each warp, which take turns (quant_decode_sm80.cuh)
//   x        m rows of chunk_groups groups of 256 k (quant_x.cuh), quant_x_stride apart
//   sums     of the tiles under way, 16 rows x 8 (or 16) tokens fp32 a group; before that the
//            norm's sums of squares. Or in the place of x, see QuantDecodeShape
//   totals   of these tiles, as large as the sums of a group, if k goes in chunks
constexpr int kQuantScaleBytes = 32 * 16;                   // of a tile: 16 of each lane
constexpr int kQuantRowPitch = kQuantEpilogueRowBytes + 8;  // of an Epilogue::Row: other banks
constexpr int kQuantRowsBytes = 256 + kQuantPartRows * kQuantRowPitch;
constexpr int kQuantFixedBytes = kQuantRowsBytes + kQuantWarps * 2 * kQuantScaleBytes;
constexpr int kQuantXGroupBytes = 512 + 64;   // of a row of x
constexpr int kQuantQuadK = 4 * kQuantTileK;  // whose squares are added together, quant_x.cuh
constexpr int kQuantKeptQuads = 4;            // of a warp, in 64 registers
// 64 (mod 128), see quant_x.cuh.
constexpr int quant_x_stride(int groups) {
    return groups * kQuantXGroupBytes + (groups % 2 ? 0 : 64);
}
// From the sums of a group's tile to those of the next group: as in x, whose place they may take.
constexpr int quant_slot_bytes(int m) {
    return quant_token_tiles(m) == 1 ? kQuantXGroupBytes : 1024;
}

// As many of the warps as there are for a row, but 4 groups for each: fewer repeat what a warp does
// once.
constexpr int quant_x_shares(int m, int groups, int warps) {
    const int most = groups < 8 ? 1 : groups / 4;
    const int of_row = m < warps ? warps / m : 1;
    return of_row < most ? of_row : most;
}

// How a block goes over its tiles: in rounds of round_tiles, of which all groups (or chunks of
// them) are multiplied by the warps, and then added. Chunks are for x that does not fit, or leaves
// room for few sums: 8 rows of 4096 and 99 KB would take 6 rounds of one tile, in which no warp has
// more than two groups, and take 2 chunks of 8 groups of all 6. Each round of chunks converts x
// again. None of it changes a bit.
//
// Up to 8 rows a warp holds x of a column in registers, and nobody needs it in memory any more if
// the column is all that warp's, of one matrix and in one round: then the column's sums take its
// place, and 6 rows of tiles of 4096 fit 99 KB with x of 8 rows.
//
// Of gate and up that are matrices of their own a row of tiles is a pair of them: the rows
// `together`.
struct QuantDecodeShape {
    int32_t part_rows;    // of x, of a block; the last part may have fewer
    int32_t num_tiles;    // rows of tiles of all matrices
    int32_t together;     // 2: pairs of them
    int32_t least_tiles;  // of a block; the first blocks_with_more have one more
    int32_t blocks_with_more;
    int32_t num_groups;    // of 256 k, of a row
    int32_t num_quarters;  // of 64 k
    int32_t chunk_groups, num_chunks;
    int32_t cluster;  // blocks that convert x together, each a part of it for all: 1 or 2
    int32_t x_stride;
    int32_t x_shares;   // warps that convert a row of x together: each x_share_k elements to
    int32_t x_share_k;  // find the largest, and x_share_groups of a chunk
    int32_t x_share_groups;
    int32_t keeps_x;  // in registers: shares are a few whole quads, and are converted once
    int32_t round_tiles, num_rounds;  // of the block with most tiles
    int32_t num_turns;                // rounds of all chunks: of each chunk one
    int32_t sums_at;                  // from x on
    int32_t sums_row_bytes;           // from one row of tiles to the next one
    int32_t round_bytes;  // from one round's to the next one's, where there are two buffers
    int32_t totals_at;    // from the sums
    int32_t smem_bytes;
};
// Groups of a row of x that L2 gives an SM, at 28 bytes a clock, in the time that a round waits for
// its first loads of w and for its last warp (1000 clocks).
constexpr int kQuantRoundGroups = 55;

// most_blocks: of a cluster.
constexpr QuantDecodeShape quant_decode_shape(int m, int k, int num_tiles, int num_matrices,
                                              int num_blocks, int most_blocks, int smem_bytes,
                                              int together = 1) {
    QuantDecodeShape s{};
    s.part_rows = m;
    s.num_tiles = num_tiles;
    s.together = together;
    s.least_tiles = num_tiles / num_blocks;
    s.blocks_with_more = num_tiles % num_blocks;
    s.num_groups = quant_row_tiles(k);
    s.num_quarters = quant_row_quarters(k);
    const int block_tiles = (num_tiles + num_blocks - 1) / num_blocks;
    const int slot = quant_slot_bytes(m);
    const auto set_chunks = [&](int count) {
        s.num_chunks = count;
        s.chunk_groups = (s.num_groups + count - 1) / count;
        s.cluster = count == 1 ? most_blocks : 1;
        s.x_stride = quant_x_stride(s.chunk_groups);
        s.x_shares = quant_x_shares(m, s.chunk_groups, kQuantWarps * s.cluster);
        const int quads = (k + kQuantQuadK - 1) / kQuantQuadK;
        s.x_share_k = (quads + s.x_shares - 1) / s.x_shares * kQuantQuadK;
        s.x_share_groups = (s.chunk_groups + s.x_shares - 1) / s.x_shares;
        s.keeps_x =
            count == 1 && k % kQuantQuadK == 0 && s.x_share_k <= kQuantKeptQuads * kQuantQuadK;
        if (s.keeps_x) {
            s.x_share_groups = s.x_share_k / kQuantTileK;
            s.x_shares = (k + s.x_share_k - 1) / s.x_share_k;  // none without any
        }
    };
    // Enough for every warp to have two groups, and for the sums of squares of a norm.
    const int least = 2 * kQuantWarps * slot;

    set_chunks(1);
    if (m <= kQuantTokens && num_matrices == 1 && s.num_groups % kQuantWarps == 0) {
        const int64_t rows = block_tiles > m ? block_tiles : m, bytes = rows * s.x_stride;
        const int64_t smem = kQuantFixedBytes + (bytes < least ? least : bytes);
        if (smem <= smem_bytes) {
            s.round_tiles = block_tiles;
            s.num_rounds = s.num_turns = 1;
            s.sums_row_bytes = s.x_stride;
            s.smem_bytes = static_cast<int32_t>(smem);
            return s;
        }
    }
    QuantDecodeShape best{};
    int64_t least_cost = 0;
    for (int chunks = 1; chunks <= s.num_groups; ++chunks) {
        set_chunks(chunks);
        s.sums_at = m * s.x_stride;
        s.sums_row_bytes = s.chunk_groups * slot;
        const int64_t fixed = kQuantFixedBytes + int64_t{m} * s.x_stride;
        const int64_t left = smem_bytes - fixed;
        const int64_t tile = int64_t{together} * s.sums_row_bytes;
        const int total = chunks > 1 ? together * slot : 0;
        int64_t tiles = left / (tile + total);  // that fit
        if (chunks == 1 && tiles < block_tiles) tiles /= 2;
        if (s.chunk_groups > 1 && (tiles < 1 || left < least)) continue;
        if (tiles > block_tiles) tiles = block_tiles;
        s.num_rounds = static_cast<int32_t>((block_tiles + tiles - 1) / tiles);
        s.round_tiles = (block_tiles + s.num_rounds - 1) / s.num_rounds;
        s.num_turns = chunks * s.num_rounds;
        const int64_t round = s.round_tiles * tile;
        const bool is_double = chunks == 1 && s.num_rounds > 1;
        s.round_bytes = is_double ? static_cast<int32_t>(round) : 0;
        s.totals_at = static_cast<int32_t>(round);
        const int64_t sums = (is_double ? 2 : 1) * round + s.round_tiles * total;
        s.smem_bytes = static_cast<int32_t>(fixed + (sums < least ? least : sums));
        const auto cost_of = [&](int rounds, int64_t conversions) {
            return int64_t{chunks} * rounds * kQuantRoundGroups + conversions * m * s.num_groups;
        };
        const int64_t cost = cost_of(s.num_rounds, chunks > 1 ? s.num_rounds : 1);
        if (best.num_chunks == 0 || cost < least_cost) {
            best = s;
            least_cost = cost;
        }
        if (cost_of(1, 1) >= least_cost) break;  // more chunks only save rounds
    }
    return best;
}
// The norm's sums of squares fit the least of the sums.
static_assert(norm_group_bytes(8, kMaxNormK) <= 2 * kQuantWarps * quant_slot_bytes(8));
static_assert(norm_group_bytes(16, kMaxNormK) <= 2 * kQuantWarps * quant_slot_bytes(16));
// Minitron-8B's products at 16 rows fit Ada, whose blocks have 99 KB: in chunks.
static_assert(quant_decode_shape(16, 11520, 256, 1, 142, 1, 99 << 10).smem_bytes <= 99 << 10);
static_assert(quant_decode_shape(8, 4096, 720, 1, 120, 1, 99 << 10).num_chunks == 1);
static_assert(quant_decode_shape(8, 4096, 384, 3, 128, 1, 99 << 10).num_chunks == 2 &&
              quant_decode_shape(8, 4096, 384, 3, 128, 1, 99 << 10).num_rounds == 1);
// Gate and up of 64 rows, in 4 parts: x is converted twice on Ada, and once on Hopper.
static_assert(quant_decode_shape(16, 4096, 1440, 1, 35, 1, 99 << 10).num_rounds == 2);
static_assert(quant_decode_shape(16, 4096, 1440, 1, 33, 1, 227 << 10).num_rounds == 1);

struct QuantDecodeArgs {
    Product product;  // w is NULL
    QuantDecodeMatrix w[kMaxQuantDecodeMatrices];
    int32_t num_matrices;
    QuantDecodeShape shape;
    Outputs to;
};

}  // namespace mk
