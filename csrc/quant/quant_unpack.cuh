// From the words of a tile (quant_layout.h) to fragments of mma.m16n8k16 and to scales, by type.
//
//   unpack_quarter(w, a)   a lane's words of a quarter -> a[step], A of the quarter's four steps
//   QuantScales<type>      a lane's scales and minima of a tile, and what is done with them:
//
//     S = sum over blocks, ascending, of scale * P      P: the MMAs of the block, from 0
//     S = the MMAs of A * scale, from 0                 blocks of 16 k: fold_scales
//     C = A B, A minima (or scales), B block sums of x16 (quant_x.cuh)
//     Y = finish(S, C)                                  the tile's part of the sum, in quant_unit's
//
// Scales of blocks of 16 k are integers, and so are multiplied with the weights, as f16: a multiply
// and add of P for each 8 rows of x would take longer than the MMAs. q * scale of Q2_K (up to 45)
// and Q3_K (224) is exact. Of Q6_K it has up to 13 bits (8064), and above 2048 is rounded to 11:
// 0.23 of the error of weights rounded to bf16, 1.9 of that of weights rounded to f16
// (test_error_of_q6_k). Not built: fma(q, scale, -32 * scale) has 0.25 to 0.4 of that error, for
// 0.1 instructions a weight more in decode and scales three times as large in shared memory. Q4_K
// and Q5_K would be exact, too (945, 1953), for 0.25 more: their blocks of 32 k have half as many
// additions of P.
//
// What is not q but a sum over x times the same number for a whole block goes through C: the
// minima, and the offset of q (8 for Q4_0, ...), which is a minimum of scale * offset. C is two
// MMAs a tile. Everything is in registers, free of branches. Lane 4g + t has scales of rows g and g
// + 8: of the two blocks of 32 k of quarter t, or the four of 16 k; QuantScales::scales gives them
// as they are shared with the other three lanes of the rows.
#pragma once

#include "common/f16_pair.cuh"
#include "common/vec.cuh"
#include "quant/quant_layout.h"

