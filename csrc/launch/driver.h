// The CUDA driver API, loaded by dlopen: the library imports where there is no driver, and the
// emulator (tests/emulator/) can stand in for it. The few types needed are declared here so that
// the host side compiles without CUDA headers; names and values are those of cuda.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "launch/status.h"

namespace mk::cuda {

using CUresult = int;
using CUdevice = int;
using CUcontext = struct CUctx_st*;
using CUlibrary = struct CUlib_st*;
using CUkernel = struct CUkern_st*;
using CUstream = void*;

constexpr CUresult kSuccess = 0;
constexpr CUresult kInvalidContext = 201;
constexpr CUresult kNotFound = 500;

constexpr int kAttributeNumSms = 16;
constexpr int kAttributeMajor = 75;
constexpr int kAttributeMinor = 76;
constexpr int kAttributeSmemPerBlockOptin = 97;

constexpr int kKernelMaxDynamicSmem = 8;

constexpr int kCaptureModeRelaxed = 2;

constexpr int kLaunchCluster = 4;
constexpr int kLaunchProgrammaticStreamSerialization = 6;

constexpr int kTensorMapUint8 = 0;
constexpr int kTensorMapFloat16 = 6;
constexpr int kTensorMapBfloat16 = 9;
constexpr int kTensorMapSwizzle128B = 3;
constexpr int kTensorMapL2Promotion256B = 3;

struct CUlaunchAttribute {
    int id;
    alignas(8) union {
        char pad[64];
        unsigned cluster_dim[3];
        int programmatic_stream_serialization;
    } value;
};
static_assert(sizeof(CUlaunchAttribute) == 72 && offsetof(CUlaunchAttribute, value) == 8);

struct CUlaunchConfig {
    unsigned grid[3];
    unsigned block[3];
    unsigned smem_bytes;
    CUstream stream;
    CUlaunchAttribute* attributes;
    unsigned num_attributes;
};
static_assert(sizeof(CUlaunchConfig) == 56);

struct Driver {
    CUresult (*cuInit)(unsigned flags);
    CUresult (*cuDriverGetVersion)(int*);
    CUresult (*cuGetErrorName)(CUresult, const char**);
    CUresult (*cuGetErrorString)(CUresult, const char**);
    CUresult (*cuDeviceGetAttribute)(int*, int attribute, CUdevice);
    CUresult (*cuDeviceGetName)(char*, int size, CUdevice);
    CUresult (*cuDeviceGet)(CUdevice*, int ordinal);
    CUresult (*cuDevicePrimaryCtxGetState)(CUdevice, unsigned* flags, int* active);
    CUresult (*cuDevicePrimaryCtxRetain)(CUcontext*, CUdevice);
    CUresult (*cuCtxGetDevice)(CUdevice*);
    CUresult (*cuCtxSetCurrent)(CUcontext);
    CUresult (*cuLibraryLoadData)(CUlibrary*, const void* code, int*, void**, unsigned, int*,
                                  void**, unsigned);
    CUresult (*cuLibraryGetKernel)(CUkernel*, CUlibrary, const char* name);
    CUresult (*cuKernelSetAttribute)(int attribute, int value, CUkernel, CUdevice);
    CUresult (*cuThreadExchangeStreamCaptureMode)(int*);
    CUresult (*cuTensorMapEncodeTiled)(void* map, int type, uint32_t rank, void* address,
                                       const uint64_t* dims, const uint64_t* strides,
                                       const uint32_t* box, const uint32_t* element_strides,
                                       int interleave, int swizzle, int l2_promotion, int oob_fill);
    CUresult (*cuOccupancyMaxActiveClusters)(int*, CUkernel, const CUlaunchConfig*);
    CUresult (*cuLaunchKernelEx)(const CUlaunchConfig*, CUkernel, void** params, void** extra);
};

// The driver, loaded and initialised on first use: MK_CUDA_DRIVER names the file, default
// libcuda.so.1. A failure is final for the process.
mk_status get_driver(const Driver** driver);

// "cuLaunchKernelEx: CUDA_ERROR_INVALID_VALUE (invalid argument)" as MK_ERR_DRIVER.
mk_status fail_driver(const Driver& driver, const char* call, CUresult result);

}  // namespace mk::cuda

// Call a driver function; hand a failure up to the caller.
#define MK_CUDA(driver, function, ...)                                                            \
    do {                                                                                          \
        if (const auto result_ = (driver).function(__VA_ARGS__); result_ != ::mk::cuda::kSuccess) \
            return ::mk::cuda::fail_driver(driver, #function, result_);                           \
    } while (0)
