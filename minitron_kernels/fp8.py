"""Products of 8-bit floats (e4m3) with scales: of a whole tensor, or of each 128 elements.

On CUDA tensors these are kernels of sm_90a (`csrc/linear/linear_fp8_sm90.cuh`); other GPUs get
NotImplementedError. CPU tensors are expanded and multiplied in fp32. Each function is also
torch.ops.minitron_kernels.<name>, with a fake kernel; `reference.py` has their definitions.

Scales in blocks are laid out as DeepSeek-V3's: of activations [T, K] one for each row and 128
columns, [T, ceil(K/128)]; of weights [N, K] one for each 128 rows and 128 columns, [ceil(N/128),
ceil(K/128)] (`weight_scale_inv` there). What a byte stands for is its value times its scale.
"""

from __future__ import annotations

import math

import torch

from minitron_kernels import cuda_ops, torch_ops
from minitron_kernels.checks import (
    check_device,
    check_dtype,
    check_float,
    check_shape,
    shape_of,
)
from minitron_kernels.cuda_ops import call, pointer, rows_of
from minitron_kernels.library import op

Tensor = torch.Tensor

__all__ = ["linear_fp8", "linear_fp8_swiglu", "quantize_fp8", "quantize_fp8_weight"]

E4M3 = torch.float8_e4m3fn
BLOCK = 128  # elements along K that have a scale, and rows of a weight
LARGEST = torch.finfo(E4M3).max  # 448
LEAST_AMAX = 2.0**-96  # so that 1 / scale is finite: a row of zeros has this one's scale
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)


def scale_of(amax: Tensor) -> Tensor:
    """The scale of elements of which the largest is amax."""
    return amax.float().clamp(min=LEAST_AMAX) / LARGEST


def magnitude(x: Tensor) -> Tensor:
    """|x| without NaN, which stays what it is under any scale."""
    return x.float().abs().nan_to_num(nan=0.0, posinf=float("inf"))


def to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale to the nearest e4m3; past 448 that. ``scale`` is broadcast."""
    return (x.float() * (1 / scale)).clamp(-LARGEST, LARGEST).to(E4M3)


# --------------------------------------------------------------------------------------- quantise


def quantize_fp8(
    x: Tensor, block: int | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., K] as e4m3, and its scales in fp32: of the whole (block None) or in blocks of 128.

    block None: scales [1], of the largest element, or ``scale``, one fp32 element, as given.
    block 128: scales [..., ceil(K/128)] of each row; those of a block of K lie side by side.

    A scale is max(amax, 2^-96) / 448. What a given scale makes larger than 448 becomes 448. NaN
    stays NaN and leaves the others alone; where an infinity is, the scale is infinity and all that
    have it stand for NaN.
    """
    check_float(x=x)
    if x.ndim < 1:
        raise ValueError(f"x must be [..., K], got {shape_of(x)}")
    if block == BLOCK:
        if scale is not None:
            raise ValueError("scale is for block=None: blocks of 128 get their own")
        return _quantize_fp8_blocks(x)
    if block is not None:
        raise ValueError(f"block must be None or {BLOCK}, got {block}")
    if scale is None:
        amax = magnitude(x).amax() if x.numel() else x.new_zeros(())
        scale = scale_of(amax).view(1)
    return _quantize_fp8(x, scale), scale


def _fake_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    scales = x.new_empty((_blocks(x.shape[-1]), rows), dtype=torch.float32).T
    scales = scales.unflatten(0, x.shape[:-1]) if x.ndim > 1 else scales[0]
    return x.new_empty(x.shape, dtype=E4M3), scales


@op("quantize_fp8_blocks(Tensor x) -> (Tensor, Tensor)", _fake_blocks)
def _quantize_fp8_blocks(x: Tensor) -> tuple[Tensor, Tensor]:
    out, scales = _fake_blocks(x)
    rows, size = math.prod(x.shape[:-1]), x.shape[-1]
    if rows == 0 or size == 0:
        return out, scales
    if cuda_ops.serves(x):
        _quantize(x, out, scales, BLOCK)
        return out, scales
    padded = torch.nn.functional.pad(x.reshape(rows, size).float(), (0, -size % BLOCK))
    in_blocks = padded.view(rows, _blocks(size), BLOCK)
    found = scale_of(magnitude(in_blocks).amax(-1))
    scales.copy_(found.view(scales.shape))
    out.copy_(to_e4m3(in_blocks, found[..., None]).view(rows, -1)[:, :size].reshape(x.shape))
    return out, scales


@op(
    "quantize_fp8(Tensor x, Tensor scale) -> Tensor",
    lambda x, scale: x.new_empty(x.shape, dtype=E4M3),
)
def _quantize_fp8(x: Tensor, scale: Tensor) -> Tensor:
    _check_scale("scale", scale, x.device)
    if scale.numel() != 1:
        raise ValueError(f"scale must have one element, got {shape_of(scale)}")
    if x.numel() and cuda_ops.serves(x):
        out = x.new_empty(x.shape, dtype=E4M3)
        _quantize(x, out, scale, 0)
        return out
    return to_e4m3(x, scale.reshape(())).contiguous()


