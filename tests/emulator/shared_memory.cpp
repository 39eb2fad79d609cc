// The race detector of shared memory, and the vector clocks behind it.

#include "shared_memory.h"

#include <algorithm>
#include <cstring>

#include "machine.h"

namespace emu {

// ---- clocks -----------------------------------------------------------------------------------

void Clocks::reset(int ctas, int warps_per_cta, bool async) {
    const int warps = ctas * warps_per_cta;
    if (warps != warps_ || warps_per_cta != per_cta_ || async != async_ || time_ > 1u << 31) {
        warps_ = warps, per_cta_ = warps_per_cta, async_ = async;
        engines_ = async ? ctas * kEngines : 0;
        agents_ = warps_ + engines_ + (async ? ctas * readers_per_cta() + 1 : 0);
        time_ = 0;
        ++epoch_;
        issued_.assign(static_cast<size_t>(agents_), 0);
    }
    // Time goes on from one CTA to the next, so that the records need no clearing.
    start_ = ++time_;
    seen_.assign(static_cast<size_t>(warps_) * static_cast<size_t>(agents_), time_);
    for (int w = 0; w < warps_; ++w)
        for (int r = warps_ + engines_; r < agents_; ++r)
            row(seen_, w)[r] = issued_[static_cast<size_t>(r)];
    if (async) proxied_ = seen_;
    over_.clear();
    if (async && ctas > 1) over_ = seen_;
}

namespace {
void merge(uint32_t* into, const uint32_t* from, int count) {
    for (int i = 0; i < count; ++i) into[i] = std::max(into[i], from[i]);
}
}  // namespace

uint32_t Clocks::tick(int warp) {
    row(seen_, warp)[warp] = ++time_;
    if (!over_.empty()) row(over_, warp)[warp] = time_;
    return time_;
}

void Clocks::arrive(int warp, Clock& clock, bool enough_scope) {
    clock.resize(clock_size(), 0);
    tick(warp);
    uint32_t* to = clock.data();
    const int first = enough_scope ? 0 : warps_;
    merge(to + first, row(seen_, warp) + first, agents_ - first);
    if (async_) merge(to + agents_, row(proxied_, warp), agents_);
    if (!over_.empty()) merge(to + 2 * agents_, row(over_, warp), agents_);
}

void Clocks::join(int warp, const Clock& clock, bool enough_scope) {
    if (clock.empty()) return;  // nothing was published
    const uint32_t* from = clock.data();
    const int first = enough_scope ? 0 : warps_;
    merge(row(seen_, warp) + first, from + first, agents_ - first);
    if (async_) merge(row(proxied_, warp), from + agents_, agents_);
    if (!over_.empty()) merge(row(over_, warp), from + 2 * agents_, agents_);
}

void Clocks::pass_on(Clock& to, const Clock& from, bool enough_scope) const {
    if (from.empty()) return;
    to.resize(clock_size(), 0);
    const int first = enough_scope ? 0 : warps_;
    merge(to.data() + first, from.data() + first, static_cast<int>(from.size()) - first);
}

void Clocks::fence_proxy(int warp) {
    if (!async_) return;
    uint32_t* to = row(proxied_, warp);
    merge(to, row(seen_, warp), agents_);
    to[warp] = ++time_;
}

void Clocks::retire(int warp, int reader, uint32_t count) {
    uint32_t& known = row(seen_, warp)[reader];
    known = std::max(known, count);
}

void Clocks::reader_over(int reader, uint32_t number, Clock& clock) const {
    clock.resize(clock_size(), 0);
    uint32_t& known = clock[static_cast<size_t>(reader)];
    known = std::max(known, number);
}

void Clocks::set(Clock& clock, int agent, uint32_t time) const {
    clock.resize(clock_size(), 0);
    clock[static_cast<size_t>(agent)] = time;
    if (!over_.empty()) clock[static_cast<size_t>(2 * agents_ + agent)] = time;
}

void Clocks::warp_arrive(int warp, Clock& clock) { set(clock, warp, tick(warp)); }

void Clocks::engine_arrive(int engine, Clock& clock) { set(clock, engine, ++time_); }

// ---- shared memory ----------------------------------------------------------------------------

void SharedMemory::reset(uint32_t bytes, int granule_shift, Clocks& clocks, int cta,
                         Options options) {
    options_ = options;
    const bool same = bytes == size_ && granule_shift == shift_ && clocks_ == &clocks &&
                      epoch_ == clocks.epoch() && cta == cta_;
    size_ = bytes;
    shift_ = granule_shift;
    clocks_ = &clocks;
    epoch_ = clocks.epoch();
    warps_ = clocks.warps();
    agents_ = clocks.agents();
    cta_ = cta;
    granules_ = ((bytes + 15) & ~15u) >> shift_;
    if (!same) {
        data_.assign((bytes + 15) & ~15u, 0);
        write_time_.assign(granules_, 0);
        writer_.assign(granules_, 0);
        const size_t times = static_cast<size_t>(granules_ + 4) * static_cast<size_t>(warps_);
        read_time_.reset(static_cast<uint32_t*>(std::calloc(times, sizeof(uint32_t))));
        if (!read_time_) throw std::bad_alloc();
        async_reads_.assign(
            clocks.async() ? static_cast<size_t>(clocks.readers_per_cta()) : size_t{0}, {});
        pages_ = (data_.size() >> kPageShift) + 1;
        version_.assign(clocks.async() ? pages_ : 0, 1);
        last_read_.assign(version_.size(), 0);
        last_visit_ = last_read_;
    }
    if (clocks.async()) checked_.assign(pages_ * static_cast<size_t>(warps_), 0);
    start_ = clocks.start();
    flags_.clear();
    // What is read uninitialised on purpose must not depend on earlier CTAs, nor look like a zero.
    if (options.allow_uninitialised) std::fill(data_.begin(), data_.end(), 0xcd);
}

void SharedMemory::access(Access kind, int warp, int lane, uint32_t address, uint32_t bytes,
                          const uint8_t* value) {
    const uint32_t first = address >> shift_;
    const uint32_t last = (address + bytes - 1) >> shift_;
    const uint32_t* seen = clocks_->seen(warp);
    const uint32_t time = clocks_->time();
    // Written in this CTA, and before what this warp has synchronised with: start <= t < seen.
    auto ordered = [&](uint32_t g) {
        return write_time_[g] - start_ < seen[(writer_[g] & ~kAtomic) >> 5] - start_;
    };
    if (kind == Access::read) {
        if (!last_read_.empty()) {
            auto& last = warp / clocks_->warps_per_cta() == cta_ ? last_read_ : last_visit_;
            last[page(address)] = last[page(address + bytes - 1)] = time;
        }
        uint32_t g = first;
        if (last - first == 3 && (g & 3) == 0) {  // 16 bytes that one lane wrote, as a rule
            uint64_t writers;
            std::memcpy(&writers, &writer_[g], sizeof writers);
            if (writers == (writers & 0xffff) * 0x0001000100010001ull) {
                const uint32_t limit = seen[(writers & 0x7fff) >> 5] - start_;
                uint32_t good = 1;
                for (int i = 0; i < 4; ++i) good &= write_time_[g + i] - start_ < limit;
                if (good) {
                    uint32_t* reads = reads_of(warp, g);
                    for (int i = 0; i < 4; ++i) reads[i] = time;
                    return;
                }
            }
        }
        for (; g <= last; ++g) {
            if (!ordered(g)) [[unlikely]]
                slow_check(kind, warp, lane, g, nullptr);
            *reads_of(warp, g) = time;
        }
        return;
    }
    const auto me = static_cast<uint16_t>(warp << 5 | lane);
    const bool strong =
        kind == Access::atomic || kind == Access::strong_read || kind == Access::strong_write;
    const bool only_writes = kind == Access::write || kind == Access::async_write;
    const uint32_t* over = clocks_->over(warp);
    for (uint32_t g = first; g <= last; ++g) {
        const bool fine =
            only_writes ? write_time_[g] < over[(writer_[g] & ~kAtomic) >> 5] : ordered(g);
        if (!fine)
            slow_check(kind, warp, lane, g, value ? value + ((g << shift_) - address) : nullptr);
    }
    if (kind != Access::strong_read) {
        check_readers(warp, lane, first, last);
        if (!async_reads_.empty()) {
            check_async_readers(warp, lane, address, bytes);
            touch_pages(address, bytes);
        }
        for (uint32_t g = first; g <= last; ++g) {
            write_time_[g] = kind == Access::async_write ? kPending : time;
            writer_[g] = me | (strong ? kAtomic : 0);
        }
    }
    if (!strong) return;
    // Whoever reads a flag that another warp set is ordered after what that warp did before.
    Clock& flag = flags_[first];
    if (kind != Access::strong_write && !flag.empty()) clocks_->join(warp, flag);
    if (kind != Access::strong_read) clocks_->arrive(warp, flag);
}

void SharedMemory::access(Access kind, int warp, Mask lanes, const uint64_t* addresses,
                          uint32_t bytes) {
    for (; lanes; lanes &= lanes - 1) {
        const int l = std::countr_zero(lanes);
        access(kind, warp, l, static_cast<uint32_t>(addresses[l]), bytes);
    }
}

void SharedMemory::land(int warp, int lane, uint32_t address, uint32_t bytes) {
    if (!async_reads_.empty()) touch_pages(address, bytes);
    for (uint32_t g = address >> shift_; g <= (address + bytes - 1) >> shift_; ++g) {
        write_time_[g] = clocks_->time();
        writer_[g] = static_cast<uint16_t>(warp << 5 | lane);
    }
}

void SharedMemory::check_readers(int warp, int lane, uint32_t first, uint32_t last) {
    if (!options_.check_races) return;
    const uint32_t* limits = clocks_->over(warp);
    if (!last_read_.empty()) {  // as a rule the warp has met all others since the pages were read
        const int begin = cta_ * clocks_->warps_per_cta(), end = begin + clocks_->warps_per_cta();
        uint32_t own = ~0u, others = ~0u;
        for (int v = 0; v < warps_; ++v) {
            uint32_t& least = v >= begin && v < end ? own : others;
            if (v != warp) least = std::min(least, limits[v]);
        }
        bool fine = true;
        for (uint32_t p = page(first << shift_); p <= page(last << shift_); ++p)
            fine &=
                last_read_[p] < std::max(own, start_) && last_visit_[p] < std::max(others, start_);
        if (fine) return;
    }
    for (uint32_t g = first & ~3u; g <= last; g += 4) {
        // Four granules at once; those outside the access are looked at only when one is late.
        const uint32_t* reads = reads_of(0, g);
        uint32_t late = 0;
        for (int v = 0; v < warps_; ++v) {
            const uint32_t limit = v == warp ? ~0u : limits[v];
            for (int i = 0; i < 4; ++i) late |= reads[4 * v + i] >= limit;
        }
        if (!late) continue;
        for (int v = 0; v < warps_; ++v)
            for (uint32_t h = std::max(g, first); h <= std::min(g + 3, last); ++h)
                if (v != warp && *reads_of(v, h) >= limits[v]) [[unlikely]]
                    fault("shared-memory race",
                          "write to shared address " + hex(static_cast<uint64_t>(h) << shift_) +
                              ", which " + describe(v) + " read with no barrier in between",
                          lane);
    }
}

std::string SharedMemory::describe(int agent) const {
    if (agent >= warps_) return "a bulk copy";
    const int per_cta = clocks_->warps_per_cta();
    const std::string text = "warp " + std::to_string(agent % per_cta);
    const int cta = agent / per_cta;
    return cta == cta_ ? text : text + " of CTA rank " + std::to_string(cta);
}

// Of a granule.
std::string SharedMemory::describe_writer(uint32_t granule) const {
    const int agent = (writer_[granule] & ~kAtomic) >> 5;
    const std::string text = describe(agent);
    return agent >= warps_ ? text : text + " lane " + std::to_string(writer_[granule] & 31);
}

void SharedMemory::slow_check(Access kind, int warp, int lane, uint32_t granule,
                              const uint8_t* value) {
    const uint32_t t = write_time_[granule];
    const uint16_t who = writer_[granule];
    const int writer = (who & ~kAtomic) >> 5;
    auto at = [&] { return "shared address " + hex(static_cast<uint64_t>(granule) << shift_); };
    const bool reads =
        kind == Access::read || kind == Access::strong_read || kind == Access::atomic;
    const bool written = t >= start_;
    if (!written && (!reads || options_.allow_uninitialised)) return;
    if (!written)
        fault("uninitialised shared memory", "read of " + at() + ", which was never written", lane);
    if (t == kPending)
        fault(
            "asynchronous copy not waited for",
            std::string(reads ? "read of " : "write to ") + at() +
                ", the target of an asynchronous copy " +
                (writer >= warps_ ? "that completes on an mbarrier, and was not waited for"
                                  : "by " + describe_writer(granule) + " that was not waited for"),
            lane);
    if (t == kBarrier)
        fault(
            "mbarrier misuse",
            std::string(reads ? "read of " : "write to ") + at() + ", which is part of an mbarrier",
            lane);
    const bool strong =
        kind == Access::atomic || kind == Access::strong_read || kind == Access::strong_write;
    if (strong && (who & kAtomic)) return;
    if (writer == warp && (who & 31) == lane) return;
    if (!options_.check_races) return;
    if (value && std::memcmp(value, data_.data() + (static_cast<size_t>(granule) << shift_),
                             size_t{1} << shift_) == 0)
        return;
    const bool handed_over = t < clocks_->over(warp)[writer];  // but it is a read
    fault("shared-memory race",
          std::string(reads ? "read of " : "write to ") + at() + ", which " +
              describe_writer(granule) + " wrote with " +
              (writer == warp     ? "no __syncwarp"
               : writer >= warps_ ? "no wait for its mbarrier"
               : handed_over      ? "an arrival or a wait of .cta scope, not .cluster,"
                                  : "no barrier") +
              " in between",
          lane);
}

// ---- the asynchronous proxy ---------------------------------------------------------------------

void SharedMemory::check_async_readers(int warp, int lane, uint32_t address, uint32_t bytes) {
    const int base = clocks_->first_reader(cta_);
    const uint32_t* seen = clocks_->seen(warp);
    for (size_t r = 0; r < async_reads_.size(); ++r) {
        if (async_reads_[r].empty()) continue;
        const uint32_t* marks = async_reads_[r].data();
        const int reader = base + static_cast<int>(r);
        const uint32_t limit = seen[reader];
        uint32_t latest = 0;
        for (uint32_t c = address >> 4; c <= (address + bytes - 1) >> 4; ++c)
            latest = std::max(latest, marks[c]);
        if (latest <= limit) continue;
        uint32_t chunk = address >> 4;
        while (marks[chunk] <= limit) ++chunk;
        const bool wgmma = static_cast<int>(r) >= clocks_->warps_per_cta();
        const auto who = static_cast<int>(r);
        fault("shared-memory race",
              "write to shared address " + hex(uint64_t{chunk} << 4) + ", which " +
                  (wgmma ? "a wgmma of warpgroup " + std::to_string(who - clocks_->warps_per_cta())
                         : "a bulk copy of warp " + std::to_string(who)) +
                  " reads; this warp has no word that it is over",
              lane);
    }
}

// What the generic proxy wrote must have gone through a proxy fence to be seen by the other one.
void SharedMemory::check_proxy(int warp, int lane, uint32_t granule, const char* what) {
    fault(
        "missing proxy fence",
        std::string(what) + " shared address " + hex(static_cast<uint64_t>(granule) << shift_) +
            ", which " + describe_writer(granule) +
            " accessed by ordinary instructions with no fence.proxy.async since (seen from warp " +
            std::to_string(warp % clocks_->warps_per_cta()) + ")",
        lane);
}

void SharedMemory::async_read(int warp, int lane, int reader, uint32_t number, uint32_t address,
                              uint32_t bytes) {
    check_async_read(warp, lane, address, bytes);
    mark_read(reader, number, address, bytes);
}

bool SharedMemory::is_uniform(uint32_t begin, uint32_t end) const {
    const uint32_t* times = write_time_.data();
    const uint16_t* writers = writer_.data();
    const uint32_t time = times[begin];
    const uint16_t writer = writers[begin];
    uint32_t differs = 0;
    for (uint32_t g = begin; g < end; ++g) differs |= times[g] ^ time;
    uint16_t others = 0;
    for (uint32_t g = begin; g < end; ++g) others |= writers[g] ^ writer;
    return !differs && !others;
}

void SharedMemory::slow_async_read(int warp, int lane, uint32_t address, uint32_t bytes) {
    const uint32_t page = address >> kPageShift;
    uint32_t& checked = checked_[static_cast<size_t>(warp) * pages_ + page];
    const uint32_t end = ((page + 1) << kPageShift) >> shift_;
    // Once for each version of a page; what a warp knows of it may grow later without that, which
    // costs time only.
    if ((address + bytes - 1) >> kPageShift == page && end <= granules_ &&
        checked != (version_[page] << 1 | 1)) {
        const uint32_t begin = (page << kPageShift) >> shift_;
        const uint32_t* seen = clocks_->seen(warp);
        const uint32_t* proxied = clocks_->proxied(warp);
        bool good = true;
        // As a rule all of it came at once.
        for (uint32_t g = is_uniform(begin, end) ? end - 1 : begin; g < end && good; ++g)
            good = in_order(g, seen, proxied);
        checked = version_[page] << 1 | (good ? 0 : 1);
        if (good) return;
    }
    const uint32_t first = address >> shift_, last = (address + bytes - 1) >> shift_;
    const uint32_t* seen = clocks_->seen(warp);
    const uint32_t* proxied = clocks_->proxied(warp);
    for (uint32_t g = first; g <= last; ++g) {
        const uint32_t t = write_time_[g];
        const int writer = (writer_[g] & ~kAtomic) >> 5;
        const bool ordered = t - start_ < seen[writer] - start_;
        const bool through = writer >= warps_ || t < proxied[writer];
        if (ordered && through) continue;
        // A whole warp's instruction comes after what its lanes wrote.
        const bool own = writer == warp && (lane < 0 || lane == (writer_[g] & 31));
        if (!ordered && !(own && t >= start_ && t < kBarrier))
            slow_check(Access::read, warp, lane, g, nullptr);
        if (t >= start_ && t < kBarrier && !through && options_.check_races)
            check_proxy(warp, lane, g, "an asynchronous read of");
    }
}

uint32_t* SharedMemory::marks_of(int reader) {
    auto& marks = async_reads_[static_cast<size_t>(reader)];
    if (marks.empty()) marks.assign(data_.size() / 16, 0);
    return marks.data();
}

void SharedMemory::mark_read(int reader, uint32_t number, uint32_t address, uint32_t bytes) {
    uint32_t* marks = marks_of(reader);
    std::fill(marks + (address >> 4), marks + ((address + bytes + 15) >> 4), number);
}

void SharedMemory::bulk_write(int warp, int lane, int engine, uint32_t address, uint32_t bytes,
                              bool generic) {
    const uint32_t first = address >> shift_, last = (address + bytes - 1) >> shift_;
    const uint32_t* over = clocks_->over(warp);
    const uint32_t* proxied = clocks_->proxied(warp);
    for (uint32_t g = first; g <= last; ++g) {
        const uint32_t t = write_time_[g];
        const int writer = (writer_[g] & ~kAtomic) >> 5;
        if (t < start_) continue;  // of an earlier CTA
        if (t >= over[writer]) slow_check(Access::async_write, warp, lane, g, nullptr);
        if (!generic && writer < warps_ && t >= proxied[writer] && options_.check_races)
            check_proxy(warp, lane, g, "an asynchronous write to");
    }
    check_readers(warp, lane, first, last);
    check_async_readers(warp, lane, address, bytes);
    touch_pages(address, bytes);
    std::fill(write_time_.begin() + first, write_time_.begin() + last + 1, kPending);
    std::fill(writer_.begin() + first, writer_.begin() + last + 1,
              static_cast<uint16_t>(engine << 5));
}

void SharedMemory::bulk_land(int engine, uint32_t address, uint32_t bytes, bool atomic) {
    const uint32_t first = address >> shift_, last = (address + bytes - 1) >> shift_;
    touch_pages(address, bytes);
    std::fill(write_time_.begin() + first, write_time_.begin() + last + 1, clocks_->time());
    std::fill(writer_.begin() + first, writer_.begin() + last + 1,
              static_cast<uint16_t>(engine << 5 | (atomic ? kAtomic : 0)));
}

void SharedMemory::make_barrier(int warp, int lane, uint32_t address) {
    access(Access::write, warp, lane, address, 8);
    for (uint32_t g = address >> shift_; g <= (address + 7) >> shift_; ++g)
        write_time_[g] = kBarrier;
}

void SharedMemory::end_barrier(int warp, int lane, uint32_t address) {
    land(warp, lane, address, 8);
}

}  // namespace emu
