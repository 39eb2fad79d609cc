#include "quant/quant_decode_plan.h"

namespace mk {
namespace {

int32_t rows_of_tiles(const mk_quant_matrix* w, int count) {
    int32_t rows = 0;
    for (int i = 0; i < count; ++i) rows += quant_row_of_tiles(w[i].rows);
    return rows;
}

// A block per SM, or fewer if that takes no more rounds over the tiles.
int32_t num_blocks(int32_t num_tiles, const mk_device& device) {
    return ceil_div(num_tiles, ceil_div(num_tiles, device.num_sms));
}

QuantDecodeShape decode_shape(const Product& a, int32_t num_tiles, const mk_device& device) {
    return quant_decode_shape(a.m, a.k, num_tiles, num_blocks(num_tiles, device),
                              device.smem_per_block);
}

}  // namespace

mk_plan plan_quant_decode(const Product& a, const mk_quant_matrix* w, int count,
                          const mk_device& device) {
    const int32_t tokens = kQuantTokens * quant_token_tiles(a.m);
    mk_plan plan = make_plan("quant_decode", device, "b16_m" + std::to_string(tokens));
    plan.grid[0] = 0;
    if (a.m == 0) return plan;
    const int32_t num_tiles = rows_of_tiles(w, count);
    plan.grid[0] = num_blocks(num_tiles, device);
    plan.block[0] = kQuantThreads;
    plan.smem_bytes = decode_shape(a, num_tiles, device).smem_bytes;
    return plan;
}

QuantDecodeArgs quant_decode_args(const Product& a, const mk_quant_matrix* w, int count,
                                  const Outputs& to, const mk_device& device) {
    QuantDecodeArgs args{a, {}, count, {}, to};
    if (a.m == 0) return args;
    int32_t end = 0;
    for (int i = 0; i < count; ++i) {
        QuantDecodeMatrix& m = args.w[i];
        m.tiles = static_cast<const uint8_t*>(w[i].tiles);
        m.row_tile_bytes = static_cast<int32_t>(quant_row_tile_bytes(w[i].type, a.k));
        m.tile_bytes = quant_tile_bytes(w[i].type, 4);
        m.type = w[i].type;
        m.unit = quant_unit(w[i].type);
        m.first = end;
        m.end = end += quant_row_of_tiles(w[i].rows);
    }
    args.shape = decode_shape(a, end, device);
    return args;
}

}  // namespace mk
