// Plans of the ops with quantised weights: mk_linear_quant, mk_linear_quant_swiglu,
// mk_qkv_rope_append_quant, mk_quant_prepare_x and mk_embedding_quant.
#include "quant/quant_plan.h"

#include <algorithm>

#include "common/rows_plan.h"
#include "linear/linear_plan.h"
#include "quant/quant_decode_plan.h"
#include "quant/quant_gemm_plan.h"

namespace mk {

const char* quant_type_name(int32_t type) {
    switch (type) {
        case MK_Q4_0:
            return "Q4_0";
        case MK_Q4_1:
            return "Q4_1";
        case MK_Q5_0:
            return "Q5_0";
        case MK_Q5_1:
            return "Q5_1";
        case MK_Q8_0:
            return "Q8_0";
        case MK_Q2_K:
            return "Q2_K";
        case MK_Q3_K:
            return "Q3_K";
        case MK_Q4_K:
            return "Q4_K";
        case MK_Q5_K:
            return "Q5_K";
        case MK_Q6_K:
            return "Q6_K";
    }
    return "invalid";
}

mk_status check_quant_type(const char* name, int32_t type, const char* k_name, int32_t k) {
    const int32_t block = quant_format(type).block_k;
    MK_REQUIRE(block, MK_ERR_VALUE,
               "%s must be one of mk_quant_type (Q4_0 2, Q4_1 3, Q5_0 6, Q5_1 7, Q8_0 8, Q2_K 10, "
               "Q3_K 11, Q4_K 12, Q5_K 13, Q6_K 14), got %d",
               name, type);
    MK_REQUIRE(k % block == 0, MK_ERR_SHAPE,
               "%s must be a multiple of %d, the block of %s = %s, got %d", k_name, block, name,
               quant_type_name(type), k);
    return MK_OK;
}

namespace {

// A packed matrix of `rows` x `k`, whose tiles are read when `is_read`.
mk_status check_matrix(const std::string& name, const mk_quant_matrix& w, int32_t rows,
                       const char* k_name, int32_t k, bool is_read) {
    MK_TRY(check_quant_type((name + ".type").c_str(), w.type, k_name, k));
    MK_REQUIRE(w.rows == rows, MK_ERR_SHAPE, "%s.rows must be %d, got %d", name.c_str(), rows,
               w.rows);
    if (!is_read) return MK_OK;
    MK_REQUIRE(w.tiles, MK_ERR_NULL, "%s.tiles is NULL", name.c_str());
    MK_REQUIRE(is_16_byte(w.tiles, MK_F16, {}), MK_ERR_ALIGNMENT,
               "%s.tiles = %p is not aligned to 16 bytes", name.c_str(), w.tiles);
    return MK_OK;
}

mk_status check_no_dense(const char* name, const void* weights, const char* matrix) {
    MK_REQUIRE(!weights, MK_ERR_VALUE, "%s must be NULL: the weights are %s.tiles", name, matrix);
    return MK_OK;
}

// Bytes of what mk_quant_prepare_x writes for m rows of k.
int64_t workspace_bytes(int32_t m, int32_t k) {
    if (m <= MK_QUANT_MAX_DECODE_M) return 0;
    return prepared_bytes(m, k);
}

mk_status check_workspace(const void* workspace, int64_t bytes, int64_t least) {
    if (least == 0) return MK_OK;
    MK_REQUIRE(least <= kPreparedMaxBytes, MK_ERR_SHAPE,
               "rows and columns of x are too many: %lld bytes of workspace, at most 2^36",
               static_cast<long long>(least));
    MK_REQUIRE(workspace, MK_ERR_NULL, "workspace is NULL");
    MK_REQUIRE(is_16_byte(workspace, MK_F16, {}), MK_ERR_ALIGNMENT,
               "workspace = %p is not aligned to 16 bytes", workspace);
    MK_REQUIRE(bytes >= least, MK_ERR_VALUE, "workspace_bytes must be at least %lld, got %lld",
               static_cast<long long>(least), static_cast<long long>(bytes));
    return MK_OK;
}

Product make_product(const mk_linear_params& p) {
    const bool is_aligned =
        is_16_byte(p.x, p.dtype, {p.x_stride}) && is_16_byte(p.norm_weight, p.dtype, {});
    return {p.x, nullptr, p.norm_weight, p.x_stride, 0, p.m, p.n, p.k, p.eps, is_aligned};
}

Product make_product(const mk_qkv_rope_append_params& p) {
    const bool is_aligned =
        is_16_byte(p.x, p.dtype, {p.x_stride}) && is_16_byte(p.norm_weight, p.dtype, {});
    const int32_t n = (p.num_q_heads + 2 * p.num_kv_heads) * p.head_dim;
    return {p.x, nullptr, p.norm_weight, p.x_stride, 0, p.tokens, n, p.hidden, p.eps, is_aligned};
}

std::string product_line(const char* op, int32_t dtype, const Product& a, const QuantMatrices& w) {
    std::string line = std::string(op) + " " + dtype_name(dtype);
    for (int i = 0; i < w.count; ++i) line += std::string(" ") + quant_type_name(w.w[i].type);
    return line + " m " + std::to_string(a.m) + " n " + std::to_string(a.n) + " k " +
           std::to_string(a.k) + (a.norm_weight ? " norm" : "");
}

struct LinearQuant {
    using Params = mk_linear_quant_params;

