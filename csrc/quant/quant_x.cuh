// x as the products with quantised weights take it: x16, f16 with a power of two per row, in the
// order of the fragments of mma.m16n8k16's B; and the sums of its blocks of 16.
//
//   e      of a row: r * 2^e is in [2^15, 2^16), where r^2 is the largest sum of squares of 128
//          elements: 32 adjacent ones in each of the four groups of 256 of a quad, at the same
//          place. So max |x| is r / 11.4 ... r. Tensor cores square and add, a third of the
//          instructions of a maximum; where fp32 does not hold the squares (bf16, r^2 below 2^-100
//          or an infinity), max |x| * 2^e is in [2^13, 2^14). Below 2^-113 (bf16), or 2^-12 (f16),
//          and for a row of zeros, e is what that number gives.
//   x16    k % 4 < 2: f16(x * 2^e), k % 4 >= 2: f16(x * 2^(e - 4)), for those weights are x16
//          (quant_layout.h). Exact but for elements below 2^-21 of the row's largest, which keep an
//          absolute error of at most 2^-32 of it.
//   sums   of 16 k each: 2^-4 * sum of x * 2^e, as a high and a low f16 (22 bits)
//
// A row lies in memory in groups of 256 k, kQuantXGroupBytes each (zeros past k):
//
//   | 32 k: t = 0: 16 B | t = 1 | t = 2 | t = 3 | 32 k: ... |  8 of these
//   | sums: t = 0: 16 B | t = 1 | t = 2 | t = 3 |
//
//   lane 4g + t of B has column (token) g: 16 bytes of it are b0, b1 of two steps of 16 k:
//   k = 32 i + 4t + (0, 1), (2, 3), 32 i + 16 + 4t + (0, 1), (2, 3)
//   and of the sums those of blocks 4t ... 4t + 3: high (2), low (2), high (2), low (2)
//
// Pieces of 16 bytes at rows 64 (mod 128) bytes apart lie in different banks for the 8 lanes that
// are served at once.
#pragma once

#include "common/f16_pair.cuh"
#include "common/vec.cuh"
#include "quant/quant_tiles.h"

namespace mk {

constexpr int kXSumsGroups = kQuantQuadK / kQuantTileK;  // of a quad

// Of a lane's piece of a group: it has these elements 0 ... 3 and 16 ... 19 from there on.
__device__ __forceinline__ int quant_piece_k(int lane) { return lane / 4 * 32 + lane % 4 * 4; }

// Magnitudes of a pair; the larger of the two as bits.
__device__ __forceinline__ uint32_t magnitudes(uint32_t pair) { return pair & 0x7FFF7FFFu; }
__device__ __forceinline__ uint32_t larger_half(uint32_t pair) {
    return max(pair & 0xFFFFu, pair >> 16);
}

// The largest of a row's r^2, by a warp.
template <class Dtype>
struct XSquares {
    float of_quad[4]{};
    float of_lane = 0.f;

    // A lane's piece of a group: A A^T of its 8 rows of 32 elements. On the diagonal are the
    // squares of the rows' lengths, and beside it, but for rounding, no larger numbers.
    __device__ __forceinline__ void add(const Vec8& x) {
        Dtype::mma(of_quad, {x.pair[0], 0, x.pair[1], 0}, x.pair[0], x.pair[1]);
        Dtype::mma(of_quad, {x.pair[2], 0, x.pair[3], 0}, x.pair[2], x.pair[3]);
    }
    __device__ __forceinline__ void end_quad() {
        of_lane = ptx::max_nan_f32(of_lane, ptx::max_nan_f32(of_quad[0], of_quad[1]));
        for (float& sum : of_quad) sum = 0.f;
    }

