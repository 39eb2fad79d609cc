// The kernels of mk_cpu_linear_quant over Vec and Ints, vectors of 16 floats and of 16 x 32 bits
// that the including file defines. A lane is a row of w:
//
//   unpack    32 rows x 256 columns of w -> QuantPanel, in L1: integers of 16 bits or of 8 (Order:
//             quant_halves.h, quant_pairs.h, quant_bytes.h), fp32 scales
//   multiply  for each 16 rows of w and each row of integers of x, one vector of sums; x is
//             broadcast, two or four columns at a time, and no sum crosses lanes
//
// One row of x or two hundred, the same code, but for one row of integers and with AVX-512 two:
// these are multiplied while unpacking, without the panel (quant_direct.h). As sums of integers are
// exact, any order of them within a block gives the same bits; the fp32 sums over blocks and groups
// are in the order that the header tells.
//
// On a Sapphire Rapids core an instruction of 32 16-bit products takes half a clock, one of 32
// bf16 products 2 clocks, one of 16 fp32 products half a clock: hence integers. A Zen 4 core (3.6
// GHz) takes a clock for 32 products with 16 bits of x, by halves, bytes or bf16, and 0.75 by pairs
// of columns. Its stores are 32 bytes a clock, so that bytes pay off where x has few rows. Products
// a nanosecond of such a core, 16 bits of x (8), w in L2 (python -m bench.cpu_quant_rates):
//
//         Q4_0       Q4_1       Q5_0       Q5_1       Q8_0
//   M 8    72 (96)    70 (94)    66 (86)    64 (84)    66 (86)    by bytes, from M 12 by pairs
//   M 31  102 (133)  100 (129)  100 (128)   97 (124)  100 (127)
//   M 128 117 (149)  111 (142)  116 (148)  110 (140)  115 (146)
//         Q2_K       Q3_K       Q4_K       Q5_K       Q6_K
//   M 8    67 (89)    67 (88)    74 (101)   70 (94)    63 (82)
//   M 31   89 (115)   95 (121)  101 (133)   99 (130)   92 (116)
//   M 128  98 (124)  106 (132)  112 (143)  111 (142)  105 (131)
//
// Tried and lost: loops of four or of one instead of eight steps (up to 10 %); halves and words of
// 16 rows inserted one by one instead of gathered (20 to 40 % for the types of 32 columns, there;
// on Zen 4 broadcasts under masks are 5 to 15 % faster than gathering); each row fetched 512 bytes
// ahead (0 to 10 %); by pairs, a quarter or a third of the columns without the additions, which
// have pipes of their own (5 % less time in the registers that five rows take, more in six rows').
//
// Ints: load, store, set, +, -, &, |, ^, <<, >>, and_or(a, mask, b) = (a & mask) | b, to_float,
//   round(vec)                   to the nearest integers, |vec| < 2^22
//   max, largest(), sum()        of signed lanes
//   store_bytes                  the low byte of each lane, 16 bytes
//   half()                       the half-precision number in the low 16 bits of each lane
//   gather(rows, offset)         the word at rows[0 ... 15] + offset
//   dot(acc, w, x)               acc + the two products of signed 16-bit halves of w and x, or
//                                (quant_bytes.h) the four of unsigned bytes of w and signed of x
//   divide(n)                    / 2^n, of signed lanes that are multiples of it
//   spread_bits(a)               0x10 in byte i of each lane if bit i of it, of 0 ... 3, is set
//   kDirectRows                  of integers of x that quant_direct.h multiplies
//   columns(rows, offset, out)   out[j] = words j of the 16 or 32 bytes at rows[0 ... 15] + offset
#pragma once

#include "cpu/epilogue.h"
#include "cpu/quant.h"
#include "cpu/quant_direct.h"
#include "cpu/quant_formats.h"
#include "cpu/tile.h"

