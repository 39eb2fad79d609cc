"""What the kernels of triton_cases.py compute: inputs, grid, reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl

from ..fp8_sums import narrow_sum

# On 100 Triton's tl.dot becomes tcgen05, which the emulator does not have yet.
DOT_CAPABILITIES = (80, 89, 90)


@dataclass(frozen=True)
class Descriptor:
    """A tensor that a kernel reads or writes through a tensor map, a block at a time."""

    tensor: torch.Tensor  # contiguous, two dimensions
    block: tuple[int, int]


@dataclass
class Problem:
    """Inputs of one launch and what must come out of it.

    args: tensors, descriptors, integers and floats in the kernel's order, constexprs left out.
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


def random(gen: torch.Generator, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values, one in fifty of them ten times as large."""
    x = torch.randn(*shape, generator=gen)
    x = torch.where(torch.rand(*shape, generator=gen) < 0.02, 10 * x, x)
    return x.to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype)
    return torch.full(shape, torch.iinfo(dtype).min, dtype=dtype)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def vector_add(gen: torch.Generator, n: int, block: int, dtype: torch.dtype) -> Problem:
    x, y = random(gen, n, dtype=dtype), random(gen, n, dtype=dtype)
    out = poisoned(n, dtype=dtype)
    args = [x, y, out, n]
    return Problem(args, (cdiv(n, block), 1, 1), out, x.double() + y.double(), x + y)


def row_softmax(gen: torch.Generator, rows: int, cols: int, dtype: torch.dtype) -> Problem:
    x, out = random(gen, rows, cols, dtype=dtype), poisoned(rows, cols, dtype=dtype)
    return Problem([x, out, cols, cols], (rows, 1, 1), out, x.double().softmax(-1), x.softmax(-1))


def layer_norm(gen: torch.Generator, rows: int, cols: int, dtype: torch.dtype) -> Problem:
    x = random(gen, rows, cols, dtype=dtype) + 3
    w, b = random(gen, cols, dtype=dtype), random(gen, cols, dtype=dtype)
    out, eps = poisoned(rows, cols, dtype=dtype), 1e-5
    norm = torch.nn.functional.layer_norm
    expected = norm(x.double(), (cols,), w.double(), b.double(), eps)
    return Problem(
        [x, w, b, out, cols, cols, eps], (rows, 1, 1), out, expected, norm(x, (cols,), w, b, eps)
    )


@dataclass(frozen=True)
class MatmulType:
    dtype: torch.dtype
    out_dtype: torch.dtype
    mma: str | None  # None: fp32 without tensor cores
    acc: Any = tl.float32
    precision: str = "tf32"
    wgmma: str | None = None
    capabilities: Sequence[int] = DOT_CAPABILITIES


def matmul(
    gen: torch.Generator,
    mnk: tuple[int, int, int],
    block: tuple[int, int, int],
    kind: MatmulType,
) -> Problem:
    m, n, k = mnk
    dtype, out_dtype = kind.dtype, kind.out_dtype
    grid = (cdiv(m, block[0]), cdiv(n, block[1]), 1)
    out = poisoned(m, n, dtype=out_dtype)
    baseline = None
    if dtype == torch.int8:
        a = torch.randint(-128, 128, (m, k), generator=gen, dtype=dtype)
        b = torch.randint(-128, 128, (k, n), generator=gen, dtype=dtype)
    elif dtype == torch.float64:
        # Integers, so that the reference is exact.
        a, b = random(gen, m, k, dtype=dtype).round(), random(gen, k, n, dtype=dtype).round()
    else:
        a, b = random(gen, m, k, dtype=dtype), random(gen, k, n, dtype=dtype)
        if dtype == torch.float32 and kind.mma:
            # The tensor core reads the upper 19 bits of each tf32 operand.
            baseline = truncate_tf32(a) @ truncate_tf32(b)
        elif dtype.itemsize == 1:
            # As the tensor core adds them, in few bits.
            name = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}[dtype]
            total = np.zeros((m, n))
            for ks in torch.arange(k).split(32):
                parts = a[:, ks].double().numpy(), b[ks].double().numpy()
                total = narrow_sum(*parts, total, name, name, "f32")
            baseline = torch.from_numpy(total).to(out_dtype)
        elif kind.acc == tl.float16:
            baseline = torch.zeros(m, n, dtype=out_dtype)
            for start in range(0, k, 16):  # as the instruction has it
                ks = slice(start, start + 16)
                baseline = (baseline.float() + a[:, ks].float() @ b[ks].float()).to(out_dtype)
        else:
            baseline = (a @ b).to(out_dtype)
    return Problem([a, b, out, m, n, k], grid, out, a.double() @ b.double(), baseline)


def truncate_tf32(x: torch.Tensor) -> torch.Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def int4_matmul(
    gen: torch.Generator, mnk: tuple[int, int, int], block: tuple[int, int, int], group: int
) -> Problem:
    m, n, k = mnk
    a = random(gen, m, k, dtype=torch.float16)
    nibbles = torch.randint(0, 16, (n, k), generator=gen, dtype=torch.uint8)
    packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    scale = (torch.rand(n, k // group, generator=gen) * 0.1 + 0.01).half()
    w = (nibbles.half() - 8) * scale.repeat_interleave(group, dim=1)
    out = poisoned(m, n, dtype=torch.float16)
    grid = (cdiv(m, block[0]), cdiv(n, block[1]), 1)
    exact_w = (nibbles.double() - 8) * scale.double().repeat_interleave(group, dim=1)
    return Problem([a, packed, scale, out, m, n, k], grid, out, a.double() @ exact_w.T, a @ w.T)


def flash_attention(
    gen: torch.Generator,
    heads: int,
    seq: int,
    dim: int,
    block_m: int,
    causal: bool,
    dtype: torch.dtype,
) -> Problem:
    q, k, v = (random(gen, heads, seq, dim, dtype=dtype) for _ in range(3))
    out = poisoned(heads, seq, dim, dtype=dtype)
    sdpa = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=causal)
    return Problem(
        [q, k, v, out, seq, dim**-0.5 * math.log2(math.e)],
        (cdiv(seq, block_m), heads, 1),
        out,
        sdpa(q.double(), k.double(), v.double()),
        sdpa(q[None], k[None], v[None])[0],
    )


def matmul_descriptors(
    gen: torch.Generator,
    mnk: tuple[int, int, int],
    block: tuple[int, int, int],
    programs: int,
    kind: MatmulType,
) -> Problem:
    plain = matmul(gen, mnk, block, kind)
    a, b, out = plain.args[:3]
    args = [
        Descriptor(a, (block[0], block[2])),
        Descriptor(b.T.contiguous(), (block[1], block[2])),
        Descriptor(out, block[:2]),
        *mnk,
    ]
    return Problem(args, (programs, 1, 1), out, plain.expected, plain.baseline)


def flash_descriptors(
    gen: torch.Generator, block: tuple[int, int], seq: int, dim: int, **shape: Any
) -> Problem:
    plain = flash_attention(gen, seq=seq, dim=dim, block_m=block[0], **shape)
    q, k, v, out = (t.view(-1, dim) for t in plain.args[:4])
    blocks = (block[0], dim), (block[1], dim), (block[1], dim), (block[0], dim)
    args = [Descriptor(t, b) for t, b in zip((q, k, v, out), blocks, strict=True)]
    return Problem([*args, *plain.args[4:]], plain.grid, plain.out, plain.expected, plain.baseline)


def linear_recurrence(gen: torch.Generator, rows: int, cols: int) -> Problem:
    decay = torch.rand(rows, cols, generator=gen)
    x = random(gen, rows, cols, dtype=torch.float32)
    out = poisoned(rows, cols, dtype=torch.float32)

    def sequential(dtype: torch.dtype) -> torch.Tensor:
        h, states = torch.zeros(rows, dtype=dtype), []
        for t in range(cols):
            h = decay[:, t].to(dtype) * h + x[:, t].to(dtype)
            states.append(h)
        return torch.stack(states, dim=1)

    expected, baseline = sequential(torch.float64), sequential(torch.float32)
    return Problem([decay, x, out, cols], (rows, 1, 1), out, expected, baseline)


def histogram(gen: torch.Generator, n: int, bins: int, block: int) -> Problem:
    x = torch.randint(0, bins, (n,), generator=gen, dtype=torch.int32)
    out = torch.arange(bins, dtype=torch.int32)  # the atomics add to what is there
    expected = out.double() + torch.bincount(x, minlength=bins).double()
    return Problem([x, out, n], (cdiv(n, block), 1, 1), out, expected)


def row_sort(gen: torch.Generator, rows: int, cols: int) -> Problem:
    x = random(gen, rows, cols, dtype=torch.float32)
    out = poisoned(rows, cols, dtype=torch.float32)
    return Problem([x, out], (rows, 1, 1), out, x.double().sort(dim=1).values)


def philox(gen: torch.Generator, programs: int, block: int) -> Problem:
    """Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    seed = int(torch.randint(1 << 20, 1 << 30, (), generator=gen))
    out = poisoned(programs, 4, block, dtype=torch.int32)
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


def elementary_functions(gen: torch.Generator, n: int, block: int, dtype: torch.dtype) -> Problem:
    x = random(gen, n, dtype=dtype).abs() + 0.01
    functions = [torch.log, torch.sin, torch.cos, torch.sqrt, torch.rsqrt, torch.erf, torch.sigmoid]

    def rows(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.exp(-x), *(f(x) for f in functions)])

    out = poisoned(8, n, dtype=dtype)
    return Problem([x, out, n], (cdiv(n, block), 1, 1), out, rows(x.double()), rows(x))


