#include "quant/quant_embedding.cuh"

#define MK_EMBEDDING_QUANT(key, Dtype)                                    \
    MK_ENTRY(__launch_bounds__(mk::kRowMaxThreads), embedding_quant, key) \
    (const __grid_constant__ mk_embedding_quant_params params) {          \
        mk::quant_embedding<Dtype>(params);                               \
    }

MK_EMBEDDING_QUANT(bf16, mk::Bf16)
MK_EMBEDDING_QUANT(f16, mk::F16)
