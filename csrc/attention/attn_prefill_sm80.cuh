// Attention for prompts: out = softmax(scale * rotate(q) k^T + mask) v, FlashAttention-2's scheme.
//
//   grid (query heads, sequences, tiles of queries): heads of a KV group are neighbours, so that
//   its K and V come from L2; a sequence's last tile, the longest when causal, is first.
//
//   block = 128 queries x head_dim     warp w = queries 32w ... 32w + 31, two MMA rows of 16
//             K0 K1 K2 ... 64 keys each      S = Q K^T    [2][8][4] registers
//      Q w0 [  S  S  S ->                    P = weights, rounded, straight from S's registers
//        w1 [  S  S  S                       O += P V     [2][head_dim / 8][4] registers
//        w2 [  S  S  S
//        w3 [  S  S  S                     smem, head_dim 128: | Q 32 KB | ring of 3 x 16 KB |
//             V0 V1 V2 ...
//
// Pipeline: K0 V0 K1 V1 ... are steps; a step waits for its tile, meets the other warps at the
// one barrier that both publishes the tile and frees the one before, and starts the copy of the
// tile two steps ahead into it.
// Masks: a warp skips a tile that none of its queries sees, and masks only where an edge of the
// visible interval crosses its 32 x 64 logits. K and V are read between the first and the last
// key that the block sees, nothing else; the rest of a tile is 0, and NaN in keys of a bad page.
//
// Per turn a warp executes, at head_dim 128, 256 MMAs, 80 ldmatrix, 16 copies, 64 each of max, fma,
// exp2 and add, 32 conversions, and about 60 others (688 in SASS): 13.3 M warp-instructions at 1024
// x 1024 and 32 heads, where FlashAttention-2 has 15.8 M. Limits: head_dim 64 or 128; sequences
// below 2^30. Lost: 8 warps of 16 queries (attn_tiles.h); tile numbers in place of running keys in
// KvLoader, one register less, 6 instructions a turn more.
#pragma once

#include "attention/attn_copy.cuh"
#include "attention/attn_keys.cuh"
#include "attention/attn_output.cuh"
#include "attention/attn_rope.cuh"
#include "common/vec.cuh"
#include "ptx/sm90.cuh"

namespace mk {

// Copies this warp's rows of tiles of K and V: a tile's K, its V, then the next tile's.
template <class Tile>
struct KvLoader {
    const AttnPrefillArgs& args;
    const typename Tile::Copy copy;
    const uint8_t* k;  // this lane's row and byte of this head, in page 0
    const uint8_t* v;
    int key_begin, key_end;  // the keys that are read
    int key;                 // first of this warp's rows of the tile
    // Page of these rows, which have one only (0: packed), looked up one tile ahead. Where some of
    // the rows are not read it is ~page, where the page does not exist it is kBadPage.
    int page;

    __device__ __forceinline__ KvLoader(const AttnPrefillArgs& args, uint32_t smem_ring,
                                        int kv_head, int64_t first_token, int key_begin,
                                        int key_end, int tile)
        : args(args),
          copy(smem_ring + threadIdx.x / 32 * Tile::kKvRows * Tile::kRowBytes),
          key_begin(key_begin),
          key_end(key_end),
          key(tile * Tile::kN + threadIdx.x / 32 * Tile::kKvRows) {
        const mk_attention_params& p = args.p;
        k = static_cast<const uint8_t*>(p.k) + kv_head * p.k_head_stride * 2 +
            (first_token + copy.row()) * p.k_stride * 2 + copy.byte();
        v = static_cast<const uint8_t*>(p.v) + kv_head * p.v_head_stride * 2 +
            (first_token + copy.row()) * p.v_stride * 2 + copy.byte();
        find_page();
    }

    __device__ __forceinline__ void find_page() {
        const mk_attention_params& p = args.p;
        const bool all_read = key >= key_begin && key + Tile::kKvRows <= key_end;
        page = all_read ? 0 : ~0;
        if (p.page_size == 0 || key >= key_end || key + Tile::kKvRows <= key_begin) return;
        const int found = page_of_key(args, blockIdx.y, key);
        page = found == kBadPage || all_read ? found : ~found;
    }

    __device__ __forceinline__ void next_tile() {
        key += Tile::kN;
        find_page();
    }

