// mk_cpu_attention for AVX-512 (F, BW, VL).
#if defined(__x86_64__)
#include "cpu/vec_avx512.h"
// Vec comes first.
#include "cpu/attention_kernels.h"

const mk::cpu::AttentionKernels mk::cpu::kAttentionAvx512 = mk::cpu::kKernels;

#endif
