// Attention for prompts on Hopper: wgmma, a warp that copies and two warpgroups that multiply,
// after FlashAttention-3. What is computed, grid and masks: attn_prefill_sm80.cuh.
//
//   block = 128 queries x head_dim, 128 keys at a time
//     warpgroup 0     its warp 0 fetches K0, K1, V0, K2, V1, ...                 40 registers
//     warpgroup 1     queries 0-63:   S = Q K^T [64 x 128], P, O += P V         232
//     warpgroup 2     queries 64-127
//
//     time ->   | S1 O0 |  softmax 1  | S2 O1 |  softmax 2  |     warpgroup 1
//               |  softmax 0  | S1 O0 |  softmax 1  | S2 O1 |     warpgroup 2
//
// The two take turns (named barriers) to hand S(j + 1) and O(j) to the tensor cores, so that
// one's softmax hides behind the other's MMAs; a warpgroup's own softmax of S(j + 1) runs under its
// O(j). P stays in registers: rounded accumulators of S are A of the second product.
//
//   smem, head_dim 128:  | Q 2 x 16 KB | K 2 x 32 KB | V 2 x 32 KB | barriers |
//   Tiles are panels of 64 columns, rows of 128 bytes with wgmma's 128-byte swizzle; K is K-major,
//   V MN-major as it lies.
//
// Tiles come by TMA, one box or one a page. Those that reach before the first key that is seen,
// past the sequence's end or into a page that does not exist come by cp.async, with zeros for what
// is not read: the warp waits for its copies before the next ones, or when it has to wait anyway.
// Events are mbarriers: a full slot's is the warp's arrival and the bytes of its boxes, an empty
// one's the arrivals of both warpgroups.
// Of a tile of 128 x 128 logits, head_dim 128, the tensor cores take 2048 clocks.
#pragma once

#include "attention/attn_copy.cuh"
#include "attention/attn_output.cuh"
#include "attention/attn_rope.cuh"
#include "attention/mask.cuh"
#include "common/wgmma.cuh"

namespace mk {

template <class Dtype, int kHeadDim>
struct AttnPrefillSm90 {
    static constexpr AttnPrefillTile kTile = attn_prefill_tile(MK_SM, kHeadDim);
    static constexpr int kN = kTile.tile_n;
    static constexpr int kGroupRows = 64;  // queries of a warpgroup
    static constexpr int kGroups = kTile.tile_m / kGroupRows;
    static constexpr int kRowBytes = mk::kRowBytes<kHeadDim>;
    static constexpr int kSlotBytes = kN * kRowBytes;
    static constexpr int kQBytes = kGroupRows * kRowBytes;  // of a warpgroup
    static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
    static_assert(kGroups == 2 && kN == 128 && kTile.slots == 4 && kTile.producer_warps == 4);
    static_assert(128 * (kProducerRegisters + kGroups * kConsumerRegisters) <= 65536);

    using QLayout = Panels<kGroupRows>;
    using KvLayout = Panels<kN>;
    using QCopy = RowCopy<QLayout, kHeadDim>;
    using KvCopy = RowCopy<KvLayout, kHeadDim>;
    using Logits = float[1][kN / 8][4];
    using Weights = uint32_t[kN / 16][4];
    using Acc = float[1][kHeadDim / 8][4];

    // Barriers of shared memory, 8 bytes each, those of a ring's two slots side by side.
    enum Event {
        kQFull,
        kKFull,
        kVFull = kKFull + 2,
        kKEmpty = kVFull + 2,
        kVEmpty = kKEmpty + 2,
        kEvents = kVEmpty + 2
    };
    static_assert(8 * kEvents <= kAttnPrefillBarrierBytes);
    // Named barriers: a warpgroup's turn, and of its own warps.
    static constexpr int kTurn = 1, kOwn = kTurn + kGroups;

    const AttnPrefillSm90Args& args;
    const VisibleKeys visible;  // up to key_end
    uint32_t smem_q, smem_k, smem_v, smem_events;
    int first_q, num_q, first_k, num_k, block_row;
    int key_begin, key_end;  // that these queries see
    int tile_begin;
    uint32_t num_tiles;

