// Decoding: control-flow graph, block layout, operand rows, parameter and shared-memory layout.

#include <algorithm>
#include <cfenv>
#include <deque>
#include <functional>
#include <set>
#include <unordered_map>

#include "decode.h"
#include "definedness.h"
#include "hazards.h"
#include "lanes.h"

namespace emu {

class ProgramBuilder {
  public:
    ProgramBuilder(const Module& module, const std::vector<uint64_t>& addresses,
                   const Device& device)
        : module_(module),
          addresses_(addresses),
          device_(device),
          program_(std::make_unique<Program>()) {}

    std::unique_ptr<Program> build(int entry) {
        Program& p = *program_;
        const Function& f = module_.functions[entry];
        p.name = f.name;
        p.module = &module_;
        p.entry = &f;
        for (int param : f.params) {
            const Variable& v = module_.variables[param];
            const uint32_t align = std::max<uint64_t>(1, v.align);
            p.param_bytes = (p.param_bytes + align - 1) / align * align;
            param_offset_[param] = p.param_bytes;
            p.params.push_back({p.param_bytes, static_cast<uint32_t>(v.bytes)});
            p.param_bytes += static_cast<uint32_t>(v.bytes);
        }
        for (auto* isa :
             {&isa_int(), &isa_float(), &isa_compare(), &isa_half(), &isa_cvt(), &isa_move(),
              &isa_memory(), &isa_async(), &isa_warp(), &isa_sync(), &isa_control(), &isa_mma(),
              &isa_mbarrier(), &isa_cluster(), &isa_wgmma()})
            for (const auto& [name, fn] : *isa) decoders_.emplace(name, fn);

        find_calls(entry);
        layout_shared();
        // Predicates first, one word each; then the rows, each 64-byte aligned.
        for (int index : functions_) {
            const Function& g = module_.functions[index];
            row_[index].assign(g.registers.size(), kNone);
            for (size_t r = 0; r < g.registers.size(); ++r)
                if (g.registers[r].type == Type::pred) row_[index][r] = p.register_words++;
        }
        scratch_predicate_ = p.register_words++;
        p.register_words = (p.register_words + 15) & ~15u;
        for (int index : functions_) emit_function(index);
        for (auto [pc, function] : call_fixups_)
            p.calls[p.code[pc].target].entry_pc = p.function_pc.at(function);
        place_constants();
        std::unordered_map<uint32_t, std::string> names;
        for (int index : functions_)
            for (size_t r = 0; r < row_[index].size(); ++r)
                names[row_[index][r]] = module_.functions[index].registers[r].name;
        track_undefined(p, flows_, names);
        find_hazards(p, flows_, names);
        p.code.shrink_to_fit();
        return std::move(program_);
    }

  private:
    friend class Decode;

    // ---- call graph, shared memory --------------------------------------------------------------

    void find_calls(int root) {
        std::vector<int> stack;
        std::function<void(int)> visit = [&](int index) {
            if (std::find(stack.begin(), stack.end(), index) != stack.end())
                throw PtxError("recursion is not supported (" + module_.functions[index].name +
                               ")");
            if (std::find(functions_.begin(), functions_.end(), index) != functions_.end()) return;
            if (!module_.functions[index].has_body) return;
            functions_.push_back(index);
            stack.push_back(index);
            for (const Statement& s : module_.functions[index].statements)
                if (s.opcode == "call")
                    for (const Operand& o : s.operands)
                        if (o.kind == Operand::Kind::function) {
                            if (o.index < 0) throw PtxError("recursion is not supported");
                            visit(o.index);
                        }
            stack.pop_back();
        };
        visit(root);
    }

