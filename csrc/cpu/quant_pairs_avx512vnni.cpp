// Products of mk_cpu_linear_quant for AVX-512 (F, BW, VL, VNNI), by pairs of columns.
#if defined(__x86_64__)
#include "cpu/quant_avx512.h"
#include "cpu/quant_pairs.h"

namespace mk::cpu {
namespace {
using Order = Pairs;
}
}  // namespace mk::cpu

#include "cpu/quant_kernels.h"

const mk::cpu::QuantProducts mk::cpu::kQuantPairsAvx512 = mk::cpu::kQuantProducts;

#endif
