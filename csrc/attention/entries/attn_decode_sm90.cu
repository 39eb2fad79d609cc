#include "attention/attn_decode_sm90.cuh"

#define MK_ATTENTION_DECODE(key, Dtype, kHeadDim, kRows)                               \
    MK_ENTRY(__launch_bounds__(mk::kAttnDecodeThreads,                                 \
                               mk::AttnDecodeSm90Tile<kHeadDim, kRows>::kBlocksPerSm), \
             attention_decode, key)                                                    \
    (const __grid_constant__ mk::AttnDecodeSm90Args args) {                            \
        mk::attn_decode_sm90<mk::Dtype, kHeadDim, kRows>(args);                        \
    }

MK_ATTENTION_DECODE(bf16_hd64_rows8, Bf16, 64, mk::kAttnDecodeFewRows)
MK_ATTENTION_DECODE(bf16_hd64_rows32, Bf16, 64, mk::kAttnDecodeManyRows)
MK_ATTENTION_DECODE(bf16_hd128_rows8, Bf16, 128, mk::kAttnDecodeFewRows)
MK_ATTENTION_DECODE(bf16_hd128_rows32, Bf16, 128, mk::kAttnDecodeManyRows)
MK_ATTENTION_DECODE(f16_hd64_rows8, F16, 64, mk::kAttnDecodeFewRows)
MK_ATTENTION_DECODE(f16_hd64_rows32, F16, 64, mk::kAttnDecodeManyRows)
MK_ATTENTION_DECODE(f16_hd128_rows8, F16, 128, mk::kAttnDecodeFewRows)
MK_ATTENTION_DECODE(f16_hd128_rows32, F16, 128, mk::kAttnDecodeManyRows)