    // Where tile number i of the block is: the address of its slot's events less their number, and
    // the parity of the phase that fills it.
    struct Place {
        uint32_t slot, events, parity;
    };
    __device__ __forceinline__ Place place(uint32_t i) const {
        return {i % 2, smem_events + i % 2 * 8, i / 2 % 2};
    }

    template <int kEvent>
    static __device__ __forceinline__ void wait(const Place& at, uint32_t parity) {
        while (!ptx::mbarrier_try_wait_parity<8 * kEvent>(at.events, parity)) {
        }
    }

    // ---- the warp that fetches ----

    struct Producer {
        const AttnPrefillSm90& block;
        const int kv_head;
        uint32_t under_way;  // event of copies by cp.async that were not waited for; 0: none

        // Waits for all copies but the latest kPending groups.
        template <int kPending>
        __device__ __forceinline__ void complete() {
            if (under_way == 0) return;
            ptx::cp_async_wait_group<kPending>();
            ptx::fence_proxy_async();
            __syncwarp();
            if (threadIdx.x == 0) ptx::mbarrier_arrive(under_way);
            under_way = 0;
        }

        template <int kEmpty>
        __device__ __forceinline__ void await_slot(const Place& at) {
            // The phase before the one that fills it.
            if (ptx::mbarrier_try_wait_parity<8 * kEmpty>(at.events, at.parity ^ 1)) return;
            complete<0>();
            wait<kEmpty>(at, at.parity ^ 1);
        }

        template <bool kIsK>
        __device__ __forceinline__ void fetch(uint32_t i) {
            const Place at = block.place(i);
            if (i >= 2) await_slot<kIsK ? kKEmpty : kVEmpty>(at);
            const uint32_t smem_slot = (kIsK ? block.smem_k : block.smem_v) + at.slot * kSlotBytes;
            const uint32_t event = at.events + 8 * (kIsK ? kKFull : kVFull);
            const int key = (block.tile_begin + static_cast<int>(i)) * kN;
            if (fetch_boxes<kIsK>(smem_slot, key, event)) {
                complete<0>();
            } else {
                copy_rows<kIsK>(smem_slot, key);
                ptx::cp_async_commit_group();
                complete<1>();
                under_way = event;
            }
        }

        // By TMA, if all of its rows exist and may be read; each lane has a box.
        template <bool kIsK>
        __device__ __forceinline__ bool fetch_boxes(uint32_t smem_slot, int key, uint32_t event) {
            const AttnPrefillSm90Args& args = block.args;
            if (args.box_rows == 0 || key < block.key_begin || key + kN > block.num_k) return false;
            const int lane = threadIdx.x;
            const int row = lane * args.box_rows;  // of the tile
            int page = 0;
            if (args.p.page_size) {
                if (row < kN) page = page_of_key(args, blockIdx.y, key + row);
                if (__any_sync(0xFFFFFFFFu, page == kBadPage)) return false;
            }
            if (lane == 0) ptx::mbarrier_arrive_expect_tx(event, kSlotBytes);
            __syncwarp();
            if (row >= kN) return true;
            const int token = block.first_k + ((key + row) & args.page_mask);
            MK_UNROLL
            for (int panel = 0; panel < kRowBytes / 128; ++panel) {
                ptx::cp_async_bulk_tensor_4d(
                    smem_slot + panel * KvLayout::kPiecePitch + row * KvLayout::kPitch,
                    kIsK ? &args.k_map : &args.v_map, panel * 64, kv_head, token, page, event);
            }
            return true;
        }

