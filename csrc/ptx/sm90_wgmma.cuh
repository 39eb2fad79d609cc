// wgmma of sm_90a: D [64, N] = A [64, 16] B [16, N] (+ D), fp32 sums, issued by the four warps of a
// warpgroup together and executed while they go on.
//
//   D, A in registers    as of mma.m16n8k16 (sm80.cuh): warp w has rows 16w ... 16w + 15
//   A, B in shared       by descriptors: smem_descriptor.cuh
//
// Between wgmma_fence() and wgmma_wait_group() nothing may touch the registers of D and A; pin()
// keeps the compiler from moving what does across them.
// ISA = https://docs.nvidia.com/cuda/parallel-thread-execution/index.html
#pragma once

#include "ptx/sm90.cuh"

namespace mk::ptx {

// The value is made before this place, or used after it, for all that the compiler knows.
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }

template <class T, int kN>
__device__ __forceinline__ void pin(T (&x)[kN][4]) {
    MK_UNROLL
    for (int i = 0; i < 4 * kN; ++i) pin(x[i / 4][i % 4]);
}

// ISA#asynchronous-warpgroup-level-matrix-instructions-wgmma-fence
// What was written to registers before is seen by the wgmma after.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// ISA#asynchronous-warpgroup-level-matrix-instructions-wgmma-commit-group
__device__ __forceinline__ void wgmma_commit_group() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// ISA#asynchronous-warpgroup-level-matrix-instructions-wgmma-wait-group
// Wait until at most kPending of the latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Operands %0 ... of D.
#define MK_D32                                                                       \
    "{"                                                                              \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
    "}"
#define MK_D64                                                                         \
    "{"                                                                                \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"   \
    "}"
#define MK_D4(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MK_D16(d, i) MK_D4(d, i), MK_D4(d, i + 1), MK_D4(d, i + 2), MK_D4(d, i + 3)

// ISA#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
// A and B in shared memory, both K-major. D is added to if kAccumulate.
template <bool kAccumulate>
__device__ __forceinline__ void wgmma_m64n128k16_f32_bf16(float (&d)[16][4], uint64_t a,
                                                          uint64_t b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %66, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " MK_D64
        ", %64, %65, p, 1, 1, 0, 0;}"
        : MK_D16(d, 0), MK_D16(d, 4), MK_D16(d, 8), MK_D16(d, 12)
        : "l"(a), "l"(b), "n"(static_cast<int>(kAccumulate)));
}
template <bool kAccumulate>
__device__ __forceinline__ void wgmma_m64n128k16_f32_f16(float (&d)[16][4], uint64_t a,
                                                         uint64_t b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %66, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " MK_D64 ", %64, %65, p, 1, 1, 0, 0;}"
        : MK_D16(d, 0), MK_D16(d, 4), MK_D16(d, 8), MK_D16(d, 12)
        : "l"(a), "l"(b), "n"(static_cast<int>(kAccumulate)));
}

// D += A B, A in registers, B in shared memory MN-major: rows of k, each with N elements.
__device__ __forceinline__ void wgmma_m64n128k16_f32_bf16(float (&d)[16][4], const uint32_t (&a)[4],
                                                          uint64_t b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " MK_D64
        ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
        : MK_D16(d, 0), MK_D16(d, 4), MK_D16(d, 8), MK_D16(d, 12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_m64n64k16_f32_bf16(float (&d)[8][4], const uint32_t (&a)[4],
                                                         uint64_t b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " MK_D32
        ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;}"
        : MK_D16(d, 0), MK_D16(d, 4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_m64n128k16_f32_f16(float (&d)[16][4], const uint32_t (&a)[4],
                                                         uint64_t b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " MK_D64
        ", {%64, %65, %66, %67}, %68, p, 1, 1, 1;}"
        : MK_D16(d, 0), MK_D16(d, 4), MK_D16(d, 8), MK_D16(d, 12)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wgmma_m64n64k16_f32_f16(float (&d)[8][4], const uint32_t (&a)[4],
                                                        uint64_t b) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, 1, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " MK_D32
        ", {%32, %33, %34, %35}, %36, p, 1, 1, 1;}"
        : MK_D16(d, 0), MK_D16(d, 4)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#undef MK_D4
#undef MK_D16
#undef MK_D32
#undef MK_D64

}  // namespace mk::ptx
