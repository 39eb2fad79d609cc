// mk_cpu_attention for AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "cpu/vec_avx2.h"
// Vec comes first.
#include "cpu/attention_kernels.h"

const mk::cpu::AttentionKernels mk::cpu::kAttentionAvx2 = mk::cpu::kKernels;

#endif
