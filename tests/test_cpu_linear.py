"""mk_cpu_linear: the bits that its header promises, by every instruction set, and nothing else."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import _native

Tensor = torch.Tensor

DTYPES = {
    torch.float32: _native.F32,
    torch.bfloat16: _native.BF16,
    torch.float16: _native.F16,
}
ISAS = {
    "baseline": _native.CPU_BASELINE,
    "avx2": _native.CPU_AVX2,
    "avx512": _native.CPU_AVX512,
    "avx512bf16": _native.CPU_AVX512BF16,
}
EPILOGUES = {
    "none": _native.EPILOGUE_NONE,
    "silu": _native.EPILOGUE_SILU,
    "mul": _native.EPILOGUE_MUL,
    "add": _native.EPILOGUE_ADD,
    "swiglu": _native.EPILOGUE_SWIGLU,
}


def available_isas() -> list[str]:
    found = []
    for name, level in ISAS.items():
        try:
            _native.cpu_linear(0, 0, 0, 0, 0, 0, 0, 0, 0, _native.F32, 1, isa=level)
            found.append(name)
        except NotImplementedError:
            pass
    return found


AVAILABLE = available_isas()
each_isa = pytest.mark.parametrize("isa", ISAS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def require(isa: str) -> int:
    if isa not in AVAILABLE:
        pytest.skip(f"this processor has no {isa}")
    return ISAS[isa]


def cpu_linear(
    x: Tensor,
    w: Tensor,
    *,
    epilogue: str = "none",
    other: Tensor | None = None,
    w_up: Tensor | None = None,
    out: Tensor | None = None,
    threads: int = 2,
    isa: int = _native.CPU_AUTO,
    out_dtype: int = 0,
) -> Tensor:
    if out is None:
        out = torch.full(
            (x.shape[0], w.shape[0]), float("nan"), dtype=torch.float32 if out_dtype else x.dtype
        )
    _native.cpu_linear(
        x.data_ptr(),
        w.data_ptr(),
        out.data_ptr(),
        x.stride(0),
        w.stride(0),
        out.stride(0),
        x.shape[0],
        w.shape[0],
        x.shape[1],
        DTYPES[x.dtype],
        threads,
        epilogue=EPILOGUES[epilogue],
        other=0 if other is None else other.data_ptr(),
        other_stride=0 if other is None else other.stride(0),
        w_up=0 if w_up is None else w_up.data_ptr(),
        w_up_stride=0 if w_up is None else w_up.stride(0),
        isa=isa,
        out_dtype=out_dtype,
    )
    return out


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32 if t.dtype is torch.float32 else torch.int16)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape and a.dtype == b.dtype
    different = (bits(a) != bits(b)).nonzero()
    assert not len(different), (
        f"{len(different)} of {a.numel()} differ, first at {different[0].tolist()}: "
        f"{a[tuple(different[0])]} and {b[tuple(different[0])]}"
    )


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal values, a few of them 30 times larger."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.02, 30 * t, t).to(dtype)


# ---- the contract, stated once more in numpy ----


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fp32 a * b + c, rounded once: in double the product is exact, and the sum, rounded to odd,
    rounds to fp32 as the exact one does (Boldo & Melquiond 2008)."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    back = total - product  # Knuth's two-sum: error is exactly product + c - total
    error = (product - (total - back)) + (c - back)
    even = (np.atleast_1d(total).view(np.int64) & 1).reshape(total.shape) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, odd, total).astype(np.float32)


def contract_sum(x: Tensor, w: Tensor) -> Tensor:
    """[M, N] fp32: 16 partial sums, halved four times; of bfloat16 by pairs, without subnormals."""
    in_pairs = x.dtype is torch.bfloat16
    step = 32 if in_pairs else 16
    a, b = (np.pad(t.float().numpy(), ((0, 0), (0, -t.shape[1] % step))) for t in (x, w))
    flush = without_subnormals if in_pairs else np.asarray
    a, b = flush(a), flush(b)
    s = np.zeros((a.shape[0], b.shape[0], 16), np.float32)
    for k in range(0, a.shape[1], step):
        for columns in (
            [slice(k + 1, k + 32, 2), slice(k, k + 32, 2)] if in_pairs else [slice(k, k + 16)]
        ):
            s = flush(fma(a[:, None, columns], b[None, :, columns], s))
    while s.shape[-1] > 1:
        half = s.shape[-1] // 2
        s = flush(s[..., :half] + s[..., half:])
    return torch.from_numpy(s[..., 0].copy())


def without_subnormals(a: np.ndarray) -> np.ndarray:
    return np.where(np.abs(a) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), a), a)


def test_cpu_linear_numpy_fma_rounds_once() -> None:
    """A double sum rounded twice would give 1 here: 1 + 2^-24 + 2^-60 lies above the midpoint."""
    a = np.array([1 + 2.0**-23, 2.0**-30, 3.0], np.float32)
    b = np.array([2.0**-24, 2.0**-30, 5.0], np.float32)
    c = np.array([1.0, 1 + 2.0**-23, 7.0], np.float32)
    assert fma(a, b, c).tolist() == [1 + 2.0**-23, 1 + 2.0**-23, 22.0]


SHAPES = [  # M, N, K
    (1, 1, 1),
    (1, 7, 15),
    (1, 50, 576),
    (2, 13, 17),
    (3, 6, 100),
    (4, 25, 64),
    (5, 11, 31),
    (8, 48, 33),
    (9, 49, 1040),
    (17, 97, 130),
    (130, 50, 70),
    (50, 9, 3300),  # several blocks of columns
]


@each_isa
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_cpu_linear_bits(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    level = require(isa)
    m, n, k = shape
    x, w = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    assert_same_bits(cpu_linear(x, w, isa=level), contract_sum(x, w).to(dtype))


def test_cpu_linear_bits_tell_orders_apart() -> None:
    """The check above would notice another order of summation: a plain running sum differs, and
    bfloat16 without its pairs."""
    x, w = random(5, 576, dtype=torch.float32), random(40, 576, dtype=torch.float32, seed=1)
    running = np.zeros((5, 40), np.float32)
    for k in range(576):
        running = fma(x.numpy()[:, None, k], w.numpy()[None, :, k], running)
    ours = cpu_linear(x, w)
    assert (bits(torch.from_numpy(running)) != bits(ours)).float().mean() > 0.5
    pairs = contract_sum(x.bfloat16(), w.bfloat16())
    without = contract_sum(x.bfloat16().float(), w.bfloat16().float())
    assert (bits(pairs) != bits(without)).float().mean() > 0.5


@each_isa
@pytest.mark.parametrize("m", [2, 60])
def test_cpu_linear_bfloat16_subnormals_are_zeros(isa: str, m: int) -> None:
    """As inputs and as sums, on processors that have the product and on those that do not."""
    level = require(isa)
    scale = torch.tensor([1e-39, 1e-21, 1e-19]).repeat(m // 2 + 1)[:m, None]
    x = (random(m, 40, dtype=torch.float32) * scale).bfloat16()
    w = (random(30, 40, dtype=torch.float32, seed=1) * 3e-19).bfloat16()
    expected = contract_sum(x, w)
    as_numbers = x.double() @ w.double().T
    assert ((expected == 0) & (as_numbers != 0)).any() and (expected != 0).any()
    assert_same_bits(cpu_linear(x, w, isa=level, out_dtype=_native.F32), expected)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 300, 4096), (4, 200, 2100), (7, 65, 5000), (150, 100, 2100)])
def test_cpu_linear_error(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Within the bound of 16 partial sums and of one rounding to the dtype."""
    m, n, k = shape
    x, w = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    exact = x.double() @ w.double().T
    bound = (k / 16 + 5) * 2.0**-24 * (x.double().abs() @ w.double().abs().T)
    error = (cpu_linear(x, w).double() - exact).abs()
    assert (error <= bound + torch.finfo(dtype).eps / 2 * (exact.abs() + bound)).all()


