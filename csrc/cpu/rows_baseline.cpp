// Row-wise CPU ops in plain C++, for any processor.
#include "cpu/vec_baseline.h"
// Vec comes first.
#include "cpu/rows_kernels.h"

const mk::cpu::RowKernels mk::cpu::kRowsBaseline = mk::cpu::kKernels;
