// The ten types of GGUF blocks, unpacked over Ints, a vector of 16 x 32 bits that the including
// file has defined (as Order): lane r belongs to row r of 16. minitron_kernels/quantized.py draws
// the blocks.
//
// A type has kBlock, the columns that share a scale; kHasMin; kBias, where it has none,
// log2 of what its integers are biased by; kColumns and kBytes of a stored block; and unpack(rows,
// columns, to), which unpacks `columns` columns, up to a group, from where rows[0 ... 15] point to.
//
// A field of the four bytes of a word belongs to four columns that follow each other. So 16 or 32
// bytes of each of the 16 rows become 4 or 8 vectors, word j of every row in vector j, and a field
// is shifted to bit 0 of all four bytes, which Order::put stores as its products want them.
#pragma once

#include "cpu/quant.h"

namespace mk::cpu {
namespace {

// One copy of each, for products and for decoding.
#define MK_NOINLINE __attribute__((noinline))

using Rows = const uint8_t* const*;

// ---- pieces of blocks ----

// The words of 16 and of 32 bytes of each row.
struct Words {
    Ints word[4];
};
struct MoreWords {
    Ints word[8];
};

MK_INLINE Words words_at(Rows rows, int64_t offset) {
    Words w;
    Ints::columns(rows, offset, w.word);
    return w;
}
MK_INLINE MoreWords more_words_at(Rows rows, int64_t offset) {
    MoreWords w;
    Ints::columns(rows, offset, w.word);
    return w;
}

// A half-precision number of each row, which is not the last one of its block; one that is.
MK_INLINE Vec half_at(Rows rows, int64_t offset) { return Ints::gather(rows, offset).half(); }
MK_INLINE Vec last_half_at(Rows rows, int64_t offset) {
    return (Ints::gather(rows, offset - 2) >> 16).half();
}

// Where the unpacked numbers of 16 rows go.
struct Target {
    QuantPanel& panel;
    int first;  // row

    // Four columns from `column` of these rows, a byte each.
    MK_INLINE void put(int column, Ints four) const {
        Order::put(panel.q[column / 4 * Order::kWords] + first, four);
    }
    // The same, of bytes that have a field at `shift`.
    template <uint32_t kMask>
    MK_INLINE void put_fields(int column, Ints bytes, int shift) const {
        put(column, (bytes >> shift) & (kMask * 0x01010101));
    }
    MK_INLINE void put_scale(int block, Vec scale) const {
        scale.store(panel.scale[block] + first);
    }
    MK_INLINE void put_minimum(int block, Vec minimum) const {
        minimum.store(panel.minimum[block] + first);
    }
};

// ---- 32 columns: scale, perhaps minimum, perhaps fifth bits, low bits ----

template <bool kHasMin_, bool kHasFifth, int kBias_>
struct Simple {
    static constexpr int kBlock = 32, kColumns = 32, kBias = kBias_;
    static constexpr bool kHasMin = kHasMin_;
    static constexpr int kHeader = kHasMin ? 4 : 2, kLow = kHeader + (kHasFifth ? 4 : 0);
    static constexpr int kBytes = kLow + 16;

    static MK_NOINLINE void unpack(Rows rows, int columns, const Target& to) {
        for (int b = 0; b < columns / 32; ++b) {
            const int at = b * kBytes;
            const Ints header = Ints::gather(rows, at);
            to.put_scale(b, header.half());
            if constexpr (kHasMin) to.put_minimum(b, (header >> 16).half());
            const Words low = words_at(rows, at + kLow);
            const int q = 32 * b;
            if constexpr (!kHasFifth) {
                unroll<4>([&](auto j) {
                    to.template put_fields<15>(q + 4 * j.value, low.word[j.value], 0);
                    to.template put_fields<15>(q + 16 + 4 * j.value, low.word[j.value], 4);
                });
            } else {
                const Ints fifth = Ints::gather(rows, at + kHeader);
                unroll<4>([&](auto j) {
                    const Ints w = low.word[j.value], bits = fifth >> (4 * j.value);
                    to.put(q + 4 * j.value, with_fifth(w, bits & 15));
                    to.put(q + 16 + 4 * j.value, with_fifth(w >> 4, (bits >> 16) & 15));
                });
            }
        }
    }

    // Bits 0 ... 3 of `fifth` are those of 4 columns.
    static MK_INLINE Ints with_fifth(Ints low, Ints fifth) {
        const Ints two = fifth | fifth << 14;  // bits 0, 1, and at 16, 17 bits 2, 3
        const Ints four = two << 4 | two << 11;
        return Ints::and_or(four, 0x10101010, low & 0x0f0f0f0f);
    }
};

using Q4_0 = Simple<false, false, 3>;
using Q4_1 = Simple<true, false, 0>;
using Q5_0 = Simple<false, true, 4>;
using Q5_1 = Simple<true, true, 0>;

struct Q8_0 {
    static constexpr int kBlock = 32, kColumns = 32, kBytes = 34, kBias = 7;
    static constexpr bool kHasMin = false;

