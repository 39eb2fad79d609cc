// The block of linear_gemm_sm90.cuh and linear_fp8_sm90.cuh: which tiles it makes, and the ring of
// stages that one thread fills and two warpgroups multiply. A stage is 128 bytes along k of the
// tile's rows of x, then of w, with wgmma's 128-byte swizzle.
//
//   cluster, here of 2 x 2 blocks:        columns n0 ...  n0 + T.n ...
//                       rows m0 ...      |   rank 0    |    rank 2    |
//                       rows m0 + T.m    |   rank 1    |    rank 3    |
//     Blocks of a row need the same x, blocks of a column the same w: each fetches its share of
//     them, for itself and, by multicast, for the others.
//
//   smem, T.n = 256:  | 4 stages of x 16 KB, w 32 KB | 8 warps' 2 KB of sums, and rows | barriers |
//
// Events are mbarriers: a full stage's is its block's arrival and the bytes of the boxes, its own
// and the others'; an empty one's the arrivals of both warpgroups of all blocks it is fetched for.
// The copying thread goes on to the next tile while the sums of this one are written.
#pragma once

#include "common/wgmma.cuh"
#include "linear/linear_tiles.h"

namespace mk {

template <GemmTileSm90 T, int kElementBytes>
struct GemmBlockSm90 {
    static constexpr int kGroupRows = 64;  // of a warpgroup
    static constexpr int kGroups = T.m / kGroupRows;
    static constexpr int kRowBytes = 2 * kGemmStageK;
    static constexpr int kStageK = kRowBytes / kElementBytes;
    static constexpr int kXBytes = T.m * kRowBytes;
    static constexpr int kStageBytes = gemm_stage_bytes(T);
    static_assert(kGroups == 2 && kRowBytes == 128);

    const GemmGridSm90& grid;
    const TensorMap &x_map, &w_map;
    uint32_t smem_stages, smem_full, smem_empty;
    int num_stages;      // along k
    int rank_m, rank_n;  // in the cluster

    __device__ __forceinline__ int rank(int m, int n) const { return m + n * grid.cluster.m; }

    struct Tile {
        int m0, n0;
    };
    // This block's tile of the cluster's number i. As in linear_gemm_sm80.cuh, in groups of rows
    // of x; in a group m first.
    __device__ __forceinline__ Tile tile(int i) const {
        const int group = i / (grid.group * grid.clusters_n) * grid.group;
        const int in_group = i - group * grid.clusters_n;
        const int height = min(grid.group, grid.clusters_m - group);
        const int n = in_group / height;
        const int m = group + in_group - n * height;
        return {(m * grid.cluster.m + rank_m) * T.m, (n * grid.cluster.n + rank_n) * T.n};
    }
    // The clusters take tiles in turn.
    template <class Body>
    __device__ __forceinline__ void each_tile(const Body& body) const {
        const int size = grid.cluster.m * grid.cluster.n;
        const int end = grid.clusters_m * grid.clusters_n;
        MK_NO_UNROLL
        for (int i = blockIdx.x / size; i < end; i += gridDim.x / size) body(tile(i));
    }

    // A box of rows from `row` on, for all `blocks` of a mask, or for this one: multicast to itself
    // is not asked of a launch that has no clusters.
    static __device__ __forceinline__ void copy(uint32_t smem, const TensorMap& map, int k, int row,
                                                uint32_t full, uint16_t blocks, bool is_shared) {
        if (is_shared) {
            ptx::cp_async_bulk_tensor_2d_multicast(smem, &map, k, row, full, blocks);
        } else {
            ptx::cp_async_bulk_tensor_2d(smem, &map, k, row, full);
        }
    }

    // By the thread that fetches.
    __device__ __forceinline__ void fetch() const {
        // The blocks that share this one's rows of x (its row of the cluster), and of w.
        const bool shares_x = grid.cluster.n > 1, shares_w = grid.cluster.m > 1;
        uint16_t row = 0, column = 0;
        for (int i = 0; i < grid.cluster.n; ++i) row |= 1 << rank(rank_m, i);
        for (int i = 0; i < grid.cluster.m; ++i) column |= 1 << rank(i, rank_n);
        const int box_x = T.m / grid.cluster.n, box_w = T.n / grid.cluster.m;  // rows
        const int first_x = rank_n * box_x, first_w = rank_m * box_w;
        const uint32_t smem_x = smem_stages + first_x * kRowBytes;
        const uint32_t smem_w = smem_stages + kXBytes + first_w * kRowBytes;
        uint32_t stage = 0, parity = 1;  // of the phase before the one that fills it
        each_tile([&](const Tile& to) {
            MK_NO_UNROLL
            for (int s = 0; s < num_stages; ++s) {
                const uint32_t full = smem_full + 8 * stage;
                while (!ptx::mbarrier_try_wait_parity(smem_empty + 8 * stage, parity)) {
                }
                ptx::mbarrier_arrive_expect_tx(full, kStageBytes);
                copy(smem_x + stage * kStageBytes, x_map, s * kStageK, to.m0 + first_x, full, row,
                     shares_x);
                copy(smem_w + stage * kStageBytes, w_map, s * kStageK, to.n0 + first_w, full,
                     column, shares_w);
                if (++stage == T.stages) stage = 0, parity ^= 1;
            }
        });
    }

