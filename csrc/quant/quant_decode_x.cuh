// The x of a decode kernel: converted by each block, into its shared memory.
//
//   1. how large each row is (and before it, with a norm, its scale), by quads of 1024 k
//   2. x16 of a chunk of k, in the order of quant_x.cuh, and its block sums, by MMAs with ones
//
// Up to kQuantWarps / m warps share a row (XShare); from sm_90 on and for more than 4 rows those of
// the two blocks of a cluster, each of which stores what it converts to both.
// Rows come from L2 twice (with a norm three times): they are few, and w comes from DRAM meanwhile.
#pragma once

#include "common/static_for.cuh"
#include "linear/linear_norm.cuh"
#include "ptx/sm90_cluster.cuh"
#include "quant/quant_tiles.h"
#include "quant/quant_x.cuh"

namespace mk {

__device__ __forceinline__ uint32_t smem_address(const void* smem) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

struct QuantSmem {
    uint8_t* rows;      // of each row of x: the outputs' Epilogue::Row
    float* unscale;     // of each row: XScale
    uint32_t* maxima;   // of the sums of squares of shares of rows
    float* norm_scale;  // of each row
    bool* in_pairs;     // are outputs stored
    uint8_t* scales;    // of this warp's tile and the next one
    uint8_t* x;
    uint8_t* sums;

    __device__ __forceinline__ QuantSmem(uint8_t* smem, const QuantDecodeShape& shape)
        : rows(smem),
          unscale(reinterpret_cast<float*>(smem + kQuantRowsBytes - 256)),
          maxima(reinterpret_cast<uint32_t*>(unscale + 16)),
          norm_scale(unscale + 32),
          in_pairs(reinterpret_cast<bool*>(unscale + 48)),
          scales(smem + kQuantRowsBytes + threadIdx.x / 32 * (2 * kQuantScaleBytes)),
          x(smem + kQuantFixedBytes),
          sums(x + shape.sums_at) {}
};

// ---- x ----

// The rows of x that the block has. Parts have more than 8 (quant_tiles.h).
struct QuantPart {
    int first, m;
};
template <int kTokenTiles>
__device__ __forceinline__ QuantPart part_of(const QuantDecodeArgs& args) {
    if constexpr (kTokenTiles > 1) {
        const int rows = args.shape.part_rows, first = blockIdx.y * rows;
        return {first, min(args.product.m - first, rows)};
    } else {
        return {0, args.product.m};
    }
}

// 16 bytes of x that a thread takes, normalised if there is a norm. k is a multiple of 32, and 8
// adjacent elements are in the row or past its end together.
template <class Dtype, bool kIsAligned, bool kHasNorm>
struct XReader {
    using Type = Dtype;
    const Product& a;
    const float* smem_norm_scale;

    __device__ __forceinline__ float norm_scale(int row) const {
        return kHasNorm ? smem_norm_scale[row] : 0.f;
    }
    // Of x and of the norm's weight, for `load`.
    struct Place {
        const uint16_t *x, *weight;
        __device__ __forceinline__ void operator+=(int k) {
            x += k;
            if constexpr (kHasNorm) weight += k;
        }
        __device__ __forceinline__ Place operator+(int k) const {
            Place sum = *this;
            sum += k;
            return sum;
        }
    };
    __device__ __forceinline__ Place place(int row, int k) const {
        return {static_cast<const uint16_t*>(row_of(a.x, row, a.x_stride)) + k,
                static_cast<const uint16_t*>(a.norm_weight) + (kHasNorm ? k : 0)};
    }

    // Elements 0 ... 3 and kSecond ... kSecond + 3.
    template <int kSecond>
    __device__ __forceinline__ Vec8 load(const Place& at, float norm_scale) const {
        const Vec8 v = load_from<kSecond>(at.x);
        if constexpr (!kHasNorm) return v;
        return normalise<Dtype>(v, norm_scale, load_from<kSecond>(at.weight));
    }

