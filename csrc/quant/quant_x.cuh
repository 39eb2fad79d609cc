// x as the products with quantised weights take it: x16, f16 with a power of two per row, in the
// order of the fragments of mma.m16n8k16's B; and the sums of its blocks of 16.
//
//   e      of a row: max |x| * 2^e is in [2^13, 2^14). (x in [2^-126, 2^127] of bf16 and all of
//   f16;
//          below, and for a row of zeros, e is what the least normal number gives.)
//   x16    k % 4 < 2: f16(x * 2^e), k % 4 >= 2: f16(x * 2^(e - 4)), for those weights are x16
//          (quant_layout.h). Exact but for elements below 2^-23 of the row's largest, which keep an
//          absolute error of at most 2^-31 of it.
//   sums   of 16 k each: 2^-4 * sum of x * 2^e, as a high and a low f16 (22 bits)
//
// A row lies in memory in groups of 256 k, kXGroupBytes each (zeros past k):
//
//   | 32 k: t = 0: 16 B | t = 1 | t = 2 | t = 3 | 32 k: ... |  8 of these
//   | sums: t = 0: 16 B | t = 1 | t = 2 | t = 3 |
//
//   lane 4g + t of B has column (token) g: 16 bytes of it are b0, b1 of two steps of 16 k:
//   k = 32 i + 4t + (0, 1), (2, 3), 32 i + 16 + 4t + (0, 1), (2, 3)
//   and of the sums those of blocks 4t ... 4t + 3: high (2), high (2), low (2), low (2)
//
// Pieces of 16 bytes at rows 64 (mod 128) bytes apart lie in different banks for the 8 lanes that
// are served at once.
#pragma once

#include "common/vec.cuh"

