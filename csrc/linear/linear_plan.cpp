#include "launch/op.h"

extern "C" {

mk_status mk_linear(const mk_linear_params*, void*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_linear is being written");
}

mk_status mk_linear_plan(const mk_linear_params*, const mk_device*, mk_plan*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_linear is being written");
}

mk_status mk_linear_swiglu(const mk_linear_params*, void*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_linear_swiglu is being written");
}

mk_status mk_linear_swiglu_plan(const mk_linear_params*, const mk_device*, mk_plan*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_linear_swiglu is being written");
}

mk_status mk_qkv_rope_append(const mk_qkv_rope_append_params*, void*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_qkv_rope_append is being written");
}

mk_status mk_qkv_rope_append_plan(const mk_qkv_rope_append_params*, const mk_device*, mk_plan*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_qkv_rope_append is being written");
}

}  // extern "C"
