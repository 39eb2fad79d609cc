// mbarrier objects and instructions. An object is kept beside the memory it takes, which ordinary
// instructions may not touch as long as it is valid.

#include <algorithm>

#include "access.h"
#include "decode.h"
#include "lanes.h"

namespace emu {

namespace {
constexpr uint32_t kMaxCount = (1u << 20) - 1;  // of arrivals, and of bytes
}

std::string Mbarrier::describe(uint32_t address) const {
    return "the mbarrier at shared address " + hex(address) + ", phase " + std::to_string(phase) +
           " (parity " + std::to_string(phase & 1) + "), which needs " + std::to_string(pending) +
           " of " + std::to_string(expected) + " arrivals and " + std::to_string(tx) +
           " bytes to end";
}

Mbarrier& Cta::mbarrier(const Warp& w, uint32_t address, int lane) {
    if (address % 8)
        fault("misaligned access", "mbarrier address " + hex(address) + " is not a multiple of 8",
              lane);
    const auto found = mbarriers.find(address);
    if (found == mbarriers.end())
        fault("mbarrier misuse", "no mbarrier was initialised at shared address " + hex(address),
              lane);
    Mbarrier& b = found->second;
    const uint32_t* seen = cluster->clocks.seen(w.agent);
    const bool own = b.init_warp == w.agent && (b.init_lane == lane || lane < 0);
    if (!own && b.init_time >= seen[b.init_warp] &&
        b.published > seen[cluster->clocks.cluster_barrier()] && launch->config.shared.check_races)
        fault("shared-memory race",
              "the mbarrier at shared address " + hex(address) +
                  " is used with nothing that orders this after its initialisation by warp " +
                  std::to_string(b.init_warp % static_cast<int>(warps.size())) + " lane " +
                  std::to_string(b.init_lane) + " of CTA rank " + std::to_string(rank),
              lane);
    return b;
}

// Those that this thread has initialised are so for the cluster from its next barrier on, even if
// the arrival there is relaxed.
void Cta::fence_mbarrier_init(const Warp& w, Mask lanes) {
    for (auto& [address, b] : mbarriers)
        b.fenced |= b.init_warp == w.agent && (lanes >> b.init_lane & 1);
}

void Mbarrier::arrive(uint32_t count, int32_t bytes, uint32_t address, int lane) {
    if (count > pending)
        fault("mbarrier misuse",
              std::to_string(count) + " arrival(s) at " + describe(address) + ": too many", lane);
    pending -= count;
    tx += bytes;
    if (tx > static_cast<int32_t>(kMaxCount) || tx < -static_cast<int32_t>(kMaxCount))
        fault("mbarrier misuse", "the byte count overflows: " + describe(address), lane);
    if (pending == 0 && tx < 0)
        fault("mbarrier misuse", "more bytes arrived than were expected: " + describe(address),
              lane);
}

void Cta::mbarrier_check(uint32_t address) {
    Mbarrier& b = mbarriers.at(address);
    ++cluster->progress;
    if (b.pending || b.tx) return;
    ++b.phase;
    b.pending = b.expected;
    b.completed = b.clock;
    b.remote_completed = b.remote;
    b.unseen_copies = std::exchange(b.copies, false);
    cluster->wake(Wait::mbarrier, this, address);
}

void Cta::mbarrier_complete(uint32_t address, int engine, uint32_t bytes) {
    const auto found = mbarriers.find(address);
    if (found == mbarriers.end())
        fault("mbarrier misuse", "a copy completes on shared address " + hex(address) +
                                     ", which is no mbarrier any more");
    Mbarrier& b = found->second;
    cluster->clocks.engine_arrive(engine, b.clock);
    b.copies = true;
    b.arrive(0, -static_cast<int32_t>(bytes), address, -1);
    mbarrier_check(address);
}

namespace {

enum Kind : uint8_t { kInit, kInval, kArrive, kExpectTx, kCompleteTx, kPendingCount, kAsyncArrive };
enum Flags : uint8_t {
    kRelaxed = 1,
    kNoComplete = 2,
    kDrop = 4,
    kTakesTx = 8,
    kNoInc = 16,
    kClusterScope = 32
};

// Calls f(cta, address, lane) for the lanes in turn.
template <class F>
void for_each_barrier(Warp& w, const Instr& in, Mask m, F f) {
    LaneAddresses all = lane_addresses(w, in.op[0], in.c & kWideAddress, in.imm, m);
    remove_shared_window(all, in.c);
    const auto each = [&](Cta& cta, const LaneAddresses& a) {
        for_each_lane(a.mask, [&](int l) {
            if (a.at[l] + 8 > cta.shared.size())
                fault("out of bounds",
                      "mbarrier at shared address " + hex(a.at[l]) + "; the CTA has " +
                          std::to_string(cta.shared.size()),
                      l);
            f(cta, static_cast<uint32_t>(a.at[l]), l);
        });
    };
    by_cta(w, Space::shared, all, in.c & kAnyCta, each, !(in.a & kRelaxed));
}

void init(Warp& w, const Instr& in, Mask m) {
    for_each_barrier(w, in, m, [&](Cta& cta, uint32_t address, int l) {
        const uint32_t count = w.row<uint32_t>(in.op[2])[l];
        if (address % 8)
            fault("misaligned access",
                  "mbarrier address " + hex(address) + " is not a multiple of 8", l);
        if (count < 1 || count > kMaxCount)
            fault("mbarrier misuse", "initialised for " + std::to_string(count) + " arrivals", l);
        cta.shared.make_barrier(w.agent, l, address);
        Mbarrier b;
        b.expected = b.pending = count;
        b.engine = w.cta->cluster->clocks.engine(static_cast<int>(cta.rank), cta.mbarriers_made++);
        b.init_warp = w.agent, b.init_lane = l;
        b.init_time = w.cta->cluster->clocks.time();
        cta.mbarriers[address] = std::move(b);
    });
}

void inval(Warp& w, const Instr& in, Mask m) {
    for_each_barrier(w, in, m, [&](Cta& cta, uint32_t address, int l) {
        cta.mbarrier(w, address, l);
        cta.shared.end_barrier(w.agent, l, address);
        cta.mbarriers.erase(address);
    });
}

// What an arrival publishes: to another CTA only with .cluster scope that there is something to
// read, else that accesses are over.
void publish(Warp& w, const Instr& in, Cta& cta, Mbarrier& b) {
    Clocks& clocks = w.cta->cluster->clocks;
    const bool remote = &cta != w.cta, wide = in.a & kClusterScope;
    if (in.a & kRelaxed)
        clocks.pass_on(remote && wide ? b.remote : b.clock, w.released,
                       !remote || (wide && w.released_to_cluster));
    else
        clocks.arrive(w.agent, remote && wide ? b.remote : b.clock, !remote || wide);
}

// op: address, state (or none), count or bytes
void arrive(Warp& w, const Instr& in, Mask m) {
    Mbarrier* published = nullptr;
    for_each_barrier(w, in, m, [&](Cta& cta, uint32_t address, int l) {
        Mbarrier& b = cta.mbarrier(w, address, l);
        if (&b != published) publish(w, in, cta, b);
        published = &b;
        const uint64_t state = uint64_t{b.phase} << 32 | b.pending;
        const uint32_t value = in.op[2] == kNone ? 1 : w.row<uint32_t>(in.op[2])[l];
        const uint32_t count = in.a & kTakesTx ? 1 : value;
        const int32_t bytes = in.a & kTakesTx ? static_cast<int32_t>(value) : 0;
        if (count < 1 || count > kMaxCount)
            fault("mbarrier misuse", std::to_string(count) + " arrivals at once", l);
        if (in.a & kDrop) b.expected -= std::min(count, b.expected);
        b.arrive(count, bytes, address, l);
        if ((in.a & kNoComplete) && b.pending == 0 && b.tx == 0)
            fault("mbarrier misuse", "arrive.noComplete ends the phase of " + b.describe(address),
                  l);
        cta.mbarrier_check(address);
        if (in.op[1] != kNone) w.row<uint64_t>(in.op[1])[l] = state;
    });
}

// in.b: kExpectTx or kCompleteTx
void count_bytes(Warp& w, const Instr& in, Mask m) {
    for_each_barrier(w, in, m, [&](Cta& cta, uint32_t address, int l) {
        const auto bytes = static_cast<int32_t>(w.row<uint32_t>(in.op[2])[l]);
        cta.mbarrier(w, address, l).arrive(0, in.b == kExpectTx ? bytes : -bytes, address, l);
        cta.mbarrier_check(address);
    });
}

// op: address, predicate, state or parity; in.b: .parity; in.d: try_wait. Both sleep while nothing
// changes: try_wait before it answers, test_wait after it said no.
void wait(Warp& w, const Instr& in, Mask m) {
    Mask done = 0;
    uint32_t at = kNone;
    bool same = true;
    for_each_barrier(w, in, m, [&](Cta& cta, uint32_t address, int l) {
        Mbarrier& b = cta.mbarrier(w, address, l);
        bool over;
        if (in.b) {
            const uint32_t parity = w.row<uint32_t>(in.op[2])[l];
            // The ISA has 0 and 1; Triton's warp specialisation also writes 1 as -1.
            if (parity > 1 && parity != ~0u)
                fault("mbarrier misuse", "parity " + std::to_string(parity) + " (0, 1)", l);
            over = (b.phase & 1) != (parity & 1);
        } else {
            const auto phase = static_cast<uint32_t>(w.row<uint64_t>(in.op[2])[l] >> 32);
            if (phase != b.phase && phase + 1 != b.phase)
                fault("mbarrier misuse",
                      "the state is of phase " + std::to_string(phase) + "; this is " +
                          b.describe(address),
                      l);
            over = b.phase != phase;
        }
        if (!over) {
            same &= at == kNone || at == address;
            at = address;
            return;
        }
        done |= 1u << l;
        Clocks& clocks = w.cta->cluster->clocks;
        const bool wide = in.a & kClusterScope;
        if (in.a & kRelaxed) {
            clocks.pass_on(w.to_acquire, b.completed);
            clocks.pass_on(w.to_acquire, b.remote_completed, wide);
        } else {
            clocks.join(w.agent, b.completed);
            clocks.join(w.agent, b.remote_completed, wide);
        }
        b.unseen_copies = false;
    });
    Group& group = w.groups[w.current];
    const bool timed_out = std::exchange(group.timed_out, false);
    const uint32_t id = same ? at : kNone;
    if (done != m && in.d && !timed_out) return w.block(Wait::mbarrier, id, true);
    Mask& p = w.predicate(in.op[1]);
    p = (p & ~m) | done;
    if (done != m && !in.d && m == w.active) w.block(Wait::mbarrier, id, false);
}

void pending_count(Warp& w, const Instr& in, Mask m) {
    const auto* state = w.row<uint64_t>(in.op[1]);
    uint32_t out[kLanes];
    for (int l = 0; l < kLanes; ++l) out[l] = static_cast<uint32_t>(state[l]);
    store_row(w.row<uint32_t>(in.op[0]), out, m);
}

// cp.async.mbarrier.arrive: an arrival once the thread's copies so far are there.
void async_arrive(Warp& w, const Instr& in, Mask m) {
    for_each_barrier(w, in, m, [&](Cta& cta, uint32_t address, int l) {
        Mbarrier& b = cta.mbarrier(w, address, l);
        if (!(in.a & kNoInc)) {
            ++b.pending;
            if (b.pending > kMaxCount)
                fault("mbarrier misuse", "too many arrivals: " + b.describe(address), l);
        }
        const auto copies = static_cast<uint32_t>(w.issued_copies[static_cast<size_t>(l)]);
        w.cta->cluster->defer(w, w.cta, [&w, &cta, address, l, copies] {
            w.land_copies(l, copies);
            const auto found = cta.mbarriers.find(address);
            if (found == cta.mbarriers.end())
                fault("mbarrier misuse",
                      "cp.async completes on shared address " + hex(address) +
                          ", which is no mbarrier any more",
                      l);
            Mbarrier& barrier = found->second;
            cta.cluster->clocks.warp_arrive(w.agent, barrier.clock);
            barrier.copies = true;
            barrier.arrive(1, 0, address, l);
            cta.mbarrier_check(address);
        });
    });
}

}  // namespace

AddressForm take_shared_form(Decode& d, const Address& a) {
    AddressForm form{static_cast<uint8_t>(a.wide ? kWideAddress : 0)};
    if (d.take("shared::cluster"))
        form.bits |= kAnyCta;
    else if (!d.take("shared") && !d.take("shared::cta"))
        form.bits |= kAnyCta | (a.space == Space::shared ? 0 : kGeneric);
    return form;
}

void remove_shared_window(LaneAddresses& a, uint8_t form) {
    if (!(form & kGeneric)) return;
    for (int l = 0; l < kLanes; ++l) {
        if (window_of(a.at[l]) != kSharedWindow)
            fault("out of bounds", "generic address " + hex(a.at[l]) + " is not of shared memory",
                  a.mask >> l & 1 ? l : a.first());
        a.at[l] -= kSharedWindow;
    }
}

void decode_cp_async_mbarrier(Decode& d) {
    d.take("mbarrier");
    if (!d.take("arrive")) d.unknown();
    const bool noinc = d.take("noinc");
    const Address a = d.address(0);
    const AddressForm form = take_shared_form(d, a);
    d.take("b64");
    d.note_async();
    Instr& in = d.emit(async_arrive, Class::sync, {a.row});
    in.imm = a.offset;
    in.a = noinc ? kNoInc : 0;
    in.c = form.bits;
}

namespace {

void decode_mbarrier(Decode& d) {
    d.consumes();
    d.note_async();
    if (d.take("pending_count")) {
        d.take("b64");
        const uint32_t state = d.src(1, Type::b64);
        d.emit(pending_count, Class::sync, {d.dst(0, Type::u32), state});
        return;
    }
    const bool waits = d.take("test_wait");
    const bool tries = !waits && d.take("try_wait");
    const bool parity = d.take("parity");
    int kind = -1;
    uint8_t flags = 0;
    if (!waits && !tries) {
        kind = d.take_one({"init", "inval", "arrive", "expect_tx", "complete_tx"}, -1);
        if (kind < 0 && d.take("arrive_drop")) kind = kArrive, flags |= kDrop;
        if (kind < 0) d.unknown();
        if (kind == kArrive && d.take("expect_tx")) flags |= kTakesTx;
        if (kind == kArrive && d.take("noComplete")) flags |= kNoComplete;
    }
    const bool needs_90 = tries || kind == kExpectTx || kind == kCompleteTx || (flags & kTakesTx);
    if (needs_90 && d.device().capability < 90) d.unknown("needs sm_90");
    if (d.take("relaxed")) flags |= kRelaxed;
    d.take_one({"acquire", "release"}, -1);
    if (d.take_one({"cta", "cluster"}, 0) == 1) flags |= kClusterScope;
    d.take("b64");
    const bool has_result = waits || tries || kind == kArrive;
    const Address a = d.address(has_result ? 1 : 0);
    const AddressForm form = take_shared_form(d, a);
    uint32_t value = kNone;
    const size_t at = has_result ? 2 : 1;
    if ((waits || tries) && !parity)
        value = d.src(at, Type::b64);
    else if (d.count() > at && kind != kInval)
        value = d.src(at, Type::u32);
    else if (kind != kInval && kind != kArrive)
        d.unknown("too few operands");
    uint32_t result = kNone;
    if (waits || tries)
        result = d.dst(0, Type::pred);
    else if (has_result && d.operand(0).kind != Operand::Kind::sink)
        result = d.dst(0, Type::b64);
    static constexpr Handler handlers[] = {init, inval, arrive, count_bytes, count_bytes};
    Instr& in = d.emit(waits || tries ? wait : handlers[kind], Class::sync, {a.row, result, value});
    in.imm = a.offset;
    in.a = flags;
    in.b = static_cast<uint8_t>(waits || tries ? parity : kind);
    in.c = form.bits;
    in.d = tries;
}

}  // namespace

const Isa& isa_mbarrier() {
    static const Isa isa = {{"mbarrier", decode_mbarrier}};
    return isa;
}

}  // namespace emu
