// y = x w^T for up to 16 rows of x, bound by the bytes of w: each is read once.
//
//   output    columns |  tile 0   |  tile 1   | ...     a tile = `warps` strips of 8 columns
//   (m <= 16)         |w0|w1|..|w7|w0|w1|..|w7|         block b does tiles b, b + grid, ...
//   stage     8 * warps rows of w, then m rows of x, 128 k (256 bytes) each; chunk c of 16 bytes of
//             row r lies at c ^ (r % 8): ldmatrix and cp.async touch every bank once
//
// One cp.async pipeline of kSkinnyStages runs through all tiles of a block, one barrier a stage. A
// warp copies its own rows of w, all warps copy x, which is in L2. Rows of x from m on are not
// copied: their lanes of ldmatrix read a row of zeros, by their own swizzle. Between a stage's MMAs
// stand the fragments of the next 32 k and the copies of the stage that is loaded.
// The sum is one accumulator over all k in ascending groups of 16 (minitron_kernels.h): k is not
// split, and what an MMA gives depends on its own row, column and accumulator only. So a row's bits
// are those of any m and any kernel of this order. The chain of MMAs does not bind: 256 of about 33
// clocks for k = 4096 take 6 us on A100, where the bytes of 4096 columns take 16 us.
// Norm: w's first stages are on their way while the warps pass over x for its scale; later each
// thread normalises the pieces of x that it copied in shared memory, before the stage's barrier.
// Without 16-byte rows, pieces go through registers, element by element: slow, the same bits. That
// also serves m > 16 (grid.y: blocks of 16 rows), so that the GEMM needs no such form.
// Counted per 1000 weights, of some 600 issue slots at A100's bandwidth: 115 instructions at m = 1,
// 129 at m = 16 (with the norm 124, 218; N = 6144). Shared memory is busy 64 of 153 clocks.
// Lost: ldmatrix of 8 rows at m <= 8 saves 16 of 64 wavefronts and 4 instructions a stage but costs
// 32 moves, as an MMA takes zeros and rows in consecutive registers. All copies before the first
// MMA: 10 % fewer instructions, but none of them in the shadow of the MMAs.
#pragma once

#include "linear/linear_epilogue.cuh"
#include "linear/linear_norm.cuh"
#include "linear/linear_tiles.h"
#include "ptx/sm90.cuh"

namespace mk {

constexpr int kSkinnyStages = skinny_stages(MK_SM);
constexpr int kSkinnyChunks = kSkinnyRowBytes / 16;  // of a row in a stage
constexpr int kRowsPerCopy = 32 / kSkinnyChunks;     // of a warp's cp.async

// Byte of chunk c of row r in a stage's rows.
__device__ __forceinline__ uint32_t skinny_offset(int r, int c) {
    return r * kSkinnyRowBytes + (c ^ r % 8) * 16;
}

// A block's shared memory (linear_tiles.h): stage 0, from which the others are stage_bytes apart,
// and what follows the last one.
struct SkinnySmem {
    int stage_bytes;
    uint8_t* w;  // of this warp
    uint8_t* x;
    uint8_t* zeros;
    float* scale;
    float4* group_sums;

    __device__ __forceinline__ SkinnySmem(uint8_t* smem, int most_rows) {
        const int w_bytes = blockDim.x / 32 * kSkinnyCols * kSkinnyRowBytes;
        stage_bytes = w_bytes + most_rows * kSkinnyRowBytes;
        w = smem + threadIdx.x / 32 * kSkinnyCols * kSkinnyRowBytes;
        x = smem + w_bytes;
        zeros = smem + kSkinnyStages * stage_bytes;
        scale = reinterpret_cast<float*>(zeros + kSkinnyRowBytes);
        group_sums = reinterpret_cast<float4*>(scale + kSkinnyRows);
    }
};

__device__ __forceinline__ uint32_t smem_address(const void* smem) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

// Copies the stages of this block's tiles, one after the other.
struct SkinnyLoader {
    static constexpr int kCopies = kSkinnyCols / kRowsPerCopy;

