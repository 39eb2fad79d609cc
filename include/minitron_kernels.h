/* minitron_kernels: the C ABI.
 *
 * Conventions
 * - C99, no framework, no CUDA header. Device pointers, sizes (int32), strides (int64, in
 * elements), dtypes (mk_dtype). The innermost dimension of every tensor is contiguous.
 * - mk_<op>(&params, stream) enqueues on `stream` (a CUstream or cudaStream_t; NULL is the default
 *   stream) of the context that is current on the calling thread, and returns at once. It allocates
 *   nothing, never synchronises, and can be captured into a CUDA graph.
 * - mk_<op>_plan(&params, &device, &plan) tells what mk_<op> would launch; it needs no GPU and no
 *   driver. Pointers of params are looked at for NULL and for alignment only.
 * - mk_<op>_workspace_bytes(&params, &bytes) exists for the ops that need a workspace.
 * - A status other than MK_OK means that nothing was launched; mk_last_error() says what was wrong.
 * - Empty tensors are legal, and then nothing is launched.
 * - All functions may be called from any thread.
 * The structs are zero-initialised by the caller; 0 is not a valid dtype.
 */
#ifndef MINITRON_KERNELS_H_
#define MINITRON_KERNELS_H_

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MK_API __attribute__((visibility("default")))
#else
#define MK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define MK_ABI_VERSION 6

typedef enum mk_status {
    MK_OK = 0,
    MK_ERR_NULL = 1,        /* a required pointer is NULL */
    MK_ERR_DTYPE = 2,       /* a dtype that the op does not take */
    MK_ERR_SHAPE = 3,       /* a size out of range */
    MK_ERR_STRIDE = 4,      /* a stride out of range */
    MK_ERR_ALIGNMENT = 5,   /* a pointer that is not aligned to its element */
    MK_ERR_VALUE = 6,       /* any other argument out of range */
    MK_ERR_UNSUPPORTED = 7, /* no kernel for this device, or not in this build */
    MK_ERR_DRIVER = 8,      /* the CUDA driver is missing or reported an error */
    MK_ERR_MEMORY = 9       /* no host memory for scratch */
} mk_status;

typedef enum mk_dtype { MK_BF16 = 1, MK_F16 = 2, MK_F32 = 3, MK_I32 = 4, MK_I64 = 5 } mk_dtype;

/* MK_ABI_VERSION of the library: it changes when a struct or a meaning does. */
MK_API int32_t mk_abi_version(void);

/* What was wrong with this thread's last failed call, naming the field; "" before any failure. */
MK_API const char* mk_last_error(void);

/* "MK_ERR_SHAPE", ... */
MK_API const char* mk_status_name(mk_status status);

/* ---- Plans ---------------------------------------------------------------------------------- */

/* What a plan needs to know of a device. */
typedef struct mk_device {
    int32_t sm;             /* kernel family: 80, 89, 90 or 100 */
    int32_t num_sms;        /* streaming multiprocessors */
    int32_t smem_per_block; /* bytes of shared memory that a block may have (opt-in limit) */
    int32_t clusters_of_4;  /* of blocks with an SM each, that run at once; 0: not known */
} mk_device;

/* One launch. A grid of 0 blocks (empty input) launches nothing. */
typedef struct mk_plan {
    char entry[88]; /* kernel name, as the profiler shows it */
    int32_t grid[3];
    int32_t block[3];
    int32_t cluster[3];
    int32_t smem_bytes; /* dynamic shared memory */
    int32_t pdl;        /* 1: launched with programmatic stream serialization (sm_90 and later) */
} mk_plan;

/* One line, e.g. "mk_rms_norm_sm90_bf16 grid 1056x1x1 block 128x1x1 smem 0 pdl". Writes at most
 * `size` bytes with the final 0; returns the length of the full line without it. */
MK_API int32_t mk_plan_format(const mk_plan* plan, char* text, size_t size);

/* The device of the current context. MK_ERR_DRIVER: no driver, or no context is current.
 * MK_ERR_UNSUPPORTED: no kernel in this build runs on it. */
MK_API mk_status mk_current_device(mk_device* device);

/* The architecture ("80", "89", "90a", "100a") whose kernels serve a device of this compute
 * capability in this build: its own, else sm_80's, which run on later 8.x parts as they are and
 * elsewhere are compiled from PTX by the driver. MK_ERR_UNSUPPORTED: none does. Needs no driver. */
MK_API mk_status mk_kernels_for(int32_t major, int32_t minor, const char** arch);

/* Load the kernels for the current device now, which the first launch does otherwise. */
MK_API mk_status mk_load(void);

/* ---- RMSNorm ---------------------------------------------------------------------------------
 * out = round(x / sqrt(mean(x^2) + eps)) * weight, row by row: normalised in fp32, rounded to the
 * dtype, then multiplied (Hugging Face's order). mk_add_rms_norm first does residual += x, rounded
 * to the dtype and stored, and normalises the sum. A row's bits depend on the row only.
 * out may be x. Accesses are 16 bytes wide when hidden is a multiple of 8 and every pointer and
 * stride is a multiple of 16 bytes; else element-wise, with the same bits.
 */
typedef struct mk_rms_norm_params {
    const void* x;      /* [rows, hidden] */
    void* residual;     /* [rows, hidden], updated in place; NULL for mk_rms_norm */
    const void* weight; /* [hidden] */
    void* out;          /* [rows, hidden] */
    int64_t x_stride, residual_stride, out_stride; /* between rows */
    int32_t rows;                                  /* 0 ... 2^30 */
    int32_t hidden;                                /* 1 ... 16384 */
    float eps;
    int32_t dtype; /* MK_BF16, MK_F16: of all tensors */
} mk_rms_norm_params;

MK_API mk_status mk_rms_norm(const mk_rms_norm_params* params, void* stream);
MK_API mk_status mk_rms_norm_plan(const mk_rms_norm_params* params, const mk_device* device,
                                  mk_plan* plan);
