#include "quant/quant_gemm_sm90.cuh"

#define MK_QUANT_GEMM(key, kTile)                                              \
    MK_ENTRY(__launch_bounds__(mk::kQuantGemmThreadsSm90, 1), quant_gemm, key) \
    (const __grid_constant__ mk::QuantGemmArgs args) { mk::quant_gemm_sm90<kTile>(args); }

MK_QUANT_GEMM(b16_rows128_m128, mk::kQuantGemmTilesSm90[0])
MK_QUANT_GEMM(b16_rows128_m64, mk::kQuantGemmTilesSm90[1])