SPECIAL = [0.0, -0.0, 1.0, -3.0, float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e-40]


@each_dtype
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("m", [1, 3, 6])
def test_cpu_linear_isas_agree(dtype: torch.dtype, epilogue: str, m: int) -> None:
    """Bit for bit: infinities, NaNs of both signs, overflow and subnormals included."""
    generator = np.random.default_rng(7)
    special = torch.tensor(SPECIAL).to(dtype)

    def values(*shape: int) -> Tensor:
        t = random(*shape, dtype=dtype, seed=int(generator.integers(1 << 30)))
        where = torch.from_numpy(generator.random(shape) < 0.01)
        return torch.where(where, special[torch.from_numpy(generator.integers(10, size=shape))], t)

    x, w, w_up, other = values(m, 90), values(101, 90), values(101, 90), values(m, 101)
    extra = {"w_up": w_up} if epilogue == "swiglu" else {}
    if epilogue in ("mul", "add"):
        extra = {"other": other}
    results = {
        name: cpu_linear(x, w, epilogue=epilogue, isa=ISAS[name], **extra) for name in AVAILABLE
    }
    for result in results.values():
        assert_same_bits(result, results["baseline"])
    nan = results["baseline"].isnan()
    assert nan.any() and not nan.all()
    assert len(bits(results["baseline"])[nan].unique()) == 1
    if epilogue == "none":
        exact = x.double() @ w.double().T
        assert (exact.isnan() <= nan).all()


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, int, int, int, int]:
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 120))
    k = draw(st.one_of(st.integers(1, 80), st.integers(1000, 1100)))
    return m, n, k, draw(st.integers(0, 9)), draw(st.integers(1, 5)), draw(st.integers(0, 1 << 30))


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(list(DTYPES)), st.sampled_from(list(EPILOGUES)), st.data())
def test_cpu_linear_batch_invariance(
    problem: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    epilogue: str,
    data: st.DataObject,
) -> None:
    """A block of rows and columns by itself, in contiguous tensors, has the bits that it has as
    part of the whole; nothing between the rows of out is written."""
    m, n, k, gap, threads, seed = problem
    x, w, w_up = (
        random(r, k + gap, dtype=dtype, seed=seed + i)[:, :k] for i, r in enumerate([m, n, n])
    )
    other = random(m, n + gap, dtype=dtype, seed=seed + 3)[:, :n]
    whole = torch.full((m, n + gap), 77.0, dtype=dtype)

    def run(rows: slice, columns: slice, **options: object) -> Tensor:
        if epilogue == "swiglu":
            options["w_up"] = w_up[columns].clone() if "out" not in options else w_up[columns]
        if epilogue in ("mul", "add"):
            options["other"] = other[rows, columns]
        return cpu_linear(x[rows], w[columns], epilogue=epilogue, **options)

    result = run(slice(None), slice(None), out=whole[:, :n], threads=threads)
    assert (whole[:, n:] == 77).all()
    rows = slice(i := data.draw(st.integers(0, m - 1)), data.draw(st.integers(i + 1, m)))
    columns = slice(j := data.draw(st.integers(0, n - 1)), data.draw(st.integers(j + 1, n)))
    assert_same_bits(run(rows, columns, threads=1), result[rows, columns])


