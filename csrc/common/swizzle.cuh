// Rows of shared memory without bank conflicts.
#pragma once

namespace mk {

// Byte offset of 16-byte piece `piece` of row `row` in a matrix of kPieces pieces a row. Eight rows
// at one piece, or one row (two, four) of 128 bytes at all, lie in eight different groups of banks.
template <int kPieces>
__device__ __forceinline__ int swizzled(int row, int piece) {
    static_assert(kPieces == 2 || kPieces == 4 || kPieces == 8);
    return (row * kPieces + (piece ^ (row / (8 / kPieces) % kPieces))) * 16;
}

}  // namespace mk
