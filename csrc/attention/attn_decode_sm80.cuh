// Attention of a few new queries over a paged KV cache: each key and value is read once for all
// queries of its KV group, in splits; the last block of a sequence and KV head combines them.
//
//   grid (KV heads x row blocks, splits, sequences); a block does splits y, y + grid.y, ...
//   per tile    S^T = K Q^T      [16 keys x d] [d x 8 rows]      A = K by ldmatrix
//               O^T += V^T P^T   [d x 16 keys] [16 keys x 8]     A = V by ldmatrix.trans
//   row = query * group + head of the group. Rows are the n of the MMA: 8 of them where M would
//   have 16, so that a group of 4 wastes half a tile and not three quarters. S^T becomes the
//   second product's B by movmatrix. Rows of up to 4 such n-tiles share a block (rows32).
//
// A warp sums up its own tiles, which its ring brings (attn_decode_ring.cuh); accumulators are
// rescaled only when a maximum grows. The warps' results are merged in order, then the splits'.
// Tiles at the edges (new keys, the end, the window, a bad page) are written key by key: nothing
// that no query may see is read, for 0 * NaN would spoil the sum.
//
// smem: 4 rings of 12 KB (rows32: 8 KB, and q behind them; attn_decode_tiles.h). With 8 rows q is
// staged in warp 0's last unit before that is first loaded. At the end of a split the warps'
// results lie over the rings (attn_combine.cuh).
#pragma once

#include "attention/attn_combine.cuh"
#include "attention/attn_decode_ring.cuh"
#include "ptx/sm90.cuh"

namespace mk {

// The rows of a warp: their queries, and what it has summed up of its keys. A lane holds rows
// 8 * n + 2 * (lane % 4) and the next one of n-tile n: of O^T features lane / 4 + 8 * i.
template <class Dtype, int kHeadDim, int kRows>
struct DecodeRows {
    using Tile = AttnDecodeTile<kHeadDim, kRows>;
    static constexpr int kNTiles = kRows / 8;
    static constexpr int kSteps = kHeadDim / 16;

    uint32_t q[kSteps / 2][4];  // of 8 rows, if they stay here
    uint32_t q_smem;            // as this lane addresses q in shared memory
    float o[kNTiles][kSteps][4];
    float m[kNTiles][2];
    float l[kNTiles][2];  // over this lane's keys

    __device__ __forceinline__ void clear() {
        MK_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
            MK_UNROLL
            for (int j = 0; j < 2; ++j) m[n][j] = kNoKeys, l[n][j] = 0.f;
            MK_UNROLL
            for (int step = 0; step < kSteps; ++step) {
                MK_UNROLL
                for (int i = 0; i < 4; ++i) o[n][step][i] = 0.f;
            }
        }
    }

