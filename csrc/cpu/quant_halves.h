// The order of an unpacked w and of x for products of 16-bit integers, over Ints, which the
// including file has defined: a word is two columns of four, (0, 2) or (1, 3).
#pragma once

#include "cpu/quant.h"

namespace mk::cpu {
namespace {

struct Halves {
    static constexpr bool kIsPaired = false;  // quant_pairs.h
    static constexpr int kWords = 2;          // of a row of w, of four columns
    static constexpr int kXByteWords = 2;     // of an x of 8 bits, which lies here as one of 16

    // Four columns of 16 rows of w, a byte each. What these add up to in `less`, and kBias, are for
    // quant_pairs.h.
    template <int kBias>
    static MK_INLINE void put(uint32_t* to, Ints four, Ints&) {
        (four & 0x00ff00ff).store(to);
        ((four >> 8) & 0x00ff00ff).store(to + kTileRows);
    }
    static MK_INLINE void put_less(uint32_t*, Ints) {}
    // Columns i ... i + 15 of a row of x, as eight words.
    static MK_INLINE void put_x(XGroup& group, int i, Ints q) {
        put_x_bytes(group.words + i / 2, q);
    }
    static MK_INLINE void put_x_bytes(uint32_t* to, Ints q) {
        uint32_t column[kLanes];
        q.store(column);
        for (int i = 0; i < kLanes; i += 4) {
            to[i / 2] = (column[i] & 0xffff) | column[i + 2] << 16;
            to[i / 2 + 1] = (column[i + 1] & 0xffff) | column[i + 3] << 16;
        }
    }
    static int32_t column(const QuantPanel& panel, int i, int row) {
        return panel.q[i / 4 * 2 + (i & 1)][row] >> (8 * (i & 2)) & 0xffff;
    }

    // Words of x for `columns`; sums[0 ... 1] += four columns, the kFour-th of a block, times those
    // of x; what both add up to.
    template <bool kXBytes>
    static constexpr int x_words(int columns) {
        return columns / 2;
    }
    template <bool kXBytes, int kFour>
    static MK_INLINE void add(Ints (&sums)[2], Ints four, const uint32_t* x) {
        const auto at = [&](int i)
                            MK_INLINE_LAMBDA { return Ints::set(static_cast<int32_t>(x[i])); };
        sums[0] = Ints::dot(sums[0], four & 0x00ff00ff, at(2 * kFour));
        sums[1] = Ints::dot(sums[1], (four >> 8) & 0x00ff00ff, at(2 * kFour + 1));
    }
    template <bool kXBytes>
    static MK_INLINE Ints total(const Ints (&sums)[2]) {
        return sums[0] + sums[1];
    }

    // p[i][j] = sum over block b, at `w` of lanes from `lane`, of row i of x times rows j of w.
    template <int kBlock, int kM, int kN>
    static MK_INLINE void block_sums(const XGroup* x, const QuantPanel&, int b, const uint32_t* w,
                                     int, Ints (&p)[kM][kN]) {
        sums_of<kBlock>(x->words + b * (kBlock / 2), w, p);
    }
    template <int kBlock, int kM, int kN>
    static MK_INLINE void sums_of(const uint32_t* x, const uint32_t* w, Ints (&p)[kM][kN]) {
        // Accumulators that take turns: a dot product takes 5 clocks, two begin in each.
        constexpr int kTurns = kM * kN >= 8 ? 1 : kM * kN >= 4 ? 2 : 4, kUnroll = 8;
        Ints acc[kTurns][kM][kN];
        unroll<kTurns>([&](auto turn) {
            each<kM, kN>([&](auto i, auto j) { acc[turn.value][i.value][j.value] = Ints::set(0); });
        });
        for (int at = 0; at < kBlock / 2; at += kUnroll, x += kUnroll, w += kUnroll * kTileRows) {
            unroll<kUnroll>([&](auto u) {
                Ints w_frag[kN];
                unroll<kN>([&](auto j) {
                    w_frag[j.value] = Ints::load(w + u.value * kTileRows + j.value * kLanes);
                });
                unroll<kM>([&](auto i) {
                    const Ints x_frag =
                        Ints::set(static_cast<int32_t>(x[kXRow * i.value + u.value]));
                    unroll<kN>([&](auto j) {
                        Ints& a = acc[u.value % kTurns][i.value][j.value];
                        a = Ints::dot(a, w_frag[j.value], x_frag);
                    });
                });
            });
        }
        each<kM, kN>([&](auto i, auto j) {
            Ints sum = acc[0][i.value][j.value];
            unroll<kTurns - 1>([&](auto t) { sum = sum + acc[t.value + 1][i.value][j.value]; });
            p[i.value][j.value] = sum;
        });
    }

    // p += the same.
    template <int kBlock, int kM, int kN>
    static MK_INLINE void add_byte_sums(const uint32_t* x, const uint32_t* w, Ints (&p)[kM][kN]) {
        Ints sums[kM][kN];
        sums_of<kBlock>(x, w, sums);
        each<kM, kN>([&](auto i, auto j) {
            p[i.value][j.value] = p[i.value][j.value] + sums[i.value][j.value];
        });
    }
};

}  // namespace
}  // namespace mk::cpu
