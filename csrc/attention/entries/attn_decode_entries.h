// The kernels of attention_decode, the same on every architecture: X(key, Dtype, head_dim, rows).
#pragma once

#define MK_ATTENTION_DECODES(X)                              \
    X(bf16_hd64_rows8, Bf16, 64, mk::kAttnDecodeFewRows)     \
    X(bf16_hd64_rows32, Bf16, 64, mk::kAttnDecodeManyRows)   \
    X(bf16_hd128_rows8, Bf16, 128, mk::kAttnDecodeFewRows)   \
    X(bf16_hd128_rows32, Bf16, 128, mk::kAttnDecodeManyRows) \
    X(f16_hd64_rows8, F16, 64, mk::kAttnDecodeFewRows)       \
    X(f16_hd64_rows32, F16, 64, mk::kAttnDecodeManyRows)     \
    X(f16_hd128_rows8, F16, 128, mk::kAttnDecodeFewRows)     \
    X(f16_hd128_rows32, F16, 128, mk::kAttnDecodeManyRows)
