// Functions over Vec, which the including file has defined.
#pragma once

#include "cpu/vec.h"

namespace mk::cpu {
namespace {

// exp(x) for x <= 89, and exp(-86) for x < -86: 2^n * e^r with |r| <= ln(2)/2 and e^r = 1 + r +
// r^2 * q(r), q of degree 4 fitted for the least relative error of e^r (2^-28; 2^-24 when rounded).
MK_INLINE Vec exp_clamped(Vec x) {
    x = Vec::min(Vec::set(89.f), Vec::max(Vec::set(-86.f), x));  // a NaN passes
    const Vec n = (x * Vec::set(0x1.715476p0f)).round();
    const Vec r = Vec::fma(n, Vec::set(0x1.05c610p-29f), Vec::fma(n, Vec::set(-0x1.62e430p-1f), x));
    Vec q = Vec::set(0x1.6a2256p-10f);
    q = Vec::fma(q, r, Vec::set(0x1.123b02p-7f));
    q = Vec::fma(q, r, Vec::set(0x1.5558f8p-5f));
    q = Vec::fma(q, r, Vec::set(0x1.555490p-3f));
    q = Vec::fma(q, r, Vec::set(0x1.fffffcp-2f));
    return (Vec::fma(q, r * r, r) + Vec::set(1.f)).scale(n);
}

MK_INLINE Vec silu(Vec y) { return y / (Vec::set(1.f) + exp_clamped(Vec::set(0.f) - y)); }

}  // namespace
}  // namespace mk::cpu
