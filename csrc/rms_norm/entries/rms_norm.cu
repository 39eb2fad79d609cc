#include "rms_norm/rms_norm.cuh"

#define MK_RMS_NORM(op, key, limit, Dtype, kAligned, kHasResidual)                \
    MK_ENTRY(limit, op, key)(const __grid_constant__ mk_rms_norm_params params) { \
        mk::rms_norm<mk::Dtype, kAligned, kHasResidual>(params);                  \
    }

#define MK_LIMIT __maxnreg__(mk::kRmsNormRegisters)
#define MK_ADD_LIMIT __maxnreg__(mk::kAddRmsNormRegisters)
// One access per element: bound by the accesses, not by the number of resident threads.
#define MK_UNALIGNED_LIMIT __launch_bounds__(mk::kRmsNormMaxThreads)

MK_RMS_NORM(rms_norm, bf16, MK_LIMIT, Bf16, true, false)
MK_RMS_NORM(rms_norm, bf16_unaligned, MK_UNALIGNED_LIMIT, Bf16, false, false)
MK_RMS_NORM(rms_norm, f16, MK_LIMIT, F16, true, false)
MK_RMS_NORM(rms_norm, f16_unaligned, MK_UNALIGNED_LIMIT, F16, false, false)
MK_RMS_NORM(add_rms_norm, bf16, MK_ADD_LIMIT, Bf16, true, true)
MK_RMS_NORM(add_rms_norm, bf16_unaligned, MK_UNALIGNED_LIMIT, Bf16, false, true)
MK_RMS_NORM(add_rms_norm, f16, MK_ADD_LIMIT, F16, true, true)
MK_RMS_NORM(add_rms_norm, f16_unaligned, MK_UNALIGNED_LIMIT, F16, false, true)
