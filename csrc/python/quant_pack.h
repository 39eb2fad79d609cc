// Packing of quantised weights, and the workspace of their products, for Python. Included by
// native.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include "minitron_kernels.h"

// `check` raises the exception that stands for a status.
inline void def_quant_pack(pybind11::module_& m, void (*check)(mk_status)) {
    namespace py = pybind11;
    using namespace py::literals;
    using Pointer = uintptr_t;
    m.attr("QUANT_LAYOUT_VERSION") = MK_QUANT_LAYOUT_VERSION;
    m.attr("QUANT_MAX_DECODE_M") = MK_QUANT_MAX_DECODE_M;
    m.def(
        "quant_packed_bytes",
        [check](int32_t type, int32_t rows, int32_t k) {
            int64_t bytes = 0;
            check(mk_quant_packed_bytes(type, rows, k, &bytes));
            return bytes;
        },
        "type"_a, "rows"_a, "k"_a);
    const auto def = [&](const char* name, mk_status (*function)(const mk_quant_pack_params*)) {
        m.def(
            name,
            [check, function](Pointer blocks, Pointer tiles, int64_t row_bytes, int32_t type,
                              int32_t rows, int32_t k, int32_t num_threads, Pointer row_order,
                              Pointer blocks_up, int64_t row_up_bytes) {
                mk_quant_pack_params params{};
                params.blocks = reinterpret_cast<void*>(blocks);
                params.blocks_up = reinterpret_cast<void*>(blocks_up);
                params.tiles = reinterpret_cast<void*>(tiles);
                params.row_order = reinterpret_cast<const int32_t*>(row_order);
                params.row_bytes = row_bytes;
                params.row_up_bytes = row_up_bytes;
                params.type = type;
                params.rows = rows;
                params.k = k;
                params.num_threads = num_threads;
                mk_status status;
                {
                    const py::gil_scoped_release release;
                    status = function(&params);
                }
                check(status);
            },
            "blocks"_a, "tiles"_a, "row_bytes"_a, "type"_a, "rows"_a, "k"_a, "num_threads"_a,
            "row_order"_a = 0, "blocks_up"_a = 0, "row_up_bytes"_a = 0);
    };
    def("quant_pack", &mk_quant_pack);
    def("quant_unpack", &mk_quant_unpack);
    m.def(
        "quant_workspace_bytes",
        [check](int32_t rows, int32_t k) {
            mk_linear_quant_params params{};
            params.linear.m = rows;
            params.linear.k = k;
            int64_t bytes = 0;
            check(mk_linear_quant_workspace_bytes(&params, &bytes));
            return bytes;
        },
        "m"_a, "k"_a);
}
