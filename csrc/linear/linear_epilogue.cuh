// What the linear kernels do with the sums of y = x w^T.
//
//   plain            out[r, c] = y[r, c] (+ residual[r, c])             dtype, or fp32
//   swiglu           out[r, c/2] = silu(y[r, c]) * y[r, c + 1]          c even
//   qkv_rope_append  (y[r, c], y[r, c + 1]) rotated by the angle of row r and pair c/2 of the head,
//                    into q, k_cache or v_cache
//
// A thread of mma.m16n8k16 holds columns c and c + 1 (c even) of a row: gate and up, or a
// rotation's pair. So no epilogue needs another thread's sums. An epilogue has
//   Params                     the op's struct
//   row(r), column(c)          what is looked up once per row, r < m, and per column, c even
//   prefetch(row, c)           may be called before the sums are there, for what store reads
//   store(row, column, y0, y1) writes the outputs of columns c and c + 1, rounded; as one access
//                              where they are aligned; columns from n on are skipped
//   store_quad(row, c, y)      if it has it, and in_quads: columns c ... c + 3, a multiple of 4
//   kJoinsPairs                a pair of columns has one output: gate and up
#pragma once

#include "common/vec.cuh"
#include "linear/linear_tiles.h"
#include "silu_and_mul/silu.cuh"

namespace mk {

__device__ __forceinline__ bool is_multiple(const void* pointer, int64_t stride_bytes, int bytes) {
    return ((reinterpret_cast<uintptr_t>(pointer) | stride_bytes) & (bytes - 1)) == 0;
}

// One 4-byte store, or two of 2 bytes.
__device__ __forceinline__ void store_pair(uint16_t* to, uint32_t pair, bool is_one_access) {
    if (is_one_access) {
        *reinterpret_cast<uint32_t*>(to) = pair;
    } else {
        to[0] = static_cast<uint16_t>(pair);
        to[1] = static_cast<uint16_t>(pair >> 16);
    }
}

template <class Dtype>
struct PlainEpilogue {
    using Params = mk_linear_params;

    struct Row {
        void* out;
        const uint16_t* residual;
    };

    static constexpr bool kJoinsPairs = false;
    const Params& p;
    bool is_f32;
    bool in_pairs;  // a pair of outputs is one access, and so is one of the residual
    bool in_quads;  // so are 4

    __device__ __forceinline__ explicit PlainEpilogue(const Params& params)
        : p(params), is_f32(params.out_dtype == MK_F32) {
        const int bytes = is_f32 ? 4 : 2;
        in_pairs = is_multiple(p.out, p.out_stride * bytes, 2 * bytes) &&
                   is_multiple(p.residual, p.residual_stride * 2, 4);
        in_quads = p.n % 4 == 0 && is_multiple(p.out, p.out_stride * bytes, 4 * bytes) &&
                   is_multiple(p.residual, p.residual_stride * 2, 8);
    }

    __device__ __forceinline__ Row row(int r) const {
        return {static_cast<char*>(p.out) + r * p.out_stride * (is_f32 ? 4 : 2),
                p.residual ? static_cast<const uint16_t*>(p.residual) + r * p.residual_stride
                           : nullptr};
    }

    __device__ __forceinline__ int column(int c) const { return c; }

    __device__ __forceinline__ void prefetch(const Row& row, int c) const {
        if (p.residual && c < p.n) ptx::prefetch_global_l2(row.residual + c);
    }

    __device__ __forceinline__ void store(const Row& row, int c, float y0, float y1) const {
        if (in_pairs && c + 1 < p.n) {
            if (is_f32) {
                *reinterpret_cast<float2*>(static_cast<float*>(row.out) + c) = {y0, y1};
                return;
            }
            if (p.residual) {
                const auto* const pair = reinterpret_cast<const uint32_t*>(row.residual + c);
                const float2 f = Dtype::unpack(*pair);
                y0 += f.x;
                y1 += f.y;
            }
            *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(row.out) + c) = Dtype::pack(y0, y1);
            return;
        }
        store_one(row, c, y0);
        store_one(row, c + 1, y1);
    }

    __device__ __forceinline__ void store_quad(const Row& row, int c, float4 y) const {
        if (c >= p.n) return;
        if (is_f32) {
            *reinterpret_cast<float4*>(static_cast<float*>(row.out) + c) = y;
            return;
        }
        if (p.residual) {
            const uint2 pairs = *reinterpret_cast<const uint2*>(row.residual + c);
            const float2 first = Dtype::unpack(pairs.x), second = Dtype::unpack(pairs.y);
            y = {y.x + first.x, y.y + first.y, y.z + second.x, y.w + second.y};
        }
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(row.out) + c) = {Dtype::pack(y.x, y.y),
                                                                          Dtype::pack(y.z, y.w)};
    }

    __device__ __forceinline__ void store_one(const Row& row, int c, float y) const {
        if (c >= p.n) return;
        if (is_f32) {
            static_cast<float*>(row.out)[c] = y;
        } else {
            if (p.residual) y += Dtype::unpack(row.residual[c]).x;
            static_cast<uint16_t*>(row.out)[c] = static_cast<uint16_t>(Dtype::pack(y, 0.f));
        }
    }
};

template <class Dtype>
struct SwigluEpilogue {
    using Params = mk_linear_params;

    struct Row {
        uint16_t* out;
    };

    static constexpr bool kJoinsPairs = true;
    const Params& p;

    __device__ __forceinline__ explicit SwigluEpilogue(const Params& params) : p(params) {}

    __device__ __forceinline__ float output(float gate, float up) const { return silu(gate) * up; }

    __device__ __forceinline__ Row row(int r) const {
        return {static_cast<uint16_t*>(p.out) + r * p.out_stride};
    }

