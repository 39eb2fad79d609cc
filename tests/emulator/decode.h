// What the instruction families (isa_*.cpp) use to turn a Statement into Instrs.
//
// A family's decoder takes the modifiers it knows and the operands, and emits a handler. Whatever
// it leaves untaken makes the statement an unknown instruction.
#pragma once

#include <initializer_list>
#include <span>
#include <string_view>
#include <utility>

#include "machine.h"

namespace emu {

class ProgramBuilder;

struct Address {
    uint32_t row = 0;
    bool wide = true;  // 64-bit row
    int64_t offset = 0;
    Space space = Space::generic;  // of the variable it names: param of a kernel, or local for
                                   // function parameters
    bool names_param = false;
};

// How the shared addresses of an operand are written, in a byte of Instr.
enum AddressBits : uint8_t { kWideAddress = 1, kAnyCta = 2, kGeneric = 4 };
struct AddressForm {
    uint8_t bits;
};

class Decode {
  public:
    Decode(ProgramBuilder& builder, const Statement& statement);

    const Statement& st;
    const Device& device() const;
    void require_arch_specific() const;  // sm_90a: compiled for just this device

    bool take(std::string_view mod);
    // Takes the next of `names` that is present and gives its position, or `otherwise`.
    int take_one(std::initializer_list<std::string_view> names, int otherwise);
    Type take_type();  // the next untaken modifier must be a type
    Type take_type_or(Type otherwise);
    bool take_prefix(std::string_view prefix);  // L2::cache_hint, L1::evict_last, ...
    int take_rounding();                        // rn rz rm rp -> fenv mode; absent: FE_TONEAREST

    size_t count() const { return st.operands.size(); }
    const Operand& operand(size_t i) const;
    uint32_t src(size_t i, Type type) { return src(operand(i), type); }
    uint32_t dst(size_t i, Type type) { return dst(operand(i), type); }
    uint32_t src(const Operand& o, Type type);
    uint32_t dst(const Operand& o, Type type);
    bool is_predicate(const Operand& o) const;
    Address address(size_t i) { return address(operand(i)); }
    Address address(const Operand& o);
    const uint32_t* list(std::span<const uint32_t> rows);
    // The elements of a {..} operand, or the operand itself.
    std::vector<uint32_t> sources(const Operand& o, Type type);
    std::vector<uint32_t> results(const Operand& o, Type type);

    uint32_t constant(uint64_t bits, bool wide);
    uint32_t temporary();
    uint32_t special(Special id);
    // An integer operand known at decode time.
    int64_t immediate(size_t i) const;
    bool is_immediate(size_t i) const { return operand(i).kind == Operand::Kind::integer; }

    Instr& emit(Handler fn, Class cls, std::initializer_list<uint32_t> ops = {});
    Instr& emit_internal(Handler fn, std::initializer_list<uint32_t> ops) {
        return emit(fn, Class::internal, ops);
    }
    // Emitted after the statement's own instruction.
    void after(Handler fn, std::initializer_list<uint32_t> ops);
    void branch_to(Instr& in, int statement);  // sets in.target once the layout is known
    void branch_table_entry(Instr& in, int slot, int statement);
    uint32_t function_call(const CallTarget& call, int function);
    const Module& module() const;
    uint32_t local_slot(int variable);
    const Function& function() const;

    // Source registers that must hold a value when this statement runs (addresses, stored data,
    // ...).
    void consumes() { consumes_ = true; }
    void crosses_lanes() { crosses_lanes_ = true; }
    [[noreturn]] void unknown(const std::string& why = {}) const;
    void note_shared_width(int bytes);
    void note_async();  // the program uses the asynchronous proxy

  private:
    friend class ProgramBuilder;
    ProgramBuilder& builder_;
    std::vector<bool> taken_;
    std::vector<std::pair<Handler, std::array<uint32_t, 6>>> after_;
    std::vector<uint32_t> read_, written_;  // register rows
    int temporaries_ = 0;
    bool consumes_ = false;
    bool crosses_lanes_ = false;
};

using DecodeFn = void (*)(Decode&);
using Isa = std::vector<std::pair<std::string_view, DecodeFn>>;
// Takes .shared, .shared::cta or .shared::cluster; without, the address is generic.
AddressForm take_shared_form(Decode& d, const Address& a);

const Isa& isa_int();
const Isa& isa_float();
const Isa& isa_compare();
const Isa& isa_half();
const Isa& isa_cvt();
const Isa& isa_move();
const Isa& isa_memory();
const Isa& isa_async();
const Isa& isa_warp();
const Isa& isa_sync();
const Isa& isa_control();
const Isa& isa_mma();
const Isa& isa_mbarrier();
const Isa& isa_cluster();
const Isa& isa_wgmma();

// cp.async.mbarrier.arrive, which isa_async.cpp meets.
void decode_cp_async_mbarrier(Decode& d);
// cp.async.bulk and cp.reduce.async.bulk, likewise.
void decode_bulk(Decode& d);
// barrier.cluster, st.async and red.async (after those words), which other families meet.
void decode_cluster_barrier(Decode& d);
void decode_store_async(Decode& d);
void decode_reduce_async(Decode& d);

}  // namespace emu
