"""The emulator's number formats and tensor-core instructions against independent statements.

Conversions: every value of the 8- and 16-bit formats, and values at and around every rounding
boundary, against torch, numpy and ml_dtypes and against a search in the sorted list of a format's
values. Fragments: the figures of the PTX ISA ("Matrix Fragments for mma...") written out in numpy,
one formula per instruction shape.

The C++ functions are pure, so they are called through a small library of their own; that the
emulator hands them the right operands is checked with one PTX kernel per instruction.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import pytest
import torch

from tests.emulator import Emulator
from tests.emulator.build import SOURCES, objects_of
from tests.fp8_sums import fp8_mma_sync, hard_values
from tests.hopper_snippets import launch, load

SHIM = r"""
#include "convert.h"
#include "mma.h"
using namespace emu;
namespace {
const FloatFormat kFormats[] = {kF16, kBF16, kTF32, kE4M3, kE5M2};
}
extern "C" {
void encode_all(int format, int mode, int satfinite, int n, const double* in, uint32_t* out) {
    for (int i = 0; i < n; ++i)
        out[i] = encode(kFormats[format], in[i], static_cast<Round>(mode), satfinite);
}
void round_integers(int format, int mode, int n, const int64_t* in, uint32_t* out) {
    for (int i = 0; i < n; ++i) {
        const uint64_t magnitude = in[i] < 0 ? -static_cast<uint64_t>(in[i]) : in[i];
        out[i] = round_to(kFormats[format], in[i] < 0, magnitude, 0, static_cast<Round>(mode));
    }
}
void decode_all(int format, int n, const uint32_t* in, double* out) {
    for (int i = 0; i < n; ++i) out[i] = decode(kFormats[format], in[i]);
}
void widen_all(int format, int n, const uint32_t* in, float* out) {
    for (int i = 0; i < n; ++i)
        out[i] = format == 0   ? f16_to_f32(in[i])
                 : format == 1 ? bf16_to_f32(in[i])
                 : format == 3 ? e4m3_to_f32(in[i])
                               : e5m2_to_f32(in[i]);
}
void narrow_all(int format, int n, const float* in, uint32_t* out) {
    for (int i = 0; i < n; ++i) out[i] = format == 0 ? f32_to_f16(in[i]) : f32_to_bf16(in[i]);
}
int traits(const int* op, int* out) {
    const auto t = mma_traits({op[0], op[1], MmaType(op[2]), MmaType(op[3]), MmaType(op[4])});
    if (!t) return 0;
    out[0] = t->a_regs, out[1] = t->b_regs, out[2] = t->c_regs, out[3] = t->min_sm;
    return 1;
}
using Regs = uint32_t (*)[32];
void mma(const int* op, uint32_t* a, uint32_t* b, uint32_t* c, uint32_t* d) {
    mma_sync({op[0], op[1], MmaType(op[2]), MmaType(op[3]), MmaType(op[4]), op[5] != 0, op[6] != 0,
              op[7]},
             Regs(a), Regs(b), Regs(c), Regs(d));
}
void load_matrices(uint8_t** rows, int count, int trans, uint32_t* d) {
    ldmatrix(rows, count, trans, Regs(d));
}
void store_matrices(uint8_t** rows, int count, int trans, uint32_t* r) {
    stmatrix(rows, count, trans, Regs(r));
}
}
"""


@pytest.fixture(scope="session")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("mma")
    (folder / "shim.cpp").write_text(SHIM)
    sources = [folder / "shim.cpp", *objects_of("convert", "mma")]
    library = folder / "shim.so"
    flags = ["-std=c++20", "-O3", "-shared", "-fPIC", "-Wno-psabi", f"-I{SOURCES}"]
    subprocess.run(["g++", *flags, *map(str, sources), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


# --------------------------------------------------------------------------------------------------
# Conversions


@dataclass(frozen=True)
class Format:
    """A small float format and its values, as a package other than the emulator reads them."""

    index: int  # in the shim
    bits: int
    values: Callable[[np.ndarray], np.ndarray]  # encodings -> float64
    has_infinity: bool = True
    unused_bits: int = 0

    def encodings(self) -> np.ndarray:
        return np.arange(1 << self.bits, dtype=np.uint32) << self.unused_bits

    def finite(self) -> tuple[np.ndarray, np.ndarray]:
        """Magnitudes in ascending order and their encodings."""
        encodings = self.encodings()[: 1 << (self.bits - 1)]
        values = self.values(encodings)
        keep = np.isfinite(values)
        return values[keep], encodings[keep]


def quiet_float64(encodings: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return encodings.view(np.float32).astype(np.float64)


def torch_values(dtype: torch.dtype, raw: type) -> Callable[[np.ndarray], np.ndarray]:
    return lambda e: torch.from_numpy(e.astype(raw)).view(dtype).double().numpy()


FORMATS = {
    "f16": Format(0, 16, lambda e: e.astype(np.uint16).view(np.float16).astype(np.float64)),
    "bf16": Format(1, 16, torch_values(torch.bfloat16, np.int16)),
    "tf32": Format(2, 19, quiet_float64, unused_bits=13),
    "e4m3": Format(3, 8, torch_values(torch.float8_e4m3fn, np.int8), has_infinity=False),
    "e5m2": Format(4, 8, torch_values(torch.float8_e5m2, np.int8)),
}
MODES = {"rn": 0, "rna": 1, "rz": 2, "rm": 3, "rp": 4}
CANONICAL_NAN = {"f16": 0x7FFF, "bf16": 0x7FFF, "tf32": 0x7FFFFFFF, "e4m3": 0x7F, "e5m2": 0x7F}


def same_floats(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal bits, or NaN in both."""
    nan = np.isnan(a)
    return bool((nan == np.isnan(b)).all() and (a[~nan] == b[~nan]).all()
                and (np.signbit(a[~nan]) == np.signbit(b[~nan])).all())  # fmt: skip


