// Shared memory with its race detector, global regions, counters, the table of devices.

#include <algorithm>
#include <cstdio>

#include "machine.h"

namespace emu {

const char* const kClassNames[kClasses] = {"fp32",  "fp64", "fp16",    "mufu",   "alu",
                                           "cvt",   "mma",  "shared",  "global", "copy",
                                           "local", "sync", "control", "mov"};

const Device* find_device(const std::string& target) {
    static const std::map<std::string, Device> devices = {
        {"sm_80", {"Emulated A100", 80, 108, 163 << 10, 164 << 10, 64}},
        {"sm_89", {"Emulated L40S", 89, 142, 99 << 10, 100 << 10, 48}},
        {"sm_90", {"Emulated H100", 90, 132, 227 << 10, 228 << 10, 64}},
        {"sm_100", {"Emulated B200", 100, 148, 227 << 10, 228 << 10, 64}},
    };
    auto it = devices.find(target.ends_with('a') ? target.substr(0, target.size() - 1) : target);
    return it == devices.end() ? nullptr : &it->second;
}

void fault(const char* kind, std::string message, int lane) {
    throw Fault{kind, std::move(message), lane};
}

std::string hex(uint64_t value) {
    char text[32];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

void Counters::add(const Counters& o) {
    for (int i = 0; i < kClasses; ++i) issued[i] += o.issued[i], lanes[i] += o.lanes[i];
    read_requests += o.read_requests, read_sectors += o.read_sectors, read_bytes += o.read_bytes;
    write_requests += o.write_requests, write_sectors += o.write_sectors,
        write_bytes += o.write_bytes;
    unique_read_sectors += o.unique_read_sectors, unique_write_sectors += o.unique_write_sectors;
    shared_requests += o.shared_requests, shared_wavefronts += o.shared_wavefronts;
    shared_wavefronts_min += o.shared_wavefronts_min;
}

// ---- shared memory ----------------------------------------------------------------------------

void SharedMemory::reset(uint32_t bytes, int granule_shift, int warps, Options options) {
    options_ = options;
    const bool same = bytes == size_ && granule_shift == shift_ && warps == warps_;
    size_ = bytes;
    shift_ = granule_shift;
    warps_ = warps;
    granules_ = ((bytes + 15) & ~15u) >> shift_;
    // Time goes on from one CTA to the next, so that the records need no clearing.
    if (!same || time_ > 1u << 31) {
        time_ = 0;
        data_.assign((bytes + 15) & ~15u, 0);
        write_time_.assign(granules_, 0);
        writer_.assign(granules_, 0);
        read_time_.assign(static_cast<size_t>(granules_ + 4) * warps, 0);
    }
    start_ = ++time_;
    seen_.assign(static_cast<size_t>(warps) * warps, time_);
    flags_.clear();
    // What is read uninitialised on purpose must not depend on earlier CTAs, nor look like a zero.
    if (options.allow_uninitialised) std::fill(data_.begin(), data_.end(), 0xcd);
}

void SharedMemory::access(Access kind, int warp, int lane, uint32_t address, uint32_t bytes,
                          const uint8_t* value) {
    const uint32_t first = address >> shift_;
    const uint32_t last = (address + bytes - 1) >> shift_;
    const uint32_t* seen = &seen_[warp * warps_];
    // Written in this CTA, and before what this warp has synchronised with: start <= t < seen.
    auto ordered = [&](uint32_t g) {
        return write_time_[g] - start_ < seen[(writer_[g] & ~kAtomic) >> 5] - start_;
    };
    if (kind == Access::read) {
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
                    for (int i = 0; i < 4; ++i) reads[i] = time_;
                    return;
                }
            }
        }
        for (; g <= last; ++g) {
            if (!ordered(g)) [[unlikely]]
                slow_check(kind, warp, lane, g, nullptr);
            *reads_of(warp, g) = time_;
        }
        return;
    }
    const auto me = static_cast<uint16_t>(warp << 5 | lane);
    const bool strong =
        kind == Access::atomic || kind == Access::strong_read || kind == Access::strong_write;
    const bool only_writes = kind == Access::write || kind == Access::async_write;
    for (uint32_t g = first; g <= last; ++g) {
        const bool fine =
            only_writes ? write_time_[g] < seen[(writer_[g] & ~kAtomic) >> 5] : ordered(g);
        if (!fine)
            slow_check(kind, warp, lane, g, value ? value + ((g << shift_) - address) : nullptr);
    }
    if (kind != Access::strong_read) {
        check_readers(warp, lane, first, last);
        for (uint32_t g = first; g <= last; ++g) {
            write_time_[g] = kind == Access::async_write ? kPending : time_;
            writer_[g] = me | (strong ? kAtomic : 0);
        }
    }
    if (!strong) return;
    // Whoever reads a flag that another warp set is ordered after what that warp did before.
    Clock& flag = flags_[first];
    if (kind != Access::strong_write && !flag.empty()) join(warp, flag);
    if (kind != Access::strong_read) arrive(warp, flag);
}