    static constexpr const char* kName = "linear_quant";
    static constexpr EpilogueKind kEpilogue = EpilogueKind::kPlain;
    static const mk_linear_params& inner(const Params& p) { return p.linear; }
    static QuantMatrices matrices(const Params& p) { return {{p.w}, 1, false}; }

    static mk_status check(const Params& p) {
        MK_TRY(check_product(p));
        MK_REQUIRE(!has_up(p), MK_ERR_VALUE,
                   "up.tiles, up.type and up.rows must be 0: mk_linear_quant_swiglu has them");
        MK_TRY(check_matrix("w", p.w, p.linear.n, "k", p.linear.k, p.linear.m > 0));
        return check_linear_out(p.linear);
    }

    // All but the matrices and the output.
    static mk_status check_product(const Params& p) {
        const mk_linear_params& a = p.linear;
        MK_TRY(check_size("n", a.n, 1, 1 << 24));
        MK_TRY(check_inputs(make_product(a), "m", "k", a.dtype, INT32_MAX));
        MK_TRY(check_no_dense("linear.w", a.w, "w"));
        return check_workspace(p.workspace, p.workspace_bytes, workspace_bytes(a.m, a.k));
    }

    static bool has_up(const Params& p) { return p.up.tiles || p.up.type || p.up.rows; }
};

struct LinearQuantSwiglu {
    using Params = mk_linear_quant_params;

    static constexpr const char* kName = "linear_quant_swiglu";
    static constexpr EpilogueKind kEpilogue = EpilogueKind::kSwiglu;
    static const mk_linear_params& inner(const Params& p) { return p.linear; }
    static QuantMatrices matrices(const Params& p) {
        if (LinearQuant::has_up(p)) return {{p.w, p.up}, 2, true};
        return {{p.w}, 1, false};
    }

    static mk_status check(const Params& p) {
        MK_TRY(LinearQuant::check_product(p));
        const mk_linear_params& a = p.linear;
        MK_TRY(check_swiglu_out(a));
        const bool has_up = LinearQuant::has_up(p);
        MK_TRY(check_matrix("w", p.w, has_up ? a.n / 2 : a.n, "k", a.k, a.m > 0));
        if (!has_up) return MK_OK;
        return check_matrix("up", p.up, a.n / 2, "k", a.k, a.m > 0);
    }
};

struct QkvRopeAppendQuant {
    using Params = mk_qkv_rope_append_quant_params;

    static constexpr const char* kName = "qkv_rope_append_quant";
    static constexpr EpilogueKind kEpilogue = EpilogueKind::kQkv;
    static const mk_qkv_rope_append_params& inner(const Params& p) { return p.qkv; }
    static QuantMatrices matrices(const Params& p) { return {{p.w[0], p.w[1], p.w[2]}, 3, false}; }

    static mk_status check(const Params& p) {
        const mk_qkv_rope_append_params& a = p.qkv;
        MK_TRY(check_qkv_sizes(a));
        MK_TRY(check_inputs(make_product(a), "tokens", "hidden", a.dtype, INT32_MAX));
        MK_TRY(check_no_dense("qkv.w", a.w, "w[0...2]"));
        for (int i = 0; i < 3; ++i) {
            const int32_t heads = i == 0 ? a.num_q_heads : a.num_kv_heads;
            MK_TRY(check_matrix("w[" + std::to_string(i) + "]", p.w[i], heads * a.head_dim,
                                "hidden", a.hidden, a.tokens > 0));
        }
        MK_TRY(
            check_workspace(p.workspace, p.workspace_bytes, workspace_bytes(a.tokens, a.hidden)));
        return check_qkv_out(a);
    }
};

struct QuantPrepareX {
    using Params = mk_quant_prepare_x_params;

