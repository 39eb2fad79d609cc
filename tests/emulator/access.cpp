#include "access.h"

#include <algorithm>

namespace emu {

LaneAddresses lane_addresses(Warp& w, uint32_t row, bool wide, int64_t offset, Mask m) {
    LaneAddresses a;
    a.mask = m;
    if (wide) {
        const auto* from = w.row<uint64_t>(row);
        for (int l = 0; l < kLanes; ++l) a.at[l] = from[l] + static_cast<uint64_t>(offset);
    } else {
        const auto* from = w.row<uint32_t>(row);
        for (int l = 0; l < kLanes; ++l)
            a.at[l] = static_cast<uint32_t>(from[l] + static_cast<uint32_t>(offset));
    }
    if (m != kAllLanes) {
        const uint64_t fill = a.at[a.first()];
        for (int l = 0; l < kLanes; ++l) a.at[l] = m >> l & 1 ? a.at[l] : fill;
    }
    return a;
}

void check_alignment(const LaneAddresses& a, uint32_t bytes) {
    uint64_t any = 0;
    for (int l = 0; l < kLanes; ++l) any |= a.at[l];
    if ((any & (bytes - 1)) == 0) [[likely]]
        return;
    for (int l = 0; l < kLanes; ++l)
        if ((a.mask >> l & 1) && (a.at[l] & (bytes - 1)))
            fault("misaligned access",
                  "address " + hex(a.at[l]) + " is not a multiple of " + std::to_string(bytes), l);
}

namespace {

// Distinct 32-byte sectors (aligned accesses of at most 32 bytes lie in one each), ascending.
int distinct_sectors(const LaneAddresses& a, uint64_t* out) {
    uint64_t low = ~0ull, high = 0;
    for (int l = 0; l < kLanes; ++l)
        low = std::min(low, a.at[l] >> 5), high = std::max(high, a.at[l] >> 5);
    int count = 0;
    if (high - low < 64) {
        uint64_t bits = 0;
        for (int l = 0; l < kLanes; ++l) bits |= 1ull << ((a.at[l] >> 5) - low);
        for (; bits; bits &= bits - 1)
            out[count++] = low + static_cast<uint64_t>(std::countr_zero(bits));
        return count;
    }
    for (int l = 0; l < kLanes; ++l) out[l] = a.at[l] >> 5;
    std::sort(out, out + kLanes);
    return static_cast<int>(std::unique(out, out + kLanes) - out);
}

void touch_sector(Region& r, uint64_t sector, bool write) {
    uint8_t& flags = r.touched[sector - (r.base >> 5)];
    const uint8_t bit = write ? 2 : 1;
    if (!(flags & bit)) std::atomic_ref(flags).fetch_or(bit, std::memory_order_relaxed);
}

void check_valid(const Region& r, uint64_t address, uint32_t bytes, bool write, int lane) {
    uint8_t* valid = r.valid.get() + (address - r.base);
    if (write) {
        std::memset(valid, 1, bytes);
        return;
    }
    for (uint32_t i = 0; i < bytes; ++i)
        if (!valid[i])
            fault("uninitialised global memory",
                  "read of " + hex(address + i) + ", offset " +
                      std::to_string(address + i - r.base) + " of '" + r.name +
                      "', which was never written",
                  lane);
}

}  // namespace

void check_waited(Warp& w, Mask m, uint64_t address, bool write) {
    if (const Mask early = w.early & m) [[unlikely]]
        fault("access before griddepcontrol.wait",
              std::string(write ? "write to " : "read of ") + hex(address) +
                  ", while kernels before this one may still run",
              std::countr_zero(early));
}

void check_global(Warp& w, const LaneAddresses& a, uint32_t bytes, bool write,
                  const uint32_t* sizes, bool is_hint) {
    check_alignment(a, bytes);
    if (!is_hint) check_waited(w, a.mask, a.at[a.first()], write);
    Launch& launch = *w.launch;
    uint64_t low = ~0ull, high = 0;
    for (int l = 0; l < kLanes; ++l) low = std::min(low, a.at[l]), high = std::max(high, a.at[l]);
    Region* all = sizes ? nullptr : launch.find(low, high - low + bytes, w.region_hint);
    uint64_t sectors[kLanes];
    const int count = distinct_sectors(a, sectors);
    auto touch = [&](Region& r, uint64_t sector) { touch_sector(r, sector, write); };
    if (all && !(write && !all->writable)) [[likely]] {
        for (int i = 0; i < count; ++i) touch(*all, sectors[i]);
        if (all->valid)
            for (int l = 0; l < kLanes; ++l)
                if (a.mask >> l & 1) check_valid(*all, a.at[l], bytes, write, l);
    } else {
        for (int l = 0; l < kLanes; ++l) {
            if (!(a.mask >> l & 1)) continue;
            const uint32_t n = sizes ? sizes[l] : bytes;
            Region* r = launch.find(a.at[l], n, w.region_hint);
            if (!r) launch.out_of_bounds(a.at[l], n, write ? "write" : "read", l);
            if (write && !r->writable)
                fault("write to read-only memory",
                      "address " + hex(a.at[l]) + " in '" + r->name + "'", l);
            touch(*r, a.at[l] >> 5);
            if (r->valid) check_valid(*r, a.at[l], n, write, l);
        }
    }
    Counters& c = *w.counters;
    const auto requested = static_cast<uint64_t>(std::popcount(a.mask)) * bytes;
    if (write) {
        ++c.write_requests;
        c.write_sectors += static_cast<uint64_t>(count);
        c.write_bytes += requested;
    } else {
        ++c.read_requests;
        c.read_sectors += static_cast<uint64_t>(count);
        c.read_bytes += requested;
    }
}

void check_global_range(Warp& w, uint64_t address, uint32_t bytes, bool write, int lane) {
    check_waited(w, 1u << lane, address, write);
    Region* r = w.launch->find(address, bytes, w.region_hint);
    if (!r) w.launch->out_of_bounds(address, bytes, write ? "write" : "read", lane);
    if (write && !r->writable)
        fault("write to read-only memory", "address " + hex(address) + " in '" + r->name + "'",
              lane);
    const uint64_t first = address >> 5, last = (address + bytes - 1) >> 5;
    for (uint64_t sector = first; sector <= last; ++sector) touch_sector(*r, sector, write);
    if (!write && r->valid) check_valid(*r, address, bytes, false, lane);
    (write ? w.counters->write_sectors : w.counters->read_sectors) += last - first + 1;
    (write ? w.counters->write_bytes : w.counters->read_bytes) += bytes;
}

void check_local(Warp& w, const LaneAddresses& a, uint32_t bytes) {
    check_alignment(a, bytes);
    const uint32_t size = w.launch->program->local_bytes;
    for (int l = 0; l < kLanes; ++l)
        if (a.at[l] + bytes > size || a.at[l] > size)
            fault("out of bounds",
                  "local address " + hex(a.at[l]) + " of " + std::to_string(size) + " bytes", l);
}

namespace {

// Shared-memory wavefronts of a request, with 32 banks of 4 bytes.
void count_wavefronts(Warp& w, const LaneAddresses& a, uint32_t bytes) {
    // A wavefront moves up to 128 bytes: 8-byte accesses go by half warps, 16-byte ones by
    // quarters.
    const uint32_t unit = std::max(4u, bytes);
    const auto lanes_per_phase = static_cast<int>(128 / unit);
    Counters& c = *w.counters;
    ++c.shared_requests;
    for (int from = 0; from < kLanes; from += lanes_per_phase) {
        // The usual case: every lane of the phase in banks of its own.
        uint32_t slots = 0;
        for (int l = from; l < from + lanes_per_phase; ++l)
            slots |= 1u << (a.at[l] >> std::countr_zero(unit) &
                            static_cast<uint32_t>(lanes_per_phase - 1));
        if (std::popcount(slots) == lanes_per_phase) {
            ++c.shared_wavefronts;
            ++c.shared_wavefronts_min;
            continue;
        }
        uint32_t used = 0, first[32], extra[kLanes];
        int extras = 0;
        for (int l = from; l < from + lanes_per_phase; ++l) {
            if (!(a.mask >> l & 1)) continue;
            for (uint32_t i = 0; i < unit / 4; ++i) {
                const auto word = static_cast<uint32_t>(a.at[l] >> 2) + i;
                const uint32_t bank = word & 31;
                if (!(used >> bank & 1))
                    used |= 1u << bank, first[bank] = word;
                else if (first[bank] != word)
                    extra[extras++] = word;
            }
        }
        if (!used) continue;
        uint32_t worst = 1;
        if (extras) {  // further distinct words of each bank
            uint32_t per_bank[32] = {};
            std::sort(extra, extra + extras);
            const auto end = std::unique(extra, extra + extras);
            for (uint32_t* word = extra; word != end; ++word)
                worst = std::max(worst, 1 + ++per_bank[*word & 31]);
        }
        c.shared_wavefronts += worst;
        ++c.shared_wavefronts_min;
    }
}

}  // namespace

void check_shared_bounds(Warp& w, Cta& cta, const LaneAddresses& a, uint32_t bytes) {
    check_alignment(a, bytes);
    const uint32_t size = cta.shared.size();
    uint64_t high = 0;
    for (int l = 0; l < kLanes; ++l) high = std::max(high, a.at[l]);
    if (high + bytes > size)
        for (int l = 0; l < kLanes; ++l)
            if ((a.mask >> l & 1) && a.at[l] + bytes > size)
                fault("out of bounds",
                      std::to_string(bytes) + " bytes at shared address " + hex(a.at[l]) +
                          "; the CTA has " + std::to_string(size),
                      l);
    count_wavefronts(w, a, bytes);
}

void check_shared(Warp& w, Cta& cta, const LaneAddresses& a, uint32_t bytes,
                  SharedMemory::Access kind) {
    check_shared_bounds(w, cta, a, bytes);
    cta.shared.access(kind, w.agent, a.mask, a.at, bytes);
}

Cta& cta_of_rank(Warp& w, uint32_t rank, int lane) {
    Cluster& cluster = *w.cta->cluster;
    if (rank >= cluster.ctas.size())
        fault("out of bounds",
              "CTA rank " + std::to_string(rank) + " of a cluster of " +
                  std::to_string(cluster.ctas.size()),
              lane);
    Cta& cta = *cluster.ctas[rank];
    if (&cta != w.cta && cta.finished())
        fault("out of bounds",
              "shared memory of CTA rank " + std::to_string(rank) + ", which has ended", lane);
    return cta;
}

}  // namespace emu
