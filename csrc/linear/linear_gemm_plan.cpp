#include "linear/linear_gemm_plan.h"

#include <algorithm>
#include <string>

#include "linear/linear_fp8_tiles.h"

namespace mk {
namespace {

struct Choice {
    const GemmTileSm90* tile;
    GemmGridSm90 grid;
    int32_t blocks;
};

// Clocks of all SMs and of L2 for a stage of every tile, 64 k of 16 bits or 128 of 8.
int64_t stage_clocks(const GemmTileSm90& t, const GemmGridSm90& g, const mk_device& device) {
    const int32_t size = g.cluster.m * g.cluster.n;
    const int64_t clusters = static_cast<int64_t>(g.clusters_m) * g.clusters_n;
    const int64_t at_once = std::min<int64_t>(clusters, clusters_at_once(size, device));
    const int64_t rounds = ceil_div<int64_t>(clusters, clusters_at_once(size, device));
    const int64_t tensor = t.m * t.n * kGemmStageK / 2048;
    const int64_t bytes = 2 * kGemmStageK * (t.m / g.cluster.n + t.n / g.cluster.m);
    return rounds * std::max({tensor, bytes / kL2BytesOfOne,
                              bytes * at_once * size / (kL2Bytes * device.num_sms)});
}

// The fewest clocks; of equals the larger tile, in smaller clusters.
template <size_t kTiles>
Choice choose(const GemmTileSm90 (&tiles)[kTiles], const Product& a, const mk_device& device) {
    Choice best{};
    int64_t least = INT64_MAX;
    for (const GemmTileSm90& t : tiles) {
        for (const GemmCluster& c : kGemmClusters) {
            if (c.m * c.n > device.num_sms) continue;
            const GemmGridSm90 grid{c, ceil_div(a.m, t.m * c.m), ceil_div(a.n, t.n * c.n),
                                    kGemmGroupRows / (t.m * c.m), 1};
            const int64_t clocks = stage_clocks(t, grid, device);
            if (clocks >= least) continue;
            least = clocks;
            const int64_t clusters = static_cast<int64_t>(grid.clusters_m) * grid.clusters_n;
            const int32_t size = c.m * c.n;
            const int64_t at_once = clusters_at_once(size, device);
            best = {&t, grid, static_cast<int32_t>(std::min(clusters, at_once)) * size};
        }
    }
    return best;
}

Choice choose(const Product& a, int32_t dtype, const mk_device& device) {
    return dtype == MK_E4M3 ? choose(kFp8Tiles, a, device) : choose(kGemmTilesSm90, a, device);
}

constexpr int64_t kMaxMapStride = int64_t{1} << 40;  // bytes; maps have less

// Pairs that adjoin in a thread: those that make 16 bytes, if whole groups of them do, everywhere.
int32_t pairs_of(const Outputs& to) {
    if (to.kind != EpilogueKind::kQkv) {
        const mk_linear_params& p = to.linear;
        const bool is_swiglu = to.kind == EpilogueKind::kSwiglu;
        const int32_t dtype = is_swiglu ? p.dtype : p.out_dtype;
        const int32_t pairs = is_swiglu         ? kPairsOfSwiglu
                              : dtype == MK_F32 ? kPairsOfF32
                                                : kPairsOf16Bit;
        const bool is_whole = p.n % (8 * pairs) == 0 && is_16_byte(p.out, dtype, {p.out_stride}) &&
                              is_16_byte(p.residual, dtype, {p.residual_stride});
        return is_whole ? pairs : 1;
    }
    const mk_qkv_rope_append_params& p = to.qkv;
    const bool is_whole = (p.head_dim == 64 || p.head_dim == 128) && p.rope.rotary_dim % 64 == 0 &&
                          is_16_byte(p.q, p.dtype, {p.q_stride, p.q_head_stride}) &&
                          is_16_byte(p.k_cache, p.dtype,
                                     {p.cache_page_stride, p.cache_stride, p.cache_head_stride}) &&
                          is_16_byte(p.v_cache, p.dtype, {}) &&
                          is_16_byte(p.rope.cos, MK_F32, {p.rope.table_stride}) &&
                          is_16_byte(p.rope.sin, MK_F32, {});
    return is_whole ? kPairsOfQkv : 1;
}

mk_status encode(const void* rows, int32_t dtype, int32_t rank, const uint64_t* dims,
                 const uint64_t* strides, const uint32_t* box, TensorMap* map) {
    const cuda::Driver* driver = nullptr;
    MK_TRY(cuda::get_driver(&driver));
    const uint32_t ones[] = {1, 1, 1, 1, 1};
    MK_CUDA(*driver, cuTensorMapEncodeTiled, map,
            dtype == MK_E4M3   ? cuda::kTensorMapUint8
            : dtype == MK_BF16 ? cuda::kTensorMapBfloat16
                               : cuda::kTensorMapFloat16,
            rank, const_cast<void*>(rows), dims, strides, box, ones, 0, cuda::kTensorMapSwizzle128B,
            cuda::kTensorMapL2Promotion256B, 0);
    return MK_OK;
}

// Rows of w, 8 pairs g + 2 pairs q + 2 b + i (linear_output_sm90.cuh), as k, i, q, g and b: boxes
// of the `rows` that a block fetches, of all groups of a tile of n columns, or else of one pair.
// With one pair rows may be no multiple of 8: as k and rows.
mk_status encode_w(const Product& a, int32_t dtype, int32_t pairs, int32_t n, int32_t rows,
                   TensorMap* map) {
    const int bytes = dtype_bytes(dtype);
    const uint64_t row = a.n > 1 ? bytes * a.w_stride : ceil_div(bytes * a.k, 16) * 16;
    const uint32_t k = 2 * kGemmStageK / bytes;
    if (pairs == 1) {
        const uint64_t dims[] = {static_cast<uint64_t>(a.k), static_cast<uint64_t>(a.n), 1, 1, 1};
        const uint64_t strides[] = {row, row, row, row};
        const uint32_t box[] = {k, static_cast<uint32_t>(rows), 1, 1, 1};
        return encode(a.w, dtype, 5, dims, strides, box, map);
    }
    const uint64_t p = pairs, dims[] = {static_cast<uint64_t>(a.k), 2, 4, a.n / 8 / p, p};
    const uint64_t strides[] = {row, 2 * p * row, 8 * p * row, 2 * row};
    const uint32_t groups = std::min(n / 8 / pairs, rows / 8);
    const uint32_t box[] = {k, 2, 4, groups, rows / 8 / groups};
    return encode(a.w, dtype, 5, dims, strides, box, map);
}

}  // namespace

// Clusters that run at once, a block per SM. One of 2 finds room on any two SMs of a TPC, one of 4
// inside a GPC, of which an H100 has 8, of up to 18 SMs: 32 clusters if each has 16 at least, 31 of
// a chip with one of 14. Only the driver knows. A cluster too many would run after all others.
int32_t clusters_at_once(int32_t size, const mk_device& device) {
    if (size == 4 && device.clusters_of_4) return device.clusters_of_4;
    const int32_t num_sms = device.num_sms;
    return std::max((size == 4 && num_sms > 16 ? num_sms / 16 * 16 : num_sms) / size, 1);
}

mk_status encode_rows(const void* rows, int32_t dtype, int64_t stride, int32_t count, int32_t k,
                      int32_t box_rows, TensorMap* map) {
    const uint64_t dims[] = {static_cast<uint64_t>(k), static_cast<uint64_t>(count)};
    // One row has no stride, but must be given one.
    const int bytes = dtype_bytes(dtype);
    const uint64_t strides[] = {
        static_cast<uint64_t>(count > 1 ? bytes * stride : ceil_div(bytes * k, 16) * 16)};
    const uint32_t box[] = {static_cast<uint32_t>(2 * kGemmStageK / bytes),
                            static_cast<uint32_t>(box_rows)};
    return encode(rows, dtype, 2, dims, strides, box, map);
}

bool is_gemm_sm90(const Product& a) { return a.m > MK_LINEAR_MAX_NORM_M && a.is_aligned; }

mk_plan plan_gemm_sm90(const char* op, int32_t dtype, const Product& a, const mk_device& device) {
    const Choice choice = choose(a, dtype, device);
    const GemmTileSm90& tile = *choice.tile;
    mk_plan plan = make_plan(op, device,
                             std::string(dtype_name(dtype)) + "_m" + std::to_string(tile.m) + "_n" +
                                 std::to_string(tile.n));
    plan.grid[0] = choice.blocks;
    plan.block[0] = kGemmSm90Threads;
    plan.cluster[0] = choice.grid.cluster.m * choice.grid.cluster.n;
    plan.smem_bytes = gemm_smem_bytes(tile);
    return plan;
}

mk_status gemm_sm90_args(const Product& a, int32_t dtype, const mk_device& device,
                         LinearGemmSm90Args* args) {
    const Choice choice = choose(a, dtype, device);
    GemmGridSm90& grid = args->grid;
    grid = choice.grid;
    const int32_t box_x = choice.tile->m / grid.cluster.n, box_w = choice.tile->n / grid.cluster.m;
    MK_TRY(encode_rows(a.x, dtype, a.x_stride, a.m, a.k, box_x, &args->x_map));
    const int32_t pairs = pairs_of(args->to);
    if (8 * pairs * dtype_bytes(dtype) * a.w_stride < kMaxMapStride) grid.pairs = pairs;
    return encode_w(a, dtype, grid.pairs, choice.tile->n, box_w, &args->w_map);
}

}  // namespace mk
