// Tiles of linear_skinny_sm90.cuh and what they take, shared by the plan and the device code.
#pragma once

#include "linear/linear_tiles.h"

namespace mk {

constexpr int kSkinnySm90Rows = 64;  // M of wgmma
constexpr int kSkinnySm90K = 64;     // of a stage: rows of 128 bytes, the width of the swizzle
constexpr int kSkinnySm90RowBytes = 2 * kSkinnySm90K;
constexpr int kSkinnySm90Consumers = 128;  // threads: a warpgroup that multiplies,
constexpr int kSkinnySm90Producers = 32;   // a warp that starts the copies,
constexpr int kSkinnySm90Fillers = 128;    // and, with a norm or by elements, four that fill stages
constexpr int kSkinnySm90Threads = kSkinnySm90Consumers + kSkinnySm90Producers + kSkinnySm90Fillers;
constexpr int kSkinnySm90BlocksPerSm = 2;  // under PDL the next launch's block starts beside it

// Columns of a strip, which a block has over the whole of k; one entry each. Every strip reads all
// of x, so that the widest is best of which there are enough: nine for ten SMs. Two thirds of the
// SMs get all that DRAM gives, though, and where x is many rows, narrow strips ask more of L2 than
// its 2.06 times as many bytes a second (6.9 of 3.35 TB/s): then six are enough for ten SMs (4096
// columns, 64 rows: 86 strips of 48, 1.5 times), and four if the norm reads all of x once more
// (6144 columns: 64 of 96 for 1.7 times, with 128 of 48 it were 2.3). Strips below 32 columns would
// spread small matrices over more SMs, to no use: one takes up to 64 bytes a clock from L2, 4.6
// times its share of DRAM's.
constexpr int kSkinnySm90Cols[] = {96, 48, 32};
constexpr int skinny_sm90_strips_for_10_sms(int m, int cluster, bool has_norm) {
    return cluster == 1 ? 9 : has_norm && m > kSkinnySm90Rows / 2 ? 4 : 6;
}
// From more rows on two blocks are a cluster and share the rows of x. Two SMs are always together;
// clusters of four would leave up to 12 of an H100's 132 SMs out, as its parts differ.
constexpr int kSkinnySm90AloneRows = 16;

// Where a stage's rows lie: those of x, in whole groups of 8 (halves, in a cluster), then w's. The
// MMA reads 64 rows: for those that x has not, what follows, which gives rows of the output that
// nobody stores. So a stage has 64 at least.
constexpr int skinny_sm90_x_rows(int m, int cluster) {
    const int rows = m < kSkinnySm90Rows ? m : kSkinnySm90Rows;
    return (rows + 8 * cluster - 1) / (8 * cluster) * (8 * cluster);
}
constexpr int skinny_sm90_stage_rows(int x_rows, int cols) {
    return x_rows + cols < kSkinnySm90Rows ? kSkinnySm90Rows : x_rows + cols;
}

// Little's law: at 3.35 TB/s over 132 SMs, and 1 us from the request to the bytes, 25 KB of w are
// in flight per SM; 38 KB, when 86 SMs have all of it. Besides the stage in use, half of an SM's
// shared memory holds 42 KB of w for 64 rows and 48 columns, 52 KB for up to 16 rows and 32
// columns. Where no more than half of the SMs have a block, it takes the whole.
constexpr int skinny_sm90_smem_bytes(int blocks, int sms) {
    return 2 * blocks <= sms ? 227 * 1024 : (228 / kSkinnySm90BlocksPerSm - 1) * 1024;
}
constexpr int kSkinnySm90MaxStages = 24;
constexpr int kSkinnySm90EventBytes = 3 * 8 * kSkinnySm90MaxStages;

// Behind the stages: their mbarriers; with the norm a scale per row, and the sums of each quad of
// groups of 256 elements of the block's share of the rows.
constexpr int skinny_sm90_rest_bytes(int m, int cluster, bool has_norm, int k) {
    return kSkinnySm90EventBytes +
           (has_norm ? 4 * kSkinnySm90Rows + norm_group_bytes((m + cluster - 1) / cluster, k) : 0);
}

// What the plan decides, for the kernel.
struct SkinnySm90Ring {
    int32_t cluster, x_rows, stage_bytes, num_stages;
};
constexpr SkinnySm90Ring skinny_sm90_ring(int m, int cols, int cluster, bool has_norm, int k,
                                          int smem_bytes) {
    const int x_rows = skinny_sm90_x_rows(m, cluster);
    const int stage_bytes = skinny_sm90_stage_rows(x_rows, cols) * kSkinnySm90RowBytes;
    const int room = smem_bytes - skinny_sm90_rest_bytes(m, cluster, has_norm, k);
    const int stages = room / stage_bytes;
    return {cluster, x_rows, stage_bytes,
            stages < kSkinnySm90MaxStages ? stages : kSkinnySm90MaxStages};
}
static_assert(skinny_sm90_ring(64, 96, 2, true, kMaxNormK, 113 << 10).num_stages >= 4);
static_assert(skinny_sm90_ring(64, 48, 2, false, 4096, 113 << 10).num_stages == 8);

// The kernel's argument. Without 16-byte rows (product.is_aligned is 0) there are no maps.
struct LinearSkinnySm90Args {
    Product product;
    Outputs to;
    SkinnySm90Ring ring;
    TensorMap x_map, w_map;  // boxes of 64 k and the rows of x that a block fetches, a strip's of w
};

}  // namespace mk
