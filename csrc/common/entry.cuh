// The declaration of a kernel entry, and the check that it is compiled for the arch it names.
#pragma once

#include "minitron_kernels.h"

#ifndef MK_SM
#error "MK_SM (80, 89, 90, 100) must be defined by the build"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != MK_SM * 10
#error "MK_SM and the architecture that nvcc compiles for differ"
#endif
// From sm_90 on the kernels use instructions of the exact architecture (sm_90a, sm_100a).
#if defined(__CUDA_ARCH__) && MK_SM >= 90 && !defined(__CUDA_ARCH_SPECIFIC__)
#error "compile for sm_90a or sm_100a, not for the base architecture"
#endif

#define MK_UNROLL _Pragma("unroll")
#define MK_NO_UNROLL _Pragma("unroll 1")

#define MK_CONCAT_(op, sm, key) mk_##op##_sm##sm##_##key
#define MK_CONCAT(op, sm, key) MK_CONCAT_(op, sm, key)

// MK_ENTRY(__launch_bounds__(512), rms_norm, bf16)(params) { ... } defines mk_rms_norm_sm90_bf16.
// The first argument is what limits registers: __launch_bounds__(threads) or
// __maxnreg__(registers).
#define MK_ENTRY(limit, op, key) extern "C" __global__ void limit MK_CONCAT(op, MK_SM, key)
