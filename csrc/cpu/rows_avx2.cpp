// Row-wise CPU ops for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "cpu/vec_avx2.h"
// Vec comes first.
#include "cpu/rows_kernels.h"

const mk::cpu::RowKernels mk::cpu::kRowsAvx2 = mk::cpu::kKernels;

#endif
