// What a thread of linear_gemm_sm90.cuh and linear_fp8_sm90.cuh does with its sums of a tile:
// outputs straight from registers, 16 bytes at once, in whole sectors.
//
// Of each row and each 8 columns wgmma gives a thread two, 2 q and 2 q + 1 (q = lane % 4). So that
// more of a thread's columns adjoin, TMA puts the rows of w into shared memory in another order, by
// a map of five dimensions (linear_gemm_plan.cpp): with `pairs` P, and G = T.n / 8 / P groups,
//
//   Sums[b G + g] = columns 8 P g + 2 P q + 2 b and + 1 of the tile        b < P, g < G
//
//   P = 4, group 0:    q = 0: columns 0-7    q = 1: 8-15    q = 2: 16-23    q = 3: 24-31
//
// No sum depends on its place. The four threads of a row write 64 bytes (32 of a rotation's halves)
// and read residuals and angles alike. They need no shared memory and no other thread, and what
// they read, they ask for when the tile begins. Where outputs are not aligned to 16 bytes, or
// groups of columns are cut, P is 1: pairs leave as they lie.
#pragma once

#include "linear/linear_epilogue.cuh"

namespace mk {

// A thread's rows of a tile: `row` and that + 8, if these are below m; and its columns.
struct GemmPlaceSm90 {
    int warp_row, m, n0;

    __device__ __forceinline__ int q() const { return threadIdx.x % 4; }
    __device__ __forceinline__ int row(int half) const {
        return warp_row + threadIdx.x % 32 / 4 + 8 * half;
    }
    __device__ __forceinline__ bool exists(int half) const { return row(half) < m; }
    // The nearest row that exists.
    __device__ __forceinline__ int64_t row_inside(int half) const { return min(row(half), m - 1); }
};

// load(epilogue, pairs, place)          what write() needs, while MMAs are under way
// write(epilogue, pairs, place, sums)
template <GemmTileSm90 T, class Epilogue>
struct GemmOutputSm90;

template <GemmTileSm90 T>
using GemmSumsSm90 = float[T.n / 8][4];

// P = 1, 64 columns a turn: unrolled over all, these took three quarters of the entries' compile
// time.
template <GemmTileSm90 T, class Epilogue>
__device__ __forceinline__ void write_pairs(const Epilogue& epilogue, const GemmPlaceSm90& at,
                                            const GemmSumsSm90<T>& sums) {
    using Row = typename Epilogue::Row;
    constexpr int kTurns = T.n / 64;
    const Row rows[2] = {at.exists(0) ? epilogue.row(at.row(0)) : Row(),
                         at.exists(1) ? epilogue.row(at.row(1)) : Row()};
    MK_NO_UNROLL
    for (int turn = 0; turn < kTurns; ++turn) {
        MK_UNROLL
        for (int j = 0; j < 8; ++j) {
            const auto column = epilogue.column(at.n0 + 64 * turn + 8 * j + 2 * at.q());
            MK_UNROLL
            for (int half = 0; half < 2; ++half) {
                // Selected: a register has no index.
                float y0 = 0.f, y1 = 0.f;
                MK_UNROLL
                for (int t = 0; t < kTurns; ++t) {
                    if (t == turn)
                        y0 = sums[8 * t + j][2 * half], y1 = sums[8 * t + j][2 * half + 1];
                }
                if (at.exists(half)) epilogue.store(rows[half], column, y0, y1);
            }
        }
    }
}

template <GemmTileSm90 T, class Dtype>
struct GemmOutputSm90<T, PlainEpilogue<Dtype>> {
    using Epilogue = PlainEpilogue<Dtype>;
    static constexpr int kPairs = kPairsOf16Bit, kGroups = T.n / 8 / kPairs;

    uint4 residual[kGroups][2]{};

