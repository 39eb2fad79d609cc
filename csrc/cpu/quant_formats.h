// The ten types of GGUF blocks, unpacked over Ints, a vector of 16 x 32 bits that the including
// file has defined (as Order): lane r belongs to row r of 16. minitron_kernels/quantized.py draws
// the blocks.
//
// A type has kBlock, the columns that share a scale; kHasMin; kBias, where it has none,
// log2 of what its integers are biased by; kColumns and kBytes of a stored block; and unpack(rows,
// columns, to), which unpacks `columns` columns, up to a group, from where rows[0 ... 15] point to.
// It hands over, for block b of the group and for its 16 rows:
//
//   to.scale(b, vec), to.minimum(b, vec)     before the block
//   to.block<kFirst, kSecond>(b, f)          ascending; f(Int<j>{}) are columns 4 j ... 4 j + 3 of
//   the
//                                            block, a byte each, << kFirst, from column 16 on <<
//                                            kSecond
//
// A field of the four bytes of a word belongs to four columns that follow each other. So 16 or 32
// bytes of each of the 16 rows become 4 or 8 vectors, word j of every row in vector j, and a field
// needs a mask, and where its bits must begin at bit 0, or others be added, a shift.
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

// What the integers of a type without minima are biased by.
template <class Type>
constexpr int kBiasOf = Type::kHasMin ? 0 : 1 << Type::kBias;

// A half-precision number of each row, which is not the last one of its block; one that is.
MK_INLINE Vec half_at(Rows rows, int64_t offset) { return Ints::gather(rows, offset).half(); }
MK_INLINE Vec last_half_at(Rows rows, int64_t offset) {
    return (Ints::gather(rows, offset - 2) >> 16).half();
}

// Where the unpacked numbers of 16 rows go: here, a panel.
template <class Type>
struct ToPanel {
    static constexpr int kBlock = Type::kBlock;

    QuantPanel& panel;
    int first;  // row

    MK_INLINE void scale(int block, Vec scale) const { scale.store(panel.scale[block] + first); }
    MK_INLINE void minimum(int block, Vec minimum) const {
        minimum.store(panel.minimum[block] + first);
    }
    template <int kFirst, int kSecond, class F>
    MK_INLINE void block(int b, const F& f) const {
        uint32_t* const q = panel.q[b * (kBlock / 4) * Order::kWords] + first;
        Ints less = Ints::set(0);
        unroll<kBlock / 4>([&](auto j) MK_INLINE_LAMBDA {
            constexpr int kShift = j.value < 4 ? kFirst : kSecond;
            uint32_t* const to = q + j.value * Order::kWords * kTileRows;
            Order::template put<kBiasOf<Type>>(to, f(j) >> kShift, less);
        });
        Order::put_less(panel.less[b] + first, less);
    }
};

// ---- 32 columns: scale, perhaps minimum, perhaps fifth bits, low bits ----

template <bool kHasMin_, bool kHasFifth, int kBias_>
struct Simple {
    static constexpr int kBlock = 32, kColumns = 32, kBias = kBias_;
    static constexpr bool kHasMin = kHasMin_;
    static constexpr int kHeader = kHasMin ? 4 : 2, kLow = kHeader + (kHasFifth ? 4 : 0);
    static constexpr int kBytes = kLow + 16;

    template <class To>
    static MK_INLINE void unpack(Rows rows, int columns, To& to) {
        for (int b = 0; b < columns / 32; ++b) {
            const int at = b * kBytes;
            const Ints header = Ints::gather(rows, at);
            to.scale(b, header.half());
            if constexpr (kHasMin) to.minimum(b, (header >> 16).half());
            const Words low = words_at(rows, at + kLow);
            Ints fifth;
            if constexpr (kHasFifth) fifth = Ints::gather(rows, at + kHeader);
            to.template block<0, kHasFifth ? 0 : 4>(b, [&](auto j) MK_INLINE_LAMBDA {
                constexpr int i = j.value % 4, kHigh = j.value / 4;
                const Ints w = low.word[i];
                if constexpr (!kHasFifth) return w & (kHigh ? 0xf0f0f0f0 : 0x0f0f0f0f);
                const Ints four = Ints::spread_bits(fifth >> (16 * kHigh + 4 * i));
                return Ints::and_or(w >> (4 * kHigh), 0x0f0f0f0f, four);
            });
        }
    }
};

using Q4_0 = Simple<false, false, 3>;
using Q4_1 = Simple<true, false, 0>;
using Q5_0 = Simple<false, true, 4>;
using Q5_1 = Simple<true, true, 0>;

