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
// `sizes`, if given: how many of the `bytes` each lane really touches.
void check_global(Warp& w, const LaneAddresses& a, uint32_t bytes, bool write,
                  const uint32_t* sizes = nullptr);
// Alignment, bounds and bank conflicts of a shared-memory request, and the race detector's part.
void check_shared_bounds(Warp& w, const LaneAddresses& a, uint32_t bytes);
void check_shared(Warp& w, const LaneAddresses& a, uint32_t bytes, SharedMemory::Access kind);
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

}  // namespace emu
