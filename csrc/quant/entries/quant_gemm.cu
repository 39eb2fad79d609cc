#include "quant/quant_gemm_sm80.cuh"

namespace {
[[maybe_unused]] constexpr mk::QuantGemmTile kLarge = mk::quant_gemm_tiles(MK_SM).large;
[[maybe_unused]] constexpr mk::QuantGemmTile kMiddle = mk::quant_gemm_tiles(MK_SM).middle;
constexpr mk::QuantGemmTile kSmall = mk::quant_gemm_tiles(MK_SM).small;
[[maybe_unused]] constexpr int kLargeThreads = mk::quant_gemm_threads(kLarge);
#if MK_SM == 80
constexpr int kMiddleThreads = mk::quant_gemm_threads(kMiddle);
#endif
constexpr int kSmallThreads = mk::quant_gemm_threads(kSmall);
}  // namespace

#define MK_QUANT_GEMM(key, Size)                                                          \
    MK_ENTRY(__launch_bounds__(k##Size##Threads, k##Size.blocks_per_sm), quant_gemm, key) \
    (const __grid_constant__ mk::QuantGemmArgs args) { mk::quant_gemm<k##Size>(args); }

#if MK_SM == 89
MK_QUANT_GEMM(b16_rows64_m128, Large)
#elif MK_SM != 90  // which has quant_gemm_sm90.cu for more rows
MK_QUANT_GEMM(b16_rows128_m128, Large)
#endif
#if MK_SM == 80
MK_QUANT_GEMM(b16_rows128_m64, Middle)
#endif
MK_QUANT_GEMM(b16_rows32_m64, Small)
