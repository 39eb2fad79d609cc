// Scheduling: lanes into groups, barriers of a CTA, clusters over host threads.

#include <algorithm>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#include <utility>

#include "machine.h"

namespace emu {
namespace {

// A group that took this many backward branches while other lanes of its warp could run lets them
// run: it may be spinning on something they must do.
constexpr uint32_t kSpinLimit = 512;

uint32_t lower_limit(const Warp& w) {
    uint32_t limit = ~0u;
    for (size_t i = 0; i < w.groups.size(); ++i) {
        const Group& g = w.groups[i];
        if (i != w.current && g.frame == w.frame && g.pc > w.pc) limit = std::min(limit, g.pc);
    }
    return limit;
}

}  // namespace

// ---- control flow of a program -----------------------------------------------------------------

uint32_t Program::block_of(uint32_t pc) const {
    return static_cast<uint32_t>(std::upper_bound(block_start.begin(), block_start.end(), pc) -
                                 block_start.begin() - 1);
}

bool Program::reaches(uint32_t from_pc, uint32_t to_pc) const {
    const uint32_t target = block_of(to_pc);
    std::set<uint32_t> seen;
    std::vector<uint32_t> stack = successors[block_of(from_pc)];
    while (!stack.empty()) {
        const uint32_t b = stack.back();
        stack.pop_back();
        if (b == target) return true;
        if (seen.insert(b).second)
            stack.insert(stack.end(), successors[b].begin(), successors[b].end());
    }
    return false;
}

// ---- warp -------------------------------------------------------------------------------------

bool Warp::runnable() const {
    return std::any_of(groups.begin(), groups.end(),
                       [](const Group& g) { return g.wait == Wait::none; });
}

// Picks the group to run: the deepest call first, then the lowest pc, so that the others are met
// where paths join.
bool Warp::select() {
    for (size_t i = 0; i < groups.size(); ++i) {
        for (size_t j = i + 1; j < groups.size();) {
            Group &a = groups[i], &b = groups[j];
            const bool can_merge = (a.wait == Wait::none || a.wait == Wait::peers) &&
                                   (b.wait == Wait::none || b.wait == Wait::peers);
            if (!can_merge || a.pc != b.pc || a.frame != b.frame) {
                ++j;
                continue;
            }
            a.lanes |= b.lanes;
            a.wait = Wait::none;
            a.penalty = std::min(a.penalty, b.penalty);
            a.spins = 0;
            groups.erase(groups.begin() + static_cast<long>(j));
        }
    }
    size_t best = groups.size();
    auto key = [&](const Group& g) { return std::tuple(g.penalty, ~frames[g.frame].depth, g.pc); };
    for (size_t i = 0; i < groups.size(); ++i)
        if (groups[i].wait == Wait::none &&
            (best == groups.size() || key(groups[i]) < key(groups[best])))
            best = i;
    if (best == groups.size()) return false;
    current = best;
    pc = groups[best].pc;
    active = groups[best].lanes;
    frame = groups[best].frame;
    limit = groups.size() > 1 ? lower_limit(*this) : ~0u;
    return true;
}

void Warp::run(uint32_t max_instructions) {
    budget = max_instructions;
    const Instr* in = nullptr;
    try {
        while (budget > 0 && !groups.empty()) {
            if (!select()) return;
            while (budget > 0) {
                in = &code[pc];
                Mask m = active;
                if (in->guard != kNone) {
                    const Mask p = predicate(in->guard);
                    m &= in->guard_negated ? ~p : p;
                }
                InstrCount& count = counts[pc];
                ++count.issued;
                count.lanes += static_cast<uint64_t>(std::popcount(m));
                count.between_mmas += wgmma.is_between;
                --budget;
                ++pc;
                if (in->taint) [[unlikely]]
                    propagate(*in, m);
                if (m) in->fn(*this, *in, m);
                if (pc >= limit) break;
            }
            if (active) {
                Group& g = groups[current];
                g.pc = pc;
                g.lanes = active;
                g.frame = frame;
            } else {
                groups.erase(groups.begin() + static_cast<long>(current));
            }
        }
    } catch (const Fault& f) {
        throw report(f, *in);
    }
}

LaunchError Warp::report(const Fault& f, const Instr& in) const {
    const Program& p = *launch->program;
    const StatementText& s = p.statements[in.statement];
    std::string where;
    if (s.file > 0) {
        auto file = p.module->files.find(s.file);
        where = " (" +
                (file == p.module->files.end() ? "file " + std::to_string(s.file) : file->second) +
                ":" + std::to_string(s.file_line) + ")";
    }
    const Dim3 id = cta->id;
    LaunchError error(
        f.kind + " in " + p.name + ": " + f.message + "\n  instruction: " + std::string(s.text) +
        "  [PTX line " + std::to_string(s.line) + "]" + where + "\n  CTA (" + std::to_string(id.x) +
        ", " + std::to_string(id.y) + ", " + std::to_string(id.z) + "), warp " +
        std::to_string(index) + (f.lane >= 0 ? ", lane " + std::to_string(f.lane) : "") +
        ", active lanes " + hex(active));
    error.kind = f.kind;
    return error;
}

void Warp::diverge(Mask lanes, uint32_t target) {
    const bool backward = target < pc;
    if (lanes == active) {
        pc = target;
    } else {
        active &= ~lanes;
        Group other;
        other.pc = target;
        other.lanes = lanes;
        other.frame = frame;
        groups.push_back(other);
        limit = 0;
    }
    if (groups.size() == 1) return;
    limit = 0;
    if (backward && ++groups[current].spins > kSpinLimit) {
        groups[current].spins = 0;
        ++groups[current].penalty;
    }
}

void Warp::exit_lanes(Mask lanes) {
    active &= ~lanes;
    live &= ~lanes;
    if (!active) limit = 0;
    release_warp_barrier();
    for (uint32_t id = 0; id < cta->barriers.size(); ++id)
        if (cta->barriers[id].active) cta->barrier_check(id);
    cta->cluster->barrier_check();
    const auto alive = [](const Warp& w) { return w.live != 0; };
    if (!live && std::none_of(cta->warps.begin(), cta->warps.end(), alive)) cta->finish();
}

void Warp::block(Wait wait, uint32_t id, bool repeat_instruction) {
    Group& g = groups[current];
    g.wait = wait;
    g.wait_id = id;
    if (repeat_instruction) --pc;
    g.pc = pc;
    limit = 0;
    if (wait == Wait::warp_barrier) {
        g.lanes = active;
        release_warp_barrier();
    }
}

void Warp::release_warp_barrier() {
    for (Group& g : groups) {
        if (g.wait != Wait::warp_barrier) continue;
        Mask here = 0;
        for (const Group& h : groups)
            if (h.wait == Wait::warp_barrier && h.wait_id == g.wait_id) here |= h.lanes;
        if ((g.wait_id & live & ~here) != 0) continue;
        const uint32_t mask = g.wait_id;
        for (Group& h : groups)
            if (h.wait == Wait::warp_barrier && h.wait_id == mask) h.wait = Wait::none;
        cta->cluster->clocks.sync_warp(agent);
    }
}

bool Warp::converged(Mask wanted, const char* what) {
    wanted &= live;
    if ((wanted & ~active) == 0) return true;
    const uint32_t here = pc - 1;
    bool behind = false;
    for (size_t i = 0; i < groups.size(); ++i) {
        const Group& g = groups[i];
        if (i == current || !(g.lanes & wanted)) continue;
        const bool may_come = g.frame != frame || g.pc <= here;
        if (may_come) {
            behind = true;
            continue;
        }
        // A group further on went round this instruction. That is fine only if it is leaving the
        // kernel.
        const StatementText& there = launch->program->statements[code[g.pc].statement];
        const bool leaving = !launch->program->reaches(here, g.pc) || there.opcode == "ret" ||
                             there.opcode == "exit";
        if (leaving) continue;
        fault(what, "lanes " + hex(g.lanes & wanted) +
                        " must take part but went past this instruction (they are at: " +
                        std::string(there.text) + ")");
    }
    if (behind) {
        block(Wait::peers, 0, true);
        return false;
    }
    return true;
}

// Follows values that may be undefined through registers; using one for an address, a stored value,
// a branch or a guard is an error. Called before the instruction runs.
void Warp::propagate(const Instr& in, Mask m) {
    const Taint& t = *in.taint;
    if (t.hazard) check_hazard(*t.hazard);
    Mask good = kAllLanes;
    for (uint32_t row : t.sources) {
        // A guard decides for all active lanes; other sources matter in the lanes that execute.
        const Mask needed = row == in.guard ? active : t.consumes ? m : 0;
        const Mask bad = needed & ~defined[row];
        if (bad) {
            fault("uninitialised register",
                  launch->program->row_names.at(row) + " was never written", std::countr_zero(bad));
        }
        good &= defined[row];
    }
    if (t.crosses_lanes && (good & m) != m) good = 0;
    for (uint32_t row : t.results) defined[row] = (defined[row] & ~m) | (good & m);
}

uint8_t* Warp::local_lane(int lane) {
    const size_t bytes = launch->program->local_bytes;
    if (local.empty()) local.resize(bytes * kLanes);
    return local.data() + bytes * static_cast<size_t>(lane);
}

// ---- CTA --------------------------------------------------------------------------------------

namespace {

void fill_specials(Warp& w, const Launch& launch, const Cta& cta) {
    const LaunchConfig& c = launch.config;
    const Program& p = *launch.program;
    const uint32_t warps = static_cast<uint32_t>((c.block.count() + kLanes - 1) / kLanes);
    const Dim3 cluster_id{cta.id.x / c.cluster.x, cta.id.y / c.cluster.y, cta.id.z / c.cluster.z};
    const Dim3 rank{cta.id.x % c.cluster.x, cta.id.y % c.cluster.y, cta.id.z % c.cluster.z};
    for (auto [id, row] : p.specials) {
        uint32_t* out = w.row<uint32_t>(row);
        auto* wide = w.row<uint64_t>(row);
        for (uint32_t l = 0; l < kLanes; ++l) {
            const uint32_t thread = static_cast<uint32_t>(w.index) * kLanes + l;
            switch (id) {
                case Special::tid_x:
                    out[l] = thread % c.block.x;
                    break;
                case Special::tid_y:
                    out[l] = thread / c.block.x % c.block.y;
                    break;
                case Special::tid_z:
                    out[l] = thread / (c.block.x * c.block.y);
                    break;
                case Special::ntid_x:
                    out[l] = c.block.x;
                    break;
                case Special::ntid_y:
                    out[l] = c.block.y;
                    break;
                case Special::ntid_z:
                    out[l] = c.block.z;
                    break;
                case Special::ctaid_x:
                    out[l] = cta.id.x;
                    break;
                case Special::ctaid_y:
                    out[l] = cta.id.y;
                    break;
                case Special::ctaid_z:
                    out[l] = cta.id.z;
                    break;
                case Special::nctaid_x:
                    out[l] = c.grid.x;
                    break;
                case Special::nctaid_y:
                    out[l] = c.grid.y;
                    break;
                case Special::nctaid_z:
                    out[l] = c.grid.z;
                    break;
                case Special::laneid:
                    out[l] = l;
                    break;
                case Special::warpid:
                    out[l] = static_cast<uint32_t>(w.index);
                    break;
                case Special::nwarpid:
                    out[l] = warps;
                    break;
                case Special::smid:
                    out[l] = static_cast<uint32_t>(cta.linear % launch.device->sms);
                    break;
                case Special::nsmid:
                    out[l] = static_cast<uint32_t>(launch.device->sms);
                    break;
                case Special::gridid:
                    out[l] = 1;
                    break;
                case Special::lanemask_eq:
                    out[l] = 1u << l;
                    break;
                case Special::lanemask_lt:
                    out[l] = (1u << l) - 1;
                    break;
                case Special::lanemask_le:
                    out[l] = ((1u << l) - 1) | 1u << l;
                    break;
                case Special::lanemask_ge:
                    out[l] = ~((1u << l) - 1);
                    break;
                case Special::lanemask_gt:
                    out[l] = ~(((1u << l) - 1) | 1u << l);
                    break;
                case Special::dynamic_smem_size:
                    out[l] = c.dynamic_smem;
                    break;
                case Special::total_smem_size:
                case Special::aggr_smem_size:
                    out[l] = cta.shared.size();
                    break;
                case Special::reserved_smem:
                    out[l] = 0;
                    break;
                case Special::clusterid_x:
                    out[l] = cluster_id.x;
                    break;
                case Special::clusterid_y:
                    out[l] = cluster_id.y;
                    break;
                case Special::clusterid_z:
                    out[l] = cluster_id.z;
                    break;
                case Special::nclusterid_x:
                    out[l] = c.grid.x / c.cluster.x;
                    break;
                case Special::nclusterid_y:
                    out[l] = c.grid.y / c.cluster.y;
                    break;
                case Special::nclusterid_z:
                    out[l] = c.grid.z / c.cluster.z;
                    break;
                case Special::cluster_ctaid_x:
                    out[l] = rank.x;
                    break;
                case Special::cluster_ctaid_y:
                    out[l] = rank.y;
                    break;
                case Special::cluster_ctaid_z:
                    out[l] = rank.z;
                    break;
                case Special::cluster_nctaid_x:
                    out[l] = c.cluster.x;
                    break;
                case Special::cluster_nctaid_y:
                    out[l] = c.cluster.y;
                    break;
                case Special::cluster_nctaid_z:
                    out[l] = c.cluster.z;
                    break;
                case Special::cluster_ctarank:
                    out[l] = rank.x + c.cluster.x * (rank.y + c.cluster.y * rank.z);
                    break;
                case Special::cluster_nctarank:
                    out[l] = static_cast<uint32_t>(c.cluster.count());
                    break;
                case Special::is_explicit_cluster:
                    out[l] = c.cluster.count() > 1;
                    break;
                case Special::warp_size:
                    out[l] = kLanes;
                    break;
                case Special::shared_base:
                    out[l] = cta.rank << kRankShift;
                    break;
                case Special::param_base:
                    wide[l] = reinterpret_cast<uint64_t>(launch.params.data());
                    break;
                case Special::shared_base_wide:
                    wide[l] = uint64_t{cta.rank} << kRankShift;
                    break;
            }
        }
    }
}

}  // namespace

void Cta::end() {
    for (const Warp& w : warps)
        for (const AsyncCopy& copy : w.copies)
            shared.land(w.agent, copy.lane, copy.destination, copy.bytes);
    for (const auto& [address, barrier] : mbarriers) shared.end_barrier(0, 0, address);
    mbarriers.clear();
}

void Cta::start(Launch& l, Cluster& c, uint32_t cta_rank, Dim3 cta_id, Counters& counters,
                InstrCount* counts) {
    launch = &l;
    cluster = &c;
    rank = cta_rank;
    id = cta_id;
    const LaunchConfig& config = l.config;
    linear = id.x + config.grid.x * (id.y + static_cast<uint64_t>(config.grid.y) * id.z);
    const Program& p = *l.program;
    const auto threads = static_cast<uint32_t>(config.block.count());
    const auto num_warps = (threads + kLanes - 1) / kLanes;
    mbarriers_made = 0;
    visits.assign(config.cluster.count() * num_warps, 0);
    shared.reset(std::max(p.static_smem, p.dynamic_smem_at + config.dynamic_smem), p.granule_shift,
                 c.clocks, static_cast<int>(rank), config.shared);
    for (Barrier& b : barriers) b = Barrier{};
    warps.resize(num_warps);
    for (uint32_t i = 0; i < num_warps; ++i) {
        Warp& w = warps[i];
        w.cta = this;
        w.launch = &l;
        w.counters = &counters;
        w.counts = counts;
        w.code = p.code.data();
        w.index = static_cast<int>(i);
        w.agent = static_cast<int>(rank * num_warps + i);
        w.storage.resize(p.register_words + 16);
        const auto base = reinterpret_cast<uintptr_t>(w.storage.data());
        w.regs = reinterpret_cast<uint32_t*>((base + 63) & ~uintptr_t{63});
        std::memcpy(w.regs + p.constants_at, p.constants.data(), p.constants.size() * 4);
        if (p.tracks_undefined) w.defined.assign(p.register_words, 0);
        fill_specials(w, l, *this);
        const uint32_t here = std::min<uint32_t>(kLanes, threads - i * kLanes);
        w.live = here == kLanes ? kAllLanes : (1u << here) - 1;
        w.early = config.is_dependent ? w.live : 0;
        w.frames.assign(1, Frame{});
        w.groups.assign(1, Group{});
        w.groups[0].lanes = w.live;
        w.current = 0;
        w.copies.clear();
        w.issued_copies.fill(0);
        w.committed.fill(0);
        w.bulk_stores.clear();
        w.bulk_committed.fill(0);
        w.released.clear(), w.to_acquire.clear();
        w.cluster_arrived = w.cluster_pending = 0;
        w.max_registers = 0;
        w.wgmma = {};
        if (!p.wgmma_names.empty()) {
            const size_t rows = p.register_words / kLanes + 1;
            for (auto* of : {&w.wgmma.writes, &w.wgmma.reads, &w.wgmma.touched})
                of->assign(rows, 0);
        }
        if (p.async)
            w.wgmma.base = c.clocks.issued(c.clocks.first_reader(static_cast<int>(rank)) +
                                           static_cast<int>(num_warps + i / 4));
        w.local.clear();
    }
}

bool Cta::finished() const {
    return std::all_of(warps.begin(), warps.end(), [](const Warp& w) { return w.done(); });
}

void Cta::barrier_arrive(Warp& warp, Mask lanes, uint32_t barrier_id, uint32_t threads, bool wait) {
    Barrier& b = barriers[barrier_id];
    if (threads % kLanes != 0)
        fault("barrier misuse",
              "thread count " + std::to_string(threads) + " is not a multiple of 32");
    if (!b.active) {
        b.active = true;
        b.expected = threads;
        b.lanes.assign(warps.size(), 0);
        b.clock.clear();
    } else if (b.expected != threads) {
        fault("barrier misuse", "barrier " + std::to_string(barrier_id) +
                                    " is in use with thread count " + std::to_string(b.expected) +
                                    ", this asks for " + std::to_string(threads));
    }
    if (b.lanes[static_cast<size_t>(warp.index)] & lanes)
        fault("barrier misuse", "a thread arrived twice at barrier " + std::to_string(barrier_id));
    b.lanes[static_cast<size_t>(warp.index)] |= lanes;
    cluster->clocks.arrive(warp.agent, b.clock);
    if (wait) warp.block(Wait::cta_barrier, barrier_id, false);
    barrier_check(barrier_id);
}

void Cta::barrier_check(uint32_t barrier_id) {
    Barrier& b = barriers[barrier_id];
    uint32_t arrived = 0, all = 0;
    for (size_t i = 0; i < warps.size(); ++i) {
        const Mask here = b.lanes[i];
        if (here && (warps[i].live & ~here) == 0) arrived += kLanes;
        if (warps[i].live || here) all += kLanes;
    }
    if (arrived < (b.expected ? b.expected : all)) return;
    for (Warp& w : warps)
        for (Group& g : w.groups) {
            if (g.wait != Wait::cta_barrier || g.wait_id != barrier_id) continue;
            g.wait = Wait::none;
            cluster->clocks.join(w.agent, b.clock);
        }
    b.active = false;
    ++cluster->progress;
    b.result_popc = std::exchange(b.popc, 0);
    b.result_all = std::exchange(b.all, true);
    b.result_any = std::exchange(b.any, false);
}

// ---- grid -------------------------------------------------------------------------------------

Counters execute(Launch& launch, std::vector<InstrCount>* profile) {
    const uint64_t clusters = launch.config.grid.count() / launch.config.cluster.count();
    const Program& p = *launch.program;
    int threads = launch.config.threads;
    if (threads <= 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    threads = static_cast<int>(std::min<uint64_t>(static_cast<uint64_t>(threads), clusters));

    std::atomic<uint64_t> next = 0;
    std::mutex mutex;
    std::optional<LaunchError> error;
    Counters total;
    std::vector<InstrCount> counts(p.code.size());
    // Another seed takes the clusters in another order.
    uint64_t stride = 1;
    const uint64_t seed = launch.config.seed;
    if (seed) {
        stride = (seed * 0x9e3779b97f4a7c15ull >> 20) % clusters | 1;
        while (std::gcd(stride, clusters) != 1) ++stride;
    }

    auto work = [&] {
        Counters counters;
        std::vector<InstrCount> mine(p.code.size());
        std::vector<std::unique_ptr<Cluster>> resident, idle;
        // A cluster that takes long may be waiting for one that has not started: start that one
        // too.
        constexpr uint64_t kSlice = 1 << 20;
        try {
            while (!launch.stop) {
                const uint64_t i = next.fetch_add(1);
                if (i < clusters) {
                    if (idle.empty()) idle.push_back(std::make_unique<Cluster>());
                    resident.push_back(std::move(idle.back()));
                    idle.pop_back();
                    const auto order = static_cast<uint64_t>(static_cast<unsigned __int128>(i) *
                                                             stride % clusters);
                    resident.back()->start(launch, (order + seed) % clusters, counters,
                                           mine.data());
                }
                if (resident.empty()) break;
                for (size_t r = 0; r < resident.size() && !launch.stop;) {
                    if (!resident[r]->run(kSlice)) {
                        ++r;
                        continue;
                    }
                    idle.push_back(std::move(resident[r]));
                    resident.erase(resident.begin() + static_cast<long>(r));
                }
            }
        } catch (const LaunchError& e) {
            launch.stop = true;
            std::lock_guard lock(mutex);
            if (!error) error = e;
        }
        std::lock_guard lock(mutex);
        total.add(counters);
        for (size_t i = 0; i < mine.size(); ++i) {
            counts[i].issued += mine[i].issued;
            counts[i].lanes += mine[i].lanes;
            counts[i].between_mmas += mine[i].between_mmas;
        }
    };
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; ++i) pool.emplace_back(work);
    work();
    for (std::thread& t : pool) t.join();
    if (error) throw *error;

    for (size_t i = 0; i < counts.size(); ++i) {
        if (p.code[i].cls == Class::internal) continue;
        const auto c = static_cast<size_t>(p.code[i].cls);
        total.issued[c] += counts[i].issued;
        total.lanes[c] += counts[i].lanes;
        if (p.code[i].cls != Class::mov) total.between_mmas += counts[i].between_mmas;
    }
    for (const Region& r : launch.regions) {
        if (!r.touched) continue;
        for (uint64_t s = 0; s < r.bytes / 32 + 2; ++s) {
            total.unique_read_sectors += r.touched[s] & 1;
            total.unique_write_sectors += r.touched[s] >> 1 & 1;
        }
    }
    if (profile) *profile = std::move(counts);
    return total;
}

}  // namespace emu