    void layout_shared() {
        std::set<int> used;
        std::function<void(const Operand&)> scan = [&](const Operand& o) {
            if (o.kind == Operand::Kind::variable &&
                module_.variables[o.index].space == Space::shared)
                used.insert(o.index);
            for (const Operand& item : o.items) scan(item);
        };
        for (int index : functions_)
            for (const Statement& s : module_.functions[index].statements)
                for (const Operand& o : s.operands) scan(o);
        uint32_t at = 0;
        uint32_t dynamic_align = 16;
        for (int index : used) {
            const Variable& v = module_.variables[index];
            if (v.is_extern) {
                dynamic_align = std::max<uint32_t>(dynamic_align, static_cast<uint32_t>(v.align));
                continue;
            }
            const uint32_t align = std::max<uint64_t>(1, v.align);
            at = (at + align - 1) / align * align;
            shared_offset_[index] = at;
            at += static_cast<uint32_t>(v.bytes);
        }
        program_->static_smem = at;
        program_->dynamic_smem_at =
            at ? (at + dynamic_align - 1) / dynamic_align * dynamic_align : 0;
        for (int index : used)
            if (module_.variables[index].is_extern)
                shared_offset_[index] = program_->dynamic_smem_at;
    }

    uint32_t local_slot(int variable) {
        auto it = local_offset_.find(variable);
        if (it != local_offset_.end()) return it->second;
        const Variable& v = module_.variables[variable];
        uint32_t& at = program_->local_bytes;
        const uint32_t align = std::max<uint64_t>(1, v.align);
        at = (at + align - 1) / align * align;
        const uint32_t offset = at;
        at += static_cast<uint32_t>(v.bytes);
        local_offset_[variable] = offset;
        return offset;
    }

    // ---- control flow ---------------------------------------------------------------------------

    struct Block {
        int first, last;  // statements [first, last)
        std::vector<int> successors;
        int falls_to = -1;
    };

    static bool is_branch(const Statement& s) { return s.opcode == "bra" || s.opcode == "brx"; }
    static bool ends_block(const Statement& s) {
        return is_branch(s) || s.opcode == "ret" || s.opcode == "exit";
    }

    std::vector<int> targets_of(const Function& f, const Statement& s) {
        if (s.opcode == "bra") {
            const Operand& o = s.operands.at(0);
            if (o.kind != Operand::Kind::label || o.index < 0)
                throw PtxError("line " + std::to_string(s.line) + ": unknown label in '" + s.text +
                               "'");
            return {o.index};
        }
        auto table = f.branch_targets.find(s.operands.at(1).name);
        if (table == f.branch_targets.end())
            throw PtxError("line " + std::to_string(s.line) + ": no .branchtargets for '" + s.text +
                           "'");
        return table->second;
    }

    std::vector<Block> find_blocks(const Function& f) {
        const int n = static_cast<int>(f.statements.size());
        std::vector<bool> leader(n + 1, false);
        leader[0] = leader[n] = true;
        for (int i = 0; i < n; ++i) {
            const Statement& s = f.statements[i];
            if (!ends_block(s)) continue;
            leader[i + 1] = true;
            if (is_branch(s))
                for (int target : targets_of(f, s)) leader[target] = true;
        }
        std::vector<int> block_at(n + 1, -1);
        std::vector<Block> blocks;
        for (int i = 0; i <= n; ++i) {
            if (!leader[i]) continue;
            if (!blocks.empty()) blocks.back().last = i;
            block_at[i] = static_cast<int>(blocks.size());
            blocks.push_back({i, i, {}, -1});
        }
        blocks.back().last = n;  // an empty block at the end: the implicit return
        for (size_t b = 0; b < blocks.size(); ++b) {
            Block& block = blocks[b];
            const Statement* last =
                block.last > block.first ? &f.statements[block.last - 1] : nullptr;
            if (last && is_branch(*last))
                for (int target : targets_of(f, *last))
                    block.successors.push_back(block_at[target]);
            const bool ends = last && ends_block(*last) && last->guard < 0;
            if (!ends && b + 1 < blocks.size()) {
                block.falls_to = static_cast<int>(b) + 1;
                block.successors.push_back(block.falls_to);
            }
        }
        return blocks;
    }

