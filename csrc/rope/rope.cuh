// apply_rope: rotate q and k.  rope_append: rotate k into the paged cache, copy v into it.
// Both move each element once, 16 bytes at a time (rope_tiles.h has the picture).
#pragma once

#include "common/vec.cuh"
#include "ptx/sm90.cuh"
#include "rope/rope_tiles.h"

namespace mk {

struct SinCos {
    float sin, cos;
};

// Sine and cosine of an angle below 2^24, to 2e-7. The angle becomes turns in two floats (product
// and its rounding error, with 48 bits of 1/2pi), whose fraction is exact whatever the number of
// whole turns; quarter turns are taken off and the rest, at most pi/4, goes into the polynomials
// of Cephes' sinf and cosf (Moshier 1992).
__device__ __forceinline__ SinCos sin_cos(float angle) {
    constexpr float kInvTwoPiHi = 0x1.45f306p-3f;
    constexpr float kInvTwoPiLo = 0x1.b93910p-28f;
    constexpr float kTwoPi = 6.283185307179586f;
    const float turns = angle * kInvTwoPiHi;
    const float turns_lo = fmaf(angle, kInvTwoPiLo, fmaf(angle, kInvTwoPiHi, -turns));
    const float fraction = turns - rintf(turns);  // exact; turns_lo is up to 0.25 beside it
    const float quarters = rintf(4.f * (fraction + turns_lo));
    const float r = kTwoPi * (fmaf(-0.25f, quarters, fraction) + turns_lo);
    const float r2 = r * r;
    const float s =
        fmaf(r * r2, fmaf(r2, fmaf(r2, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), r);
    const float c = fmaf(
        r2 * r2,
        fmaf(r2, fmaf(r2, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f),
        fmaf(-0.5f, r2, 1.f));
    const int quadrant = static_cast<int>(quarters) & 3;
    const float sine = quadrant & 1 ? c : s;
    const float cosine = quadrant & 1 ? s : c;
    return {quadrant & 2 ? -sine : sine, (quadrant + 1) & 2 ? -cosine : cosine};
}

// The chunk of this thread: where its two vectors are, and the angles of its pairs.
template <class Dtype, bool kAligned>
struct RopeChunk {
    int first[2];  // elements of a head
    int end[2];
    bool is_rotated;
    bool interleaved;
    float cos[kVec], sin[kVec];

    template <class Params>
    __device__ __forceinline__ RopeChunk(const RopeArgs<Params>& args, int64_t token) {
        const mk_rope& rope = args.p.rope;
        const int num_pairs = rope.rotary_dim / 2;
        const int num_rotated = (num_pairs + kVec - 1) / kVec;
        const int chunk = threadIdx.x;
        is_rotated = chunk < num_rotated;
        interleaved = rope.interleaved;
        const bool is_split = is_rotated && !interleaved;
        const int begin =
            is_rotated ? chunk * 2 * kVec : rope.rotary_dim + (chunk - num_rotated) * 2 * kVec;
        const int limit = is_rotated ? rope.rotary_dim : args.p.head_dim;
        first[0] = is_split ? chunk * kVec : begin;
        first[1] = is_split ? num_pairs + chunk * kVec : begin + kVec;
        end[0] = is_split ? num_pairs : limit;
        end[1] = limit;
        if (is_rotated) set_angles(args, load_index(rope.positions, rope.positions_dtype, token));
    }

    template <class Params>
    __device__ __forceinline__ void set_angles(const RopeArgs<Params>& args, int64_t position) {
        const mk_rope& rope = args.p.rope;
        const int pair = threadIdx.x * kVec;
        const int num_pairs = rope.rotary_dim / 2;
        const bool is_valid = 0 <= position && position < rope.max_position;
        MK_UNROLL
        for (int i = 0; i < kVec; ++i) cos[i] = sin[i] = __int_as_float(0x7FC00000);  // NaN
        if (!is_valid) return;
        if (!rope.cos) {
            MK_UNROLL
            for (int i = 0; i < kVec; ++i) {
                if (!kAligned && pair + i >= num_pairs) break;
                const SinCos value =
                    sin_cos(static_cast<float>(position) * args.inv_freq[pair + i]);
                cos[i] = value.cos;
                sin[i] = value.sin;
            }
            return;
        }
        const float* const cos_row = rope.cos + position * rope.table_stride + pair;
        const float* const sin_row = rope.sin + position * rope.table_stride + pair;
        if constexpr (kAligned) {
            MK_UNROLL
            for (int i = 0; i < kVec; i += 4) {
                const float4 c = *reinterpret_cast<const float4*>(cos_row + i);
                const float4 s = *reinterpret_cast<const float4*>(sin_row + i);
                cos[i] = c.x, cos[i + 1] = c.y, cos[i + 2] = c.z, cos[i + 3] = c.w;
                sin[i] = s.x, sin[i + 1] = s.y, sin[i + 2] = s.z, sin[i + 3] = s.w;
            }
        } else {
            MK_UNROLL
            for (int i = 0; i < kVec; ++i) {
                if (pair + i < num_pairs) cos[i] = cos_row[i], sin[i] = sin_row[i];
            }
        }
    }

    __device__ __forceinline__ void load(const void* head, Vec8 (&v)[2]) const {
        MK_UNROLL
        for (int j = 0; j < 2; ++j) v[j] = load8<kAligned>(head, first[j], end[j]);
    }

    __device__ __forceinline__ void store(void* head, const Vec8 (&v)[2]) const {
        MK_UNROLL
        for (int j = 0; j < 2; ++j) store8<kAligned>(head, first[j], end[j], v[j]);
    }

    // (a, b) -> (a cos - b sin, b cos + a sin) for each pair, in fp32.
    __device__ __forceinline__ void rotate(Vec8 (&v)[2]) const {
        MK_UNROLL
        for (int i = 0; i < kVec / 2; ++i) {
            if (interleaved) {  // a pair of elements is a pair of the rotation
                MK_UNROLL
                for (int j = 0; j < 2; ++j) {
                    const int k = j * kVec / 2 + i;
                    const float2 f = Dtype::unpack(v[j].pair[i]);
                    v[j].pair[i] = Dtype::pack(fmaf(f.x, cos[k], -(f.y * sin[k])),
                                               fmaf(f.y, cos[k], f.x * sin[k]));
                }
            } else {
                const float2 a = Dtype::unpack(v[0].pair[i]);
                const float2 b = Dtype::unpack(v[1].pair[i]);
                const int k = 2 * i;
                v[0].pair[i] = Dtype::pack(fmaf(a.x, cos[k], -(b.x * sin[k])),
                                           fmaf(a.y, cos[k + 1], -(b.y * sin[k + 1])));
                v[1].pair[i] = Dtype::pack(fmaf(b.x, cos[k], a.x * sin[k]),
                                           fmaf(b.y, cos[k + 1], a.y * sin[k + 1]));
            }
        }
    }
};

// Where a head is read and written, and whether it is rotated on the way.
struct RopeHead {
    const void* from;
    void* to;
    bool is_rotated;
};

// Every head of a token through this thread's chunk; head(h) gives number h of num_heads.
template <class Chunk, class Head>
__device__ __forceinline__ void rope_heads(const Chunk& chunk, int num_heads, const Head& head) {
    const int step = blockDim.y * gridDim.y;
    MK_NO_UNROLL
    for (int h0 = blockIdx.y * blockDim.y + threadIdx.y; h0 < num_heads; h0 += kRopeHeads * step) {
        Vec8 v[kRopeHeads][2];
        MK_UNROLL
        for (int i = 0; i < kRopeHeads; ++i) {
            if (h0 + i * step < num_heads) chunk.load(head(h0 + i * step).from, v[i]);
        }
        MK_UNROLL
        for (int i = 0; i < kRopeHeads; ++i) {
            if (h0 + i * step >= num_heads) break;
            const RopeHead to = head(h0 + i * step);
            if (chunk.is_rotated && to.is_rotated) chunk.rotate(v[i]);
            chunk.store(to.to, v[i]);
        }
    }
}

template <class Dtype, bool kAligned>
__device__ __forceinline__ void apply_rope(const RopeArgs<mk_apply_rope_params>& args) {
    const mk_apply_rope_params& p = args.p;
    const int64_t token = blockIdx.x;
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    const RopeChunk<Dtype, kAligned> chunk(args, token);
    rope_heads(chunk, p.num_q_heads + p.num_k_heads, [&](int h) -> RopeHead {
        const bool is_q = h < p.num_q_heads;
        const int i = is_q ? h : h - p.num_q_heads;
        if (is_q) {
            return {row_of(row_of(p.q, token, p.q_stride), i, p.q_head_stride),
                    row_of(row_of(p.q_out, token, p.q_out_stride), i, p.q_out_head_stride), true};
        }
        return {row_of(row_of(p.k, token, p.k_stride), i, p.k_head_stride),
                row_of(row_of(p.k_out, token, p.k_out_stride), i, p.k_out_head_stride), true};
    });
}

template <class Dtype, bool kAligned>
__device__ __forceinline__ void rope_append(const RopeArgs<mk_rope_append_params>& args) {
    const mk_rope_append_params& p = args.p;
    const int64_t token = blockIdx.x;
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    const int64_t slot = load_index(p.slots, p.slots_dtype, token);
    if (slot < 0 || slot >= static_cast<int64_t>(p.num_pages) * p.page_size) return;
    const int64_t page = slot / p.page_size;
    const int64_t row = page * p.cache_page_stride + (slot - page * p.page_size) * p.cache_stride;
    const RopeChunk<Dtype, kAligned> chunk(args, token);
    rope_heads(chunk, 2 * p.num_heads, [&](int h) -> RopeHead {
        if (h < p.num_heads) {
            return {row_of(row_of(p.k, token, p.k_stride), h, p.k_head_stride),
                    row_of(row_of(p.k_cache, 1, row), h, p.cache_head_stride), true};
        }
        h -= p.num_heads;
        return {row_of(row_of(p.v, token, p.v_stride), h, p.v_head_stride),
                row_of(row_of(p.v_cache, 1, row), h, p.cache_head_stride), false};
    });
}

}  // namespace mk
