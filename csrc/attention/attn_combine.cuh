// Merging partial softmax results, in a fixed order: of the warps of a block, then of the splits
// of a sequence, which the last block of the sequence and KV head to arrive does.
//
//   partial i of a row:  m_i = max of the scores (base 2), l_i = sum of 2^(score - m_i),
//                        o_i = sum of 2^(score - m_i) v
//   merged:              m = max m_i,  w_i = 2^(m_i - m),  l = sum w_i l_i,  o = sum w_i o_i
//
// A partial result without keys has m = kNoKeys, l = 0, o = 0.
#pragma once

#include "attention/attn_decode_tiles.h"
#include "common/vec.cuh"

namespace mk {

// In place of -infinity: finite, so that differences are never NaN; below any score.
constexpr float kNoKeys = -3e38f;

// Maximum and sum of a row.
using RowStat = float2;

// Where the partial results of a sequence and KV head lie in the workspace.
struct PartialRows {
    int32_t* counter;  // of the splits that have arrived
    RowStat* stats;    // [split][row]
    float* sums;       // [split][row][head_dim]
    int rows;          // per split

    __device__ __forceinline__ PartialRows(const AttnDecodeArgs& args, int64_t group,
                                           int head_dim) {
        uint8_t* const base = static_cast<uint8_t*>(args.p.workspace);
        const int64_t row = group * args.max_splits * args.rows_per_block;
        counter = reinterpret_cast<int32_t*>(base) + group;
        stats = reinterpret_cast<RowStat*>(base + args.stats_offset) + row;
        sums = reinterpret_cast<float*>(base + args.partial_offset) + row * head_dim;
        rows = args.rows_per_block;
    }
};

// Where a row of the block goes.
struct OutRows {
    const mk_attention_decode_params& p;
    int first_query;
    int first_head;
    int group;
    int first_row;  // of the block, in the KV group

    // Features 4 * quad ... of a row, whose softmax sum is l and maximum m.
    template <class Dtype>
    __device__ __forceinline__ void store(int row, int quad, float4 o, RowStat stat) const {
        const int query = (first_row + row) / group;
        const int head = first_head + (first_row + row) - query * group;
        const int64_t token = first_query + query;
        void* const to = row_of(row_of(p.out, token, p.out_stride), head, p.out_head_stride);
        const float scale = stat.y == 0.f ? 0.f : ptx::rcp_approx_ftz_f32(stat.y);
        reinterpret_cast<uint2*>(to)[quad] = {Dtype::pack(o.x * scale, o.y * scale),
                                              Dtype::pack(o.z * scale, o.w * scale)};
        if (p.lse && quad == 0) {
            constexpr float kLn2 = 0.6931471805599453f;
            p.lse[head * p.lse_stride + token] =
                stat.y == 0.f ? __int_as_float(0xFF800000) : (stat.x + log2f(stat.y)) * kLn2;
        }
    }
};

__device__ __forceinline__ void add_weighted(float4& sum, float weight, const float4& o) {
    sum.x = fmaf(weight, o.x, sum.x);
    sum.y = fmaf(weight, o.y, sum.y);
    sum.z = fmaf(weight, o.z, sum.z);
    sum.w = fmaf(weight, o.w, sum.w);
}

// Shared memory of both merges, over the ring of loads.
template <int kHeadDim, int kRows>
struct CombineSmem {
    static constexpr int kStride = kHeadDim + 4;  // so that a warp's fragments meet no bank twice

    float sums[kAttnDecodeWarps][8][kStride];  // of 8 rows at a time
    RowStat warp_stats[kAttnDecodeWarps][kRows];
    float weights[kRows][kAttnDecodeMaxSplits];
    RowStat stats[kRows];
};

// A block's result after its warps have been merged: per thread (row, quad) of each 8 rows.
template <int kHeadDim, int kRows>
struct BlockRows {
    static constexpr int kQuads = kHeadDim / 4;
    static constexpr int kItems = 8 * kQuads / kAttnDecodeThreads;
    static constexpr int kTiles = kRows / 8;
    using Smem = CombineSmem<kHeadDim, kRows>;

    float4 o[kTiles][kItems];
    RowStat stat[kTiles][kItems];

