// wgmma.mma_async of one warp, its quarter of the warpgroup's 64 rows, as pure functions.
//
// A step of k takes 32 bytes of each row of A and column of B. Elements are unpacked to doubles, in
// which products are exact; all products of a step
// and the accumulator are summed at once and the sum is truncated to fp32 (H100 sums 16 products of
// 16 bits at once), or of fp8 added in fewer bits (fp8_sums.h). f16 accumulators are rounded once
// more, integers are exact.
#pragma once

#include <cstdint>

#include "mma.h"

namespace emu {

constexpr int kWgmmaRows = 16;   // of a warp
constexpr int kWgmmaBytes = 32;  // of k

struct WgmmaOp {
    int n;
    MmaType a, b, acc;
    bool satfinite;
    bool negate;  // the products
    int k() const;
};

// `rows` rows of A, or columns of B, one behind the other, 32 bytes each: out[k][rows].
void wgmma_unpack(MmaType type, const uint32_t* words, int rows, double* out);
// The same from 16 k of `rows` 16-bit elements each (the other major-ness).
void wgmma_unpack_transposed(MmaType type, const uint16_t* halves, int rows, double* out);

// d += a b for a[k][16] and b[k][n]; with `zero`, d = a b. d: the registers, rows of 32 lanes: for
// each 8 columns those of mma.sync's C, in order.
void wgmma_multiply(const WgmmaOp& op, const double* a, const double* b, bool zero,
                    uint32_t* const* d);

// A matrix in shared memory, as its descriptor has it.
struct WgmmaDescriptor {
    uint32_t start, leading, stride;  // bytes
    uint32_t base_offset;
    uint32_t mode;  // 0 none, 1: 128, 2: 64, 3: 32 bytes
    explicit WgmmaDescriptor(uint64_t bits);
    uint32_t span() const { return mode ? 256u >> mode : 16; }  // bytes of a row of an atom
    // Addresses of 16 times 16 bytes, those of rows 8 * group ... 8 * group + 7. k-major: for each
    // row its two halves; mn-major: for each of 16 k.
    void k_major(uint32_t group, uint32_t* at) const {
        const uint32_t half = mode ? 16 : leading;
        for (uint32_t i = 0; i < 16; ++i)
            at[i] = swizzle(start + i / 2 * span() + group * stride + i % 2 * half);
    }
    void mn_major(uint32_t group, uint32_t* at) const {
        const uint32_t atom = span() / 16;  // groups
        const uint32_t of_rows = mode ? group % atom * 16 + group / atom * leading : group * stride;
        const uint32_t of_k = mode ? stride : leading;  // of eight k
        for (uint32_t k = 0; k < 16; ++k)
            at[k] = swizzle(start + of_rows + k % 8 * span() + k / 8 * of_k);
    }

  private:
    // The XOR takes absolute address bits: the pattern lies in memory, not in the tile.
    uint32_t swizzle(uint32_t address) const {
        const uint32_t mask = mode ? (8u >> (mode - 1)) - 1 : 0;
        return address ^ (address >> 7 & mask) << 4;
    }
};

}  // namespace emu
