// out = round(silu(gate)) * up.  Memory-bound: 4 bytes in, 2 out per element, each moved once.
// Work is spread as common/rows_tiles.h draws it; arithmetic is about 8 instructions an element.
#pragma once

#include "common/rows.cuh"
#include "ptx/sm90.cuh"
#include "silu_and_mul/silu.cuh"

namespace mk {

template <class Dtype, bool kAligned>
__device__ __forceinline__ void silu_and_mul(const mk_silu_and_mul_params& p) {
    const int64_t row = blockIdx.x;
    const void* const gate_row = row_of(p.gate_up, row, p.gate_up_stride);
    const void* const up_row = static_cast<const uint16_t*>(gate_row) + p.size;
    void* const out_row = row_of(p.out, row, p.out_stride);

    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    Vec8 gate[kRowVecs], up[kRowVecs];
    MK_UNROLL
    for (int s = 0; s < kRowVecs; ++s) {
        if (row_element(s) >= p.size) break;
        gate[s] = load8<kAligned>(gate_row, row_element(s), p.size);
        up[s] = load8<kAligned>(up_row, row_element(s), p.size);
    }
    MK_UNROLL
    for (int s = 0; s < kRowVecs; ++s) {
        if (row_element(s) >= p.size) break;
        MK_UNROLL
        for (int i = 0; i < kVec / 2; ++i) {
            const float2 g = Dtype::unpack(gate[s].pair[i]);
            gate[s].pair[i] = Dtype::mul(Dtype::pack(silu(g.x), silu(g.y)), up[s].pair[i]);
        }
        store8<kAligned>(out_row, row_element(s), p.size, gate[s]);
    }
}

}  // namespace mk