def encode(
    lib: ctypes.CDLL, name: str, x: np.ndarray, mode: str = "rn", satfinite: bool = False
) -> np.ndarray:
    x, out = np.ascontiguousarray(x, np.float64), np.empty(x.size, np.uint32)
    lib.encode_all(FORMATS[name].index, MODES[mode], satfinite, x.size, pointer(x), pointer(out))
    return out


def boundary_values(name: str) -> np.ndarray:
    """Values at, halfway between and one float64 step off neighbours of a format (all of a small
    one, 5000 of a large one), beyond the largest, below the smallest, and random float32 bits."""
    rng = np.random.default_rng(7)
    values, _ = FORMATS[name].finite()
    if values.size > 5000:
        kept = rng.choice(values.size - 1, 5000, replace=False)
        kept = np.concatenate([kept, [0, 1, 2, values.size - 2]])
    else:
        kept = np.arange(values.size - 1)
    low, high = values[kept], values[kept + 1]
    largest, step = values[-1], values[-1] - values[-2]
    beyond = np.array([largest + step / 4, largest + step / 2, largest + step, largest * 4])
    exact = np.concatenate(
        [
            low,
            high,
            (low + high) / 2,
            beyond,
            [0.0, values[1] / 2, values[1] / 4, values[1] * 1e-30],
        ]
    )
    near = np.concatenate([exact, np.nextafter(exact, np.inf), np.nextafter(exact, 0)])
    patterns = rng.integers(0, 1 << 32, 20000, dtype=np.uint32).view(np.float32)
    patterns = patterns[np.isfinite(patterns)].astype(np.float64)
    return np.concatenate([near, -near, patterns])


def nearest_encodings(name: str, x: np.ndarray, mode: str, satfinite: bool) -> np.ndarray:
    """The rounding rules by search among the format's values, for finite x."""
    fmt = FORMATS[name]
    values, encodings = fmt.finite()
    magnitude, negative = np.abs(x), np.signbit(x)
    # One more value, a step above the largest, stands for overflow.
    grid = np.append(values, values[-1] + (values[-1] - values[-2]))
    below = np.clip(np.searchsorted(grid, magnitude, side="right") - 1, 0, grid.size - 2)
    exact = magnitude == grid[below]
    # Distances are exact in float64: operands are neighbours, or differ hugely.
    to_low, to_high = magnitude - grid[below], grid[below + 1] - magnitude
    if mode == "rn":
        up = (to_high < to_low) | ((to_high == to_low) & (below % 2 == 1))
    elif mode == "rna":
        up = to_high <= to_low
    elif mode == "rz":
        up = np.zeros_like(exact)
    else:
        up = ~exact & (negative == (mode == "rm"))
    index = below + up
    overflow = (magnitude >= grid[-1]) | (index == grid.size - 1)
    index = np.minimum(index, values.size - 1)
    result = encodings[index]
    towards_zero = {"rz": np.ones_like(exact), "rm": ~negative, "rp": negative}.get(
        mode, np.zeros_like(exact)
    )
    if fmt.has_infinity and not satfinite:
        infinity = encodings[-1] + (1 << fmt.unused_bits)
        result = np.where(overflow & ~towards_zero, infinity, result)
    return result | (negative.astype(np.uint32) << (fmt.bits - 1 + fmt.unused_bits))


@pytest.mark.parametrize("name", FORMATS)
def test_decode_gives_every_value(lib: ctypes.CDLL, name: str) -> None:
    encodings = FORMATS[name].encodings()
    out = np.empty(encodings.size, np.float64)
    lib.decode_all(FORMATS[name].index, encodings.size, pointer(encodings), pointer(out))
    assert same_floats(out, FORMATS[name].values(encodings))


