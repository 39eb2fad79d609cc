// The arithmetic of RMSNorm, which kernels with a norm in their prologue share, for the same bits.
//
//   row     |v0 v1 ... v31|v32 ... v63| ...      v = 8 elements, 0 past the row's end
//            \__ group 0 __/ \_ group 1 _/
//
// Sums: of a vector (fma chain), of a group (xor shuffle), of all groups (four running sums over
// groups 4k + 0..3, then pairs).
#pragma once

#include "common/vec.cuh"

namespace mk {

// Of the warp's 32 vectors, in every lane.
template <class Dtype>
__device__ __forceinline__ float sum_of_squares(const Vec8& v) {
    float sum = 0.f;
    MK_UNROLL
    for (const uint32_t pair : v.pair) {
        const float2 f = Dtype::unpack(pair);
        sum = fmaf(f.y, f.y, fmaf(f.x, f.x, sum));
    }
    MK_UNROLL
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFu, sum, lane_mask);
    }
    return sum;
}

// Of the sums of four groups each, `stride` apart.
__device__ __forceinline__ float4 sum_of_groups(const float4* group_sums, int num_quads,
                                                int stride = 1) {
    float4 total = {0.f, 0.f, 0.f, 0.f};
    for (int quad = 0; quad < num_quads; ++quad) {
        const float4 sum = group_sums[quad * stride];
        total = {total.x + sum.x, total.y + sum.y, total.z + sum.z, total.w + sum.w};
    }
    return total;
}

__device__ __forceinline__ float rms_scale(const float4& total, int hidden, float eps) {
    const float mean = ((total.x + total.y) + (total.z + total.w)) / hidden;
    return ptx::rsqrt_approx_f32(mean + eps);
}

// round(x * scale) * weight
template <class Dtype>
__device__ __forceinline__ Vec8 normalise(const Vec8& x, float scale, const Vec8& weight) {
    Vec8 result;
    MK_UNROLL
    for (int i = 0; i < kVec / 2; ++i) {
        const float2 f = Dtype::unpack(x.pair[i]);
        const uint32_t normalised = Dtype::pack(f.x * scale, f.y * scale);
        result.pair[i] = Dtype::mul(normalised, weight.pair[i]);
    }
    return result;
}

}  // namespace mk
