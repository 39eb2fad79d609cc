// Ints of AVX-512 (F, BW, VL, VNNI) for quant_kernels.h.
#pragma once

#include "cpu/quant.h"
#include "cpu/vec_avx512.h"

namespace mk::cpu {
namespace {

// 16 x 32 bits: one register.
struct Ints {
    static constexpr int kTileM = 6, kTileN = 2;  // 12 sums, 12 accumulators, 2 + 1 factors of 32
    static constexpr int kDirectRows = 2;

    __m512i v;

    static __m512i all(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
    static Ints set(int32_t a) { return {_mm512_set1_epi32(a)}; }
    static Ints load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
    void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }

    friend Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
    friend Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
    friend Ints operator&(Ints a, uint32_t b) { return {_mm512_and_si512(a.v, all(b))}; }
    friend Ints operator^(Ints a, uint32_t b) { return {_mm512_xor_si512(a.v, all(b))}; }
    friend Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
    friend Ints operator<<(Ints a, int n) {
        return {_mm512_slli_epi32(a.v, static_cast<unsigned>(n))};
    }
    friend Ints operator>>(Ints a, int n) {
        return {_mm512_srli_epi32(a.v, static_cast<unsigned>(n))};
    }
    Ints divide(int n) const { return {_mm512_srai_epi32(v, static_cast<unsigned>(n))}; }
    static Ints spread_bits(Ints a) {
        const auto bytes = [](int i) {
            return (i & 1) << 4 | (i & 2) << 11 | (i & 4) << 18 | (i & 8) << 25;
        };
        const __m512i table = _mm512_setr_epi32(
            bytes(0), bytes(1), bytes(2), bytes(3), bytes(4), bytes(5), bytes(6), bytes(7),
            bytes(8), bytes(9), bytes(10), bytes(11), bytes(12), bytes(13), bytes(14), bytes(15));
        return {_mm512_permutexvar_epi32(a.v, table)};  // looks at bits 0 ... 3 of a
    }
    static Ints and_or(Ints a, uint32_t mask, Ints b) {
        return {_mm512_ternarylogic_epi32(a.v, all(mask), b.v, 0xea)};
    }

    static Ints dot(Ints acc, Ints w, Ints x) { return {_mm512_dpwssd_epi32(acc.v, w.v, x.v)}; }
    static Ints dot_bytes(Ints acc, Ints w, Ints x) {
        return {_mm512_dpbusd_epi32(acc.v, w.v, x.v)};
    }
    static Ints add_halves(Ints a, Ints b) { return {_mm512_add_epi16(a.v, b.v)}; }
    static Ints round(Vec a) { return {_mm512_cvtps_epi32(a.v)}; }
    static Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
    uint32_t largest() const { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
    int32_t sum() const { return _mm512_reduce_add_epi32(v); }
    uint32_t sum_of_pairs() const {
        const __m512i pairs = _mm512_mullo_epi32(v, _mm512_srli_epi64(v, 32));
        return static_cast<uint32_t>(_mm512_mask_reduce_add_epi32(0x5555, pairs));
    }
    void store_halves(uint32_t* p) const {
        const __m512i order = _mm512_set_epi64(0, 0, 0, 0, 0x001e001a001c0018, 0x0016001200140010,
                                               0x000e000a000c0008, 0x0006000200040000);
        const __m512i halves = _mm512_permutexvar_epi16(order, v);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(halves));
    }
    void store_bytes(uint32_t* p) const {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
    }
    Vec to_float() const { return {_mm512_cvtepi32_ps(v)}; }
    Vec half() const { return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(v))}; }

    MK_INLINE static __m256i word(const uint8_t* at) {
        int32_t a;
        __builtin_memcpy(&a, at, 4);
        return _mm256_set1_epi32(a);
    }
    MK_INLINE static Ints gather(const uint8_t* const* rows, int64_t offset) {
        __m256i half[2];
        unroll<2>([&](auto h) MK_INLINE_LAMBDA {
            half[h.value] = word(rows[8 * h.value] + offset);
            unroll<7>([&](auto r) MK_INLINE_LAMBDA {
                const __m256i each = word(rows[8 * h.value + 1 + r.value] + offset);
                half[h.value] = _mm256_mask_mov_epi32(half[h.value], 2 << r.value, each);
            });
        });
        return {_mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1)};
    }

    // Lane i of four[p] is 16 bytes of row 4 i + p.
    MK_INLINE static void columns(const uint8_t* const* rows, int64_t offset, Ints (&out)[4]) {
        const auto at = [&](int r) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + offset));
        };
        __m512i four[4];
        for (int p = 0; p < 4; ++p) {
            const auto two = [&](int r) {
                return _mm256_inserti128_si256(_mm256_castsi128_si256(at(r)), at(r + 4), 1);
            };
            four[p] = _mm512_inserti64x4(_mm512_castsi256_si512(two(p)), two(8 + p), 1);
        }
        __m512i words[4];
        transpose(four, words);
        for (int j = 0; j < 4; ++j) out[j] = {words[j]};
    }
    // Of 32 bytes: a vector begins as those of two rows, r and r + 4, or r + 8 and r + 12. Halves
    // of words 0-3 and of 4-7 take turns after the transposition, until the last shuffle.
    MK_INLINE static void columns(const uint8_t* const* rows, int64_t offset, Ints (&out)[8]) {
        const auto at = [&](int r) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[r] + offset));
        };
        __m512i words[2][4];
        for (int half = 0; half < 2; ++half) {
            __m512i two[4];
            for (int p = 0; p < 4; ++p) {
                two[p] = _mm512_inserti64x4(_mm512_castsi256_si512(at(8 * half + p)),
                                            at(8 * half + 4 + p), 1);
            }
            transpose(two, words[half]);
        }
        for (int j = 0; j < 4; ++j) {
            out[j] = {_mm512_shuffle_i32x4(words[0][j], words[1][j], 0x88)};
            out[4 + j] = {_mm512_shuffle_i32x4(words[0][j], words[1][j], 0xdd)};
        }
    }
    // Within each 16 bytes: word p of out[j] = word j of in[p].
    MK_INLINE static void transpose(const __m512i (&in)[4], __m512i (&out)[4]) {
        const __m512i lo01 = _mm512_unpacklo_epi32(in[0], in[1]);
        const __m512i lo23 = _mm512_unpacklo_epi32(in[2], in[3]);
        const __m512i hi01 = _mm512_unpackhi_epi32(in[0], in[1]);
        const __m512i hi23 = _mm512_unpackhi_epi32(in[2], in[3]);
        out[0] = _mm512_unpacklo_epi64(lo01, lo23);
        out[1] = _mm512_unpackhi_epi64(lo01, lo23);
        out[2] = _mm512_unpacklo_epi64(hi01, hi23);
        out[3] = _mm512_unpackhi_epi64(hi01, hi23);
    }
};

}  // namespace
}  // namespace mk::cpu