    template <bool kIsK>
    __device__ __forceinline__ void load(uint32_t slot) const {
        const AttnPrefillArgs::Rows& tensor = kIsK ? args.k : args.v;
        const uint64_t page_row = key & args.page_mask;
        const uint8_t* rows = (kIsK ? k : v) + page_row * tensor.bytes;
        if (page >= 0) {
            rows += page * tensor.page_bytes;
            copy.template all<Tile::kKvRows>(slot, rows, tensor.bytes_of_4);
        } else if (page != kBadPage) {
            rows += ~page * tensor.page_bytes;
            copy.template some<Tile::kKvRows>(slot, rows, tensor.bytes_of_4, key_begin - key,
                                              key_end - key);
        } else {  // NaN for each query that sees one of these keys
            const uint32_t nan = kIsK ? ~0u : 0u;
            copy.template fill<Tile::kKvRows>(slot, {nan, nan, nan, nan});
        }
    }
};

template <class Dtype, int kHeadDimOfTile>
struct AttnPrefill {
    static constexpr int kHeadDim = kHeadDimOfTile;
    static constexpr AttnPrefillTile kTile = attn_prefill_tile(MK_SM, kHeadDim);
    static constexpr int kN = kTile.tile_n;
    static constexpr int kRowBytes = mk::kRowBytes<kHeadDim>;
    static constexpr int kWarpRows = kTile.tile_m / kTile.warps;
    static constexpr int kKvRows = kN / kTile.warps;  // that a warp copies
    static constexpr int kM16 = kWarpRows / 16;
    static constexpr int kSlotBytes = kN * kRowBytes;
    static constexpr int kBlockBytes = 16 * kRowBytes;  // 16 rows of a tile

    using Copy = RowCopy<WholeRows<kHeadDim>, kHeadDim>;
    using Logits = float[kM16][kN / 8][4];
    using Weights = uint32_t[kM16][kN / 16][4];  // A fragments
    using Acc = float[kM16][kHeadDim / 8][4];

    // s = Q K^T of a warp.
    static __device__ __forceinline__ void multiply_qk(Logits& s, uint32_t smem_q,
                                                       uint32_t smem_k) {
        MK_UNROLL
        for (int i = 0; i < kM16 * kN / 8 * 4; ++i)
            s[i / 4 / (kN / 8)][i / 4 % (kN / 8)][i % 4] = 0;
        static_for<kHeadDim / 16>([&](auto j) {
            uint32_t q[kM16][4];
            static_for<kM16>([&](auto m) {
                ptx::ldmatrix_x4<m * kBlockBytes + block_immediate(j)>(q[m],
                                                                       block_address(smem_q, j));
            });
            static_for<kN / 16>([&](auto n) {
                uint32_t k[4];
                ptx::ldmatrix_x4<n * kBlockBytes + block_immediate(j)>(k, block_address(smem_k, j));
                MK_UNROLL
                for (int m = 0; m < kM16; ++m) {
                    Dtype::mma(s[m][2 * n], q[m], k[0], k[1]);
                    Dtype::mma(s[m][2 * n + 1], q[m], k[2], k[3]);
                }
            });
        });
    }

    // Accumulators of S, rounded, are A fragments of P as they are.
    static __device__ __forceinline__ void round(Weights& weights, const Logits& s) {
        MK_UNROLL
        for (int m = 0; m < kM16; ++m) {
            MK_UNROLL
            for (int i = 0; i < kN / 16 * 4; ++i) {
                const float (&x)[4] = s[m][i / 2];
                weights[m][i / 4][i % 4] = Dtype::pack(x[i % 2 * 2], x[i % 2 * 2 + 1]);
            }
        }
    }

    // acc += P V of a warp.
    static __device__ __forceinline__ void multiply_pv(Acc& acc, const Weights& w,
                                                       uint32_t smem_v) {
        static_for<kN / 16>([&](auto n) {
            static_for<kHeadDim / 16>([&](auto j) {
                uint32_t v[4];
                ptx::ldmatrix_x4_trans<n * kBlockBytes + block_immediate(j)>(
                    v, block_address(smem_v, j));
                MK_UNROLL
                for (int m = 0; m < kM16; ++m) {
                    Dtype::mma(acc[m][2 * j], w[m][n], v[0], v[1]);
                    Dtype::mma(acc[m][2 * j + 1], w[m][n], v[2], v[3]);
                }
            });
        });
    }

