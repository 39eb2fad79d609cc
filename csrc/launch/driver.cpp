#include "launch/driver.h"

#include <dlfcn.h>

#include <cstdlib>

namespace mk::cuda {
namespace {

struct Loaded {
    Driver driver{};
    mk_status status = MK_OK;
    std::string error;
};

Loaded load() {
    Loaded loaded;
    const auto give_up = [&loaded](const std::string& error) {
        loaded.status = MK_ERR_DRIVER;
        loaded.error = error;
        return loaded;
    };
    const char* chosen = std::getenv("MK_CUDA_DRIVER");
    const std::string file = chosen && *chosen ? chosen : "libcuda.so.1";
    void* handle = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) return give_up("the CUDA driver could not be loaded: " + std::string(dlerror()));
    const char* missing = nullptr;
    const auto find = [&](auto& function, const char* name) {
        void* const symbol = dlsym(handle, name);
        if (!symbol) missing = name;
        function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    };
    Driver& d = loaded.driver;
    find(d.cuInit, "cuInit");
    find(d.cuDriverGetVersion, "cuDriverGetVersion");
    find(d.cuGetErrorName, "cuGetErrorName");
    find(d.cuGetErrorString, "cuGetErrorString");
    find(d.cuDeviceGetAttribute, "cuDeviceGetAttribute");
    find(d.cuDeviceGetName, "cuDeviceGetName");
    find(d.cuDeviceGet, "cuDeviceGet");
    find(d.cuDevicePrimaryCtxGetState, "cuDevicePrimaryCtxGetState");
    find(d.cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain");
    find(d.cuCtxGetDevice, "cuCtxGetDevice");
    find(d.cuCtxSetCurrent, "cuCtxSetCurrent");
    find(d.cuLibraryLoadData, "cuLibraryLoadData");
    find(d.cuLibraryGetKernel, "cuLibraryGetKernel");
    find(d.cuKernelSetAttribute, "cuKernelSetAttribute");
    find(d.cuThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode");
    find(d.cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled");
    find(d.cuOccupancyMaxActiveClusters, "cuOccupancyMaxActiveClusters");
    find(d.cuLaunchKernelEx, "cuLaunchKernelEx");
    if (missing) {
        return give_up(file + " has no " + missing + ": a driver for CUDA 12 or later is needed");
    }
    if (const CUresult result = d.cuInit(0); result != kSuccess) {
        fail_driver(d, "cuInit", result);
        return give_up(mk_last_error());
    }
    return loaded;
}

}  // namespace

mk_status get_driver(const Driver** driver) {
    static const Loaded loaded = load();
    *driver = &loaded.driver;
    if (loaded.status != MK_OK) return fail(loaded.status, "%s", loaded.error.c_str());
    return MK_OK;
}

mk_status fail_driver(const Driver& driver, const char* call, CUresult result) {
    const char* name = nullptr;
    const char* text = nullptr;
    driver.cuGetErrorName(result, &name);
    driver.cuGetErrorString(result, &text);
    return fail(MK_ERR_DRIVER, "%s: %s (%s)", call, name ? name : "unknown error",
                text ? text : "no description");
}

}  // namespace mk::cuda
