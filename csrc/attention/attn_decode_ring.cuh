// What a block of attention_decode works on, and how its warps get at the keys and values of it.
//
//   keys of a split   | t0 | t1 | t2 | t3 | t4 | ...     tiles of 16 keys, dealt to the 4 warps
//   from
//                       w0   w3   w2   w1   w0           the last one back
//   ring of a warp    | K0 | V0 | K1 |                   units of K or of V in turn, here 3 of them
//
// A warp fills its own ring and needs no barrier: it waits for the oldest unit, uses it, and loads
// the next into its place. A tile lies in one page; the lanes hold the numbers of the next 32.
// Going backwards, a warp meets new keys and the end of the sequence in its first tile, so that the
// rotation of new keys is under way together with the first loads.
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

    // False if there is nothing to do.
    __device__ __forceinline__ bool find(const AttnDecodeArgs& args, int max_rows) {
        const mk_attention_decode_params& p = args.p;
        sequence = blockIdx.z;
        kv_head = blockIdx.x / args.row_blocks;
        first_row = (blockIdx.x - kv_head * args.row_blocks) * max_rows;
        first_query = p.cu_seqlens_q ? p.cu_seqlens_q[sequence] : sequence;
        const int end = p.cu_seqlens_q ? p.cu_seqlens_q[sequence + 1] : sequence + 1;
        num_queries = end - first_query;
        if (num_queries <= 0 || num_queries > p.max_seqlen_q) return false;
        if (first_query < 0 || end > p.tokens) return false;
        num_rows = min(num_queries * args.group - first_row, max_rows);
        num_cached = p.seqlens_k[sequence];
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
};

__device__ __forceinline__ int64_t position_of(const mk_rope& rope, int64_t token, int place) {
    return rope.positions ? load_index(rope.positions, rope.positions_dtype, token) : place;
}

// A warp's ring of K and V tiles, and what it takes to fill it.
template <class Dtype, class Tile>
struct KvRing {
    static constexpr int kTileKeys = kAttnDecodeTileKeys;
    static constexpr int kRowBytes = Tile::kRowBytes;
    static constexpr int kUnitBytes = Tile::kUnitBytes;
    static constexpr int kUnits = Tile::kUnits;
    static constexpr int kLanesPerKey = kRowBytes / 16;
    static constexpr int kKeysPerLoad = 32 / kLanesPerKey;

    const AttnDecodeArgs& args;
    const DecodeWork& work;
    uint8_t* smem;         // of this warp
    const int32_t* table;  // page numbers of the sequence
    int64_t
        lane_offset;  // of this lane's 16 bytes: in the caches, from a tile's first key of head 0
    int lane_smem;    // and in a unit
    int lane;
    int first_visible;  // no query sees a key before it

    int first_key;  // of this warp's tile 0; the next ones are 64 keys before each other
    int num_tiles;  // of this warp
    int unit;       // byte offset in the ring: the oldest one, and the next to be loaded
    int page;       // of tile 32 * n + lane of this warp; negative: there is none

    // A load takes kKeysPerLoad keys. Chunk c of a row of 16-byte chunks lies at c ^ (row % 8), so
    // that the 8 rows of a matrix that ldmatrix reads meet no bank twice.
    __device__ __forceinline__ KvRing(const AttnDecodeArgs& args_, const DecodeWork& work_,
                                      uint8_t* smem_)
        : args(args_), work(work_) {
        const mk_attention_decode_params& p = args.p;
        lane = threadIdx.x % 32;
        const int row = lane / kLanesPerKey;
        const int chunk = lane % kLanesPerKey;
        smem = smem_ + threadIdx.x / 32 * Tile::kRingBytes;
        table = p.block_table + work.sequence * p.block_table_stride;
        lane_offset = work.kv_head * p.cache_head_stride + row * p.cache_stride + chunk * kVec;
        lane_smem = row * kRowBytes + (chunk ^ row) * 16;
        first_visible = p.window ? work.num_keys - work.num_queries - p.window + 1 : 0;
    }

