// mk_cpu_rms_norm, mk_cpu_silu_and_mul, mk_cpu_embedding, mk_cpu_rope_append: checks, and rows
// handed out to threads.
#include "cpu/rows.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "cpu/chunks.h"
#include "cpu/isa.h"
#include "rope/rope_plan.h"

namespace mk::cpu {
namespace {

constexpr IsaTable<RowKernels> kRows = MK_ISA_TABLE(kRows);

// Elements of a chunk: a few microseconds. Below two chunks, waking a thread takes longer.
constexpr int64_t kChunkElements = 16 << 10;

template <class Params>
mk_status run_rows(void (*const RowKernels::*kernel)(const Params&, int64_t, int64_t),
                   const Params& params, const mk_cpu_options& options, int64_t rows,
                   int64_t row_elements) {
    int isa = 0;
    MK_TRY(find_isa(options.isa, &isa));
    const auto run = kRows[isa].*kernel;
    const int64_t step = std::max<int64_t>(kChunkElements / std::max<int64_t>(row_elements, 1), 1);
    const int threads = rows * row_elements < 2 * kChunkElements ? 1 : options.num_threads;
    for_chunks(threads, ceil_div(rows, step), 0, [&](int64_t chunk, void*) {
        run(params, chunk * step, std::min(rows, (chunk + 1) * step));
    });
    return MK_OK;
}

mk_status check(const mk_rms_norm_params& p) {
    MK_TRY(check_cpu_dtype(p.dtype));
    MK_TRY(check_size("rows", p.rows, 0, INT32_MAX));
    MK_TRY(check_size("hidden", p.hidden, 1, 1 << 20));
    if (p.rows == 0) return MK_OK;
    MK_TRY(check_pointer("weight", p.weight, p.dtype));
    MK_TRY(check_rows("x", p.x, p.x_stride, p.rows, p.hidden, p.dtype));
    if (p.residual) {
        MK_TRY(check_rows("residual", p.residual, p.residual_stride, p.rows, p.hidden, p.dtype));
    }
    return check_rows("out", p.out, p.out_stride, p.rows, p.hidden, p.dtype);
}

mk_status check(const mk_silu_and_mul_params& p) {
    MK_TRY(check_cpu_dtype(p.dtype));
    MK_TRY(check_size("rows", p.rows, 0, INT32_MAX));
    MK_TRY(check_size("size", p.size, 1, 1 << 24));
    MK_TRY(check_rows("gate_up", p.gate_up, p.gate_up_stride, p.rows, 2 * p.size, p.dtype));
    return check_rows("out", p.out, p.out_stride, p.rows, p.size, p.dtype);
}

// Every index lies in low ... high-1.
mk_status check_range(const char* name, const void* indices, int32_t dtype, int64_t count,
                      int64_t low, int64_t high) {
    int64_t smallest = INT64_MAX, largest = INT64_MIN;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t index = index_at(indices, dtype, i);
        smallest = std::min(smallest, index);
        largest = std::max(largest, index);
    }
    MK_REQUIRE(count == 0 || (low <= smallest && largest < high), MK_ERR_VALUE,
               "%s must lie in %lld..%lld, got %lld..%lld", name, static_cast<long long>(low),
               static_cast<long long>(high - 1), static_cast<long long>(smallest),
               static_cast<long long>(largest));
    return MK_OK;
}

mk_status check(const mk_embedding_params& p) {
    MK_TRY(check_cpu_dtype(p.dtype));
    MK_TRY(check_size("tokens", p.tokens, 0, INT32_MAX));
    MK_TRY(check_size("vocab", p.vocab, 0, INT32_MAX));
    MK_TRY(check_size("hidden", p.hidden, 0, INT32_MAX));
    MK_TRY(check_indices("ids", p.ids, p.tokens, p.ids_dtype));
    MK_TRY(check_range("ids", p.ids, p.ids_dtype, p.tokens, 0, p.vocab));
    if (p.hidden == 0) return MK_OK;
    MK_TRY(check_rows("table", p.table, p.table_stride, p.vocab, p.hidden, p.dtype));
    return check_rows("out", p.out, p.out_stride, p.tokens, p.hidden, p.dtype);
}

// A tensor [count, heads, head_dim].
mk_status check_heads(const char* name, const void* pointer, int64_t stride, int64_t head_stride,
                      int32_t count, int32_t heads, const mk_cpu_rope_append_params& p) {
    MK_TRY(check_stride((std::string(name) + "_head").c_str(), head_stride, heads, p.head_dim));
    return check_rows(name, pointer, stride, count, p.head_dim, p.dtype);
}

mk_status check(const mk_cpu_rope_append_params& p) {
    MK_TRY(check_cpu_dtype(p.dtype));
    MK_TRY(check_size("tokens", p.tokens, 0, INT32_MAX));
    MK_TRY(check_size("num_q_heads", p.num_q_heads, 0, 1024));
    MK_TRY(check_size("num_kv_heads", p.num_kv_heads, 0, 1024));
    MK_TRY(check_size("head_dim", p.head_dim, 1, kMaxCpuHeadDim));
    MK_REQUIRE(p.pair_order == 0 || p.pair_order == 1, MK_ERR_VALUE,
               "pair_order must be 0 or 1, got %d", p.pair_order);
    MK_TRY(check_rope(p.rope, p.tokens, p.head_dim));
    if (p.tokens == 0) return MK_OK;
    MK_TRY(check_pointer("rope.cos", p.rope.cos, MK_F32));
    MK_TRY(check_range("rope.positions", p.rope.positions, p.rope.positions_dtype, p.tokens, 0,
                       p.rope.max_position));
    const int32_t tokens = p.tokens, q_heads = p.num_q_heads, heads = p.num_kv_heads;
    if (q_heads) {
        MK_TRY(check_heads("q", p.q, p.q_stride, p.q_head_stride, tokens, q_heads, p));
        MK_TRY(
            check_heads("q_out", p.q_out, p.q_out_stride, p.q_out_head_stride, tokens, q_heads, p));
    }
    if (heads == 0) return MK_OK;
    MK_TRY(check_heads("k", p.k, p.k_stride, p.k_head_stride, tokens, heads, p));
    MK_TRY(check_heads("v", p.v, p.v_stride, p.v_head_stride, tokens, heads, p));
    MK_TRY(check_size("num_pages", p.num_pages, 0, INT32_MAX));
    MK_TRY(check_size("page_size", p.page_size, 1, INT32_MAX));
    for (const auto& [name, cache] : {std::pair{"k_cache", p.k_cache}, {"v_cache", p.v_cache}}) {
        if (p.num_pages == 0) break;
        MK_TRY(
            check_heads(name, cache, p.cache_stride, p.cache_head_stride, p.page_size, heads, p));
        MK_TRY(check_stride("cache_page", p.cache_page_stride, p.num_pages, p.head_dim));
    }
    MK_TRY(check_indices("slots", p.slots, p.tokens, p.slots_dtype));
    return check_range("slots", p.slots, p.slots_dtype, p.tokens, INT64_MIN,
                       static_cast<int64_t>(p.num_pages) * p.page_size);
}

}  // namespace
}  // namespace mk::cpu

