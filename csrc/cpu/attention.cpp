// mk_cpu_attention: checks, and division of the work among threads.
//
// A tile is up to kTileRows rows of one sequence and KV head. Where there are fewer tiles than
// threads can share (decoding), a tile's keys are divided as well: each piece leaves its blocks'
// parts in memory, and the thread that ends a tile's last piece joins them. As blocks are joined in
// ascending order either way, the division does not show in the result.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <string>

#include "cpu/chunks.h"
#include "cpu/isa.h"

namespace mk::cpu {
namespace {

constexpr IsaTable<AttentionKernels> kAttention = MK_ISA_TABLE(kAttention);

// Below this many multiply-adds, waking a thread takes longer than the work.
constexpr int64_t kMinParallelMacs = 50000;
// Pieces of work that each thread should find, so that all end at about the same time.
constexpr int64_t kPiecesPerThread = 4;
// Floats of parts (16 MiB); were there more of them, keys are not divided.
constexpr int64_t kMaxPartFloats = 4 << 20;

// ---- checks ----

mk_status check_tensor(const char* name, const void* pointer, int64_t stride, int64_t head_stride,
                       int32_t count, int32_t heads, const mk_attention_params& p) {
    MK_TRY(check_stride((std::string(name) + "_head").c_str(), head_stride, heads, p.head_dim));
    return check_rows(name, pointer, stride, count, p.head_dim, p.dtype);
}

mk_status check_starts(const char* name, const char* what, const int32_t* starts, int32_t batch,
                       int32_t total) {
    MK_TRY(check_pointer(name, starts, MK_I32));
    bool ascends = starts[0] == 0 && starts[batch] == total;
    for (int32_t i = 0; i < batch; ++i) ascends &= starts[i] <= starts[i + 1];
    MK_REQUIRE(ascends, MK_ERR_VALUE, "%s must ascend from 0 to the %d rows of %s, got %d..%d",
               name, total, what, starts[0], starts[batch]);
    return MK_OK;
}

int32_t queries_of(const mk_attention_params& p, int32_t sequence) {
    return p.cu_seqlens_q ? p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence] : 1;
}

int64_t keys_of(const mk_attention_params& p, int32_t sequence) {
    if (!p.page_size) return p.cu_seqlens_k[sequence + 1] - p.cu_seqlens_k[sequence];
    return int64_t{p.seqlens_k[sequence]} + (p.seqlens_k_add ? queries_of(p, sequence) : 0);
}

// What the index arrays say.
mk_status check_sequences(const mk_attention_params& p) {
    if (p.cu_seqlens_q) {
        MK_TRY(check_starts("cu_seqlens_q", "q", p.cu_seqlens_q, p.batch, p.tokens_q));
    } else {
        MK_REQUIRE(p.tokens_q == p.batch, MK_ERR_SHAPE,
                   "tokens_q must be batch (%d) without cu_seqlens_q, got %d", p.batch, p.tokens_q);
    }
    int32_t fewest = INT32_MAX, most = 0;
    for (int32_t i = 0; i < p.batch; ++i) {
        const int32_t queries = queries_of(p, i);
        if (queries == 0) continue;
        fewest = std::min(fewest, queries);
        most = std::max(most, queries);
    }
    MK_REQUIRE(most <= p.max_seqlen_q && (most == 0 || fewest > p.skip_seqlen_q), MK_ERR_VALUE,
               "max_seqlen_q %d and min_seqlen_q %d: a sequence has %d rows of q, another %d",
               p.max_seqlen_q, p.skip_seqlen_q + 1, most, fewest);
    if (!p.page_size) {
        return check_starts("cu_seqlens_k", "k", p.cu_seqlens_k, p.batch, p.tokens_k);
    }
    if (p.batch == 0) return MK_OK;
    MK_TRY(check_pointer("seqlens_k", p.seqlens_k, MK_I32));
    MK_TRY(check_rows("block_table", p.block_table, p.block_table_stride, p.batch, p.max_pages,
                      MK_I32));
    for (int32_t i = 0; i < p.batch; ++i) {
        const int64_t keys = keys_of(p, i);
        MK_REQUIRE(p.seqlens_k[i] >= 0 && keys <= int64_t{p.max_pages} * p.page_size, MK_ERR_VALUE,
                   "cache_seqlens[%d]: %lld tokens do not fit block_table's %d x %d", i,
                   static_cast<long long>(keys), p.max_pages, p.page_size);
        const int32_t* const pages = p.block_table + p.block_table_stride * i;
        for (int64_t j = 0; j * p.page_size < keys; ++j) {
            MK_REQUIRE(0 <= pages[j] && pages[j] < p.num_pages, MK_ERR_VALUE,
                       "block_table[%d] names a page outside 0..%d", i, p.num_pages - 1);
        }
    }
    return MK_OK;
}

mk_status check(const mk_attention_params& p) {
    MK_TRY(check_cpu_dtype(p.dtype));
    MK_TRY(check_size("tokens_q", p.tokens_q, 0, INT32_MAX));
    MK_TRY(check_size("batch", p.batch, 0, INT32_MAX - 1));
    MK_TRY(check_size("num_kv_heads", p.num_kv_heads, 1, 1024));
    MK_TRY(check_size("num_q_heads", p.num_q_heads, 1, 1024));
    MK_REQUIRE(p.num_q_heads % p.num_kv_heads == 0, MK_ERR_SHAPE,
               "num_q_heads must be a multiple of num_kv_heads %d, got %d", p.num_kv_heads,
               p.num_q_heads);
    MK_TRY(check_size("head_dim", p.head_dim, 1, kMaxAttentionHeadDim));
    MK_TRY(check_size("page_size", p.page_size, 0, INT32_MAX));
    MK_TRY(check_size("window", p.window, 0, INT32_MAX));
    MK_REQUIRE(p.causal == 0 || p.causal == 1, MK_ERR_VALUE, "causal must be 0 or 1, got %d",
               p.causal);
    MK_REQUIRE(!p.rope.cos, MK_ERR_VALUE, "rope.cos must be NULL: q comes rotated");
    MK_TRY(check_tensor("q", p.q, p.q_stride, p.q_head_stride, p.tokens_q, p.num_q_heads, p));
    MK_TRY(
        check_tensor("out", p.out, p.out_stride, p.out_head_stride, p.tokens_q, p.num_q_heads, p));
    if (p.lse) {
        MK_TRY(check_rows("lse", p.lse, p.lse_stride, p.num_q_heads, p.tokens_q, MK_F32));
    }
    const int32_t count = p.page_size ? p.num_pages ? p.page_size : 0 : p.tokens_k,
                  heads = p.num_kv_heads;
    MK_TRY(check_size("tokens_k", count, 0, INT32_MAX));
    MK_TRY(check_tensor("k", p.k, p.k_stride, p.k_head_stride, count, heads, p));
    MK_TRY(check_tensor("v", p.v, p.v_stride, p.v_head_stride, count, heads, p));
    MK_TRY(check_stride("k_page", p.k_page_stride, p.num_pages, p.head_dim));
    MK_TRY(check_stride("v_page", p.v_page_stride, p.num_pages, p.head_dim));
    return check_sequences(p);
}

// ---- division of the work ----

// Calls f(tile) for all tiles, those of late queries, which see most keys, first.
template <class F>
void for_tiles(const mk_attention_params& p, int32_t tile_queries, const F& f) {
    for (int32_t i = 0; i < p.batch; ++i) {
        AttentionTile tile{};
        tile.sequence = i;
        tile.queries = queries_of(p, i);
        if (tile.queries == 0) continue;
        tile.keys = static_cast<int32_t>(keys_of(p, i));
        tile.block_end = ceil_div(tile.keys, kKeyBlock);
        for (int32_t at = (tile.queries - 1) / tile_queries * tile_queries; at >= 0;
             at -= tile_queries) {
            tile.query = at;
            tile.num_queries = std::min(tile_queries, tile.queries - at);
            for (tile.kv_head = 0; tile.kv_head < p.num_kv_heads; ++tile.kv_head) f(tile);
        }
    }
}

struct Piece {
    AttentionTile tile;
    std::atomic<int32_t>* left;  // pieces of this tile that are not done; NULL: it is the only one
};

// What is done in pieces, and where they are.
struct Work {
    int64_t tiles = 0, blocks = 0, most_rows = 0;  // blocks of all tiles together
    int64_t pieces = 0, part_floats = 0;
};

class Memory {
  public:
    Memory(char* start) : at_(start) {}
    template <class T>
    T* take(int64_t count) {
        T* const start = reinterpret_cast<T*>(at_);
        at_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return start;
    }

