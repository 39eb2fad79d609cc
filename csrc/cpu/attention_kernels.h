// Attention of a tile of queries with the keys of one KV head, over Vec, which the including file
// has defined. For each block of 128 keys:
//
//        8 keys                     128 keys                    64 features
//     +--------+                +---------------+              +-----------+
//   3 | logits |  ... x 16 -> 1 | weights, sum  |  ... -> 6    | sum w * v |  joined with the
//     +--------+                +---------------+      rows    +-----------+  blocks before
//   q in panels of 3 rows       relative to the row's          in registers, keys ascending
//   from L1, k rows by          own maximum in this
//   pointer, reduced as in      block
//   mk_cpu_linear
//
// (rows, keys and features of a register tile as with AVX-512). Rows of k and v are read where they
// lie, through pointers that know of pages; for more than kDirectRows rows of q, 16-bit ones are
// converted to fp32 panels first. Neither changes a bit, nor does a tile's size: what a row gets
// from a block depends on its own q and the keys it sees. A logit that it does not see is never
// exponentiated into its sum, a value never multiplied.
#pragma once

#include "cpu/attention.h"
#include "cpu/tile.h"
#include "cpu/vec_math.h"

namespace mk::cpu {
namespace {

constexpr bool kHas32Registers = kTileN == 8;
constexpr int kSumM = kHas32Registers ? 6 : 2;  // rows,
constexpr int kSumN = kHas32Registers ? 4 : 2;  // and vectors of v in a register tile
constexpr int kDirectRows = 6;

struct Range {
    int begin, end;

    bool empty() const { return begin >= end; }
};

int least(int a, int b) { return a < b ? a : b; }
int most(int a, int b) { return a > b ? a : b; }

struct Scratch {
    float* q;       // [rows, padded] in panels of kTileM rows
    float* logits;  // [rows, kLogitStride]; then the weights
    float* sum;     // [rows, padded], of the blocks so far
    float* max;     // [rows], as the following
    float* total;
    float* keep;  // factors of what was joined so far,
    float* take;  // and of this block
    float* k;     // [kKeyBlock, padded], converted
    float* v;
    Range* seen;  // [rows]: keys of the block
};

int64_t scratch_floats(const mk_attention_params& p, int64_t rows) {
    return rows * (2 * padded(p.head_dim) + kLogitStride + 4 + 2) +
           2 * kKeyBlock * padded(p.head_dim) + 10 * kLanes;
}

Scratch lay_out(const mk_attention_params& p, int64_t rows, float* memory) {
    const auto take = [&](int64_t floats) {
        float* const start = memory;
        memory += (floats + kLanes - 1) / kLanes * kLanes;
        return start;
    };
    const int64_t width = padded(p.head_dim);
    Scratch s;
    s.q = take(rows * width);
    s.logits = take(rows * kLogitStride);
    s.sum = take(rows * width);
    s.max = take(rows);
    s.total = take(rows);
    s.keep = take(rows);
    s.take = take(rows);
    s.k = take(kKeyBlock * width);
    s.v = take(kKeyBlock * width);
    s.seen = reinterpret_cast<Range*>(take(2 * rows));
    return s;
}

// ---- which keys, and where ----

// The keys of the sequence that a query sees.
Range keys_of(const mk_attention_params& p, const AttentionTile& tile, int query) {
    const int64_t place = int64_t{tile.keys} - tile.queries + query;
    int64_t begin = 0, end = tile.keys;
    if (p.causal && end > place + 1) end = place + 1;
    if (p.window) {
        if (begin < place - p.window + 1) begin = place - p.window + 1;
        if (end > place + p.window) end = place + p.window;
    }
    if (end < begin) end = begin;
    return {static_cast<int>(begin), static_cast<int>(end)};
}

// rows[j] = row first + j of k or v, for begin <= j < end.
template <class T>
void find_rows(const mk_attention_params& p, const AttentionTile& tile, const void* base,
               int64_t page_stride, int64_t stride, int64_t head_stride, int first, Range range,
               const T** rows) {
    const T* const start = static_cast<const T*>(base) + head_stride * tile.kv_head;
    if (p.page_size == 0) {
        const T* const packed = start + stride * (p.cu_seqlens_k[tile.sequence] + first);
        for (int j = range.begin; j < range.end; ++j) rows[j] = packed + stride * j;
        return;
    }
    const int32_t* const table = p.block_table + p.block_table_stride * tile.sequence;
    int page = (first + range.begin) / p.page_size, at = (first + range.begin) % p.page_size;
    for (int j = range.begin; j < range.end; ++page, at = 0) {
        const T* const in_page = start + page_stride * table[page];
        for (; j < range.end && at < p.page_size; ++j, ++at) rows[j] = in_page + stride * at;
    }
}

// ---- the three steps of a block ----

// Logits, not yet scaled, of the rows that see any of these keys.
template <class T>
void dot_products(const Scratch& s, int rows, int64_t d, Range range, const T* const* k) {
    const int64_t width = (d + kLanes - 1) / kLanes * kLanes;
    for (int j = range.begin; j < range.end; j += kTileN) {
        const T* keys[kTileN];  // past the end the last one again
        for (int i = 0; i < kTileN; ++i) keys[i] = k[least(j + i, range.end - 1)];
        for (int r = 0; r < rows; r += kTileM) {
            const int count = least(rows - r, kTileM);
            bool seen = false;
            for (int i = r; i < r + count; ++i) {
                seen |= s.seen[i].begin < j + kTileN && j < s.seen[i].end;
            }
            if (!seen) continue;
            with_tile_rows(count, [&](auto tile_rows) {
                constexpr int kM = decltype(tile_rows)::value;
                const float* q = s.q + r * width;
                Tile<kM> tile;
                int64_t i = 0;
                for (; i + kLanes <= d; i += kLanes, q += kM * kLanes) {
                    tile.step(q, [&](int n) { return Vec::load(keys[n] + i); });
                }
                if (i < d) {
                    const int left = static_cast<int>(d - i);
                    tile.step(q, [&](int n) { return Vec::load(keys[n] + i, left); });
                }
                tile.reduce(s.logits + r * kLogitStride + j, kLogitStride);
            });
        }
    }
}

MK_INLINE float sum_of_lanes(Vec a) {
    alignas(64) float f[kLanes];
    a.store(f);
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int l = 0; l < half; ++l) f[l] += f[l + half];
    }
    return f[0];
}

