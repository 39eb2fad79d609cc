// What the files of the driver API share; first the result codes that the emulator gives.
#pragma once

#include <functional>
#include <string>

namespace emu {
struct Device;
}

namespace emu::driver {

enum Result : int {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kInvalidDevice = 101,
    kInvalidImage = 200,
    kInvalidContext = 201,
    kNoBinaryForGpu = 209,
    kInvalidPtx = 218,
    kFileNotFound = 301,
    kInvalidHandle = 400,
    kNotFound = 500,
    kIllegalAddress = 700,
    kOutOfResources = 701,
    kLaunchTimeout = 702,
    kAssert = 710,
    kIllegalInstruction = 715,
    kMisalignedAddress = 716,
    kLaunchFailed = 719,
    kNotSupported = 801,
    kCaptureUnsupported = 900,
    kCaptureInvalidated = 901,
    kUnknown = 999,
};

// Of the calling thread's context; null without one.
const Device* current_device();

// Runs at once, unless the stream captures a graph, which then keeps it. Gives a Result.
using Work = std::function<int()>;
int submit(void* stream, Work work);

// Sets what emu_last_report() says.
void report(const std::string& text);

}  // namespace emu::driver
