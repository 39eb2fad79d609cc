// cp.async: copies from global to shared memory that land when they are waited for, and not before.

#include <algorithm>

#include "access.h"
#include "decode.h"
#include "lanes.h"

namespace emu {
namespace {

// op: destination, source, bytes to copy (the rest of in.b is zeros); in.a bits: which addresses
// are 64 bits wide.
void copy(Warp& w, const Instr& in, Mask m) {
    LaneAddresses to = lane_addresses(w, in.op[0], in.a & 1, in.imm, m);
    by_cta(w, Space::shared, LaneAddresses(to), false,
           [&](Cta&, const LaneAddresses& offsets) { to = offsets; });
    const LaneAddresses from =
        lane_addresses(w, in.op[1], in.a & 2, static_cast<int32_t>(in.target), m);
    const auto* size = in.op[2] == kNone ? nullptr : w.row<uint32_t>(in.op[2]);
    // A source of zero bytes is not read; its address may be anything.
    LaneAddresses read = from;
    if (size) {
        read.mask = 0;
        for_each_lane(m, [&](int l) {
            if (size[l] > in.b)
                fault("bad cp.async",
                      "source size " + std::to_string(size[l]) + " > " + std::to_string(in.b), l);
            if (size[l] > 0) read.mask |= 1u << l;
        });
        if (read.mask)
            for (int l = 0; l < kLanes; ++l)
                if (!(read.mask >> l & 1)) read.at[l] = read.at[read.first()];
    }
    if (read.mask) check_global(w, read, in.b, false, size);
    check_shared(w, *w.cta, to, in.b, SharedMemory::Access::async_write);
    for_each_lane(m, [&](int l) {
        w.copies.push_back({w.issued_copies[static_cast<size_t>(l)]++,
                            reinterpret_cast<const uint8_t*>(from.at[l]),
                            static_cast<uint32_t>(to.at[l]), w.committed[l],
                            static_cast<uint8_t>(l), in.b,
                            static_cast<uint8_t>(size ? size[l] : in.b)});
    });
}

void decode_copy(Decode& d) {
    const bool cg = d.take_one({"ca", "cg"}, 0) == 1;
    if (!d.take("shared") && !d.take("shared::cta")) d.unknown();
    if (!d.take("global")) d.unknown();
    const bool hint = d.take_prefix("L2::cache_hint");
    d.take_prefix("L2::");
    const Address to = d.address(0), from = d.address(1);
    const int64_t bytes = d.immediate(2);
    if (bytes != 16 && (cg || (bytes != 4 && bytes != 8))) d.unknown("size");
    uint32_t size = kNone;
    if (d.count() > 3u + hint) {
        const Operand& o = d.operand(3);
        if (d.is_predicate(o)) {
            // ignore-src: no bytes are read where the predicate holds
            const uint32_t p = d.src(o, Type::pred);
            size = d.temporary();
            d.emit_internal(lanes([](Pred ignore, uint32_t n) { return ignore.value ? 0u : n; }),
                            {size, p, d.constant(static_cast<uint64_t>(bytes), false)});
        } else {
            size = d.src(o, Type::u32);
        }
    }
    d.note_shared_width(static_cast<int>(bytes));
    Instr& in = d.emit(copy, Class::copy, {to.row, from.row, size});
    in.imm = to.offset;
    in.target = static_cast<uint32_t>(from.offset);
    in.a = static_cast<uint8_t>((to.wide ? 1 : 0) | (from.wide ? 2 : 0));
    in.b = static_cast<uint8_t>(bytes);
}

// Those copies of a warp that `lands` picks.
template <class F>
void land(Warp& w, F lands) {
    SharedMemory& shared = w.cta->shared;
    auto keep = w.copies.begin();
    for (AsyncCopy& c : w.copies) {
        if (!lands(c)) {
            *keep++ = c;
            continue;
        }
        uint8_t* to = shared.data() + c.destination;
        std::memcpy(to, c.source, c.source_bytes);
        std::memset(to + c.source_bytes, 0, c.bytes - c.source_bytes);
        shared.land(w.agent, c.lane, c.destination, c.bytes);
    }
    w.copies.erase(keep, w.copies.end());
}

void commit(Warp& w, const Instr&, Mask m) {
    for_each_lane(m, [&](int l) { ++w.committed[static_cast<size_t>(l)]; });
}

// in.imm: groups that may stay under way; -1 for wait_all, which also waits for copies not
// committed.
void wait(Warp& w, const Instr& in, Mask m) {
    land(w, [&](const AsyncCopy& c) {
        if (!(m >> c.lane & 1)) return false;
        return in.imm < 0 ||
               static_cast<int64_t>(c.group) + in.imm < static_cast<int64_t>(w.committed[c.lane]);
    });
}

void decode_async(Decode& d) {
    const auto& mods = d.st.mods;
    if (std::find(mods.begin(), mods.end(), "bulk") != mods.end()) return decode_bulk(d);
    if (!d.take("async")) d.unknown();
    d.consumes();
    if (d.st.mods.size() > 1 && d.st.mods[1] == "mbarrier") {
        decode_cp_async_mbarrier(d);
    } else if (d.take("commit_group")) {
        d.emit(commit, Class::copy);
    } else if (d.take("wait_group")) {
        const int64_t n = d.immediate(0);
        d.emit(wait, Class::copy).imm = n;
    } else if (d.take("wait_all")) {
        d.emit(wait, Class::copy).imm = -1;
    } else {
        decode_copy(d);
    }
}

}  // namespace

void Warp::land_copies(int lane, uint32_t count) {
    land(*this, [&](const AsyncCopy& c) { return c.lane == lane && c.number < count; });
}

const Isa& isa_async() {
    static const Isa isa = {{"cp", decode_async}};
    return isa;
}

}  // namespace emu
