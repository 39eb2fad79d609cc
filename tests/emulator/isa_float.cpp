// fp32, fp64 and packed f32x2 arithmetic, and the special functions. Opcodes shared with other
// types go on to isa_int.cpp and isa_half.cpp.
//
// The .approx functions return the exact result rounded to fp32 (nearly always), which is inside
// the documented error of the hardware's; the hardware's last bits differ.

#include <cfenv>
#include <cmath>

#include "convert.h"
#include "decode.h"
#include "floats.h"
#include "lanes.h"

namespace emu {

void decode_int_add(Decode& d);
void decode_int_sub(Decode& d);
void decode_int_mul(Decode& d);
void decode_int_mad(Decode& d);
void decode_int_div(Decode& d);
void decode_int_min(Decode& d);
void decode_int_max(Decode& d);
void decode_int_abs(Decode& d);
void decode_int_neg(Decode& d);
bool decode_half(Decode& d);  // false: the statement has no half type

namespace {

enum Arithmetic { kAdd, kSub, kMul, kFma };

template <int Op, class T>
inline T evaluate(T a, T b, T c) {
    if constexpr (Op == kAdd) return a + b;
    if constexpr (Op == kSub) return a - b;
    if constexpr (Op == kMul) return a * b;
    return std::fma(a, b, c);
}

template <int Op, bool Ftz, bool Sat>
inline float evaluate32(float a, float b, float c) {
    const float r = evaluate<Op>(flush<Ftz>(a), flush<Ftz>(b), flush<Ftz>(c));
    return Sat ? saturate(flush<Ftz>(r)) : canonical(flush<Ftz>(r));
}

template <int Op, bool Ftz, bool Sat>
Handler arithmetic32(int rounding) {
    if constexpr (Op == kFma)
        return lanes_rounded(
            rounding, [](float a, float b, float c) { return evaluate32<Op, Ftz, Sat>(a, b, c); });
    else
        return lanes_rounded(rounding,
                             [](float a, float b) { return evaluate32<Op, Ftz, Sat>(a, b, 0.0f); });
}

template <int Op, bool Ftz>
Handler arithmetic32x2(int rounding) {
    constexpr auto lo = [](uint64_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x)); };
    constexpr auto hi = [](uint64_t x) {
        return std::bit_cast<float>(static_cast<uint32_t>(x >> 32));
    };
    return lanes_rounded(rounding, [](uint64_t a, uint64_t b, uint64_t c) {
        const float l =
            evaluate32<Op, Ftz, false>(decltype(lo){}(a), decltype(lo){}(b), decltype(lo){}(c));
        const float h =
            evaluate32<Op, Ftz, false>(decltype(hi){}(a), decltype(hi){}(b), decltype(hi){}(c));
        return uint64_t{std::bit_cast<uint32_t>(h)} << 32 | std::bit_cast<uint32_t>(l);
    });
}

// The type that decides the family: the first type among the modifiers.
Type first_type(const Decode& d) {
    for (const std::string& mod : d.st.mods)
        if (auto t = parse_type(mod)) return *t;
    return Type::none;
}
bool is_half(Type t) {
    return t == Type::f16 || t == Type::bf16 || t == Type::f16x2 || t == Type::bf16x2;
}

