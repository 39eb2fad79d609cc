// Pairs of bfloat16 and their products (AVX512-BF16), beside Vec in AVX-512.
#pragma once

#include "cpu/vec_avx512.h"

#define MK_BF16_PRODUCTS  // for linear_kernels.h

namespace mk::cpu {
namespace {

// 16 pairs of neighbouring columns.
struct Pairs {
    __m512i v;

    static Pairs load(const float* panel) { return {_mm512_loadu_si512(panel)}; }
    static Pairs load(const Bf16* p) { return {_mm512_loadu_si512(p)}; }
    // The first `count` <= 32 columns, then zeros.
    static Pairs load(const Bf16* p, int count) { return {Vec::load_pairs(p, count)}; }
    void store(float* panel) const { _mm512_storeu_si512(panel, v); }

    // c + the product of the odd columns, then + that of the even ones, each as by a fused
    // multiply-add that takes subnormals for zeros; on Zen 4 and by Intel's description.
    static Vec fma(Pairs a, Pairs b, Vec c) {
        return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v),
                                 reinterpret_cast<__m512bh>(b.v))};
    }
};

}  // namespace
}  // namespace mk::cpu
