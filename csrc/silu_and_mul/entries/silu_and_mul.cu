#include "silu_and_mul/silu_and_mul.cuh"

#define MK_SILU_AND_MUL(key, Dtype, kAligned)                          \
    MK_ENTRY(__launch_bounds__(mk::kRowMaxThreads), silu_and_mul, key) \
    (const __grid_constant__ mk_silu_and_mul_params params) {          \
        mk::silu_and_mul<mk::Dtype, kAligned>(params);                 \
    }

MK_SILU_AND_MUL(bf16, Bf16, true)
MK_SILU_AND_MUL(bf16_unaligned, Bf16, false)
MK_SILU_AND_MUL(f16, F16, true)
MK_SILU_AND_MUL(f16_unaligned, F16, false)
