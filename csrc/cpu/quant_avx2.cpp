// mk_cpu_linear_quant for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "cpu/vec_avx2.h"

namespace mk::cpu {
namespace {

// 16 x 32 bits: two registers, of rows 0-7 and 8-15.
struct Ints {
    static constexpr int kTileM = 2, kTileN = 1;  // 4 of sums, 4 of accumulators, 2 + 1 of factors
    static constexpr int kDirectRows = 1;

    __m256i lo, hi;

    static __m256i all(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
    static Ints set(int32_t a) { return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)}; }
    static Ints load(const uint32_t* p) {
        const auto* const q = reinterpret_cast<const __m256i*>(p);
        return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
    }
    void store(uint32_t* p) const {
        auto* const q = reinterpret_cast<__m256i*>(p);
        _mm256_storeu_si256(q, lo);
        _mm256_storeu_si256(q + 1, hi);
    }

    friend Ints operator+(Ints a, Ints b) {
        return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
    }
    friend Ints operator-(Ints a, Ints b) {
        return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)};
    }
    friend Ints operator&(Ints a, uint32_t b) {
        return {_mm256_and_si256(a.lo, all(b)), _mm256_and_si256(a.hi, all(b))};
    }
    friend Ints operator^(Ints a, uint32_t b) {
        return {_mm256_xor_si256(a.lo, all(b)), _mm256_xor_si256(a.hi, all(b))};
    }
    friend Ints operator|(Ints a, Ints b) {
        return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)};
    }
    friend Ints operator<<(Ints a, int n) {
        return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
    }
    friend Ints operator>>(Ints a, int n) {
        return {_mm256_srli_epi32(a.lo, n), _mm256_srli_epi32(a.hi, n)};
    }
    Ints divide(int n) const { return {_mm256_srai_epi32(lo, n), _mm256_srai_epi32(hi, n)}; }
    static MK_INLINE Ints spread_bits(Ints a) {
        a = a & 15;
        const Ints two = a | a << 14;  // bits 0, 1, and at 16, 17 bits 2, 3
        return (two << 4 | two << 11) & 0x10101010;
    }
    static Ints and_or(Ints a, uint32_t mask, Ints b) { return (a & mask) | b; }

    static Ints dot(Ints acc, Ints w, Ints x) {
        return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(w.lo, x.lo)),
                _mm256_add_epi32(acc.hi, _mm256_madd_epi16(w.hi, x.hi))};
    }
    static Ints round(Vec a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
    static Ints max(Ints a, Ints b) {
        return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)};
    }
    uint32_t largest() const {
        uint32_t lanes[kLanes], most = 0;
        store(lanes);
        for (const uint32_t lane : lanes) most = lane > most ? lane : most;
        return most;
    }
    int32_t sum() const {
        const __m256i eight = _mm256_add_epi32(lo, hi);
        __m128i four =
            _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
    }
    Vec to_float() const { return {_mm256_cvtepi32_ps(lo), _mm256_cvtepi32_ps(hi)}; }
    Vec half() const { return {half(lo), half(hi)}; }
    static __m256 half(__m256i a) {
        const __m256i low = _mm256_and_si256(a, all(0xffff));
        return _mm256_cvtph_ps(
            _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
    }

    MK_INLINE static Ints gather(const uint8_t* const* rows, int64_t offset) {
        uint32_t words[kLanes];
        for (int r = 0; r < kLanes; ++r) __builtin_memcpy(words + r, rows[r] + offset, 4);
        return load(words);
    }

    MK_INLINE static void columns(const uint8_t* const* rows, int64_t offset, Ints (&out)[4]) {
        __m256i lo[4], hi[4];
        columns(rows, offset, lo);
        columns(rows + 8, offset, hi);
        for (int j = 0; j < 4; ++j) out[j] = {lo[j], hi[j]};
    }
    // Of 8 rows: lane i of four[p] is 16 bytes of row 4 i + p.
    MK_INLINE static void columns(const uint8_t* const* rows, int64_t offset, __m256i (&out)[4]) {
        const auto at = [&](int r) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + offset));
        };
        __m256i four[4];
        for (int p = 0; p < 4; ++p) {
            four[p] = _mm256_inserti128_si256(_mm256_castsi128_si256(at(p)), at(4 + p), 1);
        }
        const __m256i lo01 = _mm256_unpacklo_epi32(four[0], four[1]);
        const __m256i lo23 = _mm256_unpacklo_epi32(four[2], four[3]);
        const __m256i hi01 = _mm256_unpackhi_epi32(four[0], four[1]);
        const __m256i hi23 = _mm256_unpackhi_epi32(four[2], four[3]);
        out[0] = _mm256_unpacklo_epi64(lo01, lo23);
        out[1] = _mm256_unpackhi_epi64(lo01, lo23);
        out[2] = _mm256_unpacklo_epi64(hi01, hi23);
        out[3] = _mm256_unpackhi_epi64(hi01, hi23);
    }
    static MK_INLINE void columns(const uint8_t* const* rows, int64_t offset, Ints (&out)[8]) {
        Ints half[4];
        for (int h = 0; h < 2; ++h) {
            columns(rows, offset + 16 * h, half);
            for (int j = 0; j < 4; ++j) out[4 * h + j] = half[j];
        }
    }
};

}  // namespace
}  // namespace mk::cpu

#include "cpu/quant_halves.h"

namespace mk::cpu {
namespace {
using Order = Halves;
}
}  // namespace mk::cpu

#include "cpu/quant_dequantize.h"
#include "cpu/quant_kernels.h"

const mk::cpu::QuantKernels mk::cpu::kQuantAvx2 = {mk::cpu::kQuantProducts, mk::cpu::dequantize};

#endif
