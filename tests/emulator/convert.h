// Exact conversions between the floating-point formats of the PTX ISA (section "cvt").
//
// Small formats travel as their bit patterns in the low bits of an unsigned integer, as they do in
// PTX registers. The inline functions are branch-free integer code, so that a loop over the 32
// lanes of a warp vectorises. Narrowing a NaN gives the canonical one of hardware (all bits but the
// sign set); widening keeps sign and payload.
#pragma once

#include <bit>
#include <cstdint>

namespace emu {

// Rounding of cvt: to nearest even, to nearest with ties away from zero, towards zero, down, up.
enum class Round : uint8_t { rn, rna, rz, rm, rp };

struct FloatFormat {
    int exponent_bits;
    int mantissa_bits;    // stored ones, without the hidden bit
    uint32_t max_finite;  // encoding of the largest finite value
    uint32_t nan;         // canonical NaN
    bool has_infinity;    // then its encoding is max_finite + 1
    int unused_bits = 0;  // tf32 sits in the upper bits of a 32-bit register

    constexpr int bias() const { return (1 << (exponent_bits - 1)) - 1; }
    constexpr uint32_t sign_bit() const { return 1u << (exponent_bits + mantissa_bits); }
};

inline constexpr FloatFormat kF16{5, 10, 0x7BFF, 0x7FFF, true};
inline constexpr FloatFormat kBF16{8, 7, 0x7F7F, 0x7FFF, true};
inline constexpr FloatFormat kTF32{8, 10, 0x3FBFF, 0x3FFFF, true, 13};
inline constexpr FloatFormat kE4M3{4, 3, 0x7E, 0x7F, false};
inline constexpr FloatFormat kE5M2{5, 2, 0x7B, 0x7F, true};

// Rounds +-significand * 2^exponent to a format. Too large values become infinity or the largest
// finite value as IEEE 754 has it for the rounding mode; with `satfinite`, or in a format without
// infinity, always the latter.
uint32_t round_to(const FloatFormat& format, bool negative, uint64_t significand, int exponent,
                  Round mode, bool satfinite = false);

// The same for a double (hence for a float): NaN gives the format's NaN, also with `satfinite`;
// infinity counts as a too large value, except that without `satfinite` it stays infinity in every
// rounding mode (NaN if the format has none).
uint32_t encode(const FloatFormat& format, double value, Round mode, bool satfinite = false);

// Exact value of an encoding.
double decode(const FloatFormat& format, uint32_t bits);

// Widens a format of at most 16 bits with a narrower exponent than fp32's. `first_special` is the
// magnitude from which encodings are infinities and NaNs. Word and Float are uint32_t and float, or
// vectors of them.
template <int kExponentBits, int kMantissaBits, class Word, class Float>
inline Float widen(Word bits, uint32_t first_special) {
    constexpr uint32_t kSign = 1u << (kExponentBits + kMantissaBits);
    constexpr uint32_t kRebias = 128 - (1u << (kExponentBits - 1));
    constexpr float kMinNormal = std::bit_cast<float>((kRebias + 1) << 23);
    const Word magnitude = bits & (kSign - 1);
    const Word in_place = magnitude << (23 - kMantissaBits);
    // Read with the smallest normal exponent a subnormal is too large by just that normal.
    const Float subnormal = std::bit_cast<Float>(in_place + ((kRebias + 1) << 23)) - kMinNormal;
    Word result = in_place + (kRebias << 23);
    result = magnitude < (1u << kMantissaBits) ? std::bit_cast<Word>(subnormal) : result;
    result = magnitude >= first_special ? result | 0x7F800000u : result;
    return std::bit_cast<Float>(result | (bits & kSign) << (31 - kExponentBits - kMantissaBits));
}

inline float f16_to_f32(uint16_t bits) {
    return widen<5, 10, uint32_t, float>(bits, kF16.max_finite + 1);
}

inline float e4m3_to_f32(uint8_t bits) {
    return widen<4, 3, uint32_t, float>(bits, kE4M3.max_finite + 1);
}

inline float e5m2_to_f32(uint8_t bits) {
    return widen<5, 2, uint32_t, float>(bits, kE5M2.max_finite + 1);
}

inline float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// fp32 to f16 in the low bits of a word, rounded to nearest even, without saturation. Word and
// Float as for `widen`.
template <class Word, class Float>
inline Word narrow_to_f16(Float value) {
    const Word bits = std::bit_cast<Word>(value);
    const Word magnitude = bits & 0x7FFFFFFFu;
    const Word normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // One unit in the last place of 0.5f is the smallest half: the addition rounds.
    const Float shifted = std::bit_cast<Float>(magnitude) + 0.5f;
    const Word subnormal = std::bit_cast<Word>(shifted) - 0x3F000000u;
    Word half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= (143u << 23) ? Word{} + 0x7C00u : half;  // 65536 and more
    half = magnitude > 0x7F800000u ? half | 0x7FFFu : half;
    // The canonical NaN alone has a carry into the sign bit, which drops the sign.
    return half | ((bits >> 16) & 0x8000u & ~(half + 1u));
}

inline uint16_t f32_to_f16(float value) {
    return static_cast<uint16_t>(narrow_to_f16<uint32_t, float>(value));
}

// Round to nearest even; too large values and infinities give the largest finite one.
inline uint32_t f32_to_e4m3_satfinite(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
    const uint32_t clamped = magnitude < 0x43E00000u ? magnitude : 0x43E00000u;  // 448
    const uint32_t normal = (clamped + 0x7FFFFu + ((clamped >> 20) & 1u) - (120u << 23)) >> 20;
    // One unit in the last place of 2^14 is the smallest e4m3: the addition rounds.
    const uint32_t subnormal =
        std::bit_cast<uint32_t>(std::bit_cast<float>(clamped) + 0x1p14f) - 0x46800000u;
    const uint32_t number = (clamped < (121u << 23) ? subnormal : normal) | (bits >> 24 & 0x80u);
    return magnitude > 0x7F800000u ? 0x7Fu : number;
}

// Round to nearest even, no saturation.
inline uint16_t f32_to_bf16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : rounded);
}

}  // namespace emu
