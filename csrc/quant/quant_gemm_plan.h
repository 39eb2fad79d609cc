// Plans and arguments of the two launches for more than MK_QUANT_MAX_DECODE_M rows of x.
#pragma once

#include "quant/quant_gemm_tiles.h"
#include "quant/quant_plan.h"

namespace mk {

mk_plan plan_quant_prepare(const Product& a, int32_t dtype, const mk_device& device);

mk_plan plan_quant_gemm(int32_t m, const QuantMatrices& w, const mk_device& device);
QuantGemmArgs quant_gemm_args(const Product& a, const QuantMatrices& w, void* workspace,
                              const mk_device& device);

}  // namespace mk
