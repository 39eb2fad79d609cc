// mk_cpu_linear_quant and mk_cpu_dequantize, between the part that knows the problem
// (linear_quant.cpp) and the part that is compiled once per instruction set (quant_kernels.h).
//
// This header and quant_kernels.h include no C++ library header (see vec.h).
#pragma once

#include <stdint.h>

#include "cpu/vec.h"
#include "minitron_kernels.h"

namespace mk::cpu {

constexpr int kGroup = 256;      // columns that share a unit of x, and that are unpacked at a time
constexpr int kTileRows = 32;    // rows of w that are unpacked together: two vectors of lanes
constexpr int kBlockRows = 192;  // rows of integers that pass by an unpacked tile
// Tiles that take turns at each group of x: all but the first find it in L2.
constexpr int kTurns = 4;

// A group of a row of x as integers of 16 bits, or of 8, in the order of quant_halves.h (which
// quant_pairs.h has, too) or quant_bytes.h.
struct alignas(64) XGroup {
    uint32_t words[kGroup / 2];    // at most eight for each 16 columns; zeros past k
    int32_t sums16[kGroup / 16];   // of 16 columns each,
    int32_t sums32[kGroup / 32];   // of 32
    float units[kGroup / 32];      // of 32 columns each for 8 bits, else one
    uint32_t less16[kGroup / 16];  // quant_pairs.h: minus the products of neighbours in 16 columns,
    uint32_t less32[kGroup / 32];  // in 32; modulo 2^32
};
static_assert(sizeof(XGroup) == 768);
constexpr int kXRow = sizeof(XGroup) / sizeof(uint32_t);  // words between rows of x

// A group of 32 rows of w, unpacked: 22 KiB, or 12 in the order of bytes; meant for the L1 cache.
struct alignas(64) QuantPanel {
    uint32_t q[kGroup / 2][kTileRows];  // one or two words of each row for four columns
    float scale[kGroup / 16][kTileRows];
    float minimum[kGroup / 16][kTileRows];
    uint32_t less[kGroup / 16][kTileRows];  // quant_pairs.h: as XGroup's
};

// What a thread works in.
struct alignas(64) QuantScratch {
    QuantPanel panel;
    float sums[kTurns][kBlockRows * kTileRows];
};

// A problem whose x has been rounded. A row of x gives `limbs` rows of integers, one after the
// other: one of bf16, two of f16 and fp32; one of any with x_bits. Group g of row of integers r is
// x[g * x_rows + r].
struct QuantTask {
    mk_cpu_linear_quant_params p;
    XGroup* x;
    int64_t x_rows;
    int limbs;
};

// What multiplies; rounded x is for the same products only. Rows m are rows of x, not of integers.
struct QuantProducts {
    // Round rows m ... m_end-1 of x.
    void (*round_x)(const QuantTask& task, int64_t m, int64_t m_end);
    // Outputs [m ... m_end-1, n ... n_end-1]: at most kBlockRows of integers and kTurns tiles of w,
    // or half as many with w_up.
    void (*product)(const QuantTask& task, const mk_cpu_quant_product& product, int64_t m,
                    int64_t m_end, int64_t n, int64_t n_end, QuantScratch& scratch);
};

// The kernels of an instruction set.
struct QuantKernels {
    QuantProducts products;
    // Rows t ... t_end-1 of out.
    void (*dequantize)(const mk_cpu_dequantize_params& p, int64_t t, int64_t t_end,
                       QuantPanel& panel);
};

extern const QuantKernels kQuantBaseline;
extern const QuantKernels kQuantAvx2;
extern const QuantKernels kQuantAvx512;
extern const QuantProducts kQuantPairsAvx512;  // of 16-bit x, the same bits

}  // namespace mk::cpu
