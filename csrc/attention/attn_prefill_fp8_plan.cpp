// Plan of mk_attention_fp8.
#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "attention/attn_prefill_plan.h"
#include "launch/op.h"
#include "minitron_kernels_fp8.h"

namespace mk {
namespace {

// e4m3 rows of a head, copied 16 bytes at a time.
mk_status check_e4m3(const char* name, const void* pointer, int64_t stride, int64_t head_stride,
                     int32_t tokens, int32_t heads, int32_t head_dim) {
    if (tokens == 0) return MK_OK;
    MK_REQUIRE(pointer, MK_ERR_NULL, "%s is NULL", name);
    MK_TRY(check_stride(name, stride, tokens, head_dim));
    MK_TRY(check_stride((std::string(name) + "_head").c_str(), head_stride, heads, head_dim));
    MK_REQUIRE(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, MK_ERR_ALIGNMENT,
               "%s = %p is not 16-byte aligned", name, pointer);
    MK_REQUIRE(stride % 16 == 0 && head_stride % 16 == 0, MK_ERR_STRIDE,
               "%s_stride = %lld and %s_head_stride = %lld must be multiples of 16", name,
               static_cast<long long>(stride), name, static_cast<long long>(head_stride));
    MK_REQUIRE(stride < int64_t{1} << 31, MK_ERR_STRIDE, "%s_stride must be below 2^31, got %lld",
               name, static_cast<long long>(stride));
    return MK_OK;
}

struct AttentionFp8 {
    using Params = mk_attention_fp8_params;

    static mk_status check(const Params& p) {
        MK_REQUIRE(p.out_dtype == MK_BF16 || p.out_dtype == MK_F16, MK_ERR_DTYPE,
                   "out_dtype must be MK_BF16 (1) or MK_F16 (2), got %d", p.out_dtype);
        // At 64 exp2 takes twice as long as FP8's products: no faster than 16 bits.
        MK_REQUIRE(p.head_dim == 128, MK_ERR_SHAPE, "head_dim must be 128, got %d", p.head_dim);
        MK_TRY(check_size("num_kv_heads", p.num_kv_heads, 1, 1024));
        MK_TRY(check_size("num_q_heads", p.num_q_heads, 1, 1024));
        MK_REQUIRE(p.num_q_heads % p.num_kv_heads == 0, MK_ERR_SHAPE,
                   "num_q_heads must be a multiple of num_kv_heads = %d, got %d", p.num_kv_heads,
                   p.num_q_heads);
        MK_REQUIRE(
            !p.q_descale || p.num_q_descales == p.num_kv_heads || p.num_q_descales == p.num_q_heads,
            MK_ERR_SHAPE, "num_q_descales must be num_kv_heads or num_q_heads, got %d",
            p.num_q_descales);
        MK_TRY(check_size("batch", p.batch, 0, 65535));
        MK_TRY(check_size("tokens_q", p.tokens_q, 0, kMaxTokens));
        MK_TRY(check_size("tokens_k", p.tokens_k, 0, kMaxTokens));
        MK_TRY(check_size("max_seqlen_q", p.max_seqlen_q, 0, 65535 * kAttnPrefillTileM));
        MK_REQUIRE(p.causal == 0 || p.causal == 1, MK_ERR_VALUE, "causal must be 0 or 1, got %d",
                   p.causal);
        MK_REQUIRE(p.window >= 0, MK_ERR_VALUE, "window must not be negative, got %d", p.window);
        MK_REQUIRE(p.softmax_scale > 0 && std::isfinite(p.softmax_scale), MK_ERR_VALUE,
                   "softmax_scale must be finite and positive, got %g",
                   static_cast<double>(p.softmax_scale));
        for (const auto& [name, values, stride] :
             {std::tuple{"q_descale", p.q_descale, p.q_descale_stride},
              std::tuple{"k_descale", p.k_descale, p.k_descale_stride},
              std::tuple{"v_descale", p.v_descale, p.v_descale_stride}}) {
            MK_REQUIRE(stride >= 0, MK_ERR_STRIDE, "%s_stride must not be negative, got %lld", name,
                       static_cast<long long>(stride));
            if (values) MK_TRY(check_pointer(name, values, MK_F32));
        }
        if (is_empty(p)) return MK_OK;
        MK_TRY(check_pointer("cu_seqlens_q", p.cu_seqlens_q, MK_I32));
        MK_TRY(check_pointer("cu_seqlens_k", p.cu_seqlens_k, MK_I32));
        MK_TRY(check_e4m3("q", p.q, p.q_stride, p.q_head_stride, p.tokens_q, p.num_q_heads,
                          p.head_dim));
        MK_TRY(check_e4m3("k", p.k, p.k_stride, p.k_head_stride, p.tokens_k, p.num_kv_heads,
                          p.head_dim));
        MK_TRY(check_e4m3("v", p.v, p.v_stride, p.v_head_stride, p.tokens_k, p.num_kv_heads,
                          p.head_dim));
        MK_TRY(check_rows("out", p.out, p.out_stride, p.tokens_q, p.head_dim, p.out_dtype));
        MK_TRY(check_stride("out_head", p.out_head_stride, p.num_q_heads, p.head_dim));
        MK_REQUIRE(is_16_byte(p.out, p.out_dtype, {}), MK_ERR_ALIGNMENT,
                   "out = %p is not 16-byte aligned", p.out);
        MK_REQUIRE(is_16_byte(nullptr, p.out_dtype, {p.out_stride, p.out_head_stride}),
                   MK_ERR_STRIDE,
                   "out_stride = %lld and out_head_stride = %lld must be multiples "
                   "of 8",
                   static_cast<long long>(p.out_stride), static_cast<long long>(p.out_head_stride));
        if (!p.lse) return MK_OK;
        return check_rows("lse", p.lse, p.lse_stride, p.num_q_heads, p.tokens_q, MK_F32);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        const AttnPrefillTile tile = kAttnPrefillFp8Tile;
        mk_plan plan =
            make_plan("attention_fp8", device,
                      std::string(dtype_name(p.out_dtype)) + "_hd" + std::to_string(p.head_dim));
        plan.block[0] = attn_prefill_threads(tile);
        plan.smem_bytes = attn_prefill_fp8_smem_bytes(tile, p.head_dim);
        plan.cluster[0] = kAttnPrefillCluster;
        const auto [heads, rows] = attn_units(p.num_q_heads, p.num_kv_heads);
        const int64_t items = int64_t{heads} * p.batch * ceil_div(p.max_seqlen_q, rows);
        plan.grid[0] = is_empty(p) ? 0 : attn_blocks(items, device);
        return plan;
    }

