// minitron_kernels._native: the C ABI for Python. Pointers, strides and streams are plain ints.
//
// Each op <name> gives two functions: <name>(fields..., stream) and <name>_plan(fields..., sm,
// num_sms, smem_per_block) -> dict. The fields are those of the op's struct, in the order below.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "minitron_kernels.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using Pointer = uintptr_t;

template <class T = void>
T* pointer(Pointer address) {
    return reinterpret_cast<T*>(address);
}

// The exception that stands for a status; ops.py has checked most arguments before.
void check(mk_status status) {
    switch (status) {
        case MK_OK:
            return;
        case MK_ERR_DTYPE:
            throw py::type_error(mk_last_error());
        case MK_ERR_UNSUPPORTED:
            PyErr_SetString(PyExc_NotImplementedError, mk_last_error());
            throw py::error_already_set();
        case MK_ERR_DRIVER:
            throw std::runtime_error(mk_last_error());
        default:
            throw py::value_error(mk_last_error());
    }
}

py::dict to_dict(const mk_plan& plan) {
    const auto dim3 = [](const int32_t (&d)[3]) { return py::make_tuple(d[0], d[1], d[2]); };
    return py::dict("entry"_a = plan.entry, "grid"_a = dim3(plan.grid),
                    "block"_a = dim3(plan.block), "cluster"_a = dim3(plan.cluster),
                    "smem_bytes"_a = plan.smem_bytes, "pdl"_a = plan.pdl != 0);
}

// Defines <name> and <name>_plan from the function that fills the op's struct.
template <class Params, class... Fields, class... Names>
void def_op(py::module_& m, const std::string& name, Params (*fill)(Fields...),
            mk_status (*run)(const Params*, void*),
            mk_status (*plan)(const Params*, const mk_device*, mk_plan*), const Names&... names) {
    static_assert(sizeof...(Fields) == sizeof...(Names));
    m.def(
        name.c_str(),
        [fill, run](Fields... fields, Pointer stream) {
            const Params params = fill(fields...);
            check(run(&params, pointer(stream)));
        },
        py::arg(names)..., "stream"_a);
    m.def((name + "_plan").c_str(),
          [fill, plan](Fields... fields, int32_t sm, int32_t num_sms, int32_t smem_per_block) {
              const Params params = fill(fields...);
              const mk_device device{sm, num_sms, smem_per_block};
              mk_plan result;
              check(plan(&params, &device, &result));
              return to_dict(result);
          },
          py::arg(names)..., py::kw_only(), "sm"_a, "num_sms"_a, "smem_per_block"_a);
}

mk_rms_norm_params add_rms_norm_params(Pointer x, Pointer residual, Pointer weight, Pointer out,
                                       int64_t x_stride, int64_t residual_stride,
                                       int64_t out_stride, int32_t rows, int32_t hidden, float eps,
                                       int32_t dtype) {
    return {pointer(x),
            pointer(residual),
            pointer(weight),
            pointer(out),
            x_stride,
            residual_stride,
            out_stride,
            rows,
            hidden,
            eps,
            dtype};
}

mk_rms_norm_params rms_norm_params(Pointer x, Pointer weight, Pointer out, int64_t x_stride,
                                   int64_t out_stride, int32_t rows, int32_t hidden, float eps,
                                   int32_t dtype) {
    return add_rms_norm_params(x, 0, weight, out, x_stride, 0, out_stride, rows, hidden, eps,
                               dtype);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "The C ABI of minitron_kernels (include/minitron_kernels.h).";
    m.attr("ABI_VERSION") = mk_abi_version();
    for (const auto& [name, value] : {std::pair{"BF16", MK_BF16},
                                      {"F16", MK_F16},
                                      {"F32", MK_F32},
                                      {"I32", MK_I32},
                                      {"I64", MK_I64}}) {
        m.attr(name) = static_cast<int>(value);
    }
    m.def("load", [] { check(mk_load()); });
    m.def("current_device", [] {
        mk_device device;
        check(mk_current_device(&device));
        return py::dict("sm"_a = device.sm, "num_sms"_a = device.num_sms,
                        "smem_per_block"_a = device.smem_per_block);
    });
    m.def(
        "kernels_for",
        [](int32_t major, int32_t minor) {
            const char* arch = nullptr;
            check(mk_kernels_for(major, minor, &arch));
            return std::string(arch);
        },
        "major"_a, "minor"_a);

    def_op(m, "rms_norm", &rms_norm_params, &mk_rms_norm, &mk_rms_norm_plan, "x", "weight", "out",
           "x_stride", "out_stride", "rows", "hidden", "eps", "dtype");
    def_op(m, "add_rms_norm", &add_rms_norm_params, &mk_add_rms_norm, &mk_add_rms_norm_plan, "x",
           "residual", "weight", "out", "x_stride", "residual_stride", "out_stride", "rows",
           "hidden", "eps", "dtype");
}
