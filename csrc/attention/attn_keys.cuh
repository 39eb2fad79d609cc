// Where the queries and keys of a sequence are, and which of its keys some of its queries see.
#pragma once

#include "attention/mask.cuh"

namespace mk {

struct Sequence {
    int first_q, num_q;  // tokens of q
    int first_k, num_k;  // of k; where it is paged, the first key is 0

    __device__ __forceinline__ Sequence(const mk_attention_params& p, int sequence) {
        first_q = p.cu_seqlens_q[sequence];
        num_q = p.cu_seqlens_q[sequence + 1] - first_q;
        first_k = p.page_size ? 0 : p.cu_seqlens_k[sequence];
        num_k = p.page_size ? p.seqlens_k[sequence] + (p.seqlens_k_add ? num_q : 0)
                            : p.cu_seqlens_k[sequence + 1] - first_k;
    }
};

// The keys that queries row ... last see, as an interval and in tiles of kN, each at a multiple of
// kN: so a query's tiles do not depend on what other queries are in its block.
template <int kN>
struct SeenKeys {
    int begin, end;
    int tile_begin, tile_end;

    __device__ __forceinline__ SeenKeys(const VisibleKeys& visible, int row, int last) {
        begin = visible.begin(row);
        end = visible.end(last);
        tile_begin = begin / kN;
        tile_end = end > begin ? (end + kN - 1) / kN : tile_begin;
    }
};

}  // namespace mk