    // Orders blocks topologically with each loop in one piece, header first. Always running the
    // group of lanes that is lowest in this order reconverges at the earliest point where paths can
    // meet (Diamos et al. 2011, "SIMD re-convergence at thread frontiers").
    static void order_blocks(const std::vector<Block>& blocks, const std::vector<int>& nodes,
                             int header, bool inside_loop, std::vector<int>& out) {
        std::unordered_map<int, int> index, low;
        std::set<int> members(nodes.begin(), nodes.end());
        std::vector<int> stack;
        std::set<int> on_stack;
        std::vector<std::vector<int>> components;
        int counter = 0;
        std::function<void(int)> visit = [&](int b) {
            index[b] = low[b] = counter++;
            stack.push_back(b);
            on_stack.insert(b);
            std::vector<int> successors = blocks[b].successors;
            std::sort(successors.rbegin(), successors.rend());
            for (int s : successors) {
                if (!members.count(s) || (inside_loop && s == header)) continue;
                if (!index.count(s)) {
                    visit(s);
                    low[b] = std::min(low[b], low[s]);
                } else if (on_stack.count(s)) {
                    low[b] = std::min(low[b], index[s]);
                }
            }
            if (low[b] != index[b]) return;
            std::vector<int>& component = components.emplace_back();
            int top;
            do {
                top = stack.back();
                stack.pop_back();
                on_stack.erase(top);
                component.push_back(top);
            } while (top != b);
        };
        visit(header);
        std::reverse(components.begin(), components.end());
        for (std::vector<int>& component : components) {
            const int b = component.back();  // the first one visited: the loop header
            if (component.size() == 1)
                out.push_back(b);
            else
                order_blocks(blocks, component, b, true, out);
        }
    }

    void emit_function(int index) {
        Program& p = *program_;
        function_ = index;
        const Function& f = module_.functions[index];
        std::vector<Block> blocks = find_blocks(f);
        std::vector<int> all(blocks.size()), order;
        for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
        order_blocks(blocks, all, 0, false, order);

        p.function_pc[index] = static_cast<uint32_t>(p.code.size());
        const size_t base = p.block_start.size();
        std::vector<int> position(blocks.size(), -1);
        for (size_t i = 0; i < order.size(); ++i) position[order[i]] = static_cast<int>(base + i);
        branch_fixups_.clear();
        std::vector<uint32_t> pc_of_statement(f.statements.size() + 1, kNone);
        for (size_t i = 0; i < order.size(); ++i) {
            const Block& block = blocks[order[i]];
            const auto start = static_cast<uint32_t>(p.code.size());
            p.block_start.push_back(start);
            pc_of_statement[block.first] = start;
            std::vector<uint32_t>& successors = p.successors.emplace_back();
            for (int s : block.successors) successors.push_back(static_cast<uint32_t>(position[s]));
            for (int s = block.first; s < block.last; ++s) emit_statement(f.statements[s]);
            if (block.first == static_cast<int>(f.statements.size()) ||
                (block.falls_to < 0 && block.successors.empty() &&
                 (block.last == block.first || !ends_block(f.statements[block.last - 1]) ||
                  f.statements[block.last - 1].guard >= 0))) {
                emit_statement(implicit_return());
            } else if (block.falls_to >= 0 &&
                       (i + 1 == order.size() || order[i + 1] != block.falls_to)) {
                Decode d(*this, jump_statement());
                Instr& jump = d.emit_internal(jump_handler, {});
                d.branch_to(jump, blocks[block.falls_to].first);
                jump.statement =
                    p.statements.empty() ? 0 : static_cast<uint32_t>(p.statements.size() - 1);
            }
        }
        for (auto [pc, statement, slot] : branch_fixups_) {
            const uint32_t target = pc_of_statement[statement];
            if (slot < 0)
                p.code[pc].target = target;
            else
                const_cast<uint32_t*>(p.code[pc].list)[slot] = target;
        }
    }

    static void jump_handler(Warp& w, const Instr& in, Mask) {
        w.pc = in.target;
        if (w.groups.size() > 1) w.limit = 0;
    }
    static const Statement& implicit_return() {
        static const Statement s = [] {
            Statement r;
            r.opcode = "ret";
            r.text = "ret (end of function)";
            return r;
        }();
        return s;
    }
    static const Statement& jump_statement() {
        static const Statement s = [] {
            Statement r;
            r.opcode = "bra";
            return r;
        }();
        return s;
    }

