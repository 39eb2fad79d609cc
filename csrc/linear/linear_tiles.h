// Tiles of the linear kernels and what they take, shared by the plan and the device code.
#pragma once

#include "common/tensor_map.h"
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

// The argument of a kernel that serves one product. Params: the op's struct, for the epilogue.
template <class Params>
struct LinearArgs {
    Product product;
    Params p;
};

// What becomes of the sums, of kernels that serve all three products (linear_epilogue.cuh).
enum class EpilogueKind : int32_t { kPlain, kSwiglu, kQkv };
struct Outputs {
    EpilogueKind kind;
    int32_t dtype;
    union {
        mk_linear_params linear;
        mk_qkv_rope_append_params qkv;
    };
};

// The argument of linear_gemm_sm80.cuh.
struct LinearGemmArgs {
    Product product;
    Outputs to;
};

// With a norm: linear_norm.cuh.
constexpr int kMaxNormK = 1 << 14;
constexpr int kNormQuad = 4 * 256;  // elements whose sums of squares are kept as one float4
constexpr int norm_group_bytes(int rows, int k) { return 16 * rows * ((k - 1) / kNormQuad + 1); }

// ---- up to 16 rows of x: linear_skinny_sm80.cuh ----
//
// A warp owns 8 columns of the output over the whole of k. The block's warps share the rows of x.

constexpr int kSkinnyRows = 16;  // M of the MMA
constexpr int kSkinnyCols = 8;   // N of the MMA, of a warp
constexpr int kSkinnyK = 128;    // of a stage: 256 bytes of each row
constexpr int kSkinnyMaxWarps = 8;
constexpr int kSkinnyBlocksPerSm = 2;  // registers: the next launch's block starts under PDL

// Stages of the pipeline; one is being used, the others are in flight. With 8 warps a stage of w is
// 16 KB, with 4 it is 8 KB: 40 ... 80 KB in flight per SM, where 700 ns of latency need 13 KB on
// A100, 18 KB on H100, 38 KB on B200; Ada (4 KB) has only 99 KB of shared memory.
constexpr int skinny_stages(int sm) { return sm == 89 ? 4 : 6; }

constexpr int kSkinnyRowBytes = 2 * kSkinnyK;
// Shared memory in this order: stages of (rows of w, rows of x); a row of zeros; with the norm a
// scale per row, and the sums of each quad of groups of 256 elements (rms_norm_row.cuh).
constexpr int skinny_smem_bytes(int sm, int warps, int rows, bool has_norm, int k) {
    return skinny_stages(sm) * (warps * kSkinnyCols + rows) * kSkinnyRowBytes + kSkinnyRowBytes +
           (has_norm ? 4 * kSkinnyRows + norm_group_bytes(rows, k) : 0);
}
static_assert(skinny_smem_bytes(80, kSkinnyMaxWarps, kSkinnyRows, true, kMaxNormK) <= 163 << 10);
static_assert(skinny_smem_bytes(89, kSkinnyMaxWarps, kSkinnyRows, true, kMaxNormK) <= 99 << 10);

// ---- more rows: linear_gemm_sm80.cuh ----

// A block makes m x n outputs from stages of k; a warp warp_m x warp_n of them.
struct GemmTile {
    int m, n, k;
    int stages;
    int warp_m, warp_n;
    int blocks_per_sm;
};
constexpr int gemm_threads(const GemmTile& t) { return t.m / t.warp_m * (t.n / t.warp_n) * 32; }
// A tile that takes norm_weight: no more rows than one of its blocks has.
constexpr bool gemm_has_norm(const GemmTile& t) { return t.m == MK_LINEAR_MAX_NORM_M; }
constexpr int gemm_stage_bytes(const GemmTile& t) { return (t.m + t.n) * t.k * 2; }
// The stages, then the scale of each row. The group sums lie in the last stage before its first
// use.
constexpr int gemm_smem_bytes(const GemmTile& t) {
    return t.stages * gemm_stage_bytes(t) + (gemm_has_norm(t) ? 4 * t.m : 0);
}

// Three shapes, each as deep as the arch's shared memory allows:
//   large    most MMAs per byte read from shared memory and L2: prompts
//   middle   the same warp tile, two blocks an SM: where large ones would leave too many SMs idle
//            in their last round
//   small    few rows, where w's bytes count: two blocks keep 128 KB per SM in flight (A100), of
//            which half is w, and 64 columns still give N = 4096 to 64 SMs
// A thread copies half as many rows of a stage of 32 k as of one of 64, and keeps a pointer to
// each: with 128 sums a thread, 64 take 254 registers and spill on some architectures, 32 take 246.
struct GemmTiles {
    GemmTile large, middle, small;
};
constexpr GemmTiles kGemmSm80 = {
    {128, 256, 32, 6, 64, 64, 1}, {128, 128, 32, 5, 64, 64, 2}, {64, 64, 64, 5, 32, 32, 2}};
