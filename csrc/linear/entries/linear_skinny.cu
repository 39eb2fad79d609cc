#include "linear/linear_skinny_sm80.cuh"

#define MK_SKINNY(op, key, Dtype, Epilogue, Params)                                        \
    MK_ENTRY(__launch_bounds__(32 * mk::kSkinnyMaxWarps, mk::kSkinnyBlocksPerSm), op, key) \
    (const __grid_constant__ mk::LinearArgs<Params> args) {                                \
        mk::linear_skinny_sm80<mk::Dtype, mk::Epilogue<mk::Dtype>>(args);                  \
    }

MK_SKINNY(linear, bf16_m16, Bf16, PlainEpilogue, mk_linear_params)
MK_SKINNY(linear, f16_m16, F16, PlainEpilogue, mk_linear_params)
MK_SKINNY(linear_swiglu, bf16_m16, Bf16, SwigluEpilogue, mk_linear_params)
MK_SKINNY(linear_swiglu, f16_m16, F16, SwigluEpilogue, mk_linear_params)
MK_SKINNY(qkv_rope_append, bf16_m16, Bf16, QkvEpilogue, mk_qkv_rope_append_params)
MK_SKINNY(qkv_rope_append, f16_m16, F16, QkvEpilogue, mk_qkv_rope_append_params)
