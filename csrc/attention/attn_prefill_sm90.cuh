// Attention for prompts on Hopper: wgmma, a warp that copies and two warpgroups that multiply,
// after FlashAttention-3. What is computed, and masks: attn_prefill_sm80.cuh.
//
//   cluster = 2 blocks x 128 queries x head_dim, of two heads that share K and V, or of one head
//     warpgroup 0     its warp 0 fetches Q, K0, K1, V0, K2, V1, ...              40 registers
//     warpgroup 1     queries 0-63:   S = Q K^T [64 x 128], P, O += P V         232
//     warpgroup 2     queries 64-127
//
//     time ->   | S1 O0 |  softmax 1  | S2 O1 |  softmax 2  |     warpgroup 1
//               |  softmax 0  | S1 O0 |  softmax 1  | S2 O1 |     warpgroup 2
//
// The two take turns (named barriers) to hand S(j + 1) and O(j) to the tensor cores, so that
// one's softmax hides behind the other's MMAs; a warpgroup's own softmax of S(j + 1) runs under its
// O(j). P stays in registers: rounded accumulators of S are A of the second product.
// Blocks stay on their SM and take one item after another (attn_schedule.cuh). The next one's Q, K
// and V are fetched (attn_fetch_sm90.cuh) under this one's last tiles, and the turns go on over it:
// a warpgroup writes its output, 16 rows a warp by TMA where all of them exist, under the other's
// MMAs. docs/attention.md goes through it tile by tile.
// Of a tile of 128 x 128 logits, head_dim 128, the tensor cores take 2048 clocks.
#pragma once

#include "attention/attn_consumer_sm90.cuh"
#include "attention/attn_rope.cuh"

namespace mk {

template <class Dtype, int kHeadDim>
struct AttnPrefillSm90 : AttnConsumerSm90<AttnRing<AttnPrefillSm90Args, kHeadDim>> {
    using Consumer = AttnConsumerSm90<AttnRing<AttnPrefillSm90Args, kHeadDim>>;
    using Consumer::args, Consumer::ring, Consumer::group, Consumer::warp;
    using Consumer::kN, Consumer::kOwn, Consumer::kWarpRows;
    using Consumer::pass_turn, Consumer::release, Consumer::take_turn;
    using typename Consumer::Place, typename Consumer::Ring;
    using QLayout = typename Ring::QLayout;
    using KvLayout = typename Ring::KvLayout;
    static_assert(Ring::kGroups == 2);

    using Logits = float[1][kN / 8][4];
    using Weights = uint32_t[kN / 16][4];
    using Acc = float[1][kHeadDim / 8][4];

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

    // A warp's part of the item, whose tiles have numbers first, first + 1, ...
    __device__ __forceinline__ void multiply(const AttnItem& item, uint32_t first,
                                             const VisibleKeys& visible, Softmax<1>& softmax,
                                             Acc& acc) const {
        const int row = this->first_row(item);
        const int num_tiles = item.num_tiles;
        const auto [any_begin, any_end, all_begin, all_end] = this->tiles(item, visible);

        const uint64_t q = wgmma_operand(ring.q + group * Ring::kQBytes, 0, 8 * QLayout::kPitch);
        const uint64_t k = wgmma_operand(ring.k(), 0, 8 * KvLayout::kPitch);
        const uint64_t v = wgmma_operand(ring.v(), KvLayout::kPiecePitch, 8 * KvLayout::kPitch);
        // Descriptors take uniform registers where the compiler knows that they are the same in all
        // lanes: 64 instructions a tile less.
        const auto of_slot = [](uint64_t first, const Place& at) {
            const bool is_second = __shfl_sync(0xFFFFFFFFu, at.slot, 0);
            return is_second ? wgmma_advance(first, Ring::kSlotBytes) : first;
        };
        const auto skip = [&](int i) {
            const Place at = ring.place(first + i);
            take_turn();
            pass_turn();
            Ring::template wait<Ring::kKFull>(at.events, at.parity);
            release<Ring::kKEmpty>(at);
            Ring::template wait<Ring::kVFull>(at.events, at.parity);
            release<Ring::kVEmpty>(at);
        };

        Logits s;
        Weights weights;
        const auto start_s = [&](const Place& at) {
            Ring::template wait<Ring::kKFull>(at.events, at.parity);
            ptx::wgmma_fence();
            start_qk(s, q, of_slot(k, at));
        };
        const auto start_o = [&](const Place& at) {
            Ring::template wait<Ring::kVFull>(at.events, at.parity);
            ptx::wgmma_fence();
            start_pv(acc, weights, of_slot(v, at));
        };
        const auto mask = [&](int i) {
            if (i < all_begin || i >= all_end) {
                hide(s, visible, row, (item.tile_begin + i) * kN, i < all_begin);
            }
        };
        const auto release_q = [&] {
            if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive<8 * Ring::kQEmpty>(ring.events());
        };

        int i = 0;
        MK_NO_UNROLL
        for (; i < any_begin; ++i) skip(i);
        if (i < any_end) {
            float factors[1][2];
            Place last = ring.place(first + i);
            take_turn();
            start_s(last);
            pass_turn();
            ptx::wgmma_wait_group<0>();
            ptx::pin(s[0]);
            release<Ring::kKEmpty>(last);
            mask(i);
            softmax.follow(s, factors);  // acc is 0
            softmax.weigh(s);
            round(weights, s);
            ptx::pin(weights);
            MK_NO_UNROLL
            for (++i; i < any_end; ++i) {
                const Place at = ring.place(first + i);
                take_turn();
                start_s(at);
                start_o(last);
                pass_turn();
                ptx::wgmma_wait_group<1>();
                ptx::pin(s[0]);
                release<Ring::kKEmpty>(at);
                mask(i);
                const bool is_rescaled = softmax.follow(s, factors);
                softmax.weigh(s);
                ptx::wgmma_wait_group<0>();
                ptx::pin(acc[0]);
                release<Ring::kVEmpty>(last);
                if (is_rescaled) softmax.rescale(acc, factors);
                round(weights, s);
                ptx::pin(weights);
                ptx::pin(acc[0]);
                last = at;
            }
            release_q();
            start_o(last);
            ptx::wgmma_wait_group<0>();
            ptx::pin(acc[0]);
            release<Ring::kVEmpty>(last);
        } else {
            release_q();
        }
        MK_NO_UNROLL
        for (; i < num_tiles; ++i) skip(i);
    }