MK_API mk_status mk_add_rms_norm(const mk_rms_norm_params* params, void* stream);
MK_API mk_status mk_add_rms_norm_plan(const mk_rms_norm_params* params, const mk_device* device,
                                      mk_plan* plan);

/* ---- Rotary position embedding ----------------------------------------------------------------
 * Rotates the first rotary_dim features of a head in fp32, rounded once; the rest pass unchanged.
 * Pairs are features (i, i + rotary_dim/2), or (2i, 2i+1) when interleaved. The angle of pair i at
 * position p is given by tables, or is fp32(p * fp32(theta^(-2i/rotary_dim))), with sine and cosine
 * within 2e-7 of that angle's. A position outside 0 ... max_position-1 gives NaN.
 */
typedef struct mk_rope {
    const float* cos;        /* [max_position, rotary_dim/2]; NULL: computed from theta */
    const float* sin;        /* as cos */
    int64_t table_stride;    /* between rows of cos and of sin */
    const void* positions;   /* [tokens] */
    int32_t positions_dtype; /* MK_I32, MK_I64 */
    int32_t max_position;    /* 1 ... 2^24 */
    int32_t rotary_dim;      /* even, 2 ... head_dim */
    int32_t interleaved;     /* 0 or 1 */
    float theta;             /* used when cos and sin are NULL: > 1 */
} mk_rope;

/* q_out, k_out = rotated q, k. They may be q and k themselves. */
typedef struct mk_apply_rope_params {
    const void* q; /* [tokens, num_q_heads, head_dim] */
    const void* k; /* [tokens, num_k_heads, head_dim] */
    void* q_out;
    void* k_out;
    int64_t q_stride, q_head_stride, k_stride, k_head_stride; /* between tokens, between heads */
    int64_t q_out_stride, q_out_head_stride, k_out_stride, k_out_head_stride;
    int32_t tokens;
    int32_t num_q_heads, num_k_heads; /* 0 ... 1024 */
    int32_t head_dim;                 /* 2 ... 256 */
    int32_t dtype;                    /* MK_BF16, MK_F16 */
    mk_rope rope;
} mk_apply_rope_params;

MK_API mk_status mk_apply_rope(const mk_apply_rope_params* params, void* stream);
MK_API mk_status mk_apply_rope_plan(const mk_apply_rope_params* params, const mk_device* device,
                                    mk_plan* plan);

/* k_cache[slot] = rotated k, v_cache[slot] = v, for the slot = page * page_size + offset of each
 * token. A token whose slot is negative, or past the cache's end, is skipped. */
typedef struct mk_rope_append_params {
    const void* k;     /* [tokens, num_heads, head_dim] */
    const void* v;     /* [tokens, num_heads, head_dim] */
    void* k_cache;     /* [num_pages, page_size, num_heads, head_dim] */
    void* v_cache;     /* [num_pages, page_size, num_heads, head_dim] */
    const void* slots; /* [tokens] */
    int64_t k_stride, k_head_stride, v_stride, v_head_stride;   /* between tokens, between heads */
    int64_t cache_page_stride, cache_stride, cache_head_stride; /* of both caches */
    int32_t tokens;
    int32_t num_heads; /* 1 ... 1024 */
    int32_t head_dim;  /* 2 ... 256 */
    int32_t num_pages;
    int32_t page_size;
    int32_t slots_dtype; /* MK_I32, MK_I64 */
    int32_t dtype;       /* MK_BF16, MK_F16 */
    mk_rope rope;
} mk_rope_append_params;

MK_API mk_status mk_rope_append(const mk_rope_append_params* params, void* stream);
MK_API mk_status mk_rope_append_plan(const mk_rope_append_params* params, const mk_device* device,
                                     mk_plan* plan);

/* ---- SwiGLU's activation ----------------------------------------------------------------------
 * out = round(silu(gate)) * up, with silu(x) = x / (1 + exp(-x)) in fp32, rounded to the dtype
 * before the product (Hugging Face's order).
 */
typedef struct mk_silu_and_mul_params {
    const void* gate_up; /* [rows, 2 * size]: gate first, then up */
    void* out;           /* [rows, size] */
    int64_t gate_up_stride, out_stride;
    int32_t rows;
    int32_t size;  /* 1 ... 2^20 */
    int32_t dtype; /* MK_BF16, MK_F16 */
} mk_silu_and_mul_params;

MK_API mk_status mk_silu_and_mul(const mk_silu_and_mul_params* params, void* stream);
MK_API mk_status mk_silu_and_mul_plan(const mk_silu_and_mul_params* params, const mk_device* device,
                                      mk_plan* plan);

/* ---- Embedding --------------------------------------------------------------------------------
 * out[t] = table[ids[t]]; an id outside 0 ... vocab-1 gives a row of NaN.
 */
typedef struct mk_embedding_params {
    const void* ids;   /* [tokens] */
    const void* table; /* [vocab, hidden] */
    void* out;         /* [tokens, hidden] */
    int64_t table_stride, out_stride;
    int32_t tokens;
    int32_t vocab;
    int32_t hidden;    /* 1 ... 2^20 */
    int32_t ids_dtype; /* MK_I32, MK_I64 */
    int32_t dtype;     /* MK_BF16, MK_F16 */
} mk_embedding_params;

MK_API mk_status mk_embedding(const mk_embedding_params* params, void* stream);
MK_API mk_status mk_embedding_plan(const mk_embedding_params* params, const mk_device* device,
                                   mk_plan* plan);

