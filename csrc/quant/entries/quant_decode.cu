#include "quant/quant_decode_sm80.cuh"

#define MK_QUANT_DECODE(key, token_tiles)                                \
    MK_ENTRY(__launch_bounds__(mk::kQuantThreads, 1), quant_decode, key) \
    (const __grid_constant__ mk::QuantDecodeArgs args) { mk::quant_decode_sm80<token_tiles>(args); }

MK_QUANT_DECODE(b16_m8, 1)
MK_QUANT_DECODE(b16_m16, 2)
