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

#include "attention/attn_decode_ring.cuh"
#include "attention/attn_decode_rows.cuh"
#include "ptx/sm90.cuh"

namespace mk {

template <class Dtype, int kHeadDim, int kRows>
__device__ __forceinline__ void attn_decode_sm80(const AttnDecodeArgs& args) {
    using Tile = AttnDecodeTile<kHeadDim, kRows>;
    constexpr int kUnits = Tile::kUnits;
    constexpr bool kEven = kUnits % 2 == 0;  // the load into the place of K is of K
    __shared__ __align__(1024) uint8_t smem[Tile::kSmemBytes];

    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    DecodeWork work;
    if (!work.find(args, kRows)) return;
    KvRing<Dtype, Tile> ring(args, work, smem);
    DecodeRows<Dtype, Tile> rows;
    const int2 all = work.seen_by_all(args);

    MK_NO_UNROLL
    for (int split = blockIdx.y; split < work.num_splits; split += gridDim.y) {
        ring.start(split);
        MK_NO_UNROLL
        for (int unit = 0; unit < kUnits; ++unit) {
            if (unit == kUnits - 1 && split == blockIdx.y) {
                load_queries(args, work, smem, rows);
                if (Tile::kQInRegisters) __syncthreads();  // before a load lands there
            }
            ring.template load<true>(unit % 2 == 0, unit / 2);
        }

        rows.clear();
        MK_NO_UNROLL
        for (int tile = 0; tile < ring.num_tiles; ++tile) {
            float s[kRows / 8][4];
            rows.scores(ring.wait(), s);
            ring.template load<false>(kEven, tile + kUnits / 2);
            uint32_t p[kRows / 8][2];
            rows.weigh(args, work, all, ring.key_of_tile(tile), s, p);
            rows.add_values(ring.wait(), p);
            ring.template load<false>(!kEven, tile + (kUnits + 1) / 2);
        }

        finish_split(args, work, split, smem, rows);
    }
}

}  // namespace mk
