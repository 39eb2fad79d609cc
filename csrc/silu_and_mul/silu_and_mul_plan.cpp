#include "common/rows_plan.h"

namespace mk {
namespace {

struct SiluAndMul {
    using Params = mk_silu_and_mul_params;

    static mk_status check(const Params& p) {
        MK_TRY(check_activation_dtype(p.dtype));
        MK_TRY(check_size("rows", p.rows, 0, INT32_MAX));
        MK_TRY(check_size("size", p.size, 1, kRowMaxElements));
        MK_TRY(check_rows("gate_up", p.gate_up, p.gate_up_stride, p.rows, 2 * p.size, p.dtype));
        return check_rows("out", p.out, p.out_stride, p.rows, p.size, p.dtype);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        const bool aligned = p.size % 8 == 0 &&
                             is_16_byte(p.gate_up, p.dtype, {p.gate_up_stride}) &&
                             is_16_byte(p.out, p.dtype, {p.out_stride});
        mk_plan plan = make_plan("silu_and_mul", device, dtype_key(p.dtype, aligned));
        set_row_grid(p.rows, p.size, device, &plan);
        return plan;
    }

    static const Params& args(const Params& p) { return p; }

    static std::string shape(const Params& p) {
        return std::string("silu_and_mul ") + dtype_name(p.dtype) + " rows " +
               std::to_string(p.rows) + " size " + std::to_string(p.size);
    }
};

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_silu_and_mul(const mk_silu_and_mul_params* params, void* stream) {
    return mk::run<mk::SiluAndMul>(params, stream);
}

mk_status mk_silu_and_mul_plan(const mk_silu_and_mul_params* params, const mk_device* device,
                               mk_plan* plan) {
    return mk::plan<mk::SiluAndMul>(params, device, plan);
}

}  // extern "C"
