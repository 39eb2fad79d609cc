// Eight 2-byte elements, one 16-byte access: what a thread of a memory-bound kernel moves at once.
#pragma once

#include "common/entry.cuh"
#include "ptx/sm80.cuh"

namespace mk {

constexpr int kVec = 8;

// As in memory: element 2i in the low half of pair[i], element 2i+1 in its high half.
struct Vec8 {
    uint32_t pair[kVec / 2];
};

struct Bf16 {
    static __device__ float2 unpack(uint32_t pair) {
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
    }
    static __device__ uint32_t pack(float lo, float hi) { return ptx::cvt_rn_bf16x2_f32(hi, lo); }
    // Products, rounded once. sm_80 has no mul.bf16x2; adding -0 changes no bit.
    static __device__ uint32_t mul(uint32_t a, uint32_t b) {
        return ptx::fma_rn_bf16x2(a, b, 0x80008000u);
    }
    static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_m16n8k16_f32_bf16(d, a, b0, b1);
    }
};

struct F16 {
    static __device__ float2 unpack(uint32_t pair) {
        return {ptx::cvt_f32_f16(static_cast<uint16_t>(pair)),
                ptx::cvt_f32_f16(static_cast<uint16_t>(pair >> 16))};
    }
    static __device__ uint32_t pack(float lo, float hi) { return ptx::cvt_rn_f16x2_f32(hi, lo); }
    static __device__ uint32_t mul(uint32_t a, uint32_t b) { return ptx::mul_rn_f16x2(a, b); }
    static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        ptx::mma_m16n8k16_f32_f16(d, a, b0, b1);
    }
};

enum class Reuse { kOnce, kOften };  // kOften: worth keeping in L1

// Elements first ... first + 7 of a row of `size`. kAligned: one 16-byte access, all eight exist.
// Else one access per element, and elements past the end are 0.
template <bool kAligned, Reuse kReuse = Reuse::kOnce>
__device__ __forceinline__ Vec8 load8(const void* row, int first, int size) {
    const auto* element = static_cast<const uint16_t*>(row) + first;
    Vec8 v{};
    if constexpr (kAligned) {
        const uint4 u = kReuse == Reuse::kOnce ? ptx::ld_global_l1_no_allocate_v4(element)
                                               : ptx::ld_global_v4(element);
        v = {u.x, u.y, u.z, u.w};
    } else {
        MK_UNROLL
        for (int i = 0; i < kVec; ++i) {
            const uint32_t bits = first + i < size ? element[i] : 0;
            v.pair[i / 2] |= bits << (i % 2 * 16);
        }
    }
    return v;
}

template <bool kAligned>
__device__ __forceinline__ void store8(void* row, int first, int size, const Vec8& v) {
    auto* element = static_cast<uint16_t*>(row) + first;
    if constexpr (kAligned) {
        ptx::st_global_v4(element, {v.pair[0], v.pair[1], v.pair[2], v.pair[3]});
    } else {
        MK_UNROLL
        for (int i = 0; i < kVec; ++i) {
            if (first + i < size) {
                element[i] = static_cast<uint16_t>(v.pair[i / 2] >> (i % 2 * 16));
            }
        }
    }
}

// Entry i of ids, positions or slots, int32 or int64.
__device__ __forceinline__ int64_t load_index(const void* indices, int32_t dtype, int64_t i) {
    return dtype == MK_I64 ? static_cast<const int64_t*>(indices)[i]
                           : static_cast<const int32_t*>(indices)[i];
}

// Row `index` of a tensor of 2-byte elements whose rows are `stride` elements apart.
__device__ __forceinline__ const void* row_of(const void* tensor, int64_t index, int64_t stride) {
    return static_cast<const uint16_t*>(tensor) + index * stride;
}
__device__ __forceinline__ void* row_of(void* tensor, int64_t index, int64_t stride) {
    return static_cast<uint16_t*>(tensor) + index * stride;
}

}  // namespace mk
