// Integer arithmetic, logic, bit fields, comparisons, selections, video-style dot products.

#include <algorithm>

#include "decode.h"
#include "lanes.h"

namespace emu {
namespace {

using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

// Wrapping arithmetic is done unsigned: signed overflow and the promotion of u16 to int are
// undefined behaviour in C++ where PTX wraps.
template <class T>
using Wrap = std::conditional_t<sizeof(T) == 8, u64, u32>;

// One row per type a family accepts.
struct ByType {
    Handler s16 = nullptr, s32 = nullptr, s64 = nullptr, u16 = nullptr, u32 = nullptr,
            u64 = nullptr;

    Handler get(Decode& d, Type t) const {
        Handler h = nullptr;
        switch (t) {
            case Type::s16:
                h = s16;
                break;
            case Type::s32:
                h = s32;
                break;
            case Type::s64:
                h = s64;
                break;
            case Type::u16:
            case Type::b16:
                h = u16;
                break;
            case Type::u32:
            case Type::b32:
                h = u32;
                break;
            case Type::u64:
            case Type::b64:
                h = u64;
                break;
            default:
                break;
        }
        if (!h) d.unknown("type");
        return h;
    }
};

template <template <class> class Op>
ByType all_types() {
    return {Op<i16>::get(), Op<i32>::get(), Op<i64>::get(),
            Op<u16>::get(), Op<u32>::get(), Op<u64>::get()};
}

#define EMU_LANE_OP(Name, ...)                              \
    template <class T>                                      \
    struct Name {                                           \
        static Handler get() { return lanes(__VA_ARGS__); } \
    }

EMU_LANE_OP(Add, [](T a, T b) { return static_cast<T>(Wrap<T>(a) + Wrap<T>(b)); });
EMU_LANE_OP(Sub, [](T a, T b) { return static_cast<T>(Wrap<T>(a) - Wrap<T>(b)); });
EMU_LANE_OP(MulLo, [](T a, T b) { return static_cast<T>(Wrap<T>(a) * Wrap<T>(b)); });
EMU_LANE_OP(MadLo,
            [](T a, T b, T c) { return static_cast<T>(Wrap<T>(a) * Wrap<T>(b) + Wrap<T>(c)); });
EMU_LANE_OP(Min, [](T a, T b) { return a < b ? a : b; });
EMU_LANE_OP(Max, [](T a, T b) { return a < b ? b : a; });
EMU_LANE_OP(Abs, [](T a) { return static_cast<T>(a < 0 ? 0 - Wrap<T>(a) : Wrap<T>(a)); });
EMU_LANE_OP(Neg, [](T a) { return static_cast<T>(0 - Wrap<T>(a)); });
EMU_LANE_OP(Not, [](T a) { return static_cast<T>(~a); });
EMU_LANE_OP(And, [](T a, T b) { return static_cast<T>(a & b); });
EMU_LANE_OP(Or, [](T a, T b) { return static_cast<T>(a | b); });
EMU_LANE_OP(Xor, [](T a, T b) { return static_cast<T>(a ^ b); });
EMU_LANE_OP(CNot, [](T a) { return static_cast<T>(a == 0); });
EMU_LANE_OP(Sad, [](T a, T b, T c) {
    return static_cast<T>(Wrap<T>(c) + (a < b ? Wrap<T>(b) - Wrap<T>(a) : Wrap<T>(a) - Wrap<T>(b)));
});
// Division by zero gives all ones on hardware; the most negative number by -1 wraps.
EMU_LANE_OP(Div, [](T a, T b) {
    if (b == 0) return static_cast<T>(~T{0});
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(0 - Wrap<T>(a));
    return static_cast<T>(a / b);
});
EMU_LANE_OP(Rem, [](T a, T b) {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return T{0};
    return static_cast<T>(a % b);
});
// Shift amounts are u32 and clamp at the width.
EMU_LANE_OP(Shl, [](T a, u32 n) {
    constexpr u32 bits = sizeof(T) * 8;
    return static_cast<T>(n >= bits ? 0 : Wrap<T>(a) << (n & (sizeof(T) == 8 ? 63 : 31)));
});
EMU_LANE_OP(Shr, [](T a, u32 n) {
    constexpr u32 bits = sizeof(T) * 8;
    const T fill = static_cast<T>(a < 0 ? -1 : 0);
    return static_cast<T>(n >= bits ? fill : static_cast<T>(a >> (n & (bits - 1))));
});

template <class T>
using Twice = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, i32, u32>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, i64, u64>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
EMU_LANE_OP(MulHi, [](T a, T b) {
    return static_cast<T>((Twice<T>(a) * Twice<T>(b)) >> (8 * sizeof(T)));
});
EMU_LANE_OP(MadHi, [](T a, T b, T c) {
    return static_cast<T>(Wrap<T>(static_cast<T>((Twice<T>(a) * Twice<T>(b)) >> (8 * sizeof(T)))) +
                          Wrap<T>(c));
});
template <class T>
struct MulWide {
    static Handler get() {
        if constexpr (sizeof(T) == 8)
            return nullptr;
        else
            return lanes([](T a, T b) {
                return static_cast<Twice<T>>(Wrap<Twice<T>>(a) * Wrap<Twice<T>>(b));
            });
    }
};
template <class T>
struct MadWide {
    static Handler get() {
        if constexpr (sizeof(T) == 8)
            return nullptr;
        else
            return lanes([](T a, T b, Twice<T> c) {
                return static_cast<Twice<T>>(Wrap<Twice<T>>(a) * Wrap<Twice<T>>(b) +
                                             Wrap<Twice<T>>(c));
            });
    }
};

Type widened(Type t) {
    switch (t) {
        case Type::s16:
            return Type::s32;
        case Type::u16:
            return Type::u32;
        case Type::s32:
            return Type::s64;
        default:
            return Type::u64;
    }
}

// Two or three sources of one type.
template <template <class> class Op>
void same_type(Decode& d) {
    const Type t = d.take_type();
    std::array<uint32_t, 3> s{kNone, kNone, kNone};
    for (size_t i = 1; i < d.count(); ++i) s.at(i - 1) = d.src(i, t);
    static const ByType table = all_types<Op>();
    d.emit(table.get(d, t), Class::alu, {d.dst(0, t), s[0], s[1], s[2]});
}

template <template <class> class Op>
void shift(Decode& d) {
    const Type t = d.take_type();
    static const ByType table = all_types<Op>();
    const uint32_t a = d.src(1, t), n = d.src(2, Type::u32);
    d.emit(table.get(d, t), Class::alu, {d.dst(0, t), a, n});
}

template <template <class> class Lo, template <class> class Hi, template <class> class Wide>
void multiply(Decode& d) {
    const int part = d.take_one({"lo", "hi", "wide"}, -1);
    if (part < 0) d.unknown("one of .lo .hi .wide");
    const Type t = d.take_type();
    const Type c_type = part == 2 ? widened(t) : t;
    static const ByType lo = all_types<Lo>(), hi = all_types<Hi>(), wide = all_types<Wide>();
    const ByType& table = part == 0 ? lo : part == 1 ? hi : wide;
    const uint32_t a = d.src(1, t), b = d.src(2, t);
    const uint32_t c = d.count() > 3 ? d.src(3, c_type) : kNone;
    d.emit(table.get(d, t), Class::alu, {d.dst(0, c_type), a, b, c});
}

// ---- packed 16-bit ------------------------------------------------------------------------------

template <class T, class F>
u32 halves(u32 a, u32 b, F f) {
    const T lo = f(static_cast<T>(a), static_cast<T>(b));
    const T hi = f(static_cast<T>(a >> 16), static_cast<T>(b >> 16));
    return static_cast<u16>(lo) | static_cast<u32>(static_cast<u16>(hi)) << 16;
}

constexpr auto add16 = [](auto a, auto b) { return static_cast<decltype(a)>(a + b); };
template <bool IsMax>
constexpr auto pick16 = [](auto a, auto b) { return (a < b) == IsMax ? b : a; };

// ---- add with carry -----------------------------------------------------------------------------

// The condition code is a predicate row of its own: not modelled by Decode, so it lives in
// Warp::carry.
enum Carry : uint8_t { kOut = 1, kIn = 2, kSubtract = 4, kMultiply = 8, kHigh = 16 };

template <class T>
void add_carry(Warp& w, const Instr& in, Mask m) {
    const auto *a = w.row<T>(in.op[1]), *b = w.row<T>(in.op[2]), *c = w.row<T>(in.op[3]);
    T out[kLanes];
    Mask carry = 0;
    for (int l = 0; l < kLanes; ++l) {
        T x = a[l], y = b[l];
        if (in.a & kMultiply) {
            const auto product = static_cast<unsigned __int128>(x) * y;
            x = static_cast<T>(in.a & kHigh ? product >> (8 * sizeof(T)) : product);
            y = c[l];
        }
        const T extra = in.a & kIn ? w.carry >> l & 1 : 0;
        // subc: the flag is a borrow.
        const unsigned __int128 sum = in.a & kSubtract
                                          ? static_cast<unsigned __int128>(x) - y - extra
                                          : static_cast<unsigned __int128>(x) + y + extra;
        out[l] = static_cast<T>(sum);
        carry |= static_cast<Mask>((sum >> (8 * sizeof(T)) & 1) != 0) << l;
    }
    store_row(w.row<T>(in.op[0]), out, m);
    if (in.a & kOut) w.carry = (w.carry & ~m) | (carry & m);
}

void decode_carry(Decode& d) {
    const std::string& op = d.st.opcode;
    uint8_t flags = 0;
    if (op == "addc" || op == "subc" || op == "madc") flags |= kIn;
    if (op.starts_with("sub")) flags |= kSubtract;
    if (op.starts_with("mad")) {
        flags |= kMultiply;
        if (d.take("hi"))
            flags |= kHigh;
        else if (!d.take("lo"))
            d.unknown();
    }
    if (d.take("cc")) flags |= kOut;
    const Type t = d.take_type();
    if (flags & kHigh && is_signed(t)) d.unknown("signed high product with carry");
    const uint32_t a = d.src(1, t), b = d.src(2, t);
    const uint32_t c = d.count() > 3 ? d.src(3, t) : a;
    d.emit(bits_of(t) == 64 ? add_carry<u64> : add_carry<u32>, Class::alu, {d.dst(0, t), a, b, c})
        .a = flags;
}

// add and sub are shared with floating point: its decoder comes here for integer types.
template <template <class> class Op, bool Subtract>
void add_or_sub(Decode& d) {
    for (const std::string& mod : d.st.mods) {
        if (mod == "cc") return decode_carry(d);
        if (mod == "u16x2" || mod == "s16x2") {
            d.take(mod);
            if (Subtract) d.unknown();
            const uint32_t a = d.src(1, Type::b32), b = d.src(2, Type::b32);
            d.emit(lanes([](u32 x, u32 y) { return halves<u16>(x, y, add16); }), Class::alu,
                   {d.dst(0, Type::b32), a, b});
            return;
        }
    }
    if (d.take("sat")) {
        d.take("s32");
        const uint32_t a = d.src(1, Type::s32), b = d.src(2, Type::s32);
        Handler fn = lanes([](i32 x, i32 y) {
            const i64 sum = Subtract ? i64{x} - y : i64{x} + y;
            return static_cast<i32>(std::clamp<i64>(sum, INT32_MIN, INT32_MAX));
        });
        d.emit(fn, Class::alu, {d.dst(0, Type::s32), a, b});
        return;
    }
    same_type<Op>(d);
}

template <template <class> class Op, bool IsMax>
void min_or_max(Decode& d) {
    const bool relu = d.take("relu");
    for (const char* mod : {"u16x2", "s16x2"})
        if (d.take(mod)) {
            const bool sign = mod[0] == 's';
            const uint32_t a = d.src(1, Type::b32), b = d.src(2, Type::b32);
            Handler fn = sign
                             ? lanes([](u32 x, u32 y) { return halves<i16>(x, y, pick16<IsMax>); })
                             : lanes([](u32 x, u32 y) { return halves<u16>(x, y, pick16<IsMax>); });
            const uint32_t result = d.dst(0, Type::b32);
            d.emit(fn, Class::alu, {result, a, b});
            if (relu)
                d.after(lanes([](u32 x) { return halves<i16>(x, 0u, pick16<true>); }),
                        {result, result});
            return;
        }
    const Type t = d.take_type();
    static const ByType table = all_types<Op>();
    const uint32_t a = d.src(1, t), b = d.src(2, t), result = d.dst(0, t);
    d.emit(table.get(d, t), Class::alu, {result, a, b});
    if (relu) d.after(lanes([](i32 x) { return x < 0 ? 0 : x; }), {result, result});
}

// ---- logic --------------------------------------------------------------------------------------

void predicate_logic(Warp& w, const Instr& in, Mask m) {
    const Mask a = w.predicate(in.op[1]);
    const Mask b = in.op[2] == kNone ? 0 : w.predicate(in.op[2]);
    const Mask out = in.a == 0 ? a & b : in.a == 1 ? a | b : in.a == 2 ? a ^ b : ~a;
    Mask& p = w.predicate(in.op[0]);
    p = (p & ~m) | (out & m);
}

template <template <class> class Op, uint8_t Kind>
void logic(Decode& d) {
    if (!d.take("pred")) return same_type<Op>(d);
    const uint32_t a = d.src(1, Type::pred);
    const uint32_t b = d.count() > 2 ? d.src(2, Type::pred) : kNone;
    d.emit(predicate_logic, Class::alu, {d.dst(0, Type::pred), a, b}).a = Kind;
}

void lop3(Warp& w, const Instr& in, Mask m) {
    const auto *a = w.row<u32>(in.op[1]), *b = w.row<u32>(in.op[2]), *c = w.row<u32>(in.op[3]);
    u32 out[kLanes] = {};
    for (int bit = 0; bit < 8; ++bit) {  // the minterms of the table
        if (!(in.imm >> bit & 1)) continue;
        const u32 na = bit & 4 ? 0 : ~0u, nb = bit & 2 ? 0 : ~0u, nc = bit & 1 ? 0 : ~0u;
        for (int l = 0; l < kLanes; ++l) out[l] |= (a[l] ^ na) & (b[l] ^ nb) & (c[l] ^ nc);
    }
    if (in.op[4] != kNone) {  // .and/.or: p = (result != 0) op q
        Mask p = 0;
        for (int l = 0; l < kLanes; ++l) p |= static_cast<Mask>(out[l] != 0) << l;
        const Mask q = w.predicate(in.op[5]);
        p = in.a ? p | q : p & q;
        Mask& to = w.predicate(in.op[4]);
        to = (to & ~m) | (p & m);
    }
    store_row(w.row<u32>(in.op[0]), out, m);
}

void decode_lop3(Decode& d) {
    const int bool_op = d.take_one({"and", "or"}, -1);
    d.take("b32");
    const uint32_t a = d.src(1, Type::b32), b = d.src(2, Type::b32), c = d.src(3, Type::b32);
    const int64_t table = d.immediate(4);
    uint32_t result, p = kNone, q = kNone;
    if (bool_op >= 0) {
        q = d.src(5, Type::pred);
        if (d.operand(0).items.empty()) d.unknown("d|p expected");
        p = d.dst(d.operand(0).items[0], Type::pred);
    }
    result = d.dst(0, Type::b32);
    Instr& in = d.emit(lop3, Class::alu, {result, a, b, c, p, q});
    in.imm = table;
    in.a = bool_op == 1;
}

void decode_prmt(Decode& d) {
    d.take("b32");
    const int mode = d.take_one({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"}, -1);
    const uint32_t a = d.src(1, Type::b32), b = d.src(2, Type::b32), c = d.src(3, Type::b32);
    Handler fn = lanes([](u32 x, u32 y, u32 selector) {
        const u64 bytes = u64{y} << 32 | x;
        u32 out = 0;
        for (int i = 0; i < 4; ++i) {
            const u32 s = selector >> (4 * i);
            const u32 byte = static_cast<u32>(bytes >> (8 * (s & 7))) & 0xff;
            const u32 sign = byte & 0x80 ? 0xff : 0;
            out |= (s & 8 ? sign : byte) << (8 * i);
        }
        return out;
    });
    if (mode >= 0) {
        // The other modes are a byte selector chosen by the two low bits of c.
        static constexpr u16 selectors[6][4] = {
            {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
            {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
            {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
        const uint32_t t = d.temporary();
        Instr& pick = d.emit_internal(
            [](Warp& w, const Instr& in, Mask) {
                for (int l = 0; l < kLanes; ++l)
                    w.row<u32>(in.op[0])[l] = selectors[in.a][w.row<u32>(in.op[1])[l] & 3];
            },
            {t, c});
        pick.a = static_cast<uint8_t>(mode);
        d.emit(fn, Class::alu, {d.dst(0, Type::b32), a, b, t});
        return;
    }
    d.emit(fn, Class::alu, {d.dst(0, Type::b32), a, b, c});
}

void decode_shf(Decode& d) {
    const bool left = d.take_one({"l", "r"}, 0) == 0;
    const bool wrap = d.take_one({"wrap", "clamp"}, 0) == 0;
    d.take("b32");
    const uint32_t a = d.src(1, Type::b32), b = d.src(2, Type::b32), c = d.src(3, Type::u32);
    Handler fn = left ? (wrap ? lanes([](u32 lo, u32 hi, u32 n) {
        return static_cast<u32>((u64{hi} << 32 | lo) << (n & 31) >> 32);
    })
                              : lanes([](u32 lo, u32 hi, u32 n) {
                                    n = n > 32 ? 32 : n;
                                    return static_cast<u32>(
                                        n == 32 ? lo : (u64{hi} << 32 | lo) << (n & 31) >> 32);
                                }))
                      : (wrap ? lanes([](u32 lo, u32 hi, u32 n) {
                            return static_cast<u32>((u64{hi} << 32 | lo) >> (n & 31));
                        })
                              : lanes([](u32 lo, u32 hi, u32 n) {
                                    n = n > 32 ? 32 : n;
                                    return static_cast<u32>((u64{hi} << 32 | lo) >> n);
                                }));
    d.emit(fn, Class::alu, {d.dst(0, Type::b32), a, b, c});
}

// ---- bit fields ---------------------------------------------------------------------------------

template <class T>
constexpr T bit_field_extract(T a, u32 pos, u32 len) {
    using U = std::make_unsigned_t<T>;
    constexpr u32 bits = sizeof(T) * 8;
    pos &= 255, len &= 255;
    if (len == 0) return 0;
    const u32 top = std::min(pos + len - 1, bits - 1);
    const U sign = std::is_signed_v<T> && (static_cast<U>(a) >> top & 1) ? ~U{0} : U{0};
    const U field = pos >= bits ? U{0} : static_cast<U>(a) >> pos;
    const u32 valid = pos >= bits ? 0 : std::min(len, bits - pos);
    const U keep = valid >= bits ? ~U{0} : (U{1} << valid) - 1;
    return static_cast<T>((field & keep) | (sign & ~keep));
}

template <class T>
constexpr T bit_field_insert(T a, T b, u32 pos, u32 len) {
    constexpr u32 bits = sizeof(T) * 8;
    pos &= 255, len &= 255;
    if (len == 0 || pos >= bits) return b;
    const T keep = (len >= bits ? ~T{0} : (T{1} << len) - 1) << pos;
    return (b & ~keep) | (a << pos & keep);
}

void decode_bfe(Decode& d) {
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t), pos = d.src(2, Type::u32), len = d.src(3, Type::u32);
    Handler fn =
        t == Type::s32   ? lanes([](i32 x, u32 p, u32 n) { return bit_field_extract(x, p, n); })
        : t == Type::u32 ? lanes([](u32 x, u32 p, u32 n) { return bit_field_extract(x, p, n); })
        : t == Type::s64 ? lanes([](i64 x, u32 p, u32 n) { return bit_field_extract(x, p, n); })
                         : lanes([](u64 x, u32 p, u32 n) { return bit_field_extract(x, p, n); });
    d.emit(fn, Class::alu, {d.dst(0, t), a, pos, len});
}

void decode_bfi(Decode& d) {
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t), b = d.src(2, t), pos = d.src(3, Type::u32),
                   len = d.src(4, Type::u32);
    Handler fn =
        bits_of(t) == 32
            ? lanes([](u32 x, u32 y, u32 p, u32 n) { return bit_field_insert(x, y, p, n); })
            : lanes([](u64 x, u64 y, u32 p, u32 n) { return bit_field_insert(x, y, p, n); });
    d.emit(fn, Class::alu, {d.dst(0, t), a, b, pos, len});
}

void decode_bmsk(Decode& d) {
    const bool wrap = d.take_one({"clamp", "wrap"}, 0) == 1;
    d.take_type();
    const uint32_t pos = d.src(1, Type::u32), len = d.src(2, Type::u32);
    Handler fn =
        wrap ? lanes([](u32 p, u32 n) {
            return static_cast<u32>(((u64{1} << (n & 31)) - 1) << (p & 31));
        })
             : lanes([](u32 p, u32 n) {
                   if (p >= 32) return u32{0};
                   return static_cast<u32>((n >= 32 ? 0xffffffffull : (u64{1} << n) - 1) << p);
               });
    d.emit(fn, Class::alu, {d.dst(0, Type::b32), pos, len});
}

constexpr u32 find_high(u64 a) { return a ? 63 - static_cast<u32>(std::countl_zero(a)) : ~0u; }

void decode_bfind(Decode& d) {
    const bool shiftamt = d.take("shiftamt");
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t);
    Handler fn =
        t == Type::u32   ? lanes([](u32 x) { return find_high(x); })
        : t == Type::s32 ? lanes([](i32 x) { return find_high(static_cast<u32>(x < 0 ? ~x : x)); })
        : t == Type::u64 ? lanes([](u64 x) { return find_high(x); })
                         : lanes([](i64 x) { return find_high(static_cast<u64>(x < 0 ? ~x : x)); });
    const uint32_t result = d.dst(0, Type::u32);
    d.emit(fn, Class::alu, {result, a});
    if (shiftamt)
        d.after(bits_of(t) == 32 ? lanes([](u32 x) { return x == ~0u ? x : 31 - x; })
                                 : lanes([](u32 x) { return x == ~0u ? x : 63 - x; }),
                {result, result});
}

void decode_fns(Decode& d) {
    d.take("b32");
    const uint32_t mask = d.src(1, Type::b32), base = d.src(2, Type::u32),
                   offset = d.src(3, Type::s32);
    Handler fn = lanes([](u32 m, u32 from, i32 n) {
        if (n == 0) return m >> (from & 31) & 1 ? from : ~0u;
        const int step = n > 0 ? 1 : -1;
        int left = n > 0 ? n : -n;
        for (int i = static_cast<int>(from); i >= 0 && i < 32; i += step)
            if ((m >> i & 1) && --left == 0) return static_cast<u32>(i);
        return ~0u;
    });
    d.emit(fn, Class::alu, {d.dst(0, Type::b32), mask, base, offset});
}

// f(value, width) of a 32- or 64-bit value.
template <class F>
void bit_count(Decode& d, F) {
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t);
    Handler fn = bits_of(t) == 64 ? lanes([](u64 x) { return static_cast<u32>(F{}(x)); })
                                  : lanes([](u32 x) { return static_cast<u32>(F{}(x)); });
    d.emit(fn, Class::alu, {d.dst(0, Type::u32), a});
}

constexpr u64 reverse(u64 x) {
    x = (x >> 1 & 0x5555555555555555ull) | (x & 0x5555555555555555ull) << 1;
    x = (x >> 2 & 0x3333333333333333ull) | (x & 0x3333333333333333ull) << 2;
    x = (x >> 4 & 0x0f0f0f0f0f0f0f0full) | (x & 0x0f0f0f0f0f0f0f0full) << 4;
    return __builtin_bswap64(x);
}

void decode_brev(Decode& d) {
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t);
    d.emit(bits_of(t) == 64 ? lanes([](u64 x) { return reverse(x); })
                            : lanes([](u32 x) { return static_cast<u32>(reverse(x) >> 32); }),
           Class::alu, {d.dst(0, t), a});
}

// ---- dot products, 24-bit -----------------------------------------------------------------------

template <class A, class B>
constexpr u32 dot4(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; ++i)
        c +=
            static_cast<u32>(i32{static_cast<A>(a >> (8 * i))} * i32{static_cast<B>(b >> (8 * i))});
    return c;
}
template <class A, class B>
constexpr u32 dot2(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 2; ++i)
        c += static_cast<u32>(static_cast<A>(a >> (16 * i))) *
             static_cast<u32>(static_cast<B>(b >> (8 * i)));
    return c;
}

void decode_dp4a(Decode& d) {
    const bool sa = is_signed(d.take_type()), sb = is_signed(d.take_type());
    const uint32_t a = d.src(1, Type::b32), b = d.src(2, Type::b32), c = d.src(3, Type::b32);
    Handler fn = sa ? (sb ? lanes([](u32 x, u32 y, u32 z) { return dot4<i8, i8>(x, y, z); })
                          : lanes([](u32 x, u32 y, u32 z) { return dot4<i8, u8>(x, y, z); }))
                    : (sb ? lanes([](u32 x, u32 y, u32 z) { return dot4<u8, i8>(x, y, z); })
                          : lanes([](u32 x, u32 y, u32 z) { return dot4<u8, u8>(x, y, z); }));
    d.emit(fn, Class::alu, {d.dst(0, Type::b32), a, b, c});
}

void decode_dp2a(Decode& d) {
    const bool high = d.take_one({"lo", "hi"}, 0) == 1;
    const bool sa = is_signed(d.take_type()), sb = is_signed(d.take_type());
    const uint32_t a = d.src(1, Type::b32), c = d.src(3, Type::b32);
    uint32_t b = d.src(2, Type::b32);
    if (high) {
        const uint32_t t = d.temporary();
        d.emit_internal(lanes([](u32 x) { return x >> 16; }), {t, b});
        b = t;
    }
    Handler fn = sa ? (sb ? lanes([](u32 x, u32 y, u32 z) { return dot2<i16, i8>(x, y, z); })
                          : lanes([](u32 x, u32 y, u32 z) { return dot2<i16, u8>(x, y, z); }))
                    : (sb ? lanes([](u32 x, u32 y, u32 z) { return dot2<u16, i8>(x, y, z); })
                          : lanes([](u32 x, u32 y, u32 z) { return dot2<u16, u8>(x, y, z); }));
    d.emit(fn, Class::alu, {d.dst(0, Type::b32), a, b, c});
}

constexpr i64 low24(i32 x) { return static_cast<i32>(static_cast<u32>(x) << 8) >> 8; }

void decode_mul24(Decode& d) {
    const bool high = d.take_one({"lo", "hi"}, 0) == 1;
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t), b = d.src(2, t);
    const uint32_t c = d.count() > 3 ? d.src(3, t) : d.constant(0, false);
    Handler fn;
    if (is_signed(t)) {
        fn = high ? lanes([](i32 x, i32 y, u32 z) {
            return static_cast<u32>(low24(x) * low24(y) >> 16) + z;
        })
                  : lanes([](i32 x, i32 y, u32 z) {
                        return static_cast<u32>(low24(x) * low24(y)) + z;
                    });
    } else {
        fn = high ? lanes([](u32 x, u32 y, u32 z) {
            return static_cast<u32>(u64{x & 0xffffff} * (y & 0xffffff) >> 16) + z;
        })
                  : lanes([](u32 x, u32 y, u32 z) {
                        return static_cast<u32>(u64{x & 0xffffff} * (y & 0xffffff)) + z;
                    });
    }
    d.emit(fn, Class::alu, {d.dst(0, t), a, b, c});
}

}  // namespace

