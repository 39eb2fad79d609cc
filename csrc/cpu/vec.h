// What the CPU kernels are written in: 16-bit floats, and small helpers of templates. An
// instruction set's vector of 16 floats, Vec, is in vec_baseline.h, vec_avx2.h and vec_avx512.h; a
// file that is compiled once per instruction set includes one of them, then kernels over Vec
// (*_kernels.h).
//
// None of these headers includes one of the C++ library: an inline function of the library compiled
// with AVX-512 could be the copy that the linker keeps for everybody.
//
// Vec: load(T*), load(T*, count), store(T*), store(T*, count), load_odd(Bf16*), load_even, fma, +,
// -, *, /, min, max, round, scale; and for a register tile kTileM, kTileN, reduce(). T is float,
// Bf16 or F16.
#pragma once

#include <stdint.h>

namespace mk::cpu {

#define MK_INLINE inline __attribute__((always_inline))
#define MK_INLINE_LAMBDA __attribute__((always_inline))  // behind a lambda's parameters

constexpr int kLanes = 16;

// 16-bit floats as stored.
struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

namespace {

template <class T>
const T* row(const void* base, int64_t stride, int64_t index) {
    return static_cast<const T*>(base) + stride * index;
}

// An integer that is a type.
template <int kValue>
struct Int {
    static constexpr int value = kValue;
};

// std::make_integer_sequence, by what compilers have for it.
template <class T, T... kIndex>
struct Indices {};
#if __has_builtin(__make_integer_seq)
template <int kCount>
using IndicesTo = __make_integer_seq<Indices, int, kCount>;
#else
template <int kCount>
using IndicesTo = Indices<int, __integer_pack(kCount)...>;
#endif

template <class F, int... kIndex>
MK_INLINE void unroll_over(const F& f, Indices<int, kIndex...>) {
    (f(Int<kIndex>{}), ...);
}

// f(Int<0>{}), ..., f(Int<kCount - 1>{}). Arrays indexed by these stay in registers, where a loop
// that is unrolled only after they have been laid out in memory would leave them there.
template <int kCount, class F>
MK_INLINE void unroll(const F& f) {
    unroll_over(f, IndicesTo<kCount>{});
}

// f(i, j) for all i < kM and j < kN.
template <int kM, int kN, class F>
MK_INLINE void each(const F& f) {
    unroll<kM>([&](auto i)
                   MK_INLINE_LAMBDA { unroll<kN>([&](auto j) MK_INLINE_LAMBDA { f(i, j); }); });
}

}  // namespace
}  // namespace mk::cpu
