// bar / barrier, bar.warp.sync, membar, fence, griddepcontrol.

#include "decode.h"
#include "lanes.h"

namespace emu {
namespace {

enum BarKind : uint8_t { kSync, kArrive, kRedPopc, kRedAnd, kRedOr };

void bar_fetch(Warp& w, const Instr& in, Mask m) {
    // The barrier has completed when this runs: bar.red's result.
    const Barrier& b = w.cta->barriers[w.row<uint32_t>(in.op[1])[std::countr_zero(m)] & 15];
    if (in.b == kRedPopc) {
        uint32_t out[kLanes];
        std::fill(out, out + kLanes, b.result_popc);
        store_row(w.row<uint32_t>(in.op[0]), out, m);
        return;
    }
    const bool value = in.b == kRedAnd ? b.result_all : b.result_any;
    Mask& p = w.predicate(in.op[0]);
    p = value ? p | m : p & ~m;
}

// op: barrier number, thread count (imm != 0 says that there is one), predicate of bar.red.
void bar(Warp& w, const Instr& in, Mask m) {
    const int lane = std::countr_zero(m);
    const uint32_t id = w.row<uint32_t>(in.op[0])[lane];
    const uint32_t threads = in.imm ? w.row<uint32_t>(in.op[1])[lane] : 0;
    if (id >= w.cta->barriers.size())
        fault("barrier misuse", "barrier number " + std::to_string(id) + " (0-15)", lane);
    if (in.imm && threads == 0) fault("barrier misuse", "thread count 0", lane);
    for_each_lane(m, [&](int l) {
        if (w.row<uint32_t>(in.op[0])[l] != id)
            fault("barrier misuse", "lanes name different barriers", l);
    });
    if (in.a) {  // .aligned: the whole warp, together
        if (m != w.active && !w.converged(w.live, "divergent barrier")) return;
        if (m != w.active)
            fault("divergent barrier",
                  "only lanes " + hex(m) + " of the warp execute this aligned barrier");
        if (!w.converged(w.live, "divergent barrier")) return;
    }
    Barrier& b = w.cta->barriers[id];
    if (in.b >= kRedPopc) {
        const Mask p = w.predicate(in.op[2]);
        b.popc += static_cast<uint32_t>(std::popcount(p & m));
        b.all &= (m & ~p) == 0;
        b.any |= (m & p) != 0;
    }
    w.cta->barrier_arrive(w, m, id, threads, in.b != kArrive);
}

// bar.warp.sync; tiles of the warp may come together, each with its own mask.
void warp_barrier(Warp& w, const Instr& in, Mask m) {
    const auto* mask = w.row<uint32_t>(in.op[0]);
    bool complete = true;
    Mask first = 0;
    for_each_lane(m, [&](int l) {
        if (!(mask[l] >> l & 1))
            fault("wrong lane mask", "an executing lane is not in its mask " + hex(mask[l]), l);
        complete &= (mask[l] & w.live & ~m) == 0;
        first |= static_cast<Mask>(mask[l] == mask[std::countr_zero(m)]) << l;
    });
    if (complete) {
        w.cta->cluster->clocks.sync_warp(w.agent);
        return;
    }
    if (first !=
        w.active) {  // the lanes with another mask, or not executing this, go their own way
        Group rest;
        rest.pc = m == w.active ? w.pc - 1 : w.pc;
        if (m != w.active && first != m)
            fault("wrong lane mask", "guarded bar.warp.sync with several masks");
        rest.lanes = w.active & ~first;
        rest.frame = w.frame;
        w.active = first;
        w.groups.push_back(rest);
    }
    w.block(Wait::warp_barrier, mask[std::countr_zero(m)], false);
}

void decode_bar(Decode& d) {
    d.consumes();
    d.crosses_lanes();
    if (d.take("warp")) {
        d.take("sync");
        const uint32_t mask = d.src(0, Type::b32);
        d.emit(warp_barrier, Class::sync, {mask});
        return;
    }
    const bool barrier = d.st.opcode == "barrier";
    if (d.take("cluster")) return decode_cluster_barrier(d);
    d.take("cta");
    const bool aligned = d.take("aligned") || !barrier;
    int kind = d.take_one({"sync", "arrive", "red"}, 0);
    size_t at = 0;
    uint32_t result = kNone, predicate = kNone;
    if (kind == 2) {
        kind += d.take_one({"popc", "and", "or"}, 0);
        const Type type = d.take_type();
        result = d.dst(at++, type);
    }
    const uint32_t id = d.src(at++, Type::u32);
    const bool has_count = d.count() - at == (kind >= kRedPopc ? 2u : 1u);
    const uint32_t threads = has_count ? d.src(at++, Type::u32) : id;
    if (kind >= kRedPopc) predicate = d.src(at++, Type::pred);
    Instr& in = d.emit(bar, Class::sync, {id, threads, predicate});
    in.imm = has_count;
    in.a = aligned;
    in.b = static_cast<uint8_t>(kind);
    if (kind < kRedPopc) return;
    Instr& fetch = d.emit_internal(bar_fetch, {result, id});
    fetch.b = static_cast<uint8_t>(kind);
}

// A cluster runs on one host thread in program order: most fences have nothing to do but be there.
void nothing(Warp&, const Instr&, Mask) { std::atomic_thread_fence(std::memory_order_seq_cst); }

enum Order : uint8_t { kAcquires = 1, kReleases = 2 };

// For relaxed waits before it and relaxed arrivals after it. in.a: Order; in.b: beyond the CTA
void fence(Warp& w, const Instr& in, Mask m) {
    nothing(w, in, m);
    Clocks& clocks = w.cta->cluster->clocks;
    if (!clocks.async()) return;
    if (in.a & kAcquires) {
        clocks.join(w.agent, w.to_acquire);
        w.to_acquire.clear();
    }
    if (in.a & kReleases) {
        w.released.clear();
        clocks.arrive(w.agent, w.released);
        w.released_to_cluster = in.b;
    }
}

void fence_mbarrier_init(Warp& w, const Instr&, Mask m) { w.cta->fence_mbarrier_init(w, m); }

// fence.proxy.async: what this warp knows to have been written is there for TMA and wgmma, too.
void fence_async(Warp& w, const Instr&, Mask) { w.cta->cluster->clocks.fence_proxy(w.agent); }

void wait_for_earlier_kernels(Warp& w, const Instr&, Mask m) { w.early &= ~m; }

void decode_fence(Decode& d) {
    d.consumes();
    const bool proxy = d.take("proxy");
    if (proxy && d.device().capability < 90) d.unknown("needs sm_90");
    const bool async = proxy && d.take("async");
    if (proxy && !async && !d.take("alias") && !d.take_prefix("tensormap") &&
        !d.take_prefix("async::generic"))
        d.unknown("proxy");
    const bool init = d.take("mbarrier_init");
    const int order = d.take_one({"sc", "acq_rel", "acquire", "release"}, 0);
    d.take_prefix("sync_restrict");
    const bool global = async && d.take("global");
    d.take_one({"shared::cta", "shared::cluster"}, -1);
    const int scope = d.take_one({"cta", "cluster", "gpu", "sys", "gl"}, 0);
    Instr& in = d.emit(init              ? fence_mbarrier_init
                       : async && global ? nothing
                       : async           ? fence_async
                       : proxy           ? nothing
                                         : fence,
                       Class::sync);
    in.a = order == 2 ? kAcquires : order == 3 ? kReleases : kAcquires | kReleases;
    in.b = scope != 0;
}

}  // namespace

const Isa& isa_sync() {
    static const Isa isa = {
        {"bar", decode_bar},
        {"barrier", decode_bar},
        {"membar", decode_fence},
        {"fence", decode_fence},
        // Programmatic dependent launch: kernels of a stream run one after the other here, but
        // global memory may not be touched before the wait.
        {"griddepcontrol",
         [](Decode& d) {
             const bool waits = d.take_one({"wait", "launch_dependents"}, 0) == 0;
             d.emit(waits ? wait_for_earlier_kernels : nothing, Class::sync);
         }},
    };
    return isa;
}

}  // namespace emu
