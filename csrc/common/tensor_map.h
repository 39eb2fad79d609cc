// CUtensorMap: what cuTensorMapEncodeTiled makes of a tensor and TMA reads, a kernel argument.
#pragma once

#include <cstdint>

namespace mk {

struct alignas(64) TensorMap {
    uint64_t opaque[16];
};

}  // namespace mk
