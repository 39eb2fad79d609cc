#include "hazards.h"

#include <algorithm>

namespace emu {
namespace {

// The names of the registers, for reports; rows are unique within a program.
std::string name_of(const Warp& w, uint32_t row) {
    const auto& names = w.launch->program->wgmma_names;
    const auto found = names.find(row);
    return found == names.end() ? "a register" : found->second;
}

class Set {
  public:
    explicit Set(size_t bits) : words_((bits + 63) / 64) {}
    bool has(size_t i) const { return words_[i / 64] >> i % 64 & 1; }
    void put(size_t i, bool value) {
        const uint64_t bit = uint64_t{1} << i % 64;
        words_[i / 64] = value ? words_[i / 64] | bit : words_[i / 64] & ~bit;
    }
    void clear() { std::fill(words_.begin(), words_.end(), 0); }
    bool merge(const Set& from) {  // whether there is more now
        uint64_t fresh = 0;
        for (size_t i = 0; i < words_.size(); ++i) {
            fresh |= from.words_[i] & ~words_[i];
            words_[i] |= from.words_[i];
        }
        return fresh;
    }

  private:
    std::vector<uint64_t> words_;
};

// A statement as the data flow sees it, registers as ids.
struct Step {
    const Flow* flow;
    uint32_t pc;  // of its own instruction
    std::vector<int> read, written;
    std::vector<int> d, a;  // of a wgmma
    WgmmaEvent event;
    bool is_wgmma, is_move, guarded;
};

void add(std::vector<uint32_t>& rows, uint32_t row) {
    if (std::find(rows.begin(), rows.end(), row) == rows.end()) rows.push_back(row);
}

class Analysis {
  public:
    Analysis(Program& program, const std::vector<Flow>& flows) : p_(program) {
        const size_t blocks = p_.block_start.size();
        steps_.resize(blocks);
        predecessors_.resize(blocks);
        for (size_t b = 0; b < blocks; ++b)
            for (uint32_t s : p_.successors[b])
                predecessors_[s].push_back(static_cast<uint32_t>(b));
        for (const Flow& f : flows) {
            Step step{&f, f.first, {}, {}, {}, {}, WgmmaEvent::none, false, false, false};
            while (step.pc + 1 < f.end && p_.code[step.pc].cls == Class::internal) ++step.pc;
            const Instr& in = p_.code[step.pc];
            const StatementText& s = p_.statements[in.statement];
            step.is_move = s.opcode == "mov" && !f.read.empty();
            step.guarded = in.guard != kNone;
            step.event = wgmma_event(in);
            for (uint32_t row : f.read)
                if (row != in.guard) step.read.push_back(id(row));
            for (uint32_t row : f.written) step.written.push_back(id(row));
            if (const auto registers = wgmma_registers(in)) {
                step.is_wgmma = any_ = true;
                for (uint32_t row : registers->d) step.d.push_back(id(row));
                for (uint32_t row : registers->a) step.a.push_back(id(row));
            }
            steps_[p_.block_of(f.first)].push_back(std::move(step));
        }
    }

    void run() {
        if (!any_) return;
        forward();
        backward();
    }

  private:
    int id(uint32_t row) {
        auto [it, fresh] = ids_.try_emplace(row, static_cast<int>(rows_.size()));
        if (fresh) rows_.push_back(row);
        return it->second;
    }
    uint32_t slot(int i) const { return rows_[static_cast<size_t>(i)] / kLanes; }
    RegisterHazard& hazard(const Step& step) {
        Instr& in = p_.code[step.pc];
        if (!in.taint) {
            p_.taints.push_back(std::make_unique<Taint>());
            in.taint = p_.taints.back().get();
        }
        auto& h = const_cast<Taint*>(in.taint)->hazard;
        if (!h) h = std::make_unique<RegisterHazard>();
        return *h;
    }

    // Registers that may be written (first half) or read (second half) by a wgmma under way.
    void in_flight(const Step& s, Set& set, bool mark) {
        const size_t n = rows_.size();
        auto writing = [&](int i) { return set.has(static_cast<size_t>(i)); };
        auto reading = [&](int i) { return set.has(n + static_cast<size_t>(i)); };
        if (s.event == WgmmaEvent::wait_all) set.clear();
        if (s.is_wgmma) {
            for (int i : s.d) {
                if (mark && reading(i)) add(hazard(s).writes, slot(i));
                set.put(static_cast<size_t>(i), true);
            }
            for (int i : s.a) {
                if (mark && writing(i)) add(hazard(s).reads, slot(i));
                set.put(n + static_cast<size_t>(i), true);
            }
            return;
        }
        bool copies = false;
        for (int i : s.read) {
            if (!writing(i)) continue;
            copies = true;
            if (mark && !s.is_move) add(hazard(s).reads, slot(i));
        }
        for (int i : s.written) {
            const bool busy = writing(i) || reading(i);
            if (mark && busy) add(hazard(s).writes, slot(i));
            const bool moved = s.is_move && copies;
            if (mark && s.is_move && (copies || busy))
                for (int from : s.read) hazard(s).moves.push_back({slot(i), slot(from)});
            if (!s.guarded || moved) {
                set.put(static_cast<size_t>(i), moved || (s.guarded && writing(i)));
                if (!s.guarded) set.put(n + static_cast<size_t>(i), false);
            }
        }
    }

