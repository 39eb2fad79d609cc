// Vector helpers of mma.cpp and wgmma.cpp: elements to numbers, accumulators to rows and back.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "convert.h"
#include "mma.h"

namespace emu {

constexpr int kBlockBytes = 16;        // of k, in one register of A or B
constexpr int kMaxBlockElements = 32;  // s4
constexpr int kMaxRows = 16;
constexpr int kCols = 8;
constexpr int kGroups = 8;  // of four lanes: the g of lane 4 * g + t

// Eight rows of A or eight columns of B at one k; or eight columns of one row of D.
using Octet = double __attribute__((vector_size(64)));
using OctetBits = int64_t __attribute__((vector_size(64)));
// Two octets, and the same many narrower numbers.
using Doubles = double __attribute__((vector_size(128)));
using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Ints = int32_t __attribute__((vector_size(64)));
// Eight of them.
using HalfFloats = float __attribute__((vector_size(32)));
using HalfWords = uint32_t __attribute__((vector_size(32)));
using HalfInts = int32_t __attribute__((vector_size(32)));
using Halves = uint16_t __attribute__((vector_size(32)));

template <class To>
inline To load(const void* from) {
    To value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class From>
inline void store(void* to, From value) {
    std::memcpy(to, &value, sizeof value);
}

constexpr int element_bits(MmaType type) {
    using enum MmaType;
    switch (type) {
        case f64:
            return 64;
        case tf32:
        case f32:
        case s32:
            return 32;
        case f16:
        case bf16:
            return 16;
        case e4m3:
        case e5m2:
        case s8:
        case u8:
            return 8;
        case s4:
        case u4:
            return 4;
        case b1:
            return 1;
    }
    return 0;
}

constexpr int block_elements(MmaType type) { return 8 * kBlockBytes / element_bits(type); }

// Values of the elements in the low bits of each word.
template <MmaType type, class W = Words, class F = Floats, class I = Ints>
inline F element_values(W words) {
    using enum MmaType;
    if constexpr (type == f16) return widen<5, 10, W, F>(words, kF16.max_finite + 1);
    if constexpr (type == e4m3) return widen<4, 3, W, F>(words, kE4M3.max_finite + 1);
    if constexpr (type == e5m2) return widen<5, 2, W, F>(words, kE5M2.max_finite + 1);
    if constexpr (type == bf16) return std::bit_cast<F>(words << 16);
    // The tensor core does not read the lower 13 bits of a tf32 operand.
    if constexpr (type == tf32) return std::bit_cast<F>(words & ~0x1FFFu);
    // Integers: to the top of the word, then down again with the sign or without.
    constexpr int kUnused = 32 - element_bits(type);
    if constexpr (type == s8 || type == s4)
        return __builtin_convertvector(std::bit_cast<I>(words << kUnused) >> kUnused, F);
    return __builtin_convertvector(words << kUnused >> kUnused, F);
}

// Eight rows of C. Eight lanes hold the even columns of two rows in the first register (or in the
// low halves of an f16 one) and the odd ones in the second.
inline void unpack_acc(MmaType type, const uint32_t (*c)[32], Octet* rows) {
    for (int g = 0; g < kGroups; g += 2) {
        const auto even = load<HalfWords>(&c[0][4 * g]);
        const auto odd = type == MmaType::f16 ? even >> 16 : load<HalfWords>(&c[1][4 * g]);
        const Words words = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5,
                                                    13, 6, 14, 7, 15);
        Doubles values;
        if (type == MmaType::f32) {
            values = __builtin_convertvector(std::bit_cast<Floats>(words), Doubles);
        } else if (type == MmaType::s32) {
            values = __builtin_convertvector(std::bit_cast<Ints>(words), Doubles);
        } else {
            values = __builtin_convertvector(element_values<MmaType::f16>(words), Doubles);
        }
        store(&rows[g], values);
    }
}

inline Words to_f32_bits(Doubles values) {
    const auto bits = std::bit_cast<Words>(__builtin_convertvector(values, Floats));
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? Words{} + 0x7FFFFFFFu : bits;
}

// A sum of products is far below 2^31, so one step is enough to wrap around.
inline Octet to_s32_range(Octet values, bool satfinite) {
    constexpr double kMin = -0x1p31, kMax = 0x1p31 - 1, kModulus = 0x1p32;
    const Octet from_below = satfinite ? Octet{} + kMin : values + kModulus;
    const Octet from_above = satfinite ? Octet{} + kMax : values - kModulus;
    return values < kMin ? from_below : values > kMax ? from_above : values;
}

inline void pack_acc(const MmaOp& op, Octet* rows, uint32_t (*d)[32]) {
    if (op.acc == MmaType::s32)
        for (int g = 0; g < kGroups; ++g) rows[g] = to_s32_range(rows[g], op.satfinite);
    for (int g = 0; g < kGroups; g += 2) {
        const auto values = load<Doubles>(&rows[g]);
        Words words;
        if (op.acc == MmaType::f32) {
            words = to_f32_bits(values);
        } else if (op.acc == MmaType::s32) {
            words = std::bit_cast<Words>(__builtin_convertvector(values, Ints));
        } else {
            // Values are truncated to fp32 already: this rounds once.
            words = narrow_to_f16<Words>(__builtin_convertvector(values, Floats));
        }
        HalfWords even = __builtin_shufflevector(words, words, 0, 2, 4, 6, 8, 10, 12, 14);
        const HalfWords odd = __builtin_shufflevector(words, words, 1, 3, 5, 7, 9, 11, 13, 15);
        if (op.acc == MmaType::f16) {
            even |= odd << 16;
        } else {
            store(&d[1][4 * g], odd);
        }
        store(&d[0][4 * g], even);
    }
}

// Values of fp32 to those of f16.
inline void round_to_f16(Octet* rows) {
    for (int g = 0; g < kGroups; g += 2) {
        const auto values = __builtin_convertvector(load<Doubles>(&rows[g]), Floats);
        const Words bits = narrow_to_f16<Words>(values);
        store(&rows[g], __builtin_convertvector(element_values<MmaType::f16>(bits), Doubles));
    }
}

// Drops the mantissa bits that fp32 does not have: rounding towards zero.
inline Octet truncate_to_f32(Octet values) {
    constexpr int64_t kDropped = (int64_t{1} << (52 - 23)) - 1;
    return std::bit_cast<Octet>(std::bit_cast<OctetBits>(values) & ~kDropped);
}

}  // namespace emu
