// libcuda's symbols for memory: allocations, copies, fills. Host memory is device memory.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>

#include "driver.h"
#include "runtime.h"

namespace {

using namespace emu::driver;

void mark(uint64_t address, uint64_t bytes, bool valid) {
    auto region = emu::RegionTable::instance().at(address);
    if (region && region->valid && address + bytes <= region->base + region->bytes)
        std::memset(region->valid.get() + (address - region->base), valid, bytes);
}

int copy_memory(uint64_t to, uint64_t from, size_t bytes) {
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    auto& table = emu::RegionTable::instance();
    auto target = table.at(to), source = table.at(from);
    if (target && target->valid && source && source->valid)
        std::memmove(target->valid.get() + (to - target->base),
                     source->valid.get() + (from - source->base), bytes);
    else
        mark(to, bytes, true);
    return kSuccess;
}

template <class T>
int set_memory(uint64_t to, T value, size_t count) {
    std::fill_n(reinterpret_cast<T*>(to), count, value);
    mark(to, count * sizeof(T), true);
    return kSuccess;
}

std::mutex allocations_mutex;
std::set<uint64_t> allocations;

int allocate(uint64_t* address, size_t bytes) {
    if (!address || !bytes) return kInvalidValue;
    void* memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
    if (!memory) return kOutOfMemory;
    *address = reinterpret_cast<uint64_t>(memory);
    char name[64];
    std::snprintf(name, sizeof name, "cuMemAlloc(%zu)", bytes);
    emu::RegionTable::instance().add(emu::make_region(memory, bytes, name, true));
    std::lock_guard lock(allocations_mutex);
    allocations.insert(*address);
    return kSuccess;
}

int release(uint64_t address) {
    if (!address) return kSuccess;
    std::lock_guard lock(allocations_mutex);
    if (!allocations.erase(address)) return kInvalidValue;
    emu::RegionTable::instance().remove(address);
    std::free(reinterpret_cast<void*>(address));
    return kSuccess;
}

int host_allocate(void** memory, size_t bytes) {
    if (!memory || !bytes) return kInvalidValue;
    *memory = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    if (!*memory) return kOutOfMemory;
    emu::RegionTable::instance().add(emu::make_region(*memory, bytes, "pinned host memory"));
    return kSuccess;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
    return current_device() ? allocate(address, bytes) : kInvalidContext;
}
int cuMemAllocAsync(uint64_t* address, size_t bytes, void*) {
    return cuMemAlloc_v2(address, bytes);
}
int cuMemFree_v2(uint64_t address) { return release(address); }
int cuMemFreeAsync(uint64_t address, void*) { return release(address); }
int cuMemAllocHost_v2(void** memory, size_t bytes) { return host_allocate(memory, bytes); }
int cuMemHostAlloc(void** memory, size_t bytes, unsigned) { return host_allocate(memory, bytes); }
int cuMemFreeHost(void* memory) {
    if (!emu::RegionTable::instance().remove(reinterpret_cast<uint64_t>(memory)))
        return kInvalidValue;
    return std::free(memory), kSuccess;
}
int cuMemGetInfo_v2(size_t* available, size_t* total) {
    return *available = *total = size_t{16} << 30, kSuccess;
}
int cuMemGetAddressRange_v2(uint64_t* base, size_t* bytes, uint64_t address) {
    auto region = emu::RegionTable::instance().at(address);
    if (!region) return kNotFound;
    if (base) *base = region->base;
    if (bytes) *bytes = region->bytes;
    return kSuccess;
}
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t n, void* s) {
    return submit(s, [=] { return copy_memory(to, from, n); });
}
int cuMemcpy(uint64_t to, uint64_t from, size_t n) { return copy_memory(to, from, n); }
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t n) {
    return copy_memory(to, reinterpret_cast<uint64_t>(from), n);
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t n) {
    return copy_memory(reinterpret_cast<uint64_t>(to), from, n);
}
int cuMemcpyDtoD_v2(uint64_t to, uint64_t from, size_t n) { return copy_memory(to, from, n); }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t n, void* s) {
    return cuMemcpyAsync(to, reinterpret_cast<uint64_t>(from), n, s);
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t n, void* s) {
    return cuMemcpyAsync(reinterpret_cast<uint64_t>(to), from, n, s);
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t n, void* s) {
    return cuMemcpyAsync(to, from, n, s);
}
int cuMemsetD8_v2(uint64_t to, uint8_t value, size_t n) { return set_memory(to, value, n); }
int cuMemsetD16_v2(uint64_t to, uint16_t value, size_t n) { return set_memory(to, value, n); }
int cuMemsetD32_v2(uint64_t to, uint32_t value, size_t n) { return set_memory(to, value, n); }
int cuMemsetD8Async(uint64_t to, uint8_t value, size_t n, void* s) {
    return submit(s, [=] { return set_memory(to, value, n); });
}
int cuMemsetD16Async(uint64_t to, uint16_t value, size_t n, void* s) {
    return submit(s, [=] { return set_memory(to, value, n); });
}
int cuMemsetD32Async(uint64_t to, uint32_t value, size_t n, void* s) {
    return submit(s, [=] { return set_memory(to, value, n); });
}

}  // extern "C"
#pragma GCC visibility pop
