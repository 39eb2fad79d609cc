// CPU ops with the structs of the GPU's, for Python. Included by native.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include "minitron_kernels.h"
#include "python/fields.h"
#include "python/recording.h"

// Defines `name`, whose arguments are these fields (the others stay 0) and those of the options.
// `check` raises the exception that stands for a status.
template <class Params, class... T>
void def_cpu_op(pybind11::module_& m, const char* name, void (*check)(mk_status),
                mk_status (*run)(const Params*, const mk_cpu_options*),
                Field<Params, T>... fields) {
    namespace py = pybind11;
    using namespace py::literals;
    m.def(
        name,
        [=](const Argument<T>&... values, int32_t num_threads, int32_t isa) {
            Params params{};
            ((fields.at(params) = convert<T>(values)), ...);
            const mk_cpu_options options{num_threads, isa};
            check(CpuRecording::run([=] { return run(&params, &options); }));
        },
        py::arg(fields.name)..., "num_threads"_a, "isa"_a = +MK_CPU_AUTO);
}

inline void def_cpu_ops(pybind11::module_& m, void (*check)(mk_status)) {
#define MK_MEMBER(op, name, member)                                                         \
    Field<mk_##op##_params, std::remove_reference_t<decltype(mk_##op##_params{}.member)>> { \
        name, [](mk_##op##_params& p) -> auto& { return p.member; }                         \
    }
#define MK_FIELD(op, field) MK_MEMBER(op, #field, field)
#define MK_ROPE(field) MK_MEMBER(cpu_rope_append, #field, rope.field)
    def_cpu_op(m, "cpu_rms_norm", check, &mk_cpu_rms_norm, MK_FIELD(rms_norm, x),
               MK_FIELD(rms_norm, residual), MK_FIELD(rms_norm, weight), MK_FIELD(rms_norm, out),
               MK_FIELD(rms_norm, x_stride), MK_FIELD(rms_norm, residual_stride),
               MK_FIELD(rms_norm, out_stride), MK_FIELD(rms_norm, rows), MK_FIELD(rms_norm, hidden),
               MK_FIELD(rms_norm, eps), MK_FIELD(rms_norm, dtype));
    def_cpu_op(m, "cpu_silu_and_mul", check, &mk_cpu_silu_and_mul, MK_FIELD(silu_and_mul, gate_up),
               MK_FIELD(silu_and_mul, out), MK_FIELD(silu_and_mul, gate_up_stride),
               MK_FIELD(silu_and_mul, out_stride), MK_FIELD(silu_and_mul, rows),
               MK_FIELD(silu_and_mul, size), MK_FIELD(silu_and_mul, dtype));
    def_cpu_op(
        m, "cpu_rope_append", check, &mk_cpu_rope_append, MK_FIELD(cpu_rope_append, q),
        MK_FIELD(cpu_rope_append, q_out), MK_FIELD(cpu_rope_append, k),
        MK_FIELD(cpu_rope_append, v), MK_FIELD(cpu_rope_append, k_cache),
        MK_FIELD(cpu_rope_append, v_cache), MK_FIELD(cpu_rope_append, slots),
        MK_FIELD(cpu_rope_append, q_stride), MK_FIELD(cpu_rope_append, q_head_stride),
        MK_FIELD(cpu_rope_append, q_out_stride), MK_FIELD(cpu_rope_append, q_out_head_stride),
        MK_FIELD(cpu_rope_append, k_stride), MK_FIELD(cpu_rope_append, k_head_stride),
        MK_FIELD(cpu_rope_append, v_stride), MK_FIELD(cpu_rope_append, v_head_stride),
        MK_FIELD(cpu_rope_append, cache_page_stride), MK_FIELD(cpu_rope_append, cache_stride),
        MK_FIELD(cpu_rope_append, cache_head_stride), MK_FIELD(cpu_rope_append, tokens),
        MK_FIELD(cpu_rope_append, num_q_heads), MK_FIELD(cpu_rope_append, num_kv_heads),
        MK_FIELD(cpu_rope_append, head_dim), MK_FIELD(cpu_rope_append, num_pages),
        MK_FIELD(cpu_rope_append, page_size), MK_FIELD(cpu_rope_append, slots_dtype),
        MK_FIELD(cpu_rope_append, dtype), MK_FIELD(cpu_rope_append, pair_order), MK_ROPE(cos),
        MK_ROPE(sin), MK_ROPE(table_stride), MK_ROPE(positions), MK_ROPE(positions_dtype),
        MK_ROPE(max_position), MK_ROPE(rotary_dim), MK_ROPE(interleaved));
    def_cpu_op(m, "cpu_attention", check, &mk_cpu_attention, MK_FIELD(attention, q),
               MK_FIELD(attention, k), MK_FIELD(attention, v), MK_FIELD(attention, out),
               MK_FIELD(attention, lse), MK_FIELD(attention, cu_seqlens_q),
               MK_FIELD(attention, cu_seqlens_k), MK_FIELD(attention, seqlens_k),
               MK_FIELD(attention, block_table), MK_FIELD(attention, q_stride),
               MK_FIELD(attention, q_head_stride), MK_FIELD(attention, k_page_stride),
               MK_FIELD(attention, k_stride), MK_FIELD(attention, k_head_stride),
               MK_FIELD(attention, v_page_stride), MK_FIELD(attention, v_stride),
               MK_FIELD(attention, v_head_stride), MK_FIELD(attention, out_stride),
               MK_FIELD(attention, out_head_stride), MK_FIELD(attention, lse_stride),
               MK_FIELD(attention, block_table_stride), MK_FIELD(attention, tokens_q),
               MK_FIELD(attention, tokens_k), MK_FIELD(attention, batch),
               MK_FIELD(attention, num_q_heads), MK_FIELD(attention, num_kv_heads),
               MK_FIELD(attention, head_dim), MK_FIELD(attention, num_pages),
               MK_FIELD(attention, page_size), MK_FIELD(attention, max_pages),
               MK_FIELD(attention, max_seqlen_q), MK_FIELD(attention, skip_seqlen_q),
               MK_FIELD(attention, seqlens_k_add), MK_FIELD(attention, causal),
               MK_FIELD(attention, window), MK_FIELD(attention, softmax_scale),
               MK_FIELD(attention, dtype));
    def_cpu_op(m, "cpu_embedding", check, &mk_cpu_embedding, MK_FIELD(embedding, ids),
               MK_FIELD(embedding, table), MK_FIELD(embedding, out),
               MK_FIELD(embedding, table_stride), MK_FIELD(embedding, out_stride),
               MK_FIELD(embedding, tokens), MK_FIELD(embedding, vocab), MK_FIELD(embedding, hidden),
               MK_FIELD(embedding, ids_dtype), MK_FIELD(embedding, dtype));
#undef MK_ROPE
#undef MK_FIELD
#undef MK_MEMBER
}