    static mk_status args(const Params& p, AttnPrefillFp8Args* to) {
        // As AttnPrefillFp8Args has it: q, k and v in pairs of elements.
        mk_attention_params& as_pairs = to->p;
        as_pairs.q = p.q, as_pairs.k = p.k, as_pairs.v = p.v, as_pairs.out = p.out;
        as_pairs.lse = p.lse, as_pairs.lse_stride = p.lse_stride;
        as_pairs.cu_seqlens_q = p.cu_seqlens_q, as_pairs.cu_seqlens_k = p.cu_seqlens_k;
        as_pairs.q_stride = p.q_stride / 2, as_pairs.q_head_stride = p.q_head_stride / 2;
        as_pairs.k_stride = p.k_stride / 2, as_pairs.k_head_stride = p.k_head_stride / 2;
        as_pairs.v_stride = p.v_stride / 2, as_pairs.v_head_stride = p.v_head_stride / 2;
        as_pairs.out_stride = p.out_stride, as_pairs.out_head_stride = p.out_head_stride;
        as_pairs.tokens_q = p.tokens_q, as_pairs.tokens_k = p.tokens_k, as_pairs.batch = p.batch;
        as_pairs.num_q_heads = p.num_q_heads, as_pairs.num_kv_heads = p.num_kv_heads;
        as_pairs.head_dim = p.head_dim, as_pairs.dtype = p.out_dtype;
        as_pairs.max_seqlen_q = p.max_seqlen_q, as_pairs.causal = p.causal;
        as_pairs.window = std::min(p.window, kMaxTokens);  // places and windows can be added
        to->k = {0, 4 * p.k_stride, static_cast<uint32_t>(p.k_stride)};
        to->v = {0, 4 * p.v_stride, static_cast<uint32_t>(p.v_stride)};
        to->scale = p.softmax_scale * 1.4426950408889634f;
        const auto [heads, unit_rows] = attn_units(p.num_q_heads, p.num_kv_heads);
        to->num_head_units = heads, to->unit_rows = unit_rows;
        to->q_descale = {p.q_descale, p.q_descale_stride};
        to->k_descale = {p.k_descale, p.k_descale_stride};
        to->v_descale = {p.v_descale, p.v_descale_stride};
        to->has_descale_per_q_head = p.num_q_descales == p.num_q_heads;
        if (is_empty(p)) return MK_OK;

        const auto map = [&](const char* name, const void* tensor, int64_t head_stride,
                             int64_t stride, int32_t heads, int32_t tokens, int32_t box_rows,
                             bool is_kv, TensorMap* map) -> mk_status {
            int32_t has_map = 0;
            const auto strides = {head_stride / 2, stride / 2, int64_t{0}};
            MK_TRY(is_kv ? attn_map(MK_BF16, p.head_dim / 2, tensor, strides, {heads, tokens, 1},
                                    box_rows, map, &has_map)
                         : attn_map(MK_BF16, p.head_dim / 2, tensor, strides, {heads, tokens},
                                    box_rows, map, &has_map));
            MK_REQUIRE(has_map, MK_ERR_STRIDE,
                       "%s_stride = %lld and %s_head_stride = %lld: elements share memory", name,
                       static_cast<long long>(stride), name, static_cast<long long>(head_stride));
            return MK_OK;
        };
        MK_TRY(map("q", p.q, p.q_head_stride, p.q_stride, p.num_q_heads, p.tokens_q,
                   kAttnPrefillGroupRows, false, &to->q_map));
        MK_TRY(attn_map(p.out_dtype, p.head_dim, p.out, {p.out_head_stride, p.out_stride},
                        {p.num_q_heads, p.tokens_q}, kAttnPrefillWarpRows, &to->out_map,
                        &to->has_out_map));
        if (p.tokens_k < kAttnPrefillFp8Tile.tile_n) return MK_OK;
        // Each block of a cluster fetches half of a tile.
        const int32_t box_rows = kAttnPrefillFp8Tile.tile_n / kAttnPrefillCluster;
        MK_TRY(map("k", p.k, p.k_head_stride, p.k_stride, p.num_kv_heads, p.tokens_k, box_rows,
                   true, &to->k_map));
        MK_TRY(map("v", p.v, p.v_head_stride, p.v_stride, p.num_kv_heads, p.tokens_k, box_rows,
                   true, &to->v_map));
        to->box_rows = box_rows;
        return MK_OK;
    }

