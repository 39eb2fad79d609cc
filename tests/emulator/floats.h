// What the fp32 instructions have in common: flushing, canonical NaN, saturation, min and max.
#pragma once

#include <bit>
#include <cstdint>

namespace emu {

// Subnormals become zeros of the same sign.
template <bool Ftz>
inline float flush(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (!Ftz) return x;
    return std::bit_cast<float>((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

// The NaN that the hardware produces; the host's carries sign and payload of an operand.
inline float canonical(float x) { return x != x ? std::bit_cast<float>(0x7fffffffu) : x; }
inline double canonical(double x) {
    return x != x ? std::bit_cast<double>(0x7fffffffffffffffull) : x;
}

inline float saturate(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline double saturate(double x) { return x > 0.0 ? (x < 1.0 ? x : 1.0) : 0.0; }

// The operand that is not NaN wins (with Nan: a NaN does); -0 is below +0.
template <bool Max, bool Nan, class T>
inline T min_max(T a, T b) {
    using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
    const bool b_is_less = b < a || (a == b && std::bit_cast<Bits>(b) < std::bit_cast<Bits>(a));
    const T pick = b_is_less != Max ? b : a;
    const T number = a != a ? b : b != b ? a : pick;
    return canonical(Nan && (a != a || b != b) ? a + b : number);
}

}  // namespace emu
