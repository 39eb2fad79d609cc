// cvt between all types, cvt.pack.

#include <cfenv>
#include <cmath>
#include <limits>

#include "convert.h"
#include "decode.h"
#include "floats.h"
#include "lanes.h"

namespace emu {
namespace {

constexpr FloatFormat kF32Format{8, 23, 0x7f7fffff, 0x7fffffff, true};

// ---- integers -----------------------------------------------------------------------------------

template <class F>
auto with_int(Type t, F f) {
    switch (t) {
        case Type::s8:
            return f.template operator()<int8_t>();
        case Type::s16:
            return f.template operator()<int16_t>();
        case Type::s32:
            return f.template operator()<int32_t>();
        case Type::s64:
            return f.template operator()<int64_t>();
        case Type::u8:
            return f.template operator()<uint8_t>();
        case Type::u16:
            return f.template operator()<uint16_t>();
        case Type::u32:
            return f.template operator()<uint32_t>();
        default:
            return f.template operator()<uint64_t>();
    }
}
bool is_int(Type t) {
    return is_signed(t) || t == Type::u8 || t == Type::u16 || t == Type::u32 || t == Type::u64;
}

template <class D, class S>
D saturate_to(S x) {
    const __int128 wide = x;
    constexpr __int128 lowest = std::numeric_limits<D>::min(),
                       highest = std::numeric_limits<D>::max();
    return static_cast<D>(wide < lowest ? lowest : wide > highest ? highest : wide);
}

Handler int_to_int(Type to, Type from, bool sat) {
    return with_int(to, [&]<class D>() {
        return with_int(from, [&]<class S>() {
            return sat ? lanes([](S x) { return saturate_to<D>(x); })
                       : lanes([](S x) { return static_cast<D>(x); });
        });
    });
}

// ---- integers and fp32 / fp64 -------------------------------------------------------------------

// Out of range saturates, NaN gives 0.
template <class D, class S>
inline D clamp_to(S x) {
    constexpr S lowest = static_cast<S>(std::numeric_limits<D>::min());
    constexpr S end =
        static_cast<S>(static_cast<double>(std::numeric_limits<D>::max() / 2 + 1) * 2);
    if (!(x >= lowest)) return x != x ? D{0} : std::numeric_limits<D>::min();
    return x >= end ? std::numeric_limits<D>::max() : static_cast<D>(x);
}

template <class D, class S>
Handler float_to_int(int integral) {
    switch (integral) {
        case 0:
            return lanes([](S x) { return clamp_to<D>(std::nearbyint(x)); });
        case 1:
            return lanes([](S x) { return clamp_to<D>(std::trunc(x)); });
        case 2:
            return lanes([](S x) { return clamp_to<D>(std::floor(x)); });
        default:
            return lanes([](S x) { return clamp_to<D>(std::ceil(x)); });
    }
}

template <class D>
Handler int_to_float(Type from, int rounding) {
    return with_int(from, [&]<class S>() {
        return lanes_rounded(rounding, [](S x) { return static_cast<D>(x); });
    });
}

// ---- all else, by way of double -----------------------------------------------------------------

enum Flags : uint8_t { kFtz = 1, kSat = 2, kSatFinite = 4, kRelu = 8, kIntegral = 16 };

struct Small {  // a format that travels as bits in 8 or 16 of them
    const FloatFormat* format;
    int bits;
};
Small small_format(Type t) {
    switch (t) {
        case Type::f16:
        case Type::f16x2:
            return {&kF16, 16};
        case Type::bf16:
        case Type::bf16x2:
            return {&kBF16, 16};
        case Type::e4m3x2:
            return {&kE4M3, 8};
        case Type::e5m2x2:
            return {&kE5M2, 8};
        case Type::f32:
            return {&kF32Format, 32};
        case Type::tf32:
            return {&kTF32, 32};
        default:
            return {nullptr, 0};
    }
}

double value_of(Type t, uint64_t bits) {
    if (t == Type::f64) return std::bit_cast<double>(bits);
    if (t == Type::f32) return std::bit_cast<float>(static_cast<uint32_t>(bits));
    const Small s = small_format(t);
    return decode(*s.format, static_cast<uint32_t>(bits) & ((1u << s.bits) - 1));
}

double adjust(double x, const Instr& in) {
    if (in.d & kIntegral) {
        switch (static_cast<Round>(in.c)) {
            case Round::rz:
                x = std::trunc(x);
                break;
            case Round::rm:
                x = std::floor(x);
                break;
            case Round::rp:
                x = std::ceil(x);
                break;
            default:
                x = std::nearbyint(x);
                break;
        }
    }
    if (in.d & kSat) x = saturate(x);
    if ((in.d & kRelu) && x < 0) x = 0.0;
    return x;
}

// One value. op: d, a; in.a result type, in.b source type, in.c rounding, in.d flags.
void convert_scalar(Warp& w, const Instr& in, Mask m) {
    const Type to = static_cast<Type>(in.a), from = static_cast<Type>(in.b);
    const bool wide_in = from == Type::f64;
    uint64_t out[kLanes];
    uint32_t narrow[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        uint64_t bits = wide_in ? w.row<uint64_t>(in.op[1])[l] : w.row<uint32_t>(in.op[1])[l];
        if ((in.d & kFtz) && from == Type::f32)
            bits = std::bit_cast<uint32_t>(
                flush<true>(std::bit_cast<float>(static_cast<uint32_t>(bits))));
        const double x = adjust(value_of(from, bits), in);
        if (to == Type::f64) {
            out[l] = std::bit_cast<uint64_t>(canonical(x));
            continue;
        }
        narrow[l] =
            encode(*small_format(to).format, x, static_cast<Round>(in.c), in.d & kSatFinite);
        if ((in.d & kFtz) && to == Type::f32)
            narrow[l] = std::bit_cast<uint32_t>(flush<true>(std::bit_cast<float>(narrow[l])));
    }
    if (to == Type::f64)
        store_row(w.row<uint64_t>(in.op[0]), out, m);
    else
        store_row(w.row<uint32_t>(in.op[0]), narrow, m);
}

// Two values packed. op: d, then either (upper, lower) as fp32 or one packed source.
void convert_packed(Warp& w, const Instr& in, Mask m) {
    const Type to = static_cast<Type>(in.a), from = static_cast<Type>(in.b);
    const Small target = small_format(to), source = small_format(from);
    const bool two = in.op[2] != kNone;
    uint32_t out[kLanes];
    for (int l = 0; l < kLanes; ++l) {
        const uint32_t a = w.row<uint32_t>(in.op[1])[l];
        const uint32_t upper = two ? a : a >> source.bits;
        const uint32_t lower = two ? w.row<uint32_t>(in.op[2])[l] : a;
        auto convert = [&](uint32_t bits) {
            return encode(*target.format, adjust(value_of(from, bits), in),
                          static_cast<Round>(in.c), in.d & kSatFinite);
        };
        out[l] = convert(upper) << target.bits | convert(lower);
    }
    store_row(w.row<uint32_t>(in.op[0]), out, m);
}

void decode_pack(Decode& d) {  // cvt.pack.sat.dtype.s32{.b32} d, a, b{, c}
    d.take("sat");
    const Type to = d.take_type();
    d.take("s32");
    const bool chained = d.take("b32");
    const uint32_t a = d.src(1, Type::s32), b = d.src(2, Type::s32);
    const uint32_t c = chained ? d.src(3, Type::b32) : d.constant(0, false);
    Handler fn = nullptr;
    switch (to) {
        case Type::s16:
            fn = lanes([](int32_t x, int32_t y, uint32_t) {
                return static_cast<uint16_t>(saturate_to<int16_t>(y)) |
                       static_cast<uint32_t>(static_cast<uint16_t>(saturate_to<int16_t>(x))) << 16;
            });
            break;
        case Type::u16:
            fn = lanes([](int32_t x, int32_t y, uint32_t) {
                return saturate_to<uint16_t>(y) | static_cast<uint32_t>(saturate_to<uint16_t>(x))
                                                      << 16;
            });
            break;
        case Type::s8:
            fn = lanes([](int32_t x, int32_t y, uint32_t z) {
                return static_cast<uint8_t>(saturate_to<int8_t>(y)) |
                       static_cast<uint32_t>(static_cast<uint8_t>(saturate_to<int8_t>(x))) << 8 |
                       z << 16;
            });
            break;
        case Type::u8:
            fn = lanes([](int32_t x, int32_t y, uint32_t z) {
                return saturate_to<uint8_t>(y) |
                       static_cast<uint32_t>(saturate_to<uint8_t>(x)) << 8 | z << 16;
            });
            break;
        default:
            d.unknown("type");
    }
    d.emit(fn, Class::cvt, {d.dst(0, Type::b32), a, b, c});
}

Handler fast_path(Type to, Type from, Round mode, uint8_t flags) {
    if (flags == kRelu && mode == Round::rn) {
        if (to == Type::bf16x2 && from == Type::f32)
            return lanes([](float a, float b) {
                return uint32_t{f32_to_bf16(a < 0 ? 0.0f : a)} << 16 |
                       f32_to_bf16(b < 0 ? 0.0f : b);
            });
    }
    if (flags == kSatFinite && mode == Round::rn && to == Type::e4m3x2) {
        if (from == Type::f32)
            return lanes([](float a, float b) {
                return static_cast<uint16_t>(f32_to_e4m3_satfinite(a) << 8 |
                                             f32_to_e4m3_satfinite(b));
            });
        if (from == Type::f16x2)
            return lanes([](uint32_t x) {
                const auto low = static_cast<uint16_t>(x), high = static_cast<uint16_t>(x >> 16);
                return static_cast<uint16_t>(f32_to_e4m3_satfinite(f16_to_f32(high)) << 8 |
                                             f32_to_e4m3_satfinite(f16_to_f32(low)));
            });
    }
    if (flags) return nullptr;
    if (to == Type::f16x2 && from == Type::e4m3x2)
        return lanes([](uint16_t x) {
            const auto low = static_cast<uint8_t>(x), high = static_cast<uint8_t>(x >> 8);
            return uint32_t{f32_to_f16(e4m3_to_f32(high))} << 16 | f32_to_f16(e4m3_to_f32(low));
        });
    if (to == Type::f32 && from == Type::f16)
        return lanes([](uint16_t x) { return canonical(f16_to_f32(x)); });
    if (to == Type::f32 && from == Type::bf16)
        return lanes([](uint16_t x) { return canonical(bf16_to_f32(x)); });
    if (to == Type::f64 && from == Type::f32)
        return lanes([](float x) { return canonical(static_cast<double>(x)); });
    if (mode != Round::rn || from != Type::f32) return nullptr;
    if (to == Type::f16) return lanes([](float x) { return f32_to_f16(x); });
    if (to == Type::bf16) return lanes([](float x) { return f32_to_bf16(x); });
    if (to == Type::f16x2)
        return lanes(
            [](float a, float b) { return uint32_t{f32_to_f16(a)} << 16 | f32_to_f16(b); });
    if (to == Type::bf16x2)
        return lanes(
            [](float a, float b) { return uint32_t{f32_to_bf16(a)} << 16 | f32_to_bf16(b); });
    return nullptr;
}

void decode_cvt(Decode& d) {
    if (d.take("pack")) return decode_pack(d);
    const int integral = d.take_one({"rni", "rzi", "rmi", "rpi"}, -1);
    static constexpr int fenv_modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD,
                                         FE_UPWARD,    FE_TONEAREST,  FE_TONEAREST};
    static constexpr Round rounds[] = {Round::rn, Round::rz,  Round::rm,
                                       Round::rp, Round::rna, Round::rn};
    const int mode = d.take_one({"rn", "rz", "rm", "rp", "rna"}, 5);
    const bool ftz = d.take("ftz"), relu = d.take("relu"), satfinite = d.take("satfinite"),
               sat = d.take("sat");
    const Type to = d.take_type(), from = d.take_type();
    const bool int_to = is_int(to), int_from = is_int(from);
    if (int_to && int_from) {
        const uint32_t a = d.src(1, from);
        d.emit(int_to_int(to, from, sat), Class::cvt, {d.dst(0, to), a});
        return;
    }
    uint32_t a = d.src(1, from);
    if (int_to) {
        if (ftz && from == Type::f32) {
            const uint32_t t = d.temporary();
            d.emit_internal(lanes([](float x) { return flush<true>(x); }), {t, a});
            a = t;
        } else if (from == Type::f16 || from == Type::bf16) {
            const uint32_t t = d.temporary();
            d.emit_internal(from == Type::f16 ? lanes([](uint16_t x) { return f16_to_f32(x); })
                                              : lanes([](uint16_t x) { return bf16_to_f32(x); }),
                            {t, a});
            a = t;
        }
        if (integral < 0) d.unknown("no integer rounding");
        Handler fn = with_int(to, [&]<class D>() {
            return from == Type::f64 ? float_to_int<D, double>(integral)
                                     : float_to_int<D, float>(integral);
        });
        d.emit(fn, Class::cvt, {d.dst(0, to), a});
        return;
    }
    if (int_from && (to == Type::f32 || to == Type::f64)) {
        Handler fn = to == Type::f32 ? int_to_float<float>(from, fenv_modes[mode])
                                     : int_to_float<double>(from, fenv_modes[mode]);
        const uint32_t result = d.dst(0, to);
        d.emit(fn, Class::cvt, {result, a});
        if (sat)
            d.after(to == Type::f32 ? lanes([](float x) { return saturate(x); })
                                    : lanes([](double x) { return saturate(x); }),
                    {result, result});
        return;
    }
    if (int_from) {  // to a half: exact in double up to 53 bits, far beyond where halves round
        const uint32_t t = d.temporary();
        d.emit_internal(int_to_float<double>(from, FE_TONEAREST), {t, a});
        Instr& in = d.emit(convert_scalar, Class::cvt, {d.dst(0, to), t});
        in.a = static_cast<uint8_t>(to), in.b = static_cast<uint8_t>(Type::f64);
        in.c = static_cast<uint8_t>(rounds[mode]), in.d = sat ? kSat : 0;
        return;
    }
    const bool packed =
        to == Type::f16x2 || to == Type::bf16x2 || to == Type::e4m3x2 || to == Type::e5m2x2;
    if (!small_format(to).format && to != Type::f64) d.unknown("type");
    if (!small_format(from).format && from != Type::f64) d.unknown("type");
    const bool two = packed && from == Type::f32;
    const uint32_t b = two ? d.src(2, from) : kNone;
    Round round = rounds[mode];
    uint8_t flags = static_cast<uint8_t>((ftz ? kFtz : 0) | (sat ? kSat : 0) |
                                         (satfinite ? kSatFinite : 0) | (relu ? kRelu : 0));
    if (integral >= 0) flags |= kIntegral, round = rounds[integral];
    Handler fn = fast_path(to, from, round, flags);
    Instr& in = d.emit(fn       ? fn
                       : packed ? convert_packed
                                : convert_scalar,
                       Class::cvt, {d.dst(0, to), a, b});
    in.a = static_cast<uint8_t>(to), in.b = static_cast<uint8_t>(from);
    in.c = static_cast<uint8_t>(round), in.d = flags;
}

}  // namespace

const Isa& isa_cvt() {
    static const Isa isa = {{"cvt", decode_cvt}};
    return isa;
}

}  // namespace emu