    static std::string shape(const Params& p) {
        return "attention_fp8 " + std::string(dtype_name(p.out_dtype)) + " tokens_q " +
               std::to_string(p.tokens_q) + " batch " + std::to_string(p.batch) + " heads " +
               std::to_string(p.num_q_heads) + "/" + std::to_string(p.num_kv_heads) + " head_dim " +
               std::to_string(p.head_dim) + (p.causal ? " causal" : "") +
               (p.window ? " window " + std::to_string(p.window) : "");
    }

    static mk_status check_arch(const mk_device& device) {
        MK_REQUIRE(device.sm == 90, MK_ERR_UNSUPPORTED,
                   "attention of e4m3 runs on sm_90a (H100, H200); this device is served by sm_%d",
                   device.sm);
        return MK_OK;
    }

  private:
    static bool is_empty(const Params& p) {
        return p.tokens_q == 0 || p.batch == 0 || p.max_seqlen_q == 0;
    }
};

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_attention_fp8(const mk_attention_fp8_params* params, void* stream) {
    using mk::AttentionFp8;
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(AttentionFp8::check(*params));
    const mk::Device* device = nullptr;
    MK_TRY(mk::current_device(&device));
    MK_TRY(AttentionFp8::check_arch(device->info));
    mk::AttnPrefillFp8Args args{};
    MK_TRY(AttentionFp8::args(*params, &args));
    return mk::launch(
        AttentionFp8::plan(*params, device->info), *device, &args, stream,
        [](const void* p) {
            return AttentionFp8::shape(*static_cast<const AttentionFp8::Params*>(p));
        },
        params);
}

mk_status mk_attention_fp8_plan(const mk_attention_fp8_params* params, const mk_device* device,
                                mk_plan* plan) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_REQUIRE(plan, MK_ERR_NULL, "plan is NULL");
    MK_TRY(mk::check_device(device));
    MK_TRY(mk::AttentionFp8::check(*params));
    MK_TRY(mk::AttentionFp8::check_arch(*device));
    *plan = mk::AttentionFp8::plan(*params, *device);
    return MK_OK;
}

}  // extern "C"
