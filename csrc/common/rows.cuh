// Device side of rows_tiles.h.
#pragma once

#include "common/rows_tiles.h"
#include "common/vec.cuh"

namespace mk {

// First element of this thread's vector number `step`, which exists if it is below the row's size.
__device__ __forceinline__ int row_element(int step) {
    return ((step * gridDim.y + blockIdx.y) * blockDim.x + threadIdx.x) * kVec;
}

}  // namespace mk
