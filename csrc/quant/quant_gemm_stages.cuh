// What the GEMM with quantised weights keeps in shared memory: the copies that fill it, and a
// lane's words and scales of a tile of w from there (quant_layout.h, quant_gemm_tiles.h).
#pragma once

#include "quant/quant_gemm_tiles.h"
#include "quant/quant_unpack.cuh"

namespace mk {

template <QuantGemmTile T>
struct QuantGemmShape {
    static constexpr int kThreads = quant_gemm_threads(T);
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kWarpsRows = T.rows / T.warp_rows;
    static constexpr int kWarpsTokens = T.tokens / T.warp_tokens;  // adjacent warps
    static constexpr int kBlockTiles = T.rows / kQuantTileRows;
    static constexpr int kTiles = T.warp_rows / kQuantTileRows;  // of a warp
    static constexpr int kTokens = T.warp_tokens / 8;            // MMAs of a warp
    static constexpr int kRowBlocks = T.tokens / kPreparedRows;
    static constexpr int kWarpsPerTile = kWarps / kBlockTiles;  // that copy it
    static constexpr int kXBytes = quant_gemm_x_bytes(T);
    static constexpr int kPitch = quant_gemm_pitch(T);

    // Gate, or up, of which this warp has rows.
    static __device__ __forceinline__ int matrix_of_pair() { return threadIdx.x / (kThreads / 2); }

    static_assert(T.rows % T.warp_rows == 0 && T.warp_rows % kQuantTileRows == 0);
    static_assert(T.tokens % kPreparedRows == 0 && T.warp_tokens % 8 == 0);
    static_assert(kWarps % kBlockTiles == 0, "a tile of w is copied by whole warps");
    static_assert(kWarpsTokens % kWarpsPerTile == 0, "which multiply it");
    static_assert(kWarpsRows % 2 == 0, "half of them have rows of gate");
    static_assert(T.stages <= 4 * (T.groups - 1), "a group is there a stage before its first use");
};

// Bytes in shared memory, for w of kType (quant_gemm_tiles.h).
template <int kType, QuantGemmTile T>
struct QuantGemmSmem {
    static constexpr int kSums = quant_gemm_sums_bytes(T);
    static constexpr int kSumsAt = T.stages * quant_gemm_x_bytes(T);
    static constexpr int kRow = quant_gemm_row_bytes(T);
    static constexpr int kRowsAt = kSumsAt + T.groups * kSums;
    static constexpr int kTile = quant_tile_bytes(kType, 4);
    static constexpr int kScalesAt = T.groups * kTile;             // in a row of tiles
    static constexpr int kShortTile = quant_tile_bytes(kType, 1);  // a quarter of a shorter tile
    static_assert(quant_format(kType).block_k == 256 || kTile == 4 * kShortTile);
};

// What a block multiplies: its strip of a matrix and its tile of rows of x. Of gate and up w is
// that of the warp, and up's rows are the tile's second half.
struct QuantGemmBlock {
    const QuantGemmArgs& args;
    const QuantGemmMatrix& w;
    int first_row;    // of w, of the tile
    int first_token;  // of x
};

// ---- copies ----

// This thread's part of the copies, of w of kType.
template <int kType, QuantGemmTile T>
struct QuantGemmCopy {
    using S = QuantGemmShape<T>;
    using Smem = QuantGemmSmem<kType, T>;
    static constexpr int kXPasses = kPreparedX16Bytes / (S::kThreads * 16);
    static constexpr int kSumsPasses = kPreparedSumsBytes / (S::kThreads * 16);
    static constexpr int kTilePasses =
        (Smem::kTile + 512 * S::kWarpsPerTile - 1) / (512 * S::kWarpsPerTile);

    const QuantGemmBlock& block;
    const uint8_t* w;                // the next group's first piece
    uint32_t next_x[S::kRowBlocks];  // the next stage's first piece, in pieces of 16 bytes
    uint32_t smem;

    // What follows from the thread's number is computed where it is used: registers are short.
    static __device__ __forceinline__ int thread() { return ptx::mov_u32_tid_x(); }
    static __device__ __forceinline__ int w_offset() {  // of the first piece in its tile
        return thread() / 32 % S::kWarpsPerTile * 512 + thread() % 32 * 16;
    }

