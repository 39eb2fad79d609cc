// Registers and wgmma: what may not be touched while an instruction is under way, and what needs a
// wgmma.fence first.
//
// Which instructions can meet such a register at all is found by data flow over the program; only
// those get a RegisterHazard, which Warp::check_hazard looks at when they run. Moves are followed:
// compilers copy accumulators between a wgmma and its wait, and the copy is as unfinished as the
// original.
#pragma once

#include <optional>
#include <span>
#include <unordered_map>

#include "definedness.h"
#include "machine.h"

namespace emu {

struct WgmmaRegisters {
    std::span<const uint32_t> d, a;  // rows
};
// Of a wgmma.mma_async; nothing for other instructions.
std::optional<WgmmaRegisters> wgmma_registers(const Instr& in);
enum class WgmmaEvent : uint8_t { none, fence, wait_all };
WgmmaEvent wgmma_event(const Instr& in);

void find_hazards(Program& program, const std::vector<Flow>& flows,
                  const std::unordered_map<uint32_t, std::string>& names);

// A wgmma.mma_async is issued: checks its registers (`list`: of D, then of A) and marks them.
void begin_wgmma(Warp& w, const uint32_t* list, uint32_t d_regs, uint32_t a_regs);

}  // namespace emu