/* ---- Linear -------------------------------------------------------------------------------------
 * y[m, n] = sum over k of x[m, k] * w[n, k], in fp32 on mma.sync.m16n8k16 (sm_90: wgmma, of k16
 * too), x as A and w as B: groups of 16 k are added to one accumulator in ascending order (zeros
 * past the last k). So the bits of an output depend on its row of x and its row of w only: not on
 * m, n, the kernel or the device's size. Tensor cores sum 8 products at once before sm_90 and 16
 * from it on: those are two sets of bits.
 *
 *   mk_linear         out = y, + residual where given, rounded once
 *   mk_linear_swiglu  row 2i of w is gate i and row 2i + 1 is up i:
 *                     out[m, i] = silu(y[m, 2i]) * y[m, 2i + 1] in fp32, rounded once
 *
 * norm_weight: x is RMS-normalised first, with the bits of mk_rms_norm; m <= MK_LINEAR_MAX_NORM_M.
 * Above that the product is bound by arithmetic: normalise x by mk_rms_norm, for the same bits.
 */
#define MK_LINEAR_MAX_NORM_M 64

typedef struct mk_linear_params {
    const void* x;           /* [m, k] */
    const void* w;           /* [n, k] */
    const void* norm_weight; /* [k]; NULL: x as it is */
    const void* residual;    /* [m, n], mk_linear only; NULL: none. May be out */
    void* out;               /* [m, n]; of mk_linear_swiglu [m, n / 2] */
    int64_t x_stride, w_stride, residual_stride, out_stride; /* between rows */
    int32_t m;                                               /* 0 ... 2^30 */
    int32_t n;         /* 1 ... 2^24; mk_linear_swiglu: even */
    int32_t k;         /* 1 ... 2^20; 2^14 with norm_weight */
    float eps;         /* of the norm */
    int32_t dtype;     /* MK_BF16, MK_F16: all but out */
    int32_t out_dtype; /* dtype, or MK_F32 (mk_linear without residual) */
} mk_linear_params;

MK_API mk_status mk_linear(const mk_linear_params* params, void* stream);
MK_API mk_status mk_linear_plan(const mk_linear_params* params, const mk_device* device,
                                mk_plan* plan);
MK_API mk_status mk_linear_swiglu(const mk_linear_params* params, void* stream);
MK_API mk_status mk_linear_swiglu_plan(const mk_linear_params* params, const mk_device* device,
                                       mk_plan* plan);

/* Q, K and V projection with RoPE and KV append in its epilogue. The rows of w are those of all
 * heads of Q, then of K, then of V; within a head of Q or K in *pair order*: rows 2i and 2i + 1
 * make pair i of the rotation (i < rotary_dim / 2), then the rows of the features that pass. The
 * outputs are in the order of features that rope.interleaved tells: pair i goes to features (2i, 2i
 * + 1), or (i, i + rotary_dim / 2). q = rotated Q; k_cache[slot] = rotated K and v_cache[slot] = V
 * for the slot of each token, as mk_rope_append does. Everything is computed in fp32 and rounded
 * once; the product and norm_weight are mk_linear's.
 */
typedef struct mk_qkv_rope_append_params {
    const void* x;              /* [tokens, hidden] */
    const void* w;              /* [(num_q_heads + 2 * num_kv_heads) * head_dim, hidden] */
    const void* norm_weight;    /* [hidden]; NULL: x as it is */
    void* q;                    /* [tokens, num_q_heads, head_dim] */
    void* k_cache;              /* [num_pages, page_size, num_kv_heads, head_dim] */
    void* v_cache;              /* [num_pages, page_size, num_kv_heads, head_dim] */
    const void* slots;          /* [tokens]; negative, or past the cache's end: not written */
    int64_t x_stride, w_stride; /* between rows */
    int64_t q_stride, q_head_stride;
    int64_t cache_page_stride, cache_stride, cache_head_stride; /* of both caches */
    int32_t tokens;       /* 0 ... 2^30; at most MK_LINEAR_MAX_NORM_M with norm_weight */
    int32_t hidden;       /* 1 ... 2^20; 2^14 with norm_weight */
    int32_t num_q_heads;  /* 1 ... 1024 */
    int32_t num_kv_heads; /* 1 ... 1024 */
    int32_t head_dim;     /* a multiple of 16, 16 ... 256 */
    int32_t num_pages;
    int32_t page_size;
    float eps;           /* of the norm */
    int32_t slots_dtype; /* MK_I32, MK_I64 */
    int32_t dtype;       /* MK_BF16, MK_F16 */
    mk_rope rope;        /* by tables only: cos and sin are not NULL */
} mk_qkv_rope_append_params;

MK_API mk_status mk_qkv_rope_append(const mk_qkv_rope_append_params* params, void* stream);
MK_API mk_status mk_qkv_rope_append_plan(const mk_qkv_rope_append_params* params,
                                         const mk_device* device, mk_plan* plan);

/* ---- Quantised weights --------------------------------------------------------------------------
 * A matrix of GGUF blocks (ggml's ten types) is packed once, on the host, into tiles of 16 rows in
 * the order in which the kernels read them: the same numbers, at most 3 % more bytes when k is a
 * multiple of 64, and mk_quant_unpack gives the blocks back bit by bit. csrc/quant/quant_layout.h
 * draws the tiles. k is a multiple of the type's block: 32, or 256 for the K types. The numbers of
 * the types are ggml's.
 */
typedef enum mk_quant_type {
    MK_Q4_0 = 2,
    MK_Q4_1 = 3,
    MK_Q5_0 = 6,
    MK_Q5_1 = 7,
    MK_Q8_0 = 8,
    MK_Q2_K = 10,
    MK_Q3_K = 11,
    MK_Q4_K = 12,
    MK_Q5_K = 13,
    MK_Q6_K = 14
} mk_quant_type;

/* A packed matrix in device memory. */
typedef struct mk_quant_matrix {
    const void* tiles; /* mk_quant_packed_bytes of them, aligned to 16 bytes */
    int32_t type;      /* mk_quant_type */
    int32_t rows;
} mk_quant_matrix;

/* Changes when the tiles do: packed matrices that are kept in files carry it. */
#define MK_QUANT_LAYOUT_VERSION 1

