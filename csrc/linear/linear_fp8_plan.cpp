// Plans of mk_linear_fp8 and mk_linear_fp8_swiglu: one kernel, whose epilogue is chosen at run
// time.
#include "linear/linear_fp8_tiles.h"
#include "linear/linear_gemm_plan.h"
#include "linear/linear_plan.h"

namespace mk {
namespace {

Product product_of(const mk_linear_fp8_params& p) {
    return {p.x, p.w, nullptr, p.x_stride, p.w_stride, p.m, p.n, p.k, 0, 1};
}

// What mk_linear's epilogues read.
mk_linear_params linear_params(const mk_linear_fp8_params& p) {
    mk_linear_params to{};
    to.residual = p.residual;
    to.out = p.out;
    to.residual_stride = p.residual_stride;
    to.out_stride = p.out_stride;
    to.m = p.m;
    to.n = p.n;
    to.k = p.k;
    to.dtype = p.out_dtype == MK_F16 ? MK_F16 : MK_BF16;  // of the residual
    to.out_dtype = p.out_dtype;
    return to;
}

// Rows that TMA fetches.
mk_status check_operand(const char* name, const void* pointer, int64_t stride, int32_t rows,
                        int32_t k) {
    MK_TRY(check_rows(name, pointer, stride, rows, k, MK_E4M3));
    if (rows == 0) return MK_OK;
    MK_REQUIRE(is_16_byte(pointer, MK_E4M3, {}), MK_ERR_ALIGNMENT,
               "%s = %p is not aligned to 16 bytes", name, pointer);
    MK_REQUIRE(rows == 1 || stride % 16 == 0, MK_ERR_STRIDE,
               "%s_stride must be a multiple of 16, got %lld", name,
               static_cast<long long>(stride));
    MK_REQUIRE(stride < int64_t{1} << 40, MK_ERR_STRIDE, "%s_stride must be below 2^40, got %lld",
               name, static_cast<long long>(stride));
    return MK_OK;
}

mk_status check_scales(const char* name, const float* scales, int64_t stride, int64_t block_stride,
                       bool is_read) {
    if (!is_read) return MK_OK;
    MK_TRY(check_pointer(name, scales, MK_F32));
    MK_REQUIRE(stride >= 0 && block_stride >= 0, MK_ERR_STRIDE,
               "%s_stride and %s_block_stride must not be negative, got %lld and %lld", name, name,
               static_cast<long long>(stride), static_cast<long long>(block_stride));
    return MK_OK;
}

template <bool kIsSwiglu>
struct LinearFp8 {
    using Params = mk_linear_fp8_params;
    static constexpr const char* kName = kIsSwiglu ? "linear_fp8_swiglu" : "linear_fp8";

    static mk_status check(const Params& p) {
        MK_TRY(check_size("m", p.m, 0, 1 << 30));
        MK_TRY(check_size("n", p.n, 1, 1 << 24));
        MK_TRY(check_size("k", p.k, 1, 1 << 20));
        MK_TRY(check_operand("x", p.x, p.x_stride, p.m, p.k));
        MK_TRY(check_operand("w", p.w, p.w_stride, p.m ? p.n : 0, p.k));
        MK_TRY(check_scales("x_scale", p.x_scale, p.x_scale_stride, p.x_scale_block_stride, p.m));
        MK_TRY(check_scales("w_scale", p.w_scale, p.w_scale_stride, p.w_scale_block_stride, p.m));
        MK_REQUIRE(
            p.out_dtype == MK_BF16 || p.out_dtype == MK_F16 ||
                (p.out_dtype == MK_F32 && !kIsSwiglu && !p.residual),
            MK_ERR_DTYPE,
            "out_dtype must be MK_BF16 (1), MK_F16 (2) or, of mk_linear_fp8 without residual, "
            "MK_F32 (3), got %d",
            p.out_dtype);
        const mk_linear_params to = linear_params(p);
        return kIsSwiglu ? check_swiglu_out(to) : check_linear_out(to);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        if (p.m == 0) {
            mk_plan nothing = make_plan("linear_fp8", device, "e4m3");
            nothing.grid[0] = 0;
            return nothing;
        }
        return plan_gemm_sm90("linear_fp8", MK_E4M3, product_of(p), device);
    }

    static mk_status args(const Params& p, const mk_device& device, LinearFp8Args* args) {
        const Product product = product_of(p);
        args->product = product;
        args->to =
            outputs_of(kIsSwiglu ? EpilogueKind::kSwiglu : EpilogueKind::kPlain, linear_params(p));
        args->x_scale = p.x_scale;
        args->w_scale = p.w_scale;
        args->x_scale_stride = p.x_scale_stride;
        args->w_scale_stride = p.w_scale_stride;
        args->x_scale_block_stride = p.x_scale_block_stride;
        args->w_scale_block_stride = p.w_scale_block_stride;
        return gemm_sm90_args(product, MK_E4M3, device, args);
    }

    static std::string shape(const Params& p) {
        return std::string(kName) + " e4m3 m " + std::to_string(p.m) + " n " + std::to_string(p.n) +
               " k " + std::to_string(p.k) + " out " + dtype_name(p.out_dtype) +
               (p.residual ? " residual" : "");
    }
};

template <class Op>
mk_status run_fp8(const mk_linear_fp8_params* params, void* stream) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(Op::check(*params));
    const Device* device = nullptr;
    MK_TRY(current_device(&device));
    MK_TRY(check_sm90a(Op::kName, device->info));
    if (params->m == 0) return MK_OK;
    LinearFp8Args args{};
    MK_TRY(Op::args(*params, device->info, &args));
    return launch(
        Op::plan(*params, device->info), *device, &args, stream,
        [](const void* p) { return Op::shape(*static_cast<const mk_linear_fp8_params*>(p)); },
        params);
}

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_linear_fp8(const mk_linear_fp8_params* params, void* stream) {
    return mk::run_fp8<mk::LinearFp8<false>>(params, stream);
}

mk_status mk_linear_fp8_plan(const mk_linear_fp8_params* params, const mk_device* device,
                             mk_plan* plan) {
    return mk::plan_sm90a<mk::LinearFp8<false>>(params, device, plan);
}

mk_status mk_linear_fp8_swiglu(const mk_linear_fp8_params* params, void* stream) {
    return mk::run_fp8<mk::LinearFp8<true>>(params, stream);
}

mk_status mk_linear_fp8_swiglu_plan(const mk_linear_fp8_params* params, const mk_device* device,
                                    mk_plan* plan) {
    return mk::plan_sm90a<mk::LinearFp8<true>>(params, device, plan);
}

}  // extern "C"
