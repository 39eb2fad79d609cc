// f16, bf16 and their packed pairs: add, sub, mul, fma, min, max, abs, neg.
//
// Operands are widened to fp32, or to double for fma, where the sum is rounded to odd so that the
// one rounding that counts is the last.

#include <algorithm>

#include "convert.h"
#include "decode.h"
#include "floats.h"
#include "lanes.h"

namespace emu {

bool decode_half(Decode& d);

namespace {

struct F16 {
    static float widen(uint16_t x) { return f16_to_f32(x); }
    static uint16_t narrow(float x) { return f32_to_f16(x); }
    static constexpr const FloatFormat& format = kF16;
    static constexpr uint16_t nan = 0x7fff;
};
struct BF16 {
    static float widen(uint16_t x) { return bf16_to_f32(x); }
    static uint16_t narrow(float x) { return f32_to_bf16(x); }
    static constexpr const FloatFormat& format = kBF16;
    static constexpr uint16_t nan = 0x7fff;
};

enum Op { kAdd, kSub, kMul, kFma, kMin, kMax, kMinNan, kMaxNan, kAbs, kNeg };
enum Finish { kPlain, kSat, kRelu };

// p + c rounded to odd: a second rounding to fewer bits then gives what one rounding would have.
inline double add_to_odd(double p, double c) {
    const double sum = p + c;
    const double back = sum - p;
    const double error = (p - (sum - back)) + (c - back);
    const uint64_t bits = std::bit_cast<uint64_t>(sum);
    if (error == 0 || !(error == error) || (bits & 1)) return sum;
    const bool away = (error > 0) == (sum > 0);
    return std::bit_cast<double>(away ? bits + 1 : bits - 1);
}

template <class H, Op O, Finish End>
inline uint16_t half_lane(uint16_t a, uint16_t b, uint16_t c) {
    if constexpr (O == kAbs) return a & 0x7fff;
    if constexpr (O == kNeg) return a ^ 0x8000;
    const float x = H::widen(a), y = H::widen(b);
    uint16_t bits;
    if constexpr (O == kFma) {
        const double sum = add_to_odd(static_cast<double>(x) * y, H::widen(c));
        bits = static_cast<uint16_t>(encode(H::format, sum, Round::rn));
    } else {
        float r = 0;
        if constexpr (O == kAdd) r = x + y;
        if constexpr (O == kSub) r = x - y;
        if constexpr (O == kMul) r = x * y;
        if constexpr (O == kMin) r = min_max<false, false>(x, y);
        if constexpr (O == kMax) r = min_max<true, false>(x, y);
        if constexpr (O == kMinNan) r = min_max<false, true>(x, y);
        if constexpr (O == kMaxNan) r = min_max<true, true>(x, y);
        bits = H::narrow(r);
    }
    if constexpr (End == kPlain) return bits;
    const float r = H::widen(bits);
    if constexpr (End == kSat) return H::narrow(saturate(r));
    return r != r ? H::nan : r < 0 ? uint16_t{0} : bits;
}

template <class H, Op O, Finish End>
Handler handler(bool packed) {
    if (!packed) {
        if constexpr (O == kAbs || O == kNeg)
            return lanes([](uint16_t a) { return half_lane<H, O, End>(a, 0, 0); });
        else if constexpr (O == kFma)
            return lanes(
                [](uint16_t a, uint16_t b, uint16_t c) { return half_lane<H, O, End>(a, b, c); });
        else
            return lanes([](uint16_t a, uint16_t b) { return half_lane<H, O, End>(a, b, 0); });
    }
    constexpr auto both = [](uint32_t a, uint32_t b, uint32_t c) {
        const uint32_t lo = half_lane<H, O, End>(static_cast<uint16_t>(a), static_cast<uint16_t>(b),
                                                 static_cast<uint16_t>(c));
        const uint32_t hi =
            half_lane<H, O, End>(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16),
                                 static_cast<uint16_t>(c >> 16));
        return hi << 16 | lo;
    };
    using B = decltype(both);
    if constexpr (O == kAbs || O == kNeg)
        return lanes([](uint32_t a) { return B{}(a, 0, 0); });
    else if constexpr (O == kFma)
        return lanes([](uint32_t a, uint32_t b, uint32_t c) { return B{}(a, b, c); });
    else
        return lanes([](uint32_t a, uint32_t b) { return B{}(a, b, 0); });
}

template <class H>
Handler pick(Decode& d, Op op, Finish end, bool packed) {
    switch (op) {
        case kAdd:
            return end == kSat ? handler<H, kAdd, kSat>(packed) : handler<H, kAdd, kPlain>(packed);
        case kSub:
            return end == kSat ? handler<H, kSub, kSat>(packed) : handler<H, kSub, kPlain>(packed);
        case kMul:
            return end == kSat ? handler<H, kMul, kSat>(packed) : handler<H, kMul, kPlain>(packed);
        case kFma:
            return end == kSat    ? handler<H, kFma, kSat>(packed)
                   : end == kRelu ? handler<H, kFma, kRelu>(packed)
                                  : handler<H, kFma, kPlain>(packed);
        case kMin:
            return handler<H, kMin, kPlain>(packed);
        case kMax:
            return handler<H, kMax, kPlain>(packed);
        case kMinNan:
            return handler<H, kMinNan, kPlain>(packed);
        case kMaxNan:
            return handler<H, kMaxNan, kPlain>(packed);
        case kAbs:
            return handler<H, kAbs, kPlain>(packed);
        case kNeg:
            return handler<H, kNeg, kPlain>(packed);
    }
    d.unknown();
}

void flush_half(Warp& w, const Instr& in, Mask) {
    const auto* from = w.row<uint32_t>(in.op[1]);
    auto* to = w.row<uint32_t>(in.op[0]);
    for (int l = 0; l < kLanes; ++l) {
        uint32_t x = from[l];
        if ((x & 0x7c00u) == 0) x &= 0xffff8000u;
        if ((x & 0x7c000000u) == 0) x &= 0x8000ffffu;
        to[l] = x;
    }
}

}  // namespace