template <int Op>
void arithmetic(Decode& d) {
    const int rounding = d.take_rounding();
    const bool ftz = d.take("ftz"), sat = d.take("sat");
    const Type t = d.take_type();
    // add.f32.bf16 and the like: the half operands are widened first.
    const Type narrow = d.take_type_or(Type::none);
    auto source = [&](size_t i) {
        if (narrow == Type::none || i == d.count() - 1) return d.src(i, t);
        const uint32_t half = d.src(i, narrow), temp = d.temporary();
        d.emit_internal(narrow == Type::f16 ? lanes([](uint16_t x) { return f16_to_f32(x); })
                                            : lanes([](uint16_t x) { return bf16_to_f32(x); }),
                        {temp, half});
        return temp;
    };
    const uint32_t a = source(1), b = source(2);
    const uint32_t c = Op == kFma ? source(3) : b;
    Handler fn;
    if (t == Type::f64) {
        if constexpr (Op == kFma)
            fn = lanes_rounded(rounding, [](double x, double y, double z) {
                return canonical(std::fma(x, y, z));
            });
        else
            fn = lanes_rounded(
                rounding, [](double x, double y) { return canonical(evaluate<Op>(x, y, 0.0)); });
    } else if (t == Type::f32x2) {
        if (d.device().capability < 100) d.unknown("f32x2 needs sm_100");
        fn = ftz ? arithmetic32x2<Op, true>(rounding) : arithmetic32x2<Op, false>(rounding);
    } else if (t == Type::f32) {
        fn = ftz ? (sat ? arithmetic32<Op, true, true>(rounding)
                        : arithmetic32<Op, true, false>(rounding))
                 : (sat ? arithmetic32<Op, false, true>(rounding)
                        : arithmetic32<Op, false, false>(rounding));
    } else {
        d.unknown("type");
    }
    d.emit(fn, t == Type::f64 ? Class::fp64 : Class::fp32, {d.dst(0, t), a, b, c});
}

void no_integers(Decode& d) { d.unknown("type"); }

// Sends an opcode to the family of its type.
template <DecodeFn Float, DecodeFn Int>
void by_type(Decode& d) {
    const Type t = first_type(d);
    if (is_half(t)) {
        if (!decode_half(d)) d.unknown();
    } else if (t == Type::f32 || t == Type::f64 || t == Type::f32x2) {
        Float(d);
    } else {
        Int(d);
    }
}

void decode_div(Decode& d) {
    const int kind = d.take_one({"approx", "full"}, 2);
    const int rounding = d.take_rounding();
    const bool ftz = d.take("ftz");
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t), b = d.src(2, t);
    Handler fn;
    if (t == Type::f64) {
        fn = lanes_rounded(rounding, [](double x, double y) { return canonical(x / y); });
    } else if (kind == 0) {
        // a * (1 / b): zero where the reciprocal of a huge b flushes.
        constexpr auto divide = [](float x, float y) {
            const float magnitude = std::bit_cast<float>(std::bit_cast<uint32_t>(y) & 0x7fffffffu);
            const bool huge = magnitude > 0x1p126f && magnitude < INFINITY;
            return canonical(huge ? x * std::copysign(0.0f, y) : x / y);
        };
        fn = ftz ? lanes([](float x, float y) {
            return flush<true>(decltype(divide){}(flush<true>(x), flush<true>(y)));
        })
                 : lanes([](float x, float y) { return decltype(divide){}(x, y); });
    } else {
        fn = ftz ? lanes_rounded(rounding,
                                 [](float x, float y) {
                                     return canonical(flush<true>(flush<true>(x) / flush<true>(y)));
                                 })
                 : lanes_rounded(rounding, [](float x, float y) { return canonical(x / y); });
    }
    d.emit(fn,
           t == Type::f64 ? Class::fp64
           : kind == 2    ? Class::fp32
                          : Class::mufu,
           {d.dst(0, t), a, b});
}

// min and max with two or three operands, .NaN, .xorsign.abs.
template <bool Max>
void decode_min_max(Decode& d) {
    const bool ftz = d.take("ftz"), nan = d.take("NaN"), xorsign = d.take("xorsign"),
               absolute = d.take("abs");
    const Type t = d.take_type();
    uint32_t a = d.src(1, t), b = d.src(2, t);
    Handler fn;
    if (t == Type::f64) {
        fn = lanes([](double x, double y) { return min_max<Max, false>(x, y); });
    } else if (xorsign) {
        constexpr auto signed_pick = [](float x, float y, auto pick) {
            const uint32_t sign =
                (std::bit_cast<uint32_t>(x) ^ std::bit_cast<uint32_t>(y)) & 0x80000000u;
            return std::bit_cast<float>(std::bit_cast<uint32_t>(pick(std::fabs(x), std::fabs(y))) |
                                        sign);
        };
        using S = decltype(signed_pick);
        fn = nan ? lanes([](float x, float y) { return S{}(x, y, min_max<Max, true, float>); })
                 : lanes([](float x, float y) { return S{}(x, y, min_max<Max, false, float>); });
    } else {
        fn = nan ? (ftz ? lanes([](float x, float y) {
            return min_max<Max, true>(flush<true>(x), flush<true>(y));
        })
                        : lanes([](float x, float y) { return min_max<Max, true>(x, y); }))
                 : (ftz ? lanes([](float x, float y) {
                       return min_max<Max, false>(flush<true>(x), flush<true>(y));
                   })
                        : lanes([](float x, float y) { return min_max<Max, false>(x, y); }));
    }
    if (absolute && !xorsign) d.unknown(".abs without .xorsign");
    const Class cls = t == Type::f64 ? Class::fp64 : Class::fp32;
    if (d.count() > 3) {
        if (d.device().capability < 100) d.unknown("three operands need sm_100");
        const uint32_t temp = d.temporary(), c = d.src(3, t);
        d.emit_internal(fn, {temp, a, b});
        a = temp, b = c;
    }
    d.emit(fn, cls, {d.dst(0, t), a, b});
}

