#include "quant/quant_prepare.cuh"

#define MK_QUANT_PREPARE(key, Dtype)                                         \
    MK_ENTRY(__launch_bounds__(32 * mk::kPrepareRows), quant_prepare_x, key) \
    (const __grid_constant__ mk::QuantPrepareArgs args) { mk::quant_prepare_x<mk::Dtype>(args); }

MK_QUANT_PREPARE(bf16, Bf16)
MK_QUANT_PREPARE(f16, F16)
