// PTX instructions that sm_100 has and sm_90 has not.
// ISA = https://docs.nvidia.com/cuda/parallel-thread-execution/index.html
#pragma once

#include "ptx/sm80.cuh"

namespace mk::ptx {

#if MK_SM >= 100

// Two floats as a register pair, and back.
__device__ __forceinline__ uint64_t mov_b64(float2 a) {
    uint64_t d;
    asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "f"(a.x), "f"(a.y));
    return d;
}
__device__ __forceinline__ float2 mov_b64(uint64_t a) {
    float2 d;
    asm("mov.b64 {%0, %1}, %2;" : "=f"(d.x), "=f"(d.y) : "l"(a));
    return d;
}

// ISA#floating-point-instructions-add
__device__ __forceinline__ float2 add_rn_f32x2(float2 a, float2 b) {
    uint64_t d;
    asm("add.rn.f32x2 %0, %1, %2;" : "=l"(d) : "l"(mov_b64(a)), "l"(mov_b64(b)));
    return mov_b64(d);
}

// ISA#floating-point-instructions-fma
__device__ __forceinline__ float2 fma_rn_f32x2(float2 a, float2 b, float2 c) {
    uint64_t d;
    asm("fma.rn.f32x2 %0, %1, %2, %3;"
        : "=l"(d)
        : "l"(mov_b64(a)), "l"(mov_b64(b)), "l"(mov_b64(c)));
    return mov_b64(d);
}

#endif  // MK_SM >= 100

}  // namespace mk::ptx
