#include "quant/quant_gemm_plan.h"

#include <algorithm>

namespace mk {
namespace {

// Rows of tiles of a matrix that a block multiplies; those of two matrices are never in one block.
int32_t num_strips(const mk_quant_matrix* w, int count, const QuantGemmTile& tile) {
    int32_t strips = 0;
    for (int i = 0; i < count; ++i) strips += ceil_div(w[i].rows, tile.rows);
    return strips;
}

int64_t num_blocks(int32_t m, const mk_quant_matrix* w, int count, const QuantGemmTile& tile) {
    return static_cast<int64_t>(ceil_div(m, tile.tokens)) * num_strips(w, count, tile);
}

// The tile with the least work on the busiest SM. A small one's output costs 1.5 times as much:
// its bytes of shared memory per MMA. Up to 64 rows of x the bytes of w count, and small tiles have
// most of them on their way.
bool is_small(int32_t m, const mk_quant_matrix* w, int count, const mk_device& device) {
    const QuantGemmTiles& tiles = quant_gemm_tiles(device.sm);
    if (m <= tiles.small.tokens) return true;
    const auto cost = [&](const QuantGemmTile& t, int percent) {
        return ceil_div<int64_t>(num_blocks(m, w, count, t), device.num_sms) * t.rows * t.tokens *
               percent;
    };
    return cost(tiles.small, 150) < cost(tiles.large, 100);
}

const QuantGemmTile& gemm_tile(int32_t m, const mk_quant_matrix* w, int count,
                               const mk_device& device) {
    const QuantGemmTiles& tiles = quant_gemm_tiles(device.sm);
    return is_small(m, w, count, device) ? tiles.small : tiles.large;
}

}  // namespace

mk_plan plan_quant_prepare(const Product& a, int32_t dtype, const mk_device& device) {
    mk_plan plan = make_plan("quant_prepare_x", device, dtype_name(dtype));
    plan.grid[0] = static_cast<int32_t>(prepared_row_blocks(a.m) * kPreparedRows / kPrepareRows);
    plan.block[0] = 32 * kPrepareRows;
    return plan;
}

mk_plan plan_quant_gemm(int32_t m, const mk_quant_matrix* w, int count, const mk_device& device) {
    const QuantGemmTile& tile = gemm_tile(m, w, count, device);
    mk_plan plan =
        make_plan("quant_gemm", device,
                  "b16_rows" + std::to_string(tile.rows) + "_m" + std::to_string(tile.tokens));
    plan.grid[0] =
        static_cast<int32_t>(std::min<int64_t>(num_blocks(m, w, count, tile), INT32_MAX));
    plan.block[0] = quant_gemm_threads(tile);
    plan.smem_bytes = quant_gemm_smem_bytes(tile);
    return plan;
}

QuantGemmArgs quant_gemm_args(const Product& a, const mk_quant_matrix* w, int count,
                              void* workspace, const mk_device& device) {
    const QuantGemmTile& tile = gemm_tile(a.m, w, count, device);
    QuantGemmArgs args{};
    args.x = prepared_x(workspace, a.m, a.k);
    args.m = a.m;
    args.strips = num_strips(w, count, tile);
    args.num_matrices = count;
    int32_t first_row = 0, first_strip = 0;
    for (int i = 0; i < count; ++i) {
        args.w[i] = {static_cast<const uint8_t*>(w[i].tiles),
                     quant_row_tile_bytes(w[i].type, a.k),
                     w[i].type,
                     w[i].rows,
                     quant_unit(w[i].type),
                     first_row,
                     first_strip};
        first_row += w[i].rows;
        first_strip += ceil_div(w[i].rows, tile.rows);
    }
    return args;
}

}  // namespace mk
