// Shared memory of a CTA with its race detector, and the logical time that the detector counts in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace emu {

using Mask = uint32_t;

// Logical time of a cluster, which each synchronisation advances. seen(w, a) is the time up to
// which warp w has synchronised with agent a, so what a did at time t is ordered before what w does
// now if t < seen(w, a). proxied(w, a) is the same for what also went through a fence.proxy.async
// on its way: the asynchronous proxy (TMA, wgmma) sees only that. over(w, a) is the same for what
// is known to be over, so that its bytes may be overwritten, though perhaps not read: all that an
// arrival of .cta scope says to another CTA.
//
// Agents: the warps of the cluster, CTA by CTA; then, in programs with asynchronous instructions,
// kEngines a CTA that write for its mbarriers (TMA: what completes on one mbarrier says nothing of
// what completes on another); then the readers of a CTA: one a warp for bulk copies out of shared
// memory, one a warpgroup for wgmma; then barrier.cluster. Readers count operations, and that one
// its phases, in place of time: seen(w, r) is how many of r's operations w knows to be over.
class Clocks {
  public:
    static constexpr int kEngines = 16;
    using Clock = std::vector<uint32_t>;

    void reset(int ctas, int warps_per_cta, bool async);
    int warps() const { return warps_; }
    int warps_per_cta() const { return per_cta_; }
    int agents() const { return agents_; }
    bool async() const { return async_; }
    uint32_t start() const { return start_; }  // times before it are of earlier clusters
    uint32_t time() const { return time_; }
    uint32_t epoch() const { return epoch_; }  // changes when time starts anew
    const uint32_t* seen(int warp) const { return &seen_[static_cast<size_t>(warp) * agents_]; }
    const uint32_t* proxied(int warp) const {
        return &proxied_[static_cast<size_t>(warp) * agents_];
    }

    const uint32_t* over(int warp) const {
        return over_.empty() ? seen(warp) : &over_[static_cast<size_t>(warp) * agents_];
    }

    int engine(int cta, int index) const { return warps_ + cta * kEngines + index % kEngines; }
    int readers_per_cta() const { return per_cta_ + (per_cta_ + 3) / 4; }
    int first_reader(int cta) const { return warps_ + engines_ + cta * readers_per_cta(); }
    int cluster_barrier() const { return agents_ - 1; }
    // The next operation of a reader, and word that its operations up to `count` are over.
    uint32_t next_operation(int reader) { return ++issued_[static_cast<size_t>(reader)]; }
    uint32_t issued(int reader) const { return issued_[static_cast<size_t>(reader)]; }
    void retire(int warp, int reader, uint32_t count);

    // `arrive` publishes what `warp` did into `clock`, `join` acquires it: with less than
    // `enough_scope`, that it is over and no more.
    void arrive(int warp, Clock& clock, bool enough_scope = true);
    void join(int warp, const Clock& clock, bool enough_scope = true);
    // Adds what `from` publishes to `to`.
    void pass_on(Clock& to, const Clock& from, bool enough_scope = true) const;
    void sync_warp(int warp) { tick(warp); }
    void fence_proxy(int warp);
    // An engine did something now; it is published into `clock`.
    void engine_arrive(int engine, Clock& clock);
    // An operation of a reader is over, and all before it; a phase of barrier.cluster likewise.
    void reader_over(int reader, uint32_t number, Clock& clock) const;
    // What a warp did up to now, and nothing it learnt of others.
    void warp_arrive(int warp, Clock& clock);

  private:
    uint32_t* row(std::vector<uint32_t>& of, int warp) {
        return &of[static_cast<size_t>(warp) * static_cast<size_t>(agents_)];
    }
    uint32_t tick(int warp);
    // A clock is one to three rows of all agents: seen, proxied, over.
    size_t clock_size() const {
        return static_cast<size_t>(agents_) * (over_.empty() ? async_ ? 2 : 1 : 3);
    }
    void set(Clock& clock, int agent, uint32_t time) const;
    int warps_ = 0, per_cta_ = 0, engines_ = 0, agents_ = 0;
    bool async_ = false;
    uint32_t time_ = 0, start_ = 1, epoch_ = 0;
    std::vector<uint32_t> seen_, proxied_, over_;  // by warp and agent; the last one in clusters
    std::vector<uint32_t> issued_;                 // by agent, of readers
};

struct FreeMemory {
    void operator()(void* memory) const { std::free(memory); }
};

// For each granule: who wrote and who read it last, and when.
class SharedMemory {
  public:
    static constexpr uint32_t kPending = ~0u;      // being written by an asynchronous copy
    static constexpr uint32_t kBarrier = ~0u - 1;  // part of an mbarrier
    static constexpr uint16_t kAtomic = 1 << 15;

    struct Options {
        bool allow_uninitialised = false;
        bool check_races = true;
    };
    void reset(uint32_t bytes, int granule_shift, Clocks& clocks, int cta, Options options);
    uint32_t size() const { return size_; }
    uint8_t* data() { return data_.data(); }