    static MK_NOINLINE void unpack(Rows rows, int columns, const Target& to) {
        for (int b = 0; b < columns / 32; ++b) {
            const int at = b * kBytes;
            to.put_scale(b, half_at(rows, at));
            const MoreWords all = more_words_at(rows, at + 2);
            unroll<8>(
                [&](auto j) { to.put(32 * b + 4 * j.value, all.word[j.value] ^ 0x80808080); });
        }
    }
};

// ---- 256 columns ----

struct KType {
    static constexpr int kColumns = 256;
};

// Bytes 0-15: scale and minimum of 16 columns, 4 bits each; 16-79: 2 x 32 bytes of 4 x 2 bits.
struct Q2_K : KType {
    static constexpr int kBlock = 16, kBytes = 84, kBias = 0;
    static constexpr bool kHasMin = true;

    static MK_NOINLINE void unpack(Rows rows, int, const Target& to) {
        const Vec d = half_at(rows, 80), minus_dmin = last_half_at(rows, 82) * Vec::set(-1.f);
        const Words both = words_at(rows, 0);
        unroll<16>([&](auto b) {
            const Ints word = both.word[b.value / 4] >> (8 * (b.value % 4));
            to.put_scale(b.value, d * (word & 15).to_float());
            to.put_minimum(b.value, minus_dmin * ((word >> 4) & 15).to_float());
        });
        for (int half = 0; half < 2; ++half) {
            const MoreWords all = more_words_at(rows, 16 + 32 * half);
            unroll<8>([&](auto j) {
                unroll<4>([&](auto f) {
                    const int column = 128 * half + 32 * f.value + 4 * j.value;
                    to.template put_fields<3>(column, all.word[j.value], 2 * f.value);
                });
            });
        }
    }
};

// Bytes 0-31: third bits, bit 4 * half + field of a byte; 32-95: as in Q2_K; 96-107: 16 scales.
struct Q3_K : KType {
    static constexpr int kBlock = 16, kBytes = 110, kBias = 2;
    static constexpr bool kHasMin = false;

    static MK_NOINLINE void unpack(Rows rows, int, const Target& to) {
        const Vec d = last_half_at(rows, 108), bias = Vec::set(32.f);
        const Ints low[2] = {Ints::gather(rows, 96), Ints::gather(rows, 100)};
        const Ints high = Ints::gather(rows, 104);
        unroll<16>([&](auto b) {
            constexpr int kByte = 8 * (b.value % 4);
            const Ints four = (low[b.value / 4 % 2] >> (kByte + 4 * (b.value / 8))) & 15;
            const Ints two = (high >> (kByte + 2 * (b.value / 4))) & 3;
            to.put_scale(b.value, d * ((four | two << 4).to_float() - bias));
        });
        const MoreWords third = more_words_at(rows, 0);
        unroll<2>([&](auto half) {
            const MoreWords all = more_words_at(rows, 32 + 32 * half.value);
            unroll<8>([&](auto j) {
                const Ints w = all.word[j.value], t = third.word[j.value];
                unroll<4>([&](auto f) {
                    constexpr int kBit = 4 * half.value + f.value;  // of the third bits
                    const Ints high = kBit < 2 ? t << (2 - kBit) : t >> (kBit - 2);
                    to.put(128 * half.value + 32 * f.value + 4 * j.value,
                           Ints::and_or(high, 0x04040404, (w >> (2 * f.value)) & 0x03030303));
                });
            });
        });
    }
};

// Bytes 4-15: 8 scales and minima. Words: (2 bits of scale 4-7, scale 0-3), (2 bits of minimum 4-7,
// minimum 0-3), (low bits of minimum 4-7, low bits of scale 4-7), the first field the higher bits.
MK_INLINE void put_scales_and_minima(Rows rows, const Target& to) {
    const Words header = words_at(rows, 0);
    const Vec d = header.word[0].half(),
              minus_dmin = (header.word[0] >> 16).half() * Vec::set(-1.f);
    const Ints scales = header.word[1], minima = header.word[2], low = header.word[3];
    unroll<4>([&](auto b) {
        constexpr int kByte = 8 * b.value;
        to.put_scale(b.value, d * ((scales >> kByte) & 63).to_float());
        to.put_minimum(b.value, minus_dmin * ((minima >> kByte) & 63).to_float());
        const Ints low_s = (low >> kByte) & 15, low_m = (low >> (kByte + 4)) & 15;
        const Ints scale = Ints::and_or(scales >> (kByte + 2), 48, low_s);
        const Ints minimum = Ints::and_or(minima >> (kByte + 2), 48, low_m);
        to.put_scale(b.value + 4, d * scale.to_float());
        to.put_minimum(b.value + 4, minus_dmin * minimum.to_float());
    });
}

// Bytes 16-143: 4 x 32 bytes of 2 x 4 bits.
struct Q4_K : KType {
    static constexpr int kBlock = 32, kBytes = 144, kBias = 0;
    static constexpr bool kHasMin = true;

