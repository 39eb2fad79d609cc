// The current device, and which of the built architectures serves it.
#pragma once

#include "launch/driver.h"

namespace mk {

struct Device {
    mk_device info;
    const char* arch;  // "90a": the kernels that run on it
    cuda::CUdevice ordinal;
};

// The device of the current context; looked up once per device ordinal.
mk_status current_device(const Device** device);

// Clusters of 4 blocks, each with an SM to itself, that the current device runs at once. Its GPCs
// have different numbers of SMs. 0: an architecture without clusters, or its kernels cannot be
// loaded.
int32_t clusters_of_4(const cuda::Driver& driver, const Device& device);

// The fatbin file of an architecture, next to this library.
std::string kernel_file(const char* arch);

}  // namespace mk
