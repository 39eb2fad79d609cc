#include "quant/quant_gemm_plan.h"

#include <algorithm>
#include <iterator>

#include "linear/linear_gemm_plan.h"

namespace mk {
namespace {

// How a product is divided: by a tile of quant_gemm_sm80.cuh, or one of quant_gemm_sm90.cuh.
struct Choice {
    const QuantGemmTile* tile;
    const QuantGemmTileSm90* sm90;
    int32_t cluster;
    int64_t blocks;
    int32_t rows() const { return tile ? tile->rows : kQuantGemmRowsSm90; }
    int32_t tokens() const { return tile ? tile->tokens : sm90->tokens; }
};

// Strips of a matrix that blocks multiply, whole clusters of them; those of two matrices are never
// in one cluster. A strip of gate and up has half as many rows of each: up has none of its own.
int32_t strips_of(const QuantMatrices& w, int i, const Choice& c) {
    if (w.is_pair && i > 0) return 0;
    const int32_t rows = c.rows() / (w.is_pair ? 2 : 1);
    return ceil_div(w.w[i].rows, rows * c.cluster) * c.cluster;
}
int32_t num_strips(const QuantMatrices& w, const Choice& c) {
    int32_t strips = 0;
    for (int i = 0; i < w.count; ++i) strips += strips_of(w, i, c);
    return strips;
}
int64_t num_blocks(int32_t m, const QuantMatrices& w, const Choice& c) {
    return static_cast<int64_t>(ceil_div(m, c.tokens())) * num_strips(w, c);
}

// What a row of w times a row of x costs in a tile, by the large one's: from counts of wavefronts
// of shared memory, and of instructions with scales for 16 k (docs/native.md).
constexpr int kLargeCost = 100, kMiddleCost = 125, kSmallCost = 185;

// The tile with the least work on the busiest SM; of equals the larger one. Without room for a
// larger one (A100's kernels on an RTX 3090): small ones.
Choice choose(int32_t m, const QuantMatrices& w, const mk_device& device) {
    const QuantGemmTiles& tiles = quant_gemm_tiles(device.sm);
    Choice best{};
    int64_t least = INT64_MAX;
    const auto consider = [&](const QuantGemmTile& tile, int cost) {
        Choice c{&tile, nullptr, 1, 0};
        c.blocks = num_blocks(m, w, c);
        const int64_t needed =
            ceil_div<int64_t>(c.blocks, device.num_sms) * tile.rows * tile.tokens * cost;
        if (needed >= least) return;
        least = needed;
        best = c;
    };
    const auto has_room = [&](const QuantGemmTile& tile) {
        return tile.rows > 0 && quant_gemm_smem_bytes(tile) <= device.smem_per_block;
    };
    if (has_room(tiles.large)) consider(tiles.large, kLargeCost);
    if (has_room(tiles.middle)) consider(tiles.middle, kMiddleCost);
    consider(tiles.small, kSmallCost);
    return best;
}

// ---- Hopper ----

// Clocks of an SM for 256 k of a block's tile: of the tensor cores (for mma.sync, 0.62 of the
// speed of wgmma), or of the schedulers, with a scale for 32 or for 16 k.
struct TileClocks {
    int32_t tensor, issue_32, issue_16;
};
constexpr TileClocks kSmallClocks = {464, 350, 550};
constexpr TileClocks kClocksSm90[] = {{2304, 2400, 3650}, {1152, 1600, 2350}};

// Clocks of all SMs and of L2 for 256 k of every tile.
int64_t clocks_of(const Choice& c, const TileClocks& clocks, const QuantMatrices& w,
                  const mk_device& device) {
    const int64_t at_once = int64_t{clusters_at_once(c.cluster, device)} * c.cluster;
    const int64_t busy = std::min(c.blocks, at_once);
    const auto issue_of = [&](int i) {
        return quant_format(w.w[i].type).scale_k == 16 ? clocks.issue_16 : clocks.issue_32;
    };
    int64_t of_strips = 0, strips = 0;
    for (int i = 0; i < (w.is_pair ? 1 : w.count); ++i) {
        const int other = w.is_pair ? 1 : i;  // whose rows are the other half of a strip
        const int64_t issue = (issue_of(i) + issue_of(other)) / 2;
        const int64_t bytes =
            c.tokens() * int64_t{kQuantXGroupBytes} / c.cluster +
            c.rows() / kQuantTileRows *
                (quant_tile_bytes(w.w[i].type, 4) + quant_tile_bytes(w.w[other].type, 4)) / 2;
        const int64_t most = std::max({int64_t{clocks.tensor}, issue, bytes / kL2BytesOfOne,
                                       bytes * busy / (kL2Bytes * int64_t{device.num_sms})});
        of_strips += most * strips_of(w, i, c);
        strips += strips_of(w, i, c);
    }
    return ceil_div(c.blocks, at_once) * of_strips / strips;
}

// The fewest clocks; of equals the larger tile, in smaller clusters.
Choice choose_sm90(int32_t m, const QuantMatrices& w, const mk_device& device) {
    Choice best{};
    int64_t least = INT64_MAX;
    const auto consider = [&](Choice c, const TileClocks& clocks) {
        if (c.cluster > device.num_sms) return;
        c.blocks = num_blocks(m, w, c);
        const int64_t needed = clocks_of(c, clocks, w, device);
        if (needed >= least) return;
        least = needed;
        best = c;
    };
    for (size_t i = 0; i < std::size(kQuantGemmTilesSm90); ++i) {
        for (const int32_t cluster : {1, 2, 4}) {
            consider({nullptr, &kQuantGemmTilesSm90[i], cluster, 0}, kClocksSm90[i]);
        }
    }
    consider({&quant_gemm_tiles(90).small, nullptr, 1, 0}, kSmallClocks);
    if (best.sm90) {
        const int64_t at_once = int64_t{clusters_at_once(best.cluster, device)};
        best.blocks = std::min(best.blocks, at_once * best.cluster);
    }
    return best;
}

Choice choice_of(int32_t m, const QuantMatrices& w, const mk_device& device) {
    return device.sm == 90 ? choose_sm90(m, w, device) : choose(m, w, device);
}

}  // namespace

mk_plan plan_quant_prepare(const Product& a, int32_t dtype, const mk_device& device) {
    mk_plan plan = make_plan("quant_prepare_x", device, dtype_name(dtype));
    plan.grid[0] = static_cast<int32_t>(prepared_row_blocks(a.m) * kPreparedRows / kPrepareRows);
    plan.block[0] = 32 * kPrepareRows;
    return plan;
}

mk_plan plan_quant_gemm(int32_t m, const QuantMatrices& w, const mk_device& device) {
    const Choice c = choice_of(m, w, device);
    mk_plan plan =
        make_plan("quant_gemm", device,
                  "b16_rows" + std::to_string(c.rows()) + "_m" + std::to_string(c.tokens()));
    plan.grid[0] = static_cast<int32_t>(std::min<int64_t>(c.blocks, INT32_MAX));
    plan.block[0] = c.tile ? quant_gemm_threads(*c.tile) : kQuantGemmThreadsSm90;
    plan.cluster[0] = c.cluster;
    plan.smem_bytes = c.tile ? quant_gemm_smem_bytes(*c.tile) : quant_gemm_smem_bytes(*c.sm90);
    return plan;
}

QuantGemmArgs quant_gemm_args(const Product& a, const QuantMatrices& w, void* workspace,
                              const mk_device& device) {
    const Choice c = choice_of(a.m, w, device);
    QuantGemmArgs args{};
    args.x = prepared_x(workspace, a.m, a.k);
    args.m = a.m;
    args.strips = num_strips(w, c);
    args.cluster = c.cluster;
    args.num_matrices = w.count;
    args.is_pair = w.is_pair;
    int32_t first_row = 0, first_strip = 0;
    for (int i = 0; i < w.count; ++i) {
        const mk_quant_matrix& from = w.w[i];
        args.w[i] = {static_cast<const uint8_t*>(from.tiles),
                     quant_row_tile_bytes(from.type, a.k),
                     from.type,
                     from.rows,
                     quant_tile_bytes(from.type, 4),
                     quant_unit(from.type),
                     first_row,
                     first_strip};
        first_row += from.rows;
        first_strip += strips_of(w, i, c);
    }
    return args;
}

}  // namespace mk