/* Between GGUF blocks and tiles, both in host memory. Every value of every byte is legal; rows are
 * padded to a multiple of 16 with zeros. Returns when it is done. */
typedef struct mk_quant_pack_params {
    void* blocks;    /* rows of GGUF blocks: read by mk_quant_pack, written by mk_quant_unpack */
    void* blocks_up; /* NULL, or a second matrix of rows / 2 rows, as is blocks then: packed row
                      * 2i is row i of blocks, 2i + 1 is row i of blocks_up (mk_linear_swiglu) */
    void* tiles;     /* mk_quant_packed_bytes, aligned to 16 bytes */
    const int32_t* row_order; /* a permutation of 0 ... rows - 1: packed row p is row row_order[p]
                               * of blocks. NULL: row p, and with blocks_up */
    int64_t row_bytes;        /* between rows of blocks: at least k / block * bytes of a block */
    int64_t row_up_bytes;     /* of blocks_up */
    int32_t type;             /* mk_quant_type */
    int32_t rows;             /* of the packed matrix: 0 ... 2^24 */
    int32_t k;                /* 1 ... 2^20 */
    int32_t num_threads;      /* 1 ... 256, the caller's among them */
} mk_quant_pack_params;

MK_API mk_status mk_quant_packed_bytes(int32_t type, int32_t rows, int32_t k, int64_t* bytes);
MK_API mk_status mk_quant_pack(const mk_quant_pack_params* params);
MK_API mk_status mk_quant_unpack(const mk_quant_pack_params* params);

/* mk_linear, mk_linear_swiglu and mk_qkv_rope_append with packed weights, each type of which is
 * w = scale * q - minimum for small integers q. Nothing is rounded but sums in fp32, and Q6_K:
 *
 *   x16    = x (after the norm) * 2^e as f16, e of its row such that max |x16| is in [2^11, 2^16):
 *            exact, but for elements below 2^-21 of the largest, which are off by up to 2^-32 of it
 *   P[b]   = sum over the block's 32 k of q[n, k] * x16[m, k], mma.sync.m16n8k16 of f16 with w as
 *            A, groups of 16 k ascending, from 0; q without its sign's offset: not negative
 *   S      = fma(scale[b], P[b], S) over the blocks of 256 k, ascending, from 0; of Q2_K, Q3_K and
 *            Q6_K, whose blocks are 16 k, such MMAs of f16(scale[b] * q) over all 256 k, from 0
 *   total += S times the scale they share, less their minima, or the offset of q times scale, times
 *            the block sums of x16 (22 bits each); ascending. y = total * 2^-e
 *
 * f16(scale * q) is exact, but Q6_K's above 2^11, which are off by up to 2^-11. So an output's bits
 * depend on its rows of x and w only. A row of x with an infinity or a NaN gives NaNs.
 *
 * Up to MK_QUANT_MAX_DECODE_M rows it is one launch, which needs no workspace; above, two:
 * mk_quant_prepare_x, then the product (whose plan is the one that mk_<op>_plan tells). norm_weight
 * may be given for any m. All other fields of the inner structs mean what they mean there.
 */
#define MK_QUANT_MAX_DECODE_M 64

typedef struct mk_linear_quant_params {
    mk_linear_params linear; /* w NULL; k a multiple of 32, or of 256 for the K types */
    mk_quant_matrix w;       /* [n, k]; of mk_linear_quant_swiglu gate and up by turns, or gate */
    mk_quant_matrix up;      /* zeros; where w is gate: up, of any type, both [n / 2, k] */
    void* workspace;         /* mk_linear_quant_workspace_bytes, aligned to 16 bytes; NULL for 0 */
    int64_t workspace_bytes;
} mk_linear_quant_params;

MK_API mk_status mk_linear_quant(const mk_linear_quant_params* params, void* stream);
MK_API mk_status mk_linear_quant_plan(const mk_linear_quant_params* params, const mk_device* device,
                                      mk_plan* plan);
MK_API mk_status mk_linear_quant_swiglu(const mk_linear_quant_params* params, void* stream);
MK_API mk_status mk_linear_quant_swiglu_plan(const mk_linear_quant_params* params,
                                             const mk_device* device, mk_plan* plan);
/* For both; linear.m and linear.k are looked at. */
MK_API mk_status mk_linear_quant_workspace_bytes(const mk_linear_quant_params* params,
                                                 int64_t* bytes);

typedef struct mk_qkv_rope_append_quant_params {
    mk_qkv_rope_append_params qkv; /* w NULL */
    mk_quant_matrix w[3];          /* Q, K (both in pair order) and V, of any types */
    void* workspace;               /* as for mk_linear_quant */
    int64_t workspace_bytes;
} mk_qkv_rope_append_quant_params;

MK_API mk_status mk_qkv_rope_append_quant(const mk_qkv_rope_append_quant_params* params,
                                          void* stream);
MK_API mk_status mk_qkv_rope_append_quant_plan(const mk_qkv_rope_append_quant_params* params,
                                               const mk_device* device, mk_plan* plan);
/* qkv.tokens and qkv.hidden are looked at. */
MK_API mk_status mk_qkv_rope_append_quant_workspace_bytes(
    const mk_qkv_rope_append_quant_params* params, int64_t* bytes);

/* The first of the two launches for more than MK_QUANT_MAX_DECODE_M rows, which those ops enqueue
 * themselves: x16, its block sums and e of each row, into the workspace. */
typedef struct mk_quant_prepare_x_params {
    const void* x;           /* [m, k] */
    const void* norm_weight; /* [k]; NULL: x as it is */
    void* workspace;         /* as for mk_linear_quant */
    int64_t workspace_bytes;
    int64_t x_stride; /* between rows */
    int32_t m;        /* 0 ... 2^30 */
    int32_t k;        /* a multiple of 32, 32 ... 2^20; 2^14 with norm_weight */
    float eps;        /* of the norm */
    int32_t dtype;    /* MK_BF16, MK_F16 */
} mk_quant_prepare_x_params;

