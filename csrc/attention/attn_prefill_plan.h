// What the plans of sm_90's kernels of attention for prompts share.
#pragma once

#include "attention/attn_map.h"
#include "attention/attn_tiles.h"

namespace mk {

constexpr int32_t kMaxTokens = 1 << 30;

// What a cluster takes at a time: how many of these heads or pairs of heads there are, and rows of
// queries.
struct AttnUnits {
    int32_t heads, rows;
};
AttnUnits attn_units(int32_t num_q_heads, int32_t num_kv_heads);

// Blocks in clusters: one for each two SMs, or for each item if these are fewer.
int32_t attn_blocks(int64_t num_items, const mk_device& device);

}  // namespace mk
