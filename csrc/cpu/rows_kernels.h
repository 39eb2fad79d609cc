// RMSNorm, SwiGLU's activation, and RoPE with the append to the cache, over Vec, which the
// including file has defined. Every value is loaded, computed in fp32 and rounded where the header
// of the C ABI says; the order of the one sum there is, that of the squares, is fixed: 16 sums in
// double, of every 16th element, halved four times.
#pragma once

#include "cpu/rows.h"
#include "cpu/tile.h"
#include "cpu/vec_math.h"

namespace mk::cpu {
namespace {

template <class T>
T* row(void* base, int64_t stride, int64_t index) {
    return static_cast<T*>(base) + stride * index;
}

// f(i, count) for the vectors of a row: elements i ... i + count-1.
template <class F>
MK_INLINE void each_vec(int64_t size, const F& f) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) f(i, Int<kLanes>{});
    if (i < size) f(i, static_cast<int>(size - i));
}

template <class T>
MK_INLINE Vec load(const T* p, Int<kLanes>) {
    return Vec::load(p);
}
template <class T>
MK_INLINE Vec load(const T* p, int count) {
    return Vec::load(p, count);
}

MK_INLINE int value(Int<kLanes>) { return kLanes; }
MK_INLINE int value(int count) { return count; }

// a, rounded to T.
template <class T>
MK_INLINE Vec rounded(Vec a) {
    alignas(64) T t[kLanes];
    a.store(t, kLanes);
    return Vec::load(t);
}
template <>
MK_INLINE Vec rounded<float>(Vec a) {
    return a;
}

// ---- RMSNorm ----

template <class T>
float inverse_rms(const T* x, int64_t size, float eps) {
    double sums[kLanes] = {};
    each_vec(size, [&](int64_t i, auto count) {
        alignas(64) float f[kLanes];
        load(x + i, count).store(f);
        for (int l = 0; l < kLanes; ++l) sums[l] += static_cast<double>(f[l]) * f[l];
    });
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) sums[l] += sums[l + half];
    }
    const double mean = sums[0] / static_cast<double>(size);
    return static_cast<float>(1.0 / __builtin_sqrt(mean + static_cast<double>(eps)));
}

template <class T>
void rms_norm_rows(const mk_rms_norm_params& p, int64_t begin, int64_t end) {
    const T* const weight = static_cast<const T*>(p.weight);
    for (int64_t r = begin; r < end; ++r) {
        const T* x = row<T>(p.x, p.x_stride, r);
        if (p.residual) {
            T* const sum = row<T>(p.residual, p.residual_stride, r);
            each_vec(p.hidden, [&](int64_t i, auto count) {
                (load(sum + i, count) + load(x + i, count)).store(sum + i, value(count));
            });
            x = sum;
        }
        const Vec scale = Vec::set(inverse_rms(x, p.hidden, p.eps));
        T* const out = row<T>(p.out, p.out_stride, r);
        each_vec(p.hidden, [&](int64_t i, auto count) {
            const Vec y = rounded<T>(load(x + i, count) * scale);
            (y * load(weight + i, count)).store(out + i, value(count));
        });
    }
}

// ---- SwiGLU's activation ----

template <class T>
void silu_and_mul_rows(const mk_silu_and_mul_params& p, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
        const T* const gate = row<T>(p.gate_up, p.gate_up_stride, r);
        const T* const up = gate + p.size;
        T* const out = row<T>(p.out, p.out_stride, r);
        each_vec(p.size, [&](int64_t i, auto count) {
            const Vec y = rounded<T>(silu(load(gate + i, count)));
            (y * load(up + i, count)).store(out + i, value(count));
        });
    }
}

// ---- RoPE ----

