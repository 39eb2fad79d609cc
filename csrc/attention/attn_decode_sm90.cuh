// Attention of a few new queries over a paged KV cache on Hopper: attn_decode_sm80.cuh, whose
// arithmetic and bits these are, with K and V brought by TMA.
//
//   ring of a warp    | K0 | V0 | K1 | V1 | K2 | V2 |      an mbarrier each, 4 KB (head_dim 128)
//
// A warp fills its own ring: the lane that holds the number of a tile's page hands its boxes to
// TMA. A unit is loaded again by the warp that has read it, so there is no warp that only copies
// and no barrier to tell it what is free. A tile takes 204 warp-instructions where sm_80's kernel
// takes 294, and 64 wavefronts of shared memory, not 128 (PTX on the emulator, 4 rows, head_dim
// 128). Tiles at the edges are written key by key, as on sm_80.
//
// PDL: before griddepcontrol.wait, while earlier kernels run, the block asks for its first units in
// L2. What it reads of tables then may be stale, but is only a hint (numbers of pages are checked).
//
// MMAs: m16n8k16 with a group's rows as n, as on sm_80. Of 64 keys, 32 KB, with 4 rows, wgmma
// would take 512 clocks with the rows as m = 64 (16 times the work), or with them as n = 8 256
// clocks, 16 A tiles of 2 KB from shared memory at 128 bytes a clock. mma.sync takes 64 to 128, and
// the SM's share of DRAM 2200. With n = 8 the warps of a warpgroup would have to agree on one
// maximum of each row and pass P through shared memory for every 64 keys.
//
// smem: 4 rings of 24 KB | q | barriers. At the end of a split the warps' results lie over the
// rings.
#pragma once

#include "attention/attn_decode_kv.cuh"
#include "attention/attn_decode_rows.cuh"
#include "ptx/sm90.cuh"

namespace mk {

template <class Dtype, class Tile>
struct TmaRing : KvTiles<Dtype, Tile> {
    using Tiles = KvTiles<Dtype, Tile>;
    using Tiles::lane, Tiles::num_tiles, Tiles::page, Tiles::work;
    static constexpr int kSlots = Tile::kSlots;

    const AttnDecodeSm90Args& args;
    uint8_t* smem;         // of this warp
    uint32_t smem_events;  // of this warp: of K and of V of each slot
    int slot;              // the oldest, and the next to be loaded
    uint32_t parity;       // of the phase that fills it
    uint32_t no_page;      // bits of tiles, of the 32 that `page` is about, not for TMA
    bool is_written;       // by ordinary stores, which TMA may overwrite

    __device__ __forceinline__ TmaRing(const AttnDecodeSm90Args& args_, const DecodeWork& work_,
                                       uint8_t* smem_block)
        : Tiles(args_, work_), args(args_), slot(0), parity(0), no_page(0), is_written(false) {
        const int warp = threadIdx.x / 32;
        smem = smem_block + warp * Tile::kRingBytes;
        smem_events = static_cast<uint32_t>(__cvta_generic_to_shared(smem_block)) +
                      Tile::kEventsOffset + warp * 16 * kSlots;
        if (lane < 2 * kSlots) ptx::mbarrier_init(smem_events + 8 * lane, 1);
        ptx::fence_proxy_async();
        __syncwarp();
    }

    __device__ __forceinline__ int unit(int slot, bool is_k) const {
        return (2 * slot + !is_k) * Tile::kUnitBytes;
    }
    __device__ __forceinline__ uint32_t event(int slot, bool is_k) const {
        return smem_events + 16 * slot + 8 * !is_k;
    }

    // To visit(map, first element, key in the page) for the boxes of the tile of this lane's page.
    template <class Visit>
    __device__ __forceinline__ void for_each_box(bool is_k, int tile, const Visit& visit) const {
        MK_UNROLL
        for (int panel = 0; panel < Tile::kRowBytes / 128; ++panel) {
            visit(is_k ? &args.k_map : &args.v_map, panel,
                  this->key_in_page(this->key_of_tile(tile)));
        }
    }

    // The first units of a split, to L2.
    __device__ __forceinline__ void prefetch() {
        if (!args.has_maps) return;
        this->look_up(0);
        if (lane >= kSlots || page < 0) return;
        for (const bool is_k : {true, false}) {
            for_each_box(is_k, lane, [&](const void* map, int panel, int key) {
                ptx::cp_async_bulk_prefetch_tensor_4d_l2(map, 64 * panel, work.kv_head, key, page);
            });
        }
    }

