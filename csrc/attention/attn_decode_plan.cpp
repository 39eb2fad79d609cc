#include <algorithm>
#include <cmath>
#include <string>

#include "attention/attn_decode_tiles.h"
#include "attention/attn_map.h"
#include "launch/op.h"

namespace mk {
namespace {

using Params = mk_attention_decode_params;

// Rows of a KV group and how blocks share them.
struct Rows {
    int32_t in_all, per_block, blocks;
};

Rows rows_of(const Params& p) {
    const int32_t in_all = p.num_q_heads / p.num_kv_heads * p.max_seqlen_q;
    const int32_t per_block =
        in_all <= kAttnDecodeFewRows ? kAttnDecodeFewRows : kAttnDecodeManyRows;
    return {in_all, per_block, ceil_div(in_all, per_block)};
}

int32_t max_splits(const Params& p, int32_t window) {
    int64_t span = static_cast<int64_t>(p.max_pages) * p.page_size;
    // A window and what rounding its begin down to a tile adds.
    if (window) {
        span = std::min<int64_t>(
            span, static_cast<int64_t>(window) + kAttnDecodeMaxSeqlenQ + kAttnDecodeTileKeys);
    }
    return attn_decode_max_splits(span);
}

// The workspace: counters, then (maximum, sum) of each row of each partial result, then its sums
// of v. Sequences with one split need none. The counters have the same place whatever the shape, so
// that launches of all shapes can share a workspace: what one leaves behind is no other's counter.
constexpr int64_t kMaxGroups = 1 << 16;

struct Workspace {
    int64_t stats_offset, partial_offset, bytes;
};

Workspace workspace_of(const Params& p) {
    const int32_t splits = max_splits(p, 0);
    if (splits == 1) return {};
    const Rows rows = rows_of(p);
    const int64_t groups = static_cast<int64_t>(p.batch) * p.num_kv_heads * rows.blocks;
    const int64_t partial_rows = groups * splits * std::min(rows.in_all, rows.per_block);
    Workspace w{};
    w.stats_offset = kMaxGroups * static_cast<int64_t>(sizeof(int32_t));
    w.partial_offset = w.stats_offset + ceil_div<int64_t>(partial_rows * 8, 128) * 128;
    w.bytes = w.partial_offset + partial_rows * p.head_dim * static_cast<int64_t>(sizeof(float));
    return w;
}

mk_status check_sizes(const Params& p) {
    MK_TRY(check_size("batch", p.batch, 0, 65535));
    MK_TRY(check_size("num_kv_heads", p.num_kv_heads, 1, 1024));
    MK_TRY(check_size("num_q_heads", p.num_q_heads, 1, 1024));
    MK_REQUIRE(p.num_q_heads % p.num_kv_heads == 0, MK_ERR_SHAPE,
               "num_q_heads must be a multiple of num_kv_heads = %d, got %d", p.num_kv_heads,
               p.num_q_heads);
    MK_REQUIRE(p.head_dim == 64 || p.head_dim == 128, MK_ERR_SHAPE,
               "head_dim must be 64 or 128, got %d", p.head_dim);
    MK_REQUIRE(p.page_size == 16 || p.page_size == 32 || p.page_size == 64 || p.page_size == 128,
               MK_ERR_SHAPE, "page_size must be 16, 32, 64 or 128, got %d", p.page_size);
    MK_TRY(check_size("max_pages", p.max_pages, 0, (1 << 30) / p.page_size));
    MK_TRY(check_size("max_seqlen_q", p.max_seqlen_q, 1, kAttnDecodeMaxSeqlenQ));
    const int64_t groups = static_cast<int64_t>(p.batch) * p.num_kv_heads * rows_of(p).blocks;
    MK_REQUIRE(groups <= kMaxGroups || max_splits(p, 0) == 1, MK_ERR_SHAPE,
               "batch * num_kv_heads (for each 32 rows of a group) must be at most %lld, got %lld",
               static_cast<long long>(kMaxGroups), static_cast<long long>(groups));
    return MK_OK;
}

mk_status check_16_byte_stride(const char* name, int64_t stride, int32_t count, int32_t least) {
    MK_TRY(check_stride(name, stride, count, least));
    MK_REQUIRE(count <= 1 || stride % 8 == 0, MK_ERR_STRIDE,
               "%s_stride must be a multiple of 8 elements (16 bytes), got %lld", name,
               static_cast<long long>(stride));
    return MK_OK;
}

mk_status check_16_byte_pointer(const char* name, const void* pointer) {
    MK_REQUIRE(pointer, MK_ERR_NULL, "%s is NULL", name);
    MK_REQUIRE(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, MK_ERR_ALIGNMENT,
               "%s = %p is not aligned to 16 bytes", name, pointer);
    return MK_OK;
}

// A tensor [tokens, heads, head_dim].
mk_status check_heads(const Params& p, const char* name, const void* pointer, int64_t stride,
                      int64_t head_stride, int32_t heads) {
    MK_TRY(check_16_byte_pointer(name, pointer));
    MK_TRY(check_16_byte_stride((std::string(name) + "_head").c_str(), head_stride, heads,
                                p.head_dim));
    return check_16_byte_stride(name, stride, p.tokens, p.head_dim);
}

mk_status check_decode_rope(const Params& p) {
    const mk_rope& rope = p.rope;
    if (!rope.cos && !rope.sin) return MK_OK;
    MK_REQUIRE(rope.rotary_dim % 2 == 0 && rope.rotary_dim >= 2 && rope.rotary_dim <= p.head_dim,
               MK_ERR_SHAPE, "rope.rotary_dim must be even, 2 ... head_dim = %d, got %d",
               p.head_dim, rope.rotary_dim);
    MK_REQUIRE(rope.interleaved == 0 || rope.interleaved == 1, MK_ERR_VALUE,
               "rope.interleaved must be 0 or 1, got %d", rope.interleaved);
    MK_TRY(check_size("rope.max_position", rope.max_position, 1, 1 << 24));
    if (rope.positions) {
        MK_TRY(check_indices("rope.positions", rope.positions, p.tokens, rope.positions_dtype));
    }
    MK_TRY(check_pointer("rope.cos", rope.cos, MK_F32));
    MK_TRY(check_pointer("rope.sin", rope.sin, MK_F32));
    return check_stride("rope.table", rope.table_stride, rope.max_position, rope.rotary_dim / 2);
}

struct AttentionDecode {
    using Params = mk_attention_decode_params;

