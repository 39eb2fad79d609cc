// GGUF blocks (ggml/src/ggml-common.h) <-> the numbers in them, 256 weights of a row at a time.
//
// Numbers are kept as they are packed: unsigned, without their offset (int8 as the byte + 128), and
// halves as bits. So any bytes survive the way there and back.
//
//   Q4_0  d:2            qs:16   element j is the low nibble of byte j, j + 16 the high one
//   Q4_1  d:2 m:2        qs:16   as Q4_0
//   Q5_0  d:2      qh:4  qs:16   as Q4_0; bit j of qh is the fifth bit of element j
//   Q5_1  d:2 m:2  qh:4  qs:16   as Q5_0
//   Q8_0  d:2            qs:32   int8
//   Q2_K  scales:16 (scale | min << 4)  qs:64  d:2 dmin:2
//         element 128 h + 32 f + j is field f, 2 bits, of byte 32 h + j
//   Q3_K  hmask:32  qs:64  scales:12  d:2     qs as Q2_K; bit 4 h + f of byte j of hmask is bit 2
//   Q4_K  d:2 dmin:2  scales:12  qs:128       64 p + 32 f + j is nibble f of byte 32 p + j
//   Q5_K  d:2 dmin:2  scales:12  qh:32  qs:128       as Q4_K; bit i of byte j of qh is the fifth of
//         element 32 i + j
//   Q6_K  ql:128  qh:64  scales:16 (int8)  d:2       128 h + 64 n + j is nibble n of byte 64 h + j
//         of ql, for j < 64; its bits 4 and 5 are those of Q2_K's drawing in qh
#pragma once

#include <cstdint>
#include <cstring>

#include "minitron_kernels.h"

