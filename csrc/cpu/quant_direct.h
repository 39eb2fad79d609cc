// Products of one or two rows of integers of x without a panel: to store an unpacked number and
// load it again takes as long as to multiply it.
//
// A lane is a row of w, as in the panel. 16 rows go from the first column to the last, their sums
// in registers; meanwhile the next 16, one piece of memory behind these, are fetched into L2 in the
// order in which they lie, a few lines at each block (the processor's own prefetchers see 16 short
// streams). With that, two cores read Q4_0 at 21 to 26 GB/s where a sum over the same bytes reads
// 24 to 40.
//
// Shifts and shuffles have two of Zen 4's four pipes; so a field that does not begin at bit 0 is
// multiplied where it is, and the sum divided.
//
// Products a nanosecond of a Zen 4 core at 3.6 GHz, w in L2, x of 16 bits (8), with all that a call
// costs (python -m bench.cpu_quant_rates):
//
//        Q4_0     Q4_1     Q5_0     Q5_1     Q8_0     Q2_K     Q3_K     Q4_K     Q5_K     Q6_K
//   M 1  34 (38)  33 (37)  25 (28)  25 (27)  30 (34)  35 (41)  28 (31)  37 (44)  30 (34)  26 (28)
//   M 2  47 (62)  46 (62)  41 (47)  39 (46)  45 (56)  49 (61)  43 (51)  54 (67)  49 (56)  41 (47)
//
// With AVX2 (--isa avx2), on the same core, M 1: Q4_0 19, Q4_K 19, Q8_0 16, Q6_K 17.
//
// Tried and lost: vectors of 16 columns of 4 rows, whose sums of words cross lanes at the end
// instead of the words before (Q4_0 42 (52), all others up to 20 % less); fetching into L1, into
// L3, or without keeping (20 to 30 % at DRAM's speed).
#pragma once

#include "cpu/quant_formats.h"

namespace mk::cpu {
namespace {

// Where the numbers of 16 rows go: into sums with kM rows of integers of x.
template <class Type, bool kXBytes, int kM>
struct ToSums {
    static constexpr int kBlock = Type::kBlock;

    const XGroup* x;      // kM of them
    const uint8_t* next;  // to be fetched
    Vec s[kM], total[kM];
    Vec scales[kGroup / kBlock], minima[kGroup / kBlock];

    MK_INLINE void scale(int b, Vec scale) { scales[b] = scale; }
    MK_INLINE void minimum(int b, Vec minimum) { minima[b] = minimum; }

    template <int kFirst, int kSecond, class F>
    MK_INLINE void block(int b, const F& f) {
        constexpr bool kApart = kFirst != kSecond;  // 16 columns each in sums of their own
        if (kBlock == 32 || b % 2 == 0) fetch();
        Ints acc[kM][2][2];  // chains of sums
        each<kM, 4>([&](auto i, auto t) MK_INLINE_LAMBDA {
            acc[i.value][t.value / 2][t.value % 2] = Ints::set(0);
        });
        unroll<kBlock / 4>([&](auto j) MK_INLINE_LAMBDA {
            constexpr int kChain = kApart ? j.value / 4 : kXBytes ? j.value % 2 : 0;
            const Ints w = f(j);
            unroll<kM>([&](auto i) MK_INLINE_LAMBDA {
                const uint32_t* words =
                    x[i.value].words + b * Order::template x_words<kXBytes>(kBlock);
                Order::template add<kXBytes, j.value>(acc[i.value][kChain], w, words);
            });
        });
        unroll<kM>([&](auto i) MK_INLINE_LAMBDA {
            const XGroup& group = x[i.value];
            Vec& a = s[i.value];
            const auto& chains = acc[i.value];
            const Ints first = Order::template total<kXBytes>(chains[0]);
            const Ints second = Order::template total<kXBytes>(chains[1]);
            Ints p = kApart    ? first.divide(kFirst) + second.divide(kSecond)
                     : kXBytes ? (first + second).divide(kFirst)
                               : first.divide(kFirst);
            const Ints x_sum = Ints::set(kBlock == 16 ? group.sums16[b] : group.sums32[b]);
            if constexpr (!Type::kHasMin) p = p - (x_sum << Type::kBias);
            const bool begins = kXBytes && (kBlock == 32 || b % 2 == 0);
            a = begins ? p.to_float() * scales[b] : Vec::fma(p.to_float(), scales[b], a);
            if constexpr (Type::kHasMin) a = Vec::fma(x_sum.to_float(), minima[b], a);
            if (kXBytes && (kBlock == 32 || b % 2 == 1)) add_unit(i.value, b * kBlock / 32);
        });
    }

    MK_INLINE void add_unit(int i, int b) {
        total[i] = Vec::fma(s[i], Vec::set(x[i].units[b]), total[i]);
    }
    // What 32 columns of 16 rows take; the addresses may lie outside w.
    MK_INLINE void fetch() {
        constexpr int kFetch = 16 * 32 * Type::kBytes / Type::kColumns;
        unroll<(kFetch + 63) / 64>(
            [&](auto i) MK_INLINE_LAMBDA { __builtin_prefetch(next + 64 * i.value, 0, 2); });
        next += kFetch;
    }
};

// direct_sums for kM rows of integers.
template <class Type, bool kXBytes, int kM>
MK_NOINLINE void direct_sums_of(const QuantTask& task, const XGroup* x, Rows rows,
                                const uint8_t* next, float* sums) {
    ToSums<Type, kXBytes, kM> to;
    to.next = next;
    unroll<kM>([&](auto i) { to.total[i.value] = Vec::set(0.f); });
    const uint8_t* at[kLanes];
    for (int r = 0; r < kLanes; ++r) at[r] = rows[r];
    const int64_t k = task.p.k;
    for (int64_t column = 0; column < k; column += kGroup, x += task.x_rows) {
        const int columns = static_cast<int>(k - column < kGroup ? k - column : kGroup);
        to.x = x;
        unroll<kM>([&](auto i) { to.s[i.value] = Vec::set(0.f); });
        Type::unpack(at, columns, to);
        if constexpr (!kXBytes) unroll<kM>([&](auto i) { to.add_unit(i.value, 0); });
        for (const uint8_t*& each : at) each += columns / Type::kColumns * Type::kBytes;
    }
    unroll<kM>([&](auto i) { to.total[i.value].store(sums + i.value * kTileRows); });
}

// sums[i][r] = those of row i of `count` <= kDirectRows rows of integers and of rows[r] of 16;
// `next` are the 16 rows that lie behind.
template <class Type>
MK_INLINE void direct_sums(const QuantTask& task, const XGroup* x, int64_t count, Rows rows,
                           const uint8_t* next, float* sums) {
    const auto run = [&](auto m) MK_INLINE_LAMBDA {
        constexpr int kM = decltype(m)::value;
        const auto sums_of =
            task.p.x_bits == 8 ? direct_sums_of<Type, true, kM> : direct_sums_of<Type, false, kM>;
        sums_of(task, x, rows, next, sums);
    };
    if constexpr (Ints::kDirectRows == 2) {
        if (count == 2) return run(Int<2>{});
    }
    run(Int<1>{});
}

}  // namespace
}  // namespace mk::cpu
