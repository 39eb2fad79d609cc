#include "attention/attn_prefill_sm90.cuh"

#define MK_ATTENTION(key, Dtype, kHeadDim)                                                       \
    MK_ENTRY(__launch_bounds__(mk::attn_prefill_threads(mk::attn_prefill_tile(MK_SM, kHeadDim)), \
                               mk::attn_prefill_tile(MK_SM, kHeadDim).blocks_per_sm),            \
             attention, key)                                                                     \
    (const __grid_constant__ mk::AttnPrefillSm90Args args) {                                     \
        mk::attn_prefill_sm90<mk::Dtype, kHeadDim>(args);                                        \
    }

MK_ATTENTION(bf16_hd64, Bf16, 64)
MK_ATTENTION(bf16_hd128, Bf16, 128)
MK_ATTENTION(f16_hd64, F16, 64)
MK_ATTENTION(f16_hd128, F16, 128)
