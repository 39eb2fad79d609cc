#include "linear/linear_skinny_sm90.cuh"

#define MK_SKINNY(op, key, Dtype, kCols, Epilogue, Params)                                   \
    MK_ENTRY(__launch_bounds__(mk::kSkinnySm90Threads, mk::kSkinnySm90BlocksPerSm), op, key) \
    (const __grid_constant__ mk::LinearSkinnySm90Args<Params> args) {                        \
        mk::linear_skinny_sm90<mk::Dtype, kCols, mk::Epilogue<mk::Dtype>>(args);             \
    }
#define MK_SKINNY_OF_WIDTH(cols)                                                             \
    MK_SKINNY(linear, bf16_m64_n##cols, Bf16, cols, PlainEpilogue, mk_linear_params)         \
    MK_SKINNY(linear, f16_m64_n##cols, F16, cols, PlainEpilogue, mk_linear_params)           \
    MK_SKINNY(linear_swiglu, bf16_m64_n##cols, Bf16, cols, SwigluEpilogue, mk_linear_params) \
    MK_SKINNY(linear_swiglu, f16_m64_n##cols, F16, cols, SwigluEpilogue, mk_linear_params)   \
    MK_SKINNY(qkv_rope_append, bf16_m64_n##cols, Bf16, cols, QkvEpilogue,                    \
              mk_qkv_rope_append_params)                                                     \
    MK_SKINNY(qkv_rope_append, f16_m64_n##cols, F16, cols, QkvEpilogue, mk_qkv_rope_append_params)

MK_SKINNY_OF_WIDTH(32)
MK_SKINNY_OF_WIDTH(48)
MK_SKINNY_OF_WIDTH(96)