  private:
    char* at_;
};

mk_status run(const mk_attention_params& p, int num_threads, const AttentionKernels& kernels) {
    const int32_t group = p.num_q_heads / p.num_kv_heads;
    const int32_t tile_queries = std::max(kTileRows / group, 1);
    Work work;
    double macs = 0;
    for_tiles(p, tile_queries, [&](const AttentionTile& tile) {
        ++work.tiles;
        work.blocks += tile.block_end;
        work.most_rows = std::max<int64_t>(work.most_rows, int64_t{tile.num_queries} * group);
        macs += 2.0 * tile.num_queries * group * tile.keys * p.head_dim;
    });
    if (macs < kMinParallelMacs) num_threads = 1;

    // Blocks of a piece; a tile of no more than that is one piece.
    int64_t piece_blocks = INT32_MAX;
    const int64_t pieces = kPiecesPerThread * num_threads;
    if (num_threads > 1 && work.tiles < pieces) piece_blocks = ceil_div(work.blocks, pieces);
    const int64_t part = kPartHeader + padded(p.head_dim);
    const auto part_floats = [&](const AttentionTile& tile) {
        return tile.block_end > piece_blocks ? tile.num_queries * group * tile.block_end * part
                                             : int64_t{0};
    };
    for_tiles(p, tile_queries,
              [&](const AttentionTile& tile) { work.part_floats += part_floats(tile); });
    if (work.part_floats > kMaxPartFloats) piece_blocks = INT32_MAX, work.part_floats = 0;
    for_tiles(p, tile_queries, [&](const AttentionTile& tile) {
        work.pieces += std::max<int64_t>(ceil_div<int64_t>(tile.block_end, piece_blocks), 1);
    });

    thread_local Buffer buffer;
    const size_t bytes = work.pieces * sizeof(Piece) + 64 +
                         work.tiles * sizeof(std::atomic<int32_t>) + 64 +
                         work.part_floats * sizeof(float);
    char* const start = static_cast<char*>(buffer.reserve(bytes));
    MK_REQUIRE(start, MK_ERR_MEMORY, "no memory for %lld pieces of work",
               static_cast<long long>(work.pieces));
    Memory memory(start);
    Piece* const list = memory.take<Piece>(work.pieces);
    auto* left = memory.take<std::atomic<int32_t>>(work.tiles);
    float* parts = memory.take<float>(work.part_floats);
    Piece* piece = list;
    for_tiles(p, tile_queries, [&](AttentionTile tile) {
        const int32_t blocks = tile.block_end;
        if (blocks <= piece_blocks) {
            *piece++ = {tile, nullptr};
            return;
        }
        const int64_t floats = part_floats(tile);
        tile.parts = parts;
        parts += floats;
        new (left)
            std::atomic<int32_t>(static_cast<int32_t>(ceil_div<int64_t>(blocks, piece_blocks)));
        for (tile.block = 0; tile.block < blocks; tile.block = tile.block_end) {
            tile.block_end =
                static_cast<int32_t>(std::min<int64_t>(blocks, tile.block + piece_blocks));
            *piece++ = {tile, left};
        }
        ++left;
    });

    const size_t scratch_bytes = kernels.scratch_floats(p, work.most_rows) * sizeof(float);
    const bool done =
        for_chunks(num_threads, work.pieces, scratch_bytes, [&](int64_t i, void* scratch) {
            const Piece& own = list[i];
            kernels.attend(p, own.tile, static_cast<float*>(scratch));
            // The last to end sees what the others have written.
            if (own.left && own.left->fetch_sub(1, std::memory_order_acq_rel) == 1) {
                kernels.join(p, own.tile, static_cast<float*>(scratch));
            }
        });
    MK_REQUIRE(done, MK_ERR_MEMORY, "no memory for %zu bytes of scratch", scratch_bytes);
    return MK_OK;
}

}  // namespace
}  // namespace mk::cpu

extern "C" mk_status mk_cpu_attention(const mk_attention_params* params,
                                      const mk_cpu_options* options) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    MK_TRY(mk::cpu::check_options(options));
    MK_TRY(mk::cpu::check(*params));
    int isa = 0;
    MK_TRY(mk::cpu::find_isa(options->isa, &isa));
    if (params->tokens_q == 0) return MK_OK;
    return mk::cpu::run(*params, options->num_threads, mk::cpu::kAttention[isa]);
}
