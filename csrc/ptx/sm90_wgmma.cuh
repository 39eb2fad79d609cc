// wgmma of sm_90a: D [64, N] = A [64, 16] B [16, N] (+ D), fp32 sums, issued by the four warps of a
// warpgroup together and executed while they go on.
//
//   D, A in registers    as of mma.m16n8k16 (sm80.cuh): warp w has rows 16w ... 16w + 15
//   A, B in shared       by descriptors: common/wgmma.cuh
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

// Operands %0 ... of D, as the instruction names them and as the statement binds them.
#define MK_D8 "%0, %1, %2, %3"
#define MK_D16 MK_D8 ", %4, %5, %6, %7"
#define MK_D24 MK_D16 ", %8, %9, %10, %11"
#define MK_D32 MK_D24 ", %12, %13, %14, %15"
#define MK_D40 MK_D32 ", %16, %17, %18, %19"
#define MK_D48 MK_D40 ", %20, %21, %22, %23"
#define MK_D56 MK_D48 ", %24, %25, %26, %27"
#define MK_D64 MK_D56 ", %28, %29, %30, %31"
#define MK_D96 \
    MK_D64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MK_D128 \
    MK_D96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MK_D160 \
    MK_D128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define MK_D192 \
    MK_D160 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MK_D224                                                                                \
    MK_D192                                                                                    \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
    "%111"
#define MK_D256                                                                              \
    MK_D224                                                                                  \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, " \
    "%126, %127"
#define MK_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MK_R8 MK_D4(0)
#define MK_R16 MK_R8, MK_D4(1)
#define MK_R24 MK_R16, MK_D4(2)
#define MK_R32 MK_R24, MK_D4(3)
#define MK_R40 MK_R32, MK_D4(4)
#define MK_R48 MK_R40, MK_D4(5)
#define MK_R56 MK_R48, MK_D4(6)
#define MK_R64 MK_R56, MK_D4(7)
#define MK_R96 MK_R64, MK_D4(8), MK_D4(9), MK_D4(10), MK_D4(11)
#define MK_R128 MK_R96, MK_D4(12), MK_D4(13), MK_D4(14), MK_D4(15)
#define MK_R160 MK_R128, MK_D4(16), MK_D4(17), MK_D4(18), MK_D4(19)
#define MK_R192 MK_R160, MK_D4(20), MK_D4(21), MK_D4(22), MK_D4(23)
#define MK_R224 MK_R192, MK_D4(24), MK_D4(25), MK_D4(26), MK_D4(27)
#define MK_R256 MK_R224, MK_D4(28), MK_D4(29), MK_D4(30), MK_D4(31)

enum class WgmmaType { kBf16, kF16 };  // of A and B
enum class WgmmaMajor { kK, kMn };     // which elements of B in shared memory are neighbours

// ISA#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
// wgmma<type, accumulate>(d, a, b); N is the number of columns of d. A is a descriptor of K-major
// rows, B one too then; or A is in registers, and B of either kind. %i0 ... are the operands after
// D.
#define MK_WGMMA_OF(type, types, n, i0, i1, i2, i3, i4, i5, i6)                            \
    template <WgmmaType kType, bool kAccumulate>                                           \
        requires(kType == WgmmaType::type)                                                 \
    __device__ __forceinline__ void wgmma(float (&d)[n / 8][4], uint64_t a, uint64_t b) {  \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" MK_D##n  \
                     "}, %" #i0 ", %" #i1 ", %" #i2 ", 1, 1, 0, 0;"                        \
                     : MK_R##n                                                             \
                     : "l"(a), "l"(b), "n"(static_cast<int>(kAccumulate)));                \
    }                                                                                      \
    template <WgmmaType kType, bool kAccumulate, WgmmaMajor kMajor = WgmmaMajor::kK>       \
        requires(kType == WgmmaType::type)                                                 \
    __device__ __forceinline__ void wgmma(float (&d)[n / 8][4], const uint32_t (&a)[4],    \
                                          uint64_t b) {                                    \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" MK_D##n  \
                     "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", %" #i5        \
                     ", 1, 1, %" #i6 ";"                                                   \
                     : MK_R##n                                                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                 \
                       "n"(static_cast<int>(kAccumulate)), "n"(static_cast<int>(kMajor))); \
    }
#define MK_WGMMA(...)                            \
    MK_WGMMA_OF(kBf16, "bf16.bf16", __VA_ARGS__) \
    MK_WGMMA_OF(kF16, "f16.f16", __VA_ARGS__)
MK_WGMMA(8, 4, 5, 6, 7, 8, 9, 10)
MK_WGMMA(16, 8, 9, 10, 11, 12, 13, 14)
MK_WGMMA(24, 12, 13, 14, 15, 16, 17, 18)
MK_WGMMA(32, 16, 17, 18, 19, 20, 21, 22)
MK_WGMMA(40, 20, 21, 22, 23, 24, 25, 26)
MK_WGMMA(48, 24, 25, 26, 27, 28, 29, 30)
MK_WGMMA(56, 28, 29, 30, 31, 32, 33, 34)
MK_WGMMA(64, 32, 33, 34, 35, 36, 37, 38)
MK_WGMMA(96, 48, 49, 50, 51, 52, 53, 54)
MK_WGMMA(128, 64, 65, 66, 67, 68, 69, 70)
MK_WGMMA(160, 80, 81, 82, 83, 84, 85, 86)
MK_WGMMA(192, 96, 97, 98, 99, 100, 101, 102)
MK_WGMMA(224, 112, 113, 114, 115, 116, 117, 118)
MK_WGMMA(256, 128, 129, 130, 131, 132, 133, 134)

#undef MK_D4
#undef MK_D8
#undef MK_D16
#undef MK_D24
#undef MK_D32
#undef MK_D40
#undef MK_D48
#undef MK_D56
#undef MK_D64
#undef MK_D96
#undef MK_D128
#undef MK_D160
#undef MK_D192
#undef MK_D224
#undef MK_D256
#undef MK_R8
#undef MK_R16
#undef MK_R24
#undef MK_R32
#undef MK_R40
#undef MK_R48
#undef MK_R56
#undef MK_R64
#undef MK_R96
#undef MK_R128
#undef MK_R160
#undef MK_R192
#undef MK_R224
#undef MK_R256
#undef MK_WGMMA_OF
#undef MK_WGMMA

}  // namespace mk::ptx
