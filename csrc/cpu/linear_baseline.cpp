// mk_cpu_linear in plain C++, for any processor. On x86-64 every fma is a call into libm.
#include "cpu/vec_baseline.h"
// Vec comes first.
#include "cpu/linear_kernels.h"

const mk::cpu::LinearKernels mk::cpu::kLinearBaseline = mk::cpu::kKernels;
