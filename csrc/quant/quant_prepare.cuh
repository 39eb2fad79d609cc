// x as the GEMM with quantised weights takes it: normalised where asked for, x16 and its block sums
// in the order of the MMA's fragments (quant_x.cuh has the arithmetic, quant_gemm_tiles.h the
// workspace).
//
//   block: 8 rows of x, all of k      x      | 256 k  | 256 k  | ...
//   1. warp w: row w: its scales      row 0  | warp 0 | warp 1 |
//   2. warp w: 8 rows of groups       ...    |        |        |
//      w, w + 8, ... of 256 k         row 7  |        |        |
//
// In step 2 a lane has twice 4 elements of a row, which are its 16 bytes of the fragments of 32 k:
// 32 bytes of a row are read at once, 512 written; on sm_90 these go through shared memory, for
// wgmma's order. A row is read two or three times, first from L2 and then from L1. Rows past m give
// zeros.
#pragma once

#include "linear/linear_norm.cuh"
#include "ptx/sm90.cuh"
#include "quant/quant_gemm_tiles.h"
#include "quant/quant_x.cuh"

namespace mk {

// Elements k ... k + 3 of a row as two pairs, zeros past its end.
__device__ __forceinline__ uint2 load4(const void* row, int k, int size, bool is_aligned) {
    const auto* const element = static_cast<const uint16_t*>(row) + k;
    if (k + 4 <= size && is_aligned) return *reinterpret_cast<const uint2*>(element);
    uint2 v{};
    if (k < size) v.x = element[0];
    if (k + 1 < size) v.x |= uint32_t{element[1]} << 16;
    if (k + 2 < size) v.y = element[2];
    if (k + 3 < size) v.y |= uint32_t{element[3]} << 16;
    return v;
}

// A lane's part of 32 k: elements k ... k + 3 and k + 16 ... k + 19.
__device__ __forceinline__ Vec8 load_piece_of_x(const void* row, int k, const Product& a) {
    const uint2 low = load4(row, k, a.k, a.is_aligned);
    const uint2 high = load4(row, k + 16, a.k, a.is_aligned);
    return {low.x, low.y, high.x, high.y};
}

// 1 / rms of a row, by a warp, with the bits of mk_rms_norm.
template <class Dtype>
__device__ __forceinline__ float rms_of_row(const Product& a, const void* row) {
    const int lane = threadIdx.x % 32;
    float4 total{};
    for (int first = 0; first < a.k; first += kNormQuad) {
        Vec8 v[4]{};
        MK_UNROLL
        for (int i = 0; i < 4; ++i) {
            const int k = first + (i * 32 + lane) * kVec;
            if (k < a.k) {
                v[i] = a.is_aligned ? load8<true, Reuse::kOften>(row, k, a.k)
                                    : load8<false>(row, k, a.k);
            }
        }
        const float4 sums = {sum_of_squares<Dtype>(v[0]), sum_of_squares<Dtype>(v[1]),
                             sum_of_squares<Dtype>(v[2]), sum_of_squares<Dtype>(v[3])};
        total = {total.x + sums.x, total.y + sums.y, total.z + sums.z, total.w + sums.w};
    }
    return rms_scale(total, a.k, a.eps);
}

// The row's pieces, normalised where asked for.
template <class Dtype>
struct PreparedRow {
    const Product& a;
    const void* row;
    float norm_scale;

    __device__ __forceinline__ Vec8 piece(int k) const {
        const Vec8 x = load_piece_of_x(row, k, a);
        if (!a.norm_weight) return x;
        return normalise<Dtype>(x, norm_scale, load_piece_of_x(a.norm_weight, k, a));
    }

    // body(piece of a lane) for all of the row, by a warp; end_quad() after each quad.
    template <class Body, class End>
    __device__ __forceinline__ void for_each(const Body& body, const End& end_quad) const {
        MK_NO_UNROLL
        for (int first = 0; first < a.k; first += kQuantTileK) {
            body(piece(first + quant_piece_k(threadIdx.x % 32)));
            if ((first + kQuantTileK) % kQuantQuadK == 0) end_quad();
        }
        end_quad();
    }