  private:
    template <int kSecond>
    static __device__ __forceinline__ Vec8 load_from(const uint16_t* x) {
        if constexpr (kIsAligned && kSecond == 4) {
            const uint4 v = *reinterpret_cast<const uint4*>(x);
            return {v.x, v.y, v.z, v.w};
        } else if constexpr (kIsAligned) {
            const uint2 low = *reinterpret_cast<const uint2*>(x);
            const uint2 high = *reinterpret_cast<const uint2*>(x + kSecond);
            return {low.x, low.y, high.x, high.y};
        }
        const auto pair = [x](int i) { return x[i] | static_cast<uint32_t>(x[i + 1]) << 16; };
        return {pair(0), pair(2), pair(kSecond), pair(kSecond + 2)};
    }
};

// What a warp has of x: groups of a row, and of every `warps`'th after it; the warps are those of
// the cluster. Not less than m: nothing.
struct XShare {
    uint32_t number, row, warps;
    uint32_t other_rank;  // of the other block of the cluster

    __device__ __forceinline__ XShare(uint32_t m, const QuantDecodeShape& shape) {
        uint32_t warp = threadIdx.x / 32;
        warps = kQuantWarps;
        other_rank = 0;
#if MK_SM >= 90
        const uint32_t rank = ptx::mov_u32_cluster_ctarank();
        other_rank = shape.cluster - 1 - rank;
        warp += rank * kQuantWarps;
        warps *= shape.cluster;
#endif
        number = warp / m;
        row = number < static_cast<uint32_t>(shape.x_shares) ? warp - number * m : m;
    }
};

// What is stored goes to this block's shared memory and to that of the other block of its cluster,
// which without one is this block again.
template <class T>
__device__ __forceinline__ void store_to_both(T* at, const T& v, uint32_t other_rank) {
    *at = v;
#if MK_SM >= 90
    ptx::st_shared_cluster<0>(ptx::mapa_shared_cluster(smem_address(at), other_rank), v);
#endif
}
struct SharedPlaces {
    uint32_t own;
#if MK_SM >= 90
    uint32_t other;
#endif