MK_API mk_status mk_quant_prepare_x(const mk_quant_prepare_x_params* params, void* stream);
MK_API mk_status mk_quant_prepare_x_plan(const mk_quant_prepare_x_params* params,
                                         const mk_device* device, mk_plan* plan);

/* mk_embedding from a packed table: weights as ggml decodes them in fp32, rounded once. */
typedef struct mk_embedding_quant_params {
    mk_embedding_params embedding; /* table NULL; hidden a multiple of the type's block */
    mk_quant_matrix table;         /* [vocab, hidden] */
} mk_embedding_quant_params;

MK_API mk_status mk_embedding_quant(const mk_embedding_quant_params* params, void* stream);
MK_API mk_status mk_embedding_quant_plan(const mk_embedding_quant_params* params,
                                         const mk_device* device, mk_plan* plan);

/* ---- Attention ----------------------------------------------------------------------------------
 * out = softmax(softmax_scale * rotate(q) k^T + mask) v for each sequence and query head h, over
 * the keys of head h / (num_q_heads / num_kv_heads). The last query of a sequence stands on its
 * last key. causal hides the keys after a query's own place, window = W those at a distance of W or
 * more. A query that sees no key gives 0 (lse -inf). Logits, softmax and sums are fp32; the weights
 * are rounded to the dtype before they meet v. rope (by tables only) rotates q in fp32, rounded
 * once; rope.cos NULL: q as it is. rope.positions NULL: a query's place in its sequence.
 *
 * k and v are packed ([tokens_k, num_kv_heads, head_dim], cu_seqlens_k given, page_size 0), or
 * paged
 * ([num_pages, page_size, num_kv_heads, head_dim], with seqlens_k and block_table given). A page
 * number outside 0 ... num_pages-1 gives NaN. Index arrays are int32. All strides are multiples of
 * 16 bytes, and so are the pointers of q, k, v and out.
 *
 * mk_attention is for prompts: a block of the grid does one tile of queries of one head. Sequences
 * with at most skip_seqlen_q queries are left alone, out and lse too: they are another launch's.
 * mk_attention_decode is for few new tokens: it reads the keys once for all queries of a KV group,
 * in splits whose number and bounds depend on the sequence's length alone, and the last block of a
 * sequence and KV head to end combines them in order. Sequences of more than max_seqlen_q queries
 * are left alone. k_new and v_new, where given, are appended: k_new is rotated as q is, both are
 * written into the cache behind the seqlens_k keys that are there, and take part.
 * A row's bits depend on its own sequence only.
 */
typedef struct mk_attention_params {
    const void* q;               /* [tokens_q, num_q_heads, head_dim] */
    const void* k;               /* packed or paged */
    const void* v;               /* as k */
    void* out;                   /* [tokens_q, num_q_heads, head_dim] */
    float* lse;                  /* [num_q_heads, tokens_q], natural logarithm; NULL: not wanted */
    const int32_t* cu_seqlens_q; /* [batch + 1] */
    const int32_t* cu_seqlens_k; /* packed: [batch + 1], else NULL */
    const int32_t* seqlens_k;    /* paged: [batch] keys of each sequence, else NULL */
    const int32_t* block_table;  /* paged: [batch, max_pages], pages in order, else NULL */
    int64_t q_stride, q_head_stride;
    int64_t k_page_stride, k_stride, k_head_stride;
    int64_t v_page_stride, v_stride, v_head_stride;
    int64_t out_stride, out_head_stride, lse_stride, block_table_stride;
    int32_t tokens_q, tokens_k; /* rows of q; rows of packed k */
    int32_t batch;              /* 0 ... 65535 */
    int32_t num_q_heads;        /* a multiple of num_kv_heads, ... 1024 */
    int32_t num_kv_heads;
    int32_t head_dim;      /* 64, 128 */
    int32_t num_pages;     /* of the cache */
    int32_t page_size;     /* 16, 32, 64, 128; 0: packed */
    int32_t max_pages;     /* columns of block_table */
    int32_t max_seqlen_q;  /* no sequence has more queries */
    int32_t skip_seqlen_q; /* 0: none is skipped */
    int32_t seqlens_k_add; /* paged: 1 if seqlens_k counts the keys before these queries' own */
    int32_t causal;        /* 0 or 1 */
    int32_t window;        /* 0: none */
    float softmax_scale;
    int32_t dtype; /* MK_BF16, MK_F16 */
    mk_rope rope;
} mk_attention_params;

MK_API mk_status mk_attention(const mk_attention_params* params, void* stream);
MK_API mk_status mk_attention_plan(const mk_attention_params* params, const mk_device* device,
                                   mk_plan* plan);

typedef struct mk_attention_decode_params {
    const void* q;               /* [tokens, num_q_heads, head_dim] */
    const void* k_new;           /* [tokens, num_kv_heads, head_dim]; NULL: in the cache already */
    const void* v_new;           /* as k_new */
    void* k_cache;               /* [num_pages, page_size, num_kv_heads, head_dim] */
    void* v_cache;               /* [num_pages, page_size, num_kv_heads, head_dim] */
    void* out;                   /* [tokens, num_q_heads, head_dim] */
    float* lse;                  /* [num_q_heads, tokens], natural logarithm; NULL: not wanted */
    const int32_t* cu_seqlens_q; /* [batch + 1]; NULL: one query each */
    const int32_t* seqlens_k;    /* [batch] keys in the cache before k_new */
    const int32_t* block_table;  /* [batch, max_pages] */
    void* workspace; /* of mk_attention_decode_workspace_bytes, all 0 before its first use; a launch
                      * leaves its counters 0 again, so that launches of all shapes can share one.
                      * Launches on several streams need one each */
    int64_t workspace_bytes;
    int64_t q_stride, q_head_stride;
    int64_t k_new_stride, k_new_head_stride, v_new_stride, v_new_head_stride;
    int64_t cache_page_stride, cache_stride, cache_head_stride; /* of both caches */
    int64_t out_stride, out_head_stride, lse_stride, block_table_stride;
    int32_t tokens;
    int32_t batch; /* 0 ... 65535; at most 65536 / num_kv_heads for each 32 rows of a group */
    int32_t num_q_heads;
    int32_t num_kv_heads;
    int32_t head_dim; /* 64, 128 */
    int32_t num_pages;
    int32_t page_size; /* 16, 32, 64, 128 */
    int32_t max_pages;
    int32_t max_seqlen_q; /* 1 ... 8; longer sequences are left alone */
    int32_t causal;
    int32_t window; /* 0: none */
    float softmax_scale;
    int32_t dtype; /* MK_BF16, MK_F16 */
    mk_rope rope;
} mk_attention_decode_params;

