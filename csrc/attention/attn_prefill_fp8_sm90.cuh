// Attention for prompts of e4m3 Q, K and V on Hopper, head_dim 128. As attn_prefill_sm90.cuh, which
// see for the picture; what differs:
//
//     warpgroup 0     warp 0 fetches, warps 1 and 2 transpose V (attn_transpose_sm90.cuh)     40
//     warpgroup 1, 2  a tile's part of O and of sum(P) start from 0 and are added in fp32    232
//
//   smem:  | Q 16 KB | K 4 x 16 KB | V 2 x 16 KB | V^T, ones 2 x 17 KB | O 32 KB | barriers, items
//   |
//
//   logits = S * q_descale * k_descale * softmax_scale     one factor, in that of exp2
//   P      = e4m3(2^(logits - reference))                  2^6 ... 2^8 at a row's largest
//   out    = O / sum(P) * v_descale
//
// e4m3 has three bits down to 2^-6, so weights have them down to 2^-12 of the largest and vanish at
// 2^-16 of it; with a largest of 2^0, as 16 bits have it, they would at 2^-10. The sum is of
// rounded weights, by eight more rows of V^T that are 1: out is a weighted mean of V then, and 64
// additions a lane and tile go. Sums of 8-bit wgmma keep 13 bits behind the point of their largest
// term, which a long one leaves its later terms few of: docs/attention.md has the numbers. Of a
// tile of 128 x 128 logits, the tensor cores take 1056 clocks, exp2 1024, shared memory 1168.
#pragma once

#include "attention/attn_consumer_sm90.cuh"
#include "attention/attn_transpose_sm90.cuh"
#include "ptx/sm89.cuh"
#include "ptx/sm90_wgmma_fp8.cuh"

namespace mk {

template <class Dtype>  // of the output
struct AttnPrefillFp8Sm90 : AttnConsumerSm90<AttnRing<AttnPrefillFp8Args, 128>> {
    using Consumer = AttnConsumerSm90<AttnRing<AttnPrefillFp8Args, 128>>;
    using QLayout = Ring::QLayout;
    using KvLayout = Ring::KvLayout;
    static constexpr int kHeadDim = 128;
    static_assert(Ring::kGroups == 2);

    using Logits = float[1][kN / 8][4];
    using Weights = uint32_t[kN / 32][4];
    using Acc = float[1][kHeadDim / 8][4];
    using Part = float[kHeadDim / 8 + 1][4];  // of O, and sums of P
    using Softmax = mk::Softmax<1, true>;

    // S = Q K^T, under way.
    static __device__ __forceinline__ void start_qk(Logits& s, uint64_t q, uint64_t k) {
        static_for<kHeadDim / 32>([&](auto j) {
            ptx::wgmma_e4m3<(j > 0)>(s[0], wgmma_advance(q, j * 32), wgmma_advance(k, j * 32));
        });
        ptx::wgmma_commit_group();
    }

    // P V, under way.
    static __device__ __forceinline__ void start_pv(Part& part, const Weights& weights,
                                                    uint64_t t) {
        static_for<kN / 32>(
            [&](auto n) { ptx::wgmma_e4m3<(n > 0)>(part, weights[n], wgmma_advance(t, n * 32)); });
        ptx::wgmma_commit_group();
    }

    // Columns 2q, 2q + 1, 8 + 2q and 9 + 2q of 16 become neighbours, as in V^T.
    static __device__ __forceinline__ void round(Weights& weights, const Logits& s) {
        MK_UNROLL
        for (int i = 0; i < kN / 32 * 4; ++i) {
            const int n = i / 4 * 4 + i % 4 / 2 * 2, h = i % 2 * 2;  // of the registers of A
            const uint16_t low = ptx::cvt_rn_satfinite_e4m3x2_f32(s[0][n][h + 1], s[0][n][h]);
            const uint16_t high =
                ptx::cvt_rn_satfinite_e4m3x2_f32(s[0][n + 1][h + 1], s[0][n + 1][h]);
            weights[i / 4][i % 4] = ptx::mov_b32(low, high);
        }
    }

