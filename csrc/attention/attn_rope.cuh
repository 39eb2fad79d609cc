// Rotation of query rows that lie in shared memory.
#pragma once

#include "attention/attn_smem.cuh"
#include "common/vec.cuh"

namespace mk {

// One warp rotates `kRows` (8, 16, 24 or 32) rows of a tile in place, as apply_rope does: in fp32,
// rounded once. Layout: of attn_smem.cuh. Row r is of token `token + r`, whose place in its
// sequence is `place + r`; rows from num_rows on are left alone.
//
// A lane has four neighbouring pairs of every second row (head_dim 64: of every fourth): 16 bytes
// of the cosines and of the sines, twice 8 of the row. With angles that are not aligned so, or
// numbers of pairs that are no multiple of four, it has pairs l, l + 32, ... of every row.
template <class Dtype, class Layout, int kHeadDim, int kRows>
struct RowRotation {
    static constexpr int kLanes = kHeadDim / 8;  // of a row
    static constexpr int kPasses = kLanes / 4;   // for 8 rows
    static_assert((kHeadDim == 64 || kHeadDim == 128) && kRows % 8 == 0 && kRows <= 32);

    uint8_t* const smem_rows;
    const int num_rows;
    const mk_rope& rope;
    const int num_pairs;
    const int table_row;  // of row threadIdx.x % 32; negative: it has none

    __device__ __forceinline__ RowRotation(uint8_t* smem_rows, int num_rows, const mk_rope& rope,
                                           int64_t token, int place)
        : smem_rows(smem_rows),
          num_rows(num_rows),
          rope(rope),
          num_pairs(rope.rotary_dim / 2),
          table_row(find_row(num_rows, rope, token, place)) {}

    static __device__ __forceinline__ int find_row(int num_rows, const mk_rope& rope, int64_t token,
                                                   int place) {
        const int lane = threadIdx.x % 32;
        int64_t position = place + lane;
        if (rope.positions && lane < num_rows) {
            position = load_index(rope.positions, rope.positions_dtype, token + lane);
        }
        const bool is_valid = 0 <= position && position < rope.max_position;
        return is_valid ? static_cast<int>(position) : -1;
    }

    static __device__ __forceinline__ uint32_t rotate(float a, float b, float c, float s) {
        return Dtype::pack(fmaf(a, c, -(b * s)), fmaf(b, c, a * s));
    }
    // A pair.
    static __device__ __forceinline__ uint32_t rotate(uint32_t pair, float c, float s) {
        const float2 x = Dtype::unpack(pair);
        return rotate(x.x, x.y, c, s);
    }
    // Two, of which a has the first halves.
    static __device__ __forceinline__ void rotate(uint32_t& a, uint32_t& b, float c0, float c1,
                                                  float s0, float s1) {
        const float2 x = Dtype::unpack(a), y = Dtype::unpack(b);
        a = Dtype::pack(fmaf(x.x, c0, -(y.x * s0)), fmaf(x.y, c1, -(y.y * s1)));
        b = Dtype::pack(fmaf(y.x, c0, x.x * s0), fmaf(y.y, c1, x.y * s1));
    }