// exp as it is done for vectors.
float exp_of(float x) {
    alignas(64) float f[kLanes];
    exp_clamped(Vec::set(x)).store(f);
    return f[0];
}

// The logits of one row become weights, relative to *max; the lanes of whole vectors that are not
// seen become 0.
void weigh(float* logits, Range seen, float scale, float* max, float* total) {
    constexpr float kInfinity = __builtin_inff();
    const int begin = seen.begin / kLanes * kLanes;
    const int end = (seen.end + kLanes - 1) / kLanes * kLanes;
    const auto set_unseen = [&](float value) {
        for (int j = begin; j < seen.begin; ++j) logits[j] = value;
        for (int j = seen.end; j < end; ++j) logits[j] = value;
    };
    for (int j = begin; j < end; j += kLanes) {
        (Vec::load(logits + j) * Vec::set(scale)).store(logits + j);
    }
    set_unseen(-kInfinity);
    Vec lanes = Vec::set(-kInfinity);
    for (int j = begin; j < end; j += kLanes) lanes = Vec::max(lanes, Vec::load(logits + j));
    alignas(64) float each[kLanes];
    lanes.store(each);
    float largest = each[0];  // a NaN may be lost here: its weight is NaN in any case
    for (int l = 1; l < kLanes; ++l) largest = each[l] > largest ? each[l] : largest;

    const Vec base = Vec::set(largest == -kInfinity ? 0.f : largest);
    for (int j = begin; j < end; j += kLanes) {
        exp_clamped(Vec::load(logits + j) - base).store(logits + j);
    }
    set_unseen(0.f);
    Vec sum = Vec::set(0.f);
    for (int j = begin; j < end; j += kLanes) sum = sum + Vec::load(logits + j);
    *max = largest;
    *total = sum_of_lanes(sum);
}

