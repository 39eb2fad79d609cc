// Rotation of 8 features of a head, for kernels that rotate q and new keys on their way.
#pragma once

#include "common/vec.cuh"

namespace mk {

// cos or sin of the pairs of 8 features: 8 pairs when halves are paired, 4 when neighbours are.
template <int kPairs>
__device__ __forceinline__ void load_angles(const float* row, float (&to)[8]) {
    MK_UNROLL
    for (int i = 0; i < kPairs; i += 4) {
        const float4 f = *reinterpret_cast<const float4*>(row + i);
        to[i] = f.x, to[i + 1] = f.y, to[i + 2] = f.z, to[i + 3] = f.w;
    }
    if constexpr (kPairs == 4) {
        MK_UNROLL
        for (int i = 7; i >= 0; --i) to[i] = to[i / 2];
    }
}

// Features first ... first + 7 of `head`, rotated for `position` with the bits of apply_rope:
// a cos - b sin for the first of a pair, b cos + a sin for the second. `is_vector`: rotary_dim is a
// multiple of 16 and the rows of the tables are 16-byte aligned.
template <class Dtype>
__device__ __forceinline__ Vec8 load_rotated8(const mk_rope& rope, bool is_vector, const void* head,
                                              int first, int64_t position) {
    Vec8 x = load8<true>(head, first, 0);
    if (!rope.cos || first >= rope.rotary_dim) return x;
    const int half = rope.rotary_dim / 2;
    const bool is_valid = 0 <= position && position < rope.max_position;
    const int64_t row = is_valid ? position * rope.table_stride : 0;
    float partner[8], cos[8], sin[8];
    if (is_vector && rope.interleaved) {
        load_angles<4>(rope.cos + row + first / 2, cos);
        load_angles<4>(rope.sin + row + first / 2, sin);
        MK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float2 f = Dtype::unpack(x.pair[i]);
            partner[2 * i] = f.y, partner[2 * i + 1] = f.x;
        }
    } else if (is_vector) {
        const bool is_first = first < half;
        load_angles<8>(rope.cos + row + (is_first ? first : first - half), cos);
        load_angles<8>(rope.sin + row + (is_first ? first : first - half), sin);
        const Vec8 y = load8<true>(head, is_first ? first + half : first - half, 0);
        MK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const float2 f = Dtype::unpack(y.pair[i]);
            partner[2 * i] = f.x, partner[2 * i + 1] = f.y;
        }
    } else {
        MK_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int f = min(first + i, rope.rotary_dim - 1);  // past it nothing is rotated
            const bool is_first = rope.interleaved ? f % 2 == 0 : f < half;
            const int step = rope.interleaved ? 1 : half;
            const int other = is_first ? f + step : f - step;
            const int pair = rope.interleaved ? f / 2 : min(f, other);
            partner[i] = Dtype::unpack(static_cast<const uint16_t*>(head)[other]).x;
            cos[i] = rope.cos[row + pair];
            sin[i] = rope.sin[row + pair];
        }
    }
    MK_UNROLL
    for (int i = 0; i < 4; ++i) {
        const float2 f = Dtype::unpack(x.pair[i]);
        float y[2] = {f.x, f.y};
        MK_UNROLL
        for (int j = 0; j < 2; ++j) {
            const int feature = first + 2 * i + j;
            if (feature >= rope.rotary_dim) continue;
            const bool is_first = rope.interleaved ? j == 0 : feature < half;
            const float cross = partner[2 * i + j] * sin[2 * i + j];
            y[j] = fmaf(y[j], cos[2 * i + j], is_first ? -cross : cross);
            if (!is_valid) y[j] = __int_as_float(0x7FC00000);  // NaN
        }
        x.pair[i] = Dtype::pack(y[0], y[1]);
    }
    return x;
}

}  // namespace mk