    static __device__ __forceinline__ void run(const AttnPrefillArgs& args) {
        const mk_attention_params& p = args.p;
        extern __shared__ __align__(128) uint8_t smem[];
        ptx::griddepcontrol_launch_dependents();
        ptx::griddepcontrol_wait();

        const int head = blockIdx.x, sequence = blockIdx.y;
        const int kv_head = head / (p.num_q_heads / p.num_kv_heads);
        const auto [first_q, num_q, first_k, num_k] = Sequence(p, sequence);
        const int num_tiles = (num_q + kTile.tile_m - 1) / kTile.tile_m;
        const int block_row = (num_tiles - 1 - static_cast<int>(blockIdx.z)) * kTile.tile_m;
        if (num_q <= p.skip_seqlen_q || block_row < 0) return;
        VisibleKeys visible(p, num_q, num_k);

        const int lane = threadIdx.x % 32;
        const int warp_row = threadIdx.x / 32 * kWarpRows;
        const int row = block_row + warp_row;              // of the sequence, this warp's first
        const int num_rows = min(num_q - row, kWarpRows);  // of this warp; some have none
        uint8_t* const smem_rows = smem + warp_row * kRowBytes;
        const uint32_t smem_q = static_cast<uint32_t>(__cvta_generic_to_shared(smem_rows));
        const uint32_t smem_ring =
            static_cast<uint32_t>(__cvta_generic_to_shared(smem)) + kTile.tile_m * kRowBytes;

        // Steps: copies of K and V run two steps ahead of their use.
        const auto [key_begin, key_end, tile_begin, tile_end] =
            SeenKeys<kN>(visible, block_row, min(block_row + kTile.tile_m, num_q) - 1);
        visible.num_keys = key_end;  // to these queries: one register for both
        KvLoader<AttnPrefill> loader(args, smem_ring, kv_head, first_k, key_begin, key_end,
                                     tile_begin);
        {
            const Copy copy(smem_q);
            const int64_t stride = p.q_stride * 2;
            const auto* q = static_cast<const uint8_t*>(p.q) + head * p.q_head_stride * 2;
            copy.template some<kWarpRows>(0,
                                          q + (first_q + row + copy.row()) * stride + copy.byte(),
                                          4 * stride, 0, num_rows);
            ptx::cp_async_commit_group();
        }
        if (tile_begin < tile_end) {
            loader.template load<true>(0);
            ptx::cp_async_commit_group();
            loader.template load<false>(kSlotBytes);
            loader.next_tile();
            ptx::cp_async_commit_group();
        }
        if (p.rope.cos && tile_begin < tile_end) {
            ptx::cp_async_wait_group<2>();
            __syncwarp();
            rotate_rows<Dtype, WholeRows<kHeadDim>, kHeadDim, kWarpRows>(
                smem_rows, num_rows, p.rope, first_q + row, row + visible.offset);
            __syncwarp();
        }

        // Tiles of which some of this warp's queries see some key, and all see all keys.
        const int last_row = row + num_rows - 1;
        const int any_begin = max(visible.begin(row) / kN, tile_begin);
        const int any_end = num_rows > 0 ? min((visible.end(last_row) + kN - 1) / kN, tile_end) : 0;
        const int all_begin = (visible.begin(last_row) + kN - 1) / kN;
        const int all_end = visible.end(row) / kN;

        const uint32_t smem_lane_q = ptx::mov_b32(smem_q + ldmatrix_lane_offset<kHeadDim>());
        const uint32_t smem_lane_k =
            ptx::mov_b32(smem_ring + ldmatrix_lane_offset_of_columns<kHeadDim>());
        const uint32_t smem_lane_v = smem_ring + ldmatrix_lane_offset<kHeadDim>();
        Softmax<kM16> softmax(args.scale);
        Acc acc = {};
        uint32_t k_slot = 0, v_slot = kSlotBytes;
        int tile = tile_begin;
        const auto step = [&](auto is_seen) {
            const bool has_next = tile + 1 < tile_end;
            const uint32_t free_slot = 3 * kSlotBytes - k_slot - v_slot;
            Weights weights;

            ptx::cp_async_wait_group<1>();
            __syncthreads();
            if (has_next) loader.template load<true>(free_slot);
            ptx::cp_async_commit_group();
            if constexpr (is_seen) {
                Logits s;
                multiply_qk(s, smem_lane_q, smem_lane_k + k_slot);
                if (tile < all_begin || tile >= all_end) {
                    hide(s, visible, row, tile * kN, tile < all_begin);
                }
                softmax.step(s, acc);
                round(weights, s);
            }

            ptx::cp_async_wait_group<1>();
            __syncthreads();
            if (has_next) {
                loader.template load<false>(k_slot);
                loader.next_tile();
            }
            ptx::cp_async_commit_group();
            if constexpr (is_seen) multiply_pv(acc, weights, smem_lane_v + v_slot);

            v_slot = k_slot, k_slot = free_slot;
        };
        // The warps of a block meet at the same barriers, whatever they see.
        MK_NO_UNROLL
        for (; tile < any_begin; ++tile) step(Constant<false>());
        MK_NO_UNROLL
        for (; tile < any_end; ++tile) step(Constant<true>());
        MK_NO_UNROLL
        for (; tile < tile_end; ++tile) step(Constant<false>());

        ptx::cp_async_wait_group<0>();
        __syncwarp();
        // Read again: what is not needed in the loop does not take a register there.
        const int64_t token = p.cu_seqlens_q[sequence] + row;
        const int rows = p.cu_seqlens_q[sequence + 1] - static_cast<int>(token);
        if (rows <= 0) return;
        write_rows<Dtype, kHeadDim>(p, head, token, rows, softmax, acc, smem_rows);
    }
};

template <class Dtype, int kHeadDim>
__device__ __forceinline__ void attn_prefill_sm80(const AttnPrefillArgs& args) {
    AttnPrefill<Dtype, kHeadDim>::run(args);
}

}  // namespace mk
