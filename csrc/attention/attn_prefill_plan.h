// What the plans of sm_90's kernels of attention for prompts share.
#pragma once

#include <initializer_list>

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

// A tensor map of `tensor`: the elements of a head, then `counts` of `strides` elements; boxes of
// 64 elements x box_rows of the second of these. No map if elements share memory, which TMA does
// not allow.
mk_status attn_map(int32_t dtype, int32_t head_dim, const void* tensor,
                   std::initializer_list<int64_t> strides, std::initializer_list<int32_t> counts,
                   int32_t box_rows, AttnPrefillSm90Args::TensorMap* to, int32_t* has_map);

}  // namespace mk
