// y = x w^T for more than 64 rows of x and quantised w, with the bits of quant_decode_sm80.cuh: w
// is A of the MMAs, unpacked in registers, and x, prepared by quant_prepare.cuh, is B.
//
//          x  m0 ...... m0 + tokens      block: one T.rows x T.tokens tile of y, all of k
//    w     +----------+----------+       warp:  T.warp_rows x T.warp_tokens of it, twice in
//    n0    |   warp   |          |              registers: S of the group of 256 k, and the total
//    ...   +----------+----------+       grid:  tiles in groups of kQuantGemmGroupRows rows of x;
//    +rows |          |          |              in a group m first, so that w crosses DRAM once a
//          +----------+----------+              group. A block has rows of one matrix only, or as
//                                               many of gate and up, each by half the warps.
//
// Arithmetic: quant_unpack.cuh, quant_x.cuh. 32 k at a time: A of the warp's rows is unpacked, then
// for every 8 rows of x a lane loads B (16 bytes) and adds scale * P to S. At a group's end the
// minima meet the block sums of x (two MMAs per 16 x 8), and Y is added to the total.
//
// Shared memory (quant_gemm_tiles.h): stages of x (64 k), groups of w as packed and of x's sums
// (256 k), two sets of scales. Of the large tile on A100 and Q4_K: 4 x 16 KB, 2 x 26.5
// KB, 10 KB; at the end, in their place, the outputs as floats and an Epilogue::Row for each row of
// x.
//
// Pipeline: one cp.async group a stage; group j + groups - 1 of w is asked for at the first stage
// of group j. At its last stage a warp per tile converts the scales of group j + 1. A barrier a
// stage. The loop over 32 k is not unrolled: unrolled four times, sums are spilled (180 to 270
// bytes). One entry serves all products and all types: they differ at the end, and by a branch at
// the start. Lost: 64 rows x 32 tokens a warp: half the bytes of B from shared memory, twice the
// unpacking, 255 registers and spills. C = -offset * sum for each block: 16 (32) loads of C for 32
// MMAs.
#pragma once

#include "linear/linear_epilogue.cuh"
#include "ptx/sm90.cuh"
#include "quant/quant_gemm_stages.cuh"
#include "quant/quant_x.cuh"