    __device__ __forceinline__ XScale scale() const {
        XSquares<Dtype> squares;
        for_each([&](const Vec8& v) { squares.add(v); }, [&] { squares.end_quad(); });
        return scale_of_row<Dtype>(squares.largest(),
                                   [&](const auto& body) { for_each(body, [] {}); });
    }
};

// A warp's 512 bytes of B, as its lanes have them, to memory in the order of the workspace.
// `smem`: 512 bytes of the warp, not those of the call before.
__device__ __forceinline__ void store_b(uint8_t* to, const uint4& x, uint8_t* smem) {
    const int lane = threadIdx.x % 32;
#if MK_SM == 90
    const uint32_t piece = static_cast<uint32_t>(__cvta_generic_to_shared(smem)) + lane * 16;
    ptx::stmatrix_x4(piece, {x.x, x.y, x.z, x.w});
    __syncwarp();
    ptx::st_global_v4(to + lane * 16, ptx::ld_shared_v4(piece));
#else
    ptx::st_global_v4(to + lane * 16, x);
#endif
}

// The sums of a row's blocks 2g and 2g + 1, to those of 8 rows.
__device__ __forceinline__ void store_sums(uint8_t* to, int row, int g, uint2 high_and_low) {
#if MK_SM == 90
    uint8_t* const high = to + g % 2 * 128 + row * 16 + g / 2 * 4;
    *reinterpret_cast<uint32_t*>(high) = high_and_low.x;
    *reinterpret_cast<uint32_t*>(high + 256) = high_and_low.y;
#else
    *reinterpret_cast<uint2*>(to + row * 64 + g * 8) = high_and_low;
#endif
}

template <class Dtype>
__device__ __forceinline__ void quant_prepare_x(const QuantPrepareArgs& args) {
    __shared__ float smem_norm_scale[kPrepareRows];
    __shared__ XScale smem_scale[kPrepareRows];
    // Of a warp, two that take turns.
    __shared__ __align__(16) uint8_t smem_b[MK_SM == 90 ? kPrepareRows : 1][2][512];
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();

    const Product& a = args.product;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int g = lane / 4, t = lane % 4;
    const int first_row = blockIdx.x * kPrepareRows;
    const auto prepared_row = [&](int r, float norm_scale) -> PreparedRow<Dtype> {
        return {a, row_of(a.x, first_row + r, a.x_stride), norm_scale};
    };

    if (first_row + warp < a.m) {
        PreparedRow<Dtype> row = prepared_row(warp, 0.f);
        if (a.norm_weight) row.norm_scale = rms_of_row<Dtype>(a, row.row);
        const XScale scale = row.scale();
        if (lane == 0) {
            smem_norm_scale[warp] = row.norm_scale;
            smem_scale[warp] = scale;
            args.to.unscale[first_row + warp] = scale.unscale;
        }
    } else if (lane == 0) {
        args.to.unscale[first_row + warp] = 0.f;
    }
    __syncthreads();

    const bool has_row = first_row + g < a.m;
    const PreparedRow<Dtype> row = prepared_row(g, has_row ? smem_norm_scale[g] : 0.f);
    const XScale scale = has_row ? smem_scale[g] : XScale{};
    const BlockSumFragments ones(lane);

    const int64_t row_block = first_row / kPreparedRows;
    const int tile = first_row % kPreparedRows / 8;
    uint8_t* const x16 =
        args.to.x16 + row_block * args.to.quarters * kPreparedX16Bytes + tile * 1024;
    uint8_t* const sums =
        args.to.sums + row_block * args.to.groups * kPreparedSumsBytes + tile * 512;
    MK_NO_UNROLL
    for (int group = warp; group < args.to.groups; group += kPrepareRows) {
        float block_sums[4]{};
        MK_UNROLL
        for (int i = 0; i < 8; ++i) {
            const int quarter = group * 4 + i / 2;
            uint4 x{};
            if (has_row) {
                const Vec8 v = row.piece(group * kQuantTileK + i * 32 + t * 4);
                x = to_x16<Dtype>({v.pair[0], v.pair[1], v.pair[2], v.pair[3]}, scale);
            }
            if (quarter < args.to.quarters) {
                store_b(x16 + quarter * int64_t{kPreparedX16Bytes} + i % 2 * 512, x,
                        smem_b[warp][i % 2]);
            }
            ones.add(block_sums, i, x);
        }
        // Blocks 2g and 2g + 1 of rows 2t and 2t + 1: the first or second pair of the two that lane
        // g / 2 of the row's four takes.
        MK_UNROLL
        for (int r = 0; r < 2; ++r) {
            store_sums(sums + group * int64_t{kPreparedSumsBytes}, 2 * t + r, g,
                       split_sums(block_sums[r], block_sums[2 + r]));
        }
    }
}

}  // namespace mk
