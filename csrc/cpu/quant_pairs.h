// Half as many products of 16-bit integers for two additions each (S. Winograd, A new algorithm for
// inner product, 1968): of neighbouring columns 0 and 1
//
//   (x0 + w1) (x1 + w0) = x0 w0 + x1 w1 + x0 x1 + w0 w1
//
// of which the last two belong to a row of x and a row of w alone: minus their sums over a block is
// what the sum of a block begins with. All of this is modulo 2^32, and the sum over w x is below
// 2^31; so the bits are those of the other orders. w is stored less its bias, and |x| <= 127 * 2^8,
// so that x + w has 16 bits.
//
// It pays off where a vector unit adds but does not multiply. A Zen 4 core begins 2 vectors of
// additions a clock, or one of 32 products and one of additions: 1.5 clocks for 16 rows of w and
// four columns, where bytes take 2. An Intel core with two units of 512 bits takes 1.5 and 1.
// The words of w and x are those of quant_halves.h.
#pragma once

#include "cpu/quant_halves.h"

namespace mk::cpu {
namespace {

struct Pairs : Halves {
    static constexpr bool kIsPaired = true;

    static MK_INLINE void put_x(XGroup& group, int i, Ints q) {
        q.store_halves(group.words + i / 2);
        uint32_t* const less = group.less16 + i / 16;
        *less = 0 - q.sum_of_pairs();
        if (i % 32 == 16) group.less32[i / 32] = less[-1] + less[0];
    }
    // Four columns of 16 rows of w, a byte each, less kBias; less -= the products of neighbours.
    template <int kBias>
    static MK_INLINE void put(uint32_t* to, Ints four, Ints& less) {
        const auto half = [&](Ints two) MK_INLINE_LAMBDA {
            two = two & 0x00ff00ff;
            constexpr uint32_t kLess = static_cast<uint16_t>(-kBias) * 0x10001u;
            return kBias ? Ints::add_halves(two, Ints::set(static_cast<int32_t>(kLess))) : two;
        };
        const Ints even = half(four), odd = half(four >> 8);
        even.store(to);
        odd.store(to + kTileRows);
        less = Ints::dot(less, even, odd);
    }
    static MK_INLINE void put_less(uint32_t* to, Ints sum) { (Ints::set(0) - sum).store(to); }

    // p[i][j] = sum over block b, at `w` of lanes from `lane`, of row i of x times rows j of w.
    template <int kBlock, int kM, int kN>
    static MK_INLINE void block_sums(const XGroup* x, const QuantPanel& panel, int b,
                                     const uint32_t* w, int lane, Ints (&p)[kM][kN]) {
        unroll<kN>([&](auto j) MK_INLINE_LAMBDA {
            const Ints less = Ints::load(panel.less[b] + lane + j.value * kLanes);
            unroll<kM>([&](auto i) MK_INLINE_LAMBDA {
                const uint32_t of_x = kBlock == 16 ? x[i.value].less16[b] : x[i.value].less32[b];
                p[i.value][j.value] = less + Ints::set(static_cast<int32_t>(of_x));
            });
        });
        unroll<kBlock / 4>([&](auto four) MK_INLINE_LAMBDA {
            Ints even[kN], odd[kN];
            unroll<kN>([&](auto j) MK_INLINE_LAMBDA {
                const uint32_t* const at = w + four.value * 2 * kTileRows + j.value * kLanes;
                even[j.value] = Ints::load(at);
                odd[j.value] = Ints::load(at + kTileRows);
            });
            unroll<kM>([&](auto i) MK_INLINE_LAMBDA {
                const uint32_t* const at = x[i.value].words + b * (kBlock / 2) + 2 * four.value;
                const Ints x_even = Ints::set(static_cast<int32_t>(at[0]));
                const Ints x_odd = Ints::set(static_cast<int32_t>(at[1]));
                unroll<kN>([&](auto j) MK_INLINE_LAMBDA {
                    Ints& a = p[i.value][j.value];
                    a = Ints::dot(a, Ints::add_halves(x_even, odd[j.value]),
                                  Ints::add_halves(x_odd, even[j.value]));
                });
            });
        });
    }
};

}  // namespace
}  // namespace mk::cpu
