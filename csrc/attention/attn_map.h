// Tensor maps of Q, K, V and outputs, for sm_90's kernels.
#pragma once

#include <initializer_list>

#include "common/tensor_map.h"
#include "minitron_kernels.h"

namespace mk {

// A map of `tensor`, bf16 or fp16: the elements of a head, then `counts` of `strides` elements;
// boxes of 64 elements x box_rows of the second of these. Where elements share memory, which TMA
// does not allow, there is no map: *has_map is left alone, else set to 1.
mk_status attn_map(int32_t dtype, int32_t head_dim, const void* tensor,
                   std::initializer_list<int64_t> strides, std::initializer_list<int32_t> counts,
                   int32_t box_rows, TensorMap* to, int32_t* has_map);

}  // namespace mk