        // By cp.async, 16 rows at a time: those have one page.
        template <bool kIsK>
        __device__ __forceinline__ void copy_rows(uint32_t smem_slot, int first_key) {
            const AttnPrefillSm90Args& args = block.args;
            const mk_attention_params& p = args.p;
            const AttnPrefillArgs::Rows& tensor = kIsK ? args.k : args.v;
            const KvCopy copy(smem_slot);
            const uint8_t* const rows = static_cast<const uint8_t*>(kIsK ? p.k : p.v) +
                                        kv_head * (kIsK ? p.k_head_stride : p.v_head_stride) * 2 +
                                        copy.byte();
            MK_NO_UNROLL
            for (int u = 0; u < kN; u += 16) {
                const int key = first_key + u;
                const uint32_t slot = u * KvLayout::kPitch;
                const bool is_read = key < block.key_end && key + 16 > block.key_begin;
                const int page = p.page_size && is_read ? page_of_key(args, blockIdx.y, key) : 0;
                if (page == kBadPage) {  // NaN for each query that sees one of these keys
                    const uint32_t nan = kIsK ? ~0u : 0u;
                    copy.template fill<16>(slot, {nan, nan, nan, nan});
                    continue;
                }
                const int64_t row = block.first_k + (key & args.page_mask) + copy.row();
                copy.template some<16>(slot, rows + page * tensor.page_bytes + row * tensor.bytes,
                                       tensor.bytes_of_4, block.key_begin - key,
                                       block.key_end - key);
            }
        }

        __device__ __forceinline__ void run() {
            MK_NO_UNROLL
            for (uint32_t i = 0; i <= block.num_tiles; ++i) {
                if (i < block.num_tiles) fetch<true>(i);
                if (i > 0) fetch<false>(i - 1);
            }
            complete<0>();
        }
    };

    // This warp's rows of Q, 32 of each of the four warps of warpgroup 0.
    __device__ __forceinline__ void copy_q(int head) const {
        const mk_attention_params& p = args.p;
        constexpr int kRows = kTile.tile_m / kTile.producer_warps;
        const int first = threadIdx.x / 32 * kRows;  // of the block
        const QCopy copy(smem_q + first / kGroupRows * kQBytes +
                         first % kGroupRows * QLayout::kPitch);
        const int64_t stride = p.q_stride * 2;
        const int row = block_row + first;
        const auto* q = static_cast<const uint8_t*>(p.q) + head * p.q_head_stride * 2;
        copy.template some<kRows>(0, q + (first_q + row + copy.row()) * stride + copy.byte(),
                                  4 * stride, 0, num_q - row);
        ptx::cp_async_commit_group();
        ptx::cp_async_wait_group<0>();
        ptx::fence_proxy_async();
        ptx::mbarrier_arrive(smem_events + 8 * kQFull);
    }

    // ---- the warpgroups that multiply ----

    // S = Q K^T, under way.
    static __device__ __forceinline__ void start_qk(Logits& s, uint64_t q, uint64_t k) {
        static_for<kHeadDim / 16>([&](auto j) {
            const int panel = j / 4, byte = j % 4 * 32;
            ptx::wgmma<kWgmmaType<Dtype>, (j > 0)>(
                s[0], wgmma_advance(q, panel * QLayout::kPiecePitch + byte),
                wgmma_advance(k, panel * KvLayout::kPiecePitch + byte));
        });
        ptx::wgmma_commit_group();
    }

    // O += P V, under way.
    static __device__ __forceinline__ void start_pv(Acc& acc, const Weights& weights, uint64_t v) {
        static_for<kN / 16>([&](auto n) {
            ptx::wgmma<kWgmmaType<Dtype>, true, ptx::WgmmaMajor::kMn>(
                acc[0], weights[n], wgmma_advance(v, n * 16 * KvLayout::kPitch));
        });
        ptx::wgmma_commit_group();
    }

    static __device__ __forceinline__ void round(Weights& weights, const Logits& s) {
        MK_UNROLL
        for (int i = 0; i < kN / 16 * 4; ++i) {
            const float (&x)[4] = s[0][i / 2];
            weights[i / 4][i % 4] = Dtype::pack(x[i % 2 * 2], x[i % 2 * 2 + 1]);
        }
    }

    template <int kEmpty>
    static __device__ __forceinline__ void release(const Place& at) {
        if (threadIdx.x % 128 == 0) ptx::mbarrier_arrive<8 * kEmpty>(at.events);
    }