namespace mk {

// ---- weights ----
//
// Of w, a pair is two equal fields in the halves. x1: at bit 0, x16: at bit 4.

template <int kBits>
constexpr uint32_t kQuantX1 = ((1u << kBits) - 1) * 0x00010001u;
template <int kBits>
constexpr uint32_t kQuantX16 = kQuantX1<kBits> << 4;

using QuantFragments = uint32_t[4][4];  // [step][a]

// a | (b & mask)
__device__ __forceinline__ uint32_t or_masked(uint32_t a, uint32_t b, uint32_t mask) {
    return ptx::lop3_b32<0xF8>(a, b, mask);
}

// 5 instructions for 8 weights.
__device__ __forceinline__ void unpack_nibbles(uint32_t (&a)[4], uint32_t w, uint32_t x1,
                                               uint32_t x16) {
    a[0] = w & x1;
    a[2] = w & x16;
    w >>= 8;
    a[1] = w & x1;
    a[3] = w & x16;
}

__device__ __forceinline__ void unpack_quarter(const uint32_t (&w)[4], QuantFragments& a) {
    MK_UNROLL
    for (int s = 0; s < 4; ++s) unpack_nibbles(a[s], w[s], kQuantX1<4>, kQuantX16<4>);
}

// 11 instructions for 16 weights.
__device__ __forceinline__ void unpack_quarter(const uint32_t (&w)[2], QuantFragments& a) {
    MK_UNROLL
    for (int s = 0; s < 4; ++s) {
        const uint32_t even = w[s / 2] >> s % 2 * 8;
        const uint32_t odd = w[s / 2] >> (s % 2 * 8 + 2);
        a[s][0] = even & kQuantX1<2>;
        a[s][1] = odd & kQuantX1<2>;
        a[s][2] = even & kQuantX16<2>;
        a[s][3] = odd & kQuantX16<2>;
    }
}

// 26 instructions for 32 weights.
__device__ __forceinline__ void unpack_quarter(const uint32_t (&w)[3], QuantFragments& a) {
    MK_UNROLL
    for (int s = 0; s < 3; ++s) unpack_nibbles(a[s], w[s], kQuantX1<3>, kQuantX16<3>);
    const uint32_t two = or_masked(w[0] >> 3 & 0x11111111u, w[1] >> 2, 0x22222222u);
    const uint32_t fourth = or_masked(two, w[2] >> 1, 0x44444444u);
    unpack_nibbles(a[3], fourth, kQuantX1<3>, kQuantX16<3>);
}

// 32 instructions for 32 weights: 25 for 30 of them, 7 for the pair whose bits are strewn.
__device__ __forceinline__ void unpack_quarter(const uint32_t (&w)[5], QuantFragments& a) {
    constexpr uint32_t kX1 = kQuantX1<5>, kX16 = kQuantX16<5>;
    const uint32_t w0 = w[0] >> 5, w1 = w[1] >> 5, w2 = w[2] >> 5, w3 = w[3] >> 6, w4 = w[4] >> 6;
    a[0][0] = w[0] & kX1;
    a[0][1] = w0 & kX1;
    a[0][2] = w[0] >> 7 & kX16;
    a[0][3] = w[4] >> 1 & kX16;
    a[1][0] = w[1] & kX1;
    a[1][1] = w1 & kX1;
    a[1][2] = w[1] >> 7 & kX16;
    a[1][3] = w4 & kX16;
    a[2][0] = w[2] & kX1;
    a[2][1] = w2 & kX1;
    a[2][2] = w[2] >> 6 & kX16;
    a[3][0] = w[3] & kX1;
    a[3][1] = w[4] & kX1;
    a[3][2] = w[3] >> 1 & kX16;
    a[3][3] = w3 & kX16;
    // Bits 0 ... 4 of the field go to bits 4 ... 8. They are at bits 5, 5, 9, 10, 9 of these words.
    const uint32_t bits_2_3 = or_masked(w3 & 0x02000200u, w2, 0x04000400u);
    const uint32_t bits_0_2_3 = or_masked(bits_2_3 >> 2, w0, 0x00200020u);
    const uint32_t bits_0_2_3_4 = or_masked(bits_0_2_3, w4, 0x02000200u);
    a[2][3] = or_masked(bits_0_2_3_4 >> 1, w1, 0x00200020u);
}

// 15 instructions for 16 weights.
__device__ __forceinline__ void unpack_quarter(const uint32_t (&w)[6], QuantFragments& a) {
    MK_UNROLL
    for (int s = 0; s < 4; s += 2) {
        const uint32_t w0 = w[s / 2 * 3], w1 = w[s / 2 * 3 + 1], w2 = w[s / 2 * 3 + 2];
        const uint32_t w1_high = w1 >> 6;
        a[s][0] = w0 & kQuantX1<6>;
        a[s][1] = w1 & kQuantX1<6>;
        a[s][2] = w0 >> 6 & kQuantX16<6>;
        a[s][3] = w1_high & kQuantX16<6>;
        a[s + 1][0] = w2 & kQuantX1<6>;
        a[s + 1][1] = or_masked(w1_high & 0x000F000Fu, w2 >> 2, 0x00300030u);
        a[s + 1][2] = w2 >> 6 & kQuantX16<6>;
        a[s + 1][3] = or_masked(w0 & 0x03C003C0u, w2 >> 4, 0x00300030u);
    }
}

// 4 instructions for 8 weights. a[2] and a[3] are x1: an x16 of 8 bits has no place in 11.
__device__ __forceinline__ void unpack_quarter(const uint32_t (&w)[8], QuantFragments& a) {
    MK_UNROLL
    for (int s = 0; s < 4; ++s) {
        MK_UNROLL
        for (int h = 0; h < 2; ++h) {
            a[s][h] = __byte_perm(w[2 * s + h], 0, 0x4140);
            a[s][2 + h] = __byte_perm(w[2 * s + h], 0, 0x4342);
        }
    }
}

template <int kType>
constexpr int kQuantTileWords = 4 * quant_words(kType);  // of a lane

// A lane's words of tile `tile` of 256 k, piece by piece of 16 bytes: load(p) gives piece p, store
// puts it where unpack_quarter wants it. kLastQuarter: of the quarters that need the piece.
template <int kType>
struct QuantPieces {
    static constexpr int kBits = quant_words(kType);
    static constexpr int kCount = kBits;  // of 16 bytes
    static constexpr bool kHasFifths = kBits == 5;

    // Which of the lane's words piece p has as number i.
    static __device__ constexpr int word(int p, int i) {
        if (!kHasFifths) return 4 * p + i;
        return p < 4 ? 5 * p + i : 5 * i + 4;
    }
    static __device__ constexpr int last_quarter(int p) { return word(p, 3) / kBits; }

