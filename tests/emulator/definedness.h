// Which registers may be read before they are written.
//
// Registers that are always written first need no run-time tracking. The others, and all that is
// computed from them, get a Taint on every instruction that touches them (Warp::propagate).
#pragma once

#include <unordered_map>

#include "machine.h"

namespace emu {

struct Flow {                             // of one statement
    uint32_t first, end;                  // its pcs
    std::vector<uint32_t> read, written;  // register rows
    bool consumes, crosses_lanes;
};

void track_undefined(Program& program, const std::vector<Flow>& flows,
                     const std::unordered_map<uint32_t, std::string>& names);

}  // namespace emu
