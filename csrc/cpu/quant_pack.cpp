// mk_quant_pack and mk_quant_unpack: between GGUF blocks and the tiles of quant/quant_layout.h.
#include "quant/quant_plan.h"

namespace mk {
namespace {

mk_status check_matrix(int32_t type, int32_t rows, int32_t k) {
    MK_TRY(check_size("rows", rows, 0, 1 << 24));
    MK_TRY(check_size("k", k, 1, 1 << 20));
    return check_quant_type("type", type, "k", k);
}

mk_status check_blocks(const char* name, const void* blocks, int64_t row_bytes, int32_t rows,
                       int32_t least) {
    if (rows == 0) return MK_OK;
    MK_REQUIRE(blocks, MK_ERR_NULL, "%s is NULL", name);
    MK_REQUIRE(rows == 1 || row_bytes >= least, MK_ERR_STRIDE,
               "row%s_bytes must be at least the %d bytes of a row, got %lld", name + 6, least,
               static_cast<long long>(row_bytes));
    return MK_OK;
}

mk_status check(const mk_quant_pack_params* params) {
    MK_REQUIRE(params, MK_ERR_NULL, "params is NULL");
    const mk_quant_pack_params& p = *params;
    MK_TRY(check_matrix(p.type, p.rows, p.k));
    MK_TRY(check_size("num_threads", p.num_threads, 1, 256));
    MK_REQUIRE(!p.blocks_up || p.rows % 2 == 0, MK_ERR_SHAPE,
               "rows must be even with blocks_up, got %d", p.rows);
    MK_REQUIRE(!p.blocks_up || !p.row_order, MK_ERR_VALUE, "row_order must be NULL with blocks_up");
    const int32_t row = p.k / quant_block(p.type) * quant_block_bytes(p.type);
    const int32_t rows = p.blocks_up ? p.rows / 2 : p.rows;
    MK_TRY(check_blocks("blocks", p.blocks, p.row_bytes, rows, row));
    if (p.blocks_up) MK_TRY(check_blocks("blocks_up", p.blocks_up, p.row_up_bytes, rows, row));
    if (p.rows == 0) return MK_OK;
    MK_REQUIRE(p.tiles, MK_ERR_NULL, "tiles is NULL");
    MK_REQUIRE(is_16_byte(p.tiles, MK_F16, {}), MK_ERR_ALIGNMENT,
               "tiles = %p is not aligned to 16 bytes", p.tiles);
    if (!p.row_order) return MK_OK;
    MK_TRY(check_pointer("row_order", p.row_order, MK_I32));
    for (int32_t i = 0; i < p.rows; ++i) {
        MK_REQUIRE(0 <= p.row_order[i] && p.row_order[i] < p.rows, MK_ERR_VALUE,
                   "row_order[%d] must be 0 ... %d, got %d", i, p.rows - 1, p.row_order[i]);
    }
    return MK_OK;
}

}  // namespace
}  // namespace mk

extern "C" {

mk_status mk_quant_packed_bytes(int32_t type, int32_t rows, int32_t k, int64_t* bytes) {
    MK_REQUIRE(bytes, MK_ERR_NULL, "bytes is NULL");
    MK_TRY(mk::check_matrix(type, rows, k));
    return mk::fail(MK_ERR_UNSUPPORTED, "this build cannot pack quantised weights");
}

mk_status mk_quant_pack(const mk_quant_pack_params* params) {
    MK_TRY(mk::check(params));
    return mk::fail(MK_ERR_UNSUPPORTED, "this build cannot pack quantised weights");
}

mk_status mk_quant_unpack(const mk_quant_pack_params* params) {
    MK_TRY(mk::check(params));
    return mk::fail(MK_ERR_UNSUPPORTED, "this build cannot pack quantised weights");
}

}  // extern "C"
