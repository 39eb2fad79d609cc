// The ten types of GGUF blocks, unpacked over Ints, a vector of 16 x 32 bits that the including
// file has defined: lane r belongs to row r of 16. minitron_kernels/quantized.py draws the blocks.
//
// A type has kBlock, the columns that share a scale; kOffset, what its integers are biased by;
// kHasMin; kColumns and kBytes of a stored block; and unpack(rows, columns, to), which unpacks
// `columns` columns, up to a group, from where rows[0 ... 15] point to.
//
// All fields of a type's block are bits of words of 4 bytes, 4 columns apart or fewer: 16 bytes of
// each of the 16 rows become four vectors, word j of every row in vector j, and the field of a byte
// is shifted to bit 0 of either half, that of bytes 0 and 2, then that of bytes 1 and 3.
#pragma once

#include "cpu/quant.h"

namespace mk::cpu {
namespace {

using Rows = const uint8_t* const*;

// ---- pieces of blocks ----

struct Words {
    Ints word[4];
};

MK_INLINE Words words_at(Rows rows, int64_t offset) {
    Words w;
    Ints::columns(rows, offset, w.word);
    return w;
}

// A word of each row.
MK_INLINE Ints word_at(Rows rows, int64_t offset) {
    uint32_t words[kLanes];
    for (int r = 0; r < kLanes; ++r) __builtin_memcpy(words + r, rows[r] + offset, 4);
    return Ints::load(words);
}

// A half-precision number of each row.
MK_INLINE Vec half_at(Rows rows, int64_t offset) {
    F16 halves[kLanes];
    for (int r = 0; r < kLanes; ++r) __builtin_memcpy(halves + r, rows[r] + offset, 2);
    return Vec::load(halves);
}

// Where the unpacked numbers of 16 rows go.
struct Target {
    QuantPanel& panel;
    int first;  // row

    // Columns 4 quad ... 4 quad + 3.
    MK_INLINE void put(int quad, Ints even, Ints odd) const {
        even.store(panel.q[2 * quad] + first);
        odd.store(panel.q[2 * quad + 1] + first);
    }
    MK_INLINE void put_scale(int block, Vec scale) const {
        scale.store(panel.scale[block] + first);
    }
    MK_INLINE void put_minimum(int block, Vec minimum) const {
        minimum.store(panel.minimum[block] + first);
    }
};

// The fields of the even and of the odd bytes, at `shift` of a byte.
template <uint32_t kMask>
MK_INLINE void put_bytes(const Target& to, int quad, Ints w, int shift) {
    to.put(quad, (w >> shift) & (kMask * 0x10001), (w >> (shift + 8)) & (kMask * 0x10001));
}

// ---- 32 columns: scale, perhaps minimum, perhaps fifth bits, low bits ----

template <bool kHasMin_, bool kHasFifth, int kOffset_>
struct Simple {
    static constexpr int kBlock = 32, kColumns = 32, kOffset = kOffset_;
    static constexpr bool kHasMin = kHasMin_;
    static constexpr int kHeader = kHasMin ? 4 : 2, kLow = kHeader + (kHasFifth ? 4 : 0);
    static constexpr int kBytes = kLow + 16;

    static void unpack(Rows rows, int columns, const Target& to) {
        for (int b = 0; b < columns / 32; ++b) {
            const int at = b * kBytes;
            to.put_scale(b, half_at(rows, at));
            if constexpr (kHasMin) to.put_minimum(b, half_at(rows, at + 2));
            const Words low = words_at(rows, at + kLow);
            if constexpr (!kHasFifth) {
                unroll<4>([&](auto j) {
                    put_bytes<15>(to, 8 * b + j.value, low.word[j.value], 0);
                    put_bytes<15>(to, 8 * b + 4 + j.value, low.word[j.value], 4);
                });
            } else {
                const Ints fifth = word_at(rows, at + kHeader);
                unroll<4>([&](auto j) {
                    const Ints w = low.word[j.value], bits = fifth >> (4 * j.value);
                    put5(to, 8 * b + j.value, w, bits & 15);
                    put5(to, 8 * b + 4 + j.value, w >> 4, (bits >> 16) & 15);
                });
            }
        }
    }