    static MK_NOINLINE void unpack(Rows rows, int, const Target& to) {
        put_scales_and_minima(rows, to);
        unroll<4>([&](auto i) {
            const MoreWords all = more_words_at(rows, 16 + 32 * i.value);
            constexpr int q = 64 * i.value;
            unroll<8>([&](auto j) {
                to.template put_fields<15>(q + 4 * j.value, all.word[j.value], 0);
                to.template put_fields<15>(q + 32 + 4 * j.value, all.word[j.value], 4);
            });
        });
    }
};

// Bytes 16-47: bit i of byte j is the fifth of column 32 i + j; 48-175: as in Q4_K.
struct Q5_K : KType {
    static constexpr int kBlock = 32, kBytes = 176, kBias = 0;
    static constexpr bool kHasMin = true;

    static MK_NOINLINE void unpack(Rows rows, int, const Target& to) {
        put_scales_and_minima(rows, to);
        const MoreWords fifth = more_words_at(rows, 16);
        unroll<4>([&](auto i) {
            const MoreWords all = more_words_at(rows, 48 + 32 * i.value);
            constexpr int q = 64 * i.value;
            unroll<8>([&](auto j) {
                const Ints w = all.word[j.value], bits = fifth.word[j.value];
                to.put(q + 4 * j.value, with_fifth<2 * i.value>(w, bits));
                to.put(q + 32 + 4 * j.value, with_fifth<2 * i.value + 1>(w >> 4, bits));
            });
        });
    }

    // The fifth bits are bit kBit of the bytes of `fifth`.
    template <int kBit>
    static MK_INLINE Ints with_fifth(Ints low, Ints fifth) {
        const Ints high = kBit < 4 ? fifth << (4 - kBit) : fifth >> (kBit - 4);
        return Ints::and_or(high, 0x10101010, low & 0x0f0f0f0f);
    }
};

// Bytes 0-127: 2 x 64 bytes of 2 x 4 low bits; 128-191: 2 x 32 bytes of 4 x 2 high bits; 192-207:
// 16 signed scales.
struct Q6_K : KType {
    static constexpr int kBlock = 16, kBytes = 210, kBias = 5;
    static constexpr bool kHasMin = false;

    static MK_NOINLINE void unpack(Rows rows, int, const Target& to) {
        const Vec d = last_half_at(rows, 208), bias = Vec::set(128.f);
        const Words scales = words_at(rows, 192);
        unroll<16>([&](auto b) {
            const Ints biased = scales.word[b.value / 4] ^ 0x80808080;
            to.put_scale(b.value, d * (((biased >> (8 * (b.value % 4))) & 255).to_float() - bias));
        });
        for (int half = 0; half < 2; ++half) {
            const MoreWords first = more_words_at(rows, 64 * half);
            const MoreWords second = more_words_at(rows, 64 * half + 32);
            const MoreWords high = more_words_at(rows, 128 + 32 * half);
            const int q = 128 * half;
            unroll<8>([&](auto j) {
                const Ints a = first.word[j.value], b = second.word[j.value];
                const Ints h = high.word[j.value];
                to.put(q + 4 * j.value, with_high(a, h << 4));
                to.put(q + 32 + 4 * j.value, with_high(b, h << 2));
                to.put(q + 64 + 4 * j.value, with_high(a >> 4, h));
                to.put(q + 96 + 4 * j.value, with_high(b >> 4, h >> 2));
            });
        }
    }

    // The high bits are bits 4 and 5 of the bytes of `high`; bits that a shift brought from the
    // next byte are masked.
    static MK_INLINE Ints with_high(Ints low, Ints high) {
        return Ints::and_or(high, 0x30303030, low & 0x0f0f0f0f);
    }
};

// f(the type's struct)
template <class F>
MK_INLINE void with_quant_type(int32_t type, const F& f) {
    switch (type) {
        case MK_Q4_0:
            return f(Q4_0{});
        case MK_Q4_1:
            return f(Q4_1{});
        case MK_Q5_0:
            return f(Q5_0{});
        case MK_Q5_1:
            return f(Q5_1{});
        case MK_Q8_0:
            return f(Q8_0{});
        case MK_Q2_K:
            return f(Q2_K{});
        case MK_Q3_K:
            return f(Q3_K{});
        case MK_Q4_K:
            return f(Q4_K{});
        case MK_Q5_K:
            return f(Q5_K{});
        default:
            return f(Q6_K{});
    }
}

}  // namespace
}  // namespace mk::cpu