MK_API mk_status mk_attention_decode(const mk_attention_decode_params* params, void* stream);
MK_API mk_status mk_attention_decode_plan(const mk_attention_decode_params* params,
                                          const mk_device* device, mk_plan* plan);
/* Bytes that any launch with this batch, heads, head_dim, max_pages * page_size and max_seqlen_q
 * may use; other fields are not looked at. */
MK_API mk_status mk_attention_decode_workspace_bytes(const mk_attention_decode_params* params,
                                                     int64_t* bytes);

/* ---- Picking the next token -------------------------------------------------------------------
 * mk_argmax: the first of the largest logits of each row; a NaN counts as largest (PyTorch's rule).
 *
 * mk_sample draws one token per row by a rule in integers that the CPU sampler
 * (minitron_kernels/sampling.py) shares, so that neither the order of summation nor the other rows
 * can change the result:
 *   l_i = fp32(logit_i / temperature), m = max l_i, w_i = int64(exp(l_i - m) * 2^40)
 *   top_k  keeps the k first in the order (l descending, id ascending)
 *   top_p  keeps, of these and in this order, those before which w sums to less than
 *          max(1, int64(top_p * total)), total = the sum of w after top_k, in double
 *   min_p  keeps, of these, those with w_i >= int64(min_p * 2^40)
 *   r      = out[1] << 32 | out[0] of Philox4x32-10, counter (step, 0, 0, 0), key = seed (low,
 * high) token  = the first id at which the running sum of the w left exceeds (r * their total) >>
 * 64 The fp32 exp is within 1.01 ulp; another one may differ in the last bit of some w_i, about
 * 2^-24 of it, and then can move the token only when target lies within such a step. temperature 0
 * takes the argmax. A row whose largest logit is not finite gives -1.
 */
typedef struct mk_argmax_params {
    const void* logits; /* [rows, vocab] */
    int64_t* out;       /* [rows] */
    int64_t logits_stride;
    int32_t rows;
    int32_t vocab; /* 1 ... 2^19 */
    int32_t dtype; /* of logits: MK_BF16, MK_F16, MK_F32 */
} mk_argmax_params;

MK_API mk_status mk_argmax(const mk_argmax_params* params, void* stream);
MK_API mk_status mk_argmax_plan(const mk_argmax_params* params, const mk_device* device,
                                mk_plan* plan);

/* How one row is sampled; an array of these lies in device memory. Values are not checked there:
 * the caller keeps the ranges. */
typedef struct mk_sampling {
    double top_p; /* 0 < top_p <= 1; 1: off */
    double min_p; /* 0 ... 1; 0: off */
    uint64_t seed;
    uint32_t step;     /* tokens drawn before, for this seed */
    float temperature; /* 0: greedy; else 1e-5 or more */
    int32_t top_k;     /* 0: off */
    int32_t reserved;  /* 0 */
} mk_sampling;

typedef struct mk_sample_params {
    const void* logits;          /* [rows, vocab] */
    const mk_sampling* sampling; /* [rows] */
    int64_t* out;                /* [rows] */
    int64_t logits_stride;
    int32_t rows;
    int32_t vocab; /* 1 ... 2^19 */
    int32_t dtype; /* of logits: MK_BF16, MK_F16, MK_F32 */
} mk_sample_params;

MK_API mk_status mk_sample(const mk_sample_params* params, void* stream);
MK_API mk_status mk_sample_plan(const mk_sample_params* params, const mk_device* device,
                                mk_plan* plan);

/* ---- Matrix product on the CPU ------------------------------------------------------------------
 * out[m, n] = epilogue(sum over k of x[m, k] * w[n, k]) for tensors in host memory; it returns when
 * it is done. The sum is 16 partial sums in fp32 from +0, lane l adding by fused multiply-add the
 * products of k = l, l + 16, ... ascending (zeros past the last k, up to a multiple of 16), which
 * are then halved four times: s[l] += s[l + 8], += s[l + 4], += s[l + 2], += s[l + 1]. Of bf16, as
 * VDPBF16PS adds pairs, lane l takes k = 2 l + 1, 2 l, 2 l + 33, 2 l + 32, ... (zeros up to a
 * multiple of 32), and what is below 2^-126 counts as zero. The epilogue works in fp32 on the sum,
 * and the result is rounded once, to nearest even; every NaN is stored as the positive quiet NaN.
 * So an output's bits depend on its row of x and of w only: not on m, n, the strides, the threads,
 * the processor, nor the rounding mode and flush-to-zero of the caller. No byte outside the rows is
 * read. May be called by several threads at once (one has the workers, the others work alone) and
 * in a forked child. Every thread keeps 630 KiB, and a caller 32 MiB or 144 rows of x in fp32.
 */
typedef enum mk_epilogue {
    MK_EPILOGUE_NONE = 0,
    MK_EPILOGUE_SILU = 1,  /* silu(y) = y / (1 + exp(-y)), exp within 1 unit in the last place */
    MK_EPILOGUE_MUL = 2,   /* y * other */
    MK_EPILOGUE_ADD = 3,   /* y + other */
    MK_EPILOGUE_SWIGLU = 4 /* silu(y) * (the same sum with w_up) */
} mk_epilogue;