    void emit_statement(const Statement& s) {
        Program& p = *program_;
        p.statements.push_back({s.text, s.opcode, s.line, s.file, s.file_line});
        const size_t first = p.code.size();
        Decode d(*this, s);
        auto it = decoders_.find(s.opcode);
        if (it == decoders_.end()) d.unknown();
        it->second(d);
        for (size_t i = 0; i < s.mods.size(); ++i)
            if (!d.taken_[i]) d.unknown("modifier ." + s.mods[i]);
        for (auto& [fn, ops] : d.after_) {
            Instr in;
            in.fn = fn;
            in.op = ops;
            in.cls = Class::internal;
            p.code.push_back(in);
        }
        for (size_t i = first; i < p.code.size(); ++i) {
            p.code[i].statement = static_cast<uint32_t>(p.statements.size() - 1);
            if (s.guard < 0) continue;
            p.code[i].guard = register_row(s.guard);
            p.code[i].guard_negated = s.guard_negated;
        }
        if (s.guard >= 0) d.read_.push_back(register_row(s.guard));
        if (p.code.size() > first)
            flows_.push_back({static_cast<uint32_t>(first), static_cast<uint32_t>(p.code.size()),
                              std::move(d.read_), std::move(d.written_), d.consumes_,
                              d.crosses_lanes_});
    }

    // ---- rows
    // -------------------------------------------------------------------------------------

    uint32_t allocate(int bits) {
        const uint32_t row = program_->register_words;
        program_->register_words += bits <= 32 ? 32 : bits <= 64 ? 64 : 128;
        return row;
    }
    uint32_t register_row(int reg) {
        uint32_t& row = row_[function_][reg];
        if (row == kNone) row = allocate(bits_of(module_.functions[function_].registers[reg].type));
        return row;
    }
    uint32_t constant_row(uint64_t bits, bool wide) {
        auto [it, fresh] = constant_rows_.try_emplace({bits, wide}, 0);
        if (fresh) it->second = kConstantTag + static_cast<uint32_t>(constant_values_.size());
        if (fresh) constant_values_.push_back({wide ? bits : bits & 0xffffffffu, wide});
        return it->second;
    }
    uint32_t special_row(Special id) {
        for (auto [known, row] : program_->specials)
            if (known == id) return row;
        const uint32_t row = allocate(id >= Special::param_base ? 64 : 32);
        program_->specials.push_back({id, row});
        return row;
    }

    // Constants get their rows last, behind all registers, so that a warp's are filled by one copy.
    static constexpr uint32_t kConstantTag = 1u << 31;
    void place_constants() {
        Program& p = *program_;
        p.constants_at = p.register_words;
        std::vector<uint32_t> rows;
        for (auto [bits, wide] : constant_values_) {
            rows.push_back(p.register_words);
            p.register_words += wide ? 64 : 32;
            for (int l = 0; l < kLanes; ++l) {
                p.constants.push_back(static_cast<uint32_t>(bits));
                if (wide) p.constants.push_back(static_cast<uint32_t>(bits >> 32));
            }
        }
        auto place = [&](uint32_t& row) {
            if (row != kNone && row >= kConstantTag) row = rows.at(row - kConstantTag);
        };
        for (Instr& in : p.code)
            for (uint32_t& row : in.op) place(row);
        for (auto& [list, count] : lists_)
            for (size_t i = 0; i < count; ++i) place(list[i]);
    }

