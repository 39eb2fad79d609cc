#include "definedness.h"

#include <algorithm>

namespace emu {

void track_undefined(Program& p, const std::vector<Flow>& flows,
                     const std::unordered_map<uint32_t, std::string>& names) {
    const size_t blocks = p.block_start.size();
    std::vector<std::vector<const Flow*>> in_block(blocks);
    for (const Flow& f : flows) in_block[p.block_of(f.first)].push_back(&f);
    std::unordered_map<uint32_t, int> id;
    for (const Flow& f : flows)
        for (auto* rows : {&f.read, &f.written})
            for (uint32_t row : *rows) id.try_emplace(row, static_cast<int>(id.size()));
    const size_t words = (id.size() + 63) / 64;
    using Bits = std::vector<uint64_t>;
    // Registers written on every path to a block.
    std::vector<Bits> at_entry(blocks, Bits(words, ~0ull));
    std::vector<std::vector<uint32_t>> predecessors(blocks);
    for (size_t b = 0; b < blocks; ++b)
        for (uint32_t s : p.successors[b]) predecessors[s].push_back(static_cast<uint32_t>(b));
    auto transfer = [&](size_t b, Bits bits) {
        for (const Flow* f : in_block[b])
            if (p.code[f->first].guard == kNone)
                for (uint32_t row : f->written) bits[id[row] / 64] |= 1ull << (id[row] % 64);
        return bits;
    };
    std::vector<Bits> at_exit(blocks, Bits(words, ~0ull));
    for (bool changed = true; changed;) {
        changed = false;
        for (size_t b = 0; b < blocks; ++b) {
            Bits bits(words, predecessors[b].empty() ? 0 : ~0ull);
            if (b == 0) bits.assign(words, 0);
            for (uint32_t q : predecessors[b])
                for (size_t i = 0; i < words; ++i) bits[i] &= at_exit[q][i];
            at_entry[b] = bits;
            Bits out = transfer(b, std::move(bits));
            if (out != at_exit[b]) at_exit[b] = std::move(out), changed = true;
        }
    }
    // Read where some path brings no value.
    std::vector<bool> suspect(id.size(), false);
    for (size_t b = 0; b < blocks; ++b) {
        Bits bits = at_entry[b];
        for (const Flow* f : in_block[b]) {
            for (uint32_t row : f->read)
                if (!(bits[id[row] / 64] >> (id[row] % 64) & 1)) suspect[id[row]] = true;
            if (p.code[f->first].guard == kNone)
                for (uint32_t row : f->written) bits[id[row] / 64] |= 1ull << (id[row] % 64);
        }
    }
    auto any = [&](const std::vector<uint32_t>& rows) {
        return std::any_of(rows.begin(), rows.end(),
                           [&](uint32_t row) { return suspect[id[row]]; });
    };
    // What is computed from such a register.
    for (bool changed = true; changed;) {
        changed = false;
        for (const Flow& f : flows) {
            if (!any(f.read)) continue;
            for (uint32_t row : f.written)
                if (!suspect[id[row]]) suspect[id[row]] = changed = true;
        }
    }
    for (auto [row, i] : id)
        if (suspect[i]) p.row_names[row] = names.at(row);
    for (const Flow& f : flows) {
        if (!any(f.read) && !any(f.written)) continue;
        auto taint = std::make_unique<Taint>();
        for (uint32_t row : f.read)
            if (suspect[id[row]]) taint->sources.push_back(row);
        for (uint32_t row : f.written)
            if (suspect[id[row]]) taint->results.push_back(row);
        taint->consumes = f.consumes;
        taint->crosses_lanes = f.crosses_lanes;
        // The statement's own instruction, not a width adaption before it.
        uint32_t at = f.first;
        while (at + 1 < f.end && p.code[at].cls == Class::internal) ++at;
        p.code[at].taint = taint.get();
        p.taints.push_back(std::move(taint));
        p.tracks_undefined = true;
    }
}

}  // namespace emu