template <bool Negate>
void decode_sign(Decode& d) {
    const bool ftz = d.take("ftz");
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t);
    Handler fn =
        t == Type::f64 ? lanes([](double x) { return Negate ? -x : std::fabs(x); })
        : ftz ? lanes([](float x) { return Negate ? -flush<true>(x) : std::fabs(flush<true>(x)); })
              : lanes([](float x) { return Negate ? -x : std::fabs(x); });
    d.emit(fn, t == Type::f64 ? Class::fp64 : Class::fp32, {d.dst(0, t), a});
}

void decode_copysign(Decode& d) {  // the sign of a, the magnitude of b
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t), b = d.src(2, t);
    d.emit(t == Type::f64 ? lanes([](double x, double y) { return std::copysign(y, x); })
                          : lanes([](float x, float y) { return std::copysign(y, x); }),
           Class::fp32, {d.dst(0, t), a, b});
}

void decode_testp(Decode& d) {
    const int kind =
        d.take_one({"finite", "infinite", "number", "notanumber", "normal", "subnormal"}, -1);
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t);
    static constexpr auto test = []<class T>(int k, T x) {
        switch (k) {
            case 0:
                return std::isfinite(x);
            case 1:
                return std::isinf(x);
            case 2:
                return !std::isnan(x);
            case 3:
                return std::isnan(x);
            case 4:
                return std::isnormal(x);
            default:
                return std::fpclassify(x) == FP_SUBNORMAL;
        }
    };
    const uint32_t k = d.constant(static_cast<uint64_t>(kind), false);
    d.emit(
        t == Type::f64
            ? lanes([](double x, uint32_t which) { return Pred{test(static_cast<int>(which), x)}; })
            : lanes([](float x, uint32_t which) { return Pred{test(static_cast<int>(which), x)}; }),
        Class::fp32, {d.dst(0, Type::pred), a, k});
}

// ---- special functions -------------------------------------------------------------------------

// 2^x to 1e-10: the Taylor series of 2^f around the nearest integer, in double. Vectorises.
inline float exp2_lane(float x) {
    const double limited = x < -200.0f ? -200.0 : x > 200.0f ? 200.0 : x;
    const double magic = 0x1.8p52;
    const double shifted = limited + magic;
    const double f = (limited - (shifted - magic)) * 0.693147180559945309417;
    double p = 1.0 / 3628800;
    p = p * f + 1.0 / 362880;
    p = p * f + 1.0 / 40320;
    p = p * f + 1.0 / 5040;
    p = p * f + 1.0 / 720;
    p = p * f + 1.0 / 120;
    p = p * f + 1.0 / 24;
    p = p * f + 1.0 / 6;
    p = p * f + 0.5;
    p = p * f + 1.0;
    p = p * f + 1.0;
    const double scale = std::bit_cast<double>((std::bit_cast<uint64_t>(shifted) + 1023) << 52);
    return canonical(x != x ? x : static_cast<float>(p * scale));
}

