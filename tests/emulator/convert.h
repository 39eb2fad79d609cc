// Exact conversions between the floating-point formats of the PTX ISA (section "cvt").
//
// Small formats travel as their bit patterns in the low bits of an unsigned integer, as they do in
// PTX registers. The inline functions are branch-free integer code, so that a loop over the 32
// lanes of a warp vectorises. NaN results are canonical, as on hardware: all bits but the sign set,
// sign clear. (bfloat16 to fp32 is a shift and keeps the payload.)
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

inline float f16_to_f32(uint16_t half) {
    const uint32_t magnitude = half & 0x7FFFu;
    const uint32_t normal = (magnitude << 13) + (112u << 23);
    // 2^-14 + m * 2^-24 is exact with the mantissa in place; so is the difference.
    const float subnormal = std::bit_cast<float>((113u << 23) + (magnitude << 13)) - 0x1p-14f;
    const uint32_t special = magnitude == 0x7C00u ? 0x7F800000u : 0x7FFFFFFFu;
    uint32_t bits = magnitude < 0x0400u ? std::bit_cast<uint32_t>(subnormal) : normal;
    bits = magnitude >= 0x7C00u ? special : bits;
    const uint32_t sign = magnitude > 0x7C00u ? 0u : (half & 0x8000u) << 16;
    return std::bit_cast<float>(bits | sign);
}

inline float bf16_to_f32(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Round to nearest even, no saturation.
inline uint16_t f32_to_f16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // One unit in the last place of 0.5f is the smallest half: the addition rounds.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    const uint32_t subnormal = std::bit_cast<uint32_t>(shifted) - 0x3F000000u;
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= (143u << 23) ? 0x7C00u : half;  // 65536 and more
    half |= (bits >> 16) & 0x8000u;
    return static_cast<uint16_t>(magnitude > 0x7F800000u ? 0x7FFFu : half);
}

// Round to nearest even, no saturation.
inline uint16_t f32_to_bf16(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFu : rounded);
}

inline float e4m3_to_f32(uint8_t bits) {
    // In place, the exponent reads 120 too low; the product is exact, also for subnormals.
    const float magnitude = std::bit_cast<float>((bits & 0x7Fu) << 20) * 0x1p120f;
    const uint32_t sign = (bits & 0x80u) << 24;
    const uint32_t result = std::bit_cast<uint32_t>(magnitude) | sign;
    return std::bit_cast<float>((bits & 0x7Fu) == 0x7Fu ? 0x7FFFFFFFu : result);
}

// The upper byte of a half.
inline float e5m2_to_f32(uint8_t bits) { return f16_to_f32(static_cast<uint16_t>(bits << 8)); }

}  // namespace emu
