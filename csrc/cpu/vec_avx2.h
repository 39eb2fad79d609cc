// Vec, a vector of 16 floats, in AVX2, FMA and F16C: two registers.
#pragma once

#include <immintrin.h>

#include "cpu/vec.h"

namespace mk::cpu {
namespace {

struct Vec {
    static constexpr int kTileM = 2, kTileN = 3;  // 12 + 2 + 2 registers of 16

    __m256 lo, hi;

    static Vec set(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }

    static Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static Vec load(const Bf16* p) { return {widen(p), widen(p + 8)}; }
    static Vec load(const F16* p) { return {widen(p), widen(p + 8)}; }
    // The first `count` <= 16, then zeros; what lies behind is not touched.
    template <class T>
    static Vec load(const T* p, int count) {
        T all[kLanes] = {};
        __builtin_memcpy(all, p, count * sizeof(T));
        return load(all);
    }
    static __m128i load_bits(const void* p) {
        return _mm_loadu_si128(static_cast<const __m128i*>(p));
    }
    static __m256 widen(const Bf16* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bits(p)), 16));
    }
    static __m256 widen(const F16* p) { return _mm256_cvtph_ps(load_bits(p)); }

    // The odd and the even ones of 32, or of `count` <= 32 and then zeros.
    static Vec load_odd(const Bf16* p) { return {odd(p), odd(p + kLanes)}; }
    static Vec load_even(const Bf16* p) { return {even(p), even(p + kLanes)}; }
    static Vec load_odd(const Bf16* p, int count) {
        Bf16 all[2 * kLanes] = {};
        __builtin_memcpy(all, p, count * sizeof(Bf16));
        return load_odd(all);
    }
    static Vec load_even(const Bf16* p, int count) {
        Bf16 all[2 * kLanes] = {};
        __builtin_memcpy(all, p, count * sizeof(Bf16));
        return load_even(all);
    }
    static __m256i load_pairs(const void* p) {
        return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    }
    static __m256 odd(const Bf16* p) {
        const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
        return _mm256_castsi256_ps(_mm256_and_si256(load_pairs(p), high));
    }
    static __m256 even(const Bf16* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(load_pairs(p), 16));
    }

    // Rounded to nearest even; every NaN as the positive quiet one without payload.
    void store(float* p) const {
        _mm256_storeu_ps(p, lo);
        _mm256_storeu_ps(p + 8, hi);
    }
    template <class T>
    void store(T* p, int count) const {
        T all[kLanes];
        store_half(all, clean(lo));
        store_half(all + 8, clean(hi));
        __builtin_memcpy(p, all, count * sizeof(T));
    }
    static __m256 clean(__m256 a) {
        const __m256 nan = _mm256_set1_ps(__builtin_nanf(""));
        return _mm256_blendv_ps(a, nan, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    }
    static void store_half(float* p, __m256 a) { _mm256_storeu_ps(p, a); }
    static void store_half(Bf16* p, __m256 a) {
        const __m256i bits = _mm256_castps_si256(a);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
        const __m256i out = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
        _mm_storeu_si128(
            reinterpret_cast<__m128i*>(p),
            _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1)));
    }
    static void store_half(F16* p, __m256 a) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
    }

    static Vec fma(Vec a, Vec b, Vec c) {
        return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
    }
    friend Vec operator+(Vec a, Vec b) {
        return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
    }
    friend Vec operator-(Vec a, Vec b) {
        return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
    }
    friend Vec operator*(Vec a, Vec b) {
        return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
    }
    friend Vec operator/(Vec a, Vec b) {
        return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
    }
    // b if either is a NaN.
    static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
    static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
    Vec round() const {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(lo, kNearest), _mm256_round_ps(hi, kNearest)};
    }
    // * 2^n, in two steps because 2^128 is no float.
    Vec scale(Vec n) const { return {scale(lo, n.lo), scale(hi, n.hi)}; }
    static __m256 scale(__m256 a, __m256 n) {
        const __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
        return _mm256_mul_ps(_mm256_mul_ps(a, pow2(half)), pow2(_mm256_sub_epi32(all, half)));
    }
    static __m256 pow2(__m256i n) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
    }

    // sums[i] = the sum of the lanes of acc[i].
    MK_INLINE static void reduce(const Vec (&acc)[kTileN], float* sums) {
        for (int i = 0; i < kTileN; ++i) {
            const __m256 s8 = _mm256_add_ps(acc[i].lo, acc[i].hi);
            const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
            const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
            _mm_store_ss(sums + i, _mm_add_ss(s2, _mm_movehdup_ps(s2)));
        }
    }
};

}  // namespace
}  // namespace mk::cpu
