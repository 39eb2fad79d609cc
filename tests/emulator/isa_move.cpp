// mov (scalar, pack, unpack), cvta, isspacep, mapa-free address arithmetic.

#include <algorithm>

#include "decode.h"
#include "lanes.h"

namespace emu {
namespace {

template <class S>
void copy_row(Warp& w, const Instr& in, Mask m) {
    store_row(w.row<S>(in.op[0]), w.row<S>(in.op[1]), m);
}

void move_predicate(Warp& w, const Instr& in, Mask m) {
    Mask& p = w.predicate(in.op[0]);
    p = (p & ~m) | (w.predicate(in.op[1]) & m);
}

// Packs in.a elements of in.b bits (list) into one value, or unpacks one into the list; in.c bits a
// whole.
template <class S>
void pack(Warp& w, const Instr& in, Mask m) {
    S out[kLanes] = {};
    const S element_mask = static_cast<S>((1ull << in.b) - 1);
    for (int e = 0; e < in.a; ++e) {
        const auto* from = w.row<uint32_t>(in.list[e]);
        const int shift = e * in.b;
        for (int l = 0; l < kLanes; ++l)
            out[l] |= (static_cast<S>(from[l]) & element_mask) << shift;
    }
    store_row(w.row<S>(in.op[0]), out, m);
}

template <class S>
void unpack(Warp& w, const Instr& in, Mask m) {
    S from[kLanes];
    std::memcpy(from, w.row<S>(in.op[0]), sizeof from);
    const S element_mask = static_cast<S>((1ull << in.b) - 1);
    for (int e = 0; e < in.a; ++e) {
        uint32_t out[kLanes];
        const int shift = e * in.b;
        for (int l = 0; l < kLanes; ++l)
            out[l] = static_cast<uint32_t>(from[l] >> shift & element_mask);
        store_row(w.row<uint32_t>(in.list[e]), out, m);
    }
}

// .b128 is two 64-bit rows.
void pack128(Warp& w, const Instr& in, Mask m) {
    for (uint32_t half = 0; half < 2; ++half)
        store_row(w.row<uint64_t>(in.op[0] + 64 * half), w.row<uint64_t>(in.list[half]), m);
}
void unpack128(Warp& w, const Instr& in, Mask m) {
    uint64_t from[2][kLanes];
    std::memcpy(from, w.row<uint64_t>(in.op[0]), sizeof from);
    for (int half = 0; half < 2; ++half) store_row(w.row<uint64_t>(in.list[half]), from[half], m);
}
void copy128(Warp& w, const Instr& in, Mask m) {
    for (uint32_t half = 0; half < 2; ++half)
        store_row(w.row<uint64_t>(in.op[0] + 64 * half), w.row<uint64_t>(in.op[1] + 64 * half), m);
}

void decode_mov(Decode& d) {
    const Type type = d.take_type();
    const int bits = bits_of(type);
    const Operand &to = d.operand(0), &from = d.operand(1);
    if (type == Type::pred) {
        const uint32_t source = d.src(1, type);
        d.emit(move_predicate, Class::mov, {d.dst(0, type), source});
        return;
    }
    const Operand* vector = from.kind == Operand::Kind::list ? &from
                            : to.kind == Operand::Kind::list ? &to
                                                             : nullptr;
    if (!vector) {
        const uint32_t source = d.src(1, type);
        d.emit(bits == 128  ? copy128
               : bits == 64 ? copy_row<uint64_t>
                            : copy_row<uint32_t>,
               Class::mov, {d.dst(0, type), source});
        return;
    }
    const int count = static_cast<int>(vector->items.size());
    const int element = count ? bits / count : 0;
    if (element * count != bits) d.unknown("elements do not fill the value");
    const Type piece = element == 64   ? Type::b64
                       : element == 32 ? Type::b32
                       : element == 16 ? Type::b16
                                       : Type::b8;
    const bool packs = vector == &from;
    const std::vector<uint32_t> rows = packs ? d.sources(from, piece) : d.results(to, piece);
    const uint32_t* list = d.list(rows);
    const uint32_t whole = packs ? d.dst(0, type) : d.src(1, type);
    Handler fn = bits == 128  ? (packs ? pack128 : unpack128)
                 : bits == 64 ? (packs ? pack<uint64_t> : unpack<uint64_t>)
                              : (packs ? pack<uint32_t> : unpack<uint32_t>);
    if (bits == 128 && element != 64) d.unknown("only two .b64 make a .b128 here");
    Instr& in = d.emit(fn, Class::mov, {whole});
    in.list = list;
    in.a = static_cast<uint8_t>(count);
    in.b = static_cast<uint8_t>(element);
}

uint64_t window(Space space) {
    return space == Space::shared ? kSharedWindow : space == Space::local ? kLocalWindow : 0;
}

std::optional<Space> take_space(Decode& d) {
    if (d.take("global")) return Space::global;
    if (d.take("shared") || d.take("shared::cta") || d.take("shared::cluster"))
        return Space::shared;
    if (d.take("local")) return Space::local;
    if (d.take("const")) return Space::constant;
    if (d.take("param") || d.take("param::entry")) return Space::param;
    return std::nullopt;
}

void decode_cvta(Decode& d) {
    const bool to = d.take("to");
    const auto space = take_space(d);
    if (!space) d.unknown("no state space");
    const Type type = d.take_type();
    if (bits_of(type) != 64) d.unknown("only 64-bit generic addresses");
    const uint32_t from = d.src(1, Type::u64);
    const uint32_t base =
        *space == Space::param ? d.special(Special::param_base) : d.constant(window(*space), true);
    Handler fn = to ? lanes([](uint64_t a, uint64_t b) { return a - b; })
                    : lanes([](uint64_t a, uint64_t b) { return a + b; });
    d.emit(fn, Class::alu, {d.dst(0, Type::u64), from, base});
}

void decode_isspacep(Decode& d) {
    const auto& mods = d.st.mods;
    const bool cluster = std::find(mods.begin(), mods.end(), "shared::cluster") != mods.end();
    const auto space = take_space(d);
    if (!space) d.unknown("no state space");
    const uint32_t from = d.src(1, Type::u64);
    const uint32_t base = d.constant(window(*space), true);
    if (*space == Space::shared && !cluster && d.device().capability >= 90) {
        // Another CTA's shared memory is in .shared::cluster alone.
        const uint32_t own = d.special(Special::shared_base_wide);
        d.emit(lanes([](uint64_t a, uint64_t b, uint64_t rank) {
                   return Pred{window_of(a) == b && (a - b) >> kRankShift == rank >> kRankShift};
               }),
               Class::alu, {d.dst(0, Type::pred), from, base, own});
        return;
    }
    d.emit(lanes([](uint64_t a, uint64_t b) { return Pred{window_of(a) == b}; }), Class::alu,
           {d.dst(0, Type::pred), from, base});
}

}  // namespace

const Isa& isa_move() {
    static const Isa isa = {
        {"mov", decode_mov}, {"cvta", decode_cvta}, {"isspacep", decode_isspacep}};
    return isa;
}

}  // namespace emu
