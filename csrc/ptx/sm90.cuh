// PTX instructions that sm_90 and later have (wgmma: sm90_wgmma.cuh). On sm_80 and sm_89 those that
// only order launches do nothing: there a kernel starts after the one before it has ended.
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

#if MK_SM >= 90

// ISA#parallel-synchronization-and-communication-instructions-mbarrier
// `barrier` is an address in shared memory, 8-byte aligned. A phase ends with `count` arrivals.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// The barrier kOffset bytes behind the address.
template <int kOffset = 0>
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0 + %1];" ::"r"(barrier), "n"(kOffset)
                 : "memory");
}

// The arrival, after `bytes` more that bulk copies have to bring in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Whether the phase of this parity has ended, after some time of waiting for it.
template <int kOffset = 0>
__device__ __forceinline__ bool mbarrier_try_wait_parity(uint32_t barrier, uint32_t parity) {
    uint32_t has_ended;
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1 + %3], %2; "
        "selp.b32 %0, 1, 0, p;}"
        : "=r"(has_ended)
        : "r"(barrier), "r"(parity), "n"(kOffset)
        : "memory");
    return has_ended;
}

// Until it has, in as few instructions: the branch takes the predicate.
__device__ __forceinline__ void mbarrier_wait_parity(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{.reg .pred p; $wait%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0 + 0], %1; "
        "@!p bra $wait%=;}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// ISA#parallel-synchronization-and-communication-instructions-barrier-cluster
// All threads of the cluster's blocks that have not exited. Relaxed: orders no memory.
__device__ __forceinline__ void barrier_cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void barrier_cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;");
}
__device__ __forceinline__ void barrier_cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ISA#special-registers-cluster-ctarank
__device__ __forceinline__ uint32_t mov_u32_cluster_ctarank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// ISA#data-movement-and-conversion-instructions-mapa
// The address, in the cluster, of what this block has at `smem`, in the block of that rank.
__device__ __forceinline__ uint32_t mapa_shared_cluster(uint32_t smem, uint32_t rank) {
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(smem), "r"(rank));
    return remote;
}

// ISA#parallel-synchronization-and-communication-instructions-membar
// After mbarrier_init(), before a barrier of the cluster, where other blocks use the mbarriers.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// The same kind of address, written to.
__device__ __forceinline__ void st_shared_cluster(uint32_t remote, float value) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
}

// An arrival at a barrier of any block of the cluster, by mapa_shared_cluster()'s address. It
// orders accesses of the block only, and so does a wait for it: enough for a stage that wgmma has
// read and TMA writes again. With the scope of the cluster the thread would first wait for all of
// its global writes (MEMBAR.GPU), and whoever waits would empty L1 (CCTL.IVALL).
template <int kOffset = 0>
__device__ __forceinline__ void mbarrier_arrive_shared_cluster(uint32_t remote) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0 + %1];" ::"r"(remote), "n"(kOffset)
                 : "memory");
}

// ISA#data-movement-and-conversion-instructions-cp-async-bulk-tensor
// The box of a tensor map (in the kernel's parameters) at these coordinates, innermost first, to
// shared memory. Its bytes count for `barrier`.
__device__ __forceinline__ void cp_async_bulk_tensor_4d(uint32_t smem, const void* map, int x0,
                                                        int x1, int x2, int x3, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(smem),
        "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_3d(uint32_t smem, const void* map, int x0,
                                                        int x1, int x2, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(smem),
        "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_2d(uint32_t smem, const void* map, int x0,
                                                        int x1, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(smem),
        "l"(map), "r"(x0), "r"(x1), "r"(barrier)
        : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_5d(uint32_t smem, const void* map, int x0,
                                                        int x1, int x2, int x3, int x4,
                                                        uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(smem),
        "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(barrier)
        : "memory");
}