// emit(r, c, sum of weight * v) for kM rows and kN vectors of features d, d + 16, ...; the last
// one, if kN is 1, has `count` of them.
template <int kM, int kN, class T, class Emit>
MK_INLINE void weighted_sum(const float* weights, const Range* seen, const T* const* v, int64_t d,
                            int count, const Emit& emit) {
    Vec acc[kM][kN];
    unroll<kM>([&](auto r) MK_INLINE_LAMBDA {
        unroll<kN>([&](auto c) MK_INLINE_LAMBDA { acc[r.value][c.value] = Vec::set(0.f); });
    });
    // All inlined: an array that a function is given cannot stay in registers.
    const auto load = [&](int j, int c) MK_INLINE_LAMBDA {
        return kN == 1 && count < kLanes ? Vec::load(v[j] + d, count)
                                         : Vec::load(v[j] + d + c * kLanes);
    };
    const auto add_to_row = [&](auto r, int from, int to) MK_INLINE_LAMBDA {
        for (int j = from; j < to; ++j) {
            const Vec weight = Vec::set(weights[r.value * kLogitStride + j]);
            unroll<kN>([&](auto c) MK_INLINE_LAMBDA {
                Vec& a = acc[r.value][c.value];
                a = Vec::fma(weight, load(j, c.value), a);
            });
        }
    };
    int begin = seen[0].begin, end = seen[0].end;  // the keys that all rows see
    for (int r = 1; r < kM; ++r) {
        begin = most(begin, seen[r].begin);
        end = least(end, seen[r].end);
    }
    end = most(begin, end);
    unroll<kM>([&](auto r) MK_INLINE_LAMBDA {
        add_to_row(r, seen[r.value].begin, least(begin, seen[r.value].end));
    });
    for (int j = begin; j < end; ++j) {
        Vec value[kN];
        unroll<kN>([&](auto c) MK_INLINE_LAMBDA { value[c.value] = load(j, c.value); });
        unroll<kM>([&](auto r) MK_INLINE_LAMBDA {
            const Vec weight = Vec::set(weights[r.value * kLogitStride + j]);
            unroll<kN>([&](auto c) MK_INLINE_LAMBDA {
                Vec& a = acc[r.value][c.value];
                a = Vec::fma(weight, value[c.value], a);
            });
        });
    }
    unroll<kM>([&](auto r) MK_INLINE_LAMBDA {
        add_to_row(r, most(end, seen[r.value].begin), seen[r.value].end);
    });
    unroll<kM>([&](auto r) MK_INLINE_LAMBDA {
        unroll<kN>([&](auto c) MK_INLINE_LAMBDA { emit(r.value, c.value, acc[r.value][c.value]); });
    });
}

// ---- joining blocks ----

// What was joined so far counts `keep`, a new part `take`: the greater maximum becomes that of
// both. One of the factors is 1.
void join_totals(float part_max, float part_total, float* max, float* total, float* keep,
                 float* take) {
    const float before = *max, both = part_max > before ? part_max : before;
    *keep = before == both ? 1.f : exp_of(before - both);
    *take = part_max == both ? 1.f : exp_of(part_max - both);
    *max = both;
    *total = __builtin_fmaf(*total, *keep, part_total * *take);
}

MK_INLINE Vec join(Vec before, float keep, Vec part, float take) {
    return Vec::fma(before, Vec::set(keep), part * Vec::set(take));
}

float* part_of(const mk_attention_params& p, const AttentionTile& tile, int row, int block) {
    const int64_t blocks = (tile.keys + kKeyBlock - 1) / kKeyBlock;
    return tile.parts + (row * blocks + block) * (kPartHeader + padded(p.head_dim));
}