@each_dtype
@pytest.mark.parametrize("m", [1, 4, 70])
def test_cpu_linear_threads(dtype: torch.dtype, m: int) -> None:
    x, w = random(m, 500, dtype=dtype), random(700, 500, dtype=dtype, seed=1)
    one = cpu_linear(x, w, threads=1)
    for threads in (2, 3, 5, 256, 2):
        assert_same_bits(cpu_linear(x, w, threads=threads), one)


def test_cpu_linear_many_passes() -> None:
    """More rows than packed x holds at a time: the same bits as in two calls."""
    x, w = random(1300, 8192, dtype=torch.float32), random(8, 8192, dtype=torch.float32, seed=1)
    other = random(1300, 8, dtype=torch.float32, seed=2)
    whole = cpu_linear(x, w, epilogue="add", other=other)
    for rows in (slice(0, 700), slice(700, 1300), slice(1299, 1300)):
        part = cpu_linear(x[rows], w, epilogue="add", other=other[rows])
        assert_same_bits(part, whole[rows])


# ---- epilogues ----


@each_dtype
@pytest.mark.parametrize("m", [2, 6])
def test_cpu_linear_mul_add(dtype: torch.dtype, m: int) -> None:
    """In fp32 on the sum, rounded once; other may be out."""
    x, w, other = (random(*s, dtype=dtype, seed=s[0]) for s in ((m, 75), (43, 75), (m, 43)))
    total = contract_sum(x, w)
    for epilogue, expected in (("mul", total * other.float()), ("add", total + other.float())):
        assert_same_bits(cpu_linear(x, w, epilogue=epilogue, other=other), expected.to(dtype))
        in_place = other.clone()
        cpu_linear(x, w, epilogue=epilogue, other=in_place, out=in_place)
        assert_same_bits(in_place, expected.to(dtype))


