// mk_cpu_linear for Python. Included by native.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "minitron_kernels.h"
#include "python/recording.h"

// `check` raises the exception that stands for a status.
inline void def_cpu_linear(pybind11::module_& m, void (*check)(mk_status)) {
    namespace py = pybind11;
    using namespace py::literals;
    using Pointer = uintptr_t;
    for (const auto& [name, value] : {std::pair{"EPILOGUE_NONE", +MK_EPILOGUE_NONE},
                                      {"EPILOGUE_SILU", +MK_EPILOGUE_SILU},
                                      {"EPILOGUE_MUL", +MK_EPILOGUE_MUL},
                                      {"EPILOGUE_ADD", +MK_EPILOGUE_ADD},
                                      {"EPILOGUE_SWIGLU", +MK_EPILOGUE_SWIGLU},
                                      {"CPU_AUTO", +MK_CPU_AUTO},
                                      {"CPU_BASELINE", +MK_CPU_BASELINE},
                                      {"CPU_AVX2", +MK_CPU_AVX2},
                                      {"CPU_AVX512", +MK_CPU_AVX512},
                                      {"CPU_AVX512BF16", +MK_CPU_AVX512BF16}}) {
        m.attr(name) = static_cast<int>(value);
    }
    m.def("cpu_isa", [check] {
        const char* name = nullptr;
        check(mk_cpu_isa_name(&name));
        return std::string(name);
    });
    m.def(
        "cpu_linear",
        [check](Pointer x, Pointer w, Pointer out, int64_t x_stride, int64_t w_stride,
                int64_t out_stride, int32_t rows, int32_t n, int32_t k, int32_t dtype,
                int32_t num_threads, int32_t epilogue, Pointer other, int64_t other_stride,
                Pointer w_up, int64_t w_up_stride, int32_t isa, int32_t out_dtype) {
            const auto at = [](Pointer p) { return reinterpret_cast<void*>(p); };
            const mk_cpu_linear_params params{
                at(x),    at(w),       at(w_up),     at(other),   at(out), x_stride,
                w_stride, w_up_stride, other_stride, out_stride,  rows,    n,
                k,        dtype,       epilogue,     num_threads, isa,     out_dtype};
            check(CpuRecording::run([params] { return mk_cpu_linear(&params); }));
        },
        "x"_a, "w"_a, "out"_a, "x_stride"_a, "w_stride"_a, "out_stride"_a, "m"_a, "n"_a, "k"_a,
        "dtype"_a, "num_threads"_a, "epilogue"_a = +MK_EPILOGUE_NONE, "other"_a = 0,
        "other_stride"_a = 0, "w_up"_a = 0, "w_up_stride"_a = 0, "isa"_a = +MK_CPU_AUTO,
        "out_dtype"_a = 0);
}
