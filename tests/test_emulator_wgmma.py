"""wgmma on the emulator against numpy: types, shapes, layouts of shared memory, scales, f16 sums.

One warpgroup stores A and B as a matrix descriptor has them, multiplies, and writes the registers
of D, which the figure "Register fragments of D" of the PTX ISA says how to read.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.fp8_sums import cut, hard_values, narrow_sum
from tests.hopper_snippets import launch, load, swizzled

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
DTYPES: dict[str, Any] = {
    "bf16": BF16, "f16": np.float16, "tf32": np.float32, "e4m3": E4M3, "e5m2": E5M2,
    "s8": np.int8, "u8": np.uint8,
}  # fmt: skip
MODES = {0: 0, 128: 1, 64: 2, 32: 3}  # bytes of the swizzle: bits 62-63 of a descriptor
K_BYTES = 32  # of one instruction


def random(rng: np.random.Generator, name: str, *shape: int) -> np.ndarray:
    if name == "s8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    if name == "u8":
        return rng.integers(0, 256, shape).astype(np.uint8)
    if name in ("e4m3", "e5m2"):
        values = np.arange(256, dtype=np.uint8).view(DTYPES[name]).astype(np.float64)
        return hard_values(rng, shape, np.unique(values[np.isfinite(values)]), False).astype(
            DTYPES[name]
        )
    x = rng.standard_normal(shape).astype(np.float32)
    if name == "tf32":
        return (x.view(np.int32) & ~0x1FFF).view(np.float32)
    return x.astype(DTYPES[name])


def place(matrix: np.ndarray, swizzle: int, transposed: bool, base: int) -> tuple[bytes, int]:
    """A matrix [mn, k] as shared memory holds it from `base` on, and its descriptor.

    Core matrices of 8 rows by 16 bytes (no swizzle), or atoms of 8 rows by `swizzle` bytes, where a
    row is along k, or with `transposed` along mn; atoms one behind the other.
    """
    major = matrix if not transposed else matrix.T  # [rows, contiguous]
    size = matrix.itemsize
    span = swizzle or 16
    per_row = span // size
    rows, columns = major.shape
    padded = np.zeros((rows, -(-columns // per_row) * per_row), matrix.dtype)
    padded[:, :columns] = major
    raw = padded.view(np.uint8).reshape(rows // 8, 8, -1, span)
    # [atom of contiguous][group of 8 rows][row][span]
    atoms = np.ascontiguousarray(raw.transpose(2, 0, 1, 3))
    image = np.zeros(atoms.size, np.uint8)
    image[swizzled(base + np.arange(atoms.size), swizzle) - base] = atoms.ravel()
    group, atom = 8 * span, rows * span
    if not transposed or swizzle:
        leading, stride = atom, group
    else:
        leading, stride = group, atom
    bits = base >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | MODES[swizzle] << 62
    return image.tobytes(), bits


def fragments_of_d(registers: np.ndarray, n: int) -> np.ndarray:
    """[register, thread] -> [64, n]; f16: [register, thread, 2]."""
    d = np.zeros((64, n), registers.dtype)
    halves = registers.ndim == 3
    for t in range(128):
        warp, lane = divmod(t, 32)
        for i in range(n // 8):
            for half in range(2):
                for j in range(2):
                    row = 16 * warp + lane // 4 + 8 * half
                    column = 8 * i + lane % 4 * 2 + j
                    value = registers[2 * i + half, t, j] if halves else registers[
                        4 * i + 2 * half + j, t
                    ]  # fmt: skip
                    d[row, column] = value
    return d


def kernel_for(name: str, b_name: str, acc: str, n: int, steps: int, a_in_registers: bool,
               tail: str, satfinite: bool = False) -> str:  # fmt: skip
    """x: shared memory's image, then descriptors; y: D by register and thread, started from it."""
    k = K_BYTES // np.dtype(DTYPES[name]).itemsize
    count = n // 4 if acc == "f16" else n // 2
    d = ", ".join(f"%r{i + 20}" for i in range(count))
    a = "{%r4, %r5, %r6, %r7}" if a_in_registers else "%rd2"
    saturate = ".satfinite" if satfinite else ""
    shape = f"m64n{n}k{k}{saturate}.{acc}.{name}.{b_name}"
    body = """
    mov.u32 %r1, %tid; ld.global.u32 %r2, [%x];                  // 16-byte pieces of the image
    setp.ge.u32 %p1, %r1, %r2; @%p1 bra $copied;
$copy: mad.lo.u32 %r3, %r1, 16, %s; mul.wide.u32 %rd1, %r1, 16; add.s64 %rd1, %rd1, %x;
    ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd1+1024];
    st.shared.v4.u32 [%r3], {%r4, %r5, %r6, %r7};
    add.u32 %r1, %r1, 128; setp.lt.u32 %p1, %r1, %r2; @%p1 bra $copy;
$copied: fence.proxy.async.shared::cta; bar.sync 0;
    mul.wide.u32 %rd9, %tid, 4; add.s64 %rd8, %y, %rd9;"""
    for i in range(count):
        body += f"ld.global.u32 %r{i + 20}, [%rd8+{512 * i}];"
    body += "ld.global.u32 %r8, [%x+4]; setp.ne.u32 %p2, %r8, 0; wgmma.fence.sync.aligned;"
    for step in range(steps):
        body += f"ld.global.u64 %rd2, [%x+{16 + 16 * step}];"
        body += f"ld.global.u64 %rd3, [%x+{24 + 16 * step}];"
        if a_in_registers:
            body += "add.s64 %rd4, %x, %rd9;"
            for r in range(4):
                body += f"ld.global.u32 %r{4 + r}, [%rd4+{65536 + 2048 * step + 512 * r}];"
            body += "wgmma.fence.sync.aligned;"
        body += f"wgmma.mma_async.sync.aligned.{shape} {{{d}}}, {a}, %rd3, %p2{tail};"
        body += "wgmma.commit_group.sync.aligned;"
        if a_in_registers:
            body += "wgmma.wait_group.sync.aligned 0;"
    body += "wgmma.wait_group.sync.aligned 0;"
    for i in range(count):
        body += f"st.global.u32 [%rd8+{512 * i}], %r{i + 20};"
    return body


