// argmax: the first of the largest logits of each row. One block of 1024 threads reads a row once,
// 16 bytes per thread and access: 131072 logits in bf16 are 16 accesses a thread.
#pragma once

#include "sampling/logits.cuh"

namespace mk {

template <class Dtype, bool kAligned>
__device__ __forceinline__ void argmax(const mk_argmax_params& p) {
    const int64_t row = blockIdx.x;
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    const Logits<Dtype, kAligned> logits(p.logits, row, p.logits_stride, p.vocab);
    const uint64_t best = block_argmax(logits, 1.f);
    if (threadIdx.x == 0) p.out[row] = id_in(best);
}

}  // namespace mk
