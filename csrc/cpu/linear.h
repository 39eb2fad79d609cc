// mk_cpu_linear, between the part that knows the problem (linear.cpp) and the part that is compiled
// once per instruction set (linear_kernels.h).
//
// This header and linear_kernels.h include no C++ library header (see vec.h).
#pragma once

#include <stdint.h>

#include "cpu/vec.h"
#include "minitron_kernels.h"

namespace mk::cpu {

static_assert(kLanes == 16);     // partial sums of an output
constexpr int kBlockM = 144;     // rows of x,
constexpr int kBlockN = 48;      // rows of w,
constexpr int kBlockK = 768;     // and columns of both, that a thread works on at a time
constexpr int kStreamMaxM = 48;  // rows of x up to which w is read where it lies
constexpr int kSumsSize = kBlockM * kBlockN;
constexpr int kStreamMaxN = kSumsSize / kStreamMaxM;

// What a thread works in, meant for its L2 cache: 200 KiB, and 430 KiB more when k > kBlockK.
struct alignas(64) Scratch {
    float w[kBlockN * kBlockK];         // a block of w in fp32, in panels
    float partial[kSumsSize * kLanes];  // partial sums between two blocks of columns
    float sums[2][kSumsSize];           // of w, and of w_up
};

// A problem whose x has been packed: in fp32, zeros after column k, in tiles of tile_m rows (the
// last may have fewer). A tile is stored by 16 columns: those of its first row, of its second, ...
// Of bfloat16 the odd 16 of 32 columns come before the even ones; or it stays as it is, in place of
// 16 floats 32 columns. With many rows all of them come by blocks of columns.
struct LinearTask {
    mk_cpu_linear_params p;
    float* packed_x;
    int64_t packed_k;  // floats of a row
};

// The kernels of an instruction set.
struct LinearKernels {
    int tile_m;
    bool multiplies_bf16;  // which stays as it is
    // Pack rows m ... m_end-1 of x; m is a multiple of tile_m.
    void (*pack_x)(const LinearTask& task, int64_t m, int64_t m_end);
    // Outputs [all rows, n ... n_end-1], reading w where it lies: rows <= kStreamMaxM,
    // n_end - n <= kStreamMaxN.
    void (*stream)(const LinearTask& task, int64_t n, int64_t n_end, Scratch& scratch);
    // Outputs [m ... m_end-1, n ... n_end-1], at most a block of them; m is a multiple of tile_m.
    void (*block)(const LinearTask& task, int64_t m, int64_t m_end, int64_t n, int64_t n_end,
                  Scratch& scratch);
};

extern const LinearKernels kLinearBaseline;
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvx512;
extern const LinearKernels kLinearAvx512Bf16;

}  // namespace mk::cpu