    // s = K Q^T for the 16 keys at `smem`.
    __device__ __forceinline__ void scores(uint32_t smem, float (&s)[kNTiles][4]) const {
        const int lane = threadIdx.x % 32;
        const int row = lane % 16;
        smem += row * 2 * kHeadDim + ((lane / 16) ^ (row & 7)) * 16;
        MK_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
            MK_UNROLL
            for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
        }
        MK_UNROLL
        for (int step = 0; step < kSteps; step += 2) {
            uint32_t k[2][4];
            ptx::ldmatrix_x4(k[0], smem ^ (step * 32));
            ptx::ldmatrix_x4(k[1], smem ^ (step * 32 + 32));
            MK_UNROLL
            for (int n = 0; n < kNTiles; ++n) {
                uint32_t b[4];
                if constexpr (Tile::kQInRegisters) {
                    MK_UNROLL
                    for (int i = 0; i < 4; ++i) b[i] = q[step / 2][i];
                } else {
                    ptx::ldmatrix_x4(b, (q_smem ^ (step * 32)) + n * 8 * Tile::kRowBytes);
                }
                Dtype::mma(s[n], k[0], b[0], b[1]);
                Dtype::mma(s[n], k[1], b[2], b[3]);
            }
        }
    }

    // Hides the keys that a row may not see. key: the first of the tile.
    __device__ __forceinline__ static void mask(const AttnDecodeArgs& args, const DecodeWork& work,
                                                int key, float (&s)[kNTiles][4]) {
        const int lane = threadIdx.x % 32;
        MK_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
            MK_UNROLL
            for (int j = 0; j < 2; ++j) {
                const int2 visible = work.visible(args, 8 * n + 2 * (lane % 4) + j);
                MK_UNROLL
                for (int i = j; i < 4; i += 2) {
                    const int this_key = key + lane / 4 + i / 2 * 8;
                    const bool is_visible = visible.x <= this_key && this_key < visible.y;
                    if (!is_visible) s[n][i] = __int_as_float(0xFF800000);
                }
            }
        }
    }

    // Maxima that cover the scores s, in base 2; what was summed up so far is rescaled if one grew.
    __device__ __forceinline__ void raise_maxima(const float (&s)[kNTiles][4]) {
        bool grew = false;
        MK_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
            MK_UNROLL
            for (int i = 0; i < 4; ++i) grew |= s[n][i] > m[n][i % 2];
        }
        if (!__any_sync(0xFFFFFFFFu, grew)) return;
        MK_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
            float rescale[2];
            MK_UNROLL
            for (int j = 0; j < 2; ++j) {
                float largest = fmaxf(m[n][j], fmaxf(s[n][j], s[n][j + 2]));
                MK_UNROLL
                for (int lane_mask = 4; lane_mask < 32; lane_mask *= 2) {
                    largest = fmaxf(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, lane_mask));
                }
                rescale[j] = ptx::ex2_approx_ftz_f32(m[n][j] - largest);
                m[n][j] = largest;
                l[n][j] *= rescale[j];
            }
            MK_UNROLL
            for (int step = 0; step < kSteps; ++step) {
                MK_UNROLL
                for (int i = 0; i < 4; ++i) o[n][step][i] *= rescale[i % 2];
            }
        }
    }

    // P^T of the scores, as B of the second product.
    __device__ __forceinline__ void weights(const float (&s)[kNTiles][4],
                                            uint32_t (&p)[kNTiles][2]) {
        MK_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
            float e[4];
            MK_UNROLL
            for (int i = 0; i < 4; ++i) e[i] = ptx::ex2_approx_ftz_f32(s[n][i] - m[n][i % 2]);
            MK_UNROLL
            for (int j = 0; j < 2; ++j) {
                l[n][j] += e[j] + e[j + 2];
                p[n][j] = ptx::movmatrix_trans(Dtype::pack(e[2 * j], e[2 * j + 1]));
            }
        }
    }

    // o += V^T P^T for the 16 values at `smem`.
    __device__ __forceinline__ void add_values(uint32_t smem, const uint32_t (&p)[kNTiles][2]) {
        const int lane = threadIdx.x % 32;
        const int row = lane % 8 + lane / 16 * 8;
        smem += row * 2 * kHeadDim + ((lane / 8 % 2) ^ (row & 7)) * 16;
        MK_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            uint32_t v[4];
            ptx::ldmatrix_x4_trans(v, smem ^ (step * 32));
            MK_UNROLL
            for (int n = 0; n < kNTiles; ++n) Dtype::mma(o[n][step], v, p[n][0], p[n][1]);
        }
    }

    __device__ __forceinline__ void write_stats(RowStat* stats) {
        const int lane = threadIdx.x % 32;
        MK_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
            MK_UNROLL
            for (int j = 0; j < 2; ++j) {
                MK_UNROLL
                for (int lane_mask = 4; lane_mask < 32; lane_mask *= 2) {
                    l[n][j] += __shfl_xor_sync(0xFFFFFFFFu, l[n][j], lane_mask);
                }
                if (lane < 4) stats[8 * n + 2 * lane + j] = {m[n][j], l[n][j]};
            }
        }
    }

    template <int kStride>
    __device__ __forceinline__ void write_sums(float (&to)[8][kStride], int n) const {
        const int lane = threadIdx.x % 32;
        MK_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            MK_UNROLL
            for (int i = 0; i < 4; ++i) {
                to[2 * (lane % 4) + i % 2][16 * step + i / 2 * 8 + lane / 4] = o[n][step][i];
            }
        }
    }
};