constexpr GemmTiles kGemmSm89 = {
    {128, 256, 32, 4, 64, 64, 1}, {128, 128, 32, 3, 64, 64, 2}, {64, 64, 64, 3, 32, 32, 2}};
constexpr GemmTiles kGemmSm100 = {
    {128, 256, 32, 8, 64, 64, 1}, {128, 128, 32, 6, 64, 64, 2}, {64, 64, 64, 7, 32, 32, 2}};
constexpr const GemmTiles& gemm_tiles(int sm) {
    return sm == 80 ? kGemmSm80 : sm == 89 ? kGemmSm89 : kGemmSm100;
}

// An SM has `kilobytes` of shared memory, of which each block takes 1 for itself.
constexpr bool gemm_tile_fits(const GemmTile& t, int kilobytes) {
    return t.blocks_per_sm * (gemm_smem_bytes(t) + 1024) <= kilobytes * 1024 &&
           (!gemm_has_norm(t) || norm_group_bytes(t.m, kMaxNormK) <= gemm_stage_bytes(t));
}
constexpr bool gemm_tiles_fit(const GemmTiles& t, int kilobytes) {
    return gemm_tile_fits(t.large, kilobytes) && gemm_tile_fits(t.middle, kilobytes) &&
           gemm_tile_fits(t.small, kilobytes);
}
static_assert(gemm_tiles_fit(kGemmSm80, 164));
static_assert(gemm_tiles_fit(kGemmSm89, 100));
static_assert(gemm_tiles_fit(kGemmSm100, 228));

// Rows of x that the tiles of a column of w share while they are in L2 (16 MB at k = 4096).
constexpr int kGemmGroupRows = 2048;

// ---- more than 64 rows on Hopper: linear_gemm_sm90.cuh ----

constexpr int kGemmStageK = 64;  // 128 bytes of each row: what wgmma's swizzle permutes

// Tiles of m x n by two warpgroups with 64 rows each, and one that copies.
struct GemmTileSm90 {
    int m, n;
    int stages;
};
constexpr int kGemmSm90Threads = 384;
constexpr int gemm_stage_bytes(const GemmTileSm90& t) { return (t.m + t.n) * kGemmStageK * 2; }
// In this order: the stages, 1024-byte aligned; two barriers per stage.
constexpr int gemm_smem_bytes(const GemmTileSm90& t) {
    return 1024 + t.stages * gemm_stage_bytes(t) + t.stages * 16;
}

// As many stages as there is room for, 192 to 224 KB, of which one stage is in use. 192 columns
// leave fewer SMs idle in the last round of some shapes: 6144 columns of 512 rows are 128 tiles of
// them.
constexpr GemmTileSm90 kGemmTilesSm90[] = {
    {128, 256, 4}, {128, 192, 5}, {128, 128, 7}, {128, 64, 9}};
static_assert(gemm_smem_bytes(kGemmTilesSm90[0]) <= 227 << 10 &&
              gemm_smem_bytes(kGemmTilesSm90[1]) <= 227 << 10 &&
              gemm_smem_bytes(kGemmTilesSm90[2]) <= 227 << 10 &&
              gemm_smem_bytes(kGemmTilesSm90[3]) <= 227 << 10);

// Blocks of a cluster, m x n, share the rows that they have in common: of x along n, of w along m.
struct GemmCluster {
    int32_t m, n;
};
constexpr GemmCluster kGemmClusters[] = {{1, 1}, {2, 1}, {1, 2}, {4, 1}, {2, 2}, {1, 4}};

// Pairs of columns that adjoin in a thread's sums (linear_output_sm90.cuh): those that make 16
// bytes of outputs, of a rotation's halves 8 each. Of SwiGLU a pair makes one. 1: none adjoin.
constexpr int kPairsOf16Bit = 4, kPairsOfF32 = 2, kPairsOfSwiglu = 8, kPairsOfQkv = 4;

// How the output is divided; the last clusters may reach past it.
struct GemmGridSm90 {
    GemmCluster cluster;
    int32_t clusters_m, clusters_n;
    int32_t group;  // clusters along m that take w's rows together, while L2 has these
    int32_t pairs;
};

struct LinearGemmSm90Args {
    Product product;
    Outputs to;
    GemmGridSm90 grid;
    TensorMap x_map, w_map;  // boxes of the rows of a stage that a block fetches
};

}  // namespace mk
