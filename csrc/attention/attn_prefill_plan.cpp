// Plan of mk_attention. What decides between its kernels are dtype and head_dim; masks, pages and
// rope are arguments.
#include "attention/attn_prefill_plan.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "launch/op.h"
#include "rope/rope_plan.h"

namespace mk {
namespace {

constexpr int64_t kMaxStride = 1 << 30;  // of rows: bytes fit 32 bits

// A tensor whose rows of one head are copied 16 bytes at a time.
mk_status check_heads(const char* name, const void* pointer, int64_t stride, int64_t head_stride,
                      int32_t tokens, int32_t heads, const mk_attention_params& p) {
    MK_TRY(check_rows(name, pointer, stride, tokens, p.head_dim, p.dtype));
    if (tokens == 0) return MK_OK;
    MK_TRY(check_stride((std::string(name) + "_head").c_str(), head_stride, heads, p.head_dim));
    MK_REQUIRE(is_16_byte(pointer, p.dtype, {}), MK_ERR_ALIGNMENT, "%s = %p is not 16-byte aligned",
               name, pointer);
    MK_REQUIRE(is_16_byte(nullptr, p.dtype, {stride, head_stride}), MK_ERR_STRIDE,
               "%s_stride = %lld and %s_head_stride = %lld must be multiples of 8", name,
               static_cast<long long>(stride), name, static_cast<long long>(head_stride));
    MK_REQUIRE(stride <= kMaxStride, MK_ERR_STRIDE, "%s_stride must be at most %lld, got %lld",
               name, static_cast<long long>(kMaxStride), static_cast<long long>(stride));
    return MK_OK;
}

mk_status check_pages(const mk_attention_params& p) {
    MK_REQUIRE(p.page_size == 16 || p.page_size == 32 || p.page_size == 64 || p.page_size == 128,
               MK_ERR_SHAPE, "page_size must be 16, 32, 64, 128 or 0 (packed), got %d",
               p.page_size);
    MK_TRY(check_size("num_pages", p.num_pages, 0, INT32_MAX));
    MK_TRY(check_size("max_pages", p.max_pages, 0, INT32_MAX));
    MK_REQUIRE(p.seqlens_k_add == 0 || p.seqlens_k_add == 1, MK_ERR_VALUE,
               "seqlens_k_add must be 0 or 1, got %d", p.seqlens_k_add);
    MK_REQUIRE(!p.cu_seqlens_k, MK_ERR_VALUE, "cu_seqlens_k must be NULL when k is paged");
    MK_TRY(check_pointer("seqlens_k", p.seqlens_k, MK_I32));
    const int32_t rows = p.max_pages ? p.batch : 0;
    MK_TRY(
        check_rows("block_table", p.block_table, p.block_table_stride, rows, p.max_pages, MK_I32));
    const int32_t tokens = p.num_pages ? p.page_size : 0;
    MK_TRY(check_heads("k", p.k, p.k_stride, p.k_head_stride, tokens, p.num_kv_heads, p));
    MK_TRY(check_heads("v", p.v, p.v_stride, p.v_head_stride, tokens, p.num_kv_heads, p));
    for (const auto& [name, stride] :
         {std::pair{"k_page", p.k_page_stride}, std::pair{"v_page", p.v_page_stride}}) {
        MK_TRY(check_stride(name, stride, p.num_pages, p.head_dim));
        MK_REQUIRE(is_16_byte(nullptr, p.dtype, {stride}), MK_ERR_STRIDE,
                   "%s_stride = %lld must be a multiple of 8", name,
                   static_cast<long long>(stride));
    }
    return MK_OK;
}

struct Attention {
    using Params = mk_attention_params;

