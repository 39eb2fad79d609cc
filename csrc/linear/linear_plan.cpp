// Plans of mk_linear, mk_linear_swiglu and mk_qkv_rope_append: one product, three epilogues.
#include "linear/linear_plan.h"

#include <algorithm>
#include <cmath>

#include "linear/linear_gemm_plan.h"
#include "linear/linear_skinny_plan.h"
#include "rope/rope_plan.h"

namespace mk {

mk_status check_inputs(const Product& a, const char* m, const char* k, int32_t dtype,
                       int32_t max_norm_m) {
    MK_TRY(check_activation_dtype(dtype));
    MK_TRY(check_size(m, a.m, 0, 1 << 30));
    MK_TRY(check_size(k, a.k, 1, a.norm_weight ? kMaxNormK : 1 << 20));
    if (a.norm_weight) {
        MK_REQUIRE(a.m <= max_norm_m, MK_ERR_VALUE,
                   "norm_weight must be NULL when %s is above %d, got %s = %d: use mk_rms_norm", m,
                   max_norm_m, m, a.m);
        MK_REQUIRE(a.eps >= 0 && std::isfinite(a.eps), MK_ERR_VALUE,
                   "eps must be finite and not negative, got %g", static_cast<double>(a.eps));
        MK_TRY(check_pointer("norm_weight", a.norm_weight, dtype));
    }
    return check_rows("x", a.x, a.x_stride, a.m, a.k, dtype);
}

mk_status check_linear_out(const mk_linear_params& p) {
    MK_REQUIRE(p.out_dtype == p.dtype || (p.out_dtype == MK_F32 && !p.residual), MK_ERR_DTYPE,
               "out_dtype must be dtype = %d, or MK_F32 (3) without residual, got %d", p.dtype,
               p.out_dtype);
    MK_TRY(check_rows("out", p.out, p.out_stride, p.m, p.n, p.out_dtype));
    if (!p.residual) return MK_OK;
    return check_rows("residual", p.residual, p.residual_stride, p.m, p.n, p.dtype);
}

mk_status check_swiglu_out(const mk_linear_params& p) {
    MK_REQUIRE(p.n % 2 == 0, MK_ERR_SHAPE, "n must be even (gate and up), got %d", p.n);
    MK_REQUIRE(!p.residual, MK_ERR_VALUE, "residual must be NULL: mk_linear has one");
    return check_rows("out", p.out, p.out_stride, p.m, p.n / 2, p.dtype);
}

mk_status check_qkv_sizes(const mk_qkv_rope_append_params& p) {
    MK_TRY(check_size("num_q_heads", p.num_q_heads, 1, 1024));
    MK_TRY(check_size("num_kv_heads", p.num_kv_heads, 1, 1024));
    MK_TRY(check_size("head_dim", p.head_dim, 16, 256));
    MK_REQUIRE(p.head_dim % 16 == 0, MK_ERR_SHAPE, "head_dim must be a multiple of 16, got %d",
               p.head_dim);
    MK_TRY(check_size("num_pages", p.num_pages, 0, INT32_MAX));
    return check_size("page_size", p.page_size, 1, 1 << 20);
}

mk_status check_qkv_out(const mk_qkv_rope_append_params& p) {
    if (p.tokens) MK_TRY(check_pointer("rope.cos", p.rope.cos, MK_F32));
    MK_TRY(check_rope(p.rope, p.tokens, p.head_dim));
    MK_TRY(check_indices("slots", p.slots, p.tokens, p.slots_dtype));
    if (p.tokens == 0) return MK_OK;
    MK_TRY(check_rows("q", p.q, p.q_stride, p.tokens, p.head_dim, p.dtype));
    MK_TRY(check_stride("q_head", p.q_head_stride, p.num_q_heads, p.head_dim));
    if (p.num_pages == 0) return MK_OK;
    MK_TRY(check_pointer("k_cache", p.k_cache, p.dtype));
    MK_TRY(check_pointer("v_cache", p.v_cache, p.dtype));
    MK_TRY(check_stride("cache_page", p.cache_page_stride, p.num_pages, p.head_dim));
    MK_TRY(check_stride("cache", p.cache_stride, p.page_size, p.head_dim));
    return check_stride("cache_head", p.cache_head_stride, p.num_kv_heads, p.head_dim);
}

Outputs outputs_of(EpilogueKind kind, const mk_linear_params& p) {
    Outputs to{kind, p.dtype, {}};
    to.linear = p;
    return to;
}
Outputs outputs_of(EpilogueKind kind, const mk_qkv_rope_append_params& p) {
    Outputs to{kind, p.dtype, {}};
    to.qkv = p;
    return to;
}

namespace {

constexpr int64_t kMaxMapStride = int64_t{1}
                                  << 39;  // elements: a tensor map's are below 2^40 bytes

Product make_product(const void* x, const void* w, const void* norm_weight, int64_t x_stride,
                     int64_t w_stride, int32_t m, int32_t n, int32_t k, float eps) {
    const bool is_aligned = k % 8 == 0 && std::max(x_stride, w_stride) < kMaxMapStride &&
                            is_16_byte(x, MK_BF16, {x_stride}) &&
                            is_16_byte(w, MK_BF16, {w_stride}) &&
                            is_16_byte(norm_weight, MK_BF16, {});
    return {x, w, norm_weight, x_stride, w_stride, m, n, k, eps, is_aligned};
}

Product make_product(const mk_linear_params& p) {
    return make_product(p.x, p.w, p.norm_weight, p.x_stride, p.w_stride, p.m, p.n, p.k, p.eps);
}

Product make_product(const mk_qkv_rope_append_params& p) {
    const int32_t heads = p.num_q_heads + 2 * p.num_kv_heads;
    return make_product(p.x, p.w, p.norm_weight, p.x_stride, p.w_stride, p.tokens,
                        heads * p.head_dim, p.hidden, p.eps);
}

mk_status check_product(const Product& a, const char* m, const char* k, int32_t dtype) {
    MK_TRY(check_inputs(a, m, k, dtype, MK_LINEAR_MAX_NORM_M));
    return check_rows("w", a.w, a.w_stride, a.m ? a.n : 0, a.k, dtype);
}

// Blocks of `warps` strips of 8 columns, one block per SM. Of the largest number of warps that the
// SMs have strips for, and a block has room for (devices with the kernels of another may have less
// shared memory than that one), and down to half of it, that with the fewest strips on the busiest
// SM.
void plan_skinny(const Product& a, const mk_device& device, mk_plan* plan) {
    const int32_t strips = ceil_div(a.n, kSkinnyCols);
    const auto smem_bytes = [&](int32_t warps) {
        return skinny_smem_bytes(device.sm, warps, std::min(a.m, kSkinnyRows), a.norm_weight, a.k);
    };
    int32_t most = std::min(ceil_div(strips, device.num_sms), kSkinnyMaxWarps);
    while (most > 1 && smem_bytes(most) > device.smem_per_block) --most;
    int32_t warps = most, least = INT32_MAX;
    for (int32_t w = ceil_div(most, 2); w <= most; ++w) {
        const int32_t strips_per_sm = ceil_div(ceil_div(strips, w), device.num_sms) * w;
        if (strips_per_sm <= least) warps = w, least = strips_per_sm;
    }
    const int32_t tiles = ceil_div(strips, warps);
    plan->grid[0] = ceil_div(tiles, ceil_div(tiles, device.num_sms));
    plan->grid[1] = std::min(ceil_div(a.m, kSkinnyRows), 65535);
    plan->block[0] = 32 * warps;
    plan->smem_bytes = smem_bytes(warps);
}

int64_t gemm_blocks(const Product& a, const GemmTile& tile) {
    return static_cast<int64_t>(ceil_div(a.m, tile.m)) * ceil_div(a.n, tile.n);
}

// The tile with the least work on the busiest SM. A middle tile's output costs 1.1 times, a small
// one's 1.8 times as much as a large one's: their bytes from L2 and shared memory per MMA. Up to 64
// rows it is the bytes of w that count, and small tiles read them with most in flight. Without room
// for a large one (A100's kernels on an RTX 3090): the others.
const GemmTile& gemm_tile(const Product& a, const mk_device& device) {
    const GemmTiles& tiles = gemm_tiles(device.sm);
    if (a.m <= tiles.small.m) return tiles.small;
    const auto cost = [&](const GemmTile& t, int percent) {
        return ceil_div<int64_t>(gemm_blocks(a, t), device.num_sms) * t.m * t.n * percent;
    };
    const bool has_room = gemm_smem_bytes(tiles.large) <= device.smem_per_block;
    const int64_t large = has_room ? cost(tiles.large, 100) : INT64_MAX;
    const int64_t middle = cost(tiles.middle, 110);
    const int64_t small = cost(tiles.small, 180);
    if (large <= std::min(middle, small)) return tiles.large;
    return middle <= small ? tiles.middle : tiles.small;
}

void plan_gemm(const Product& a, const GemmTile& tile, mk_plan* plan) {
    plan->grid[0] = static_cast<int32_t>(std::min<int64_t>(gemm_blocks(a, tile), INT32_MAX));
    plan->block[0] = gemm_threads(tile);
    plan->smem_bytes = gemm_smem_bytes(tile);
}

// Few rows read w once and go by bandwidth. So does, slowly, what has no 16-byte rows.
bool is_skinny(const Product& a) { return a.m <= kSkinnyRows || !a.is_aligned; }

mk_plan plan_product(const char* op, int32_t dtype, const Product& a, const mk_device& device) {
    const std::string name = dtype_name(dtype);
    // One kernel serves the three products, but for few rows before sm_90.
    if (device.sm == 90) {
        return is_gemm_sm90(a) ? plan_gemm_sm90("linear", dtype, a, device)
                               : plan_skinny_sm90(dtype, a, device);
    }
    if (is_skinny(a)) {
        mk_plan plan = make_plan(op, device, name + "_m" + std::to_string(kSkinnyRows));
        plan.grid[0] = 0;
        if (a.m) plan_skinny(a, device, &plan);
        return plan;
    }
    const GemmTile& tile = gemm_tile(a, device);
    mk_plan plan = make_plan("linear", device,
                             name + "_m" + std::to_string(tile.m) + "_n" + std::to_string(tile.n));
    plan_gemm(a, tile, &plan);
    return plan;
}

std::string product_shape(const char* op, int32_t dtype, const Product& a) {
    return std::string(op) + " " + dtype_name(dtype) + " m " + std::to_string(a.m) + " n " +
           std::to_string(a.n) + " k " + std::to_string(a.k) + (a.norm_weight ? " norm" : "");
}

struct Linear {
    using Params = mk_linear_params;
    static constexpr EpilogueKind kEpilogue = EpilogueKind::kPlain;

