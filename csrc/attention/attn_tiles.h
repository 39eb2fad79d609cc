// Tiles of attention, shared by the plans and the kernels.
#pragma once

#include "minitron_kernels.h"

namespace mk {

// Prefill: a block does tile_m queries of one head, tile_n keys at a time; K and V take turns in a
// ring of kAttnPrefillSlots tiles, two loads ahead of the tensor cores.
//   smem = (tile_m of Q + 3 * tile_n) * head_dim * 2 bytes
struct AttnPrefillTile {
    int tile_m;
    int tile_n;
    int warps;          // tile_m / warps queries each, a multiple of 16
    int blocks_per_sm;  // that registers and shared memory have room for
};

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

constexpr int kAttnPrefillSlots = 3;
constexpr int kAttnPrefillTileM = 128;  // of all rows of the table

constexpr AttnPrefillTile attn_prefill_tile(int sm, int head_dim) {
    // 32 queries per warp: a fragment of K or V, once loaded, feeds two MMAs, which halves the
    // traffic from shared memory. Two blocks per SM, so that one's softmax runs under the other's
    // MMAs: 2 * (80 + 1) KB of A100's 164 KB. 255 registers. Issue slots over tensor time at 1024 x
    // 1024: .40 full, .44 causal; with 8 warps of 16 queries they are .47 and .52.
    if (head_dim == 128 && (sm == 80 || sm == 90)) return {kAttnPrefillTileM, 64, 4, 2};
    // Ada has room for one block (100 KB): 8 warps. Its tensor cores take twice as long per MMA,
    // so that they hide the second load of each fragment. sm_100 takes the same (181 registers),
    // because with 32 queries per warp the f16 kernel spills 92 bytes when nvcc 13.5 compiles it.
    if (head_dim == 128) return {kAttnPrefillTileM, 64, 8, 1};
    return {kAttnPrefillTileM, 64, 4, 2};  // 40 KB
}

constexpr int attn_prefill_smem_bytes(AttnPrefillTile tile, int head_dim) {
    return (tile.tile_m + kAttnPrefillSlots * tile.tile_n) * head_dim * 2;
}

// Whether a tile keeps what it claims on an SM with this much shared memory and 64K registers; a
// block takes 1 KB of shared memory for itself.
constexpr bool fits(AttnPrefillTile tile, int head_dim, int smem_per_sm_kb) {
    const int smem = attn_prefill_smem_bytes(tile, head_dim) + 1024;
    return tile.blocks_per_sm * smem <= smem_per_sm_kb * 1024 &&
           tile.tile_m % (16 * tile.warps) == 0 && tile.tile_n % tile.warps == 0 &&
           16 % (tile.tile_n / tile.warps) == 0;  // a warp's rows are of one page
}
static_assert(fits(attn_prefill_tile(80, 64), 64, 164) &&
              fits(attn_prefill_tile(80, 128), 128, 164));
static_assert(fits(attn_prefill_tile(89, 64), 64, 100) &&
              fits(attn_prefill_tile(89, 128), 128, 100));
static_assert(fits(attn_prefill_tile(90, 64), 64, 228) &&
              fits(attn_prefill_tile(90, 128), 128, 228));
static_assert(fits(attn_prefill_tile(100, 64), 64, 228) &&
              fits(attn_prefill_tile(100, 128), 128, 228));

}  // namespace mk
