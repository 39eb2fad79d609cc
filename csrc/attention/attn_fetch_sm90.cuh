// The warp of sm_90's attention for prompts that fetches, and the shared memory that it fills.
//
//   smem, head_dim 128:  | Q 2 x 16 KB | K 2 x 32 KB | V 2 x 32 KB | O 32 KB | barriers, item |
//   Tiles are panels of 64 columns, rows of 128 bytes with wgmma's 128-byte swizzle; K is K-major,
//   V MN-major as it lies.
//
// The two blocks of a cluster read the same K and V. Each fetches the half of a tile's rows that
// its rank says, by TMA, into the same slot of both: L2 gives each byte once for 256 queries. So a
// slot is free when the four warpgroups of both blocks have read it, and full with the block's own
// arrival and the bytes of both halves.
// A tile that reaches before the first key that is seen, past the sequence's end or into a page
// that does not exist comes by cp.async, to each block by its own warp, with zeros for what is not
// read: the warp waits for its copies before the next ones, or when it has to wait anyway. Both
// blocks know which tiles these are: they are a matter of the cluster's keys.
#pragma once

#include "attention/attn_copy.cuh"
#include "attention/attn_keys.cuh"
#include "attention/attn_schedule.cuh"
#include "ptx/sm90.cuh"

namespace mk {

// What a block does next: `row` is its first query, of num_q; keys are in tiles from tile_begin on.
struct AttnItem {
    static constexpr int kNone = -1;  // head, after the last
    int head, first_q, num_q, num_k, row, key_end, tile_begin, num_tiles;

    static __device__ __forceinline__ AttnItem read(uint32_t smem) {
        const uint4 a = ptx::ld_shared_v4(smem), b = ptx::ld_shared_v4(smem + 16);
        return {int(a.x), int(a.y), int(a.z), int(a.w), int(b.x), int(b.y), int(b.z), int(b.w)};
    }
};

// The barriers and places of a kernel's shared memory. FP8: V, as it comes, is transposed into
// slots of its own (attn_transpose_sm90.cuh).
template <class AttnArgs, int kHeadDim>
struct AttnRing {
    using Args = AttnArgs;
    static constexpr bool kIsFp8 = Args::kIsFp8;
    static constexpr AttnPrefillTile kTile =
        kIsFp8 ? kAttnPrefillFp8Tile : attn_prefill_tile(MK_SM, kHeadDim);
    static constexpr int kKSlots = kIsFp8 ? 4 : 2, kVSlots = 2, kTransposedSlots = kIsFp8 ? 2 : 0;
    static constexpr int kN = kTile.tile_n;
    static constexpr int kGroupRows = kAttnPrefillGroupRows;  // queries of a warpgroup
    static constexpr int kGroups = kTile.tile_m / kGroupRows;
    static constexpr int kRowBytes = kHeadDim * (kIsFp8 ? 1 : 2);  // of Q, K and V
    static constexpr int kSlotBytes = kN * kRowBytes;
    static constexpr int kQBytes = kGroupRows * kRowBytes;  // of a warpgroup
    // Of V^T, with eight more rows, of ones.
    static constexpr int kTransposedBytes = kSlotBytes + 8 * kN;
    static constexpr int kOutBytes = kAttnPrefillWarpRows * kHeadDim * 2;  // of a warp
    static_assert(kGroups == 2 && kN == 128 && kTile.producer_warps == 4);
    static_assert(kTile.slots == kKSlots + kVSlots + kTransposedSlots);

    using QLayout = Panels<kGroupRows>;
    using KvLayout = Panels<kN>;
    using OutLayout = Panels<kAttnPrefillWarpRows>;  // a warp's

    // Barriers, 8 bytes each, those of a ring's slots side by side; behind them the item, which
    // comes and goes with Q. FP8: two in turn, with their scales, so that one can be read again.
    enum Event {
        kQFull,
        kQEmpty,
        kKFull,
        kVFull = kKFull + kKSlots,
        kTransposedFull = kVFull + kVSlots,
        kKEmpty = kTransposedFull + kTransposedSlots,
        kVEmpty = kKEmpty + kKSlots,
        kTransposedEmpty = kVEmpty + kVSlots,
        kEvents = kTransposedEmpty + kTransposedSlots
    };
    static constexpr int kItem = 8 * kEvents + 16;
    static constexpr int kItemBytes = sizeof(AttnItem) + (kIsFp8 ? 16 : 0);
    static constexpr int kTransposers = 2;  // warps
    // FP8: 16 bytes of each warp that multiplies, behind the items.
    static constexpr int kWarpWords = kItem + (kIsFp8 ? 2 : 1) * kItemBytes;
    static_assert(kItem % 16 == 0 &&
                  kWarpWords + (kIsFp8 ? 16 * kTile.warps : 0) <=
                      (kIsFp8 ? kAttnPrefillFp8BarrierBytes : kAttnPrefillBarrierBytes));

