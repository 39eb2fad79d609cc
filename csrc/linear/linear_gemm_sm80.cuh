// y = x w^T for more than 16 rows of x:  x [m, k] and w [n, k], both along k, y in fp32.
//
//         w  n0 ......... n0 + T.n         block: one T.m x T.n tile of y, all of k
//   x     +------+------+------+-----+     warp:  T.warp_m x T.warp_n of it, in registers
//   m0    | warp |      |      |     |     grid:  tiles in groups of kGemmGroupRows rows of x; in
//   ...   +------+------+------+-----+            a group m first, so that w crosses DRAM once a
//   + T.m |      |      |      |     |            group, and x stays in L2
//         +------+------+------+-----+
// k ascends in groups of 16 into one accumulator per output, whatever the tile (see the header).
//
// Shared memory: T.stages times [x: T.m rows][w: T.n rows] of T.k; on A100 6 x 24 KB (large), twice
// 5 x 16 KB (middle, small). After the sums: Epilogue::Row of each row, 16 rows of sums per warp.
// The small tile takes a norm (linear_norm.cuh), the others' x was normalised by a launch before.
//
// Pipeline: stage t + stages - 1 is copied while t is multiplied. The last step of 16 k waits for
// stage t + 1, passes the block's only barrier, and loads the first fragments of t + 1: those of x
// are a step ahead in a second set, those of w replace what the MMAs have just used. Rows past m
// and n repeat the last row, pieces past k are filled with 0: the loop has no branch but its end.
// Unrolled over the stages, every shared address is a register plus a constant. In SASS 32 k of a
// warp's 64x64 are 64 HMMA, 16 LDSM, 6 LDGSTS, 17 others: 0.20 issue slots per slot of tensor time
// (whole kernel at k = 4096: 0.25 by its PTX, without mov). No bank conflicts, no local memory.
//
// Lost: two sets of w's fragments too: 255 registers and spills. 64 k a stage: 12 row pointers a
// thread, 254 registers, spills on sm_90 and sm_100. Outputs rounded in registers and staged as
// 16-byte vectors: 8100 instructions a kernel instead of 3400; pairs fill the same sectors.
#pragma once

#include "common/swizzle.cuh"
#include "linear/linear_epilogue.cuh"
#include "linear/linear_norm.cuh"
#include "ptx/sm90.cuh"

namespace mk {

template <GemmTile T>
struct GemmShape {
    static constexpr int kWarpsN = T.n / T.warp_n;
    static constexpr int kThreads = gemm_threads(T);
    static constexpr int kSmemBytes = gemm_smem_bytes(T);
    static constexpr bool kHasNorm = gemm_has_norm(T);
    static constexpr int kSteps = T.k / 16;         // MMAs along a stage
    static constexpr int kBlocksM = T.warp_m / 16;  // MMAs of a warp
    static constexpr int kBlocksN = T.warp_n / 8;
    static constexpr int kPieces = T.k / kVec;  // of a row of a stage
    static constexpr int kRowsPerPass = kThreads / kPieces;
    static constexpr int kPassesX = T.m / kRowsPerPass;
    static constexpr int kPassesW = T.n / kRowsPerPass;
    static constexpr int kRowBytes = T.k * 2;
    static constexpr int kXBytes = T.m * kRowBytes;
    static constexpr int kStageBytes = gemm_stage_bytes(T);

    static_assert(T.m % T.warp_m == 0 && T.n % T.warp_n == 0 && T.warp_m % 16 == 0);
    static_assert(T.warp_n % 16 == 0, "ldmatrix.x4 takes 16 rows of w");
    static_assert(kSteps % 2 == 0, "the two sets of fragments alternate");
    static_assert(kRowsPerPass % 8 == 0 && T.m % kRowsPerPass == 0 && T.n % kRowsPerPass == 0);
};

// This thread's part of the copies: piece `piece` of every kRowsPerPass'th row.
template <GemmTile T>
struct GemmCopy {
    using S = GemmShape<T>;
    const uint16_t* x[S::kPassesX];
    const uint16_t* w[S::kPassesW];
    int k_left;     // from this thread's piece of stage 0 of the round
    uint32_t smem;  // where its first row of stage 0 goes

