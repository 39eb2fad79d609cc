"""Triton kernels that the project's are compared with, written as one would for speed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend(
    q, acc, row_max, row_sum, rows, k_ptr, v_ptr, first, last, scale_log2, k_stride,
    MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys first ... last-1; MASKED hides those after a row's own place."""
    dims = tl.arange(0, HEAD_DIM)
    for start in range(first, last, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_ptr + cols[None, :] * k_stride + dims[:, None])
        logits = tl.dot(q, k)
        if MASKED:
            logits = tl.where(cols[None, :] <= rows[:, None], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1) * scale_log2)
        p = tl.exp2(logits * scale_log2 - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        v = tl.load(v_ptr + cols[:, None] * k_stride + dims[None, :])
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None])
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def flash_attention(
    q_ptr, k_ptr, v_ptr, out_ptr, seq, q_stride, k_stride, scale_log2,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a head, longest rows first, heads of a KV group side by side. Layout [seq,
    heads, HEAD_DIM]; seq is a multiple of the tile, so only tiles on the diagonal have a mask."""
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    offsets = head * HEAD_DIM + rows[:, None] * q_stride + dims[None, :]
    k_ptr += head // GROUP * HEAD_DIM
    v_ptr += head // GROUP * HEAD_DIM
    q = tl.load(q_ptr + offsets)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    diagonal = tile * BLOCK_M if CAUSAL else seq
    acc, row_max, row_sum = _attend(
        q, acc, row_max, row_sum, rows, k_ptr, v_ptr, 0, diagonal, scale_log2, k_stride,
        False, HEAD_DIM, BLOCK_N,
    )  # fmt: skip
    if CAUSAL:
        acc, row_max, row_sum = _attend(
            q, acc, row_max, row_sum, rows, k_ptr, v_ptr, diagonal, diagonal + BLOCK_M, scale_log2,
            k_stride, True, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
    tl.store(out_ptr + offsets, (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty))


@triton.jit
def _attend_tma(
    q, acc, row_max, row_sum, rows, k_desc, v_desc, column, first, last, scale_log2,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """_attend with K and V through tensor maps, a head at `column`."""
    for start in range(first, last, BLOCK_N):
        k = k_desc.load([start, column])
        logits = tl.dot(q, k.T)
        if MASKED:
            cols = start + tl.arange(0, BLOCK_N)
            logits = tl.where(cols[None, :] <= rows[:, None], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1) * scale_log2)
        p = tl.exp2(logits * scale_log2 - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        v = v_desc.load([start, column])
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None])
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def flash_attention_tma(
    q_desc, k_desc, v_desc, out_desc, seq, scale_log2,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """flash_attention through tensor maps of [seq, heads * HEAD_DIM]; `seq` keys."""
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = head // GROUP * HEAD_DIM
    q = q_desc.load([tile * BLOCK_M, head * HEAD_DIM])
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    diagonal = tile * BLOCK_M if CAUSAL else seq
    acc, row_max, row_sum = _attend_tma(
        q, acc, row_max, row_sum, rows, k_desc, v_desc, column, 0, diagonal, scale_log2, False,
        BLOCK_N,
    )  # fmt: skip
    if CAUSAL:
        acc, row_max, row_sum = _attend_tma(
            q, acc, row_max, row_sum, rows, k_desc, v_desc, column, diagonal, diagonal + BLOCK_M,
            scale_log2, True, BLOCK_N,
        )  # fmt: skip
    out = acc / row_sum[:, None]
    out_desc.store([tile * BLOCK_M, head * HEAD_DIM], out.to(out_desc.dtype))


@triton.jit
def rms_norm(x_ptr, w_ptr, out_ptr, stride, cols, eps, BLOCK: tl.constexpr):
    """A program for each row, in registers. Rounded before the weight, as Llama's code does."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < cols
    x = tl.load(x_ptr + row * stride + offsets, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / cols + eps)
    tl.store(out_ptr + row * stride + offsets, (x * scale).to(w.dtype) * w, mask=inside)


@triton.jit
def silu_and_mul(gate_ptr, up_ptr, out_ptr, stride, cols, BLOCK: tl.constexpr):
    """A program for each row."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < cols
    gate = tl.load(gate_ptr + row * stride + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride + offsets, mask=inside, other=0.0)
    silu = (gate * tl.sigmoid(gate)).to(up.dtype)
    tl.store(out_ptr + row * stride + offsets, silu * up, mask=inside)


@triton.jit
def _rotate(ptr, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr):
    offsets = tl.arange(0, HEADS)[:, None] * (2 * HALF) + tl.arange(0, HALF)[None, :]
    first = tl.load(ptr + offsets).to(tl.float32)
    second = tl.load(ptr + offsets + HALF).to(tl.float32)
    tl.store(ptr + offsets, (first * cos - second * sin).to(ptr.dtype.element_ty))
    tl.store(ptr + offsets + HALF, (second * cos + first * sin).to(ptr.dtype.element_ty))


@triton.jit
def apply_rope(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_stride, k_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """A program for each token: all its heads of q and k, in place. cos and sin [T, HALF]."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, HALF)
    cos = tl.load(cos_ptr + row * HALF + dims).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * HALF + dims).to(tl.float32)[None, :]
    _rotate(q_ptr + row * q_stride, cos, sin, HEADS, HALF)
    _rotate(k_ptr + row * k_stride, cos, sin, KV_HEADS, HALF)
