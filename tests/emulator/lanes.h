// lanes(f): the handler that applies a plain function to the 32 lanes of an instruction.
//
// f must be a lambda with no captures. Its argument types say how to read op[1], op[2], ... and its
// result type how to write op[0]. The loops have no branch on the mask, so that the compiler
// vectorises them: inactive lanes are computed and dropped. f must therefore be total (no trap for
// any input).
#pragma once

#include <cfenv>
#include <tuple>
#include <utility>

#include "machine.h"

namespace emu {

struct Pred {
    bool value;
};

template <class T>
using RowOf = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <class T>
inline T from_row(RowOf<T> bits) {
    if constexpr (sizeof(T) == 8 || sizeof(T) == 4)
        return std::bit_cast<T>(bits);
    else if constexpr (sizeof(T) == 2)
        return std::bit_cast<T>(static_cast<uint16_t>(bits));
    else
        return std::bit_cast<T>(static_cast<uint8_t>(bits));
}

template <class T>
inline RowOf<T> to_row(T value) {
    if constexpr (sizeof(T) == 8 || sizeof(T) == 4)
        return std::bit_cast<RowOf<T>>(value);
    else if constexpr (std::is_signed_v<T>)
        return static_cast<uint32_t>(static_cast<int32_t>(value));
    else if constexpr (sizeof(T) == 2)
        return std::bit_cast<uint16_t>(value);
    else
        return std::bit_cast<uint8_t>(value);
}

template <class S>
inline void store_row(S* row, const S* values, Mask m) {
    if (m == kAllLanes) {
        std::memcpy(row, values, sizeof(S) * kLanes);
        return;
    }
    for (int l = 0; l < kLanes; ++l) row[l] = m >> l & 1 ? values[l] : row[l];
}

template <class T>
struct Source {
    const RowOf<T>* row;
    Source(Warp& w, uint32_t at) : row(w.row<RowOf<T>>(at)) {}
    T operator[](int l) const { return from_row<T>(row[l]); }
};
template <>
struct Source<Pred> {
    Mask mask;
    Source(Warp& w, uint32_t at) : mask(w.predicate(at)) {}
    Pred operator[](int l) const { return {(mask >> l & 1) != 0}; }
};

template <class F>
struct Signature;
template <class C, class R, class... A>
struct Signature<R (C::*)(A...) const> {
    using Result = R;
    using Arguments = std::tuple<A...>;
};

template <class F, class R, class... A, size_t... I>
[[gnu::noinline]] void apply_lanes(Warp& w, const Instr& in, Mask m, std::tuple<A...>*,
                                   std::index_sequence<I...>) {
    const std::tuple<Source<A>...> sources{Source<A>(w, in.op[I + 1])...};
    if constexpr (std::is_same_v<R, Pred>) {
        Mask out = 0;
        for (int l = 0; l < kLanes; ++l)
            out |= static_cast<Mask>(F{}(std::get<I>(sources)[l]...).value) << l;
        Mask& p = w.predicate(in.op[0]);
        p = (p & ~m) | (out & m);
    } else {
        RowOf<R> out[kLanes];
        for (int l = 0; l < kLanes; ++l) out[l] = to_row<R>(F{}(std::get<I>(sources)[l]...));
        store_row(w.row<RowOf<R>>(in.op[0]), out, m);
    }
}

template <class F>
void lanes_handler(Warp& w, const Instr& in, Mask m) {
    using S = Signature<decltype(&F::operator())>;
    using Args = typename S::Arguments;
    apply_lanes<F, typename S::Result>(w, in, m, static_cast<Args*>(nullptr),
                                       std::make_index_sequence<std::tuple_size_v<Args>>());
}

template <class F>
Handler lanes(F) {
    return lanes_handler<F>;
}

// The same under another IEEE rounding mode of the host; apply_lanes is out of line, so no
// arithmetic moves across the mode changes.
template <class F, int Mode>
void rounded_handler(Warp& w, const Instr& in, Mask m) {
    std::fesetround(Mode);
    lanes_handler<F>(w, in, m);
    std::fesetround(FE_TONEAREST);
}

template <class F>
Handler lanes_rounded(int mode, F) {
    switch (mode) {
        case FE_TOWARDZERO:
            return rounded_handler<F, FE_TOWARDZERO>;
        case FE_DOWNWARD:
            return rounded_handler<F, FE_DOWNWARD>;
        case FE_UPWARD:
            return rounded_handler<F, FE_UPWARD>;
        default:
            return lanes_handler<F>;
    }
}

template <class F>
inline void for_each_lane(Mask m, F f) {
    for (; m; m &= m - 1) f(std::countr_zero(m));
}

}  // namespace emu
