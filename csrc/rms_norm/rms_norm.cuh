// RMSNorm, with or without a residual added first:  out = round(x * rsqrt(mean(x^2) + eps)) * w.
//
//   block (threads_per_row, rows_per_block); block b does rows b, b + grid, ... of the row groups
//   row     |v0 v1 ... v31|v32 ... v63| ...      v = 8 elements = 16 bytes
//            \__ group 0 __/ \_ group 1 _/       a warp takes one group per step, 1 to 4 steps
//
// A thread holds its vectors in registers from the load to the store, so x crosses DRAM once; the
// weight is loaded once per block and stays in registers over all its rows. The next row is loaded
// before the current one is reduced: 5 blocks of 128 threads then keep 40 KB per SM in flight
// (add_rms_norm: 4 blocks, 64 KB), where 700 ns of latency need 18 KB on H100 and 38 KB on B200.
//
// rms_norm_row.cuh has the arithmetic. Which thread holds a vector has no influence, so the plan
// may give a row more threads when there are few rows, and a row's bits depend on the row only.
#pragma once

#include "common/vec.cuh"
#include "ptx/sm90.cuh"
#include "rms_norm/rms_norm_row.cuh"
#include "rms_norm/rms_norm_tiles.h"

namespace mk {

template <class Dtype>
__device__ __forceinline__ Vec8 add(const Vec8& a, const Vec8& b) {
    Vec8 sum;
    MK_UNROLL
    for (int i = 0; i < kVec / 2; ++i) {
        const float2 fa = Dtype::unpack(a.pair[i]);
        const float2 fb = Dtype::unpack(b.pair[i]);
        sum.pair[i] = Dtype::pack(fa.x + fb.x, fa.y + fb.y);
    }
    return sum;
}

template <class Dtype, bool kAligned, bool kHasResidual>
__device__ __forceinline__ void rms_norm(const mk_rms_norm_params& p) {
    constexpr int kSteps = kRmsNormVecsPerThread;
    // Two sets, so that one barrier per row is enough.
    __shared__ float4 smem_group_sums[2][kRmsNormMaxGroups / 4];

    const int num_vecs = (p.hidden + kVec - 1) / kVec;
    const int num_quads = (num_vecs + 127) / 128;  // of groups
    const bool one_warp_per_row = blockDim.x == 32;
    const auto is_mine = [&](int step) { return threadIdx.x + step * blockDim.x < num_vecs; };
    const auto first = [&](int step) { return (threadIdx.x + step * blockDim.x) * kVec; };
    const auto load_row = [&](const void* tensor, int64_t stride, int row, Vec8(&to)[kSteps]) {
        const void* from = row_of(tensor, row, stride);
        MK_UNROLL
        for (int s = 0; s < kSteps; ++s) {
            if (is_mine(s)) to[s] = load8<kAligned>(from, first(s), p.hidden);
        }
    };

    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    Vec8 weight[kSteps]{};
    MK_UNROLL
    for (int s = 0; s < kSteps; ++s) {
        if (is_mine(s)) weight[s] = load8<kAligned, Reuse::kOften>(p.weight, first(s), p.hidden);
    }

    const int row_step = gridDim.x * blockDim.y;
    int row = blockIdx.x * blockDim.y + threadIdx.y;
    Vec8 next[kSteps]{};
    Vec8 next_residual[kSteps]{};
    if (row < p.rows) {
        load_row(p.x, p.x_stride, row, next);
        if (kHasResidual) load_row(p.residual, p.residual_stride, row, next_residual);
    }
    for (int parity = 0; row < p.rows; row += row_step, parity ^= 1) {
        Vec8 x[kSteps];
        MK_UNROLL
        for (int s = 0; s < kSteps; ++s) {
            x[s] = kHasResidual ? add<Dtype>(next[s], next_residual[s]) : next[s];
        }
        if (row + row_step < p.rows) {
            load_row(p.x, p.x_stride, row + row_step, next);
            if (kHasResidual)
                load_row(p.residual, p.residual_stride, row + row_step, next_residual);
        }

        // All four sums, though fewer groups may be left: the shuffles of the four interleave, and
        // missing vectors are 0.
        float group_sum[kSteps];
        MK_UNROLL
        for (int s = 0; s < kSteps; ++s) group_sum[s] = sum_of_squares<Dtype>(x[s]);
        float4 total = {group_sum[0], group_sum[1], group_sum[2], group_sum[3]};
        if (!one_warp_per_row) {
            float* sums = &smem_group_sums[parity][0].x;
            if (threadIdx.x % 32 == 0) {
                MK_UNROLL
                for (int s = 0; s < kSteps; ++s)
                    sums[(threadIdx.x + s * blockDim.x) / 32] = group_sum[s];
            }
            __syncthreads();
            total = sum_of_groups(smem_group_sums[parity], num_quads);
        }
        const float scale = rms_scale(total, p.hidden, p.eps);

        void* const out = row_of(p.out, row, p.out_stride);
        MK_UNROLL
        for (int s = 0; s < kSteps; ++s) {
            if (!is_mine(s)) break;
            if (kHasResidual) {
                store8<kAligned>(row_of(p.residual, row, p.residual_stride), first(s), p.hidden,
                                 x[s]);
            }
            store8<kAligned>(out, first(s), p.hidden, normalise<Dtype>(x[s], scale, weight[s]));
        }
    }
}

}  // namespace mk
