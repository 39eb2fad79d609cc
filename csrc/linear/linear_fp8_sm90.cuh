// y = x w^T of e4m3 on Hopper, any number of rows:  x [m, k] and w [n, k], both along k, y in fp32.
//
//   y[m, n] = sum over blocks b of 128 k:  x_scale[m, b] w_scale[n / 128, b] *
//             (sum over the 128 k of b:  x[m, k] w[n, k])
//
// Blocks, clusters and the ring of stages are those of the 16-bit product (linear_block_sm90.cuh),
// a stage being 128 k. Wgmma of 8 bits keeps 13 fractional bits of a sum, so that each stage starts
// a new one, of four k32, and an FFMA adds that, scaled, to an fp32 sum: 192 registers of sums.
//
//   clocks of a stage, 128 x 192:    0        192       384       576       768
//     tensor cores                   | 1: k0-63 | 64-127 | 2: k0-63 | 64-127 |
//     warpgroup 1                       waits      waits   FFMAs      turn
//     warpgroup 2                    FFMAs      turn        waits      waits
//
// The FFMAs of both warpgroups, 96 a thread, take 192 of the 768 clocks' issue slots (25 %, and all
// that is issued 39 %; products of 16 bits add nothing), never of both at once: a warpgroup starts
// its stage when the other is half through with its own. Without turns both would finish, and add,
// together, as one waits for the same stage as the other: the tensor cores would stand still
// meanwhile. Half a stage (192 clocks) is more than the 96 FFMAs and the latencies before and after
// them.
//
// Shared memory: a stage is written (40 KB, 320 clocks of 128 bytes) and read by wgmma (64 KB, 512)
// in 832 clocks if nothing overlaps: 1.08 of the tensor cores' time. In two chunks of 96 columns,
// whose products would need no turns, x is read twice: 1.25.
#pragma once

#include "common/static_for.cuh"
#include "linear/linear_block_sm90.cuh"
#include "linear/linear_fp8_tiles.h"
#include "ptx/sm90_wgmma_fp8.cuh"

namespace mk {

template <GemmTileSm90 T>
struct LinearFp8Sm90 {
    using Block = GemmBlockSm90<T, 1>;
    static_assert(Block::kStageK == kFp8Block);
    using Sums = float[T.n / 8][4];

    static constexpr int kTurn = 1;  // named barriers: + 0, + 1 of the warpgroups

    // Columns that have one scale of w: a tile begins anywhere on a multiple of T.n.
    static constexpr int kScaleCols = T.n < kFp8Block ? T.n : T.n % kFp8Block ? 64 : kFp8Block;
    static constexpr int kColScales = T.n / kScaleCols;
    static_assert(kColScales == 1 || kColScales == 3);

    // body(epilogue), of the product and the dtype at hand.
    template <class Body>
    static __device__ __forceinline__ void with_epilogue(const LinearFp8Args& args,
                                                         const Body& body) {
        const mk_linear_params& to = args.to.linear;
        const bool is_f16 = args.to.dtype == MK_F16;
        if (args.to.kind == EpilogueKind::kSwiglu) {
            is_f16 ? body(SwigluEpilogue<F16>(to)) : body(SwigluEpilogue<Bf16>(to));
        } else {
            is_f16 ? body(PlainEpilogue<F16>(to)) : body(PlainEpilogue<Bf16>(to));
        }
    }

    // The scales of a warp's 16 rows and of the tile's columns, block after block of k: lane l has
    // those of row l % 16 and of the first columns, or, from 16 on, the last. Rows and columns that
    // do not exist have those of the last that does.
    struct Scales {
        const float *x, *w;
        int64_t x_step, w_step;
        // The lanes with the scales of the thread's rows lane / 4 and that + 8; of a tile with
        // three of w the middle one is its first or its last. Kept in registers.
        uint32_t from[2][kColScales];

        struct Pair {
            float x, w;
        };

        __device__ __forceinline__ Scales(const LinearFp8Args& args, const GemmPlaceSm90& at)
            : x_step(args.x_scale_block_stride), w_step(args.w_scale_block_stride) {
            const int lane = threadIdx.x % 32;
            const int column = at.n0 + lane / 16 * (T.n - kScaleCols);
            x = args.x_scale + min(at.warp_row + lane % 16, at.m - 1) * args.x_scale_stride;
            w = args.w_scale + min(column, args.product.n - 1) / kFp8Block * args.w_scale_stride;
            MK_UNROLL
            for (int i = 0; i < 2 * kColScales; ++i) {
                const int c = i % kColScales;
                const bool is_last = c == 2 || (c == 1 && at.n0 % kFp8Block);
                from[i / kColScales][c] =
                    ptx::mov_b32(lane / 4 + 8 * (i / kColScales) + (is_last ? 16 : 0));
            }
        }

