// The x of a decode kernel: converted by each block, into its shared memory.
//
//   1. how large each row is (and before it, with a norm, its scale)
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

static_assert(kXGroupBytes == kQuantXGroupBytes);

__device__ __forceinline__ uint32_t smem_address(const void* smem) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(smem));
}

struct QuantSmem {
    float* unscale;     // of each row of x: XScale
    uint32_t* maxima;   // of the sums of squares of shares of rows
    float* norm_scale;  // of each row
    uint8_t* scales;    // of this warp's tile
    uint8_t* x;
    uint8_t* sums;

    __device__ __forceinline__ QuantSmem(uint8_t* smem, int rows, int x_stride)
        : unscale(reinterpret_cast<float*>(smem)),
          maxima(reinterpret_cast<uint32_t*>(smem + 64)),
          norm_scale(reinterpret_cast<float*>(smem + 128)),
          scales(smem + kQuantRowsBytes + threadIdx.x / 32 * kQuantScaleBytes),
          x(smem + kQuantFixedBytes),
          sums(x + rows * x_stride) {}
};
static_assert(3 * 64 <= kQuantRowsBytes);

// ---- x ----

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

// body(8 adjacent elements of a lane) for groups of 256 k of a row, from k = first, by a warp.
template <class Reader, class Body>
__device__ __forceinline__ void for_each_of_row(const Reader& reader, int row, int first, int end,
                                                const Body& body) {
    const int k = reader.a.k, lane_k = first + ptx::mov_u32_tid_x() % 32 * kVec;
    const float norm_scale = reader.norm_scale(row);
    auto at = reader.place(row, lane_k);
    MK_NO_UNROLL
    for (; first + 4 * kQuantTileK <= min(end, k); first += 4 * kQuantTileK) {
        MK_UNROLL
        for (int i = 0; i < 4; ++i) body(reader.template load<4>(at + i * kQuantTileK, norm_scale));
        at += 4 * kQuantTileK;
    }
    MK_NO_UNROLL
    for (; first < min(end, k); first += kQuantTileK) {
        Vec8 v{};
        if (first + lane_k % kQuantTileK < k) v = reader.template load<4>(at, norm_scale);
        body(v);
        at += kQuantTileK;
    }
}

// The largest sum of squares of each share of a row (quant_x.cuh).
template <class Reader>
__device__ __forceinline__ void find_maxima(const Reader& reader, const QuantSmem& smem,
                                            const QuantDecodeShape& shape, const XShare& share) {
    const uint32_t m = reader.a.m;
    MK_NO_UNROLL
    for (uint32_t row = share.row; row < m; row += kQuantWarps) {
        const int first = share.number * shape.x_share_k;
        XSquares<typename Reader::Type> squares;
        for_each_of_row(reader, row, first, first + shape.x_share_k,
                        [&](const Vec8& v) { squares.add(v); });
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
    const int lane = ptx::mov_u32_tid_x() % 32, t = lane % 4;
    MK_NO_UNROLL
    for (uint32_t row = share.row; row < a.m; row += kQuantWarps) {
        const float norm_scale = reader.norm_scale(row);
        const uint32_t largest = lane < shape.x_shares ? smem.maxima[lane * a.m + row] : 0;
        const XScale scale = scale_of_row<Dtype>(
            __reduce_max_sync(0xFFFFFFFFu, largest),
            [&](const auto& body) { for_each_of_row(reader, row, 0, a.k, body); });
        if (share.number == 0 && lane == 0) smem.unscale[row] = scale.unscale;
        const XRowConvert<Dtype> convert(scale);

        const int first_group = share.number * shape.x_share_groups;
        int groups = min(shape.x_share_groups, num_groups - first_group);
        int k = (first + first_group) * kQuantTileK;
        auto at = reader.place(row, k + lane / 4 * 32 + t * 4);
        uint8_t* to = smem.x + row * shape.x_stride + first_group * kXGroupBytes;
        // Four groups at a time: all of their sums are in columns of one MMA (quant_x.cuh).
        const auto batch = [&](auto is_whole) {
            float sums[4]{};
            static_for<kXSumsGroups>([&](auto i) {
                if (!is_whole && i >= groups) return;
                Vec8 v{};
                if (is_whole || k + i * kQuantTileK + lane / 4 * 32 < a.k) {
                    v = reader.template load<16>(at + i * kQuantTileK, norm_scale);
                }
                const uint4 x = convert({v.pair[0], v.pair[1], v.pair[2], v.pair[3]});
                *reinterpret_cast<uint4*>(to + lane * 16 + i * kXGroupBytes) = x;
                add_group_sums(sums, lane, i, x);
            });
            if (is_whole || t < groups) {
                // Blocks 2g and 2g + 1 of group t: of lane g / 2 of four, its first or second pair
                const int g = lane / 4;
                uint8_t* const to_sums = to + t * kXGroupBytes + 512 + g / 2 * 16 + g % 2 * 4;
                const uint2 parts = split_sums(sums[0], sums[2]);
                *reinterpret_cast<uint32_t*>(to_sums) = parts.x;
                *reinterpret_cast<uint32_t*>(to_sums + 8) = parts.y;
            }
            at += kXSumsGroups * kQuantTileK;
            to += kXSumsGroups * kXGroupBytes;
            k += kXSumsGroups * kQuantTileK;
            groups -= kXSumsGroups;
        };
        MK_NO_UNROLL
        while (groups >= kXSumsGroups && k + kXSumsGroups * kQuantTileK <= a.k) {
            batch(Constant<1>());
        }
        MK_NO_UNROLL
        while (groups > 0) batch(Constant<0>());
    }
}

// body(reader), of the kind that x takes.
template <class Dtype, class Body>
__device__ __forceinline__ void with_x_reader(const Product& a, const QuantSmem& smem,
                                              const Body& body) {
    if (!a.is_aligned) {
        a.norm_weight ? body(XReader<Dtype, false, true>{a, smem.norm_scale})
                      : body(XReader<Dtype, false, false>{a, smem.norm_scale});
    } else {
        a.norm_weight ? body(XReader<Dtype, true, true>{a, smem.norm_scale})
                      : body(XReader<Dtype, true, false>{a, smem.norm_scale});
    }
}

template <class Dtype>
__device__ __forceinline__ void find_x_maxima(const Product& a, const QuantSmem& smem,
                                              const QuantDecodeShape& shape, const XShare& share) {
    with_x_reader<Dtype>(a, smem,
                         [&](const auto& reader) { find_maxima(reader, smem, shape, share); });
    __syncthreads();
}

// Groups `first`, ... of all rows of x to shared memory, with their block sums.
template <class Dtype>
__device__ __forceinline__ void convert_x(const Product& a, const QuantSmem& smem,
                                          const QuantDecodeShape& shape, const XShare& share,
                                          int first, int num_groups) {
    with_x_reader<Dtype>(a, smem, [&](const auto& reader) {
        convert_groups(reader, smem, shape, share, first, num_groups);
    });
    __syncthreads();
}

}  // namespace mk
