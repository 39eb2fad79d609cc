#include "quant/quant_decode_plan.h"

#include "quant/quant_tiles.h"

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

// The tiles of the matrices, one below the other.
template <class Params>
QuantDecodeArgs<Params> decode_args(const Product& a, const mk_quant_matrix* w, int count,
                                    const Params& p, const mk_device& device) {
    QuantDecodeArgs<Params> args{a, {}, {}, p};
    int32_t end = 0;
    for (int i = 0; i < count; ++i) {
        QuantDecodeMatrix& m = args.w[i];
        m.tiles = static_cast<const uint8_t*>(w[i].tiles);
        m.row_tile_bytes = static_cast<int32_t>(quant_row_tile_bytes(w[i].type, a.k));
        m.tile_bytes = quant_tile_bytes(w[i].type, 4);
        m.type = w[i].type;
        m.first = end;
        m.end = end += quant_row_of_tiles(w[i].rows);
    }
    args.shape = decode_shape(a, end, device);
    return args;
}

template <class Params>
mk_status run_decode(const mk_plan& plan, const Product& a, const mk_quant_matrix* w, int count,
                     const Params& p, const Device& device, void* stream,
                     std::string (*shape)(const void*), const void* params) {
    QuantDecodeArgs<Params> args{a, {}, {}, p};
    if (a.m) args = decode_args(a, w, count, p, device.info);
    return launch(plan, device, &args, stream, shape, params);
}

}  // namespace

mk_plan plan_quant_decode(const char* op, int32_t dtype, const Product& a, const mk_quant_matrix* w,
                          int count, const mk_device& device) {
    const int32_t tokens = kQuantTokens * quant_token_tiles(a.m);
    mk_plan plan =
        make_plan(op, device, std::string(dtype_name(dtype)) + "_m" + std::to_string(tokens));
    plan.grid[0] = 0;
    if (a.m == 0) return plan;
    const int32_t num_tiles = rows_of_tiles(w, count);
    plan.grid[0] = num_blocks(num_tiles, device);
    plan.block[0] = kQuantThreads;
    plan.smem_bytes = decode_shape(a, num_tiles, device).smem_bytes;
    return plan;
}

mk_status run_quant_decode(const mk_plan& plan, const Product& a, const mk_quant_matrix* w,
                           int count, const mk_linear_params& p, const Device& device, void* stream,
                           std::string (*shape)(const void*), const void* params) {
    return run_decode(plan, a, w, count, p, device, stream, shape, params);
}

mk_status run_quant_decode(const mk_plan& plan, const Product& a, const mk_quant_matrix* w,
                           int count, const mk_qkv_rope_append_params& p, const Device& device,
                           void* stream, std::string (*shape)(const void*), const void* params) {
    return run_decode(plan, a, w, count, p, device, stream, shape, params);
}

}  // namespace mk
