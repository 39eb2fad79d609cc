// The operations of atom, red and their asynchronous kin.
#pragma once

#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "convert.h"
#include "ptx.h"

namespace emu {

enum AtomOp : uint8_t { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kExch, kCas };

inline float min_number(float a, float b) { return a != a ? b : b != b ? a : a < b ? a : b; }

template <class T>
T combine(uint8_t op, T old, T b, T c) {
    if constexpr (std::is_floating_point_v<T>) {
        return op == kAdd ? old + b : b;
    } else {
        using U = std::make_unsigned_t<T>;
        switch (op) {
            case kAdd:
                return static_cast<T>(static_cast<U>(old) + static_cast<U>(b));
            case kMin:
                return old < b ? old : b;
            case kMax:
                return old < b ? b : old;
            case kInc:
                return old >= b ? T{0} : static_cast<T>(old + 1);
            case kDec:
                return old == 0 || old > b ? b : static_cast<T>(old - 1);
            case kAnd:
                return old & b;
            case kOr:
                return old | b;
            case kXor:
                return old ^ b;
            case kCas:
                return old == b ? c : old;
            default:
                return b;
        }
    }
}

// Half types: one 16-bit value at a time. Widening is exact and so is the sum in fp32 (up to its
// rounding, which does not matter: 24 >= 2 * 11 + 2 bits).
struct Half {
    uint16_t bits;
};
struct Bfloat {
    uint16_t bits;
};
inline Half combine(uint8_t op, Half old, Half b, Half) {
    const float x = f16_to_f32(old.bits), y = f16_to_f32(b.bits);
    return {f32_to_f16(op == kAdd ? x + y : op == kMin ? min_number(x, y) : -min_number(-x, -y))};
}
inline Bfloat combine(uint8_t op, Bfloat old, Bfloat b, Bfloat) {
    const float x = bf16_to_f32(old.bits), y = bf16_to_f32(b.bits);
    return {f32_to_bf16(op == kAdd ? x + y : op == kMin ? min_number(x, y) : -min_number(-x, -y))};
}
template <class H>
struct Pair {
    H lo, hi;
};
template <class H>
Pair<H> combine(uint8_t op, Pair<H> old, Pair<H> b, Pair<H>) {
    return {combine(op, old.lo, b.lo, b.lo), combine(op, old.hi, b.hi, b.hi)};
}

template <class T>
T atomic_update(void* p, uint8_t op, T b, T c) {
    using U = std::conditional_t<sizeof(T) == 8, uint64_t,
                                 std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    std::atomic_ref<U> cell(*static_cast<U*>(p));
    U old = cell.load();
    while (!cell.compare_exchange_weak(
        old, std::bit_cast<U>(combine(op, std::bit_cast<T>(old), b, c)))) {
    }
    return std::bit_cast<T>(old);
}

// to[i] = op(to[i], from[i]) for `bytes` bytes of a type, element by element.
using Reduction = void (*)(uint8_t op, void* to, const void* from, uint32_t bytes);

template <class T>
void reduce_elements(uint8_t op, void* to, const void* from, uint32_t bytes) {
    for (uint32_t at = 0; at < bytes; at += sizeof(T)) {
        T value;
        std::memcpy(&value, static_cast<const uint8_t*>(from) + at, sizeof value);
        atomic_update<T>(static_cast<uint8_t*>(to) + at, op, value, value);
    }
}

// Null if there is no such one.
inline Reduction find_reduction(uint8_t op, Type type) {
    const bool bitwise = op == kAnd || op == kOr || op == kXor;
    const bool counts = op == kInc || op == kDec;
    if (bitwise && type != Type::b32 && type != Type::b64) return nullptr;
    switch (type) {
        case Type::b32:
            return bitwise ? reduce_elements<uint32_t> : nullptr;
        case Type::b64:
            return bitwise ? reduce_elements<uint64_t> : nullptr;
        case Type::u32:
            return reduce_elements<uint32_t>;
        case Type::s32:
            return counts ? nullptr : reduce_elements<int32_t>;
        case Type::u64:
            return reduce_elements<uint64_t>;
        case Type::s64:
            return counts ? nullptr : reduce_elements<int64_t>;
        case Type::f32:
            return op == kAdd ? reduce_elements<float> : nullptr;
        case Type::f64:
            return op == kAdd ? reduce_elements<double> : nullptr;
        case Type::f16:
            return counts ? nullptr : reduce_elements<Half>;
        case Type::bf16:
            return counts ? nullptr : reduce_elements<Bfloat>;
        default:
            return nullptr;
    }
}

}  // namespace emu
