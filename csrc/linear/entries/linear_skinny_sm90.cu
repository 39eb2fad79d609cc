#include "linear/linear_skinny_sm90.cuh"

// One entry serves the three products.
#define MK_SKINNY(key, Dtype, kCols)                                                             \
    MK_ENTRY(__launch_bounds__(mk::kSkinnySm90Threads, mk::kSkinnySm90BlocksPerSm), linear, key) \
    (const __grid_constant__ mk::LinearSkinnySm90Args args) {                                    \
        mk::linear_skinny_sm90<mk::Dtype, kCols>(args);                                          \
    }

MK_SKINNY(bf16_m64_n32, Bf16, 32)
MK_SKINNY(bf16_m64_n48, Bf16, 48)
MK_SKINNY(bf16_m64_n96, Bf16, 96)
MK_SKINNY(f16_m64_n32, F16, 32)
MK_SKINNY(f16_m64_n48, F16, 48)
MK_SKINNY(f16_m64_n96, F16, 96)
