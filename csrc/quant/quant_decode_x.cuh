// The x of a decode kernel: converted by each block, into its shared memory.
//
//   1. how large each row is (and before it, with a norm, its scale), by quads of 1024 k
//   2. x16 of a chunk of k, in the order of quant_x.cuh, and its block sums, by MMAs with ones
//
// Up to kQuantWarps / m warps share a row (XShare); from sm_90 on and for more than 4 rows those of
// the two blocks of a cluster, each of which stores what it converts to both.
// A share of up to kQuantKeptQuads quads stays in registers from 1 to 2, which has no loops then;
// else rows come from L2 twice (with a norm once more). They are few, and w comes from DRAM
// meanwhile.
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

// A piece of x that a lane takes, normalised if there is a norm: elements 0 ... 3 and 16 ... 19
// from its place on. k is a multiple of 32, and both are in the row or past its end together.
template <class Dtype, bool kIsAligned, bool kHasNorm>
struct XReader {
    using Type = Dtype;
    static constexpr bool kHasWholeQuads = kIsAligned;  // loops for them
    const Product& a;
    const float* smem_norm_scale;

    // One reader for all that is not aligned.
    __device__ __forceinline__ bool has_norm() const {
        return kHasNorm && (kIsAligned || a.norm_weight);
    }
    __device__ __forceinline__ float norm_scale(int row) const {
        return has_norm() ? smem_norm_scale[row] : 0.f;
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
    // Of a lane's piece of the group at k.
    __device__ __forceinline__ Place place(int row, int k, int lane) const {
        k += quant_piece_k(lane);
        return {static_cast<const uint16_t*>(row_of(a.x, row, a.x_stride)) + k,
                static_cast<const uint16_t*>(a.norm_weight) + (kHasNorm ? k : 0)};
    }

    __device__ __forceinline__ Vec8 load(const Place& at, float norm_scale) const {
        const Vec8 v = load_from(at.x);
        if (!has_norm()) return v;
        return normalise<Dtype>(v, norm_scale, load_from(at.weight));
    }

  private:
    static __device__ __forceinline__ Vec8 load_from(const uint16_t* x) {
        if constexpr (kIsAligned) {
            const uint2 low = *reinterpret_cast<const uint2*>(x);
            const uint2 high = *reinterpret_cast<const uint2*>(x + 16);
            return {low.x, low.y, high.x, high.y};
        }
        const auto pair = [x](int i) { return x[i] | static_cast<uint32_t>(x[i + 1]) << 16; };
        return {pair(0), pair(2), pair(16), pair(18)};
    }
};

// Shared memory of the other block of the cluster, if there is one.
struct OtherBlock {
    bool is_there = false;
    uint32_t distance = 0;  // from an address of this block to the same place there

    template <int kOffset = 0, class T>
    __device__ __forceinline__ void store([[maybe_unused]] uint32_t at,
                                          [[maybe_unused]] const T& v) const {
#if MK_SM >= 90
        ptx::st_shared_cluster<kOffset>(at + distance, v);
#endif
    }
};

// What a warp has of x: groups of a row, and of every `warps`'th after it; the warps are those of
// the cluster. Not less than m: nothing.
struct XShare {
    uint32_t number, row, warps;
    OtherBlock other;

    __device__ __forceinline__ XShare(uint32_t m, const QuantDecodeShape& shape,
                                      [[maybe_unused]] uint32_t smem) {
        uint32_t warp = threadIdx.x / 32;
        warps = kQuantWarps;
#if MK_SM >= 90
        other.is_there = shape.cluster > 1;
        if (other.is_there) {
            const uint32_t rank = ptx::mov_u32_cluster_ctarank();
            other.distance = ptx::mapa_shared_cluster(smem, 1 - rank) - smem;
            warp += rank * kQuantWarps;
            warps *= 2;
        }
#endif
        number = warp / m;
        row = number < static_cast<uint32_t>(shape.x_shares) ? warp - number * m : m;
    }