    // Rows and columns that do not exist: those of some that do.
    __device__ __forceinline__ void load(const Epilogue& epilogue, int pairs,
                                         const GemmPlaceSm90& at) {
        const mk_linear_params& p = epilogue.p;
        if (pairs != kPairs || !p.residual) return;
        MK_UNROLL
        for (int half = 0; half < 2; ++half) {
            const auto* const from = static_cast<const uint16_t*>(p.residual) +
                                     at.row_inside(half) * p.residual_stride + 2 * kPairs * at.q();
            MK_UNROLL
            for (int g = 0; g < kGroups; ++g) {
                const int column = min(at.n0 + 8 * kPairs * g, p.n - 8 * kPairs);
                residual[g][half] = ptx::ld_global_v4(from + column);
            }
        }
    }

    __device__ __forceinline__ void write(const Epilogue& epilogue, int pairs,
                                          const GemmPlaceSm90& at,
                                          const GemmSumsSm90<T>& sums) const {
        if (pairs == kPairs) {
            epilogue.p.residual ? write_vectors<true>(epilogue, at, sums)
                                : write_vectors<false>(epilogue, at, sums);
        } else if (pairs == kPairsOfF32) {
            write_f32(epilogue, at, sums);
        } else {
            write_pairs<T>(epilogue, at, sums);
        }
    }

    template <bool kHasResidual>
    __device__ __forceinline__ void write_vectors(const Epilogue& epilogue, const GemmPlaceSm90& at,
                                                  const GemmSumsSm90<T>& sums) const {
        const mk_linear_params& p = epilogue.p;
        auto* const out = static_cast<uint16_t*>(p.out) + at.n0 + 2 * kPairs * at.q();
        uint16_t* const rows[2] = {out + at.row(0) * p.out_stride, out + at.row(1) * p.out_stride};
        MK_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            if (at.n0 + 8 * kPairs * g >= p.n) return;
            MK_UNROLL
            for (int half = 0; half < 2; ++half) {
                const uint4& r = residual[g][half];
                const uint32_t add[kPairs] = {r.x, r.y, r.z, r.w};
                uint32_t y[kPairs];
                MK_UNROLL
                for (int b = 0; b < kPairs; ++b) {
                    const float (&sum)[4] = sums[b * kGroups + g];
                    float2 v = {sum[2 * half], sum[2 * half + 1]};
                    if (kHasResidual) {
                        const float2 a = Dtype::unpack(add[b]);
                        v = {v.x + a.x, v.y + a.y};
                    }
                    y[b] = Dtype::pack(v.x, v.y);
                }
                if (at.exists(half)) {
                    ptx::st_global_v4(rows[half] + 8 * kPairs * g, {y[0], y[1], y[2], y[3]});
                }
            }
        }
    }

    static __device__ __forceinline__ void write_f32(const Epilogue& epilogue,
                                                     const GemmPlaceSm90& at,
                                                     const GemmSumsSm90<T>& sums) {
        constexpr int kColumns = 8 * kPairsOfF32, kCount = T.n / kColumns;
        const mk_linear_params& p = epilogue.p;
        auto* const out = static_cast<float*>(p.out) + at.n0 + 2 * kPairsOfF32 * at.q();
        float* const rows[2] = {out + at.row(0) * p.out_stride, out + at.row(1) * p.out_stride};
        MK_UNROLL
        for (int g = 0; g < kCount; ++g) {
            if (at.n0 + kColumns * g >= p.n) return;
            MK_UNROLL
            for (int half = 0; half < 2; ++half) {
                const float *const y = sums[g] + 2 * half, *const z = sums[kCount + g] + 2 * half;
                if (!at.exists(half)) continue;
                *reinterpret_cast<float4*>(rows[half] + kColumns * g) = {y[0], y[1], z[0], z[1]};
            }
        }
    }
};