namespace mk::cpu {
namespace {

// ---- x as integers ----

MK_INLINE float from_bits(uint32_t bits) {
    float a;
    __builtin_memcpy(&a, &bits, 4);
    return a;
}

// One group of a row, `count` columns, as kLimbs groups of integers.
template <int kLimbs, class T>
void round_group(const T* x, int count, XGroup* groups) {
    constexpr uint32_t kTop = kLimbs == 1 ? 14 : 13;  // the largest is about 2^kTop or more
    alignas(64) uint32_t bits[kGroup];
    float* const values = reinterpret_cast<float*>(bits);
    Ints magnitude = Ints::set(0);
    for (int i = 0; i < kGroup; i += kLanes) {
        const int left = count - i < kLanes ? (count > i ? count - i : 0) : kLanes;
        Vec::load(x + (left ? i : 0), left).store(values + i);
        magnitude = Ints::max(magnitude, Ints::load(bits + i) & 0x7fffffff);
    }
    const uint32_t largest = magnitude.largest();
    const bool finite = largest < 0x7f800000;  // else the row becomes NaN
    // Biased by 127; of what follows the largest in bf16, so that none is above 127 * 2^8.
    const uint32_t above = (largest + (kLimbs == 1 ? 0x10000 : 0)) >> 23;
    const uint32_t exponent = above < 15 ? 15 : above;
    const Vec factor = Vec::set(from_bits((127 + 127 + kTop - exponent) << 23));
    const float unit = finite ? from_bits((exponent - kTop) << 23) : __builtin_nanf("");
    const auto put = [&](XGroup& group, int i, Ints q) MK_INLINE_LAMBDA {
        Order::put_x(group, i, q);
        group.sums16[i / 16] = q.sum();
    };
    for (int i = 0; i < kGroup; i += kLanes) {
        const Vec value = (finite ? Vec::load(values + i) : Vec::set(0.f)) * factor;
        const Ints q = Ints::round(value);
        put(groups[0], i, q);
        if constexpr (kLimbs == 2) {
            put(groups[1], i, Ints::round((value - q.to_float()) * Vec::set(0x1p15f)));
        }
    }
    for (int limb = 0; limb < kLimbs; ++limb) {
        XGroup& group = groups[limb];
        for (int b = 0; b < kGroup / 32; ++b) {
            group.sums32[b] = group.sums16[2 * b] + group.sums16[2 * b + 1];
        }
        group.units[0] = limb == 0 ? unit : unit * 0x1p-15f;
    }
}

// The same in 8 bits, each 32 columns for themselves.
template <class T>
void round_group_to_bytes(const T* x, int count, XGroup& group) {
    constexpr uint32_t kLeast = 15 << 23;  // 2^-112
    for (int b = 0; b < kGroup / 32; ++b) {
        alignas(64) uint32_t bits[32];
        float* const values = reinterpret_cast<float*>(bits);
        Ints magnitude = Ints::set(0);
        for (int i = 0; i < 32; i += kLanes) {
            const int at = 32 * b + i, left = count - at;
            const int some = left < 0 ? 0 : left < kLanes ? left : kLanes;
            Vec::load(x + (some ? at : 0), some).store(values + i);
            magnitude = Ints::max(magnitude, Ints::load(bits + i) & 0x7fffffff);
        }
        const uint32_t largest_bits = magnitude.largest();
        const bool finite = largest_bits < 0x7f800000;  // else the row becomes NaN
        const float largest = finite ? from_bits(largest_bits < kLeast ? kLeast : largest_bits) : 1;
        const Vec factor = Vec::set(127 / largest);
        group.units[b] = finite ? largest / 127 : __builtin_nanf("");
        group.sums32[b] = 0;
        for (int i = 0; i < 32; i += kLanes) {
            const Vec value = finite ? Vec::load(values + i) : Vec::set(0.f);
            const Ints q = Ints::round(value * factor);
            const int at = 32 * b + i;
            Order::put_x_bytes(group.words + at / 4 * Order::kXByteWords, q);
            group.sums16[at / 16] = q.sum();
            group.sums32[b] += group.sums16[at / 16];
        }
    }
}

template <int kLimbs, class T>
void round_rows(const QuantTask& task, int64_t m, int64_t m_end) {
    const bool to_bytes = task.p.x_bits == 8;
    for (; m < m_end; ++m) {
        const T* x = row<T>(task.p.x, task.p.x_stride, m);
        XGroup* groups = task.x + m * task.limbs;
        for (int64_t k = 0; k < task.p.k; k += kGroup, groups += task.x_rows) {
            const int64_t left = task.p.k - k;
            const int count = static_cast<int>(left < kGroup ? left : kGroup);
            if (to_bytes) {
                round_group_to_bytes(x + k, count, *groups);
            } else {
                round_group<kLimbs>(x + k, count, groups);
            }
        }
    }
}

// ---- products ----

// sums[i][j] += unit[i] * (the group's sum), for kM rows of integers of x, the rows of w of kN
// vectors from v.
template <int kBlock, bool kHasMin, int kM>
MK_NOINLINE void multiply(const XGroup* x, const QuantPanel& panel, int blocks, int bias, int v,
                          float* sums) {
    constexpr int kN = Ints::kTileN;
    const uint32_t* w = panel.q[0] + v * kLanes;
    Vec s[kM][kN];
    each<kM, kN>([&](auto i, auto j) { s[i.value][j.value] = Vec::set(0.f); });
    const auto x_sum = [&](int i, int b) {
        return Ints::set(kBlock == 16 ? x[i].sums16[b] : x[i].sums32[b]);
    };
    for (int b = 0; b < blocks; ++b) {
        Ints p[kM][kN];
        Order::template block_sums<kBlock>(x, panel, b, w, v * kLanes, p);
        w += kBlock / 4 * Order::kWords * kTileRows;
        if constexpr (!kHasMin && !Order::kIsPaired) {
            unroll<kM>([&](auto i) {
                const Ints biased = x_sum(i.value, b) << bias;
                unroll<kN>([&](auto j) { p[i.value][j.value] = p[i.value][j.value] - biased; });
            });
        }
        unroll<kN>([&](auto j) {
            const Vec scale = Vec::load(panel.scale[b] + (v + j.value) * kLanes);
            unroll<kM>([&](auto i) {
                Vec& a = s[i.value][j.value];
                a = Vec::fma(p[i.value][j.value].to_float(), scale, a);
            });
        });
        if constexpr (kHasMin) {
            unroll<kN>([&](auto j) {
                const Vec minimum = Vec::load(panel.minimum[b] + (v + j.value) * kLanes);
                unroll<kM>([&](auto i) {
                    Vec& a = s[i.value][j.value];
                    a = Vec::fma(x_sum(i.value, b).to_float(), minimum, a);
                });
            });
        }
    }
    unroll<kM>([&](auto i) {
        const Vec unit = Vec::set(x[i.value].units[0]);
        unroll<kN>([&](auto j) {
            float* total = sums + i.value * kTileRows + (v + j.value) * kLanes;
            Vec::fma(s[i.value][j.value], unit, Vec::load(total)).store(total);
        });
    });
}

// The same of an x of 8 bits, which has a unit for each 32 columns.
template <int kBlock, bool kHasMin, int kM>
MK_NOINLINE void multiply_bytes(const XGroup* x, const QuantPanel& panel, int blocks, int bias,
                                int v, float* sums) {
    constexpr int kN = Ints::kTileN, kParts = 32 / kBlock;
    const uint32_t* w = panel.q[0] + v * kLanes;
    const auto total_at = [&](auto i, auto j) {
        return sums + i.value * kTileRows + (v + j.value) * kLanes;
    };
    Vec total[kM][kN];
    each<kM, kN>([&](auto i, auto j) { total[i.value][j.value] = Vec::load(total_at(i, j)); });
    for (int b = 0; b < blocks / kParts; ++b) {
        Vec s[kM][kN];
        unroll<kParts>([&](auto part) {
            const int at = b * kParts + part.value;
            Ints p[kM][kN], x_sum[kM];
            unroll<kM>([&](auto i) {
                const XGroup& group = x[i.value];
                x_sum[i.value] = Ints::set(kBlock == 16 ? group.sums16[at] : group.sums32[at]);
                const Ints biased = x_sum[i.value] << bias;
                unroll<kN>([&](auto j) {
                    p[i.value][j.value] = kHasMin ? Ints::set(0) : Ints::set(0) - biased;
                });
            });
            Order::add_byte_sums<kBlock>(x->words + at * (kBlock / 4) * Order::kXByteWords, w, p);
            w += kBlock / 4 * Order::kWords * kTileRows;
            unroll<kN>([&](auto j) {
                const Vec scale = Vec::load(panel.scale[at] + (v + j.value) * kLanes);
                unroll<kM>([&](auto i) {
                    const Vec sum = p[i.value][j.value].to_float();
                    Vec& a = s[i.value][j.value];
                    a = part.value == 0 ? sum * scale : Vec::fma(sum, scale, a);
                });
            });
            if constexpr (kHasMin) {
                unroll<kN>([&](auto j) {
                    const Vec minimum = Vec::load(panel.minimum[at] + (v + j.value) * kLanes);
                    unroll<kM>([&](auto i) {
                        Vec& a = s[i.value][j.value];
                        a = Vec::fma(x_sum[i.value].to_float(), minimum, a);
                    });
                });
            }
        });
        unroll<kM>([&](auto i) {
            const Vec unit = Vec::set(x[i.value].units[b]);
            unroll<kN>([&](auto j) {
                Vec& a = total[i.value][j.value];
                a = Vec::fma(s[i.value][j.value], unit, a);
            });
        });
    }
    each<kM, kN>([&](auto i, auto j) { total[i.value][j.value].store(total_at(i, j)); });
}

// sums[i] += this group's part, for `rows` rows of integers, of 8 bits with `x_bytes`. Tiles of at
// most kTileM rows differ by one row at most: one of a few rows takes as long as one of more.
// fetch(tile, tiles) is called with each: processors wait when many lines are fetched at once.
template <int kBlock, bool kHasMin, class Fetch>
void multiply_rows(const XGroup* x, bool x_bytes, int64_t rows, const QuantPanel& panel, int blocks,
                   int bias, float* sums, const Fetch& fetch) {
    // Of x in 8 bits and 16 columns, registers: two sums and a total each.
    constexpr int kBytesM = kBlock == 16 && Ints::kTileM > 4 ? 4 : Ints::kTileM;
    const int64_t most = x_bytes ? kBytesM : Ints::kTileM;
    const int64_t tiles = (rows + most - 1) / most;
    for (int v = 0; v < kTileRows / kLanes; v += Ints::kTileN) {
        int64_t i = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t end = rows * (tile + 1) / tiles;
            if (v == 0) fetch(tile, tiles);
            const auto run = [&](auto count) {
                constexpr int kM = decltype(count)::value;
                if constexpr (kM <= Ints::kTileM) {
                    if (end - i != kM) return;
                    float* const to = sums + i * kTileRows;
                    if (!x_bytes) {
                        multiply<kBlock, kHasMin, kM>(x + i, panel, blocks, bias, v, to);
                    } else if constexpr (!Order::kIsPaired && kM <= kBytesM) {
                        multiply_bytes<kBlock, kHasMin, kM>(x + i, panel, blocks, bias, v, to);
                    }
                }
            };
            run(Int<1>{}), run(Int<2>{}), run(Int<3>{}), run(Int<4>{}), run(Int<5>{}),
                run(Int<6>{});
            i = end;
        }
    }
}

// 32 rows of a matrix, and their sums with those of x.
struct QuantTile {
    int32_t type;
    int64_t row_bytes;
    int count;                       // rows that there are
    const uint8_t* next;             // what is read after this and the tiles that take turns
    const uint8_t* rows[kTileRows];  // past these the last one again, whose sums nobody reads
    float* sums;
};

// By way of the panel: sums[i][r] += the group's part, for `rows` rows of integers.
template <class Type>
void add_group(const QuantTask& task, const XGroup* x, int64_t rows, int columns, QuantTile& tile,
               QuantPanel& panel) {
    const int bytes = columns / Type::kColumns * Type::kBytes;
    for (int r = 0; r < kTileRows; r += kLanes) {
        unpack_to_panel<Type>(tile.rows + r, columns, panel, r);
    }
    for (const uint8_t*& at : tile.rows) at += bytes;
    // Meanwhile fetch into L2 the tile after these, in the order in which it lies, and the next
    // group of this one, which x may have thrown out. May lie outside w.
    const auto fetch = [&](int64_t part, int64_t parts) MK_INLINE_LAMBDA {
        const int64_t lines = (kTileRows * bytes + 63) / 64;
        for (int64_t i = lines * part / parts; i < lines * (part + 1) / parts; ++i) {
            __builtin_prefetch(tile.next + 64 * i, 0, 2);
        }
        const int64_t end = kTileRows * (part + 1) / parts;
        for (int64_t r = kTileRows * part / parts; r < end; ++r) {
            for (int i = 0; i < bytes; i += 64) __builtin_prefetch(tile.rows[r] + i, 0, 2);
        }
    };
    multiply_rows<Type::kBlock, Type::kHasMin>(
        x, task.p.x_bits == 8, rows, panel, columns / Type::kBlock, Type::kBias, tile.sums, fetch);
    tile.next += kTileRows * bytes;
}

// sums[i][r] = those of row i of `rows` rows of integers and row r.
void tile_sums(const QuantTask& task, const XGroup* x, int64_t rows, QuantTile* tiles,
               int num_tiles, QuantScratch& scratch) {
    if constexpr (!Order::kIsPaired && Ints::kDirectRows > 0) {
        if (rows <= Ints::kDirectRows) {
            for (int i = 0; i < num_tiles; ++i) {
                const QuantTile& tile = tiles[i];
                with_quant_type(tile.type, [&](auto type) {
                    for (int r = 0; r < tile.count; r += kLanes) {
                        direct_sums<decltype(type)>(task, x, rows, tile.rows + r,
                                                    tile.rows[0] + (r + kLanes) * tile.row_bytes,
                                                    tile.sums + r);
                    }
                });
            }
            return;
        }
    }
    for (int i = 0; i < num_tiles; ++i) {
        for (int64_t j = 0; j < rows * kTileRows; ++j) tiles[i].sums[j] = 0;
    }
    const int64_t k = task.p.k;
    for (int64_t column = 0; column < k; column += kGroup, x += task.x_rows) {
        const int columns = static_cast<int>(k - column < kGroup ? k - column : kGroup);
        for (int i = 0; i < num_tiles; ++i) {
            with_quant_type(tiles[i].type, [&](auto type) {
                add_group<decltype(type)>(task, x, rows, columns, tiles[i], scratch.panel);
            });
        }
    }
}

template <class T, class Out>
void finish(const mk_cpu_quant_product& p, int64_t m, int64_t m_end, int64_t n, int64_t n_end,
            const float* sums, const float* up) {
    for (int64_t i = 0; m + i < m_end; ++i) {
        finish_row<T>(p.epilogue, sums + i * kTileRows, up + i * kTileRows,
                      p.other ? row<T>(p.other, p.other_stride, m + i) + n : nullptr,
                      static_cast<Out*>(p.out) + p.out_stride * (m + i) + n, n_end - n);
    }
}

void product(const QuantTask& task, const mk_cpu_quant_product& p, int64_t m, int64_t m_end,
             int64_t n, int64_t n_end, QuantScratch& scratch) {
    const bool has_up = p.epilogue == MK_EPILOGUE_SWIGLU;
    QuantTile tiles[kTurns];
    int num_tiles = 0;
    const auto add_tile = [&](int32_t type, const void* w, int64_t row_bytes, int64_t at) {
        QuantTile& tile = tiles[num_tiles];
        tile.type = type;
        tile.row_bytes = row_bytes;
        tile.count = static_cast<int>(n_end - at < kTileRows ? n_end - at : kTileRows);
        for (int r = 0; r < kTileRows; ++r) {
            tile.rows[r] = row<uint8_t>(w, row_bytes, r < tile.count ? at + r : n_end - 1);
        }
        tile.next = tile.rows[0] + (n_end - n) * row_bytes;
        tile.sums = scratch.sums[num_tiles++];
    };
    for (int64_t at = n; at < n_end; at += kTileRows) {
        add_tile(p.type, p.w, p.w_row_bytes, at);
        if (has_up) add_tile(p.up_type, p.w_up, p.w_up_row_bytes, at);
    }
    const int64_t rows = (m_end - m) * task.limbs;
    tile_sums(task, task.x + m * task.limbs, rows, tiles, num_tiles, scratch);
    for (int tile = 0; task.limbs == 2 && tile < num_tiles; ++tile) {
        float* const sums = tiles[tile].sums;
        for (int64_t i = 0; i < m_end - m; ++i) {
            for (int r = 0; r < kTileRows; ++r) {
                const float* both = sums + 2 * i * kTileRows + r;
                sums[i * kTileRows + r] = both[0] + both[kTileRows];
            }
        }
    }
    const int step = has_up ? 2 : 1;
    for (int tile = 0; tile < num_tiles; tile += step, n += kTileRows) {
        with_dtype(task.p.dtype, [&](auto t) {
            using T = decltype(t);
            const int64_t end = n + tiles[tile].count;
            const float *sums = tiles[tile].sums, *up = tiles[tile + step - 1].sums;
            if (p.out_dtype == MK_F32) {
                finish<T, float>(p, m, m_end, n, end, sums, up);
            } else {
                finish<T, T>(p, m, m_end, n, end, sums, up);
            }
        });
    }
}

constexpr QuantProducts kQuantProducts = {
    [](const QuantTask& task, int64_t m, int64_t m_end) {
        switch (task.p.dtype) {
            case MK_BF16:
                return round_rows<1, Bf16>(task, m, m_end);
            case MK_F16:
                return round_rows<2, F16>(task, m, m_end);
            default:
                return round_rows<2, float>(task, m, m_end);
        }
    },
    product,
};

}  // namespace
}  // namespace mk::cpu