    // Bits 0 ... 3 of `fifth` are those of 4 columns.
    static MK_INLINE void put5(const Target& to, int quad, Ints w, Ints fifth) {
        const Ints spread = fifth | fifth << 14;  // bit 0 and, at 16, 2; bit 1 and, at 17, 3
        to.put(quad, Ints::and_or(spread << 4, 0x00100010, w & 0x000f000f),
               Ints::and_or(spread << 3, 0x00100010, (w >> 8) & 0x000f000f));
    }
};

using Q4_0 = Simple<false, false, 8>;
using Q4_1 = Simple<true, false, 0>;
using Q5_0 = Simple<false, true, 16>;
using Q5_1 = Simple<true, true, 0>;

struct Q8_0 {
    static constexpr int kBlock = 32, kColumns = 32, kBytes = 34, kOffset = 128;
    static constexpr bool kHasMin = false;

    static void unpack(Rows rows, int columns, const Target& to) {
        for (int b = 0; b < columns / 32; ++b) {
            const int at = b * kBytes;
            to.put_scale(b, half_at(rows, at));
            for (int h = 0; h < 2; ++h) {
                const Words all = words_at(rows, at + 2 + 16 * h);
                unroll<4>([&](auto j) {
                    const Ints biased = all.word[j.value] ^ 0x80808080;
                    put_bytes<255>(to, 8 * b + 4 * h + j.value, biased, 0);
                });
            }
        }
    }
};

// ---- 256 columns ----

struct KType {
    static constexpr int kColumns = 256;
};

// Bytes 0-15: scale and minimum of 16 columns, 4 bits each; 16-79: 2 x 32 bytes of 4 x 2 bits.
struct Q2_K : KType {
    static constexpr int kBlock = 16, kBytes = 84, kOffset = 0;
    static constexpr bool kHasMin = true;

    static void unpack(Rows rows, int, const Target& to) {
        const Vec d = half_at(rows, 80), minus_dmin = half_at(rows, 82) * Vec::set(-1.f);
        const Words both = words_at(rows, 0);
        unroll<16>([&](auto b) {
            const Ints word = both.word[b.value / 4] >> (8 * (b.value % 4));
            to.put_scale(b.value, d * (word & 15).to_float());
            to.put_minimum(b.value, minus_dmin * ((word >> 4) & 15).to_float());
        });
        for (int half = 0; half < 2; ++half) {
            for (int c = 0; c < 2; ++c) {
                const Words all = words_at(rows, 16 + 32 * half + 16 * c);
                unroll<4>([&](auto j) {
                    unroll<4>([&](auto f) {
                        put_bytes<3>(to, 32 * half + 8 * f.value + 4 * c + j.value,
                                     all.word[j.value], 2 * f.value);
                    });
                });
            }
        }
    }
};

// Bytes 0-31: third bits, bit 4 * half + field of a byte; 32-95: as in Q2_K; 96-107: 16 scales.
struct Q3_K : KType {
    static constexpr int kBlock = 16, kBytes = 110, kOffset = 4;
    static constexpr bool kHasMin = false;

    static void unpack(Rows rows, int, const Target& to) {
        const Vec d = half_at(rows, 108), bias = Vec::set(32.f);
        const Ints low[2] = {word_at(rows, 96), word_at(rows, 100)}, high = word_at(rows, 104);
        unroll<16>([&](auto b) {
            constexpr int kByte = 8 * (b.value % 4);
            const Ints four = (low[b.value / 4 % 2] >> (kByte + 4 * (b.value / 8))) & 15;
            const Ints two = (high >> (kByte + 2 * (b.value / 4))) & 3;
            to.put_scale(b.value, d * ((four | two << 4).to_float() - bias));
        });
        for (int c = 0; c < 2; ++c) {
            const Words third = words_at(rows, 16 * c);
            for (int half = 0; half < 2; ++half) {
                const Words all = words_at(rows, 32 + 32 * half + 16 * c);
                unroll<4>([&](auto j) {
                    const Ints t = third.word[j.value] >> (4 * half);
                    unroll<4>([&](auto f) {
                        const Ints two = all.word[j.value] >> (2 * f.value), one = t >> f.value;
                        to.put(32 * half + 8 * f.value + 4 * c + j.value,
                               Ints::and_or(one << 2, 0x00040004, two & 0x00030003),
                               Ints::and_or(one >> 6, 0x00040004, (two >> 8) & 0x00030003));
                    });
                });
            }
        }
    }
};

// Bytes 4-15: 8 scales and minima. Words: (2 bits of scale 4-7, scale 0-3), (2 bits of minimum 4-7,
// minimum 0-3), (low bits of minimum 4-7, low bits of scale 4-7), the first field the higher bits.
MK_INLINE void put_scales_and_minima(Rows rows, const Target& to) {
    const Vec d = half_at(rows, 0), minus_dmin = half_at(rows, 2) * Vec::set(-1.f);
    const Words header = words_at(rows, 0);
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
    static constexpr int kBlock = 32, kBytes = 144, kOffset = 0;
    static constexpr bool kHasMin = true;

    static void unpack(Rows rows, int, const Target& to) {
        put_scales_and_minima(rows, to);
        for (int c = 0; c < 8; ++c) {
            const Words all = words_at(rows, 16 + 16 * c);
            const int quad = c / 2 * 16 + c % 2 * 4;
            unroll<4>([&](auto j) {
                put_bytes<15>(to, quad + j.value, all.word[j.value], 0);
                put_bytes<15>(to, quad + 8 + j.value, all.word[j.value], 4);
            });
        }
    }
};

// Bytes 16-47: bit i of byte j is the fifth of column 32 i + j; 48-175: as in Q4_K.
struct Q5_K : KType {
    static constexpr int kBlock = 32, kBytes = 176, kOffset = 0;
    static constexpr bool kHasMin = true;