    __device__ __forceinline__ void consume(int group, int head, uint8_t* smem) const {
        const mk_attention_params& p = args.p;
        const int warp_row = group * kGroupRows + threadIdx.x / 32 % 4 * 16;
        const int row = block_row + warp_row;  // of the sequence, this warp's first
        const int num_rows = min(num_q - row, 16);
        Softmax<1> softmax(args.scale);
        Acc acc = {};
        uint8_t* const smem_group = smem + group * kQBytes;

        if (num_tiles > 0) {
            if (group == 1) ptx::bar_arrive(kTurn, 256);  // warpgroup 0 has the first turn
            wait<kQFull>({0, smem_events, 0}, 0);
            if (p.rope.cos) {
                if (num_rows > 0) {
                    rotate_rows<Dtype, QLayout, kHeadDim, 16>(
                        smem_group + threadIdx.x / 32 % 4 * 16 * QLayout::kPitch, num_rows, p.rope,
                        first_q + row, row + visible.offset);
                }
                ptx::fence_proxy_async();
                ptx::bar_sync(kOwn + group, 128);
            }
            multiply(group, softmax, acc);
            ptx::bar_sync(kOwn + group, 128);  // Q is read: its place is free
        }
        if (num_rows > 0) {
            uint8_t* const smem_rows = smem_group + threadIdx.x / 32 % 4 * 16 * kRowBytes;
            write_rows<Dtype, kHeadDim>(p, head, first_q + row, num_rows, softmax, acc, smem_rows);
        }
    }

    __device__ __forceinline__ void multiply(int group, Softmax<1>& softmax, Acc& acc) const {
        const int group_row = block_row + group * kGroupRows;
        const int group_last = min(group_row + kGroupRows, num_q) - 1;
        const int row = group_row + threadIdx.x / 32 % 4 * 16;
        // Of the block's tiles, those of which some of the warpgroup's queries see some key, and
        // those of which all of the warp's queries see all keys.
        const uint32_t any_begin = max(visible.begin(group_row) / kN - tile_begin, 0);
        const uint32_t any_end = group_row > group_last
                                     ? 0
                                     : max(min((visible.end(group_last) + kN - 1) / kN - tile_begin,
                                               static_cast<int>(num_tiles)),
                                           0);
        const int all_begin = (visible.begin(row + 15) + kN - 1) / kN - tile_begin;
        const int all_end = visible.end(row) / kN - tile_begin;

        const uint64_t q = wgmma_operand(smem_q + group * kQBytes, 0, 8 * QLayout::kPitch);
        const uint64_t k = wgmma_operand(smem_k, 0, 8 * KvLayout::kPitch);
        const uint64_t v = wgmma_operand(smem_v, KvLayout::kPiecePitch, 8 * KvLayout::kPitch);
        const auto of_slot = [](uint64_t first, uint32_t slot) {
            return slot ? wgmma_advance(first, kSlotBytes) : first;
        };
        const auto take_turn = [&] { ptx::bar_sync(kTurn + group, 256); };
        const auto pass_turn = [&](uint32_t i) {
            if (group == 0 || i + 1 < num_tiles) ptx::bar_arrive(kTurn + 1 - group, 256);
        };
        const auto skip = [&](uint32_t i) {
            const Place at = place(i);
            take_turn();
            pass_turn(i);
            wait<kKFull>(at, at.parity);
            release<kKEmpty>(at);
            wait<kVFull>(at, at.parity);
            release<kVEmpty>(at);
        };

        Logits s;
        Weights weights;
        const auto start_s = [&](const Place& at) {
            wait<kKFull>(at, at.parity);
            ptx::wgmma_fence();
            start_qk(s, q, of_slot(k, at.slot));
        };
        const auto start_o = [&](const Place& at) {
            wait<kVFull>(at, at.parity);
            ptx::wgmma_fence();
            start_pv(acc, weights, of_slot(v, at.slot));
        };
        const auto mask = [&](int i) {
            if (i < all_begin || i >= all_end) {
                hide(s, visible, row, (tile_begin + i) * kN, i < all_begin);
            }
        };

        uint32_t i = 0;
        MK_NO_UNROLL
        for (; i < any_begin; ++i) skip(i);
        if (i < any_end) {
            float factors[1][2];
            Place last = place(i);
            take_turn();
            start_s(last);
            pass_turn(i);
            ptx::wgmma_wait_group<0>();
            ptx::pin(s[0]);
            release<kKEmpty>(last);
            mask(i);
            softmax.follow(s, factors);  // acc is 0
            softmax.weigh(s);
            round(weights, s);
            ptx::pin(weights);
            MK_NO_UNROLL
            for (++i; i < any_end; ++i) {
                const Place at = place(i);
                take_turn();
                start_s(at);
                start_o(last);
                pass_turn(i);
                ptx::wgmma_wait_group<1>();
                ptx::pin(s[0]);
                release<kKEmpty>(at);
                mask(i);
                const bool is_rescaled = softmax.follow(s, factors);
                softmax.weigh(s);
                ptx::wgmma_wait_group<0>();
                ptx::pin(acc[0]);
                release<kVEmpty>(last);
                if (is_rescaled) softmax.rescale(acc, factors);
                round(weights, s);
                ptx::pin(weights);
                ptx::pin(acc[0]);
                last = at;
            }
            start_o(last);
            ptx::wgmma_wait_group<0>();
            ptx::pin(acc[0]);
            release<kVEmpty>(last);
        }
        MK_NO_UNROLL
        for (; i < num_tiles; ++i) skip(i);
    }