/* Instruction sets. The results are the same. */
typedef enum mk_cpu_isa {
    MK_CPU_AUTO = 0,      /* what MK_CPU_ISA names (mk_cpu_isa_name), else the best there is */
    MK_CPU_BASELINE = 1,  /* plain C++ */
    MK_CPU_AVX2 = 2,      /* and FMA, F16C */
    MK_CPU_AVX512 = 3,    /* F, BW, VL */
    MK_CPU_AVX512BF16 = 4 /* and BF16, for bf16 in mk_cpu_linear; else as MK_CPU_AVX512 */
} mk_cpu_isa;

typedef struct mk_cpu_linear_params {
    const void* x;     /* [m, k] */
    const void* w;     /* [n, k] */
    const void* w_up;  /* [n, k] for MK_EPILOGUE_SWIGLU, else NULL */
    const void* other; /* [m, n] for MK_EPILOGUE_MUL and _ADD, else NULL; may be out */
    void* out;         /* [m, n] */
    int64_t x_stride, w_stride, w_up_stride, other_stride, out_stride; /* between rows */
    int32_t m, n, k;
    int32_t dtype;       /* MK_BF16, MK_F16, MK_F32: of all tensors but out */
    int32_t epilogue;    /* mk_epilogue */
    int32_t num_threads; /* 1 ... 256, the caller's among them */
    int32_t isa;         /* mk_cpu_isa */
    int32_t out_dtype;   /* dtype (0 stands for it), or MK_F32 */
} mk_cpu_linear_params;

MK_API mk_status mk_cpu_linear(const mk_cpu_linear_params* params);

/* The instruction set of MK_CPU_AUTO: "baseline", "avx2", "avx512", "avx512bf16". */
MK_API mk_status mk_cpu_isa_name(const char** name);

/* ---- Quantised matrices on the CPU --------------------------------------------------------------
 * Products of x and of matrices that stay GGUF blocks as stored, which need no alignment:
 * out[m, n] = epilogue(sum over k of x[m, k] * w[n, k]) for each of the products. Several of them
 * (Q, K and V) cost one call of the threads. Returns when it is done.
 *
 * A weight is scale * q + minimum for a small integer q and numbers of its block b, of 32 k or, for
 * Q2_K, Q3_K and Q6_K, of 16 k; scale and minimum are exact in fp32. Every group of 256 k of a row
 * of x (the last may be shorter) is rounded to integers X times a power of two, unit:
 *
 *   bf16       |X| <= 127 * 2^8, the largest at least 255 * 2^6: an element is off by 1.004 * 2^-15
 *              of the largest of its group at the most, and exact if it is above 2^-7 of that
 *   f16, fp32  X = X1 + 2^-15 X2, |X1| <= 2^14: off by 2^-29 of the largest; a group whose largest
 *              is below 2^-112 takes the unit of 2^-112
 *
 *   P     = sum over the block's k of q * X              exact
 *   S     = fma(scale, P, S), then, for types with minima, fma(minimum, sum of the block's X, S)
 *           in fp32 over the blocks of a group, ascending, from +0
 *   total = fma(unit, S, total) over the groups, ascending, from +0
 *
 * and for f16 and fp32 the totals of X1 and of X2 are added.
 *
 * With x_bits = 8, which takes half as many products, x is rounded further, each 32 k of it for
 * themselves, whatever dtype is. All of this is in fp32:
 *
 *   largest = the largest |x| of 32 k, 2^-112 if it is below that
 *   X       = rint(x * (127 / largest))    unit = largest / 127
 *   P       = sum over the block's k of q * X              exact
 *   S       = scale * P, then, for types with minima, fma(minimum, sum of the block's X, S); the
 *             second of two blocks of 16 k goes on with fma(scale, P, S)
 *   total   = fma(unit, S, total) over the 32 k, ascending, from +0
 *
 * An element is then off by 1 / 254 of the largest of its 32.
 *
 * The epilogue works in fp32 on the total, and the result is rounded once; every NaN is stored as
 * the positive quiet one. So an output's bits depend on its row of x and of w only: not on m, n,
 * the type of others, the threads, or the processor. A row of x with an infinity or a NaN gives
 * NaNs. For any x, what rounding x costs (without x_bits) is a quarter or less of what rounding w
 * to bf16 costs in a bf16 product.
 *
 * No byte outside the rows is read. Threads as for mk_cpu_linear. Every thread keeps 120 KiB, and a
 * caller 32 MiB or 192 rows of x as integers.
 */
typedef struct mk_cpu_quant_product {
    const void* w;     /* n rows of GGUF blocks */
    const void* w_up;  /* n rows of GGUF blocks for MK_EPILOGUE_SWIGLU, else NULL */
    const void* other; /* [m, n] of dtype for MK_EPILOGUE_MUL and _ADD, else NULL; may be out */
    void* out;         /* [m, n] */
    int64_t w_row_bytes, w_up_row_bytes; /* between rows: at least the bytes of a row */
    int64_t other_stride, out_stride;    /* between rows, in elements */
    int32_t n;
    int32_t type;      /* mk_quant_type */
    int32_t up_type;   /* of w_up */
    int32_t epilogue;  /* mk_epilogue */
    int32_t out_dtype; /* dtype (0 stands for it), or MK_F32 */
} mk_cpu_quant_product;

typedef struct mk_cpu_linear_quant_params {
    const void* x; /* [m, k] */
    const mk_cpu_quant_product* products;
    int64_t x_stride; /* between rows */
    int32_t num_products;
    int32_t m;
    int32_t k;           /* 0 ... 2^20, a multiple of 32, or of 256 for the K types */
    int32_t dtype;       /* MK_BF16, MK_F16, MK_F32: of x and other */
    int32_t num_threads; /* 1 ... 256, the caller's among them */
    int32_t isa;         /* mk_cpu_isa; AVX-512 without VNNI takes the kernels of AVX2 */
    int32_t x_bits;      /* 0, or 8: x is rounded to 8 bits */
} mk_cpu_linear_quant_params;