    static mk_status check(const Params& p) {
        MK_TRY(check_activation_dtype(p.dtype));
        MK_TRY(check_size("tokens", p.tokens, 0, 1 << 30));
        MK_TRY(check_sizes(p));
        MK_TRY(check_size("num_pages", p.num_pages, 0, INT32_MAX));
        MK_TRY(check_size("window", p.window, 0, INT32_MAX));
        MK_REQUIRE(p.causal == 0 || p.causal == 1, MK_ERR_VALUE, "causal must be 0 or 1, got %d",
                   p.causal);
        MK_REQUIRE(std::isfinite(p.softmax_scale), MK_ERR_VALUE,
                   "softmax_scale must be finite, got %g", static_cast<double>(p.softmax_scale));
        if (p.tokens == 0 || p.batch == 0) return MK_OK;
        MK_TRY(check_heads(p, "q", p.q, p.q_stride, p.q_head_stride, p.num_q_heads));
        MK_TRY(check_heads(p, "out", p.out, p.out_stride, p.out_head_stride, p.num_q_heads));
        if (p.k_new || p.v_new) {
            MK_TRY(check_heads(p, "k_new", p.k_new, p.k_new_stride, p.k_new_head_stride,
                               p.num_kv_heads));
            MK_TRY(check_heads(p, "v_new", p.v_new, p.v_new_stride, p.v_new_head_stride,
                               p.num_kv_heads));
        }
        if (p.lse) {
            MK_TRY(check_rows("lse", p.lse, p.lse_stride, p.num_q_heads, p.tokens, MK_F32));
        }
        if (p.num_pages > 0) {
            MK_TRY(check_16_byte_pointer("k_cache", p.k_cache));
            MK_TRY(check_16_byte_pointer("v_cache", p.v_cache));
            MK_TRY(
                check_16_byte_stride("cache_page", p.cache_page_stride, p.num_pages, p.head_dim));
            MK_TRY(check_16_byte_stride("cache", p.cache_stride, p.page_size, p.head_dim));
            MK_TRY(check_16_byte_stride("cache_head", p.cache_head_stride, p.num_kv_heads,
                                        p.head_dim));
        }
        MK_REQUIRE(p.cu_seqlens_q || p.tokens >= p.batch, MK_ERR_SHAPE,
                   "tokens must be at least batch = %d without cu_seqlens_q, got %d", p.batch,
                   p.tokens);
        if (p.cu_seqlens_q) MK_TRY(check_pointer("cu_seqlens_q", p.cu_seqlens_q, MK_I32));
        MK_TRY(check_pointer("seqlens_k", p.seqlens_k, MK_I32));
        if (p.max_pages > 0) {
            MK_TRY(check_rows("block_table", p.block_table, p.block_table_stride, p.batch,
                              p.max_pages, MK_I32));
        }
        MK_TRY(check_decode_rope(p));
        const int64_t bytes = workspace_of(p).bytes;
        MK_REQUIRE(p.workspace_bytes >= bytes, MK_ERR_VALUE,
                   "workspace_bytes must be at least %lld, got %lld", static_cast<long long>(bytes),
                   static_cast<long long>(p.workspace_bytes));
        return bytes ? check_16_byte_pointer("workspace", p.workspace) : MK_OK;
    }

