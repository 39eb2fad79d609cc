// Thread block clusters: addresses and barriers across CTAs, asynchronous stores into another CTA's
// shared memory; registers that warps hand to each other.

#include <algorithm>

#include "access.h"
#include "atomics.h"
#include "decode.h"
#include "lanes.h"

namespace emu {
namespace {

// op: result, address, rank; in.a: the window of generic addresses
template <class T>
void mapa(Warp& w, const Instr& in, Mask m) {
    const auto* from = w.row<T>(in.op[1]);
    const auto* rank = w.row<uint32_t>(in.op[2]);
    const uint64_t base = in.a ? kSharedWindow : 0;
    T out[kLanes] = {};
    for_each_lane(m, [&](int l) {
        if (rank[l] >= w.cta->cluster->ctas.size())
            fault("out of bounds",
                  "mapa to CTA rank " + std::to_string(rank[l]) + " of a cluster of " +
                      std::to_string(w.cta->cluster->ctas.size()),
                  l);
        if (in.a && window_of(from[l]) != kSharedWindow)
            fault("out of bounds", "mapa of " + hex(from[l]) + ", which is not in shared memory",
                  l);
        const uint64_t offset = (from[l] - base) & kOffsetMask;
        out[l] = static_cast<T>(base + (uint64_t{rank[l]} << kRankShift) + offset);
    });
    store_row(w.row<T>(in.op[0]), out, m);
}

void require_90(Decode& d) {
    if (d.device().capability < 90) d.unknown("needs sm_90");
}

void decode_mapa(Decode& d) {
    require_90(d);
    const bool shared = d.take("shared::cluster");
    const Type t = d.take_type();
    const uint32_t from = d.src(1, t), rank = d.src(2, Type::u32);
    d.emit(bits_of(t) == 64 ? mapa<uint64_t> : mapa<uint32_t>, Class::alu,
           {d.dst(0, t), from, rank})
        .a = !shared;
}

void decode_getctarank(Decode& d) {
    require_90(d);
    d.take("shared::cluster");
    const Type t = d.take_type();
    const uint32_t from = d.src(1, t);
    d.emit(bits_of(t) == 64 ? lanes([](uint64_t a) {
               return static_cast<uint32_t>((a & (kSharedWindow - 1)) >> kRankShift);
           })
                            : lanes([](uint32_t a) { return a >> kRankShift; }),
           Class::alu, {d.dst(0, Type::u32), from});
}

// ---- barrier.cluster ----------------------------------------------------------------------------

// in.a: .aligned; in.b: orders no memory (.relaxed)
void cluster_arrive(Warp& w, const Instr& in, Mask m) {
    if (in.a && !w.converged(w.live, "divergent barrier")) return;
    w.cta->cluster->barrier_arrive(w, m, !in.b);
}

void cluster_wait(Warp& w, const Instr& in, Mask m) {
    if (in.a && !w.converged(w.live, "divergent barrier")) return;
    if (m & ~w.cluster_arrived)
        fault("barrier misuse", "barrier.cluster.wait before barrier.cluster.arrive",
              std::countr_zero(m & ~w.cluster_arrived));
    if (m & w.cluster_pending) return w.block(Wait::cluster_barrier, 0, true);
    w.cluster_arrived &= ~m;
    w.cta->cluster->clocks.join(w.agent, w.cta->cluster->completed);
}

// ---- asynchronous stores ------------------------------------------------------------------------

struct Target {
    Cta* cta;
    uint32_t address, barrier;
    int engine;
};

// Where a lane's data and the word of its arrival go: op[0] and op[1], the latter in.target on.
Target target_of(Warp& w, const Instr& in, int lane, uint32_t bytes) {
    const auto address = static_cast<uint32_t>(
        w.row<uint32_t>(in.op[0])[lane * (in.a & 1 ? 2 : 1)] + static_cast<uint32_t>(in.imm));
    const auto barrier =
        static_cast<uint32_t>(w.row<uint32_t>(in.op[1])[lane * (in.a & 2 ? 2 : 1)] + in.target);
    if (address >> kRankShift != barrier >> kRankShift)
        fault("mbarrier misuse",
              "data go to CTA rank " + std::to_string(address >> kRankShift) +
                  ", its mbarrier is of rank " + std::to_string(barrier >> kRankShift),
              lane);
    Cta& cta = cta_of_rank(w, address >> kRankShift, lane);
    Target t{&cta, address & kOffsetMask, barrier & kOffsetMask, 0};
    if (t.address % bytes)
        fault("misaligned access",
              "address " + hex(address) + " is not a multiple of " + std::to_string(bytes), lane);
    if (t.address + bytes > cta.shared.size())
        fault("out of bounds",
              std::to_string(bytes) + " bytes at shared address " + hex(address) +
                  "; the CTA has " + std::to_string(cta.shared.size()),
              lane);
    t.engine = cta.mbarrier(w, t.barrier, lane).engine;
    return t;
}

// list: in.b rows of elements of in.c bytes
void store_async(Warp& w, const Instr& in, Mask m) {
    const uint32_t bytes = uint32_t{in.b} * in.c;
    for_each_lane(m, [&](int l) {
        const Target t = target_of(w, in, l, bytes);
        std::array<uint8_t, 32> value;
        for (uint32_t e = 0; e < in.b; ++e) {
            if (in.c == 8)
                std::memcpy(&value[e * 8], &w.row<uint64_t>(in.list[e])[l], 8);
            else
                std::memcpy(&value[e * 4], &w.row<uint32_t>(in.list[e])[l], 4);
        }
        t.cta->shared.bulk_write(w.agent, l, t.engine, t.address, bytes, true);
        w.cta->cluster->defer(w, t.cta, [t, value, bytes] {
            std::memcpy(t.cta->shared.data() + t.address, value.data(), bytes);
            t.cta->shared.bulk_land(t.engine, t.address, bytes);
            t.cta->mbarrier_complete(t.barrier, t.engine, bytes);
        });
    });
}

void reduce_async(Warp& w, const Instr& in, Mask m) {
    const auto reduce = reinterpret_cast<Reduction>(in.list);
    const uint32_t bytes = in.c;
    const uint8_t op = in.d;
    for_each_lane(m, [&](int l) {
        const Target t = target_of(w, in, l, bytes);
        const uint64_t value =
            bytes == 8 ? w.row<uint64_t>(in.op[2])[l] : w.row<uint32_t>(in.op[2])[l];
        w.cta->cluster->defer(w, t.cta, [t, value, bytes, reduce, op] {
            reduce(op, t.cta->shared.data() + t.address, &value, bytes);
            t.cta->shared.bulk_land(t.engine, t.address, bytes, true);
            t.cta->mbarrier_complete(t.barrier, t.engine, bytes);
        });
    });
}

void take_async_qualifiers(Decode& d) {
    require_90(d);
    d.note_async();
    d.take_one({"weak", "relaxed"}, -1);
    d.take_one({"cluster"}, -1);
    if (!d.take("shared::cluster") || !d.take("mbarrier::complete_tx::bytes"))
        d.unknown("only to .shared::cluster with .mbarrier::complete_tx::bytes");
}

// ---- setmaxnreg ---------------------------------------------------------------------------------

constexpr uint32_t kRegisters = 65536;  // of an SM

// in.imm: registers a thread; in.a: .inc
void set_max_registers(Warp& w, const Instr& in, Mask) {
    if (!w.converged(w.live, "wrong lane mask")) return;
    // What a thread had at launch is ptxas' choice: taken as all that the CTA can have. 255
    // registers are allocated as 256.
    const auto threads = static_cast<uint32_t>(w.launch->config.block.count());
    const uint32_t launched = std::min(256u, kRegisters / threads) & ~7u;
    const auto wanted = static_cast<uint32_t>(in.imm);
    const uint32_t now = w.max_registers ? w.max_registers : launched;
    if (in.a ? wanted < now : wanted > now)
        fault("setmaxnreg misuse", std::string(in.a ? ".inc" : ".dec") + " to " +
                                       std::to_string(wanted) + " registers from " +
                                       std::to_string(now));
    uint32_t sum = 0;
    for (const Warp& other : w.cta->warps) {
        const uint32_t held = other.max_registers ? other.max_registers : launched;
        sum += kLanes * (&other == &w ? wanted : held);
    }
    // Not from what the SM has left: the launch's registers are whole eights of each thread.
    if (sum > launched * threads && in.a) return w.block(Wait::registers, 0, true);
    w.max_registers = wanted;
    if (!in.a) w.cta->cluster->wake(Wait::registers, w.cta, kNone);
}

void decode_setmaxnreg(Decode& d) {
    d.require_arch_specific();
    const int kind = d.take_one({"inc", "dec"}, -1);
    if (kind < 0 || !d.take("sync") || !d.take("aligned") || !d.take("u32")) d.unknown();
    const int64_t n = d.immediate(0);
    if (n < 24 || n > 256 || n % 8) d.unknown("24 to 256, a multiple of 8");
    Instr& in = d.emit(set_max_registers, Class::sync);
    in.imm = n;
    in.a = kind == 0;
}

}  // namespace

void decode_cluster_barrier(Decode& d) {
    require_90(d);
    const int kind = d.take_one({"arrive", "wait"}, -1);
    if (kind < 0) d.unknown();
    const int order = d.take_one({"release", "acquire", "relaxed"}, kind);
    if ((kind == 0 && order == 1) || (kind == 1 && order != 1)) d.unknown("memory order");
    Instr& in = d.emit(kind == 0 ? cluster_arrive : cluster_wait, Class::sync);
    in.a = d.take("aligned");
    in.b = order == 2;
}

void decode_store_async(Decode& d) {
    take_async_qualifiers(d);
    const int which = d.take_one({"v2", "v4"}, -1);
    const Type t = d.take_type();
    const auto rows = d.sources(d.operand(1), t);
    const size_t expected = which < 0 ? 1 : which == 0 ? 2 : 4;
    if (rows.size() != expected || bytes_of(t) < 4) d.unknown("vector width");
    const Address to = d.address(0), barrier = d.address(2);
    const uint32_t* list = d.list(rows);
    Instr& in = d.emit(store_async, Class::copy, {to.row, barrier.row});
    in.list = list;
    in.imm = to.offset;
    in.target = static_cast<uint32_t>(barrier.offset);
    in.a = static_cast<uint8_t>((to.wide ? 1 : 0) | (barrier.wide ? 2 : 0));
    in.b = static_cast<uint8_t>(rows.size());
    in.c = static_cast<uint8_t>(bytes_of(t));
}

void decode_reduce_async(Decode& d) {
    take_async_qualifiers(d);
    const int op = d.take_one({"add", "min", "max", "inc", "dec", "and", "or", "xor"}, -1);
    const Type t = d.take_type();
    const Reduction reduce = op < 0 ? nullptr : find_reduction(static_cast<uint8_t>(op), t);
    if (!reduce || bytes_of(t) < 4) d.unknown("operation on this type");
    const Address to = d.address(0), barrier = d.address(2);
    const uint32_t value = d.src(1, t);
    Instr& in = d.emit(reduce_async, Class::copy, {to.row, barrier.row, value});
    in.list = reinterpret_cast<const uint32_t*>(reduce);
    in.imm = to.offset;
    in.target = static_cast<uint32_t>(barrier.offset);
    in.a = static_cast<uint8_t>((to.wide ? 1 : 0) | (barrier.wide ? 2 : 0));
    in.c = static_cast<uint8_t>(bytes_of(t));
    in.d = static_cast<uint8_t>(op);
}

const Isa& isa_cluster() {
    static const Isa isa = {{"mapa", decode_mapa},
                            {"getctarank", decode_getctarank},
                            {"setmaxnreg", decode_setmaxnreg}};
    return isa;
}

}  // namespace emu
