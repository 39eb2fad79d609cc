// Plan and launch of the products with quantised weights and up to MK_QUANT_MAX_DECODE_M rows of x.
#pragma once

#include "launch/op.h"
#include "linear/linear_tiles.h"

namespace mk {

// Of one matrix, or of the three of Q, K and V.
mk_plan plan_quant_decode(const char* op, int32_t dtype, const Product& a, const mk_quant_matrix* w,
                          int count, const mk_device& device);

// p: for the epilogue. shape, params: as launch() takes them.
mk_status run_quant_decode(const mk_plan& plan, const Product& a, const mk_quant_matrix* w,
                           int count, const mk_linear_params& p, const Device& device, void* stream,
                           std::string (*shape)(const void*), const void* params);
mk_status run_quant_decode(const mk_plan& plan, const Product& a, const mk_quant_matrix* w,
                           int count, const mk_qkv_rope_append_params& p, const Device& device,
                           void* stream, std::string (*shape)(const void*), const void* params);

}  // namespace mk