bool decode_half(Decode& d) {
    static const std::pair<std::string_view, Op> ops[] = {
        {"add", kAdd}, {"sub", kSub}, {"mul", kMul}, {"fma", kFma},
        {"min", kMin}, {"max", kMax}, {"abs", kAbs}, {"neg", kNeg}};
    const auto* found = std::find_if(std::begin(ops), std::end(ops),
                                     [&](auto& o) { return o.first == d.st.opcode; });
    if (found == std::end(ops)) return false;
    Op op = found->second;
    d.take("rn");
    const bool ftz = d.take("ftz"), sat = d.take("sat"), relu = d.take("relu"), nan = d.take("NaN");
    const Type t = d.take_type();
    const bool f16 = t == Type::f16 || t == Type::f16x2,
               packed = t == Type::f16x2 || t == Type::bf16x2;
    if (ftz && !f16) d.unknown(".ftz on bf16");
    if (nan && (op == kMin || op == kMax)) op = op == kMin ? kMinNan : kMaxNan;
    std::array<uint32_t, 3> s{kNone, kNone, kNone};
    for (size_t i = 1; i < d.count(); ++i) {
        s.at(i - 1) = d.src(i, t);
        if (!ftz) continue;
        const uint32_t temp = d.temporary();
        d.emit_internal(flush_half, {temp, s[i - 1]});
        s[i - 1] = temp;
    }
    const Finish end = sat ? kSat : relu ? kRelu : kPlain;
    Handler fn = f16 ? pick<F16>(d, op, end, packed) : pick<BF16>(d, op, end, packed);
    const uint32_t result = d.dst(0, t);
    d.emit(fn, Class::fp16, {result, s[0], s[1], s[2]});
    if (ftz) d.after(flush_half, {result, result});
    return true;
}

const Isa& isa_half() {
    static const Isa isa;  // all opcodes are shared with fp32: decode_half
    return isa;
}

}  // namespace emu