    const Product& a;
    const SkinnySmem& smem;
    const int first_row, num_rows, num_strips, num_tiles;
    int tile, k, stage_offset;
    bool has_copies;  // of this tile: cp.async, rather than elements, and a strip for this warp
    uint32_t w_to;    // of the stage that is copied: where this thread's first piece goes
    int bytes;        // 16, or 0 past the last k
    const uint16_t* w[kCopies];  // this thread's next pieces
    const uint16_t* x;

    __device__ __forceinline__ SkinnyLoader(const Product& product, const SkinnySmem& layout,
                                            int row, int rows, int strips, int tiles)
        : a(product),
          smem(layout),
          first_row(row),
          num_rows(rows),
          num_strips(strips),
          num_tiles(tiles),
          tile(blockIdx.x),
          stage_offset(0) {
        start_tile();
    }

    // What this thread copies: a chunk of every row, from these rows of w (its warp's) and x on.
    static __device__ __forceinline__ int chunk() { return threadIdx.x % kSkinnyChunks; }
    static __device__ __forceinline__ int w_row() { return threadIdx.x % 32 / kSkinnyChunks; }
    static __device__ __forceinline__ int x_row() { return threadIdx.x / kSkinnyChunks; }
    static __device__ __forceinline__ int x_row_step() { return blockDim.x / kSkinnyChunks; }

    __device__ __forceinline__ int strip() const {
        return tile * (blockDim.x / 32) + threadIdx.x / 32;
    }

    // Row r of w's strip. Columns from n on are not stored: any row will do for them.
    __device__ __forceinline__ const uint16_t* row_of_w(int r) const {
        const int row = min(strip() * kSkinnyCols + r, a.n - 1);
        return static_cast<const uint16_t*>(row_of(a.w, row, a.w_stride));
    }
    __device__ __forceinline__ const uint16_t* row_of_x(int r) const {
        return static_cast<const uint16_t*>(row_of(a.x, first_row + r, a.x_stride));
    }

    __device__ __forceinline__ void start_tile() {
        k = 0;
        has_copies = a.is_aligned && strip() < num_strips;
        MK_UNROLL
        for (int i = 0; i < kCopies; ++i) {
            w[i] = row_of_w(i * kRowsPerCopy + w_row()) + chunk() * kVec;
        }
        x = row_of_x(x_row()) + chunk() * kVec;
    }

    // The next stage, as one group of cp.async (an empty one after the last tile), in steps between
    // which a warp's MMAs stand: start_stage(), copy_w(0) ... copy_w(kCopies - 1), finish_stage().
    __device__ __forceinline__ void load_stage() {
        start_stage();
        MK_UNROLL
        for (int i = 0; i < kCopies; ++i) copy_w(i);
        finish_stage();
    }

    __device__ __forceinline__ void start_stage() {
        bytes = k + chunk() * kVec < a.k ? 16 : 0;
        w_to = smem_address(smem.w) + stage_offset + skinny_offset(w_row(), chunk());
        if (!a.is_aligned && tile < num_tiles) load_elements();
    }

    __device__ __forceinline__ void copy_w(int i) {
        if (!has_copies) return;
        // skinny_offset(i * kRowsPerCopy + w_row(), chunk()), by one instruction
        static_assert(kRowsPerCopy == 2);
        ptx::cp_async_cg_16((w_to ^ i * 32) + i * 2 * kSkinnyRowBytes, w[i], bytes);
        w[i] += kSkinnyK;
    }

    __device__ __forceinline__ void finish_stage() {
        if (tile < num_tiles) {
            if (a.is_aligned) copy_x();
            stage_offset += smem.stage_bytes;
            if (stage_offset == kSkinnyStages * smem.stage_bytes) stage_offset = 0;
            k += kSkinnyK;
            if (k >= a.k) {
                tile += gridDim.x;
                start_tile();
            }
        }
        ptx::cp_async_commit_group();
    }