// q of the block's rows, rotated, to shared memory, and 8 rows of it from there to all warps.
template <class Dtype, int kHeadDim, int kRows>
__device__ __forceinline__ void load_queries(const AttnDecodeArgs& args, const DecodeWork& work,
                                             uint8_t* smem,
                                             DecodeRows<Dtype, kHeadDim, kRows>& rows) {
    using Tile = AttnDecodeTile<kHeadDim, kRows>;
    constexpr int kChunks = kHeadDim / kVec;
    MK_NO_UNROLL
    for (int i = threadIdx.x; i < kRows * kChunks; i += kAttnDecodeThreads) {
        const int row = i / kChunks;
        const int chunk = i % kChunks;
        Vec8 x{};
        if (row < work.num_rows) {
            const int query = (work.first_row + row) / args.group;
            const int head = work.kv_head * args.group + work.first_row + row - query * args.group;
            const int64_t token = work.first_query + query;
            const void* from =
                row_of(row_of(args.p.q, token, args.p.q_stride), head, args.p.q_head_stride);
            const int place = work.num_keys - work.num_queries + query;
            x = load_rotated8<Dtype>(args.p.rope, args.rope_is_vector, from, chunk * kVec,
                                     position_of(args.p.rope, token, place));
        }
        uint8_t* const to = smem + Tile::kQOffset + row * Tile::kRowBytes;
        reinterpret_cast<uint4*>(to)[chunk ^ row % 8] = {x.pair[0], x.pair[1], x.pair[2],
                                                         x.pair[3]};
    }
    __syncthreads();
    const int lane = threadIdx.x % 32;
    rows.q_smem = static_cast<uint32_t>(__cvta_generic_to_shared(smem)) + Tile::kQOffset +
                  lane % 8 * Tile::kRowBytes + ((lane / 8) ^ lane % 8) * 16;
    if constexpr (Tile::kQInRegisters) {
        MK_UNROLL
        for (int i = 0; i < kHeadDim / 32; ++i) ptx::ldmatrix_x4(rows.q[i], rows.q_smem ^ (i * 64));
        __syncthreads();  // before a load lands there
    }
}

template <class Dtype, int kHeadDim, int kRows>
__device__ __forceinline__ void attn_decode_sm80(const AttnDecodeArgs& args) {
    using Tile = AttnDecodeTile<kHeadDim, kRows>;
    constexpr int kUnits = Tile::kUnits;
    constexpr bool kEven = kUnits % 2 == 0;  // the load into the place of K is of K
    __shared__ __align__(1024) uint8_t smem[Tile::kSmemBytes];
    auto& combine_smem = *reinterpret_cast<CombineSmem<kHeadDim, kRows>*>(smem);
    static_assert(sizeof combine_smem <= Tile::kRingsBytes);

    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    DecodeWork work;
    if (!work.find(args, kRows)) return;
    KvRing<Dtype, Tile> ring(args, work, smem);
    DecodeRows<Dtype, kHeadDim, kRows> rows;
    // All queries see the keys in between: the last query's first, to the first query's last.
    const int all_from = args.p.window ? work.num_keys - args.p.window : 0;
    const int first_query_at = work.num_keys - work.num_queries;
    const int all_to = args.p.causal   ? first_query_at + 1
                       : args.p.window ? min(first_query_at + args.p.window, work.num_keys)
                                       : work.num_keys;

    MK_NO_UNROLL
    for (int split = blockIdx.y; split < work.num_splits; split += gridDim.y) {
        ring.start(split);
        MK_NO_UNROLL
        for (int unit = 0; unit < kUnits; ++unit) {
            if (unit == kUnits - 1 && split == blockIdx.y) load_queries(args, work, smem, rows);
            ring.template load<true>(unit % 2 == 0, unit / 2);
        }

        rows.clear();
        MK_NO_UNROLL
        for (int tile = 0; tile < ring.num_tiles; ++tile) {
            float s[kRows / 8][4];
            rows.scores(ring.wait(), s);
            ring.template load<false>(kEven, tile + kUnits / 2);
            MK_UNROLL
            for (int n = 0; n < kRows / 8; ++n) {
                MK_UNROLL
                for (int i = 0; i < 4; ++i) s[n][i] *= args.scale_log2;
            }
            const int key = ring.key_of_tile(tile);
            if (key < all_from || key + kAttnDecodeTileKeys > all_to) rows.mask(args, work, key, s);
            rows.raise_maxima(s);
            uint32_t p[kRows / 8][2];
            rows.weights(s, p);
            rows.add_values(ring.wait(), p);
            ring.template load<false>(!kEven, tile + (kUnits + 1) / 2);
        }

        BlockRows<kHeadDim, kRows> result;
        __syncthreads();  // all warps are done with their rings
        rows.write_stats(combine_smem.warp_stats[threadIdx.x / 32]);
        MK_UNROLL
        for (int n = 0; n < kRows / 8; ++n) {
            rows.write_sums(combine_smem.sums[threadIdx.x / 32], n);
            __syncthreads();
            result.merge_warps(combine_smem, n);
            __syncthreads();
        }
        if (work.num_splits > 1) {
            const int64_t group = static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x;
            const PartialRows partial(args, group, kHeadDim);
            if (!result.publish(partial, split, work.num_splits, work.num_rows)) {
                continue;
            }
            result.merge_splits(combine_smem, partial, split, work.num_splits, work.num_rows);
        }
        const OutRows out{args.p, work.first_query, work.kv_head * args.group, args.group,
                          work.first_row};
        result.for_each(work.num_rows, [&](int row, const float4& o, RowStat stat) {
            out.template store<Dtype>(row, result.quad(), o, stat);
        });
    }
}

}  // namespace mk
