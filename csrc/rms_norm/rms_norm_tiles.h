// Tile constants of rms_norm, shared by the plan and the kernel. One row serves every arch: the
// kernel is bound by DRAM, and all of them want the same bytes in flight (see rms_norm.cuh).
#pragma once

namespace mk {

// 8 elements each, so a block of 512 covers the largest hidden size, 16384.
constexpr int kRmsNormVecsPerThread = 4;
constexpr int kRmsNormMaxThreads = 512;
constexpr int kRmsNormMaxHidden = 8 * kRmsNormVecsPerThread * kRmsNormMaxThreads;
constexpr int kRmsNormMaxGroups = kRmsNormMaxHidden / 8 / 32;  // of 32 vectors
// Registers per thread, and how many threads an SM then holds in blocks of 128. With 64 (80 for
// add_rms_norm) they spill; the rest is room for other versions of the compiler.
constexpr int kRmsNormRegisters = 96;
constexpr int kRmsNormThreadsPerSm = 640;
constexpr int kAddRmsNormRegisters = 128;
constexpr int kAddRmsNormThreadsPerSm = 512;

static_assert(kRmsNormMaxHidden == 16384 && kRmsNormMaxGroups == 64);
static_assert(kRmsNormRegisters * kRmsNormThreadsPerSm <= 65536);
static_assert(kAddRmsNormRegisters * kAddRmsNormThreadsPerSm <= 65536);

}  // namespace mk
