// Stores to shared memory of any block of the cluster, by the addresses of mapa_shared_cluster().
// ISA = https://docs.nvidia.com/cuda/parallel-thread-execution/index.html
#pragma once

#include "ptx/sm90.cuh"

namespace mk::ptx {

#if MK_SM >= 90

// ISA#data-movement-and-conversion-instructions-st  `remote` is kOffset bytes before the place.
template <int kOffset>
__device__ __forceinline__ void st_shared_cluster(uint32_t remote, float v) {
    asm volatile("st.shared::cluster.f32 [%0 + %1], %2;" ::"r"(remote), "n"(kOffset), "f"(v)
                 : "memory");
}
template <int kOffset>
__device__ __forceinline__ void st_shared_cluster(uint32_t remote, uint32_t v) {
    asm volatile("st.shared::cluster.b32 [%0 + %1], %2;" ::"r"(remote), "n"(kOffset), "r"(v)
                 : "memory");
}
template <int kOffset>
__device__ __forceinline__ void st_shared_cluster(uint32_t remote, const uint2& v) {
    asm volatile("st.shared::cluster.v2.b32 [%0 + %1], {%2, %3};" ::"r"(remote), "n"(kOffset),
                 "r"(v.x), "r"(v.y)
                 : "memory");
}
template <int kOffset>
__device__ __forceinline__ void st_shared_cluster(uint32_t remote, const uint4& v) {
    asm volatile("st.shared::cluster.v4.b32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(remote),
                 "n"(kOffset), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

#endif  // MK_SM >= 90

}  // namespace mk::ptx