    const Module& module_;
    const std::vector<uint64_t>& addresses_;
    const Device& device_;
    std::unique_ptr<Program> program_;
    std::unordered_map<std::string_view, DecodeFn> decoders_;
    std::vector<int> functions_;
    std::map<int, std::vector<uint32_t>> row_;
    int function_ = 0;
    uint32_t scratch_predicate_ = 0;
    std::map<std::pair<uint64_t, bool>, uint32_t> constant_rows_;
    std::vector<std::pair<uint64_t, bool>> constant_values_;
    std::vector<uint32_t> temporaries_;
    std::vector<std::pair<uint32_t*, size_t>> lists_;
    std::unordered_map<int, uint32_t> param_offset_, shared_offset_, local_offset_;
    struct BranchFixup {
        uint32_t pc;
        int statement;
        int slot;  // in the list of brx; -1: Instr::target
    };
    std::vector<BranchFixup> branch_fixups_;
    std::vector<std::pair<uint32_t, int>> call_fixups_;
    std::vector<Flow> flows_;
};

// ---- Decode -----------------------------------------------------------------------------------

namespace {

void narrow(Warp& w, const Instr& in, Mask m) {
    const auto* from = w.row<uint64_t>(in.op[1]);
    uint32_t out[kLanes];
    for (int l = 0; l < kLanes; ++l) out[l] = static_cast<uint32_t>(from[l]);
    store_row(w.row<uint32_t>(in.op[0]), out, m);
}
template <bool Signed>
void widen(Warp& w, const Instr& in, Mask m) {
    const auto* from = w.row<uint32_t>(in.op[1]);
    uint64_t out[kLanes];
    for (int l = 0; l < kLanes; ++l)
        out[l] = Signed ? static_cast<uint64_t>(static_cast<int32_t>(from[l])) : from[l];
    store_row(w.row<uint64_t>(in.op[0]), out, m);
}
void negate_predicate(Warp& w, const Instr& in, Mask) {
    w.predicate(in.op[0]) = ~w.predicate(in.op[1]);
}
void read_clock(Warp& w, const Instr& in, Mask m) {
    uint64_t ticks = w.cta->cluster->instructions;
    if (in.a) ticks = ticks * 4 / 7 + 1;  // %globaltimer: nanoseconds at about 1.75 GHz
    uint64_t wide[kLanes];
    uint32_t low[kLanes], high[kLanes];
    for (int l = 0; l < kLanes; ++l)
        wide[l] = ticks, low[l] = static_cast<uint32_t>(ticks), high[l] = ticks >> 32;
    if (in.b == 64)
        store_row(w.row<uint64_t>(in.op[0]), wide, m);
    else
        store_row(w.row<uint32_t>(in.op[0]), in.b == 1 ? high : low, m);
}

const std::unordered_map<std::string_view, Special> kSpecials = {
    {"%tid.x", Special::tid_x},
    {"%tid.y", Special::tid_y},
    {"%tid.z", Special::tid_z},
    {"%ntid.x", Special::ntid_x},
    {"%ntid.y", Special::ntid_y},
    {"%ntid.z", Special::ntid_z},
    {"%ctaid.x", Special::ctaid_x},
    {"%ctaid.y", Special::ctaid_y},
    {"%ctaid.z", Special::ctaid_z},
    {"%nctaid.x", Special::nctaid_x},
    {"%nctaid.y", Special::nctaid_y},
    {"%nctaid.z", Special::nctaid_z},
    {"%laneid", Special::laneid},
    {"%warpid", Special::warpid},
    {"%nwarpid", Special::nwarpid},
    {"%smid", Special::smid},
    {"%nsmid", Special::nsmid},
    {"%gridid", Special::gridid},
    {"%lanemask_eq", Special::lanemask_eq},
    {"%lanemask_le", Special::lanemask_le},
    {"%lanemask_lt", Special::lanemask_lt},
    {"%lanemask_ge", Special::lanemask_ge},
    {"%lanemask_gt", Special::lanemask_gt},
    {"%dynamic_smem_size", Special::dynamic_smem_size},
    {"%total_smem_size", Special::total_smem_size},
    {"%aggr_smem_size", Special::aggr_smem_size},
    {"%reserved_smem_offset_begin", Special::reserved_smem},
    {"%clusterid.x", Special::clusterid_x},
    {"%clusterid.y", Special::clusterid_y},
    {"%clusterid.z", Special::clusterid_z},
    {"%nclusterid.x", Special::nclusterid_x},
    {"%nclusterid.y", Special::nclusterid_y},
    {"%nclusterid.z", Special::nclusterid_z},
    {"%cluster_ctaid.x", Special::cluster_ctaid_x},
    {"%cluster_ctaid.y", Special::cluster_ctaid_y},
    {"%cluster_ctaid.z", Special::cluster_ctaid_z},
    {"%cluster_nctaid.x", Special::cluster_nctaid_x},
    {"%cluster_nctaid.y", Special::cluster_nctaid_y},
    {"%cluster_nctaid.z", Special::cluster_nctaid_z},
    {"%cluster_ctarank", Special::cluster_ctarank},
    {"%cluster_nctarank", Special::cluster_nctarank},
    {"%is_explicit_cluster", Special::is_explicit_cluster},
    {"WARP_SZ", Special::warp_size},
};

uint64_t immediate_bits(const Operand& o, Type type) {
    if (o.kind == Operand::Kind::integer) {
        if (type == Type::f32)
            return std::bit_cast<uint32_t>(static_cast<float>(static_cast<int64_t>(o.bits)));
        if (type == Type::f64)
            return std::bit_cast<uint64_t>(static_cast<double>(static_cast<int64_t>(o.bits)));
        return bits_of(type) >= 64 ? o.bits : o.bits & ((1ull << bits_of(type)) - 1);
    }
    if (o.exact_f32) return o.bits;
    if (bits_of(type) == 32)
        return std::bit_cast<uint32_t>(static_cast<float>(std::bit_cast<double>(o.bits)));
    return o.bits;
}

}  // namespace

Decode::Decode(ProgramBuilder& builder, const Statement& statement)
    : st(statement), builder_(builder), taken_(statement.mods.size(), false) {}

const Device& Decode::device() const { return builder_.device_; }
const Module& Decode::module() const { return builder_.module_; }
const Function& Decode::function() const { return builder_.module_.functions[builder_.function_]; }
uint32_t Decode::local_slot(int variable) { return builder_.local_slot(variable); }

void Decode::unknown(const std::string& why) const {
    throw PtxError("unknown instruction at PTX line " + std::to_string(st.line) + ": " + st.text +
                   (why.empty() ? "" : " (" + why + ")"));
}

bool Decode::take(std::string_view mod) {
    for (size_t i = 0; i < st.mods.size(); ++i)
        if (!taken_[i] && st.mods[i] == mod) return taken_[i] = true;
    return false;
}

int Decode::take_one(std::initializer_list<std::string_view> names, int otherwise) {
    int position = 0;
    for (std::string_view name : names) {
        if (take(name)) return position;
        ++position;
    }
    return otherwise;
}

Type Decode::take_type() {
    const Type type = take_type_or(Type::none);
    if (type == Type::none) unknown("no type");
    return type;
}

Type Decode::take_type_or(Type otherwise) {
    for (size_t i = 0; i < st.mods.size(); ++i) {
        if (taken_[i]) continue;
        auto type = parse_type(st.mods[i]);
        if (!type) continue;
        taken_[i] = true;
        return *type;
    }
    return otherwise;
}

bool Decode::take_prefix(std::string_view prefix) {
    bool found = false;
    for (size_t i = 0; i < st.mods.size(); ++i)
        if (!taken_[i] && st.mods[i].starts_with(prefix)) taken_[i] = found = true;
    return found;
}

int Decode::take_rounding() {
    static constexpr int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD,
                                    FE_TONEAREST};
    return modes[take_one({"rn", "rz", "rm", "rp"}, 4)];
}

