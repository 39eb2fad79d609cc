// wgmma of e4m3 operands on sm_90a: D [64, N] = A [64, 32] B [32, N] (+ D), as sm90_wgmma.cuh has
// it of 16 bits. A and B in shared memory are K-major, which is all that 8 bits have.
//
//   D               as of mma.m16n8k16: row l / 4 (+ 8), columns 2 (l % 4) and the next of lane l
//   A in registers  of mma.m16n8k32: a[0] row l / 4, k 4 (l % 4) ... + 3; a[1] row + 8; a[2], a[3]
//                   the same for k + 16
//
// The hardware aligns the 32 products and D to the largest of them and keeps about 13 fractional
// bits of the sum: longer sums belong into fp32 registers.
// ISA = https://docs.nvidia.com/cuda/parallel-thread-execution/index.html
#pragma once

#include "ptx/sm90_wgmma.cuh"

namespace mk::ptx {

// Operands %0 ... of D, as the instruction names them and as the statement binds them.
#define MK_D32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MK_D64 \
    MK_D32 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MK_D96 \
    MK_D64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MK_D128 \
    MK_D96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MK_D136 MK_D128 ", %64, %65, %66, %67"
#define MK_D160 \
    MK_D128 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define MK_D192 \
    MK_D160 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MK_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MK_R32 MK_D4(0), MK_D4(1), MK_D4(2), MK_D4(3)
#define MK_R64 MK_R32, MK_D4(4), MK_D4(5), MK_D4(6), MK_D4(7)
#define MK_R96 MK_R64, MK_D4(8), MK_D4(9), MK_D4(10), MK_D4(11)
#define MK_R128 MK_R96, MK_D4(12), MK_D4(13), MK_D4(14), MK_D4(15)
#define MK_R136 MK_R128, MK_D4(16)
#define MK_R160 MK_R128, MK_D4(16), MK_D4(17), MK_D4(18), MK_D4(19)
#define MK_R192 MK_R160, MK_D4(20), MK_D4(21), MK_D4(22), MK_D4(23)

// ISA#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
// wgmma_e4m3<accumulate>(d, a, b); N is the number of columns of d. A is a descriptor, or in
// registers. %i0 ... are the operands after D.
#define MK_WGMMA(n, i0, i1, i2, i3, i4, i5)                                                    \
    template <bool kAccumulate>                                                                \
    __device__ __forceinline__ void wgmma_e4m3(float (&d)[n / 8][4], uint64_t a, uint64_t b) { \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" MK_D##n      \
                     "}, %" #i0 ", %" #i1 ", %" #i2 ", 1, 1;"                                  \
                     : MK_R##n                                                                 \
                     : "l"(a), "l"(b), "n"(static_cast<int>(kAccumulate)));                    \
    }                                                                                          \
    template <bool kAccumulate>                                                                \
    __device__ __forceinline__ void wgmma_e4m3(float (&d)[n / 8][4], const uint32_t (&a)[4],   \
                                               uint64_t b) {                                   \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" MK_D##n      \
                     "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", %" #i5 ", 1, 1;"  \
                     : MK_R##n                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                     \
                       "n"(static_cast<int>(kAccumulate)));                                    \
    }
MK_WGMMA(32, 16, 17, 18, 19, 20, 21)
MK_WGMMA(64, 32, 33, 34, 35, 36, 37)
MK_WGMMA(96, 48, 49, 50, 51, 52, 53)
MK_WGMMA(128, 64, 65, 66, 67, 68, 69)
MK_WGMMA(136, 68, 69, 70, 71, 72, 73)
MK_WGMMA(192, 96, 97, 98, 99, 100, 101)

#undef MK_D4
#undef MK_D32
#undef MK_D64
#undef MK_D96
#undef MK_D128
#undef MK_D136
#undef MK_D160
#undef MK_D192
#undef MK_R32
#undef MK_R64
#undef MK_R96
#undef MK_R128
#undef MK_R136
#undef MK_R160
#undef MK_R192
#undef MK_WGMMA

}  // namespace mk::ptx
