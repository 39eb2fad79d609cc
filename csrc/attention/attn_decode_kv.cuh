// What a block of attention_decode works on, which tiles of keys its warps take, and the tiles at
// the edges, which are written key by key.
//
//   keys of a split   | t0 | t1 | t2 | t3 | t4 | ...     tiles of 16 keys, dealt to the 4 warps
//   from
//                       w0   w3   w2   w1   w0           the last one back
//
// A tile lies in one page; the lanes of a warp hold the numbers of its next 32. Going backwards, a
// warp meets new keys and the end of the sequence in its first tile, so that the rotation of new
// keys is under way together with the first loads.
#pragma once

#include "attention/attn_decode_rope.cuh"
#include "attention/attn_decode_tiles.h"

namespace mk {

// What a block works on: rows of a KV group of a sequence.
struct DecodeWork {
    int sequence, kv_head;
    int first_query, num_queries;  // tokens of q
    int first_row, num_rows;       // of the KV group, this block's
    int num_keys;                  // with those of k_new
    int num_cached;                // of them in the cache
    int num_pages;                 // 0 if the lengths are out of range: then every key is NaN
    int span_begin, chunk, num_splits;

    // False if there is nothing to do. What it reads is not kept in L1: it may be read before
    // earlier kernels are done, and again.
    __device__ __forceinline__ bool find(const AttnDecodeArgs& args, int max_rows) {
        const mk_attention_decode_params& p = args.p;
        num_splits = 0;
        sequence = blockIdx.z;
        kv_head = blockIdx.x / args.row_blocks;
        first_row = (blockIdx.x - kv_head * args.row_blocks) * max_rows;
        first_query = p.cu_seqlens_q ? ptx::ld_global_cg(p.cu_seqlens_q + sequence) : sequence;
        const int end =
            p.cu_seqlens_q ? ptx::ld_global_cg(p.cu_seqlens_q + sequence + 1) : sequence + 1;
        num_queries = end - first_query;
        if (num_queries <= 0 || num_queries > p.max_seqlen_q) return false;
        if (first_query < 0 || end > p.tokens) return false;
        num_rows = min(num_queries * args.group - first_row, max_rows);
        num_cached = ptx::ld_global_cg(p.seqlens_k + sequence);
        num_pages = p.num_pages;
        const int num_new = p.k_new ? num_queries : 0;
        if (num_cached < 0 || num_cached > (p.max_pages << args.page_shift) - num_new) {
            num_cached = num_queries - num_new;
            num_pages = 0;
        }
        num_keys = num_cached + num_new;
        span_begin = attn_decode_span_begin(num_keys, p.window);
        const int span = num_keys - span_begin;
        chunk = attn_decode_chunk(span);
        num_splits = max((span + chunk - 1) / max(chunk, 1), 1);
        return num_rows > 0;
    }

    // Keys [begin, end) that a row may see; row counts from the block's first.
    __device__ __forceinline__ int2 visible(const AttnDecodeArgs& args, int row) const {
        const int place = num_keys - num_queries + (first_row + row) / args.group;
        const int window = args.p.window;
        const int end = args.p.causal ? place + 1 : window ? place + window : num_keys;
        return {window ? place - window + 1 : 0, min(end, num_keys)};
    }

    // Keys [begin, end) that all queries see: from the last query's first to the first's last.
    __device__ __forceinline__ int2 seen_by_all(const AttnDecodeArgs& args) const {
        const int window = args.p.window;
        const int first_query_at = num_keys - num_queries;
        const int end = args.p.causal ? first_query_at + 1
                        : window      ? min(first_query_at + window, num_keys)
                                      : num_keys;
        return {window ? num_keys - window : 0, end};
    }
};

__device__ __forceinline__ int64_t position_of(const mk_rope& rope, int64_t token, int place) {
    return rope.positions ? load_index(rope.positions, rope.positions_dtype, token) : place;
}

// The tiles of a warp in a split. A copy of one by cp.async takes kKeysPerLoad keys an instruction.
template <class Dtype, class Tile>
struct KvTiles {
    static constexpr int kTileKeys = kAttnDecodeTileKeys;
    static constexpr int kLanesPerKey = 2 * Tile::kHeadDim / 16;
    static constexpr int kKeysPerLoad = 32 / kLanesPerKey;

    const AttnDecodeArgs& args;
    const DecodeWork& work;
    const int32_t* table;  // page numbers of the sequence
    int64_t
        lane_offset;  // of this lane's 16 bytes: in the caches, from a tile's first key of head 0
    int lane_smem;    // and in a unit
    int lane;
    int first_visible;  // no query sees a key before it

    int first_key;  // of this warp's tile 0; the next ones are 64 keys before each other
    int num_tiles;  // of this warp
    int page;       // of tile 32 * n + lane of this warp; negative: there is none

