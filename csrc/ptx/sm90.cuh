// PTX instructions that sm_90 and later have. On sm_80 and sm_89 those that only order launches do
// nothing: there a kernel starts after the one before it has ended.
// ISA = https://docs.nvidia.com/cuda/parallel-thread-execution/index.html
#pragma once

#include "ptx/sm80.cuh"

namespace mk::ptx {

// ISA#parallel-synchronization-and-communication-instructions-griddepcontrol
// Wait until the kernels before this one in the stream have ended and their writes are visible.
__device__ __forceinline__ void griddepcontrol_wait() {
#if MK_SM >= 90
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next kernel's blocks start now, where there is room; it still waits for this one's end.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if MK_SM >= 90
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace mk::ptx