    // As bits, which are in the order of the numbers, NaN last, and those below 0 before all.
    __device__ __forceinline__ uint32_t largest() const {
        return __reduce_max_sync(0xFFFFFFFFu, __float_as_int(of_lane));
    }
};

// How a row is converted.
struct XScale {
    uint32_t first;  // f16: 2^n, by which x is multiplied before the other factor, if it is not 1
    uint32_t low;    // 2^e, twice: for k % 4 < 2
    uint32_t high;   // 2^(e - 4), twice: for k % 4 >= 2
    float unscale;   // 2^-e; NaN for a row with an infinity or a NaN
};

template <class Dtype>
struct XConvert;

template <>
struct XConvert<Bf16> {
    static constexpr bool kHasFirst = false, kHasExtremes = true;

    // 140 less e, from r^2, or from the bits of max |x| where that does not tell.
    static __device__ __forceinline__ int exponent(uint32_t r2) { return (r2 >> 23) + 123 >> 1; }
    static __device__ __forceinline__ bool is_extreme(uint32_t r2) {
        return r2 < 0x0D800000u || r2 >= 0x7F800000u;  // 2^-100, infinity
    }
    static __device__ __forceinline__ int exponent_of_max(uint32_t bits) {
        return max(bits >> 7, 14);
    }

    static __device__ __forceinline__ XScale scale(int exponent) {
        const uint32_t field = 267 - exponent;
        return {
            0, (field << 7) * 0x00010001u, ((field - 4) << 7) * 0x00010001u,
            exponent == 255 ? __int_as_float(0x7FC00000) : __int_as_float((exponent - 13) << 23)};
    }

    // A pair; the product is exact, or so small that it is 0.
    static __device__ __forceinline__ uint32_t to_f16(uint32_t pair, uint32_t by) {
        const float2 product = Bf16::unpack(Bf16::mul(pair, by));
        return F16::pack(product.x, product.y);
    }
};

template <>
struct XConvert<F16> {
    static constexpr bool kHasFirst = true, kHasExtremes = false;
    static constexpr uint32_t kOne = 0x3C003C00u;
    static constexpr int kNotFinite = 255;  // finite rows have 32 at the most

    // 28 less e.
    static __device__ __forceinline__ int exponent(uint32_t r2) {
        return r2 >= 0x7F800000u ? kNotFinite : static_cast<int>((r2 >> 23) - 101) >> 1;
    }

    static __device__ __forceinline__ XScale scale(int exponent) {
        exponent = max(exponent, 1);
        const bool is_tiny = exponent < 13;  // 2^e would be an infinity
        const uint32_t field = (is_tiny ? 31 : 43) - exponent;
        return {is_tiny ? 0x6C006C00u : kOne,  // 2^12
                (field << 10) * 0x00010001u, ((field - 4) << 10) * 0x00010001u,
                exponent == kNotFinite ? __int_as_float(0x7FC00000)
                                       : __int_as_float((exponent + 99) << 23)};
    }

    static __device__ __forceinline__ uint32_t to_f16(uint32_t pair, uint32_t by) {
        return F16::mul(pair, by);
    }
};

// The scale of a row from r^2; for_each(body) gives body all of the row, 8 elements a lane at a
// time, to the warp.
template <class Dtype, class ForEach>
__device__ __forceinline__ XScale scale_of_row(uint32_t r2, const ForEach& for_each) {
    using C = XConvert<Dtype>;
    int exponent = C::exponent(r2);
    if constexpr (C::kHasExtremes) {
        if (C::is_extreme(r2)) {
            uint32_t most = 0;
            for_each([&](const Vec8& v) {
                MK_UNROLL
                for (const uint32_t pair : v.pair) {
                    most = ptx::max_nan_bf16x2(most, magnitudes(pair));
                }
            });
            exponent = C::exponent_of_max(__reduce_max_sync(0xFFFFFFFFu, larger_half(most)));
        }
    }
    return C::scale(exponent);
}

// A piece of 16 bytes: x at 4t + (0, 1), (2, 3) of two steps, converted.
template <class Dtype>
__device__ __forceinline__ uint4 to_x16(uint4 x, const XScale& scale) {
    using C = XConvert<Dtype>;
    if constexpr (C::kHasFirst) {
        if (scale.first != C::kOne) {
            x = {F16::mul(x.x, scale.first), F16::mul(x.y, scale.first), F16::mul(x.z, scale.first),
                 F16::mul(x.w, scale.first)};
        }
    }
    return {C::to_f16(x.x, scale.low), C::to_f16(x.y, scale.high), C::to_f16(x.z, scale.low),
            C::to_f16(x.w, scale.high)};
}

// The same for a warp whose 32 pieces are of one row. bf16: multiplied, and widened to fp32, by
// tensor cores; A are the pieces, B is diagonal: 6 instructions instead of 16.
template <class Dtype>
struct XRowConvert {
    XScale scale;

