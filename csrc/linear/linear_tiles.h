// Tiles of the linear kernels and what they take, shared by the plan and the device code.
#pragma once

#include "minitron_kernels.h"

namespace mk {

// y = x w^T, whatever the epilogue makes of it.
struct Product {
    const void* x;
    const void* w;
    const void* norm_weight;
    int64_t x_stride, w_stride;
    int32_t m, n, k;
    float eps;
    int32_t is_aligned;  // x, w and norm_weight are read 16 bytes at a time, k is a multiple of 8
};

// The argument of every linear kernel. Params: the op's struct, for the epilogue.
template <class Params>
struct LinearArgs {
    Product product;
    Params p;
};

// ---- up to 16 rows of x: linear_skinny_sm80.cuh ----
//
// A warp owns 8 columns of the output over the whole of k. The block's warps share the rows of x.

constexpr int kSkinnyRows = 16;  // M of the MMA
constexpr int kSkinnyCols = 8;   // N of the MMA, of a warp
constexpr int kSkinnyK = 128;    // of a stage: 256 bytes of each row
constexpr int kSkinnyMaxWarps = 8;
constexpr int kSkinnyRegisters = 128;  // 2 blocks an SM, for the next launch's to start under PDL

// Stages of the pipeline; one is being used, the others are in flight. With 8 warps a stage of w is
// 16 KB, with 4 it is 8 KB: 40 ... 80 KB in flight per SM, where 700 ns of latency need 13 KB on
// A100, 18 KB on H100, 38 KB on B200; Ada (4 KB) has only 99 KB of shared memory.
constexpr int skinny_stages(int sm) { return sm == 89 ? 4 : 6; }

constexpr int kSkinnyRowBytes = 2 * kSkinnyK;
constexpr int kSkinnyMaxNormK = 1 << 14;
// Shared memory in this order: stages of (rows of w, rows of x); a row of zeros; with the norm a
// scale per row, and a sum per row and group of 256 elements.
constexpr int skinny_norm_groups(int k) { return (k + 1023) / 1024 * 4; }
constexpr int skinny_smem_bytes(int sm, int warps, int rows, bool has_norm, int k) {
    return skinny_stages(sm) * (warps * kSkinnyCols + rows) * kSkinnyRowBytes + kSkinnyRowBytes +
           (has_norm ? 4 * kSkinnyRows + 4 * rows * skinny_norm_groups(k) : 0);
}
static_assert(skinny_smem_bytes(80, kSkinnyMaxWarps, kSkinnyRows, true, kSkinnyMaxNormK) <=
              163 << 10);
static_assert(skinny_smem_bytes(89, kSkinnyMaxWarps, kSkinnyRows, true, kSkinnyMaxNormK) <=
              99 << 10);

// ---- more rows: linear_gemm_sm80.cuh ----

struct GemmTile {
    int m, n, k;  // of the output, and of a stage
    int stages;
    int threads;
};
constexpr int gemm_smem_bytes(const GemmTile& t) { return t.stages * (t.m + t.n) * t.k * 2; }

// Two shapes an arch: large ones when they fill the SMs, else small ones.
constexpr GemmTile kGemmLarge = {128, 256, 64, 3, 256};
constexpr GemmTile kGemmLargeSm89 = {128, 128, 64, 3, 256};
constexpr GemmTile kGemmSmall = {64, 64, 64, 4, 128};
constexpr GemmTile gemm_large(int sm) { return sm == 89 ? kGemmLargeSm89 : kGemmLarge; }
static_assert(gemm_smem_bytes(kGemmLarge) <= 163 << 10);
static_assert(gemm_smem_bytes(kGemmLargeSm89) <= 99 << 10);
static_assert(gemm_smem_bytes(kGemmSmall) <= 99 << 10);

}  // namespace mk
