// argmax: the first of the largest logits of each row. A block of 1024 threads looks for the
// largest value, then for its first place: 5 instructions per logit in all, where one pass that
// carries value and place takes 10. The second read comes from L2 (131072 bf16 logits are 256 KB).
#pragma once

#include "sampling/logits.cuh"

namespace mk {

template <class Dtype, bool kAligned>
__device__ __forceinline__ void argmax(const mk_argmax_params& p) {
    const int64_t row = blockIdx.x;
    ptx::griddepcontrol_launch_dependents();
    ptx::griddepcontrol_wait();
    const Logits<Dtype, kAligned> logits(p.logits, row, p.logits_stride, p.vocab);
    const int id = block_first(logits, block_max(logits));
    if (threadIdx.x == 0) p.out[row] = id;
}

}  // namespace mk
