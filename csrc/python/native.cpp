// minitron_kernels._native: the C ABI for Python. Pointers, strides and streams are plain ints.
//
// Each op <name> gives two functions: <name>(fields..., stream) and <name>_plan(fields..., sm,
// num_sms, smem_per_block) -> dict. The fields are those of the op's struct, in the order below.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "minitron_kernels.h"
#include "python/cpu_linear.h"

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
        case MK_ERR_MEMORY:
            PyErr_SetString(PyExc_MemoryError, mk_last_error());
            throw py::error_already_set();
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

mk_rope rope(Pointer cos, Pointer sin, int64_t table_stride, Pointer positions,
             int32_t positions_dtype, int32_t max_position, int32_t rotary_dim, bool interleaved,
             float theta) {
    return {pointer<const float>(cos),
            pointer<const float>(sin),
            table_stride,
            pointer(positions),
            positions_dtype,
            max_position,
            rotary_dim,
            interleaved,
            theta};
}

mk_apply_rope_params apply_rope_params(Pointer q, Pointer k, Pointer q_out, Pointer k_out,
                                       int64_t q_stride, int64_t q_head_stride, int64_t k_stride,
                                       int64_t k_head_stride, int64_t q_out_stride,
                                       int64_t q_out_head_stride, int64_t k_out_stride,
                                       int64_t k_out_head_stride, int32_t tokens,
                                       int32_t num_q_heads, int32_t num_k_heads, int32_t head_dim,
                                       int32_t dtype, const mk_rope& rope) {
    return {pointer(q),     pointer(k),
            pointer(q_out), pointer(k_out),
            q_stride,       q_head_stride,
            k_stride,       k_head_stride,
            q_out_stride,   q_out_head_stride,
            k_out_stride,   k_out_head_stride,
            tokens,         num_q_heads,
            num_k_heads,    head_dim,
            dtype,          rope};
}

mk_rope_append_params rope_append_params(Pointer k, Pointer v, Pointer k_cache, Pointer v_cache,
                                         Pointer slots, int64_t k_stride, int64_t k_head_stride,
                                         int64_t v_stride, int64_t v_head_stride,
                                         int64_t cache_page_stride, int64_t cache_stride,
                                         int64_t cache_head_stride, int32_t tokens,
                                         int32_t num_heads, int32_t head_dim, int32_t num_pages,
                                         int32_t page_size, int32_t slots_dtype, int32_t dtype,
                                         const mk_rope& rope) {
    return {pointer(k),
            pointer(v),
            pointer(k_cache),
            pointer(v_cache),
            pointer(slots),
            k_stride,
            k_head_stride,
            v_stride,
            v_head_stride,
            cache_page_stride,
            cache_stride,
            cache_head_stride,
            tokens,
            num_heads,
            head_dim,
            num_pages,
            page_size,
            slots_dtype,
            dtype,
            rope};
}

mk_silu_and_mul_params silu_and_mul_params(Pointer gate_up, Pointer out, int64_t gate_up_stride,
                                           int64_t out_stride, int32_t rows, int32_t size,
                                           int32_t dtype) {
    return {pointer(gate_up), pointer(out), gate_up_stride, out_stride, rows, size, dtype};
}

mk_embedding_params embedding_params(Pointer ids, Pointer table, Pointer out, int64_t table_stride,
                                     int64_t out_stride, int32_t tokens, int32_t vocab,
                                     int32_t hidden, int32_t ids_dtype, int32_t dtype) {
    return {pointer(ids), pointer(table), pointer(out), table_stride, out_stride,
            tokens,       vocab,          hidden,       ids_dtype,    dtype};
}

mk_argmax_params argmax_params(Pointer logits, Pointer out, int64_t logits_stride, int32_t rows,
                               int32_t vocab, int32_t dtype) {
    return {pointer(logits), pointer<int64_t>(out), logits_stride, rows, vocab, dtype};
}

mk_sample_params sample_params(Pointer logits, Pointer sampling, Pointer out, int64_t logits_stride,
                               int32_t rows, int32_t vocab, int32_t dtype) {
    return {pointer(logits),
            pointer<const mk_sampling>(sampling),
            pointer<int64_t>(out),
            logits_stride,
            rows,
            vocab,
            dtype};
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
    py::class_<mk_rope>(m, "Rope").def(py::init(&rope), "cos"_a, "sin"_a, "table_stride"_a,
                                       "positions"_a, "positions_dtype"_a, "max_position"_a,
                                       "rotary_dim"_a, "interleaved"_a = false, "theta"_a = 0.f);
    def_op(m, "apply_rope", &apply_rope_params, &mk_apply_rope, &mk_apply_rope_plan, "q", "k",
           "q_out", "k_out", "q_stride", "q_head_stride", "k_stride", "k_head_stride",
           "q_out_stride", "q_out_head_stride", "k_out_stride", "k_out_head_stride", "tokens",
           "num_q_heads", "num_k_heads", "head_dim", "dtype", "rope");
    def_op(m, "rope_append", &rope_append_params, &mk_rope_append, &mk_rope_append_plan, "k", "v",
           "k_cache", "v_cache", "slots", "k_stride", "k_head_stride", "v_stride", "v_head_stride",
           "cache_page_stride", "cache_stride", "cache_head_stride", "tokens", "num_heads",
           "head_dim", "num_pages", "page_size", "slots_dtype", "dtype", "rope");
    def_op(m, "silu_and_mul", &silu_and_mul_params, &mk_silu_and_mul, &mk_silu_and_mul_plan,
           "gate_up", "out", "gate_up_stride", "out_stride", "rows", "size", "dtype");
    def_op(m, "embedding", &embedding_params, &mk_embedding, &mk_embedding_plan, "ids", "table",
           "out", "table_stride", "out_stride", "tokens", "vocab", "hidden", "ids_dtype", "dtype");
    def_op(m, "argmax", &argmax_params, &mk_argmax, &mk_argmax_plan, "logits", "out",
           "logits_stride", "rows", "vocab", "dtype");
    def_op(m, "sample", &sample_params, &mk_sample, &mk_sample_plan, "logits", "sampling", "out",
           "logits_stride", "rows", "vocab", "dtype");
    def_cpu_linear(m, &check);
}
