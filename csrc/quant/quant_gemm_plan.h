// Plans and arguments of the two launches for more than MK_QUANT_MAX_DECODE_M rows of x.
#pragma once

#include "launch/op.h"
#include "quant/quant_gemm_tiles.h"

namespace mk {

mk_plan plan_quant_prepare(const Product& a, int32_t dtype, const mk_device& device);

// Of one matrix, or of the three of Q, K and V.
mk_plan plan_quant_gemm(int32_t m, const mk_quant_matrix* w, int count, const mk_device& device);
QuantGemmArgs quant_gemm_args(const Product& a, const mk_quant_matrix* w, int count,
                              void* workspace, const mk_device& device);

}  // namespace mk
