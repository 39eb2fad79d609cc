#include "launch/op.h"

extern "C" {

mk_status mk_attention_decode(const mk_attention_decode_params*, void*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_attention_decode is being written");
}

mk_status mk_attention_decode_plan(const mk_attention_decode_params*, const mk_device*, mk_plan*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_attention_decode is being written");
}

mk_status mk_attention_decode_workspace_bytes(const mk_attention_decode_params*, int64_t*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_attention_decode is being written");
}

}  // extern "C"
