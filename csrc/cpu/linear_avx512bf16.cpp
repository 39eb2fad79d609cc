// mk_cpu_linear for AVX-512 with BF16: a product of bfloat16 takes two columns of an output's lane.
#if defined(__x86_64__)
#include "cpu/vec_avx512bf16.h"
// Vec comes first.
#include "cpu/linear_kernels.h"

const mk::cpu::LinearKernels mk::cpu::kLinearAvx512Bf16 = mk::cpu::kKernels;

#endif