template <GemmTileSm90 T, class Dtype>
struct GemmOutputSm90<T, SwigluEpilogue<Dtype>> {
    using Epilogue = SwigluEpilogue<Dtype>;
    static constexpr int kPairs = kPairsOfSwiglu, kGroups = T.n / 8 / kPairs;

    __device__ __forceinline__ void load(const Epilogue&, int, const GemmPlaceSm90&) {}

    __device__ __forceinline__ void write(const Epilogue& epilogue, int pairs,
                                          const GemmPlaceSm90& at,
                                          const GemmSumsSm90<T>& sums) const {
        if (pairs != kPairs) return write_pairs<T>(epilogue, at, sums);
        const mk_linear_params& p = epilogue.p;
        auto* const out = static_cast<uint16_t*>(p.out) + at.n0 / 2 + kPairs * at.q();
        uint16_t* const rows[2] = {out + at.row(0) * p.out_stride, out + at.row(1) * p.out_stride};
        MK_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            if (at.n0 + 8 * kPairs * g >= p.n) return;
            MK_UNROLL
            for (int half = 0; half < 2; ++half) {
                uint32_t y[kPairs / 2];
                MK_UNROLL
                for (int i = 0; i < kPairs / 2; ++i) {
                    const float* const first = sums[2 * i * kGroups + g] + 2 * half;
                    const float* const other = sums[(2 * i + 1) * kGroups + g] + 2 * half;
                    y[i] = Dtype::pack(epilogue.output(first[0], first[1]),
                                       epilogue.output(other[0], other[1]));
                }
                if (at.exists(half)) {
                    ptx::st_global_v4(rows[half] + 4 * kPairs * g, {y[0], y[1], y[2], y[3]});
                }
            }
        }
    }
};

// Of heads of 64 or 128 columns and rotations of multiples of 64: 64 columns are all rotated or
// all not, and groups of four have the same angles.
template <GemmTileSm90 T, class Dtype>
struct GemmOutputSm90<T, QkvEpilogue<Dtype>> {
    using Epilogue = QkvEpilogue<Dtype>;
    static constexpr int kPairs = kPairsOfQkv, kColumns = 8 * kPairs, kGroups = T.n / kColumns;
    static constexpr int kSets = kGroups < 4 ? kGroups : 4;  // of angles

    int64_t cache[2];  // as Epilogue::Row has it, in bytes
    float4 cos[kSets][2], sin[kSets][2];

    __device__ __forceinline__ void load(const Epilogue& epilogue, int pairs,
                                         const GemmPlaceSm90& at) {
        if (pairs != kPairs) return;
        MK_UNROLL
        for (int half = 0; half < 2; ++half) {
            const auto row = epilogue.row(at.row_inside(half));
            cache[half] = at.exists(half) ? 2 * row.cache : -1;
            MK_UNROLL
            for (int s = 0; s < kSets; ++s) {
                const int column = at.n0 + kColumns * s, d = column & (epilogue.p.head_dim - 1);
                const float nan = __int_as_float(0x7FC00000);
                cos[s][half] = sin[s][half] = {nan, nan, nan, nan};
                if (column >= epilogue.num_qk || d >= epilogue.p.rope.rotary_dim || !row.cos) {
                    continue;
                }
                const int pair = d / 2 + kPairs * at.q();
                cos[s][half] = *reinterpret_cast<const float4*>(row.cos + pair);
                sin[s][half] = *reinterpret_cast<const float4*>(row.sin + pair);
            }
        }
    }