// Pair i of the input is features (2i, 2i + 1) if kPairsIn, else (i, i + half); kPairsOut likewise.
template <bool kPairsIn, bool kPairsOut, class T>
void rotate(const T* x, const float* cos, const float* sin, int half, float* out) {
    each_vec(half, [&](int64_t i, auto count) {
        alignas(64) float a[kLanes], b[kLanes];
        if constexpr (kPairsIn) {
            alignas(64) float pairs[2 * kLanes];
            const int left = 2 * value(count) - kLanes;  // in the second vector
            (left >= 0 ? Vec::load(x + 2 * i) : Vec::load(x + 2 * i, 2 * value(count)))
                .store(pairs);
            (left > 0 ? Vec::load(x + 2 * i + kLanes, left) : Vec::set(0.f)).store(pairs + kLanes);
            for (int l = 0; l < kLanes; ++l) a[l] = pairs[2 * l], b[l] = pairs[2 * l + 1];
        } else {
            load(x + i, count).store(a);
            load(x + half + i, count).store(b);
        }
        const Vec c = load(cos + i, count), s = load(sin + i, count);
        const Vec va = Vec::load(a), vb = Vec::load(b);
        Vec::fma(va, c, Vec::set(0.f) - vb * s).store(a);
        Vec::fma(va, s, vb * c).store(b);
        if constexpr (kPairsOut) {
            for (int l = 0; l < value(count); ++l) {
                out[2 * (i + l)] = a[l];
                out[2 * (i + l) + 1] = b[l];
            }
        } else {
            for (int l = 0; l < value(count); ++l) {
                out[i + l] = a[l];
                out[half + i + l] = b[l];
            }
        }
    });
}

// One head; out may be x.
template <class T>
void rotate_head(const T* x, T* out, const mk_cpu_rope_append_params& p, const float* cos,
                 const float* sin) {
    alignas(64) float turned[kMaxCpuHeadDim];
    const int rotated = p.rope.rotary_dim, half = rotated / 2;
    if (p.rope.interleaved) {
        rotate<true, true>(x, cos, sin, half, turned);
    } else if (p.pair_order) {
        rotate<true, false>(x, cos, sin, half, turned);
    } else {
        rotate<false, false>(x, cos, sin, half, turned);
    }
    each_vec(rotated,
             [&](int64_t i, auto count) { load(turned + i, count).store(out + i, value(count)); });
    if (out != x) {
        for (int i = rotated; i < p.head_dim; ++i) out[i] = x[i];
    }
}

inline int64_t index_of(const void* indices, int32_t dtype, int64_t i) {
    return dtype == MK_I64 ? static_cast<const int64_t*>(indices)[i]
                           : static_cast<const int32_t*>(indices)[i];
}

template <class T>
void rope_append_tokens(const mk_cpu_rope_append_params& p, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
        const int64_t position = index_of(p.rope.positions, p.rope.positions_dtype, t);
        const float* const cos = p.rope.cos + p.rope.table_stride * position;
        const float* const sin = p.rope.sin + p.rope.table_stride * position;
        for (int h = 0; h < p.num_q_heads; ++h) {
            rotate_head(row<T>(p.q, p.q_stride, t) + p.q_head_stride * h,
                        row<T>(p.q_out, p.q_out_stride, t) + p.q_out_head_stride * h, p, cos, sin);
        }
        const int64_t slot = p.num_kv_heads ? index_of(p.slots, p.slots_dtype, t) : -1;
        if (slot < 0) continue;
        const int64_t at =
            slot / p.page_size * p.cache_page_stride + slot % p.page_size * p.cache_stride;
        for (int h = 0; h < p.num_kv_heads; ++h) {
            T* const k_out = static_cast<T*>(p.k_cache) + at + p.cache_head_stride * h;
            T* const v_out = static_cast<T*>(p.v_cache) + at + p.cache_head_stride * h;
            rotate_head(row<T>(p.k, p.k_stride, t) + p.k_head_stride * h, k_out, p, cos, sin);
            const T* const v = row<T>(p.v, p.v_stride, t) + p.v_head_stride * h;
            __builtin_memcpy(v_out, v, static_cast<size_t>(p.head_dim) * sizeof(T));
        }
    }
}

constexpr RowKernels kKernels = {
    [](const mk_rms_norm_params& p, int64_t begin, int64_t end) {
        with_dtype(p.dtype, [&](auto t) { rms_norm_rows<decltype(t)>(p, begin, end); });
    },
    [](const mk_silu_and_mul_params& p, int64_t begin, int64_t end) {
        with_dtype(p.dtype, [&](auto t) { silu_and_mul_rows<decltype(t)>(p, begin, end); });
    },
    [](const mk_cpu_rope_append_params& p, int64_t begin, int64_t end) {
        with_dtype(p.dtype, [&](auto t) { rope_append_tokens<decltype(t)>(p, begin, end); });
    },
};

}  // namespace
}  // namespace mk::cpu
