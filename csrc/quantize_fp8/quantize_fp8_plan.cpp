#include "common/rows_plan.h"
#include "minitron_kernels_fp8.h"

namespace mk {
namespace {

struct QuantizeFp8 {
    using Params = mk_quantize_fp8_params;
    static constexpr const char* kName = "quantize_fp8";

    static mk_status check(const Params& p) {
        MK_TRY(check_activation_dtype(p.dtype));
        MK_TRY(check_size("rows", p.rows, 0, 1 << 30));
        MK_TRY(check_size("k", p.k, 1, kRowMaxElements));
        MK_REQUIRE(p.block == 0 || p.block == 128, MK_ERR_VALUE, "block must be 0 or 128, got %d",
                   p.block);
        MK_TRY(check_rows("x", p.x, p.x_stride, p.rows, p.k, p.dtype));
        MK_TRY(check_rows("out", p.out, p.out_stride, p.rows, p.k, MK_E4M3));
        if (p.rows == 0) return MK_OK;
        MK_TRY(check_pointer("scales", p.scales, MK_F32));
        if (p.block == 0) return MK_OK;
        MK_TRY(check_stride("scales", p.scales_stride, p.rows, 1));
        return check_stride("scales_block", p.scales_block_stride, ceil_div(p.k, p.block), 1);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        mk_plan plan = make_plan("quantize_fp8", device, "b16");
        set_row_grid(p.rows, p.k, device, &plan);
        return plan;
    }

    static const Params& args(const Params& p) { return p; }

    static std::string shape(const Params& p) {
        return std::string("quantize_fp8 ") + dtype_name(p.dtype) + " rows " +
               std::to_string(p.rows) + " k " + std::to_string(p.k) + " block " +
               std::to_string(p.block);
    }
};

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_quantize_fp8(const mk_quantize_fp8_params* params, void* stream) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(mk::QuantizeFp8::check(*params));
    const mk::Device* device = nullptr;
    MK_TRY(mk::current_device(&device));
    MK_TRY(mk::check_sm90a(mk::QuantizeFp8::kName, device->info));
    return mk::run<mk::QuantizeFp8>(params, stream);
}

mk_status mk_quantize_fp8_plan(const mk_quantize_fp8_params* params, const mk_device* device,
                               mk_plan* plan) {
    return mk::plan_sm90a<mk::QuantizeFp8>(params, device, plan);
}

}  // extern "C"