template <class T>
void weighted_sums(const mk_attention_params& p, const AttentionTile& tile, const Scratch& s,
                   int rows, int64_t d, int block, const T* const* v) {
    const int64_t width = padded(p.head_dim);
    for (int r = 0; r < rows;) {
        int count = 0;  // rows of this register tile: 6, 4, 3, 2 or 1
        const auto with_rows = [&](const auto& f) {
            const int left = rows - r;
            if constexpr (kSumM == 6) {
                if (left >= 6) return f(Int<6>{});
                if (left >= 4) return f(Int<4>{});
                if (left == 3) return f(Int<3>{});
            }
            return left >= 2 ? f(Int<2>{}) : f(Int<1>{});
        };
        with_rows([&](auto tile_rows) {
            constexpr int kM = decltype(tile_rows)::value;
            count = kM;
            const float* const weights = s.logits + r * kLogitStride;
            const auto store = [&](int64_t at, int i, Vec sum) {
                if (tile.parts) {
                    sum.store(part_of(p, tile, r + i, block) + kPartHeader + at);
                } else if (!s.seen[r + i].empty()) {
                    float* const joined = s.sum + (r + i) * width + at;
                    join(Vec::load(joined), s.keep[r + i], sum, s.take[r + i]).store(joined);
                }
            };
            int64_t at = 0;
            for (; at + kSumN * kLanes <= d; at += kSumN * kLanes) {
                weighted_sum<kM, kSumN>(
                    weights, s.seen + r, v, at, kLanes,
                    [&](int i, int c, Vec sum) { store(at + c * kLanes, i, sum); });
            }
            for (; at < d; at += kLanes) {
                const int left = static_cast<int>(d - at < kLanes ? d - at : kLanes);
                weighted_sum<kM, 1>(weights, s.seen + r, v, at, left,
                                    [&](int i, int, Vec sum) { store(at, i, sum); });
            }
        });
        r += count;
    }
}

template <class T>
void attend_block(const mk_attention_params& p, const AttentionTile& tile, const Scratch& s,
                  int rows, int64_t d, int block, Range range, const T* const* k,
                  const T* const* v) {
    dot_products(s, rows, d, range, k);
    for (int r = 0; r < rows; ++r) {
        float max = -__builtin_inff(), total = 0;
        if (!s.seen[r].empty()) {
            weigh(s.logits + r * kLogitStride, s.seen[r], p.softmax_scale, &max, &total);
        }
        if (tile.parts) {
            float* const part = part_of(p, tile, r, block);
            part[0] = max;
            part[1] = total;
        } else if (!s.seen[r].empty()) {
            join_totals(max, total, s.max + r, s.total + r, s.keep + r, s.take + r);
        }
    }
    weighted_sums(p, tile, s, rows, d, block, v);
}

// ---- a tile ----

template <class T>
void finish_row(const mk_attention_params& p, const AttentionTile& tile, int row, const float* sum,
                float max, float total) {
    const int group = p.num_q_heads / p.num_kv_heads, query = tile.query + row / group;
    const int64_t token =
        query + (p.cu_seqlens_q ? p.cu_seqlens_q[tile.sequence] : int64_t{tile.sequence});
    const int64_t head = tile.kv_head * group + row % group;
    const bool blind = keys_of(p, tile, query).empty();
    T* const out = static_cast<T*>(p.out) + p.out_stride * token + p.out_head_stride * head;
    for (int64_t i = 0; i < p.head_dim; i += kLanes) {
        const int count = least(p.head_dim - static_cast<int>(i), kLanes);
        (blind ? Vec::set(0.f) : Vec::load(sum + i) / Vec::set(total)).store(out + i, count);
    }
    if (p.lse) {
        p.lse[p.lse_stride * head + token] =
            blind ? -__builtin_inff() : max + __builtin_logf(total);
    }
}

