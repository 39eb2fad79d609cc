#include "attention/attn_prefill_fp8_sm90.cuh"

// bf16, f16: of the output
#define MK_ATTENTION_FP8(key, Dtype)                                              \
    MK_ENTRY(__launch_bounds__(mk::attn_prefill_threads(mk::kAttnPrefillFp8Tile), \
                               mk::kAttnPrefillFp8Tile.blocks_per_sm),            \
             attention_fp8, key)                                                  \
    (const __grid_constant__ mk::AttnPrefillFp8Args args) {                       \
        mk::attn_prefill_fp8_sm90<mk::Dtype>(args);                               \
    }

MK_ATTENTION_FP8(bf16_hd128, Bf16)
MK_ATTENTION_FP8(f16_hd128, F16)