void SharedMemory::access(Access kind, int warp, Mask lanes, const uint64_t* addresses,
                          uint32_t bytes) {
    for (; lanes; lanes &= lanes - 1) {
        const int l = std::countr_zero(lanes);
        access(kind, warp, l, static_cast<uint32_t>(addresses[l]), bytes);
    }
}

void SharedMemory::land(int warp, int lane, uint32_t address, uint32_t bytes) {
    for (uint32_t g = address >> shift_; g <= (address + bytes - 1) >> shift_; ++g) {
        write_time_[g] = time_;
        writer_[g] = static_cast<uint16_t>(warp << 5 | lane);
    }
}

void SharedMemory::check_readers(int warp, int lane, uint32_t first, uint32_t last) {
    if (!options_.check_races) return;
    const uint32_t* limits = &seen_[warp * warps_];
    if (last - first == 3 && (first & 3) == 0) {
        const uint32_t* reads = reads_of(0, first);
        uint32_t late = 0;
        for (int v = 0; v < warps_; ++v) {
            const uint32_t limit = v == warp ? ~0u : limits[v];
            for (int i = 0; i < 4; ++i) late |= reads[4 * v + i] >= limit;
        }
        if (!late) return;
    }
    for (int v = 0; v < warps_; ++v)
        for (uint32_t g = first; g <= last; ++g)
            if (v != warp && *reads_of(v, g) >= limits[v]) [[unlikely]]
                fault("shared-memory race",
                      "write to shared address " + hex(static_cast<uint64_t>(g) << shift_) +
                          ", which warp " + std::to_string(v) + " read with no barrier in between",
                      lane);
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
        fault("asynchronous copy not waited for",
              std::string(reads ? "read of " : "write to ") + at() +
                  ", the target of an asynchronous copy by warp " + std::to_string(writer) +
                  " lane " + std::to_string(who & 31) + " that was not waited for",
              lane);
    const bool strong =
        kind == Access::atomic || kind == Access::strong_read || kind == Access::strong_write;
    if (strong && (who & kAtomic)) return;
    if (writer == warp && (who & 31) == lane) return;
    if (!options_.check_races) return;
    if (value && std::memcmp(value, data_.data() + (static_cast<size_t>(granule) << shift_),
                             size_t{1} << shift_) == 0)
        return;
    fault("shared-memory race",
          std::string(reads ? "read of " : "write to ") + at() + ", which warp " +
              std::to_string(writer) + " lane " + std::to_string(who & 31) + " wrote with no " +
              (writer == warp ? "__syncwarp" : "barrier") + " in between",
          lane);
}

void SharedMemory::arrive(int warp, Clock& clock) {
    clock.resize(warps_, 0);
    seen(warp, warp) = ++time_;
    for (int v = 0; v < warps_; ++v) clock[v] = std::max(clock[v], seen(warp, v));
}

void SharedMemory::join(int warp, const Clock& clock) {
    for (int v = 0; v < warps_; ++v) seen(warp, v) = std::max(seen(warp, v), clock[v]);
}

// ---- global regions ---------------------------------------------------------------------------

Region* Launch::find(uint64_t address, uint64_t bytes, size_t& hint) {
    if (hint < regions.size()) {
        Region& r = regions[hint];
        if (address >= r.base && address + bytes <= r.base + r.bytes) return &r;
    }
    auto it = std::upper_bound(regions.begin(), regions.end(), address,
                               [](uint64_t a, const Region& r) { return a < r.base; });
    if (it == regions.begin()) return nullptr;
    --it;
    if (address + bytes > it->base + it->bytes || address + bytes < address) return nullptr;
    hint = static_cast<size_t>(it - regions.begin());
    return &*it;
}

void Launch::out_of_bounds(uint64_t address, uint64_t bytes, const char* what, int lane) {
    const Region* nearest = nullptr;
    uint64_t best = ~0ull;
    for (const Region& r : regions) {
        const uint64_t distance = address < r.base              ? r.base - address
                                  : address >= r.base + r.bytes ? address - (r.base + r.bytes) + 1
                                                                : 0;
        if (distance < best) best = distance, nearest = &r;
    }
    std::string message =
        std::string(what) + " of " + std::to_string(bytes) + " bytes at " + hex(address);
    if (nearest) {
        const int64_t offset = static_cast<int64_t>(address - nearest->base);
        message += ", offset " + std::to_string(offset) + " of '" + nearest->name + "' (" +
                   std::to_string(nearest->bytes) + " bytes at " + hex(nearest->base) +
                   "), the nearest region";
    } else {
        message += "; no memory is registered";
    }
    fault("out of bounds", message, lane);
}

}  // namespace emu
