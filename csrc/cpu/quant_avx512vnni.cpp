// mk_cpu_linear_quant for AVX-512 (F, BW, VL, VNNI), in the order of bytes.
#if defined(__x86_64__)
#include "cpu/quant_avx512.h"
#include "cpu/quant_bytes.h"

namespace mk::cpu {
namespace {
using Order = Bytes;
}
}  // namespace mk::cpu

#include "cpu/quant_dequantize.h"
#include "cpu/quant_kernels.h"

const mk::cpu::QuantKernels mk::cpu::kQuantAvx512 = {mk::cpu::kQuantProducts, mk::cpu::dequantize};

#endif