const Operand& Decode::operand(size_t i) const {
    if (i >= st.operands.size()) unknown("too few operands");
    return st.operands[i];
}

int64_t Decode::immediate(size_t i) const {
    if (!is_immediate(i))
        unknown("operand " + std::to_string(i + 1) + " must be an integer constant");
    return static_cast<int64_t>(operand(i).bits);
}

uint32_t Decode::constant(uint64_t bits, bool wide) { return builder_.constant_row(bits, wide); }
uint32_t Decode::special(Special id) { return builder_.special_row(id); }

uint32_t Decode::temporary() {
    auto& pool = builder_.temporaries_;
    if (static_cast<size_t>(temporaries_) == pool.size()) pool.push_back(builder_.allocate(64));
    return pool[temporaries_++];
}

bool Decode::is_predicate(const Operand& o) const {
    return o.kind == Operand::Kind::reg && function().registers[o.index].type == Type::pred;
}

uint32_t Decode::src(const Operand& o, Type type) {
    const bool wide = bits_of(type) > 32;
    switch (o.kind) {
        case Operand::Kind::reg: {
            const Type held = function().registers[o.index].type;
            uint32_t row = builder_.register_row(o.index);
            read_.push_back(row);
            if ((held == Type::pred) != (type == Type::pred)) unknown("predicate and data mixed");
            if (o.negated) {
                const uint32_t t = temporary();
                emit_internal(negate_predicate, {t, row});
                return t;
            }
            const int bits = bits_of(held);
            if (held == Type::pred || (bits > 32) == wide || bits == 128) return row;
            const uint32_t t = temporary();
            emit_internal(wide ? widen<false> : narrow, {t, row});
            return t;
        }
        case Operand::Kind::integer:
        case Operand::Kind::real:
            if (type == Type::pred) return constant(o.bits ? 0xffffffffu : 0, false);
            return constant(immediate_bits(o, type), wide);
        case Operand::Kind::variable: {
            const Address a = address(o);
            const uint32_t offset = constant(static_cast<uint64_t>(a.offset), wide);
            if (a.space != Space::shared || device().capability < 90) return offset;
            const uint32_t t = temporary();
            const Special base = wide ? Special::shared_base_wide : Special::shared_base;
            emit_internal(wide ? lanes([](uint64_t x, uint64_t y) { return x + y; })
                               : lanes([](uint32_t x, uint32_t y) { return x + y; }),
                          {t, offset, special(base)});
            return t;
        }
        case Operand::Kind::special: {
            static const std::unordered_map<std::string_view, std::pair<int, int>> clocks = {
                {"%clock", {0, 32}},          {"%clock_hi", {0, 1}},
                {"%clock64", {0, 64}},        {"%globaltimer", {1, 64}},
                {"%globaltimer_lo", {1, 32}}, {"%globaltimer_hi", {1, 1}}};
            if (auto it = clocks.find(o.name); it != clocks.end()) {
                const uint32_t t = temporary();
                Instr& in = emit_internal(read_clock, {t});
                in.a = static_cast<uint8_t>(it->second.first);
                in.b = static_cast<uint8_t>(it->second.second);
                return t;
            }
            auto it = kSpecials.find(o.name);
            if (it == kSpecials.end()) unknown("special register " + o.name);
            const uint32_t row = special(it->second);
            if (!wide) return row;
            const uint32_t t = temporary();
            emit_internal(widen<false>, {t, row});
            return t;
        }
        default:
            unknown("operand '" + o.name + "'");
    }
}

