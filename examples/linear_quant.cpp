// A product with a quantised matrix, from C++: GGUF blocks are packed in host memory, uploaded, and
// multiplied as they are.
//
//   python -c "import minitron_kernels as m; print(m.get_include(), m.get_library())"
//   c++ -std=c++17 -I<include> linear_quant.cpp <library> -Wl,-rpath,<its folder> -ldl -o
//   linear_quant
//
// The driver is loaded at run time, as in rms_norm.c.
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "minitron_kernels.h"

namespace {

constexpr int kRows = 40;      // of w: N
constexpr int kCols = 512;     // K
constexpr int kTokens = 3;     // rows of x: M, of which more than 16 would need a workspace
constexpr int kElements = 32;  // of a Q8_0 block: scale d as f16, then 32 int8

struct BlockQ8_0 {
    std::uint16_t d;
    std::int8_t q[kElements];
};
static_assert(sizeof(BlockQ8_0) == 34);

[[noreturn]] void give_up(const char* what, const char* why) {
    std::fprintf(stderr, "%s: %s\n", what, why);
    std::exit(1);
}

void check(mk_status status, const char* what) {
    if (status != MK_OK) give_up(what, mk_last_error());
}

// ---- the driver

using DevicePointer = unsigned long long;

void* driver_library() {
    const char* file = std::getenv("MK_CUDA_DRIVER");
    void* handle = dlopen(file ? file : "libcuda.so.1", RTLD_NOW);
    if (!handle) give_up("the CUDA driver", dlerror());
    return handle;
}

// driver<int(unsigned)>("cuInit")(0)
template <typename Signature>
Signature* driver(const char* name) {
    static void* const library = driver_library();
    void* symbol = dlsym(library, name);
    if (!symbol) give_up(name, "not in the driver");
    return reinterpret_cast<Signature*>(symbol);
}

void cuda(int status, const char* what) {
    if (status != 0) give_up(what, "driver error");
}

template <typename T>
T* allocate(std::size_t count) {
    DevicePointer pointer = 0;
    cuda(driver<int(DevicePointer*, std::size_t)>("cuMemAlloc_v2")(&pointer, count * sizeof(T)),
         "cuMemAlloc");
    return reinterpret_cast<T*>(pointer);
}

template <typename T>
T* to_device(const std::vector<T>& host) {
    T* device = allocate<T>(host.size());
    cuda(driver<int(DevicePointer, const void*, std::size_t)>("cuMemcpyHtoD_v2")(
             reinterpret_cast<DevicePointer>(device), host.data(), host.size() * sizeof(T)),
         "cuMemcpyHtoD");
    return device;
}

template <typename T>
std::vector<T> to_host(const T* device, std::size_t count) {
    std::vector<T> host(count);
    cuda(driver<int(void*, DevicePointer, std::size_t)>("cuMemcpyDtoH_v2")(
             host.data(), reinterpret_cast<DevicePointer>(device), count * sizeof(T)),
         "cuMemcpyDtoH");
    return host;
}

void free_device(const void* device) {
    cuda(driver<int(DevicePointer)>("cuMemFree_v2")(reinterpret_cast<DevicePointer>(device)),
         "cuMemFree");
}

std::uint16_t to_bf16(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest even
}

float from_bf16(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace

int main() {
    // w[n, k] = d q with d = 2^-7 or 2^-6, whose f16 are 0x2000 and 0x2400; x of bf16.
    std::vector<BlockQ8_0> blocks(kRows * kCols / kElements);
    for (std::size_t i = 0; i < blocks.size(); ++i) {
        blocks[i].d = i % 3 ? 0x2000 : 0x2400;
        for (int j = 0; j < kElements; ++j) {
            blocks[i].q[j] = static_cast<std::int8_t>((i * 131 + j * 37) % 255 - 127);
        }
    }
    std::vector<std::uint16_t> x(kTokens * kCols);
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = to_bf16(static_cast<float>(static_cast<int>(i * 29 % 97) - 48) / 31);
    }

    std::int64_t packed_bytes = 0;
    check(mk_quant_packed_bytes(MK_Q8_0, kRows, kCols, &packed_bytes), "mk_quant_packed_bytes");
    std::vector<std::uint8_t> tiles(static_cast<std::size_t>(packed_bytes));
    mk_quant_pack_params packing{};
    packing.blocks = blocks.data();
    packing.tiles = tiles.data();
    packing.row_bytes = kCols / kElements * sizeof(BlockQ8_0);
    packing.type = MK_Q8_0;
    packing.rows = kRows;
    packing.k = kCols;
    packing.num_threads = 1;
    check(mk_quant_pack(&packing), "mk_quant_pack");

    void* context = nullptr;
    cuda(driver<int(unsigned)>("cuInit")(0), "cuInit");
    cuda(driver<int(void**, int)>("cuDevicePrimaryCtxRetain")(&context, 0), "the context");
    cuda(driver<int(void*)>("cuCtxSetCurrent")(context), "cuCtxSetCurrent");
    const std::uint8_t* device_tiles = to_device(tiles);
    const std::uint16_t* device_x = to_device(x);
    float* device_y = allocate<float>(kTokens * kRows);

    mk_linear_quant_params params{};
    params.linear.x = device_x;
    params.linear.out = device_y;
    params.linear.x_stride = kCols;
    params.linear.out_stride = kRows;
    params.linear.m = kTokens;
    params.linear.n = kRows;
    params.linear.k = kCols;
    params.linear.dtype = MK_BF16;
    params.linear.out_dtype = MK_F32;
    params.w = {device_tiles, MK_Q8_0, kRows};

    mk_device device;
    mk_plan plan;
    char text[200];
    check(mk_current_device(&device), "mk_current_device");
    check(mk_linear_quant_plan(&params, &device, &plan), "mk_linear_quant_plan");
    mk_plan_format(&plan, text, sizeof text);
    std::printf("%s\n", text);
    check(mk_linear_quant(&params, nullptr), "mk_linear_quant");
    cuda(driver<int()>("cuCtxSynchronize")(), "cuCtxSynchronize");
    const std::vector<float> y = to_host(device_y, kTokens * kRows);
    free_device(device_tiles);
    free_device(device_x);
    free_device(device_y);

    double worst = 0;
    for (int m = 0; m < kTokens; ++m) {
        for (int n = 0; n < kRows; ++n) {
            double exact = 0, size = 0;
            for (int k = 0; k < kCols; ++k) {
                const BlockQ8_0& block = blocks[(n * kCols + k) / kElements];
                const double d = block.d == 0x2000 ? 1.0 / 128 : 1.0 / 64;
                const double term = d * block.q[k % kElements] * from_bf16(x[m * kCols + k]);
                exact += term;
                size += std::fabs(term);
            }
            worst = std::fmax(worst, std::fabs(y[m * kRows + n] - exact) / size);
        }
    }
    std::printf("largest error over the sum of magnitudes %.2e\n", worst);
    return worst < 1e-6 ? 0 : 1;  // the inputs are exact, sums are fp32
}
