// Vec, a vector of 16 floats, in plain C++, for any processor. On x86-64 every fma is a call into
// libm.
#pragma once

#include "cpu/vec.h"

namespace mk::cpu {
namespace {

template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

float widen(float a) { return a; }

float widen(Bf16 a) { return bit_cast<float>(static_cast<uint32_t>(a.bits) << 16); }

float widen(F16 a) {
    const uint32_t sign = (a.bits & 0x8000u) << 16, rest = a.bits & 0x7fffu;
    if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // Exponents differ by 112; the product makes subnormals normal.
    return bit_cast<float>(sign | rest << 13) * 0x1p112f;
}

void narrow(float a, float* out) { *out = a; }

void narrow(float a, Bf16* out) {
    const uint32_t bits = bit_cast<uint32_t>(a);
    out->bits = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void narrow(float a, F16* out) {
    const uint32_t bits = bit_cast<uint32_t>(a), sign = bits >> 16 & 0x8000u;
    const uint32_t rest = bits & 0x7fffffffu;
    uint32_t half;
    if (rest > 0x7f800000u) {
        half = 0x7e00;
    } else if (rest >= 0x477ff000u) {  // 65520 and more
        half = 0x7c00;
    } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24
        half = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
    } else {
        half = (rest - 0x38000000u + 0xfff + (rest >> 13 & 1)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | half);
}

struct Vec {
    static constexpr int kTileM = 2, kTileN = 3;

    float v[kLanes];

    // f(0) ... f(15)
    template <class F>
    static Vec each(const F& f) {
        Vec a;
        for (int l = 0; l < kLanes; ++l) a.v[l] = f(l);
        return a;
    }
    static Vec set(float a) {
        return each([&](int) { return a; });
    }
    template <class T>
    static Vec load(const T* p) {
        return each([&](int l) { return widen(p[l]); });
    }
    // The first `count` <= 16, then zeros; what lies behind is not touched.
    template <class T>
    static Vec load(const T* p, int count) {
        return each([&](int l) { return l < count ? widen(p[l]) : 0.f; });
    }

    // The odd and the even ones of 32, or of `count` <= 32 and then zeros.
    static Vec load_odd(const Bf16* p, int count = 2 * kLanes) {
        return each([&](int l) { return 2 * l + 1 < count ? widen(p[2 * l + 1]) : 0.f; });
    }
    static Vec load_even(const Bf16* p, int count = 2 * kLanes) {
        return each([&](int l) { return 2 * l < count ? widen(p[2 * l]) : 0.f; });
    }

    // Rounded to nearest even; every NaN as the positive quiet one without payload.
    void store(float* p) const {
        for (int l = 0; l < kLanes; ++l) p[l] = v[l];
    }
    template <class T>
    void store(T* p, int count) const {
        for (int l = 0; l < count; ++l) narrow(v[l] == v[l] ? v[l] : __builtin_nanf(""), p + l);
    }

    static Vec fma(const Vec& a, const Vec& b, const Vec& c) {
        return each([&](int l) { return __builtin_fmaf(a.v[l], b.v[l], c.v[l]); });
    }
    friend Vec operator+(const Vec& a, const Vec& b) {
        return each([&](int l) { return a.v[l] + b.v[l]; });
    }
    friend Vec operator-(const Vec& a, const Vec& b) {
        return each([&](int l) { return a.v[l] - b.v[l]; });
    }
    friend Vec operator*(const Vec& a, const Vec& b) {
        return each([&](int l) { return a.v[l] * b.v[l]; });
    }
    friend Vec operator/(const Vec& a, const Vec& b) {
        return each([&](int l) { return a.v[l] / b.v[l]; });
    }
    // b if either is a NaN.
    static Vec min(const Vec& a, const Vec& b) {
        return each([&](int l) { return a.v[l] < b.v[l] ? a.v[l] : b.v[l]; });
    }
    static Vec max(const Vec& a, const Vec& b) {
        return each([&](int l) { return a.v[l] > b.v[l] ? a.v[l] : b.v[l]; });
    }
    Vec round() const {
        return each([&](int l) { return __builtin_rintf(v[l]); });
    }
    Vec scale(const Vec& n) const {  // * 2^n
        return each([&](int l) {
            return v[l] == v[l] ? __builtin_ldexpf(v[l], static_cast<int>(n.v[l])) : v[l];
        });
    }

    // sums[i] = the sum of the lanes of acc[i].
    static void reduce(const Vec (&acc)[kTileN], float* sums) {
        for (int i = 0; i < kTileN; ++i) {
            Vec s = acc[i];
            for (int half = kLanes / 2; half > 0; half /= 2) {
                for (int l = 0; l < half; ++l) s.v[l] += s.v[l + half];
            }
            sums[i] = s.v[0];
        }
    }
};

}  // namespace
}  // namespace mk::cpu
