// Row-wise CPU ops for AVX-512 (F, BW, VL).
#if defined(__x86_64__)
#include "cpu/vec_avx512.h"
// Vec comes first.
#include "cpu/rows_kernels.h"

const mk::cpu::RowKernels mk::cpu::kRowsAvx512 = mk::cpu::kKernels;

#endif