    static mk_status check(const Params& p) {
        MK_TRY(check_activation_dtype(p.dtype));
        MK_REQUIRE(p.head_dim == 64 || p.head_dim == 128, MK_ERR_SHAPE,
                   "head_dim must be 64 or 128, got %d", p.head_dim);
        MK_TRY(check_size("num_kv_heads", p.num_kv_heads, 1, 1024));
        MK_TRY(check_size("num_q_heads", p.num_q_heads, 1, 1024));
        MK_REQUIRE(p.num_q_heads % p.num_kv_heads == 0, MK_ERR_SHAPE,
                   "num_q_heads must be a multiple of num_kv_heads = %d, got %d", p.num_kv_heads,
                   p.num_q_heads);
        MK_TRY(check_size("batch", p.batch, 0, 65535));
        MK_TRY(check_size("tokens_q", p.tokens_q, 0, kMaxTokens));
        MK_TRY(check_size("max_seqlen_q", p.max_seqlen_q, 0, 65535 * kAttnPrefillTileM));
        MK_TRY(check_size("skip_seqlen_q", p.skip_seqlen_q, 0, INT32_MAX));
        MK_REQUIRE(p.causal == 0 || p.causal == 1, MK_ERR_VALUE, "causal must be 0 or 1, got %d",
                   p.causal);
        MK_REQUIRE(p.window >= 0, MK_ERR_VALUE, "window must not be negative, got %d", p.window);
        MK_REQUIRE(p.softmax_scale > 0 && std::isfinite(p.softmax_scale), MK_ERR_VALUE,
                   "softmax_scale must be finite and positive, got %g",
                   static_cast<double>(p.softmax_scale));
        if (is_empty(p)) return MK_OK;
        MK_TRY(check_pointer("cu_seqlens_q", p.cu_seqlens_q, MK_I32));
        MK_TRY(check_heads("q", p.q, p.q_stride, p.q_head_stride, p.tokens_q, p.num_q_heads, p));
        MK_TRY(check_heads("out", p.out, p.out_stride, p.out_head_stride, p.tokens_q, p.num_q_heads,
                           p));
        if (p.lse) {
            MK_TRY(check_rows("lse", p.lse, p.lse_stride, p.num_q_heads, p.tokens_q, MK_F32));
        }
        if (p.page_size) {
            MK_TRY(check_pages(p));
        } else {
            MK_TRY(check_size("tokens_k", p.tokens_k, 0, kMaxTokens));
            MK_TRY(check_pointer("cu_seqlens_k", p.cu_seqlens_k, MK_I32));
            MK_TRY(
                check_heads("k", p.k, p.k_stride, p.k_head_stride, p.tokens_k, p.num_kv_heads, p));
            MK_TRY(
                check_heads("v", p.v, p.v_stride, p.v_head_stride, p.tokens_k, p.num_kv_heads, p));
        }
        if (!p.rope.cos && !p.rope.sin) return MK_OK;
        mk_rope rope = p.rope;
        if (!rope.positions) {  // places in the sequence
            rope.positions = p.cu_seqlens_q;
            rope.positions_dtype = MK_I32;
        }
        return check_rope(rope, p.tokens_q, p.head_dim);
    }

    static mk_plan plan(const Params& p, const mk_device& device) {
        const AttnPrefillTile tile = attn_prefill_tile(device.sm, p.head_dim);
        mk_plan plan =
            make_plan("attention", device,
                      std::string(dtype_name(p.dtype)) + "_hd" + std::to_string(p.head_dim));
        plan.block[0] = attn_prefill_threads(tile);
        plan.smem_bytes = attn_prefill_smem_bytes(tile, p.head_dim);
        plan.grid[0] = is_empty(p) ? 0 : p.num_q_heads;
        if (device.sm == 90) {  // a cluster for each two SMs, or for each item if these are fewer
            const auto [heads, rows] = attn_units(p.num_q_heads, p.num_kv_heads);
            plan.cluster[0] = kAttnPrefillCluster;
            const int64_t most = int64_t{heads} * p.batch * ceil_div(p.max_seqlen_q, rows);
            plan.grid[0] = is_empty(p) ? 0 : attn_blocks(most, device);
            return plan;
        }
        plan.grid[1] = std::max(p.batch, 1);
        plan.grid[2] = std::max(ceil_div(p.max_seqlen_q, tile.tile_m), 1);
        return plan;
    }

