// Plan and arguments of the products with quantised weights and up to MK_QUANT_MAX_DECODE_M rows of
// x, one launch.
#pragma once

#include "quant/quant_plan.h"
#include "quant/quant_tiles.h"

namespace mk {

mk_plan plan_quant_decode(const Product& a, const QuantMatrices& w, const mk_device& device);
QuantDecodeArgs quant_decode_args(const Product& a, const QuantMatrices& w, const Outputs& to,
                                  const mk_device& device);

}  // namespace mk
