// Plan and arguments of the products with quantised weights and up to MK_QUANT_MAX_DECODE_M rows of
// x.
#pragma once

#include "launch/op.h"
#include "quant/quant_tiles.h"

namespace mk {

// Of one matrix, or of the three of Q, K and V.
mk_plan plan_quant_decode(const Product& a, const mk_quant_matrix* w, int count,
                          const mk_device& device);
QuantDecodeArgs quant_decode_args(const Product& a, const mk_quant_matrix* w, int count,
                                  const Outputs& to, const mk_device& device);

}  // namespace mk
