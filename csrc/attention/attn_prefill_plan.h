// What the plans of sm_90's kernels of attention for prompts share.
#pragma once

#include "attention/attn_map.h"
#include "attention/attn_tiles.h"

namespace mk {

constexpr int32_t kMaxTokens = 1 << 30;

// Blocks in clusters: one for each two SMs, or for each item if these are fewer.
int32_t attn_blocks(int64_t num_items, const mk_device& device);

}  // namespace mk
