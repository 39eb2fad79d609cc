#include "embedding/embedding.cuh"

#define MK_EMBEDDING(key, kAligned)                                 \
    MK_ENTRY(__launch_bounds__(mk::kRowMaxThreads), embedding, key) \
    (const __grid_constant__ mk_embedding_params params) { mk::embedding<kAligned>(params); }

MK_EMBEDDING(b16, true)
MK_EMBEDDING(b16_unaligned, false)