def _quantize(x: Tensor, out: Tensor, scales: Tensor, block: int) -> None:
    rows = rows_of(x)
    call(
        "quantize_fp8",
        x,
        rows.data_ptr(),
        out.data_ptr(),
        scales.data_ptr(),
        rows.stride(0),
        rows.shape[1],
        1,  # between scales of rows
        rows.shape[0],  # and of blocks
        *rows.shape,
        block,
        cuda_ops.DTYPES[x.dtype],
    )


def quantize_fp8_weight(w: Tensor, block: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight [N, K] as e4m3, and its scales in fp32: [1], or [ceil(N/128), ceil(K/128)].

    In PyTorch, on w's device: weights are quantised once. Elements and scales as in
    `quantize_fp8`. Gate and up are packed first (`ops.pack_gate_up`): their rows share blocks.
    """
    check_float(w=w)
    if w.ndim != 2:
        raise ValueError(f"w must be [N, K], got {shape_of(w)}")
    if block not in (None, BLOCK):
        raise ValueError(f"block must be None or {BLOCK}, got {block}")
    if block is None or w.numel() == 0:
        amax = magnitude(w).amax() if w.numel() else w.new_zeros(())
        scale = scale_of(amax).view(1)
        return to_e4m3(w, scale), scale
    n, k = w.shape
    padded = torch.nn.functional.pad(magnitude(w), (0, -k % BLOCK, 0, -n % BLOCK))
    tiles = padded.view(_blocks(n), BLOCK, _blocks(k), BLOCK)
    scales = scale_of(tiles.amax((1, 3)))
    return to_e4m3(w, expanded(scales, n, k)), scales


def expanded(scales: Tensor, rows: int, cols: int) -> Tensor:
    """Scales of 128 x 128 blocks, one for each element of [rows, cols]."""
    wide = scales.repeat_interleave(BLOCK, 0)[:rows]
    return wide.repeat_interleave(BLOCK, 1)[:, :cols]


# --------------------------------------------------------------------------------------- products


def linear_fp8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    residual: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(x * x_scale) [..., K] @ (w * w_scale) [N, K]^T (+ residual [..., N]) -> [..., N].

    x and w: e4m3, K a multiple of 16. x_scale: one element, one of each row [..., 1], or
    [..., ceil(K/128)]; w_scale: one element or [ceil(N/128), ceil(K/128)]; fp32, any strides.
    ``out_dtype``: bfloat16 or float16, that of residual; or float32, without residual.

    The tensor cores' sums, of about 14 bits, reach over 128 k; those are added in fp32 and rounded
    once. A row has the same bits in any batch.
    """
    if out_dtype not in OUT_DTYPES or (residual is not None and out_dtype == torch.float32):
        raise ValueError(
            f"out_dtype must be bfloat16, float16 or, without residual, float32, got {out_dtype}"
        )
    return _linear_fp8(x, w, x_scale, w_scale, residual, out_dtype)


def linear_fp8_swiglu(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """silu(gate) * up [..., N/2] of the product: rows 2i and 2i+1 of w [N, K] are gate i and up i.

    The order is that of `ops.pack_gate_up`. Arguments as in `linear_fp8`; out_dtype bfloat16 or
    float16. Gate and up are not rounded in between (Shazeer 2020).
    """
    if out_dtype not in OUT_DTYPES[:2]:
        raise ValueError(f"out_dtype must be bfloat16 or float16, got {out_dtype}")
    return _linear_fp8_swiglu(x, w, x_scale, w_scale, out_dtype)


def _check_scale(name: str, scale: Tensor, device: torch.device) -> None:
    check_dtype(name, scale, torch.float32)
    check_device(name, scale, device)


def _check(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> None:
    for name, t in (("x", x), ("w", w)):
        check_dtype(name, t, E4M3)
    check_device("w", w, x.device)
    if w.ndim != 2:
        raise ValueError(f"w must be [N, K], got {shape_of(w)}")
    n, k = w.shape
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"the last dimension of x ({shape_of(x)}) must be w's K = {k}")
    if n < 1 or k < 1 or k % 16:
        raise ValueError(f"w must be [N, K] with K a multiple of 16, got {shape_of(w)}")
    _check_scale("x_scale", x_scale, x.device)
    _check_scale("w_scale", w_scale, x.device)
    rows = tuple(x.shape[:-1])
    if x_scale.numel() != 1 and x_scale.shape not in ((*rows, 1), (*rows, _blocks(k))):
        expected = "x".join(map(str, (*rows, _blocks(k))))
        raise ValueError(
            f"x_scale must have one element, one of each row (...x1) or shape {expected}, "
            f"got {shape_of(x_scale)}"
        )
    if w_scale.numel() != 1 and tuple(w_scale.shape) != (_blocks(n), _blocks(k)):
        raise ValueError(
            f"w_scale must have one element or shape {_blocks(n)}x{_blocks(k)}, "
            f"got {shape_of(w_scale)}"
        )


@op(
    "linear_fp8(Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, Tensor? residual, "
    "ScalarType out_dtype) -> Tensor",
    lambda x, w, x_scale, w_scale, residual, out_dtype: x.new_empty(
        (*x.shape[:-1], w.shape[0]), dtype=out_dtype
    ),
)
def _linear_fp8(
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    residual: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    _check(x, w, x_scale, w_scale)
    shape = (*x.shape[:-1], w.shape[0])
    if residual is not None:
        check_dtype("residual", residual, out_dtype)
        check_shape("residual", residual, shape)
        check_device("residual", residual, x.device)
    if x.is_cuda or cuda_ops.emulate:
        out = torch.empty(shape, dtype=out_dtype, device=x.device)
        _product("linear_fp8", x, w, x_scale, w_scale, out, (residual,))
        return out
    y = _expanded_product(x, w, x_scale, w_scale)
    if residual is not None:
        y += residual.reshape(y.shape)
    return y.to(out_dtype).view(shape)


@op(
    "linear_fp8_swiglu(Tensor x, Tensor w, Tensor x_scale, Tensor w_scale, ScalarType out_dtype) "
    "-> Tensor",
    lambda x, w, x_scale, w_scale, out_dtype: x.new_empty(
        (*x.shape[:-1], w.shape[0] // 2), dtype=out_dtype
    ),
)
def _linear_fp8_swiglu(
    x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    _check(x, w, x_scale, w_scale)
    if w.shape[0] % 2:
        raise ValueError(f"w must have an even number of rows (gate and up), got {shape_of(w)}")
    shape = (*x.shape[:-1], w.shape[0] // 2)
    if x.is_cuda or cuda_ops.emulate:
        out = torch.empty(shape, dtype=out_dtype, device=x.device)
        _product("linear_fp8_swiglu", x, w, x_scale, w_scale, out, ())
        return out
    y = _expanded_product(x, w, x_scale, w_scale)
    return (torch.nn.functional.silu(y[:, ::2]) * y[:, 1::2]).to(out_dtype).view(shape)


def _expanded_product(x: Tensor, w: Tensor, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """The product [rows, N] in fp32, of expanded matrices."""
    n, k = w.shape
    rows = x.reshape(-1, k).float()
    if x_scale.numel() != 1:
        x_scale = x_scale.reshape(rows.shape[0], x_scale.shape[-1])
        x_scale = x_scale if x_scale.shape[1] == 1 else x_scale.repeat_interleave(BLOCK, 1)[:, :k]
    w_scale = w_scale if w_scale.numel() == 1 else expanded(w_scale, n, k)
    return torch_ops.matmul(rows * x_scale, w.float() * w_scale)


# ----------------------------------------------------------------------------------- CUDA tensors


def _aligned(t: Tensor) -> Tensor:
    """The rows as TMA takes them: 16 bytes and multiples of it apart."""
    t = rows_of(t)
    is_aligned = t.data_ptr() % 16 == 0 and (t.shape[0] <= 1 or t.stride(0) % 16 == 0)
    return t if is_aligned else t.clone(memory_format=torch.contiguous_format)


def _scale_strides(scale: Tensor, blocks: int) -> tuple[int, int]:
    """Between rows, and between blocks of K, of a [rows, blocks], [rows, 1] or single scale."""
    if scale.numel() == 1:
        return 0, 0
    return scale.stride(0), scale.stride(1) if scale.shape[1] == blocks else 0


def _product(
    name: str,
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    out: Tensor,
    residuals: tuple[Tensor | None, ...],
) -> None:
    """mk_<name> into ``out``; ``residuals``: of mk_linear_fp8 one, which may be None."""
    n, k = w.shape
    rows, w = _aligned(x), _aligned(w)
    if x_scale.numel() != 1:
        x_scale = x_scale.reshape(rows.shape[0], x_scale.shape[-1])
    x_strides, w_strides = _scale_strides(x_scale, _blocks(k)), _scale_strides(w_scale, _blocks(k))
    added = [None if t is None else rows_of(t) for t in residuals]
    call(
        name,
        x,
        rows.data_ptr(),
        w.data_ptr(),
        x_scale.data_ptr(),
        w_scale.data_ptr(),
        *map(pointer, added),
        out.data_ptr(),
        rows.stride(0),
        w.stride(0),
        *(0 if t is None else t.stride(0) for t in added),
        out.shape[-1],
        x_strides[0],
        w_strides[0],
        x_strides[1],
        w_strides[1],
        rows.shape[0],
        n,
        k,
        cuda_ops.DTYPES[out.dtype],
    )
