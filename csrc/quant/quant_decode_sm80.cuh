// y = x w^T for up to 16 rows of x and packed weights w, bound by the bytes of w.
//
//             256 k
//   rows    +------+------+------+     block b: rows of tiles b, b + grid, ...; one block an SM
//   of w    | warp | warp | warp |     warp:    the tiles of 16 rows x 256 k by turns, along k
//   16      |  0   |  1   |  2   |              first, over all the rows of tiles of a round
//           +------+------+------+     sums:    Y of each tile to shared memory; when the round is
//   16      |  3   | ...                        done, a thread for two rows and a token adds them
//           +------+------+                     in ascending k, and runs the epilogue
//
// A = w, 16 rows x 16 k of small integers as f16 patterns, B = x16, 16 k x 8 tokens (one or two
// such), from shared memory: quant_layout.h, quant_unpack.cuh, quant_x.cuh tell how. All blocks
// convert all of x first. What is added in which order depends on k alone, and a column of an MMA
// on its own tokens: so a row's bits depend on nothing else. Types are told apart once per run of a
// warp's tiles of the same type: Q, K and V may differ.
//
// Weights come by 16-byte loads straight into the registers of the tile at hand, each as soon as
// its quarter is unpacked, a tile ahead: all warps have a tile each on its way all the time. Scales
// come two ways: each lane converts its own four (or eight), and gets those of its rows that the
// other three lanes converted from 512 (1024) bytes of shared memory of the warp.
// Shared memory: quant_tiles.h. Where x does not fit, k goes in chunks, totals stay in registers.
// Counted for n = 11520, k = 4096 on A100, lane-instructions per weight at m = 1, 8, 16 (PTX, no
// mov): Q4_K 1.81, 2.31, 3.89; Q4_0 1.69, 2.20, 3.74. Per tile Q4_K executes 200, of which 80
// unpack. Lost: one switch per tile with registers common to all types: 168 registers, 10
// instructions more. 12 warps of 168 registers spill in some entries, 16 of 128 in all.
#pragma once

#include "linear/linear_epilogue.cuh"
#include "ptx/sm90.cuh"
#include "quant/quant_decode_x.cuh"
#include "quant/quant_unpack.cuh"

namespace mk {

// ---- w ----

// Which of the matrices has a row of tiles.
template <int kMatrices>
__device__ __forceinline__ const QuantDecodeMatrix& matrix_of(const QuantDecodeMatrix* w, int row) {
    int i = 0;
    if constexpr (kMatrices > 1) {
        while (i + 1 < kMatrices && row >= w[i].end) ++i;
    }
    return w[i];
}

// Rows of tiles and groups that a block multiplies before it adds.
struct QuantRound {
    int first_row, end_row;  // every gridDim.x'th
    int first_group, num_groups;
    int num_quarters, num_rows;  // of all of w
};

// A warp's way through the tiles of a round: number u = warp, warp + 8, ... along k first.
template <int kMatrices, int kTokenTiles>
struct QuantWalk {
    const QuantDecodeMatrix* const matrices;
    const QuantRound& round;
    const int step_rows, step_groups;  // and a row more when the groups end
    int row, group;
    uint32_t smem_y;  // this lane's sums of the tile
    // Of the matrix that has the row
    int type, end;
    int64_t step_bytes, wrap_bytes;
    const uint8_t* tile;

    __device__ __forceinline__ QuantWalk(const QuantDecodeMatrix* w, const QuantRound& of,
                                         uint32_t smem_sums)
        : matrices(w),
          round(of),
          step_rows(kQuantWarps / of.num_groups * gridDim.x),
          step_groups(kQuantWarps % of.num_groups) {
        const int first = threadIdx.x / 32, i = first / of.num_groups;
        row = of.first_row + i * gridDim.x;
        group = first - i * of.num_groups;
        smem_y = smem_sums + first * kTokenTiles * 512 + threadIdx.x % 32 * 16;
        if (is_inside()) enter();
    }

    __device__ __forceinline__ bool is_inside() const { return row < round.end_row; }
    __device__ __forceinline__ int quarters() const {
        return min(round.num_quarters - 4 * (round.first_group + group), 4);
    }
    __device__ __forceinline__ bool is_whole() const {
        return group < round.num_quarters / 4 - round.first_group;
    }

    __device__ __forceinline__ void enter() {
        const QuantDecodeMatrix& w = matrix_of<kMatrices>(matrices, row);
        type = w.type;
        end = w.end;
        tile = w.tiles + (row - w.first) * w.row_tile_bytes +
               (round.first_group + group) * w.tile_bytes;
        step_bytes = step_rows * w.row_tile_bytes + step_groups * w.tile_bytes;
        wrap_bytes = step_bytes + gridDim.x * w.row_tile_bytes - round.num_groups * w.tile_bytes;
    }

