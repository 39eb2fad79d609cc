// Global regions, counters, the table of devices.

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
    shared_wavefronts_min += o.shared_wavefronts_min, between_mmas += o.between_mmas;
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
