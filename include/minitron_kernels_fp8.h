/* minitron_kernels: FP8 (e4m3) operands, on sm_90a. The conventions are those of
 * minitron_kernels.h; on other devices these functions return MK_ERR_UNSUPPORTED.
 *
 * MK_E4M3: 8 bits, 4 of exponent and 3 of mantissa, as torch.float8_e4m3fn: finite up to 448, no
 * infinity. Scales are fp32, and what a byte stands for is its value times its scale.
 */
#ifndef MINITRON_KERNELS_FP8_H_
#define MINITRON_KERNELS_FP8_H_

#include "minitron_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define MK_E4M3 6 /* an mk_dtype */

/* ---- Quantise -----------------------------------------------------------------------------------
 * out = e4m3(x * (1 / scale)) in fp32, to the nearest (ties to even); what is beyond 448 becomes
 * 448, NaN stays NaN.
 *   block 128  for each row and each 128 columns scale = max(amax, 2^-96) / 448 is made and stored,
 *              amax being the largest |x|, NaN left out. A block with an infinity has the scale
 *              infinity and stands for NaN.
 *   block 0    scales[0] is the scale of all
 */
typedef struct mk_quantize_fp8_params {
    const void* x;    /* [rows, k] */
    void* out;        /* [rows, k], MK_E4M3 */
    float* scales;    /* [rows, ceil(k / 128)], or [1] */
    int64_t x_stride; /* between rows, as the next */
    int64_t out_stride;
    int64_t scales_stride;       /* between rows; of block 0 unused, as the next */
    int64_t scales_block_stride; /* between blocks: any two strides that keep scales apart */
    int32_t rows;                /* 0 ... 2^30 */
    int32_t k;                   /* 1 ... 2^20 */
    int32_t block;               /* 0, 128 */
    int32_t dtype;               /* MK_BF16, MK_F16: of x */
} mk_quantize_fp8_params;

MK_API mk_status mk_quantize_fp8(const mk_quantize_fp8_params* params, void* stream);
MK_API mk_status mk_quantize_fp8_plan(const mk_quantize_fp8_params* params, const mk_device* device,
                                      mk_plan* plan);

/* ---- Linear -------------------------------------------------------------------------------------
 * y[m, n] = sum over k of x[m, k] x_scale[m, k / 128] * w[n, k] w_scale[n / 128, k / 128].
 * The products of 128 k are summed by four wgmma k32, whose sums keep about 14 bits, from 0; then
 * that, times x_scale * w_scale, is added to an fp32 sum by an FMA; k ascends. The bits of an
 * output depend on its row of x, its row of w and their scales only.
 *   mk_linear_fp8         out = y, + residual where given, rounded once
 *   mk_linear_fp8_swiglu  row 2i of w is gate i and row 2i + 1 is up i:
 *                         out[m, i] = silu(y[m, 2i]) * y[m, 2i + 1] in fp32, rounded once
 * A stride of 0 repeats a scale: with both 0 it is one of the whole tensor.
 */
typedef struct mk_linear_fp8_params {
    const void* x;        /* [m, k], MK_E4M3; rows aligned to 16 bytes, as those of w */
    const void* w;        /* [n, k], MK_E4M3 */
    const float* x_scale; /* [m, ceil(k / 128)] */
    const float* w_scale; /* [ceil(n / 128), ceil(k / 128)] */
    const void* residual; /* [m, n], mk_linear_fp8 only; NULL: none. May be out */
    void* out;            /* [m, n]; of mk_linear_fp8_swiglu [m, n / 2] */
    int64_t x_stride, w_stride, residual_stride, out_stride; /* between rows */
    int64_t x_scale_stride, w_scale_stride;                  /* between rows of scales; or 0 */
    int64_t x_scale_block_stride, w_scale_block_stride;      /* between blocks of k; or 0 */
    int32_t m;                                               /* 0 ... 2^30 */
    int32_t n;         /* 1 ... 2^24; mk_linear_fp8_swiglu: even */
    int32_t k;         /* 1 ... 2^20 */
    int32_t out_dtype; /* MK_BF16, MK_F16: of residual, too; or MK_F32 (mk_linear_fp8 without it) */
} mk_linear_fp8_params;

MK_API mk_status mk_linear_fp8(const mk_linear_fp8_params* params, void* stream);
MK_API mk_status mk_linear_fp8_plan(const mk_linear_fp8_params* params, const mk_device* device,
                                    mk_plan* plan);
MK_API mk_status mk_linear_fp8_swiglu(const mk_linear_fp8_params* params, void* stream);
MK_API mk_status mk_linear_fp8_swiglu_plan(const mk_linear_fp8_params* params,
                                           const mk_device* device, mk_plan* plan);

/* ---- Attention ----------------------------------------------------------------------------------
 * mk_attention of e4m3 q, k and v, packed, not rotated:
 *   out = v_descale * sum over keys of P v / sum of P,
 *   P = exp(softmax_scale * q_descale * k_descale * (q . k) - reference)
 * P is rounded to e4m3, for its product with v and for its sum. Both are made by four wgmma k32 for
 * each 128 keys, whose sums keep about 14 bits, from 0, and those are added in fp32. lse is that of
 * the sum. A row's bits depend on its sequence and head only. A descale has a value for each
 * sequence and KV head (q_descale: or query head), as FlashAttention-3 takes them; a stride of 0
 * repeats those of one sequence, and NULL is 1. Rows of q, k, v and out are aligned to 16 bytes:
 * strides are multiples of 16 (out: 8). Elements of a tensor share no memory.
 */
typedef struct mk_attention_fp8_params {
    const void* q;               /* [tokens_q, num_q_heads, head_dim], MK_E4M3 */
    const void* k;               /* [tokens_k, num_kv_heads, head_dim], MK_E4M3 */
    const void* v;               /* [tokens_k, num_kv_heads, head_dim], MK_E4M3 */
    void* out;                   /* [tokens_q, num_q_heads, head_dim], out_dtype */
    float* lse;                  /* [num_q_heads, tokens_q], or NULL */
    const int32_t* cu_seqlens_q; /* [batch + 1] */
    const int32_t* cu_seqlens_k; /* [batch + 1] */
    const float* q_descale;      /* [batch, num_q_descales], as the next or NULL */
    const float* k_descale;      /* [batch, num_kv_heads] */
    const float* v_descale;      /* [batch, num_kv_heads] */
    int64_t q_stride, q_head_stride, k_stride, k_head_stride; /* between tokens, between heads */
    int64_t v_stride, v_head_stride, out_stride, out_head_stride;
    int64_t lse_stride;                                           /* between heads */
    int64_t q_descale_stride, k_descale_stride, v_descale_stride; /* between sequences */
    int32_t tokens_q, tokens_k;
    int32_t batch;
    int32_t num_q_heads, num_kv_heads; /* as in mk_attention */
    int32_t num_q_descales;            /* num_kv_heads or num_q_heads */
    int32_t head_dim;                  /* 128 */
    int32_t max_seqlen_q;              /* at least the queries of any sequence */
    int32_t causal;                    /* 0 or 1 */
    int32_t window; /* 0: none; keys at a distance of window or more are hidden */
    float softmax_scale;
    int32_t out_dtype; /* MK_BF16, MK_F16 */
} mk_attention_fp8_params;

MK_API mk_status mk_attention_fp8(const mk_attention_fp8_params* params, void* stream);
MK_API mk_status mk_attention_fp8_plan(const mk_attention_fp8_params* params,
                                       const mk_device* device, mk_plan* plan);

#ifdef __cplusplus
}
#endif

#endif /* MINITRON_KERNELS_FP8_H_ */