def cast(
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
    return Problem([x, out, len(x)], (cdiv(len(x), block), 1, 1), out, x.to(to_dtype).double())


def integer_division(gen: torch.Generator, programs: int, block: int) -> Problem:
    n = programs * block
    bits = torch.randint(1, 52, (2, n), generator=gen)  # exact in float64
    x, y = torch.randint(-(1 << 60), 1 << 60, (2, n), generator=gen) >> (60 - bits)
    y = torch.where(y == 0, 7, y)
    out = poisoned(programs, 2, block, dtype=torch.int64)
    expected = [torch.div(x, y, rounding_mode="trunc"), torch.fmod(x, y)]
    rows = torch.stack([e.view(programs, block) for e in expected], dim=1).double()
    return Problem([x, y, out], (programs, 1, 1), out, rows)


def atomics(gen: torch.Generator, programs: int, block: int, bins: int) -> Problem:
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


def locked_sum(gen: torch.Generator, programs: int, block: int) -> Problem:
    # Small integers: the sum is exact in whatever order the programs come.
    x = torch.randint(-8, 9, (programs, block), generator=gen).float()
    lock, out = torch.zeros(1, dtype=torch.int32), torch.ones(block)
    return Problem([x, lock, out], (programs, 1, 1), out, x.double().sum(0) + 1)


def row_argmax(gen: torch.Generator, rows: int, cols: int) -> Problem:
    x = torch.randint(-50, 51, (rows, cols), generator=gen).float()  # with ties
    out = poisoned(rows, dtype=torch.int32)
    first = [row.index(max(row)) for row in x.tolist()]
    return Problem([x, out, cols, cols], (rows, 1, 1), out, torch.tensor(first).double())
