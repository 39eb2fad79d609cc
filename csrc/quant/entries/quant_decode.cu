#include "quant/quant_decode_sm80.cuh"

#define MK_QUANT_DECODE(op, key, Dtype, token_tiles, matrices, Epilogue)                        \
    MK_ENTRY(__launch_bounds__(mk::kQuantThreads, 1), op, key)                                  \
    (const __grid_constant__ mk::QuantDecodeArgs<mk::Epilogue<mk::Dtype>::Params> args) {       \
        mk::quant_decode_sm80<mk::Dtype, token_tiles, matrices, mk::Epilogue<mk::Dtype>>(args); \
    }
#define MK_QUANT_DECODES(key, Dtype, token_tiles)                                    \
    MK_QUANT_DECODE(linear_quant, key, Dtype, token_tiles, 1, PlainEpilogue)         \
    MK_QUANT_DECODE(linear_quant_swiglu, key, Dtype, token_tiles, 1, SwigluEpilogue) \
    MK_QUANT_DECODE(qkv_rope_append_quant, key, Dtype, token_tiles, 3, QkvEpilogue)

MK_QUANT_DECODES(bf16_m8, Bf16, 1)
MK_QUANT_DECODES(f16_m8, F16, 1)
MK_QUANT_DECODES(bf16_m16, Bf16, 2)
MK_QUANT_DECODES(f16_m16, F16, 2)
