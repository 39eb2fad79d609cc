// Vec, a vector of 16 floats, in AVX-512 (F, BW, VL): one register.
#pragma once

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC bug 105593, in its header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#include "cpu/vec.h"

namespace mk::cpu {
namespace {

__mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }

struct Vec {
    static constexpr int kTileM = 3, kTileN = 8;  // 24 + 3 + 1 registers of 32

    __m512 v;

    static Vec set(float a) { return {_mm512_set1_ps(a)}; }
    static Vec widen(Bf16, __m256i bits) {
        return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
    }
    static Vec widen(F16, __m256i bits) { return {_mm512_cvtph_ps(bits)}; }

    static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
    template <class T>
    static Vec load(const T* p) {
        return widen(T{}, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    // The first `count` <= 16, then zeros; what lies behind is not touched.
    static Vec load(const float* p, int count) { return {_mm512_maskz_loadu_ps(first(count), p)}; }
    template <class T>
    static Vec load(const T* p, int count) {
        return widen(T{}, _mm256_maskz_loadu_epi16(first(count), p));
    }

    // The odd and the even ones of 32, or of `count` <= 32 and then zeros.
    static Vec load_odd(const Bf16* p) { return odd(_mm512_loadu_si512(p)); }
    static Vec load_even(const Bf16* p) { return even(_mm512_loadu_si512(p)); }
    static Vec load_odd(const Bf16* p, int count) { return odd(load_pairs(p, count)); }
    static Vec load_even(const Bf16* p, int count) { return even(load_pairs(p, count)); }
    static __m512i load_pairs(const Bf16* p, int count) {
        return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << count) - 1), p);
    }
    static Vec odd(__m512i pairs) {
        const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        return {_mm512_castsi512_ps(_mm512_and_si512(pairs, high))};
    }
    static Vec even(__m512i pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))}; }

    // Rounded to nearest even; every NaN as the positive quiet one without payload.
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void store(float* p, int count) const {
        _mm512_mask_storeu_ps(p, first(count), with_nan(v, set(__builtin_nanf("")).v));
    }
    void store(Bf16* p, int count) const {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i out = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
        _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtepi32_epi16(out));
    }
    void store(F16* p, int count) const {
        const __m512 clean = with_nan(v, set(__builtin_nanf("")).v);
        _mm256_mask_storeu_epi16(p, first(count),
                                 _mm512_cvtps_ph(clean, _MM_FROUND_TO_NEAREST_INT));
    }
    static __m512 with_nan(__m512 a, __m512 nan) {
        return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), nan);
    }

    static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
    friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
    // b if either is a NaN.
    static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
    static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
    Vec round() const {
        return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
    }
    Vec scale(Vec n) const { return {_mm512_scalef_ps(v, n.v)}; }  // * 2^n

    // sums[i] = the sum of the lanes of acc[i]. Each addition folds two registers into one, and the
    // lanes that it adds are those of the summation order.
    MK_INLINE static void reduce(const Vec (&acc)[kTileN], float* sums) {
        static_assert(kTileN == 8);
        // By quarters, which outputs a register holds: [0 0 1 1], [2 2 3 3], [4 4 5 5], [6 6 7 7].
        const __m512 s01 = fold8(acc[0].v, acc[1].v), s23 = fold8(acc[2].v, acc[3].v);
        const __m512 s45 = fold8(acc[4].v, acc[5].v), s67 = fold8(acc[6].v, acc[7].v);
        const __m512 s0123 = fold4(s01, s23), s4567 = fold4(s45, s67);  // [0 1 2 3], [4 5 6 7]
        const __m512 s = fold2(s0123, s4567);  // by pairs: [0 4 1 5 2 6 3 7]
        const __m512 sum = _mm512_add_ps(s, _mm512_permute_ps(s, 0xb1));
        const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
        _mm256_storeu_ps(sums, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, sum)));
    }
    static __m512 fold8(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    }
    static __m512 fold4(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    static __m512 fold2(__m512 a, __m512 b) {
        return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    }
};

}  // namespace
}  // namespace mk::cpu