    // Blocks of one sequence take its splits in turn: as many blocks as splits while that is few
    // per SM, fewer when the batch alone fills the device, so that short sequences of a long table
    // cost few blocks that find nothing to do.
    static mk_plan plan(const Params& p, const mk_device& device) {
        constexpr int64_t kBlocksPerSm = 32;
        const Rows rows = rows_of(p);
        mk_plan plan =
            make_plan("attention_decode", device,
                      std::string(dtype_name(p.dtype)) + "_hd" + std::to_string(p.head_dim) +
                          "_rows" + std::to_string(rows.per_block));
        const bool is_empty = p.tokens == 0 || p.batch == 0;
        const int64_t groups = static_cast<int64_t>(p.num_kv_heads) * rows.blocks;
        const int64_t wanted = is_empty ? 1 : kBlocksPerSm * device.num_sms / (groups * p.batch);
        plan.grid[0] = is_empty ? 0 : static_cast<int32_t>(groups);
        plan.grid[1] =
            static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, max_splits(p, p.window)));
        plan.grid[2] = std::max(p.batch, 1);
        plan.block[0] = kAttnDecodeThreads;
        if (device.sm == 90) plan.smem_bytes = sm90_smem_bytes(p.head_dim, rows.per_block);
        return plan;
    }

    static int32_t sm90_smem_bytes(int32_t head_dim, int32_t rows) {
        const bool is_few = rows == kAttnDecodeFewRows;
        if (head_dim == 64) {
            return is_few ? AttnDecodeSm90Tile<64, kAttnDecodeFewRows>::kSmemBytes
                          : AttnDecodeSm90Tile<64, kAttnDecodeManyRows>::kSmemBytes;
        }
        return is_few ? AttnDecodeSm90Tile<128, kAttnDecodeFewRows>::kSmemBytes
                      : AttnDecodeSm90Tile<128, kAttnDecodeManyRows>::kSmemBytes;
    }