    __device__ static __forceinline__ int row_of_item(int tile, int item) {
        return 8 * tile + (item * kAttnDecodeThreads + threadIdx.x) / kQuads;
    }
    __device__ static __forceinline__ int quad() { return threadIdx.x % kQuads; }

    // smem.sums holds rows 8 * tile ... of each warp.
    __device__ __forceinline__ void merge_warps(const Smem& smem, int tile) {
        MK_UNROLL
        for (int item = 0; item < kItems; ++item) {
            const int row = row_of_item(tile, item);
            RowStat warp[kAttnDecodeWarps];
            float m = kNoKeys;
            MK_UNROLL
            for (int w = 0; w < kAttnDecodeWarps; ++w) {
                warp[w] = smem.warp_stats[w][row];
                m = fmaxf(m, warp[w].x);
            }
            float l = 0.f;
            float4 sum = {0.f, 0.f, 0.f, 0.f};
            MK_UNROLL
            for (int w = 0; w < kAttnDecodeWarps; ++w) {
                const float weight = ptx::ex2_approx_ftz_f32(warp[w].x - m);
                l = fmaf(weight, warp[w].y, l);
                add_weighted(sum, weight,
                             *reinterpret_cast<const float4*>(&smem.sums[w][row % 8][4 * quad()]));
            }
            o[tile][item] = sum;
            stat[tile][item] = {m, l};
        }
    }

    // To visit(row, o, stat) for the rows below num_rows.
    template <class Visit>
    __device__ __forceinline__ void for_each(int num_rows, const Visit& visit) {
        MK_UNROLL
        for (int tile = 0; tile < kTiles; ++tile) {
            MK_UNROLL
            for (int item = 0; item < kItems; ++item) {
                const int row = row_of_item(tile, item);
                if (row < num_rows) visit(row, o[tile][item], stat[tile][item]);
            }
        }
    }

    // As partial result number `split`. True in all threads of the block that does so last, which
    // leaves the counter 0 for the next launch.
    __device__ __forceinline__ bool publish(const PartialRows& partial, int split, int num_splits,
                                            int num_rows) {
        for_each(num_rows, [&](int row, const float4& sum, RowStat row_stat) {
            const int64_t index = split * partial.rows + row;
            reinterpret_cast<float4*>(partial.sums + index * kHeadDim)[quad()] = sum;
            if (quad() == 0) partial.stats[index] = row_stat;
        });
        __syncthreads();
        bool is_last = false;
        if (threadIdx.x == 0) {
            __threadfence();
            is_last = atomicAdd(partial.counter, 1) == num_splits - 1;
            __threadfence();
            if (is_last) *partial.counter = 0;
        }
        return __syncthreads_or(is_last);
    }

    // All splits' partial results, in their order; this block's own is number `split`.
    __device__ __forceinline__ void merge_splits(Smem& smem, const PartialRows& partial, int split,
                                                 int num_splits, int num_rows) {
        const int lane = threadIdx.x % 32;
        for (int row = threadIdx.x / 32; row < num_rows; row += kAttnDecodeWarps) {
            RowStat mine = {kNoKeys, 0.f};
            if (lane < num_splits) mine = __ldcg(&partial.stats[lane * partial.rows + row]);
            float m = mine.x;
            MK_UNROLL
            for (int i = 16; i > 0; i /= 2) m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFFu, m, i));
            const float weight = ptx::ex2_approx_ftz_f32(mine.x - m);
            float l = weight * mine.y;
            MK_UNROLL
            for (int i = 16; i > 0; i /= 2) l += __shfl_xor_sync(0xFFFFFFFFu, l, i);
            smem.weights[row][lane] = weight;
            if (lane == 0) smem.stats[row] = {m, l};
        }
        __syncthreads();
        for_each(num_rows, [&](int row, float4& sum, RowStat& row_stat) {
            const float4 own = sum;
            sum = {0.f, 0.f, 0.f, 0.f};
            row_stat = smem.stats[row];
            const float* from = partial.sums + row * kHeadDim + 4 * quad();
#pragma unroll 8
            for (int i = 0; i < num_splits; ++i, from += partial.rows * kHeadDim) {
                float4 other = own;
                if (i != split) other = __ldcg(reinterpret_cast<const float4*>(from));
                add_weighted(sum, smem.weights[row][i], other);
            }
        });
    }
};

}  // namespace mk