    enum class Access : uint8_t { read, write, atomic, strong_read, strong_write, async_write };
    // Checks one lane's access and records it. Bounds and alignment were checked before. `value`
    // is what a write is about to store: writing what is there already harms nobody.
    void access(Access kind, int warp, int lane, uint32_t address, uint32_t bytes,
                const uint8_t* value = nullptr);
    // The same for the lanes of a mask, without values.
    void access(Access kind, int warp, Mask lanes, const uint64_t* addresses, uint32_t bytes);
    void land(int warp, int lane, uint32_t address, uint32_t bytes);  // an async_write arrives

    // The asynchronous proxy. A copy by `engine`, issued by a thread: what it overwrites must be
    // over; the bytes are pending until they land.
    // `generic`: it stays in the proxy of ordinary instructions (st.async).
    void bulk_write(int warp, int lane, int engine, uint32_t address, uint32_t bytes,
                    bool generic = false);
    void bulk_land(int engine, uint32_t address, uint32_t bytes, bool atomic = false);
    // Operation `number` of a reader (of this CTA, from 0), issued by a thread or, with lane -1, by
    // a whole warp, reads these bytes from now until it is retired.
    void async_read(int warp, int lane, int reader, uint32_t number, uint32_t address,
                    uint32_t bytes);
    // The two halves of it. The check is quick where the warp has found all of the page (1 KB) in
    // order, and nobody has written to it since.
    void check_async_read(int warp, int lane, uint32_t address, uint32_t bytes) {
        if (page(address + bytes - 1) != page(address) || !is_checked(warp, page(address)))
            slow_async_read(warp, lane, address, bytes);
    }
    // Whether that is known of a page; of those of the bytes `first` ... `last`.
    bool is_checked(int warp, uint32_t page) const {
        return checked_[static_cast<size_t>(warp) * pages_ + page] == version_[page] << 1;
    }
    bool is_checked(int warp, uint32_t first, uint32_t last) const {
        for (uint32_t p = page(first); p <= page(last); ++p)
            if (!is_checked(warp, p)) return false;
        return true;
    }
    static uint32_t page(uint32_t address) { return address >> kPageShift; }
    void mark_read(int reader, uint32_t number, uint32_t address, uint32_t bytes);
    // By 16 bytes: where mark_read leaves the number.
    uint32_t* marks_of(int reader);
    void make_barrier(int warp, int lane, uint32_t address);
    void end_barrier(int warp, int lane, uint32_t address);

    using Clock = Clocks::Clock;

  private:
    // When `warp` read granule g and, if g is a multiple of 4, the three after it: [g / 4][warp][g
    // % 4].
    uint32_t* reads_of(int warp, uint32_t g) {
        return &read_time_[((g >> 2) * static_cast<uint32_t>(warps_) +
                            static_cast<uint32_t>(warp)) *
                               4 +
                           (g & 3)];
    }
    void slow_check(Access kind, int warp, int lane, uint32_t granule, const uint8_t* value);
    void check_readers(int warp, int lane, uint32_t first, uint32_t last);
    static constexpr int kPageShift = 10;
    // Bytes are written, or change hands: in programs with asynchronous readers.
    void touch_pages(uint32_t address, uint32_t bytes) {
        for (uint32_t p = address >> kPageShift; p <= (address + bytes - 1) >> kPageShift; ++p)
            ++version_[p];
    }
    bool in_order(uint32_t granule, const uint32_t* seen, const uint32_t* proxied) const {
        const uint32_t t = write_time_[granule];
        const int writer = (writer_[granule] & ~kAtomic) >> 5;
        return t - start_ < seen[writer] - start_ && (writer >= warps_ || t < proxied[writer]);
    }
    // Whether granules begin ... end - 1 were written at the same time by the same.
    bool is_uniform(uint32_t begin, uint32_t end) const;
    void slow_async_read(int warp, int lane, uint32_t address, uint32_t bytes);
    void check_async_readers(int warp, int lane, uint32_t address, uint32_t bytes);
    void check_proxy(int warp, int lane, uint32_t granule, const char* what);
    std::string describe(int agent) const;
    std::string describe_writer(uint32_t granule) const;

    std::vector<uint8_t> data_;
    uint32_t size_ = 0;
    int shift_ = 2;
    int warps_ = 0;
    int cta_ = 0;
    int agents_ = 0;
    Clocks* clocks_ = nullptr;
    uint32_t granules_ = 0;
    uint32_t start_ = 1;
    uint32_t epoch_ = 0;
    Options options_;
    std::vector<uint32_t> write_time_;
    std::vector<uint16_t> writer_;  // agent << 5 | lane
    // See reads_of: much, and most of it never used, so of pages that the system clears on demand.
    std::unique_ptr<uint32_t[], FreeMemory> read_time_;
    // By reader of this CTA and 16 bytes: the number of the operation that read them last.
    std::vector<std::vector<uint32_t>> async_reads_;
    // By page: how often it was written. By warp and page: twice the count at which the warp found
    // the page in order, plus one if it did not.
    std::vector<uint32_t> version_, checked_;
    // By page, in programs with asynchronous readers: when a warp read there last, of this CTA and
    // of others.
    std::vector<uint32_t> last_read_, last_visit_;
    size_t pages_ = 0;
    std::unordered_map<uint32_t, Clock> flags_;  // carried by atomics and strong accesses
};

}  // namespace emu