    // To this block's shared memory, and that of the other one.
    template <class T>
    __device__ __forceinline__ void store(T* at, const T& v) const {
        *at = v;
        if (other.is_there) other.store(smem_address(at), v);
    }
};

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

// A lane's pieces of the groups of a quad.
using XQuad = Vec8[kXSumsGroups];

__device__ __forceinline__ void set_zero(XQuad& quad) {
    for (Vec8& x : quad) x = {};
}

// piece(i): a lane's piece of group i of the quad; `left`: how many k of the quad the row has.
template <class Dtype, class Piece, class Left>
__device__ __forceinline__ void add_quad(XSquares<Dtype>& squares, const Piece& piece, Left left) {
    static_for<kXSumsGroups>([&](auto i) {
        if (i * kQuantTileK < left) squares.add(piece(i));
    });
    squares.end_quad();
}

// For `left` k of a row from k = first on, by a warp: body(piece, left, i), and step(n) after n of
// them, i = 0 ... n - 1.
template <class Reader, class Body, class Step>
__device__ __forceinline__ void for_each_quad(const Reader& reader, int row, int first, int left,
                                              int lane, const Body& body, const Step& step) {
    const float norm_scale = reader.norm_scale(row);
    auto at = reader.place(row, first, lane);
    const auto whole = [&](auto count) {
        static_for<count>([&](auto quad) {
            const auto piece = [&](auto i) {
                return reader.load(at + (quad * kQuantQuadK + i * kQuantTileK), norm_scale);
            };
            body(piece, Constant<kQuantQuadK>(), quad);
        });
        at += count * kQuantQuadK;
        left -= count * kQuantQuadK;
        step(count);
    };
    const auto partial = [&] {
        const int there = ptx::mov_b32(left), lane_k = ptx::mov_b32(lane / 4 * 32);
        const auto piece = [&](auto i) {
            Vec8 v{};
            if (lane_k + i * kQuantTileK < there) v = reader.load(at + i * kQuantTileK, norm_scale);
            return v;
        };
        body(piece, there, Constant<0>());
    };
    if constexpr (Reader::kHasWholeQuads) {
        MK_NO_UNROLL
        while (left >= 2 * kQuantQuadK) whole(Constant<2>());
        if (left >= kQuantQuadK) whole(Constant<1>());
        if (left > 0) partial();
    } else {
        MK_NO_UNROLL
        for (; left > 0; left -= kQuantQuadK) {
            partial();
            at += kQuantQuadK;
            step(1);
        }
    }
}

// body(piece) for all groups of a row, by a warp.
template <class Reader, class Body>
__device__ __forceinline__ void for_each_piece(const Reader& reader, int row, int lane,
                                               const Body& body) {
    const float norm_scale = reader.norm_scale(row);
    auto at = reader.place(row, 0, lane);
    MK_NO_UNROLL
    for (int left = reader.a.k - lane / 4 * 32; left > 0; left -= kQuantTileK) {
        body(reader.load(at, norm_scale));
        at += kQuantTileK;
    }
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

// The place of a share's largest r^2 of a row (quant_x.cuh).
__device__ __forceinline__ void store_largest(const QuantSmem& smem, const XShare& share,
                                              uint32_t m, uint32_t row, uint32_t largest,
                                              int lane) {
    if (lane == 0) share.store(smem.maxima + ptx::mov_b32(share.number * m + row), largest);
}
__device__ __forceinline__ uint32_t load_largest(const QuantSmem& smem,
                                                 const QuantDecodeShape& shape, uint32_t m,
                                                 uint32_t row, int lane) {
    const uint32_t largest = lane < shape.x_shares ? smem.maxima[lane * m + row] : 0;
    return __reduce_max_sync(0xFFFFFFFFu, largest);
}

// A row on its way to shared memory.
template <class Dtype>
struct XRow {
    XRowConvert<Dtype> convert;
    GroupSumFragments ones;
    OtherBlock other;
    int t;
    uint32_t to, to_sums;  // this lane's: of the next quad's pieces, and of its sums of group t

    // largest: r^2 of the row; first_group: of its groups in shared memory.
    template <class Reader>
    __device__ __forceinline__ XRow(const Reader& reader, const QuantSmem& smem,
                                    const QuantDecodeShape& shape, const XShare& share,
                                    uint32_t row, uint32_t largest, int first_group, int lane)
        : XRow(scale_of_row<Dtype>(
                   largest, [&](const auto& body) { for_each_piece(reader, row, lane, body); }),
               smem, shape, share, row, first_group, lane) {}

    // Of blocks 2g and 2g + 1 of group t; `left`: elements that the row has from here on.
    template <int kQuad, class Piece, class Left>
    __device__ __forceinline__ void store(const Piece& piece, Left left) const {
        constexpr int kAt = kQuad * kXSumsGroups * kQuantXGroupBytes;
        float sums[4]{};
        // All of their sums are in columns of one MMA (quant_x.cuh).
        static_for<kXSumsGroups>([&](auto i) {
            if (i * kQuantTileK >= left) return;
            const Vec8 v = piece(i);
            const uint4 x = convert({v.pair[0], v.pair[1], v.pair[2], v.pair[3]});
            ptx::st_shared_v4<kAt + i * kQuantXGroupBytes>(to, x);
            if (other.is_there) other.store<kAt + i * kQuantXGroupBytes>(to, x);
            ones.add(sums, i, x);
        });
        if (left < kQuantQuadK && t * kQuantTileK >= left) return;
        const uint2 split = split_sums(sums[0], sums[2]);
        ptx::st_shared_v2<kAt>(to_sums, split);
        if (other.is_there) other.store<kAt>(to_sums, split);
    }

  private:
    __device__ __forceinline__ XRow(const XScale& scale, const QuantSmem& smem,
                                    const QuantDecodeShape& shape, const XShare& share,
                                    uint32_t row, int first_group, int lane)
        : convert(scale, lane),
          ones(lane),
          other(share.other),
          t(lane % 4),
          to(smem_address(smem.x) +
             (row * shape.x_stride + (first_group * kQuantXGroupBytes + lane * 16))),
          to_sums(to + (t * (kQuantXGroupBytes - 16) + 512 - lane / 4 * (64 - 8))) {
        if (lane == 0) {  // each of the row's warps the same
            share.store(smem.unscale + ptx::mov_b32(row), scale.unscale);
        }
    }
};

// The largest r^2 of each share of a row.
template <int kTokenTiles, class Reader>
__device__ __forceinline__ void find_maxima(const Reader& reader, const QuantSmem& smem,
                                            const QuantDecodeShape& shape, const XShare& share) {
    const uint32_t m = reader.a.m;
    const int lane = ptx::mov_u32_tid_x() % 32;
    for_each_row<kTokenTiles>(share, m, [&](uint32_t row) {
        const int first = share.number * shape.x_share_k;
        XSquares<typename Reader::Type> squares;
        const auto add = [&](const auto& piece, auto left, int) { add_quad(squares, piece, left); };
        for_each_quad(reader, row, first, min(shape.x_share_k, reader.a.k - first), lane, add,
                      [](int) {});
        store_largest(smem, share, m, row, squares.largest(), lane);
    });
}

// Groups `first`, ... of all rows to shared memory.
template <int kTokenTiles, class Reader>
__device__ __forceinline__ void convert_groups(const Reader& reader, const QuantSmem& smem,
                                               const QuantDecodeShape& shape, const XShare& share,
                                               int first, int num_groups) {
    const uint32_t m = reader.a.m;
    const int lane = ptx::mov_u32_tid_x() % 32;
    for_each_row<kTokenTiles>(share, m, [&](uint32_t row) {
        const uint32_t largest = load_largest(smem, shape, m, row, lane);
        const int first_group = share.number * shape.x_share_groups;
        XRow<typename Reader::Type> x(reader, smem, shape, share, row, largest, first_group, lane);
        const int k = (first + first_group) * kQuantTileK;
        const int end_k = min((first + num_groups) * kQuantTileK, reader.a.k);
        for_each_quad(
            reader, row, k, min(shape.x_share_groups * kQuantTileK, end_k - k), lane,
            [&](const auto& piece, auto left, auto i) { x.template store<i>(piece, left); },
            [&](int quads) {
                x.to += quads * (kXSumsGroups * kQuantXGroupBytes);
                x.to_sums += quads * (kXSumsGroups * kQuantXGroupBytes);
            });
    });
}

// All groups of all rows to shared memory, of shares that stay in registers (QuantDecodeShape):
// whole quads.
template <int kTokenTiles, class Reader>
__device__ __forceinline__ void convert_kept(const Reader& reader, const QuantSmem& smem,
                                             const QuantDecodeShape& shape, const XShare& share) {
    using Dtype = typename Reader::Type;
    const uint32_t m = reader.a.m;
    const int lane = ptx::mov_u32_tid_x() % 32;
    const int first = ptx::mov_b32(share.number) * shape.x_share_k;
    const int left = share.row < m ? min(shape.x_share_k, reader.a.k - first) : 0;
    constexpr Constant<kQuantQuadK> whole;
    XQuad quads[kQuantKeptQuads];
    const auto load = [&](uint32_t row) {
        const float norm_scale = reader.norm_scale(row);
        const auto at = reader.place(row, first, lane);
        XSquares<Dtype> squares;
        static_for<kQuantKeptQuads>([&](auto i) {
            if (left > i * kQuantQuadK) {
                static_for<kXSumsGroups>([&](auto group) {
                    constexpr int k = i * kQuantQuadK + group * kQuantTileK;
                    quads[i][group] = reader.load(at + k, norm_scale);
                });
                add_quad(squares, [&](int group) { return quads[i][group]; }, whole);
            } else {  // not left undefined: see multiply_columns
                set_zero(quads[i]);
            }
        });
        return squares.largest();
    };
    const auto convert = [&](uint32_t row, uint32_t largest) {
        const XRow<Dtype> x(reader, smem, shape, share, row, largest,
                            share.number * shape.x_share_groups, lane);
        static_for<kQuantKeptQuads>([&](auto i) {
            if (left <= i * kQuantQuadK) return;
            x.template store<i>([&](int group) { return quads[i][group]; }, whole);
        });
    };
    if constexpr (kTokenTiles == 1) {
        const uint32_t row = ptx::mov_b32(share.row);
        if (left > 0) {
            store_largest(smem, share, m, row, load(row), lane);
        } else {
            for (XQuad& quad : quads) set_zero(quad);
        }
        sync_cluster(shape);
        if (left > 0) convert(row, load_largest(smem, shape, m, row, lane));
    } else {  // a share is a row
        for_each_row<kTokenTiles>(share, m, [&](uint32_t row) { convert(row, load(row)); });
    }
}

// body(reader), of the kind that x takes.
template <class Dtype, class Body>
__device__ __forceinline__ void with_reader_of(const Product& a, const QuantSmem& smem,
                                               const Body& body) {
    if (!a.is_aligned) {
        body(XReader<Dtype, false, true>{a, smem.norm_scale});
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
        using Reader = std::decay_t<decltype(reader)>;
        if constexpr (Reader::kHasWholeQuads) {
            if (shape.keeps_x) {
                convert_kept<kTokenTiles>(reader, smem, shape, share);
                return;
            }
        }
        if (is_first_time) {
            find_maxima<kTokenTiles>(reader, smem, shape, share);
            sync_cluster(shape);
        }
        convert_groups<kTokenTiles>(reader, smem, shape, share, first, num_groups);
    });
    sync_cluster(shape);
}

}  // namespace mk