    static mk_status check(const Params& p) {
        MK_TRY(check_size("n", p.n, 1, 1 << 24));
        MK_TRY(check_product(make_product(p), "m", "k", p.dtype));
        return check_linear_out(p);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        return plan_product("linear", p.dtype, make_product(p), device);
    }

    static LinearArgs<Params> args(const Params& p) { return {make_product(p), p}; }

    static std::string shape(const Params& p) {
        return product_shape("linear", p.dtype, make_product(p)) + " out " +
               dtype_name(p.out_dtype) + (p.residual ? " residual" : "");
    }
};

struct LinearSwiglu {
    using Params = mk_linear_params;
    static constexpr EpilogueKind kEpilogue = EpilogueKind::kSwiglu;

    static mk_status check(const Params& p) {
        MK_TRY(check_size("n", p.n, 1, 1 << 24));
        MK_TRY(check_product(make_product(p), "m", "k", p.dtype));
        return check_swiglu_out(p);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        return plan_product("linear_swiglu", p.dtype, make_product(p), device);
    }

    static LinearArgs<Params> args(const Params& p) { return {make_product(p), p}; }

    static std::string shape(const Params& p) {
        return product_shape("linear_swiglu", p.dtype, make_product(p));
    }
};

struct QkvRopeAppend {
    using Params = mk_qkv_rope_append_params;
    static constexpr EpilogueKind kEpilogue = EpilogueKind::kQkv;