// To the same place of each block of the cluster whose bit `blocks` has, each with its own barrier.
__device__ __forceinline__ void cp_async_bulk_tensor_5d_multicast(uint32_t smem, const void* map,
                                                                  int x0, int x1, int x2, int x3,
                                                                  int x4, uint32_t barrier,
                                                                  uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3, %4, %5, %6}], [%7], %8;" ::"r"(smem),
        "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(barrier), "h"(blocks)
        : "memory");
}
__device__ __forceinline__ void cp_async_bulk_tensor_4d_multicast(uint32_t smem, const void* map,
                                                                  int x0, int x1, int x2, int x3,
                                                                  uint32_t barrier,
                                                                  uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(smem),
        "l"(map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier), "h"(blocks)
        : "memory");
}

__device__ __forceinline__ void cp_async_bulk_tensor_2d_multicast(uint32_t smem, const void* map,
                                                                  int x0, int x1, uint32_t barrier,
                                                                  uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem),
        "l"(map), "r"(x0), "r"(x1), "r"(barrier), "h"(blocks)
        : "memory");
}

// ISA#data-movement-and-conversion-instructions-cp-async-bulk
// `bytes` adjacent ones, a multiple of 16 and aligned so, to shared memory; they count for
// `barrier`.
__device__ __forceinline__ void cp_async_bulk(uint32_t smem, const void* from, uint32_t bytes,
                                              uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
        "[%3];" ::"r"(smem),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
}
__device__ __forceinline__ void cp_async_bulk_multicast(uint32_t smem, const void* from,
                                                        uint32_t bytes, uint32_t barrier,
                                                        uint16_t blocks) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1], %2, [%3], %4;" ::"r"(smem),
        "l"(from), "r"(bytes), "r"(barrier), "h"(blocks)
        : "memory");
}

// The way back: the box at these coordinates is written, in the thread's current bulk group.
__device__ __forceinline__ void cp_async_bulk_tensor_3d_global_shared(const void* map, int x0,
                                                                      int x1, int x2,
                                                                      uint32_t smem) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::
            "l"(map),
        "r"(x0), "r"(x1), "r"(x2), "r"(smem)
        : "memory");
}

// ISA#data-movement-and-conversion-instructions-cp-async-bulk-commit-group
__device__ __forceinline__ void cp_async_bulk_commit_group() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// ISA#data-movement-and-conversion-instructions-cp-async-bulk-wait-group
// Wait until all but the latest kPending bulk groups have read shared memory, which may then be
// written again.
template <int kPending>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// ISA#warp-level-matrix-instructions-stmatrix
// The reverse of ldmatrix_x4: lane l's address is that of row l % 8 of matrix l / 8.
template <int kOffset = 0>
__device__ __forceinline__ void stmatrix_x4(uint32_t smem, const uint32_t (&r)[4]) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0 + %5], {%1, %2, %3, %4};" ::"r"(smem),
        "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "n"(kOffset)
        : "memory");
}

// ISA#data-movement-and-conversion-instructions-cp-async-bulk-prefetch-tensor
// The box to L2 alone, a hint.
__device__ __forceinline__ void cp_async_bulk_prefetch_tensor_2d_l2(const void* map, int x0,
                                                                    int x1) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map),
                 "r"(x0), "r"(x1)
                 : "memory");
}
__device__ __forceinline__ void cp_async_bulk_prefetch_tensor_4d_l2(const void* map, int x0, int x1,
                                                                    int x2, int x3) {
    asm volatile(
        "cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(map),
        "r"(x0), "r"(x1), "r"(x2), "r"(x3)
        : "memory");
}

// ISA#data-movement-and-conversion-instructions-cp-async-mbarrier-arrive
// The phase waits for this thread's cp.async so far, too; it counts no arrival.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t barrier) {
    asm volatile("cp.async.mbarrier.arrive.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ISA#parallel-synchronization-and-communication-instructions-membar
// What this thread wrote to shared memory is seen by later wgmma and bulk copies of those that it
// synchronises with.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ISA#miscellaneous-instructions-setmaxnreg
// Registers of a thread from here on, for all warps of the warpgroup.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif  // MK_SM >= 90

}  // namespace mk::ptx