    __device__ __forceinline__ GemmCopy(const Product& a, int m0, int n0, uint32_t smem_ring) {
        const int row = threadIdx.x / S::kPieces;
        const int piece = threadIdx.x % S::kPieces;
        const auto rows = [&](const void* from, int64_t stride, int first, int last, auto& to) {
            for (int i = 0; i < sizeof(to) / sizeof(to[0]); ++i) {
                const int64_t r = min(first + row + i * S::kRowsPerPass, last);
                to[i] = static_cast<const uint16_t*>(from) + r * stride + piece * kVec;
            }
        };
        rows(a.x, a.x_stride, m0, a.m - 1, x);
        rows(a.w, a.w_stride, n0, a.n - 1, w);
        k_left = a.k - piece * kVec;
        smem = smem_ring + swizzled<S::kPieces>(row, piece);
    }

    // Pass i of stage `stage` of the ring, from `ahead` stages past the round's start.
    __device__ __forceinline__ void copy_x(int i, int stage, int ahead) const {
        ptx::cp_async_cg_16(smem + stage * S::kStageBytes + i * S::kRowsPerPass * S::kRowBytes,
                            x[i] + ahead * T.k, k_left > ahead * T.k ? 16 : 0);
    }
    __device__ __forceinline__ void copy_w(int i, int stage, int ahead) const {
        ptx::cp_async_cg_16(
            smem + stage * S::kStageBytes + S::kXBytes + i * S::kRowsPerPass * S::kRowBytes,
            w[i] + ahead * T.k, k_left > ahead * T.k ? 16 : 0);
    }
    // Passes first ... last - 1, those of x before those of w.
    __device__ __forceinline__ void copy(int first, int last, int stage, int ahead) const {
        MK_UNROLL
        for (int i = first; i < last; ++i) {
            i < S::kPassesX ? copy_x(i, stage, ahead) : copy_w(i - S::kPassesX, stage, ahead);
        }
    }

