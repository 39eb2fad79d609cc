// Host side of rows_tiles.h.
#pragma once

#include <algorithm>

#include "common/rows_tiles.h"
#include "launch/op.h"

namespace mk {

// Largest row that the launch shape covers: blocks_per_row is a grid's y, at most 65535.
constexpr int32_t kRowMaxElements = 1 << 20;

inline void set_row_grid(int32_t rows, int32_t elements, const mk_device& device, mk_plan* plan) {
    const int32_t vecs = ceil_div(elements, 8);
    // With few vectors in all, one per thread: more blocks to spread over the SMs.
    const bool few = static_cast<int64_t>(rows) * vecs <= 1024 * device.num_sms;
    const int32_t per_thread = few ? 1 : kRowVecs;
    const int32_t threads_per_row = ceil_div(vecs, per_thread);
    plan->grid[0] = rows;
    plan->grid[1] = ceil_div(threads_per_row, kRowMaxThreads);
    plan->block[0] = 32 * ceil_div(ceil_div(threads_per_row, plan->grid[1]), 32);
}

}  // namespace mk
