// What sm_90's persistent blocks do, and in which order.
//
// An item is the work of a cluster: a unit of queries of a sequence (kAttnPrefillTileM, or twice as
// many, of one head each; AttnPrefillSm90Args) and a head or a pair of them. The list has those
// that see most tiles of keys first: units of all sequences by classes of that number (exact up to
// 31, above 16 classes an octave), those of a class by sequence, heads side by side. So K and V of
// the heads and sequences that are under way at a time come from L2.
//
// Clusters take items as if each took the next one when it gets free, a tile of keys being as long
// as another: in rounds, of which each is for the clusters that would be free before one of them
// could have done another item, from the first to the last, in the next round back. The busiest has
// at most 4 % more than the mean then (tests/test_attn_schedule.py: contexts of 512 to 32k in a
// batch, windows, and others), unless a single item is more. One sequence needs no such
// book-keeping: cluster c of C takes items c, 2C - 1 - c, 2C + c, ... of the list.
//
//     3 clusters, items of 9 4 4 3 3 2 1 tiles    0: 9       1: 4 3 2    2: 4 3 1
//
// All of it follows from the lengths, by the same steps in every block: there is no counter in
// memory to reset, and a captured graph can be replayed. tests/attn_schedule_host.cpp compiles this
// file for the CPU.
#pragma once

#include "attention/attn_keys.cuh"
#include "attention/attn_tiles.h"

namespace mk {

// A sequence's units and how many tiles of keys each one sees: of unit u
//     min(keys, first_end + u * step) - max(0, first_begin + u * step)
// (0 if that is negative), which grows with u, stays and falls.
struct UnitTiles {
    int num_units, keys, first_end, first_begin, shift;  // in tiles; step = 1 << shift

    __device__ __forceinline__ UnitTiles(const AttnPrefillSm90Args& args, int sequence)
        : num_units(0),
          keys(0),
          first_end(0),
          first_begin(0),
          shift(args.unit_rows == kAttnPrefillTileM ? 0 : 1) {
        if (sequence >= args.p.batch) return;
        const Sequence at(args.p, sequence);
        const VisibleKeys visible(args.p, at.num_q, at.num_k);
        if (at.num_q > args.p.skip_seqlen_q) {
            num_units = (min(at.num_q, args.p.max_seqlen_q) + args.unit_rows - 1) / args.unit_rows;
        }
        keys = (at.num_k + kTile - 1) / kTile;
        first_end = (visible.offset + visible.ahead() + args.unit_rows + kTile - 1) >> kTileShift;
        first_begin = (visible.offset - visible.behind()) >> kTileShift;
    }

    // No unit sees more.
    __device__ __forceinline__ int most() const { return min(keys, first_end - first_begin); }

    // The units that see at least so many.
    struct Interval {
        int begin, end;
    };
    __device__ __forceinline__ Interval at_least(int tiles) const {
        if (tiles <= 0) return {0, num_units};
        if (tiles > most()) return {0, 0};
        const int begin = max((tiles - first_end + (1 << shift) - 1) >> shift, 0);
        const int end = min(((keys - first_begin - tiles) >> shift) + 1, num_units);
        return {begin, max(begin, end)};
    }

    static constexpr int kTileShift = 7, kTile = 1 << kTileShift;
    static_assert(kTile == attn_prefill_tile(90, 128).tile_n && kAttnPrefillTileM == kTile &&
                  kTile == attn_prefill_tile(90, 64).tile_n && kTile == kAttnPrefillFp8Tile.tile_n);
};

// A warp's walk through the list. It looks at 32 sequences at a time, and at all of them for each
// class that has a unit: some 120 instructions; 70 more for each round until its cluster's next.
class AttnSchedule {
  public:
    struct Item {
        int sequence, unit, head_unit;
    };

    __device__ __forceinline__ AttnSchedule(const AttnPrefillSm90Args& args, uint32_t cluster,
                                            uint32_t num_clusters)
        : args_(args), cluster_(cluster), num_clusters_(num_clusters) {
        MK_UNROLL
        for (int j = 0; j < kPerLane; ++j) {
            loads_[j] = lane() * kPerLane + j < num_clusters ? 0 : kNever;
        }
        if (!is_plain()) look();  // finds nothing, but which class is the first
    }

    // The cluster's next item; false: none is left.
    __device__ __forceinline__ bool next(Item& item) {
        if (is_plain()) return next_of_one(item);
        MK_NO_UNROLL
        while (true) {
            MK_NO_UNROLL
            while (num_left_ == 0) {
                if (!advance()) return false;
            }
            if (!__any_sync(kAll, open_ != 0)) start_round();
            int rank = 0, num_open = 0;  // of the lane's first open cluster; of all
            MK_UNROLL
            for (int j = 0; j < kPerLane; ++j) {
                const uint32_t open = __ballot_sync(kAll, open_ >> j & 1);
                rank += __popc(open & ((1u << lane()) - 1));
                num_open += __popc(open);
            }
            const int num_given = min(num_left_, static_cast<uint32_t>(num_open));
            int mine = -1;
            MK_UNROLL
            for (int j = 0; j < kPerLane; ++j) {
                if (!(open_ >> j & 1)) continue;
                const int number = is_backwards_ ? num_open - 1 - rank : rank;
                ++rank;
                if (number >= num_given) continue;
                open_ ^= 1u << j;
                loads_[j] += load_;
                if (lane() * kPerLane + j == cluster_) mine = number;
            }
            const uint32_t first = num_given_;
            num_given_ += num_given, num_left_ -= num_given;
            mine = __reduce_max_sync(kAll, mine);
            if (mine >= 0) {
                item = find(first + mine);
                return true;
            }
        }
    }