    __device__ __forceinline__ void next_round() {
        MK_UNROLL
        for (int i = 0; i < S::kPassesX; ++i) x[i] += T.stages * T.k;
        MK_UNROLL
        for (int i = 0; i < S::kPassesW; ++i) w[i] += T.stages * T.k;
        k_left -= T.stages * T.k;
    }
};

// 16 rows (two 8x8 matrices) by 16 k per ldmatrix.x4, from the address of this lane's row.
template <int kRowBytes, int kBlocks>
__device__ __forceinline__ void load_fragments(uint32_t (&to)[kBlocks][4], uint32_t smem) {
    MK_UNROLL
    for (int i = 0; i < kBlocks; ++i) ptx::ldmatrix_x4(to[i], smem + i * 16 * kRowBytes);
}

template <GemmTile T>
using GemmSums = float[GemmShape<T>::kBlocksM][GemmShape<T>::kBlocksN][4];

// The norm's weights of this thread's piece, `ahead` stages past the round's start.
template <GemmTile T>
__device__ __forceinline__ Vec8 load_norm_weight(const Product& a, const GemmCopy<T>& copy,
                                                 int ahead) {
    if (copy.k_left <= ahead * T.k) return {};
    return load8<true, Reuse::kOften>(a.norm_weight, a.k - copy.k_left + ahead * T.k, a.k);
}

// Normalise the pieces of x in a stage that this thread copied, of rows that exist.
template <class Dtype, GemmTile T>
__device__ __forceinline__ void normalise_stage(uint8_t* smem, int stage, int num_rows,
                                                const Vec8& norm_weight) {
    using S = GemmShape<T>;
    const int first = threadIdx.x / S::kPieces;
    const auto* const scale = reinterpret_cast<const float*>(smem + T.stages * S::kStageBytes);
    uint8_t* piece =
        smem + stage * S::kStageBytes + swizzled<S::kPieces>(first, threadIdx.x % S::kPieces);
    for (int r = first; r < num_rows; r += S::kRowsPerPass) {
        store_piece(piece, normalise<Dtype>(load_piece(piece), scale[r], norm_weight));
        piece += S::kRowsPerPass * S::kRowBytes;
    }
}

template <class Dtype, GemmTile T>
__device__ __forceinline__ void gemm_sums(const Product& a, int m0, int n0, uint8_t* smem,
                                          GemmSums<T>& sums) {
    using S = GemmShape<T>;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const uint32_t smem_ring = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
    const int num_rows = min(T.m, a.m - m0);
    const bool has_norm = S::kHasNorm && a.norm_weight;

    // ldmatrix: matrices (rows 0-7, 8-15) x (k 0-7, 8-15) in the order of the MMA's registers.
    const int x_row = warp / S::kWarpsN * T.warp_m + lane % 16;
    const int w_row = warp % S::kWarpsN * T.warp_n + lane / 16 * 8 + lane % 8;
    const uint32_t smem_x = smem_ring + swizzled<S::kPieces>(x_row, lane / 16);
    const uint32_t smem_w = smem_ring + S::kXBytes + swizzled<S::kPieces>(w_row, lane / 8 % 2);

    GemmCopy<T> copy(a, m0, n0, smem_ring);
    constexpr int kPasses = S::kPassesX + S::kPassesW;
    ptx::griddepcontrol_wait();  // the kernel before may have written w, too
    MK_UNROLL
    for (int t = 0; t < T.stages - 1; ++t) {
        copy.copy(0, kPasses, t, t);
        ptx::cp_async_commit_group();
    }

    Vec8 norm_weight{};  // for the next stage
    if (has_norm) {
        row_scales<Dtype>(a, m0, num_rows,
                          reinterpret_cast<float4*>(smem + (T.stages - 1) * S::kStageBytes),
                          reinterpret_cast<float*>(smem + T.stages * S::kStageBytes));
        norm_weight = load_norm_weight<T>(a, copy, 0);
    }

    uint32_t frag_x[2][S::kBlocksM][4];
    uint32_t frag_w[S::kBlocksN / 2][4];
    ptx::cp_async_wait_group<T.stages - 2>();
    if (has_norm) normalise_stage<Dtype, T>(smem, 0, num_rows, norm_weight);
    __syncthreads();
    load_fragments<S::kRowBytes>(frag_x[0], smem_x);
    load_fragments<S::kRowBytes>(frag_w, smem_w);

    constexpr int kCopySteps = S::kSteps - 1;
    const int num_tiles = (a.k + T.k - 1) / T.k;
    for (int tile = 0;; copy.next_round()) {
        MK_UNROLL
        for (int stage = 0; stage < T.stages; ++stage) {
            MK_UNROLL
            for (int step = 0; step < S::kSteps; ++step) {
                const bool is_last = step == S::kSteps - 1;
                if (has_norm && step == 0) norm_weight = load_norm_weight<T>(a, copy, stage + 1);
                if (is_last) {
                    ptx::cp_async_wait_group<T.stages - 2>();
                    if (has_norm) {
                        normalise_stage<Dtype, T>(smem, (stage + 1) % T.stages, num_rows,
                                                  norm_weight);
                    }
                    __syncthreads();
                }
                const int next = is_last ? 0 : step + 1;
                const int next_stage = (stage + is_last) % T.stages * S::kStageBytes;
                load_fragments<S::kRowBytes>(frag_x[next % 2], (smem_x ^ next * 32) + next_stage);
                if (!is_last) {
                    copy.copy(kPasses * step / kCopySteps, kPasses * (step + 1) / kCopySteps,
                              (stage + T.stages - 1) % T.stages, stage + T.stages - 1);
                }
                if (step == kCopySteps - 1) ptx::cp_async_commit_group();
                MK_UNROLL
                for (int j = 0; j < S::kBlocksN / 2; ++j) {
                    MK_UNROLL
                    for (int i = 0; i < S::kBlocksM; ++i) {
                        Dtype::mma(sums[i][2 * j], frag_x[step % 2][i], frag_w[j][0], frag_w[j][1]);
                        Dtype::mma(sums[i][2 * j + 1], frag_x[step % 2][i], frag_w[j][2],
                                   frag_w[j][3]);
                    }
                    ptx::ldmatrix_x4(frag_w[j],
                                     (smem_w ^ next * 32) + next_stage + j * 16 * S::kRowBytes);
                }
            }
            if (++tile == num_tiles) return;
        }
    }
}

// The sums of 16 rows of a warp at a time go through shared memory, after which a lane has a pair
// of adjacent columns and the next lane the next pair: whole sectors of outputs, residuals and
// rotation tables, and one row or two per instruction.
template <GemmTile T, class Epilogue>
__device__ __forceinline__ void gemm_store(const Epilogue& epilogue, int m, int m0, int n0,
                                           uint8_t* smem, const GemmSums<T>& sums) {
    using S = GemmShape<T>;
    using Row = typename Epilogue::Row;
    constexpr int kRowsBytes = (T.m * sizeof(Row) + 127) / 128 * 128;
    constexpr int kStagedBytes = 16 * T.warp_n * sizeof(float);  // of a warp
    constexpr int kPairs = T.warp_n / 2;
    static_assert(kRowsBytes + S::kThreads / 32 * kStagedBytes <= S::kSmemBytes);
    static_assert(32 % kPairs == 0);

    const int num_rows = min(T.m, m - m0);
    Row* const rows = reinterpret_cast<Row*>(smem);
    for (int r = threadIdx.x; r < num_rows; r += S::kThreads) rows[r] = epilogue.row(m0 + r);
    __syncthreads();

    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int warp_row = warp / S::kWarpsN * T.warp_m;
    const auto column = epilogue.column(n0 + warp % S::kWarpsN * T.warp_n + lane % kPairs * 2);
    uint8_t* const staged = smem + kRowsBytes + warp * kStagedBytes;
    // Pair `pair` of row r of the 16; four pairs make 32 bytes, which the XOR moves as one.
    const auto place = [&](int r, int pair) -> float2& {
        return *reinterpret_cast<float2*>(staged + r * T.warp_n * 4 + ((pair / 4) ^ (r % 4)) * 32 +
                                          pair % 4 * 8);
    };
    MK_UNROLL
    for (int i = 0; i < S::kBlocksM; ++i) {
        MK_UNROLL
        for (int j = 0; j < S::kBlocksN; ++j) {
            place(lane / 4, j * 4 + lane % 4) = {sums[i][j][0], sums[i][j][1]};
            place(lane / 4 + 8, j * 4 + lane % 4) = {sums[i][j][2], sums[i][j][3]};
        }
        __syncwarp();
        const int first = warp_row + i * 16;
        const int end = min(16, num_rows - first);
        _Pragma("unroll 4") for (int r = lane / kPairs; r < end; r += 32 / kPairs) {
            const float2 y = place(r, lane % kPairs);
            epilogue.store(rows[first + r], column, y.x, y.y);
        }
        __syncwarp();
    }
}

template <class Dtype, GemmTile T>
__device__ __forceinline__ void linear_gemm(const LinearGemmArgs& args) {
    extern __shared__ __align__(128) uint8_t smem[];
    ptx::griddepcontrol_launch_dependents();
    const Product& a = args.product;
    const int tiles_m = (a.m + T.m - 1) / T.m;
    const int tiles_n = (a.n + T.n - 1) / T.n;
    constexpr int kGroup = kGemmGroupRows / T.m;
    const int group = blockIdx.x / (kGroup * tiles_n) * kGroup;
    const int in_group = blockIdx.x % (kGroup * tiles_n);
    const int height = min(kGroup, tiles_m - group);
    const int m0 = (group + in_group % height) * T.m;
    const int n0 = in_group / height * T.n;

    GemmSums<T> sums{};
    gemm_sums<Dtype, T>(a, m0, n0, smem, sums);
    ptx::cp_async_wait_group<0>();  // the zeros past the last stage
    __syncthreads();
    with_epilogue<Dtype>(args.to, [&](const auto& epilogue) __attribute__((always_inline)) {
        gemm_store<T>(epilogue, a.m, m0, n0, smem, sums);
    });
}

}  // namespace mk
