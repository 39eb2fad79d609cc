// PTX instructions that sm_80 and later have, one function each, named as the mnemonic.
// ISA = https://docs.nvidia.com/cuda/parallel-thread-execution/index.html
#pragma once

#include <cstdint>

namespace mk::ptx {

// ISA#data-movement-and-conversion-instructions-ld
// Data that is read once: it does not push what is reused (norm weights, rope tables) out of L1.
__device__ __forceinline__ uint4 ld_global_l1_no_allocate_v4(const void* address) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

__device__ __forceinline__ uint4 ld_global_v4(const void* address) {
    uint4 v;
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address)
                 : "memory");
    return v;
}

// Not from L1, which may hold what was there before another kernel wrote.
__device__ __forceinline__ int32_t ld_global_cg(const int32_t* address) {
    int32_t v;
    asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}

// Past L1, too, data that no kernel of the launch writes, kOffset bytes behind the address.
template <int kOffset = 0>
__device__ __forceinline__ uint4 ld_global_nc_l1_no_allocate_v4(const void* address) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(address), "n"(kOffset));
    return v;
}

template <int kOffset = 0>
__device__ __forceinline__ uint2 ld_global_nc_l1_no_allocate_v2(const void* address) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2 + %3];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(address), "n"(kOffset));
    return v;
}

template <int kOffset = 0>
__device__ __forceinline__ uint32_t ld_global_nc_l1_no_allocate(const void* address) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1 + %2];"
                 : "=r"(v)
                 : "l"(address), "n"(kOffset));
    return v;
}

template <int kOffset = 0>
__device__ __forceinline__ uint32_t ld_global_nc_l1_no_allocate_u16(const void* address) {
    uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1 + %2];"
                 : "=r"(v)
                 : "l"(address), "n"(kOffset));
    return v;
}

// From kOffset bytes behind an address of shared memory.
template <int kOffset = 0>
__device__ __forceinline__ uint4 ld_shared_v4(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address), "n"(kOffset)
                 : "memory");
    return v;
}

// ISA#data-movement-and-conversion-instructions-st
__device__ __forceinline__ void st_global_v4(void* address, uint4 v) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

// Both words in one access, even where one of them is not used.
__device__ __forceinline__ uint2 ld_shared_v2(uint32_t address) {
    uint2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "r"(address)
                 : "memory");
    return v;
}

// `address` is one of shared memory, kOffset bytes before the place.
template <int kOffset = 0>
__device__ __forceinline__ void st_shared_v2(uint32_t address, uint2 v) {
    asm volatile("st.shared.v2.b32 [%0 + %1], {%2, %3};" ::"r"(address), "n"(kOffset), "r"(v.x),
                 "r"(v.y)
                 : "memory");
}
template <int kOffset = 0>
__device__ __forceinline__ void st_shared_v4(uint32_t address, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(address), "n"(kOffset),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// ISA#data-movement-and-conversion-instructions-mov
// A value that the compiler does not know how to recompute: it stays in its register, where nvcc
// would derive it anew in each turn of a loop. (ptxas, which counts registers, still may.)
__device__ __forceinline__ uint32_t mov_b32(uint32_t a) {
    uint32_t d;
    asm volatile("mov.b32 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

__device__ __forceinline__ int64_t mov_b64(int64_t a) {
    int64_t d;
    asm volatile("mov.b64 %0, %1;" : "=l"(d) : "l"(a));
    return d;
}

// threadIdx.x read here and now, so that what is derived from it holds no register elsewhere.
__device__ __forceinline__ uint32_t mov_u32_tid_x() {
    uint32_t d;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(d));
    return d;
}

// The halves of a register.
__device__ __forceinline__ void mov_b32(uint16_t& low, uint16_t& high, uint32_t a) {
    asm("mov.b32 {%0, %1}, %2;" : "=h"(low), "=h"(high) : "r"(a));
}

// ISA#logic-and-shift-instructions-lop3  kTable: the result for a = 0xF0, b = 0xCC, c = 0xAA
template <int kTable>
__device__ __forceinline__ uint32_t lop3_b32(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
    return d;
}

// ISA#data-movement-and-conversion-instructions-cvt
__device__ __forceinline__ uint32_t cvt_rn_bf16x2_f32(float hi, float lo) {
    uint32_t d;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}

__device__ __forceinline__ uint32_t cvt_rn_f16x2_f32(float hi, float lo) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
    return d;
}

__device__ __forceinline__ float cvt_f32_f16(uint16_t a) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a));
    return d;
}