    __device__ __forceinline__ void next() {
        const bool is_wrapped = group >= round.num_groups - step_groups;
        group += is_wrapped ? step_groups - round.num_groups : step_groups;
        row += is_wrapped ? step_rows + static_cast<int>(gridDim.x) : step_rows;
        tile += is_wrapped ? wrap_bytes : step_bytes;
        smem_y += kQuantWarps * kTokenTiles * 512;
        if constexpr (kMatrices > 1) {
            if (row >= end && row < round.num_rows) enter();
        }
    }
};

// A lane's words of a tile that is not a whole one.
template <int kType>
__device__ __forceinline__ void load_rest(uint32_t (&words)[kQuantTileWords<kType>],
                                          const uint8_t* tile, int lane, int quarters) {
    using Pieces = QuantPieces<kType>;
    if constexpr (!QuantScales<kType>::kIsK) {
        constexpr int kPerQuarter = Pieces::kBits / 4;
        MK_UNROLL
        for (int q = 0; q < 4; ++q) {
            const bool is_there = q < quarters;
            MK_UNROLL
            for (int i = 0; i < kPerQuarter; ++i) {
                const int p = q * kPerQuarter + i;
                uint4 v{};
                if (is_there) v = ptx::ld_global_nc_l1_no_allocate_v4(tile + p * 512 + lane * 16);
                Pieces::store(words, p, v);
            }
            if constexpr (Pieces::kHasFifths) {
                uint32_t& fifth = words[5 * q + 4];
                fifth = 0;
                if (is_there) {
                    fifth = ptx::ld_global_nc_l1_no_allocate(tile + quarters * 512 +
                                                             (lane * quarters + q) * 4);
                }
            }
        }
    }
}

// Piece p of a whole tile, from piece 0 of the lane.
template <int kPiece>
__device__ __forceinline__ uint4 load_lane_piece(const uint8_t* first) {
    return ptx::ld_global_nc_l1_no_allocate_v4<kPiece * 512>(first);
}

__device__ __forceinline__ float4 as_float4(const uint4& v) {
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// s += scale * p, of rows g and g + 8.
__device__ __forceinline__ void add_scaled(float (&s)[4], const float (&p)[4], float scale,
                                           float scale_8) {
    s[0] = fmaf(scale, p[0], s[0]);
    s[1] = fmaf(scale, p[1], s[1]);
    s[2] = fmaf(scale_8, p[2], s[2]);
    s[3] = fmaf(scale_8, p[3], s[3]);
}

// Y of tiles to the sums, from `at` on, as long as they are of this type. smem_x: of this lane's
// token, from which that of the second tile of tokens is x_bytes away.
template <int kType, int kTokenTiles, int kMatrices>
__device__ __forceinline__ void multiply_tiles(QuantWalk<kMatrices, kTokenTiles>& at,
                                               uint32_t smem_x, uint32_t x_bytes,
                                               uint8_t* smem_scales) {
    using Pieces = QuantPieces<kType>;
    using Scales = QuantScales<kType>;
    // Read here, so that no type's addresses hold registers while another's tiles are multiplied.
    const int lane = ptx::mov_u32_tid_x() % 32, g = lane / 4, t = lane % 4;
    constexpr int kScaleStride = Scales::kIs16 ? 144 : 64;  // from row g to g + 1
    const uint32_t smem_rows = smem_address(smem_scales) + g * kScaleStride;
    float4* const smem_own =
        reinterpret_cast<float4*>(smem_scales + g * kScaleStride) + t * Scales::kFloat4s;

    // Not left undefined: that would keep the registers of all types from one switch to the next.
    uint32_t words[kQuantTileWords<kType>]{};
    Scales scales{};
    const auto load_all = [&] {
        const int quarters = at.quarters();
        scales.load(at.tile, lane, quarters);
        if (quarters == 4) {
            static_for<Pieces::kCount>(
                [&](auto p) { Pieces::store(words, p, load_lane_piece<p>(at.tile + lane * 16)); });
        } else {
            load_rest<kType>(words, at.tile, lane, quarters);
        }
    };
    load_all();
    for (;;) {
        // The scales of this lane's rows from all four lanes that have them
        __syncwarp();  // all lanes are done with the last tile's
        MK_UNROLL
        for (int i = 0; i < Scales::kFloat4s; ++i) smem_own[i] = scales.scales(i);
        __syncwarp();
        uint32_t minima[4];
        scales.minima(minima);
        uint32_t x[kTokenTiles];
        float s[kTokenTiles][4]{}, c[kTokenTiles][4]{};
        MK_UNROLL
        for (int n = 0; n < kTokenTiles; ++n) {
            x[n] = smem_x + n * x_bytes + at.group * kXGroupBytes;
            add_minima(c[n], minima, ptx::ld_shared_v4<512>(x[n]));
        }

        // The next tile, if it is of this type, or of the next round. K types have whole tiles
        // only: where there is no next one they load this one again, without a branch.
        const uint8_t* next = at.tile;
        const uint32_t smem_y = at.smem_y;
        at.next();
        const bool is_same = at.is_inside() && (kMatrices == 1 || at.type == kType);
        const bool is_whole = Scales::kIsK || at.is_whole();
        const bool is_loading = Scales::kIsK || (is_same && is_whole);
        if (kMatrices == 1 && Scales::kIsK ? at.row < at.round.num_rows : is_same) next = at.tile;
        Scales next_scales = scales;
        if (is_loading) next_scales.load(next, next + Scales::scales_place(lane), lane);
        next += lane * 16;
        uint4 next_fifths{};
        if (Pieces::kHasFifths && is_loading) next_fifths = load_lane_piece<4>(next);

        static_for<4>([&](auto q) {
            QuantFragments a;
            unpack_quarter_of<kType>(words, q, a);
            static_for<Pieces::kCount>([&](auto p) {  // this quarter was the last to need it
                if constexpr (Pieces::last_quarter(p) == q && !(Pieces::kHasFifths && p == 4)) {
                    if (is_loading) Pieces::store(words, p, load_lane_piece<p>(next));
                }
            });
            float4 scale;
            static_for<2>([&](auto i) {  // 32 k
                if constexpr (Scales::kIs16 || i == 0) {
                    scale = as_float4(
                        ptx::ld_shared_v4<(Scales::kIs16 ? 2 * q + i : q) * 16>(smem_rows));
                }
                MK_UNROLL
                for (int n = 0; n < kTokenTiles; ++n) {
                    uint4 b = ptx::ld_shared_v4<(2 * q + i) * 64>(x[n]);
                    if constexpr (Pieces::kBits == 8) {  // of x / 16, for weights that are x1
                        b.y = ptx::mul_rn_f16x2(b.y, 0x4C004C00u);
                        b.w = ptx::mul_rn_f16x2(b.w, 0x4C004C00u);
                    }
                    float p[4]{};
                    ptx::mma_m16n8k16_f32_f16(p, a[2 * i], b.x, b.y);
                    if constexpr (Scales::kIs16) {
                        add_scaled(s[n], p, scale.x, scale.y);
                        float p_odd[4]{};
                        ptx::mma_m16n8k16_f32_f16(p_odd, a[2 * i + 1], b.z, b.w);
                        add_scaled(s[n], p_odd, scale.z, scale.w);
                    } else {
                        ptx::mma_m16n8k16_f32_f16(p, a[2 * i + 1], b.z, b.w);
                        add_scaled(s[n], p, i ? scale.z : scale.x, i ? scale.w : scale.y);
                    }
                }
            });
        });
        if constexpr (Pieces::kHasFifths) Pieces::store(words, 4, next_fifths);
        MK_UNROLL
        for (int n = 0; n < kTokenTiles; ++n) {
            scales.finish(s[n], c[n]);
            // Of tokens 2t and 2t + 1: rows g and g + 8 together
            ptx::st_shared_v4(smem_y + n * 512,
                              {__float_as_uint(s[n][0]), __float_as_uint(s[n][2]),
                               __float_as_uint(s[n][1]), __float_as_uint(s[n][3])});
        }
        if (!is_same) return;
        scales = next_scales;
        if constexpr (!Scales::kIsK) {
            if (!is_whole) load_all();
        }
    }
}

// Y of all tiles of the round that are this warp's.
template <int kTokenTiles, int kMatrices>
__device__ __forceinline__ void multiply_round(const QuantDecodeMatrix* w, const QuantRound& round,
                                               uint32_t smem_x, uint32_t x_bytes,
                                               uint8_t* smem_scales, uint32_t smem_sums) {
    QuantWalk<kMatrices, kTokenTiles> at(w, round, smem_sums);
    while (at.is_inside()) {
        switch (at.type) {
#define MK_QUANT_CASE(type)                                                  \
    case type:                                                               \
        multiply_tiles<type, kTokenTiles>(at, smem_x, x_bytes, smem_scales); \
        break;
            MK_QUANT_CASE(MK_Q4_0)
            MK_QUANT_CASE(MK_Q4_1)
            MK_QUANT_CASE(MK_Q5_0)
            MK_QUANT_CASE(MK_Q5_1)
            MK_QUANT_CASE(MK_Q8_0)
            MK_QUANT_CASE(MK_Q2_K)
            MK_QUANT_CASE(MK_Q3_K)
            MK_QUANT_CASE(MK_Q4_K)
            MK_QUANT_CASE(MK_Q5_K)
            MK_QUANT_CASE(MK_Q6_K)
#undef MK_QUANT_CASE
        }
    }
}

// Asks L2 for the block's first row of tiles, which does not change, while x is not there yet.
template <int kMatrices>
__device__ __forceinline__ void prefetch_tiles(const QuantDecodeMatrix* w) {
    const int row = blockIdx.x;
    const QuantDecodeMatrix& m = matrix_of<kMatrices>(w, row);
    const uint8_t* const tiles = m.tiles + (row - m.first) * m.row_tile_bytes;
    const int bytes = min(m.row_tile_bytes, static_cast<int64_t>(kQuantPrefetchBytes));
    for (int byte = threadIdx.x * 128; byte < bytes; byte += kQuantThreads * 128) {
        ptx::prefetch_global_l2(tiles + byte);
    }
}

// ---- the kernel ----

template <class Dtype, int kTokenTiles, int kMatrices, class Epilogue>
__device__ __forceinline__ void quant_decode_sm80(
    const QuantDecodeArgs<typename Epilogue::Params>& args) {
    extern __shared__ __align__(1024) uint8_t dynamic_smem[];
    const Product& a = args.product;
    const QuantDecodeShape& shape = args.shape;
    const int x_stride = shape.x_stride;
    const QuantSmem smem(dynamic_smem, a.m, x_stride);
    const int lane = threadIdx.x % 32, num_blocks = gridDim.x;

    ptx::griddepcontrol_launch_dependents();
    prefetch_tiles<kMatrices>(args.w);
    ptx::griddepcontrol_wait();

    if (a.norm_weight) {
        row_scales<Dtype>(a, 0, a.m, reinterpret_cast<float4*>(smem.sums), smem.norm_scale);
    }
    find_x_scales<Dtype>(a, smem);

    const Epilogue epilogue(args.p);
    // This lane's token (absent ones are the last one), and its second one.
    const int last = a.m - 1, g = lane / 4;
    const uint32_t smem_x = smem_address(smem.x) + min(g, last) * x_stride + threadIdx.x % 4 * 16;
    const uint32_t x_bytes = (min(kQuantTokens + g, last) - min(g, last)) * x_stride;

    // Of the sums of a tile, this thread's: two rows, a token.
    constexpr int kTileThreads = 64 * kTokenTiles;
    const int pair = threadIdx.x % 64 / kQuantTokens;
    const int token = threadIdx.x % kTileThreads / 64 * kQuantTokens + threadIdx.x % kQuantTokens;
    constexpr int kStep = kQuantThreads / kTileThreads;  // tiles at a time
    float2 totals[kQuantKeptSteps]{};

    uint8_t* smem_sums = smem.sums;
    for (int first = blockIdx.x; first < shape.num_tiles; first += shape.round_tiles * gridDim.x) {
        for (int chunk = 0; chunk < shape.num_chunks; ++chunk) {
            const int first_group = chunk * shape.chunk_groups;
            const int num_groups = min(shape.chunk_groups, shape.num_groups - first_group);
            const int end = min(shape.num_tiles, first + shape.round_tiles * num_blocks);
            const QuantRound round{first,          end, first_group, num_groups, shape.num_quarters,
                                   shape.num_tiles};
            if (shape.num_chunks > 1 || first == blockIdx.x) {
                convert_x<Dtype>(a, smem, x_stride, first_group, num_groups);
            }
            multiply_round<kTokenTiles, kMatrices>(args.w, round, smem_x, x_bytes, smem.scales,
                                                   smem_address(smem_sums));
            __syncthreads();

            for (int base = 0; first + base * num_blocks < end; base += kQuantKeptSteps * kStep) {
                MK_UNROLL
                for (int step = 0; step < kQuantKeptSteps; ++step) {
                    const int tile = base + step * kStep + threadIdx.x / kTileThreads;
                    const int row = first + tile * num_blocks;
                    if (row >= end || token >= a.m) continue;
                    float2& total = totals[step];
                    if (chunk == 0) total = {};
                    const auto* const y = reinterpret_cast<const float2*>(smem_sums) +
                                          tile * num_groups * kTileThreads +
                                          threadIdx.x % kTileThreads;
                    for (int i = 0; i < num_groups; ++i) {
                        total.x += y[i * kTileThreads].x;
                        total.y += y[i * kTileThreads].y;
                    }
                    if (chunk + 1 < shape.num_chunks) continue;
                    const float unscale = smem.x_scale[token].unscale;
                    const int type = matrix_of<kMatrices>(args.w, row).type;
                    epilogue.store(epilogue.row(token),
                                   epilogue.column(row * kQuantTileRows + 2 * pair),
                                   quant_unscaled(type, total.x) * unscale,
                                   quant_unscaled(type, total.y) * unscale);
                }
            }
            // The next round's sums go to the other buffer; with chunks, convert_x waits.
            smem_sums = smem_sums == smem.sums ? smem.sums + shape.round_bytes : smem.sums;
        }
    }
}

}  // namespace mk