@pytest.mark.parametrize("name", ["f16", "bf16", "e4m3", "e5m2"])
def test_widening_gives_every_value(lib: ctypes.CDLL, name: str) -> None:
    encodings = FORMATS[name].encodings()
    out = np.empty(encodings.size, np.float32)
    lib.widen_all(FORMATS[name].index, encodings.size, pointer(encodings), pointer(out))
    assert same_floats(quiet_float64(out), FORMATS[name].values(encodings))


@pytest.mark.parametrize("satfinite", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMATS)
def test_encode_rounds_by_the_rules(
    lib: ctypes.CDLL, name: str, mode: str, satfinite: bool
) -> None:
    x = boundary_values(name)
    expected = nearest_encodings(name, x, mode, satfinite)
    np.testing.assert_array_equal(encode(lib, name, x, mode, satfinite), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_encode_of_special_values(lib: ctypes.CDLL, name: str) -> None:
    fmt, special = FORMATS[name], np.array([np.nan, np.inf, -np.inf, 0.0, -0.0])
    sign = np.uint32(1 << (fmt.bits - 1 + fmt.unused_bits))
    largest = fmt.finite()[1][-1]
    infinity = (
        largest + (1 << fmt.unused_bits) if fmt.has_infinity else np.uint32(CANONICAL_NAN[name])
    )
    negative_infinity = infinity | sign if fmt.has_infinity else infinity
    nan = CANONICAL_NAN[name]
    for mode in MODES:
        plain, clamped = encode(lib, name, special, mode), encode(lib, name, special, mode, True)
        assert plain.tolist() == [nan, infinity, negative_infinity, 0, sign]
        assert clamped.tolist() == [nan, largest, largest | sign, 0, sign]


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_fast_narrowing_equals_numpy_and_torch(lib: ctypes.CDLL, name: str) -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 1 << 32, 1_000_000, dtype=np.uint32)
    special = np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 65519.996, 65520.0])
    with np.errstate(over="ignore"):
        boundaries = boundary_values(name).astype(np.float32)
    x = np.concatenate([bits.view(np.float32), boundaries, special])
    out = np.empty(x.size, np.uint32)
    lib.narrow_all(FORMATS[name].index, x.size, pointer(x), pointer(out))
    with np.errstate(over="ignore", invalid="ignore"):
        by_numpy = x.astype(np.float16 if name == "f16" else ml_dtypes.bfloat16)
    dtype = torch.float16 if name == "f16" else torch.bfloat16
    by_torch = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(x)
    assert (out[nan] == CANONICAL_NAN[name]).all()
    np.testing.assert_array_equal(out[~nan], by_numpy.view(np.uint16)[~nan])
    np.testing.assert_array_equal(out[~nan], by_torch[~nan])


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3", ml_dtypes.float8_e4m3fn), ("e5m2", ml_dtypes.float8_e5m2)]
)
def test_fp8_equals_ml_dtypes_in_range(lib: ctypes.CDLL, name: str, dtype: type) -> None:
    x = boundary_values(name).astype(np.float32)
    x = x[np.abs(x) <= FORMATS[name].finite()[0][-1]]
    expected = x.astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(encode(lib, name, x, satfinite=True), expected)


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_integers_round_once(lib: ctypes.CDLL, name: str) -> None:
    """A 64-bit integer has more bits than a double: going through one would round twice."""
    tie = (1 << 62) + (1 << 54)  # half a unit of bf16 above 2^62
    x = np.array(
        [0, 1, -1, 2049, -2051, 65519, -65520, tie, tie + 1, tie - 1, -tie - 1, -(1 << 63)]
    )
    out = np.empty(x.size, np.uint32)
    lib.round_integers(FORMATS[name].index, MODES["rn"], x.size, pointer(x), pointer(out))
    if name == "bf16":
        assert out[7:11].tolist() == [0x5E80, 0x5E81, 0x5E80, 0xDE81]
        assert out[11] == 0xDF00
    else:
        with np.errstate(over="ignore"):
            expected = x[:7].astype(np.float16).view(np.uint16)
        np.testing.assert_array_equal(out[:7], expected)
        assert out[7:].tolist() == [0x7C00] * 3 + [0xFC00] * 2


# --------------------------------------------------------------------------------------------------
# Fragments: where lane l = 4 * group + t holds element i, as the PTX ISA's figures have it

LANE = np.arange(32)
GROUP, T = LANE // 4, LANE % 4

