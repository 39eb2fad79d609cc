// What argmax and sample share: rows of logits, and numbers that order as the logits do.
#pragma once

#include "common/vec.cuh"
#include "ptx/sm90.cuh"
#include "sampling/sampling_tiles.h"

namespace mk {

constexpr float kMinusInf = -__builtin_huge_valf();

// A row of logits of a 2-byte dtype.
template <class Dtype, bool kAligned>
struct Logits {
    const void* row;
    int vocab;

    __device__ Logits(const void* logits, int64_t index, int64_t stride, int vocab)
        : row(row_of(logits, index, stride)), vocab(vocab) {}

    // Logits first ... first + 7, of which the first exists; -inf past the end.
    __device__ __forceinline__ void load(int first, float (&to)[kVec]) const {
        const Vec8 v = load8<kAligned, Reuse::kOften>(row, first, vocab);
        MK_UNROLL
        for (int i = 0; i < kVec / 2; ++i) {
            const float2 f = Dtype::unpack(v.pair[i]);
            to[2 * i] = f.x;
            to[2 * i + 1] = f.y;
        }
        if constexpr (!kAligned) {
            MK_UNROLL
            for (int i = 0; i < kVec; ++i) {
                if (first + i >= vocab) to[i] = kMinusInf;
            }
        }
    }
};

struct F32;

template <bool kAligned>
struct Logits<F32, kAligned> {
    const float* row;
    int vocab;

    __device__ Logits(const void* logits, int64_t index, int64_t stride, int vocab)
        : row(static_cast<const float*>(logits) + index * stride), vocab(vocab) {}

    __device__ __forceinline__ void load(int first, float (&to)[kVec]) const {
        MK_UNROLL
        for (int i = 0; i < kVec; ++i) {
            if constexpr (kAligned) {
                if (i % 4 == 0) {
                    const float4 f = *reinterpret_cast<const float4*>(row + first + i);
                    to[i] = f.x, to[i + 1] = f.y, to[i + 2] = f.z, to[i + 3] = f.w;
                }
            } else {
                to[i] = first + i < vocab ? row[first + i] : kMinusInf;
            }
        }
    }
};

// Calls visit(first, logits) for each 8 logits of the row. A thread has kUnroll of them in flight
// together, where visit is small enough for that.
template <int kUnroll, class Row, class Visit>
__device__ __forceinline__ void for_each_8(const Row& row, const Visit& visit) {
#pragma unroll kUnroll
    for (int first = threadIdx.x * kVec; first < row.vocab; first += kSamplingThreads * kVec) {
        float logits[kVec];
        row.load(first, logits);
        visit(first, logits);
    }
}

// The largest of 8; NaN if one is.
__device__ __forceinline__ float max_of(const float (&logits)[kVec]) {
    float largest = logits[0];
    MK_UNROLL
    for (int i = 1; i < kVec; ++i) largest = ptx::max_nan_f32(largest, logits[i]);
    return largest;
}

// `value` of all threads of the block, reduced by `combine`.
template <class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, const Combine& combine) {
    __shared__ T smem_values[kSamplingThreads / 32];
    const auto warp_reduce = [&combine](T v) {
        MK_UNROLL
        for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
            v = combine(v, __shfl_xor_sync(0xFFFFFFFFu, v, lane_mask));
        }
        return v;
    };
    value = warp_reduce(value);
    if (threadIdx.x % 32 == 0) smem_values[threadIdx.x / 32] = value;
    __syncthreads();
    return warp_reduce(smem_values[threadIdx.x % 32]);
}

// The largest logit of the row; NaN if one is. Two instructions per logit.
template <class Row>
__device__ __forceinline__ float block_max(const Row& row) {
    const auto combine = [](float a, float b) { return ptx::max_nan_f32(a, b); };
    float largest = kMinusInf;
    for_each_8<4>(
        row, [&](int, const float (&logits)[kVec]) { largest = combine(largest, max_of(logits)); });
    return block_reduce(largest, combine);
}

// The first place of `largest`, which block_max found. It is in few vectors: most are skipped.
template <class Row>
__device__ __forceinline__ int block_first(const Row& row, float largest) {
    int id = row.vocab;
    for_each_8<4>(row, [&](int first, const float (&logits)[kVec]) {
        const float top = max_of(logits);
        if (id < row.vocab || (top != largest && !isnan(top))) return;
        MK_UNROLL
        for (int i = kVec - 1; i >= 0; --i) {
            if (logits[i] == largest || isnan(logits[i])) id = first + i;
        }
    });
    return block_reduce(id, [](int a, int b) { return min(a, b); });
}

}  // namespace mk
