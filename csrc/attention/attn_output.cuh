// The end of a warp's rows: what attention writes.
#pragma once

#include "attention/attn_smem.cuh"
#include "attention/softmax.cuh"
#include "common/vec.cuh"

namespace mk {

// A warp's rows from shared memory to out, 16 bytes at a time, `stride` bytes apart.
template <class Layout, int kHeadDim, int kRows>
__device__ __forceinline__ void copy_rows(const uint8_t* smem_rows, uint8_t* out, int64_t stride,
                                          int num_rows) {
    constexpr int kLanes = kRowBytes<kHeadDim> / 16;  // of a row
    const int lane = threadIdx.x % 32;
    MK_UNROLL
    for (int first = 0; first < kRows; first += 32 / kLanes) {
        const int row = first + lane / kLanes, byte = lane % kLanes * 16;
        const uint4 v = *reinterpret_cast<const uint4*>(smem_rows + Layout::at(row, byte));
        if (row < num_rows) ptx::st_global_v4(out + row * stride + byte, v);
    }
}

// Rows of acc, over their sums, to shared memory, and from there to out. smem_rows: the warp's own,
// 16 kM rows.
template <class Dtype, int kHeadDim, int kM>
__device__ __forceinline__ void store_rows(const float (&acc)[kM][kHeadDim / 8][4],
                                           const Softmax<kM>& softmax, uint8_t* smem_rows,
                                           uint8_t* out, int64_t stride, int num_rows) {
    const int lane = threadIdx.x % 32;
    MK_UNROLL
    for (int i = 0; i < 2 * kM; ++i) {
        const int m = i / 2, h = i % 2;
        const float scale = softmax.inverse_sum(m, h);
        MK_UNROLL
        for (int n = 0; n < kHeadDim / 8; ++n) {
            const uint32_t pair =
                Dtype::pack(acc[m][n][2 * h] * scale, acc[m][n][2 * h + 1] * scale);
            const int at = swizzled<kHeadDim>(16 * m + 8 * h + lane / 4, 16 * n);
            *reinterpret_cast<uint32_t*>(smem_rows + at + lane % 4 * 4) = pair;
        }
    }
    __syncwarp();
    copy_rows<WholeRows<kHeadDim>, kHeadDim, 16 * kM>(smem_rows, out, stride, num_rows);
}

// Where a head's output of a token is.
__device__ __forceinline__ uint8_t* out_row(const mk_attention_params& p, int head, int64_t token) {
    return static_cast<uint8_t*>(p.out) + head * p.out_head_stride * 2 + token * p.out_stride * 2;
}

// lse of the tokens `token` ... of a head, `num_rows` of them, if it is asked for.
template <int kM, bool kIsFp8>
__device__ __forceinline__ void write_lse(const mk_attention_params& p, int head, int64_t token,
                                          int num_rows, const Softmax<kM, kIsFp8>& softmax) {
    const int lane = threadIdx.x % 32;
    if (!p.lse || lane % 4) return;
    float* const lse = p.lse + head * p.lse_stride + token;
    MK_UNROLL
    for (int i = 0; i < 2 * kM; ++i) {
        const int r = lane / 4 + 8 * i;
        if (r < num_rows) lse[r] = softmax.lse(i / 2, i % 2);
    }
}

// out and lse of these tokens.
template <class Dtype, int kHeadDim, int kM>
__device__ __forceinline__ void write_rows(const mk_attention_params& p, int head, int64_t token,
                                           int num_rows, Softmax<kM>& softmax,
                                           const float (&acc)[kM][kHeadDim / 8][4],
                                           uint8_t* smem_rows) {
    softmax.finish();
    write_lse(p, head, token, num_rows, softmax);
    // Not by out_row(): nvcc would then double the stride anew for each row.
    const int64_t stride = p.out_stride * 2;
    uint8_t* const out =
        static_cast<uint8_t*>(p.out) + head * p.out_head_stride * 2 + token * stride;
    store_rows<Dtype, kHeadDim>(acc, softmax, smem_rows, out, stride, num_rows);
}

}  // namespace mk
