// out[t] = table[ids[t]], a row of NaN for an id out of range. Copies 2-byte elements of any kind;
// work is spread as common/rows_tiles.h draws it.
#pragma once

#include "common/rows.cuh"
#include "ptx/sm90.cuh"

namespace mk {

template <bool kAligned>
__device__ __forceinline__ void embedding(const mk_embedding_params& p) {
    constexpr uint32_t kNans = 0x7FFF7FFFu;  // in bf16 and in f16
    const int64_t token = blockIdx.x;
    void* const out_row = row_of(p.out, token, p.out_stride);

    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    const int64_t id = load_index(p.ids, p.ids_dtype, token);
    const bool is_valid = 0 <= id && id < p.vocab;
    const void* const table_row = row_of(p.table, is_valid ? id : 0, p.table_stride);
    Vec8 v[kRowVecs];
    MK_UNROLL
    for (int s = 0; s < kRowVecs; ++s) {
        if (row_element(s) >= p.hidden) break;
        v[s] = {kNans, kNans, kNans, kNans};
        if (is_valid) v[s] = load8<kAligned>(table_row, row_element(s), p.hidden);
    }
    MK_UNROLL
    for (int s = 0; s < kRowVecs; ++s) {
        if (row_element(s) >= p.hidden) break;
        store8<kAligned>(out_row, row_element(s), p.hidden, v[s]);
    }
}

}  // namespace mk
