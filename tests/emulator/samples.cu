// C++ that nvcc compiles for tests/test_emulator_isa.py: what single PTX instructions do not cover
// (libdevice, calls, switches, local memory, cooperative groups, printf, parameter structs).
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

#include <cassert>
#include <cstdio>
namespace cg = cooperative_groups;
extern "C" __global__ void k_math(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    float a = x[i];
    y[i * 16 + 0] = sinf(a);
    y[i * 16 + 1] = cosf(a);
    y[i * 16 + 2] = tanf(a);
    y[i * 16 + 3] = expf(a);
    y[i * 16 + 4] = logf(fabsf(a));
    y[i * 16 + 5] = sqrtf(fabsf(a));
    y[i * 16 + 6] = rsqrtf(fabsf(a));
    y[i * 16 + 7] = 1.0f / a;
    y[i * 16 + 8] = powf(fabsf(a), 1.3f);
    y[i * 16 + 9] = tanhf(a);
    y[i * 16 + 10] = erff(a);
    y[i * 16 + 11] = fmodf(a, 0.7f);
    y[i * 16 + 12] = __expf(a);
    y[i * 16 + 13] = floorf(a);
    y[i * 16 + 14] = roundf(a);
    y[i * 16 + 15] = a / 3.7f;
}
extern "C" __global__ void k_math64(const double* x, double* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    double a = x[i];
    y[i * 8 + 0] = sin(a);
    y[i * 8 + 1] = exp(a);
    y[i * 8 + 2] = log(fabs(a));
    y[i * 8 + 3] = sqrt(fabs(a));
    y[i * 8 + 4] = 1.0 / a;
    y[i * 8 + 5] = pow(fabs(a), 1.3);
    y[i * 8 + 6] = tanh(a);
    y[i * 8 + 7] = a / 3.7;
}
extern "C" __global__ void k_int(const int64_t* x, int64_t* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int64_t a = x[i], b = x[(i + 1) % n];
    if (b == 0) b = 1;
    y[i * 12 + 0] = a / b;
    y[i * 12 + 1] = a % b;
    y[i * 12 + 2] = (int)a / ((int)b ? (int)b : 1);
    y[i * 12 + 3] = (int64_t)((uint64_t)a / (uint64_t)b);
    y[i * 12 + 4] = __mul64hi(a, b);
    y[i * 12 + 5] = __popcll(a);
    y[i * 12 + 6] = __clzll(a);
    y[i * 12 + 7] = __brevll(a);
    y[i * 12 + 8] = a >> (b & 63);
    y[i * 12 + 9] = a << (b & 63);
    y[i * 12 + 10] = (int64_t)(int16_t)a * (int16_t)b;
    y[i * 12 + 11] = (uint32_t)a % 1000u;
}
__device__ __noinline__ float helper(float a, int k) { return k > 2 ? a * k : a + k; }
extern "C" __global__ void k_call(const float* x, float* y, int n) {
    int i = threadIdx.x;
    float acc = 0;
    for (int k = 0; k < i % 7; ++k) acc = helper(acc + x[i], k);
    y[i] = (i & 1) ? helper(acc, 5) : acc;
}
extern "C" __global__ void k_switch(const int* x, int* y) {
    int i = threadIdx.x, v = x[i], r = 0;
    switch (v) {
        case 0:
            r = 10;
            break;
        case 1:
            r = v * 7 + y[i];
            break;
        case 2:
            r = y[i] ^ 55;
            break;
        case 3:
            r = -v;
            break;
        case 4:
            r = y[i] / 3;
            break;
        case 5:
            r = y[i] % 7;
            break;
        case 6:
            r = 1 << (y[i] & 31);
            break;
        default:
            r = 99;
    }
    y[i] = r;
}
extern "C" __global__ void k_local(const int* x, int* y) {
    int buf[32];
    for (int k = 0; k < 32; ++k) buf[k] = x[(threadIdx.x + k) & 63];
    for (int k = 0; k < 31; ++k)
        for (int j = 0; j < 31 - k; ++j)
            if (buf[j] > buf[j + 1]) {
                int t = buf[j];
                buf[j] = buf[j + 1];
                buf[j + 1] = t;
            }
    y[threadIdx.x] = buf[x[threadIdx.x] & 31];
}
__constant__ float table[4] = {1.5f, 2.5f, 3.5f, 4.5f};
__device__ int counter = 5;
extern "C" __global__ void k_globals(float* y, int* z) {
    y[threadIdx.x] = table[threadIdx.x & 3];
    z[threadIdx.x] = atomicAdd(&counter, 1);
}
extern "C" __global__ void k_half(const __half* x, const __nv_bfloat16* u, float* y) {
    int i = threadIdx.x;
    __half a = x[i], b = x[i ^ 1];
    __nv_bfloat16 c = u[i], d = u[i ^ 1];
    y[i * 12 + 0] = __half2float(a + b);
    y[i * 12 + 1] = __half2float(a * b);
    y[i * 12 + 2] = __half2float(__hfma(a, b, a));
    y[i * 12 + 3] = __half2float(a / b);
    y[i * 12 + 4] = __bfloat162float(c + d);
    y[i * 12 + 5] = __bfloat162float(c * d);
    y[i * 12 + 6] = __bfloat162float(__hfma(c, d, c));
    y[i * 12 + 7] = __half2float(hexp(a));
    y[i * 12 + 8] = a < b;
    y[i * 12 + 9] = __half2float(__hmax(a, b));
    y[i * 12 + 10] = __half2int_rn(a);
    y[i * 12 + 11] = __half2float(hsqrt(__habs(a)));
}
extern "C" __global__ void k_fp8(const float* x, uint8_t* e4, uint8_t* e5, float* back) {
    int i = threadIdx.x;
    __nv_fp8_e4m3 a(x[i]);
    __nv_fp8_e5m2 b(x[i]);
    e4[i] = a.__x;
    e5[i] = b.__x;
    back[2 * i] = float(a);
    back[2 * i + 1] = float(b);
}
extern "C" __global__ void k_cg(int* y) {
    auto warp = cg::tiled_partition<32>(cg::this_thread_block());
    auto t8 = cg::tiled_partition<8>(warp);
    int v = threadIdx.x;
    for (int o = 4; o; o >>= 1) v += t8.shfl_down(v, o);
    if (threadIdx.x % 3 == 0) {
        auto g = cg::coalesced_threads();
        v += g.size() * 1000 + g.thread_rank();
    }
    y[threadIdx.x] = v + __reduce_add_sync(0xffffffff, 1) +
                     __popc(__match_any_sync(0xffffffff, threadIdx.x & 3));
}
extern "C" __global__ void k_printf(int* y) {
    if (threadIdx.x < 2) printf("hi %d %f %s\n", threadIdx.x, 1.5, "x");
    y[0] = 1;
    assert(y[0] == 1);
}
struct Big {
    float v[20];
    int64_t p[4];
    int n;
};
extern "C" __global__ void k_struct(__grid_constant__ const Big b, float* y) {
    const float* q = b.v;
    y[threadIdx.x] = q[threadIdx.x % 20] + b.p[threadIdx.x & 3] + b.n;
}
