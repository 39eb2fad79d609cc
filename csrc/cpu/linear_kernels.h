// The kernels of mk_cpu_linear over Vec, a vector of 16 floats that the including file defines.
//
// An output is 16 partial sums, lane l adding x[k] * w[k] for k = l, l + 16, ... by fused
// multiply-add, then halved four times: s[l] += s[l + 8], += s[l + 4], += s[l + 2], += s[l + 1].
// Bfloat16 does so by pairs of columns, as VDPBF16PS, which is two fused multiply-adds of the odd
// and of the even ones; without that instruction the two halves of 32 columns are vectors of their
// own. A register tile of kTileM x kTileN outputs takes a vector a step. Blocking by rows is free;
// blocking by columns keeps all 16 partial sums of every output of the block in Scratch::partial.
//
//   stream  up to 48 rows of x: w is read once from memory, kTileN rows at a time, and again by
//           each further tile from L2; against blocks 1.04 (48 rows) to 1.6 (6) times as fast, on
//           Zen 4, whether w has to be converted or not
//   block   w is converted to panels of kTileN rows x kBlockK floats (or pairs), which stay in L1
//           while the tiles of x pass by from L2; all of w for a block of rows of x, which stays
//           in L3, then for the next (the other way round 512 rows of K 11520 took 1.2 times as
//           long)
//
// Tried and lost, on a Sapphire Rapids core: prefetching the next panel of w into L2 (-5 % at
// M 512, K 576; nothing at M 8 and 16); blocks of 512, 1024 or 1536 columns, of 66 or 252 rows of x
// (all within 3 % or slower); huge pages for packed x (+2 % at K 4096, nothing at K 576).
//
// T is float, Bf16 or F16.
#pragma once

#include "cpu/epilogue.h"
#include "cpu/linear.h"
#include "cpu/tile.h"

namespace mk::cpu {
namespace {

static_assert(kBlockM % kTileM == 0 && kBlockN % kTileN == 0 && kStreamMaxN % kTileN == 0);

// Bytes: 4 to 12 % at K 1536 to 11520, where the processor's own prefetch begins anew with each
// page of a row; +-2 % at K 576.
constexpr int kStreamAhead = 1024;

// How the columns of a row are multiplied: kCount of them at a time, as kParts vectors.
template <class T>
struct Columns {
    using Frag = Vec;
    static constexpr int kCount = kLanes, kParts = 1;

    static Vec load(const T* p, Int<0>) { return Vec::load(p); }
    static Vec load(const T* p, int count, Int<0>) { return Vec::load(p, count); }
};

template <>
struct Columns<Bf16> {
    static constexpr int kCount = 2 * kLanes;
#if defined(MK_BF16_PRODUCTS)
    using Frag = Pairs;
    static constexpr int kParts = 1;

    static Pairs load(const Bf16* p, Int<0>) { return Pairs::load(p); }
    static Pairs load(const Bf16* p, int count, Int<0>) { return Pairs::load(p, count); }
#else
    using Frag = Vec;
    static constexpr int kParts = 2;