    template <bool kIsInterleaved>
    __device__ __forceinline__ void by_fours() const {
        const int lane = threadIdx.x % 32, group = lane / kLanes;
        const int pair = lane % kLanes * 4;
        const bool has_pairs = pair < num_pairs;
        const int end = has_pairs ? num_rows : 0;
        // Half a warp's rows are in different banks.
        const int lane_row = kPasses == 4 ? group : group / 2 + group % 2 * 4;
        const int64_t lane_byte = has_pairs ? 4 * pair : 0, row_bytes = rope.table_stride * 4;
        const char* const lane_cos = reinterpret_cast<const char*>(rope.cos) + lane_byte;
        const char* const lane_sin = reinterpret_cast<const char*>(rope.sin) + lane_byte;
        const int byte_a = kIsInterleaved ? 4 * pair : 2 * pair;
        const int byte_b = kIsInterleaved ? byte_a + 8 : byte_a + 2 * num_pairs;
        const auto smem = static_cast<uint32_t>(__cvta_generic_to_shared(smem_rows));
        uint32_t smem_a[kPasses], smem_b[kPasses];
        MK_UNROLL
        for (int i = 0; i < kPasses; ++i) {
            smem_a[i] = ptx::mov_b32(smem + Layout::at(lane_row + 2 * i, byte_a));
            smem_b[i] = ptx::mov_b32(smem + Layout::at(lane_row + 2 * i, byte_b));
        }
        MK_NO_UNROLL
        for (int first = 0; first < num_rows; first += 8) {
            float4 cos[kPasses], sin[kPasses];
            MK_UNROLL
            for (int i = 0; i < kPasses; ++i) {
                const int row = __shfl_sync(0xFFFFFFFFu, table_row, first + lane_row + 2 * i);
                const float nan = __int_as_float(0x7FC00000);
                cos[i] = sin[i] = {nan, nan, nan, nan};
                if (row >= 0) {
                    cos[i] = *reinterpret_cast<const float4*>(lane_cos + row * row_bytes);
                    sin[i] = *reinterpret_cast<const float4*>(lane_sin + row * row_bytes);
                }
            }
            MK_UNROLL
            for (int i = 0; i < kPasses; ++i) {
                if (first + lane_row + 2 * i >= end) continue;
                const uint32_t at_a = smem_a[i] + first * Layout::kPitch;
                const uint32_t at_b = smem_b[i] + first * Layout::kPitch;
                uint2 a = ptx::ld_shared_v2(at_a), b = ptx::ld_shared_v2(at_b);
                if constexpr (kIsInterleaved) {
                    a = {rotate(a.x, cos[i].x, sin[i].x), rotate(a.y, cos[i].y, sin[i].y)};
                    b = {rotate(b.x, cos[i].z, sin[i].z), rotate(b.y, cos[i].w, sin[i].w)};
                } else {
                    rotate(a.x, b.x, cos[i].x, cos[i].y, sin[i].x, sin[i].y);
                    rotate(a.y, b.y, cos[i].z, cos[i].w, sin[i].z, sin[i].w);
                }
                ptx::st_shared_v2(at_a, a);
                ptx::st_shared_v2(at_b, b);
            }
        }
    }

    __device__ __forceinline__ void by_ones() const {
        MK_NO_UNROLL
        for (int r = 0; r < num_rows; ++r) {
            const int row = __shfl_sync(0xFFFFFFFFu, table_row, r);
            MK_NO_UNROLL
            for (int pair = threadIdx.x % 32; pair < num_pairs; pair += 32) {
                const int at_a = rope.interleaved ? 2 * pair : pair;
                const int at_b = rope.interleaved ? 2 * pair + 1 : pair + num_pairs;
                const auto element = [&](int at) {
                    return reinterpret_cast<uint16_t*>(smem_rows + Layout::at(r, 2 * at));
                };
                float c = __int_as_float(0x7FC00000), s = c;
                if (row >= 0) {
                    c = rope.cos[row * rope.table_stride + pair];
                    s = rope.sin[row * rope.table_stride + pair];
                }
                const float a = Dtype::unpack(*element(at_a)).x;
                const float b = Dtype::unpack(*element(at_b)).x;
                const uint32_t rotated = rotate(a, b, c, s);
                *element(at_a) = static_cast<uint16_t>(rotated);
                *element(at_b) = static_cast<uint16_t>(rotated >> 16);
            }
        }
    }

    __device__ __forceinline__ void run() const {
        const auto addresses =
            reinterpret_cast<uintptr_t>(rope.cos) | reinterpret_cast<uintptr_t>(rope.sin);
        if (((addresses | rope.table_stride * 4) & 15) || num_pairs % 4) {
            by_ones();
        } else if (rope.interleaved) {
            by_fours<true>();
        } else {
            by_fours<false>();
        }
    }
};

template <class Dtype, class Layout, int kHeadDim, int kRows>
__device__ __forceinline__ void rotate_rows(uint8_t* smem_rows, int num_rows, const mk_rope& rope,
                                            int64_t token, int place) {
    RowRotation<Dtype, Layout, kHeadDim, kRows>(smem_rows, num_rows, rope, token, place).run();
}

}  // namespace mk
