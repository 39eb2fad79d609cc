// setp, set, selp, slct.

#include <cmath>

#include "convert.h"
#include "decode.h"
#include "floats.h"
#include "lanes.h"

namespace emu {
namespace {

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNan };

template <class T, int Op, bool Unordered>
Handler comparison() {
    return lanes([](T a, T b) {
        bool result = false;
        switch (Op) {
            case kEq:
                result = a == b;
                break;
            case kNe:
                result = a != b;
                break;
            case kLt:
                result = a < b;
                break;
            case kLe:
                result = a <= b;
                break;
            case kGt:
                result = a > b;
                break;
            case kGe:
                result = a >= b;
                break;
            case kNum:
                result = a == a && b == b;
                break;
            default:
                result = a != a || b != b;
                break;
        }
        // `ne` is false when unordered, unlike C++'s; the ...u forms are true.
        if constexpr (std::is_floating_point_v<T>) {
            const bool ordered = a == a && b == b;
            if (Unordered)
                result = result || !ordered;
            else if (Op == kNe)
                result = result && ordered;
        }
        return Pred{result};
    });
}

template <class T, bool Unordered = false>
Handler comparison(int op) {
    switch (op) {
        case kEq:
            return comparison<T, kEq, Unordered>();
        case kNe:
            return comparison<T, kNe, Unordered>();
        case kLt:
            return comparison<T, kLt, Unordered>();
        case kLe:
            return comparison<T, kLe, Unordered>();
        case kGt:
            return comparison<T, kGt, Unordered>();
        case kGe:
            return comparison<T, kGe, Unordered>();
        case kNum:
            return comparison<T, kNum, false>();
        default:
            return comparison<T, kNan, false>();
    }
}

Handler comparison(Decode& d, Type t, int op, bool unordered) {
    switch (t) {
        case Type::s16:
            return comparison<int16_t>(op);
        case Type::u16:
        case Type::b16:
            return comparison<uint16_t>(op);
        case Type::s32:
            return comparison<int32_t>(op);
        case Type::u32:
        case Type::b32:
            return comparison<uint32_t>(op);
        case Type::s64:
            return comparison<int64_t>(op);
        case Type::u64:
        case Type::b64:
            return comparison<uint64_t>(op);
        case Type::f32:
            return unordered ? comparison<float, true>(op) : comparison<float>(op);
        case Type::f64:
            return unordered ? comparison<double, true>(op) : comparison<double>(op);
        default:
            d.unknown("type");
    }
}

struct Comparer {
    int op;
    bool unordered;
};

Comparer take_comparison(Decode& d) {
    const int plain = d.take_one({"eq", "ne", "lt", "le", "gt", "ge", "num", "nan"}, -1);
    if (plain >= 0) return {plain, false};
    const int unsigned_form = d.take_one({"lo", "ls", "hi", "hs"}, -1);
    if (unsigned_form >= 0) return {kLt + unsigned_form, false};
    const int unordered = d.take_one({"equ", "neu", "ltu", "leu", "gtu", "geu"}, -1);
    if (unordered < 0) d.unknown("no comparison");
    return {unordered, true};
}

// p = t op c, with t possibly negated (the second result of p|q).
void combine(Warp& w, const Instr& in, Mask m) {
    Mask t = w.predicate(in.op[1]);
    if (in.b) t = ~t;
    if (in.op[2] != kNone) {
        const Mask c = w.predicate(in.op[2]);
        t = in.a == 0 ? t & c : in.a == 1 ? t | c : t ^ c;
    }
    Mask& p = w.predicate(in.op[0]);
    p = (p & ~m) | (t & m);
}

// An operand as fp32 (halves, or flushed singles) in a temporary, else as it is.
uint32_t comparable(Decode& d, size_t i, Type& t, Type given, bool ftz, int half) {
    const uint32_t row = d.src(i, given);
    Handler fn = nullptr;
    if (given == Type::f16 || given == Type::f16x2)
        fn = half ? lanes([](uint32_t x) { return f16_to_f32(static_cast<uint16_t>(x >> 16)); })
                  : lanes([](uint32_t x) { return f16_to_f32(static_cast<uint16_t>(x)); });
    else if (given == Type::bf16 || given == Type::bf16x2)
        fn = half ? lanes([](uint32_t x) { return bf16_to_f32(static_cast<uint16_t>(x >> 16)); })
                  : lanes([](uint32_t x) { return bf16_to_f32(static_cast<uint16_t>(x)); });
    else if (given == Type::f32 && ftz)
        fn = lanes([](float x) { return flush<true>(x); });
    if (!fn) return row;
    t = Type::f32;
    const uint32_t temp = d.temporary();
    d.emit_internal(fn, {temp, row});
    return temp;
}

Class class_of(Type t) {
    if (t == Type::f32) return Class::fp32;
    if (t == Type::f64) return Class::fp64;
    if (t == Type::f16 || t == Type::bf16 || t == Type::f16x2 || t == Type::bf16x2)
        return Class::fp16;
    return Class::alu;
}

void decode_setp(Decode& d) {
    const Comparer compare = take_comparison(d);
    const int bool_op = d.take_one({"and", "or", "xor"}, -1);
    const bool ftz = d.take("ftz");
    const Type given = d.take_type();
    const Operand& to = d.operand(0);
    const uint32_t c = bool_op >= 0 ? d.src(3, Type::pred) : kNone;
    const bool packed = given == Type::f16x2 || given == Type::bf16x2;
    const Operand* second = to.items.empty() ? nullptr : &to.items[0];
    if (!second && bool_op < 0) {
        Type t = given;
        const uint32_t a = comparable(d, 1, t, given, ftz, 0),
                       b = comparable(d, 2, t, given, ftz, 0);
        d.emit(comparison(d, t, compare.op, compare.unordered), class_of(given),
               {d.dst(to, Type::pred), a, b});
        return;
    }
    auto finish = [&](const Operand& o, uint32_t raw, bool negate) {
        Instr& in = d.emit_internal(combine, {d.dst(o, Type::pred), raw, c});
        in.a = static_cast<uint8_t>(std::max(bool_op, 0));
        in.b = negate;
    };
    const uint32_t raw[2] = {d.temporary(), d.temporary()};
    for (int half = 0; half < (packed ? 2 : 1); ++half) {
        Type t = given;
        const uint32_t a = comparable(d, 1, t, given, ftz, half),
                       b = comparable(d, 2, t, given, ftz, half);
        Handler fn = comparison(d, t, compare.op, compare.unordered);
        if (half == 0)
            d.emit(fn, class_of(given), {raw[0], a, b});
        else
            d.emit_internal(fn, {raw[1], a, b});
    }
    Operand first = to;
    first.items.clear();
    finish(first, raw[0], false);
    if (second) finish(*second, raw[packed ? 1 : 0], !packed);
}

// set.cmp.dtype.stype d, a, b: all ones or 1.0 where true.
void decode_set(Decode& d) {
    const Comparer compare = take_comparison(d);
    const int bool_op = d.take_one({"and", "or", "xor"}, -1);
    const bool ftz = d.take("ftz");
    const Type result = d.take_type(), given = d.take_type();
    const uint32_t c = bool_op >= 0 ? d.src(3, Type::pred) : kNone;
    const bool packed = given == Type::f16x2 || given == Type::bf16x2;
    const uint32_t raw[2] = {d.temporary(), d.temporary()};
    for (int half = 0; half < (packed ? 2 : 1); ++half) {
        Type t = given;
        const uint32_t a = comparable(d, 1, t, given, ftz, half),
                       b = comparable(d, 2, t, given, ftz, half);
        d.emit_internal(comparison(d, t, compare.op, compare.unordered), {raw[half], a, b});
        Instr& in = d.emit_internal(combine, {raw[half], raw[half], c});
        in.a = static_cast<uint8_t>(std::max(bool_op, 0));
    }
    uint64_t one = 0xffffffffu;
    if (result == Type::f32)
        one = 0x3f800000u;
    else if (result == Type::f16)
        one = 0x3c00u;
    else if (result == Type::bf16)
        one = 0x3f80u;
    else if (result == Type::f16x2)
        one = 0x3c003c00u;
    else if (result == Type::bf16x2)
        one = 0x3f803f80u;
    const uint32_t value = d.constant(one, false);
    d.emit(packed ? lanes([](Pred lo, Pred hi, uint32_t v) {
               return (lo.value ? v & 0xffffu : 0u) | (hi.value ? v & 0xffff0000u : 0u);
           })
                  : lanes([](Pred p, Pred, uint32_t v) { return p.value ? v : 0u; }),
           class_of(given), {d.dst(0, result), raw[0], raw[packed ? 1 : 0], value});
}

void decode_selp(Decode& d) {
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t), b = d.src(2, t), p = d.src(3, Type::pred);
    d.emit(bits_of(t) == 64 ? lanes([](uint64_t x, uint64_t y, Pred c) { return c.value ? x : y; })
                            : lanes([](uint32_t x, uint32_t y, Pred c) { return c.value ? x : y; }),
           Class::alu, {d.dst(0, t), a, b, p});
}

void decode_slct(Decode& d) {
    const bool ftz = d.take("ftz");
    const Type t = d.take_type(), by = d.take_type();
    const uint32_t a = d.src(1, t), b = d.src(2, t), c = d.src(3, by);
    Handler fn;
    if (by == Type::f32) {
        if (ftz) d.unknown();
        fn = bits_of(t) == 64
                 ? lanes([](uint64_t x, uint64_t y, float z) { return z >= 0 ? x : y; })
                 : lanes([](uint32_t x, uint32_t y, float z) { return z >= 0 ? x : y; });
    } else {
        fn = bits_of(t) == 64
                 ? lanes([](uint64_t x, uint64_t y, int32_t z) { return z >= 0 ? x : y; })
                 : lanes([](uint32_t x, uint32_t y, int32_t z) { return z >= 0 ? x : y; });
    }
    d.emit(fn, Class::alu, {d.dst(0, t), a, b, c});
}

}  // namespace

const Isa& isa_compare() {
    static const Isa isa = {
        {"setp", decode_setp}, {"set", decode_set}, {"selp", decode_selp}, {"slct", decode_slct}};
    return isa;
}

}  // namespace emu
