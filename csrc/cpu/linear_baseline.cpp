// mk_cpu_linear in plain C++, for any processor. On x86-64 every fma is a call into libm.
#include "cpu/linear.h"
#include "cpu/linear_kernels.h"
#include "cpu/vec_baseline.h"

const mk::cpu::LinearKernels mk::cpu::kLinearBaseline = mk::cpu::kKernels;
