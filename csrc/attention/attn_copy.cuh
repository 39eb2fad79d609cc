// Copies of rows of Q, K and V to shared memory by cp.async, and where a sequence's pages are.
#pragma once

#include "attention/attn_smem.cuh"
#include "attention/attn_tiles.h"
#include "common/static_for.cuh"
#include "ptx/sm80.cuh"

namespace mk {

// How a warp copies rows of a tile: 4 rows x 128 bytes an instruction, 16 bytes a lane.
template <class Layout, int kHeadDim>
struct RowCopy {
    static constexpr int kRows = 4;                            // of an instruction
    static constexpr int kPieces = kRowBytes<kHeadDim> / 128;  // of a row
    static constexpr int kPair = 2 * kRows * Layout::kPitch;   // smem of two instructions' rows

    uint32_t smem;  // destination of this lane's chunk of rows 0-3

    // `smem_rows` is the first row's address; the row's number in its tile is a multiple of 8.
    __device__ explicit RowCopy(uint32_t smem_rows) : smem(smem_rows + Layout::at(row(), byte())) {}

    static __device__ int row() { return threadIdx.x % 32 / 8; }   // of this lane, 0 ... 3
    static __device__ int byte() { return threadIdx.x % 8 * 16; }  // in a piece

    // Destination in rows 0-3, 8-11, ... (is_odd 0), or 4-7, ... (1), kPair apart.
    __device__ uint32_t to(uint32_t slot, int is_odd) const {
        const uint32_t even = smem + slot;
        return is_odd ? (even ^ 64) + kRows * Layout::kPitch : even;
    }

    // `from`: this lane's row and byte; step: bytes between rows 4 apart. All kNumRows rows.
    template <int kNumRows>
    __device__ __forceinline__ void all(uint32_t slot, const uint8_t* from, int64_t step) const {
        static_for<kNumRows / kRows>([&](auto i) {
            static_for<kPieces>([&](auto piece) {
                ptx::cp_async_cg_16<i / 2 * kPair + piece * Layout::kPiecePitch, piece * 128>(
                    to(slot, i % 2), from);
            });
            from += step;
        });
    }

    // Rows begin <= r < end of the kNumRows; the others become 0.
    template <int kNumRows>
    __device__ __forceinline__ void some(uint32_t slot, const uint8_t* from, int64_t step,
                                         int begin, int end) const {
        static_for<kNumRows / kRows>([&](auto i) {
            const int r = row() + i * kRows;
            const int bytes = begin <= r && r < end ? 16 : 0;
            static_for<kPieces>([&](auto piece) {
                ptx::cp_async_cg_16<i / 2 * kPair + piece * Layout::kPiecePitch, piece * 128>(
                    to(slot, i % 2), from, bytes);
            });
            from += step;
        });
    }

    template <int kNumRows>
    __device__ __forceinline__ void fill(uint32_t slot, uint4 value) const {
        static_for<kNumRows / kRows>([&](auto i) {
            static_for<kPieces>([&](auto piece) {
                ptx::st_shared_v4<i / 2 * kPair + piece * Layout::kPiecePitch>(to(slot, i % 2),
                                                                               value);
            });
        });
    }
};

constexpr int kBadPage = INT32_MIN;

// The page that has key `key` of a sequence; kBadPage if there is none.
__device__ __forceinline__ int page_of_key(const AttnPrefillArgs& args, int sequence, int key) {
    const mk_attention_params& p = args.p;
    const int column = key >> args.page_shift;
    const int32_t* const pages = p.block_table + sequence * p.block_table_stride;
    const int found = column < p.max_pages ? pages[column] : -1;
    return static_cast<uint32_t>(found) < static_cast<uint32_t>(p.num_pages) ? found : kBadPage;
}

}  // namespace mk
