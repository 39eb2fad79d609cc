// Tile constants of attention_decode and its split rule, shared by the plan and the kernel. One row
// serves every arch: the kernel is bound by DRAM, and 48 KB of shared memory per block, all of it
// the ring of loads, let sm_89 hold two blocks, sm_80 three, sm_90 and sm_100 four.
#pragma once

#include "common/tensor_map.h"
#include "minitron_kernels.h"

#ifdef __CUDACC__
#define MK_HOST_DEVICE __host__ __device__
#else
#define MK_HOST_DEVICE
#endif

namespace mk {

constexpr int kAttnDecodeWarps = 4;
constexpr int kAttnDecodeThreads = 32 * kAttnDecodeWarps;
// Keys of a tile: the k of one MMA. The smallest page holds one, so no tile spans two pages.
constexpr int kAttnDecodeTileKeys = 16;
constexpr int kAttnDecodeMaxSeqlenQ = 8;

// Rows of a block (queries of a KV group, as the n of the MMA, 8 at a time) come in two instances:
// one between them would save arithmetic only. 8 rows keep q in registers, 32 in shared memory.
constexpr int kAttnDecodeFewRows = 8;
constexpr int kAttnDecodeManyRows = 32;

// Until sm_89, and on sm_100. A unit is a tile of K or of V; a warp's ring holds kUnits of them,
// and all but one are in flight. Latency of 700 ns needs 13 KB in flight per SM on A100, 18 KB on
// H100, 38 KB on B200.
//
//   head_dim  rows | units  ring | smem of a block | blocks per SM (sm_80, 89, 90, 100)
//   128        8   |   3   12 KB |    48 KB        | 3, 2, 3, 3 (registers)
//   64         8   |   6   12 KB |    48 KB        | 3, 2, 3, 3 (registers)
//   128       32   |   2    8 KB |    40 KB        | 2, 2, 2, 2 (registers)
//   64        32   |   4    8 KB |    36 KB        | 2, 2, 2, 2 (registers)
template <int kHeadDim_, int kRows_>
struct AttnDecodeTile {
    static constexpr int kHeadDim = kHeadDim_, kRows = kRows_;
    static constexpr bool kQInRegisters = kRows == kAttnDecodeFewRows;
    static constexpr int kRowBytes = 2 * kHeadDim;
    static constexpr int kPitch = kRowBytes;  // of a unit's rows
    static constexpr int kUnitBytes = kAttnDecodeTileKeys * kRowBytes;
    static constexpr int kRingBytes = kQInRegisters ? 12 << 10 : 8 << 10;
    static constexpr int kUnits = kRingBytes / kUnitBytes;
    // Where q is staged: in warp 0's last unit before it is loaded, or behind the rings.
    static constexpr int kRingsBytes = kAttnDecodeWarps * kRingBytes;
    static constexpr int kQOffset = kQInRegisters ? kRingBytes - kUnitBytes : kRingsBytes;
    static constexpr int kSmemBytes = kRingsBytes + (kQInRegisters ? 0 : kRows * kRowBytes);
    static constexpr int kBlocksPerSm = kQInRegisters ? 3 : 2;

    // In a unit: 16-byte chunk `chunk` of row `row`, and the 16 columns number `step` of the rows
    // that a lane addresses for ldmatrix.
    MK_HOST_DEVICE static constexpr int chunk_at(int row, int chunk) {
        return row * kPitch + (chunk ^ row % 8) * 16;
    }
    MK_HOST_DEVICE static constexpr uint32_t block(uint32_t smem, int step) {
        return smem ^ static_cast<uint32_t>(step * 32);
    }

