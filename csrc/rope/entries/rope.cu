#include "rope/rope.cuh"

#define MK_ROPE(key, Dtype, kAligned)                                    \
    MK_ENTRY(__launch_bounds__(mk::kRopeMaxThreads), apply_rope, key)    \
    (const __grid_constant__ mk::RopeArgs<mk_apply_rope_params> args) {  \
        mk::apply_rope<mk::Dtype, kAligned>(args);                       \
    }                                                                    \
    MK_ENTRY(__launch_bounds__(mk::kRopeMaxThreads), rope_append, key)   \
    (const __grid_constant__ mk::RopeArgs<mk_rope_append_params> args) { \
        mk::rope_append<mk::Dtype, kAligned>(args);                      \
    }

MK_ROPE(bf16, Bf16, true)
MK_ROPE(bf16_unaligned, Bf16, false)
MK_ROPE(f16, F16, true)
MK_ROPE(f16_unaligned, F16, false)