        // Of the next block.
        __device__ __forceinline__ Pair load() {
            const Pair pair{*x, *w};
            x += x_step, w += w_step;
            return pair;
        }

        // What the thread's products are multiplied with.
        __device__ __forceinline__ void of(const Pair& pair, float (&scale)[2][kColScales]) const {
            const float product = pair.x * pair.w;
            MK_UNROLL
            for (int i = 0; i < 2 * kColScales; ++i) {
                float& to = scale[i / kColScales][i % kColScales];
                to = __shfl_sync(0xFFFFFFFFu, product, from[i / kColScales][i % kColScales]);
            }
        }
    };

    // products = x w^T of a stage, from 0, in two groups.
    static __device__ __forceinline__ void start(Sums& products, const typename Block::Ring& at) {
        ptx::wgmma_fence();
        static_for<4>([&](auto j) {
            ptx::wgmma_e4m3<(j > 0)>(products, wgmma_advance(at.w - at.x_before_w, 32 * j),
                                     wgmma_advance(at.w, 32 * j));
            if (j % 2) ptx::wgmma_commit_group();
        });
    }

    // sums += products, scaled. Sums[j] are columns of group j % (T.n / 8 / pairs).
    static __device__ __forceinline__ void add(Sums& sums, const Sums& products, int pairs,
                                               const float (&scale)[2][kColScales]) {
        MK_UNROLL
        for (int j = 0; j < T.n / 8; ++j) {
            MK_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int group = kColScales == 1 ? 0 : j % (T.n / 8 / pairs);
                sums[j][i] =
                    fmaf(products[j][i], scale[i / 2][group * 8 * pairs / kScaleCols], sums[j][i]);
            }
        }
    }

    // What the outputs need is in L2 when they are written.
    template <class E>
    static __device__ __forceinline__ void prefetch(const E& epilogue, const GemmPlaceSm90& at) {
        const int row = at.warp_row + threadIdx.x % 32;
        if (threadIdx.x % 32 >= 16 || row >= at.m) return;
        MK_UNROLL
        for (int c = 0; c < T.n; c += 64) epilogue.prefetch(epilogue.row(row), at.n0 + c);
    }

    // pairs: args.grid.pairs, a constant where the scale of a sum depends on it.
    static __device__ __forceinline__ void multiply(const LinearFp8Args& args, const Block& block,
                                                    int group, int pairs) {
        auto at = block.ring(group);
        const int mine = ptx::mov_b32(kTurn + group), others = ptx::mov_b32(kTurn + 1 - group);
        if (group == 1) ptx::bar_arrive(kTurn, 256);
        block.each_tile([&](const typename Block::Tile& to, const auto& find_next) {
            const GemmPlaceSm90 place = block.place(args.product, to, group);
            with_epilogue(args, [&](const auto& epilogue) { prefetch(epilogue, place); });
            find_next();
            Scales scales(args, place);
            auto pair = scales.load();
            Sums sums{}, products;
            MK_NO_UNROLL
            for (int left = block.num_stages; left > 0; --left) {
                at.wait();
                ptx::bar_sync(mine, 256);
                start(products, at);
                float scale[2][kColScales];
                scales.of(pair, scale);
                if (left > 1) pair = scales.load();  // a stage ahead: nobody waits for them
                ptx::wgmma_wait_group<1>();
                ptx::bar_arrive(others, 256);
                ptx::wgmma_wait_group<0>();
                ptx::pin(products);
                at.release(at.full);
                at.advance();
                add(sums, products, pairs, scale);
            }
            with_epilogue(args, [&]<class E>(const E& epilogue) {
                GemmOutputSm90<T, E> output;
                output.load(epilogue, pairs, place);
                output.write(epilogue, pairs, place, sums);
            });
        });
        if (group == 0) ptx::bar_sync(kTurn, 256);  // as many as arrivals
    }
};

template <GemmTileSm90 T>
__device__ __forceinline__ void linear_fp8_sm90(const LinearFp8Args& args) {
    using Gemm = LinearFp8Sm90<T>;
    Gemm::Block::run(args, [&](const auto& block, int group) __attribute__((always_inline)) {
        const int pairs = args.grid.pairs;
        if constexpr (Gemm::kColScales == 1) {
            Gemm::multiply(args, block, group, pairs);
        } else if (pairs == kPairsOf16Bit) {
            Gemm::multiply(args, block, group, kPairsOf16Bit);
        } else if (pairs == kPairsOfSwiglu) {
            Gemm::multiply(args, block, group, kPairsOfSwiglu);
        } else if (pairs == kPairsOfF32) {
            Gemm::multiply(args, block, group, kPairsOfF32);
        } else {
            Gemm::multiply(args, block, group, 1);
        }
    });
}

}  // namespace mk