struct Q8_0 {
    static constexpr int kBlock = 32, kColumns = 32, kBytes = 34, kBias = 7;
    static constexpr bool kHasMin = false;

    template <class To>
    static MK_INLINE void unpack(Rows rows, int columns, To& to) {
        for (int b = 0; b < columns / 32; ++b) {
            const int at = b * kBytes;
            to.scale(b, half_at(rows, at));
            const MoreWords all = more_words_at(rows, at + 2);
            to.template block<0, 0>(
                b, [&](auto j) MK_INLINE_LAMBDA { return all.word[j.value] ^ 0x80808080; });
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

    template <class To>
    static MK_INLINE void unpack(Rows rows, int, To& to) {
        const Vec d = half_at(rows, 80), minus_dmin = last_half_at(rows, 82) * Vec::set(-1.f);
        const Words both = words_at(rows, 0);
        unroll<16>([&](auto b) MK_INLINE_LAMBDA {
            const Ints word = both.word[b.value / 4] >> (8 * (b.value % 4));
            to.scale(b.value, d * (word & 15).to_float());
            to.minimum(b.value, minus_dmin * ((word >> 4) & 15).to_float());
        });
        for (int half = 0; half < 2; ++half) {
            const MoreWords all = more_words_at(rows, 16 + 32 * half);
            unroll<8>([&](auto b) MK_INLINE_LAMBDA {
                constexpr int kShift = b.value / 2 * 2;
                to.template block<kShift, kShift>(8 * half + b.value, [&](auto j) MK_INLINE_LAMBDA {
                    return all.word[b.value % 2 * 4 + j.value] & (0x03030303u << kShift);
                });
            });
        }
    }
};

// Bytes 0-31: third bits, bit 4 * half + field of a byte; 32-95: as in Q2_K; 96-107: 16 scales.
struct Q3_K : KType {
    static constexpr int kBlock = 16, kBytes = 110, kBias = 2;
    static constexpr bool kHasMin = false;

    template <class To>
    static MK_INLINE void unpack(Rows rows, int, To& to) {
        const Vec d = last_half_at(rows, 108), bias = Vec::set(32.f);
        const Ints low[2] = {Ints::gather(rows, 96), Ints::gather(rows, 100)};
        const Ints high = Ints::gather(rows, 104);
        unroll<16>([&](auto b) MK_INLINE_LAMBDA {
            constexpr int kByte = 8 * (b.value % 4);
            const Ints four = (low[b.value / 4 % 2] >> (kByte + 4 * (b.value / 8))) & 15;
            const Ints two = (high >> (kByte + 2 * (b.value / 4))) & 3;
            to.scale(b.value, d * ((four | two << 4).to_float() - bias));
        });
        const MoreWords third = more_words_at(rows, 0);
        unroll<2>([&](auto half) MK_INLINE_LAMBDA {
            const MoreWords all = more_words_at(rows, 32 + 32 * half.value);
            unroll<8>([&](auto b) MK_INLINE_LAMBDA {
                constexpr int kField = b.value / 2, kBit = 4 * half.value + kField;
                to.template block<0, 0>(8 * half.value + b.value, [&](auto j) MK_INLINE_LAMBDA {
                    constexpr int kWord = b.value % 2 * 4 + j.value;
                    const Ints w = all.word[kWord], t = third.word[kWord];
                    const Ints high = kBit < 2 ? t << (2 - kBit) : t >> (kBit - 2);
                    return Ints::and_or(high, 0x04040404, (w >> (2 * kField)) & 0x03030303);
                });
            });
        });
    }
};

// Bytes 4-15: 8 scales and minima. Words: (2 bits of scale 4-7, scale 0-3), (2 bits of minimum 4-7,
// minimum 0-3), (low bits of minimum 4-7, low bits of scale 4-7), the first field the higher bits.
template <class To>
MK_INLINE void put_scales_and_minima(Rows rows, To& to) {
    const Words header = words_at(rows, 0);
    const Vec d = header.word[0].half(),
              minus_dmin = (header.word[0] >> 16).half() * Vec::set(-1.f);
    const Ints scales = header.word[1], minima = header.word[2], low = header.word[3];
    unroll<4>([&](auto b) MK_INLINE_LAMBDA {
        constexpr int kByte = 8 * b.value;
        to.scale(b.value, d * ((scales >> kByte) & 63).to_float());
        to.minimum(b.value, minus_dmin * ((minima >> kByte) & 63).to_float());
        const Ints low_s = (low >> kByte) & 15, low_m = (low >> (kByte + 4)) & 15;
        const Ints scale = Ints::and_or(scales >> (kByte + 2), 48, low_s);
        const Ints minimum = Ints::and_or(minima >> (kByte + 2), 48, low_m);
        to.scale(b.value + 4, d * scale.to_float());
        to.minimum(b.value + 4, minus_dmin * minimum.to_float());
    });
}

// Bytes 16-143: 4 x 32 bytes of 2 x 4 bits.
struct Q4_K : KType {
    static constexpr int kBlock = 32, kBytes = 144, kBias = 0;
    static constexpr bool kHasMin = true;

    template <class To>
    static MK_INLINE void unpack(Rows rows, int, To& to) {
        put_scales_and_minima(rows, to);
        for (int i = 0; i < 4; ++i) {
            const MoreWords all = more_words_at(rows, 16 + 32 * i);
            unroll<2>([&](auto high) MK_INLINE_LAMBDA {
                constexpr int kShift = 4 * high.value;
                to.template block<kShift, kShift>(2 * i + high.value, [&](auto j) MK_INLINE_LAMBDA {
                    return all.word[j.value] & (0x0f0f0f0fu << kShift);
                });
            });
        }
    }
};

// Bytes 16-47: bit i of byte j is the fifth of column 32 i + j; 48-175: as in Q4_K.
struct Q5_K : KType {
    static constexpr int kBlock = 32, kBytes = 176, kBias = 0;
    static constexpr bool kHasMin = true;

    template <class To>
    static MK_INLINE void unpack(Rows rows, int, To& to) {
        put_scales_and_minima(rows, to);
        const MoreWords fifth = more_words_at(rows, 16);
        unroll<4>([&](auto i) MK_INLINE_LAMBDA {
            const MoreWords all = more_words_at(rows, 48 + 32 * i.value);
            unroll<2>([&](auto high) MK_INLINE_LAMBDA {
                constexpr int b = 2 * i.value + high.value;
                to.template block<0, 0>(b, [&](auto j) MK_INLINE_LAMBDA {
                    const Ints low = (all.word[j.value] >> (4 * high.value)) & 0x0f0f0f0f;
                    const Ints t = fifth.word[j.value];
                    return Ints::and_or(b < 4 ? t << (4 - b) : t >> (b - 4), 0x10101010, low);
                });
            });
        });
    }
};

// Bytes 0-127: 2 x 64 bytes of 2 x 4 low bits; 128-191: 2 x 32 bytes of 4 x 2 high bits; 192-207:
// 16 signed scales.
struct Q6_K : KType {
    static constexpr int kBlock = 16, kBytes = 210, kBias = 5;
    static constexpr bool kHasMin = false;

    template <class To>
    static MK_INLINE void unpack(Rows rows, int, To& to) {
        const Vec d = last_half_at(rows, 208), bias = Vec::set(128.f);
        const Words scales = words_at(rows, 192);
        unroll<16>([&](auto b) MK_INLINE_LAMBDA {
            const Ints biased = scales.word[b.value / 4] ^ 0x80808080;
            to.scale(b.value, d * (((biased >> (8 * (b.value % 4))) & 255).to_float() - bias));
        });
        for (int half = 0; half < 2; ++half) {
            const MoreWords low[2] = {more_words_at(rows, 64 * half),
                                      more_words_at(rows, 64 * half + 32)};
            const MoreWords high = more_words_at(rows, 128 + 32 * half);
            unroll<8>([&](auto b) MK_INLINE_LAMBDA {
                constexpr int kField = b.value / 2;
                to.template block<0, 0>(8 * half + b.value, [&](auto j) MK_INLINE_LAMBDA {
                    constexpr int kWord = b.value % 2 * 4 + j.value;
                    const Ints w = low[kField % 2].word[kWord], h = high.word[kWord];
                    // Bits that a shift brought from the next byte are masked.
                    return Ints::and_or(kField < 2 ? h << (4 - 2 * kField) : h >> (2 * kField - 4),
                                        0x30303030, (w >> (kField / 2 * 4)) & 0x0f0f0f0f);
                });
            });
        }
    }
};

// One copy for products and for decoding.
template <class Type>
MK_NOINLINE void unpack_to_panel(Rows rows, int columns, QuantPanel& panel, int first) {
    ToPanel<Type> to{panel, first};
    Type::unpack(rows, columns, to);
}

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