# Below -88.7 exp(-y) is infinite and silu(y) is -0, as in torch, instead of up to this much.
SILU_FLUSHED = 3e-37


@each_isa
def test_cpu_linear_silu(isa: str) -> None:
    """silu of every magnitude, within 3 units in the last place; K = 1 passes y through."""
    level = require(isa)
    y = torch.cat([torch.linspace(-100, 100, 20001), torch.logspace(-44, 38, 3000)])
    y = torch.cat([y, -y])
    ours = cpu_linear(y[:, None], torch.ones(1, 1), epilogue="silu", isa=level)[:, 0]
    exact = y.double() * torch.sigmoid(y.double())
    ulp = torch.from_numpy(np.spacing(exact.abs().float().numpy())).double()
    error = (ours.double() - exact).abs()
    assert (error <= torch.where(y > -88, 3 * ulp, SILU_FLUSHED)).all()
    limits = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    ours = cpu_linear(limits[:, None], torch.ones(1, 1), epilogue="silu", isa=level)[:, 0]
    assert ours[0] == float("inf") and ours[1:3].isnan().all() and (ours[3:] == 0).all()


@each_dtype
@pytest.mark.parametrize("m", [1, 5])
def test_cpu_linear_swiglu(dtype: torch.dtype, m: int) -> None:
    """silu(gate) * up in fp32, rounded once."""
    x, gate, up = (random(*s, dtype=dtype, seed=s[0]) for s in ((m, 75), (43, 75), (44, 75)))
    x, up = x / 16, up[1:]  # float16 must not overflow
    ours = cpu_linear(x, gate, epilogue="swiglu", w_up=up)
    g, u = contract_sum(x, gate).double(), contract_sum(x, up).double()
    exact = g * torch.sigmoid(g) * u
    assert ours.isfinite().all()
    error = (ours.double() - exact).abs()
    limits = torch.finfo(dtype)
    relative = limits.eps / 2 + 5 * 2.0**-24
    absolute = SILU_FLUSHED * u.abs() + limits.smallest_normal * limits.eps / 2
    assert (error <= relative * exact.abs() + absolute).all()
    if dtype is torch.float32:
        assert_same_bits(ours, cpu_linear(x, gate, epilogue="silu") * contract_sum(x, up))


# ---- what is touched ----


def before_guard_page(t: Tensor, keep: list[object]) -> Tensor:
    """A copy of t that ends where memory ends: one more byte would be a segmentation fault."""
    size = t.numel() * t.element_size()
    page = mmap.PAGESIZE
    length = -(-size // page) * page
    area = mmap.mmap(-1, length + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + length), page, 0) == 0  # PROT_NONE
    data = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=length - size)
    keep.append(area)
    return data.view(t.shape).copy_(t)


class LongerBy1:
    """A matrix of one row that claims one more column than its memory has."""

    def __init__(self, row: Tensor) -> None:
        self.shape = (1, row.shape[1] + 1)
        self.data_ptr = row.data_ptr
        self.stride = row.stride