    const uint32_t q;  // address; a multiple of 1 KB

    __device__ __forceinline__ uint32_t k() const { return q + kGroups * kQBytes; }
    __device__ __forceinline__ uint32_t v() const { return k() + kKSlots * kSlotBytes; }
    __device__ __forceinline__ uint32_t transposed() const { return v() + kVSlots * kSlotBytes; }
    __device__ __forceinline__ uint32_t out() const {
        return transposed() + kTransposedSlots * kTransposedBytes;
    }
    __device__ __forceinline__ uint32_t item(uint32_t number) const {
        return events() + kItem + (kIsFp8 ? number % 2 * kItemBytes : 0);
    }
    __device__ __forceinline__ uint32_t events() const { return out() + kTile.warps * kOutBytes; }

    // Arrivals that end a phase of a barrier. What both blocks' warps write is read in both: K by
    // four warpgroups, V too, or by two warps of each block that transpose it.
    static __device__ constexpr int arrivals(int event) {
        if (event == kQEmpty) return kTile.warps + (kIsFp8 ? kTransposers : 0);
        if (event < kTransposedFull) return 1;
        if (event < kKEmpty) return kTransposers;
        static_assert(!kIsFp8 || kTransposers == kGroups);
        return event < kTransposedEmpty ? kAttnPrefillCluster * kGroups : kGroups;
    }
    __device__ __forceinline__ void init() const {
        for (int i = 0; i < kEvents; ++i) ptx::mbarrier_init(events() + 8 * i, arrivals(i));
        ptx::fence_mbarrier_init();
    }

    // Where a block's tile number i is, of all that it ever has: the address of its slot's events
    // less their number, and the parity of the phase that fills it.
    struct Place {
        uint32_t slot, events, parity;
    };
    template <int kSlots = 2>
    __device__ __forceinline__ Place place(uint32_t i) const {
        return {i % kSlots, events() + i % kSlots * 8, i / kSlots % 2};
    }

    template <int kEvent>
    static __device__ __forceinline__ void wait(uint32_t events, uint32_t parity) {
        while (!ptx::mbarrier_try_wait_parity<8 * kEvent>(events, parity)) {
        }
    }
};

template <class Ring>
struct AttnFetch {
    using QCopy = RowCopy<typename Ring::QLayout, Ring::kRowBytes / 2>;
    using KvCopy = RowCopy<typename Ring::KvLayout, Ring::kRowBytes / 2>;
    static constexpr int kN = Ring::kN;
    static constexpr int kPanels = Ring::kRowBytes / 128;
    static constexpr uint32_t kAll = 0xFFFFFFFFu;

    const typename Ring::Args& args;
    const Ring ring;
    const uint32_t rank;
    uint32_t num_fetched = 0;  // tiles of K, and of V, before this item's
    uint32_t under_way = 0;    // event of copies by cp.async that were not waited for; 0: none
    // Of the item:
    int sequence = 0, kv_head = 0, first_k = 0, num_k = 0;
    int key_begin = 0, key_end = 0, tile_begin = 0;  // of the keys that the cluster's queries see

    // FP8's K and V are packed.
    __device__ __forceinline__ bool is_paged() const { return !Ring::kIsFp8 && args.p.page_size; }
    __device__ __forceinline__ uint32_t in_page(int key) const {
        return Ring::kIsFp8 ? key : key & args.page_mask;
    }

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

    // Until the phase of this parity has ended, for which it may take what is under way.
    template <int kEmpty>
    __device__ __forceinline__ void await(uint32_t events, uint32_t parity) {
        if (ptx::mbarrier_try_wait_parity<8 * kEmpty>(events, parity)) return;
        complete<0>();
        while (!ptx::mbarrier_try_wait_parity<8 * kEmpty>(events, parity)) {
        }
    }