    // Registers that a wgmma may use next with no wgmma.fence before it.
    void unfenced(const Step& s, Set& set, bool mark) {
        if (s.event == WgmmaEvent::fence) set.clear();
        if (s.is_wgmma) {
            for (auto* rows : {&s.d, &s.a})
                for (int i : *rows) set.put(static_cast<size_t>(i), true);
            return;
        }
        bool needed = false;
        for (int i : s.written) {
            if (!set.has(static_cast<size_t>(i))) continue;
            needed = true;
            if (mark && !s.is_move) add(hazard(s).touches, slot(i));
            if (mark && s.is_move)
                for (int from : s.read) hazard(s).moves.push_back({slot(i), slot(from)});
            if (!s.guarded) set.put(static_cast<size_t>(i), false);
        }
        if (needed && s.is_move)
            for (int i : s.read) set.put(static_cast<size_t>(i), true);
    }

    void forward() {
        std::vector<Set> entry(steps_.size(), Set(2 * rows_.size()));
        for (bool changed = true; changed;) {
            changed = false;
            for (size_t b = 0; b < steps_.size(); ++b) {
                Set set = entry[b];
                for (const Step& s : steps_[b]) in_flight(s, set, false);
                for (uint32_t next : p_.successors[b]) changed |= entry[next].merge(set);
            }
        }
        for (size_t b = 0; b < steps_.size(); ++b)
            for (const Step& s : steps_[b]) in_flight(s, entry[b], true);
    }

    void backward() {
        std::vector<Set> exit(steps_.size(), Set(rows_.size()));
        for (bool changed = true; changed;) {
            changed = false;
            for (size_t b = steps_.size(); b-- > 0;) {
                Set set = exit[b];
                for (auto s = steps_[b].rbegin(); s != steps_[b].rend(); ++s)
                    unfenced(*s, set, false);
                for (uint32_t before : predecessors_[b]) changed |= exit[before].merge(set);
            }
        }
        for (size_t b = 0; b < steps_.size(); ++b)
            for (auto s = steps_[b].rbegin(); s != steps_[b].rend(); ++s)
                unfenced(*s, exit[b], true);
    }

    Program& p_;
    std::unordered_map<uint32_t, int> ids_;
    std::vector<uint32_t> rows_;
    std::vector<std::vector<Step>> steps_;
    std::vector<std::vector<uint32_t>> predecessors_;
    bool any_ = false;
};

}  // namespace

void find_hazards(Program& p, const std::vector<Flow>& flows,
                  const std::unordered_map<uint32_t, std::string>& names) {
    const auto is_wgmma = [](const Instr& in) { return wgmma_registers(in).has_value(); };
    if (std::none_of(p.code.begin(), p.code.end(), is_wgmma)) return;
    Analysis(p, flows).run();
    for (const auto& [row, name] : names) p.wgmma_names[row / kLanes] = name;
}

void Warp::check_hazard(const RegisterHazard& h) {
    WgmmaState& s = wgmma;
    for (uint32_t row : h.reads)
        if (s.writes[row] > s.retired)
            fault("wgmma not waited for",
                  name_of(*this, row) + " is read, an accumulator of a wgmma under way");
    for (uint32_t row : h.writes) {
        if (s.writes[row] > s.retired)
            fault("wgmma not waited for",
                  name_of(*this, row) + " is overwritten, an accumulator of a wgmma under way");
        if (s.reads[row] > s.retired)
            fault("wgmma not waited for",
                  name_of(*this, row) + " is overwritten, which a wgmma under way reads");
    }
    for (size_t i = 0; i < h.moves.size(); ++i) {
        const auto [to, from] = h.moves[i];
        const bool first = i == 0 || h.moves[i - 1].first != to;
        s.writes[to] = std::max(first ? 0 : s.writes[to], s.writes[from]);
        s.touched[to] = std::max(first ? 0 : s.touched[to], s.touched[from]);
    }
    for (uint32_t row : h.touches) s.touched[row] = s.fences + 1;
}

void begin_wgmma(Warp& w, const uint32_t* list, uint32_t d_regs, uint32_t a_regs) {
    WgmmaState& s = w.wgmma;
    ++s.issued;
    s.is_between = 0;
    for (uint32_t i = 0; i < d_regs + a_regs; ++i) {
        const uint32_t row = list[i] / kLanes;
        if (s.touched[row] > s.fences)
            fault("missing wgmma.fence",
                  name_of(w, row) + " was written with no wgmma.fence since");
        (i < d_regs ? s.writes : s.reads)[row] = s.issued;
    }
}

}  // namespace emu
