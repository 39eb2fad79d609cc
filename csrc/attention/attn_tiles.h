// Tiles of attention, shared by the plans and the kernels.
#pragma once

#include "common/tensor_map.h"
#include "minitron_kernels.h"

namespace mk {

// Prefill: a block does tile_m queries of one head, tile_n keys at a time, whose K and V wait in
// slots of shared memory. Until sm_89, and on sm_100: three slots in which K and V take turns, two
// loads ahead of the tensor cores. On sm_90: two for K and two for V, filled by a warpgroup that
// does nothing else.
struct AttnPrefillTile {
    int tile_m;
    int tile_n;
    int warps;          // tile_m / warps queries each, a multiple of 16
    int blocks_per_sm;  // that registers and shared memory have room for
    int slots;
    int producer_warps;
};
constexpr int attn_prefill_threads(AttnPrefillTile tile) {
    return 32 * (tile.warps + tile.producer_warps);
}

// What the kernel takes: the op's parameters, and what its loop would derive from them again and
// again.
struct AttnPrefillArgs {
    mk_attention_params p;
    struct Rows {
        int64_t page_bytes;  // between pages
        int64_t bytes_of_4;  // between rows 4 apart
        uint32_t bytes;      // between rows
    } k, v;
    float scale;         // softmax_scale * log2(e)
    int32_t page_shift;  // page_size = 1 << page_shift
    uint32_t page_mask;  // page_size - 1; packed: all ones, a sequence is one page
};

// sm_90's: what its blocks, which come in clusters of two, share out (attn_schedule.cuh), and
// tensor maps for TMA.
struct AttnPrefillSm90Args : AttnPrefillArgs {
    // Dimensions element, head, row (packed: token, else row of a page) and page; boxes of 64
    // elements x box_rows.
    TensorMap k_map, v_map;
    // Dimensions element, head and token; boxes of 64 elements x kAttnPrefillGroupRows tokens of q,
    // kAttnPrefillWarpRows of out.
    TensorMap q_map, out_map;
    // 0 where there is no map: strides that overlap, or fewer rows than a tile.
    int32_t box_rows, has_q_map, has_out_map;
    // The two blocks take two heads of a KV group: num_head_units pairs, units of a tile's rows.
    // Or, if a group is of an odd number, a head's two neighbouring tiles.
    int32_t num_head_units, unit_rows;
    static constexpr bool kIsFp8 = false;
};

// FP8's: a row of 128 e4m3 is to copies and tensor maps what one of 64 bf16 is, so strides of q, k
// and v in `p` and the maps count pairs of elements; p.head_dim and p.dtype are the output's.
struct AttnPrefillFp8Args : AttnPrefillSm90Args {
    struct Descale {
        const float* values;  // NULL: all 1
        int64_t stride;       // between sequences
    } q_descale, k_descale, v_descale;
    int32_t has_descale_per_q_head;  // else q has one for each KV head, as k and v
    static constexpr bool kIsFp8 = true;
};

constexpr int kAttnPrefillTileM = 128;                                // of all rows of the table
constexpr int kAttnPrefillGroupRows = 64, kAttnPrefillWarpRows = 16;  // on sm_90
constexpr int kAttnPrefillCluster = 2;
constexpr int kAttnPrefillMaxClusters = 96;  // that attn_schedule.cuh counts; an H100 has 66

// What a cluster takes at a time: how many of these heads or pairs of heads there are, and rows of
// queries.
struct AttnUnits {
    int32_t heads, rows;
};
constexpr AttnUnits attn_units(int32_t num_q_heads, int32_t num_kv_heads) {
    const bool pairs = num_q_heads / num_kv_heads % kAttnPrefillCluster == 0;
    return pairs ? AttnUnits{num_q_heads / kAttnPrefillCluster, kAttnPrefillTileM}
                 : AttnUnits{num_q_heads, kAttnPrefillTileM * kAttnPrefillCluster};
}

constexpr AttnPrefillTile attn_prefill_tile(int sm, int head_dim) {
    // 32 queries per warp: a fragment of K or V, once loaded, feeds two MMAs, which halves the
    // traffic from shared memory. Two blocks per SM, so that one's softmax runs under the other's
    // MMAs: 2 * (80 + 1) KB of A100's 164 KB. 255 registers. Issue slots over tensor time at 1024 x
    // 1024: .40 full, .44 causal; with 8 warps of 16 queries they are .47 and .52.
    if (head_dim == 128 && sm == 80) return {kAttnPrefillTileM, 64, 4, 2, 3, 0};
    // Two warpgroups of 64 queries, one's softmax under the other's MMAs, and a third that copies.
    // A wgmma of n = 128 has 64 accumulators a thread; S, O and P take 160 registers of 232. Blocks
    // stay: one per SM, 193 KB of 227.
    if (sm == 90) return {kAttnPrefillTileM, 128, 8, 1, 4, 4};
    // Ada has room for one block (100 KB): 8 warps. Its tensor cores take twice as long per MMA,
    // so that they hide the second load of each fragment. sm_100 takes the same (181 registers),
    // because with 32 queries per warp the f16 kernel spills 92 bytes when nvcc 13.5 compiles it.
    if (head_dim == 128) return {kAttnPrefillTileM, 64, 8, 1, 3, 0};
    return {kAttnPrefillTileM, 64, 4, 2, 3, 0};  // 40 KB
}

// FP8's: half the bytes in half the time, so twice the depth: four slots for K, two for V as it
// comes and two for V transposed. 180 KB.
constexpr AttnPrefillTile kAttnPrefillFp8Tile = {kAttnPrefillTileM, 128, 8, 1, 8, 4};

// Behind Q and the slots of sm_90: the output's own place, barriers, and room to align all to 1 KB.
constexpr int kAttnPrefillBarrierBytes = 128;
constexpr int attn_prefill_smem_bytes(AttnPrefillTile tile, int head_dim) {
    const int rows = tile.tile_m + tile.slots * tile.tile_n;
    if (tile.producer_warps == 0) return rows * head_dim * 2;
    return (rows + tile.tile_m) * head_dim * 2 + kAttnPrefillBarrierBytes + 1024;
}
constexpr int kAttnPrefillFp8BarrierBytes = 384;
constexpr int attn_prefill_fp8_smem_bytes(AttnPrefillTile tile, int head_dim) {
    const int rows = tile.tile_m + tile.slots * tile.tile_n;
    const int ones = 2 * 8 * tile.tile_n;  // behind V^T
    return rows * head_dim + ones + tile.tile_m * head_dim * 2 + kAttnPrefillFp8BarrierBytes + 1024;
}

// Whether a tile keeps what it claims on an SM with this much shared memory and 64K registers; a
// block takes 1 KB of shared memory for itself.
constexpr bool fits(AttnPrefillTile tile, int head_dim, int smem_per_sm_kb) {
    const int smem = attn_prefill_smem_bytes(tile, head_dim) + 1024;
    return tile.blocks_per_sm * smem <= smem_per_sm_kb * 1024 &&
           tile.tile_m % (16 * tile.warps) == 0 && tile.tile_n % tile.warps == 0 &&
           // A warp's rows, or those that it copies at a time, are of one page.
           (tile.producer_warps ? tile.tile_n % (16 * tile.producer_warps) == 0
                                : 16 % (tile.tile_n / tile.warps) == 0);
}
static_assert(fits(attn_prefill_tile(80, 64), 64, 164) &&
              fits(attn_prefill_tile(80, 128), 128, 164));
static_assert(fits(attn_prefill_tile(89, 64), 64, 100) &&
              fits(attn_prefill_tile(89, 128), 128, 100));
static_assert(fits(attn_prefill_tile(90, 64), 64, 228) &&
              fits(attn_prefill_tile(90, 128), 128, 228));
static_assert(attn_prefill_fp8_smem_bytes(kAttnPrefillFp8Tile, 128) <= 227 * 1024);
static_assert(fits(attn_prefill_tile(100, 64), 64, 228) &&
              fits(attn_prefill_tile(100, 128), 128, 228));

}  // namespace mk