    static void unpack(Rows rows, int, const Target& to) {
        put_scales_and_minima(rows, to);
        for (int c = 0; c < 2; ++c) {
            const Words fifth = words_at(rows, 16 + 16 * c);
            unroll<4>([&](auto i) {
                const Words all = words_at(rows, 48 + 32 * i.value + 16 * c);
                unroll<4>([&](auto j) {
                    const Ints w = all.word[j.value], bits = fifth.word[j.value] >> (2 * i.value);
                    const int quad = 16 * i.value + 4 * c + j.value;
                    put5(to, quad, w, bits);
                    put5(to, quad + 8, w >> 4, bits >> 1);
                });
            });
        }
    }

    // The fifth bits are bit 0 of the bytes of `fifth`.
    static MK_INLINE void put5(const Target& to, int quad, Ints w, Ints fifth) {
        to.put(quad, Ints::and_or(fifth << 4, 0x00100010, w & 0x000f000f),
               Ints::and_or(fifth >> 4, 0x00100010, (w >> 8) & 0x000f000f));
    }
};

// Bytes 0-127: 2 x 64 bytes of 2 x 4 low bits; 128-191: 2 x 32 bytes of 4 x 2 high bits; 192-207:
// 16 signed scales.
struct Q6_K : KType {
    static constexpr int kBlock = 16, kBytes = 210, kOffset = 32;
    static constexpr bool kHasMin = false;

    static void unpack(Rows rows, int, const Target& to) {
        const Vec d = half_at(rows, 208), bias = Vec::set(128.f);
        const Words scales = words_at(rows, 192);
        unroll<16>([&](auto b) {
            const Ints biased = scales.word[b.value / 4] ^ 0x80808080;
            to.put_scale(b.value, d * (((biased >> (8 * (b.value % 4))) & 255).to_float() - bias));
        });
        for (int half = 0; half < 2; ++half) {
            for (int c = 0; c < 2; ++c) {
                const Words first = words_at(rows, 64 * half + 16 * c);
                const Words second = words_at(rows, 64 * half + 32 + 16 * c);
                const Words high = words_at(rows, 128 + 32 * half + 16 * c);
                unroll<4>([&](auto j) {
                    const Ints h = high.word[j.value];
                    const int quad = 32 * half + 4 * c + j.value;
                    put6(to, quad, first.word[j.value], h << 4);
                    put6(to, quad + 8, second.word[j.value], h << 2);
                    put6(to, quad + 16, first.word[j.value] >> 4, h);
                    put6(to, quad + 24, second.word[j.value] >> 4, h >> 2);
                });
            }
        }
    }

    // The high bits are bits 4 and 5 of the bytes of `high`; bits that a shift brought from the
    // next byte are masked.
    static MK_INLINE void put6(const Target& to, int quad, Ints low, Ints high) {
        to.put(quad, Ints::and_or(high, 0x00300030, low & 0x000f000f),
               Ints::and_or(high >> 8, 0x00300030, (low >> 8) & 0x000f000f));
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
