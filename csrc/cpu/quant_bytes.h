// The order of an unpacked w and of x for products of bytes, over Ints, which the including file
// has defined: a word is four columns, of w as they are, of x (16 bits) as 256 * high + low, both
// signed.
//
// Two instructions of 64 products of bytes do what two of 32 products of 16 bits do, in the same
// time. But w takes half as many words: to unpack, to store, and to load again. An x of 8 bits is
// four columns a word as well, and one of the two instructions.
#pragma once

#include "cpu/quant.h"

namespace mk::cpu {
namespace {

struct Bytes {
    static constexpr bool kIsPaired = false;
    static constexpr int kWords = 1;
    static constexpr int kXByteWords = 1;  // of an x of 8 bits, of four columns

    template <int kBias>
    static MK_INLINE void put(uint32_t* to, Ints four, Ints&) {
        four.store(to);
    }
    static MK_INLINE void put_less(uint32_t*, Ints) {}
    // Four words of high bytes, then four of low ones.
    static MK_INLINE void put_x(XGroup& group, int i, Ints q) {
        uint32_t* const to = group.words + i / 2;
        ((q + Ints::set(0x80)) >> 8).store_bytes(to);
        q.store_bytes(to + 4);
    }
    // 16 columns of a row of x in 8 bits.
    static MK_INLINE void put_x_bytes(uint32_t* to, Ints q) { q.store_bytes(to); }
    static int32_t column(const QuantPanel& panel, int i, int row) {
        return panel.q[i / 4][row] >> (8 * (i & 3)) & 0xff;
    }

    // Words of x for `columns`; sums[0 ... 1] += four columns, the kFour-th of a block, times those
    // of x; what both add up to.
    template <bool kXBytes>
    static constexpr int x_words(int columns) {
        return kXBytes ? columns / 4 : columns / 2;
    }
    template <bool kXBytes, int kFour>
    static MK_INLINE void add(Ints (&sums)[2], Ints four, const uint32_t* x) {
        const auto at = [&](int i)
                            MK_INLINE_LAMBDA { return Ints::set(static_cast<int32_t>(x[i])); };
        if constexpr (kXBytes) {
            sums[0] = Ints::dot_bytes(sums[0], four, at(kFour));
        } else {
            constexpr int kHigh = kFour / 4 * 8 + kFour % 4;
            sums[0] = Ints::dot_bytes(sums[0], four, at(kHigh));
            sums[1] = Ints::dot_bytes(sums[1], four, at(kHigh + 4));
        }
    }
    template <bool kXBytes>
    static MK_INLINE Ints total(const Ints (&sums)[2]) {
        return kXBytes ? sums[0] : (sums[0] << 8) + sums[1];
    }

    template <int kBlock, int kM, int kN>
    static MK_INLINE void block_sums(const XGroup* x_rows, const QuantPanel&, int b,
                                     const uint32_t* w, int, Ints (&p)[kM][kN]) {
        const uint32_t* const x = x_rows->words + b * (kBlock / 2);
        const auto add = [&](auto half, auto u, Ints(&to)[kM][kN]) MK_INLINE_LAMBDA {
            Ints w_frag[kN];
            unroll<kN>([&](auto j) MK_INLINE_LAMBDA {
                w_frag[j.value] = Ints::load(w + u.value * kTileRows + j.value * kLanes);
            });
            unroll<kM>([&](auto i) MK_INLINE_LAMBDA {
                const uint32_t four =
                    x[kXRow * i.value + u.value / 4 * 8 + 4 * half.value + u.value % 4];
                const Ints x_frag = Ints::set(static_cast<int32_t>(four));
                unroll<kN>([&](auto j) MK_INLINE_LAMBDA {
                    Ints& a = to[i.value][j.value];
                    a = Ints::dot_bytes(a, w_frag[j.value], x_frag);
                });
            });
        };
        each<kM, kN>([&](auto i, auto j) { p[i.value][j.value] = Ints::set(0); });
        if constexpr (kM * kN <= 4) {  // a chain of sums each: a dot product takes 4 clocks
            Ints low[kM][kN];
            each<kM, kN>([&](auto i, auto j) { low[i.value][j.value] = Ints::set(0); });
            unroll<kBlock / 4>([&](auto u) MK_INLINE_LAMBDA {
                add(Int<0>{}, u, p);
                add(Int<1>{}, u, low);
            });
            each<kM, kN>([&](auto i, auto j) {
                Ints& a = p[i.value][j.value];
                a = (a << 8) + low[i.value][j.value];
            });
        } else {  // one after the other, in the same registers
            unroll<kBlock / 4>([&](auto u) MK_INLINE_LAMBDA { add(Int<0>{}, u, p); });
            each<kM, kN>([&](auto i, auto j) { p[i.value][j.value] = p[i.value][j.value] << 8; });
            // Loads w once more: to keep it, there are not registers enough.
            __atomic_signal_fence(__ATOMIC_SEQ_CST);
            unroll<kBlock / 4>([&](auto u) MK_INLINE_LAMBDA { add(Int<1>{}, u, p); });
        }
    }

    // p += the sums of an x of 8 bits.
    template <int kBlock, int kM, int kN>
    static MK_INLINE void add_byte_sums(const uint32_t* x, const uint32_t* w, Ints (&p)[kM][kN]) {
        constexpr int kTurns = kM * kN < 4 ? 2 : 1;  // of accumulators, as in block_sums
        Ints other[kM][kN];
        each<kM, kN>([&](auto i, auto j) { other[i.value][j.value] = Ints::set(0); });
        unroll<kBlock / 4>([&](auto u) MK_INLINE_LAMBDA {
            Ints w_frag[kN];
            unroll<kN>([&](auto j) MK_INLINE_LAMBDA {
                w_frag[j.value] = Ints::load(w + u.value * kTileRows + j.value * kLanes);
            });
            unroll<kM>([&](auto i) MK_INLINE_LAMBDA {
                const Ints x_frag = Ints::set(static_cast<int32_t>(x[kXRow * i.value + u.value]));
                unroll<kN>([&](auto j) MK_INLINE_LAMBDA {
                    Ints& a = (u.value % kTurns ? other : p)[i.value][j.value];
                    a = Ints::dot_bytes(a, w_frag[j.value], x_frag);
                });
            });
        });
        if constexpr (kTurns == 2) {
            each<kM, kN>([&](auto i, auto j) {
                p[i.value][j.value] = p[i.value][j.value] + other[i.value][j.value];
            });
        }
    }
};

}  // namespace
}  // namespace mk::cpu