MK_API mk_status mk_cpu_linear_quant(const mk_cpu_linear_quant_params* params);

/* out[t] = row ids[t] of a quantised matrix, each weight fma(scale, q, minimum) in fp32, as ggml
 * decodes it, rounded once. An id outside 0 ... rows-1 gives a row of NaN. */
typedef struct mk_cpu_dequantize_params {
    const void* ids; /* [tokens]; NULL: 0, 1, ..., tokens-1 */
    const void* w;   /* [rows] of GGUF blocks */
    void* out;       /* [tokens, k] */
    int64_t w_row_bytes;
    int64_t out_stride; /* between rows, in elements */
    int32_t tokens;
    int32_t rows;
    int32_t k;           /* as for mk_cpu_linear_quant */
    int32_t type;        /* mk_quant_type */
    int32_t ids_dtype;   /* MK_I32, MK_I64 */
    int32_t dtype;       /* MK_BF16, MK_F16, MK_F32: of out */
    int32_t num_threads; /* 1 ... 256, the caller's among them */
    int32_t isa;         /* mk_cpu_isa */
} mk_cpu_dequantize_params;

MK_API mk_status mk_cpu_dequantize(const mk_cpu_dequantize_params* params);

/* A matrix [rows, k] of GGUF blocks as stored. */
typedef struct mk_cpu_quant_blocks {
    const void* w;
    int64_t w_row_bytes; /* between rows */
    int32_t rows;
    int32_t k;    /* as for mk_cpu_linear_quant */
    int32_t type; /* mk_quant_type */
} mk_cpu_quant_blocks;

/* found[i] = the first row of matrices[i] in which a block has an infinite or NaN scale or minimum
 * as it is stored (half precision), -1 if there is none. Reads 2 or 4 bytes of a block. */
MK_API mk_status mk_cpu_nonfinite_scales(const mk_cpu_quant_blocks* matrices, int32_t count,
                                         int32_t num_threads, int32_t* found);

/* ---- Row-wise ops and attention on the CPU ------------------------------------------------------
 * The ops of the GPU on tensors in host memory, with the same structs; dtype may be MK_F32 as well.
 * They return when they are done. Indices are looked at, and nothing is written if one is bad. As
 * for mk_cpu_linear, the bits do not depend on num_threads, the processor or the rest of the batch,
 * and NaNs are stored as the positive quiet one.
 */
typedef struct mk_cpu_options {
    int32_t num_threads; /* 1 ... 256, the caller's among them */
    int32_t isa;         /* mk_cpu_isa */
} mk_cpu_options;

/* As mk_rms_norm; residual, where given, is added as by mk_add_rms_norm. The mean is summed in
 * double, and 1 / sqrt(mean + eps) rounded once to fp32. hidden: 1 ... 2^20. */
MK_API mk_status mk_cpu_rms_norm(const mk_rms_norm_params* params, const mk_cpu_options* options);

/* As mk_silu_and_mul. */
MK_API mk_status mk_cpu_silu_and_mul(const mk_silu_and_mul_params* params,
                                     const mk_cpu_options* options);

/* As mk_embedding, but an id outside 0 ... vocab-1 is an error. */
MK_API mk_status mk_cpu_embedding(const mk_embedding_params* params, const mk_cpu_options* options);

/* q_out = rotated q; k_cache[slot] = rotated k and v_cache[slot] = v for the slot of each token, a
 * negative one being skipped. Either half is left out when its number of heads is 0. */
typedef struct mk_cpu_rope_append_params {
    const void* q;     /* [tokens, num_q_heads, head_dim] */
    void* q_out;       /* as q; may be q */
    const void* k;     /* [tokens, num_kv_heads, head_dim] */
    const void* v;     /* as k */
    void* k_cache;     /* [num_pages, page_size, num_kv_heads, head_dim] */
    void* v_cache;     /* as k_cache */
    const void* slots; /* [tokens] */
    int64_t q_stride, q_head_stride, q_out_stride, q_out_head_stride;
    int64_t k_stride, k_head_stride, v_stride, v_head_stride;
    int64_t cache_page_stride, cache_stride, cache_head_stride; /* of both caches */
    int32_t tokens;
    int32_t num_q_heads, num_kv_heads; /* 0 ... 1024 */
    int32_t head_dim;                  /* 1 ... 1024 */
    int32_t num_pages;
    int32_t page_size;
    int32_t slots_dtype; /* MK_I32, MK_I64 */
    int32_t dtype;       /* MK_BF16, MK_F16, MK_F32 */
    int32_t pair_order;  /* 1: q and k come in the pair order of mk_qkv_rope_append's rows */
    mk_rope rope;        /* by tables only */
} mk_cpu_rope_append_params;

MK_API mk_status mk_cpu_rope_append(const mk_cpu_rope_append_params* params,
                                    const mk_cpu_options* options);

/* As mk_attention, for prompts and single tokens alike; any page_size, head_dim 1 ... 1024, no
 * alignment, and rope.cos is NULL. For a block of 128 keys (0 ... 127, 128 ... 255, ...): the
 * logits as mk_cpu_linear sums fp32, times softmax_scale; their maximum; weights relative to it,
 * which are not rounded below fp32; and sum and product with v over the block's keys ascending.
 * Blocks are joined in ascending order. So a row has the same bits in a prompt, cut anywhere, and
 * as a single token. Keys that a query does not see are not multiplied with anything: a NaN there
 * is not met. Sequences with at most skip_seqlen_q or more than max_seqlen_q rows are an error. */
MK_API mk_status mk_cpu_attention(const mk_attention_params* params, const mk_cpu_options* options);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* MINITRON_KERNELS_H_ */