// Called by the decoders shared with floating point (isa_float.cpp).
void decode_int_add(Decode& d) { add_or_sub<Add, false>(d); }
void decode_int_sub(Decode& d) { add_or_sub<Sub, true>(d); }
void decode_int_mul(Decode& d) { multiply<MulLo, MulHi, MulWide>(d); }
void decode_int_mad(Decode& d) {
    for (const std::string& mod : d.st.mods)
        if (mod == "cc") return decode_carry(d);
    multiply<MadLo, MadHi, MadWide>(d);
}
void decode_int_div(Decode& d) { same_type<Div>(d); }
void decode_int_min(Decode& d) { min_or_max<Min, false>(d); }
void decode_int_max(Decode& d) { min_or_max<Max, true>(d); }
void decode_int_abs(Decode& d) { same_type<Abs>(d); }
void decode_int_neg(Decode& d) { same_type<Neg>(d); }

const Isa& isa_int() {
    static const Isa isa = {
        {"addc", decode_carry},
        {"subc", decode_carry},
        {"madc", decode_carry},
        {"rem", same_type<Rem>},
        {"sad", same_type<Sad>},
        {"and", logic<And, 0>},
        {"or", logic<Or, 1>},
        {"xor", logic<Xor, 2>},
        {"not", logic<Not, 3>},
        {"cnot", same_type<CNot>},
        {"shl", shift<Shl>},
        {"shr", shift<Shr>},
        {"lop3", decode_lop3},
        {"prmt", decode_prmt},
        {"shf", decode_shf},
        {"bfe", decode_bfe},
        {"bfi", decode_bfi},
        {"bmsk", decode_bmsk},
        {"bfind", decode_bfind},
        {"fns", decode_fns},
        {"popc", [](Decode& d) { bit_count(d, [](auto x) { return std::popcount(x); }); }},
        {"clz", [](Decode& d) { bit_count(d, [](auto x) { return std::countl_zero(x); }); }},
        {"brev", decode_brev},
        {"dp4a", decode_dp4a},
        {"dp2a", decode_dp2a},
        {"mul24", decode_mul24},
        {"mad24", decode_mul24},
    };
    return isa;
}

}  // namespace emu
