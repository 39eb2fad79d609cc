// The x of a decode kernel: converted by each block, into its shared memory.
//
//   1. each row's largest magnitude (and before it, with a norm, its scale): warps share the rows
//   2. x16 of a chunk of k, in the order of quant_x.cuh, a warp a group of 256 k of a row
//   3. its block sums, by MMAs with ones, from shared memory
//
// Rows come from L2 twice (with a norm three times): they are few, and w comes from DRAM meanwhile.
// Of 4096 k counted per element: 1.3 instructions for 1, 1.9 for 2, 0.8 for 3.
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
    XScale* x_scale;    // of each row of x
    uint32_t* maxima;   // of shares of rows
    float* norm_scale;  // of each row
    uint8_t* scales;    // of this warp's tile
    uint8_t* x;
    uint8_t* sums;

    __device__ __forceinline__ QuantSmem(uint8_t* smem, int rows, int x_stride)
        : x_scale(reinterpret_cast<XScale*>(smem)),
          maxima(reinterpret_cast<uint32_t*>(smem + 256)),
          norm_scale(reinterpret_cast<float*>(smem + 256 + 64)),
          scales(smem + kQuantRowsBytes + threadIdx.x / 32 * kQuantScaleBytes),
          x(smem + kQuantFixedBytes),
          sums(x + rows * x_stride) {}
};
static_assert(sizeof(XScale) * 16 == 256 && 256 + 64 + 64 <= kQuantRowsBytes);

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

// How each row is converted, from its largest magnitude: warps take a share of a row each.
template <class Reader>
__device__ __forceinline__ void find_maxima(const Reader& reader, const QuantSmem& smem,
                                            int shares) {
    using Dtype = typename Reader::Type;
    const Product& a = reader.a;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int num_groups = a.k / kQuantTileK, share_groups = (num_groups + shares - 1) / shares;
    for (int unit = warp; unit < shares * a.m; unit += kQuantWarps) {
        const int share = unit / a.m, row = unit - share * a.m;
        const float norm_scale = reader.norm_scale(row);
        const int first = share * share_groups;
        auto at = reader.place(row, first * kQuantTileK + lane * kVec);
        uint32_t largest = 0;
        const auto add = [&] {
            const Vec8 v = reader.template load<4>(at, norm_scale);
            MK_UNROLL
            for (const uint32_t pair : v.pair) {
                largest = max_magnitudes<Dtype>(largest, magnitudes(pair));
            }
            at += kQuantTileK;
        };
        int groups = min(share_groups, num_groups - first);
        for (; groups >= 4; groups -= 4) {
            add();
            add();
            add();
            add();
        }
        for (; groups > 0; --groups) add();
        if (share == 0 && num_groups * kQuantTileK + lane * kVec < a.k) {  // the last, a short one
            at = reader.place(row, num_groups * kQuantTileK + lane * kVec);
            add();
        }
        largest = __reduce_max_sync(0xFFFFFFFFu, larger_half(largest));
        if (lane == 0) smem.maxima[unit] = largest;
    }
}

// Groups `first`, ... of all rows to shared memory: a warp takes the 32 pieces of a group of a row.
template <class Reader>
__device__ __forceinline__ void convert_groups(const Reader& reader, const QuantSmem& smem,
                                               int x_stride, int first, int num_groups) {
    using Dtype = typename Reader::Type;
    const Product& a = reader.a;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int lane_k = lane / 4 * 32 + lane % 4 * 4;
    const int whole_groups = min(num_groups, a.k / kQuantTileK - first);
    for (int row = 0; row < a.m; ++row) {
        const float norm_scale = reader.norm_scale(row);
        const XRowConvert<Dtype> convert(smem.x_scale[row]);
        int group = (warp + row) % kQuantWarps;
        auto at = reader.place(row, (first + group) * kQuantTileK + lane_k);
        uint8_t* to = smem.x + row * x_stride + group * kXGroupBytes + lane * 16;
        const auto store = [&](const Vec8& v) {
            *reinterpret_cast<uint4*>(to) = convert({v.pair[0], v.pair[1], v.pair[2], v.pair[3]});
        };
        const auto next = [&] {
            store(reader.template load<16>(at, norm_scale));
            at += kQuantWarps * kQuantTileK;
            to += kQuantWarps * kXGroupBytes;
            group += kQuantWarps;
        };
        while (group + kQuantWarps < whole_groups) {
            next();
            next();
        }
        if (group < whole_groups) next();
        if (group == whole_groups && group < num_groups) {  // a short one
            const bool is_inside = (first + group) * kQuantTileK + lane_k < a.k;
            store(is_inside ? reader.template load<16>(at, norm_scale) : Vec8{});
        }
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
__device__ __forceinline__ void find_x_scales(const Product& a, const QuantSmem& smem) {
    const int shares = max(kQuantWarps / a.m, 1);  // of a row
    with_x_reader<Dtype>(a, smem, [&](const auto& reader) { find_maxima(reader, smem, shares); });
    __syncthreads();
    if (threadIdx.x < a.m) {
        uint32_t largest = 0;
        for (int i = 0; i < shares; ++i) {
            largest = max(largest, smem.maxima[i * a.m + threadIdx.x]);
        }
        smem.x_scale[threadIdx.x] = XConvert<Dtype>::scale(largest);
    }
    __syncthreads();
}

// Groups `first`, ... of all rows of x to shared memory, with their block sums.
template <class Dtype>
__device__ __forceinline__ void convert_x(const Product& a, const QuantSmem& smem, int x_stride,
                                          int first, int num_groups) {
    with_x_reader<Dtype>(a, smem, [&](const auto& reader) {
        convert_groups(reader, smem, x_stride, first, num_groups);
    });
    __syncthreads();

    // Columns of the MMAs are groups of rows here: 8 of all of them.
    const int thread = ptx::mov_u32_tid_x();
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
    const int num_columns = a.m * num_groups;
    if (warp * 8 < num_columns) {
        const auto group = [&](int column) {
            const int row = column / num_groups;
            return smem.x + row * x_stride + (column - row * num_groups) * kXGroupBytes;
        };
        const BlockSumFragments ones(lane);
        for (int column = warp * 8; column < num_columns; column += kQuantWarps * 8) {
            const uint8_t* const x = group(min(column + g, num_columns - 1)) + t * 16;
            float d[4]{};
            MK_UNROLL
            for (int i = 0; i < 8; ++i) {
                ones.add(d, i, *reinterpret_cast<const uint4*>(x + i * 64));
            }
            MK_UNROLL
            for (int i = 0; i < 2; ++i) {
                if (column + 2 * t + i >= num_columns) continue;
                // Blocks 2g and 2g + 1: of lane g / 2 of four, its first or second pair
                uint8_t* const to = group(column + 2 * t + i) + 512 + g / 2 * 16 + g % 2 * 4;
                const uint2 parts = split_sums(d[i], d[2 + i]);
                *reinterpret_cast<uint32_t*>(to) = parts.x;
                *reinterpret_cast<uint32_t*>(to + 8) = parts.y;
            }
        }
    }
    __syncthreads();
}

}  // namespace mk
