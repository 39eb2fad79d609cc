// Loops whose index is a constant: where an immediate of an instruction depends on it.
#pragma once

namespace mk {

template <int kValue>
struct Constant {
    __device__ constexpr operator int() const { return kValue; }
};

// body(i) for i = 0 ... kCount - 1; `i` may be a template argument in the body.
template <int kCount, int kFirst = 0, class Body>
__device__ __forceinline__ void static_for(const Body& body) {
    if constexpr (kFirst < kCount) {
        body(Constant<kFirst>());
        static_for<kCount, kFirst + 1>(body);
    }
}

}  // namespace mk
