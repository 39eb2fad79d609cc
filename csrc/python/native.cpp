// minitron_kernels._native: the C ABI for Python. Pointers, strides and streams are plain ints.
//
// Each op <name> gives a function <name>(fields..., stream). The fields are those of the op's
// struct, in the order below.
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "minitron_kernels_fp8.h"
#include "python/cpu_linear.h"
#include "python/cpu_linear_quant.h"
#include "python/cpu_ops.h"
#include "python/fields.h"
#include "python/quant_pack.h"
#include "python/recording.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

template <class T = const void>
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

// Defines `name`, whose arguments are these fields (the others stay 0) and the stream.
template <class Params, class... T>
void def_op(py::module_& m, const char* name, mk_status (*run)(const Params*, void*),
            Field<Params, T>... fields) {
    m.def(
        name,
        [=](const Argument<T>&... values, Pointer stream) {
            Params params{};
            ((fields.at(params) = convert<T>(values)), ...);
            check(run(&params, reinterpret_cast<void*>(stream)));
        },
        py::arg(fields.name)..., "stream"_a);
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
    m.attr("E4M3") = MK_E4M3;
    m.def("load", [] { check(mk_load()); });
    m.def("current_device", [] {
        mk_device device;
        check(mk_current_device(&device));
        return py::dict("sm"_a = device.sm, "num_sms"_a = device.num_sms,
                        "smem_per_block"_a = device.smem_per_block,
                        "clusters_of_4"_a = device.clusters_of_4);
    });
    m.def(
        "kernels_for",
        [](int32_t major, int32_t minor) {
            const char* arch = nullptr;
            check(mk_kernels_for(major, minor, &arch));
            return std::string(arch);
        },
        "major"_a, "minor"_a);

    py::class_<mk_rope>(m, "Rope").def(py::init(&rope), "cos"_a, "sin"_a, "table_stride"_a,
                                       "positions"_a, "positions_dtype"_a, "max_position"_a,
                                       "rotary_dim"_a, "interleaved"_a = false, "theta"_a = 0.f);
    py::class_<mk_quant_matrix>(m, "QuantMatrix")
        .def(py::init([](Pointer tiles, int32_t type, int32_t rows) {
                 return mk_quant_matrix{pointer(tiles), type, rows};
             }),
             "tiles"_a, "type"_a, "rows"_a);
    m.def(
        "attention_decode_workspace_bytes",
        [](int32_t batch, int32_t num_q_heads, int32_t num_kv_heads, int32_t head_dim,
           int32_t max_pages, int32_t page_size, int32_t max_seqlen_q) {
            mk_attention_decode_params params{};
            params.batch = batch;
            params.num_q_heads = num_q_heads;
            params.num_kv_heads = num_kv_heads;
            params.head_dim = head_dim;
            params.max_pages = max_pages;
            params.page_size = page_size;
            params.max_seqlen_q = max_seqlen_q;
            int64_t bytes = 0;
            check(mk_attention_decode_workspace_bytes(&params, &bytes));
            return bytes;
        },
        "batch"_a, "num_q_heads"_a, "num_kv_heads"_a, "head_dim"_a, "max_pages"_a, "page_size"_a,
        "max_seqlen_q"_a);
// The argument `name` is `member` of the op's struct.
#define MK_MEMBER(op, name, member)                                                         \
    Field<mk_##op##_params, std::remove_reference_t<decltype(mk_##op##_params{}.member)>> { \
        name, [](mk_##op##_params& p) -> auto& { return p.member; }                         \
    }
#define MK_FIELD(op, field) MK_MEMBER(op, #field, field)
    def_op(m, "rms_norm", &mk_rms_norm, MK_FIELD(rms_norm, x), MK_FIELD(rms_norm, weight),
           MK_FIELD(rms_norm, out), MK_FIELD(rms_norm, x_stride), MK_FIELD(rms_norm, out_stride),
           MK_FIELD(rms_norm, rows), MK_FIELD(rms_norm, hidden), MK_FIELD(rms_norm, eps),
           MK_FIELD(rms_norm, dtype));
    def_op(m, "add_rms_norm", &mk_add_rms_norm, MK_FIELD(rms_norm, x), MK_FIELD(rms_norm, residual),
           MK_FIELD(rms_norm, weight), MK_FIELD(rms_norm, out), MK_FIELD(rms_norm, x_stride),
           MK_FIELD(rms_norm, residual_stride), MK_FIELD(rms_norm, out_stride),
           MK_FIELD(rms_norm, rows), MK_FIELD(rms_norm, hidden), MK_FIELD(rms_norm, eps),
           MK_FIELD(rms_norm, dtype));
    def_op(m, "apply_rope", &mk_apply_rope, MK_FIELD(apply_rope, q), MK_FIELD(apply_rope, k),
           MK_FIELD(apply_rope, q_out), MK_FIELD(apply_rope, k_out), MK_FIELD(apply_rope, q_stride),
           MK_FIELD(apply_rope, q_head_stride), MK_FIELD(apply_rope, k_stride),
           MK_FIELD(apply_rope, k_head_stride), MK_FIELD(apply_rope, q_out_stride),
           MK_FIELD(apply_rope, q_out_head_stride), MK_FIELD(apply_rope, k_out_stride),
           MK_FIELD(apply_rope, k_out_head_stride), MK_FIELD(apply_rope, tokens),
           MK_FIELD(apply_rope, num_q_heads), MK_FIELD(apply_rope, num_k_heads),
           MK_FIELD(apply_rope, head_dim), MK_FIELD(apply_rope, dtype), MK_FIELD(apply_rope, rope));
    def_op(m, "rope_append", &mk_rope_append, MK_FIELD(rope_append, k), MK_FIELD(rope_append, v),
           MK_FIELD(rope_append, k_cache), MK_FIELD(rope_append, v_cache),
           MK_FIELD(rope_append, slots), MK_FIELD(rope_append, k_stride),
           MK_FIELD(rope_append, k_head_stride), MK_FIELD(rope_append, v_stride),
           MK_FIELD(rope_append, v_head_stride), MK_FIELD(rope_append, cache_page_stride),
           MK_FIELD(rope_append, cache_stride), MK_FIELD(rope_append, cache_head_stride),
           MK_FIELD(rope_append, tokens), MK_FIELD(rope_append, num_heads),
           MK_FIELD(rope_append, head_dim), MK_FIELD(rope_append, num_pages),
           MK_FIELD(rope_append, page_size), MK_FIELD(rope_append, slots_dtype),
           MK_FIELD(rope_append, dtype), MK_FIELD(rope_append, rope));
    def_op(m, "linear", &mk_linear, MK_FIELD(linear, x), MK_FIELD(linear, w),
           MK_FIELD(linear, norm_weight), MK_FIELD(linear, residual), MK_FIELD(linear, out),
           MK_FIELD(linear, x_stride), MK_FIELD(linear, w_stride),
           MK_FIELD(linear, residual_stride), MK_FIELD(linear, out_stride), MK_FIELD(linear, m),
           MK_FIELD(linear, n), MK_FIELD(linear, k), MK_FIELD(linear, eps), MK_FIELD(linear, dtype),
           MK_FIELD(linear, out_dtype));
    def_op(m, "linear_swiglu", &mk_linear_swiglu, MK_FIELD(linear, x), MK_FIELD(linear, w),
           MK_FIELD(linear, norm_weight), MK_FIELD(linear, out), MK_FIELD(linear, x_stride),
           MK_FIELD(linear, w_stride), MK_FIELD(linear, out_stride), MK_FIELD(linear, m),
           MK_FIELD(linear, n), MK_FIELD(linear, k), MK_FIELD(linear, eps),
           MK_FIELD(linear, dtype));
    def_op(m, "qkv_rope_append", &mk_qkv_rope_append, MK_FIELD(qkv_rope_append, x),
           MK_FIELD(qkv_rope_append, w), MK_FIELD(qkv_rope_append, norm_weight),
           MK_FIELD(qkv_rope_append, q), MK_FIELD(qkv_rope_append, k_cache),
           MK_FIELD(qkv_rope_append, v_cache), MK_FIELD(qkv_rope_append, slots),
           MK_FIELD(qkv_rope_append, x_stride), MK_FIELD(qkv_rope_append, w_stride),
           MK_FIELD(qkv_rope_append, q_stride), MK_FIELD(qkv_rope_append, q_head_stride),
           MK_FIELD(qkv_rope_append, cache_page_stride), MK_FIELD(qkv_rope_append, cache_stride),
           MK_FIELD(qkv_rope_append, cache_head_stride), MK_FIELD(qkv_rope_append, tokens),
           MK_FIELD(qkv_rope_append, hidden), MK_FIELD(qkv_rope_append, num_q_heads),
           MK_FIELD(qkv_rope_append, num_kv_heads), MK_FIELD(qkv_rope_append, head_dim),
           MK_FIELD(qkv_rope_append, num_pages), MK_FIELD(qkv_rope_append, page_size),
           MK_FIELD(qkv_rope_append, eps), MK_FIELD(qkv_rope_append, slots_dtype),
           MK_FIELD(qkv_rope_append, dtype), MK_FIELD(qkv_rope_append, rope));
    def_op(m, "attention", &mk_attention, MK_FIELD(attention, q), MK_FIELD(attention, k),
           MK_FIELD(attention, v), MK_FIELD(attention, out), MK_FIELD(attention, lse),
           MK_FIELD(attention, cu_seqlens_q), MK_FIELD(attention, cu_seqlens_k),
           MK_FIELD(attention, seqlens_k), MK_FIELD(attention, block_table),
           MK_FIELD(attention, q_stride), MK_FIELD(attention, q_head_stride),
           MK_FIELD(attention, k_page_stride), MK_FIELD(attention, k_stride),
           MK_FIELD(attention, k_head_stride), MK_FIELD(attention, v_page_stride),
           MK_FIELD(attention, v_stride), MK_FIELD(attention, v_head_stride),
           MK_FIELD(attention, out_stride), MK_FIELD(attention, out_head_stride),
           MK_FIELD(attention, lse_stride), MK_FIELD(attention, block_table_stride),
           MK_FIELD(attention, tokens_q), MK_FIELD(attention, tokens_k), MK_FIELD(attention, batch),
           MK_FIELD(attention, num_q_heads), MK_FIELD(attention, num_kv_heads),
           MK_FIELD(attention, head_dim), MK_FIELD(attention, num_pages),
           MK_FIELD(attention, page_size), MK_FIELD(attention, max_pages),
           MK_FIELD(attention, max_seqlen_q), MK_FIELD(attention, skip_seqlen_q),
           MK_FIELD(attention, seqlens_k_add), MK_FIELD(attention, causal),
           MK_FIELD(attention, window), MK_FIELD(attention, softmax_scale),
           MK_FIELD(attention, dtype), MK_FIELD(attention, rope));
    def_op(m, "attention_fp8", &mk_attention_fp8, MK_FIELD(attention_fp8, q),
           MK_FIELD(attention_fp8, k), MK_FIELD(attention_fp8, v), MK_FIELD(attention_fp8, out),
           MK_FIELD(attention_fp8, lse), MK_FIELD(attention_fp8, cu_seqlens_q),
           MK_FIELD(attention_fp8, cu_seqlens_k), MK_FIELD(attention_fp8, q_descale),
           MK_FIELD(attention_fp8, k_descale), MK_FIELD(attention_fp8, v_descale),
           MK_FIELD(attention_fp8, q_stride), MK_FIELD(attention_fp8, q_head_stride),
           MK_FIELD(attention_fp8, k_stride), MK_FIELD(attention_fp8, k_head_stride),
           MK_FIELD(attention_fp8, v_stride), MK_FIELD(attention_fp8, v_head_stride),
           MK_FIELD(attention_fp8, out_stride), MK_FIELD(attention_fp8, out_head_stride),
           MK_FIELD(attention_fp8, lse_stride), MK_FIELD(attention_fp8, q_descale_stride),
           MK_FIELD(attention_fp8, k_descale_stride), MK_FIELD(attention_fp8, v_descale_stride),
           MK_FIELD(attention_fp8, tokens_q), MK_FIELD(attention_fp8, tokens_k),
           MK_FIELD(attention_fp8, batch), MK_FIELD(attention_fp8, num_q_heads),
           MK_FIELD(attention_fp8, num_kv_heads), MK_FIELD(attention_fp8, num_q_descales),
           MK_FIELD(attention_fp8, head_dim), MK_FIELD(attention_fp8, max_seqlen_q),
           MK_FIELD(attention_fp8, causal), MK_FIELD(attention_fp8, window),
           MK_FIELD(attention_fp8, softmax_scale), MK_FIELD(attention_fp8, out_dtype));
    def_op(m, "attention_decode", &mk_attention_decode, MK_FIELD(attention_decode, q),
           MK_FIELD(attention_decode, k_new), MK_FIELD(attention_decode, v_new),
           MK_FIELD(attention_decode, k_cache), MK_FIELD(attention_decode, v_cache),
           MK_FIELD(attention_decode, out), MK_FIELD(attention_decode, lse),
           MK_FIELD(attention_decode, cu_seqlens_q), MK_FIELD(attention_decode, seqlens_k),
           MK_FIELD(attention_decode, block_table), MK_FIELD(attention_decode, workspace),
           MK_FIELD(attention_decode, workspace_bytes), MK_FIELD(attention_decode, q_stride),
           MK_FIELD(attention_decode, q_head_stride), MK_FIELD(attention_decode, k_new_stride),
           MK_FIELD(attention_decode, k_new_head_stride), MK_FIELD(attention_decode, v_new_stride),
           MK_FIELD(attention_decode, v_new_head_stride),
           MK_FIELD(attention_decode, cache_page_stride), MK_FIELD(attention_decode, cache_stride),
           MK_FIELD(attention_decode, cache_head_stride), MK_FIELD(attention_decode, out_stride),
           MK_FIELD(attention_decode, out_head_stride), MK_FIELD(attention_decode, lse_stride),
           MK_FIELD(attention_decode, block_table_stride), MK_FIELD(attention_decode, tokens),
           MK_FIELD(attention_decode, batch), MK_FIELD(attention_decode, num_q_heads),
           MK_FIELD(attention_decode, num_kv_heads), MK_FIELD(attention_decode, head_dim),
           MK_FIELD(attention_decode, num_pages), MK_FIELD(attention_decode, page_size),
           MK_FIELD(attention_decode, max_pages), MK_FIELD(attention_decode, max_seqlen_q),
           MK_FIELD(attention_decode, causal), MK_FIELD(attention_decode, window),
           MK_FIELD(attention_decode, softmax_scale), MK_FIELD(attention_decode, dtype),
           MK_FIELD(attention_decode, rope));
    def_op(m, "silu_and_mul", &mk_silu_and_mul, MK_FIELD(silu_and_mul, gate_up),
           MK_FIELD(silu_and_mul, out), MK_FIELD(silu_and_mul, gate_up_stride),
           MK_FIELD(silu_and_mul, out_stride), MK_FIELD(silu_and_mul, rows),
           MK_FIELD(silu_and_mul, size), MK_FIELD(silu_and_mul, dtype));
    def_op(m, "embedding", &mk_embedding, MK_FIELD(embedding, ids), MK_FIELD(embedding, table),
           MK_FIELD(embedding, out), MK_FIELD(embedding, table_stride),
           MK_FIELD(embedding, out_stride), MK_FIELD(embedding, tokens), MK_FIELD(embedding, vocab),
           MK_FIELD(embedding, hidden), MK_FIELD(embedding, ids_dtype), MK_FIELD(embedding, dtype));
    def_op(m, "argmax", &mk_argmax, MK_FIELD(argmax, logits), MK_FIELD(argmax, out),
           MK_FIELD(argmax, logits_stride), MK_FIELD(argmax, rows), MK_FIELD(argmax, vocab),
           MK_FIELD(argmax, dtype));
    def_op(m, "sample", &mk_sample, MK_FIELD(sample, logits), MK_FIELD(sample, sampling),
           MK_FIELD(sample, out), MK_FIELD(sample, logits_stride), MK_FIELD(sample, rows),
           MK_FIELD(sample, vocab), MK_FIELD(sample, dtype));
    def_op(m, "quantize_fp8", &mk_quantize_fp8, MK_FIELD(quantize_fp8, x),
           MK_FIELD(quantize_fp8, out), MK_FIELD(quantize_fp8, scales),
           MK_FIELD(quantize_fp8, x_stride), MK_FIELD(quantize_fp8, out_stride),
           MK_FIELD(quantize_fp8, scales_stride), MK_FIELD(quantize_fp8, scales_block_stride),
           MK_FIELD(quantize_fp8, rows), MK_FIELD(quantize_fp8, k), MK_FIELD(quantize_fp8, block),
           MK_FIELD(quantize_fp8, dtype));
    def_op(m, "linear_fp8", &mk_linear_fp8, MK_FIELD(linear_fp8, x), MK_FIELD(linear_fp8, w),
           MK_FIELD(linear_fp8, x_scale), MK_FIELD(linear_fp8, w_scale),
           MK_FIELD(linear_fp8, residual), MK_FIELD(linear_fp8, out),
           MK_FIELD(linear_fp8, x_stride), MK_FIELD(linear_fp8, w_stride),
           MK_FIELD(linear_fp8, residual_stride), MK_FIELD(linear_fp8, out_stride),
           MK_FIELD(linear_fp8, x_scale_stride), MK_FIELD(linear_fp8, w_scale_stride),
           MK_FIELD(linear_fp8, x_scale_block_stride), MK_FIELD(linear_fp8, w_scale_block_stride),
           MK_FIELD(linear_fp8, m), MK_FIELD(linear_fp8, n), MK_FIELD(linear_fp8, k),
           MK_FIELD(linear_fp8, out_dtype));
    def_op(m, "linear_fp8_swiglu", &mk_linear_fp8_swiglu, MK_FIELD(linear_fp8, x),
           MK_FIELD(linear_fp8, w), MK_FIELD(linear_fp8, x_scale), MK_FIELD(linear_fp8, w_scale),
           MK_FIELD(linear_fp8, out), MK_FIELD(linear_fp8, x_stride),
           MK_FIELD(linear_fp8, w_stride), MK_FIELD(linear_fp8, out_stride),
           MK_FIELD(linear_fp8, x_scale_stride), MK_FIELD(linear_fp8, w_scale_stride),
           MK_FIELD(linear_fp8, x_scale_block_stride), MK_FIELD(linear_fp8, w_scale_block_stride),
           MK_FIELD(linear_fp8, m), MK_FIELD(linear_fp8, n), MK_FIELD(linear_fp8, k),
           MK_FIELD(linear_fp8, out_dtype));
#undef MK_FIELD
#define MK_FIELD(field) MK_MEMBER(linear_quant, #field, linear.field)
    def_op(m, "linear_quant", &mk_linear_quant, MK_FIELD(x), MK_MEMBER(linear_quant, "w", w),
           MK_FIELD(norm_weight), MK_FIELD(residual), MK_FIELD(out),
           MK_MEMBER(linear_quant, "workspace", workspace),
           MK_MEMBER(linear_quant, "workspace_bytes", workspace_bytes), MK_FIELD(x_stride),
           MK_FIELD(residual_stride), MK_FIELD(out_stride), MK_FIELD(m), MK_FIELD(n), MK_FIELD(k),
           MK_FIELD(eps), MK_FIELD(dtype), MK_FIELD(out_dtype));
    def_op(m, "linear_quant_swiglu", &mk_linear_quant_swiglu, MK_FIELD(x),
           MK_MEMBER(linear_quant, "w", w), MK_MEMBER(linear_quant, "up", up),
           MK_FIELD(norm_weight), MK_FIELD(out), MK_MEMBER(linear_quant, "workspace", workspace),
           MK_MEMBER(linear_quant, "workspace_bytes", workspace_bytes), MK_FIELD(x_stride),
           MK_FIELD(out_stride), MK_FIELD(m), MK_FIELD(n), MK_FIELD(k), MK_FIELD(eps),
           MK_FIELD(dtype));
#undef MK_FIELD
#define MK_FIELD(field) MK_MEMBER(qkv_rope_append_quant, #field, qkv.field)
    def_op(
        m, "qkv_rope_append_quant", &mk_qkv_rope_append_quant, MK_FIELD(x),
        MK_MEMBER(qkv_rope_append_quant, "wq", w[0]), MK_MEMBER(qkv_rope_append_quant, "wk", w[1]),
        MK_MEMBER(qkv_rope_append_quant, "wv", w[2]), MK_FIELD(norm_weight), MK_FIELD(q),
        MK_FIELD(k_cache), MK_FIELD(v_cache), MK_FIELD(slots),
        MK_MEMBER(qkv_rope_append_quant, "workspace", workspace),
        MK_MEMBER(qkv_rope_append_quant, "workspace_bytes", workspace_bytes), MK_FIELD(x_stride),
        MK_FIELD(q_stride), MK_FIELD(q_head_stride), MK_FIELD(cache_page_stride),
        MK_FIELD(cache_stride), MK_FIELD(cache_head_stride), MK_FIELD(tokens), MK_FIELD(hidden),
        MK_FIELD(num_q_heads), MK_FIELD(num_kv_heads), MK_FIELD(head_dim), MK_FIELD(num_pages),
        MK_FIELD(page_size), MK_FIELD(eps), MK_FIELD(slots_dtype), MK_FIELD(dtype), MK_FIELD(rope));
#undef MK_FIELD
#define MK_FIELD(field) MK_MEMBER(embedding_quant, #field, embedding.field)
    def_op(m, "embedding_quant", &mk_embedding_quant, MK_FIELD(ids),
           MK_MEMBER(embedding_quant, "table", table), MK_FIELD(out), MK_FIELD(out_stride),
           MK_FIELD(tokens), MK_FIELD(vocab), MK_FIELD(hidden), MK_FIELD(ids_dtype),
           MK_FIELD(dtype));
#undef MK_FIELD
#undef MK_MEMBER
    def_cpu_linear(m, &check);
    def_cpu_linear_quant(m, &check);
    def_cpu_ops(m, &check);
    def_recording(m, &check);
    def_quant_pack(m, &check);
}
