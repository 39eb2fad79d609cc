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

// The fatbin file of an architecture, next to this library.
std::string kernel_file(const char* arch);

}  // namespace mk
