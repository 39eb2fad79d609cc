// Row-wise CPU ops, between rows.cpp (checks, threads) and rows_kernels.h (one copy per instruction
// set).
#pragma once

#include "minitron_kernels.h"

namespace mk::cpu {

// Each does the rows or tokens begin ... end-1.
struct RowKernels {
    void (*rms_norm)(const mk_rms_norm_params& p, int64_t begin, int64_t end);
    void (*silu_and_mul)(const mk_silu_and_mul_params& p, int64_t begin, int64_t end);
    void (*rope_append)(const mk_cpu_rope_append_params& p, int64_t begin, int64_t end);
};

extern const RowKernels kRowsBaseline;
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;

constexpr int kMaxCpuHeadDim = 1024;

}  // namespace mk::cpu