    __device__ __forceinline__ int column(int c) const { return c; }

    __device__ __forceinline__ void prefetch(const Row&, int) const {}

    __device__ __forceinline__ void store(const Row& row, int c, float gate, float up) const {
        if (c < p.n) row.out[c / 2] = static_cast<uint16_t>(Dtype::pack(output(gate, up), 0.f));
    }
};

template <class Dtype>
struct QkvEpilogue {
    using Params = mk_qkv_rope_append_params;

    struct Row {
        uint16_t* q = nullptr;
        int64_t cache = -1;          // elements from the caches' start; negative: not written
        const float* cos = nullptr;  // null: the position is out of range, and the results NaN
        const float* sin = nullptr;
    };

    static constexpr bool kJoinsPairs = false;
    const Params& p;
    int num_q, num_qk, n;  // columns of Q, of Q and K, of all
    int gap;               // from the first to the second feature of a pair
    bool in_pairs;         // adjacent features are one access

    __device__ __forceinline__ explicit QkvEpilogue(const Params& params)
        : p(params),
          num_q(params.num_q_heads * params.head_dim),
          num_qk(num_q + params.num_kv_heads * params.head_dim),
          n(num_qk + params.num_kv_heads * params.head_dim),
          gap(params.rope.interleaved ? 1 : params.rope.rotary_dim / 2),
          in_pairs(are_multiples(4)) {}

    __device__ __forceinline__ Row row(int r) const {
        const int64_t slot = load_index(p.slots, p.slots_dtype, r);
        const int64_t position = load_index(p.rope.positions, p.rope.positions_dtype, r);
        Row row{static_cast<uint16_t*>(p.q) + r * p.q_stride, -1, nullptr, nullptr};
        if (0 <= slot && slot < static_cast<int64_t>(p.num_pages) * p.page_size) {
            const int64_t page = slot / p.page_size;
            row.cache = page * p.cache_page_stride + (slot - page * p.page_size) * p.cache_stride;
        }
        if (0 <= position && position < p.rope.max_position) {
            row.cos = p.rope.cos + position * p.rope.table_stride;
            row.sin = p.rope.sin + position * p.rope.table_stride;
        }
        return row;
    }

    // The angles are in L2: all blocks read them.
    __device__ __forceinline__ void prefetch(const Row&, int) const {}

    // Where the outputs of columns c and c + 1 go, from the row's start in q or in a cache.
    struct Column {
        uint16_t* cache;
        int64_t offset;
        int pair;  // of the rotation; negative: the features pass
        bool is_q, is_inside;
    };
    __device__ __forceinline__ Column column(int c) const {
        const int first = c < num_q ? 0 : c < num_qk ? num_q : num_qk;
        const int h = (c - first) / p.head_dim;
        const int d = (c - first) - h * p.head_dim;
        const bool is_q = c < num_q;
        const bool is_rotated = c < num_qk && d < p.rope.rotary_dim;
        return {static_cast<uint16_t*>(c < num_qk ? p.k_cache : p.v_cache),
                h * (is_q ? p.q_head_stride : p.cache_head_stride) +
                    (is_rotated && gap != 1 ? d / 2 : d),
                is_rotated ? d / 2 : -1, is_q, c < n};
    }

    __device__ __forceinline__ float2 cos_sin(const Row& row, int64_t pair) const {
        if (row.cos) return {row.cos[pair], row.sin[pair]};
        const float nan = __int_as_float(0x7FC00000);
        return {nan, nan};
    }
    static __device__ __forceinline__ float2 rotated(float2 angle, float a, float b) {
        return {fmaf(a, angle.x, -(b * angle.y)), fmaf(b, angle.x, a * angle.y)};
    }

    __device__ __forceinline__ void store(const Row& row, const Column& c, float y0,
                                          float y1) const {
        if (!c.is_inside || (!c.is_q && row.cache < 0)) return;
        uint16_t* const to = (c.is_q ? row.q : c.cache + row.cache) + c.offset;
        const float2 y = c.pair < 0 ? float2{y0, y1} : rotated(cos_sin(row, c.pair), y0, y1);
        const uint32_t pair = Dtype::pack(y.x, y.y);
        if (c.pair < 0 || gap == 1) {
            store_pair(to, pair, in_pairs);
        } else {
            to[0] = static_cast<uint16_t>(pair);
            to[gap] = static_cast<uint16_t>(pair >> 16);
        }
    }

    // The places of heads in all outputs.
    __device__ __forceinline__ bool are_multiples(int bytes) const {
        const int64_t cache = p.cache_page_stride | p.cache_stride | p.cache_head_stride;
        return is_multiple(p.q, (p.q_stride | p.q_head_stride) * 2, bytes) &&
               is_multiple(p.k_cache, cache * 2, bytes) && is_multiple(p.v_cache, cache * 2, bytes);
    }
};

// body(epilogue) of the product at hand, in kernels that serve all of them;
template <class Dtype, class Body>
__device__ __forceinline__ void with_epilogue(const Outputs& to, const Body& body) {
    switch (to.kind) {
        case EpilogueKind::kPlain:
            body(PlainEpilogue<Dtype>(to.linear));
            break;
        case EpilogueKind::kSwiglu:
            body(SwigluEpilogue<Dtype>(to.linear));
            break;
        case EpilogueKind::kQkv:
            body(QkvEpilogue<Dtype>(to.qkv));
            break;
    }
}
// of the dtype at hand, too.
template <class Body>
__device__ __forceinline__ void with_epilogue(const Outputs& to, const Body& body) {
    to.dtype == MK_BF16 ? with_epilogue<Bf16>(to, body) : with_epilogue<F16>(to, body);
}

}  // namespace mk
