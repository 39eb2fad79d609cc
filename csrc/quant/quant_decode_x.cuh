// The x of a decode kernel: converted by each block, into its shared memory.
//
//   1. how large each row is (and before it, with a norm, its scale), by quads of 1024 k
//   2. x16 of a chunk of k, in the order of quant_x.cuh, and its block sums, by MMAs with ones
//
// Up to kQuantWarps / m warps share a row (XShare).
// Rows come from L2 twice (with a norm three times): they are few, and w comes from DRAM meanwhile.
#pragma once

#include "common/static_for.cuh"
#include "linear/linear_norm.cuh"
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
    uint8_t* scales;    // of this warp's tile
    uint8_t* x;
    uint8_t* sums;

    __device__ __forceinline__ QuantSmem(uint8_t* smem, int num_rows, int x_stride)
        : rows(smem),
          unscale(reinterpret_cast<float*>(smem + kQuantRowsBytes - 256)),
          maxima(reinterpret_cast<uint32_t*>(unscale + 16)),
          norm_scale(unscale + 32),
          in_pairs(reinterpret_cast<bool*>(unscale + 48)),
          scales(smem + kQuantRowsBytes + threadIdx.x / 32 * kQuantScaleBytes),
          x(smem + kQuantFixedBytes),
          sums(x + num_rows * x_stride) {}
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

// What a warp has of x: groups of a row, and of every kQuantWarps'th after it. Not less than m:
// nothing.
struct XShare {
    uint32_t number, row;

    __device__ __forceinline__ XShare(uint32_t m, uint32_t shares) {
        const uint32_t warp = threadIdx.x / 32;
        number = warp / m;
        row = number < shares ? warp - number * m : m;
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

// The largest r^2 of each share of a row (quant_x.cuh).
template <class Reader>
__device__ __forceinline__ void find_maxima(const Reader& reader, const QuantSmem& smem,
                                            const QuantDecodeShape& shape, const XShare& share) {
    const uint32_t m = reader.a.m;
    MK_NO_UNROLL
    for (uint32_t row = share.row; row < m; row += kQuantWarps) {
        const int first = share.number * shape.x_share_k;
        XSquares<typename Reader::Type> squares;
        for_each_quad(reader, row, first, shape.x_share_k, [&](const XQuad& quad) {
            for (const Vec8& x : quad) squares.add(x);
            squares.end_quad();
        });
        const uint32_t largest = squares.largest();
        if (threadIdx.x % 32 == 0) smem.maxima[share.number * m + row] = largest;
    }
}

// Groups `first`, ... of all rows to shared memory.
template <class Reader>
__device__ __forceinline__ void convert_groups(const Reader& reader, const QuantSmem& smem,
                                               const QuantDecodeShape& shape, const XShare& share,
                                               int first, int num_groups) {
    using Dtype = typename Reader::Type;
    const Product& a = reader.a;
    const int lane = ptx::mov_u32_tid_x() % 32, g = lane / 4, t = lane % 4;
    const GroupSumFragments ones(lane);
    MK_NO_UNROLL
    for (uint32_t row = share.row; row < a.m; row += kQuantWarps) {
        const float norm_scale = reader.norm_scale(row);
        const uint32_t largest = lane < shape.x_shares ? smem.maxima[lane * a.m + row] : 0;
        const XScale scale =
            scale_of_row<Dtype>(__reduce_max_sync(0xFFFFFFFFu, largest), [&](const auto& body) {
                for_each_quad(reader, row, 0, a.k, [&](const XQuad& quad) {
                    for (const Vec8& x : quad) body(x);
                });
            });
        if (lane == 0) smem.unscale[row] = scale.unscale;  // each of the row's warps the same
        const XRowConvert<Dtype> convert(scale);

        const int first_group = share.number * shape.x_share_groups;
        const int groups = min(num_groups - first_group, shape.x_share_groups);
        const int k = (first + first_group) * kQuantTileK;
        int left = min(groups * kQuantTileK, a.k - k);
        auto at = reader.place(row, k + g * 32 + t * 4);
        uint8_t* const to_row = smem.x + row * shape.x_stride + first_group * kQuantXGroupBytes;
        uint8_t* to = to_row + lane * 16;
        // Of blocks 2g and 2g + 1 of group t
        uint8_t* to_sums = to_row + t * kQuantXGroupBytes + 512 + g * 8;
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
                *reinterpret_cast<uint4*>(to + i * kQuantXGroupBytes) = x;
                ones.add(sums, i, x);
            });
            if (is_whole || t * kQuantTileK < there) {
                *reinterpret_cast<uint2*>(to_sums) = split_sums(sums[0], sums[2]);
            }
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
    }
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

// How large the rows are, and with a norm their scales; smem.sums is used for that.
__device__ __forceinline__ void find_x_maxima(const Product& a, int dtype, const QuantSmem& smem,
                                              const QuantDecodeShape& shape, const XShare& share) {
    if (a.norm_weight) {
        auto* const sums = reinterpret_cast<float4*>(smem.sums);
        dtype == MK_BF16 ? row_scales<Bf16>(a, 0, a.m, sums, smem.norm_scale)
                         : row_scales<F16>(a, 0, a.m, sums, smem.norm_scale);
    }
    with_reader(a, dtype, smem,
                [&](const auto& reader) { find_maxima(reader, smem, shape, share); });
    __syncthreads();
}

// Groups `first`, ... of all rows of x to shared memory, with their block sums.
__device__ __forceinline__ void convert_x(const Product& a, int dtype, const QuantSmem& smem,
                                          const QuantDecodeShape& shape, const XShare& share,
                                          int first, int num_groups) {
    with_reader(a, dtype, smem, [&](const auto& reader) {
        convert_groups(reader, smem, shape, share, first, num_groups);
    });
    __syncthreads();
}

}  // namespace mk
