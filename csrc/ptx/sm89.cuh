// PTX instructions that sm_89 and later have: conversions to 8-bit floats, and what goes with them.
// ISA = https://docs.nvidia.com/cuda/parallel-thread-execution/index.html
#pragma once

#include "ptx/sm80.cuh"

namespace mk::ptx {

#if MK_SM >= 89

// ISA#data-movement-and-conversion-instructions-cvt
// Two e4m3, lo in the low byte: to the nearest, beyond 448 that, NaN 0x7F.
__device__ __forceinline__ uint16_t cvt_rn_satfinite_e4m3x2_f32(float hi, float lo) {
    uint16_t pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(hi), "f"(lo));
    return pair;
}

// ISA#data-movement-and-conversion-instructions-mov
// Two pairs as a register, which ptxas lets the second conversion write.
__device__ __forceinline__ uint32_t mov_b32(uint16_t low, uint16_t high) {
    uint32_t d;
    asm("mov.b32 %0, {%1, %2};" : "=r"(d) : "h"(low), "h"(high));
    return d;
}

#endif  // MK_SM >= 89

}  // namespace mk::ptx
