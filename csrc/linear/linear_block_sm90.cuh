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
//   smem, T.n = 256:  | 4 stages of x 16 KB, w 32 KB | barriers |
//
// Events are mbarriers: a full stage's is its block's arrival and the bytes of the boxes, its own
// and the others'; an empty one's the arrivals of both warpgroups of all blocks it is fetched for.
// The copying thread goes on to the next tile while the sums of this one are written.
#pragma once

#include "common/wgmma.cuh"
#include "linear/linear_output_sm90.cuh"

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
    // Of a thread. 128 x 256 has 128 sums and 64 words that wait for the outputs.
    static constexpr int kFetchRegisters = T.n == 256 ? 24 : kProducerRegisters;
    static constexpr int kMultiplyRegisters = T.n == 256 ? 240 : kConsumerRegisters;
    static_assert(kFetchRegisters + 2 * kMultiplyRegisters <= 3 * 168);

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
    __device__ __forceinline__ GemmPlaceSm90 place(const Product& product, const Tile& to,
                                                   int group) const {
        const int warp = threadIdx.x / 32 % 4;
        return {to.m0 + group * kGroupRows + 16 * warp, product.m, to.n0};
    }
    // The clusters take tiles in turn. body(tile, find_next): it calls that when it has time.
    template <class Body>
    __device__ __forceinline__ void each_tile(const Body& body) const {
        const int size = grid.cluster.m * grid.cluster.n, step = gridDim.x / size;
        const int end = grid.clusters_m * grid.clusters_n;
        Tile next = tile(blockIdx.x / size);
        MK_NO_UNROLL
        for (int i = blockIdx.x / size; i < end; i += step) {
            const Tile to = next;
            body(to, [&] { next = tile(min(i + step, end - 1)); });
        }
    }

    // Multicast to itself is not asked of a launch that has no clusters.
    static __device__ __forceinline__ void copy_x(uint32_t smem, const TensorMap& map, int k,
                                                  int row, uint32_t full, uint16_t blocks) {
        if (blocks) {
            ptx::cp_async_bulk_tensor_2d_multicast(smem, &map, k, row, full, blocks);
        } else {
            ptx::cp_async_bulk_tensor_2d(smem, &map, k, row, full);
        }
    }
    static __device__ __forceinline__ void copy_w(uint32_t smem, const TensorMap& map, int k,
                                                  int row, int group, int pair, uint32_t full,
                                                  uint16_t blocks) {
        if (blocks) {
            ptx::cp_async_bulk_tensor_5d_multicast(smem, &map, k, row, 0, group, pair, full,
                                                   blocks);
        } else {
            ptx::cp_async_bulk_tensor_5d(smem, &map, k, row, 0, group, pair, full);
        }
    }

    // By the thread that fetches.
    __device__ __forceinline__ void fetch() const {
        // The blocks that share this one's rows of x (its row of the cluster), and of w: masks; 0
        // if there are no others.
        uint16_t row = 0, column = 0;
        if (grid.cluster.n > 1) {
            for (int i = 0; i < grid.cluster.n; ++i) row |= 1 << rank(rank_m, i);
        }
        if (grid.cluster.m > 1) {
            for (int i = 0; i < grid.cluster.m; ++i) column |= 1 << rank(i, rank_n);
        }
        const int box_x = T.m / grid.cluster.n, box_w = T.n / grid.cluster.m;  // rows
        const int first_x = rank_n * box_x, first_w = rank_m * box_w;
        const uint32_t smem_x = smem_stages + first_x * kRowBytes;
        const uint32_t smem_w = smem_stages + kXBytes + first_w * kRowBytes;
        // A tile has the 8 columns of pair 0 of all groups first; with one pair, rows as they lie.
        const bool has_pairs = grid.pairs > 1;
        const int pairs_log2 = __ffs(grid.pairs) - 1, groups = T.n / 8 >> pairs_log2;
        const int first_pair = first_w / 8 / groups, first_group = first_w / 8 % groups;
        uint32_t stage = 0, parity = 1;  // of the phase before the one that fills it
        each_tile([&](const Tile& to, const auto& find_next) {
            const int group = has_pairs ? (to.n0 / 8 >> pairs_log2) + first_group : 0;
            const int row_w = has_pairs ? 0 : to.n0 + first_w;
            MK_NO_UNROLL
            for (int s = 0; s < num_stages; ++s) {
                const uint32_t full = smem_full + 8 * stage;
                ptx::mbarrier_wait_parity(smem_empty + 8 * stage, parity);
                ptx::mbarrier_arrive_expect_tx(full, kStageBytes);
                copy_x(smem_x + stage * kStageBytes, x_map, s * kStageK, to.m0 + first_x, full,
                       row);
                copy_w(smem_w + stage * kStageBytes, w_map, s * kStageK, row_w, group, first_pair,
                       full, column);
                if (++stage == T.stages) stage = 0, parity ^= 1;
            }
            find_next();
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

        __device__ __forceinline__ void wait() const { ptx::mbarrier_wait_parity(full, parity); }
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

    // The kernel: multiply(block, group) by each of the warpgroups that multiply.
    template <class Args, class Multiply>
    static __device__ __forceinline__ void run(const Args& args, const Multiply& multiply) {
        extern __shared__ uint8_t smem_unaligned[];
        ptx::griddepcontrol_launch_dependents();
        const uint32_t unaligned = static_cast<uint32_t>(__cvta_generic_to_shared(smem_unaligned));
        const uint32_t smem_stages = (unaligned + 1023) & ~1023u;
        const uint32_t smem_full = smem_stages + T.stages * kStageBytes;
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
            ptx::setmaxnreg_dec<kFetchRegisters>();
            if (threadIdx.x == 0) block.fetch();
        } else {
            ptx::setmaxnreg_inc<kMultiplyRegisters>();
            multiply(block, group);
        }
        // Until then others may copy into this block's stages, and arrive at its barriers.
        __syncwarp();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
    }
};

}  // namespace mk
