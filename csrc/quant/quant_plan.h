// What the plans of the ops with quantised weights share, and checks that the repack shares, too.
#pragma once

#include "launch/op.h"
#include "quant/quant_layout.h"

namespace mk {

// The matrices of a product, their rows one below the other's: one, or Q, K and V. Or, is_pair,
// gate and up [I, k], of which rows i give output i together.
struct QuantMatrices {
    mk_quant_matrix w[3];
    int32_t count;
    bool is_pair;
};

// "Q4_K" and so on.
const char* quant_type_name(int32_t type);

// A type in the field `name`, for rows of `k` elements, the field `k_name`.
mk_status check_quant_type(const char* name, int32_t type, const char* k_name, int32_t k);

}  // namespace mk