    template <bool kIsK>
    __device__ __forceinline__ void fetch(int i) {
        constexpr int kSlots = kIsK ? Ring::kKSlots : Ring::kVSlots;
        const uint32_t number = num_fetched + i;
        const typename Ring::Place at = ring.template place<kSlots>(number);
        if (number >= kSlots) {  // the phase before the one that fills it
            await<kIsK ? Ring::kKEmpty : Ring::kVEmpty>(at.events, at.parity ^ 1);
        }
        const uint32_t smem_slot = (kIsK ? ring.k() : ring.v()) + at.slot * Ring::kSlotBytes;
        const uint32_t event = at.events + 8 * (kIsK ? Ring::kKFull : Ring::kVFull);
        const int key = (tile_begin + i) * kN;
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
        if (args.box_rows == 0 || key < key_begin || key + kN > num_k) return false;
        const int row = threadIdx.x * args.box_rows;  // of the tile
        int page = 0;
        if (is_paged()) {
            if (row < kN) page = page_of_key(args, sequence, key + row);
            if (__any_sync(kAll, page == kBadPage)) return false;
        }
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(event, Ring::kSlotBytes);
        __syncwarp();
        constexpr uint32_t kShare = kN / kAttnPrefillCluster;
        if (row / kShare != rank) return true;
        const int token = first_k + in_page(key + row);
        MK_UNROLL
        for (int panel = 0; panel < kPanels; ++panel) {
            ptx::cp_async_bulk_tensor_4d_multicast(
                smem_slot + panel * Ring::KvLayout::kPiecePitch + row * Ring::KvLayout::kPitch,
                kIsK ? &args.k_map : &args.v_map, panel * 64, kv_head, token, page, event,
                (1 << kAttnPrefillCluster) - 1);
        }
        return true;
    }

    // By cp.async, 16 rows at a time: those have one page.
    template <bool kIsK>
    __device__ __forceinline__ void copy_rows(uint32_t smem_slot, int first_key) const {
        const mk_attention_params& p = args.p;
        const AttnPrefillArgs::Rows& tensor = kIsK ? args.k : args.v;
        const KvCopy copy(smem_slot);
        const uint8_t* const rows = static_cast<const uint8_t*>(kIsK ? p.k : p.v) +
                                    kv_head * (kIsK ? p.k_head_stride : p.v_head_stride) * 2 +
                                    copy.byte();
        MK_NO_UNROLL
        for (int u = 0; u < kN; u += 16) {
            const int key = first_key + u;
            const uint32_t slot = u * Ring::KvLayout::kPitch;
            const bool is_read = key < key_end && key + 16 > key_begin;
            const int page = is_paged() && is_read ? page_of_key(args, sequence, key) : 0;
            if (page == kBadPage) {  // NaN for each query that sees one of these keys
                const uint32_t nan = kIsK ? ~0u : 0u;
                copy.template fill<16>(slot, {nan, nan, nan, nan});
                continue;
            }
            const int64_t row = first_k + in_page(key) + copy.row();
            copy.template some<16>(slot, rows + page * tensor.page_bytes + row * tensor.bytes,
                                   tensor.bytes_of_4, key_begin - key, key_end - key);
        }
    }

    // The item, and Q of as many warpgroups as have queries in it.
    __device__ __forceinline__ void fetch_q(const AttnItem& item, uint32_t number) {
        const uint32_t event = ring.events() + 8 * Ring::kQFull;
        const int rows = item.num_tiles > 0 ? item.num_q - item.row : 0;
        const int groups =
            min(max((rows + Ring::kGroupRows - 1) / Ring::kGroupRows, 0), Ring::kGroups);
        if (threadIdx.x == 0) {
            const auto* words = reinterpret_cast<const uint32_t*>(&item);
            const uint32_t to = ring.item(number);
            ptx::st_shared_v4(to, {words[0], words[1], words[2], words[3]});
            ptx::st_shared_v4(to + 16, {words[4], words[5], words[6], words[7]});
            if constexpr (Ring::kIsFp8) ptx::st_shared_v4(to + 32, scales(item));
        }
        const bool has_map = Ring::kIsFp8 || args.has_q_map;
        if (!has_map && groups > 0) copy_q(item, groups * Ring::kGroupRows);
        const int bytes = has_map ? groups * Ring::kQBytes : 0;
        if (threadIdx.x == 0) ptx::mbarrier_arrive_expect_tx(event, bytes);
        __syncwarp();
        const int group = threadIdx.x / kPanels, panel = threadIdx.x % kPanels;
        if (group * Ring::kQBytes >= bytes) return;
        ptx::cp_async_bulk_tensor_3d(
            ring.q + group * Ring::kQBytes + panel * Ring::QLayout::kPiecePitch, &args.q_map,
            panel * 64, item.head, item.first_q + item.row + group * Ring::kGroupRows, event);
    }

