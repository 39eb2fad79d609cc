// mk_cpu_linear_quant, mk_cpu_dequantize and mk_cpu_nonfinite_scales for Python. Included by
// native.cpp.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "minitron_kernels.h"
#include "python/recording.h"

// `check` raises the exception that stands for a status.
inline void def_cpu_linear_quant(pybind11::module_& m, void (*check)(mk_status)) {
    namespace py = pybind11;
    using namespace py::literals;
    using Pointer = uintptr_t;
    constexpr auto at = [](Pointer p) { return reinterpret_cast<void*>(p); };
    py::class_<mk_cpu_quant_product>(m, "CpuQuantProduct")
        .def(py::init([at](Pointer w, int64_t w_row_bytes, int32_t n, int32_t type, Pointer out,
                           int64_t out_stride, int32_t epilogue, Pointer other,
                           int64_t other_stride, Pointer w_up, int64_t w_up_row_bytes,
                           int32_t up_type, int32_t out_dtype) {
                 return mk_cpu_quant_product{at(w),       at(w_up),       at(other),    at(out),
                                             w_row_bytes, w_up_row_bytes, other_stride, out_stride,
                                             n,           type,           up_type,      epilogue,
                                             out_dtype};
             }),
             "w"_a, "w_row_bytes"_a, "n"_a, "type"_a, "out"_a, "out_stride"_a,
             "epilogue"_a = +MK_EPILOGUE_NONE, "other"_a = 0, "other_stride"_a = 0, "w_up"_a = 0,
             "w_up_row_bytes"_a = 0, "up_type"_a = 0, "out_dtype"_a = 0);
    m.def(
        "cpu_linear_quant",
        [check, at](Pointer x, int64_t x_stride, int32_t rows, int32_t k, int32_t dtype,
                    const std::vector<mk_cpu_quant_product>& products, int32_t num_threads,
                    int32_t isa, int32_t x_bits) {
            mk_cpu_linear_quant_params params{
                at(x), nullptr, x_stride, static_cast<int32_t>(products.size()),
                rows,  k,       dtype,    num_threads,
                isa,   x_bits};
            check(CpuRecording::run([params, products]() mutable {
                params.products = products.data();
                return mk_cpu_linear_quant(&params);
            }));
        },
        "x"_a, "x_stride"_a, "m"_a, "k"_a, "dtype"_a, "products"_a, "num_threads"_a,
        "isa"_a = +MK_CPU_AUTO, "x_bits"_a = 0);
    m.def(
        "cpu_dequantize",
        [check, at](Pointer w, int64_t w_row_bytes, int32_t rows, int32_t k, int32_t type,
                    Pointer out, int64_t out_stride, int32_t tokens, int32_t dtype,
                    int32_t num_threads, Pointer ids, int32_t ids_dtype, int32_t isa) {
            const mk_cpu_dequantize_params params{
                at(ids), at(w), at(out),   w_row_bytes, out_stride,  tokens, rows,
                k,       type,  ids_dtype, dtype,       num_threads, isa};
            check(CpuRecording::run([params] { return mk_cpu_dequantize(&params); }));
        },
        "w"_a, "w_row_bytes"_a, "rows"_a, "k"_a, "type"_a, "out"_a, "out_stride"_a, "tokens"_a,
        "dtype"_a, "num_threads"_a, "ids"_a = 0, "ids_dtype"_a = +MK_I64, "isa"_a = +MK_CPU_AUTO);
    m.def(
        "cpu_nonfinite_scales",
        [check, at](const std::vector<std::tuple<Pointer, int64_t, int32_t, int32_t, int32_t>>& all,
                    int32_t num_threads) {
            std::vector<mk_cpu_quant_blocks> matrices;
            for (const auto& [w, w_row_bytes, rows, k, type] : all) {
                matrices.push_back({at(w), w_row_bytes, rows, k, type});
            }
            std::vector<int32_t> found(all.size());
            mk_status status;
            {
                const py::gil_scoped_release release;
                status = mk_cpu_nonfinite_scales(matrices.data(), static_cast<int32_t>(all.size()),
                                                 num_threads, found.data());
            }
            check(status);
            return found;
        },
        "matrices"_a, "num_threads"_a);
}