    static __device__ __forceinline__ void add(Acc& acc, Softmax& softmax, const Part& part) {
        MK_UNROLL
        for (int i = 0; i < kHeadDim / 8 * 4; ++i) acc[0][i / 4][i % 4] += part[i / 4][i % 4];
        MK_UNROLL
        for (int h = 0; h < 2; ++h) softmax.sum[0][h] += part[kHeadDim / 8][2 * h];
    }
    static __device__ __forceinline__ void rescale(Acc& acc, Softmax& softmax,
                                                   const float (&factors)[1][2]) {
        softmax.rescale(acc, factors);
        MK_UNROLL
        for (int h = 0; h < 2; ++h) softmax.sum[0][h] *= factors[0][h];
    }

    // A warp's part of the item, as in attn_prefill_sm90.cuh. S, O, a tile's part and P take 212
    // registers of 232: tiles go by their number, which tells all of their places, bounds are in
    // shared memory, and what masks need is read from the item again.
    __device__ __forceinline__ void multiply(uint32_t smem_item, Softmax& softmax, Acc& acc) const {
        const auto visible_keys = [&](const AttnItem& item) {
            VisibleKeys visible(args.p, item.num_q, item.num_k);
            visible.num_keys = item.key_end;  // to these queries
            return visible;
        };
        uint32_t number = first_tile(smem_item);
        const uint32_t smem_bounds = ring.events() + Ring::kWarpWords + (4 * group + warp) * 16;
        const AttnItem item = AttnItem::read(smem_item);
        const auto of_item = tiles(item, visible_keys(item));
        __syncwarp();
        ptx::st_shared_v4(smem_bounds, {number + of_item.any_end, number + of_item.all_begin,
                                        number + of_item.all_end, 0});
        __syncwarp();
        const auto is_left = [&] {
            return static_cast<int>(number - ptx::ld_shared_v4(smem_bounds).x) < 0;
        };

        const auto k_place = [&](uint32_t n) { return ring.template place<Ring::kKSlots>(n); };
        const auto t_place = [&](uint32_t n) {
            return ring.template place<Ring::kTransposedSlots>(n);
        };
        const auto release_k = [](const Place& at) {
            if (threadIdx.x % 128 < kAttnPrefillCluster) {
                ptx::mbarrier_arrive_shared_cluster<8 * Ring::kKEmpty>(
                    ptx::mapa_shared_cluster(at.events, threadIdx.x % 128));
            }
        };
        // Of the transposing warps of this block alone.
        const auto release_t = [](const Place& at) {
            if (threadIdx.x % 128 == 0) {
                ptx::mbarrier_arrive<8 * Ring::kTransposedEmpty>(at.events);
            }
        };
        const auto skip = [&] {
            take_turn();
            pass_turn();
            const Place k = k_place(number), t = t_place(number);
            Ring::template wait<Ring::kKFull>(k.events, k.parity);
            release_k(k);
            Ring::template wait<Ring::kTransposedFull>(t.events, t.parity);
            release_t(t);
        };

        Logits s;
        Weights weights;
        Part part;
        const auto operand = [](uint32_t smem, uint32_t slot, int slot_bytes) {
            const uint32_t at = smem + __shfl_sync(0xFFFFFFFFu, slot, 0) * slot_bytes;
            return wgmma_operand(at, 0, 8 * KvLayout::kPitch);
        };
        const uint64_t q = wgmma_operand(ring.q + group * Ring::kQBytes, 0, 8 * QLayout::kPitch);
        const auto start_s = [&](const Place& at) {
            Ring::template wait<Ring::kKFull>(at.events, at.parity);
            ptx::wgmma_fence();
            start_qk(s, q, operand(ring.k(), at.slot, Ring::kSlotBytes));
        };
        const auto start_o = [&](const Place& at) {
            Ring::template wait<Ring::kTransposedFull>(at.events, at.parity);
            ptx::wgmma_fence();
            start_pv(part, weights, operand(ring.transposed(), at.slot, Ring::kTransposedBytes));
        };
        const auto mask = [&] {
            const uint4 bounds = ptx::ld_shared_v4(smem_bounds);
            const bool hides_first = static_cast<int>(number - bounds.y) < 0;
            if (hides_first || static_cast<int>(number - bounds.z) >= 0) {
                const AttnItem item = AttnItem::read(smem_item);
                const int tile = item.tile_begin + static_cast<int>(number - first_tile(smem_item));
                hide(s, visible_keys(item), first_row(item), tile * kN, hides_first);
            }
        };
        const auto release_q = [&] {
            if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive<8 * Ring::kQEmpty>(ring.events());
        };

        MK_NO_UNROLL
        for (int i = 0; i < of_item.any_begin; ++i, ++number) skip();
        if (is_left()) {
            float factors[1][2];
            take_turn();
            start_s(k_place(number));
            pass_turn();
            ptx::wgmma_wait_group<0>();
            ptx::pin(s[0]);
            release_k(k_place(number));
            mask();
            softmax.follow(s, factors);  // acc is 0
            softmax.weigh(s);
            round(weights, s);
            ptx::pin(weights);
            MK_NO_UNROLL
            for (++number; is_left(); ++number) {
                take_turn();
                start_s(k_place(number));
                start_o(t_place(number - 1));
                pass_turn();
                ptx::wgmma_wait_group<1>();
                ptx::pin(s[0]);
                release_k(k_place(number));
                mask();
                float factors[1][2];
                const bool is_rescaled = softmax.follow(s, factors);
                softmax.weigh(s);
                ptx::wgmma_wait_group<0>();
                ptx::pin(part);
                release_t(t_place(number - 1));
                add(acc, softmax, part);  // whose weights have the references before
                if (is_rescaled) rescale(acc, softmax, factors);
                round(weights, s);
                ptx::pin(weights);
            }
            release_q();
            start_o(t_place(number - 1));
            ptx::wgmma_wait_group<0>();
            ptx::pin(part);
            release_t(t_place(number - 1));
            add(acc, softmax, part);
        } else {
            release_q();
        }
        const uint32_t end = first_tile(smem_item) + AttnItem::read(smem_item).num_tiles;
        MK_NO_UNROLL
        for (; number != end; ++number) skip();
    }

