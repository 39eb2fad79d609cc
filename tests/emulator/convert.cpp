#include "convert.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace emu {
namespace {

constexpr int kDoubleMantissaBits = 52;

uint32_t overflow(const FloatFormat& format, bool negative, Round mode, bool satfinite) {
    const bool towards_zero =
        mode == Round::rz || (mode == Round::rm && !negative) || (mode == Round::rp && negative);
    const bool to_infinity = format.has_infinity && !satfinite && !towards_zero;
    return to_infinity ? format.max_finite + 1 : format.max_finite;
}

// Whether to add one to the kept part, where `rest` of `unit` was cut off.
bool rounds_up(uint64_t kept, uint64_t rest, uint64_t unit, bool negative, Round mode) {
    const uint64_t half = unit / 2;
    switch (mode) {
        case Round::rn:
            return rest > half || (rest == half && (kept & 1));
        case Round::rna:
            return rest >= half;
        case Round::rz:
            return false;
        case Round::rm:
            return rest != 0 && negative;
        case Round::rp:
            return rest != 0 && !negative;
    }
    return false;
}

}  // namespace

uint32_t round_to(const FloatFormat& format, bool negative, uint64_t significand, int exponent,
                  Round mode, bool satfinite) {
    const uint32_t sign = negative ? format.sign_bit() : 0;
    if (significand == 0) return sign << format.unused_bits;
    const int leading = std::countl_zero(significand);
    significand <<= leading;  // now 2^63 <= significand < 2^64
    exponent -= leading;

    const int min_exponent = 1 - format.bias();
    const int value_exponent = std::max(exponent + 63, min_exponent);
    // Bits below one unit in the last place of the result.
    int cut = value_exponent - format.mantissa_bits - exponent;
    if (cut > 63) {  // no bit is kept: all that counts is how the rest compares with half a unit
        significand = cut == 64 ? significand >> 1 | (significand & 1) : 1;
        cut = 63;
    }
    const uint64_t unit = uint64_t{1} << cut;
    uint64_t kept = significand >> cut;
    kept += rounds_up(kept, significand & (unit - 1), unit, negative, mode);
    // The hidden bit in `kept` adds one to the exponent field; so does a carry out of the mantissa.
    const uint64_t biased = static_cast<uint64_t>(value_exponent - min_exponent);
    const uint64_t magnitude = (biased << format.mantissa_bits) + kept;
    const uint32_t bits = magnitude > format.max_finite
                              ? overflow(format, negative, mode, satfinite)
                              : static_cast<uint32_t>(magnitude);
    return (bits | sign) << format.unused_bits;
}

uint32_t encode(const FloatFormat& format, double value, Round mode, bool satfinite) {
    const bool negative = std::signbit(value);
    if (std::isnan(value))
        return (format.nan << format.unused_bits) | ((1u << format.unused_bits) - 1);
    if (std::isinf(value)) {
        if (!format.has_infinity && !satfinite) return format.nan;
        const uint32_t magnitude = satfinite ? format.max_finite : format.max_finite + 1;
        return (magnitude | (negative ? format.sign_bit() : 0)) << format.unused_bits;
    }
    int exponent = 0;
    const double fraction = std::frexp(std::abs(value), &exponent);  // in [0.5, 1)
    const auto significand = static_cast<uint64_t>(std::ldexp(fraction, kDoubleMantissaBits + 1));
    return round_to(format, negative, significand, exponent - kDoubleMantissaBits - 1, mode,
                    satfinite);
}

double decode(const FloatFormat& format, uint32_t bits) {
    bits >>= format.unused_bits;
    const uint32_t magnitude = bits & (format.sign_bit() - 1);
    const double sign = bits & format.sign_bit() ? -1.0 : 1.0;
    if (magnitude > format.max_finite) {
        const bool infinite = format.has_infinity && magnitude == format.max_finite + 1;
        return infinite ? sign * std::numeric_limits<double>::infinity()
                        : std::numeric_limits<double>::quiet_NaN();
    }
    const uint32_t hidden = 1u << format.mantissa_bits;
    const uint32_t biased = magnitude >> format.mantissa_bits;
    const uint32_t significand = (magnitude & (hidden - 1)) | (biased ? hidden : 0);
    const int exponent =
        static_cast<int>(std::max(biased, 1u)) - format.bias() - format.mantissa_bits;
    return sign * std::ldexp(significand, exponent);
}

}  // namespace emu
