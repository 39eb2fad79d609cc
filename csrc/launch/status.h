// Errors: a status for the caller, and a message of this thread for people.
#pragma once

#include "minitron_kernels.h"

namespace mk {

// Sets mk_last_error() and returns `status`.
__attribute__((format(printf, 2, 3))) mk_status fail(mk_status status, const char* format, ...);

}  // namespace mk

// Return from a function that returns mk_status when `condition` does not hold.
#define MK_REQUIRE(condition, status, ...)                        \
    do {                                                          \
        if (!(condition)) return ::mk::fail(status, __VA_ARGS__); \
    } while (0)

// Hand a failure up to the caller.
#define MK_TRY(expression)                                                            \
    do {                                                                              \
        if (const mk_status status_ = (expression); status_ != MK_OK) return status_; \
    } while (0)
