// V transposed, for FP8: 8-bit wgmma takes B with neighbouring k, which of P V are keys.
//
// Two warps of the warpgroup that fetches turn V [128 keys][128 bytes] into V^T [128 features][128
// keys], both with the 128-byte swizzle, a slot at a time, between the ring that TMA fills and the
// one that wgmma reads. Each does 64 keys, in units of 32 keys x 16 features:
//
//   ldmatrix.trans  of pairs of bytes:   r0 = V[2q ... 2q + 1][2c ... 2c + 1]   c = lane / 4
//                   (keys of r1: + 8)    r1 = V[2q + 8 ... 2q + 9][2c ... ]     q = lane % 4
//   prmt            even = V[2q, 2q + 1, 2q + 8, 2q + 9][2c]      odd = the same of 2c + 1
//   stmatrix        rows of 16 keys, of feature 2c or 2c + 1
//
// So 16 keys lie in V^T in the order 0, 1, 8, 9, 2, 3, 10, 11, ...: 4q ... 4q + 3 are the keys
// whose logits lane q of a row has in its accumulators, and P becomes A of the second product with
// no exchange between lanes (attn_prefill_fp8_sm90.cuh). A matrix of stmatrix takes its rows of
// even features from lanes 0-15 and of odd ones from lanes 16-31: their places modulo 8 all differ
// then, and nothing conflicts. 192 instructions a tile.
#pragma once

#include "attention/attn_fetch_sm90.cuh"

namespace mk {

template <class Ring>
struct AttnTranspose {
    using Layout = typename Ring::KvLayout;
    static_assert(Ring::kN == 128 && Ring::kRowBytes == 128 && Ring::kTransposers == 2);
    static constexpr int kHeadDim = Ring::kRowBytes;
    static constexpr int kKeys = 64;  // of a warp

    const Ring ring;
    const int warp;  // 0, 1

    __device__ __forceinline__ void transpose(uint32_t smem_v, uint32_t smem_t) const {
        const int lane = threadIdx.x % 32;
        // Lane l has row l of 32 keys; and of matrix l / 8 to be written row l % 8: matrices 0, 1
        // are of the first 16 keys.
        const uint32_t from = smem_v + Layout::at(warp * kKeys + lane, 0);
        const bool is_second = lane / 8 % 2;
        const int feature = lane % 8 * 2 + (is_second != (lane % 8 >= 4));
        const uint32_t to = smem_t + Layout::at(feature, warp * kKeys + lane / 16 * 16);
        const uint32_t of_even = lane < 16 ? 0x6420 : 0x7531, of_odd = of_even ^ 0x1111;
        static_for<kHeadDim / 16>([&](auto j) {  // two units' loads are under way together
            uint32_t pairs[2][4];
            static_for<2>([&](auto u) {
                ptx::ldmatrix_x4_trans<u * 32 * Layout::kPitch>(pairs[u], from ^ j * 16);
            });
            static_for<2>([&](auto u) {
                uint32_t keys[4];
                MK_UNROLL
                for (int m = 0; m < 4; ++m) {
                    keys[m] = __byte_perm(pairs[u][m / 2 * 2], pairs[u][m / 2 * 2 + 1],
                                          m % 2 ? of_odd : of_even);
                }
                ptx::stmatrix_x4<j * 16 * Layout::kPitch>(to ^ u * 32, keys);
            });
        });
    }

    // The rows of ones behind the features.
    __device__ __forceinline__ void write_ones() const {
        const uint32_t rows = ring.transposed() + Ring::kSlotBytes + threadIdx.x % 32 * 16;
        constexpr uint32_t kOnes = 0x38383838;
        MK_UNROLL
        for (int byte = warp * 512; byte < Ring::kTransposedSlots * Ring::kTransposedBytes;
             byte += Ring::kTransposedBytes) {
            ptx::st_shared_v4(rows + byte, {kOnes, kOnes, kOnes, kOnes});
        }
    }

    __device__ __forceinline__ void run() const {
        write_ones();
        uint32_t number = 0;
        const int lane = threadIdx.x % 32;
        MK_NO_UNROLL
        for (uint32_t parity = 0;; parity ^= 1) {
            Ring::template wait<Ring::kQFull>(ring.events(), parity);
            const AttnItem item = AttnItem::read(ring.item(parity));
            if (item.head == AttnItem::kNone) break;
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive<8 * Ring::kQEmpty>(ring.events());
            MK_NO_UNROLL
            for (const uint32_t end = number + item.num_tiles; number != end; ++number) {
                const auto at = ring.template place<Ring::kVSlots>(number);
                const auto to = ring.template place<Ring::kTransposedSlots>(number);
                Ring::template wait<Ring::kVFull>(at.events, at.parity);
                if (number >= Ring::kTransposedSlots) {
                    Ring::template wait<Ring::kTransposedEmpty>(to.events, to.parity ^ 1);
                }
                transpose(ring.v() + at.slot * Ring::kSlotBytes,
                          ring.transposed() + to.slot * Ring::kTransposedBytes);
                ptx::fence_proxy_async();
                __syncwarp();
                if (lane == 0) ptx::mbarrier_arrive<8 * Ring::kTransposedFull>(to.events);
                if (lane < kAttnPrefillCluster) {
                    ptx::mbarrier_arrive_shared_cluster<8 * Ring::kVEmpty>(
                        ptx::mapa_shared_cluster(at.events, lane));
                }
            }
        }
    }
};

}  // namespace mk
