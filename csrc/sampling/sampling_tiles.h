// Tile constants of argmax and sample: one block per row, a warp per chunk of consecutive logits.
#pragma once

namespace mk {

constexpr int kSamplingThreads = 1024;
constexpr int kSamplingChunk = 256;  // 8 logits per lane
// Bins of a radix digit, and chunks of a row: two of each per thread.
constexpr int kSamplingBins = 2 * kSamplingThreads;
constexpr int kSamplingMaxVocab = kSamplingChunk * kSamplingBins;
static_assert(kSamplingMaxVocab == 1 << 19);

}  // namespace mk