def fragment_of_a(a: np.ndarray) -> np.ndarray:
    """[64, 32 bytes] -> words [4 registers, 128 threads]."""
    words = np.ascontiguousarray(a).view(np.uint32).reshape(64, 8)
    out = np.zeros((4, 128), np.uint32)
    for t in range(128):
        warp, lane = divmod(t, 32)
        for r in range(4):
            out[r, t] = words[16 * warp + lane // 4 + 8 * (r % 2), r // 2 * 4 + lane % 4]
    return out


def multiply(
    name: str, n: int, *, acc: str = "f32", swizzle_a: int = 128, swizzle_b: int = 128,
    transpose_a: bool = False, transpose_b: bool = False, a_in_registers: bool = False,
    scale_d: bool = True, negate: tuple[int, int] = (1, 1), b_name: str = "", steps: int = 2,
    satfinite: bool = False, large: bool = False, seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """D of the emulator, D in float64, and the sum of the magnitudes of what was added.

    fp8: D as the tensor core has it, and 0.
    """
    b_name = b_name or name
    rng = np.random.default_rng(n + seed)
    size = np.dtype(DTYPES[name]).itemsize
    k = K_BYTES // size
    a, b = random(rng, name, 64, steps * k), random(rng, b_name, n, steps * k)
    image_a, at_a = place(a, swizzle_a, transpose_a, 0)
    start_b = -(-len(image_a) // 1024) * 1024
    image_b, at_b = place(b, swizzle_b, transpose_b, start_b)
    image = image_a.ljust(start_b, b"\0") + image_b

    def advance(bits: int, swizzle: int, transposed: bool, rows: int) -> int:
        span = swizzle or 16
        if transposed:  # 16 further k: two groups of 8 rows
            step = 2 * 8 * span
        else:  # 32 bytes further along k
            atom = rows * span
            step = 2 * atom if not swizzle else 32 if span > 32 else atom
        return bits + (step >> 4)

    x = np.zeros(65536 + 2048 * steps, np.uint8)
    header = x.view(np.uint32)
    header[:2] = len(image) // 16, scale_d
    for step in range(steps):
        x[16 + 16 * step : 32 + 16 * step].view(np.uint64)[:] = at_a, at_b
        if not transpose_a and swizzle_a > 32 and (step + 1) % (swizzle_a // 32) == 0:
            at_a += 64 * swizzle_a - swizzle_a + 32 >> 4  # the next atom
        else:
            at_a = advance(at_a, swizzle_a, transpose_a, 64)
        if not transpose_b and swizzle_b > 32 and (step + 1) % (swizzle_b // 32) == 0:
            at_b += n * swizzle_b - swizzle_b + 32 >> 4
        else:
            at_b = advance(at_b, swizzle_b, transpose_b, n)
        part = fragment_of_a(a[:, step * k : (step + 1) * k])
        x[65536 + 2048 * step : 65536 + 2048 * (step + 1)] = part.view(np.uint8).ravel()
    x[1024 : 1024 + len(image)] = np.frombuffer(image, np.uint8)

    count = n // 4 if acc == "f16" else n // 2
    if acc == "s32":
        c = rng.integers(-1000, 1000, (count, 128)).astype(np.int32)
        if large:
            c[:] = 2**31 - 5000
    else:
        c = rng.standard_normal((count, 128) + ((2,) if acc == "f16" else ()))
        c = c.astype(np.float16 if acc == "f16" else np.float32)
    y = c.copy()
    tail = ""
    if acc != "s32":
        tail = f", {negate[0]}, {negate[1]}"
        if size == 2:
            tail += "" if a_in_registers else f", {int(transpose_a)}"
            tail += f", {int(transpose_b)}"
    body = kernel_for(name, b_name, acc, n, steps, a_in_registers, tail, satfinite)
    launch(load(body, smem=160 << 10), x, y, 128, seed=seed)
    start = fragments_of_d(c, n).astype(np.float64) * scale_d
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    if not scale_d:  # each step starts anew
        wide_a, wide_b = wide_a[:, -k:], wide_b[:, -k:]
    if name in ("e4m3", "e5m2"):
        total, signed = start, negate[0] * negate[1] * wide_a
        for at in range(0, wide_a.shape[1], k):
            ks = slice(at, at + k)
            total = narrow_sum(signed[:, ks], wide_b[:, ks].T, total, name, b_name, acc)
        return fragments_of_d(y, n), total, np.zeros(())
    product = negate[0] * negate[1] * (wide_a @ wide_b.T)
    return fragments_of_d(y, n), start + product, np.abs(start) + np.abs(wide_a) @ np.abs(wide_b).T


def check(d: np.ndarray, expected: np.ndarray, magnitude: np.ndarray) -> None:
    eps = {np.dtype(np.float32): 2.0**-21, np.dtype(np.float16): 2.0**-10}[d.dtype]
    if magnitude.any():
        assert (np.abs(d - expected) <= eps * magnitude).all()
    else:
        np.testing.assert_array_equal(d, expected)


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32", "e4m3", "e5m2", "s8", "u8"])
@pytest.mark.parametrize("n", [8, 64, 256])
def test_types_and_widths(name: str, n: int) -> None:
    acc = "s32" if name in ("s8", "u8") else "f32"
    d, expected, magnitude = multiply(name, n, acc=acc)
    if acc == "s32":
        assert np.array_equal(d, expected)
    else:
        check(d, expected, magnitude)


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("options", [{}, {"transpose_b": True}, {"a_in_registers": True}], ids=str)
def test_sums_are_truncated_once(name: str, options: dict[str, bool]) -> None:
    """To the bit: the products of a step and the accumulator, added exactly, cut to fp32."""
    if name == "tf32" and "transpose_b" in options:
        pytest.skip("tf32 is k-major")
    d, expected, magnitude = multiply(name, 40, steps=1, **options)
    assert magnitude.all()
    rounded = expected.astype(np.float32)
    assert (d != rounded).any()
    np.testing.assert_array_equal(d, cut(expected))  # float64 has the bits of all these sums


@pytest.mark.parametrize("n", [24, 40, 136, 248])
def test_odd_widths(n: int) -> None:
    check(*multiply("bf16", n))


@pytest.mark.parametrize("swizzle_a", [0, 32, 64, 128])
@pytest.mark.parametrize("swizzle_b", [0, 32, 64, 128])
@pytest.mark.parametrize("transpose", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_layouts(swizzle_a: int, swizzle_b: int, transpose: tuple[int, int]) -> None:
    check(
        *multiply(
            "f16", 64, swizzle_a=swizzle_a, swizzle_b=swizzle_b, steps=4,
            transpose_a=bool(transpose[0]), transpose_b=bool(transpose[1]),
        )
    )  # fmt: skip


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("name", ["tf32", "e4m3", "s8"])
def test_layouts_of_other_types(name: str, swizzle: int) -> None:
    acc = "s32" if name == "s8" else "f32"
    result = multiply(name, 32, acc=acc, swizzle_a=swizzle, swizzle_b=swizzle, steps=5)
    if acc == "s32":
        assert np.array_equal(result[0], result[1])
    else:
        check(*result)


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32", "e4m3", "s8"])
def test_a_in_registers(name: str) -> None:
    acc = "s32" if name == "s8" else "f32"
    d, expected, magnitude = multiply(name, 64, acc=acc, a_in_registers=True)
    if acc == "s32":
        assert np.array_equal(d, expected)
    else:
        check(d, expected, magnitude)
    if name in ("bf16", "f16"):
        check(*multiply(name, 64, a_in_registers=True, transpose_b=True))


@pytest.mark.parametrize("negate", [(1, -1), (-1, 1), (-1, -1)])
def test_scales(negate: tuple[int, int]) -> None:
    check(*multiply("bf16", 64, negate=negate))
    check(*multiply("e4m3", 64, negate=negate, b_name="e5m2"))
    check(*multiply("tf32", 64, scale_d=False, negate=negate))


@pytest.mark.parametrize("name", ["f16", "e4m3"])
def test_f16_sums(name: str) -> None:
    d, expected, magnitude = multiply(name, 64, acc="f16", steps=1)
    assert d.dtype == np.float16
    check(d, expected, magnitude)


def test_integer_sums_wrap_or_saturate() -> None:
    for satfinite in (False, True):
        d, expected, _ = multiply("s8", 64, acc="s32", steps=1, large=True, satfinite=satfinite)
        limit = 2**31
        assert (expected >= limit).any()
        if satfinite:
            assert np.array_equal(d, np.minimum(expected, limit - 1))
        else:
            assert np.array_equal(d, (expected + limit) % 2**32 - limit)
    assert np.array_equal(*multiply("u8", 32, acc="s32", b_name="s8")[:2])


@pytest.mark.parametrize("steps", [1, 2])
def test_instructions_between_mmas_are_counted(steps: int) -> None:
    """A from registers is loaded with nothing under way: per step and warp, 8 instructions and the
    wgmma itself, but not before the first one. The end is the second wait_group, 4 stores, ret."""
    image, at = place(np.zeros((8, 16), BF16), 32, False, 0)
    x, y = np.zeros(65536 + 2048 * steps, np.uint8), np.zeros((4, 128), np.float32)
    x.view(np.uint32)[0] = len(image) // 16
    for step in range(steps):
        x.view(np.uint64)[2 + 2 * step : 4 + 2 * step] = at
    counters = launch(
        load(kernel_for("bf16", "bf16", "f32", 8, steps, True, ", 1, 1, 0")), x, y, 128
    )
    assert counters.between_mmas == 4 * (6 + 9 * (steps - 1))
