"""Instruction semantics: single instructions against plain Python, nvcc's code against numpy."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.emulator import Emulator, Module

SNIPPET = """
.version 8.7
.target {target}
.address_size 64
.visible .entry test(.param .u64 pa, .param .u64 pb, .param .u64 pc, .param .u64 pd)
{{
    .reg .pred %p<4>;
    .reg .b16 %ha, %hb, %hc, %hd;
    .reg .b32 %a, %b, %c, %d, %t, %n;
    .reg .b64 %la, %lb, %lc, %ld, %o, %pa, %pb, %pc, %pd;
    ld.param.u64 %pa, [pa]; ld.param.u64 %pb, [pb]; ld.param.u64 %pc, [pc]; ld.param.u64 %pd, [pd];
    mov.u32 %t, %tid.x; mov.u32 %n, %ctaid.x; mad.lo.u32 %t, %n, 256, %t; mul.wide.u32 %o, %t, 8;
    add.u64 %pa, %pa, %o; add.u64 %pb, %pb, %o; add.u64 %pc, %pc, %o; add.u64 %pd, %pd, %o;
    ld.global.u64 %la, [%pa]; ld.global.u64 %lb, [%pb]; ld.global.u64 %lc, [%pc];
    cvt.u32.u64 %a, %la; cvt.u32.u64 %b, %lb; cvt.u32.u64 %c, %lc;
    cvt.u16.u32 %ha, %a; cvt.u16.u32 %hb, %b; cvt.u16.u32 %hc, %c;
    mov.b64 %ld, 0; mov.b32 %d, 0; mov.b16 %hd, 0;
    {body}
    st.global.u64 [%pd], {result};
    ret;
}}
"""
COUNT = 4096


def operands(seed: int) -> list[np.ndarray]:
    """Three arrays of 64-bit patterns: random ones and edge cases, short and long shift counts."""
    rng = np.random.default_rng(seed)
    edges = np.array(
        [0, 1, 2, 31, 32, 33, 63, 64, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1],
        np.uint64,
    )
    out = []
    for _ in range(3):
        values = rng.integers(0, 2**64, COUNT, dtype=np.uint64)
        pick = rng.random(COUNT)
        values = np.where(pick < 0.3, rng.choice(edges, COUNT), values)
        out.append(np.where(pick > 0.8, values % np.uint64(70), values))
    return out


def execute(instruction: str, arrays: list[np.ndarray], device: str = "sm_100") -> np.ndarray:
    """The result of an instruction on %a, %b, %c (or %l.., %h..), as 64-bit patterns."""
    if "%ld" in instruction:
        result, body = "%ld", instruction
    elif "%hd" in instruction:
        result, body = "%ld", instruction + " cvt.u64.u16 %ld, %hd;"
    elif "%p1" in instruction:
        result, body = "%ld", instruction + " selp.b64 %ld, 1, 0, %p1;"
    else:
        result, body = "%ld", instruction + " cvt.u64.u32 %ld, %d;"
    ptx = SNIPPET.format(target=device, body=body, result=result)
    out = np.full(COUNT, 0x5A5A, np.uint64)
    kernel = Emulator(device).load(ptx).kernel("test")
    kernel.launch((COUNT // 256,), (256,), [*arrays, out])
    return out


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bfe(a: int, pos: int, n: int, bits: int, sign: bool) -> int:
    pos, n = pos & 255, n & 255
    if n == 0:
        return 0
    top = min(pos + n - 1, bits - 1)
    fill = (a >> top & 1) if sign else 0
    return sum((a >> (pos + i) & 1 if i < n and pos + i < bits else fill) << i for i in range(bits))


def bfi(a: int, b: int, pos: int, n: int, bits: int) -> int:
    pos, n = pos & 255, n & 255
    for i in range(n):
        if pos + i < bits:
            b = b & ~(1 << (pos + i)) | (a >> i & 1) << (pos + i)
    return b


def prmt(a: int, b: int, c: int) -> int:
    bytes_ = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    out = 0
    for i in range(4):
        s = c >> 4 * i & 15
        byte = bytes_[s & 7]
        out |= ((255 if byte & 128 else 0) if s & 8 else byte) << 8 * i
    return out


def lop3(a: int, b: int, c: int, table: int) -> int:
    out = 0
    for i in range(32):
        out |= (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i
    return out


def dp(a: int, b: int, c: int, sa: bool, sb: bool) -> int:
    for i in range(4):
        x, y = a >> 8 * i & 255, b >> 8 * i & 255
        c += (signed(x, 8) if sa else x) * (signed(y, 8) if sb else y)
    return c


def halves(f, a: int, b: int, bits: int = 16) -> int:
    return sum((f(a >> i & 0xFFFF, b >> i & 0xFFFF) & 0xFFFF) << i for i in (0, 16))


M32, M64 = 2**32 - 1, 2**64 - 1
S = signed
INTEGER = {
    "add.s32 %d, %a, %b;": lambda a, b, c: a + b,
    "sub.u64 %ld, %la, %lb;": lambda a, b, c: a - b,
    "add.sat.s32 %d, %a, %b;": lambda a, b, c: max(-(2**31), min(2**31 - 1, S(a, 32) + S(b, 32))),
    "sub.s16 %hd, %ha, %hb;": lambda a, b, c: (a - b) & 0xFFFF,
    "mul.lo.u16 %hd, %ha, %hb;": lambda a, b, c: (a * b) & 0xFFFF,
    "mul.wide.s16 %d, %ha, %hb;": lambda a, b, c: S(a, 16) * S(b, 16),
    "mul.hi.s32 %d, %a, %b;": lambda a, b, c: S(a, 32) * S(b, 32) >> 32,
    "mul.hi.u64 %ld, %la, %lb;": lambda a, b, c: a * b >> 64,
    "mul.hi.s64 %ld, %la, %lb;": lambda a, b, c: S(a, 64) * S(b, 64) >> 64,
    "mul.wide.s32 %ld, %a, %b;": lambda a, b, c: S(a, 32) * S(b, 32),
    "mad.wide.u32 %ld, %a, %b, %lc;": lambda a, b, c: (a & M32) * (b & M32) + c,
    "mad.lo.s32 %d, %a, %b, %c;": lambda a, b, c: a * b + c,
    "mad.hi.u32 %d, %a, %b, %c;": lambda a, b, c: ((a & M32) * (b & M32) >> 32) + c,
    "mul24.lo.s32 %d, %a, %b;": lambda a, b, c: S(a, 24) * S(b, 24),
    "add.cc.u32 %d, %a, %b; addc.u32 %d, %c, 0;": lambda a, b, c: c + ((a & M32) + (b & M32) >> 32),
    "sub.cc.u32 %d, %a, %b; subc.u32 %d, %c, 0;": lambda a, b, c: c - ((a & M32) < (b & M32)),
    "mad.lo.cc.u32 %d, %a, %b, %c; madc.hi.u32 %d, %a, %b, 0;": lambda a, b, c: (
        (a & M32) * (b & M32) + (c & M32) >> 32
    ),
    "div.u32 %d, %a, %b;": lambda a, b, c: (a & M32) // (b & M32) if b & M32 else M32,
    "div.s64 %ld, %la, %lb;": lambda a, b, c: quotient(S(a, 64), S(b, 64)) if b else M64,
    "rem.s32 %d, %a, %b;": lambda a, b, c: (
        S(a, 32) - quotient(S(a, 32), S(b, 32)) * S(b, 32) if b & M32 else a
    ),
    "abs.s32 %d, %a;": lambda a, b, c: abs(S(a, 32)),
    "neg.s64 %ld, %la;": lambda a, b, c: -a,
    "min.s32 %d, %a, %b;": lambda a, b, c: min(S(a, 32), S(b, 32)),
    "max.u64 %ld, %la, %lb;": lambda a, b, c: max(a, b),
    "max.s16x2 %d, %a, %b;": lambda a, b, c: halves(lambda x, y: max(S(x, 16), S(y, 16)), a, b),
    "min.u16x2 %d, %a, %b;": lambda a, b, c: halves(min, a, b),
    "add.u16x2 %d, %a, %b;": lambda a, b, c: halves(lambda x, y: x + y, a, b),
    "sad.s32 %d, %a, %b, %c;": lambda a, b, c: c + abs(S(a, 32) - S(b, 32)),
    "popc.b32 %d, %a;": lambda a, b, c: (a & M32).bit_count(),
    "clz.b64 %d, %la;": lambda a, b, c: 64 - a.bit_length(),
    "brev.b32 %d, %a;": lambda a, b, c: int(f"{a & M32:032b}"[::-1], 2),
    "brev.b64 %ld, %la;": lambda a, b, c: int(f"{a:064b}"[::-1], 2),
    "bfind.s32 %d, %a;": lambda a, b, c: (
        (S(a, 32) if S(a, 32) >= 0 else ~S(a, 32)).bit_length() - 1
    ),
    "bfind.shiftamt.u64 %d, %la;": lambda a, b, c: 64 - a.bit_length() if a else M32,
    "bfe.u32 %d, %a, %b, %c;": lambda a, b, c: bfe(a & M32, b, c, 32, False),
    "bfe.s32 %d, %a, %b, %c;": lambda a, b, c: bfe(a & M32, b, c, 32, True),
    "bfe.s64 %ld, %la, %b, %c;": lambda a, b, c: bfe(a, b, c, 64, True),
    "bfi.b32 %d, %a, %b, %c, 9;": lambda a, b, c: bfi(a & M32, b & M32, c, 9, 32),
    "bfi.b64 %ld, %la, %lb, %c, 40;": lambda a, b, c: bfi(a, b, c, 40, 64),
    "shl.b32 %d, %a, %b;": lambda a, b, c: a << min(b & M32, 32),
    "shr.s32 %d, %a, %b;": lambda a, b, c: S(a, 32) >> min(b & M32, 32),
    "shr.u64 %ld, %la, %b;": lambda a, b, c: a >> min(b & M32, 64),
    "shr.s16 %hd, %ha, %b;": lambda a, b, c: (S(a, 16) >> min(b & M32, 16)) & 0xFFFF,
    "shf.l.wrap.b32 %d, %a, %b, %c;": lambda a, b, c: ((b & M32) << 32 | a & M32) << (c & 31) >> 32,
    "shf.r.clamp.b32 %d, %a, %b, %c;": lambda a, b, c: (
        ((b & M32) << 32 | a & M32) >> min(c & M32, 32)
    ),
    "shf.l.clamp.b32 %d, %a, %b, %c;": lambda a, b, c: (
        ((b & M32) << 32 | a & M32) << min(c & M32, 32) >> 32
    ),
    "lop3.b32 %d, %a, %b, %c, 0xE8;": lambda a, b, c: lop3(a, b, c, 0xE8),
    "lop3.b32 %d, %a, %b, %c, 0x2D;": lambda a, b, c: lop3(a, b, c, 0x2D),
    "prmt.b32 %d, %a, %b, %c;": lambda a, b, c: prmt(a & M32, b & M32, c),
    "prmt.b32.f4e %d, %a, %b, %c;": lambda a, b, c: ((b & M32) << 32 | a & M32) >> 8 * (c & 3),
    "prmt.b32.rc16 %d, %a, %b, %c;": lambda a, b, c: (a >> 16 * (c & 1) & 0xFFFF) * 0x10001,
    "dp4a.s32.s32 %d, %a, %b, %c;": lambda a, b, c: dp(a, b, c, True, True),
    "dp4a.u32.s32 %d, %a, %b, %c;": lambda a, b, c: dp(a, b, c, False, True),
    "dp2a.hi.s32.u32 %d, %a, %b, %c;": lambda a, b, c: (
        c + S(a, 16) * (b >> 16 & 255) + S(a >> 16, 16) * (b >> 24 & 255)
    ),
    "slct.b32.s32 %d, %a, %b, %c;": lambda a, b, c: a if S(c, 32) >= 0 else b,
    "setp.lt.s32 %p1, %a, %b;": lambda a, b, c: S(a, 32) < S(b, 32),
    "setp.hi.u32 %p1, %a, %b;": lambda a, b, c: (a & M32) > (b & M32),
    "setp.ge.s64 %p2|%p1, %la, %lb;": lambda a, b, c: S(a, 64) < S(b, 64),
    "setp.ne.u16 %p2, %ha, %hb; setp.eq.or.b32 %p1, %a, 0, !%p2;": lambda a, b, c: (
        a & M32 == 0 or a & 0xFFFF == b & 0xFFFF
    ),
    "set.gt.u32.s32 %d, %a, %b;": lambda a, b, c: M32 if S(a, 32) > S(b, 32) else 0,
    "cvt.s32.s8 %d, %a;": lambda a, b, c: S(a, 8),
    "cvt.sat.u8.s32 %d, %a;": lambda a, b, c: max(0, min(255, S(a, 32))),
    "cvt.sat.s32.u64 %d, %la;": lambda a, b, c: min(a, 2**31 - 1),
    "cvt.s64.s32 %ld, %a;": lambda a, b, c: S(a, 32),
    "cvt.pack.sat.s8.s32.b32 %d, %a, %b, %c;": lambda a, b, c: (
        (max(-128, min(127, S(b, 32))) & 255) | (max(-128, min(127, S(a, 32))) & 255) << 8 | c << 16
    ),
    "mov.b32 {%ha, %hb}, %a; mov.b32 %d, {%hb, %ha};": lambda a, b, c: (
        (a >> 16 & 0xFFFF) | (a & 0xFFFF) << 16
    ),
    "mov.b64 {%c, %d}, %la; mov.b64 %ld, {%d, %c};": lambda a, b, c: a >> 32 | (a & M32) << 32,
    "fns.b32 %d, %a, 3, 2;": lambda a, b, c: ([i for i in range(3, 32) if a >> i & 1] + [M32] * 2)[
        1
    ],
    "bmsk.clamp.b32 %d, %a, %b;": lambda a, b, c: (
        ((1 << min(b & M32, 32)) - 1) << (a & M32) if (a & M32) < 32 else 0
    ),
}


@pytest.mark.parametrize("instruction", INTEGER)
def test_integer_instruction(instruction: str) -> None:
    arrays = operands(seed=1)
    got = execute(instruction, arrays)
    mask = M64 if "%ld" in instruction else M32
    want = [
        int(INTEGER[instruction](int(a), int(b), int(c))) & mask
        for a, b, c in zip(*arrays, strict=True)
    ]
    wrong = np.flatnonzero(got != np.array(want, np.uint64))
    assert wrong.size == 0, [
        hex(int(v)) for v in (*(x[wrong[0]] for x in arrays), got[wrong[0]], want[wrong[0]])
    ]


# --------------------------------------------------------------------------------------------------
# Floating point


def floats(seed: int) -> list[np.ndarray]:
    """fp32 patterns of every magnitude with infinities, NaN, zeros and subnormals among them."""
    rng = np.random.default_rng(seed)
    special = np.array(
        [0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000], np.uint64
    )
    special = np.concatenate([special, special | np.uint64(1 << 31)])
    out = []
    for _ in range(3):
        ordinary = (rng.standard_normal(COUNT) * 4).astype(np.float32).view(np.uint32)
        wild = rng.integers(0, 2**32, COUNT, dtype=np.uint64)
        pick = rng.random(COUNT)
        out.append(
            np.where(
                pick < 0.4, ordinary, np.where(pick < 0.8, wild, rng.choice(special, COUNT))
            ).astype(np.uint64)
        )
    return out


def f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint32).view(np.float32)


def same(got: np.ndarray, want: np.ndarray) -> None:
    got, want = f32(got), want.astype(np.float32)
    nan = np.isnan(want)
    assert np.array_equal(np.isnan(got), nan)
    assert (got[nan].view(np.uint32) == 0x7FFFFFFF).all()  # the canonical NaN
    assert np.array_equal(got[~nan].view(np.uint32), want[~nan].view(np.uint32))


def flushed(x: np.ndarray) -> np.ndarray:
    tiny = np.abs(x) < np.finfo(np.float32).tiny
    return np.where(tiny, np.copysign(np.float32(0), x), x)


def directed(value: np.ndarray, down: bool) -> np.ndarray:
    """A double rounded to fp32 towards minus or plus infinity."""
    near = value.astype(np.float32)
    off = near.astype(np.float64) > value if down else near.astype(np.float64) < value
    step = np.nextafter(near, np.float32(-np.inf if down else np.inf))
    return np.where(off & ~np.isinf(value), step, near)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_fp32_arithmetic() -> None:
    arrays = floats(seed=2)
    a, b, c = map(f32, arrays)
    wide = [x.astype(np.float64) for x in (a, b, c)]
    same(execute("add.f32 %d, %a, %b;", arrays), a + b)
    same(execute("sub.rn.f32 %d, %a, %b;", arrays), a - b)
    same(execute("mul.f32 %d, %a, %b;", arrays), a * b)
    same(execute("mul.ftz.f32 %d, %a, %b;", arrays), flushed(flushed(a) * flushed(b)))
    same(
        execute("add.sat.f32 %d, %a, %b;", arrays), np.nan_to_num(np.clip(a + b, 0, 1), nan=0.0) + 0
    )
    same(execute("div.rn.f32 %d, %a, %b;", arrays), a / b)
    same(execute("sqrt.rn.f32 %d, %a;", arrays), np.sqrt(a))
    same(execute("rcp.rn.f32 %d, %a;", arrays), 1 / a)
    same(execute("mul.rm.f32 %d, %a, %b;", arrays), directed(wide[0] * wide[1], down=True))
    same(execute("mul.rp.f32 %d, %a, %b;", arrays), directed(wide[0] * wide[1], down=False))
    same(
        execute("min.f32 %d, %a, %b;", arrays),
        np.where(a == b, np.where(np.signbit(a), a, b), np.fmin(a, b)),
    )
    same(
        execute("max.NaN.f32 %d, %a, %b;", arrays),
        np.where(a == b, np.where(np.signbit(a), b, a), np.maximum(a, b)),
    )
    fma = torch.from_numpy(wide[0] * wide[1])  # exact; fp64's sum of it and c rounds once more
    exact = fma.numpy() + wide[2]
    ordinary = np.abs(fma.numpy() / np.where(wide[2] == 0, 1, wide[2]) - 1) < 2**20
    got = execute("fma.rn.f32 %d, %a, %b, %c;", arrays)
    same(got[ordinary], exact[ordinary].astype(np.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_packed_fp32_of_blackwell() -> None:
    arrays = [x | y << np.uint64(32) for x, y in zip(floats(3), floats(4), strict=True)]
    got = execute("fma.rn.f32x2 %ld, %la, %lb, %lc;", arrays)
    for shift in (np.uint64(0), np.uint64(32)):
        parts = [x >> shift & np.uint64(M32) for x in arrays]
        want = execute("fma.rn.f32 %d, %a, %b, %c;", parts)
        assert np.array_equal(got >> shift & np.uint64(M32), want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("name", "function", "low", "high", "tolerance"),
    [
        ("ex2", np.exp2, -160, 130, 2**-22),
        ("lg2", np.log2, 1e-30, 1e30, 2**-22),
        ("rcp", np.reciprocal, -1e30, 1e30, 2**-23),
        ("rsqrt", lambda x: 1 / np.sqrt(x), 1e-30, 1e30, 2**-22),
        ("sqrt", np.sqrt, 0, 1e30, 2**-22),
        ("sin", np.sin, -3, 3, 2**-20),
        ("cos", np.cos, -3, 3, 2**-20),
        ("tanh", np.tanh, -20, 20, 2**-11),
    ],
)
def test_special_functions_are_within_their_documented_error(
    name, function, low, high, tolerance
) -> None:
    x = np.random.default_rng(5).uniform(low, high, COUNT).astype(np.float32)
    arrays = [x.view(np.uint32).astype(np.uint64)] * 3
    got = f32(execute(f"{name}.approx.f32 %d, %a;", arrays)).astype(np.float64)
    want = function(x.astype(np.float64))
    representable = np.abs(want) < np.finfo(np.float32).max
    error = np.abs(got - want)[representable] / np.maximum(np.abs(want[representable]), 2**-126)
    assert error.max() <= tolerance
    edges = np.array([np.inf, -np.inf, np.nan, 0.0] * (COUNT // 4), np.float32)
    got = f32(execute(f"{name}.approx.f32 %d, %a;", [edges.view(np.uint32).astype(np.uint64)] * 3))
    assert np.array_equal(got[:4], function(edges[:4]), equal_nan=True)


@pytest.mark.parametrize(("name", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_arithmetic(name: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(6)
    arrays = [rng.integers(0, 2**32, COUNT, dtype=np.uint64) for _ in range(3)]
    a, b, c = (torch.from_numpy(x.astype(np.uint32)).view(dtype).double() for x in arrays)

    def check(instruction: str, want: torch.Tensor) -> None:
        got = torch.from_numpy(execute(instruction, arrays).astype(np.uint32)).view(dtype)
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got[~got.isnan()].double(), want.to(dtype)[~got.isnan()].double())

    check(f"add.{name}x2 %d, %a, %b;", (a.float() + b.float()).to(dtype))
    check(f"mul.{name}x2 %d, %a, %b;", (a.float() * b.float()).to(dtype))
    check(f"max.{name}x2 %d, %a, %b;", torch.fmax(a, b))
    check(f"neg.{name}x2 %d, %a;", -a)
    # The product is exact in fp64. Where the sum is too, no neighbour may be nearer than the result
    # (torch's own conversion from fp64 rounds twice).
    total = a * b + c
    got = execute(f"fma.rn.{name}x2 %d, %a, %b, %c;", arrays).astype(np.uint32)
    result = torch.from_numpy(got).view(dtype)
    assert torch.equal(result.isnan(), total.isnan())
    exact = (total - a * b == c) & (total - c == a * b) & result.isfinite()
    assert exact.float().mean() > 0.2
    bits = result.view(torch.int16)
    error = (result.double() - total).abs()
    for step in (-1, 1):
        neighbour = (bits + step).view(dtype).double()
        assert (error <= (neighbour - total).abs())[exact & neighbour.isfinite()].all()


def test_float_to_integer_conversions() -> None:
    arrays = floats(seed=7)
    a = f32(arrays[0])

    def clamp(x: float, low: int, high: int, rounding) -> int:
        if math.isnan(x):
            return 0
        if math.isinf(x):
            return high if x > 0 else low
        return max(low, min(high, int(rounding(x))))

    for mode, rounding in (
        ("rzi", math.trunc),
        ("rni", round),
        ("rmi", math.floor),
        ("rpi", math.ceil),
    ):
        got = execute(f"cvt.{mode}.s32.f32 %d, %a;", arrays)
        want = [clamp(float(x), -(2**31), 2**31 - 1, rounding) & M32 for x in a]
        assert np.array_equal(got, np.array(want, np.uint64))
        got = execute(f"cvt.{mode}.u64.f32 %ld, %a;", arrays)
        want = [clamp(float(x), 0, 2**64 - 1, rounding) for x in a]
        assert np.array_equal(got, np.array(want, np.uint64))


def test_integer_to_float_conversions() -> None:
    arrays = operands(seed=8)
    low = arrays[0].astype(np.uint32)
    same(execute("cvt.rn.f32.s32 %d, %a;", arrays), low.view(np.int32).astype(np.float32))
    same(execute("cvt.rn.f32.u64 %d, %la;", arrays), arrays[0].astype(np.float32))
    down = directed(low.astype(np.float64), down=True)
    same(execute("cvt.rz.f32.u32 %d, %a;", arrays), down)


def test_comparisons_with_nan() -> None:
    arrays = floats(seed=9)
    a, b = f32(arrays[0]), f32(arrays[1])
    unordered = np.isnan(a) | np.isnan(b)
    for name, want in {
        "lt": a < b, "gtu": (a > b) | unordered, "ne": (a != b) & ~unordered, "neu": a != b,
        "num": ~unordered, "nan": unordered, "equ": (a == b) | unordered,
    }.items():  # fmt: skip
        assert np.array_equal(
            execute(f"setp.{name}.f32 %p1, %a, %b;", arrays).astype(bool), want
        ), name


# --------------------------------------------------------------------------------------------------
# Counters


def test_counters_of_a_known_kernel() -> None:
    ptx = SNIPPET.format(target="sm_80", body="", result="%la")
    arrays = [np.zeros(512, np.uint64) for _ in range(4)]
    c = Emulator().load(ptx).kernel("test").launch((2,), (256,), arrays)
    warps = 16
    assert c.issued["global"] == 4 * warps and c.lanes["global"] == 4 * 512
    assert c.read_requests == 3 * warps and c.write_requests == warps
    assert c.read_bytes == 3 * 512 * 8 and c.write_bytes == 512 * 8
    # numpy aligns to 16 bytes: a warp's 256 bytes touch 8 sectors, or 9.
    extents = [(x.ctypes.data // 32, (x.ctypes.data + 512 * 8 - 1) // 32) for x in arrays]
    assert c.unique_read_sectors == sum(b - a + 1 for a, b in extents[:3])
    assert c.unique_write_sectors == extents[3][1] - extents[3][0] + 1
    assert 8 * 3 * warps <= c.read_sectors <= 9 * 3 * warps


@pytest.mark.parametrize(
    ("stride", "bytes_", "wavefronts", "least"),
    [
        (4, 4, 1, 1),
        (8, 4, 2, 1),
        (128, 4, 32, 1),
        (0, 4, 1, 1),
        (132, 4, 1, 1),
        (8, 8, 2, 2),
        (16, 16, 4, 4),
        (128, 16, 32, 4),
        (144, 16, 4, 4),
    ],
)
def test_bank_conflicts(stride: int, bytes_: int, wavefronts: int, least: int) -> None:
    vector = {4: "st.shared.u32 [%d], 0;", 8: "st.shared.u64 [%d], 0;"}
    store = vector.get(bytes_, "st.shared.v4.u32 [%d], {%n, %n, %n, %n};")
    body = f".shared .align 16 .b8 s[8192]; mov.u32 %d, s; mad.lo.u32 %d, %t, {stride}, %d; {store}"
    x = np.zeros(32, np.uint64)
    ptx = SNIPPET.format(target="sm_80", body=body, result="%la")
    c = Emulator().load(ptx).kernel("test").launch((1,), (32,), [x, x, x, x.copy()])
    assert (c.shared_wavefronts, c.shared_wavefronts_min) == (wavefronts, least)


# --------------------------------------------------------------------------------------------------
# What nvcc makes of C++

NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"
)


@pytest.fixture(scope="module", params=["sm_80", "sm_100"])
def samples(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Module:
    """samples.cu, compiled for the architecture."""
    if NVCC is None:
        pytest.skip("nvcc is not installed")
    source = Path(__file__).parent / "emulator" / "samples.cu"
    ptx = tmp_path_factory.mktemp("samples") / "samples.ptx"
    arch = {"sm_100": "sm_100a"}.get(request.param, request.param)
    subprocess.run(
        [NVCC, "-ptx", "-lineinfo", f"-arch={arch}", str(source), "-o", str(ptx)], check=True
    )
    return Emulator(request.param).load(ptx.read_text())


def test_nvcc_single_precision_functions(samples: Module) -> None:
    rng = np.random.default_rng(10)
    x = np.concatenate([rng.standard_normal(200) * 3, rng.standard_normal(56) * 1e6]).astype(
        np.float32
    )
    y = np.full((256, 16), np.nan, np.float32)
    samples.kernel("k_math").launch((2,), (128,), [x, y, 256])
    t = torch.from_numpy(x.astype(np.float64))
    want = [
        t.sin(),
        t.cos(),
        t.tan(),
        t.exp(),
        t.abs().log(),
        t.abs().sqrt(),
        t.abs().rsqrt(),
        1 / t,
        t.abs() ** 1.3,
        t.tanh(),
        t.erf(),
        torch.fmod(t, float(np.float32(0.7))),
        t.exp(),
        t.floor(),
        None,
        t / float(np.float32(3.7)),
    ]
    for i, w in enumerate(want):
        if w is None:
            w = torch.from_numpy(np.copysign(np.floor(np.abs(x.astype(np.float64)) + 0.5), x))
        with np.errstate(over="ignore"):
            w32 = w.numpy().astype(np.float32)
        tolerance = 1e-4 if i == 12 else 2e-6
        np.testing.assert_allclose(y[:, i], w32, rtol=tolerance, atol=1e-30, err_msg=str(i))


def test_nvcc_double_precision_functions(samples: Module) -> None:
    x = np.random.default_rng(11).standard_normal(64) * 5
    y = np.full((64, 8), np.nan)
    samples.kernel("k_math64").launch((1,), (64,), [x, y, 64])
    a = np.abs(x)
    want = [np.sin(x), np.exp(x), np.log(a), np.sqrt(a), 1 / x, a**1.3, np.tanh(x), x / 3.7]
    np.testing.assert_allclose(y, np.stack(want, 1), rtol=4e-15)


def test_nvcc_integer_arithmetic(samples: Module) -> None:
    rng = np.random.default_rng(12)
    x = rng.integers(-(2**63), 2**63 - 1, 128) >> rng.integers(0, 63, 128)
    y = np.zeros((128, 12), np.int64)
    samples.kernel("k_int").launch((1,), (128,), [x, y, 128])
    for i in range(128):
        a, b = int(x[i]), int(x[(i + 1) % 128]) or 1
        ua, ub, wa, wb = a & M64, b & M64, signed(a, 32), signed(b, 32) or 1
        want = [
            quotient(a, b),
            a - quotient(a, b) * b,
            quotient(wa, wb),
            ua // ub,
            a * b >> 64,
            ua.bit_count(),
            64 - ua.bit_length(),
            int(f"{ua:064b}"[::-1], 2),
            a >> (b & 63),
            ua << (b & 63),
            signed(a, 16) * signed(b, 16),
            (ua & M32) % 1000,
        ]
        assert [int(v) & M64 for v in y[i]] == [w & M64 for w in want], (a, b)


def test_nvcc_calls_switches_and_local_memory(samples: Module) -> None:
    x = np.random.default_rng(13).standard_normal(96).astype(np.float32)
    y = np.full(96, np.nan, np.float32)
    samples.kernel("k_call").launch((1,), (96,), [x, y, 96])

    def helper(a: np.float32, k: int) -> np.float32:
        return np.float32(a * np.float32(k)) if k > 2 else np.float32(a + np.float32(k))

    for i in range(96):
        acc = np.float32(0)
        for k in range(i % 7):
            acc = helper(np.float32(acc + x[i]), k)
        assert y[i] == (helper(acc, 5) if i & 1 else acc)

    cases = np.arange(64, dtype=np.int32) % 9
    v = np.arange(64, dtype=np.int32) * 37
    before = v.copy()
    samples.kernel("k_switch").launch((1,), (64,), [cases, v])
    functions = [
        lambda w: 10,
        lambda w: 7 + w,
        lambda w: w ^ 55,
        lambda w: -3,
        lambda w: w // 3,
        lambda w: w % 7,
        lambda w: signed(1 << (w & 31), 32),
        lambda w: 99,
        lambda w: 99,
    ]
    assert v.tolist() == [functions[c](int(w)) for c, w in zip(cases, before, strict=True)]

    values = np.random.default_rng(14).integers(0, 1000, 64).astype(np.int32)
    out = np.zeros(64, np.int32)
    samples.kernel("k_local").launch((1,), (64,), [values, out])
    want = [sorted(values[(i + np.arange(32)) & 63])[values[i] & 31] for i in range(64)]
    assert out.tolist() == want


def test_nvcc_globals_and_constants(samples: Module) -> None:
    y, z = np.zeros(64, np.float32), np.zeros(64, np.int32)
    start = int(samples.variable("counter").view(np.int32)[0])
    samples.kernel("k_globals").launch((1,), (64,), [y, z])
    assert np.array_equal(y, np.tile([1.5, 2.5, 3.5, 4.5], 16))
    assert sorted(z) == list(range(start, start + 64))
    assert samples.variable("counter").view(np.int32)[0] == start + 64


def test_nvcc_half_types(samples: Module) -> None:
    rng = np.random.default_rng(15)
    h = torch.from_numpy(rng.standard_normal(64)).half()
    u = torch.from_numpy(rng.standard_normal(64)).bfloat16()
    y = np.full((64, 12), np.nan, np.float32)
    samples.kernel("k_half").launch((1,), (64,), [h, u, y])
    swap = torch.arange(64) ^ 1
    a, b, c, d = h.double(), h[swap].double(), u.double(), u[swap].double()
    want = [
        (a + b).half(),
        (a * b).half(),
        (a * b + a).half(),
        (a / b).half(),
        (c + d).bfloat16(),
        (c * d).bfloat16(),
        (c * d + c).bfloat16(),
        a.exp().half(),
        a < b,
        torch.maximum(a, b),
        a.round(),
        a.abs().sqrt().half(),
    ]
    for i, w in enumerate(want):
        np.testing.assert_allclose(
            y[:, i], w.float().numpy(), rtol=2e-3 if i == 7 else 0, err_msg=str(i)
        )


def test_nvcc_fp8(samples: Module) -> None:
    x = (torch.randn(128, generator=torch.Generator().manual_seed(16)) * 100).float()
    e4, e5 = torch.zeros(128, dtype=torch.uint8), torch.zeros(128, dtype=torch.uint8)
    back = torch.full((128, 2), torch.nan)
    samples.kernel("k_fp8").launch((1,), (128,), [x, e4, e5, back])
    want4, want5 = x.clamp(-448, 448).to(torch.float8_e4m3fn), x.to(torch.float8_e5m2)
    assert torch.equal(e4, want4.view(torch.uint8)) and torch.equal(e5, want5.view(torch.uint8))
    assert torch.equal(back, torch.stack([want4.float(), want5.float()], 1))


def test_conversions_to_and_from_fp8() -> None:
    """Every f16 there and every e4m3 back; random fp32 patterns, halfway cases, NaN."""
    patterns = np.random.default_rng(4).integers(0, 2**32, COUNT, dtype=np.uint32)
    near = np.random.default_rng(5).standard_normal(COUNT).astype(np.float32) * 0.02
    special = np.float32(
        [np.nan, -np.nan, np.inf, -np.inf, 448, 464, 465, 2**-10, 3 * 2**-10, -0.0]
    )
    x = np.concatenate([patterns[: COUNT // 2].view(np.float32), near[: COUNT // 2 - 10], special])

    def expected(values: np.ndarray) -> np.ndarray:
        clamped = torch.from_numpy(values.astype(np.float32)).clamp(-448, 448)
        bits = clamped.to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint64)
        return np.where(np.isnan(values), np.uint64(0x7F), bits)

    low = np.roll(x, 1)
    pair = [v.view(np.uint32).astype(np.uint64) for v in (x, low)]
    got = execute("cvt.rn.satfinite.e4m3x2.f32 %hd, %a, %b;", [*pair, pair[0]], "sm_89")
    np.testing.assert_array_equal(got, expected(x) << np.uint64(8) | expected(low))
    for start in range(0, 1 << 16, COUNT):
        halves = np.arange(start, start + COUNT, dtype=np.uint16)
        other = np.roll(halves, 1)
        words = halves.astype(np.uint64) << np.uint64(16) | other
        got = execute("cvt.rn.satfinite.e4m3x2.f16x2 %hd, %a;", [words] * 3, "sm_89")
        want = [expected(h.view(np.float16)) for h in (halves, other)]
        np.testing.assert_array_equal(got, want[0] << np.uint64(8) | want[1])
    pairs = np.arange(1 << 16, dtype=np.uint64)
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).half()
    halves = values.view(torch.int16).numpy().view(np.uint16).astype(np.uint64)
    halves[[0x7F, 0xFF]] = 0x7FFF
    for start in range(0, 1 << 16, COUNT):
        some = pairs[start : start + COUNT]
        got = execute("cvt.rn.f16x2.e4m3x2 %d, %ha;", [some] * 3, "sm_89")
        want = halves[some >> np.uint64(8)] << np.uint64(16) | halves[some & np.uint64(255)]
        np.testing.assert_array_equal(got, want)


def test_nvcc_cooperative_groups(samples: Module) -> None:
    y = np.zeros(64, np.int32)
    for seed in range(4):
        samples.kernel("k_cg").launch((1,), (64,), [y], seed=seed)
        for i in range(64):
            warp = i // 32
            tile = [i // 8 * 8 + j for j in range(8)]
            values = list(tile)
            for o in (4, 2, 1):
                values = [values[j] + (values[j + o] if j + o < 8 else values[j]) for j in range(8)]
            value = values[i % 8]
            members = [j for j in range(warp * 32, warp * 32 + 32) if j % 3 == 0]
            if i in members:
                value += len(members) * 1000 + members.index(i)
            assert y[i] == value + 32 + 8, i


def test_nvcc_printf_and_parameter_structs(
    samples: Module, capfd: pytest.CaptureFixture[str]
) -> None:
    y = np.zeros(1, np.int32)
    samples.kernel("k_printf").launch((1,), (32,), [y])
    assert capfd.readouterr().err == "hi 0 1.500000 x\nhi 1 1.500000 x\n"
    big = np.zeros(
        1, np.dtype([("v", np.float32, 20), ("p", np.int64, 4), ("n", np.int32), ("pad", np.int32)])
    )
    big["v"], big["p"], big["n"] = np.arange(20), [100, 200, 300, 400], 5
    out = np.zeros(32, np.float32)
    samples.kernel("k_struct").launch((1,), (32,), [big.tobytes(), out])
    i = np.arange(32)
    assert np.array_equal(out, i % 20 + np.array([100, 200, 300, 400])[i & 3] + 5)