    static mk_status check(const Params& p) {
        MK_TRY(check_qkv_sizes(p));
        MK_TRY(check_product(make_product(p), "tokens", "hidden", p.dtype));
        return check_qkv_out(p);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        return plan_product("qkv_rope_append", p.dtype, make_product(p), device);
    }

    static LinearArgs<Params> args(const Params& p) { return {make_product(p), p}; }

    static std::string shape(const Params& p) {
        return product_shape("qkv_rope_append", p.dtype, make_product(p)) + " heads " +
               std::to_string(p.num_q_heads) + "+" + std::to_string(p.num_kv_heads) + " head_dim " +
               std::to_string(p.head_dim);
    }
};

// What mk::run does; sm_90's kernels take tensor maps as well.
template <class Op>
mk_status run_product(const typename Op::Params* params, void* stream) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(Op::check(*params));
    const Device* device = nullptr;
    MK_TRY(current_device(&device));
    const auto args = Op::args(*params);
    const mk_plan plan = Op::plan(*params, device->info);
    const auto enqueue = [&](const void* kernel_args) {
        return launch(
            plan, *device, kernel_args, stream,
            [](const void* p) { return Op::shape(*static_cast<const typename Op::Params*>(p)); },
            params);
    };
    const bool is_sm90 = device->info.sm == 90;
    if (plan.grid[0] == 0 || (!is_sm90 && is_skinny(args.product))) return enqueue(&args);
    const Outputs to = outputs_of(Op::kEpilogue, *params);
    if (!is_sm90) {
        const LinearGemmArgs gemm{args.product, to};
        return enqueue(&gemm);
    }
    if (is_gemm_sm90(args.product)) {
        LinearGemmSm90Args gemm{args.product, to, {}, {}, {}};
        MK_TRY(gemm_sm90_args(args.product, params->dtype, device->info, &gemm));
        return enqueue(&gemm);
    }
    LinearSkinnySm90Args skinny{args.product, to, {}, {}, {}};
    MK_TRY(skinny_sm90_args(args.product, params->dtype, device->info, &skinny.ring, &skinny.x_map,
                            &skinny.w_map));
    return enqueue(&skinny);
}

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_linear(const mk_linear_params* params, void* stream) {
    return mk::run_product<mk::Linear>(params, stream);
}

mk_status mk_linear_plan(const mk_linear_params* params, const mk_device* device, mk_plan* plan) {
    return mk::plan<mk::Linear>(params, device, plan);
}

mk_status mk_linear_swiglu(const mk_linear_params* params, void* stream) {
    return mk::run_product<mk::LinearSwiglu>(params, stream);
}

mk_status mk_linear_swiglu_plan(const mk_linear_params* params, const mk_device* device,
                                mk_plan* plan) {
    return mk::plan<mk::LinearSwiglu>(params, device, plan);
}

mk_status mk_qkv_rope_append(const mk_qkv_rope_append_params* params, void* stream) {
    return mk::run_product<mk::QkvRopeAppend>(params, stream);
}

mk_status mk_qkv_rope_append_plan(const mk_qkv_rope_append_params* params, const mk_device* device,
                                  mk_plan* plan) {
    return mk::plan<mk::QkvRopeAppend>(params, device, plan);
}

}  // extern "C"
