#include "linear/linear_gemm_sm90.cuh"

// One entry serves the three products.
#define MK_GEMM(key, Dtype, kTile)                                    \
    MK_ENTRY(__launch_bounds__(mk::kGemmSm90Threads, 1), linear, key) \
    (const __grid_constant__ mk::LinearGemmSm90Args args) {           \
        mk::linear_gemm_sm90<mk::Dtype, kTile>(args);                 \
    }

MK_GEMM(bf16_m128_n256, Bf16, mk::kGemmTilesSm90[0])
MK_GEMM(bf16_m128_n192, Bf16, mk::kGemmTilesSm90[1])
MK_GEMM(bf16_m128_n128, Bf16, mk::kGemmTilesSm90[2])
MK_GEMM(bf16_m128_n64, Bf16, mk::kGemmTilesSm90[3])
MK_GEMM(f16_m128_n256, F16, mk::kGemmTilesSm90[0])
MK_GEMM(f16_m128_n192, F16, mk::kGemmTilesSm90[1])
MK_GEMM(f16_m128_n128, F16, mk::kGemmTilesSm90[2])
MK_GEMM(f16_m128_n64, F16, mk::kGemmTilesSm90[3])