    __device__ __forceinline__ SharedPlaces(uint32_t at, [[maybe_unused]] uint32_t other_rank)
        : own(at) {
#if MK_SM >= 90
        other = ptx::mapa_shared_cluster(at, other_rank);
#endif
    }
    template <int kOffset>
    __device__ __forceinline__ void store(const uint4& v) const {
        ptx::st_shared_v4<kOffset>(own, v);
#if MK_SM >= 90
        ptx::st_shared_cluster<kOffset>(other, v);
#endif
    }
    __device__ __forceinline__ void store(const uint2& v) const {
        ptx::st_shared_v2(own, v);
#if MK_SM >= 90
        ptx::st_shared_cluster<0>(other, v);
#endif
    }
    __device__ __forceinline__ void operator+=(int bytes) {
        own += bytes;
#if MK_SM >= 90
        other += bytes;
#endif
    }
    __device__ __forceinline__ SharedPlaces operator+(int bytes) const {
        SharedPlaces sum = *this;
        sum += bytes;
        return sum;
    }
};

// The groups of a quad: of each 8 adjacent elements a lane.
using XQuad = Vec8[kQuantQuadK / kQuantTileK];

// body(quad) for `size` k of a row from k = first on, a multiple of kQuantQuadK, by a warp; zeros
// past the row's end.
template <class Reader, class Body>
__device__ __forceinline__ void for_each_quad(const Reader& reader, int row, int first, int size,
                                              const Body& body) {
    const int lane_k = ptx::mov_u32_tid_x() % 32 * kVec;
    const float norm_scale = reader.norm_scale(row);
    auto at = reader.place(row, first + lane_k);
    int left = min(size, reader.a.k - first);
    const auto next = [&](auto is_whole) {
        XQuad quad{};
        static_for<4>([&](auto i) {
            if (is_whole || i * kQuantTileK + lane_k < left) {
                quad[i] = reader.template load<4>(at + i * kQuantTileK, norm_scale);
            }
        });
        body(quad);
        at += kQuantQuadK;
    };
    MK_NO_UNROLL
    for (; left >= 2 * kQuantQuadK; left -= 2 * kQuantQuadK) {
        next(Constant<1>());
        next(Constant<1>());
    }
    if (left >= kQuantQuadK) {
        next(Constant<1>());
        left -= kQuantQuadK;
    }
    if (left > 0) next(Constant<0>());
}

// Of which rows a warp has a share.
template <int kTokenTiles, class Body>
__device__ __forceinline__ void for_each_row(const XShare& share, uint32_t m, const Body& body) {
    if constexpr (kTokenTiles == 1) {  // no more rows than warps
        if (share.row < m) body(share.row);
    } else {
        MK_NO_UNROLL
        for (uint32_t row = share.row; row < m; row += share.warps) body(row);
    }
}

// The largest r^2 of each share of a row (quant_x.cuh).
template <int kTokenTiles, class Reader>
__device__ __forceinline__ void find_maxima(const Reader& reader, const QuantSmem& smem,
                                            const QuantDecodeShape& shape, const XShare& share) {
    const uint32_t m = reader.a.m;
    for_each_row<kTokenTiles>(share, m, [&](uint32_t row) {
        const int first = share.number * shape.x_share_k;
        XSquares<typename Reader::Type> squares;
        for_each_quad(reader, row, first, shape.x_share_k, [&](const XQuad& quad) {
            for (const Vec8& x : quad) squares.add(x);
            squares.end_quad();
        });
        const uint32_t largest = squares.largest();
        if (threadIdx.x % 32 == 0) {
            const uint32_t at = ptx::mov_b32(share.number * m + row);
            store_to_both(smem.maxima + at, largest, share.other_rank);
        }
    });
}

// Groups `first`, ... of all rows to shared memory.
template <int kTokenTiles, class Reader>
__device__ __forceinline__ void convert_groups(const Reader& reader, const QuantSmem& smem,
                                               const QuantDecodeShape& shape, const XShare& share,
                                               int first, int num_groups) {
    using Dtype = typename Reader::Type;
    const Product& a = reader.a;
    const int lane = ptx::mov_u32_tid_x() % 32, g = lane / 4, t = lane % 4;
    const GroupSumFragments ones(lane);
    for_each_row<kTokenTiles>(share, a.m, [&](uint32_t row) {
        const float norm_scale = reader.norm_scale(row);
        const uint32_t largest = lane < shape.x_shares ? smem.maxima[lane * a.m + row] : 0;
        const XScale scale =
            scale_of_row<Dtype>(__reduce_max_sync(0xFFFFFFFFu, largest), [&](const auto& body) {
                for_each_quad(reader, row, 0, a.k, [&](const XQuad& quad) {
                    for (const Vec8& x : quad) body(x);
                });
            });
        if (lane == 0) {  // each of the row's warps the same
            store_to_both(smem.unscale + ptx::mov_b32(row), scale.unscale, share.other_rank);
        }
        const XRowConvert<Dtype> convert(scale, lane);

        const int first_group = share.number * shape.x_share_groups;
        const int k = (first + first_group) * kQuantTileK;
        const int end_k = min((first + num_groups) * kQuantTileK, a.k);
        int left = min(shape.x_share_groups * kQuantTileK, end_k - k);
        auto at = reader.place(row, k + g * 32 + t * 4);
        const uint32_t to_lane =
            smem_address(smem.x) +
            (row * shape.x_stride + (first_group * kQuantXGroupBytes + lane * 16));
        SharedPlaces to(to_lane, share.other_rank);
        // Of blocks 2g and 2g + 1 of group t
        SharedPlaces to_sums = to + (t * (kQuantXGroupBytes - 16) + 512 - g * (64 - 8));
        // Four groups at a time: all of their sums are in columns of one MMA (quant_x.cuh).
        const auto batch = [&](auto is_whole) {
            const int there = is_whole ? kQuantQuadK : ptx::mov_b32(left);
            const int lane_k = is_whole ? 0 : ptx::mov_b32(g * 32);
            float sums[4]{};
            static_for<kXSumsGroups>([&](auto i) {
                if (i * kQuantTileK >= there) return;
                Vec8 v{};
                if (lane_k + i * kQuantTileK < there) {
                    v = reader.template load<16>(at + i * kQuantTileK, norm_scale);
                }
                const uint4 x = convert({v.pair[0], v.pair[1], v.pair[2], v.pair[3]});
                to.template store<i * kQuantXGroupBytes>(x);
                ones.add(sums, i, x);
            });
            if (is_whole || t * kQuantTileK < there) to_sums.store(split_sums(sums[0], sums[2]));
            at += kQuantQuadK;
            to += kXSumsGroups * kQuantXGroupBytes;
            to_sums += kXSumsGroups * kQuantXGroupBytes;
        };
        MK_NO_UNROLL
        for (; left >= 2 * kQuantQuadK; left -= 2 * kQuantQuadK) {
            batch(Constant<1>());
            batch(Constant<1>());
        }
        if (left >= kQuantQuadK) {
            batch(Constant<1>());
            left -= kQuantQuadK;
        }
        if (left > 0) batch(Constant<0>());
    });
}

// body(reader), of the kind that x takes.
template <class Dtype, class Body>
__device__ __forceinline__ void with_reader_of(const Product& a, const QuantSmem& smem,
                                               const Body& body) {
    if (!a.is_aligned) {
        a.norm_weight ? body(XReader<Dtype, false, true>{a, smem.norm_scale})
                      : body(XReader<Dtype, false, false>{a, smem.norm_scale});
    } else {
        a.norm_weight ? body(XReader<Dtype, true, true>{a, smem.norm_scale})
                      : body(XReader<Dtype, true, false>{a, smem.norm_scale});
    }
}
template <class Body>
__device__ __forceinline__ void with_reader(const Product& a, int dtype, const QuantSmem& smem,
                                            const Body& body) {
    dtype == MK_BF16 ? with_reader_of<Bf16>(a, smem, body) : with_reader_of<F16>(a, smem, body);
}

// All threads of the cluster, or of the block if there is none.
__device__ __forceinline__ void sync_cluster(const QuantDecodeShape& shape) {
    __syncthreads();
#if MK_SM >= 90
    if (shape.cluster > 1) {
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
    }
#endif
}

// With a norm the scales of all rows; smem.sums is used for that.
__device__ __forceinline__ void find_norm_scales(const Product& a, int dtype,
                                                 const QuantSmem& smem) {
    if (!a.norm_weight) return;
    auto* const sums = reinterpret_cast<float4*>(smem.sums);
    dtype == MK_BF16 ? row_scales<Bf16>(a, 0, a.m, sums, smem.norm_scale)
                     : row_scales<F16>(a, 0, a.m, sums, smem.norm_scale);
}

// Groups `first`, ... of all rows of x to shared memory, with their block sums; the first time, how
// large the rows are before that.
template <int kTokenTiles>
__device__ __forceinline__ void convert_x(const Product& a, int dtype, const QuantSmem& smem,
                                          const QuantDecodeShape& shape, const XShare& share,
                                          int first, int num_groups, bool is_first_time) {
    with_reader(a, dtype, smem, [&](const auto& reader) {
        if (is_first_time) {
            find_maxima<kTokenTiles>(reader, smem, shape, share);
            sync_cluster(shape);
        }
        convert_groups<kTokenTiles>(reader, smem, shape, share, first, num_groups);
    });
    sync_cluster(shape);
}

}  // namespace mk
