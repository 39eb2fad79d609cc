// Arguments of a Python function that are fields of an op's struct.
#pragma once

#include <cstdint>
#include <type_traits>

using Pointer = uintptr_t;

// A field of an op's struct as Python passes it: pointers are plain ints.
template <class T>
using Argument = std::conditional_t<std::is_pointer_v<T>, Pointer, T>;

template <class T>
T convert(const Argument<T>& value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value);
    } else {
        return value;
    }
}

// `at` finds it in the struct, or in a struct inside it.
template <class Params, class T>
struct Field {
    const char* name;
    T& (*at)(Params&);
};
