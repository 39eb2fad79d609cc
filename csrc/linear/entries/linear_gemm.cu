#include "linear/linear_gemm_sm80.cuh"

namespace {
constexpr mk::GemmTile kLarge = mk::gemm_tiles(MK_SM).large;
constexpr mk::GemmTile kMiddle = mk::gemm_tiles(MK_SM).middle;
constexpr mk::GemmTile kSmall = mk::gemm_tiles(MK_SM).small;
constexpr int kLargeThreads = mk::gemm_threads(kLarge);
constexpr int kMiddleThreads = mk::gemm_threads(kMiddle);
constexpr int kSmallThreads = mk::gemm_threads(kSmall);
}  // namespace

// One entry serves the three products.
#define MK_GEMM(key, Dtype, Size)                                                     \
    MK_ENTRY(__launch_bounds__(k##Size##Threads, k##Size.blocks_per_sm), linear, key) \
    (const __grid_constant__ mk::LinearGemmArgs args) { mk::linear_gemm<mk::Dtype, k##Size>(args); }

MK_GEMM(bf16_m128_n256, Bf16, Large)
MK_GEMM(bf16_m128_n128, Bf16, Middle)
MK_GEMM(bf16_m64_n64, Bf16, Small)
MK_GEMM(f16_m128_n256, F16, Large)
MK_GEMM(f16_m128_n128, F16, Middle)
MK_GEMM(f16_m64_n64, F16, Small)
