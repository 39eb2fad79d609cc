// The narrow sums of fp8 products: mma.sync of sm_89 and wgmma of sm_90.
//
// After Xie et al., "MMA-Sim", arXiv:2511.10909, who measured them: the products of a step and the
// accumulator are aligned to the largest exponent among them, cut (towards zero) 13 bits below it,
// and added exactly. An fp32 result keeps 13 bits of its mantissa, also cut; an f16 one is rounded
// to nearest. The exponent of a product is the sum of its factors', that of a zero is below all.
//
//   1.0 + 32 * 2^-14   = 1.0         each product is cut to 0
//   1.0 + 32 * 2^-13   = 1.00390625  each is one unit of the aligned sum
#pragma once

#include "mma_lanes.h"

namespace emu {

constexpr int kNarrowBits = 13;      // of a sum, below the largest exponent
constexpr int kZeroExponent = -512;  // of a zero factor
constexpr int kMaxNarrowK = 32;

template <class Ints, class Floats>
inline Ints exponents(Floats values, int smallest) {
    const Ints magnitude = std::bit_cast<Ints>(values) & 0x7FFFFFFF;
    const Ints e = (magnitude >> 23) - 127;
    const Ints normal = e < smallest ? Ints{} + smallest : e;  // subnormals keep the smallest one
    return magnitude == 0 ? Ints{} + kZeroExponent : normal;
}

constexpr int smallest_exponent(MmaType type) {
    using enum MmaType;
    return type == e4m3 ? -6 : type == f32 ? -126 : -14;  // e5m2 has that of f16
}

inline HalfFloats power_of_two(HalfInts exponent) {
    return std::bit_cast<HalfFloats>((exponent + 127) << 23);
}

// rows += a b for eight rows and eight columns: a[k][8 of a_stride], b[k][8 of b_stride].
inline void add_narrow(const MmaOp& op, int k, const double* a, int a_stride, const double* b,
                       int b_stride, Octet* rows) {
    HalfFloats columns[kMaxNarrowK];
    HalfInts column_exponents[kMaxNarrowK];
    float a_values[kMaxNarrowK][kGroups];
    int32_t a_exponents[kMaxNarrowK][kGroups];
    for (int i = 0; i < k; ++i) {
        columns[i] = __builtin_convertvector(load<Octet>(b + i * b_stride), HalfFloats);
        column_exponents[i] = exponents<HalfInts>(columns[i], smallest_exponent(op.b));
        const auto values = __builtin_convertvector(load<Octet>(a + i * a_stride), HalfFloats);
        store(a_values[i], values);
        store(a_exponents[i], exponents<HalfInts>(values, smallest_exponent(op.a)));
    }
    for (int row = 0; row < kGroups; ++row) {
        const auto start = __builtin_convertvector(rows[row], HalfFloats);
        HalfInts largest = HalfInts{} + 2 * kZeroExponent;
        HalfFloats total{};  // far from overflow: finite unless a product is not
        for (int i = 0; i < k; ++i) {
            const HalfInts e = column_exponents[i] + a_exponents[i][row];
            largest = e > largest ? e : largest;
            total += columns[i] * a_values[i][row];
        }
        const HalfInts no_products = largest <= kZeroExponent / 2;
        const HalfInts e = exponents<HalfInts>(start, smallest_exponent(op.acc));
        largest = e > largest ? e : largest;
        largest = no_products ? HalfInts{} : largest;

        const HalfFloats to_units = power_of_two(kNarrowBits - largest);
        HalfWords sum =
            std::bit_cast<HalfWords>(__builtin_convertvector(start * to_units, HalfInts));
        for (int i = 0; i < k; ++i) {
            const HalfFloats product = columns[i] * a_values[i][row] * to_units;
            sum += std::bit_cast<HalfWords>(__builtin_convertvector(product, HalfInts));
        }
        HalfFloats result = __builtin_convertvector(std::bit_cast<HalfInts>(sum), HalfFloats) *
                            power_of_two(largest - kNarrowBits);
        result = no_products ? start : result;
        if (op.acc == MmaType::f16) {
            const auto bits = narrow_to_f16<HalfWords>(result);
            result = widen<5, 10, HalfWords, HalfFloats>(bits, kF16.max_finite + 1);
        } else {
            constexpr int32_t kDropped = (1 << (23 - kNarrowBits)) - 1;
            result = std::bit_cast<HalfFloats>(std::bit_cast<HalfInts>(result) & ~kDropped);
        }
        // Infinities and NaN: x - x is 0 for all other numbers.
        const HalfInts finite = (total - total == 0) & (start - start == 0);
        result = finite ? result : total + start;
        rows[row] = __builtin_convertvector(result, Octet);
    }
}

}  // namespace emu
