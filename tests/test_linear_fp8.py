"""FP8 products and quantisation: kernels of sm_90a on the emulator and a GPU, and the Python API.

Operands are random e4m3 with scales that differ up to 16-fold from block to block, so that a scale
of another block shows. What lies behind rows, of operands, scales and outputs, is NaN (byte 0x7F).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import fp8, reference
from tests import native_abi as abi
from tests.cuda_device import both, cuda_device, on_cpu
from tests.fp8_sums import narrow_sum
from tests.linear_cases import magnitude
from tests.native_emulator import (
    BUILT,
    DEVICES,
    dtype_id,
    faulty_library,
    run,
    storage_of,
)
from tests.test_kernels_memory import (
    HALVES,
    assert_close,
    assert_padding_untouched,
    poisoned,
    strided,
    values,
)

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3 = torch.float8_e4m3fn
NAN = 0x7F

pytestmark = pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
WHERE = [d for d in DEVICES if d in ("90a", "gpu")]
on_hopper = pytest.mark.parametrize(
    "arch",
    [pytest.param(d, id=f"emu-sm_{d}") if d == "90a" else pytest.param(d, marks=pytest.mark.gpu)
     for d in WHERE],
)  # fmt: skip


def as_bytes(x: Tensor) -> Tensor:
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def strided_fp8(x: Tensor, padding: int, offset: int = 0) -> Tensor:
    """As `strided`, of e4m3."""
    storage = torch.full((offset + x.shape[0] * (x.shape[1] + padding),), NAN, dtype=torch.uint8)
    view = storage[offset:].view(x.shape[0], x.shape[1] + padding)[:, : x.shape[1]]
    view.copy_(x.view(torch.uint8))
    return view.view(E4M3)


def blocks(size: int) -> int:
    return -(-size // 128)


# ---------------------------------------------------------------------------------------- products


def assert_product(
    op: str, out: Tensor, x: Tensor, w: Tensor, residual: Tensor | None = None
) -> None:
    """out [m, n] is the product of the expanded operands: at most twice the error of PyTorch's
    product of these in the output's dtype, and one unit of that. Sums of 128 k keep about 14 bits,
    so that an fp32 output is held to float16's error; test_sums_have_the_bits_of_tensor_cores holds
    it to the bits. Of few outputs PyTorch's error may be small by luck: products of the same
    values, which meet in another order, count with them."""
    copies = -(-1024 // out.numel()) if out.numel() else 1
    x = torch.cat([x.roll(i, 1) for i in range(copies)])
    residual = None if residual is None else residual.repeat(copies, 1)
    dtype = F16 if out.dtype == F32 else out.dtype
    exact, rounded, scale = x @ w.T, (x.to(dtype) @ w.to(dtype).T).double(), magnitude(x, w)
    if op == "linear_fp8_swiglu":
        (gate, up), (g, u) = ((y[:, ::2], y[:, 1::2]) for y in (exact, scale))
        silu = torch.nn.functional.silu(gate)
        exact, scale = silu * up, g * up.abs() + u * silu.abs()
        rounded = torch.nn.functional.silu(rounded[:, ::2]) * rounded[:, 1::2]
    if residual is not None:
        exact, rounded = exact + residual.double(), rounded + residual.double()
        scale = scale + residual.double().abs()
    got = torch.cat([out, exact[len(out) :].to(out.dtype)])
    assert_close(got, exact, rounded.to(dtype), "out", scale + exact.abs())


@dataclass
class Product:
    """Operands and scales of x [m, k] and w [n, k]."""

    x: Tensor
    w: Tensor
    x_scale: Tensor
    w_scale: Tensor

    @classmethod
    def random(
        cls, m: int, n: int, k: int, scales: str = "blocks", padding: int = 0, seed: int = 0
    ) -> Product:
        """scales: blocks, transposed (those of a block of k adjoin), rows (one of each of x), one.
        padding: 16-byte pieces behind rows of x and w, and floats behind rows of scales."""
        x = (2 * values(m, k, dtype=F32, seed=seed)).to(E4M3)
        w = (2 * values(n, k, dtype=F32, seed=seed + 1)).to(E4M3)
        shapes = [(m, blocks(k)), (blocks(n), blocks(k))]
        if scales in ("rows", "one"):
            shapes = [(m if scales == "rows" else 1, 1), (1, 1)]
        generator = torch.Generator().manual_seed(seed + 2)
        x_scale, w_scale = (
            strided(torch.exp2(4 * torch.rand(shape, generator=generator) - 9), padding)
            for shape in shapes
        )
        if scales == "transposed":
            x_scale, w_scale = (strided(s.T, padding).T for s in (x_scale, w_scale))
        x, w = (strided_fp8(t, 16 * padding, 16 * padding) for t in (x, w))
        return cls(x, w, x_scale, w_scale)

    def expanded(self) -> tuple[Tensor, Tensor]:
        return (
            reference.dequantize_fp8(self.x, self.x_scale.double()),
            reference.dequantize_fp8(self.w, self.w_scale.double()),
        )

    def params(self, out: Tensor, residual: Tensor | None = None) -> ctypes.Structure:
        def strides(scale: Tensor, rows: int) -> tuple[int, int]:
            of_rows = scale.stride(0) if scale.shape[0] > 1 or rows <= 128 else 0
            return of_rows, scale.stride(1) if scale.shape[1] == blocks(self.x.shape[1]) else 0

        params = abi.structs()["mk_linear_fp8_params"](
            **{f: getattr(self, f).data_ptr() for f in ("x", "w", "x_scale", "w_scale")},
            out=out.data_ptr(), x_stride=self.x.stride(0), w_stride=self.w.stride(0),
            out_stride=out.stride(0), m=len(self.x), n=len(self.w), k=self.x.shape[1],
            out_dtype=dtype_id(out),
        )  # fmt: skip
        for f, scale in (("x_scale", self.x_scale), ("w_scale", self.w_scale)):
            of_rows, of_blocks = strides(scale, len(self.x if f == "x_scale" else self.w))
            if scale.numel() == 1:
                of_rows = of_blocks = 0
            setattr(params, f"{f}_stride", of_rows)
            setattr(params, f"{f}_block_stride", of_blocks)
        if residual is not None:
            params.residual, params.residual_stride = residual.data_ptr(), residual.stride(0)
        return params

    def run(
        self, op: str, arch: str, out: Tensor, residual: Tensor | None = None, seed: int = 0,
        lib: ctypes.CDLL | None = None,
    ) -> Any:  # fmt: skip
        tensors = [self.x, self.w, self.x_scale, self.w_scale, out]
        if residual is not None and residual is not out:
            tensors.append(residual)
        tensors = [storage_of(as_bytes(t)) for t in tensors]
        return run(op, arch, self.params(out, residual), tensors, seed, lib)

    def entry(self, op: str, out: Tensor) -> str:
        return abi.plan(op, self.params(out), "90a").entry.decode()

    def out(self, op: str, dtype: torch.dtype = BF16, padding: int = 0) -> Tensor:
        columns = len(self.w) // (2 if op == "linear_fp8_swiglu" else 1)
        return poisoned(torch.empty(len(self.x), columns, dtype=dtype), padding)

    def check(
        self, op: str, arch: str, out: Tensor, residual: Tensor | None = None, seed: int = 0,
        lib: ctypes.CDLL | None = None,
    ) -> Any:  # fmt: skip
        """Runs it and compares all of `out` with the exact result."""
        kept = None if residual is None else residual.clone()
        counters = self.run(op, arch, out, residual, seed, lib)
        assert_product(op, out, *self.expanded(), kept)
        assert_padding_untouched(out, "out")
        return counters


# Tile -> m and n whose tiles have tails in both directions, on an H100.
SIZES = {"m128_n64": (77, 200), "m128_n128": (371, 3300), "m128_n192": (890, 2910)}
KINDS = ("plain", "residual", "f16", "f32", "swiglu", "residual f16", "swiglu f16")
SCALES = ("blocks", "transposed", "rows", "one")


def arguments(kind: str, of: Product, padding: int) -> tuple[str, Tensor, Tensor | None]:
    op = "linear_fp8_swiglu" if "swiglu" in kind else "linear_fp8"
    out = of.out(op, {"f16": F16, "f32": F32}.get(kind.split()[-1], BF16), padding)
    residual = None
    if "residual" in kind:
        residual = strided(values(*out.shape, dtype=out.dtype, seed=7), padding)
    return op, out, residual


@on_hopper
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_tile(arch: str, size: str, kind: str) -> None:
    m, n = SIZES[size]
    scales = SCALES[KINDS.index(kind) % len(SCALES)]
    product = Product.random(m, n, 144, scales, padding=3)
    op, out, residual = arguments(kind, product, 5)
    assert product.entry(op, out).endswith(size)
    product.check(op, arch, out, residual, seed=m)


@on_hopper
@pytest.mark.parametrize("kind", ["plain", "residual", "swiglu"])
def test_writes_vectors(arch: str, kind: str) -> None:
    """Outputs in rows of whole vectors of 16 bytes."""
    product = Product.random(300, 720, 272)
    op, out, residual = arguments(kind, product, 8)
    counters = product.check(op, arch, out, residual)
    if arch != "gpu":
        assert counters.shared_wavefronts == counters.shared_wavefronts_min


SHAPES = [  # m, n, k: Minitron-8B's and SmolLM2's, cut in n; odd ones
    (1, 4096, 4096), (33, 192, 11520), (129, 256, 4096), (40, 576, 576), (7, 1, 16), (1, 7, 48),
    (129, 33, 1536), (2, 129, 16), (64, 64, 2048),
]  # fmt: skip


@on_hopper
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_model_shapes(arch: str, m: int, n: int, k: int) -> None:
    product = Product.random(m, n, k, SCALES[m % 4], seed=n)
    product.check("linear_fp8", arch, product.out("linear_fp8"), seed=k)
    if n % 2 == 0 and n < 1000:
        product.check("linear_fp8_swiglu", arch, product.out("linear_fp8_swiglu"))


@settings(max_examples=40, deadline=None)
@given(
    arch=st.sampled_from(WHERE or ["90a"]),
    kind=st.sampled_from(KINDS),
    scales=st.sampled_from(SCALES),
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    k=st.integers(1, 40).map(lambda i: 16 * i),
    padding=st.integers(0, 3),
    out_padding=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_strides(
    arch: str, kind: str, scales: str, m: int, n: int, k: int, padding: int, out_padding: int,
    seed: int,
) -> None:  # fmt: skip
    product = Product.random(m, 2 * n if "swiglu" in kind else n, k, scales, padding, seed)
    op, out, residual = arguments(kind, product, out_padding)
    product.check(op, arch, out, residual, seed)


@on_hopper
def test_operands_that_end_inside_16_bytes_of_k(arch: str) -> None:
    """The C function takes any k, with rows aligned."""
    for k in (1, 127, 131):
        product = Product.random(5, 9, k)
        product = replace(product, **{
            name: strided_fp8(getattr(product, name), -k % 16 + 16) for name in ("x", "w")
        })  # fmt: skip
        product.check("linear_fp8", arch, product.out("linear_fp8"))


# -------------------------------------------------------------------------------------------- bits


@on_hopper
@pytest.mark.parametrize("size", SIZES)
def test_sums_of_a_block_are_scaled_and_added_in_order(arch: str, size: str) -> None:
    """Of small integers, the sums over 128 k are exact in any order and at any width: the rest is
    one FMA a block, bit by bit."""
    m, n = SIZES[size]
    product = Product.random(m, n, 400)
    generator = torch.Generator().manual_seed(1)
    for t in (product.x, product.w):
        t.copy_(torch.randint(-2, 3, t.shape, generator=generator).to(E4M3))
    out = product.out("linear_fp8", F32)
    assert product.entry("linear_fp8", out).endswith(size)
    product.run("linear_fp8", arch, out)
    x, w = product.x.double(), product.w.double()
    sums = torch.zeros(m, n)
    for b in range(blocks(400)):
        k = slice(128 * b, 128 * b + 128)
        columns = product.w_scale[:, b].repeat_interleave(128)[:n]
        scale = product.x_scale[:, b, None] * columns  # rounded to fp32
        sums = (x[:, k] @ w[:, k].T * scale.double() + sums.double()).float()
    assert torch.equal(out, sums)


@on_hopper
@pytest.mark.parametrize("size", SIZES)
def test_sums_have_the_bits_of_tensor_cores(arch: str, size: str) -> None:
    """Rows at the edges of warps, warpgroups and tiles, whose outputs are the header's sums bit by
    bit: of 128 k by four MMAs of 32, as fp8_sums.py adds them, and by one FMA a block. k ends
    inside an MMA."""
    if arch == "gpu":
        pytest.skip("an MMA may drop other bits than the model does")
    m, n = SIZES[size]
    product = Product.random(m, n, 304)
    out = product.out("linear_fp8", F32)
    assert product.entry("linear_fp8", out).endswith(size)
    product.run("linear_fp8", arch, out)
    rows = [0, 8, 63, 64, m - 1]
    x, w = product.x[rows].double().numpy(), product.w.double().numpy()
    sums = np.zeros((len(rows), n))
    for b in range(blocks(304)):
        block = np.zeros_like(sums)
        for k in range(128 * b, min(128 * b + 128, 304), 32):
            step = slice(k, k + 32)
            block = narrow_sum(x[:, step], w[:, step].T, block, "e4m3", "e4m3", "f32")
        columns = product.w_scale[:, b].repeat_interleave(128)[:n]
        scale = product.x_scale[rows, b, None] * columns  # rounded to fp32
        sums = (block * scale.double().numpy() + sums).astype(np.float32).astype(np.float64)
    assert torch.equal(out[rows].double(), torch.from_numpy(sums))


@on_hopper
@pytest.mark.parametrize("op", ["linear_fp8", "linear_fp8_swiglu"])
def test_rows_have_the_same_bits_in_any_batch(arch: str, op: str) -> None:
    """In every tile, and whichever way warps take turns."""
    product = Product.random(890, 2910, 160)
    whole = product.out(op)
    product.run(op, arch, whole)
    names = {product.entry(op, whole)}
    for m in (1, 7, 64, 129, 371):
        rows = replace(product, x=product.x[-m:], x_scale=product.x_scale[-m:])
        out = rows.out(op)
        names.add(rows.entry(op, out))
        rows.run(op, arch, out, seed=m)
        assert torch.equal(out, whole[-m:]), m
    assert len(names) >= 2
    again = product.out(op)
    product.run(op, arch, again, seed=11)
    assert torch.equal(again, whole)


@on_hopper
@pytest.mark.parametrize("n", [77, 88])
def test_adds_the_residual_in_place(arch: str, n: int) -> None:
    product = Product.random(70, n, 272)
    residual, out = values(70, n, dtype=BF16, seed=2), product.out("linear_fp8")
    product.check("linear_fp8", arch, out, residual)
    product.run("linear_fp8", arch, residual, residual)
    assert torch.equal(residual, out)


@on_hopper
def test_nan_stays_in_its_row_and_column(arch: str) -> None:
    product = Product.random(130, 70, 272)
    as_bytes(product.x)[3, 200] = NAN
    as_bytes(product.w)[66, 5] = 0xFF
    out = product.out("linear_fp8")
    product.run("linear_fp8", arch, out)
    expected = torch.zeros(130, 70, dtype=torch.bool)
    expected[3], expected[:, 66] = True, True
    assert torch.equal(out.isnan(), expected)


# ---------------------------------------------------------------------------------------- counters


def test_large_tile_meets_the_bars() -> None:
    """Of a stage: 96 FFMAs a thread of 768 clocks' issue slots (.25), and what is around them; the
    sectors of operands from DRAM once, outputs in whole sectors, no bank conflict."""
    m, n = 896, 2880
    issued = []
    for k in (128, 384):
        product = Product.random(m, n, k)
        out = product.out("linear_fp8")
        assert product.entry("linear_fp8", out).endswith("m128_n192")
        plan = abi.plan("linear_fp8", product.params(out), "90a")
        counters = product.run("linear_fp8", "90a", out)
        blocks_of_y = plan.grid[0]
        assert counters.issued["mma"] == blocks_of_y * (k // 128) * 4 * 8
        assert counters.shared_wavefronts == counters.shared_wavefronts_min
        read = sum(t.nbytes for t in (product.x, product.w)) // 32
        scales = sum(t.nbytes for t in (product.x_scale, product.w_scale)) // 32
        assert read <= counters.unique_read_sectors <= read + scales + 2
        assert counters.write_sectors == counters.unique_write_sectors == out.nbytes // 32
        issued.append(counters.instructions - counters.issued["mov"])
    stage = (issued[1] - issued[0]) / 2
    ratio = stage / (blocks_of_y * 768 * 4)
    print(f"issue/t {ratio:.3f}")
    assert ratio <= 0.40


# ---------------------------------------------------------------------------------- planted faults


@pytest.mark.parametrize(
    "old, new, found",
    [
        (r"wgmma\.wait_group\.sync\.aligned 0;", "", "wgmma not waited for"),
        (r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[%r\d+ \+ 0\]), %r\d+;", r"\1, 1;",
         "uninitialised shared memory|asynchronous copy not waited for|no wait for its mbarrier|"
         # or first the producer, which asks for a stage again while its copies are under way
         "mbarrier misuse.* which needs 0 of 1 arrivals and .* to end: too many"),
        (r"mbarrier\.arrive\.shared::cluster\.b64 _, \[%r\d+ \+ 0\];", "", "deadlock"),
        (r"bar\.arrive [^;]*;", "", "deadlock"),
        (r"wgmma\.fence\.sync\.aligned;", "", "missing wgmma.fence"),
        # The rows' scales: of the row itself, not of that 8 further; the block's, not the first's.
        (r"(fma\.rn\.f32 (%f\d+), %f\d+), %f\d+, \2;", r"\1, \2, \2;", "out: element|NaN"),
    ],
    ids=["wait", "parity", "release", "turn", "fence", "scale"],
)  # fmt: skip
def test_planted_fault_is_found(tmp_path: Path, old: str, new: str, found: str) -> None:
    """In a cluster of two, with more stages along k than the ring has."""
    product = Product.random(300, 130, 1232)
    out = product.out("linear_fp8")
    lib = faulty_library(tmp_path, "90a", product.entry("linear_fp8", out), old, new)
    with pytest.raises(AssertionError, match=found):
        product.check("linear_fp8", "90a", out, lib=lib)


@pytest.mark.parametrize("which", ["x_scale", "w_scale"])
@pytest.mark.parametrize("stride", ["_stride", "_block_stride"])
def test_wrong_scale_index_is_found(which: str, stride: str, monkeypatch: Any) -> None:
    """Scales of the neighbouring block, or row: further than the tolerance."""
    product = Product.random(70, 300, 272)
    right = Product.params

    def wrong(self: Product, *args: Any) -> ctypes.Structure:
        params = right(self, *args)
        setattr(params, which + stride, 0)
        return params

    monkeypatch.setattr(Product, "params", wrong)
    with pytest.raises(AssertionError, match="out: element"):
        product.check("linear_fp8", "90a", product.out("linear_fp8"))


# ---------------------------------------------------------------------------------------- quantise


def quantized(arch: str, x: Tensor, block: int, scale: Tensor | None = None, padding: int = 0,
              seed: int = 0) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
    """mk_quantize_fp8 of x, with padded outputs."""
    rows, k = x.shape
    out = strided_fp8(torch.full((rows, k), NAN, dtype=torch.uint8).view(E4M3), padding)
    scales = strided(torch.full((blocks(k), rows), float("nan")), 3).T
    if scale is not None:
        scales = scale.clone().view(1, 1)
    params = abi.structs()["mk_quantize_fp8_params"](
        x=x.data_ptr(), out=out.data_ptr(), scales=scales.data_ptr(), x_stride=x.stride(0),
        out_stride=out.stride(0), scales_stride=scales.stride(0),
        scales_block_stride=scales.stride(1), rows=rows, k=k, block=block, dtype=dtype_id(x),
    )  # fmt: skip
    tensors = [storage_of(t) for t in (x, as_bytes(out), scales)]
    counters = run("quantize_fp8", arch, params, tensors, seed)
    inside = torch.zeros(storage_of(as_bytes(out)).shape, dtype=torch.bool)
    inside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(True)
    assert (storage_of(as_bytes(out))[~inside] == NAN).all(), "out: written outside its rows"
    if scale is None:
        assert_padding_untouched(scales, "scales")
    return out, scales, counters


def nearest(x: Tensor) -> Tensor:
    """e4m3 by search: ties to the even byte."""
    table = torch.arange(NAN, dtype=torch.uint8).view(E4M3).double()
    distance = (x.double().abs()[..., None] - table).abs()
    byte = distance.argmin(-1)  # the lower of two at the same distance, even or odd
    above = (byte + 1).clamp(max=NAN - 1)
    tie = distance.gather(-1, byte[..., None]) == distance.gather(-1, above[..., None])
    byte = torch.where(tie[..., 0] & (byte % 2 == 1), above, byte)
    byte = byte.to(torch.uint8) | (x < 0).to(torch.uint8) << 7
    return torch.where(x.isnan(), NAN, byte)


@on_hopper
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "rows, k, padding",
    [(1, 128, 0), (3, 136, 8), (7, 4096, 32), (33, 1000, 24), (5, 7, 0), (2, 131, 3), (1, 1, 0)],
)
def test_quantize_blocks(arch: str, rows: int, k: int, padding: int, dtype: torch.dtype) -> None:
    x = values(rows, k, dtype=dtype, seed=rows)
    x *= torch.exp2(torch.arange(rows) % 7 * 2.0 - 8)[:, None].to(dtype)
    x = strided(x, padding)
    out, scales, counters = quantized(arch, x, 128, padding=padding, seed=k)
    padded = torch.nn.functional.pad(x.float(), (0, -k % 128)).view(rows, -1, 128)
    amax = padded.abs().amax(-1)
    assert torch.equal(scales, amax / 448)
    inverse = (1 / scales).repeat_interleave(128, 1)[:, :k]
    expected = nearest(x.float() * inverse)
    assert torch.equal(as_bytes(out) & 0x7F, expected & 0x7F)
    assert torch.equal(out.float(), expected.view(E4M3).float())
    assert out.float().abs().max() == 448
    if arch != "gpu" and k == 4096:
        assert counters.read_sectors == x.nbytes // 32
        assert counters.write_sectors == out.nbytes // 32 + scales.numel()


@on_hopper
def test_quantize_edges(arch: str) -> None:
    """Zeros, NaN, infinities, tiny and huge values; ties; and a scale that is given."""
    inf, nan = float("inf"), float("nan")
    x = torch.zeros(8, 256, dtype=BF16)
    x[1, 5], x[1, 7], x[1, 200] = nan, 3.0, -2.0
    x[2, 0], x[2, 1], x[2, 130] = -inf, 1.0, 1.0
    x[3] = 1e-40
    x[4] = torch.arange(256) * 1e36
    x[5] = nan
    x[6, :128] = torch.cat((torch.arange(64) + 0.5, torch.tensor([448.0]), torch.zeros(63)))
    out, scales, _ = quantized(arch, x, 128)
    assert scales[0, 0] == 2.0**-96 / 448 and not out[0].float().any()
    assert out[1].float().isnan().nonzero().tolist() == [[5]]
    assert (out[1, 7].float(), scales[1, 0]) == (448, torch.tensor(3.0) / 448)
    assert (out[1, 200].float(), scales[1, 1]) == (-448, torch.tensor(2.0) / 448)
    stands = reference.dequantize_fp8(out, scales)
    assert stands[2, :128].isnan().all() and scales[2, 0] == inf and stands[2, 130] == 1
    assert (stands[3].abs() < 2.0**-100).all() and not stands[3].isnan().any()
    assert ((stands[4] - x[4].float()).abs() <= 16.01 * scales[4, 1]).all()  # of 32 to 448
    assert out[5].float().isnan().all() and (scales[5] == 2.0**-96 / 448).all()
    assert scales[6, 0] == 1 and torch.equal(as_bytes(out[6]), nearest(x[6].float()))
    given, _, _ = quantized(arch, x, 0, torch.tensor(0.25))
    expected = nearest((4 * x.float()).clamp(-448, 448))
    expected[2, 0] = 0xFE  # -448
    assert torch.equal(as_bytes(given), expected)


# ---------------------------------------------------------------------------------------------- API


@pytest.fixture(
    params=[pytest.param("sm_90", id="emu-sm_90a"), *([pytest.param("gpu", marks=pytest.mark.gpu)]
                                          if "gpu" in WHERE else [])],
)  # fmt: skip
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with cuda_device(request.param, monkeypatch) as name:
        yield name


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("shape", [(3, 5, 160), (0, 128), (256,), (129, 400), (2, 4, 33)])
def test_quantize_fp8(device: str, shape: tuple[int, ...], block: int | None) -> None:
    """The CPU's bits, and the layout that the product reads best: rows of a block adjoin."""
    x = randn(*shape)
    (q, scales), (q_cpu, scales_cpu), _ = both(fp8.quantize_fp8, device, x, block)
    assert torch.equal(as_bytes(q), as_bytes(q_cpu)) and torch.equal(scales, scales_cpu)
    assert q.shape == x.shape and q.dtype == E4M3 and scales.dtype == F32
    assert tuple(scales.shape) == ((1,) if block is None else (*shape[:-1], blocks(shape[-1])))
    if block and x.ndim > 1 and x.numel():
        assert scales.stride(-2) == 1


