"""What the tests of the quantised products share: matrices of random blocks, exact results.

The reference is fp64 over weights that `QuantizedTensor.dequantize` decodes, a decoder that shares
nothing with the kernels. Errors are relative to the sum of |x| times the size of what the kernel
adds up, which is not |w|: q as it is packed is not signed, minima are added apart, and both cancel.
Outputs in fp32 are compared with what the header defines, which for Q6_K rounds scale * q to f16;
others with the exact weights.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from minitron_kernels.block_types import GGML_NUMBERS, QUANT_TYPES
from minitron_kernels.quant_packing import pack
from minitron_kernels.quantized import QuantizedTensor
from tests import emulator
from tests import native_abi as abi
from tests.gguf_files import random_rows
from tests.linear_cases import linear_params, magnitude, normalised
from tests.native_emulator import run, storage_of
from tests.test_kernels_memory import assert_close, assert_padding_untouched, poisoned

Tensor = torch.Tensor
KINDS = tuple(QUANT_TYPES)
K_KINDS = tuple(kind for kind in KINDS if QUANT_TYPES[kind].elements == 256)

# Of a block: the bytes of its quants.
_QUANT_BYTES = {
    "Q4_0": (2, 18), "Q4_1": (4, 20), "Q5_0": (2, 22), "Q5_1": (4, 24), "Q8_0": (2, 34),
    "Q2_K": (16, 80), "Q3_K": (0, 96), "Q4_K": (16, 144), "Q5_K": (16, 176), "Q6_K": (0, 192),
}  # fmt: skip

# Where what is decoded differs from what is stored: relative to the terms, decoding in fp32 rounds
# three times, the kernel's sums of 16 products truncate twice, and each of 45 groups of 256 once.
F32_ERROR = 2.0**-20
# The same where a scale has 16 k: MMAs add all of a group's 256 k, and truncate 32 times.
F32_ERROR_16 = 2.0**-18


@dataclass
class Weights:
    """A matrix [n, k]: its blocks, its tiles, fp64, the same as it is multiplied (of Q6_K not quite
    the same), and the size of its terms."""

    blocks: QuantizedTensor
    tiles: Tensor
    dense: Tensor
    multiplied: Tensor
    terms: Tensor

    @property
    def kind(self) -> str:
        return self.blocks.quant_type

    def native(self) -> ctypes.Structure:
        return abi.structs()["mk_quant_matrix"](
            tiles=self.tiles.data_ptr(), type=GGML_NUMBERS[self.kind], rows=self.blocks.shape[0]
        )


def weights_of(blocks: QuantizedTensor) -> Weights:
    """The forms of these blocks."""
    block = QUANT_TYPES[blocks.quant_type]
    first, last = _QUANT_BYTES[blocks.quant_type]
    lowest, highest = (blocks.blocks.clone().view(-1, block.nbytes) for _ in range(2))
    lowest[:, first:last], highest[:, first:last] = 0, 255
    if blocks.quant_type == "Q8_0":
        lowest[:, first:last], highest[:, first:last] = 0x80, 0x7F
    terms = sum(
        QuantizedTensor(b.view_as(blocks.blocks), blocks.quant_type, blocks.shape)
        .dequantize().double().abs()
        for b in (lowest, highest)
    )  # fmt: skip
    assert isinstance(terms, Tensor)
    dense = blocks.dequantize().double()
    multiplied = folded_q6_k(blocks) if blocks.quant_type == "Q6_K" else dense
    return Weights(blocks, pack(blocks).tiles, dense, multiplied, terms)


def folded_q6_k(blocks: QuantizedTensor) -> Tensor:
    """d * (f16(scale * q) - 32 * scale), fp64, q from 0 to 63."""
    raw = blocks.blocks.view(-1, 210)
    of_one = raw.clone()
    of_one[:, 208:] = torch.tensor([0x00, 0x3C], dtype=torch.uint8)  # d = 1
    integers = QuantizedTensor(of_one.view_as(blocks.blocks), "Q6_K", blocks.shape).dequantize()
    scales = raw[:, 192:208].contiguous().view(torch.int8).double().unsqueeze(2)
    d = raw[:, 208:].contiguous().view(torch.float16).double().unsqueeze(2)
    products = integers.double().view(-1, 16, 16) + 32 * scales
    return ((products.half().double() - 32 * scales) * d).view(blocks.shape)


def random_weights(kind: str, n: int, k: int, seed: int = 0) -> Weights:
    """Random blocks: any bits, finite scales, one of 16 of which is extreme: 0, -0, denormal, of
    the largest exponent that keeps the sums finite."""
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(random_rows(kind, n, k, rng))
    block = QUANT_TYPES[kind]
    special = torch.tensor([0.0, -0.0, 6e-8, -3e-5, 900.0], dtype=torch.float16)
    for offset in block.scale_offsets:
        scales = rows.view(-1, block.nbytes)[:, offset : offset + 2]
        chosen = torch.from_numpy(rng.random(len(scales)) < 1 / 16)
        which = torch.from_numpy(rng.integers(0, len(special), int(chosen.sum())))
        scales[chosen] = special[which].view(torch.uint8).view(-1, 2)
    return weights_of(QuantizedTensor(rows, kind, (n, k)))


def run_linear(
    op: str,
    arch: str,
    x: Tensor,
    w: Weights,
    out: Tensor,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    seed: int = 0,
    lib: ctypes.CDLL | None = None,
) -> emulator.Counters | None:
    """mk_linear_quant or mk_linear_quant_swiglu of these tensors into `out`."""
    params, tensors = quant_params(x, w, out, norm_weight, residual)
    return run(op, arch, params, tensors, seed, lib)


def quant_params(
    x: Tensor,
    w: Weights,
    out: Tensor,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[ctypes.Structure, list[Tensor]]:
    """The op's struct, and all memory that it names."""
    linear = linear_params(x, x, out, norm_weight, residual)
    linear.w, linear.w_stride, linear.n = None, 0, w.blocks.shape[0]
    params = abi.structs()["mk_linear_quant_params"](linear=linear, w=w.native())
    tensors = [x, w.tiles, out]
    tensors += [t for t in (norm_weight, residual) if t is not None and t is not out]
    if x.shape[0] > abi.constants()["MK_QUANT_MAX_DECODE_M"]:
        bytes_ = ctypes.c_int64()
        lib = abi.library()
        abi.check(lib.mk_linear_quant_workspace_bytes(ctypes.byref(params), ctypes.byref(bytes_)))
        workspace = torch.full((bytes_.value,), 0xFF, dtype=torch.uint8)  # NaN of any type
        params.workspace, params.workspace_bytes = workspace.data_ptr(), bytes_.value
        tensors.append(workspace)
    return params, [storage_of(t) for t in tensors]