uint32_t Decode::dst(const Operand& o, Type type) {
    if (o.kind == Operand::Kind::sink)
        return type == Type::pred ? builder_.scratch_predicate_ : temporary();
    if (o.kind != Operand::Kind::reg) unknown("the result must be a register");
    const Type held = function().registers[o.index].type;
    const uint32_t row = builder_.register_row(o.index);
    written_.push_back(row);
    if ((held == Type::pred) != (type == Type::pred)) unknown("predicate and data mixed");
    const int bits = bits_of(held);
    if (held == Type::pred || bits == 128 || (bits > 32) == (bits_of(type) > 32)) return row;
    if (bits < bits_of(type)) unknown("result register is too narrow");
    const uint32_t t = temporary();
    after(is_signed(type) ? widen<true> : widen<false>, {row, t});
    return t;
}

Address Decode::address(const Operand& o) {
    Address a;
    const Operand& base = o.kind == Operand::Kind::address ? o.items[0] : o;
    a.offset = o.offset;
    if (base.kind == Operand::Kind::reg) {
        const Type held = function().registers[base.index].type;
        a.row = builder_.register_row(base.index);
        a.wide = bits_of(held) > 32;
        read_.push_back(a.row);
        return a;
    }
    if (base.kind == Operand::Kind::integer) {
        a.offset += static_cast<int64_t>(base.bits);
    } else if (base.kind == Operand::Kind::variable) {
        const Variable& v = builder_.module_.variables[base.index];
        a.space = v.space;
        if (v.space == Space::shared) {
            a.offset += builder_.shared_offset_.at(base.index);
            if (device().capability >= 90) {
                a.row = special(Special::shared_base_wide);
                return a;
            }
        } else if (v.space == Space::param) {
            a.names_param = true;
            auto it = builder_.param_offset_.find(base.index);
            if (it != builder_.param_offset_.end()) {
                a.offset += it->second;
            } else {
                a.space = Space::local;
                a.offset += builder_.local_slot(base.index);
            }
        } else if (v.space == Space::local) {
            a.offset += builder_.local_slot(base.index);
        } else {
            a.offset += static_cast<int64_t>(builder_.addresses_.at(base.index));
        }
    } else {
        unknown("address '" + base.name + "'");
    }
    a.row = constant(0, true);
    return a;
}