template <class T>
void attend(const mk_attention_params& p, const AttentionTile& tile, float* scratch) {
    const int group = p.num_q_heads / p.num_kv_heads, rows = tile.num_queries * group;
    const int64_t width = padded(p.head_dim);
    const Scratch s = lay_out(p, rows, scratch);
    const int64_t first_token =
        tile.query + (p.cu_seqlens_q ? p.cu_seqlens_q[tile.sequence] : int64_t{tile.sequence});
    for (int r = 0; r < rows; r += kTileM) {
        const T* q[kTileM];
        const int count = least(rows - r, kTileM);
        for (int i = 0; i < count; ++i) {
            q[i] = row<T>(p.q, p.q_stride, first_token + (r + i) / group) +
                   p.q_head_stride * (tile.kv_head * group + (r + i) % group);
        }
        pack(q, count, 0, p.head_dim, s.q + r * width);
    }
    if (!tile.parts) {
        for (int64_t i = 0; i < rows * width; i += kLanes) Vec::set(0.f).store(s.sum + i);
        for (int r = 0; r < rows; ++r) s.max[r] = -__builtin_inff(), s.total[r] = 0;
    }
    for (int block = tile.block; block < tile.block_end; ++block) {
        const int first = block * kKeyBlock;
        Range range = {kKeyBlock, 0};
        for (int i = 0; i < tile.num_queries; ++i) {
            Range seen = keys_of(p, tile, tile.query + i);
            seen = {most(seen.begin - first, 0), least(seen.end - first, kKeyBlock)};
            if (seen.empty()) seen = {0, 0};
            for (int h = 0; h < group; ++h) s.seen[i * group + h] = seen;
            if (seen.empty()) continue;
            range = {least(range.begin, seen.begin), most(range.end, seen.end)};
        }
        if (range.empty()) range = {0, 0};
        const T *k[kKeyBlock], *v[kKeyBlock];
        find_rows(p, tile, p.k, p.k_page_stride, p.k_stride, p.k_head_stride, first, range, k);
        find_rows(p, tile, p.v, p.v_page_stride, p.v_stride, p.v_head_stride, first, range, v);
        if (sizeof(T) == sizeof(float) || rows <= kDirectRows) {
            attend_block(p, tile, s, rows, p.head_dim, block, range, k, v);
        } else {
            const float *k32[kKeyBlock], *v32[kKeyBlock];
            for (int j = range.begin; j < range.end; ++j) {
                pack(k + j, 1, 0, p.head_dim, s.k + j * width);
                pack(v + j, 1, 0, p.head_dim, s.v + j * width);
                k32[j] = s.k + j * width;
                v32[j] = s.v + j * width;
            }
            attend_block(p, tile, s, rows, width, block, range, k32, v32);
        }
    }
    if (tile.parts) return;
    for (int r = 0; r < rows; ++r) {
        finish_row<T>(p, tile, r, s.sum + r * width, s.max[r], s.total[r]);
    }
}

template <class T>
void join_parts(const mk_attention_params& p, const AttentionTile& tile, float* scratch) {
    const int rows = tile.num_queries * (p.num_q_heads / p.num_kv_heads);
    const int64_t width = padded(p.head_dim);
    const Scratch s = lay_out(p, rows, scratch);
    for (int r = 0; r < rows; ++r) {
        float* const sum = s.sum;
        float max = -__builtin_inff(), total = 0, keep, take;
        for (int64_t i = 0; i < width; i += kLanes) Vec::set(0.f).store(sum + i);
        for (int block = 0; block * kKeyBlock < tile.keys; ++block) {
            const float* const part = part_of(p, tile, r, block);
            if (part[1] == 0) continue;  // the row saw nothing of it
            join_totals(part[0], part[1], &max, &total, &keep, &take);
            for (int64_t i = 0; i < width; i += kLanes) {
                join(Vec::load(sum + i), keep, Vec::load(part + kPartHeader + i), take)
                    .store(sum + i);
            }
        }
        finish_row<T>(p, tile, r, sum, max, total);
    }
}

constexpr AttentionKernels kKernels = {
    scratch_floats,
    [](const mk_attention_params& p, const AttentionTile& tile, float* scratch) {
        with_dtype(p.dtype, [&](auto t) { attend<decltype(t)>(p, tile, scratch); });
    },
    [](const mk_attention_params& p, const AttentionTile& tile, float* scratch) {
        with_dtype(p.dtype, [&](auto t) { join_parts<decltype(t)>(p, tile, scratch); });
    },
};

}  // namespace
}  // namespace mk::cpu
