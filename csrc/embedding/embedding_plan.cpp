#include "common/rows_plan.h"

namespace mk {
namespace {

struct Embedding {
    using Params = mk_embedding_params;

    static mk_status check(const Params& p) {
        MK_TRY(check_activation_dtype(p.dtype));
        MK_TRY(check_size("tokens", p.tokens, 0, INT32_MAX));
        MK_TRY(check_size("hidden", p.hidden, 1, kRowMaxElements));
        MK_TRY(check_size("vocab", p.vocab, 1, INT32_MAX));
        MK_TRY(check_indices("ids", p.ids, p.tokens, p.ids_dtype));
        if (p.tokens > 0) {
            MK_TRY(check_rows("table", p.table, p.table_stride, p.vocab, p.hidden, p.dtype));
        }
        return check_rows("out", p.out, p.out_stride, p.tokens, p.hidden, p.dtype);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        const bool aligned = p.hidden % 8 == 0 && is_16_byte(p.table, p.dtype, {p.table_stride}) &&
                             is_16_byte(p.out, p.dtype, {p.out_stride});
        mk_plan plan = make_plan("embedding", device, aligned ? "b16" : "b16_unaligned");
        set_row_grid(p.tokens, p.hidden, device, &plan);
        return plan;
    }

    static const Params& args(const Params& p) { return p; }

    static std::string shape(const Params& p) {
        return std::string("embedding ") + dtype_name(p.dtype) + " tokens " +
               std::to_string(p.tokens) + " hidden " + std::to_string(p.hidden);
    }
};

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_embedding(const mk_embedding_params* params, void* stream) {
    return mk::run<mk::Embedding>(params, stream);
}

mk_status mk_embedding_plan(const mk_embedding_params* params, const mk_device* device,
                            mk_plan* plan) {
    return mk::plan<mk::Embedding>(params, device, plan);
}

}  // extern "C"
