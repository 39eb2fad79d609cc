// The rows of a warp of attention_decode: what it does with a tile of K and of V, and what becomes
// of its sums. The MMAs, their order and so the bits are the same on every architecture.
#pragma once

#include "attention/attn_combine.cuh"
#include "attention/attn_decode_kv.cuh"

namespace mk {

// The rows of a warp: their queries, and what it has summed up of its keys. A lane holds rows
// 8 * n + 2 * (lane % 4) and the next one of n-tile n: of O^T features lane / 4 + 8 * i.
template <class Dtype, class Tile>
struct DecodeRows {
    static constexpr int kNTiles = Tile::kRows / 8;
    static constexpr int kSteps = Tile::kHeadDim / 16;

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
        smem += row * Tile::kPitch + ((lane / 16) ^ (row & 7)) * 16;
        MK_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
            MK_UNROLL
            for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
        }
        MK_UNROLL
        for (int step = 0; step < kSteps; step += 2) {
            uint32_t k[2][4];
            ptx::ldmatrix_x4(k[0], Tile::block(smem, step));
            ptx::ldmatrix_x4(k[1], Tile::block(smem, step + 1));
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

    // From the products s of a tile to weights. key: the first of the tile; all: the keys that
    // every row sees.
    __device__ __forceinline__ void weigh(const AttnDecodeArgs& args, const DecodeWork& work,
                                          const int2& all, int key, float (&s)[kNTiles][4],
                                          uint32_t (&p)[kNTiles][2]) {
        MK_UNROLL
        for (int n = 0; n < kNTiles; ++n) {
            MK_UNROLL
            for (int i = 0; i < 4; ++i) s[n][i] *= args.scale_log2;
        }
        if (key < all.x || key + kAttnDecodeTileKeys > all.y) mask(args, work, key, s);
        raise_maxima(s);
        weights(s, p);
    }

    // o += V^T P^T for the 16 values at `smem`.
    __device__ __forceinline__ void add_values(uint32_t smem, const uint32_t (&p)[kNTiles][2]) {
        const int lane = threadIdx.x % 32;
        const int row = lane % 8 + lane / 16 * 8;
        smem += row * Tile::kPitch + ((lane / 8 % 2) ^ (row & 7)) * 16;
        MK_UNROLL
        for (int step = 0; step < kSteps; ++step) {
            uint32_t v[4];
            ptx::ldmatrix_x4_trans(v, Tile::block(smem, step));
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
template <class Dtype, class Tile>
__device__ __forceinline__ void load_queries(const AttnDecodeArgs& args, const DecodeWork& work,
                                             uint8_t* smem, DecodeRows<Dtype, Tile>& rows) {
    constexpr int kChunks = Tile::kHeadDim / kVec;
    MK_NO_UNROLL
    for (int i = threadIdx.x; i < Tile::kRows * kChunks; i += kAttnDecodeThreads) {
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
        for (int i = 0; i < Tile::kHeadDim / 32; ++i) {
            ptx::ldmatrix_x4(rows.q[i], rows.q_smem ^ (i * 64));
        }
    }
}

// The end of a split: the warps' results merged and, by the block that comes last, the splits'.
template <class Dtype, class Tile>
__device__ __forceinline__ void finish_split(const AttnDecodeArgs& args, const DecodeWork& work,
                                             int split, uint8_t* smem,
                                             DecodeRows<Dtype, Tile>& rows) {
    using Smem = CombineSmem<Tile::kHeadDim, Tile::kRows>;
    static_assert(sizeof(Smem) <= Tile::kRingsBytes);
    auto& combine_smem = *reinterpret_cast<Smem*>(smem);
    BlockRows<Tile::kHeadDim, Tile::kRows> result;
    __syncthreads();  // all warps are done with their rings
    rows.write_stats(combine_smem.warp_stats[threadIdx.x / 32]);
    MK_UNROLL
    for (int n = 0; n < Tile::kRows / 8; ++n) {
        rows.write_sums(combine_smem.sums[threadIdx.x / 32], n);
        __syncthreads();
        result.merge_warps(combine_smem, n);
        __syncthreads();
    }
    if (work.num_splits > 1) {
        const int64_t group = static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x;
        const PartialRows partial(args, group, Tile::kHeadDim);
        if (!result.publish(partial, split, work.num_splits, work.num_rows)) return;
        result.merge_splits(combine_smem, partial, split, work.num_splits, work.num_rows);
    }
    const OutRows out{args.p, work.first_query, work.kv_head * args.group, args.group,
                      work.first_row};
    result.for_each(work.num_rows, [&](int row, const float4& o, RowStat stat) {
        out.template store<Dtype>(row, result.quad(), o, stat);
    });
}

}  // namespace mk
