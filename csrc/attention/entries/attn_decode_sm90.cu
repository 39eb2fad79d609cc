#include "attention/attn_decode_sm90.cuh"
#include "attention/entries/attn_decode_entries.h"

#define MK_ATTENTION_DECODE(key, Dtype, kHeadDim, kRows)                               \
    MK_ENTRY(__launch_bounds__(mk::kAttnDecodeThreads,                                 \
                               mk::AttnDecodeSm90Tile<kHeadDim, kRows>::kBlocksPerSm), \
             attention_decode, key)                                                    \
    (const __grid_constant__ mk::AttnDecodeSm90Args args) {                            \
        mk::attn_decode_sm90<mk::Dtype, kHeadDim, kRows>(args);                        \
    }

MK_ATTENTION_DECODES(MK_ATTENTION_DECODE)
