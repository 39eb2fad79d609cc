// wgmma: the instructions of a warpgroup. The arithmetic is in wgmma.cpp, which registers may be
// touched meanwhile in hazards.cpp.
//
// Each warp does its 16 rows when it issues the instruction; operands in shared memory are marked
// as being read, and registers as in use, until it was waited for, so that nobody can tell that the
// result is there early. The wait of one warp is for all four: it lets one of them release a stage.

#include <algorithm>

#include "access.h"
#include "decode.h"
#include "hazards.h"
#include "lanes.h"
#include "wgmma.h"

namespace emu {
namespace {

struct WgmmaCode {
    WgmmaOp op;
    bool a_in_registers, transpose_a, transpose_b;
    uint32_t d_regs;
};

const WgmmaCode& code_of(const Instr& in) { return *reinterpret_cast<const WgmmaCode*>(in.imm); }

constexpr int kWarps = 4;  // of a warpgroup

// False: the group waits for the rest of its warp.
bool whole_warp(Warp& w, Mask m) {
    if (w.live != kAllLanes)
        fault("wrong lane mask", "this instruction needs all 32 lanes, some have exited");
    if (!w.converged(kAllLanes, "wrong lane mask")) return false;
    if (m != kAllLanes)
        fault("wrong lane mask", "this instruction needs all 32 lanes, here are " + hex(m));
    return true;
}

std::span<Warp> warpgroup_of(Warp& w) {
    const size_t first = static_cast<size_t>(w.index / kWarps * kWarps);
    if (first + kWarps > w.cta->warps.size())
        fault("wrong lane mask", "wgmma needs a warpgroup: four warps, from a multiple of four on");
    return std::span(w.cta->warps).subspan(first, kWarps);
}

// The clocks' agent for what a warpgroup's wgmma read.
int reader_of(const Warp& w) {
    const Clocks& clocks = w.cta->cluster->clocks;
    return clocks.first_reader(static_cast<int>(w.cta->rank)) + clocks.warps_per_cta() +
           w.index / kWarps;
}

uint64_t uniform(Warp& w, uint32_t row, const char* what) {
    const auto* lanes = w.row<uint64_t>(row);
    for (int l = 1; l < kLanes; ++l)
        if (lanes[l] != lanes[0])
            fault("bad wgmma", std::string(what) + " differs between the lanes of the warp", l);
    return lanes[0];
}

struct Reading {
    Warp& w;
    int reader;  // of the CTA, from 0
    uint32_t number;
    bool marks;  // else another warp has marked the same bytes
};

WgmmaDescriptor descriptor_of(uint64_t bits) {
    const WgmmaDescriptor d(bits);
    if (d.base_offset) fault("not modelled", "a matrix descriptor with a base offset");
    // Rows of a swizzled atom start a pattern of 8 rows.
    const uint32_t pattern = d.span() * 8;
    if (d.mode && ((d.start & ~127u) % pattern >= 128 || d.start % d.span() % 16))
        fault("misaligned access", "matrix descriptor with start " + hex(d.start) +
                                       ": a swizzle of " + std::to_string(d.span()) +
                                       " bytes starts at multiples of " + std::to_string(pattern));
    return d;
}

// Pages of shared memory, each once.
void add_pages(std::vector<uint32_t>& pages, uint32_t first, uint32_t last) {
    for (uint32_t p = SharedMemory::page(first); p <= SharedMemory::page(last); ++p)
        if (std::find(pages.begin(), pages.end(), p) == pages.end()) pages.push_back(p);
}

// Rows 8 * first ... 8 * end - 1 of a matrix in shared memory, as numbers [k][rows]; null: only
// checks. `pages`: gets those that it lies in.
void read_matrix(const Reading& r, const WgmmaDescriptor& d, MmaType type, bool transpose,
                 uint32_t first, uint32_t end, double* out, std::vector<uint32_t>* pages) {
    SharedMemory& shared = r.w.cta->shared;
    alignas(64) uint32_t words[256 * kWgmmaBytes / 4];
    auto* bytes = reinterpret_cast<uint8_t*>(words);
    uint32_t* marks = r.marks ? shared.marks_of(r.reader) : nullptr;
    const uint32_t groups = end - first;
    if (pages) pages->clear();
    for (uint32_t g = 0; g < groups; ++g) {
        uint32_t at[16];
        transpose ? d.mn_major(first + g, at) : d.k_major(first + g, at);
        const uint32_t low = *std::min_element(at, at + 16);
        const uint32_t high = *std::max_element(at, at + 16) + 15;
        if (high >= shared.size())
            fault("out of bounds", "matrix at shared address " + hex(high - 15) + "; the CTA has " +
                                       std::to_string(shared.size()));
        if (pages) add_pages(*pages, low, high);
        if (!shared.is_checked(r.w.agent, low, high))
            for (uint32_t address : at) shared.check_async_read(r.w.agent, -1, address, 16);
        if (marks)
            for (uint32_t address : at) marks[address >> 4] = r.number;
        if (!out) continue;
        // Row by row; mn-major: k by k, of all groups.
        uint8_t* to = bytes + g * (transpose ? 16 : 16 * 16);
        const uint32_t step = transpose ? groups * 16 : 16;
        for (uint32_t i = 0; i < 16; ++i) std::memcpy(to + i * step, shared.data() + at[i], 16);
    }
    if (!out) return;
    const auto rows = static_cast<int>(groups * 8);
    transpose ? wgmma_unpack_transposed(type, reinterpret_cast<const uint16_t*>(words), rows, out)
              : wgmma_unpack(type, words, rows, out);
}

// op: descriptors of A (if it is in shared memory) and B, scale-d; list: registers of D, then of A
void mma_async(Warp& w, const Instr& in, Mask m) {
    if (!whole_warp(w, m)) return;
    const WgmmaCode& code = code_of(in);
    const std::span<Warp> group = warpgroup_of(w);
    const Mask scale = w.predicate(in.op[2]);
    if (scale != 0 && scale != kAllLanes)
        fault("bad wgmma", "scale-d differs between the lanes of the warp");
    WgmmaState& state = w.wgmma;
    if (!state.fences)
        fault("missing wgmma.fence", "no wgmma.fence before the first wgmma.mma_async");
    begin_wgmma(w, in.list, code.d_regs, code.a_in_registers ? 4 : 0);

    const uint64_t a_bits = code.a_in_registers ? 0 : uniform(w, in.op[0], "the descriptor of A");
    const uint64_t b_bits = uniform(w, in.op[1], "the descriptor of B");
    Clocks& clocks = w.cta->cluster->clocks;
    const int agent = reader_of(w);
    const uint32_t number = state.base + state.issued;
    // B is the same for the four warps: the first one here unpacks it for the others.
    auto& slots = w.cta->wgmma_operands;
    if (slots.empty()) slots.resize((w.cta->warps.size() + 3) / 4);
    WgmmaOperand& b = slots[static_cast<size_t>(w.index / kWarps)][number % kWgmmaSlots];
    const bool first = number > clocks.issued(agent);
    if (first) clocks.next_operation(agent);
    if (!first && b.number == number && (b.a_bits != a_bits || b.b_bits != b_bits))
        fault("bad wgmma", "the warps of a warpgroup give different descriptors");
    if (!first && b.number == number && b.path != state.path)
        fault("bad wgmma",
              "the warps of a warpgroup have not executed the same wgmma.fence, commit_group and "
              "wait_group: conditions around them must be those of all four");
    Reading reading{w, clocks.warps_per_cta() + w.index / kWarps, number, first};
    const WgmmaOp& op = code.op;
    const auto k = static_cast<size_t>(op.k());
    const bool unpacked = b.number == number;
    if (!unpacked) b.values.resize(k * static_cast<size_t>(op.n));
    // The others check it again, each for itself, quickly where that goes by pages.
    const auto is_checked = [&](uint32_t page) { return w.cta->shared.is_checked(w.agent, page); };
    if (!unpacked || !std::all_of(b.pages.begin(), b.pages.end(), is_checked))
        read_matrix(reading, descriptor_of(b_bits), op.b, code.transpose_b, 0,
                    static_cast<uint32_t>(op.n / 8), unpacked ? nullptr : b.values.data(),
                    &b.pages);
    b.number = number, b.a_bits = a_bits, b.b_bits = b_bits, b.path = state.path;

    alignas(64) double a[32 * kWgmmaRows];
    if (code.a_in_registers) {
        uint32_t words[kWgmmaRows * kWgmmaBytes / 4];  // row, then the 8 words of its 32 bytes
        for (int r = 0; r < 4; ++r) {
            const auto* lanes = w.row<uint32_t>(in.list[code.d_regs + static_cast<uint32_t>(r)]);
            for (int row = 0; row < 8; ++row)
                std::memcpy(words + (row + r % 2 * 8) * 8 + r / 2 * 4, lanes + 4 * row, 16);
        }
        wgmma_unpack(op.a, words, kWgmmaRows, a);
    } else {
        reading.marks = true;
        const auto group = static_cast<uint32_t>(w.index % kWarps * kWgmmaRows / 8);
        read_matrix(reading, descriptor_of(a_bits), op.a, code.transpose_a, group, group + 2, a,
                    nullptr);
    }
    if (op.negate)
        for (size_t i = 0; i < k * kWgmmaRows; ++i) a[i] = -a[i];
    uint32_t* d[128];
    for (uint32_t r = 0; r < code.d_regs; ++r) d[r] = w.row<uint32_t>(in.list[r]);
    wgmma_multiply(op, a, b.values.data(), scale == 0, d);
    for (const Warp& other : group)
        if (other.wgmma.waits) return w.cta->cluster->wake(Wait::warpgroup, w.cta, kNone);
}

// An instruction that a warpgroup executes together, though its warps need not meet at it.
void follow(WgmmaState& state, const Instr& in) {
    state.path = (state.path + reinterpret_cast<uintptr_t>(&in)) * 0x9e3779b97f4a7c15;
}

void fence(Warp& w, const Instr& in, Mask m) {
    if (!whole_warp(w, m)) return;
    ++w.wgmma.fences;
    follow(w.wgmma, in);
}

void commit(Warp& w, const Instr& in, Mask m) {
    if (!whole_warp(w, m)) return;
    w.wgmma.groups.push_back(w.wgmma.issued);
    follow(w.wgmma, in);
}

// in.imm: groups that may stay under way
void wait(Warp& w, const Instr& in, Mask m) {
    if (!whole_warp(w, m)) return;
    WgmmaState& s = w.wgmma;
    const auto left = static_cast<size_t>(in.imm);
    if (left == 0 && s.issued > (s.groups.empty() ? s.retired : s.groups.back()))
        fault("bad wgmma", "wait_group 0 with a wgmma.mma_async that no commit_group follows");
    if (s.groups.size() <= left) return follow(s, in);
    const uint32_t over = s.groups[s.groups.size() - 1 - left];
    for (const Warp& other : warpgroup_of(w)) {
        s.waits = other.wgmma.issued < over;
        if (s.waits) return w.block(Wait::warpgroup, 0, true);
    }
    follow(s, in);
    s.retired = std::max(s.retired, over);
    s.is_between = s.retired == s.issued;
    s.groups.erase(s.groups.begin(), s.groups.end() - static_cast<long>(left));
    w.cta->cluster->clocks.retire(w.agent, reader_of(w), s.base + over);
}

bool valid_n(int n, bool integer) {
    if (n < 8 || n > 256 || n % 8) return false;
    return !integer || n == 8 || n == 24 || n % 16 == 0;
}

void decode_mma_async(Decode& d) {
    WgmmaCode code{};
    int m = 0, k = 0;
    std::vector<MmaType> types;
    for (const std::string& mod : d.st.mods) {
        int mm, nn, kk;
        if (std::sscanf(mod.c_str(), "m%dn%dk%d", &mm, &nn, &kk) == 3 && d.take(mod))
            m = mm, code.op.n = nn, k = kk;
        else if (auto t = mma_type(mod); t && types.size() < 3)
            types.push_back(*t);
    }
    if (types.size() != 3) d.unknown("three types expected");
    for (size_t i = 0; i < d.st.mods.size(); ++i)
        if (mma_type(d.st.mods[i])) d.take(d.st.mods[i]);
    code.op.satfinite = d.take("satfinite");
    const MmaType acc = code.op.acc = types[0], a = code.op.a = types[1], b = code.op.b = types[2];
    using enum MmaType;
    const bool integer = a == s8 || a == u8, fp8 = a == e4m3 || a == e5m2;
    const bool wide = a == f16 || a == bf16;
    const bool same = integer ? b == s8 || b == u8 : fp8 ? b == e4m3 || b == e5m2 : a == b;
    const bool fits = integer           ? acc == s32
                      : fp8 || a == f16 ? acc == f32 || acc == f16
                                        : (a == bf16 || a == tf32) && acc == f32;
    if (!same || !fits || m != 64 || k != code.op.k() || !valid_n(code.op.n, integer))
        d.unknown("no such wgmma shape");
    if (code.op.satfinite && !integer) d.unknown("satfinite of integers alone");

    const std::vector<uint32_t> results = d.results(d.operand(0), Type::b32);
    code.d_regs = static_cast<uint32_t>(code.op.n / (acc == f16 ? 4 : 2));
    if (results.size() != code.d_regs) d.unknown("register count");
    std::vector<uint32_t> rows = results;
    uint32_t a_desc = kNone;
    code.a_in_registers = d.operand(1).kind == Operand::Kind::list;
    if (code.a_in_registers) {
        const auto part = d.sources(d.operand(1), Type::b32);
        if (part.size() != 4) d.unknown("register count");
        rows.insert(rows.end(), part.begin(), part.end());
    } else {
        a_desc = d.src(1, Type::b64);
    }
    const uint32_t b_desc = d.src(2, Type::b64);
    const uint32_t scale = d.src(3, Type::pred);
    if (d.is_immediate(3) && d.immediate(3)) d.sources(d.operand(0), Type::b32);
    size_t at = 4;
    auto flag = [&](int64_t low, int64_t high) {
        const int64_t value = d.immediate(at++);
        if (value != low && value != high) d.unknown("immediate");
        return value == high;
    };
    if (!integer) {
        const bool keep_a = flag(-1, 1), keep_b = flag(-1, 1);
        code.op.negate = keep_a != keep_b;
        if (wide) {
            if (!code.a_in_registers) code.transpose_a = flag(0, 1);
            code.transpose_b = flag(0, 1);
        }
    }
    if (d.count() != at) d.unknown("number of operands");

    static std::vector<std::unique_ptr<WgmmaCode>> codes;
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    codes.push_back(std::make_unique<WgmmaCode>(code));
    const uint32_t* list = d.list(rows);
    Instr& in = d.emit(mma_async, Class::mma, {a_desc, b_desc, scale});
    in.list = list;
    in.imm = reinterpret_cast<int64_t>(codes.back().get());
}

void decode_wgmma(Decode& d) {
    d.require_arch_specific();
    d.note_async();
    d.crosses_lanes();
    const int kind = d.take_one({"mma_async", "fence", "commit_group", "wait_group"}, -1);
    if (kind < 0 || !d.take("sync") || !d.take("aligned")) d.unknown();
    if (kind == 0) return decode_mma_async(d);
    const int64_t left = kind == 3 ? d.immediate(0) : 0;
    static constexpr Handler handlers[] = {mma_async, fence, commit, wait};
    d.emit(handlers[kind], Class::sync).imm = left;
}

}  // namespace

std::optional<WgmmaRegisters> wgmma_registers(const Instr& in) {
    if (in.fn != mma_async) return {};
    const WgmmaCode& code = code_of(in);
    return WgmmaRegisters{{in.list, code.d_regs},
                          {in.list + code.d_regs, code.a_in_registers ? size_t{4} : size_t{0}}};
}

WgmmaEvent wgmma_event(const Instr& in) {
    if (in.fn == fence) return WgmmaEvent::fence;
    if (in.fn == wait && in.imm == 0) return WgmmaEvent::wait_all;
    return WgmmaEvent::none;
}

const Isa& isa_wgmma() {
    static const Isa isa = {{"wgmma", decode_wgmma}};
    return isa;
}

}  // namespace emu