@pytest.mark.parametrize("scales", [None, 128])
def test_linear_fp8(device: str, scales: int | None) -> None:
    """Of quantised activations and weights; on the CPU too, which expands them."""
    x, w, residual = randn(3, 43, 160), randn(250, 160), randn(3, 43, 250)
    with on_cpu():
        x8, x_scale = fp8.quantize_fp8(x, scales)
        w8, w_scale = fp8.quantize_fp8_weight(w, scales)
    operands = (x8, w8, x_scale, w_scale)
    rows = x_scale if x_scale.numel() == 1 else x_scale.flatten(0, 1)
    expanded = (
        reference.dequantize_fp8(x8.flatten(0, 1), rows.double()),
        reference.dequantize_fp8(w8, w_scale.double()),
    )
    for function, rest in (
        (fp8.linear_fp8, ()), (fp8.linear_fp8, (residual,)), (fp8.linear_fp8, (None, F32)),
        (fp8.linear_fp8_swiglu, (F16,)),
    ):  # fmt: skip
        added = rest[0].flatten(0, 1) if rest and rest[0] is residual else None
        (got,), (on_host,), _ = both(function, device, *operands, *rest)
        assert got.dtype == on_host.dtype
        for out in (got, on_host):
            assert_product(function.__name__, out.flatten(0, 1), *expanded, added)


