#include "linear/linear_gemm_sm90.cuh"

namespace {
constexpr mk::GemmTileSm90 kLarge = mk::kGemmTilesSm90[0];
constexpr mk::GemmTileSm90 kWide = mk::kGemmTilesSm90[1];
constexpr mk::GemmTileSm90 kMiddle = mk::kGemmTilesSm90[2];
constexpr mk::GemmTileSm90 kSmall = mk::kGemmTilesSm90[3];
}  // namespace

#define MK_GEMM(op, key, Dtype, kTile, Epilogue)                                             \
    MK_ENTRY(__launch_bounds__(mk::kGemmSm90Threads, 1), op, key)                            \
    (const __grid_constant__ mk::LinearGemmSm90Args<mk::Epilogue<mk::Dtype>::Params> args) { \
        mk::linear_gemm_sm90<mk::Dtype, kTile, mk::Epilogue<mk::Dtype>>(args);               \
    }
#define MK_GEMMS(key, Dtype, kTile)                           \
    MK_GEMM(linear, key, Dtype, kTile, PlainEpilogue)         \
    MK_GEMM(linear_swiglu, key, Dtype, kTile, SwigluEpilogue) \
    MK_GEMM(qkv_rope_append, key, Dtype, kTile, QkvEpilogue)

MK_GEMMS(bf16_m128_n256, Bf16, kLarge)
MK_GEMMS(bf16_m128_n192, Bf16, kWide)
MK_GEMMS(bf16_m128_n128, Bf16, kMiddle)
MK_GEMMS(bf16_m128_n64, Bf16, kSmall)
MK_GEMMS(f16_m128_n256, F16, kLarge)
MK_GEMMS(f16_m128_n192, F16, kWide)
MK_GEMMS(f16_m128_n128, F16, kMiddle)
MK_GEMMS(f16_m128_n64, F16, kSmall)