namespace mk {

constexpr int kXGroupBytes = 512 + 64;

// Magnitudes of a pair; their maximum, NaN if there is one. The larger of the two as bits.
__device__ __forceinline__ uint32_t magnitudes(uint32_t pair) { return pair & 0x7FFF7FFFu; }
template <class Dtype>
__device__ __forceinline__ uint32_t max_magnitudes(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t max_magnitudes<Bf16>(uint32_t a, uint32_t b) {
    return ptx::max_nan_bf16x2(a, b);
}
template <>
__device__ __forceinline__ uint32_t max_magnitudes<F16>(uint32_t a, uint32_t b) {
    return ptx::max_nan_f16x2(a, b);
}
__device__ __forceinline__ uint32_t larger_half(uint32_t pair) {
    return max(pair & 0xFFFFu, pair >> 16);
}

// How a row is converted, from the bits of its largest magnitude.
struct XScale {
    uint32_t first;  // 2^n, by which x is multiplied before, if it is not 1
    uint32_t low;    // for k % 4 < 2
    uint32_t high;   // for k % 4 >= 2
    float unscale;   // 2^-e; NaN for a row with an infinity or a NaN
};

template <class Dtype>
struct XConvert;

// bf16 times 2^(e - 112) has, in the low bits of its exponent, the exponent of an f16.
template <>
struct XConvert<Bf16> {
    static constexpr uint32_t kOne = 0x3F803F80u;

    static __device__ __forceinline__ XScale scale(uint32_t max_bits) {
        const uint32_t exponent = max(max_bits >> 7, 1u);
        const bool is_huge = exponent > 150;  // 2^(e - 116) would be denormal
        const uint32_t field = (is_huge ? 259 : 155) - exponent;
        // 2^(exponent - 140)
        const uint32_t unscale = exponent > 13 ? (exponent - 13) << 23 : 1u << (exponent + 9);
        return {is_huge ? 0x0B800B80u : kOne,  // 2^-104
                (field << 7) * 0x00010001u, ((field - 4) << 7) * 0x00010001u,
                exponent == 255 ? __int_as_float(0x7FC00000) : __uint_as_float(unscale)};
    }

    static __device__ __forceinline__ uint32_t multiply(uint32_t pair, uint32_t by) {
        return ptx::fma_rn_bf16x2(pair, by, 0x80008000u);
    }

    static __device__ __forceinline__ uint32_t to_f16(uint32_t pair, uint32_t by) {
        const uint32_t v = multiply(pair, by);
        return (v & 0x7FFF7FFFu) << 3 | (v & 0x80008000u);
    }
};

template <>
struct XConvert<F16> {
    static constexpr uint32_t kOne = 0x3C003C00u;

    static __device__ __forceinline__ XScale scale(uint32_t max_bits) {
        const uint32_t exponent = max(max_bits >> 10, 1u);
        const bool is_tiny = exponent < 13;  // 2^e would be an infinity
        const uint32_t field = (is_tiny ? 31 : 43) - exponent;
        return {is_tiny ? 0x6C006C00u : kOne,  // 2^12
                (field << 10) * 0x00010001u, ((field - 4) << 10) * 0x00010001u,
                exponent == 31 ? __int_as_float(0x7FC00000)
                               : __uint_as_float((exponent + 99) << 23)};  // 2^(exponent - 28)
    }

    static __device__ __forceinline__ uint32_t multiply(uint32_t pair, uint32_t by) {
        return ptx::mul_rn_f16x2(pair, by);
    }

    static __device__ __forceinline__ uint32_t to_f16(uint32_t pair, uint32_t by) {
        return multiply(pair, by);
    }
};

// A piece of 16 bytes: x at 4t + (0, 1), (2, 3) of two steps, converted.
template <class Dtype>
__device__ __forceinline__ uint4 to_x16(uint4 x, const XScale& scale) {
    using C = XConvert<Dtype>;
    if (scale.first != C::kOne) {
        x = {C::multiply(x.x, scale.first), C::multiply(x.y, scale.first),
             C::multiply(x.z, scale.first), C::multiply(x.w, scale.first)};
    }
    return {C::to_f16(x.x, scale.low), C::to_f16(x.y, scale.high), C::to_f16(x.z, scale.low),
            C::to_f16(x.w, scale.high)};
}

// ---- block sums ----
//
// A of the step of 16 k of block b has ones in one row: g = b / 2 for even b, g + 8 for odd b. All
// steps of a group add to one accumulator, which then has, in lane 4g + t, the sums of blocks 2g
// (elements 0, 1) and 2g + 1 (2, 3) of columns 2t and 2t + 1.
struct BlockSumFragments {
    uint32_t low[8], high[8];  // of blocks 2i and 2i + 1, for k % 4 < 2 and >= 2

    __device__ __forceinline__ explicit BlockSumFragments(int lane) {
        MK_UNROLL
        for (int i = 0; i < 8; ++i) {
            low[i] = lane / 4 == i ? 0x2C002C00u : 0;   // 2^-4
            high[i] = lane / 4 == i ? 0x3C003C00u : 0;  // 1
        }
    }

    // Two steps: blocks 2i and 2i + 1.
    __device__ __forceinline__ void add(float (&d)[4], int i, const uint4& x) const {
        ptx::mma_m16n8k16_f32_f16(d, {low[i], 0, high[i], 0}, x.x, x.y);
        ptx::mma_m16n8k16_f32_f16(d, {0, low[i], 0, high[i]}, x.z, x.w);
    }
};

// Two sums as a pair of high and a pair of low parts.
__device__ __forceinline__ uint2 split_sums(float a, float b) {
    const uint32_t high = F16::pack(a, b);
    const float2 back = F16::unpack(high);
    return {high, F16::pack(a - back.x, b - back.y)};
}

// C += minima times block sums (quant_unpack.cuh), from the lane's 16 bytes of them.
__device__ __forceinline__ void add_minima(float (&c)[4], const uint32_t (&a)[4],
                                           const uint4& sums) {
    ptx::mma_m16n8k16_f32_f16(c, a, sums.x, sums.y);
    ptx::mma_m16n8k16_f32_f16(c, a, sums.z, sums.w);
}

}  // namespace mk
