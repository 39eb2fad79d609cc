// A register tile of dot products over Vec, which the including file has defined: kTileM rows of x
// times kTileN rows of w, 16 columns a step, 16 partial sums an output (see mk_cpu_linear).
#pragma once

#include "cpu/vec.h"
#include "minitron_kernels.h"

namespace mk::cpu {
namespace {

constexpr int kTileM = Vec::kTileM;
constexpr int kTileN = Vec::kTileN;
static_assert(kTileM == 2 || kTileM == 3);

template <int kM>
struct Tile {
    Vec acc[kM][kTileN];

    MK_INLINE Tile() {
        each([](Vec& a, int) { a = Vec::set(0.f); });
    }

    // f(accumulator, its index in the tile)
    template <class F>
    MK_INLINE void each(const F& f) {
        unroll<kM>([&](auto i) {
            unroll<kTileN>([&](auto j) { f(acc[i.value][j.value], i.value * kTileN + j.value); });
        });
    }

    // acc[i][j] += x[i] * w[j] for the columns of a Frag, a Vec's 16; load_w(j) gives those of row
    // j.
    template <class Frag = Vec, class LoadW>
    MK_INLINE void step(const float* x, const LoadW& load_w) {
        Frag x_frag[kM];
        unroll<kM>([&](auto i) { x_frag[i.value] = Frag::load(x + i.value * kLanes); });
        unroll<kTileN>([&](auto j) {
            const Frag w_frag = load_w(j.value);
            unroll<kM>([&](auto i) {
                Vec& a = acc[i.value][j.value];
                a = Frag::fma(x_frag[i.value], w_frag, a);
            });
        });
    }

    // sums[i * stride + j] = the sum of the lanes of acc[i][j].
    MK_INLINE void reduce(float* sums, int64_t stride) const {
        unroll<kM>([&](auto i) { Vec::reduce(acc[i.value], sums + i.value * stride); });
    }
};

// f(Int<rows of the next tile>{}), when `rows` >= 1 are left.
template <class F>
MK_INLINE void with_tile_rows(int64_t rows, const F& f) {
    if constexpr (kTileM == 3) {
        if (rows >= 3) return f(Int<3>{});
    }
    if (rows >= 2) return f(Int<2>{});
    return f(Int<1>{});
}

// Columns k ... k_end-1 of `count` rows as a panel: 16 columns of each row, then the next 16.
template <class T>
void pack(const T* const* rows, int count, int64_t k, int64_t k_end, float* panel) {
    for (; k + kLanes <= k_end; k += kLanes) {
        for (int r = 0; r < count; ++r, panel += kLanes) Vec::load(rows[r] + k).store(panel);
    }
    if (k < k_end) {
        const int left = static_cast<int>(k_end - k);
        for (int r = 0; r < count; ++r, panel += kLanes) Vec::load(rows[r] + k, left).store(panel);
    }
}

// f(T{}) for the T that an mk_dtype stands for.
template <class F>
void with_dtype(int32_t dtype, const F& f) {
    if (dtype == MK_F32) return f(float{});
    if (dtype == MK_BF16) return f(Bf16{});
    return f(F16{});
}

}  // namespace
}  // namespace mk::cpu
