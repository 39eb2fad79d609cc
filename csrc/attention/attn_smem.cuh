// Tiles of Q, K and V in shared memory: rows of head_dim 2-byte elements, in chunks of 16 bytes,
// chunk c of row r at c ^ (r % 8) (of each 128 bytes).
//
// Any 8 rows of one chunk column (ldmatrix), and any 8 chunks of a row (copies), are then in
// different banks. And the address of a chunk 2j to the right is the first one's ^ 32j: a lane
// needs no more than four addresses for a tile of whatever size, the rest is in immediates.
#pragma once

#include "common/entry.cuh"

namespace mk {

template <int kHeadDim>
constexpr int kRowBytes = kHeadDim * 2;

// Byte `byte` of row `row` of a tile.
template <int kHeadDim>
__device__ __forceinline__ int swizzled(int row, int byte) {
    return row * kRowBytes<kHeadDim> + (byte ^ (row % 8 * 16));
}

// The two ways in which a tile's pieces of 128 bytes lie: those of a row side by side (above), for
// ldmatrix, or those of all rows (a panel), which is wgmma's layout with its swizzle of 128 bytes.
template <int kHeadDim>
struct WholeRows {
    static constexpr int kPitch = kRowBytes<kHeadDim>;  // of rows
    static constexpr int kPiecePitch = 128;
    static __device__ __forceinline__ int at(int row, int byte) {
        return swizzled<kHeadDim>(row, byte);
    }
};
template <int kRows>
struct Panels {
    static constexpr int kPitch = 128;
    static constexpr int kPiecePitch = kRows * kPitch;
    static __device__ __forceinline__ int at(int row, int byte) {
        return byte / 128 * kPiecePitch + swizzled<64>(row, byte % 128);
    }
};

// What lane l of a warp adds to a tile's address for ldmatrix.x4 of the 16x16 elements at its row
// 0, byte 0: matrices 0, 1 are rows 0-7, 8-15 of the first eight columns, 2, 3 of the next.
template <int kHeadDim>
__device__ __forceinline__ int ldmatrix_lane_offset() {
    const int lane = threadIdx.x % 32;
    return swizzled<kHeadDim>(lane % 16, lane / 16 * 16);
}

// The same with matrices 1 and 2 changed over. An MMA takes B as two neighbouring registers: those
// of K, whose rows are B's columns, come in this order, those of V, transposed, in the other.
template <int kHeadDim>
__device__ __forceinline__ int ldmatrix_lane_offset_of_columns() {
    const int lane = threadIdx.x % 32;
    return swizzled<kHeadDim>(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 16);
}

// Address of 16x16 block number j of a row of blocks, given that of block 0, without
// block_immediate, which is 128 bytes for every four.
__device__ __forceinline__ uint32_t block_address(uint32_t first, int j) {
    return first ^ (j % 4 * 32);
}
__device__ constexpr int block_immediate(int j) { return j / 4 * 128; }

}  // namespace mk
