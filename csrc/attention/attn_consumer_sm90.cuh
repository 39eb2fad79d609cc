// What the warps that multiply do alike in sm_90's kernels of attention for prompts, whatever the
// type of Q, K and V: turns, slots, which tiles they see, and their output.
#pragma once

#include "attention/attn_fetch_sm90.cuh"
#include "attention/attn_output.cuh"
#include "common/wgmma.cuh"

namespace mk {

template <class AttnRing>
struct AttnConsumerSm90 {
    using Ring = AttnRing;
    using Place = typename Ring::Place;
    using OutLayout = typename Ring::OutLayout;
    static constexpr int kN = Ring::kN;
    static constexpr int kGroups = Ring::kGroups;
    static constexpr int kWarpRows = kAttnPrefillWarpRows;
    // Named barriers: a warpgroup's turn, and of its own warps.
    static constexpr int kTurn = 1, kOwn = kTurn + kGroups;

    const typename Ring::Args& args;
    const Ring ring;
    const int group;  // 0, 1
    const int warp;   // of the group
    // What is added to an address here to get the same in the block of rank threadIdx.x % 2; FP8
    // has no register for it.
    const uint32_t to_cluster = 0;

    // A slot has been read: in both blocks, as each one's warp writes to both.
    template <int kEmpty>
    __device__ __forceinline__ void release(const Place& at) const {
        if (threadIdx.x % 128 < kAttnPrefillCluster) {
            ptx::mbarrier_arrive_shared_cluster<8 * kEmpty>(at.events + to_cluster);
        }
    }

    __device__ __forceinline__ void take_turn() const { ptx::bar_sync(kTurn + group, 256); }
    __device__ __forceinline__ void pass_turn() const { ptx::bar_arrive(kTurn + 1 - group, 256); }

    // The warp's first query.
    __device__ __forceinline__ int first_row(const AttnItem& item) const {
        return item.row + group * Ring::kGroupRows + warp * kWarpRows;
    }

    // Of the item's tiles, those of which some of the warpgroup's queries see some key, and those
    // of which all of the warp's queries see all keys.
    struct Tiles {
        int any_begin, any_end, all_begin, all_end;
    };
    __device__ __forceinline__ Tiles tiles(const AttnItem& item, const VisibleKeys& visible) const {
        const int group_row = item.row + group * Ring::kGroupRows;
        const int group_last = min(group_row + Ring::kGroupRows, item.num_q) - 1;
        const int row = group_row + warp * kWarpRows;
        const int num_tiles = item.num_tiles;
        const int any_begin =
            min(max(visible.begin(group_row) / kN - item.tile_begin, 0), num_tiles);
        const int any_end =
            group_row > group_last
                ? 0
                : min((visible.end(group_last) + kN - 1) / kN - item.tile_begin, num_tiles);
        const int all_begin = (visible.begin(row + 15) + kN - 1) / kN - item.tile_begin;
        const int all_end = visible.end(row) / kN - item.tile_begin;
        return {any_begin, any_end, all_begin, all_end};
    }

    // The warp's rows of O, times v_scale, to out: all 16 by TMA, else those that exist by ordinary
    // stores. `smem`: ring.q as a pointer.
    template <class Dtype, int kHeadDim, bool kIsFp8>
    __device__ __forceinline__ void write(const AttnItem& item, Softmax<1, kIsFp8>& softmax,
                                          const float (&acc)[1][kHeadDim / 8][4], float v_scale,
                                          uint8_t* smem) const {
        const mk_attention_params& p = args.p;
        const int row = first_row(item);
        const int num_rows = min(item.num_q - row, kWarpRows);
        if (num_rows <= 0) return;
        const int token = item.first_q + row;
        softmax.finish();
        write_lse(p, item.head, token, num_rows, softmax);

        const int lane = threadIdx.x % 32;
        const uint32_t offset = ring.out() - ring.q + group * (4 * Ring::kOutBytes) +
                                warp * Ring::kOutBytes;  // of the warp's own place
        const uint32_t smem_lane = ring.q + offset + OutLayout::at(lane % 16, lane / 16 * 16);
        const float scales[2] = {softmax.inverse_sum(0, 0) * v_scale,
                                 softmax.inverse_sum(0, 1) * v_scale};
        if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();  // the item before
        __syncwarp();
        static_for<kHeadDim / 16>([&](auto j) {
            uint32_t block[4];
            MK_UNROLL
            for (int i = 0; i < 4; ++i) {
                const float (&x)[4] = acc[0][2 * j + i / 2];
                block[i] =
                    Dtype::pack(x[i % 2 * 2] * scales[i % 2], x[i % 2 * 2 + 1] * scales[i % 2]);
            }
            ptx::stmatrix_x4<j / 4 * OutLayout::kPiecePitch>(block_address(smem_lane, j), block);
        });
        if (args.has_out_map && num_rows == kWarpRows) {
            ptx::fence_proxy_async();
            __syncwarp();
            if (lane == 0) {
                MK_UNROLL
                for (int panel = 0; panel < kHeadDim / 64; ++panel) {
                    ptx::cp_async_bulk_tensor_3d_global_shared(
                        &args.out_map, panel * 64, item.head, token,
                        ring.q + offset + panel * OutLayout::kPiecePitch);
                }
                ptx::cp_async_bulk_commit_group();
            }
        } else {
            __syncwarp();
            copy_rows<OutLayout, kHeadDim, kWarpRows>(smem + offset, out_row(p, item.head, token),
                                                      p.out_stride * 2, num_rows);
        }
    }
};

}  // namespace mk
