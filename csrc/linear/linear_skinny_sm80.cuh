// y = x w^T for up to 16 rows of x, bound by the bytes of w: each is read once.
//
//   output    columns |  tile 0   |  tile 1   | ...     a tile = `warps` strips of 8 columns
//   (m <= 16)         |w0|w1|..|w7|w0|w1|..|w7|         block b does tiles b, b + grid, ...
//
//   stage     8 * warps rows of w, m rows of x, 128 k each (256 bytes a row); kStages stages, then
//   a
//             row of zeros; chunk c of 16 bytes of row r lies at c ^ (r % 8), so that ldmatrix and
//             cp.async touch every bank once
//
// One pipeline of cp.async runs through all the tiles of a block: while a stage is multiplied, the
// others are in flight. A warp copies its own rows of w, in pieces of 256 bytes; all warps copy x,
// which comes from L2. Rows of x from m on are not copied: their lanes of ldmatrix read the row of
// zeros instead, with their own swizzle.
//
// The sum is one accumulator over the whole of k, in ascending groups of 16 (minitron_kernels.h):
// no split of k, and an MMA's output depends on its own row, column and accumulator only. So a
// row's bits are those of any other kernel or m that adds in this order. The chain is not what
// binds: 256 MMAs of about 33 clocks for k = 4096 take 6 us on A100, where the bytes of 4096 x 4096
// weights take 16 us; a stage of 8 MMAs lets an SM's 5 warps take 28 bytes per clock, DRAM
// gives 13.
//
// The norm: w's first stages are on their way while all warps pass over x (in L2) for its scale;
// then each thread normalises in shared memory the pieces of x that it copied, before the stage's
// barrier.
//
// Without 16-byte rows, pieces go through registers element by element: slow, with the same bits.
// That form also serves m > 16 (grid.y = blocks of 16 rows), so that the GEMM needs none of its
// own.
#pragma once

#include "linear/linear_epilogue.cuh"
#include "linear/linear_tiles.h"
#include "ptx/sm90.cuh"
#include "rms_norm/rms_norm_row.cuh"

namespace mk {

constexpr int kSkinnyStages = skinny_stages(MK_SM);
constexpr int kSkinnyChunks = kSkinnyRowBytes / 16;  // of a row in a stage
constexpr int kRowsPerCopy = 32 / kSkinnyChunks;     // of a warp's cp.async

// Byte of chunk c of row r in a stage's rows.
__device__ __forceinline__ uint32_t skinny_offset(int r, int c) {
    return r * kSkinnyRowBytes + (c ^ r % 8) * 16;
}

// Elements k ... k + 7 of a row of `size` to shared memory: 16 bytes by cp.async, or by elements.
__device__ __forceinline__ void copy_piece(uint8_t* smem, const void* row, int k, int size,
                                           bool is_aligned) {
    if (is_aligned) {
        const bool exists = k < size;
        ptx::cp_async_cg_16(static_cast<uint32_t>(__cvta_generic_to_shared(smem)),
                            static_cast<const uint16_t*>(row) + (exists ? k : 0), exists ? 16 : 0);
    } else {
        *reinterpret_cast<Vec8*>(smem) = load8<false>(row, k, size);
    }
}

// 1 / rms of each row of x, to smem_scale. Every quad of groups of a row is a unit of work.
template <class Dtype>
__device__ __forceinline__ void row_scales(const Product& a, int first_row, int num_rows,
                                           float4* smem_group_sums, float* smem_scale) {
    const int lane = threadIdx.x % 32;
    const int num_quads = (a.k + kSkinnyNormQuad - 1) / kSkinnyNormQuad;
    for (int unit = threadIdx.x / 32; unit < num_rows * num_quads; unit += blockDim.x / 32) {
        const int r = unit / num_quads;
        const int quad = unit - r * num_quads;
        const void* const row = row_of(a.x, first_row + r, a.x_stride);
        Vec8 v[4]{};
        MK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int k = ((quad * 4 + i) * 32 + lane) * kVec;
            if (k < a.k) v[i] = a.is_aligned ? load8<true>(row, k, a.k) : load8<false>(row, k, a.k);
        }
        const float4 sums = {sum_of_squares<Dtype>(v[0]), sum_of_squares<Dtype>(v[1]),
                             sum_of_squares<Dtype>(v[2]), sum_of_squares<Dtype>(v[3])};
        if (lane == 0) smem_group_sums[unit] = sums;
    }
    __syncthreads();
    if (threadIdx.x < num_rows) {
        const float4* const sums = smem_group_sums + threadIdx.x * num_quads;
        smem_scale[threadIdx.x] = rms_scale(sum_of_groups(sums, num_quads), a.k, a.eps);
    }
    __syncthreads();
}

