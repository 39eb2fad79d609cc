// cp.async.bulk, cp.async.bulk.tensor and cp.reduce.async.bulk: copies of the asynchronous proxy.
//
// A copy into shared memory is checked when it is issued; its bytes and the word to its mbarrier
// land together, later. One out of shared memory takes the bytes when it is issued, as what would
// change them under way is reported, and writes them when it was waited for.

#include <algorithm>
#include <memory>

#include "access.h"
#include "atomics.h"
#include "decode.h"
#include "lanes.h"
#include "tma.h"

namespace emu {
namespace {

struct Place {  // an address operand
    const uint32_t* row = nullptr;
    bool wide = true;
    int64_t offset = 0;
    uint64_t of(Warp& w, int lane) const {
        const uint64_t base = wide ? w.row<uint64_t>(*row)[lane] : w.row<uint32_t>(*row)[lane];
        return wide ? base + static_cast<uint64_t>(offset)
                    : static_cast<uint32_t>(base + static_cast<uint64_t>(offset));
    }
};

// What the operands of a statement are. Rows are kept by where they stand in a list of the
// program's, as those of constants are settled last.
struct BulkCode {
    Place to, from, barrier;  // the map of a tensor is in `from` of a load, in `to` of a store
    const uint32_t* size = nullptr;
    const uint32_t* mask = nullptr;  // multicast
    int rank = 0;                    // of the tensor, 0: plain bytes
    const uint32_t* coordinates = nullptr;
    Reduction reduce = nullptr;
    uint8_t op = 0;
};

const BulkCode& code_of(const Instr& in) { return *reinterpret_cast<const BulkCode*>(in.imm); }

// An offset into the CTA of a .shared::cluster address, aligned, with `bytes` bytes behind it.
uint32_t offset_in(const Cta& cta, uint64_t address, uint32_t bytes, uint32_t alignment, int lane) {
    const auto offset = static_cast<uint32_t>(address & kOffsetMask);
    if (offset % alignment)
        fault(
            "misaligned access",
            "shared address " + hex(address) + " is not a multiple of " + std::to_string(alignment),
            lane);
    if (address >> 32 || uint64_t{offset} + bytes > const_cast<Cta&>(cta).shared.size())
        fault("out of bounds",
              std::to_string(bytes) + " bytes at shared address " + hex(address) +
                  "; the CTA has " + std::to_string(const_cast<Cta&>(cta).shared.size()),
              lane);
    return offset;
}

Cta& own(Warp& w, uint64_t address, int lane) {
    if (address >> kRankShift != w.cta->rank)
        fault("out of bounds",
              "shared address " + hex(address) + " is not of this CTA, of rank " +
                  std::to_string(w.cta->rank),
              lane);
    return *w.cta;
}

uint32_t size_of(Warp& w, const BulkCode& code, uint64_t global, int lane) {
    const uint32_t bytes = w.row<uint32_t>(*code.size)[lane];
    if (bytes == 0 || bytes % 16)
        fault("bad bulk copy", std::to_string(bytes) + " bytes, must be a multiple of 16", lane);
    if (global % 16)
        fault("misaligned access", "address " + hex(global) + " is not a multiple of 16", lane);
    return bytes;
}

Tile tile_of(Warp& w, const BulkCode& code, const Place& map_at, int lane) {
    const uint64_t address = map_at.of(w, lane);
    if (address % 64)
        fault("misaligned access", "tensor map at " + hex(address) + ", must be a multiple of 64",
              lane);
    if (!w.launch->find(address, sizeof(TensorMap), w.region_hint))
        w.launch->out_of_bounds(address, sizeof(TensorMap), "read", lane);
    const auto map = decode_tensor_map(reinterpret_cast<const void*>(address));
    if (!map) fault("bad tensor map", "no tensor map at " + hex(address), lane);
    if (map->rank != code.rank)
        fault("bad tensor map",
              "the map has " + std::to_string(map->rank) + " dimensions, the instruction " +
                  std::to_string(code.rank),
              lane);
    int32_t at[5];
    for (int i = 0; i < code.rank; ++i)
        at[i] = static_cast<int32_t>(w.row<uint32_t>(code.coordinates[i])[lane]);
    return make_tile(*map, at);
}

void check_tile_in_global(Warp& w, const Tile& tile, bool write, int lane) {
    for (uint32_t row = 0; row < tile.rows; ++row)
        if (const RowPart part = row_part(tile, row); part.bytes)
            check_global_range(w, part.global, part.bytes, write, lane);
}

// Calls f(address, bytes) for what a tile takes of shared memory: all of it at once, as a rule.
template <class F>
void for_each_range(const Tile& t, uint32_t address, F f) {
    if (t.pitch == t.row_bytes) return f(address, t.span());
    for (uint32_t row = 0; row < t.rows; ++row)
        for (uint32_t at = 0; at < t.row_bytes; at += 16)
            f(swizzled(t.map.swizzle, address + row * t.pitch + at), 16);
}

// ---- into shared memory -----------------------------------------------------------------------

// Bytes that go to one place in each of several CTAs.
void load_into(Warp& w, const BulkCode& code, int lane, uint32_t alignment, uint32_t span,
               uint32_t bytes, std::shared_ptr<Tile> tile, const uint8_t* source) {
    const uint64_t to = code.to.of(w, lane), barrier = code.barrier.of(w, lane);
    uint32_t ranks = 1u << (to >> kRankShift & 31);
    if (code.mask)
        ranks = w.row<uint32_t>(*code.mask)[lane] & 0xffff;
    else if (to >> kRankShift != barrier >> kRankShift)
        fault("mbarrier misuse",
              "the copy goes to CTA rank " + std::to_string(to >> kRankShift) +
                  ", its mbarrier is of rank " + std::to_string(barrier >> kRankShift),
              lane);
    for (; ranks; ranks &= ranks - 1) {
        Cta& cta = cta_of_rank(w, static_cast<uint32_t>(std::countr_zero(ranks)), lane);
        const uint32_t at = offset_in(cta, to, span, alignment, lane);
        const uint32_t signal = offset_in(cta, barrier, 8, 8, lane);
        const int engine = cta.mbarrier(w, signal, lane).engine;
        auto each = [&](auto f) { tile ? for_each_range(*tile, at, f) : f(at, bytes); };
        each([&](uint32_t from, uint32_t n) {
            cta.shared.bulk_write(w.agent, lane, engine, from, n);
        });
        w.cta->cluster->defer(w, &cta, [&cta, at, signal, engine, bytes, tile, source] {
            auto landed = [&](uint32_t from, uint32_t n) { cta.shared.bulk_land(engine, from, n); };
            if (tile) {
                load_tile(*tile, cta.shared.data(), at);
                for_each_range(*tile, at, landed);
            } else {
                std::memcpy(cta.shared.data() + at, source, bytes);
                landed(at, bytes);
            }
            cta.mbarrier_complete(signal, engine, bytes);
        });
    }
}

void load(Warp& w, const Instr& in, Mask m) {
    const BulkCode& code = code_of(in);
    for_each_lane(m, [&](int l) {
        ++w.counters->read_requests;
        if (code.rank) {
            auto tile = std::make_shared<Tile>(tile_of(w, code, code.from, l));
            check_tile_in_global(w, *tile, false, l);
            const uint32_t span = tile->span(), bytes = tile->bytes();
            return load_into(w, code, l, 128, span, bytes, std::move(tile), nullptr);
        }
        const uint64_t from = code.from.of(w, l);
        const uint32_t bytes = size_of(w, code, from, l);
        check_global_range(w, from, bytes, false, l);
        load_into(w, code, l, 16, bytes, bytes, nullptr, reinterpret_cast<const uint8_t*>(from));
    });
}

// ---- out of shared memory -----------------------------------------------------------------------

// Where a warp's bulk copies out of shared memory are counted: an agent of the clocks.
int reader_of(const Warp& w) {
    return w.cta->cluster->clocks.first_reader(static_cast<int>(w.cta->rank)) + w.index;
}

// Do all lanes ask for the same? Then it is one copy.
bool uniform(Warp& w, const BulkCode& code, Mask m) {
    const int first = std::countr_zero(m);
    bool same = true;
    for_each_lane(m, [&](int l) {
        same &= code.to.of(w, l) == code.to.of(w, first);
        same &= code.from.of(w, l) == code.from.of(w, first);
        if (code.size) same &= w.row<uint32_t>(*code.size)[l] == w.row<uint32_t>(*code.size)[first];
        for (int i = 0; i < code.rank; ++i)
            same &= w.row<uint32_t>(code.coordinates[i])[l] ==
                    w.row<uint32_t>(code.coordinates[i])[first];
    });
    return same;
}

void write_global(Launch& launch, uint64_t to, const uint8_t* from, uint32_t bytes,
                  Reduction reduce, uint8_t op) {
    if (reduce)
        reduce(op, reinterpret_cast<void*>(to), from, bytes);
    else
        std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    size_t hint = 0;
    if (Region* r = launch.find(to, bytes, hint); r && r->valid)
        std::memset(r->valid.get() + (to - r->base), 1, bytes);
}

void store(Warp& w, const Instr& in, Mask m) {
    const BulkCode& code = code_of(in);
    if (uniform(w, code, m)) m = m & (0 - m);
    Launch& launch = *w.launch;
    for_each_lane(m, [&](int l) {
        const uint64_t from = code.from.of(w, l);
        Cta& cta = own(w, from, l);
        const int reader = reader_of(w);
        const uint32_t number = cta.cluster->clocks.next_operation(reader);
        ++w.counters->write_requests;
        std::function<void()> land;
        if (code.rank) {
            auto tile = std::make_shared<Tile>(tile_of(w, code, code.to, l));
            const uint32_t at = offset_in(cta, from, tile->span(), 128, l);
            check_tile_in_global(w, *tile, true, l);
            for_each_range(*tile, at, [&](uint32_t address, uint32_t bytes) {
                cta.shared.async_read(w.agent, l, w.index, number, address, bytes);
            });
            auto bytes = std::make_shared<std::vector<uint8_t>>(tile->bytes());
            gather_tile(*tile, cta.shared.data(), at, bytes->data());
            land = [&launch, tile, bytes, reduce = code.reduce, op = code.op] {
                for (uint32_t row = 0; row < tile->rows; ++row)
                    if (const RowPart part = row_part(*tile, row); part.bytes)
                        write_global(launch, part.global,
                                     bytes->data() + row * tile->row_bytes + part.skip, part.bytes,
                                     reduce, op);
            };
        } else {
            const uint64_t to = code.to.of(w, l);
            const uint32_t size = size_of(w, code, to, l);
            const uint32_t at = offset_in(cta, from, size, 16, l);
            check_global_range(w, to, size, true, l);
            cta.shared.async_read(w.agent, l, w.index, number, at, size);
            const uint8_t* data = cta.shared.data() + at;
            auto bytes = std::make_shared<std::vector<uint8_t>>(data, data + size);
            land = [&launch, to, bytes, size, reduce = code.reduce, op = code.op] {
                write_global(launch, to, bytes->data(), size, reduce, op);
            };
        }
        w.bulk_stores.push_back({w.bulk_committed[static_cast<size_t>(l)], number,
                                 static_cast<uint8_t>(l), false, std::move(land)});
    });
}

// Shared memory of this CTA to that of any CTA of the cluster.
void copy_shared(Warp& w, const Instr& in, Mask m) {
    const BulkCode& code = code_of(in);
    for_each_lane(m, [&](int l) {
        const uint64_t from = code.from.of(w, l), to = code.to.of(w, l);
        const uint64_t barrier = code.barrier.of(w, l);
        Cta& source = own(w, from, l);
        const uint32_t bytes = size_of(w, code, 0, l);
        const uint32_t source_at = offset_in(source, from, bytes, 16, l);
        if (to >> kRankShift != barrier >> kRankShift)
            fault("mbarrier misuse", "the copy and its mbarrier are in different CTAs", l);
        Cta& target = cta_of_rank(w, static_cast<uint32_t>(to >> kRankShift), l);
        const uint32_t at = offset_in(target, to, bytes, 16, l);
        const uint32_t signal = offset_in(target, barrier, 8, 8, l);
        const int engine = target.mbarrier(w, signal, l).engine;
        const int reader = reader_of(w);
        const uint32_t number = w.cta->cluster->clocks.next_operation(reader);
        source.shared.async_read(w.agent, l, w.index, number, source_at, bytes);
        const uint8_t* data = source.shared.data() + source_at;
        auto copy = std::make_shared<std::vector<uint8_t>>(data, data + bytes);
        if (!code.reduce) target.shared.bulk_write(w.agent, l, engine, at, bytes);
        w.cta->cluster->defer(
            w, &target, [&target, at, signal, engine, bytes, copy, reader, number, &code] {
                uint8_t* destination = target.shared.data() + at;
                if (code.reduce)
                    code.reduce(code.op, destination, copy->data(), bytes);
                else
                    std::memcpy(destination, copy->data(), bytes);
                target.shared.bulk_land(engine, at, bytes, code.reduce != nullptr);
                if (auto found = target.mbarriers.find(signal); found != target.mbarriers.end())
                    target.cluster->clocks.reader_over(reader, number, found->second.clock);
                target.mbarrier_complete(signal, engine, bytes);
            });
    });
}

void commit(Warp& w, const Instr&, Mask m) {
    for_each_lane(m, [&](int l) { ++w.bulk_committed[static_cast<size_t>(l)]; });
}

// in.imm: groups that may stay under way; in.a: .read, their sources alone must have been read
void wait(Warp& w, const Instr& in, Mask m) {
    constexpr size_t kKept = 32;  // copies whose sources were read: older ones may land any time
    auto over = [&](const BulkStore& s) {
        return (m >> s.lane & 1) && int64_t{s.group} + in.imm < int64_t{w.bulk_committed[s.lane]};
    };
    Clocks& clocks = w.cta->cluster->clocks;
    const int reader = reader_of(w);
    uint32_t first_left = clocks.issued(reader) + 1;
    size_t read = 0;
    for (BulkStore& s : w.bulk_stores) {
        s.read_over |= over(s);
        if (!s.read_over) first_left = std::min(first_left, s.number);
        read += s.read_over;
    }
    clocks.retire(w.agent, reader, first_left - 1);
    auto keep = w.bulk_stores.begin();
    for (BulkStore& s : w.bulk_stores) {
        const bool lands = in.a ? s.read_over && read > kKept : over(s);
        if (lands) {
            s.land();
            --read;
        } else {
            if (&*keep != &s) *keep = std::move(s);
            ++keep;
        }
    }
    w.bulk_stores.erase(keep, w.bulk_stores.end());
}

void prefetch(Warp& w, const Instr& in, Mask m) {
    const BulkCode& code = code_of(in);
    for_each_lane(m, [&](int l) {
        if (code.rank)
            tile_of(w, code, code.from, l);
        else
            size_of(w, code, code.from.of(w, l), l);
    });
}

// ---- decoding -----------------------------------------------------------------------------------

Place place(Decode& d, const Operand& o) {
    const Address a = d.address(o);
    return {d.list(std::vector{a.row}), a.wide, a.offset};
}

void take_reduction(Decode& d, BulkCode& code) {
    const int op = d.take_one({"add", "min", "max", "inc", "dec", "and", "or", "xor"}, -1);
    if (op < 0) d.unknown("no operation");
    code.op = static_cast<uint8_t>(op);
    d.take("noftz");
    if (code.rank) return;  // the type is the map's
    code.reduce = find_reduction(code.op, d.take_type());
    if (!code.reduce) d.unknown("operation on this type");
}

// The elements of a map as a type to reduce; its integers are 8 to 64 bits.
struct MapReduction {
    TensorType map;
    Type type;
};
constexpr MapReduction kMapReductions[] = {
    {TensorType::u32, Type::u32}, {TensorType::s32, Type::s32},   {TensorType::u64, Type::u64},
    {TensorType::s64, Type::s64}, {TensorType::f16, Type::f16},   {TensorType::f32, Type::f32},
    {TensorType::f64, Type::f64}, {TensorType::bf16, Type::bf16}, {TensorType::f32_ftz, Type::f32}};

// cp.reduce.async.bulk.tensor: the type is known when the map is.
void reduce_tensor(Warp& w, const Instr& in, Mask m) {
    BulkCode code = code_of(in);
    const Tile tile = tile_of(w, code, code.to, std::countr_zero(m));
    for (auto [map, type] : kMapReductions) {
        if (map != tile.map.type) continue;
        const bool bitwise = code.op == kAnd || code.op == kOr || code.op == kXor;
        const Type unsigned_type = bits_of(type) == 64 ? Type::b64 : Type::b32;
        code.reduce = find_reduction(code.op, bitwise ? unsigned_type : type);
    }
    if (!code.reduce) fault("bad tensor map", "no such reduction of the map's elements");
    Instr typed = in;
    typed.imm = reinterpret_cast<int64_t>(&code);
    store(w, typed, m);
}

}  // namespace

void decode_bulk(Decode& d) {
    if (d.device().capability < 90) d.unknown("needs sm_90");
    d.consumes();
    d.note_async();
    const bool reduces = d.take("reduce");
    d.take("async");
    d.take("bulk");
    if (d.take("commit_group")) {
        d.emit(commit, Class::copy);
        return;
    }
    if (d.take("wait_group")) {
        const bool read = d.take("read");
        const int64_t n = d.immediate(0);
        Instr& in = d.emit(wait, Class::copy);
        in.imm = n;
        in.a = read;
        return;
    }
    const bool prefetches = d.take("prefetch");
    static std::vector<std::unique_ptr<BulkCode>> codes;
    static std::mutex mutex;
    auto owned = std::make_unique<BulkCode>();
    BulkCode& code = *owned;
    if (d.take("tensor")) code.rank = d.take_one({"1d", "2d", "3d", "4d", "5d"}, -1) + 1;
    if (code.rank) d.take("tile");
    if (prefetches && !d.take("L2")) d.unknown("prefetch to L2 alone");
    // In the order of the text: destination, source.
    std::vector<std::string> spaces;
    for (const std::string& mod : d.st.mods)
        if (mod == "global" || mod == "shared::cta" || mod == "shared::cluster") {
            spaces.push_back(mod);
            d.take(mod);
        }
    if (spaces.size() != (prefetches ? 1u : 2u)) d.unknown("state spaces");
    const bool to_global = spaces[0] == "global", from_global = spaces.back() == "global";
    if (!prefetches && to_global == from_global && to_global) d.unknown("state spaces");
    const bool multicast = d.take("multicast::cluster");
    const bool hint = d.take("L2::cache_hint");
    const bool has_barrier = d.take("mbarrier::complete_tx::bytes");
    const bool in_group = d.take("bulk_group");
    if (!prefetches && (has_barrier == to_global || in_group != to_global)) d.unknown("completion");
    if (reduces) take_reduction(d, code);

    size_t at = 0;
    auto tensor = [&](const Operand& o) {
        Place map = place(d, o);
        if (o.items.size() != 2) d.unknown("[map, {coordinates}] expected");
        const auto rows = d.sources(o.items[1], Type::u32);
        if (static_cast<int>(rows.size()) != code.rank) d.unknown("number of coordinates");
        code.coordinates = d.list(rows);
        return map;
    };
    if (!prefetches) {
        const Operand& to = d.operand(at++);
        code.to = code.rank && to_global ? tensor(to) : place(d, to);
    }
    const Operand& from = d.operand(at++);
    code.from = code.rank && from_global ? tensor(from) : place(d, from);
    if (!code.rank) code.size = d.list(std::vector{d.src(at++, Type::u32)});
    if (has_barrier) code.barrier = place(d, d.operand(at++));
    if (multicast) code.mask = d.list(std::vector{d.src(at++, Type::u16)});
    if (d.count() != at + hint) d.unknown("number of operands");

    const bool tensor_reduction = reduces && code.rank;
    Instr& in = d.emit(prefetches         ? prefetch
                       : tensor_reduction ? reduce_tensor
                       : to_global        ? store
                       : from_global      ? load
                                          : copy_shared,
                       Class::copy);
    in.imm = reinterpret_cast<int64_t>(owned.get());
    std::lock_guard lock(mutex);
    codes.push_back(std::move(owned));
}

}  // namespace emu