    __device__ __forceinline__ QuantGemmCopy(const QuantGemmBlock& b, uint32_t to)
        : block(b), smem(to) {
        const int last_tile = (b.w.rows - 1) / kQuantTileRows;
        const int tile =
            min(b.first_row / kQuantTileRows + thread() / 32 / S::kWarpsPerTile, last_tile);
        w = b.w.tiles + tile * b.w.row_tile_bytes + w_offset();
        MK_UNROLL
        for (int i = 0; i < S::kRowBlocks; ++i) {
            next_x[i] =
                static_cast<uint32_t>(row_block(i)) * b.args.x.quarters * (kPreparedX16Bytes / 16) +
                thread();
        }
    }

    // Of the block's rows of x, 64 at a time: past m, those before are copied again.
    __device__ __forceinline__ int row_block(int i) const {
        return min(block.first_token / kPreparedRows + i, (block.args.m - 1) / kPreparedRows);
    }

    // The next 64 k, into `stage` of the ring.
    __device__ __forceinline__ void copy_x(int stage) {
        const uint32_t to = smem + stage * S::kXBytes + thread() * 16;
        MK_UNROLL
        for (int i = 0; i < S::kRowBlocks; ++i) {
            const uint8_t* const from = block.args.x.x16 + next_x[i] * uint64_t{16};
            next_x[i] += kPreparedX16Bytes / 16;
            MK_UNROLL
            for (int pass = 0; pass < kXPasses; ++pass) {
                ptx::cp_async_cg_16(to + i * kPreparedX16Bytes + pass * S::kThreads * 16,
                                    from + pass * S::kThreads * 16);
            }
        }
    }

    // Of a group of `quarters`, into `slot` of the ring.
    __device__ __forceinline__ void copy_w(int slot, int quarters) {
        const int bytes = quarters == 4 ? Smem::kTile : quarters * Smem::kShortTile;
        const uint32_t to = smem + Smem::kRowsAt + slot * Smem::kTile +
                            thread() / 32 / S::kWarpsPerTile * Smem::kRow + w_offset();
        MK_UNROLL
        for (int pass = 0; pass < kTilePasses; ++pass) {
            constexpr int kStep = S::kWarpsPerTile * 512;
            if (w_offset() + pass * kStep < bytes) {
                ptx::cp_async_cg_16(to + pass * kStep, w + pass * kStep);
            }
        }
        w += Smem::kTile;
    }

    __device__ __forceinline__ void copy_sums(int slot, int group) const {
        const PreparedX& from = block.args.x;
        const uint32_t to = smem + Smem::kSumsAt + slot * Smem::kSums + thread() * 16;
        MK_UNROLL
        for (int i = 0; i < S::kRowBlocks; ++i) {
            const uint8_t* const sums =
                from.sums + (int64_t{row_block(i)} * from.groups + group) * kPreparedSumsBytes +
                thread() * 16;
            MK_UNROLL
            for (int pass = 0; pass < kSumsPasses; ++pass) {
                ptx::cp_async_cg_16(to + i * kPreparedSumsBytes + pass * S::kThreads * 16,
                                    sums + pass * S::kThreads * 16);
            }
        }
    }
};

// ---- a tile's group in shared memory ----

// A lane's 16 bytes of x, from its piece of 512 bytes (quant_gemm_tiles.h); and of its sums, which
// on sm_90 are there as high parts, then low parts.
__device__ __forceinline__ uint4 load_b(const uint8_t* piece) {
#if MK_SM == 90
    uint32_t b[4];
    ptx::ldmatrix_x4(b, static_cast<uint32_t>(__cvta_generic_to_shared(piece)));
    return {b[0], b[1], b[2], b[3]};
#else
    return *reinterpret_cast<const uint4*>(piece);
#endif
}
__device__ __forceinline__ uint4 load_sums(const uint8_t* piece) {
    const uint4 b = load_b(piece);
    return MK_SM == 90 ? uint4{b.x, b.z, b.y, b.w} : b;
}

// This lane's words of a quarter, which take turns in the first registers: pieces of 16 bytes hold
// words of up to four quarters.
template <int kType>
struct QuantGemmWords {
    static constexpr int kBits = QuantPieces<kType>::kBits;
    static constexpr bool kHasFifths = QuantPieces<kType>::kHasFifths;
    static constexpr int kPeriod = kBits == 3 ? 4 : kBits % 4 == 2 ? 2 : 1;  // quarters of a load
    static constexpr int kPieces = kHasFifths ? 1 : kBits * kPeriod / 4;

