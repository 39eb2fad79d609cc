#include "linear/linear_gemm_sm80.cuh"

namespace {
constexpr mk::GemmTile kLarge = mk::gemm_tiles(MK_SM).large;
constexpr mk::GemmTile kMiddle = mk::gemm_tiles(MK_SM).middle;
constexpr mk::GemmTile kSmall = mk::gemm_tiles(MK_SM).small;
constexpr int kLargeThreads = mk::gemm_threads(kLarge);
constexpr int kMiddleThreads = mk::gemm_threads(kMiddle);
constexpr int kSmallThreads = mk::gemm_threads(kSmall);
}  // namespace

#define MK_GEMM(op, key, Dtype, Size, Epilogue)                                      \
    MK_ENTRY(__launch_bounds__(k##Size##Threads, k##Size.blocks_per_sm), op, key)    \
    (const __grid_constant__ mk::LinearArgs<mk::Epilogue<mk::Dtype>::Params> args) { \
        mk::linear_gemm<mk::Dtype, k##Size, mk::Epilogue<mk::Dtype>>(args);          \
    }
#define MK_GEMMS(key, Dtype, Size)                           \
    MK_GEMM(linear, key, Dtype, Size, PlainEpilogue)         \
    MK_GEMM(linear_swiglu, key, Dtype, Size, SwigluEpilogue) \
    MK_GEMM(qkv_rope_append, key, Dtype, Size, QkvEpilogue)

#if MK_SM != 90  // linear_gemm_sm90.cu has more than 64 rows
MK_GEMMS(bf16_m128_n256, Bf16, Large)
MK_GEMMS(bf16_m128_n128, Bf16, Middle)
MK_GEMMS(f16_m128_n256, F16, Large)
MK_GEMMS(f16_m128_n128, F16, Middle)
#endif
MK_GEMMS(bf16_m64_n64, Bf16, Small)
MK_GEMMS(f16_m64_n64, F16, Small)
