/* RMSNorm from C: the header, libminitron_kernels.so and the CUDA driver, nothing else.
 *
 *   python -c "import minitron_kernels as m; print(m.get_include(), m.get_library())"
 *   cc -std=c99 -I<include> rms_norm.c <library> -Wl,-rpath,<its folder> -ldl -lm -o rms_norm
 *
 * The driver is loaded at run time, from MK_CUDA_DRIVER or libcuda.so.1, as the library does it. A
 * program that links to the driver or the CUDA runtime calls them directly instead.
 */
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "minitron_kernels.h"

enum { ROWS = 3, HIDDEN = 4096 };
static const float EPS = 1e-5f;

typedef unsigned long long device_pointer;

static struct {
    int (*cuInit)(unsigned);
    int (*cuDevicePrimaryCtxRetain)(void** context, int device);
    int (*cuCtxSetCurrent)(void* context);
    int (*cuMemAlloc_v2)(device_pointer*, size_t bytes);
    int (*cuMemFree_v2)(device_pointer);
    int (*cuMemcpyHtoD_v2)(device_pointer, const void*, size_t bytes);
    int (*cuMemcpyDtoH_v2)(void*, device_pointer, size_t bytes);
    int (*cuCtxSynchronize)(void);
} driver;

static void give_up(const char* what, const char* why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void load_driver(void) {
    const char* file = getenv("MK_CUDA_DRIVER");
    void* handle = dlopen(file ? file : "libcuda.so.1", RTLD_NOW);
    if (!handle) give_up("the CUDA driver", dlerror());
#define LOAD(name)                                                                         \
    do {                                                                                   \
        void* symbol = dlsym(handle, #name);                                               \
        if (!symbol) give_up(#name, "not in the driver");                                  \
        memcpy(&driver.name, &symbol, sizeof symbol); /* C99 has no cast that does this */ \
    } while (0)
    LOAD(cuInit);
    LOAD(cuDevicePrimaryCtxRetain);
    LOAD(cuCtxSetCurrent);
    LOAD(cuMemAlloc_v2);
    LOAD(cuMemFree_v2);
    LOAD(cuMemcpyHtoD_v2);
    LOAD(cuMemcpyDtoH_v2);
    LOAD(cuCtxSynchronize);
#undef LOAD
}

#define CUDA(call)                                       \
    do {                                                 \
        if ((call) != 0) give_up(#call, "driver error"); \
    } while (0)

static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16); /* to nearest even */
}

static float from_bf16(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static device_pointer to_device(const uint16_t* host, size_t count) {
    device_pointer pointer;
    CUDA(driver.cuMemAlloc_v2(&pointer, count * sizeof *host));
    CUDA(driver.cuMemcpyHtoD_v2(pointer, host, count * sizeof *host));
    return pointer;
}

int main(void) {
    static uint16_t x[ROWS * HIDDEN], weight[HIDDEN], out[ROWS * HIDDEN];
    for (int i = 0; i < ROWS * HIDDEN; ++i) x[i] = to_bf16((float)(i * 37 % 101 - 50) / 17);
    for (int i = 0; i < HIDDEN; ++i) weight[i] = to_bf16(1 + (float)(i % 13) / 64);

    load_driver();
    CUDA(driver.cuInit(0));
    void* context;
    CUDA(driver.cuDevicePrimaryCtxRetain(&context, 0));
    CUDA(driver.cuCtxSetCurrent(context));
    const device_pointer device_x = to_device(x, ROWS * HIDDEN);
    const device_pointer device_weight = to_device(weight, HIDDEN);
    const device_pointer device_out = to_device(out, ROWS * HIDDEN);

    mk_rms_norm_params params;
    memset(&params, 0, sizeof params);
    params.x = (const void*)(uintptr_t)device_x;
    params.weight = (const void*)(uintptr_t)device_weight;
    params.out = (void*)(uintptr_t)device_out;
    params.x_stride = params.out_stride = HIDDEN;
    params.rows = ROWS;
    params.hidden = HIDDEN;
    params.eps = EPS;
    params.dtype = MK_BF16;

    mk_device device;
    mk_plan plan;
    char text[200];
    if (mk_current_device(&device) != MK_OK) give_up("mk_current_device", mk_last_error());
    if (mk_rms_norm_plan(&params, &device, &plan) != MK_OK) {
        give_up("mk_rms_norm_plan", mk_last_error());
    }
    mk_plan_format(&plan, text, sizeof text);
    printf("%s\n", text);
    if (mk_rms_norm(&params, NULL) != MK_OK) give_up("mk_rms_norm", mk_last_error());
    CUDA(driver.cuCtxSynchronize());
    CUDA(driver.cuMemcpyDtoH_v2(out, device_out, sizeof out));
    CUDA(driver.cuMemFree_v2(device_x));
    CUDA(driver.cuMemFree_v2(device_weight));
    CUDA(driver.cuMemFree_v2(device_out));

    double worst = 0;
    for (int row = 0; row < ROWS; ++row) {
        double sum = 0;
        for (int i = 0; i < HIDDEN; ++i) sum += pow(from_bf16(x[row * HIDDEN + i]), 2);
        const double scale = 1 / sqrt(sum / HIDDEN + EPS);
        for (int i = 0; i < HIDDEN; ++i) {
            const double exact = from_bf16(x[row * HIDDEN + i]) * scale * from_bf16(weight[i]);
            const double error = fabs(from_bf16(out[row * HIDDEN + i]) - exact);
            worst = fmax(worst, error / fmax(fabs(exact), 1e-6));
        }
    }
    printf("largest relative error %.5f\n", worst);
    return worst < 0.0079 ? 0 : 1; /* two roundings to bf16 */
}