GUARD = """
import sys
import torch
from tests.test_cpu_linear import *
isa = ISAS[sys.argv[1]]
for dtype in DTYPES:
    for m, n, k in ((1, 5, 1), (1, 13, 100), (3, 7, 31), (4, 12, 33), (9, 50, 47), (6, 5, 1030)):
        keep = []
        args = [random(*s, dtype=dtype, seed=sum(s)) for s in ((m, k), (n, k), (n, k), (m, n))]
        x, w, w_up, other = (before_guard_page(t, keep) for t in args)
        out = before_guard_page(torch.zeros(m, n, dtype=dtype), keep)
        for name in EPILOGUES:
            extra = {"w_up": w_up} if name == "swiglu" else {}
            plain = {"w_up": args[2]} if name == "swiglu" else {}
            if name in ("mul", "add"):
                extra, plain = {"other": other}, {"other": args[3]}
            cpu_linear(x, w, epilogue=name, out=out, isa=isa, **extra)
            assert_same_bits(out, cpu_linear(args[0], args[1], epilogue=name, isa=isa, **plain))
if sys.argv[2] == "past":
    cpu_linear(torch.zeros(1, k + 1, dtype=dtype), LongerBy1(w[-1:]), isa=isa)
print("done")
"""


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)


@each_isa
def test_cpu_linear_reads_nothing_past_the_end(isa: str) -> None:
    require(isa)
    result = python(GUARD, isa, "inside")
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_cpu_linear_guard_page_works() -> None:
    """The same script, told that rows are one element longer, dies by a segmentation fault."""
    assert python(GUARD, AVAILABLE[-1], "past").returncode == -11