    static mk_status check(const Params& p) {
        MK_TRY(check_inputs(product(p), "m", "k", p.dtype, INT32_MAX));
        MK_REQUIRE(p.k % 32 == 0, MK_ERR_SHAPE, "k must be a multiple of 32, got %d", p.k);
        return check_workspace(p.workspace, p.workspace_bytes, workspace_bytes(p.m, p.k));
    }

    // Up to MK_QUANT_MAX_DECODE_M rows nobody reads what it would leave.
    static mk_plan plan(const Params& p, const mk_device& device) {
        mk_plan plan = plan_quant_prepare(product(p), p.dtype, device);
        if (p.m <= MK_QUANT_MAX_DECODE_M) plan.grid[0] = 0;
        return plan;
    }

    static QuantPrepareArgs args(const Params& p) {
        return {product(p), prepared_x(p.workspace, p.m, p.k)};
    }

    static std::string shape(const Params& p) {
        return std::string("quant_prepare_x ") + dtype_name(p.dtype) + " m " + std::to_string(p.m) +
               " k " + std::to_string(p.k) + (p.norm_weight ? " norm" : "");
    }

    static Product product(const Params& p) {
        const bool is_aligned =
            is_16_byte(p.x, p.dtype, {p.x_stride}) && is_16_byte(p.norm_weight, p.dtype, {});
        return {p.x, nullptr, p.norm_weight, p.x_stride, 0, p.m, 0, p.k, p.eps, is_aligned};
    }
};

struct EmbeddingQuant {
    using Params = mk_embedding_quant_params;

    static mk_status check(const Params& p) {
        const mk_embedding_params& a = p.embedding;
        MK_TRY(check_activation_dtype(a.dtype));
        MK_TRY(check_size("tokens", a.tokens, 0, INT32_MAX));
        MK_TRY(check_size("hidden", a.hidden, 1, kRowMaxElements));
        MK_TRY(check_size("vocab", a.vocab, 1, 1 << 24));
        MK_TRY(check_indices("ids", a.ids, a.tokens, a.ids_dtype));
        MK_TRY(check_no_dense("embedding.table", a.table, "table"));
        MK_TRY(check_matrix("table", p.table, a.vocab, "hidden", a.hidden, a.tokens > 0));
        return check_rows("out", a.out, a.out_stride, a.tokens, a.hidden, a.dtype);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        mk_plan plan = make_plan("embedding_quant", device, dtype_name(p.embedding.dtype));
        const int32_t threads = 4 * quant_row_tiles(p.embedding.hidden);
        plan.grid[0] = p.embedding.tokens;
        plan.grid[1] = ceil_div(threads, kRowMaxThreads);
        plan.block[0] = std::min(32 * ceil_div(threads, 32), kRowMaxThreads);
        return plan;
    }

    static const Params& args(const Params& p) { return p; }