    __device__ __forceinline__ KvTiles(const AttnDecodeArgs& args_, const DecodeWork& work_)
        : args(args_), work(work_), lane(threadIdx.x % 32) {}

    // Once it is known what to work on.
    __device__ __forceinline__ void begin() {
        const mk_attention_decode_params& p = args.p;
        const int row = lane / kLanesPerKey;
        const int chunk = lane % kLanesPerKey;
        table = p.block_table + work.sequence * p.block_table_stride;
        lane_offset = work.kv_head * p.cache_head_stride + row * p.cache_stride + chunk * kVec;
        lane_smem = Tile::chunk_at(row, chunk);
        first_visible = p.window ? work.num_keys - work.num_queries - p.window + 1 : 0;
    }

    __device__ __forceinline__ void start(int split) {
        const int begin = work.span_begin + split * work.chunk;
        const int end = min(begin + work.chunk, work.num_keys);
        const int tiles = (end - begin + kTileKeys - 1) / kTileKeys;
        const int last_tile = tiles - 1 - static_cast<int>(threadIdx.x) / 32;
        num_tiles = (last_tile + kAttnDecodeWarps) / kAttnDecodeWarps;
        first_key = begin + last_tile * kTileKeys;
    }

    __device__ __forceinline__ int key_of_tile(int tile) const {
        return first_key - tile * (kAttnDecodeWarps * kTileKeys);
    }
    __device__ __forceinline__ int key_in_page(int key) const {
        return key & ((1 << args.page_shift) - 1);
    }

    // The pages of tiles tile ... tile + 31.
    __device__ __forceinline__ void look_up(int tile) {
        page = -1;
        if (tile + lane < num_tiles && work.num_pages > 0) {
            page = ptx::ld_global_cg(table + (key_of_tile(tile + lane) >> args.page_shift));
            if (page >= work.num_pages) page = -1;
        }
    }

    // Where a tile begins in the caches, without lane_offset; negative: there is no such page.
    __device__ __forceinline__ int64_t offset_of_tile(int tile) const {
        const mk_attention_decode_params& p = args.p;
        const int number = __shfl_sync(0xFFFFFFFFu, page, tile % 32);
        const int in_page = key_in_page(key_of_tile(tile));
        return number < 0 ? -1 : number * p.cache_page_stride + in_page * p.cache_stride;
    }

    // Whether some of a tile's keys are not to be read or, in tile 0, not in the cache yet.
    template <bool kIsFirst>
    __device__ __forceinline__ bool is_edge(int key) const {
        return key < first_visible || (kIsFirst && key + kTileKeys > work.num_cached);
    }

    // K or V of a tile, this lane's part of which lies at `in_cache`, with keys that are not to be
    // read, or not in the cache yet: these are rotated (K) and appended on the way. What is not
    // there is 0; on a page that does not exist K is NaN, which spoils the rows that see it, and V
    // 0, which spoils no other. Only a warp's first tile can have new keys and the end.
    template <bool kIsFirst>
    __device__ __forceinline__ void load_edge(bool is_k, uint8_t* smem, int unit, void* in_cache,
                                              bool is_no_page, int key) {
        const mk_attention_decode_params& p = args.p;
        MK_NO_UNROLL
        for (int i = 0; i < kTileKeys; i += kKeysPerLoad) {
            const int this_key = key + i + lane / kLanesPerKey;
            uint8_t* const at = smem + (((unit + lane_smem) ^ (i % 8 * 16)) + i * Tile::kPitch);
            uint4& to = *reinterpret_cast<uint4*>(at);
            if (this_key < first_visible || this_key >= work.num_keys) {
                to = {0, 0, 0, 0};
            } else if (is_no_page) {
                const uint32_t bits = is_k ? 0x7FFF7FFFu : 0u;  // NaN in both dtypes
                to = {bits, bits, bits, bits};
            } else if (!kIsFirst || this_key < work.num_cached) {
                ptx::cp_async_cg_16(static_cast<uint32_t>(__cvta_generic_to_shared(at)), in_cache);
            } else {
                const int64_t token = work.first_query + this_key - work.num_cached;
                const void* from =
                    row_of(is_k ? p.k_new : p.v_new, token, is_k ? p.k_new_stride : p.v_new_stride);
                from = row_of(from, work.kv_head, is_k ? p.k_new_head_stride : p.v_new_head_stride);
                const int feature = lane % kLanesPerKey * kVec;
                const Vec8 x =
                    is_k ? load_rotated8<Dtype>(p.rope, args.rope_is_vector, from, feature,
                                                position_of(p.rope, token, this_key))
                         : load8<true>(from, feature, 0);
                if (work.first_row == 0) store8<true>(in_cache, 0, 0, x);
                to = {x.pair[0], x.pair[1], x.pair[2], x.pair[3]};
            }
            in_cache = row_of(in_cache, kKeysPerLoad, p.cache_stride);
        }
    }
};

}  // namespace mk