def test_linear_fp8_of_any_strides(device: str) -> None:
    """Rows that TMA cannot take are copied; scales are read where they are."""
    wide, w = (randn(40, 200, dtype=F32).to(E4M3), randn(72, 96, dtype=F32).to(E4M3))
    x_scale, w_scale = torch.rand(40, 3)[:, 1:2] + 1, torch.rand(3)[1:2]
    x = wide[:, 1:97]
    (got,), (on_host,), _ = both(fp8.linear_fp8, device, x, w, x_scale, w_scale)
    expanded = (
        reference.dequantize_fp8(x, x_scale.double()),
        reference.dequantize_fp8(w, w_scale.double()),
    )
    for out in (got, on_host):
        assert_product("linear_fp8", out, *expanded)
    (got,), (on_host,), _ = both(fp8.linear_fp8, device, x[:0], w, x_scale[:0], w_scale)
    assert got.shape == on_host.shape == (0, 72)


@pytest.mark.parametrize("block", [None, 128])
def test_quantized_product_is_near_the_product(block: int | None) -> None:
    """e4m3 keeps 4 bits: a product of 1536 of them is 3 % off, rms, and no more."""
    x, w = randn(64, 1536, dtype=F32), randn(260, 1536, dtype=F32)
    x8, x_scale = fp8.quantize_fp8(x, block)
    w8, w_scale = fp8.quantize_fp8_weight(w, block)
    assert tuple(w_scale.shape) == ((1,) if block is None else (3, 12))
    y, exact = fp8.linear_fp8(x8, w8, x_scale, w_scale, None, F32), x @ w.T
    error = (y - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0.02 < error < 0.045
    expected = reference.linear_fp8(x8, w8, x_scale.double(), w_scale.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)
    swiglu = fp8.linear_fp8_swiglu(x8, w8, x_scale, w_scale)
    expected = reference.linear_fp8_swiglu(x8, w8, x_scale.double(), w_scale.double())
    torch.testing.assert_close(swiglu.double(), expected, rtol=2**-8, atol=1e-2)


def test_rows_on_the_cpu_have_the_same_bits_in_any_batch() -> None:
    x8, x_scale = fp8.quantize_fp8(randn(70, 272), 128)
    w8, w_scale = fp8.quantize_fp8_weight(randn(90, 272), 128)
    whole = fp8.linear_fp8(x8, w8, x_scale, w_scale)
    for m in (1, 7, 33):
        assert torch.equal(fp8.linear_fp8(x8[:m], w8, x_scale[:m], w_scale), whole[:m])


GOOD: dict[str, Any] = {
    "x": torch.zeros(4, 256).to(E4M3), "w": torch.zeros(130, 256).to(E4M3),
    "x_scale": torch.ones(4, 2), "w_scale": torch.ones(2, 2),
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"x": torch.zeros(4, 256)}, TypeError, "x must be a float8_e4m3fn tensor"),
        ({"w": torch.zeros(130, 256).to(torch.float8_e5m2)}, TypeError, "w must be a float8_e4m3"),
        ({"w": GOOD["w"][0]}, ValueError, r"w must be \[N, K\]"),
        ({"x": GOOD["x"][:, :128]}, ValueError, "the last dimension of x"),
        ({"x": GOOD["x"][:, :40], "w": GOOD["w"][:, :40]}, ValueError, "multiple of 16"),
        ({"x_scale": torch.ones(4, 3)}, ValueError, "x_scale must have .* 4x2, got 4x3"),
        ({"x_scale": torch.ones(4, 2).double()}, TypeError, "x_scale must be a float32"),
        ({"x_scale": 1.0}, TypeError, "x_scale must be a float32"),
        ({"w_scale": torch.ones(130, 2)}, ValueError, "w_scale must have .* 2x2, got 130x2"),
        ({"w_scale": torch.ones(2, 2, device="meta")}, ValueError, "w_scale is on meta"),
        ({"residual": torch.zeros(4, 130)}, TypeError, "residual must be a bfloat16 tensor"),
        ({"residual": torch.zeros(4, 131).bfloat16()}, ValueError, "residual must be 4x130"),
        ({"out_dtype": torch.int8}, ValueError, "out_dtype must be bfloat16"),
    ],
)
def test_bad_arguments_are_named(changes: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fp8.linear_fp8(**{**GOOD, **changes})


def test_bad_arguments_of_the_others_are_named() -> None:
    with pytest.raises(ValueError, match="w must have an even number of rows"):
        fp8.linear_fp8_swiglu(**{**GOOD, "w": GOOD["w"][:129]})
    with pytest.raises(ValueError, match="out_dtype must be bfloat16 or float16"):
        fp8.linear_fp8_swiglu(**GOOD, out_dtype=F32)
    x = torch.ones(4, 256)
    for call, text in (
        (lambda: fp8.quantize_fp8(x, 64), "block must be None or 128, got 64"),
        (lambda: fp8.quantize_fp8(x, 128, torch.ones(1)), "scale is for block=None"),
        (lambda: fp8.quantize_fp8(x, None, torch.ones(2)), "scale must have one element"),
        (lambda: fp8.quantize_fp8(x[0, 0]), "x must be"),
        (lambda: fp8.quantize_fp8_weight(x[0]), r"w must be \[N, K\]"),
        (lambda: fp8.quantize_fp8_weight(x, 32), "block must be None or 128, got 32"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(TypeError, match="x must be bfloat16, float16 or float32"):
        fp8.quantize_fp8(torch.ones(4, 256).to(E4M3))


@pytest.mark.parametrize("arch", [a for a in BUILT if a != "90a"])
def test_other_architectures_are_refused(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with cuda_device(f"sm_{arch.removesuffix('a')}", monkeypatch):
        for call, op in (
            (lambda: fp8.linear_fp8(**GOOD), "linear_fp8"),
            (lambda: fp8.linear_fp8_swiglu(**GOOD), "linear_fp8_swiglu"),
            (lambda: fp8.quantize_fp8(torch.ones(2, 128).bfloat16(), 128), "quantize_fp8"),
        ):
            with pytest.raises(NotImplementedError, match=rf"mk_{op} .*sm_90a only.*sm_\d+'s"):
                call()