    static __device__ __forceinline__ void store(uint32_t (&words)[kQuantTileWords<kType>], int p,
                                                 const uint4& v) {
        words[word(p, 0)] = v.x;
        words[word(p, 1)] = v.y;
        words[word(p, 2)] = v.z;
        words[word(p, 3)] = v.w;
    }
};

template <int kType>
__device__ __forceinline__ void unpack_quarter_of(const uint32_t (&words)[kQuantTileWords<kType>],
                                                  int quarter, QuantFragments& a) {
    constexpr int kBits = QuantPieces<kType>::kBits;
    uint32_t w[kBits];
    MK_UNROLL
    for (int i = 0; i < kBits; ++i) w[i] = words[quarter * kBits + i];
    unpack_quarter(w, a);
}

// ---- scales ----

// Half kHalf twice, as a move: ptxas lets mul.f16x2 take its operand so.
template <int kHalf>
__device__ __forceinline__ uint32_t twice(uint32_t pair) {
    ushort2 halves;
    memcpy(&halves, &pair, 4);
    halves = kHalf ? ushort2{halves.y, halves.y} : ushort2{halves.x, halves.x};
    memcpy(&pair, &halves, 4);
    return pair;
}

// A of 32 k times the scales of its two blocks of 16 k, those of rows g and g + 8.
__device__ __forceinline__ void fold_scales(uint32_t (*a)[4], uint32_t pair, uint32_t pair_8) {
    MK_UNROLL
    for (int i = 0; i < 4; ++i) {
        const uint32_t scales = i % 2 ? pair_8 : pair;
        a[0][i] = ptx::mul_rn_f16x2(a[0][i], twice<0>(scales));
        a[1][i] = ptx::mul_rn_f16x2(a[1][i], twice<1>(scales));
    }
}

__device__ __forceinline__ uint32_t both_halves_low(uint32_t a) {
    return __byte_perm(a, 0, 0x1010);
}
__device__ __forceinline__ uint32_t both_halves_high(uint32_t a) {
    return __byte_perm(a, 0, 0x3232);
}

template <int kType>
struct QuantScales {
    static constexpr QuantFormat kFormat = quant_format(kType);
    static constexpr bool kIsK = kFormat.block_k == 256;
    static constexpr bool kIs16 = kFormat.scale_k == 16;
    static constexpr int kWords = !kIsK && kFormat.has_min ? 4 : 2;
    static constexpr int kQuantBytes = quant_scales_offset(kType, 1);  // of a quarter
    static constexpr int kScalesAt = quant_scales_offset(kType, 4);
    static constexpr int kHalvesAt = quant_halves_offset(kType, 4);

    uint32_t words[kWords];  // of the scales' section
    uint32_t halves[2];      // K types: d (and dmin) of g, and of g + 8

    // From byte lane * 16 of a whole tile to this lane's place in the scales, but for a constant.
    static __device__ __forceinline__ int64_t scales_place(int lane) {
        return lane * ((kType == MK_Q3_K ? 4 : kWords * 4) - 16);
    }

