// The rings of quant_gemm_sm90.cuh in shared memory, the tiles that a block goes over, and the two
// warps that fetch them: one x and its sums, for all blocks of the cluster, one w.
//
// A stage of x has 64 k of T.tokens rows or, behind those of 256 k, their sums; a slot of w has 256
// k of the block's 128 rows, 64 of them for each of the two warpgroups that multiply: of gate and
// up one has gate's, the other up's. Each is full when its bytes are there, and empty when both
// warpgroups of all blocks that get it have read it (w: all warps of the block).
#pragma once

#include "common/vec.cuh"
#include "ptx/sm90.cuh"
#include "quant/quant_gemm_tiles.h"

namespace mk {

template <QuantGemmTileSm90 T>
struct QuantRingSm90 {
    static constexpr int kGroups = 2;  // warpgroups that multiply
    static constexpr int kStageBytes = quant_gemm_x_bytes(T);
    static constexpr int kWAt = T.stages * kStageBytes;
    static constexpr int kBarriersAt = quant_gemm_barriers_at(T);
    static_assert(kBarriersAt % 8 == 0);
    static_assert(T.stages >= 5, "a group's stages have room, so that the next one's w is fetched");

    struct Tile {  // of a warpgroup
        const QuantGemmMatrix& w;
        int first_row;    // of the matrix
        int first_token;  // of x
    };
    static constexpr int kGroupRows = kQuantGemmRowsSm90 / kGroups;
    static constexpr int kGroupTiles = kGroupRows / kQuantTileRows;
    static constexpr int kGroupSlotBytes = kQuantGemmSlotBytes / kGroups;

    const QuantGemmArgs& args;
    const uint32_t smem;  // address of all
    const int rank;       // in the cluster

    __device__ __forceinline__ uint32_t x_at(uint32_t stage) const {
        return smem + stage * kStageBytes;
    }
    __device__ __forceinline__ uint32_t w_at(uint32_t slot, int group) const {
        return smem + kWAt + slot * kQuantGemmSlotBytes + group * kGroupSlotBytes;
    }
    __device__ __forceinline__ uint32_t x_full(uint32_t stage) const {
        return smem + kBarriersAt + 8 * stage;
    }
    __device__ __forceinline__ uint32_t x_empty(uint32_t stage) const {
        return x_full(stage) + 8 * T.stages;
    }
    __device__ __forceinline__ uint32_t w_full(uint32_t slot) const {
        return smem + kBarriersAt + 16 * T.stages + 8 * slot;
    }
    __device__ __forceinline__ uint32_t w_empty(uint32_t slot) const {
        return w_full(slot) + 8 * T.slots;
    }

