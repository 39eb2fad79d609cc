// SwiGLU's activation.
#pragma once

#include "ptx/sm80.cuh"

namespace mk {

// x / (1 + 2^(-x log2(e))). For very negative x the power is inf and the result -0.
__device__ __forceinline__ float silu(float x) {
    constexpr float kLog2E = 1.4426950408889634f;
    return x * ptx::rcp_approx_ftz_f32(1.f + ptx::ex2_approx_ftz_f32(-kLog2E * x));
}

}  // namespace mk
