#include "quantize_fp8/quantize_fp8.cuh"

MK_ENTRY(__launch_bounds__(mk::kRowMaxThreads), quantize_fp8, b16)
(const __grid_constant__ mk_quantize_fp8_params params) { mk::quantize_fp8(params); }
