"""Kernels that Triton compiles, as third-party code to validate the emulator on.

Triton writes PTX for any NVIDIA target without a GPU, and nobody of this project writes that PTX:
layouts, swizzles, pipelines and reductions are Triton's own. A `Case` couples such a kernel with
inputs, a float64 reference and the same operation done by PyTorch; `compile_case` gives the PTX and
everything a launch needs.

Only `.asm["ptx"]` is used, so Triton needs neither a driver nor a C compiler. Triton's own cache
(`TRITON_CACHE_DIR`) keeps the results and is safe for parallel test processes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ALL_CAPABILITIES = (80, 89, 90, 100)
# On 90 and 100 Triton's tl.dot becomes wgmma and tcgen05, which the emulator does not have yet.
MMA_SYNC_CAPABILITIES = (80, 89)

_TRITON_DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}

# --------------------------------------------------------------------------------------------------
# Device code


@triton.jit
def vector_add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


@triton.jit
def row_softmax(x_ptr, out_ptr, stride, cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < cols
    x = tl.load(x_ptr + row * stride + offs, mask=mask, other=float("-inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, axis=0))
    y = e / tl.sum(e, axis=0)
    tl.store(out_ptr + row * stride + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm(x_ptr, weight_ptr, bias_ptr, out_ptr, stride, cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + row * stride + offs, mask=offs < cols, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / cols
    squares = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + offs, mask=offs < cols, other=0.0).to(tl.float32)
        centred = tl.where(offs < cols, x - mean, 0.0)
        squares += centred * centred
    inv_std = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / cols + eps)
    for start in range(0, cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < cols
        x = tl.load(x_ptr + row * stride + offs, mask=mask).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=mask).to(tl.float32)
        b = tl.load(bias_ptr + offs, mask=mask).to(tl.float32)
        y = (x - mean) * inv_std * w + b
        tl.store(out_ptr + row * stride + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def matmul(
    a_ptr, b_ptr, out_ptr, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        a_mask = (rows[:, None] < m) & (ks[None, :] < k)
        b_mask = (ks[:, None] < k) & (cols[None, :] < n)
        a = tl.load(a_ptr + rows[:, None] * k + ks[None, :], mask=a_mask, other=0.0)
        b = tl.load(b_ptr + ks[:, None] * n + cols[None, :], mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
    out_mask = (rows[:, None] < m) & (cols[None, :] < n)
    out_offs = rows[:, None] * n + cols[None, :]
    tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def int4_matmul(
    a_ptr, packed_ptr, scale_ptr, out_ptr, m, n, k,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """a[m, k] @ w[n, k]^T, w = scale * (nibble - 8); byte j: k = 2j (low nibble) and 2j + 1."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        a_mask = (rows[:, None] < m) & (ks[None, :] < k)
        a = tl.load(a_ptr + rows[:, None] * k + ks[None, :], mask=a_mask, other=0.0)
        bytes_at = start // 2 + tl.arange(0, BLOCK_K // 2)
        packed = tl.load(
            packed_ptr + cols[:, None] * (k // 2) + bytes_at[None, :],
            mask=(cols[:, None] < n) & (bytes_at[None, :] < k // 2),
            other=0x88,
        )
        low = (packed & 0xF).to(tl.int8) - 8
        high = (packed >> 4).to(tl.int8) - 8
        quants = tl.interleave(low, high)
        scale = tl.load(
            scale_ptr + cols[:, None] * (k // GROUP) + (ks // GROUP)[None, :],
            mask=(cols[:, None] < n) & (ks[None, :] < k),
            other=0.0,
        )
        w = quants.to(a.dtype) * scale
        acc = tl.dot(a, tl.trans(w), acc)
    out_mask = (rows[:, None] < m) & (cols[None, :] < n)
    out_offs = rows[:, None] * n + cols[None, :]
    tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit
def flash_attention(
    q_ptr, k_ptr, v_ptr, out_ptr, seq, scale_log2,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M query rows of a head. Layout [head, seq, HEAD_DIM], softmax base 2."""
    base = tl.program_id(1) * seq * HEAD_DIM
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    row_mask = rows[:, None] < seq
    q = tl.load(q_ptr + base + rows[:, None] * HEAD_DIM + dims[None, :], mask=row_mask, other=0.0)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    end = tl.minimum(seq, (tl.program_id(0) + 1) * BLOCK_M) if CAUSAL else seq
    for start in range(0, end, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        offs = cols[:, None] * HEAD_DIM + dims[None, :]
        k = tl.load(k_ptr + base + offs, mask=cols[:, None] < seq, other=0.0)
        v = tl.load(v_ptr + base + offs, mask=cols[:, None] < seq, other=0.0)
        logits = tl.dot(q, tl.trans(k)) * scale_log2
        visible = cols[None, :] < seq
        if CAUSAL:
            visible = visible & (cols[None, :] <= rows[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        p = tl.exp2(logits - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None])
        row_max = new_max
    out = acc / row_sum[:, None]
    out_offs = rows[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + base + out_offs, out.to(out_ptr.dtype.element_ty), mask=row_mask)


@triton.jit
def _compose(decay_left, value_left, decay_right, value_right):
    return decay_left * decay_right, value_left * decay_right + value_right


@triton.jit
def linear_recurrence(decay_ptr, x_ptr, out_ptr, cols, BLOCK: tl.constexpr):
    """h[t] = decay[t] * h[t-1] + x[t] along each row, as an associative scan."""
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < cols
    decay = tl.load(decay_ptr + row * cols + offs, mask=mask, other=1.0)
    x = tl.load(x_ptr + row * cols + offs, mask=mask, other=0.0)
    _, h = tl.associative_scan((decay, x), 0, _compose)
    tl.store(out_ptr + row * cols + offs, h, mask=mask)


@triton.jit
def histogram(x_ptr, out_ptr, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """A histogram per program in shared memory, added to the global one with atomics."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0)
    counts = tl.histogram(x, BINS, mask=mask)
    tl.atomic_add(out_ptr + tl.arange(0, BINS), counts)


@triton.jit
def row_sort(x_ptr, sorted_ptr, BLOCK: tl.constexpr):
    """Bitonic sort: exchanges within lanes, warps and the whole CTA."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sorted_ptr + offs, tl.sort(tl.load(x_ptr + offs)))


@triton.jit
def philox(out_ptr, seed, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, tl.program_id(0) * BLOCK + offs)
    base = out_ptr + tl.program_id(0) * 4 * BLOCK + offs
    tl.store(base, a)
    tl.store(base + BLOCK, b)
    tl.store(base + 2 * BLOCK, c)
    tl.store(base + 3 * BLOCK, d)


@triton.jit
def elementary_functions(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """out[f, i] = f(x[i]) for positive x."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=1.0).to(tl.float32)
    y = out_ptr + offs
    tl.store(y, tl.exp(-x), mask=mask)
    tl.store(y + n, tl.log(x), mask=mask)
    tl.store(y + 2 * n, tl.sin(x), mask=mask)
    tl.store(y + 3 * n, tl.cos(x), mask=mask)
    tl.store(y + 4 * n, tl.sqrt(x), mask=mask)
    tl.store(y + 5 * n, tl.rsqrt(x), mask=mask)
    tl.store(y + 6 * n, tl.erf(x), mask=mask)
    tl.store(y + 7 * n, tl.sigmoid(x), mask=mask)


@triton.jit
def cast(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def integer_division(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    """64-bit quotient, then remainder, of signed numbers; no machine instruction divides them."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + offs), tl.load(y_ptr + offs)
    base = out_ptr + tl.program_id(0) * BLOCK + offs
    tl.store(base, x // y)
    tl.store(base + BLOCK, x % y)


@triton.jit
def atomics(index_ptr, x_ptr, out_ptr, bins, BLOCK: tl.constexpr):
    """Many lanes on few addresses: out[op, bin] over add, max, min, and, or, xor."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = out_ptr + tl.load(index_ptr + offs)
    x = tl.load(x_ptr + offs)
    tl.atomic_add(y, x)
    tl.atomic_max(y + bins, x)
    tl.atomic_min(y + 2 * bins, x)
    tl.atomic_and(y + 3 * bins, x)
    tl.atomic_or(y + 4 * bins, x)
    tl.atomic_xor(y + 5 * bins, x)


@triton.jit
def locked_sum(x_ptr, lock_ptr, sum_ptr, BLOCK: tl.constexpr):
    """Programs add to one row in turn, each while it holds a spin lock."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + offs)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(sum_ptr + offs, tl.load(sum_ptr + offs) + x)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def row_argmax(x_ptr, out_ptr, stride, cols, BLOCK: tl.constexpr):
    """Index of the first largest element."""
    offs = tl.arange(0, BLOCK)
    mask = offs < cols
    x = tl.load(x_ptr + tl.program_id(0) * stride + offs, mask=mask, other=float("-inf"))
    tl.store(out_ptr + tl.program_id(0), tl.argmax(x, axis=0, tie_break_left=True))


# --------------------------------------------------------------------------------------------------
# Problems: inputs, grid, reference


@dataclass
class Problem:
    """Inputs of one launch and what must come out of it.

    args: tensors, integers and floats in the kernel's order, constexprs left out.
    out: the tensor the kernel writes, poisoned beforehand.
    expected: float64 reference, of the shape of `out`.
    baseline: the same operation by PyTorch in the input dtype; None where `out` must be exact.
    """

    args: list[Any]
    grid: tuple[int, int, int]
    out: torch.Tensor
    expected: torch.Tensor
    baseline: torch.Tensor | None = None
    initial: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.initial = self.out.clone()

    def reset(self) -> None:
        """Puts the poison (or the starting counts) back into `out`."""
        self.out.copy_(self.initial)

    def error(self) -> tuple[float, float]:
        """Largest error of `out`, then of the baseline, in units of what is allowed.

        Allowed for an element: twice the baseline's largest error plus one unit in the last
        place of the output dtype at the expected value. NaN or infinity in `out` gives infinity.
        """
        out = self.out.double()
        if self.baseline is None:
            return (0.0 if torch.equal(out, self.expected) else float("inf")), 0.0
        if not torch.isfinite(out).all():
            return float("inf"), 0.0
        own = (self.baseline.double() - self.expected).abs()
        eps = torch.finfo(self.out.dtype).eps
        tiny = torch.finfo(self.out.dtype).tiny
        allowed = 2 * own.max() + eps * self.expected.abs().clamp(min=tiny)
        return ((out - self.expected).abs() / allowed).max().item(), (own / allowed).max().item()


def _random(gen: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values, one in fifty of them ten times as large."""
    x = torch.randn(*shape, generator=gen)
    x = torch.where(torch.rand(*shape, generator=gen) < 0.02, 10 * x, x)
    return x.to(dtype)


def _poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, torch.iinfo(dtype).min, dtype=dtype)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _vector_add(gen: torch.Generator, n: int, block: int, dtype: torch.dtype) -> Problem:
    x, y = _random(gen, n, dtype=dtype), _random(gen, n, dtype=dtype)
    out = _poisoned(n, dtype=dtype)
    args = [x, y, out, n]
    return Problem(args, (_cdiv(n, block), 1, 1), out, x.double() + y.double(), x + y)


def _row_softmax(gen: torch.Generator, rows: int, cols: int, dtype: torch.dtype) -> Problem:
    x, out = _random(gen, rows, cols, dtype=dtype), _poisoned(rows, cols, dtype=dtype)
    return Problem([x, out, cols, cols], (rows, 1, 1), out, x.double().softmax(-1), x.softmax(-1))


def _layer_norm(gen: torch.Generator, rows: int, cols: int, dtype: torch.dtype) -> Problem:
    x = _random(gen, rows, cols, dtype=dtype) + 3
    w, b = _random(gen, cols, dtype=dtype), _random(gen, cols, dtype=dtype)
    out, eps = _poisoned(rows, cols, dtype=dtype), 1e-5
    norm = torch.nn.functional.layer_norm
    expected = norm(x.double(), (cols,), w.double(), b.double(), eps)
    return Problem(
        [x, w, b, out, cols, cols, eps], (rows, 1, 1), out, expected, norm(x, (cols,), w, b, eps)
    )


def _matmul(
    gen: torch.Generator,
    mnk: tuple[int, int, int],
    block: tuple[int, int, int],
    kind: _MatmulType,
) -> Problem:
    m, n, k = mnk
    dtype, out_dtype = kind.dtype, kind.out_dtype
    grid = (_cdiv(m, block[0]), _cdiv(n, block[1]), 1)
    out = _poisoned(m, n, dtype=out_dtype)
    baseline = None
    if dtype == torch.int8:
        a = torch.randint(-128, 128, (m, k), generator=gen, dtype=dtype)
        b = torch.randint(-128, 128, (k, n), generator=gen, dtype=dtype)
    elif dtype == torch.float64:
        # Integers, so that the reference is exact.
        a, b = _random(gen, m, k, dtype=dtype).round(), _random(gen, k, n, dtype=dtype).round()
    else:
        a, b = _random(gen, m, k, dtype=dtype), _random(gen, k, n, dtype=dtype)
        if dtype == torch.float32 and kind.mma:
            # The tensor core reads the upper 19 bits of each tf32 operand.
            baseline = _truncate_tf32(a) @ _truncate_tf32(b)
        elif dtype.itemsize == 1:
            # PyTorch has no fp8 product on the CPU; values and products are exact in fp32.
            baseline = (a.float() @ b.float()).to(out_dtype)
        elif kind.acc == tl.float16:
            baseline = torch.zeros(m, n, dtype=out_dtype)
            for start in range(0, k, 16):  # as the instruction has it
                ks = slice(start, start + 16)
                baseline = (baseline.float() + a[:, ks].float() @ b[ks].float()).to(out_dtype)
        else:
            baseline = (a @ b).to(out_dtype)
    return Problem([a, b, out, m, n, k], grid, out, a.double() @ b.double(), baseline)


def _truncate_tf32(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def _int4_matmul(
    gen: torch.Generator, mnk: tuple[int, int, int], block: tuple[int, int, int], group: int
) -> Problem:
    m, n, k = mnk
    a = _random(gen, m, k, dtype=torch.float16)
    nibbles = torch.randint(0, 16, (n, k), generator=gen, dtype=torch.uint8)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    scale = (torch.rand(n, k // group, generator=gen) * 0.1 + 0.01).half()
    w = (nibbles.half() - 8) * scale.repeat_interleave(group, dim=1)
    out = _poisoned(m, n, dtype=torch.float16)
    grid = (_cdiv(m, block[0]), _cdiv(n, block[1]), 1)
    exact_w = (nibbles.double() - 8) * scale.double().repeat_interleave(group, dim=1)
    return Problem([a, packed, scale, out, m, n, k], grid, out, a.double() @ exact_w.T, a @ w.T)


def _flash_attention(
    gen: torch.Generator,
    heads: int,
    seq: int,
    dim: int,
    block_m: int,
    causal: bool,
    dtype: torch.dtype,
) -> Problem:
    q, k, v = (_random(gen, heads, seq, dim, dtype=dtype) for _ in range(3))
    out = _poisoned(heads, seq, dim, dtype=dtype)
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal)
    return Problem(
        [q, k, v, out, seq, dim**-0.5 * math.log2(math.e)],
        (_cdiv(seq, block_m), heads, 1),
        out,
        sdpa(q.double(), k.double(), v.double()),
        sdpa(q[None], k[None], v[None])[0],
    )


def _linear_recurrence(gen: torch.Generator, rows: int, cols: int) -> Problem:
    decay = torch.rand(rows, cols, generator=gen)
    x = _random(gen, rows, cols, dtype=torch.float32)
    out = _poisoned(rows, cols, dtype=torch.float32)

    def sequential(dtype: torch.dtype) -> torch.Tensor:
        h, states = torch.zeros(rows, dtype=dtype), []
        for t in range(cols):
            h = decay[:, t].to(dtype) * h + x[:, t].to(dtype)
            states.append(h)
        return torch.stack(states, dim=1)

    expected, baseline = sequential(torch.float64), sequential(torch.float32)
    return Problem([decay, x, out, cols], (rows, 1, 1), out, expected, baseline)


def _histogram(gen: torch.Generator, n: int, bins: int, block: int) -> Problem:
    x = torch.randint(0, bins, (n,), generator=gen, dtype=torch.int32)
    out = torch.arange(bins, dtype=torch.int32)  # the atomics add to what is there
    expected = out.double() + torch.bincount(x, minlength=bins).double()
    return Problem([x, out, n], (_cdiv(n, block), 1, 1), out, expected)


def _row_sort(gen: torch.Generator, rows: int, cols: int) -> Problem:
    x = _random(gen, rows, cols, dtype=torch.float32)
    out = _poisoned(rows, cols, dtype=torch.float32)
    return Problem([x, out], (rows, 1, 1), out, x.double().sort(dim=1).values)


def _philox(gen: torch.Generator, programs: int, block: int) -> Problem:
    """Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    seed = int(torch.randint(1 << 20, 1 << 30, (), generator=gen))
    out = _poisoned(programs, 4, block, dtype=torch.int32)
    low = (1 << 32) - 1

    def one(counter: int) -> list[int]:
        c, key = [counter, 0, 0, 0], [seed, 0]
        for _ in range(10):
            p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [q >> 32 ^ c[1] ^ key[0], q & low, p >> 32 ^ c[3] ^ key[1], p & low]
            key = [key[0] + 0x9E3779B9 & low, key[1] + 0xBB67AE85 & low]
        return c

    words = torch.tensor([one(i) for i in range(programs * block)], dtype=torch.int64)
    signed = torch.where(words >= 1 << 31, words - (1 << 32), words)
    expected = signed.view(programs, block, 4).transpose(1, 2).double()
    return Problem([out, seed], (programs, 1, 1), out, expected)


def _elementary_functions(gen: torch.Generator, n: int, block: int, dtype: torch.dtype) -> Problem:
    x = _random(gen, n, dtype=dtype).abs() + 0.01
    functions = [torch.log, torch.sin, torch.cos, torch.sqrt, torch.rsqrt, torch.erf, torch.sigmoid]

    def rows(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.exp(-x), *(f(x) for f in functions)])

    out = _poisoned(8, n, dtype=dtype)
    return Problem([x, out, n], (_cdiv(n, block), 1, 1), out, rows(x.double()), rows(x))


def _cast(
    gen: torch.Generator, from_dtype: torch.dtype, to_dtype: torch.dtype, block: int
) -> Problem:
    """Every finite value of a source of at most 16 bits; random bits and near-ties of a wider one.

    Values that the target cannot hold are left out: there Triton saturates and PyTorch does not.
    """
    if from_dtype.itemsize <= 2:
        patterns = torch.arange(1 << 8 * from_dtype.itemsize)
        x = patterns.to(torch.uint8 if from_dtype.itemsize == 1 else torch.int16).view(from_dtype)
    elif from_dtype.is_floating_point:
        ties = torch.arange(1 << 16).to(torch.int16).view(torch.float16).float()
        ties = ties + torch.nextafter(ties, torch.tensor(0.0)).half().float()
        patterns = torch.randint(-(1 << 31), 1 << 31, (1 << 14,), generator=gen)
        x = torch.cat([patterns.to(torch.int32).view(torch.float32), ties, 1.0009765 * ties])
        x = x.to(from_dtype)
    else:
        bits = torch.randint(0, 8 * from_dtype.itemsize - 1, (1 << 14,), generator=gen)
        patterns = torch.randint(-(1 << 62), 1 << 62, (1 << 14,), generator=gen)
        x = (patterns >> (63 - bits)).to(from_dtype)
    info = torch.finfo if to_dtype.is_floating_point else torch.iinfo
    wide = x.double()
    x = x[(wide >= info(to_dtype).min) & (wide <= info(to_dtype).max)].clone()
    out = torch.empty(x.shape, dtype=to_dtype).view(torch.uint8).fill_(0x7F).view(to_dtype)
    return Problem([x, out, len(x)], (_cdiv(len(x), block), 1, 1), out, x.to(to_dtype).double())


def _integer_division(gen: torch.Generator, programs: int, block: int) -> Problem:
    n = programs * block
    bits = torch.randint(1, 52, (2, n), generator=gen)  # exact in float64
    x, y = torch.randint(-(1 << 60), 1 << 60, (2, n), generator=gen) >> (60 - bits)
    y = torch.where(y == 0, 7, y)
    out = _poisoned(programs, 2, block, dtype=torch.int64)
    expected = [torch.div(x, y, rounding_mode="trunc"), torch.fmod(x, y)]
    rows = torch.stack([e.view(programs, block) for e in expected], dim=1).double()
    return Problem([x, y, out], (programs, 1, 1), out, rows)


def _atomics(gen: torch.Generator, programs: int, block: int, bins: int) -> Problem:
    n = programs * block
    index = torch.randint(0, bins, (n,), generator=gen, dtype=torch.int32)
    x = torch.randint(-(1 << 20), 1 << 20, (n,), generator=gen, dtype=torch.int32)
    start = torch.randint(-(1 << 20), 1 << 20, (6, bins), generator=gen, dtype=torch.int32)
    rules = [int.__add__, max, min, int.__and__, int.__or__, int.__xor__]
    rows = start.tolist()
    for i, value in zip(index.tolist(), x.tolist(), strict=True):
        for row, rule in zip(rows, rules, strict=True):
            row[i] = rule(row[i], value)
    out, expected = start.clone(), torch.tensor(rows).double()
    return Problem([index, x, out, bins], (programs, 1, 1), out, expected)


def _locked_sum(gen: torch.Generator, programs: int, block: int) -> Problem:
    # Small integers: the sum is exact in whatever order the programs come.
    x = torch.randint(-8, 9, (programs, block), generator=gen).float()
    lock, out = torch.zeros(1, dtype=torch.int32), torch.ones(block)
    return Problem([x, lock, out], (programs, 1, 1), out, x.double().sum(0) + 1)


def _row_argmax(gen: torch.Generator, rows: int, cols: int) -> Problem:
    x = torch.randint(-50, 51, (rows, cols), generator=gen).float()  # with ties
    out = _poisoned(rows, dtype=torch.int32)
    first = [row.index(max(row)) for row in x.tolist()]
    return Problem([x, out, cols, cols], (rows, 1, 1), out, torch.tensor(first).double())


# --------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True, eq=False)
class Case:
    """One kernel at one shape, tile and pipeline depth.

    mma: regular expression of the tensor-core instruction that the PTX must hold, or None.
    """

    id: str
    kernel: Any
    constexprs: dict[str, Any]
    build: Callable[[torch.Generator], Problem]
    capabilities: Sequence[int] = ALL_CAPABILITIES
    num_warps: int = 4
    num_stages: int = 3
    mma: str | None = None

    @property
    def table_row(self) -> str:
        """The kernel, products with their type: "matmul bf16"."""
        is_product = self.kernel in (matmul, int4_matmul, flash_attention)
        return " ".join(self.id.split("-")[:2]) if is_product else self.kernel.__name__

    def problem(self, seed: int) -> Problem:
        return self.build(torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class _MatmulType:
    dtype: torch.dtype
    out_dtype: torch.dtype
    mma: str | None  # None: fp32 without tensor cores
    acc: Any = tl.float32
    precision: str = "tf32"
    capabilities: Sequence[int] = MMA_SYNC_CAPABILITIES


_MATMUL_TYPES = {
    "bf16": _MatmulType(torch.bfloat16, torch.bfloat16, r"mma\.\S*m16n8k16\S*bf16"),
    "f16": _MatmulType(torch.float16, torch.float16, r"mma\.\S*m16n8k16\S*f32\.f16"),
    "f16_acc": _MatmulType(
        torch.float16, torch.float16, r"mma\.\S*m16n8k16\S*col\.f16\.f16", tl.float16
    ),
    "tf32": _MatmulType(torch.float32, torch.float32, r"mma\.\S*m16n8k8\S*tf32"),
    "s8": _MatmulType(torch.int8, torch.int32, r"mma\.\S*m16n8k32\S*s8", tl.int32),
    "e4m3": _MatmulType(
        torch.float8_e4m3fn, torch.float32, r"mma\.\S*m16n8k32\S*e4m3", capabilities=(89,)
    ),
    "e5m2": _MatmulType(
        torch.float8_e5m2, torch.float32, r"mma\.\S*m16n8k32\S*e5m2", capabilities=(89,)
    ),
    "f64": _MatmulType(
        torch.float64, torch.float64, r"mma\.\S*f64", tl.float64, capabilities=(80,)
    ),
    "f32": _MatmulType(
        torch.float32, torch.float32, None, precision="ieee", capabilities=ALL_CAPABILITIES
    ),
}


def _matmul_case(
    name: str,
    block: tuple[int, int, int],
    mnk: tuple[int, int, int],
    num_warps: int,
    num_stages: int,
) -> Case:
    kind = _MATMUL_TYPES[name]
    tile = "x".join(map(str, block))
    constexprs = {"ACC": kind.acc, "PRECISION": kind.precision}
    return Case(
        f"matmul-{name}-{tile}-w{num_warps}-s{num_stages}",
        matmul,
        dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), block, strict=True)) | constexprs,
        partial(_matmul, mnk=mnk, block=block, kind=kind),
        kind.capabilities,
        num_warps,
        num_stages,
        kind.mma,
    )


def _flash_case(
    dtype: torch.dtype,
    causal: bool,
    dim: int,
    block: tuple[int, int],
    seq: int,
    num_warps: int,
    num_stages: int,
) -> Case:
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    mask = "causal" if causal else "full"
    return Case(
        f"flash_attention-{name}-{mask}-d{dim}-{block[0]}x{block[1]}-w{num_warps}-s{num_stages}",
        flash_attention,
        {"CAUSAL": causal, "HEAD_DIM": dim, "BLOCK_M": block[0], "BLOCK_N": block[1]},
        partial(
            _flash_attention,
            heads=2,
            seq=seq,
            dim=dim,
            block_m=block[0],
            causal=causal,
            dtype=dtype,
        ),
        MMA_SYNC_CAPABILITIES,
        num_warps,
        num_stages,
        r"mma\.\S*m16n8k16",
    )


_CASTS = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float8_e4m3fn),
    (torch.float32, torch.float8_e5m2),
    (torch.float32, torch.float64),
    (torch.float32, torch.int32),
    (torch.float32, torch.int64),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float16, torch.float8_e4m3fn),
    (torch.float16, torch.float8_e5m2),
    (torch.float16, torch.int32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.bfloat16, torch.int8),
    (torch.float8_e4m3fn, torch.float16),
    (torch.float8_e4m3fn, torch.bfloat16),
    (torch.float8_e5m2, torch.float16),
    (torch.float8_e5m2, torch.float32),
    (torch.float64, torch.float32),
    (torch.float64, torch.float16),
    (torch.int8, torch.float16),
    (torch.uint8, torch.bfloat16),
    (torch.int32, torch.float32),
    (torch.int32, torch.float16),
    (torch.int64, torch.float32),
    (torch.int64, torch.float64),
]


def _cast_case(from_dtype: torch.dtype, to_dtype: torch.dtype) -> Case:
    has_e4m3 = torch.float8_e4m3fn in (from_dtype, to_dtype)
    return Case(
        f"cast-{_TRITON_DTYPES[from_dtype]}-{_TRITON_DTYPES[to_dtype]}",
        cast,
        {"BLOCK": 2048},
        partial(_cast, from_dtype=from_dtype, to_dtype=to_dtype, block=2048),
        (89, 90, 100) if has_e4m3 else ALL_CAPABILITIES,
    )


def _cases() -> list[Case]:
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    cases = [
        Case(
            f"vector_add-{name}-{n}",
            vector_add,
            {"BLOCK": 1024},
            partial(_vector_add, n=n, block=1024, dtype=dtype),
        )
        for name, dtype, n in [("f32", f32, 3000), ("bf16", bf16, 4097), ("f16", f16, 2064)]
    ]
    cases += [
        Case(
            f"row_softmax-{name}-{cols}-w{warps}",
            row_softmax,
            {"BLOCK": triton.next_power_of_2(cols)},
            partial(_row_softmax, rows=5, cols=cols, dtype=dtype),
            num_warps=warps,
        )
        for name, dtype, cols, warps in [
            ("f32", f32, 781, 4),
            ("bf16", bf16, 2000, 8),
            ("f32", f32, 33, 1),
        ]
    ]
    cases += [
        Case(
            f"layer_norm-{name}-{cols}-w{warps}",
            layer_norm,
            {"BLOCK": 512},
            partial(_layer_norm, rows=3, cols=cols, dtype=dtype),
            num_warps=warps,
        )
        for name, dtype, cols, warps in [("f32", f32, 1151, 4), ("f16", f16, 2048, 8)]
    ]
    cases += [
        Case(
            f"linear_recurrence-{cols}-w{warps}",
            linear_recurrence,
            {"BLOCK": triton.next_power_of_2(cols)},
            partial(_linear_recurrence, rows=3, cols=cols),
            num_warps=warps,
        )
        for cols, warps in [(1000, 4), (60, 1)]
    ]
    cases += [
        Case(
            f"histogram-{bins}-w{warps}",
            histogram,
            {"BINS": bins, "BLOCK": 1024},
            partial(_histogram, n=5000, bins=bins, block=1024),
            num_warps=warps,
        )
        for bins, warps in [(128, 4), (256, 8)]
    ]
    cases += [
        Case(
            f"row_sort-{cols}-w{warps}",
            row_sort,
            {"BLOCK": cols},
            partial(_row_sort, rows=2, cols=cols),
            num_warps=warps,
        )
        for cols, warps in [(256, 4), (64, 1)]
    ]
    cases += [
        Case("philox", philox, {"BLOCK": 256}, partial(_philox, programs=2, block=256)),
        Case(
            "integer_division",
            integer_division,
            {"BLOCK": 256},
            partial(_integer_division, programs=2, block=256),
        ),
        Case("atomics", atomics, {"BLOCK": 512}, partial(_atomics, programs=3, block=512, bins=16)),
        Case("locked_sum", locked_sum, {"BLOCK": 256}, partial(_locked_sum, programs=6, block=256)),
        Case(
            "row_argmax",
            row_argmax,
            {"BLOCK": 1024},
            partial(_row_argmax, rows=4, cols=1000),
        ),
    ]
    cases += [
        Case(
            f"elementary_functions-{name}",
            elementary_functions,
            {"BLOCK": 512},
            partial(_elementary_functions, n=1000, block=512, dtype=dtype),
        )
        for name, dtype in [("bf16", bf16), ("f16", f16)]
    ]
    cases += [_cast_case(*pair) for pair in _CASTS]
    small, ragged = (128, 128, 256), (100, 80, 208)
    cases += [
        _matmul_case("bf16", (64, 64, 32), small, 4, 3),
        _matmul_case("bf16", (128, 64, 32), ragged, 8, 4),
        _matmul_case("bf16", (16, 128, 64), ragged, 4, 4),
        _matmul_case("f16", (64, 128, 32), small, 4, 4),
        _matmul_case("f16", (32, 32, 64), ragged, 2, 3),
        _matmul_case("tf32", (64, 64, 32), small, 4, 3),
        _matmul_case("tf32", (32, 64, 16), ragged, 4, 4),
        _matmul_case("s8", (64, 64, 64), small, 4, 3),
        _matmul_case("s8", (32, 128, 32), ragged, 4, 4),
        _matmul_case("e4m3", (64, 64, 64), small, 4, 3),
        _matmul_case("e4m3", (32, 64, 32), ragged, 4, 4),
        _matmul_case("e5m2", (64, 64, 64), small, 4, 3),
        _matmul_case("f16_acc", (64, 64, 32), small, 4, 3),
        _matmul_case("f64", (32, 32, 16), (48, 40, 64), 4, 3),
        _matmul_case("f32", (32, 32, 16), (48, 40, 64), 4, 3),
    ]
    large = (256, 256, 512)
    cases += [
        _matmul_case("bf16", (128, 128, 32), large, 4, 3),
        _matmul_case("bf16", (128, 256, 64), large, 8, 3),
        _matmul_case("f16", (256, 64, 32), large, 4, 4),
        _matmul_case("tf32", (128, 128, 32), large, 8, 3),
        _matmul_case("s8", (128, 128, 64), large, 8, 4),
        _matmul_case("e4m3", (128, 128, 64), large, 8, 4),
        _matmul_case("e5m2", (128, 64, 64), large, 4, 4),
    ]
    cases += [
        _flash_case(bf16, False, dim=64, block=(64, 32), seq=160, num_warps=4, num_stages=3),
        _flash_case(bf16, True, dim=64, block=(64, 64), seq=160, num_warps=4, num_stages=2),
        _flash_case(f16, True, dim=128, block=(64, 32), seq=100, num_warps=4, num_stages=2),
        _flash_case(f16, False, 128, (128, 64), seq=512, num_warps=8, num_stages=3),
        _flash_case(bf16, True, 128, (128, 64), seq=500, num_warps=8, num_stages=2),
    ]
    cases += [
        Case(
            f"int4_matmul-f16-{'x'.join(map(str, block))}-s{stages}",
            int4_matmul,
            {"GROUP": 32, "BLOCK_M": block[0], "BLOCK_N": block[1], "BLOCK_K": block[2]},
            partial(_int4_matmul, mnk=mnk, block=block, group=32),
            MMA_SYNC_CAPABILITIES,
            num_stages=stages,
            mma=r"mma\.\S*m16n8k16\S*f16",
        )
        for block, mnk, stages in [
            ((32, 64, 64), (48, 96, 192), 3),
            ((16, 32, 128), (5, 70, 256), 4),
        ]
    ]
    return cases


CASES = _cases()


# --------------------------------------------------------------------------------------------------
# Compilation


@dataclass(frozen=True)
class CompiledCase:
    """PTX of a case and how to launch it.

    hidden_params: pointers that Triton appends to the kernel's own parameters (global scratch,
    profiler scratch); null, as no kernel here asks for scratch memory.
    """

    ptx: str
    name: str
    block: tuple[int, int, int]
    smem: int
    hidden_params: int

    def args(self, problem: Problem) -> list[Any]:
        """Arguments of a launch."""
        return problem.args + [None] * self.hidden_params


@cache
def compile_case(case: Case, capability: int) -> CompiledCase:
    """Compiles a case for a compute capability, specialised as Triton's launcher would do it.

    That is, pointers and sizes that are multiples of 16 are declared as such: only then does Triton
    emit vector loads and cp.async. Raises NotImplementedError if the kernel wants scratch memory.
    """
    args = case.problem(seed=0).args
    runtime_names = [name for name in case.kernel.arg_names if name not in case.constexprs]
    signature = dict.fromkeys(case.kernel.arg_names, "constexpr")
    attrs = {}
    for name, arg in zip(runtime_names, args, strict=True):
        is_tensor = isinstance(arg, torch.Tensor)
        if is_tensor:
            signature[name] = "*" + _TRITON_DTYPES[arg.dtype]
        else:
            signature[name] = "i32" if isinstance(arg, int) else "fp32"
        address = arg.data_ptr() if is_tensor else arg
        if address % 16 == 0:
            attrs[(case.kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    source = ASTSource(case.kernel, signature, case.constexprs, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    meta, ptx = compiled.metadata, compiled.asm["ptx"]
    if meta.global_scratch_size or meta.profile_scratch_size:
        raise NotImplementedError(f"{case.id}: Triton asks for scratch memory, accepted is none")
    params = re.findall(r"^\s*\.param ", ptx.partition(".entry")[2].partition(")")[0], re.M)
    return CompiledCase(
        ptx, meta.name, (32 * meta.num_warps, 1, 1), meta.shared, len(params) - len(args)
    )
