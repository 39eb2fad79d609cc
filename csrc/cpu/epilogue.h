// The epilogues of matrix products (mk_epilogue) over Vec, which the including file has defined.
#pragma once

#include "cpu/vec_math.h"
#include "minitron_kernels.h"

namespace mk::cpu {
namespace {

// out = epilogue(sums), for `count` outputs of one row.
template <class T, class Out>
void finish_row(int32_t epilogue, const float* sums, const float* sums_up, const T* other, Out* out,
                int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int left = static_cast<int>(count - i < kLanes ? count - i : kLanes);
        Vec y = Vec::load(sums + i, left);
        if (epilogue == MK_EPILOGUE_SILU) {
            y = silu(y);
        } else if (epilogue == MK_EPILOGUE_SWIGLU) {
            y = silu(y) * Vec::load(sums_up + i, left);
        } else if (epilogue == MK_EPILOGUE_MUL) {
            y = y * Vec::load(other + i, left);
        } else if (epilogue == MK_EPILOGUE_ADD) {
            y = y + Vec::load(other + i, left);
        }
        y.store(out + i, left);
    }
}

}  // namespace
}  // namespace mk::cpu