namespace mk::cpu {

// 256 weights of a row, or the 32 * n of its last blocks; the rest is 0.
struct Group {
    alignas(64) uint16_t q[256];
    uint16_t d[8], m[8];         // of each block of 32; of a K type d[0] and dmin = m[0]
    uint8_t scale[16], min[16];  // of each 16 (Q2_K, Q3_K, Q6_K) or 32 (Q4_K, Q5_K) weights
};

inline uint16_t load_u16(const uint8_t* p) {
    uint16_t v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store_u16(uint8_t* p, uint16_t v) { std::memcpy(p, &v, sizeof v); }

// ---- fields of several bits: count bytes hold the low fields of all their weights, then ... ----

// q[f * count + j] = field f, `kBits` wide, of byte j.
template <int kBits, int kCount>
inline void read_fields(const uint8_t* bytes, uint16_t* q) {
    for (int f = 0; f < 8 / kBits; ++f) {
        for (int j = 0; j < kCount; ++j) {
            q[f * kCount + j] = bytes[j] >> (f * kBits) & ((1 << kBits) - 1);
        }
    }
}

// Bits kShift ... kShift + kBits - 1 of each q as read_fields found them.
template <int kBits, int kCount, int kShift = 0>
inline void write_fields(const uint16_t* q, uint8_t* bytes) {
    for (int j = 0; j < kCount; ++j) {
        int byte = 0;
        for (int f = 0; f < 8 / kBits; ++f) {
            byte |= (q[f * kCount + j] >> kShift & ((1 << kBits) - 1)) << (f * kBits);
        }
        bytes[j] = static_cast<uint8_t>(byte);
    }
}

// The same, into bits that are 0.
template <int kBits, int kCount, int kShift>
inline void add_fields(const uint8_t* bytes, uint16_t* q) {
    for (int f = 0; f < 8 / kBits; ++f) {
        for (int j = 0; j < kCount; ++j) {
            q[f * kCount + j] |= (bytes[j] >> (f * kBits) & ((1 << kBits) - 1)) << kShift;
        }
    }
}

// ---- one bit of each of 16 weights ----

typedef uint16_t Eight __attribute__((vector_size(16)));
constexpr Eight kOneBit[2] = {
    {1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 6, 1 << 7},
    {1 << 8, 1 << 9, 1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15}};

// Bit j of `bits` becomes bit kShift, which is 0, of q[j].
template <int kShift>
inline void add_bits(uint16_t bits, uint16_t* q) {
    for (int half = 0; half < 2; ++half) {
        Eight v;
        std::memcpy(&v, q + 8 * half, sizeof v);
        const Eight found = (Eight)((bits & kOneBit[half]) != 0);  // all ones or 0
        v |= found & static_cast<uint16_t>(1 << kShift);
        std::memcpy(q + 8 * half, &v, sizeof v);
    }
}

template <int kShift>
inline uint16_t take_bits(const uint16_t* q) {
    Eight sum{};
    for (int half = 0; half < 2; ++half) {
        Eight v;
        std::memcpy(&v, q + 8 * half, sizeof v);
        sum |= (v >> kShift & 1) * kOneBit[half];
    }
    uint64_t fold[2];
    std::memcpy(fold, &sum, sizeof sum);
    fold[0] |= fold[1];
    fold[0] |= fold[0] >> 32;
    return static_cast<uint16_t>(fold[0] | fold[0] >> 16);
}

// ---- scales of Q4_K and Q5_K, and of Q3_K, in 12 bytes ----

inline void read_scales_mins(const uint8_t* b, uint8_t* scale, uint8_t* min) {
    for (int i = 0; i < 4; ++i) {
        scale[i] = b[i] & 63;
        min[i] = b[4 + i] & 63;
        scale[4 + i] = (b[8 + i] & 15) | (b[i] >> 6 << 4);
        min[4 + i] = (b[8 + i] >> 4) | (b[4 + i] >> 6 << 4);
    }
}

inline void write_scales_mins(const uint8_t* scale, const uint8_t* min, uint8_t* b) {
    for (int i = 0; i < 4; ++i) {
        b[i] = static_cast<uint8_t>((scale[i] & 63) | scale[4 + i] >> 4 << 6);
        b[4 + i] = static_cast<uint8_t>((min[i] & 63) | min[4 + i] >> 4 << 6);
        b[8 + i] = static_cast<uint8_t>((scale[4 + i] & 15) | (min[4 + i] & 15) << 4);
    }
}

inline void read_scales_q3(const uint8_t* b, uint8_t* scale) {
    for (int i = 0; i < 16; ++i) {
        const int low = i < 8 ? b[i] & 15 : b[i - 8] >> 4;
        scale[i] = static_cast<uint8_t>(low | (b[8 + i % 4] >> (2 * (i / 4)) & 3) << 4);
    }
}

inline void write_scales_q3(const uint8_t* scale, uint8_t* b) {
    for (int i = 0; i < 8; ++i) b[i] = (scale[i] & 15) | (scale[8 + i] & 15) << 4;
    for (int i = 0; i < 4; ++i) {
        b[8 + i] = static_cast<uint8_t>((scale[i] >> 4 & 3) | (scale[4 + i] >> 4 & 3) << 2 |
                                        (scale[8 + i] >> 4 & 3) << 4 | scale[12 + i] >> 4 << 6);
    }
}

// ---- the types ----

template <int kType>
struct Blocks;

// One block of 32 at a time: i is its number in the group.
template <int kType>
struct Blocks32 {
    static constexpr bool kIs5 = kType == MK_Q5_0 || kType == MK_Q5_1;
    static constexpr bool kHasMin = kType == MK_Q4_1 || kType == MK_Q5_1;
    static constexpr int kHigh = kHasMin ? 4 : 2;           // where qh is
    static constexpr int kQuants = kHigh + (kIs5 ? 4 : 0);  // where qs is
    static constexpr int kElements = 32;
    static constexpr int kBytes = kQuants + (kType == MK_Q8_0 ? 32 : 16);

    static void read(const uint8_t* b, int i, Group& g) {
        uint16_t* const q = g.q + 32 * i;
        g.d[i] = load_u16(b);
        if (kHasMin) g.m[i] = load_u16(b + 2);
        if constexpr (kType == MK_Q8_0) {
            for (int j = 0; j < 32; ++j) q[j] = b[kQuants + j] ^ 0x80;
        } else {
            read_fields<4, 16>(b + kQuants, q);
        }
        if constexpr (kIs5) {
            for (int half = 0; half < 2; ++half) {
                add_bits<4>(load_u16(b + kHigh + 2 * half), q + 16 * half);
            }
        }
    }

    static void write(const Group& g, int i, uint8_t* b) {
        const uint16_t* const q = g.q + 32 * i;
        store_u16(b, g.d[i]);
        if (kHasMin) store_u16(b + 2, g.m[i]);
        if constexpr (kType == MK_Q8_0) {
            for (int j = 0; j < 32; ++j) b[kQuants + j] = static_cast<uint8_t>(q[j] ^ 0x80);
        } else {
            write_fields<4, 16>(q, b + kQuants);
        }
        if constexpr (kIs5) {
            for (int half = 0; half < 2; ++half) {
                store_u16(b + kHigh + 2 * half, take_bits<4>(q + 16 * half));
            }
        }
    }
};

template <>
struct Blocks<MK_Q4_0> : Blocks32<MK_Q4_0> {};
template <>
struct Blocks<MK_Q4_1> : Blocks32<MK_Q4_1> {};
template <>
struct Blocks<MK_Q5_0> : Blocks32<MK_Q5_0> {};
template <>
struct Blocks<MK_Q5_1> : Blocks32<MK_Q5_1> {};
template <>
struct Blocks<MK_Q8_0> : Blocks32<MK_Q8_0> {};

template <>
struct Blocks<MK_Q2_K> {
    static constexpr int kElements = 256, kBytes = 84;

    static void read(const uint8_t* b, int, Group& g) {
        for (int i = 0; i < 16; ++i) g.scale[i] = b[i] & 15, g.min[i] = b[i] >> 4;
        read_fields<2, 32>(b + 16, g.q);
        read_fields<2, 32>(b + 48, g.q + 128);
        g.d[0] = load_u16(b + 80);
        g.m[0] = load_u16(b + 82);
    }

    static void write(const Group& g, int, uint8_t* b) {
        for (int i = 0; i < 16; ++i) b[i] = (g.scale[i] & 15) | (g.min[i] & 15) << 4;
        write_fields<2, 32>(g.q, b + 16);
        write_fields<2, 32>(g.q + 128, b + 48);
        store_u16(b + 80, g.d[0]);
        store_u16(b + 82, g.m[0]);
    }
};

template <>
struct Blocks<MK_Q3_K> {
    static constexpr int kElements = 256, kBytes = 110;

    static void read(const uint8_t* b, int, Group& g) {
        read_fields<2, 32>(b + 32, g.q);
        read_fields<2, 32>(b + 64, g.q + 128);
        add_fields<1, 32, 2>(b, g.q);
        read_scales_q3(b + 96, g.scale);
        g.d[0] = load_u16(b + 108);
    }

    static void write(const Group& g, int, uint8_t* b) {
        write_fields<1, 32, 2>(g.q, b);
        write_fields<2, 32>(g.q, b + 32);
        write_fields<2, 32>(g.q + 128, b + 64);
        write_scales_q3(g.scale, b + 96);
        store_u16(b + 108, g.d[0]);
    }
};

template <>
struct Blocks<MK_Q4_K> {
    static constexpr int kElements = 256, kBytes = 144;

    static void read(const uint8_t* b, int, Group& g) {
        g.d[0] = load_u16(b);
        g.m[0] = load_u16(b + 2);
        read_scales_mins(b + 4, g.scale, g.min);
        for (int p = 0; p < 4; ++p) read_fields<4, 32>(b + 16 + 32 * p, g.q + 64 * p);
    }

    static void write(const Group& g, int, uint8_t* b) {
        store_u16(b, g.d[0]);
        store_u16(b + 2, g.m[0]);
        write_scales_mins(g.scale, g.min, b + 4);
        for (int p = 0; p < 4; ++p) write_fields<4, 32>(g.q + 64 * p, b + 16 + 32 * p);
    }
};

template <>
struct Blocks<MK_Q5_K> {
    static constexpr int kElements = 256, kBytes = 176;

    static void read(const uint8_t* b, int, Group& g) {
        g.d[0] = load_u16(b);
        g.m[0] = load_u16(b + 2);
        read_scales_mins(b + 4, g.scale, g.min);
        for (int p = 0; p < 4; ++p) read_fields<4, 32>(b + 48 + 32 * p, g.q + 64 * p);
        add_fields<1, 32, 4>(b + 16, g.q);
    }

    static void write(const Group& g, int, uint8_t* b) {
        store_u16(b, g.d[0]);
        store_u16(b + 2, g.m[0]);
        write_scales_mins(g.scale, g.min, b + 4);
        write_fields<1, 32, 4>(g.q, b + 16);
        for (int p = 0; p < 4; ++p) write_fields<4, 32>(g.q + 64 * p, b + 48 + 32 * p);
    }
};

template <>
struct Blocks<MK_Q6_K> {
    static constexpr int kElements = 256, kBytes = 210;

    static void read(const uint8_t* b, int, Group& g) {
        for (int h = 0; h < 2; ++h) {
            read_fields<4, 64>(b + 64 * h, g.q + 128 * h);
            add_fields<2, 32, 4>(b + 128 + 32 * h, g.q + 128 * h);
        }
        for (int i = 0; i < 16; ++i) g.scale[i] = b[192 + i] ^ 0x80;
        g.d[0] = load_u16(b + 208);
    }

    static void write(const Group& g, int, uint8_t* b) {
        for (int h = 0; h < 2; ++h) {
            write_fields<4, 64>(g.q + 128 * h, b + 64 * h);
            write_fields<2, 32, 4>(g.q + 128 * h, b + 128 + 32 * h);
        }
        for (int i = 0; i < 16; ++i) b[192 + i] = g.scale[i] ^ 0x80;
        store_u16(b + 208, g.d[0]);
    }
};

}  // namespace mk::cpu
