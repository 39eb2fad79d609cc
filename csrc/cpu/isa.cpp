#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "launch/op.h"

namespace mk::cpu {
namespace {

struct Isa {
    const char* name;
    bool available;
};

const Isa* isas() {  // in the order of mk_cpu_isa, which begins at 1
#if defined(__x86_64__)
    static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("f16c");
    static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                               __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512vl");
    static const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    static const Isa all[] = {
        {"baseline", true}, {"avx2", avx2}, {"avx512", avx512}, {"avx512bf16", bf16}};
#else
    static const Isa all[] = {
        {"baseline", true}, {"avx2", false}, {"avx512", false}, {"avx512bf16", false}};
#endif
    return all;
}

// The level of MK_CPU_ISA, or the best; 0 when MK_CPU_ISA names none.
int default_isa() {
    const char* const wanted = std::getenv("MK_CPU_ISA");
    for (int level = MK_CPU_AVX512BF16; level >= MK_CPU_BASELINE; --level) {
        const Isa& isa = isas()[level - 1];
        if (wanted && *wanted ? !std::strcmp(wanted, isa.name) : isa.available) return level;
    }
    return 0;
}

}  // namespace

mk_status find_isa(int32_t level, int* found) {
    static const int best = default_isa();
    MK_REQUIRE(MK_CPU_AUTO <= level && level <= MK_CPU_AVX512BF16, MK_ERR_VALUE,
               "isa must be MK_CPU_AUTO (0) ... MK_CPU_AVX512BF16 (4), got %d", level);
    if (level == MK_CPU_AUTO) {
        level = best;
        MK_REQUIRE(level, MK_ERR_VALUE,
                   "MK_CPU_ISA must be baseline, avx2, avx512 or avx512bf16, got %s",
                   std::getenv("MK_CPU_ISA"));
    }
    MK_REQUIRE(isas()[level - 1].available, MK_ERR_UNSUPPORTED, "this processor has no %s",
               isa_name(level));
    *found = level;
    return MK_OK;
}

const char* isa_name(int level) { return isas()[level - 1].name; }

}  // namespace mk::cpu

extern "C" mk_status mk_cpu_isa_name(const char** name) {
    MK_REQUIRE(name, MK_ERR_NULL, "name is NULL");
    int level = 0;
    MK_TRY(mk::cpu::find_isa(MK_CPU_AUTO, &level));
    *name = mk::cpu::isa_name(level);
    return MK_OK;
}
