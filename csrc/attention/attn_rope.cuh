// Rotation of query rows that lie in shared memory.
#pragma once

#include "attention/attn_smem.cuh"
#include "common/vec.cuh"

namespace mk {

// One warp rotates `kRows` (at most 32) rows of a tile in place, as apply_rope does: in fp32,
// rounded once. Layout: of attn_smem.cuh. Row r is of token `token + r`, whose place in its
// sequence is `place + r`; rows from num_rows on are left alone. Lane l takes pairs l, l + 32, ...
template <class Dtype, class Layout, int kHeadDim, int kRows>
__device__ __forceinline__ void rotate_rows(uint8_t* smem_rows, int num_rows, const mk_rope& rope,
                                            int64_t token, int place) {
    constexpr int kBatch = 8;  // rows whose angles are under way together
    constexpr int kSteps = kHeadDim / 2 / 32;
    const float nan = __int_as_float(0x7FC00000);
    const int lane = threadIdx.x % 32;
    const int num_pairs = rope.rotary_dim / 2;
    int64_t position = place + lane;
    if (rope.positions && lane < num_rows) {
        position = load_index(rope.positions, rope.positions_dtype, token + lane);
    }
    const bool is_valid = 0 <= position && position < rope.max_position;
    const int table_row = is_valid ? static_cast<int>(position) : -1;

    MK_NO_UNROLL
    for (int first = 0; first < kRows; first += kBatch) {
        float cos[kBatch][kSteps], sin[kBatch][kSteps];
        MK_UNROLL
        for (int i = 0; i < kBatch * kSteps; ++i) {
            const int r = i / kSteps, pair = lane + i % kSteps * 32;
            const int row = __shfl_sync(0xFFFFFFFFu, table_row, first + r);
            float& c = cos[r][i % kSteps];
            float& s = sin[r][i % kSteps];
            c = s = nan;
            if (row >= 0 && first + r < num_rows && pair < num_pairs) {
                c = rope.cos[row * rope.table_stride + pair];
                s = rope.sin[row * rope.table_stride + pair];
            }
        }
        MK_UNROLL
        for (int i = 0; i < kBatch * kSteps; ++i) {
            const int r = i / kSteps, pair = lane + i % kSteps * 32;
            if (first + r >= num_rows || pair >= num_pairs) continue;
            const int at_a = rope.interleaved ? 2 * pair : pair;
            const int at_b = rope.interleaved ? 2 * pair + 1 : pair + num_pairs;
            const auto element = [&](int at) {
                return reinterpret_cast<uint16_t*>(smem_rows + Layout::at(first + r, 2 * at));
            };
            const float a = Dtype::unpack(*element(at_a)).x;
            const float b = Dtype::unpack(*element(at_b)).x;
            const float c = cos[r][i % kSteps], s = sin[r][i % kSteps];
            const uint32_t rotated = Dtype::pack(fmaf(a, c, -(b * s)), fmaf(b, c, a * s));
            *element(at_a) = static_cast<uint16_t>(rotated);
            *element(at_b) = static_cast<uint16_t>(rotated >> 16);
        }
    }
}

}  // namespace mk
