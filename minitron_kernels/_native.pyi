"""The C ABI of minitron_kernels for Python; include/minitron_kernels.h describes every field.

Pointers (of any tensor) and streams are addresses, strides are in elements, dtypes are the ids
below. `<op>` enqueues on the stream; `<op>_plan` tells what it would launch on a device, without
one: the keys of a plan are entry, grid, block, cluster, smem_bytes and pdl.

Raises ValueError (NULL, shape, stride, alignment, value), TypeError (dtype), NotImplementedError
(no kernel for the device), MemoryError or RuntimeError (the CUDA driver), with the message of
mk_last_error().
"""

from typing import Any

ABI_VERSION: int
BF16: int
F16: int
F32: int
I32: int
I64: int

class Rope:
    """mk_rope: tables (cos, sin) or, when both are 0, theta."""

    def __init__(
        self,
        cos: int,
        sin: int,
        table_stride: int,
        positions: int,
        positions_dtype: int,
        max_position: int,
        rotary_dim: int,
        interleaved: bool = False,
        theta: float = 0.0,
    ) -> None: ...

def load() -> None: ...
def current_device() -> dict[str, int]: ...
def kernels_for(major: int, minor: int) -> str: ...
def add_rms_norm(
    x: int,
    residual: int,
    weight: int,
    out: int,
    x_stride: int,
    residual_stride: int,
    out_stride: int,
    rows: int,
    hidden: int,
    eps: float,
    dtype: int,
    stream: int,
) -> None: ...
def add_rms_norm_plan(
    x: int,
    residual: int,
    weight: int,
    out: int,
    x_stride: int,
    residual_stride: int,
    out_stride: int,
    rows: int,
    hidden: int,
    eps: float,
    dtype: int,
    *,
    sm: int,
    num_sms: int,
    smem_per_block: int,
) -> dict[str, Any]: ...
def rms_norm(
    x: int,
    weight: int,
    out: int,
    x_stride: int,
    out_stride: int,
    rows: int,
    hidden: int,
    eps: float,
    dtype: int,
    stream: int,
) -> None: ...
def rms_norm_plan(
    x: int,
    weight: int,
    out: int,
    x_stride: int,
    out_stride: int,
    rows: int,
    hidden: int,
    eps: float,
    dtype: int,
    *,
    sm: int,
    num_sms: int,
    smem_per_block: int,
) -> dict[str, Any]: ...
def apply_rope(
    q: int,
    k: int,
    q_out: int,
    k_out: int,
    q_stride: int,
    q_head_stride: int,
    k_stride: int,
    k_head_stride: int,
    q_out_stride: int,
    q_out_head_stride: int,
    k_out_stride: int,
    k_out_head_stride: int,
    tokens: int,
    num_q_heads: int,
    num_k_heads: int,
    head_dim: int,
    dtype: int,
    rope: Rope,
    stream: int,
) -> None: ...
def apply_rope_plan(
    q: int,
    k: int,
    q_out: int,
    k_out: int,
    q_stride: int,
    q_head_stride: int,
    k_stride: int,
    k_head_stride: int,
    q_out_stride: int,
    q_out_head_stride: int,
    k_out_stride: int,
    k_out_head_stride: int,
    tokens: int,
    num_q_heads: int,
    num_k_heads: int,
    head_dim: int,
    dtype: int,
    rope: Rope,
    *,
    sm: int,
    num_sms: int,
    smem_per_block: int,
) -> dict[str, Any]: ...
def rope_append(
    k: int,
    v: int,
    k_cache: int,
    v_cache: int,
    slots: int,
    k_stride: int,
    k_head_stride: int,
    v_stride: int,
    v_head_stride: int,
    cache_page_stride: int,
    cache_stride: int,
    cache_head_stride: int,
    tokens: int,
    num_heads: int,
    head_dim: int,
    num_pages: int,
    page_size: int,
    slots_dtype: int,
    dtype: int,
    rope: Rope,
    stream: int,
) -> None: ...
def rope_append_plan(
    k: int,
    v: int,
    k_cache: int,
    v_cache: int,
    slots: int,
    k_stride: int,
    k_head_stride: int,
    v_stride: int,
    v_head_stride: int,
    cache_page_stride: int,
    cache_stride: int,
    cache_head_stride: int,
    tokens: int,
    num_heads: int,
    head_dim: int,
    num_pages: int,
    page_size: int,
    slots_dtype: int,
    dtype: int,
    rope: Rope,
    *,
    sm: int,
    num_sms: int,
    smem_per_block: int,
) -> dict[str, Any]: ...
def silu_and_mul(
    gate_up: int,
    out: int,
    gate_up_stride: int,
    out_stride: int,
    rows: int,
    size: int,
    dtype: int,
    stream: int,
) -> None: ...
def silu_and_mul_plan(
    gate_up: int,
    out: int,
    gate_up_stride: int,
    out_stride: int,
    rows: int,
    size: int,
    dtype: int,
    *,
    sm: int,
    num_sms: int,
    smem_per_block: int,
) -> dict[str, Any]: ...
def embedding(
    ids: int,
    table: int,
    out: int,
    table_stride: int,
    out_stride: int,
    tokens: int,
    vocab: int,
    hidden: int,
    ids_dtype: int,
    dtype: int,
    stream: int,
) -> None: ...
def embedding_plan(
    ids: int,
    table: int,
    out: int,
    table_stride: int,
    out_stride: int,
    tokens: int,
    vocab: int,
    hidden: int,
    ids_dtype: int,
    dtype: int,
    *,
    sm: int,
    num_sms: int,
    smem_per_block: int,
) -> dict[str, Any]: ...
def argmax(
    logits: int, out: int, logits_stride: int, rows: int, vocab: int, dtype: int, stream: int
) -> None: ...
def argmax_plan(
    logits: int,
    out: int,
    logits_stride: int,
    rows: int,
    vocab: int,
    dtype: int,
    *,
    sm: int,
    num_sms: int,
    smem_per_block: int,
) -> dict[str, Any]: ...
def sample(
    logits: int,
    sampling: int,
    out: int,
    logits_stride: int,
    rows: int,
    vocab: int,
    dtype: int,
    stream: int,
) -> None: ...
def sample_plan(
    logits: int,
    sampling: int,
    out: int,
    logits_stride: int,
    rows: int,
    vocab: int,
    dtype: int,
    *,
    sm: int,
    num_sms: int,
    smem_per_block: int,
) -> dict[str, Any]: ...

EPILOGUE_NONE: int
EPILOGUE_SILU: int
EPILOGUE_MUL: int
EPILOGUE_ADD: int
EPILOGUE_SWIGLU: int
CPU_AUTO: int
CPU_BASELINE: int
CPU_AVX2: int
CPU_AVX512: int

def cpu_isa() -> str: ...
def cpu_linear(
    x: int,
    w: int,
    out: int,
    x_stride: int,
    w_stride: int,
    out_stride: int,
    m: int,
    n: int,
    k: int,
    dtype: int,
    num_threads: int,
    epilogue: int = ...,
    other: int = 0,
    other_stride: int = 0,
    w_up: int = 0,
    w_up_stride: int = 0,
    isa: int = ...,
) -> None: ...
