#include "rope/rope_plan.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "rope/rope_tiles.h"

namespace mk {

mk_status check_rope(const mk_rope& rope, int32_t tokens, int32_t head_dim) {
    MK_REQUIRE(rope.rotary_dim % 2 == 0 && rope.rotary_dim >= 2 && rope.rotary_dim <= head_dim,
               MK_ERR_SHAPE, "rope.rotary_dim must be even, 2 ... head_dim = %d, got %d", head_dim,
               rope.rotary_dim);
    MK_REQUIRE(rope.interleaved == 0 || rope.interleaved == 1, MK_ERR_VALUE,
               "rope.interleaved must be 0 or 1, got %d", rope.interleaved);
    MK_TRY(check_size("rope.max_position", rope.max_position, 1, 1 << 24));
    MK_TRY(check_indices("rope.positions", rope.positions, tokens, rope.positions_dtype));
    if (!rope.cos && !rope.sin) {
        MK_REQUIRE(rope.theta > 1 && std::isfinite(rope.theta), MK_ERR_VALUE,
                   "rope.theta must be finite and above 1 (there are no tables), got %g",
                   static_cast<double>(rope.theta));
        return MK_OK;
    }
    if (tokens == 0) return MK_OK;
    MK_TRY(check_pointer("rope.cos", rope.cos, MK_F32));
    MK_TRY(check_pointer("rope.sin", rope.sin, MK_F32));
    return check_stride("rope.table", rope.table_stride, rope.max_position, rope.rotary_dim / 2);
}

namespace {

// A tensor [tokens, heads, head_dim].
mk_status check_heads(const char* name, const void* pointer, int64_t stride, int64_t head_stride,
                      int32_t tokens, int32_t heads, int32_t head_dim, int32_t dtype) {
    if (tokens == 0 || heads == 0) return MK_OK;
    MK_TRY(check_stride((std::string(name) + "_head").c_str(), head_stride, heads, head_dim));
    return check_rows(name, pointer, stride, tokens, head_dim, dtype);
}

bool is_aligned(const mk_rope& rope, int32_t head_dim) {
    return head_dim % 16 == 0 && rope.rotary_dim % 16 == 0 &&
           is_16_byte(rope.cos, MK_F32, {rope.table_stride}) &&
           is_16_byte(rope.sin, MK_F32, {rope.table_stride});
}

void set_grid(const mk_rope& rope, int32_t tokens, int32_t heads, int32_t head_dim,
              const mk_device& device, mk_plan* plan) {
    const int32_t chunks = ceil_div(rope.rotary_dim, 16) + ceil_div(head_dim - rope.rotary_dim, 16);
    const int32_t heads_per_block = std::clamp(kRopeMaxThreads / 2 / chunks, 1, std::max(heads, 1));
    // With few tokens one head per thread, which spreads them over the SMs.
    const int32_t per_thread = tokens <= 4 * device.num_sms ? 1 : kRopeHeads;
    plan->grid[0] = heads ? tokens : 0;
    plan->grid[1] = std::max(ceil_div(heads, heads_per_block * per_thread), 1);
    plan->block[0] = chunks;
    plan->block[1] = heads_per_block;
}

template <class Params>
RopeArgs<Params> with_frequencies(const Params& p) {
    RopeArgs<Params> args{p, {}};
    if (!p.rope.cos) {
        for (int i = 0; i < p.rope.rotary_dim / 2; ++i) {
            const double exponent = -2.0 * i / p.rope.rotary_dim;
            args.inv_freq[i] = static_cast<float>(std::pow(p.rope.theta, exponent));
        }
    }
    return args;
}

struct ApplyRope {
    using Params = mk_apply_rope_params;

    static mk_status check(const Params& p) {
        MK_TRY(check_activation_dtype(p.dtype));
        MK_TRY(check_size("tokens", p.tokens, 0, INT32_MAX));
        MK_TRY(check_size("num_q_heads", p.num_q_heads, 0, 1024));
        MK_TRY(check_size("num_k_heads", p.num_k_heads, 0, 1024));
        MK_TRY(check_size("head_dim", p.head_dim, 2, kRopeMaxHeadDim));
        MK_TRY(check_rope(p.rope, p.tokens, p.head_dim));
        const auto check_tensor = [&p](const char* name, const void* pointer, int64_t stride,
                                       int64_t head_stride, int32_t heads) {
            return check_heads(name, pointer, stride, head_stride, p.tokens, heads, p.head_dim,
                               p.dtype);
        };
        MK_TRY(check_tensor("q", p.q, p.q_stride, p.q_head_stride, p.num_q_heads));
        MK_TRY(check_tensor("k", p.k, p.k_stride, p.k_head_stride, p.num_k_heads));
        MK_TRY(check_tensor("q_out", p.q_out, p.q_out_stride, p.q_out_head_stride, p.num_q_heads));
        return check_tensor("k_out", p.k_out, p.k_out_stride, p.k_out_head_stride, p.num_k_heads);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        const bool q_aligned = is_16_byte(p.q, p.dtype, {p.q_stride, p.q_head_stride}) &&
                               is_16_byte(p.q_out, p.dtype, {p.q_out_stride, p.q_out_head_stride});
        const bool k_aligned = is_16_byte(p.k, p.dtype, {p.k_stride, p.k_head_stride}) &&
                               is_16_byte(p.k_out, p.dtype, {p.k_out_stride, p.k_out_head_stride});
        const bool aligned = is_aligned(p.rope, p.head_dim) && (q_aligned || p.num_q_heads == 0) &&
                             (k_aligned || p.num_k_heads == 0);
        mk_plan plan = make_plan("apply_rope", device, dtype_key(p.dtype, aligned));
        set_grid(p.rope, p.tokens, p.num_q_heads + p.num_k_heads, p.head_dim, device, &plan);
        return plan;
    }