// ISA#half-precision-floating-point-instructions-fma
__device__ __forceinline__ uint32_t fma_rn_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// ISA#half-precision-floating-point-instructions-mul
__device__ __forceinline__ uint32_t mul_rn_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// ISA#half-precision-floating-point-instructions-sub
__device__ __forceinline__ uint32_t sub_rn_f16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// ISA#half-precision-floating-point-instructions-max  (NaN if either is)
__device__ __forceinline__ uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// ISA#floating-point-instructions-rsqrt  (relative error below 2^-22.9)
__device__ __forceinline__ float rsqrt_approx_f32(float a) {
    float d;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// ISA#floating-point-instructions-max  (NaN if either is)
__device__ __forceinline__ float max_nan_f32(float a, float b) {
    float d;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
    return d;
}

// ISA#floating-point-instructions-rcp  (at most 1 ulp)
__device__ __forceinline__ float rcp_approx_ftz_f32(float a) {
    float d;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// ISA#floating-point-instructions-ex2  (relative error below 2^-22)
__device__ __forceinline__ float ex2_approx_ftz_f32(float a) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// ISA#floating-point-instructions-lg2  (absolute error below 2^-22)
__device__ __forceinline__ float lg2_approx_ftz_f32(float a) {
    float d;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(a));
    return d;
}

// ISA#data-movement-and-conversion-instructions-cp-async
// 16 bytes from global to shared memory, past L1; of them src_bytes (0 ... 16) are read and the
// rest is 0.
__device__ __forceinline__ void cp_async_cg_16(uint32_t smem, const void* gmem) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem), "l"(gmem) : "memory");
}

__device__ __forceinline__ void cp_async_cg_16(uint32_t smem, const void* gmem, int src_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem),
                 "r"(src_bytes)
                 : "memory");
}

// The same, kSmem and kGmem bytes behind the addresses.
template <int kSmem, int kGmem>
__device__ __forceinline__ void cp_async_cg_16(uint32_t smem, const void* gmem) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(smem), "l"(gmem),
                 "n"(kSmem), "n"(kGmem)
                 : "memory");
}

template <int kSmem, int kGmem>
__device__ __forceinline__ void cp_async_cg_16(uint32_t smem, const void* gmem, int src_bytes) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16, %4;" ::"r"(smem), "l"(gmem),
                 "n"(kSmem), "n"(kGmem), "r"(src_bytes)
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ISA#parallel-synchronization-and-communication-instructions-bar
// Named barriers 0 ... 15, of `threads` threads in whole warps: those that sync and those that only
// arrive.
__device__ __forceinline__ void bar_sync(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ISA#data-movement-and-conversion-instructions-prefetch-prefetchu
__device__ __forceinline__ void prefetch_global_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// ISA#warp-level-matrix-instructions-ldmatrix
// Four 8x8 matrices of 2-byte elements; lane 8i + r gives the address of row r of matrix i, which
// lies kOffset bytes further.
template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&d)[4], uint32_t smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(smem), "n"(kOffset)
                 : "memory");
}

template <int kOffset = 0>
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&d)[4], uint32_t smem) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(smem), "n"(kOffset)
                 : "memory");
}

// ISA#warp-level-matrix-instructions-movmatrix
// An 8x8 matrix of 2-byte elements, in the layout of ldmatrix, transposed between the lanes.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t a) {
    uint32_t d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// ISA#warp-level-matrix-instructions-for-mma
// d += a b, a 16x16, b 16x8, fp32 sums.
__device__ __forceinline__ void mma_m16n8k16_f32_bf16(float (&d)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_m16n8k16_f32_f16(float (&d)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace mk::ptx
