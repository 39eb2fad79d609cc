// Tiles of linear_fp8_sm90.cuh and its argument, shared by the plan and the device code.
#pragma once

#include "linear/linear_tiles.h"
#include "minitron_kernels_fp8.h"

namespace mk {

constexpr int kFp8Block = 128;  // k of a scale, and of a stage; columns of a scale of w

// A thread has a tile's sums twice, as products of a stage and in fp32: of 128 x 192 these are 192
// registers. 128 x 256 would take 256.
constexpr GemmTileSm90 kFp8Tiles[] = {{128, 192, 5}, {128, 128, 7}, {128, 64, 9}};
static_assert(gemm_smem_bytes(kFp8Tiles[0]) <= 227 << 10 &&
              gemm_smem_bytes(kFp8Tiles[1]) <= 227 << 10 &&
              gemm_smem_bytes(kFp8Tiles[2]) <= 227 << 10);

struct LinearFp8Args : LinearGemmSm90Args {
    const float *x_scale, *w_scale;
    int64_t x_scale_stride, w_scale_stride;
    int64_t x_scale_block_stride, w_scale_block_stride;
};

}  // namespace mk
