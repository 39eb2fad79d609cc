// Running softmax of the rows of a warp's accumulators, in base 2.
//
//   weight = 2^(scale * logit - reference),  sum += weight,  acc += weight * v
//
// The reference is the row's largest scaled logit up to now, give or take: it follows only when
// it falls behind by more than kRescaleAt = 8. A weight then is at most 2^8 in place of 1, and
// the fp32 sums and the rounding of the weights are relative, so nothing is lost (2^8 is far
// below fp16's 65504, and a row's largest weight is never below 1 once its reference is set). In
// return acc and sum, 2 M of the 16 M instructions at head_dim 128, are rescaled about once per
// row and not once per tile. Whether a row's reference moves depends on that row only: the others
// of its warp, where the warp's vote takes them along, multiply by exactly 1.
#pragma once

#include "common/entry.cuh"
#include "ptx/sm80.cuh"

namespace mk {

constexpr float kRescaleAt = 8.f;
constexpr float kLn2 = 0.6931471805599453f;

// Accumulators of a warp: [m][n][2h + e] is row 16m + 8h + lane / 4; four lanes share a row.
// FP8 (attn_prefill_fp8_sm90.cuh): a reference is set 6 below the row's largest logit, whose weight
// then is 2^6, as e4m3 has few places below 1; and the sums are of rounded weights, made with acc.
template <int kM, bool kIsFp8 = false>
struct Softmax {
    static constexpr int kTopLog2 = kIsFp8 ? 6 : 0;
    const float scale;  // softmax_scale * log2(e), positive
    float neg_reference[kM][2];
    float sum[kM][2];  // over this lane's columns

    __device__ explicit Softmax(float scale) : scale(scale) {
        MK_UNROLL
        for (int i = 0; i < 2 * kM; ++i) {
            // Below any logit, but finite: a hidden logit, -inf, has weight 0 against it too.
            neg_reference[i / 2][i % 2] = 0x1p126f;
            sum[i / 2][i % 2] = 0.f;
        }
    }

    static __device__ __forceinline__ float from_top(float x) {
        return kTopLog2 ? x + kTopLog2 : x;
    }

    // Logits -> weights, in place.
    template <int kN, int kAccN>
    __device__ __forceinline__ void step(float (&x)[kM][kN][4], float (&acc)[kM][kAccN][4]) {
        float factors[kM][2];
        if (follow(x, factors)) rescale(acc, factors);
        weigh(x);
    }

    // The references follow these logits; whether that changes acc, and then each row's factor.
    template <int kN>
    __device__ __forceinline__ bool follow(const float (&x)[kM][kN][4], float (&factors)[kM][2]) {
        float largest[kM][2];
        float most_behind = -INFINITY;
        MK_UNROLL
        for (int i = 0; i < 2 * kM; ++i) {
            const int m = i / 2, h = i % 2;
            float& top = largest[m][h];
            top = fmaxf(x[m][0][2 * h], x[m][0][2 * h + 1]);
            MK_UNROLL
            for (int n = 1; n < kN; ++n) {
                top = fmaxf(fmaxf(top, x[m][n][2 * h]), x[m][n][2 * h + 1]);
            }
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
            most_behind = fmaxf(most_behind, fmaf(top, scale, neg_reference[m][h]));
        }
        return __any_sync(0xFFFFFFFFu, most_behind > kRescaleAt) && move(largest, factors);
    }

    __device__ __forceinline__ bool move(const float (&largest)[kM][2], float (&factors)[kM][2]) {
        bool has_sum = false;
        MK_UNROLL
        for (int i = 0; i < 2 * kM; ++i) {
            const int m = i / 2, h = i % 2;
            const float behind = fmaf(largest[m][h], scale, neg_reference[m][h]);
            const bool moves = behind > kRescaleAt;
            const float factor = moves ? ptx::ex2_approx_ftz_f32(from_top(-behind)) : 1.f;
            if (moves) neg_reference[m][h] = from_top(-largest[m][h] * scale);
            has_sum |= sum[m][h] > 0.f;
            if constexpr (!kIsFp8) sum[m][h] *= factor;
            factors[m][h] = factor;
        }
        if constexpr (kIsFp8) return true;
        // Not in a row's first step, when every reference moves and acc is 0.
        return __any_sync(0xFFFFFFFFu, has_sum);
    }

    template <int kAccN>
    static __device__ __forceinline__ void rescale(float (&acc)[kM][kAccN][4],
                                                   const float (&factors)[kM][2]) {
        MK_UNROLL
        for (int i = 0; i < 2 * kM; ++i) {
            const int m = i / 2, h = i % 2;
            MK_UNROLL
            for (int n = 0; n < kAccN; ++n) {
                acc[m][n][2 * h] *= factors[m][h];
                acc[m][n][2 * h + 1] *= factors[m][h];
            }
        }
    }

    // Logits -> weights, in place, and their sums.
    template <int kN>
    __device__ __forceinline__ void weigh(float (&x)[kM][kN][4]) {
        MK_UNROLL
        for (int n = 0; n < kN; ++n) {
            MK_UNROLL
            for (int i = 0; i < 4 * kM; ++i) {
                const int m = i / 4, h = i / 2 % 2;
                float& w = x[m][n][i % 4];
                w = ptx::ex2_approx_ftz_f32(fmaf(w, scale, neg_reference[m][h]));
                if constexpr (!kIsFp8) sum[m][h] += w;
            }
        }
    }

    // After the last step: sums over whole rows, in all four lanes.
    __device__ __forceinline__ void finish() {
        MK_UNROLL
        for (int i = 0; i < (kIsFp8 ? 0 : 2 * kM); ++i) {  // FP8's are
            float& s = sum[i / 2][i % 2];
            s += __shfl_xor_sync(0xFFFFFFFFu, s, 1);
            s += __shfl_xor_sync(0xFFFFFFFFu, s, 2);
        }
    }

    // What acc is multiplied with in the end: 0 for a row that saw no key.
    __device__ float inverse_sum(int m, int h) const {
        return sum[m][h] == 0.f ? 0.f : ptx::rcp_approx_ftz_f32(sum[m][h]);
    }

    // Natural logarithm of the sum of exponentials; -inf for a row that saw no key.
    __device__ float lse(int m, int h) const {
        return (ptx::lg2_approx_ftz_f32(sum[m][h]) - neg_reference[m][h]) * kLn2;
    }
};

}  // namespace mk
