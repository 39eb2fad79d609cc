#include "linear/linear_skinny_plan.h"

#include <algorithm>
#include <string>

#include "linear/linear_gemm_plan.h"

namespace mk {
namespace {

struct Tiling {
    int32_t cols, blocks;
    SkinnySm90Ring ring;
};

Tiling tiling(const Product& a, const mk_device& device) {
    const bool is_shared = a.is_aligned && a.m > kSkinnySm90AloneRows && device.num_sms > 1;
    const int32_t cluster = is_shared ? 2 : 1;
    const int32_t least =
        device.num_sms * skinny_sm90_strips_for_10_sms(a.m, cluster, a.norm_weight) / 10;
    const auto round_up = [&](int32_t count) { return ceil_div(count, cluster) * cluster; };
    int32_t cols = 0, strips = 0;
    for (const int32_t width : kSkinnySm90Cols) {
        cols = width;
        strips = round_up(ceil_div(a.n, cols));
        if (strips >= least) break;
    }
    // Blocks with equal numbers of strips, rather than one on every SM: DRAM is what they share.
    const int32_t most = device.num_sms / cluster * cluster;
    const int32_t blocks = round_up(ceil_div(strips, ceil_div(strips, most)));
    return {cols, blocks,
            skinny_sm90_ring(a.m, cols, cluster, a.norm_weight, a.k,
                             skinny_sm90_smem_bytes(blocks, device.num_sms))};
}

}  // namespace

mk_plan plan_skinny_sm90(int32_t dtype, const Product& a, const mk_device& device) {
    const Tiling t = tiling(a, device);
    mk_plan plan = make_plan("linear", device,
                             std::string(dtype_name(dtype)) + "_m" +
                                 std::to_string(kSkinnySm90Rows) + "_n" + std::to_string(t.cols));
    plan.grid[0] = a.m ? t.blocks : 0;
    plan.grid[1] = a.is_aligned ? 1 : std::clamp(ceil_div(a.m, kSkinnySm90Rows), 1, 65535);
    plan.cluster[0] = t.ring.cluster;
    plan.block[0] = kSkinnySm90Consumers + kSkinnySm90Producers +
                    (a.norm_weight || !a.is_aligned ? kSkinnySm90Fillers : 0);
    plan.smem_bytes = t.ring.num_stages * t.ring.stage_bytes +
                      skinny_sm90_rest_bytes(a.m, t.ring.cluster, a.norm_weight, a.k);
    return plan;
}

mk_status skinny_sm90_args(const Product& a, int32_t dtype, const mk_device& device,
                           SkinnySm90Ring* ring, TensorMap* x_map, TensorMap* w_map) {
    const Tiling t = tiling(a, device);
    *ring = t.ring;
    if (!a.is_aligned) return MK_OK;
    const int32_t x_rows = t.ring.x_rows / t.ring.cluster;
    MK_TRY(encode_rows(a.x, dtype, a.x_stride, a.m, a.k, x_rows, x_map));
    return encode_rows(a.w, dtype, a.w_stride, a.n, a.k, t.cols, w_map);
}

}  // namespace mk
