// Operands of wgmma, and what the warpgroups that issue it have.
#pragma once

#include "common/vec.cuh"
#include "ptx/sm90_wgmma.cuh"

namespace mk {

// Registers of a thread, by setmaxnreg, where one warpgroup copies and two multiply. Together they
// have what the launch gave the three: of 65536 for 384 threads 168 each, in eights. More than that
// setmaxnreg would wait for without end.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
static_assert(kProducerRegisters + 2 * kConsumerRegisters <= 3 * 168);

constexpr ptx::WgmmaType wgmma_type(Bf16) { return ptx::WgmmaType::kBf16; }
constexpr ptx::WgmmaType wgmma_type(F16) { return ptx::WgmmaType::kF16; }
template <class Dtype>
constexpr ptx::WgmmaType kWgmmaType = wgmma_type(Dtype());

// Operand in shared memory with the 128-byte swizzle: `lead` bytes between atoms along MN (MN-major
// only), `stride` between groups of 8 rows.
// ISA#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t smem, int lead, int stride) {
    return uint64_t{smem >> 4 & 0x3FFF} | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32 |
           uint64_t{1} << 62;
}
// The same without a swizzle, K-major: 8 rows x 16 bytes lie together, `lead` bytes from one such
// to the next along K, `stride` to the next 8 rows.
__device__ __forceinline__ uint64_t wgmma_plain_operand(uint32_t smem, int lead, int stride) {
    return uint64_t{smem >> 4 & 0x3FFF} | uint64_t(lead >> 4) << 16 | uint64_t(stride >> 4) << 32;
}
// That `bytes` further.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t operand, uint32_t bytes) {
    return operand + (bytes >> 4);
}

}  // namespace mk
