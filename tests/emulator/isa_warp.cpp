// Instructions across the lanes of a warp: shfl, vote, match, redux, activemask, elect.

#include <algorithm>

#include "decode.h"
#include "lanes.h"

namespace emu {
namespace {

// Checks a .sync instruction's member masks and calls f for each set of lanes that name each other
// (tiles of a warp may execute one instruction with a mask each). Does nothing when the group must
// wait for lanes on their way.
template <class F>
void for_each_member_set(Warp& w, uint32_t mask_row, Mask m, F f) {
    const auto* mask = w.row<uint32_t>(mask_row);
    Mask all = 0;
    for_each_lane(m, [&](int l) {
        if (!(mask[l] >> l & 1))
            fault("wrong lane mask", "an executing lane is not in its mask " + hex(mask[l]), l);
        all |= mask[l];
    });
    if (!w.converged(all, "wrong lane mask")) return;
    while (m) {
        const Mask named = mask[std::countr_zero(m)] & w.live;
        Mask set = 0;
        for_each_lane(m,
                      [&](int l) { set |= static_cast<Mask>((mask[l] & w.live) == named) << l; });
        if (named & ~set)
            fault("wrong lane mask",
                  "lanes " + hex(named & ~set) +
                      " are in the mask but do not execute this instruction with it",
                  std::countr_zero(named & ~set));
        f(set);
        m &= ~set;
    }
}

// op: d, a, b, c, mask, p
void shfl_set(Warp& w, const Instr& in, Mask m) {
    const auto *a = w.row<uint32_t>(in.op[1]), *b = w.row<uint32_t>(in.op[2]),
               *c = w.row<uint32_t>(in.op[3]);
    uint32_t out[kLanes];
    Mask inside = 0;
    for (int l = 0; l < kLanes; ++l) {
        const int clamp = static_cast<int>(c[l] & 31), segment = static_cast<int>(c[l] >> 8 & 31);
        const int n = static_cast<int>(b[l] & 31);
        const int max_lane = (l & segment) | (clamp & ~segment);
        const int min_lane = l & segment;
        int j = 0;
        bool ok = false;
        switch (in.a) {
            case 0:
                j = l - n, ok = j >= max_lane;
                break;  // up
            case 1:
                j = l + n, ok = j <= max_lane;
                break;  // down
            case 2:
                j = l ^ n, ok = j <= max_lane;
                break;  // bfly
            default:
                j = min_lane | (n & ~segment), ok = j <= max_lane;
                break;  // idx
        }
        if (!ok)
            j = l;
        else
            inside |= 1u << l;
        if ((m >> l & 1) && !(m >> j & 1) && ok)
            fault("wrong lane mask",
                  "reads lane " + std::to_string(j) + ", which does not take part", l);
        out[l] = a[j];
    }
    store_row(w.row<uint32_t>(in.op[0]), out, m);
    if (in.op[5] == kNone) return;
    Mask& p = w.predicate(in.op[5]);
    p = (p & ~m) | (inside & m);
}

void shfl(Warp& w, const Instr& in, Mask m) {
    for_each_member_set(w, in.op[4], m, [&](Mask set) { shfl_set(w, in, set); });
}

void decode_shfl(Decode& d) {
    d.crosses_lanes();
    if (!d.take("sync")) d.unknown("shfl without .sync");
    const int mode = d.take_one({"up", "down", "bfly", "idx"}, -1);
    d.take("b32");
    const uint32_t a = d.src(1, Type::b32), b = d.src(2, Type::b32), c = d.src(3, Type::b32),
                   mask = d.src(4, Type::b32);
    const uint32_t p =
        d.operand(0).items.empty() ? kNone : d.dst(d.operand(0).items[0], Type::pred);
    d.emit(shfl, Class::shared, {d.dst(0, Type::b32), a, b, c, mask, p}).a =
        static_cast<uint8_t>(mode);
}

// op: result, predicate, mask
void vote_set(Warp& w, const Instr& in, Mask m) {
    const Mask p = w.predicate(in.op[1]) & m;
    if (in.a == 3) {
        uint32_t out[kLanes];
        std::fill(out, out + kLanes, p);
        store_row(w.row<uint32_t>(in.op[0]), out, m);
        return;
    }
    const bool value = in.a == 0 ? p == m : in.a == 1 ? p != 0 : p == 0 || p == m;
    Mask& result = w.predicate(in.op[0]);
    result = value ? result | m : result & ~m;
}

void vote(Warp& w, const Instr& in, Mask m) {
    for_each_member_set(w, in.op[2], m, [&](Mask set) { vote_set(w, in, set); });
}

void decode_vote(Decode& d) {
    d.crosses_lanes();
    if (!d.take("sync")) d.unknown("vote without .sync");
    const int mode = d.take_one({"all", "any", "uni", "ballot"}, -1);
    const Type t = d.take_type();
    const uint32_t p = d.src(1, Type::pred), mask = d.src(2, Type::b32);
    d.emit(vote, Class::alu, {d.dst(0, t), p, mask}).a = static_cast<uint8_t>(mode);
}

// op: d, a, mask, p
template <class T>
void match_set(Warp& w, const Instr& in, Mask m) {
    const auto* a = w.row<T>(in.op[1]);
    uint32_t out[kLanes] = {};
    for_each_lane(m, [&](int l) {
        for_each_lane(m, [&](int k) { out[l] |= static_cast<uint32_t>(a[k] == a[l]) << k; });
    });
    if (in.a) {  // .all
        const bool same = out[std::countr_zero(m)] == m;
        std::fill(out, out + kLanes, same ? m : 0);
        if (in.op[3] != kNone) {
            Mask& p = w.predicate(in.op[3]);
            p = same ? p | m : p & ~m;
        }
    }
    store_row(w.row<uint32_t>(in.op[0]), out, m);
}

template <class T>
void match(Warp& w, const Instr& in, Mask m) {
    for_each_member_set(w, in.op[2], m, [&](Mask set) { match_set<T>(w, in, set); });
}

void decode_match(Decode& d) {
    d.crosses_lanes();
    const bool all = d.take_one({"any", "all"}, 0) == 1;
    d.take("sync");
    const Type t = d.take_type();
    const uint32_t a = d.src(1, t), mask = d.src(2, Type::b32);
    const uint32_t p =
        d.operand(0).items.empty() ? kNone : d.dst(d.operand(0).items[0], Type::pred);
    d.emit(bits_of(t) == 64 ? match<uint64_t> : match<uint32_t>, Class::alu,
           {d.dst(0, Type::b32), a, mask, p})
        .a = all;
}

// op: d, a, mask; in.a operation
template <class T>
void redux_set(Warp& w, const Instr& in, Mask m) {
    const auto* a = w.row<uint32_t>(in.op[1]);
    T value = from_row<T>(a[std::countr_zero(m)]);
    for_each_lane(m & (m - 1), [&](int l) {
        const T x = from_row<T>(a[l]);
        if constexpr (std::is_same_v<T, float>) {
            // in.b: .NaN makes a NaN win, else the number does; in.c: of absolute values
            const bool nan = in.b ? x != x : value != value;
            const bool keep = in.b ? value != value : x != x;
            if (!keep && (nan || (in.a == 1 ? x < value : x > value))) value = x;
        } else {
            switch (in.a) {
                case 0:
                    value = static_cast<T>(static_cast<uint32_t>(value) + static_cast<uint32_t>(x));
                    break;
                case 1:
                    value = std::min(value, x);
                    break;
                case 2:
                    value = std::max(value, x);
                    break;
                case 3:
                    value &= x;
                    break;
                case 4:
                    value |= x;
                    break;
                default:
                    value ^= x;
                    break;
            }
        }
    });
    uint32_t out[kLanes];
    std::fill(out, out + kLanes, to_row<T>(value));
    store_row(w.row<uint32_t>(in.op[0]), out, m);
}

template <class T>
void redux(Warp& w, const Instr& in, Mask m) {
    for_each_member_set(w, in.op[2], m, [&](Mask set) { redux_set<T>(w, in, set); });
}

void decode_redux(Decode& d) {
    d.crosses_lanes();
    d.take("sync");
    const int op = d.take_one({"add", "min", "max", "and", "or", "xor"}, -1);
    const bool absolute = d.take("abs"), nan = d.take("NaN");
    const Type t = d.take_type();
    if (op < 0 || (t == Type::f32 && (op < 1 || op > 2))) d.unknown();
    if (t == Type::f32 && d.device().capability < 100) d.unknown("redux.f32 needs sm_100a");
    uint32_t a = d.src(1, t);
    const uint32_t mask = d.src(2, Type::b32);
    if (absolute) {
        const uint32_t temp = d.temporary();
        d.emit_internal(lanes([](uint32_t x) { return x & 0x7fffffffu; }), {temp, a});
        a = temp;
    }
    Instr& in = d.emit(t == Type::f32 ? redux<float>
                       : is_signed(t) ? redux<int32_t>
                                      : redux<uint32_t>,
                       Class::alu, {d.dst(0, t), a, mask});
    in.a = static_cast<uint8_t>(op);
    in.b = nan;
}

void activemask(Warp& w, const Instr& in, Mask m) {
    uint32_t out[kLanes];
    std::fill(out, out + kLanes, m);
    store_row(w.row<uint32_t>(in.op[0]), out, m);
}

// elect.sync d|p, mask: the lowest member is elected.
void elect_set(Warp& w, const Instr& in, Mask m) {
    const int leader = std::countr_zero(m);
    uint32_t out[kLanes];
    std::fill(out, out + kLanes, static_cast<uint32_t>(leader));
    store_row(w.row<uint32_t>(in.op[0]), out, m);
    Mask& p = w.predicate(in.op[1]);
    p = (p & ~m) | 1u << leader;
}

void elect(Warp& w, const Instr& in, Mask m) {
    for_each_member_set(w, in.op[2], m, [&](Mask set) { elect_set(w, in, set); });
}

void decode_elect(Decode& d) {
    if (d.device().capability < 90) d.unknown("needs sm_90");
    d.take("sync");
    const Operand& o = d.operand(0);
    if (o.items.empty()) d.unknown("d|p expected");
    const uint32_t mask = d.src(1, Type::b32);
    const uint32_t p = d.dst(o.items[0], Type::pred);
    d.emit(elect, Class::alu, {d.dst(0, Type::b32), p, mask});
}

}  // namespace

const Isa& isa_warp() {
    static const Isa isa = {
        {"shfl", decode_shfl},
        {"vote", decode_vote},
        {"match", decode_match},
        {"redux", decode_redux},
        {"activemask",
         [](Decode& d) {
             d.take("b32");
             d.emit(activemask, Class::alu, {d.dst(0, Type::b32)});
         }},
        {"elect", decode_elect},
    };
    return isa;
}

}  // namespace emu