    // A place in a ring of kSize, and the parity of the phase that fills it.
    template <int kSize>
    struct Place {
        uint32_t at = 0, parity = 0;
        __device__ __forceinline__ void advance() {
            const bool is_last = at == kSize - 1;
            at = is_last ? 0 : at + 1;
            parity ^= is_last;
        }
    };
    static __device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
        while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
        }
    }

    // As in quant_gemm_sm80.cuh: in groups of rows of x, in a group m first. The clusters take
    // tiles in turn, a block of one after the other along the rows of w.
    __device__ __forceinline__ int tiles_m() const { return (args.m + T.tokens - 1) / T.tokens; }
    __device__ __forceinline__ int num_tiles() const {  // of the cluster's
        return tiles_m() * (args.strips / args.cluster);
    }
    __device__ __forceinline__ Tile tile(int i, int of_group) const {
        constexpr int kGroup = kQuantGemmGroupRows / T.tokens;
        const int tiles_n = args.strips / args.cluster;
        const int group = i / (kGroup * tiles_n) * kGroup;
        const int in_group = i - group * tiles_n;
        const int height = min(kGroup, tiles_m() - group);
        const int n = in_group / height;
        const int strip = n * args.cluster + rank;
        const int first_token = (group + in_group - n * height) * T.tokens;
        if (args.is_pair) return {args.w[of_group], strip * kGroupRows, first_token};
        const int matrix = (args.num_matrices > 1 && strip >= args.w[1].first_strip) +
                           (args.num_matrices > 2 && strip >= args.w[2].first_strip);
        const QuantGemmMatrix& w = args.w[matrix];
        return {w, (strip - w.first_strip) * kQuantGemmRowsSm90 + of_group * kGroupRows,
                first_token};
    }

    // By one thread, before a barrier of the cluster.
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < T.stages; ++i) {
            ptx::mbarrier_init(x_full(i), 1);
            ptx::mbarrier_init(x_empty(i), kGroups * args.cluster);
        }
        for (int i = 0; i < T.slots; ++i) {
            ptx::mbarrier_init(w_full(i), 1);
            ptx::mbarrier_init(w_empty(i), kQuantGemmWarpsSm90);
        }
        ptx::fence_mbarrier_init();
    }

    // The next stage, kBytes of 64 rows of x: this block's share of them, to all blocks of the
    // cluster, in pieces of which a lane has one. `row`: its first, of the stage.
    template <int kBytes>
    __device__ __forceinline__ void fetch_stage(Place<T.stages>& stage, const uint8_t*& from,
                                                int row) const {
        constexpr int kRowBytes = kBytes / kPreparedRows;
        const uint32_t full = x_full(stage.at);
        wait(x_empty(stage.at), stage.parity ^ 1);
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(full, T.tokens * kRowBytes);
        __syncwarp();
        if (row < (rank + 1) * T.tokens / args.cluster) {
            const uint32_t to = x_at(stage.at) + row * kRowBytes;
            if (args.cluster > 1) {
                ptx::cp_async_bulk_multicast(to, from, piece() * kRowBytes, full,
                                             static_cast<uint16_t>((1 << args.cluster) - 1));
            } else {  // multicast to itself is not asked of a launch that has no clusters
                ptx::cp_async_bulk(to, from, piece() * kRowBytes, full);
            }
        }
        from += kBytes;
        stage.advance();
    }
    __device__ __forceinline__ int piece() const {  // rows: those of a block of 64 lie together
        return min(T.tokens / args.cluster, kPreparedRows);
    }

    // By a warp.
    __device__ __forceinline__ void fetch_x() const {
        Place<T.stages> stage;
        const int row = rank * T.tokens / args.cluster + threadIdx.x * piece();
        MK_NO_UNROLL
        for (int i = blockIdx.x / args.cluster; i < num_tiles(); i += gridDim.x / args.cluster) {
            // Past m the rows before are copied again.
            const int block =
                min((tile(i, 0).first_token + row) / kPreparedRows, (args.m - 1) / kPreparedRows);
            const auto of_rows = [&](const uint8_t* from, int count, int bytes) {
                return from + int64_t{block} * count * bytes +
                       row % kPreparedRows * (bytes / kPreparedRows);
            };
            const uint8_t* x = of_rows(args.x.x16, args.x.quarters, kPreparedX16Bytes);
            const uint8_t* sums = of_rows(args.x.sums, args.x.groups, kPreparedSumsBytes);
            int left = args.x.quarters;
            MK_NO_UNROLL
            do {
                fetch_stage<kPreparedX16Bytes>(stage, x, row);
                // The sums of 256 k behind their stages.
                if (--left % 4 == args.x.quarters % 4 || left == 0) {
                    fetch_stage<kPreparedSumsBytes>(stage, sums, row);
                }
            } while (left > 0);
        }
    }

    // By a warp: a lane has one of the tiles.
    __device__ __forceinline__ void fetch_w() const {
        Place<T.slots> slot;
        const int lane = threadIdx.x % 32, group = min(lane / kGroupTiles, kGroups - 1);
        MK_NO_UNROLL
        for (int i = blockIdx.x / args.cluster; i < num_tiles(); i += gridDim.x / args.cluster) {
            const Tile to = tile(i, group);
            const int tile_bytes = to.w.tile_bytes;
            // Past the last tile that one is copied again.
            const uint8_t* from =
                to.w.tiles + min(to.first_row / kQuantTileRows + lane % kGroupTiles,
                                 (to.w.rows - 1) / kQuantTileRows) *
                                 to.w.row_tile_bytes;
            const int both_bytes = tile_bytes + __shfl_sync(0xFFFFFFFFu, tile_bytes, kGroupTiles);
            MK_NO_UNROLL
            for (int left = args.x.quarters; left > 0; left -= 4) {
                const uint32_t full = w_full(slot.at);
                wait(w_empty(slot.at), slot.parity ^ 1);
                if (lane == 0) {  // which has one of the first warpgroup's
                    ptx::mbarrier_arrive_expect_tx(full,
                                                   kGroupTiles * (both_bytes * min(left, 4) / 4));
                }
                __syncwarp();
                if (lane < kQuantGemmWarpsSm90) {
                    ptx::cp_async_bulk(w_at(slot.at, group) + lane % kGroupTiles * tile_bytes, from,
                                       tile_bytes * min(left, 4) / 4, full);
                }
                from += tile_bytes;
                slot.advance();
            }
        }
    }
};

}  // namespace mk