using namespace mk;
using mk::cpu::RowKernels;

extern "C" mk_status mk_cpu_rms_norm(const mk_rms_norm_params* params,
                                     const mk_cpu_options* options) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(cpu::check_options(options));
    MK_TRY(cpu::check(*params));
    return cpu::run_rows(&RowKernels::rms_norm, *params, *options, params->rows, params->hidden);
}

extern "C" mk_status mk_cpu_silu_and_mul(const mk_silu_and_mul_params* params,
                                         const mk_cpu_options* options) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(cpu::check_options(options));
    MK_TRY(cpu::check(*params));
    return cpu::run_rows(&RowKernels::silu_and_mul, *params, *options, params->rows,
                         4 * int64_t{params->size});
}

extern "C" mk_status mk_cpu_embedding(const mk_embedding_params* params,
                                      const mk_cpu_options* options) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(cpu::check_options(options));
    MK_TRY(cpu::check(*params));
    const mk_embedding_params& p = *params;
    const int64_t bytes = dtype_bytes(p.dtype);
    for (int64_t t = 0; t < p.tokens; ++t) {
        const int64_t row = cpu::index_at(p.ids, p.ids_dtype, t);
        std::memcpy(static_cast<char*>(p.out) + t * p.out_stride * bytes,
                    static_cast<const char*>(p.table) + row * p.table_stride * bytes,
                    p.hidden * bytes);
    }
    return MK_OK;
}

extern "C" mk_status mk_cpu_rope_append(const mk_cpu_rope_append_params* params,
                                        const mk_cpu_options* options) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(cpu::check_options(options));
    MK_TRY(cpu::check(*params));
    const mk_cpu_rope_append_params& p = *params;
    return cpu::run_rows(&RowKernels::rope_append, p, *options, p.tokens,
                         int64_t{p.num_q_heads + 2 * p.num_kv_heads} * p.head_dim);
}
