#include "sampling/argmax.cuh"
#include "sampling/sample.cuh"

#define MK_SAMPLING(key, Dtype, kAligned)                                                          \
    MK_ENTRY(__launch_bounds__(mk::kSamplingThreads), argmax, key)                                 \
    (const __grid_constant__ mk_argmax_params params) { mk::argmax<mk::Dtype, kAligned>(params); } \
    MK_ENTRY(__launch_bounds__(mk::kSamplingThreads), sample, key)                                 \
    (const __grid_constant__ mk_sample_params params) { mk::sample<mk::Dtype, kAligned>(params); }

MK_SAMPLING(bf16, Bf16, true)
MK_SAMPLING(bf16_unaligned, Bf16, false)
MK_SAMPLING(f16, F16, true)
MK_SAMPLING(f16_unaligned, F16, false)
MK_SAMPLING(f32, F32, true)
MK_SAMPLING(f32_unaligned, F32, false)
