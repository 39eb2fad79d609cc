// out = e4m3(x / scale), with a scale for each 128 elements of a row, or one that is given.
// Memory-bound: 2 bytes in, 1 out per element, each moved once.
//
// One kernel serves bf16 and f16, both forms of scales, and rows that are not aligned.
//
// Work is spread as common/rows_tiles.h draws it. A block of 128 is 16 lanes with a vector of 8
// each: half a warp, always, as the vectors of a row go round whole warps.
#pragma once

#include "common/rows.cuh"
#include "minitron_kernels_fp8.h"
#include "ptx/sm89.cuh"
#include "ptx/sm90.cuh"

namespace mk {

constexpr float kE4m3Max = 448.f;
constexpr float kLeastAmax = 0x1p-96f;  // so that 1 / scale is finite

template <class Dtype, bool kAligned>
__device__ __forceinline__ void quantize_fp8(const mk_quantize_fp8_params& p) {
    const int64_t row = blockIdx.x;
    const void* const x_row = row_of(p.x, row, p.x_stride);
    uint8_t* const out_row = static_cast<uint8_t*>(p.out) + row * p.out_stride;

    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    Vec8 x[kRowVecs]{};
    MK_UNROLL
    for (int s = 0; s < kRowVecs; ++s) {
        if (row_element(s) < p.k) x[s] = load8<kAligned>(x_row, row_element(s), p.k);
    }
    float scale = p.block ? 0.f : *p.scales;
    MK_UNROLL
    for (int s = 0; s < kRowVecs; ++s) {
        const int first = row_element(s), lane = threadIdx.x % 32;
        if (first - lane * kVec >= p.k) break;  // the warp's first
        float v[kVec], amax = 0;
        MK_UNROLL
        for (int i = 0; i < kVec; i += 2) {
            const float2 pair = Dtype::unpack(x[s].pair[i / 2]);
            v[i] = pair.x, v[i + 1] = pair.y;
            amax = fmaxf(amax, fmaxf(fabsf(pair.x), fabsf(pair.y)));  // NaN left out
        }
        if (p.block) {
            MK_UNROLL
            for (int lanes = 1; lanes < 16; lanes *= 2) {
                amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, lanes));
            }
            scale = __fdiv_rn(fmaxf(amax, kLeastAmax), kE4m3Max);
            if (lane % 16 == 0 && first < p.k) {
                p.scales[row * p.scales_stride + first / (16 * kVec) * p.scales_block_stride] =
                    scale;
            }
        }
        if (first >= p.k) continue;
        const float inverse = __frcp_rn(scale);
        uint16_t pairs[kVec / 2];
        MK_UNROLL
        for (int i = 0; i < kVec; i += 2) {
            pairs[i / 2] = ptx::cvt_rn_satfinite_e4m3x2_f32(v[i + 1] * inverse, v[i] * inverse);
        }
        if constexpr (kAligned) {
            *reinterpret_cast<uint2*>(out_row + first) = {pairs[0] | uint32_t{pairs[1]} << 16,
                                                          pairs[2] | uint32_t{pairs[3]} << 16};
        } else {
            MK_UNROLL
            for (int i = 0; i < kVec; ++i) {
                if (first + i < p.k) {
                    out_row[first + i] = static_cast<uint8_t>(pairs[i / 2] >> (i % 2 * 8));
                }
            }
        }
    }
}

__device__ __forceinline__ void quantize_fp8(const mk_quantize_fp8_params& p) {
    const bool is_aligned = p.k % kVec == 0 &&
                            ((reinterpret_cast<uintptr_t>(p.x) | p.x_stride * 2) & 15) == 0 &&
                            ((reinterpret_cast<uintptr_t>(p.out) | p.out_stride) & 7) == 0;
    if (p.dtype == MK_BF16) {
        is_aligned ? quantize_fp8<Bf16, true>(p) : quantize_fp8<Bf16, false>(p);
    } else {
        is_aligned ? quantize_fp8<F16, true>(p) : quantize_fp8<F16, false>(p);
    }
}

}  // namespace mk