    __device__ __forceinline__ void write(const Epilogue& epilogue, int pairs,
                                          const GemmPlaceSm90& at,
                                          const GemmSumsSm90<T>& sums) const {
        if (pairs != kPairs) return write_pairs<T>(epilogue, at, sums);
        const auto& p = epilogue.p;
        const int64_t q_rows[2] = {at.exists(0) ? 2 * at.row(0) * p.q_stride : -1,
                                   at.exists(1) ? 2 * at.row(1) * p.q_stride : -1};
        const int head_log2 = p.head_dim == 64 ? 6 : 7;
        MK_UNROLL
        for (int first = 0; first < T.n; first += 64) {
            const int column = at.n0 + first;
            if (column >= epilogue.n) return;
            const bool is_q = column < epilogue.num_q, is_qk = column < epilogue.num_qk;
            const int i = column - (is_q ? 0 : is_qk ? epilogue.num_q : epilogue.num_qk);
            const int head = i >> head_log2, d = i & (p.head_dim - 1);
            const bool is_rotated = is_qk && d < p.rope.rotary_dim;
            const bool is_split = is_rotated && epilogue.gap != 1;
            const int feature = is_split ? (d >> 1) + kPairs * at.q() : d + 2 * kPairs * at.q();
            auto* const to = static_cast<uint16_t*>(is_q    ? p.q
                                                    : is_qk ? p.k_cache
                                                            : p.v_cache) +
                             head * (is_q ? p.q_head_stride : p.cache_head_stride) + feature;
            const auto each_row = [&](const auto& body) {
                MK_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int64_t row = is_q ? q_rows[half] : cache[half];
                    if (row < 0) continue;
                    body(half, reinterpret_cast<uint16_t*>(reinterpret_cast<char*>(to) + row));
                }
            };
            if (is_split) {
                each_row([&](int half, uint16_t* row) {
                    store_split(sums, first, half, row, epilogue.gap);
                });
            } else if (is_rotated) {
                each_row([&](int half, uint16_t* row) { store<true>(sums, first, half, row); });
            } else {
                each_row([&](int half, uint16_t* row) { store<false>(sums, first, half, row); });
            }
        }
    }

    // Of 64 columns from `first` on: features that adjoin,
    template <bool kIsRotated>
    __device__ __forceinline__ void store(const GemmSumsSm90<T>& sums, int first, int half,
                                          uint16_t* to) const {
        MK_UNROLL
        for (int i = 0; i < 64; i += kColumns) {
            float2 y[kPairs];
            features<kIsRotated>(sums, (first + i) / kColumns, half, y);
            ptx::st_global_v4(to + i, {Dtype::pack(y[0].x, y[0].y), Dtype::pack(y[1].x, y[1].y),
                                       Dtype::pack(y[2].x, y[2].y), Dtype::pack(y[3].x, y[3].y)});
        }
    }
    // and of pairs that are `gap` apart.
    __device__ __forceinline__ void store_split(const GemmSumsSm90<T>& sums, int first, int half,
                                                uint16_t* to, int gap) const {
        uint16_t* const other = to + gap;
        MK_UNROLL
        for (int i = 0; i < 64; i += kColumns) {
            float2 y[kPairs];
            features<true>(sums, (first + i) / kColumns, half, y);
            *reinterpret_cast<uint2*>(to + i / 2) = {Dtype::pack(y[0].x, y[1].x),
                                                     Dtype::pack(y[2].x, y[3].x)};
            *reinterpret_cast<uint2*>(other + i / 2) = {Dtype::pack(y[0].y, y[1].y),
                                                        Dtype::pack(y[2].y, y[3].y)};
        }
    }
    template <bool kIsRotated>
    __device__ __forceinline__ void features(const GemmSumsSm90<T>& sums, int g, int half,
                                             float2 (&y)[kPairs]) const {
        const float4 &c = cos[g % kSets][half], &s = sin[g % kSets][half];
        const float2 angles[kPairs] = {{c.x, s.x}, {c.y, s.y}, {c.z, s.z}, {c.w, s.w}};
        MK_UNROLL
        for (int b = 0; b < kPairs; ++b) {
            const float* const sum = sums[b * kGroups + g] + 2 * half;
            y[b] =
                kIsRotated ? Epilogue::rotated(angles[b], sum[0], sum[1]) : float2{sum[0], sum[1]};
        }
    }
};

}  // namespace mk