    // What FP8 adds to an item: the scale of its logits, in base 2, and of its output, and the
    // number of its first tile.
    __device__ __forceinline__ uint4 scales(const AttnItem& item) const {
        if (item.head == AttnItem::kNone) return {};
        const auto of = [&](const AttnPrefillFp8Args::Descale& descale, int head) {
            return descale.values ? descale.values[sequence * descale.stride + head] : 1.f;
        };
        const int q_head = args.has_descale_per_q_head ? item.head : kv_head;
        const float logits = args.scale * of(args.q_descale, q_head) * of(args.k_descale, kv_head);
        return {__float_as_uint(logits), __float_as_uint(of(args.v_descale, kv_head)), num_fetched,
                0};
    }

    __device__ __forceinline__ void copy_q(const AttnItem& item, int rows) const {
        const mk_attention_params& p = args.p;
        const QCopy copy(ring.q);
        const int64_t stride = p.q_stride * 2;
        const uint8_t* q = static_cast<const uint8_t*>(p.q) + item.head * p.q_head_stride * 2 +
                           (item.first_q + item.row + copy.row()) * stride + copy.byte();
        MK_NO_UNROLL
        for (int u = 0; u < rows; u += 16) {
            const uint32_t slot =
                u / Ring::kGroupRows * Ring::kQBytes + u % Ring::kGroupRows * Ring::QLayout::kPitch;
            copy.template some<16>(slot, q, 4 * stride, 0, item.num_q - item.row - u);
            q += 16 * stride;
        }
        ptx::cp_async_commit_group();
        ptx::cp_async_wait_group<0>();
        ptx::fence_proxy_async();
        __syncwarp();
    }

    __device__ __forceinline__ void run() {
        const mk_attention_params& p = args.p;
        const int q_heads_per_kv = p.num_q_heads / p.num_kv_heads;
        const bool is_head_pair = args.unit_rows == kAttnPrefillTileM;
        AttnSchedule schedule(args, blockIdx.x / kAttnPrefillCluster,
                              gridDim.x / kAttnPrefillCluster);
        AttnSchedule::Item next;
        uint32_t num_items = 0;
        const auto await_q = [&] {
            if (num_items > 0) await<Ring::kQEmpty>(ring.events(), (num_items - 1) % 2);
            complete<0>();
        };
        MK_NO_UNROLL
        for (; schedule.next(next); ++num_items) {
            const Sequence at(p, next.sequence);
            const int row = next.unit * args.unit_rows;
            const VisibleKeys visible(p, at.num_q, at.num_k);
            const SeenKeys<kN> keys(visible, row, min(row + args.unit_rows, at.num_q) - 1);
            const int num_tiles = keys.tile_end - keys.tile_begin;
            const AttnItem item{
                is_head_pair ? static_cast<int>(kAttnPrefillCluster * next.head_unit + rank)
                             : next.head_unit,
                at.first_q,
                at.num_q,
                at.num_k,
                is_head_pair ? row : static_cast<int>(row + rank * kAttnPrefillTileM),
                keys.end,
                keys.tile_begin,
                num_tiles};
            sequence = next.sequence, kv_head = item.head / q_heads_per_kv;
            first_k = at.first_k, num_k = at.num_k;
            key_begin = keys.begin, key_end = keys.end, tile_begin = keys.tile_begin;
            await_q();
            fetch_q(item, num_items);
            MK_NO_UNROLL
            for (int i = 0; i <= num_tiles; ++i) {
                if (i < num_tiles) fetch<true>(i);
                if (i > 0) fetch<false>(i - 1);
            }
            num_fetched += num_tiles;
        }
        await_q();
        fetch_q({AttnItem::kNone, 0, 0, 0, 0, 0, 0, 0}, num_items);
    }
};

}  // namespace mk