  private:
    static constexpr uint32_t kAll = 0xFFFFFFFFu;
    static constexpr uint32_t kNever = 0xFFFFFFFFu;  // a load of clusters that are not there
    static constexpr int kPerLane = kAttnPrefillMaxClusters / 32;
    static constexpr int kAboveAll = 352;  // a class of 2^25 tiles

    static __device__ __forceinline__ uint32_t lane() { return threadIdx.x % 32; }

    // The class of so many tiles, and the fewest tiles of a class.
    static __device__ __forceinline__ int class_of(int tiles) {
        const int shift = max(27 - __clz(tiles), 0);
        return 16 * shift + (tiles >> shift);
    }
    static __device__ __forceinline__ int fewest(int number) {
        return number < 32 ? number : (16 + number % 16) << (number / 16 - 1);
    }

    // One sequence, of which no unit sees more than the last.
    __device__ __forceinline__ bool is_plain() const {
        return args_.p.batch == 1 && (args_.p.causal || !args_.p.window);
    }
    // Its units from the last to the first, dealt out to all clusters, there and back.
    __device__ __forceinline__ bool next_of_one(Item& item) {
        const uint32_t heads = args_.num_head_units;
        const uint32_t at = is_backwards_ ? cluster_ : num_clusters_ - 1 - cluster_;
        const uint32_t number = num_given_ + at;
        const UnitTiles tiles(args_, 0);
        if (number >= tiles.num_units * heads) return false;
        num_given_ += num_clusters_;
        is_backwards_ = !is_backwards_;
        const int nth = static_cast<int>(number / heads);
        item = {0, tiles.num_units - 1 - nth, static_cast<int>(number - nth * heads)};
        return true;
    }

    // The next 32 sequences, or the next class; false: there is none.
    __device__ __forceinline__ bool advance() {
        first_ += 32;
        if (first_ >= args_.p.batch) {
            if (next_class_ < 0) return false;
            class_ = next_class_;
            next_class_ = -1;
            first_ = 0;
        }
        look();
        return true;
    }

    // The units of a sequence in a class are those of `all` before and behind `inner`.
    struct Units {
        UnitTiles::Interval all, inner;
        __device__ __forceinline__ Units(const UnitTiles& tiles, int number)
            : all(tiles.at_least(fewest(number))), inner(tiles.at_least(fewest(number + 1))) {
            if (inner.begin >= inner.end) inner = {all.end, all.end};
        }
        __device__ __forceinline__ int count() const {
            return inner.begin - all.begin + all.end - inner.end;
        }
    };

    // What the sequences first_ ... first_ + 31 have of the class.
    __device__ __forceinline__ void look() {
        const UnitTiles tiles(args_, first_ + static_cast<int>(lane()));
        const Units units(tiles, class_);
        const int count = units.count(), above = fewest(class_ + 1) - 1;
        const bool has_more = units.all.end - units.all.begin < tiles.num_units;
        const int next = has_more ? class_of(max(min(tiles.most(), fewest(class_) - 1), 0)) : -1;
        next_class_ = max(next_class_, __reduce_max_sync(kAll, next));
        // A quarter of a tile for an item's first and last tile, which nothing overlaps.
        load_ = 4 * __reduce_max_sync(kAll, count > 0 ? min(tiles.most(), above) : 0) + 1;
        num_units_ = count;
        num_left_ = static_cast<uint32_t>(__reduce_add_sync(kAll, count)) * args_.num_head_units;
        num_given_ = 0;
    }

    // Opens the clusters that take part in a round.
    __device__ __forceinline__ void start_round() {
        uint32_t least = loads_[0];
        MK_UNROLL
        for (int j = 1; j < kPerLane; ++j) least = min(least, loads_[j]);
        least = __reduce_min_sync(kAll, least);
        MK_UNROLL
        for (int j = 0; j < kPerLane; ++j) open_ |= (loads_[j] - least < load_ ? 1u : 0u) << j;
        is_backwards_ = !is_backwards_;
    }

    // Item `number` of the 32 sequences' and the class.
    __device__ __forceinline__ Item find(uint32_t number) const {
        const int heads = args_.num_head_units;
        const int nth = static_cast<int>(number / heads);  // unit
        int before = num_units_;                           // of the lanes before this one
        MK_UNROLL
        for (uint32_t i = 1; i < 32; i *= 2) {
            const int other = __shfl_up_sync(kAll, before, i);
            if (lane() >= i) before += other;
        }
        before -= num_units_;
        const int from = 31 - __clz(__ballot_sync(kAll, before <= nth));
        const int sequence = first_ + from;
        const int of_sequence = nth - __shfl_sync(kAll, before, from);
        const Units units(UnitTiles(args_, sequence), class_);
        const int behind = of_sequence - (units.inner.begin - units.all.begin);
        return {sequence,
                behind < 0 ? units.inner.begin - 1 - of_sequence : units.inner.end + behind,
                static_cast<int>(number) - nth * heads};
    }

    const AttnPrefillSm90Args& args_;
    const uint32_t cluster_, num_clusters_;
    // The lane's clusters, from lane() * kPerLane on: quarters of tiles that they have, and, as
    // bits, which of them are still to take an item of this round.
    uint32_t loads_[kPerLane];
    uint32_t open_ = 0;
    bool is_backwards_ = true;
    int class_ = kAboveAll, next_class_ = -1;  // -1: none
    int first_ = 0;                            // of 32 sequences
    int num_units_;                            // of the class, of the lane's sequence
    uint32_t num_given_ = 0, num_left_ = 0;    // of the class's items of these sequences
    uint32_t load_;                            // of one
};

}  // namespace mk
