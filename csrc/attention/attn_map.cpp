#include "attention/attn_map.h"

#include <algorithm>

#include "launch/op.h"

namespace mk {
namespace {

// Whether elements of a tensor map share memory, which TMA does not allow.
bool overlap(const uint64_t (&dims)[4], const uint64_t (&strides)[3]) {
    int order[] = {0, 1, 2};
    std::sort(order, order + 3, [&](int a, int b) { return strides[a] < strides[b]; });
    uint64_t below = 2 * dims[0];
    for (const int i : order) {
        if (dims[i + 1] == 1) continue;
        if (strides[i] < below) return true;
        below += strides[i] * (dims[i + 1] - 1);
    }
    return false;
}

}  // namespace

mk_status attn_map(int32_t dtype, int32_t head_dim, const void* tensor,
                   std::initializer_list<int64_t> strides, std::initializer_list<int32_t> counts,
                   int32_t box_rows, TensorMap* to, int32_t* has_map) {
    uint64_t dims[4] = {static_cast<uint64_t>(head_dim), 1, 1, 1}, steps[3] = {};
    const uint32_t box[4] = {64, 1, static_cast<uint32_t>(box_rows), 1};
    const uint32_t ones[4] = {1, 1, 1, 1};
    const uint32_t rank = static_cast<uint32_t>(1 + counts.size());
    for (uint32_t i = 1; i < rank; ++i) {
        dims[i] = static_cast<uint64_t>(counts.begin()[i - 1]);
        // A dimension of one has no stride, but must be given one.
        steps[i - 1] =
            static_cast<uint64_t>(2 * (dims[i] > 1 ? strides.begin()[i - 1] : int64_t{head_dim}));
    }
    if (overlap(dims, steps)) return MK_OK;
    const cuda::Driver* driver = nullptr;
    MK_TRY(cuda::get_driver(&driver));
    MK_CUDA(*driver, cuTensorMapEncodeTiled, to,
            dtype == MK_BF16 ? cuda::kTensorMapBfloat16 : cuda::kTensorMapFloat16, rank,
            const_cast<void*>(tensor), dims, steps, box, ones, 0, cuda::kTensorMapSwizzle128B,
            cuda::kTensorMapL2Promotion256B, 0);
    *has_map = 1;
    return MK_OK;
}

}  // namespace mk