    static RopeArgs<Params> args(const Params& p) { return with_frequencies(p); }

    static std::string shape(const Params& p) {
        return std::string("apply_rope ") + dtype_name(p.dtype) + " tokens " +
               std::to_string(p.tokens) + " heads " + std::to_string(p.num_q_heads) + "+" +
               std::to_string(p.num_k_heads) + " head_dim " + std::to_string(p.head_dim) +
               " rotary_dim " + std::to_string(p.rope.rotary_dim);
    }
};

struct RopeAppend {
    using Params = mk_rope_append_params;

    static mk_status check(const Params& p) {
        MK_TRY(check_activation_dtype(p.dtype));
        MK_TRY(check_size("tokens", p.tokens, 0, INT32_MAX));
        MK_TRY(check_size("num_heads", p.num_heads, 1, 1024));
        MK_TRY(check_size("head_dim", p.head_dim, 2, kRopeMaxHeadDim));
        MK_TRY(check_size("num_pages", p.num_pages, 0, INT32_MAX));
        MK_TRY(check_size("page_size", p.page_size, 1, 1 << 20));
        MK_TRY(check_rope(p.rope, p.tokens, p.head_dim));
        MK_TRY(check_indices("slots", p.slots, p.tokens, p.slots_dtype));
        const auto check_tensor = [&p](const char* name, const void* pointer, int64_t stride,
                                       int64_t head_stride) {
            return check_heads(name, pointer, stride, head_stride, p.tokens, p.num_heads,
                               p.head_dim, p.dtype);
        };
        MK_TRY(check_tensor("k", p.k, p.k_stride, p.k_head_stride));
        MK_TRY(check_tensor("v", p.v, p.v_stride, p.v_head_stride));
        if (p.num_pages == 0 || p.tokens == 0) return MK_OK;
        MK_TRY(check_pointer("k_cache", p.k_cache, p.dtype));
        MK_TRY(check_pointer("v_cache", p.v_cache, p.dtype));
        MK_TRY(check_stride("cache_page", p.cache_page_stride, p.num_pages, p.head_dim));
        MK_TRY(check_stride("cache", p.cache_stride, p.page_size, p.head_dim));
        return check_stride("cache_head", p.cache_head_stride, p.num_heads, p.head_dim);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        const auto strides = {p.cache_page_stride, p.cache_stride, p.cache_head_stride};
        const bool aligned = is_aligned(p.rope, p.head_dim) &&
                             is_16_byte(p.k, p.dtype, {p.k_stride, p.k_head_stride}) &&
                             is_16_byte(p.v, p.dtype, {p.v_stride, p.v_head_stride}) &&
                             is_16_byte(p.k_cache, p.dtype, strides) &&
                             is_16_byte(p.v_cache, p.dtype, strides);
        mk_plan plan = make_plan("rope_append", device, dtype_key(p.dtype, aligned));
        set_grid(p.rope, p.tokens, 2 * p.num_heads, p.head_dim, device, &plan);
        return plan;
    }

    static RopeArgs<Params> args(const Params& p) { return with_frequencies(p); }

    static std::string shape(const Params& p) {
        return std::string("rope_append ") + dtype_name(p.dtype) + " tokens " +
               std::to_string(p.tokens) + " heads " + std::to_string(p.num_heads) + " head_dim " +
               std::to_string(p.head_dim) + " page_size " + std::to_string(p.page_size);
    }
};

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_apply_rope(const mk_apply_rope_params* params, void* stream) {
    return mk::run<mk::ApplyRope>(params, stream);
}

mk_status mk_apply_rope_plan(const mk_apply_rope_params* params, const mk_device* device,
                             mk_plan* plan) {
    return mk::plan<mk::ApplyRope>(params, device, plan);
}

mk_status mk_rope_append(const mk_rope_append_params* params, void* stream) {
    return mk::run<mk::RopeAppend>(params, stream);
}

mk_status mk_rope_append_plan(const mk_rope_append_params* params, const mk_device* device,
                              mk_plan* plan) {
    return mk::plan<mk::RopeAppend>(params, device, plan);
}

}  // extern "C"
