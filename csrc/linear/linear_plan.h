// What the ops with dense and with quantised weights share: all but the weights.
#pragma once

#include "launch/op.h"
#include "linear/linear_tiles.h"

namespace mk {

// Sizes of a product, x and the norm; m and k under the names that the op gives them.
mk_status check_inputs(const Product& a, const char* m, const char* k, int32_t dtype,
                       int32_t max_norm_m);
mk_status check_linear_out(const mk_linear_params& p);
mk_status check_swiglu_out(const mk_linear_params& p);
mk_status check_qkv_sizes(const mk_qkv_rope_append_params& p);  // heads, pages: before the product
mk_status check_qkv_out(const mk_qkv_rope_append_params& p);    // rope, slots and outputs

// The outputs of a kernel that serves all products.
Outputs outputs_of(EpilogueKind kind, const mk_linear_params& p);
Outputs outputs_of(EpilogueKind kind, const mk_qkv_rope_append_params& p);

}  // namespace mk
