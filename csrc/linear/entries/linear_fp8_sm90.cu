#include "linear/linear_fp8_sm90.cuh"

// One entry serves both products and all dtypes of the output.
#define MK_LINEAR_FP8(key, kTile)                                         \
    MK_ENTRY(__launch_bounds__(mk::kGemmSm90Threads, 1), linear_fp8, key) \
    (const __grid_constant__ mk::LinearFp8Args args) { mk::linear_fp8_sm90<kTile>(args); }

MK_LINEAR_FP8(e4m3_m128_n192, mk::kFp8Tiles[0])
MK_LINEAR_FP8(e4m3_m128_n128, mk::kFp8Tiles[1])
MK_LINEAR_FP8(e4m3_m128_n64, mk::kFp8Tiles[2])