    // The ring as a warpgroup that multiplies goes through it, from the first stage on.
    struct Ring {
        uint32_t full;    // of the stage: the barrier,
        uint64_t w;       // the operand; x lies x_before_w before it,
        uint32_t parity;  // of the phase that fills it
        // Values that the loop would otherwise compute again for every stage.
        uint64_t x_before_w;
        uint32_t first_full, last_full;
        uint64_t first_w;
        // Blocks of its row and column fetch for this one: each is a lane's to tell.
        bool is_releasing;
        uint32_t to_empty;

        __device__ __forceinline__ void wait() const {
            while (!ptx::mbarrier_try_wait_parity(full, parity)) {
            }
        }
        __device__ __forceinline__ void advance() {
            const bool is_last = full == last_full;
            full = is_last ? first_full : full + 8;
            w = is_last ? first_w : wgmma_advance(w, kStageBytes);
            parity ^= is_last;
        }
        // A stage that wgmma has read.
        __device__ __forceinline__ void release(uint32_t stage_full) const {
            if (is_releasing) ptx::mbarrier_arrive_shared_cluster(stage_full + to_empty);
        }
    };
    __device__ __forceinline__ Ring ring(int group) const {
        const int cluster_m = grid.cluster.m, cluster_n = grid.cluster.n;
        const int lane = threadIdx.x % 128;
        const bool is_releasing = lane < cluster_m + cluster_n - 1;
        const int other = lane - cluster_m;  // in the row, without this block
        const int block =
            other < 0 ? rank(lane, rank_n) : rank(rank_m, other + (other >= rank_n ? 1 : 0));
        const uint32_t to_empty =
            (is_releasing ? ptx::mapa_shared_cluster(smem_empty, block) : 0) - smem_full;
        const uint64_t x_before_w = ptx::mov_b32((kXBytes - group * kGroupRows * kRowBytes) >> 4);
        const uint32_t first_full = ptx::mov_b32(smem_full);
        const uint32_t last_full = ptx::mov_b32(smem_full + 8 * (T.stages - 1));
        const uint64_t first_w = wgmma_operand(smem_stages + kXBytes, 0, 8 * kRowBytes);
        return {first_full, first_w,      0,       x_before_w, first_full, last_full,
                first_w,    is_releasing, to_empty};
    }

    // The kernel: multiply(block, group, smem_warp) by each of the warpgroups that multiply.
    template <class Args, class Multiply>
    static __device__ __forceinline__ void run(const Args& args, const Multiply& multiply) {
        extern __shared__ uint8_t smem_unaligned[];
        ptx::griddepcontrol_launch_dependents();
        const uint32_t unaligned = static_cast<uint32_t>(__cvta_generic_to_shared(smem_unaligned));
        const uint32_t smem_stages = (unaligned + 1023) & ~1023u;
        const uint32_t smem_full =
            smem_stages + T.stages * kStageBytes + kGemmWarps * kGemmWarpBytes;
        const uint32_t smem_empty = smem_full + 8 * T.stages;
        const int rank_in_cluster = static_cast<int>(ptx::mov_u32_cluster_ctarank());
        const GemmBlockSm90 block{args.grid,
                                  args.x_map,
                                  args.w_map,
                                  smem_stages,
                                  smem_full,
                                  smem_empty,
                                  (args.product.k + kStageK - 1) / kStageK,
                                  rank_in_cluster % args.grid.cluster.m,
                                  rank_in_cluster / args.grid.cluster.m};
        if (threadIdx.x == 0) {
            for (int i = 0; i < T.stages; ++i) {
                ptx::mbarrier_init(smem_full + 8 * i, 1);
                ptx::mbarrier_init(smem_empty + 8 * i,
                                   kGroups * (args.grid.cluster.m + args.grid.cluster.n - 1));
            }
            ptx::fence_mbarrier_init();
        }
        __syncthreads();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
        ptx::griddepcontrol_wait();
        // The same in all lanes, and known to be: descriptors then take uniform registers.
        const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1;
        if (group < 0) {
            ptx::setmaxnreg_dec<kProducerRegisters>();
            if (threadIdx.x == 0) block.fetch();
        } else {
            ptx::setmaxnreg_inc<kConsumerRegisters>();
            const uint32_t smem_warp =
                ptx::mov_b32(smem_stages + T.stages * kStageBytes +
                             (threadIdx.x / 32 - 4) * kGemmWarpBytes);  // kept in a register
            multiply(block, group, static_cast<uint8_t*>(__cvta_shared_to_generic(smem_warp)));
        }
        // Until then others may copy into this block's stages, and arrive at its barriers.
        __syncwarp();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
    }
};

}  // namespace mk