    // `smem`: ring.q as a pointer.
    __device__ __forceinline__ void run_consumer(uint8_t* smem) const {
        const mk_attention_params& p = args.p;
        uint32_t num_tiles = 0;
        if (group == 1) pass_turn();  // the first one is group 0's
        MK_NO_UNROLL
        for (uint32_t parity = 0;; parity ^= 1) {
            Ring::template wait<Ring::kQFull>(ring.events(), parity);
            const AttnItem item = AttnItem::read(ring.item(0));
            if (item.head == AttnItem::kNone) break;
            VisibleKeys visible(p, item.num_q, item.num_k);
            visible.num_keys = item.key_end;  // to these queries
            if (p.rope.cos && item.num_tiles > 0) rotate(item, visible.offset, smem);
            Softmax<1> softmax(args.scale);
            Acc acc = {};
            multiply(item, num_tiles, visible, softmax, acc);
            num_tiles += item.num_tiles;
            this->template write<Dtype, kHeadDim>(item, softmax, acc, 1.f, smem);
        }
        if (group == 0) take_turn();  // which group 1 passed in the end
        if (threadIdx.x % 32 == 0) ptx::cp_async_bulk_wait_group_read<0>();
    }

    // The warp's rows of Q, in place.
    __device__ __forceinline__ void rotate(const AttnItem& item, int offset, uint8_t* smem) const {
        const int row = this->first_row(item);
        const int num_rows = min(item.num_q - row, kWarpRows);
        if (num_rows > 0) {
            uint8_t* const smem_rows =
                smem + group * Ring::kQBytes + warp * kWarpRows * QLayout::kPitch;
            rotate_rows<Dtype, QLayout, kHeadDim, kWarpRows>(smem_rows, num_rows, args.p.rope,
                                                             item.first_q + row, row + offset);
        }
        ptx::fence_proxy_async();
        ptx::bar_sync(kOwn + group, 128);
    }

    static __device__ __forceinline__ void run(const AttnPrefillSm90Args& args) {
        extern __shared__ uint8_t smem_unaligned[];
        const uint32_t unaligned = static_cast<uint32_t>(__cvta_generic_to_shared(smem_unaligned));
        const Ring ring{(unaligned + 1023) & ~1023u};
        if (threadIdx.x == 0) ring.init();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
        ptx::griddepcontrol_launch_dependents();
        ptx::griddepcontrol_wait();

        // The same in all lanes, and known to be: descriptors then take uniform registers.
        const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1;
        if (group < 0) {
            ptx::setmaxnreg_dec<kProducerRegisters>();
            if (threadIdx.x >= 32) return;
            AttnFetch<Ring>{args, ring, ptx::mov_u32_cluster_ctarank()}.run();
        } else {
            ptx::setmaxnreg_inc<kConsumerRegisters>();
            const uint32_t peer =
                ptx::mapa_shared_cluster(ring.q, threadIdx.x % kAttnPrefillCluster);
            AttnPrefillSm90{
                {args, ring, group, static_cast<int>(threadIdx.x / 32 % 4), peer - ring.q}}
                .run_consumer(smem_unaligned + (ring.q - unaligned));
        }
        // Until then the other block may arrive at barriers here.
        __syncwarp();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
    }
};

template <class Dtype, int kHeadDim>
__device__ __forceinline__ void attn_prefill_sm90(const AttnPrefillSm90Args& args) {
    AttnPrefillSm90<Dtype, kHeadDim>::run(args);
}

}  // namespace mk
