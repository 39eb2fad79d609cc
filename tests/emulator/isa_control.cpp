// bra, brx.idx, call, ret, exit, trap, brkpt, nanosleep; vprintf and __assertfail.

#include <cinttypes>
#include <cstdio>

#include "decode.h"
#include "lanes.h"

namespace emu {
namespace {

void branch(Warp& w, const Instr& in, Mask m) { w.diverge(m, in.target); }

void decode_bra(Decode& d) {
    d.take("uni");
    d.consumes();
    Instr& in = d.emit(branch, Class::control);
    d.branch_to(in, d.operand(0).index);
}

// brx.idx: one diverge per distinct target.
void branch_indexed(Warp& w, const Instr& in, Mask m) {
    const auto* index = w.row<uint32_t>(in.op[0]);
    while (m) {
        const uint32_t pick = index[std::countr_zero(m)];
        if (pick >= static_cast<uint32_t>(in.imm))
            fault("bad branch",
                  "brx.idx index " + std::to_string(pick) + " of a table of " +
                      std::to_string(in.imm),
                  std::countr_zero(m));
        Mask same = 0;
        for_each_lane(m, [&](int l) { same |= static_cast<Mask>(index[l] == pick) << l; });
        m &= ~same;
        w.diverge(same, in.list[pick]);
    }
}

void exit_thread(Warp& w, const Instr&, Mask m) { w.exit_lanes(m); }

void copy_parameters(Warp& w, const std::vector<CallTarget::Copy>& copies, Mask m) {
    for (const CallTarget::Copy& c : copies)
        for_each_lane(m, [&](int l) {
            uint8_t* local = w.local_lane(l);
            std::memcpy(local + c.to, local + c.from, c.bytes);
        });
}

void enter_frame(Warp& w, Mask m, uint32_t return_pc, uint32_t call, uint32_t target) {
    if (m != w.active)
        fault("divergent call", "a guarded call that only some lanes take is not supported");
    for (uint32_t i = 1; i < w.frames.size(); ++i) {
        const Frame& f = w.frames[i];
        if (f.parent == w.frame && f.return_pc == return_pc) {
            w.frame = i;
            w.pc = target;
            w.limit = 0;
            return;
        }
    }
    w.frames.push_back({w.frame, return_pc, call, w.frames[w.frame].depth + 1});
    w.frame = static_cast<uint32_t>(w.frames.size() - 1);
    w.pc = target;
    w.limit = 0;
}

void call(Warp& w, const Instr& in, Mask m) {
    const CallTarget& target = w.launch->program->calls[in.target];
    copy_parameters(w, target.arguments, m);
    enter_frame(w, m, w.pc, in.target, target.entry_pc);
}

void ret(Warp& w, const Instr&, Mask m) {
    if (w.frame == 0) {
        w.exit_lanes(m);
        return;
    }
    const Frame frame = w.frames[w.frame];
    copy_parameters(w, w.launch->program->calls[frame.call].results, m);
    if (m == w.active) {
        w.pc = frame.return_pc;
        w.frame = frame.parent;
    } else {
        w.active &= ~m;
        Group other;
        other.pc = frame.return_pc;
        other.lanes = m;
        other.frame = frame.parent;
        w.groups.push_back(other);
    }
    w.limit = 0;
}

// A string in host-visible memory, of bounded length.
std::string read_string(Warp& w, uint64_t address) {
    std::string text;
    while (text.size() < 4096) {
        const Region* r = w.launch->find(address, 1, w.region_hint);
        if (!r) return text + "<unreadable>";
        const char c = *reinterpret_cast<const char*>(address++);
        if (!c) break;
        text += c;
    }
    return text;
}

uint64_t argument(Warp& w, const CallTarget& call, size_t i, int lane) {
    const CallTarget::Copy& c = call.arguments.at(i);
    uint64_t value = 0;
    std::memcpy(&value, w.local_lane(lane) + c.from, std::min<uint32_t>(8, c.bytes));
    return value;
}

// vprintf(format, arguments in local memory): 4-byte values take 4 bytes, 8-byte ones are aligned
// to 8.
void call_printf(Warp& w, const Instr& in, Mask m) {
    const CallTarget& call = w.launch->program->calls[in.target];
    for_each_lane(m, [&](int l) {
        const std::string format = read_string(w, argument(w, call, 0, l));
        const uint64_t at = argument(w, call, 1, l);
        const uint8_t* buffer = w.local_lane(l) + (at & (kLocalWindow - 1));
        size_t offset = 0;
        std::string out;
        for (size_t i = 0; i < format.size(); ++i) {
            if (format[i] != '%') {
                out += format[i];
                continue;
            }
            if (i + 1 < format.size() && format[i + 1] == '%') {
                out += '%', ++i;
                continue;
            }
            size_t end = format.find_first_of("diouxXeEfFgGaAcsp", i);
            if (end == format.npos) break;
            std::string spec = format.substr(i, end - i + 1);
            const char kind = spec.back();
            const bool is_float = std::string("eEfFgGaA").find(kind) != std::string::npos;
            const bool wide = is_float || kind == 's' || kind == 'p' || spec.find('l') != spec.npos;
            if (wide) offset = (offset + 7) & ~size_t{7};
            uint64_t bits = 0;
            std::memcpy(&bits, buffer + offset, wide ? 8 : 4);
            offset += wide ? 8 : 4;
            char text[512];
            if (is_float)
                std::snprintf(text, sizeof text, spec.c_str(), std::bit_cast<double>(bits));
            else if (kind == 's')
                std::snprintf(text, sizeof text, spec.c_str(), read_string(w, bits).c_str());
            else if (wide)
                std::snprintf(text, sizeof text, spec.c_str(), bits);
            else
                std::snprintf(text, sizeof text, spec.c_str(), static_cast<uint32_t>(bits));
            out += text;
            i = end;
        }
        std::fputs(out.c_str(), stderr);
    });
    for_each_lane(m, [&](int l) {
        const uint32_t ok = 0;
        if (!call.results.empty()) std::memcpy(w.local_lane(l) + call.results[0].to, &ok, 4);
    });
}

void call_assert(Warp& w, const Instr& in, Mask m) {
    const CallTarget& call = w.launch->program->calls[in.target];
    const int l = std::countr_zero(m);
    fault("assertion failed",
          read_string(w, argument(w, call, 0, l)) + " at " +
              read_string(w, argument(w, call, 1, l)) + ":" +
              std::to_string(static_cast<uint32_t>(argument(w, call, 2, l))) + " in " +
              read_string(w, argument(w, call, 3, l)),
          l);
}

void decode_call(Decode& d) {
    d.take("uni");
    d.consumes();
    size_t at = 0;
    const Operand* results = nullptr;
    const Operand* arguments = nullptr;
    if (d.operand(0).kind == Operand::Kind::list) results = &d.operand(at++);
    const Operand& callee = d.operand(at++);
    if (callee.kind != Operand::Kind::function) d.unknown("indirect calls are not supported");
    if (at < d.count() && d.operand(at).kind == Operand::Kind::list) arguments = &d.operand(at);
    const Function& f = d.module().functions[callee.index];
    CallTarget target;
    auto slot = [&](const Operand& o) {
        if (o.kind != Operand::Kind::variable) d.unknown("only .param variables can be passed");
        return d.local_slot(o.index);
    };
    auto bytes = [&](int variable) {
        return static_cast<uint32_t>(d.module().variables[variable].bytes);
    };
    if (arguments)
        for (size_t i = 0; i < arguments->items.size() && i < f.params.size(); ++i)
            target.arguments.push_back(
                {slot(arguments->items[i]), d.local_slot(f.params[i]), bytes(f.params[i])});
    if (results)
        for (size_t i = 0; i < results->items.size() && i < f.results.size(); ++i)
            target.results.push_back(
                {d.local_slot(f.results[i]), slot(results->items[i]), bytes(f.results[i])});
    if (f.has_body) {
        const uint32_t index = d.function_call(target, callee.index);
        d.emit(call, Class::control).target = index;
    } else if (f.name == "vprintf" || f.name == "__assertfail") {
        const uint32_t index = d.function_call(target, -1);
        d.emit(f.name == "vprintf" ? call_printf : call_assert, Class::control).target = index;
    } else {
        d.unknown("function '" + f.name + "' has no body");
    }
}

void decode_brx(Decode& d) {
    if (!d.take("idx")) d.unknown();
    d.take("uni");
    d.consumes();
    const auto& table = d.function().branch_targets.at(d.operand(1).name);
    const uint32_t index = d.src(0, Type::u32);
    const uint32_t* list = d.list(std::vector<uint32_t>(table.size(), 0));
    Instr& in = d.emit(branch_indexed, Class::control, {index});
    in.list = list;
    in.imm = static_cast<int64_t>(table.size());
    for (size_t i = 0; i < table.size(); ++i)
        d.branch_table_entry(in, static_cast<int>(i), table[i]);
}

void trap(Warp&, const Instr&, Mask m) {
    fault("trap", "the kernel executed a trap", std::countr_zero(m));
}
void yield(Warp& w, const Instr&, Mask) {
    w.budget = 0;  // lets the other warps run
    w.limit = 0;
}
void nothing(Warp&, const Instr&, Mask) {}

}  // namespace

const Isa& isa_control() {
    static const Isa isa = {
        {"bra", decode_bra},
        {"brx", decode_brx},
        {"call", decode_call},
        {"ret",
         [](Decode& d) {
             d.take("uni");
             d.consumes();
             d.emit(ret, Class::control);
         }},
        {"exit",
         [](Decode& d) {
             d.consumes();
             d.emit(exit_thread, Class::control);
         }},
        {"trap", [](Decode& d) { d.emit(trap, Class::control); }},
        {"brkpt", [](Decode& d) { d.emit(trap, Class::control); }},
        {"nanosleep",
         [](Decode& d) {
             d.take_type();
             d.src(0, Type::u32);
             d.emit(yield, Class::control);
         }},
        {"pmevent",
         [](Decode& d) {
             d.take("mask");
             d.emit(nothing, Class::control);
         }},
    };
    return isa;
}

}  // namespace emu