def out_of(op: str, x: Tensor, w: Weights, dtype: torch.dtype | None = None) -> Tensor:
    rows = w.blocks.shape[0]
    columns = rows // 2 if op == "linear_quant_swiglu" else rows
    return poisoned(torch.empty(x.shape[0], columns, dtype=dtype or x.dtype))


def check_linear(
    op: str,
    arch: str,
    x: Tensor,
    w: Weights,
    out: Tensor,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    seed: int = 0,
) -> emulator.Counters | None:
    """Runs the op and compares all of `out` with the exact result: fp32 by F32_ERROR(_16), others
    by the tolerance rule against PyTorch on the dequantised weights."""
    kept = None if residual is None else residual.clone()
    counters = run_linear(op, arch, x, w, out, norm_weight, residual, seed)
    if norm_weight is not None:
        x = normalised(arch, x, norm_weight)
    compare(op, x, w, out, kept)
    return counters


def compare(op: str, x: Tensor, w: Weights, out: Tensor, residual: Tensor | None = None) -> None:
    """`out` against the exact result of the normalised x."""
    if out.numel() == 0:
        return
    exact = x.double() @ (w.multiplied if out.dtype == torch.float32 else w.dense).T
    if out.dtype == torch.float32:
        error = (out.double() - exact).abs()
        relative = F32_ERROR_16 if w.blocks.quant_type in ("Q2_K", "Q3_K", "Q6_K") else F32_ERROR
        allowed = relative * (x.double().abs() @ w.terms.T) + 1e-30
        assert not out.isnan().any(), f"{int(out.isnan().sum())} elements are NaN"
        worst = int((error / allowed).argmax())
        assert (error <= allowed).all(), (
            f"element {worst} is {out.flatten()[worst]}, exact {exact.flatten()[worst]}; "
            f"{(error / allowed).flatten()[worst]:.2f} times the error allowed"
        )
    else:
        dense = w.dense.to(x.dtype)
        rounded = x @ dense.T
        scale = magnitude(x, w.dense) + 256 * F32_ERROR * magnitude(x, w.terms)
        if op == "linear_quant_swiglu":
            (gate, up), (g, u) = ((y[:, ::2], y[:, 1::2]) for y in (exact, scale))
            silu = torch.nn.functional.silu(gate)
            exact, scale = silu * up, g * up.abs() + u * silu.abs()
            rounded = torch.nn.functional.silu(rounded[:, ::2]) * rounded[:, 1::2]
        if residual is not None:
            exact, rounded = exact + residual.double(), rounded + residual
            scale = scale + residual.double().abs()
        assert_close(out, exact, rounded, "out", scale + exact.abs())
    assert_padding_untouched(out, "out")


def one_of(items: Sequence[Any], i: int) -> Any:
    return items[i % len(items)]