inline float ex2_value(float x) { return exp2_lane(x); }
inline float lg2_value(float x) { return std::log2(x); }
inline float rcp_value(float x) { return 1.0f / x; }
inline float rsqrt_value(float x) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
inline float sqrt_value(float x) { return std::sqrt(x); }
inline float sin_value(float x) { return std::sin(x); }
inline float cos_value(float x) { return std::cos(x); }
inline float tanh_value(float x) { return std::tanh(x); }

template <float (*F)(float)>
void special(Decode& d) {
    const bool approx = d.take("approx");
    const int rounding = d.take_rounding();
    const bool ftz = d.take("ftz");
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t);
    if (is_half(t)) {
        Handler fn = nullptr;
        constexpr auto half = [](uint16_t x) { return f32_to_f16(F(f16_to_f32(x))); };
        constexpr auto bfloat = [](uint16_t x) { return f32_to_bf16(F(bf16_to_f32(x))); };
        using H = decltype(half);
        using B = decltype(bfloat);
        switch (t) {
            case Type::f16:
                fn = lanes([](uint16_t x) { return H{}(x); });
                break;
            case Type::bf16:
                fn = lanes([](uint16_t x) { return B{}(x); });
                break;
            case Type::f16x2:
                fn = lanes([](uint32_t x) {
                    return uint32_t{H{}(static_cast<uint16_t>(x))} |
                           uint32_t{H{}(static_cast<uint16_t>(x >> 16))} << 16;
                });
                break;
            default:
                fn = lanes([](uint32_t x) {
                    return uint32_t{B{}(static_cast<uint16_t>(x))} |
                           uint32_t{B{}(static_cast<uint16_t>(x >> 16))} << 16;
                });
        }
        d.emit(fn, Class::mufu, {d.dst(0, t), a});
        return;
    }
    Handler fn;
    if (t == Type::f64) {
        if constexpr (F == rcp_value)
            fn = lanes_rounded(rounding, [](double x) { return canonical(1.0 / x); });
        else if constexpr (F == sqrt_value)
            fn = lanes_rounded(rounding, [](double x) { return canonical(std::sqrt(x)); });
        else if constexpr (F == rsqrt_value)
            fn = lanes([](double x) { return canonical(1.0 / std::sqrt(x)); });
        else
            d.unknown("type");
        if (approx && ftz) {  // rcp.approx.ftz.f64: only the upper 32 bits are given
            const uint32_t result = d.dst(0, t);
            d.emit(fn, Class::mufu, {result, a});
            d.after(lanes([](uint64_t x) { return x & ~0xffffffffull; }), {result, result});
            return;
        }
    } else if (t == Type::f32) {
        fn = ftz ? lanes_rounded(rounding,
                                 [](float x) { return canonical(flush<true>(F(flush<true>(x)))); })
                 : lanes_rounded(rounding, [](float x) { return canonical(F(x)); });
    } else {
        d.unknown("type");
    }
    d.emit(fn, Class::mufu, {d.dst(0, t), a});
}

}  // namespace

const Isa& isa_float() {
    static const Isa isa = {
        {"add", by_type<arithmetic<kAdd>, decode_int_add>},
        {"sub", by_type<arithmetic<kSub>, decode_int_sub>},
        {"mul", by_type<arithmetic<kMul>, decode_int_mul>},
        {"fma", by_type<arithmetic<kFma>, no_integers>},
        {"mad", by_type<arithmetic<kFma>, decode_int_mad>},
        {"div", by_type<decode_div, decode_int_div>},
        {"min", by_type<decode_min_max<false>, decode_int_min>},
        {"max", by_type<decode_min_max<true>, decode_int_max>},
        {"abs", by_type<decode_sign<false>, decode_int_abs>},
        {"neg", by_type<decode_sign<true>, decode_int_neg>},
        {"copysign", decode_copysign},
        {"testp", decode_testp},
        {"ex2", special<ex2_value>},
        {"lg2", special<lg2_value>},
        {"rcp", special<rcp_value>},
        {"rsqrt", special<rsqrt_value>},
        {"sqrt", special<sqrt_value>},
        {"sin", special<sin_value>},
        {"cos", special<cos_value>},
        {"tanh", special<tanh_value>},
    };
    return isa;
}

}  // namespace emu
