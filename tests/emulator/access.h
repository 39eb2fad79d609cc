// Checked memory accesses of a warp: alignment, bounds, initialisation, races, counters.
//
// Addresses come as 32 lanes; those of inactive lanes repeat the first active one's, so that loops
// over all lanes are safe to read with and change no minimum, maximum or set.
#pragma once

#include "machine.h"

namespace emu {

struct LaneAddresses {
    uint64_t at[kLanes];
    Mask mask;
    int first() const { return std::countr_zero(mask); }
};

// Row `row` (64-bit when `wide`, else 32-bit) plus offset.
LaneAddresses lane_addresses(Warp& w, uint32_t row, bool wide, int64_t offset, Mask m);

void check_alignment(const LaneAddresses& a, uint32_t bytes);
// `sizes`, if given: how many of the `bytes` each lane really touches. `is_hint`: a load whose
// value may be one of before griddepcontrol.wait.
void check_global(Warp& w, const LaneAddresses& a, uint32_t bytes, bool write,
                  const uint32_t* sizes = nullptr, bool is_hint = false);
// Alignment, bounds and bank conflicts of a shared-memory request, and the race detector's part.
// Bounds, initialisation and sectors of one lane's contiguous access of any length. What it writes
// counts as initialised when it lands, which the caller sees to.
void check_global_range(Warp& w, uint64_t address, uint32_t bytes, bool write, int lane);
// `a` are offsets in the shared memory of `cta`.
void check_shared_bounds(Warp& w, Cta& cta, const LaneAddresses& a, uint32_t bytes);
void check_shared(Warp& w, Cta& cta, const LaneAddresses& a, uint32_t bytes,
                  SharedMemory::Access kind);
// The CTA of the cluster that has this rank; a fault if there is none or it has ended.
Cta& cta_of_rank(Warp& w, uint32_t rank, int lane);
void check_local(Warp& w, const LaneAddresses& a, uint32_t bytes);

// Splits generic addresses by window, takes the window off and calls f(space, addresses) for each
// part.
template <class F>
void by_space(const LaneAddresses& a, Space space, F f) {
    if (space != Space::generic) return f(space, a);
    uint64_t any = 0;
    for (int l = 0; l < kLanes; ++l) any |= a.at[l];
    if (window_of(any) == 0) return f(Space::global, a);
    for (auto [part, window] : {std::pair{Space::global, uint64_t{0}},
                                {Space::shared, kSharedWindow},
                                {Space::local, kLocalWindow}}) {
        LaneAddresses sub{{}, 0};
        for (int l = 0; l < kLanes; ++l)
            if ((a.mask >> l & 1) && window_of(a.at[l]) == window) sub.mask |= 1u << l;
        if (!sub.mask) continue;
        const uint64_t fill = a.at[sub.first()];
        for (int l = 0; l < kLanes; ++l)
            sub.at[l] = ((sub.mask >> l & 1) ? a.at[l] : fill) - window;
        f(part, sub);
    }
}

inline uint32_t clock_of(const Warp& w) { return w.cta->cluster->clocks.time(); }

// Takes the window off generic addresses, by the AddressBits of an operand; a fault for other
// spaces.
void remove_shared_window(LaneAddresses& a, uint8_t form);

// Splits shared addresses by the CTA whose memory they are of, takes the rank off and calls f(cta,
// offsets) for each part. Only .shared::cluster and generic addresses (`any`) may name another CTA,
// which must not end while it `stays` there. Addresses of other spaces pass as they are.
template <class F>
void by_cta(Warp& w, Space space, const LaneAddresses& a, bool any, F f, bool stays = true) {
    if (space != Space::shared) return f(*w.cta, a);
    uint64_t high = 0;
    for (int l = 0; l < kLanes; ++l) high |= a.at[l] >> kRankShift;
    if (high == 0 && w.cta->rank == 0) return f(*w.cta, a);
    Mask left = a.mask;
    while (left) {
        const int first = std::countr_zero(left);
        const uint64_t rank = a.at[first] >> kRankShift;
        if (rank != w.cta->rank && !any && w.cta->cluster->ctas.size() > 1)
            fault("out of bounds",
                  "shared address " + hex(a.at[first]) + " has rank " + std::to_string(rank) +
                      "; .shared::cta is of rank " + std::to_string(w.cta->rank),
                  first);
        LaneAddresses sub{{}, 0};
        for (int l = 0; l < kLanes; ++l)
            if ((left >> l & 1) && a.at[l] >> kRankShift == rank) sub.mask |= 1u << l;
        for (int l = 0; l < kLanes; ++l)
            sub.at[l] = a.at[sub.mask >> l & 1 ? l : first] & kOffsetMask;
        if (rank >= w.cta->cluster->ctas.size())
            fault("out of bounds",
                  "shared address " + hex(a.at[first]) + "; the CTA has " +
                      std::to_string(w.cta->shared.size()),
                  first);
        left &= ~sub.mask;
        Cta& cta = cta_of_rank(w, static_cast<uint32_t>(rank), first);
        if (&cta != w.cta && stays) cta.visits[static_cast<size_t>(w.agent)] = clock_of(w) + 1;
        f(cta, sub);
    }
}

}  // namespace emu
