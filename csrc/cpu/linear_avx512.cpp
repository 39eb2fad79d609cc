// mk_cpu_linear for AVX-512 (F, BW, VL): an output's 16 partial sums are one register.
#if defined(__x86_64__)
#include "cpu/vec_avx512.h"
// Vec comes first.
#include "cpu/linear_kernels.h"

const mk::cpu::LinearKernels mk::cpu::kLinearAvx512 = mk::cpu::kKernels;

#endif
