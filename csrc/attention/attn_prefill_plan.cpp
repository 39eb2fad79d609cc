#include "launch/op.h"

extern "C" {

mk_status mk_attention(const mk_attention_params*, void*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_attention is being written");
}

mk_status mk_attention_plan(const mk_attention_params*, const mk_device*, mk_plan*) {
    return mk::fail(MK_ERR_UNSUPPORTED, "mk_attention is being written");
}

}  // extern "C"
