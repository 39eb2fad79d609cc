// What argmax and sample share: rows of logits, and numbers that order as the logits do.
#pragma once

#include "common/vec.cuh"
#include "ptx/sm90.cuh"
#include "sampling/sampling_tiles.h"

namespace mk {

// A row of logits of a 2-byte dtype.
template <class Dtype, bool kAligned>
struct Logits {
    const void* row;
    int vocab;

    __device__ Logits(const void* logits, int64_t index, int64_t stride, int vocab)
        : row(row_of(logits, index, stride)), vocab(vocab) {}

    // Logits first ... first + 7; those past the end are arbitrary.
    __device__ __forceinline__ void load(int first, float (&to)[kVec]) const {
        const Vec8 v = load8<kAligned, Reuse::kOften>(row, first, vocab);
        MK_UNROLL
        for (int i = 0; i < kVec / 2; ++i) {
            const float2 f = Dtype::unpack(v.pair[i]);
            to[2 * i] = f.x;
            to[2 * i + 1] = f.y;
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
                to[i] = first + i < vocab ? row[first + i] : 0.f;
            }
        }
    }
};

// Keys order as floats do, with -0 = +0 and every NaN above all. No float has key 0.
constexpr uint32_t kKeyNone = 0;
constexpr uint32_t kKeyMinusInf = 0x007FFFFFu;
constexpr uint32_t kKeyInf = 0xFF800000u;
constexpr uint32_t kKeyNan = 0xFFFFFFFFu;

__device__ __forceinline__ uint32_t key_of(float logit) {
    if (isnan(logit)) return kKeyNan;
    const uint32_t bits = __float_as_uint(logit + 0.f);  // -0 + 0 = +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// The 8 keys at `first` of logits divided by `temperature`, kKeyNone past the end.
template <class Row>
__device__ __forceinline__ void load_keys(const Row& logits, int first, float temperature,
                                          uint32_t (&keys)[kVec]) {
    MK_UNROLL
    for (uint32_t& key : keys) key = kKeyNone;
    if (first >= logits.vocab) return;
    float l[kVec];
    logits.load(first, l);
    MK_UNROLL
    for (int i = 0; i < kVec; ++i) {
        if (first + i < logits.vocab) keys[i] = key_of(__fdiv_rn(l[i], temperature));
    }
}

// A maximum and where it is first; as one number, the largest of these is the first maximum.
__device__ __forceinline__ uint64_t key_and_id(uint32_t key, int id) {
    return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ uint32_t key_in(uint64_t best) { return best >> 32; }
__device__ __forceinline__ int id_in(uint64_t best) { return ~static_cast<uint32_t>(best); }

// The first of the largest logits of the row, in every thread of the block.
template <class Row>
__device__ __forceinline__ uint64_t block_argmax(const Row& logits, float temperature) {
    __shared__ uint64_t smem_best[kSamplingThreads / 32];
    uint64_t best = 0;
    MK_NO_UNROLL
    for (int first = threadIdx.x * kVec; first < logits.vocab; first += kSamplingThreads * kVec) {
        uint32_t keys[kVec];
        load_keys(logits, first, temperature, keys);
        MK_UNROLL
        for (int i = 0; i < kVec; ++i) best = max(best, key_and_id(keys[i], first + i));
    }
    MK_UNROLL
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
        best = max(best, __shfl_xor_sync(0xFFFFFFFFu, best, lane_mask));
    }
    if (threadIdx.x % 32 == 0) smem_best[threadIdx.x / 32] = best;
    __syncthreads();
    best = smem_best[threadIdx.x % 32];
    MK_UNROLL
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) {
        best = max(best, __shfl_xor_sync(0xFFFFFFFFu, best, lane_mask));
    }
    return best;
}

}  // namespace mk
