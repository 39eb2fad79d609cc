// The epilogues (linear_epilogue.cuh) of kernels that serve all products with quantised weights.
#pragma once

#include "linear/linear_epilogue.cuh"
#include "quant/quant_tiles.h"

namespace mk {

// body(epilogue), of the product and the dtype at hand.
template <class Body>
__device__ __forceinline__ void with_epilogue(const QuantOutputs& to, const Body& body) {
    const bool is_bf16 = to.dtype == MK_BF16;
    switch (to.epilogue) {
        case QuantEpilogue::kPlain:
            is_bf16 ? body(PlainEpilogue<Bf16>(to.linear)) : body(PlainEpilogue<F16>(to.linear));
            break;
        case QuantEpilogue::kSwiglu:
            is_bf16 ? body(SwigluEpilogue<Bf16>(to.linear)) : body(SwigluEpilogue<F16>(to.linear));
            break;
        case QuantEpilogue::kQkv:
            is_bf16 ? body(QkvEpilogue<Bf16>(to.qkv)) : body(QkvEpilogue<F16>(to.qkv));
            break;
    }
}

}  // namespace mk
