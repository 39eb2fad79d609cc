// Which keys a query sees: an interval, whatever the mask.
#pragma once

#include "common/entry.cuh"
#include "ptx/sm80.cuh"

namespace mk {

constexpr int kUnlimited = 1 << 30;  // farther than any key

struct VisibleKeys {
    const mk_attention_params& p;
    int num_keys;
    int offset;  // query i stands on key i + offset: the last query on the last key

    __device__ VisibleKeys(const mk_attention_params& p, int num_queries, int num_keys)
        : p(p), num_keys(num_keys), offset(num_keys - num_queries) {}

    // How many keys before its own place a query sees, and how many after.
    __device__ int behind() const { return p.window ? p.window - 1 : kUnlimited; }
    __device__ int ahead() const { return p.causal ? 0 : behind(); }

    // Query i sees keys begin(i) ... end(i) - 1; none if end(i) <= begin(i). Both grow with i.
    __device__ int begin(int i) const { return max(i + offset - behind(), 0); }
    __device__ int end(int i) const { return min(i + offset + ahead() + 1, num_keys); }
};

// -inf for the logits of a warp's accumulators that are hidden, `row` and `key` being those of the
// first. Accumulator [m][n][2h + e] of lane l is 16m + 8h + l / 4 rows and 8n + e + 2 (l % 4) keys
// on.
template <int kM, int kN>
__device__ __forceinline__ void hide(float (&logits)[kM][kN][4], const VisibleKeys& visible,
                                     int row, int key, bool hides_first) {
    const int lane = ptx::mov_u32_tid_x() % 32;
    const int lane_row = row + lane / 4, lane_key = key + lane % 4 * 2;
    MK_UNROLL
    for (int m = 0; m < kM; ++m) {
        MK_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int row = lane_row + 16 * m + 8 * h;
            const int end = visible.end(row) - lane_key;
            MK_UNROLL
            for (int i = 0; i < 2 * kN; ++i) {
                float& x = logits[m][i / 2][2 * h + i % 2];
                if (8 * (i / 2) + i % 2 >= end) x = -INFINITY;
            }
        }
    }
    if (!hides_first) return;  // no window begins in this tile
    MK_UNROLL
    for (int m = 0; m < kM; ++m) {
        MK_UNROLL
        for (int h = 0; h < 2; ++h) {
            const int row = lane_row + 16 * m + 8 * h;
            const int begin = visible.begin(row) - lane_key;
            MK_UNROLL
            for (int i = 0; i < 2 * kN; ++i) {
                float& x = logits[m][i / 2][2 * h + i % 2];
                if (8 * (i / 2) + i % 2 < begin) x = -INFINITY;
            }
        }
    }
}

}  // namespace mk