// One stage: acc += x w^T over 128 k, for the lane's addresses of its rows of x and w.
template <class Dtype, int kRows>
__device__ __forceinline__ void multiply_stage(float (&acc)[4], uint32_t smem_x, uint32_t smem_w) {
    MK_UNROLL
    for (int i = 0; i < kSkinnyK / 32; ++i) {
        uint32_t b[4];  // 8 columns, 32 k
        ptx::ldmatrix_x4(b, smem_w ^ i * 64);
        if constexpr (kRows == 8) {
            uint32_t a[4];  // 8 rows, 32 k
            ptx::ldmatrix_x4(a, smem_x ^ i * 64);
            Dtype::mma(acc, {a[0], 0, a[1], 0}, b[0], b[1]);
            Dtype::mma(acc, {a[2], 0, a[3], 0}, b[2], b[3]);
        } else {
            uint32_t a[2][4];  // 16 rows, 16 k each
            ptx::ldmatrix_x4(a[0], smem_x ^ i * 64);
            ptx::ldmatrix_x4(a[1], smem_x ^ (i * 64 + 32));
            Dtype::mma(acc, a[0], b[0], b[1]);
            Dtype::mma(acc, a[1], b[2], b[3]);
        }
    }
}

template <class Dtype, class Epilogue>
__device__ __forceinline__ void linear_skinny(const LinearArgs<typename Epilogue::Params>& args) {
    extern __shared__ __align__(1024) uint8_t smem[];
    const Product& a = args.product;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int num_warps = blockDim.x / 32;
    const int most_rows = min(a.m, kSkinnyRows);
    const int stage_bytes = (num_warps * kSkinnyCols + most_rows) * kSkinnyRowBytes;
    uint8_t* const smem_w = smem + warp * kSkinnyCols * kSkinnyRowBytes;
    uint8_t* const smem_x = smem + num_warps * kSkinnyCols * kSkinnyRowBytes;
    uint8_t* const smem_zeros = smem + kSkinnyStages * stage_bytes;
    float* const smem_scale = reinterpret_cast<float*>(smem_zeros + kSkinnyRowBytes);
    float4* const smem_group_sums = reinterpret_cast<float4*>(smem_scale + kSkinnyRows);

    const int num_strips = (a.n + kSkinnyCols - 1) / kSkinnyCols;
    const int num_tiles = (num_strips + num_warps - 1) / num_warps;
    const int my_tiles = (num_tiles - 1 - static_cast<int>(blockIdx.x)) / gridDim.x + 1;
    const int stages_per_tile = (a.k + kSkinnyK - 1) / kSkinnyK;
    const int num_steps = my_tiles * stages_per_tile;
    const auto strip_of = [&](int tile) { return tile * num_warps + warp; };

    // What this thread copies of every stage: chunk `chunk` of rows of w and of x.
    const int chunk = lane % kSkinnyChunks;
    const int x_row = threadIdx.x / kSkinnyChunks;
    const int x_row_step = blockDim.x / kSkinnyChunks;

    ptx::griddepcontrol_launch_dependents();
#if MK_SM >= 90
    // w does not change: it comes as far as L2 while the kernels before this one still run.
    if (strip_of(blockIdx.x) < num_strips) {
        const int row = min(strip_of(blockIdx.x) * kSkinnyCols + lane / 4, a.n - 1);
        const int end = min(a.k, (kSkinnyStages - 1) * kSkinnyK);
        for (int k = lane % 4 * 64; k < end; k += 4 * 64) {
            ptx::prefetch_global_l2(static_cast<const uint16_t*>(row_of(a.w, row, a.w_stride)) + k);
        }
    }
#endif
    if (threadIdx.x < kSkinnyChunks) reinterpret_cast<uint4*>(smem_zeros)[threadIdx.x] = {};
    ptx::griddepcontrol_wait();

    const Epilogue epilogue(args.p);
    for (int first_row = blockIdx.y * kSkinnyRows; first_row < a.m;
         first_row += gridDim.y * kSkinnyRows) {
        const int num_rows = min(a.m - first_row, kSkinnyRows);

        int load_tile = blockIdx.x, load_k = 0, load_stage = 0;
        const auto load_next = [&] {  // nothing after the last tile
            if (load_tile < num_tiles) {
                uint8_t* const stage = smem + load_stage * stage_bytes;
                const int k = load_k + chunk * kVec;
                if (strip_of(load_tile) < num_strips) {
                    const int column = strip_of(load_tile) * kSkinnyCols;
                    MK_UNROLL
                    for (int i = 0; i < kSkinnyCols / kRowsPerCopy; ++i) {
                        const int r = i * kRowsPerCopy + lane / kSkinnyChunks;
                        // Columns from n on are not stored: any row of w will do.
                        const void* const row = row_of(a.w, min(column + r, a.n - 1), a.w_stride);
                        copy_piece(smem_w + (stage - smem) + skinny_offset(r, chunk), row, k, a.k,
                                   a.is_aligned);
                    }
                }
                for (int r = x_row; r < num_rows; r += x_row_step) {
                    copy_piece(smem_x + (stage - smem) + skinny_offset(r, chunk),
                               row_of(a.x, first_row + r, a.x_stride), k, a.k, a.is_aligned);
                }
                load_stage = load_stage + 1 == kSkinnyStages ? 0 : load_stage + 1;
                load_k += kSkinnyK;
                if (load_k >= a.k) load_k = 0, load_tile += gridDim.x;
            }
            ptx::cp_async_commit_group();
        };

        __syncthreads();  // the last block of rows is done with the stages
        for (int s = 0; s < kSkinnyStages - 1; ++s) load_next();
        if (a.norm_weight) {
            row_scales<Dtype>(a, first_row, num_rows, smem_group_sums, smem_scale);
        }

        // Lane addresses in stage 0, and how far the stages are apart; absent rows stay at the
        // zeros.
        const int few = num_rows <= 8;
        const int a_row = few ? lane % 8 : lane % 16, a_chunk = few ? lane / 8 : lane / 16;
        const uint32_t lane_x = static_cast<uint32_t>(__cvta_generic_to_shared(
            a_row < num_rows ? smem_x + skinny_offset(a_row, a_chunk)
                             : smem_zeros + skinny_offset(a_row, a_chunk) % kSkinnyRowBytes));
        const uint32_t lane_x_step = a_row < num_rows ? stage_bytes : 0;
        const uint32_t lane_w = static_cast<uint32_t>(
            __cvta_generic_to_shared(smem_w + skinny_offset(lane % 8, lane / 8)));

        // Of the sums that this thread holds: rows g and g + 8, columns 2t and 2t + 1.
        const int g = lane / 4, t = lane % 4;
        typename Epilogue::Row rows[2]{};
        MK_UNROLL
        for (int i = 0; i < 2; ++i) {
            if (g + 8 * i < num_rows) rows[i] = epilogue.row(first_row + g + 8 * i);
        }

        float acc[4]{};
        int tile = blockIdx.x, stage = 0, k0 = 0;
        for (int step = 0; step < num_steps; ++step) {
            Vec8 norm_weight{};
            const bool has_norm = a.norm_weight && x_row < num_rows && k0 + chunk * kVec < a.k;
            if (has_norm) {
                const int k = k0 + chunk * kVec;
                norm_weight = a.is_aligned ? load8<true, Reuse::kOften>(a.norm_weight, k, a.k)
                                           : load8<false>(a.norm_weight, k, a.k);
            }
            ptx::cp_async_wait_group<kSkinnyStages - 2>();
            if (has_norm) {
                for (int r = x_row; r < num_rows; r += x_row_step) {
                    auto* const piece = reinterpret_cast<Vec8*>(smem_x + stage * stage_bytes +
                                                                skinny_offset(r, chunk));
                    *piece = normalise<Dtype>(*piece, smem_scale[r], norm_weight);
                }
            }
            __syncthreads();  // the stage is there for all; all are done with the one before
            load_next();
            if (strip_of(tile) < num_strips) {
                const uint32_t x = lane_x + stage * lane_x_step, w = lane_w + stage * stage_bytes;
                if (few) {
                    multiply_stage<Dtype, 8>(acc, x, w);
                } else {
                    multiply_stage<Dtype, 16>(acc, x, w);
                }
            }
            stage = stage + 1 == kSkinnyStages ? 0 : stage + 1;
            k0 += kSkinnyK;
            if (k0 < a.k) continue;
            MK_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (g + 8 * i >= num_rows) continue;
                epilogue.store(rows[i], strip_of(tile) * kSkinnyCols + 2 * t, acc[2 * i],
                               acc[2 * i + 1]);
            }
            MK_UNROLL
            for (float& sum : acc) sum = 0.f;
            k0 = 0;
            tile += gridDim.x;
        }
    }
}

}  // namespace mk