    // What the item adds to AttnItem (AttnFetch::scales).
    static __device__ __forceinline__ uint4 scales(uint32_t smem_item) {
        return ptx::ld_shared_v4(smem_item + sizeof(AttnItem));
    }
    static __device__ __forceinline__ uint32_t first_tile(uint32_t smem_item) {
        return scales(smem_item).z;
    }

    // `smem`: ring.q as a pointer.
    __device__ __forceinline__ void run_consumer(uint8_t* smem) const {
        if (group == 1) pass_turn();  // the first one is group 0's
        MK_NO_UNROLL
        for (uint32_t smem_item = ring.item(0);;
             smem_item = ring.item(0) + ring.item(1) - smem_item) {
            Ring::template wait<Ring::kQFull>(ring.events(), smem_item != ring.item(0));
            if (AttnItem::read(smem_item).head == AttnItem::kNone) break;
            Softmax softmax(__uint_as_float(scales(smem_item).x));
            Acc acc = {};
            multiply(smem_item, softmax, acc);
            write<Dtype, kHeadDim>(AttnItem::read(smem_item), softmax, acc,
                                   __uint_as_float(scales(smem_item).y), smem);
        }
        if (group == 0) take_turn();  // which group 1 passed in the end
        if (threadIdx.x % 32 == 0) ptx::cp_async_bulk_wait_group_read<0>();
    }

    static __device__ __forceinline__ void run(const AttnPrefillFp8Args& args) {
        extern __shared__ uint8_t smem_unaligned[];
        const uint32_t unaligned = static_cast<uint32_t>(__cvta_generic_to_shared(smem_unaligned));
        const Ring ring{(unaligned + 1023) & ~1023u};
        if (threadIdx.x == 0) ring.init();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
        ptx::griddepcontrol_launch_dependents();
        ptx::griddepcontrol_wait();

        const int group = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128, 0) - 1;
        const int warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32 % 4, 0);
        if (group < 0) {
            ptx::setmaxnreg_dec<kProducerRegisters>();
            if (warp > Ring::kTransposers) return;
            if (warp == 0) {
                AttnFetch<Ring>{args, ring, ptx::mov_u32_cluster_ctarank()}.run();
            } else {
                AttnTranspose<Ring>{ring, warp - 1}.run();
            }
        } else {
            ptx::setmaxnreg_inc<kConsumerRegisters>();
            AttnPrefillFp8Sm90{{args, ring, group, warp}}.run_consumer(smem_unaligned +
                                                                       (ring.q - unaligned));
        }
        // Until then the other block may arrive at barriers here.
        __syncwarp();
        ptx::barrier_cluster_arrive();
        ptx::barrier_cluster_wait();
    }
};

template <class Dtype>
__device__ __forceinline__ void attn_prefill_fp8_sm90(const AttnPrefillFp8Args& args) {
    AttnPrefillFp8Sm90<Dtype>::run(args);
}

}  // namespace mk
