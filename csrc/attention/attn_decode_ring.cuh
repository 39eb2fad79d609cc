// How a warp of attn_decode_sm80 gets at its keys and values.
//
//   ring of a warp    | K0 | V0 | K1 |                   units of K or of V in turn, here 3 of them
//
// A warp fills its own ring and needs no barrier: it waits for the oldest unit, uses it, and loads
// the next into its place.
#pragma once

#include "attention/attn_decode_kv.cuh"

namespace mk {

template <class Dtype, class Tile>
struct KvRing : KvTiles<Dtype, Tile> {
    using Tiles = KvTiles<Dtype, Tile>;
    using Tiles::args, Tiles::work, Tiles::num_tiles;
    static constexpr int kUnits = Tile::kUnits;

    uint8_t* smem;  // of this warp
    int unit;       // byte offset in the ring: the oldest one, and the next to be loaded

    // Chunk c of a row of 16-byte chunks lies at c ^ (row % 8), so that the 8 rows of a matrix that
    // ldmatrix reads meet no bank twice.
    __device__ __forceinline__ KvRing(const AttnDecodeArgs& args_, const DecodeWork& work_,
                                      uint8_t* smem_)
        : Tiles(args_, work_), smem(smem_ + threadIdx.x / 32 * Tile::kRingBytes) {
        this->begin();
    }

    __device__ __forceinline__ void start(int split) {
        Tiles::start(split);
        unit = 0;
    }

    // K or V of a tile into the oldest unit's place, which all lanes are done with. A group of
    // copies is committed in any case. kIsFirst: the tile may be this warp's tile 0, the only one
    // that new keys and the end can be in. Tiles are asked for in order, some of them twice.
    template <bool kIsFirst>
    __device__ __forceinline__ void load(bool is_k, int tile) {
        __syncwarp();
        if (tile < num_tiles) {
            if (tile % 32 == 0) this->look_up(tile);
            const int64_t offset = this->offset_of_tile(tile);
            const int key = this->key_of_tile(tile);
            void* const cache = is_k ? args.p.k_cache : args.p.v_cache;
            if (offset < 0 || this->template is_edge<kIsFirst>(key)) {
                this->template load_edge<kIsFirst>(is_k, smem, unit,
                                                   row_of(cache, offset + this->lane_offset, 1),
                                                   offset < 0, key);
            } else {
                const void* from = row_of(cache, offset + this->lane_offset, 1);
                const uint32_t to = address(unit + this->lane_smem);
                MK_UNROLL
                for (int i = 0; i < Tiles::kTileKeys; i += Tiles::kKeysPerLoad) {
                    ptx::cp_async_cg_16((to ^ (i % 8 * 16)) + i * Tile::kPitch, from);
                    from = row_of(from, Tiles::kKeysPerLoad, args.p.cache_stride);
                }
            }
        }
        ptx::cp_async_commit_group();
        unit = unit == (kUnits - 1) * Tile::kUnitBytes ? 0 : unit + Tile::kUnitBytes;
    }

    __device__ __forceinline__ uint32_t address(int in_ring) const {
        return static_cast<uint32_t>(__cvta_generic_to_shared(smem)) + in_ring;
    }

    // The oldest unit, which is there when this returns.
    __device__ __forceinline__ uint32_t wait() const {
        ptx::cp_async_wait_group<kUnits - 1>();
        __syncwarp();
        return address(unit);
    }
};

}  // namespace mk