@each_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 70, 33), (5, 49, 20), (300, 50, 800)], ids=str)
def test_cpu_linear_float32_of_halves(
    isa: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    x, w = random(m, k, dtype=dtype), random(n, k, dtype=dtype, seed=1)
    wide = torch.full((m, n + 3), float("nan"))
    options = {"threads": 2, "isa": require(isa), "out_dtype": _native.F32}
    got = cpu_linear(x, w, out=wide[:, :n], **options)
    assert_same_bits(got, contract_sum(x, w))
    assert wide[:, n:].isnan().all()


def test_cpu_linear_empty() -> None:
    for m, n in ((0, 5), (5, 0), (0, 0)):
        x, w = torch.empty(m, 8), torch.empty(n, 8)
        assert cpu_linear(x, w).shape == (m, n)
    for m in (1, 6):
        other = random(m, 20, dtype=torch.float32)
        empty = cpu_linear(torch.empty(m, 0), torch.empty(20, 0))
        assert_same_bits(empty, torch.zeros(m, 20))
        added = cpu_linear(torch.empty(m, 0), torch.empty(20, 0), epilogue="add", other=other)
        assert_same_bits(added, other)


def test_cpu_linear_bad_arguments() -> None:
    x, w, out = torch.zeros(2, 8), torch.zeros(3, 8), torch.full((2, 3), 5.0)
    good = {
        "x": x.data_ptr(),
        "w": w.data_ptr(),
        "out": out.data_ptr(),
        "x_stride": 8,
        "w_stride": 8,
        "out_stride": 3,
        "m": 2,
        "n": 3,
        "k": 8,
        "dtype": _native.F32,
        "num_threads": 1,
    }
    bad = [
        ({"dtype": _native.I32}, TypeError, "dtype must be .* got 4"),
        ({"out_dtype": _native.F16}, TypeError, "out_dtype must be dtype .3. or MK_F32 .3., got 2"),
        ({"dtype": 0}, TypeError, "dtype"),
        ({"x": 0}, ValueError, "x is NULL"),
        ({"w": 0}, ValueError, "w is NULL"),
        ({"out": 0}, ValueError, "out is NULL"),
        ({"x": x.data_ptr() + 2}, ValueError, "x = .* not aligned"),
        ({"m": -1}, ValueError, "m must be"),
        ({"n": -1}, ValueError, "n must be"),
        ({"k": -1}, ValueError, "k must be"),
        ({"x_stride": 7}, ValueError, "x_stride must be at least the 8 .* got 7"),
        ({"w_stride": -8}, ValueError, "w_stride"),
        ({"out_stride": 2}, ValueError, "out_stride"),
        ({"epilogue": 5}, ValueError, "epilogue .* got 5"),
        ({"epilogue": _native.EPILOGUE_MUL}, ValueError, "other is NULL"),
        ({"epilogue": _native.EPILOGUE_SWIGLU}, ValueError, "w_up is NULL"),
        ({"other": out.data_ptr(), "other_stride": 3}, ValueError, "other must be NULL"),
        ({"w_up": w.data_ptr(), "w_up_stride": 8}, ValueError, "w_up must be NULL"),
        ({"num_threads": 0}, ValueError, "num_threads must be 1 ... 256, got 0"),
        ({"num_threads": 257}, ValueError, "num_threads"),
        ({"isa": 5}, ValueError, "isa must be .* got 5"),
    ]
    for change, error, message in bad:
        with pytest.raises(error, match=message):
            _native.cpu_linear(**{**good, **change})
    assert (out == 5).all()
    _native.cpu_linear(**good)
    assert (out == 0).all()


# ---- processes and threads ----


def test_cpu_linear_isa_of_the_environment() -> None:
    code = "from minitron_kernels import _native; print(_native.cpu_isa())"
    for name in AVAILABLE:
        assert python(code, MK_CPU_ISA=name).stdout == f"{name}\n"
    assert python(code, MK_CPU_ISA="").stdout == f"{AVAILABLE[-1]}\n"
    wrong = python(code, MK_CPU_ISA="sse9")
    assert wrong.returncode == 1
    assert (
        "ValueError: MK_CPU_ISA must be baseline, avx2, avx512 or avx512bf16, got sse9"
        in wrong.stderr
    )


def test_cpu_linear_ignores_float_modes() -> None:
    """Subnormals count in a caller that flushes them, and in workers that it started."""
    code = """
from tests.test_cpu_linear import *
x = random(6, 64, dtype=torch.float32) * 3e-21
w = random(600, 64, dtype=torch.float32, seed=1) * 3e-21
expected = contract_sum(x, w)
assert ((expected != 0) & (expected.abs() < 1e-38)).float().mean() > 0.9
assert torch.set_flush_denormal(True)
ours = [cpu_linear(x[:m], w, threads=4) for m in (1, 6)]
assert (expected * 1 == 0).float().mean() > 0.9  # torch still flushes
torch.set_flush_denormal(False)
assert_same_bits(ours[0], expected[:1])
assert_same_bits(ours[1], expected)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_cpu_linear_after_fork() -> None:
    """In children forked while idle and while another thread's call is running; and again in
    the parent."""
    code = """
import os, threading
from tests.test_cpu_linear import *
x, w = random(4, 512, dtype=torch.float32), random(2000, 512, dtype=torch.float32, seed=1)
expected = cpu_linear(x, w, threads=1)
def check():
    for _ in range(20):
        assert_same_bits(cpu_linear(x, w, threads=3), expected)
check()
for busy in (False, True):
    stop = threading.Event()
    def load():
        while not stop.is_set():
            cpu_linear(x, w, threads=3)
    other = threading.Thread(target=load)
    if busy:
        other.start()
    children = []
    for _ in range(5):
        if not (child := os.fork()):
            try:
                check()
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
        check()
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    stop.set()
    if busy:
        other.join()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_cpu_linear_from_many_threads() -> None:
    problems = [
        (random(m, 300, dtype=torch.float32, seed=m), random(900, 300, dtype=torch.float32, seed=m))
        for m in (1, 2, 5, 40)
    ]
    expected = [cpu_linear(x, w, threads=1) for x, w in problems]
    failures: list[BaseException] = []

    def check(i: int) -> None:
        try:
            for _ in range(100):
                x, w = problems[i]
                assert_same_bits(cpu_linear(x, w, threads=1 + i), expected[i])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=check, args=(i % len(problems),)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures[0]