    static_assert(kUnits >= 2 && kUnits * kUnitBytes == kRingBytes);
    static_assert(kRows * kRowBytes <= kUnitBytes || !kQInRegisters);
    static_assert(kSmemBytes <= 48 << 10, "the most that needs no opt-in; two blocks on sm_89");
};

// On sm_90 a unit's loads are one or two boxes of TMA and no lane's registers, so a ring can be
// deep. 90 % of an H100's bandwidth (3.02 TB/s) have 3.0 MB under way in 1 us, DRAM's latency under
// load, or 23 KB on each of 132 SMs. Two blocks of an SM have seven times that in flight, all but
// the units in use. It is few blocks that need it: a sequence of 1024 keys has 32 (8 KV heads x 4
// splits), with 2.6 MB in flight, where sm_80's rings would have 1.0 MB.
//
//   head_dim  rows | slots   ring | smem of a block
//   128        8   |   3    24 KB |  4 * 24 + 2 (q) + 1.25 (barriers, alignment)
//   128       32   |   3    24 KB |  4 * 24 + 8     + 1.25
//   64        8    |   6    24 KB |  4 * 24 + 1 + 1.25; 32 rows: + 4
//
// A slot has a tile of K and of V: units of panels of 64 columns, as TMA's 128-byte swizzle wants.
template <int kHeadDim_, int kRows_>
struct AttnDecodeSm90Tile {
    static constexpr int kHeadDim = kHeadDim_, kRows = kRows_;
    static constexpr bool kQInRegisters = kRows == kAttnDecodeFewRows;
    static constexpr int kRowBytes = 2 * kHeadDim;
    static constexpr int kPitch = 128;  // of a panel's rows
    static constexpr int kPanelBytes = kAttnDecodeTileKeys * kPitch;
    static constexpr int kUnitBytes = kAttnDecodeTileKeys * kRowBytes;
    static constexpr int kRingBytes = 24 << 10;
    static constexpr int kSlots = kRingBytes / (2 * kUnitBytes);
    static constexpr int kRingsBytes = kAttnDecodeWarps * kRingBytes;
    static constexpr int kQOffset = kRingsBytes;
    static constexpr int kEventsOffset = kQOffset + kRows * kRowBytes;
    static constexpr int kEventsBytes = 2 * 8 * kAttnDecodeWarps * kSlots;
    static constexpr int kSmemBytes = kEventsOffset + kEventsBytes + 1024;  // to align it
    static constexpr int kBlocksPerSm = 2;

    MK_HOST_DEVICE static constexpr int chunk_at(int row, int chunk) {
        return chunk / 8 * kPanelBytes + row * kPitch + (chunk % 8 ^ row % 8) * 16;
    }
    MK_HOST_DEVICE static constexpr uint32_t block(uint32_t smem, int step) {
        return (smem ^ static_cast<uint32_t>(step % 4 * 32)) + step / 4 * kPanelBytes;
    }

    static_assert(kSlots * 2 * kUnitBytes == kRingBytes);
    static_assert(kBlocksPerSm * (kSmemBytes + 1024) <= 228 << 10);
};

// ---- The split rule: a function of the number of keys and of the window ----
// A split writes and reads back rows * (head_dim + 2) floats. With 4 rows and about 270 keys that
// is 2.9 % of the split's K and V; fewer keys would fill more SMs, at the price of more traffic.
constexpr int kAttnDecodeMaxSplits = 32;  // the lanes of a warp, which weigh them
constexpr int kAttnDecodeSplitKeys = 272;

// At most this many splits for a span of keys; never decreases with it.
MK_HOST_DEVICE constexpr int attn_decode_max_splits(int64_t span) {
    const int64_t splits = (span + 64) / kAttnDecodeSplitKeys;
    return splits < 1                      ? 1
           : splits > kAttnDecodeMaxSplits ? kAttnDecodeMaxSplits
                                           : static_cast<int>(splits);
}

// Keys of each split but the last: whole tiles.
MK_HOST_DEVICE constexpr int attn_decode_chunk(int span) {
    const int splits = attn_decode_max_splits(span);
    const int tiles = (span + kAttnDecodeTileKeys - 1) / kAttnDecodeTileKeys;
    return (tiles + splits - 1) / splits * kAttnDecodeTileKeys;
}

// The first key that is split over: of the tile with the first one that the longest query block
// could see, so that it does not depend on the number of queries.
MK_HOST_DEVICE constexpr int attn_decode_span_begin(int num_keys, int window) {
    const int64_t first = static_cast<int64_t>(num_keys) - kAttnDecodeMaxSeqlenQ - window + 1;
    if (window == 0 || first < 0) return 0;
    return static_cast<int>(first) / kAttnDecodeTileKeys * kAttnDecodeTileKeys;
}

// ---- Arguments ----

// What the kernel takes: the op's parameters, and what the host derives from them.
struct AttnDecodeArgs {
    mk_attention_decode_params p;
    float scale_log2;        // softmax_scale * log2(e)
    int32_t group;           // query heads of a KV head
    int32_t row_blocks;      // blocks that share the rows of a KV group
    int32_t rows_per_block;  // rows that a partial result has in the workspace
    int32_t max_splits;      // partial results that a sequence has room for
    int32_t page_shift;      // log2(page_size)
    int32_t rope_is_vector;  // rotary_dim and tables allow 16-byte loads
    int64_t stats_offset;    // bytes from the counters to the partial results' statistics
    int64_t partial_offset;  // and to their sums
};

// sm_90's: tensor maps of the caches, of elements, heads, keys of a page and pages, whose boxes are
// 64 elements of one head and 16 keys. has_maps is 0 where strides overlap, which TMA does not
// take.
struct AttnDecodeSm90Args : AttnDecodeArgs {
    TensorMap k_map, v_map;
    int32_t has_maps;
};

}  // namespace mk
