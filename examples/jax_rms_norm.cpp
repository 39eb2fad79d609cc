// RMSNorm as a custom call of XLA: the C ABI behind handlers of XLA's FFI, for CPU and CUDA arrays.
// jax_ffi.py compiles this file and calls it from JAX.
#include <cstdint>
#include <string>

#include "minitron_kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

ffi::ErrorOr<mk_dtype> dtype_of(ffi::DataType type) {
    switch (type) {
        case ffi::BF16:
            return MK_BF16;
        case ffi::F16:
            return MK_F16;
        case ffi::F32:
            return MK_F32;
        default:
            return ffi::Unexpected(ffi::Error::InvalidArgument("x: bfloat16, float16 or float32"));
    }
}

// x [..., H], weight [H] and out as x, as the struct that both entry points take.
ffi::ErrorOr<mk_rms_norm_params> params_of(float eps, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                                           ffi::AnyBuffer out) {
    const auto shape = x.dimensions();
    if (shape.size() == 0) return ffi::Unexpected(ffi::Error::InvalidArgument("x: a scalar"));
    const std::int64_t hidden = shape.back();
    if (weight.dimensions().size() != 1 || weight.dimensions()[0] != hidden ||
        weight.element_type() != x.element_type()) {
        return ffi::Unexpected(
            ffi::Error::InvalidArgument("weight: must be [H], of the dtype of x [..., H]"));
    }
    const auto dtype = dtype_of(x.element_type());
    if (dtype.has_error()) return ffi::Unexpected(dtype.error());
    mk_rms_norm_params params{};
    params.x = x.untyped_data();
    params.weight = weight.untyped_data();
    params.out = out.untyped_data();
    params.x_stride = params.out_stride = hidden;
    params.rows = hidden == 0 ? 0 : static_cast<std::int32_t>(x.element_count() / hidden);
    params.hidden = static_cast<std::int32_t>(hidden);
    params.eps = eps;
    params.dtype = dtype.value();
    return params;
}

ffi::Error told(mk_status status) {
    if (status == MK_OK) return ffi::Error::Success();
    return ffi::Error::InvalidArgument(std::string(mk_status_name(status)) + ": " +
                                       mk_last_error());
}

ffi::Error rms_norm_cpu(float eps, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                        ffi::Result<ffi::AnyBuffer> out) {
    const auto params = params_of(eps, x, weight, *out);
    if (params.has_error()) return params.error();
    const mk_cpu_options options{/*num_threads=*/1, /*isa=*/0};
    return told(mk_cpu_rms_norm(&params.value(), &options));
}

ffi::Error rms_norm_cuda(void* stream, float eps, ffi::AnyBuffer x, ffi::AnyBuffer weight,
                         ffi::Result<ffi::AnyBuffer> out) {
    const auto params = params_of(eps, x, weight, *out);
    if (params.has_error()) return params.error();
    return told(mk_rms_norm(&params.value(), stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(minitron_rms_norm_cpu, rms_norm_cpu,
                              ffi::Ffi::Bind()
                                  .Attr<float>("eps")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

// The kernel is enqueued on XLA's stream, and can be part of its command buffers.
XLA_FFI_DEFINE_HANDLER_SYMBOL(minitron_rms_norm_cuda, rms_norm_cuda,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<void*>>()
                                  .Attr<float>("eps")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
