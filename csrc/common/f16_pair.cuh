// Two f16 of a register as floats, without the shift and the narrowing of F16::unpack.
#pragma once

#include "ptx/sm80.cuh"

namespace mk {

__device__ __forceinline__ float2 f16_pair(uint32_t pair) {
    uint16_t low, high;
    ptx::mov_b32(low, high, pair);
    return {ptx::cvt_f32_f16(low), ptx::cvt_f32_f16(high)};
}

}  // namespace mk