    static AttnPrefillArgs args(const Params& p) {
        const auto rows = [](int64_t page_stride, int64_t stride) -> AttnPrefillArgs::Rows {
            return {2 * page_stride, 8 * stride, static_cast<uint32_t>(2 * stride)};
        };
        int32_t page_shift = 0;
        while (1 << page_shift < p.page_size) ++page_shift;
        AttnPrefillArgs args{p,
                             rows(p.k_page_stride, p.k_stride),
                             rows(p.v_page_stride, p.v_stride),
                             p.softmax_scale * 1.4426950408889634f,
                             page_shift,
                             static_cast<uint32_t>(p.page_size) - 1};
        args.p.window = std::min(p.window, kMaxTokens);  // places and windows can be added
        return args;
    }

    static std::string shape(const Params& p) {
        return std::string("attention ") + dtype_name(p.dtype) + " tokens_q " +
               std::to_string(p.tokens_q) + " batch " + std::to_string(p.batch) + " heads " +
               std::to_string(p.num_q_heads) + "/" + std::to_string(p.num_kv_heads) + " head_dim " +
               std::to_string(p.head_dim) + " page_size " + std::to_string(p.page_size) +
               (p.causal ? " causal" : "") +
               (p.window ? " window " + std::to_string(p.window) : "");
    }

    // What sm_90's kernel takes: the same, what its clusters share out, and tensor maps.
    static mk_status args_sm90(const Params& p, const AttnPrefillTile& tile,
                               AttnPrefillSm90Args* to) {
        static_cast<AttnPrefillArgs&>(*to) = args(p);
        const auto [heads, unit_rows] = attn_units(p.num_q_heads, p.num_kv_heads);
        to->num_head_units = heads;
        to->unit_rows = unit_rows;
        if (is_empty(p)) return MK_OK;
        MK_TRY(attn_map(p.dtype, p.head_dim, p.q, {p.q_head_stride, p.q_stride},
                        {p.num_q_heads, p.tokens_q}, kAttnPrefillGroupRows, &to->q_map,
                        &to->has_q_map));
        MK_TRY(attn_map(p.dtype, p.head_dim, p.out, {p.out_head_stride, p.out_stride},
                        {p.num_q_heads, p.tokens_q}, kAttnPrefillWarpRows, &to->out_map,
                        &to->has_out_map));
        const int32_t rows = p.page_size ? p.page_size : p.tokens_k;
        const int32_t pages = p.page_size ? p.num_pages : 1;
        if (pages == 0 || (!p.page_size && rows < tile.tile_n)) return MK_OK;
        // Each block of a cluster fetches half of a tile.
        const int32_t box_rows = std::min(rows, tile.tile_n / kAttnPrefillCluster);
        int32_t has_k = 0, has_v = 0;
        const std::initializer_list<int32_t> counts = {p.num_kv_heads, rows, pages};
        MK_TRY(attn_map(p.dtype, p.head_dim, p.k, {p.k_head_stride, p.k_stride, p.k_page_stride},
                        counts, box_rows, &to->k_map, &has_k));
        MK_TRY(attn_map(p.dtype, p.head_dim, p.v, {p.v_head_stride, p.v_stride, p.v_page_stride},
                        counts, box_rows, &to->v_map, &has_v));
        to->box_rows = has_k && has_v ? box_rows : 0;
        return MK_OK;
    }

  private:
    // No query, or none that is not skipped.
    static bool is_empty(const Params& p) {
        return p.tokens_q == 0 || p.batch == 0 || p.max_seqlen_q <= p.skip_seqlen_q;
    }
};

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_attention(const mk_attention_params* params, void* stream) {
    using mk::Attention;
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(Attention::check(*params));
    const mk::Device* device = nullptr;
    MK_TRY(mk::current_device(&device));
    if (device->info.sm != 90) return mk::run<Attention>(params, stream);
    mk::AttnPrefillSm90Args args{};
    MK_TRY(Attention::args_sm90(*params, mk::attn_prefill_tile(90, params->head_dim), &args));
    return mk::launch(
        Attention::plan(*params, device->info), *device, &args, stream,
        [](const void* p) { return Attention::shape(*static_cast<const Attention::Params*>(p)); },
        params);
}

mk_status mk_attention_plan(const mk_attention_params* params, const mk_device* device,
                            mk_plan* plan) {
    return mk::plan<mk::Attention>(params, device, plan);
}

}  // extern "C"