    static __device__ __forceinline__ void run(const AttnPrefillSm90Args& args) {
        const mk_attention_params& p = args.p;
        extern __shared__ uint8_t smem_unaligned[];
        ptx::griddepcontrol_launch_dependents();
        ptx::griddepcontrol_wait();

        const int head = blockIdx.x, sequence = blockIdx.y;
        const int first_q = p.cu_seqlens_q[sequence];
        const int num_q = p.cu_seqlens_q[sequence + 1] - first_q;
        const int num_tiles = (num_q + kTile.tile_m - 1) / kTile.tile_m;
        const int block_row = (num_tiles - 1 - static_cast<int>(blockIdx.z)) * kTile.tile_m;
        if (num_q <= p.skip_seqlen_q || block_row < 0) return;
        const int first_k = p.page_size ? 0 : p.cu_seqlens_k[sequence];
        const int num_k = p.page_size ? p.seqlens_k[sequence] + (p.seqlens_k_add ? num_q : 0)
                                      : p.cu_seqlens_k[sequence + 1] - first_k;
        VisibleKeys visible(p, num_q, num_k);
        const int key_begin = visible.begin(block_row);
        const int key_end = visible.end(min(block_row + kTile.tile_m, num_q) - 1);
        visible.num_keys = key_end;  // to these queries
        const int tile_begin = key_begin / kN;
        const int tile_end = key_end > key_begin ? (key_end + kN - 1) / kN : tile_begin;

        const uint32_t unaligned = static_cast<uint32_t>(__cvta_generic_to_shared(smem_unaligned));
        const uint32_t smem_q = (unaligned + 1023) & ~1023u;
        const uint32_t smem_k = smem_q + kGroups * kQBytes;
        const uint32_t smem_v = smem_k + 2 * kSlotBytes;
        const uint32_t smem_events = smem_v + 2 * kSlotBytes;
        const AttnPrefillSm90 block{
            args,    visible,    smem_q,
            smem_k,  smem_v,     smem_events,
            first_q, num_q,      first_k,
            num_k,   block_row,  key_begin,
            key_end, tile_begin, static_cast<uint32_t>(tile_end - tile_begin)};
        if (threadIdx.x == 0) {
            for (int i = 0; i < kEvents; ++i) {
                const int arrivals = i == kQFull ? 128 : i < kKEmpty ? 1 : kGroups;
                ptx::mbarrier_init(smem_events + 8 * i, arrivals);
            }
        }
        __syncthreads();
        // The same in all lanes, and known to be: descriptors then take uniform registers.
        const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1;
        if (group < 0) {
            ptx::setmaxnreg_dec<kProducerRegisters>();
            if (block.num_tiles == 0) return;
            block.copy_q(head);
            if (threadIdx.x >= 32) return;
            Producer{block, head / (p.num_q_heads / p.num_kv_heads), 0}.run();
        } else {
            ptx::setmaxnreg_inc<kConsumerRegisters>();
            block.consume(group, head, smem_unaligned + (smem_q - unaligned));
        }
    }
};

template <class Dtype, int kHeadDim>
__device__ __forceinline__ void attn_prefill_sm90(const AttnPrefillSm90Args& args) {
    AttnPrefillSm90<Dtype, kHeadDim>::run(args);
}

}  // namespace mk