# name: (m, k, (row, col) of A's element i, row of B's element i); B's column is GROUP.
Where = Callable[[int], np.ndarray]
LAYOUTS: dict[str, tuple[int, int, Callable[[int], tuple[np.ndarray, np.ndarray]], Where]] = {
    # 16-bit elements
    "m16n8k8-16": (16, 8, lambda i: (GROUP + 8 * (i >= 2), T * 2 + (i & 1)), lambda i: T * 2 + i),
    "m16n8k16-16": (
        16, 16,
        lambda i: (GROUP + 8 * (i not in (0, 1, 4, 5)), T * 2 + (i & 1) + 8 * (i >= 4)),
        lambda i: T * 2 + (i & 1) + 8 * (i >= 2),
    ),
    # 32-bit elements (tf32)
    "m16n8k4-32": (16, 4, lambda i: (GROUP + 8 * (i == 1), T), lambda i: T),
    "m16n8k8-32": (
        16, 8, lambda i: (GROUP + 8 * (i in (1, 3)), T + 4 * (i >= 2)), lambda i: T + 4 * i
    ),
    # 64-bit elements
    "m8n8k4-64": (8, 4, lambda i: (GROUP, T), lambda i: T),
    "m16n8k4-64": (16, 4, lambda i: (GROUP + 8 * (i == 1), T), lambda i: T),
    "m16n8k8-64": (
        16, 8, lambda i: (GROUP + 8 * (i in (1, 3)), T + 4 * (i >= 2)), lambda i: T + 4 * i
    ),
    "m16n8k16-64": (
        16, 16, lambda i: (GROUP + 8 * (i % 2), (i // 2) * 4 + T), lambda i: T + 4 * i
    ),
    # 8-bit elements
    "m8n8k16-8": (8, 16, lambda i: (GROUP, T * 4 + i), lambda i: T * 4 + i),
    "m16n8k16-8": (16, 16, lambda i: (GROUP + 8 * (i >= 4), T * 4 + (i & 3)), lambda i: T * 4 + i),
    "m16n8k32-8": (
        16, 32,
        lambda i: (GROUP + 8 * (i // 4 in (1, 3)), T * 4 + (i & 3) + 16 * (i >= 8)),
        lambda i: T * 4 + (i & 3) + 16 * (i >= 4),
    ),
    # 4-bit elements
    "m8n8k32-4": (8, 32, lambda i: (GROUP, T * 8 + i), lambda i: T * 8 + i),
    "m16n8k32-4": (16, 32, lambda i: (GROUP + 8 * (i >= 8), T * 8 + (i & 7)), lambda i: T * 8 + i),
    "m16n8k64-4": (
        16, 64,
        lambda i: (GROUP + 8 * (i // 8 in (1, 3)), T * 8 + (i & 7) + 32 * (i >= 16)),
        lambda i: T * 8 + (i & 7) + 32 * (i >= 8),
    ),
    # 1-bit elements
    "m8n8k128-1": (8, 128, lambda i: (GROUP, T * 32 + i), lambda i: T * 32 + i),
    "m16n8k128-1": (
        16, 128, lambda i: (GROUP + 8 * (i >= 32), T * 32 + (i & 31)), lambda i: T * 32 + i
    ),
    "m16n8k256-1": (
        16, 256,
        lambda i: (GROUP + 8 * (i // 32 in (1, 3)), T * 32 + (i & 31) + 128 * (i >= 64)),
        lambda i: T * 32 + (i & 31) + 128 * (i >= 32),
    ),
}  # fmt: skip


def where_acc(m: int, i: int) -> tuple[np.ndarray, np.ndarray]:
    """C and D: elements 0, 1 are in row GROUP, 2 and 3 in row GROUP + 8."""
    assert i < m // 4
    return GROUP + 8 * (i >= 2), T * 2 + (i & 1)


TYPES = ["f16", "bf16", "tf32", "f64", "e4m3", "e5m2", "s8", "u8", "s4", "u4", "b1", "f32", "s32"]
BITS = dict(zip(TYPES, [16, 16, 32, 64, 8, 8, 8, 8, 4, 4, 1, 32, 32], strict=True))
FLOAT_DTYPES = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "f32": np.float32,
    "f64": np.float64,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def to_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Encodings, as uint64."""
    if name in FLOAT_DTYPES:
        raw = values.astype(FLOAT_DTYPES[name])
        return raw.view(f"u{raw.dtype.itemsize}").astype(np.uint64)
    return values.astype(np.int64).astype(np.uint64) & np.uint64((1 << BITS[name]) - 1)


def from_bits(bits: np.ndarray, name: str) -> np.ndarray:
    """Values, as float64."""
    if name in FLOAT_DTYPES:
        dtype = np.dtype(FLOAT_DTYPES[name])
        return bits.astype(f"u{dtype.itemsize}").view(dtype).astype(np.float64)
    return bits.astype(np.uint32).view(np.int32).astype(np.float64)  # s32


def pack(elements: list[np.ndarray], bits: int) -> np.ndarray:
    """Elements of each lane, in order, into rows of 32 x 32 bits, from the low bits up."""
    regs = np.zeros((max(1, len(elements) * bits // 32), 32), np.uint32)
    for i, element in enumerate(elements):
        for part in range(max(1, bits // 32)):
            word, shift = divmod(i * bits + 32 * part, 32)
            piece = (element >> np.uint64(32 * part)) & np.uint64(0xFFFFFFFF)
            regs[word] |= (piece << np.uint64(shift)).astype(np.uint32)
    return regs


def unpack(regs: np.ndarray, bits: int) -> list[np.ndarray]:
    if bits == 64:
        return [
            regs[i] | regs[i + 1].astype(np.uint64) << np.uint64(32) for i in range(0, len(regs), 2)
        ]
    mask = np.uint64((1 << bits) - 1)
    return [
        (reg.astype(np.uint64) >> np.uint64(shift)) & mask
        for reg in regs
        for shift in range(0, 32, bits)
    ]


@dataclass(frozen=True)
class Op:
    m: int
    k: int
    a: str
    b: str
    acc: str
    satfinite: bool = False
    and_popc: bool = False
    capability: int = 80  # of the device, whose sums it takes

    @property
    def layout(self) -> str:
        return f"m{self.m}n8k{self.k}-{BITS[self.a]}"

    @property
    def min_sm(self) -> int:
        """Lowest compute capability, as the PTX ISA has it."""
        if self.a in ("e4m3", "e5m2"):
            return 89
        return 90 if self.a == "f64" and self.m == 16 else 80

    def codes(self) -> ctypes.Array[ctypes.c_int]:
        types = [TYPES.index(t) for t in (self.a, self.b, self.acc)]
        flags = (self.satfinite, self.and_popc, self.capability)
        return (ctypes.c_int * 8)(self.m, self.k, *types, *flags)

    def __str__(self) -> str:
        return f"m{self.m}n8k{self.k}.{self.acc}.{self.a}.{self.b}"


# (op, registers of A, B and C) -> registers of D
Execute = Callable[[Op, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def run_mma(execute: Execute, op: Op, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """D of one instruction on whole matrices a[m, k], b[k, 8], c[m, 8]; the ISA's figures say which
    lane gets what."""
    m, k, where_a, where_b = LAYOUTS[op.layout]
    a_bits, b_bits, c_bits = to_bits(a, op.a), to_bits(b, op.b), to_bits(c, op.acc)
    d_regs = execute(
        op,
        pack([a_bits[where_a(i)] for i in range(m * k // 32)], BITS[op.a]),
        pack([b_bits[where_b(i), GROUP] for i in range(k * 8 // 32)], BITS[op.b]),
        pack([c_bits[where_acc(m, i)] for i in range(m // 4)], BITS[op.acc]),
    )
    d = np.empty((m, 8))
    for i, element in enumerate(unpack(d_regs, BITS[op.acc])):
        d[where_acc(m, i)] = from_bits(element, op.acc)
    return d


@pytest.fixture(scope="session")
def direct(lib: ctypes.CDLL) -> Execute:
    """mma_sync itself, with D in place of C, as compilers like to have it."""

    def execute(op: Op, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        counts, d = (ctypes.c_int * 4)(), c.copy()
        assert lib.traits(op.codes(), counts) == 1
        assert [len(a), len(b), len(c)] == list(counts)[:3]
        lib.mma(op.codes(), pointer(a), pointer(b), pointer(d), pointer(d))
        return d

    return execute


def execute_ptx(op: Op, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A kernel of one warp that loads the registers, executes the instruction and stores D."""
    words = 2 if op.a == "f64" else 1  # of 32 bits in a PTX register
    in_type = ".f64" if op.a == "f64" else ".b32"
    acc_type = {"f32": ".f32", "f64": ".f64"}.get(op.acc, ".b32")
    counts = {"a": len(a) // words, "b": len(b) // words, "c": len(c) // words}
    counts["d"] = counts["c"]
    types = {"a": in_type, "b": in_type, "c": acc_type, "d": acc_type}

    def move(name: str, instruction: str) -> list[str]:
        """Register r of this lane from or to element r * 32 + lane of parameter `name`."""
        address = f"ld.param.u64 %base, [p_{name}]; add.u64 %base, %base, %offset;"
        rows = range(counts[name])
        return [address, *(instruction.format(r=r, byte=128 * words * r) for r in rows)]

    lines = [f".reg {types[name]} %{name}<{counts[name]}>;" for name in "abcd"]
    for name in "abc":
        lines += move(name, f"ld.global{types[name]} %{name}{{r}}, [%base + {{byte}}];")
    suffix = "" if op.a != "b1" else ".and.popc" if op.and_popc else ".xor.popc"
    regs = ["{" + ", ".join(f"%{name}{r}" for r in range(counts[name])) + "}" for name in "dabc"]
    lines.append(
        f"mma.sync.aligned.m{op.m}n8k{op.k}.row.col.{op.acc}.{op.a}.{op.b}.{op.acc}{suffix} "
        f"{', '.join(regs)};"
    )
    lines += move("d", f"st.global{acc_type} [%base + {{byte}}], %d{{r}};")
    body = "\n".join(lines)
    ptx = f""".version 8.7
.target sm_{op.min_sm}
.address_size 64
.visible .entry one_mma({", ".join(f".param .u64 p_{name}" for name in "abcd")})
{{
.reg .u64 %base, %offset;
.reg .u32 %lane;
mov.u32 %lane, %tid.x;
mul.wide.u32 %offset, %lane, {4 * words};
{body}
ret;
}}
"""
    # A lane's f64 is in one place in memory; in rows of 32 x 32 bits its halves are two rows.
    in_memory = [r.reshape(-1, words, 32).transpose(0, 2, 1).copy() for r in (a, b, c)]
    result = np.zeros_like(in_memory[2])
    kernel = Emulator(f"sm_{op.min_sm}").load(ptx).kernel("one_mma")
    kernel.launch((1,), (32,), [*in_memory, result])
    return result.transpose(0, 2, 1).reshape(c.shape).copy()


def all_ops() -> list[Op]:
    """Every instruction of sm_80, sm_89 and sm_90 in the PTX ISA (sm_70's m8n8k4 .f16 left out)."""
    fp8, int8, int4 = ("e4m3", "e5m2"), ("s8", "u8"), ("s4", "u4")
    ops = [Op(16, k, "f16", "f16", acc) for k in (8, 16) for acc in ("f16", "f32")]
    ops += [Op(16, k, "bf16", "bf16", "f32") for k in (8, 16)]
    ops += [Op(16, k, "tf32", "tf32", "f32") for k in (4, 8)]
    ops += [
        Op(16, k, a, b, acc) for k in (16, 32) for a in fp8 for b in fp8 for acc in ("f16", "f32")
    ]
    ops += [
        Op(m, k, a, b, "s32") for m, k in ((8, 16), (16, 16), (16, 32)) for a in int8 for b in int8
    ]
    ops += [
        Op(m, k, a, b, "s32") for m, k in ((8, 32), (16, 32), (16, 64)) for a in int4 for b in int4
    ]
    ops += [Op(m, k, "b1", "b1", "s32") for m, k in ((8, 128), (16, 128), (16, 256))]
    ops += [Op(m, k, "f64", "f64", "f64") for m, k in ((8, 4), (16, 4), (16, 8), (16, 16))]
    return ops


INTEGER_RANGES = {"s8": (-128, 128), "u8": (0, 256), "s4": (-8, 8), "u4": (0, 16), "b1": (0, 2)}


def exact_inputs(op: Op, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Small integers: every partial sum is exact, so D has one right answer whatever the order."""
    a = rng.integers(*INTEGER_RANGES.get(op.a, (-4, 5)), (op.m, op.k)).astype(np.float64)
    b = rng.integers(*INTEGER_RANGES.get(op.b, (-4, 5)), (op.k, 8)).astype(np.float64)
    return a, b, rng.integers(-100, 100, (op.m, 8)).astype(np.float64)


def check_exact_sums(execute: Execute, op: Op, draws: int) -> None:
    rng = np.random.default_rng(11)
    for _ in range(draws):
        a, b, c = exact_inputs(op, rng)
        if op.a == "b1":
            differing = a @ (1 - b) + (1 - a) @ b
            np.testing.assert_array_equal(run_mma(execute, op, a, b, c), differing + c)
            both = replace(op, and_popc=True)
            np.testing.assert_array_equal(run_mma(execute, both, a, b, c), a @ b + c)
        else:
            np.testing.assert_array_equal(run_mma(execute, op, a, b, c), a @ b + c)


@pytest.mark.parametrize("op", all_ops(), ids=str)
def test_mma_layout_and_exact_sums(direct: Execute, op: Op) -> None:
    check_exact_sums(direct, op, draws=3)


@pytest.mark.parametrize("op", all_ops(), ids=str)
def test_mma_in_ptx(op: Op) -> None:
    check_exact_sums(execute_ptx, op, draws=1)


def test_mma_traits_know_every_instruction_and_no_other(lib: ctypes.CDLL) -> None:
    legal, counts = {(o.m, o.k, o.a, o.b, o.acc) for o in all_ops()}, (ctypes.c_int * 4)()
    for m in (8, 16, 32):
        for k in (2, 4, 8, 16, 32, 64, 128, 256, 512):
            for a in TYPES:
                for b in TYPES:
                    for acc in ("f16", "f32", "f64", "s32"):
                        known = lib.traits(Op(m, k, a, b, acc).codes(), counts) == 1
                        assert known == ((m, k, a, b, acc) in legal), (m, k, a, b, acc)


@pytest.mark.parametrize("op", all_ops(), ids=str)
def test_mma_traits_name_the_lowest_capability(lib: ctypes.CDLL, op: Op) -> None:
    counts = (ctypes.c_int * 4)()
    lib.traits(op.codes(), counts)
    assert counts[3] == op.min_sm


@pytest.mark.parametrize(
    "op",
    [o for o in all_ops() if o.acc == "f32" and BITS[o.a] > 8],
    ids=str,
)
@pytest.mark.parametrize("capability", [80, 89, 90, 100])
def test_mma_sums_a_block_at_once_and_truncates(direct: Execute, op: Op, capability: int) -> None:
    """Random values over many binades, in integer arithmetic: a block's sum is exact, then cut."""
    op = replace(op, capability=capability)
    rng = np.random.default_rng(5)

    def draw(shape: tuple[int, int], name: str) -> np.ndarray:
        x = rng.standard_normal(shape) * 2.0 ** rng.integers(-3, 3, shape)
        dtype = FLOAT_DTYPES[name]
        x = x.astype(dtype).astype(np.float64)
        return from_bits(to_bits(x, name) & np.uint64(0xFFFFE000), name) if name == "tf32" else x

    a, b = draw((op.m, op.k), op.a), draw((op.k, 8), op.b)
    c = draw((op.m, 8), "f32")
    per_block = (128 if capability < 90 else 256) // BITS[op.a]
    expected = c.copy()
    for start in range(0, op.k, per_block):
        ks = slice(start, start + per_block)
        exact = np.empty_like(expected, dtype=object)
        for i, j in np.ndindex(op.m, 8):
            products = (a[i, ks] * b[ks, j]).tolist()  # exact in float64
            exact[i, j] = sum(map(exact_integer, [*products, expected[i, j]]))
        expected = np.vectorize(truncated, otypes=[np.float64])(exact)
    np.testing.assert_array_equal(run_mma(direct, op, a, b, c), expected)


UNIT_EXPONENT = 120  # exact_integer counts in units of 2^-120


def exact_integer(x: float) -> int:
    numerator, denominator = float(x).as_integer_ratio()
    return numerator * (1 << UNIT_EXPONENT) // denominator


def truncated(total: int) -> float:
    """Towards zero to 24 significant bits."""
    cut = max(0, abs(total).bit_length() - 24)
    magnitude = abs(total) >> cut << cut
    return float(magnitude) / float(1 << UNIT_EXPONENT) * (1 if total >= 0 else -1)


@pytest.mark.parametrize("op", [o for o in all_ops() if BITS[o.a] == 8 and o.acc != "s32"], ids=str)
@pytest.mark.parametrize("capability", [89, 90, 100])
def test_mma_of_fp8(direct: Execute, op: Op, capability: int) -> None:
    op = replace(op, capability=capability)
    rng = np.random.default_rng(6)

    def draw(name: str, shape: tuple[int, int], special: bool) -> np.ndarray:
        magnitudes = FORMATS[name].finite()[0]
        return hard_values(rng, shape, np.concatenate([-magnitudes[:0:-1], magnitudes]), special)

    for i in range(8):
        a, b = draw(op.a, (16, op.k), i > 4), draw(op.b, (op.k, 8), i > 4)
        c = rng.standard_normal((16, 8)) * 2.0 ** rng.integers(-20, 14, (16, 8))
        c[3], c[5, 2] = 0, np.inf if i > 4 else 60000.0
        a[7] = 0  # such a row has C alone, with the sums' bits
        c = from_bits(to_bits(c, op.acc), op.acc)
        expected = fp8_mma_sync(a, b, c, op.a, op.b, op.acc, capability)
        np.testing.assert_array_equal(run_mma(direct, op, a, b, c), expected)


def test_mma_of_fp8_drops_low_bits(direct: Execute) -> None:
    """Sixteen products of 2^-14 are lost beside 1 on sm_89, each of them; of 2^-13 none is."""
    a, one = np.zeros((16, 16)), np.ones((16, 8))
    for exponent, capability, total in [(-14, 89, 1), (-13, 89, 1 + 2**-9), (-14, 90, 1 + 2**-10)]:
        op = Op(16, 16, "e5m2", "e5m2", "f32", capability=capability)
        a[:] = 2.0 ** (exponent + 7)
        assert (run_mma(direct, op, a, np.full((16, 8), 2.0**-7), one) == total).all()


def test_mma_truncates_towards_zero(direct: Execute) -> None:
    """1 - 2^-30 is below 1 for a truncating adder and 1 for a rounding one."""
    op = Op(16, 8, "bf16", "bf16", "f32")
    a, b = np.zeros((16, 8)), np.zeros((8, 8))
    a[:, 0], b[0] = -(2.0**-15), 2.0**-15
    assert (run_mma(direct, op, a, b, np.ones((16, 8))) == 1 - 2.0**-24).all()
    assert (run_mma(direct, op, -a, b, np.ones((16, 8))) == 1).all()


def test_mma_rounds_f16_accumulators_to_nearest(direct: Execute) -> None:
    op = Op(16, 8, "f16", "f16", "f16")
    a, b = np.zeros((16, 8)), np.zeros((8, 8))
    a[:, 0], b[0] = 1.0, [1.0, 1.5, 3.0, -1.0, 2.0**-14, 0.5, 2.5, 1.25]
    c = np.full((16, 8), 2048.0)  # halves are 2 apart from here on, 1 below
    expected = (2048.0 + b[0]).astype(np.float16).astype(np.float64)
    assert (run_mma(direct, op, a, b, c) == expected).all()


def test_mma_ignores_the_low_bits_of_tf32(direct: Execute) -> None:
    op = Op(16, 8, "tf32", "tf32", "f32")
    rng = np.random.default_rng(2)
    a, b, c = (rng.standard_normal(s).astype(np.float32) for s in ((16, 8), (8, 8), (16, 8)))
    cut = [(x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32) for x in (a, b)]
    np.testing.assert_array_equal(run_mma(direct, op, a, b, c), run_mma(direct, op, *cut, c))
    assert (a != cut[0]).any()


def test_mma_carries_infinity_and_nan(direct: Execute) -> None:
    for name in ("f16", "bf16", "tf32", "e5m2"):
        op = Op(16, 128 // BITS[name], name, name, "f32")
        a, b = np.ones((16, op.k)), np.ones((op.k, 8))
        a[3, 1], a[5, 2], b[2, 6] = np.inf, np.nan, -np.inf
        d = run_mma(direct, op, a, b, np.zeros((16, 8)))
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(d, a @ b)


def test_mma_overflow_of_integer_sums(direct: Execute) -> None:
    a, b = np.full((16, 32), 127.0), np.full((32, 8), 127.0)
    largest, smallest = 2.0**31 - 1, -(2.0**31)
    total = 32 * 127 * 127
    for sign, limit in ((1, largest), (-1, smallest)):
        c = np.full((16, 8), limit)
        wrapping = run_mma(direct, Op(16, 32, "s8", "s8", "s32"), sign * a, b, c)
        clamping = run_mma(direct, Op(16, 32, "s8", "s8", "s32", satfinite=True), sign * a, b, c)
        assert (wrapping == limit + sign * (total - 2.0**32)).all()
        assert (clamping == limit).all()


# --------------------------------------------------------------------------------------------------
# ldmatrix, stmatrix


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(lib: ctypes.CDLL, count: int, trans: bool) -> None:
    """Rows lie anywhere; lane 8 * i + r gives the address of row r of matrix i."""
    rng = np.random.default_rng(count)
    memory = rng.integers(0, 1 << 16, (64, 8), dtype=np.uint16)
    row_of_lane = rng.permutation(64)[:32]
    matrices = memory[row_of_lane].reshape(4, 8, 8)[:count]
    addresses = [memory.ctypes.data + 16 * int(r) for r in row_of_lane]
    rows = (ctypes.c_void_p * 32)(*addresses[: 8 * count])  # the other lanes' are null
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    expected = pack([m[GROUP, 2 * T + i].astype(np.uint64) for m in matrices for i in (0, 1)], 16)
    regs = np.zeros((count, 32), np.uint32)
    lib.load_matrices(rows, count, int(trans), pointer(regs))
    np.testing.assert_array_equal(regs, expected)

    before = memory.copy()
    memory[row_of_lane[: 8 * count]] = 0
    lib.store_matrices(rows, count, int(trans), pointer(regs))
    np.testing.assert_array_equal(memory, before)


def test_bytes_transposed_in_shared_memory() -> None:
    """16 x 16 bytes by the instructions of 16-bit elements, as kernels turn a V of fp8 around.

    Lanes get two k of two neighbouring columns; prmt sorts them by column. A word of the result
    has k = 2t, 2t+1, 8+2t, 9+2t of its column.
    """
    rng = np.random.default_rng(8)
    v = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    y = np.zeros((16, 16), np.uint8)
    body = """
        mul.wide.u32 %rd1, %tid, 8; add.s64 %rd1, %x, %rd1; ld.global.v2.u32 {%r1, %r2}, [%rd1];
        shl.b32 %r3, %tid, 3; add.u32 %r3, %r3, %s; st.shared.v2.u32 [%r3], {%r1, %r2};
        bar.warp.sync -1; and.b32 %r4, %lane, 15; shl.b32 %r4, %r4, 4; add.u32 %r4, %r4, %s;
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r5, %r6}, [%r4];
        prmt.b32 %r7, %r5, %r6, 0x6420; prmt.b32 %r8, %r5, %r6, 0x7531;
        and.b32 %r9, %lane, 7; shl.b32 %r9, %r9, 5; shl.b32 %r10, %lane, 1; and.b32 %r10, %r10, 16;
        add.u32 %r9, %r9, %r10; add.u32 %r9, %r9, %s; bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r9], {%r7, %r8}; bar.warp.sync -1;
        ld.shared.v2.u32 {%r1, %r2}, [%r3]; mul.wide.u32 %rd1, %tid, 8; add.s64 %rd1, %y, %rd1;
        st.global.v2.u32 [%rd1], {%r1, %r2};"""
    launch(load(body), v, y, threads=32)
    order = np.array([[2 * t, 2 * t + 1, 8 + 2 * t, 9 + 2 * t] for t in range(4)]).ravel()
    np.testing.assert_array_equal(y, v.T[:, order])
