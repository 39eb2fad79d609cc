#include "attention/attn_decode_sm80.cuh"
#include "attention/entries/attn_decode_entries.h"

#define MK_ATTENTION_DECODE(key, Dtype, kHeadDim, kRows)                           \
    MK_ENTRY(__launch_bounds__(mk::kAttnDecodeThreads,                             \
                               mk::AttnDecodeTile<kHeadDim, kRows>::kBlocksPerSm), \
             attention_decode, key)                                                \
    (const __grid_constant__ mk::AttnDecodeArgs args) {                            \
        mk::attn_decode_sm80<mk::Dtype, kHeadDim, kRows>(args);                    \
    }

MK_ATTENTION_DECODES(MK_ATTENTION_DECODE)
