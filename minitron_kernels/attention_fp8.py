"""Attention of e4m3 Q, K and V with a scale per head, as FlashAttention-3 has it.

CUDA tensors take mk_attention_fp8 (sm_90a: H100, H200). CPU tensors are multiplied by their scales
and take the CPU's attention in fp32: the same but for the rounding of weights, which a GPU has to
give its tensor cores in e4m3, too.
"""

from __future__ import annotations

import math

import torch

from minitron_kernels import cuda_ops, torch_ops
from minitron_kernels.checks import (
    check_device,
    check_dtype,
    check_packed,
    shape_of,
    starts_of,
)
from minitron_kernels.cuda_attention import as_int32, outputs
from minitron_kernels.library import op

Tensor = torch.Tensor

E4M3 = torch.float8_e4m3fn
HEAD_DIM = 128  # of the kernel


def attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    window: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.attention` of float8_e4m3fn q [Tq, Hq, D], k and v [Tk, Hk, D] -> out [Tq, Hq, D].

    What a byte stands for is its value times its descale, fp32 [Hk] or [B, Hk] (q_descale: or [Hq],
    [B, Hq], a scale for each query head); None is 1. ``out_dtype``: bfloat16 or float16. Everything
    else is as in `ops.attention`; rope and paged keys are not there, as q and k are rotated before
    they are quantised.

    On a GPU the softmax's weights, 2^6 to 2^8 at a row's largest, are rounded to e4m3 for their
    product with v, and summed in fp32 before that; sums of weight * v are fp32 from one tile of 128
    keys to the next. NotImplementedError: another architecture than sm_90a, or another head_dim
    than 128.
    """
    out, lse = _attention_fp8(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        q_descale,
        k_descale,
        v_descale,
        out_dtype,
        max_seqlen_q,
        causal,
        softmax_scale,
        window,
        return_lse,
    )
    return (out, lse) if return_lse else out


def _fake(q: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    out_dtype, return_lse = args[7], args[-1]
    assert isinstance(out_dtype, torch.dtype)
    lse_shape = (q.shape[1], q.shape[0]) if return_lse else (0,)
    return q.new_empty(q.shape, dtype=out_dtype), q.new_empty(lse_shape, dtype=torch.float32)


@op(
    "attention_fp8(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, ScalarType out_dtype, "
    "SymInt? max_seqlen_q, bool causal, float? softmax_scale, int? window, bool return_lse) "
    "-> (Tensor, Tensor)",
    _fake,
)
def _attention_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    out_dtype: torch.dtype,
    max_seqlen_q: int | None,
    causal: bool,
    softmax_scale: float | None,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, t, E4M3)
        check_device(name, t, q.device)
    check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, window)
    if out_dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"out_dtype must be bfloat16 or float16, got {out_dtype}")
    batch, (heads, kv_heads) = len(cu_seqlens_q) - 1, (q.shape[1], k.shape[1])
    _check_descale("q_descale", q_descale, batch, {kv_heads, heads}, q)
    _check_descale("k_descale", k_descale, batch, {kv_heads}, q)
    _check_descale("v_descale", v_descale, batch, {kv_heads}, q)
    scale = 1 / math.sqrt(q.shape[2]) if softmax_scale is None else softmax_scale
    cu_seqlens = cu_seqlens_q, cu_seqlens_k
    options = max_seqlen_q, causal, scale, window
    if q.is_cuda or cuda_ops.emulate:
        descales = q_descale, k_descale, v_descale
        return _on_gpu(q, k, v, cu_seqlens, descales, out_dtype, *options, return_lse)
    starts_of("cu_seqlens_q", cu_seqlens_q, q.shape[0], "q")
    starts_of("cu_seqlens_k", cu_seqlens_k, k.shape[0], "k")
    q = _dequantised(q, cu_seqlens_q, q_descale)
    k = _dequantised(k, cu_seqlens_k, k_descale)
    v = _dequantised(v, cu_seqlens_k, v_descale)
    out, lse = torch_ops.packed_attention(q, k, v, cu_seqlens, *options, None, return_lse)
    return out.to(out_dtype), lse


def _check_descale(
    name: str, descale: Tensor | None, batch: int, heads: set[int], q: Tensor
) -> None:
    if descale is None:
        return
    check_dtype(name, descale, torch.float32)
    check_device(name, descale, q.device)
    good = descale.ndim in (1, 2) and descale.shape[-1] in heads
    if not good or (descale.ndim == 2 and descale.shape[0] != batch):
        counts = " or ".join(f"[{n}] or [{batch}, {n}]" for n in sorted(heads))
        raise ValueError(f"{name} must be {counts}, got {shape_of(descale)}")


def _dequantised(x: Tensor, cu_seqlens: Tensor, descale: Tensor | None) -> Tensor:
    """x [T, H, D] in fp32, times the descale of its head, and of its sequence if they differ."""
    wide = x.float()
    if descale is None:
        return wide
    descale = descale.repeat_interleave(x.shape[1] // descale.shape[-1], -1)
    if descale.ndim == 2:
        descale = descale.repeat_interleave(torch.diff(cu_seqlens), 0, output_size=x.shape[0])
    return wide.mul_(descale[..., None])


def _on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    descales: tuple[Tensor | None, Tensor | None, Tensor | None],
    out_dtype: torch.dtype,
    max_seqlen_q: int | None,
    causal: bool,
    scale: float,
    window: int | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    num_rows, heads, head_dim = q.shape
    if head_dim != HEAD_DIM:
        raise NotImplementedError(
            f"attention of {E4M3} takes head_dim {HEAD_DIM} on a GPU, it is {head_dim}"
        )
    out, lse = outputs(q, return_lse, torch.empty(q.shape, dtype=out_dtype, device=q.device))
    largest = num_rows if max_seqlen_q is None else min(max_seqlen_q, num_rows)
    if q.numel() == 0 or largest == 0:
        return out, lse
    q, k, v = _wide(q), _wide(k), _wide(v)
    cu_q, cu_k = as_int32(cu_seqlens[0]), as_int32(cu_seqlens[1])
    kept = [None if t is None else t.contiguous() for t in descales]
    cuda_ops.call(
        "attention_fp8",
        q,
        *(t.data_ptr() for t in (q, k, v, out)),
        lse.data_ptr() if return_lse else 0,
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        *(cuda_ops.pointer(t) for t in kept),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *out.stride()[:2],
        num_rows,  # lse_stride
        *(0 if t is None or t.ndim == 1 else t.stride(0) for t in kept),
        num_rows,
        k.shape[0],
        len(cu_q) - 1,
        heads,
        k.shape[1],
        0 if kept[0] is None else kept[0].shape[-1],
        head_dim,
        largest,
        causal,
        window or 0,
        scale,
        cuda_ops.DTYPES[out_dtype],
    )
    return out, lse


def _wide(x: Tensor) -> Tensor:
    """x [T, H, D] so that it can be read 16 bytes at a time and no elements share memory; copied
    only if it must be.
    """
    (tokens, heads, dim), (row, head, feature) = x.shape, x.stride()
    tokens_outside = head >= dim and row >= heads * head
    heads_outside = row >= dim and head >= tokens * row
    aligned = feature == 1 and row % 16 == 0 and head % 16 == 0 and x.data_ptr() % 16 == 0
    if aligned and (tokens_outside or heads_outside):
        return x
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