    __device__ __forceinline__ XRowConvert(const XScale& of_row, uint32_t) : scale(of_row) {}
    __device__ __forceinline__ uint4 operator()(const uint4& x) const {
        return to_x16<Dtype>(x, scale);
    }
};

template <>
struct XRowConvert<Bf16> {
    uint32_t low, high;  // of B: k = 2t, 2t + 1 of column g

    __device__ __forceinline__ XRowConvert(const XScale& of_row, uint32_t lane) {
        // The low half where g is 2t, the high half where it is 2t + 1: else out of the register.
        const uint32_t shift = lane / 4 * 16 - lane % 4 * 32;
        const uint32_t diagonal = __funnelshift_lc(0, 0xFFFFu, shift);
        low = of_row.low & diagonal;
        high = of_row.high & diagonal;
    }

    __device__ __forceinline__ uint4 operator()(const uint4& x) const {
        const uint32_t a[4] = {x.x, x.z, x.y, x.w};
        float d[4]{}, e[4]{};
        ptx::mma_m16n8k16_f32_bf16(d, a, low, 0);
        ptx::mma_m16n8k16_f32_bf16(e, a, 0, high);
        return {F16::pack(d[0], d[1]), F16::pack(e[0], e[1]), F16::pack(d[2], d[3]),
                F16::pack(e[2], e[3])};
    }
};

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

// The same from a warp's 32 pieces of one row, which are A here, ones are B: of up to kXSumsGroups
// groups, each in two columns of its own. Lane 4g + t then has the sums of blocks 2g (elements 0,
// 1) and 2g + 1 (2, 3) of group t.
struct GroupSumFragments {
    uint32_t low[kXSumsGroups], high[kXSumsGroups];  // for k % 4 < 2 and >= 2

    __device__ __forceinline__ explicit GroupSumFragments(uint32_t lane) {
        // 1 as f16, its high byte in the place of the group of this lane's column
        const uint32_t one = 0x3Cu << lane / 8 * 8;
        MK_UNROLL
        for (int i = 0; i < kXSumsGroups; ++i) {
            high[i] = __byte_perm(one, 0, 0x0404 + 0x1010 * i);
            low[i] = high[i] & 0x2C002C00u;  // 2^-4
        }
    }

    __device__ __forceinline__ void add(float (&d)[4], int group, const uint4& x) const {
        ptx::mma_m16n8k16_f32_f16(d, {x.x, x.z, x.y, x.w}, low[group], high[group]);
    }
};

// Two sums as a pair of high and a pair of low parts.
__device__ __forceinline__ uint2 split_sums(float a, float b) {
    const uint32_t high = F16::pack(a, b);
    const float2 back = f16_pair(high);
    return {high, F16::pack(a - back.x, b - back.y)};
}

// C += minima times block sums (quant_unpack.cuh), from the lane's 16 bytes of them.
__device__ __forceinline__ void add_minima(float (&c)[4], const uint32_t (&a)[4],
                                           const uint4& sums) {
    ptx::mma_m16n8k16_f32_f16(c, a, sums.x, sums.z);
    ptx::mma_m16n8k16_f32_f16(c, a, sums.y, sums.w);
}

}  // namespace mk
