// mma.sync, ldmatrix, stmatrix, movmatrix; the arithmetic and the layouts are in mma.cpp.

#include <algorithm>

#include "access.h"
#include "decode.h"
#include "lanes.h"
#include "mma.h"

namespace emu {
namespace {

// False: the group waits for the rest of its warp.
bool whole_warp(Warp& w, Mask m) {
    if (w.live != kAllLanes)
        fault("wrong lane mask", "this instruction needs all 32 lanes, some have exited");
    if (!w.converged(kAllLanes, "wrong lane mask")) return false;
    if (m != kAllLanes)
        fault("wrong lane mask", "this instruction needs all 32 lanes, here are " + hex(m));
    return true;
}

struct MmaCode {
    MmaOp op;
    MmaTraits traits;
};

// list: a, b, c, d registers; 64-bit (f64) operands are split into halves around the call.
void mma(Warp& w, const Instr& in, Mask m) {
    if (!whole_warp(w, m)) return;
    const auto& code = *reinterpret_cast<const MmaCode*>(in.imm);
    const MmaTraits& t = code.traits;
    uint32_t a[16][32], b[8][32], c[8][32];
    const uint32_t* list = in.list;
    auto gather = [&](uint32_t (*to)[32], int regs, bool wide) {
        for (int r = 0; r < regs; r += wide ? 2 : 1, ++list) {
            if (!wide) {
                std::memcpy(to[r], w.row<uint32_t>(*list), sizeof to[r]);
                continue;
            }
            const auto* from = w.row<uint64_t>(*list);
            for (int l = 0; l < kLanes; ++l)
                to[r][l] = static_cast<uint32_t>(from[l]),
                to[r + 1][l] = static_cast<uint32_t>(from[l] >> 32);
        }
    };
    const bool wide = code.op.a == MmaType::f64;
    gather(a, t.a_regs, wide);
    gather(b, t.b_regs, wide);
    gather(c, t.c_regs, wide);
    mma_sync(code.op, a, b, c, c);
    for (int r = 0; r < t.c_regs; r += wide ? 2 : 1, ++list) {
        if (!wide) {
            std::memcpy(w.row<uint32_t>(*list), c[r], sizeof c[r]);
            continue;
        }
        auto* to = w.row<uint64_t>(*list);
        for (int l = 0; l < kLanes; ++l) to[l] = uint64_t{c[r + 1][l]} << 32 | c[r][l];
    }
}

void decode_mma(Decode& d) {
    d.crosses_lanes();
    MmaOp op{};
    std::vector<MmaType> types;
    for (const std::string& mod : d.st.mods) {
        int m = 0, n = 0, k = 0;
        if (std::sscanf(mod.c_str(), "m%dn%dk%d", &m, &n, &k) == 3 && n == 8)
            op.m = m, op.k = k;
        else if (auto t = mma_type(mod))
            types.push_back(*t);
        else if (mod == "satfinite")
            op.satfinite = true;
        else if (mod == "and")
            op.and_popc = true;
        else if (mod != "sync" && mod != "aligned" && mod != "row" && mod != "col" &&
                 mod != "xor" && mod != "popc")
            d.unknown("modifier ." + mod);
    }
    for (const std::string& mod : d.st.mods) d.take(mod);
    if (types.size() != 4) d.unknown("four types expected");
    op.acc = types[0], op.a = types[1], op.b = types[2];
    const auto traits = mma_traits(op);
    if (!traits || types[3] != types[0]) d.unknown("no such mma shape");
    if (d.device().capability < traits->min_sm)
        d.unknown("needs sm_" + std::to_string(traits->min_sm));
    op.capability = d.device().capability;
    const bool wide = op.a == MmaType::f64;
    const Type reg = wide ? Type::f64 : Type::b32;
    std::vector<uint32_t> rows;
    for (size_t i : {1, 2, 3, 0}) {
        const auto part = i ? d.sources(d.operand(i), reg) : d.results(d.operand(i), reg);
        const int expected = i == 1 ? traits->a_regs : i == 2 ? traits->b_regs : traits->c_regs;
        if (static_cast<int>(part.size()) != (wide ? expected / 2 : expected))
            d.unknown("register count");
        rows.insert(rows.end(), part.begin(), part.end());
    }
    static std::vector<std::unique_ptr<MmaCode>> codes;
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    codes.push_back(std::make_unique<MmaCode>(MmaCode{op, *traits}));
    const uint32_t* list = d.list(rows);
    Instr& in = d.emit(mma, Class::mma);
    in.list = list;
    in.imm = reinterpret_cast<int64_t>(codes.back().get());
}

// op: address; list: in.b rows; in.a: wide address; in.c: .trans
template <bool Store>
void matrix(Warp& w, const Instr& in, Mask m) {
    if (!whole_warp(w, m)) return;
    // Lanes 8i..8i+7 give the rows of matrix i; the others' addresses are not used.
    const Mask used = in.b == 4 ? kAllLanes : (1u << (8 * in.b)) - 1;
    const LaneAddresses a = lane_addresses(w, in.op[0], in.a, in.imm, used);
    LaneAddresses shared = a;
    if (window_of(a.at[0]) == kSharedWindow)
        for (uint64_t& at : shared.at) at -= kSharedWindow;
    by_cta(w, Space::shared, LaneAddresses(shared), false,
           [&](Cta&, const LaneAddresses& offsets) { shared = offsets; });
    check_shared(w, *w.cta, shared, 16,
                 Store ? SharedMemory::Access::write : SharedMemory::Access::read);
    uint8_t* rows[kLanes];
    for (int l = 0; l < kLanes; ++l) rows[l] = w.cta->shared.data() + shared.at[l];
    uint32_t r[4][32];
    if constexpr (Store) {
        for (int i = 0; i < in.b; ++i) std::memcpy(r[i], w.row<uint32_t>(in.list[i]), sizeof r[i]);
        stmatrix(rows, in.b, in.c, r);
    } else {
        ldmatrix(rows, in.b, in.c, r);
        for (int i = 0; i < in.b; ++i) std::memcpy(w.row<uint32_t>(in.list[i]), r[i], sizeof r[i]);
    }
}

template <bool Store>
void decode_matrix(Decode& d) {
    d.crosses_lanes();
    d.consumes();
    d.take("sync");
    d.take("aligned");
    if (!d.take("m8n8")) d.unknown("shape");
    static constexpr int counts[] = {1, 2, 4};
    const int which = d.take_one({"x1", "x2", "x4"}, -1);
    if (which < 0) d.unknown("count");
    const bool trans = d.take("trans");
    d.take("shared") || d.take("shared::cta");
    if (!d.take("b16")) d.unknown("type");
    if (Store && d.device().capability < 90) d.unknown("stmatrix needs sm_90");
    const Address a = d.address(Store ? 0 : 1);
    const auto rows =
        Store ? d.sources(d.operand(1), Type::b32) : d.results(d.operand(0), Type::b32);
    if (static_cast<int>(rows.size()) != counts[which]) d.unknown("register count");
    d.note_shared_width(16);
    const uint32_t* list = d.list(rows);
    Instr& in = d.emit(matrix<Store>, Class::shared, {a.row});
    in.list = list;
    in.imm = a.offset;
    in.a = a.wide;
    in.b = static_cast<uint8_t>(counts[which]);
    in.c = trans;
}

// movmatrix: an 8x8 matrix of 16-bit elements transposed between the lanes.
void movmatrix(Warp& w, const Instr& in, Mask m) {
    if (!whole_warp(w, m)) return;
    uint8_t image[8][16];
    uint8_t* rows[kLanes] = {};
    for (int r = 0; r < 8; ++r) rows[r] = image[r];
    uint32_t value[1][32];
    std::memcpy(value[0], w.row<uint32_t>(in.op[1]), sizeof value[0]);
    stmatrix(rows, 1, false, value);
    ldmatrix(rows, 1, true, value);
    std::memcpy(w.row<uint32_t>(in.op[0]), value[0], sizeof value[0]);
}

void decode_movmatrix(Decode& d) {
    d.crosses_lanes();
    for (const char* mod : {"sync", "aligned", "m8n8", "trans", "b16"})
        if (!d.take(mod)) d.unknown();
    const uint32_t a = d.src(1, Type::b32);
    d.emit(movmatrix, Class::shared, {d.dst(0, Type::b32), a});
}

}  // namespace

const Isa& isa_mma() {
    static const Isa isa = {{"mma", decode_mma},
                            {"ldmatrix", decode_matrix<false>},
                            {"stmatrix", decode_matrix<true>},
                            {"movmatrix", decode_movmatrix}};
    return isa;
}

}  // namespace emu
