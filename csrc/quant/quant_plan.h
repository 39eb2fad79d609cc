// Checks that the ops with quantised weights and the repack share.
#pragma once

#include "launch/op.h"
#include "quant/quant_layout.h"

namespace mk {

// "Q4_K" and so on.
const char* quant_type_name(int32_t type);

// A type in the field `name`, for rows of `k` elements, the field `k_name`.
mk_status check_quant_type(const char* name, int32_t type, const char* k_name, int32_t k);

}  // namespace mk
