// mk_cpu_linear for AVX2, FMA and F16C: an output's 16 partial sums are two registers.
#if defined(__x86_64__)
#include "cpu/vec_avx2.h"
// Vec comes first.
#include "cpu/linear_kernels.h"

const mk::cpu::LinearKernels mk::cpu::kLinearAvx2 = mk::cpu::kKernels;

#endif
