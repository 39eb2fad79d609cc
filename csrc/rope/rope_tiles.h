// Launch shape and arguments of the rope kernels.
//
//   grid (tokens, blocks_per_token), block (chunks, heads)
//   chunk = 8 pairs of a head = two vectors of 8 elements, in one thread:
//     half-split    [c*8 ... +8) and [R/2 + c*8 ... +8)      R = rotary_dim
//     interleaved   [c*16 ... +16)
//   past R, chunks of 16 consecutive features that pass unchanged.
//
// A thread keeps the cosines and sines of its 8 pairs in registers and applies them to up to
// kRopeHeads heads, which it loads all at once (32 bytes each).
#pragma once

#include "minitron_kernels.h"

namespace mk {

constexpr int kRopeHeads = 4;
constexpr int kRopeMaxThreads = 256;
constexpr int kRopeMaxHeadDim = 256;
constexpr int kRopeMaxPairs = kRopeMaxHeadDim / 2;
static_assert(kRopeMaxHeadDim / 16 + 1 <= kRopeMaxThreads);

// What the kernels take: the op's parameters, and the frequencies when there are no tables.
template <class Params>
struct RopeArgs {
    Params p;
    float inv_freq[kRopeMaxPairs];
};

}  // namespace mk