    __device__ __forceinline__ void copy_x() {
        const uint32_t to = smem_address(smem.x) + stage_offset;
        const uint16_t* from = x;
        for (int r = x_row(); r < num_rows; r += x_row_step()) {
            ptx::cp_async_cg_16(to + skinny_offset(r, chunk()), from, bytes);
            from += x_row_step() * a.x_stride;
        }
        x += kSkinnyK;
    }

    // Through registers, element by element.
    __device__ __forceinline__ void load_elements() {
        const int first = k + chunk() * kVec;
        const auto copy = [&](uint8_t* to, int r, const void* row) {
            store_piece(to + stage_offset + skinny_offset(r, chunk()),
                        load8<false>(row, first, a.k));
        };
        MK_NO_UNROLL
        for (int r = w_row(); r < kSkinnyCols && strip() < num_strips; r += kRowsPerCopy) {
            copy(smem.w, r, row_of_w(r));
        }
        MK_NO_UNROLL
        for (int r = x_row(); r < num_rows; r += x_row_step()) {
            copy(smem.x, r, row_of_x(r));
        }
    }
};

// acc += x w^T over the 128 k of a stage, from the lane's addresses of its rows of x and w. The
// fragments of the next 32 k, and a copy of the stage that is loaded meanwhile, come before the
// MMAs that they need not wait for.
template <class Dtype>
__device__ __forceinline__ void multiply_stage(float (&acc)[4], uint32_t smem_x, uint32_t smem_w,
                                               SkinnyLoader& loader) {
    constexpr int kSteps = kSkinnyK / 32;
    static_assert(kSteps == SkinnyLoader::kCopies);
    uint32_t x[2][2][4], w[2][4];  // 16 rows, 16 k twice; 8 columns, 32 k
    const auto load = [&](int i) {
        ptx::ldmatrix_x4(w[i % 2], smem_w ^ i * 64);
        ptx::ldmatrix_x4(x[i % 2][0], smem_x ^ i * 64);
        ptx::ldmatrix_x4(x[i % 2][1], smem_x ^ (i * 64 + 32));
    };
    load(0);
    MK_UNROLL
    for (int i = 0; i < kSteps; ++i) {
        if (i + 1 < kSteps) load(i + 1);
        loader.copy_w(i);
        Dtype::mma(acc, x[i % 2][0], w[i % 2][0], w[i % 2][1]);
        Dtype::mma(acc, x[i % 2][1], w[i % 2][2], w[i % 2][3]);
    }
}

// Normalise the pieces of a stage of x that this thread copied.
template <class Dtype>
__device__ __forceinline__ void normalise_stage(const SkinnySmem& smem, int stage_offset,
                                                int num_rows, const Vec8& norm_weight) {
    const int chunk = SkinnyLoader::chunk();
    for (int r = SkinnyLoader::x_row(); r < num_rows; r += SkinnyLoader::x_row_step()) {
        uint8_t* const piece = smem.x + stage_offset + skinny_offset(r, chunk);
        store_piece(piece, normalise<Dtype>(load_piece(piece), smem.scale[r], norm_weight));
    }
}

template <class Dtype, class Epilogue>
__device__ __forceinline__ void linear_skinny_sm80(
    const LinearArgs<typename Epilogue::Params>& args) {
    extern __shared__ __align__(1024) uint8_t dynamic_smem[];
    const Product& a = args.product;
    const SkinnySmem smem(dynamic_smem, min(a.m, kSkinnyRows));
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_warps = blockDim.x / 32;
    const int num_strips = (a.n + kSkinnyCols - 1) / kSkinnyCols;
    const int num_tiles = (num_strips + num_warps - 1) / num_warps;

    ptx::griddepcontrol_launch_dependents();
#if MK_SM >= 90
    // w does not change: it comes as far as L2 while the kernels before this one still run.
    if (const int strip = blockIdx.x * num_warps + warp; strip < num_strips) {
        const void* const row =
            row_of(a.w, min(strip * kSkinnyCols + lane / 4, a.n - 1), a.w_stride);
        const int end = min(a.k, (kSkinnyStages - 1) * kSkinnyK);
        for (int k = lane % 4 * 64; k < end; k += 4 * 64) {
            ptx::prefetch_global_l2(static_cast<const uint16_t*>(row) + k);
        }
    }
#endif
    if (threadIdx.x < kSkinnyChunks) reinterpret_cast<uint4*>(smem.zeros)[threadIdx.x] = {};
    ptx::griddepcontrol_wait();

    const Epilogue epilogue(args.p);
    for (int first_row = blockIdx.y * kSkinnyRows; first_row < a.m;
         first_row += gridDim.y * kSkinnyRows) {
        const int num_rows = min(a.m - first_row, kSkinnyRows);
        __syncthreads();  // the last block of rows is done with the stages
        SkinnyLoader loader(a, smem, first_row, num_rows, num_strips, num_tiles);
        for (int s = 0; s < kSkinnyStages - 1; ++s) loader.load_stage();
        if (a.norm_weight) row_scales<Dtype>(a, first_row, num_rows, smem.group_sums, smem.scale);

        // Lane addresses in stage 0. Absent rows of x are at the zeros in all stages.
        const int x_row = lane % 16;
        const bool has_row = x_row < num_rows;
        const uint32_t lane_x =
            smem_address(has_row ? smem.x + x_row * kSkinnyRowBytes : smem.zeros) +
            skinny_offset(x_row, lane / 16) % kSkinnyRowBytes;
        const uint32_t lane_w = smem_address(smem.w) + skinny_offset(lane % 8, lane / 8);

        // Of the sums that this thread holds: rows g and g + 8, columns 2t and 2t + 1.
        const int g = lane / 4, t = lane % 4;
        typename Epilogue::Row rows[2]{};
        MK_UNROLL
        for (int i = 0; i < 2; ++i) {
            if (g + 8 * i < num_rows) rows[i] = epilogue.row(first_row + g + 8 * i);
        }

        int stage_offset = 0;
        for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
            const int strip = tile * num_warps + warp;
            MK_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (g + 8 * i < num_rows) epilogue.prefetch(rows[i], strip * kSkinnyCols + 2 * t);
            }
            float acc[4]{};
            for (int k = 0; k < a.k; k += kSkinnyK) {
                const int piece = k + SkinnyLoader::chunk() * kVec;
                const bool has_norm =
                    a.norm_weight && SkinnyLoader::x_row() < num_rows && piece < a.k;
                Vec8 norm_weight{};
                if (has_norm) {
                    norm_weight = a.is_aligned
                                      ? load8<true, Reuse::kOften>(a.norm_weight, piece, a.k)
                                      : load8<false>(a.norm_weight, piece, a.k);
                }
                ptx::cp_async_wait_group<kSkinnyStages - 2>();
                if (has_norm) normalise_stage<Dtype>(smem, stage_offset, num_rows, norm_weight);
                __syncthreads();  // the stage is there for all; all are done with the one before
                loader.start_stage();
                if (strip < num_strips) {  // else there is no strip to come either
                    const uint32_t x = lane_x + (has_row ? stage_offset : 0);
                    multiply_stage<Dtype>(acc, x, lane_w + stage_offset, loader);
                }
                loader.finish_stage();
                stage_offset += smem.stage_bytes;
                if (stage_offset == kSkinnyStages * smem.stage_bytes) stage_offset = 0;
            }
            const auto column = epilogue.column(strip * kSkinnyCols + 2 * t);
            MK_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (g + 8 * i < num_rows)
                    epilogue.store(rows[i], column, acc[2 * i], acc[2 * i + 1]);
            }
        }
    }
}

}  // namespace mk
