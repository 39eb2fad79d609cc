// mk_cpu_attention in plain C++, for any processor.
#include "cpu/vec_baseline.h"
// Vec comes first.
#include "cpu/attention_kernels.h"

const mk::cpu::AttentionKernels mk::cpu::kAttentionBaseline = mk::cpu::kKernels;
