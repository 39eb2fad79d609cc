// Two floats at a time: one instruction on sm_100, two before. The same bits.
#pragma once

#include "ptx/sm100.cuh"

namespace mk {

__device__ __forceinline__ float2 both(float a) { return {a, a}; }

__device__ __forceinline__ float2 add_pair(float2 a, float2 b) {
#if MK_SM >= 100
    return ptx::add_rn_f32x2(a, b);
#else
    return {a.x + b.x, a.y + b.y};
#endif
}

__device__ __forceinline__ float2 fma_pair(float2 a, float2 b, float2 c) {
#if MK_SM >= 100
    return ptx::fma_rn_f32x2(a, b, c);
#else
    return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

}  // namespace mk
