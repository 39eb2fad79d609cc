// ld, st, atom, red in every space, prefetches and cache policies.

#include "access.h"
#include "atomics.h"
#include "decode.h"
#include "lanes.h"

namespace emu {
namespace {

using Access = SharedMemory::Access;

enum Flags : uint8_t { kWide = 1, kStrong = 2, kCluster = 4, kHint = 8 };

uint8_t* host_address(Warp& w, Cta& cta, Space space, uint64_t address, int lane) {
    if (space == Space::shared) return cta.shared.data() + address;
    if (space == Space::local) return w.local_lane(lane) + address;
    return reinterpret_cast<uint8_t*>(address);
}

// Calls f(space, cta, addresses) for the lanes of each space and CTA.
template <class F>
void by_place(Warp& w, const Instr& in, const LaneAddresses& all, F f) {
    by_space(all, static_cast<Space>(in.c), [&](Space space, const LaneAddresses& part) {
        by_cta(w, space, part, in.a & kCluster,
               [&](Cta& cta, const LaneAddresses& a) { f(space, cta, a); });
    });
}

// Shared memory is done by the caller.
void check(Warp& w, Space space, const LaneAddresses& a, uint32_t bytes, bool write,
           bool is_hint = false) {
    if (space == Space::local)
        check_local(w, a, bytes);
    else
        check_global(w, a, bytes, write, nullptr, is_hint);
}

// op[0]: address; list: in.b rows of elements of type T.
template <class T>
void load(Warp& w, const Instr& in, Mask m) {
    using S = RowOf<T>;
    const uint32_t bytes = sizeof(T) * in.b;
    const LaneAddresses all = lane_addresses(w, in.op[0], in.a & kWide, in.imm, m);
    by_place(w, in, all, [&](Space space, Cta& cta, const LaneAddresses& a) {
        if (space == Space::shared)
            check_shared(w, cta, a, bytes, in.a & kStrong ? Access::strong_read : Access::read);
        else
            check(w, space, a, bytes, false, in.a & kHint);
        const uint8_t* from[kLanes];
        for (int l = 0; l < kLanes; ++l) from[l] = host_address(w, cta, space, a.at[l], l);
        for (uint32_t e = 0; e < in.b; ++e) {
            S out[kLanes];
            for (int l = 0; l < kLanes; ++l) {
                T value;
                std::memcpy(&value, from[l] + e * sizeof(T), sizeof(T));
                out[l] = to_row<T>(value);
            }
            store_row(w.row<S>(in.list[e]), out, a.mask);
        }
    });
}

template <class T>
void store(Warp& w, const Instr& in, Mask m) {
    using S = RowOf<T>;
    const uint32_t bytes = sizeof(T) * in.b;
    const LaneAddresses all = lane_addresses(w, in.op[0], in.a & kWide, in.imm, m);
    by_place(w, in, all, [&](Space space, Cta& cta, const LaneAddresses& a) {
        if (space == Space::shared)
            check_shared_bounds(w, cta, a, bytes);
        else
            check(w, space, a, bytes, true);
        for_each_lane(a.mask, [&](int l) {
            uint8_t value[32];
            for (uint32_t e = 0; e < in.b; ++e)
                std::memcpy(value + e * sizeof(T), &w.row<S>(in.list[e])[l], sizeof(T));
            if (space == Space::shared)
                cta.shared.access(in.a & kStrong ? Access::strong_write : Access::write, w.agent, l,
                                  static_cast<uint32_t>(a.at[l]), bytes, value);
            std::memcpy(host_address(w, cta, space, a.at[l], l), value, bytes);
        });
    });
}

// Kernel parameters and constants: no lanes' addresses to check one by one in the usual, uniform
// case.
template <class T>
void load_param(Warp& w, const Instr& in, Mask m) {
    using S = RowOf<T>;
    const LaneAddresses a = lane_addresses(w, in.op[0], in.a & kWide, in.imm, m);
    check_alignment(a, sizeof(T) * in.b);
    const std::span<const uint8_t> params = w.launch->params;
    for (int l = 0; l < kLanes; ++l)
        if (a.at[l] + sizeof(T) * in.b > params.size())
            fault("out of bounds",
                  "parameter offset " + std::to_string(a.at[l]) + " of " +
                      std::to_string(params.size()) + " bytes",
                  l);
    for (uint32_t e = 0; e < in.b; ++e) {
        S out[kLanes];
        for (int l = 0; l < kLanes; ++l) {
            T value;
            std::memcpy(&value, params.data() + a.at[l] + e * sizeof(T), sizeof(T));
            out[l] = to_row<T>(value);
        }
        store_row(w.row<S>(in.list[e]), out, m);
    }
}

struct Qualifiers {
    Space space = Space::generic;
    bool strong = false;
    bool cluster = false;  // may name another CTA's shared memory
    bool hint = false;     // a load past L1: one may come before griddepcontrol.wait, as a hint
};

Qualifiers take_qualifiers(Decode& d) {
    Qualifiers q;
    q.strong =
        d.take_one({"relaxed", "acquire", "release", "acq_rel", "volatile", "mmio"}, -1) >= 0;
    d.take("weak");
    d.take_one({"cta", "cluster", "gpu", "sys"}, -1);
    if (d.take("global"))
        q.space = Space::global;
    else if (d.take("shared") || d.take("shared::cta"))
        q.space = Space::shared;
    else if (d.take("shared::cluster"))
        q.space = Space::shared, q.cluster = true;
    else if (d.take("local"))
        q.space = Space::local;
    else if (d.take("const"))
        q.space = Space::constant;
    else if (d.take("param") || d.take("param::entry") || d.take("param::func"))
        q.space = Space::param;
    // Caching changes speed only.
    q.hint = d.take_one({"ca", "cg", "cs", "lu", "cv", "wb", "wt"}, -1) == 1;
    d.take("nc");
    d.take("unified");
    d.take_prefix("L1::");
    d.take_prefix("L2::");
    return q;
}

int take_vector(Decode& d) {
    static constexpr int widths[] = {2, 4, 8, 1};
    return widths[d.take_one({"v2", "v4", "v8"}, 3)];
}

Class class_of(Space space) {
    switch (space) {
        case Space::shared:
            return Class::shared;
        case Space::local:
            return Class::local;
        case Space::param:
        case Space::constant:
            return Class::mov;  // ptxas reads them as operands
        default:
            return Class::global;
    }
}

// Fills the fields that load and store share.
void finish(Instr& in, const Address& a, Space space, const Qualifiers& q, int count) {
    in.imm = a.offset;
    const bool cluster = q.cluster || q.space == Space::generic;
    in.a = static_cast<uint8_t>((a.wide ? kWide : 0) | (q.strong ? kStrong : 0) |
                                (cluster ? kCluster : 0) | (q.hint ? kHint : 0));
    in.b = static_cast<uint8_t>(count);
    in.c = static_cast<uint8_t>(space == Space::constant ? Space::global : space);
}

// The space a .param access really goes to: kernel parameters, or a function's, kept in local
// memory.
Space resolve_space(Decode& d, Space space, const Address& a) {
    if (space == Space::param) return a.names_param ? a.space : Space::param;
    if (space == Space::generic && a.names_param) d.unknown("a parameter needs .param");
    if (space == Space::generic && a.space != Space::generic) return a.space;
    return space;
}

// .b128 registers are two 64-bit rows.
std::vector<uint32_t> split128(std::vector<uint32_t> rows, Type& type) {
    if (type != Type::b128) return rows;
    type = Type::b64;
    std::vector<uint32_t> halves;
    for (uint32_t row : rows) halves.insert(halves.end(), {row, row + 64});
    return halves;
}

void decode_ld(Decode& d) {
    d.consumes();
    Qualifiers q = take_qualifiers(d);
    const int vector = take_vector(d);
    Type t = d.take_type();
    const Address a = d.address(1);
    const Space space = resolve_space(d, q.space, a);
    std::vector<uint32_t> rows = d.results(d.operand(0), t);
    if (static_cast<int>(rows.size()) != vector) d.unknown("vector width");
    rows = split128(rows, t);
    const int count = static_cast<int>(rows.size());
    if (space == Space::shared || space == Space::generic) d.note_shared_width(bytes_of(t) * count);
    const uint32_t* list = d.list(rows);
    auto pick = [&]<class T>() -> Handler {
        return space == Space::param ? load_param<T> : load<T>;
    };
    Handler fn = nullptr;
    switch (bits_of(t)) {
        case 8:
            fn = is_signed(t) ? pick.operator()<int8_t>() : pick.operator()<uint8_t>();
            break;
        case 16:
            fn = is_signed(t) ? pick.operator()<int16_t>() : pick.operator()<uint16_t>();
            break;
        case 32:
            fn = pick.operator()<uint32_t>();
            break;
        default:
            fn = pick.operator()<uint64_t>();
            break;
    }
    Instr& in = d.emit(
        fn, class_of(q.space == Space::param && space == Space::local ? Space::param : space),
        {a.row});
    in.list = list;
    finish(in, a, space, q, count);
}

void decode_st(Decode& d) {
    d.consumes();
    if (d.take("async")) return decode_store_async(d);
    Qualifiers q = take_qualifiers(d);
    const int vector = take_vector(d);
    Type t = d.take_type();
    const Address a = d.address(0);
    const Space space = resolve_space(d, q.space, a);
    if (space == Space::param) d.unknown("kernel parameters are read-only");
    std::vector<uint32_t> rows = d.sources(d.operand(1), t);
    if (static_cast<int>(rows.size()) != vector) d.unknown("vector width");
    rows = split128(rows, t);
    const int count = static_cast<int>(rows.size());
    if (space == Space::shared || space == Space::generic) d.note_shared_width(bytes_of(t) * count);
    const uint32_t* list = d.list(rows);
    Handler fn = nullptr;
    switch (bits_of(t)) {
        case 8:
            fn = store<uint8_t>;
            break;
        case 16:
            fn = store<uint16_t>;
            break;
        case 32:
            fn = store<uint32_t>;
            break;
        default:
            fn = store<uint64_t>;
            break;
    }
    Instr& in = d.emit(fn, class_of(q.space == Space::param ? Space::param : space), {a.row});
    in.list = list;
    finish(in, a, space, q, count);
}

// ---- atomics --------------------------------------------------------------------------------

// op: address, b, c; list: result rows (null for red), then value rows; in.b elements.
template <class T>
void atomic(Warp& w, const Instr& in, Mask m) {
    using S = RowOf<T>;
    const uint32_t bytes = sizeof(T) * in.b;
    const LaneAddresses all = lane_addresses(w, in.op[0], in.a & kWide, in.imm, m);
    by_place(w, in, all, [&](Space space, Cta& cta, const LaneAddresses& a) {
        if (space == Space::shared) {
            check_shared(w, cta, a, bytes, SharedMemory::Access::atomic);
        } else if (space == Space::global) {
            check_global(w, a, bytes, false);
            check_global(w, a, bytes, true);
        } else {
            fault("bad atomic", "atomics need shared or global memory", a.first());
        }
        for_each_lane(a.mask, [&](int l) {
            for (uint32_t e = 0; e < in.b; ++e) {
                const T b = from_row<T>(w.row<S>(in.list[in.b + e])[l]);
                const T c = in.op[2] == kNone ? b : from_row<T>(w.row<S>(in.op[2])[l]);
                const T old = atomic_update<T>(
                    host_address(w, cta, space, a.at[l], l) + e * sizeof(T), in.d, b, c);
                if (in.list[e] != kNone) w.row<S>(in.list[e])[l] = to_row<T>(old);
            }
        });
    });
}

void decode_atom(Decode& d) {
    d.consumes();
    const bool has_result = d.st.opcode == "atom";
    if (!has_result && d.take("async")) return decode_reduce_async(d);
    Qualifiers q = take_qualifiers(d);
    const int op =
        d.take_one({"add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"}, -1);
    if (op < 0) d.unknown("no operation");
    d.take("noftz");
    const int vector = take_vector(d);
    const Type t = d.take_type();
    const Address a = d.address(has_result ? 1 : 0);
    const Space space = resolve_space(d, q.space, a);
    if (space == Space::shared || space == Space::generic)
        d.note_shared_width(bytes_of(t) * vector);
    const size_t at = has_result ? 2 : 1;
    std::vector<uint32_t> rows(static_cast<size_t>(vector), kNone);
    const std::vector<uint32_t> values = d.sources(d.operand(at), t);
    const uint32_t c = op == kCas ? d.src(at + 1, t) : kNone;
    if (has_result) rows = d.results(d.operand(0), t);
    rows.insert(rows.end(), values.begin(), values.end());
    Handler fn = nullptr;
    switch (t) {
        case Type::s32:
            fn = atomic<int32_t>;
            break;
        case Type::u32:
        case Type::b32:
            fn = atomic<uint32_t>;
            break;
        case Type::s64:
            fn = atomic<int64_t>;
            break;
        case Type::u64:
        case Type::b64:
            fn = atomic<uint64_t>;
            break;
        case Type::b16:
        case Type::u16:
            fn = atomic<uint16_t>;
            break;
        case Type::f32:
            fn = atomic<float>;
            break;
        case Type::f64:
            fn = atomic<double>;
            break;
        case Type::f16:
            fn = atomic<Half>;
            break;
        case Type::bf16:
            fn = atomic<Bfloat>;
            break;
        case Type::f16x2:
            fn = atomic<Pair<Half>>;
            break;
        case Type::bf16x2:
            fn = atomic<Pair<Bfloat>>;
            break;
        default:
            d.unknown("type");
    }
    if ((t == Type::f32 || t == Type::f64) && op != kAdd) d.unknown("operation on this type");
    const uint32_t* list = d.list(rows);
    Instr& in = d.emit(fn, class_of(space), {a.row, kNone, c});
    in.list = list;
    q.strong = true;
    finish(in, a, space, q, vector);
    in.d = static_cast<uint8_t>(op);
}

// ---- hints ------------------------------------------------------------------------------------

void nothing(Warp&, const Instr&, Mask) {}

void decode_prefetch(Decode& d) {
    d.take_one({"global", "local", "const", "param"}, -1);
    d.take("tensormap");
    d.take_prefix("L1");
    d.take_prefix("L2");
    d.address(0);
    d.emit(nothing, Class::global);
}

void decode_createpolicy(Decode& d) {
    for (const std::string& mod : d.st.mods) d.take(mod);
    d.emit(lanes([](uint64_t a) { return a; }), Class::alu,
           {d.dst(0, Type::b64), d.constant(0, true)});
}

}  // namespace

const Isa& isa_memory() {
    static const Isa isa = {
        {"ld", decode_ld},
        {"ldu", decode_ld},
        {"st", decode_st},
        {"atom", decode_atom},
        {"red", decode_atom},
        {"prefetch", decode_prefetch},
        {"prefetchu", decode_prefetch},
        {"applypriority", decode_prefetch},
        {"discard", decode_prefetch},
        {"createpolicy", decode_createpolicy},
    };
    return isa;
}

}  // namespace emu
