// What sm_90's persistent blocks do, and in which order.
//
// An item is the work of a cluster: a unit of queries of a sequence (kAttnPrefillTileM, or twice as
// many, of one head each; AttnPrefillSm90Args) and a head or a pair of them. Items are listed by
// the unit's number in its sequence, the last one first; those of a number by sequence, heads side
// by side. Where sequences have as many queries as keys and the mask is causal, the longest come
// first, and K and V of the heads and sequences that are under way at a time come from L2.
//
// Cluster c of C takes items c, 2C - 1 - c, 2C + c, 4C - 1 - c, ...: it gets a little more in one
// round than its neighbour, a little less in the next. Which ones depends on lengths only, so there
// is no counter in memory to reset, and a captured graph can be replayed.
//
//     8 queries' units, 16 heads, 5 clusters   u7 h0 ... h15 | u6 h0 ... h15 | ... | u0 h0 ... h15
//     round 0 ->   0 1 2 3 4  |  <- round 1   9 8 7 6 5  |  round 2 ->   10 11 12 13 14  | ...
#pragma once

#include "attention/attn_tiles.h"
#include "common/entry.cuh"

namespace mk {

// A warp's walk through the list. It looks at 32 sequences at a time, and at all of them for each
// number of a unit: 40 instructions, at some 60 clocks, per step.
class AttnSchedule {
  public:
    struct Item {
        int sequence, unit, head_unit;
    };

    __device__ __forceinline__ AttnSchedule(const AttnPrefillSm90Args& args, uint32_t cluster,
                                            uint32_t num_clusters)
        : args_(args),
          next_(cluster),
          step_(2 * (num_clusters - 1 - cluster) + 1),
          steps_(2 * num_clusters),
          unit_((args.p.max_seqlen_q + args.unit_rows - 1) / args.unit_rows - 1) {
        look();
    }

    // The cluster's next item; false: none is left.
    __device__ __forceinline__ bool next(Item& item) {
        const uint32_t heads = args_.num_head_units;
        while (next_ - before_ >= __popc(present_) * heads) {
            before_ += __popc(present_) * heads;
            first_ += 32;
            if (first_ >= args_.p.batch) {
                first_ = 0;
                if (--unit_ < 0) return false;
            }
            look();
        }
        const uint32_t nth = (next_ - before_) / heads;  // of the sequences that are present
        const uint32_t lane = threadIdx.x % 32;
        const bool is_it = present_ >> lane & 1 && __popc(present_ & ((1u << lane) - 1)) == nth;
        item.sequence = first_ + __ffs(__ballot_sync(0xFFFFFFFFu, is_it)) - 1;
        item.unit = unit_;
        item.head_unit = static_cast<int>(next_ - before_ - nth * heads);
        next_ += step_;
        step_ = steps_ - step_;
        return true;
    }

  private:
    // Which of the sequences first_ ... first_ + 31 have a unit of this number.
    __device__ __forceinline__ void look() {
        const mk_attention_params& p = args_.p;
        const int sequence = first_ + static_cast<int>(threadIdx.x % 32);
        bool is_present = false;
        if (sequence < p.batch) {
            const int num_q = p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence];
            is_present = num_q > p.skip_seqlen_q && num_q > unit_ * args_.unit_rows;
        }
        present_ = __ballot_sync(0xFFFFFFFFu, is_present);
    }

    const AttnPrefillSm90Args& args_;
    uint32_t next_;          // item's number in the list
    uint32_t step_, steps_;  // to the one after it; of two rounds
    int unit_;
    int first_ = 0;
    uint32_t before_ = 0;  // items before those of this unit's number and these 32 sequences
    uint32_t present_;
};

}  // namespace mk