namespace mk {

// Tiles of 8 rows of x that a warp multiplies together, or not at all when none of the rows exists.
// The branch between them also keeps the compiler from having more products under way at once than
// there are registers for: with 4 it takes 255 and spills 8 bytes on sm_90 and sm_100.
constexpr int kQuantGemmChunk = 2;

template <QuantGemmTile T>
using QuantGemmSums = float[QuantGemmShape<T>::kTiles][QuantGemmShape<T>::kTokens][4];

// ---- the product ----

// The scales of the tiles of `slot` as floats, as those of `set`, by the first warp that copies a
// tile: lane 4g + t's of quarter t, which the four lanes of row g then read.
template <int kType, QuantGemmTile T>
__device__ __forceinline__ void convert_scales(uint8_t* smem, int slot, int set, int quarters) {
    using S = QuantGemmShape<T>;
    using Smem = QuantGemmSmem<kType, T>;
    const int thread = ptx::mov_u32_tid_x(), lane = thread % 32, warp = thread / 32;
    if (warp % S::kWarpsPerTile != 0) return;
    using Scales = QuantScales<kType>;
    uint8_t* const row = smem + Smem::kRowsAt + warp / S::kWarpsPerTile * Smem::kRow;
    typename Scales::Pairs pairs;
    load_scales<kType>(row + slot * Smem::kTile, lane, quarters).scale_pairs(pairs);
    *reinterpret_cast<uint4*>(row + Smem::kScalesAt + set * kQuantGemmScaleBytes +
                              lane % 4 * kQuantGemmScalePitch + lane / 4 * 16) =
        Scales::scales(pairs);
}

// S += scale * P over 32 k, or S += (A * scale) B. x: this lane's pieces of them; scales: those of
// this lane's rows, of the warp's first tile.
template <int kType, QuantGemmTile T>
__device__ __forceinline__ void multiply(QuantGemmSums<T>& sums,
                                         uint32_t (&a)[QuantGemmShape<T>::kTiles][2][4],
                                         const uint8_t* x, const uint8_t* scales, int tokens) {
    using S = QuantGemmShape<T>;
    constexpr bool kIs16 = QuantScales<kType>::kIs16;
    float2 scale[S::kTiles];  // of rows g and g + 8
    MK_UNROLL
    for (int i = 0; i < S::kTiles; ++i) {
        const uint8_t* const from = scales + i * QuantGemmSmem<kType, T>::kRow;
        const uint2 of_g = *reinterpret_cast<const uint2*>(from);
        if constexpr (kIs16) {
            fold_scales(a[i], of_g.x, of_g.y);
        } else {
            scale[i] = {__uint_as_float(of_g.x), __uint_as_float(of_g.y)};
        }
    }
    MK_UNROLL
    for (int n = 0; n < S::kTokens; ++n) {
        if (n % kQuantGemmChunk == 0 && n * 8 >= tokens) break;
        const uint4 b = load_b(x + n * 1024);
        MK_UNROLL
        for (int i = 0; i < S::kTiles; ++i) {
            float (&s)[4] = sums[i][n];
            float from_0[4]{};
            float (&p)[4] = kIs16 ? s : from_0;
            ptx::mma_m16n8k16_f32_f16(p, a[i][0], b.x, b.y);
            ptx::mma_m16n8k16_f32_f16(p, a[i][1], b.z, b.w);
            if constexpr (kIs16) continue;
            s[0] = fmaf(scale[i].x, p[0], s[0]);
            s[1] = fmaf(scale[i].x, p[1], s[1]);
            s[2] = fmaf(scale[i].y, p[2], s[2]);
            s[3] = fmaf(scale[i].y, p[3], s[3]);
        }
    }
}

// total += Y of a group.
template <int kType, QuantGemmTile T>
__device__ __forceinline__ void add_group(QuantGemmSums<T>& total, QuantGemmSums<T>& sums,
                                          const uint8_t* tiles, const uint8_t* x_sums, int quarters,
                                          int tokens) {
    using S = QuantGemmShape<T>;
    const int lane = ptx::mov_u32_tid_x() % 32;
    QuantScales<kType> scales[S::kTiles];
    uint32_t minima[S::kTiles][4];
    MK_UNROLL
    for (int i = 0; i < S::kTiles; ++i) {
        scales[i] = load_scales<kType>(tiles + i * QuantGemmSmem<kType, T>::kRow, lane, quarters);
        typename QuantScales<kType>::Pairs pairs;
        scales[i].scale_pairs(pairs);
        scales[i].minima(pairs, minima[i]);
    }
    MK_UNROLL
    for (int n = 0; n < S::kTokens; ++n) {
        if (n % kQuantGemmChunk == 0 && n * 8 >= tokens) break;
        const uint4 b = load_sums(x_sums + n * 512);
        MK_UNROLL
        for (int i = 0; i < S::kTiles; ++i) {
            float c[4]{};
            add_minima(c, minima[i], b);
            scales[i].finish(sums[i][n], c);
            MK_UNROLL
            for (int j = 0; j < 4; ++j) {  // not contracted with finish's product
                total[i][n][j] = __fadd_rn(total[i][n][j], sums[i][n][j]);
            }
        }
    }
}

// All warps', each of which may be in the loop of another type.
template <QuantGemmTile T>
__device__ __forceinline__ void sync_block() {
    ptx::bar_sync(1, QuantGemmShape<T>::kThreads);
}

template <int kType, QuantGemmTile T>
__device__ __forceinline__ void quant_gemm_sums(const QuantGemmBlock& block, uint8_t* smem,
                                                QuantGemmSums<T>& total) {
    using S = QuantGemmShape<T>;
    using Smem = QuantGemmSmem<kType, T>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_tile = warp / S::kWarpsTokens * S::kTiles;
    const int first_token = warp % S::kWarpsTokens * T.warp_tokens;
    const int tokens = block.args.m - block.first_token - first_token;  // from this warp's first on
    const int num_quarters = block.args.x.quarters;
    const auto quarters_of = [&](int group) { return min(num_quarters - 4 * group, 4); };

    QuantGemmCopy<kType, T> copy(block, static_cast<uint32_t>(__cvta_generic_to_shared(smem)));
    ptx::griddepcontrol_wait();  // a kernel before may have written the weights, too
    MK_UNROLL
    for (int j = 0; j < T.groups - 1; ++j) {
        if (4 * j >= num_quarters) break;
        copy.copy_w(j, quarters_of(j));
        copy.copy_sums(j, j);
    }
    MK_UNROLL
    for (int i = 0; i < T.stages - 1; ++i) {
        if (i < num_quarters) copy.copy_x(i);
        ptx::cp_async_commit_group();
    }
    ptx::cp_async_wait_group<T.stages - 2>();
    sync_block<T>();
    convert_scales<kType, T>(smem, 0, 0, quarters_of(0));

    const uint8_t* const lane_x = smem + first_token * kQuantQuarterK * 2 + lane * 16;
    int stage = -1, slot = 0, left = block.args.x.halves;
    for (int group = 0;; ++group) {
        QuantGemmSums<T> sums{};
        QuantGemmWords<kType> words[S::kTiles];
        const int quarters = min((left + 1) / 2, 4);
        uint8_t* const rows = smem + Smem::kRowsAt + first_tile * Smem::kRow;
        const uint8_t* const tiles = rows + slot * Smem::kTile;
        const uint8_t* const scales =
            rows + Smem::kScalesAt + group % 2 * kQuantGemmScaleBytes + lane / 4 * 16;
        const int next_slot = slot + 1 == T.groups ? 0 : slot + 1;
        const uint8_t* x = nullptr;
        MK_NO_UNROLL
        for (int half = 0; half < 8; ++half) {
            const int quarter = half / 2;
            uint32_t a[S::kTiles][2][4];
            if (half % 2 == 0) {
                const int quarters_left = (left + 1) / 2;
                ptx::cp_async_wait_group<T.stages - 2>();
                sync_block<T>();
                if (quarters_left >= T.stages) {
                    copy.copy_x(stage < 0 ? T.stages - 1 : stage);
                }
                if (half == 0 && quarters_left > 4 * (T.groups - 1)) {
                    const int to = slot == 0 ? T.groups - 1 : slot - 1;
                    copy.copy_w(to, min(quarters_left - 4 * (T.groups - 1), 4));
                    copy.copy_sums(to, group + T.groups - 1);
                }
                ptx::cp_async_commit_group();
                stage = stage + 1 == T.stages ? 0 : stage + 1;
                x = lane_x + stage * S::kXBytes;
                if (half == 6 && quarters_left > 1) {
                    convert_scales<kType, T>(smem, next_slot, (group + 1) % 2,
                                             min(quarters_left - 1, 4));
                }
                MK_UNROLL
                for (int i = 0; i < S::kTiles; ++i) {
                    words[i].next(tiles + i * Smem::kRow, lane, quarter, quarters);
                    words[i].template unpack<0>(a[i]);
                }
            } else {
                MK_UNROLL
                for (int i = 0; i < S::kTiles; ++i) words[i].template unpack<1>(a[i]);
            }
            multiply<kType, T>(sums, a, x + half % 2 * 512,
                               scales + quarter * kQuantGemmScalePitch + half % 2 * 8, tokens);
            if (--left == 0) break;
        }
        add_group<kType, T>(
            total, sums, tiles,
            smem + Smem::kSumsAt + slot * Smem::kSums + first_token * 64 + lane * 16, quarters,
            tokens);
        if (left == 0) return;
        slot = next_slot;
    }
}

// ---- outputs ----

template <QuantGemmTile T, class Epilogue>
__device__ __forceinline__ void store_outputs(const QuantGemmBlock& block, const Epilogue& epilogue,
                                              uint8_t* smem) {
    using S = QuantGemmShape<T>;
    using Row = typename Epilogue::Row;
    static_assert(sizeof(Row) <= kQuantEpilogueRowBytes);
    Row* const rows = reinterpret_cast<Row*>(smem + T.tokens * S::kPitch);
    const int num_rows = min(T.tokens, block.args.m - block.first_token);
    for (int r = threadIdx.x; r < num_rows; r += S::kThreads) {
        rows[r] = epilogue.row(block.first_token + r);
    }
    __syncthreads();
    constexpr int kPairs = T.rows / 2;
    const int pair = threadIdx.x % kPairs;
    const auto store = [&](int c, const auto& sums_of) {
        const auto column = epilogue.column(c);
        _Pragma("unroll 4") for (int r = threadIdx.x / kPairs; r < num_rows;
                                 r += S::kThreads / kPairs) {
            const float2 y = sums_of(smem + r * S::kPitch);
            epilogue.store(rows[r], column, y.x, y.y);
        }
    };
    if (Epilogue::kJoinsPairs && block.args.is_pair) {  // up's rows behind gate's
        const int row = block.first_row + S::matrix_of_pair() * kPairs + pair;
        if (row >= block.w.rows) return;
        store(2 * row, [&](const uint8_t* y) {
            const auto* const gate = reinterpret_cast<const float*>(y) + pair;
            return float2{gate[0], gate[kPairs]};
        });
    } else {
        const int row = block.first_row + 2 * pair;
        if (row >= block.w.rows) return;
        store(block.w.first_row + row,
              [&](const uint8_t* y) { return *reinterpret_cast<const float2*>(y + pair * 8); });
    }
}

// Sums to outputs in shared memory, [row of x][row of w], which are then stored row by row.
template <QuantGemmTile T>
__device__ __forceinline__ void stage_outputs(const QuantGemmBlock& block, uint8_t* smem,
                                              const QuantGemmSums<T>& total) {
    using S = QuantGemmShape<T>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int token = warp % S::kWarpsTokens * T.warp_tokens + lane % 4 * 2;
    const int row = warp / S::kWarpsTokens * T.warp_rows + lane / 4 * 2;
    MK_UNROLL
    for (int n = 0; n < S::kTokens; ++n) {
        MK_UNROLL
        for (int j = 0; j < 2; ++j) {
            const int r = token + n * 8 + j;
            const int in_x = min(block.first_token + r, block.args.m - 1);
            const float unscale = block.args.x.unscale[in_x];
            MK_UNROLL
            for (int i = 0; i < S::kTiles; ++i) {
                *reinterpret_cast<float2*>(smem + r * S::kPitch + (row + i * 16) * 4) = {
                    total[i][n][j] * block.w.unit * unscale,
                    total[i][n][2 + j] * block.w.unit * unscale};
            }
        }
    }
}

template <QuantGemmTile T>
__device__ __forceinline__ void quant_gemm(const QuantGemmArgs& args) {
    using S = QuantGemmShape<T>;
    extern __shared__ __align__(128) uint8_t smem[];
    ptx::griddepcontrol_launch_dependents();
    const int tiles_m = (args.m + T.tokens - 1) / T.tokens;
    constexpr int kGroup = kQuantGemmGroupRows / T.tokens;
    const int group = blockIdx.x / (kGroup * args.strips) * kGroup;
    const int in_group = blockIdx.x % (kGroup * args.strips);
    const int height = min(kGroup, tiles_m - group);
    const int strip = in_group / height;
    int matrix = (args.num_matrices > 1 && strip >= args.w[1].first_strip) +
                 (args.num_matrices > 2 && strip >= args.w[2].first_strip);
    int first_row = (strip - args.w[matrix].first_strip) * T.rows;
    if (args.is_pair) {
        matrix = S::matrix_of_pair();
        first_row = (strip - matrix) * (T.rows / 2);
    }
    const QuantGemmBlock block{args, args.w[matrix], first_row,
                               (group + in_group % height) * T.tokens};

    QuantGemmSums<T> total{};
    switch (block.w.type) {
#define MK_QUANT_CASE(type)                           \
    case type:                                        \
        quant_gemm_sums<type, T>(block, smem, total); \
        break;
        MK_FOR_EACH_QUANT_TYPE(MK_QUANT_CASE)
#undef MK_QUANT_CASE
    }
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    stage_outputs<T>(block, smem, total);
    with_epilogue(args.to, [&](const auto& epilogue) { store_outputs<T>(block, epilogue, smem); });
}

}  // namespace mk