    // Of a whole tile. `lane_piece`: its byte lane * 16; place: scales_place.
    __device__ __forceinline__ void load(const uint8_t* lane_piece, int64_t place, int lane) {
        const uint8_t* const at = lane_piece + place;
        if constexpr (kType == MK_Q3_K) {
            words[0] = ptx::ld_global_nc_l1_no_allocate<kScalesAt>(at);
            words[1] = ptx::ld_global_nc_l1_no_allocate_u16<kScalesAt + 128>(at - lane * 2);
        } else if constexpr (kWords == 4) {
            const uint4 v = ptx::ld_global_nc_l1_no_allocate_v4<kScalesAt>(at);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else {
            load2<kScalesAt>(words, at);
        }
        if constexpr (kIsK && kFormat.has_min) {
            load2<kHalvesAt>(halves, lane_piece + (lane / 4 * 8 - lane * 16));
        } else if constexpr (kIsK) {
            halves[0] = ptx::ld_global_nc_l1_no_allocate<kHalvesAt>(lane_piece +
                                                                    (lane / 4 * 4 - lane * 16));
        }
    }

    // Of a tile of fewer quarters: of a simple type.
    __device__ __forceinline__ void load_short(const uint8_t* tile, int lane, int quarters) {
        if constexpr (!kIsK) {
            const int g = lane / 4, t = lane % 4;
            const uint8_t* const at =
                tile + quarters * kQuantBytes + (g * quarters + t) * kWords * 4;
            MK_UNROLL
            for (int i = 0; i < kWords; ++i) {
                words[i] = t < quarters ? ptx::ld_global_nc_l1_no_allocate(at + i * 4) : 0;
            }
        }
    }

    // f16 of this lane's scales of row g + 8h: blocks 2t, 2t + 1, or of 16 k blocks 4t + 2i and
    // 4t + 2i + 1.
    __device__ __forceinline__ uint32_t scale_pair(int h, int i) const {
        if constexpr (!kIsK) {
            return words[h];
        } else if constexpr (kType == MK_Q2_K) {
            return ptx::sub_rn_f16x2(or_masked(0x64006400u, words[h] >> 8 * i, 0x000F000Fu),
                                     0x64006400u);  // 1024 + n, less 1024
        } else if constexpr (kType == MK_Q3_K) {
            const uint32_t low = words[0] >> (8 * h + 4 * i) & 0x000F000Fu;
            const uint32_t spread = __byte_perm(words[1], 0, 0x4140);
            const int place = 4 - 4 * h - 2 * i;
            const uint32_t high = place >= 0 ? spread << place : spread >> -place;
            return ptx::sub_rn_f16x2(or_masked(low | 0x64006400u, high, 0x00300030u),
                                     0x64206420u);  // 1024 + n, less 1056
        } else if constexpr (kType == MK_Q6_K) {
            return ptx::sub_rn_f16x2(__byte_perm(words[h], 0x64646464u, i ? 0x4341 : 0x4240),
                                     0x64806480u);  // 1024 + n, less 1152
        } else {
            return __byte_perm(words[0], 0, 0x4240 + h * 0x0101);
        }
    }

    // All of them: that of h and i is pairs[2 * i + h].
    using Pairs = uint32_t[kIs16 ? 4 : 2];
    __device__ __forceinline__ void scale_pairs(Pairs& pairs) const {
        MK_UNROLL
        for (int i = 0; i < (kIs16 ? 4 : 2); ++i) pairs[i] = scale_pair(i % 2, i / 2);
    }

    // What the four lanes of the rows share of a quarter, 8 bytes for each 32 k: a block's scales
    // of g and g + 8 as floats, or those of two blocks of 16 k as pairs of f16 of g and of g + 8.
    static __device__ __forceinline__ uint4 scales(const Pairs& pairs) {
        if constexpr (kIs16) {
            return {pairs[0], pairs[1], pairs[2], pairs[3]};
        } else {
            const float2 lo = f16_pair(pairs[0]), hi = f16_pair(pairs[1]);
            return {__float_as_uint(lo.x), __float_as_uint(hi.x), __float_as_uint(lo.y),
                    __float_as_uint(hi.y)};
        }
    }

    // A of C: k = 2t, 2t + 1 of the MMA are blocks of 16 k 4t and 4t + 1, k = 2t + 8, 2t + 9 are
    // 4t + 2 and 4t + 3.
    __device__ __forceinline__ void minima(const Pairs& pairs, uint32_t (&a)[4]) const {
        if constexpr (kIs16) {
            MK_UNROLL
            for (int i = 0; i < 4; ++i) {
                a[i] = kFormat.has_min ? words[i % 2] >> i / 2 * 8 & 0x00F000F0u : pairs[i];
            }
        } else {
            MK_UNROLL
            for (int h = 0; h < 2; ++h) {
                if constexpr (kIsK) {
                    a[h] = __byte_perm(words[1], 0, 0x4040 + h * 0x0101);
                    a[2 + h] = __byte_perm(words[1], 0, 0x4242 + h * 0x0101);
                } else {
                    const uint32_t pair = words[kFormat.has_min ? 2 + h : h];
                    a[h] = both_halves_low(pair);
                    a[2 + h] = both_halves_high(pair);
                }
            }
        }
    }

    // Y of S and C, both as an MMA holds them: elements 0, 1 of row g, 2, 3 of row g + 8.
    // The block sums are 2^-4 of their value, P is 2^-24: C needs 2^-20 to match.
    __device__ __forceinline__ void finish(float (&s)[4], const float (&c)[4]) const {
        constexpr float kTwo20 = 1.f / (1 << 20);
        if constexpr (!kIsK) {
            constexpr float kFactor = (kFormat.has_min ? 1.f : -kFormat.offset) * kTwo20;
            MK_UNROLL
            for (int i = 0; i < 4; ++i) s[i] = fmaf(c[i], kFactor, s[i]);
        } else if constexpr (kFormat.has_min) {  // Q2_K's minima are x16, and its S is 2^-24
            constexpr float kFactor = kType == MK_Q2_K ? -1.f : -kTwo20;
            MK_UNROLL
            for (int h = 0; h < 2; ++h) {
                const float2 d = f16_pair(halves[h]);
                MK_UNROLL
                for (int i = 2 * h; i < 2 * h + 2; ++i) {
                    s[i] = fmaf(d.x, s[i], d.y * kFactor * c[i]);
                }
            }
        } else {
            const float2 d = f16_pair(halves[0]);
            MK_UNROLL
            for (int i = 0; i < 4; ++i) {
                s[i] = (i < 2 ? d.x : d.y) * fmaf(c[i], -kFormat.offset * kTwo20, s[i]);
            }
        }
    }

  private:
    template <int kOffset>
    static __device__ __forceinline__ void load2(uint32_t (&to)[2], const uint8_t* from) {
        const uint2 v = ptx::ld_global_nc_l1_no_allocate_v2<kOffset>(from);
        to[0] = v.x;
        to[1] = v.y;
    }
};

}  // namespace mk