std::vector<uint32_t> Decode::sources(const Operand& o, Type type) {
    std::vector<uint32_t> rows;
    if (o.kind != Operand::Kind::list) return {src(o, type)};
    for (const Operand& item : o.items) rows.push_back(src(item, type));
    return rows;
}

std::vector<uint32_t> Decode::results(const Operand& o, Type type) {
    std::vector<uint32_t> rows;
    if (o.kind != Operand::Kind::list) return {dst(o, type)};
    for (const Operand& item : o.items) rows.push_back(dst(item, type));
    return rows;
}

const uint32_t* Decode::list(std::span<const uint32_t> rows) {
    auto copy = std::make_unique<uint32_t[]>(rows.size());
    std::copy(rows.begin(), rows.end(), copy.get());
    builder_.lists_.push_back({copy.get(), rows.size()});
    return builder_.program_->lists.emplace_back(std::move(copy)).get();
}

Instr& Decode::emit(Handler fn, Class cls, std::initializer_list<uint32_t> ops) {
    Instr in;
    in.fn = fn;
    in.cls = cls;
    in.op.fill(kNone);
    std::copy(ops.begin(), ops.end(), in.op.begin());
    return builder_.program_->code.emplace_back(in);
}

void Decode::after(Handler fn, std::initializer_list<uint32_t> ops) {
    std::array<uint32_t, 6> rows;
    rows.fill(kNone);
    std::copy(ops.begin(), ops.end(), rows.begin());
    after_.push_back({fn, rows});
}

void Decode::branch_to(Instr& in, int statement) {
    const auto pc = static_cast<uint32_t>(&in - builder_.program_->code.data());
    builder_.branch_fixups_.push_back({pc, statement, -1});
}

void Decode::branch_table_entry(Instr& in, int slot, int statement) {
    const auto pc = static_cast<uint32_t>(&in - builder_.program_->code.data());
    builder_.branch_fixups_.push_back({pc, statement, slot});
}

// The call belongs to the instruction emitted next; a function of -1 is built in.
uint32_t Decode::function_call(const CallTarget& call, int function) {
    Program& p = *builder_.program_;
    p.calls.push_back(call);
    if (function >= 0)
        builder_.call_fixups_.push_back({static_cast<uint32_t>(p.code.size()), function});
    return static_cast<uint32_t>(p.calls.size() - 1);
}

void Decode::note_shared_width(int bytes) {
    int& shift = builder_.program_->granule_shift;
    while (shift > 0 && (1 << shift) > bytes) --shift;
}

void Decode::require_arch_specific() const {
    const std::string wanted = "sm_" + std::to_string(device().capability) + "a";
    if (device().capability < 90 || module().target != wanted)
        unknown("needs .target sm_90a, this is " + module().target);
}
void Decode::note_async() { builder_.program_->async = true; }

std::unique_ptr<Program> decode(const Module& module, int entry,
                                const std::vector<uint64_t>& addresses, const Device& device) {
    return ProgramBuilder(module, addresses, device).build(entry);
}

}  // namespace emu