    static Vec load(const Bf16* p, Int<0>) { return Vec::load_odd(p); }
    static Vec load(const Bf16* p, Int<1>) { return Vec::load_even(p); }
    static Vec load(const Bf16* p, int count, Int<0>) { return Vec::load_odd(p, count); }
    static Vec load(const Bf16* p, int count, Int<1>) { return Vec::load_even(p, count); }
#endif
};

// Vectors of `columns` columns, and columns of a panel's row.
template <class T>
int64_t num_vectors(int64_t columns) {
    return (columns + Columns<T>::kCount - 1) / Columns<T>::kCount * Columns<T>::kParts;
}
template <class T>
constexpr int64_t kBlockColumns = kBlockK / kLanes / Columns<T>::kParts * Columns<T>::kCount;

// Columns k ... k_end-1 of `count` rows as a panel: a vector of each row, then the next of each.
template <class T>
void pack_panel(const T* const* rows, int count, int64_t k, int64_t k_end, float* panel) {
    using C = Columns<T>;
    for (; k + C::kCount <= k_end; k += C::kCount) {
        unroll<C::kParts>([&](auto part) {
            for (int r = 0; r < count; ++r, panel += kLanes)
                C::load(rows[r] + k, part).store(panel);
        });
    }
    if (k < k_end) {
        const int left = static_cast<int>(k_end - k);
        unroll<C::kParts>([&](auto part) {
            for (int r = 0; r < count; ++r, panel += kLanes)
                C::load(rows[r] + k, left, part).store(panel);
        });
    }
}

template <int kM, class T>
void stream_tile(const float* x, const T* const (&w)[kTileN], int64_t k, float* sums) {
    using C = Columns<T>;
    Tile<kM> tile;
    int64_t i = 0;
    for (; i + C::kCount <= k; i += C::kCount) {
        unroll<C::kParts>([&](auto part) {
            tile.template step<typename C::Frag>(x, [&](int j) {
                if (part.value == 0) {
                    __builtin_prefetch(w[j] + i + kStreamAhead / sizeof(T));  // may lie outside w
                }
                return C::load(w[j] + i, part);
            });
            x += kM * kLanes;
        });
    }
    if (i < k) {
        const int left = static_cast<int>(k - i);
        unroll<C::kParts>([&](auto part) {
            tile.template step<typename C::Frag>(
                x, [&](int j) { return C::load(w[j] + i, left, part); });
            x += kM * kLanes;
        });
    }
    tile.reduce(sums, kStreamMaxN);
}

// One tile of a block: x and w are panels of `steps` vectors a row. `partial` takes the tile's
// partial sums from one block of columns to the next.
template <int kM, class Frag>
void panel_tile(const float* x, const float* w, int64_t steps, bool first, bool last,
                float* partial, float* sums) {
    Tile<kM> tile;
    if (!first) tile.each([&](Vec& a, int at) { a = Vec::load(partial + at * kLanes); });
    for (; steps > 0; --steps, x += kM * kLanes, w += kTileN * kLanes) {
        tile.template step<Frag>(x, [&](int j) { return Frag::load(w + j * kLanes); });
    }
    if (last) {
        tile.reduce(sums, kBlockN);
    } else {
        tile.each([&](const Vec& a, int at) { a.store(partial + at * kLanes); });
    }
}

// ---- packing x ----

// Columns of x that lie together, for all of its rows: with many rows a block, of what a panel of w
// holds or a little less, so that all blocks have the same size.
template <class T>
int64_t block_columns(const LinearTask& task) {
    constexpr int64_t kCount = Columns<T>::kCount, kMost = kBlockColumns<T>;
    if (task.p.m <= kStreamMaxM || task.p.k <= kMost) return task.p.k;
    const int64_t blocks = (task.p.k + kMost - 1) / kMost;
    return ((task.p.k + blocks - 1) / blocks + kCount - 1) / kCount * kCount;
}

// Where x is packed, from row m and column k on; `floats` of a row lie together.
template <class T>
float* packed_x(const LinearTask& task, int64_t m, int64_t k, int64_t floats) {
    return task.packed_x + num_vectors<T>(k) * kLanes * task.p.m + m * floats;
}

template <class T>
void pack_x_rows(const LinearTask& task, int64_t m, int64_t m_end) {
    const int64_t block_k = block_columns<T>(task);
    for (int64_t k = 0, k_end; k < task.p.k; k = k_end) {
        k_end = k + block_k < task.p.k ? k + block_k : task.p.k;
        const int64_t floats = num_vectors<T>(k_end - k) * kLanes;
        for (int64_t i = m; i < m_end; i += kTileM) {
            const int count = static_cast<int>(m_end - i < kTileM ? m_end - i : kTileM);
            const T* rows[kTileM];
            for (int r = 0; r < count; ++r) rows[r] = row<T>(task.p.x, task.p.x_stride, i + r);
            pack_panel(rows, count, k, k_end, packed_x<T>(task, i, k, floats));
        }
    }
}

// ---- the epilogue ----

// Outputs [m ... m_end-1, n ... n_end-1] from scratch.sums, whose rows are `stride` apart.
template <class T, class Out>
void finish_rows(const LinearTask& task, int64_t m, int64_t m_end, int64_t n, int64_t n_end,
                 const Scratch& scratch, int64_t stride) {
    const mk_cpu_linear_params& p = task.p;
    const bool has_other = p.epilogue == MK_EPILOGUE_MUL || p.epilogue == MK_EPILOGUE_ADD;
    for (int64_t i = 0; m + i < m_end; ++i) {
        finish_row<T>(p.epilogue, scratch.sums[0] + i * stride, scratch.sums[1] + i * stride,
                      has_other ? row<T>(p.other, p.other_stride, m + i) + n : nullptr,
                      static_cast<Out*>(p.out) + p.out_stride * (m + i) + n, n_end - n);
    }
}

template <class T>
void finish(const LinearTask& task, int64_t m, int64_t m_end, int64_t n, int64_t n_end,
            const Scratch& scratch, int64_t stride) {
    if (task.p.out_dtype == MK_F32) {
        finish_rows<T, float>(task, m, m_end, n, n_end, scratch, stride);
    } else {
        finish_rows<T, T>(task, m, m_end, n, n_end, scratch, stride);
    }
}

// ---- few rows ----

// The rows n ... n + kTileN-1 of w; past `end` the last one again, whose sums nobody reads.
template <class T>
void tile_rows(const void* w, int64_t stride, int64_t n, int64_t end, const T* (&rows)[kTileN]) {
    for (int j = 0; j < kTileN; ++j) rows[j] = row<T>(w, stride, n + j < end ? n + j : end - 1);
}

template <class T>
void stream_sums(const LinearTask& task, const void* w, int64_t stride, int64_t n, int64_t n_end,
                 float* sums) {
    for (int64_t j = n; j < n_end; j += kTileN) {
        const T* rows[kTileN];
        tile_rows(w, stride, j, n_end, rows);
        for (int64_t m = 0; m < task.p.m; m += kTileM) {
            const float* x = task.packed_x + m * task.packed_k;
            float* tile_sums = sums + m * kStreamMaxN + (j - n);
            with_tile_rows(task.p.m - m, [&](auto count) {
                stream_tile<decltype(count)::value, T>(x, rows, task.p.k, tile_sums);
            });
        }
    }
}

template <class T>
void stream(const LinearTask& task, int64_t n, int64_t n_end, Scratch& scratch) {
    const mk_cpu_linear_params& p = task.p;
    stream_sums<T>(task, p.w, p.w_stride, n, n_end, scratch.sums[0]);
    if (p.epilogue == MK_EPILOGUE_SWIGLU) {
        stream_sums<T>(task, p.w_up, p.w_up_stride, n, n_end, scratch.sums[1]);
    }
    finish<T>(task, 0, p.m, n, n_end, scratch, kStreamMaxN);
}

// ---- many rows ----

template <class T>
void block_sums(const LinearTask& task, const void* w, int64_t stride, int64_t m, int64_t m_end,
                int64_t n, int64_t n_end, Scratch& scratch, float* sums) {
    const int64_t block_k = block_columns<T>(task);
    int64_t k = 0;
    do {
        const int64_t k_end = k + block_k < task.p.k ? k + block_k : task.p.k;
        const int64_t steps = num_vectors<T>(k_end - k);
        const bool first = k == 0, last = k_end == task.p.k;
        float* partial = scratch.partial;
        for (int64_t j = n; j < n_end; j += kTileN) {
            float* panel = scratch.w + (j - n) * kBlockK;
            const T* rows[kTileN];
            tile_rows(w, stride, j, n_end, rows);
            pack_panel(rows, kTileN, k, k_end, panel);
            // Meanwhile the next panel's rows are fetched, a few cache lines with each tile.
            if (j + kTileN < n_end) tile_rows(w, stride, j + kTileN, n_end, rows);
            const int64_t row_lines = (k_end - k) * static_cast<int64_t>(sizeof(T)) / 64 + 1;
            const int64_t tile_lines = kTileN * row_lines * kTileM / (m_end - m) + 1;
            int64_t next_row = 0, next_line = 0;
            for (int64_t i = m; i < m_end; i += kTileM, partial += kTileM * kTileN * kLanes) {
                for (int64_t l = 0; l < tile_lines && next_row < kTileN; ++l) {
                    const char* const next = reinterpret_cast<const char*>(rows[next_row] + k);
                    __builtin_prefetch(next + next_line * 64);
                    if (++next_line == row_lines) next_line = 0, ++next_row;
                }
                const float* x = packed_x<T>(task, i, k, steps * kLanes);
                float* tile_sums = sums + (i - m) * kBlockN + (j - n);
                with_tile_rows(m_end - i, [&](auto count) {
                    constexpr int kM = decltype(count)::value;
                    panel_tile<kM, typename Columns<T>::Frag>(x, panel, steps, first, last, partial,
                                                              tile_sums);
                });
            }
        }
        k = k_end;
    } while (k < task.p.k);
}

template <class T>
void block(const LinearTask& task, int64_t m, int64_t m_end, int64_t n, int64_t n_end,
           Scratch& scratch) {
    const mk_cpu_linear_params& p = task.p;
    block_sums<T>(task, p.w, p.w_stride, m, m_end, n, n_end, scratch, scratch.sums[0]);
    if (p.epilogue == MK_EPILOGUE_SWIGLU) {
        block_sums<T>(task, p.w_up, p.w_up_stride, m, m_end, n, n_end, scratch, scratch.sums[1]);
    }
    finish<T>(task, m, m_end, n, n_end, scratch, kBlockN);
}

constexpr LinearKernels kKernels = {
    kTileM,
    Columns<Bf16>::kParts == 1,
    [](const LinearTask& task, int64_t m, int64_t m_end) {
        with_dtype(task.p.dtype, [&](auto t) { pack_x_rows<decltype(t)>(task, m, m_end); });
    },
    [](const LinearTask& task, int64_t n, int64_t n_end, Scratch& scratch) {
        with_dtype(task.p.dtype, [&](auto t) { stream<decltype(t)>(task, n, n_end, scratch); });
    },
    [](const LinearTask& task, int64_t m, int64_t m_end, int64_t n, int64_t n_end,
       Scratch& scratch) {
        with_dtype(task.p.dtype,
                   [&](auto t) { block<decltype(t)>(task, m, m_end, n, n_end, scratch); });
    },
};

}  // namespace
}  // namespace mk::cpu
