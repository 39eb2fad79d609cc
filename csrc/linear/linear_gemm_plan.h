// The plan of linear_gemm_sm90.cuh and linear_fp8_sm90.cuh, and the part of their argument that
// product and outputs give. dtype: of x and w.
#pragma once

#include "launch/op.h"
#include "linear/linear_tiles.h"

namespace mk {

// Clusters that run at once, a block per SM.
int32_t clusters_at_once(int32_t size, const mk_device& device);
// L2 gives all SMs together at least 28 bytes per clock and SM of an H100 (6.9 TB/s; source:
// minitron_kernels/architectures.py), and one SM 64.
constexpr int32_t kL2Bytes = 28, kL2BytesOfOne = 64;

// A tensor map of `count` rows of k elements: boxes of 128 bytes (a stage's k) and box_rows.
mk_status encode_rows(const void* rows, int32_t dtype, int64_t stride, int32_t count, int32_t k,
                      int32_t box_rows, TensorMap* map);

// More than 64 rows of 16-byte pieces, not normalised.
bool is_gemm_sm90(const Product& a);

mk_plan plan_gemm_sm90(const char* op, int32_t dtype, const Product& a, const mk_device& device);

mk_status gemm_sm90_args(const Product& a, int32_t dtype, const mk_device& device,
                         LinearGemmSm90Args* args);

}  // namespace mk