    // K or V of a tile to a slot that all lanes are done with. Tiles come in order, K before V.
    template <bool kIsK, bool kIsFirst>
    __device__ __forceinline__ void load(int tile, int to) {
        if (is_written) ptx::fence_proxy_async();
        __syncwarp();
        if (tile >= num_tiles) return;
        if (kIsK && tile % 32 == 0) {
            this->look_up(tile);
            no_page = args.has_maps ? __ballot_sync(0xFFFFFFFFu, page < 0) : 0xFFFFFFFFu;
        }
        const int key = this->key_of_tile(tile);
        const uint32_t full = event(to, kIsK);
        if (no_page >> tile % 32 & 1 || this->template is_edge<kIsFirst>(key)) {
            const int64_t offset = this->offset_of_tile(tile);
            void* const cache = kIsK ? args.p.k_cache : args.p.v_cache;
            this->template load_edge<kIsFirst>(kIsK, smem, unit(to, kIsK),
                                               row_of(cache, offset + this->lane_offset, 1),
                                               offset < 0, key);
            ptx::cp_async_mbarrier_arrive(full);
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(full);
            is_written = true;
        } else if (lane == tile % 32) {
            ptx::mbarrier_arrive_expect_tx(full, Tile::kUnitBytes);
            const uint32_t at =
                static_cast<uint32_t>(__cvta_generic_to_shared(smem)) + unit(to, kIsK);
            for_each_box(kIsK, tile, [&](const void* map, int panel, int key) {
                ptx::cp_async_bulk_tensor_4d(at + panel * Tile::kPanelBytes, map, 64 * panel,
                                             work.kv_head, key, page, full);
            });
        }
    }

    // A split's first tiles.
    __device__ __forceinline__ void fill() {
        int to = slot;
        MK_NO_UNROLL
        for (int tile = 0; tile < kSlots; ++tile) {
            load<true, true>(tile, to);
            load<false, true>(tile, to);
            to = to + 1 == kSlots ? 0 : to + 1;
        }
    }

    // K or V of the oldest slot, which is there when this returns.
    template <bool kIsK>
    __device__ __forceinline__ uint32_t wait() const {
        while (!ptx::mbarrier_try_wait_parity(event(slot, kIsK), parity)) {
        }
        __syncwarp();
        return static_cast<uint32_t>(__cvta_generic_to_shared(smem)) + unit(slot, kIsK);
    }

    __device__ __forceinline__ void next_slot() {
        slot = slot + 1 == kSlots ? 0 : slot + 1;
        parity ^= slot == 0;
    }
};

template <class Dtype, int kHeadDim, int kRows>
__device__ __forceinline__ void attn_decode_sm90(const AttnDecodeSm90Args& args) {
    using Tile = AttnDecodeSm90Tile<kHeadDim, kRows>;
    extern __shared__ uint8_t smem_unaligned[];
    const uint32_t unaligned = static_cast<uint32_t>(__cvta_generic_to_shared(smem_unaligned));
    uint8_t* const smem = smem_unaligned + (-unaligned & 1023);

    ptx::griddepcontrol_launch_dependents();
    DecodeWork work;
    TmaRing<Dtype, Tile> ring(args, work, smem);
    if (work.find(args, kRows) && blockIdx.y < work.num_splits) {
        ring.begin();
        ring.start(blockIdx.y);
        ring.prefetch();
    }
    ptx::griddepcontrol_wait();
    if (!work.find(args, kRows)) return;
    ring.begin();
    DecodeRows<Dtype, Tile> rows;
    const int2 all = work.seen_by_all(args);

    MK_NO_UNROLL
    for (int split = blockIdx.y; split < work.num_splits; split += gridDim.y) {
        if (split != blockIdx.y) {  // results of the last one lie over the rings
            ptx::fence_proxy_async();
            __syncthreads();
        }
        ring.start(split);
        ring.fill();
        if (split == blockIdx.y) load_queries(args, work, smem, rows);

        rows.clear();
        MK_NO_UNROLL
        for (int tile = 0; tile < ring.num_tiles; ++tile) {
            float s[kRows / 8][4];
            rows.scores(ring.template wait<true>(), s);
            ring.template load<true, false>(tile + Tile::kSlots, ring.slot);
            uint32_t p[kRows / 8][2];
            rows.weigh(args, work, all, ring.key_of_tile(tile), s, p);
            rows.add_values(ring.template wait<false>(), p);
            ring.template load<false, false>(tile + Tile::kSlots, ring.slot);
            ring.next_slot();
        }
        finish_split(args, work, split, smem, rows);
    }
}

}  // namespace mk