    static AttnDecodeArgs args(const Params& p) {
        const Rows rows = rows_of(p);
        const Workspace workspace = workspace_of(p);
        AttnDecodeArgs args{};
        args.p = p;
        // A window that no sequence outgrows is none; so sums of a place and a window fit an int.
        if (p.window >= p.max_pages * p.page_size) args.p.window = 0;
        args.scale_log2 = p.softmax_scale * 1.4426950408889634f;
        args.group = p.num_q_heads / p.num_kv_heads;
        args.row_blocks = rows.blocks;
        args.rows_per_block = std::min(rows.in_all, rows.per_block);
        args.max_splits = max_splits(p, 0);
        while (1 << args.page_shift < p.page_size) ++args.page_shift;
        args.rope_is_vector = p.rope.rotary_dim % 16 == 0 &&
                              is_16_byte(p.rope.cos, MK_F32, {p.rope.table_stride}) &&
                              is_16_byte(p.rope.sin, MK_F32, {p.rope.table_stride});
        args.stats_offset = workspace.stats_offset;
        args.partial_offset = workspace.partial_offset;
        return args;
    }

    // What sm_90's kernel takes: the same, and tensor maps.
    static mk_status args_sm90(const Params& p, AttnDecodeSm90Args* to) {
        static_cast<AttnDecodeArgs&>(*to) = args(p);
        to->has_maps = 0;
        if (p.tokens == 0 || p.batch == 0 || p.num_pages == 0) return MK_OK;
        const auto map = [&](const void* cache, TensorMap* to_map, int32_t* has_map) {
            return attn_map(p.dtype, p.head_dim, cache,
                            {p.cache_head_stride, p.cache_stride, p.cache_page_stride},
                            {p.num_kv_heads, p.page_size, p.num_pages}, kAttnDecodeTileKeys, to_map,
                            has_map);
        };
        int32_t has_k = 0;
        MK_TRY(map(p.k_cache, &to->k_map, &has_k));
        MK_TRY(map(p.v_cache, &to->v_map, &to->has_maps));  // their strides are the same
        return MK_OK;
    }

    static std::string shape(const Params& p) {
        return std::string("attention_decode ") + dtype_name(p.dtype) + " batch " +
               std::to_string(p.batch) + " heads " + std::to_string(p.num_q_heads) + "/" +
               std::to_string(p.num_kv_heads) + " head_dim " + std::to_string(p.head_dim) +
               " queries " + std::to_string(p.max_seqlen_q) + " pages " +
               std::to_string(p.max_pages) + "x" + std::to_string(p.page_size);
    }
};

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_attention_decode(const mk_attention_decode_params* params, void* stream) {
    using mk::AttentionDecode;
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(AttentionDecode::check(*params));
    const mk::Device* device = nullptr;
    MK_TRY(mk::current_device(&device));
    if (device->info.sm != 90) return mk::run<AttentionDecode>(params, stream);
    mk::AttnDecodeSm90Args args{};
    MK_TRY(AttentionDecode::args_sm90(*params, &args));
    return mk::launch(
        AttentionDecode::plan(*params, device->info), *device, &args, stream,
        [](const void* p) {
            return AttentionDecode::shape(*static_cast<const AttentionDecode::Params*>(p));
        },
        params);
}

mk_status mk_attention_decode_plan(const mk_attention_decode_params* params,
                                   const mk_device* device, mk_plan* plan) {
    return mk::plan<mk::AttentionDecode>(params, device, plan);
}

mk_status mk_attention_decode_workspace_bytes(const mk_attention_decode_params* params,
                                              int64_t* bytes) {
    using namespace mk;
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_REQUIRE(bytes, MK_ERR_NULL, "bytes is NULL");
    MK_TRY(check_sizes(*params));
    *bytes = workspace_of(*params).bytes;
    return MK_OK;
}

}  // extern "C"
