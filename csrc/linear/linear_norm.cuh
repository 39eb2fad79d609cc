// The RMSNorm of x in a product: a scale per row first, then each thread normalises, in shared
// memory, the pieces of 16 bytes that it copied itself, before the barrier that hands them over.
#pragma once

#include "linear/linear_tiles.h"
#include "rms_norm/rms_norm_row.cuh"

namespace mk {

// 16 bytes of shared memory, in one access.
__device__ __forceinline__ Vec8 load_piece(const uint8_t* smem) {
    const uint4 v = *reinterpret_cast<const uint4*>(smem);
    return {v.x, v.y, v.z, v.w};
}
__device__ __forceinline__ void store_piece(uint8_t* smem, const Vec8& v) {
    *reinterpret_cast<uint4*>(smem) = {v.pair[0], v.pair[1], v.pair[2], v.pair[3]};
}

// 1 / rms of each row of x, by all threads of the block, which are together at its end. Every quad
// of groups of a row is a warp's unit of work.
template <class Dtype>
__device__ __forceinline__ void row_scales(const Product& a, int first_row, int num_rows,
                                           float4* smem_group_sums, float* smem_scale) {
    const int lane = threadIdx.x % 32;
    const int num_quads = (a.k + kNormQuad - 1) / kNormQuad;
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
        if (lane == 0) smem_group_sums[quad * num_rows + r] = sums;
    }
    __syncthreads();
    if (threadIdx.x < num_rows) {
        const float4 total = sum_of_groups(smem_group_sums + threadIdx.x, num_quads, num_rows);
        smem_scale[threadIdx.x] = rms_scale(total, a.k, a.eps);
    }
    __syncthreads();
}

}  // namespace mk