    static std::string shape(const Params& p) {
        const mk_embedding_params& a = p.embedding;
        return std::string("embedding_quant ") + quant_type_name(p.table.type) + " " +
               dtype_name(a.dtype) + " tokens " + std::to_string(a.tokens) + " hidden " +
               std::to_string(a.hidden);
    }
};

template <class Op>
mk_plan plan_product(const typename Op::Params& p, const mk_device& device) {
    const Product a = make_product(Op::inner(p));
    if (a.m <= MK_QUANT_MAX_DECODE_M) return plan_quant_decode(a, Op::matrices(p), device);
    return plan_quant_gemm(a.m, Op::matrices(p), device);
}

template <class Op>
std::string shape_of(const void* params) {
    const auto& p = *static_cast<const typename Op::Params*>(params);
    return product_line(Op::kName, Op::inner(p).dtype, make_product(Op::inner(p)), Op::matrices(p));
}

// More than MK_QUANT_MAX_DECODE_M rows: two launches.
template <class Op>
mk_status run_gemm(const typename Op::Params& p, const Device& device, void* stream) {
    const auto& inner = Op::inner(p);
    const Product a = make_product(inner);
    const QuantPrepareArgs prepare{a, prepared_x(p.workspace, a.m, a.k)};
    MK_TRY(launch(plan_quant_prepare(a, inner.dtype, device.info), device, &prepare, stream,
                  shape_of<Op>, &p));
    QuantGemmArgs args = quant_gemm_args(a, Op::matrices(p), p.workspace, device.info);
    args.to = outputs_of(Op::kEpilogue, inner);
    return launch(plan_product<Op>(p, device.info), device, &args, stream, shape_of<Op>, &p);
}

template <class Op>
mk_status check_product(const typename Op::Params* params) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    return Op::check(*params);
}

template <class Op>
mk_status run_product(const typename Op::Params* params, void* stream) {
    MK_TRY(check_product<Op>(params));
    const Device* device = nullptr;
    MK_TRY(current_device(&device));
    const auto& inner = Op::inner(*params);
    const Product a = make_product(inner);
    if (a.m > MK_QUANT_MAX_DECODE_M) return run_gemm<Op>(*params, *device, stream);
    const QuantDecodeArgs args =
        quant_decode_args(a, Op::matrices(*params), outputs_of(Op::kEpilogue, inner), device->info);
    return launch(plan_product<Op>(*params, device->info), *device, &args, stream, shape_of<Op>,
                  params);
}

template <class Op>
mk_status tell_plan(const typename Op::Params* params, const mk_device* device, mk_plan* plan) {
    MK_REQUIRE(plan, MK_ERR_NULL, "plan is NULL");
    MK_TRY(check_device(device));
    MK_TRY(check_product<Op>(params));
    *plan = plan_product<Op>(*params, *device);
    return MK_OK;
}

mk_status tell_bytes(const void* params, int32_t m, int32_t k, int64_t* bytes) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_REQUIRE(bytes, MK_ERR_NULL, "bytes is NULL");
    MK_TRY(check_size("m", m, 0, 1 << 30));
    MK_TRY(check_size("k", k, 1, 1 << 20));
    *bytes = workspace_bytes(m, k);
    return MK_OK;
}

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_linear_quant(const mk_linear_quant_params* params, void* stream) {
    return mk::run_product<mk::LinearQuant>(params, stream);
}

mk_status mk_linear_quant_plan(const mk_linear_quant_params* params, const mk_device* device,
                               mk_plan* plan) {
    return mk::tell_plan<mk::LinearQuant>(params, device, plan);
}

mk_status mk_linear_quant_swiglu(const mk_linear_quant_params* params, void* stream) {
    return mk::run_product<mk::LinearQuantSwiglu>(params, stream);
}

mk_status mk_linear_quant_swiglu_plan(const mk_linear_quant_params* params, const mk_device* device,
                                      mk_plan* plan) {
    return mk::tell_plan<mk::LinearQuantSwiglu>(params, device, plan);
}

mk_status mk_linear_quant_workspace_bytes(const mk_linear_quant_params* params, int64_t* bytes) {
    return mk::tell_bytes(params, params ? params->linear.m : 0, params ? params->linear.k : 0,
                          bytes);
}

mk_status mk_qkv_rope_append_quant(const mk_qkv_rope_append_quant_params* params, void* stream) {
    return mk::run_product<mk::QkvRopeAppendQuant>(params, stream);
}

mk_status mk_qkv_rope_append_quant_plan(const mk_qkv_rope_append_quant_params* params,
                                        const mk_device* device, mk_plan* plan) {
    return mk::tell_plan<mk::QkvRopeAppendQuant>(params, device, plan);
}

mk_status mk_qkv_rope_append_quant_workspace_bytes(const mk_qkv_rope_append_quant_params* params,
                                                   int64_t* bytes) {
    return mk::tell_bytes(params, params ? params->qkv.tokens : 0, params ? params->qkv.hidden : 0,
                          bytes);
}

mk_status mk_quant_prepare_x(const mk_quant_prepare_x_params* params, void* stream) {
    return mk::run<mk::QuantPrepareX>(params, stream);
}

mk_status mk_quant_prepare_x_plan(const mk_quant_prepare_x_params* params, const mk_device* device,
                                  mk_plan* plan) {
    return mk::plan<mk::QuantPrepareX>(params, device, plan);
}

mk_status mk_embedding_quant(const mk_embedding_quant_params* params, void* stream) {
    return mk::run<mk::EmbeddingQuant>(params, stream);
}

mk_status mk_embedding_quant_plan(const mk_embedding_quant_params* params, const mk_device* device,
                                  mk_plan* plan) {
    return mk::plan<mk::EmbeddingQuant>(params, device, plan);
}

}  // extern "C"
