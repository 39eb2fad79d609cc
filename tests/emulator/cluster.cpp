// Running the CTAs of a cluster: turns of their warps, work of the asynchronous proxy, deadlocks.

#include <algorithm>

#include "machine.h"

namespace emu {

void Cluster::start(Launch& l, uint64_t linear, Counters& counters, InstrCount* counts) {
    launch = &l;
    const LaunchConfig& c = l.config;
    const Dim3 size = c.cluster;
    const uint64_t across = c.grid.x / size.x, down = c.grid.y / size.y;
    const Dim3 first{static_cast<uint32_t>(linear % across) * size.x,
                     static_cast<uint32_t>(linear / across % down) * size.y,
                     static_cast<uint32_t>(linear / (across * down)) * size.z};
    rng.seed(static_cast<uint32_t>((c.seed + 1) * 2654435761u ^ (linear * 40503u + 17)));
    instructions = round = progress = seen_progress_ = 0;
    idle_rounds_ = 0;
    under_way.clear();
    clock.clear();
    completed.clear();
    const auto count = static_cast<uint32_t>(size.count());
    const auto warps = static_cast<int>((c.block.count() + kLanes - 1) / kLanes);
    for (const auto& cta : ctas) cta->end();  // in the time of those that ran here before
    clocks.reset(static_cast<int>(count), warps, l.program->async);
    while (ctas.size() < count) ctas.push_back(std::make_unique<Cta>());
    for (uint32_t rank = 0; rank < count; ++rank) {
        const Dim3 id{first.x + rank % size.x, first.y + rank / size.x % size.y,
                      first.z + rank / (size.x * size.y)};
        ctas[rank]->start(l, *this, rank, id, counters, counts);
    }
}

bool Cluster::finished() const {
    return std::all_of(ctas.begin(), ctas.end(), [](const auto& c) { return c->finished(); });
}

bool Cluster::run(uint64_t slice) {
    const uint64_t end = instructions + slice;
    std::vector<Warp*> ready;
    while (instructions < end) {
        ++round;
        if (!under_way.empty()) land_due();
        ready.clear();
        for (auto& cta : ctas)
            for (Warp& w : cta->warps)
                if (w.runnable()) ready.push_back(&w);
        if (ready.empty()) {
            if (finished()) return true;
            if (!under_way.empty()) {  // nobody can go on without it: the latest moment
                round = std::min_element(
                            under_way.begin(), under_way.end(),
                            [](const AsyncWork& a, const AsyncWork& b) { return a.due < b.due; })
                            ->due;
                continue;
            }
            if (wake_pollers()) continue;
            stuck("deadlock", "no warp can go on");
        }
        if (instructions > launch->config.max_instructions)
            stuck("hang", "no end after " + std::to_string(instructions) + " warp-instructions");
        std::shuffle(ready.begin(), ready.end(), rng);
        for (Warp* w : ready) {
            // From single steps to long runs.
            const uint32_t longest = 1u << rng() % 8;
            const uint32_t quantum = 1 + static_cast<uint32_t>(rng()) % longest;
            w->run(quantum);
            instructions += quantum - w->budget;
        }
    }
    return finished();
}

// ---- the asynchronous proxy ---------------------------------------------------------------------

void Cluster::defer(const Warp& warp, const Cta* target, std::function<void()> land) {
    // A third waits until all warps do; the others take up to 128 rounds, in any order.
    const uint64_t delay = rng() % 3 == 0 ? uint64_t{1} << 40 : rng() % (uint64_t{1} << rng() % 8);
    under_way.push_back(
        {round + delay + rng() % 4, std::move(land), &warp, &warp.code[warp.pc - 1], target});
}

void Cluster::land_due() {
    for (size_t i = 0; i < under_way.size();) {
        if (under_way[i].due > round) {
            ++i;
            continue;
        }
        const AsyncWork work = std::move(under_way[i]);
        under_way.erase(under_way.begin() + static_cast<long>(i));
        try {
            work.land();
        } catch (const Fault& f) {
            throw work.warp->report(f, *work.instruction);
        }
        ++progress;
    }
}

// ---- waiting ------------------------------------------------------------------------------------

// Groups of a CTA (null: of all) that wait for this; kNone: whatever their id.
void Cluster::wake(Wait wait, const Cta* only, uint32_t id) {
    ++progress;
    for (auto& cta : ctas) {
        if (only && cta.get() != only) continue;
        for (Warp& w : cta->warps)
            for (Group& g : w.groups)
                if (g.wait == wait && (id == kNone || g.wait_id == id || g.wait_id == kNone))
                    g.wait = Wait::none;
    }
}

// A wait for an mbarrier may give up at any time. They all do when nothing else can happen; that
// nothing comes of it, several times in a row, is a deadlock.
bool Cluster::wake_pollers() {
    constexpr int kPatience = 3;
    idle_rounds_ = progress == seen_progress_ ? idle_rounds_ + 1 : 0;
    seen_progress_ = progress;
    if (idle_rounds_ >= kPatience) return false;
    bool any = false;
    for (auto& cta : ctas)
        for (Warp& w : cta->warps)
            for (Group& g : w.groups)
                if (g.wait == Wait::mbarrier) {
                    g.wait = Wait::none;
                    g.timed_out = any = true;
                }
    return any;
}

void Cluster::barrier_arrive(Warp& warp, Mask lanes, bool release) {
    if (warp.cluster_arrived & lanes)
        fault("barrier misuse",
              "a thread arrived twice at the cluster's barrier with no wait in between",
              std::countr_zero(warp.cluster_arrived & lanes));
    warp.cluster_arrived |= lanes;
    warp.cluster_pending |= lanes;
    if (release)
        clocks.arrive(warp.agent, clock);
    else if (warp.released_to_cluster)
        clocks.pass_on(clock, warp.released);
    for (auto& [address, b] : warp.cta->mbarriers)
        if (b.init_warp == warp.agent && b.fenced && b.published == ~0u)
            b.published = clocks.issued(clocks.cluster_barrier()) + 1;
    barrier_check();
}

// barrier.cluster: over when every thread that has not exited has arrived.
void Cluster::barrier_check() {
    Mask late = 0, any = 0;
    for (auto& cta : ctas)
        for (Warp& w : cta->warps) late |= w.live & ~w.cluster_pending, any |= w.cluster_pending;
    if (late || !any) return;
    for (auto& cta : ctas)
        for (Warp& w : cta->warps) w.cluster_pending = 0;
    if (clocks.async())
        clocks.reader_over(clocks.cluster_barrier(),
                           clocks.next_operation(clocks.cluster_barrier()), clock);
    completed = clock;
    wake(Wait::cluster_barrier, nullptr, kNone);
}

// Whoever used the shared memory of a CTA that ends has said so to one of its warps.
void Cta::check_visits() const {
    for (size_t agent = 0; agent < visits.size(); ++agent) {
        const auto knows = [&](const Warp& w) {
            return visits[agent] <= cluster->clocks.over(w.agent)[agent];
        };
        if (!visits[agent] || std::any_of(warps.begin(), warps.end(), knows)) continue;
        const size_t rank = agent / warps.size();
        fault("shared-memory race", "the CTA ends, and nothing says that warp " +
                                        std::to_string(agent % warps.size()) + " of CTA rank " +
                                        std::to_string(rank) + " is done with its shared memory");
    }
}

// Nothing may still be on its way to the shared memory of a CTA that ends, nor out of it.
void Cta::finish() {
    if (launch->config.shared.check_races) check_visits();
    for (const AsyncWork& work : cluster->under_way)
        if (work.target == this)
            fault("asynchronous copy not waited for",
                  "the CTA ends while a copy to its shared memory is under way");
    for (const auto& [address, b] : mbarriers)
        if (b.copies || b.unseen_copies)
            fault("asynchronous copy not waited for",
                  "the CTA ends with a copy that nobody waited for: it completes on " +
                      b.describe(address));
    for (Warp& w : warps) {
        for (BulkStore& store : w.bulk_stores) {
            if (!store.read_over)
                fault("asynchronous copy not waited for",
                      "the CTA ends with a bulk copy out of its shared memory, by warp " +
                          std::to_string(w.index) + ", that was not waited for",
                      store.lane);
            store.land();
        }
        w.bulk_stores.clear();
    }
}

// Nobody will finish: says where every warp stands.
void Cluster::stuck(const char* kind, const std::string& message) const {
    std::string report = std::string(kind) + " in " + launch->program->name + ": " + message;
    for (const auto& cta : ctas) {
        report += "\n  CTA (" + std::to_string(cta->id.x) + ", " + std::to_string(cta->id.y) +
                  ", " + std::to_string(cta->id.z) + ")";
        for (const Warp& w : cta->warps)
            for (const Group& g : w.groups) {
                const bool after = g.wait == Wait::cta_barrier || g.wait == Wait::warp_barrier;
                const Instr& at = w.code[after ? g.pc - 1 : g.pc];
                report += "\n  warp " + std::to_string(w.index) + " lanes " + hex(g.lanes) +
                          " at: " + std::string(launch->program->statements[at.statement].text);
                if (g.wait != Wait::mbarrier) continue;
                const auto barrier = cta->mbarriers.find(g.wait_id);
                if (barrier != cta->mbarriers.end())
                    report += "\n    waits for " + barrier->second.describe(g.wait_id);
            }
    }
    LaunchError error(report);
    error.kind = kind;
    throw error;
}

}  // namespace emu
