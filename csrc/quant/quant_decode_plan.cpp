#include "quant/quant_decode_plan.h"

#include <algorithm>

namespace mk {
namespace {

// Or pairs of them, of gate and up.
int32_t rows_of_tiles(const QuantMatrices& w) {
    int32_t rows = 0;
    for (int i = 0; i < (w.is_pair ? 1 : w.count); ++i) rows += quant_row_of_tiles(w.w[i].rows);
    return rows;
}

// Of a part of the rows of x. A block per SM, or fewer if that takes no more rounds over the tiles.
// From sm_90 on x of more than 4 rows is converted by pairs of blocks: then an even number, if
// there is one.
struct Blocks {
    int32_t count, of_cluster;
};
Blocks blocks(int32_t m, int32_t num_tiles, const mk_device& device) {
    const int32_t sms = std::max(device.num_sms / quant_parts(m), 1);
    const int32_t count = ceil_div(num_tiles, ceil_div(num_tiles, sms));
    const int32_t even = count + count % 2;
    if (device.sm < 90 || m <= 4 || even > std::min(num_tiles, sms)) return {count, 1};
    return {even, 2};
}

QuantDecodeShape decode_shape(const Product& a, const QuantMatrices& w, const mk_device& device) {
    const int32_t num_tiles = rows_of_tiles(w);
    const Blocks of = blocks(a.m, num_tiles, device);
    return quant_decode_shape(quant_part_rows(a.m), a.k, num_tiles, w.count, of.count,
                              of.of_cluster, device.smem_per_block, w.is_pair ? 2 : 1);
}

}  // namespace

mk_plan plan_quant_decode(const Product& a, const QuantMatrices& w, const mk_device& device) {
    const int32_t rows = a.m > 0 ? quant_part_rows(a.m) : 0;
    const int32_t tokens = kQuantTokens * quant_token_tiles(rows);
    mk_plan plan = make_plan("quant_decode", device, "b16_m" + std::to_string(tokens));
    plan.grid[0] = 0;
    if (a.m == 0) return plan;
    const QuantDecodeShape shape = decode_shape(a, w, device);
    plan.grid[0] = blocks(a.m, rows_of_tiles(w), device).count;
    plan.grid[1] = quant_parts(a.m);
    plan.block[0] = kQuantThreads;
    plan.cluster[0] = shape.cluster;
    plan.smem_bytes = shape.smem_bytes;
    return plan;
}

QuantDecodeArgs quant_decode_args(const Product& a, const QuantMatrices& w, const Outputs& to,
                                  const mk_device& device) {
    QuantDecodeArgs args{a, {}, w.count, {}, to};
    if (a.m == 0) return args;
    const int32_t num_blocks = blocks(a.m, rows_of_tiles(w), device).count;
    int32_t end = 0;
    for (int i = 0; i < w.count; ++i) {
        const mk_quant_matrix& from = w.w[i];
        QuantDecodeMatrix& m = args.w[i];
        m.tiles = static_cast<const uint8_t*>(from.tiles);
        m.row_tile_bytes = static_cast<int32_t>(quant_row_tile_bytes(from.type, a.k));
        m.tile_bytes = quant_tile_bytes(from.type, 4);
        m.type = from.type;
        m.unit = quant_unit(from.type);
        m.step = int64_t{num_blocks} * m.row_tile_bytes;
        m.first = w.is_pair ? 0 : end;
        m.end = end = m.first + quant_row_of_tiles(from.rows);
    }
    args.shape = decode_shape(a, w, device);
    return args;
}

}  // namespace mk
