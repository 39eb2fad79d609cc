#include "launch/status.h"

#include <cstdarg>
#include <cstdio>

namespace mk {
namespace {

thread_local char last_error[1024] = "";

}  // namespace

mk_status fail(mk_status status, const char* format, ...) {
    std::va_list args;
    va_start(args, format);
    std::vsnprintf(last_error, sizeof last_error, format, args);
    va_end(args);
    return status;
}

}  // namespace mk

extern "C" int32_t mk_abi_version(void) { return MK_ABI_VERSION; }

extern "C" const char* mk_last_error(void) { return mk::last_error; }

extern "C" const char* mk_status_name(mk_status status) {
    switch (status) {
        case MK_OK:
            return "MK_OK";
        case MK_ERR_NULL:
            return "MK_ERR_NULL";
        case MK_ERR_DTYPE:
            return "MK_ERR_DTYPE";
        case MK_ERR_SHAPE:
            return "MK_ERR_SHAPE";
        case MK_ERR_STRIDE:
            return "MK_ERR_STRIDE";
        case MK_ERR_ALIGNMENT:
            return "MK_ERR_ALIGNMENT";
        case MK_ERR_VALUE:
            return "MK_ERR_VALUE";
        case MK_ERR_UNSUPPORTED:
            return "MK_ERR_UNSUPPORTED";
        case MK_ERR_DRIVER:
            return "MK_ERR_DRIVER";
        case MK_ERR_MEMORY:
            return "MK_ERR_MEMORY";
    }
    return "unknown mk_status";
}