    __device__ __forceinline__ void start(int split) {
        const int begin = work.span_begin + split * work.chunk;
        const int end = min(begin + work.chunk, work.num_keys);
        const int tiles = (end - begin + kTileKeys - 1) / kTileKeys;
        const int last_tile = tiles - 1 - static_cast<int>(threadIdx.x) / 32;
        num_tiles = (last_tile + kAttnDecodeWarps) / kAttnDecodeWarps;
        first_key = begin + last_tile * kTileKeys;
        unit = 0;
    }

    __device__ __forceinline__ int key_of_tile(int tile) const {
        return first_key - tile * (kAttnDecodeWarps * kTileKeys);
    }

    // Where a tile begins in the caches, without lane_offset; negative: there is no such page.
    // Tiles are asked for in order, some of them twice.
    __device__ __forceinline__ int64_t offset_of_tile(int tile) {
        const mk_attention_decode_params& p = args.p;
        if (tile % 32 == 0) {
            page = -1;
            if (tile + lane < num_tiles && work.num_pages > 0) {
                page = table[key_of_tile(tile + lane) >> args.page_shift];
                if (page >= work.num_pages) page = -1;
            }
        }
        const int number = __shfl_sync(0xFFFFFFFFu, page, tile % 32);
        const int in_page = key_of_tile(tile) & ((1 << args.page_shift) - 1);
        return number < 0 ? -1 : number * p.cache_page_stride + in_page * p.cache_stride;
    }

    // K or V of a tile into the oldest unit's place, which all lanes are done with. A group of
    // copies is committed in any case. kIsFirst: the tile may be this warp's tile 0, the only one
    // that new keys and the end can be in.
    template <bool kIsFirst>
    __device__ __forceinline__ void load(bool is_k, int tile) {
        __syncwarp();
        if (tile < num_tiles) {
            const int64_t offset = offset_of_tile(tile);
            const int key = key_of_tile(tile);
            void* const cache = is_k ? args.p.k_cache : args.p.v_cache;
            const bool is_edge = offset < 0 || key < first_visible ||
                                 (kIsFirst && key + kTileKeys > work.num_cached);
            if (is_edge) {
                load_edge<kIsFirst>(is_k, row_of(cache, offset + lane_offset, 1), offset < 0, key);
            } else {
                const void* from = row_of(cache, offset + lane_offset, 1);
                const uint32_t to = address(unit + lane_smem);
                MK_UNROLL
                for (int i = 0; i < kTileKeys; i += kKeysPerLoad) {
                    ptx::cp_async_cg_16((to ^ (i % 8 * 16)) + i * kRowBytes, from);
                    from = row_of(from, kKeysPerLoad, args.p.cache_stride);
                }
            }
        }
        ptx::cp_async_commit_group();
        unit = unit == (kUnits - 1) * kUnitBytes ? 0 : unit + kUnitBytes;
    }

    __device__ __forceinline__ uint32_t address(int in_ring) const {
        return static_cast<uint32_t>(__cvta_generic_to_shared(smem)) + in_ring;
    }

    // A tile with keys that are not to be read, or not in the cache yet: these are rotated (K) and
    // appended on the way. What is not there is 0; on a page that does not exist K is NaN, which
    // spoils the rows that see it, and V 0, which spoils no other.
    template <bool kIsFirst>
    __device__ __forceinline__ void load_edge(bool is_k, void* in_cache, bool is_no_page, int key) {
        const mk_attention_decode_params& p = args.p;
        MK_NO_UNROLL
        for (int i = 0; i < kTileKeys; i += kKeysPerLoad) {
            const int this_key = key + i + lane / kLanesPerKey;
            const int in_ring = ((unit + lane_smem) ^ (i % 8 * 16)) + i * kRowBytes;
            uint4& to = *reinterpret_cast<uint4*>(smem + in_ring);
            if (this_key < first_visible || this_key >= work.num_keys) {
                to = {0, 0, 0, 0};
            } else if (is_no_page) {
                const uint32_t bits = is_k ? 0x7FFF7FFFu : 0u;  // NaN in both dtypes
                to = {bits, bits, bits, bits};
            } else if (!kIsFirst || this_key < work.num_cached) {
                ptx::cp_async_cg_16(address(in_ring), in_cache);
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

    // The oldest unit, which is there when this returns.
    __device__ __forceinline__ uint32_t wait() const {
        ptx::cp_async_wait_group<kUnits - 1>();
        __syncwarp();
        return address(unit);
    }
};

}  // namespace mk
