// y = x w^T for more than 64 rows of x on Hopper:  x [m, k] and w [n, k], both along k, y in fp32.
//
//   block = one warpgroup that copies and two that multiply; tile after tile of T.m x T.n of y
//     warpgroup 0    a thread of it fetches stages of 64 k by TMA               24 or 40 registers
//     warpgroup 1    rows 0-63 of the tile by wgmma m64 n(T.n) k16             240 or 232
//     warpgroup 2    rows 64-127
//   Clusters, shared memory and the ring of stages: linear_block_sm90.cuh.
//
//   A stage's rows are 128 bytes with wgmma's 128-byte swizzle, x as A and w as B, both K-major.
//   What TMA finds past m, n or k is 0.
//
// k ascends in groups of 16 into one accumulator per output, whatever the tile (see the header).
//
// The end of a tile hides behind the other warpgroup's MMAs: warpgroup 2 begins each tile when 1
// has done kLead stages of it. As many are left to 2 when 1 writes, and for 1 to do when 2 writes:
//
//   clocks, 128 x 256:   0                                         1024
//     warpgroup 1        | writes, in E clocks  | stages of the next tile ...
//     warpgroup 2        | its last 2 stages                         | writes ...
//
// E is below 1024, or little above (docs/modelled.md has it of each product, and counts what is):
// outputs leave from registers (linear_output_sm90.cuh), residuals and angles came when the tile
// began, and the next tile is known. What the ring holds when a stage gets free, and TMA has time
// for the next one, is 2048 clocks of MMAs; without a lead 3072, with three stages 1536.
//
// Of a tile of 128 x 256 the tensor cores take 1024 clocks per stage, and L2 gives an SM 48 KB in
// 1750 (28 bytes per clock when all SMs ask): hence the clusters. In one of two it is 32 KB, of
// four 24. In one of eight, 4 x 2, it would be 16, which saves nothing and, where a GPC has less
// than 16 SMs, leaves more of them idle.
#pragma once

#include "common/static_for.cuh"
#include "linear/linear_block_sm90.cuh"

namespace mk {

template <class Dtype, GemmTileSm90 T>
struct LinearGemmSm90 {
    using Block = GemmBlockSm90<T, 2>;
    using Sums = float[T.n / 8][4];
    template <class Epilogue>
    using Output = GemmOutputSm90<T, Epilogue>;

    // Stages that warpgroup 1 has done when warpgroup 2 starts with a tile.
    static constexpr int kLead = T.stages / 2;
    static constexpr int kLeadBarrier = 1;

    // y += x w^T of a stage, under way.
    template <bool kIsFirst>
    static __device__ __forceinline__ void start(Sums& sums, const typename Block::Ring& at) {
        at.wait();
        ptx::wgmma_fence();
        static_for<kGemmStageK / 16>([&](auto j) {
            ptx::wgmma<kWgmmaType<Dtype>, !kIsFirst || (j > 0)>(
                sums, wgmma_advance(at.w - at.x_before_w, 32 * j), wgmma_advance(at.w, 32 * j));
        });
        ptx::wgmma_commit_group();
    }

    template <class E>
    static __device__ __forceinline__ void multiply(const LinearGemmSm90Args& args,
                                                    const E& epilogue, const Block& block,
                                                    int group) {
        auto at = block.ring(group);
        Sums sums;
        // Of fewer stages warpgroup 1 could signal twice before warpgroup 2 waits once.
        const bool has_lead = block.num_stages >= T.stages;
        block.each_tile([&](const typename Block::Tile& to,
                            const auto& find_next) __attribute__((always_inline)) {
            const GemmPlaceSm90 place = block.place(args.product, to, group);
            if (has_lead && group == 1) ptx::bar_sync(kLeadBarrier, 256);
            start<true>(sums, at);
            Output<E> output;
            output.load(epilogue, args.grid.pairs, place);
            find_next();
            int s = 1;
            MK_NO_UNROLL
            for (int end = min(kLead + 1, block.num_stages);; end = block.num_stages) {
                MK_NO_UNROLL
                for (; s < end; ++s) {
                    const uint32_t last = at.full;
                    at.advance();
                    start<false>(sums, at);
                    ptx::wgmma_wait_group<1>();
                    at.release(last);
                }
                if (end == block.num_stages) break;
                if (has_lead && group == 0) ptx::bar_arrive(kLeadBarrier, 256);
            }
            ptx::wgmma_wait_group<0>();
            ptx::pin(sums);
            at.release(at.full);
            at.advance();
            output.write(epilogue, args.grid.pairs, place, sums);
        });
    }
};

template <class Dtype, GemmTileSm90 T>
__device__ __forceinline__ void linear_gemm_sm90(const LinearGemmSm90Args& args) {
    using Gemm = LinearGemmSm90<Dtype, T>;
    Gemm::Block::run(args, [&](const auto& block, int group) __attribute__((always_inline)) {
        with_epilogue<Dtype>(args.to, [&](const auto& epilogue) __attribute__((always_inline)) {
            Gemm::multiply(args, epilogue, block, group);
        });
    });
}

}  // namespace mk
