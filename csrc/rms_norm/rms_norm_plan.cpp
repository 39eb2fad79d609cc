#include <algorithm>
#include <cmath>

#include "launch/op.h"
#include "rms_norm/rms_norm_tiles.h"

namespace mk {
namespace {

template <bool kHasResidual>
struct RmsNorm {
    using Params = mk_rms_norm_params;

    static mk_status check(const Params& p) {
        MK_TRY(check_activation_dtype(p.dtype));
        MK_TRY(check_size("rows", p.rows, 0, 1 << 30));
        MK_TRY(check_size("hidden", p.hidden, 1, kRmsNormMaxHidden));
        MK_REQUIRE(p.eps >= 0 && std::isfinite(p.eps), MK_ERR_VALUE,
                   "eps must be finite and not negative, got %g", static_cast<double>(p.eps));
        MK_TRY(check_rows("x", p.x, p.x_stride, p.rows, p.hidden, p.dtype));
        MK_TRY(check_rows("out", p.out, p.out_stride, p.rows, p.hidden, p.dtype));
        MK_TRY(check_rows("weight", p.weight, p.hidden, p.rows, p.hidden, p.dtype));
        if (kHasResidual) {
            return check_rows("residual", p.residual, p.residual_stride, p.rows, p.hidden, p.dtype);
        }
        MK_REQUIRE(!p.residual, MK_ERR_VALUE, "residual must be NULL: use mk_add_rms_norm");
        return MK_OK;
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        const bool aligned = p.hidden % 8 == 0 && is_16_byte(p.x, p.dtype, {p.x_stride}) &&
                             is_16_byte(p.out, p.dtype, {p.out_stride}) &&
                             is_16_byte(p.weight, p.dtype, {}) &&
                             is_16_byte(p.residual, p.dtype, {p.residual_stride});
        mk_plan plan = make_plan(kHasResidual ? "add_rms_norm" : "rms_norm", device,
                                 dtype_key(p.dtype, aligned));
        const int groups = ceil_div(p.hidden, 8 * 32);
        // Few rows: as many threads as the row has vectors, for the shortest chain. Many rows: as
        // few as can hold it, so that more rows are in flight and warps meet at fewer barriers.
        const bool few_rows = p.rows <= 2 * device.num_sms;
        const int warps = few_rows ? std::min(groups, kRmsNormMaxThreads / 32)
                                   : ceil_div(groups, kRmsNormVecsPerThread);
        const int rows_per_block = warps > 1 ? 1 : std::clamp(p.rows / device.num_sms, 1, 4);
        const int threads = 32 * warps * rows_per_block;
        // Persistent blocks, all with the same number of rows (the last round may be short).
        const int threads_per_sm = kHasResidual ? kAddRmsNormThreadsPerSm : kRmsNormThreadsPerSm;
        const int resident = device.num_sms * std::max(threads_per_sm / threads, 1);
        const int blocks = ceil_div<int64_t>(p.rows, rows_per_block);
        plan.grid[0] = blocks ? ceil_div(blocks, ceil_div(blocks, resident)) : 0;
        plan.block[0] = 32 * warps;
        plan.block[1] = rows_per_block;
        return plan;
    }

    static const Params& args(const Params& p) { return p; }

    static std::string shape(const Params& p) {
        return std::string(kHasResidual ? "add_rms_norm " : "rms_norm ") + dtype_name(p.dtype) +
               " rows " + std::to_string(p.rows) + " hidden " + std::to_string(p.hidden);
    }
};

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_rms_norm(const mk_rms_norm_params* params, void* stream) {
    return mk::run<mk::RmsNorm<false>>(params, stream);
}

mk_status mk_rms_norm_plan(const mk_rms_norm_params* params, const mk_device* device,
                           mk_plan* plan) {
    return mk::plan<mk::RmsNorm<false>>(params, device, plan);
}

mk_status mk_add_rms_norm(const mk_rms_norm_params* params, void* stream) {
    return mk::run<mk::RmsNorm<true>>(params, stream);
}

mk_status mk_add_rms_norm_plan(const mk_rms_norm_params* params, const mk_device* device,
                               mk_plan* plan) {
    return mk::plan<mk::RmsNorm<true>>(params, device, plan);
}

}  // extern "C"