    uint32_t words[kHasFifths ? 8 : kBits * kPeriod];

    __device__ __forceinline__ void load_piece(int first, const uint8_t* from) {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        words[first] = v.x;
        words[first + 1] = v.y;
        words[first + 2] = v.z;
        words[first + 3] = v.w;
    }

    // Quarter `quarter` of a group of `quarters`; they come in order.
    __device__ __forceinline__ void next(const uint8_t* tile, int lane, int quarter, int quarters) {
        if (quarter % kPeriod == 0) {
            MK_UNROLL
            for (int p = 0; p < kPieces; ++p) {
                load_piece(4 * p,
                           tile + quarter * (kHasFifths ? 512 : 128 * kBits) + p * 512 + lane * 16);
            }
        } else {
            MK_UNROLL
            for (int i = 0; i + kBits < kBits * kPeriod; ++i) words[i] = words[i + kBits];
        }
        if constexpr (kHasFifths) {
            if (quarter != 0) {
                MK_UNROLL
                for (int i = 4; i < 7; ++i) words[i] = words[i + 1];
            } else if (QuantScales<kType>::kIsK || quarters == 4) {
                load_piece(4, tile + 4 * 512 + lane * 16);
            } else {
                const auto* const fifths =
                    reinterpret_cast<const uint32_t*>(tile + quarters * 512) + lane * quarters;
                MK_UNROLL
                for (int q = 0; q < 3; ++q) words[4 + q] = q < quarters ? fifths[q] : 0;
            }
        }
    }

    // A of the two steps of half of the quarter.
    template <int kHalf>
    __device__ __forceinline__ void unpack(uint32_t (&a)[2][4]) const {
        uint32_t w[kBits];
        MK_UNROLL
        for (int i = 0; i < kBits; ++i) w[i] = words[i];
        QuantFragments fragments;
        unpack_quarter(w, fragments);
        MK_UNROLL
        for (int step = 0; step < 2; ++step) {
            MK_UNROLL
            for (int i = 0; i < 4; ++i) {
                a[step][i] = fragments[2 * kHalf + step][i];
                // 8 bits come as x1: times 16
                if (kBits == 8 && i >= 2) a[step][i] = ptx::mul_rn_f16x2(a[step][i], 0x4C004C00u);
            }
        }
    }
};

// In a tile of a K type.
template <int kType>
constexpr int kScalesAt = quant_scales_offset(kType, 4);
template <int kType>
constexpr int kHalvesAt = quant_halves_offset(kType, 4);

// As QuantScales::load, from shared memory.
template <int kType>
__device__ __forceinline__ QuantScales<kType> load_scales(const uint8_t* tile, int lane,
                                                          int quarters) {
    using Scales = QuantScales<kType>;
    Scales s{};
    const int g = lane / 4, t = lane % 4;
    const auto load2 = [](uint32_t (&to)[2], const uint8_t* from) {
        const uint2 v = ptx::ld_shared_v2(static_cast<uint32_t>(__cvta_generic_to_shared(from)));
        to[0] = v.x;
        to[1] = v.y;
    };
    if constexpr (Scales::kIsK) {
        const uint8_t* const scales = tile + kScalesAt<kType>;
        const uint8_t* const halves = tile + kHalvesAt<kType>;
        if constexpr (kType == MK_Q3_K) {
            s.words[0] = *reinterpret_cast<const uint32_t*>(scales + lane * 4);
            s.words[1] = *reinterpret_cast<const uint16_t*>(scales + 128 + lane * 2);
        } else {
            load2(s.words, scales + lane * 8);
        }
        if constexpr (Scales::kFormat.has_min) {
            load2(s.halves, halves + g * 8);
        } else {
            s.halves[0] = *reinterpret_cast<const uint32_t*>(halves + g * 4);
        }
    } else if (t < quarters) {
        const uint8_t* const scales = tile + quarters * 128 * QuantPieces<kType>::kBits +
                                      (g * quarters + t) * Scales::kWords * 4;
        if constexpr (Scales::kFormat.has_min) {
            const uint4 v = *reinterpret_cast<const uint4*>(scales);
            s.words[0] = v.x, s.words[1] = v.y, s.words[2] = v.z, s.words[3] = v.w;
        } else {
            load2(s.words, scales);
        }
    }
    return s;
}

}  // namespace mk
