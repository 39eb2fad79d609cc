#include "launch/device.h"

#include <dlfcn.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

namespace mk {
namespace {

// The architectures that kernels are written for.
struct Arch {
    const char* name;
    int32_t sm;
    int32_t major, minor;  // the compute capability it is made for
};
constexpr Arch kArchs[] = {
    {"80", 80, 8, 0},
    {"89", 89, 8, 9},
    {"90a", 90, 9, 0},
    {"100a", 100, 10, 0},
};
// Serves every later capability that has no kernels of its own: code for sm_80 runs on 8.x as it
// is, and its PTX is forward compatible (that of sm_90a and sm_100a is not).
constexpr const Arch& kFallback = kArchs[0];

bool is_built(const Arch& arch) { return access(kernel_file(arch.name).c_str(), R_OK) == 0; }

std::string built_archs() {
    std::string names;
    for (const Arch& arch : kArchs) {
        if (is_built(arch)) names += (names.empty() ? "" : " ") + std::string(arch.name);
    }
    return names.empty() ? "none" : names;
}

// The architecture that serves a capability, or null.
const Arch* choose(int major, int minor) {
    for (const Arch& arch : kArchs) {
        if (arch.major == major && arch.minor == minor && is_built(arch)) return &arch;
    }
    return major >= kFallback.major && is_built(kFallback) ? &kFallback : nullptr;
}

mk_status query(const cuda::Driver& driver, cuda::CUdevice ordinal, Device* device) {
    char name[128] = "";
    int major = 0, minor = 0;
    MK_CUDA(driver, cuDeviceGetName, name, sizeof name, ordinal);
    MK_CUDA(driver, cuDeviceGetAttribute, &major, cuda::kAttributeMajor, ordinal);
    MK_CUDA(driver, cuDeviceGetAttribute, &minor, cuda::kAttributeMinor, ordinal);
    MK_CUDA(driver, cuDeviceGetAttribute, &device->info.num_sms, cuda::kAttributeNumSms, ordinal);
    MK_CUDA(driver, cuDeviceGetAttribute, &device->info.smem_per_block,
            cuda::kAttributeSmemPerBlockOptin, ordinal);
    const Arch* arch = choose(major, minor);
    MK_REQUIRE(arch, MK_ERR_UNSUPPORTED,
               "%s (compute capability %d.%d) is not supported by this build: it has kernels for "
               "%s, and sm_80's also serve later devices (MK_ARCHS chooses at build time)",
               name, major, minor, built_archs().c_str());
    if (arch->major != major || arch->minor != minor) {
        std::fprintf(stderr,
                     "minitron_kernels: %s (compute capability %d.%d) has no kernels of its own in "
                     "this build; it runs those of sm_%s%s\n",
                     name, major, minor, arch->name,
                     major == arch->major ? "" : ", compiled from PTX by the driver");
    }
    device->info.sm = arch->sm;
    device->arch = arch->name;
    device->ordinal = ordinal;
    return MK_OK;
}

// The device of this thread's context. A thread in which the CUDA runtime has done nothing yet has
// none, though other threads use the device: it gets what the runtime would give it, the primary
// context of device 0, if somebody has made that.
mk_status current_ordinal(const cuda::Driver& driver, cuda::CUdevice* ordinal) {
    const cuda::CUresult result = driver.cuCtxGetDevice(ordinal);
    if (result == cuda::kSuccess) return MK_OK;
    if (result != cuda::kInvalidContext) {
        return cuda::fail_driver(driver, "cuCtxGetDevice", result);
    }
    unsigned flags = 0;
    int is_active = 0;
    cuda::CUcontext context = nullptr;
    MK_CUDA(driver, cuDeviceGet, ordinal, 0);
    MK_CUDA(driver, cuDevicePrimaryCtxGetState, *ordinal, &flags, &is_active);
    MK_REQUIRE(is_active, MK_ERR_DRIVER, "no CUDA context is current on this thread");
    MK_CUDA(driver, cuDevicePrimaryCtxRetain, &context, *ordinal);
    MK_CUDA(driver, cuCtxSetCurrent, context);
    return MK_OK;
}

}  // namespace

std::string kernel_file(const char* arch) {
    static const std::string folder = [] {
        Dl_info info{};
        dladdr(reinterpret_cast<void*>(&mk_abi_version), &info);
        const std::string library = info.dli_fname ? info.dli_fname : "";
        return library.substr(0, library.rfind('/') + 1) + "kernels/";
    }();
    return folder + "sm_" + arch + ".fatbin";
}

mk_status current_device(const Device** device) {
    const cuda::Driver* driver = nullptr;
    MK_TRY(cuda::get_driver(&driver));
    cuda::CUdevice ordinal = 0;
    MK_TRY(current_ordinal(*driver, &ordinal));

    static std::mutex mutex;
    static std::map<cuda::CUdevice, Device> devices;  // nodes stay where they are
    const std::lock_guard lock(mutex);
    auto found = devices.find(ordinal);
    if (found == devices.end()) {
        Device queried{};
        MK_TRY(query(*driver, ordinal, &queried));
        queried.info.clusters_of_4 = clusters_of_4(*driver, queried);
        found = devices.emplace(ordinal, queried).first;
    }
    *device = &found->second;
    return MK_OK;
}

}  // namespace mk

extern "C" mk_status mk_current_device(mk_device* device) {
    MK_REQUIRE(device, MK_ERR_NULL, "device is NULL");
    const mk::Device* current = nullptr;
    MK_TRY(mk::current_device(&current));
    *device = current->info;
    return MK_OK;
}

extern "C" mk_status mk_kernels_for(int32_t major, int32_t minor, const char** arch) {
    MK_REQUIRE(arch, MK_ERR_NULL, "arch is NULL");
    const mk::Arch* chosen = mk::choose(major, minor);
    MK_REQUIRE(chosen, MK_ERR_UNSUPPORTED,
               "compute capability %d.%d is not supported by this build: it has kernels for %s",
               major, minor, mk::built_archs().c_str());
    *arch = chosen->name;
    return MK_OK;
}
