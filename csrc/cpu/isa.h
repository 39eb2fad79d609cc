// The instruction sets that CPU ops are compiled for, and the choice among them at run time.
#pragma once

#include "minitron_kernels.h"

namespace mk::cpu {

// What `level` (a mk_cpu_isa) stands for on this processor: MK_CPU_BASELINE or above.
mk_status find_isa(int32_t level, int* found);
const char* isa_name(int level);

// The kernels of an op at a level that find_isa gave; MK_CPU_AVX512BF16 is AVX-512 for most.
template <class Kernels>
struct IsaTable {
    const Kernels *baseline, *avx2, *avx512;
    const Kernels& operator[](int level) const {
        return level >= MK_CPU_AVX512 ? *avx512 : level == MK_CPU_AVX2 ? *avx2 : *baseline;
    }
};

#if defined(__x86_64__)
#define MK_ISA_TABLE(name) {&name##Baseline, &name##Avx2, &name##Avx512}
#else
#define MK_ISA_TABLE(name) {&name##Baseline, nullptr, nullptr}
#endif

}  // namespace mk::cpu
