"""The linear kernels for more than 16 rows, tile by tile, on the emulator and a GPU.

linear_cases.py tells how results are compared. Outputs are poisoned with NaN and padded. The plan
chooses a tile by the shape; each of SIZES has the smallest shapes that make it choose one.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import emulator, native_emulator
from tests import native_abi as abi
from tests.linear_cases import Qkv, canonical, check_linear, run_linear
from tests.native_emulator import BUILT, DEVICES, dtype_id, on_own_and_alike
from tests.test_kernels_memory import HALVES, archs, dtypes, poisoned, strided, values

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# Tile -> rows and heads of 128 columns: tiles with tails in both directions, on any of DEVICES.
SIZES = {
    "m64_n64": (77, 2),
    "m128_n128": (371, 26),
    "m128_n256": (515, 37),
}
# What sm_90 has for more than 64 rows instead of mma.sync's small tile, and what only it has.
SM90 = {"m64_n64": "m128_n64"}
SM90_SIZES = {**SIZES, "m128_n192": (387, 33)}
KINDS = ("plain", "residual", "f32", "swiglu", "qkv")


def size_on(arch: str, size: str) -> str:
    return SM90.get(size, size) if arch == "90a" else size


def entry_of(arch: str, op: str, x: Tensor, n: int, out_dtype: torch.dtype | None = None) -> str:
    """The kernel that the plan chooses for x and n rows of w."""
    params = abi.structs()["mk_linear_params"](
        x=x.data_ptr(), w=x.data_ptr(), out=x.data_ptr(), x_stride=x.stride(0),
        w_stride=x.stride(0), out_stride=n, m=x.shape[0], n=n, k=x.shape[1], dtype=dtype_id(x),
        out_dtype=abi.constants()["MK_F32"] if out_dtype == F32 else dtype_id(x),
    )  # fmt: skip
    return abi.plan(op, params, arch).entry.decode()


def out_of(
    op: str, x: Tensor, n: int, dtype: torch.dtype | None = None, padding: int = 0
) -> Tensor:
    columns = n // 2 if op == "linear_swiglu" else n
    return poisoned(torch.empty(x.shape[0], columns, dtype=dtype or x.dtype), padding)


# ------------------------------------------------------------------------------------- results


def check_tile(arch: str, size: str, kind: str, dtype: torch.dtype, k: int) -> None:
    m, heads = SM90_SIZES[size]
    op = {"swiglu": "linear_swiglu", "qkv": "qkv_rope_append"}.get(kind, "linear")
    if kind == "qkv":
        heads = max(heads, 3)
        qkv = Qkv.random(m, k, (heads - 2, 1), 128, 64, dtype=dtype, interleaved=k % 16 != 0)
        n = heads * 128
        entry = entry_of("80" if arch == "gpu" else arch, "linear", qkv.x, n)
    else:
        x, n = strided(values(m, k, dtype=dtype), 8), heads * 128 - 30
        entry = entry_of("80" if arch == "gpu" else arch, "linear", x, n)
    assert entry.endswith(f"{'bf16' if dtype == BF16 else 'f16'}_{size_on(arch, size)}")
    if kind == "qkv":
        qkv.check(arch, seed=k)
        return
    w = strided(values(n, k, dtype=dtype, seed=1), 16)
    out = out_of(op, x, n, F32 if kind == "f32" else dtype, padding=5)
    residual = strided(values(m, n, dtype=dtype, seed=2), 3) if kind == "residual" else None
    check_linear(op, arch, x, w, out, residual=residual, seed=k)


@pytest.mark.parametrize(
    "arch, size, kind, dtype",
    on_own_and_alike([(s, k, d) for s in SIZES for k in KINDS for d in HALVES]),
)
def test_gemm_tile(arch: str, size: str, kind: str, dtype: torch.dtype) -> None:
    check_tile(arch, size, kind, dtype, k=104 if kind == "plain" else 72)


@pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
@dtypes
@pytest.mark.parametrize("kind", KINDS, ids="emu-sm_90a-{}".format)
def test_gemm_sm90_wide_tile(kind: str, dtype: torch.dtype) -> None:
    check_tile("90a", "m128_n192", kind, dtype, k=72)


@pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
@pytest.mark.parametrize(
    "kind, cut",
    [("plain", 64), ("residual", 64), ("f32", 64), ("swiglu", 64), ("f32", 48), ("plain", 48)],
)
@pytest.mark.parametrize("size", SM90_SIZES, ids=lambda s: f"emu-sm_90a-{s}")
def test_gemm_sm90_writes_vectors(size: str, kind: str, cut: int) -> None:
    """Outputs of 16 bytes a thread, in whole sectors, where groups of its columns are whole: all
    kinds if 64 columns of the last tile are cut, fp32 if 48 are. Others leave in pairs."""
    m, heads = SM90_SIZES[size]
    op, n = "linear_swiglu" if kind == "swiglu" else "linear", heads * 128 - cut
    x, w = values(m, 136, dtype=BF16), values(n, 136, dtype=BF16, seed=1)
    assert entry_of("90a", op, x, n).endswith(size_on("90a", size))
    residual = strided(values(m, n, dtype=BF16, seed=2), 24) if kind == "residual" else None
    out = out_of(op, x, n, F32 if kind == "f32" else None, padding=16)
    counters = check_linear(op, "90a", x, w, out, residual=residual, seed=m)
    assert counters is not None
    is_whole = cut == 64 or kind == "f32"
    sectors = m * out.shape[1] * out.itemsize // 32
    assert counters.write_sectors == sectors * (1 if is_whole else 2)
    if is_whole:  # eight rows of 64 bytes
        assert counters.write_requests == -(-m // 8) * (out.shape[1] * out.itemsize // 64)


@pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("columns, m, n", [(256, 1400, 4608), (192, 1100, 4224)])
def test_gemm_sm90_warpgroups_keep_their_distance(
    columns: int, m: int, n: int, stages: int
) -> None:
    """Blocks of several tiles, from one stage each, without a lead, to a whole ring's."""
    x, w = values(m, 64 * stages, dtype=F16), values(n, 64 * stages, dtype=F16, seed=1)
    assert entry_of("90a", "linear", x, n).endswith(f"m128_n{columns}")
    assert -(-m // 128) * -(-n // columns) > 132
    whole = out_of("linear", x, n)
    check_linear("linear", "90a", x, w, whole, seed=stages)
    again = out_of("linear", x, n)
    run_linear("linear", "90a", x, w, again, seed=stages + 10)
    assert torch.equal(again, whole)


@pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
@pytest.mark.parametrize("interleaved", [False, True], ids=["split", "interleaved"])
@pytest.mark.parametrize(
    "head_dim, rotary_dim, padding",
    [(128, 128, 8), (128, 64, 8), (80, 20, 4), (64, 64, 8), (64, 64, 2), (64, 6, 8), (64, 64, 1)],
    ids=lambda i: f"{i}",
)
def test_gemm_sm90_qkv_outputs(
    head_dim: int, rotary_dim: int, padding: int, interleaved: bool
) -> None:
    """16 or 8 bytes at once; pairs where a rotation or a head cuts 64 columns, or rows are odd."""
    case = Qkv.random(
        150, 72, (5, 2), head_dim, rotary_dim, dtype=F16, interleaved=interleaved, padding=padding
    )
    case.x = strided(case.x, 8)
    case.check("90a", seed=rotary_dim)


@pytest.mark.slow
@archs
@dtypes
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_gemm_every_tile(arch: str, size: str, kind: str, dtype: torch.dtype) -> None:
    check_tile(arch, size, kind, dtype, k=200)


SHAPES = [  # op, m, n, k: Minitron-8B's and SmolLM2's, cut in n
    ("linear", 512, 128, 4096),
    ("linear", 64, 64, 11520),
    ("linear", 33, 192, 4096),
    ("linear_swiglu", 129, 256, 4096),
    ("linear", 40, 576, 576),
    ("linear", 17, 576, 1536),
    ("linear_swiglu", 130, 3072, 576),
    ("linear", 65, 1, 8),
    ("linear", 17, 7, 40),
    ("linear_swiglu", 19, 2, 136),
    ("linear", 1100, 3080, 72),  # sm_90's blocks take up to three tiles each, in clusters of 4
    ("linear_swiglu", 1540, 4064, 136),
]


@pytest.mark.parametrize(
    "arch, op, m, n, k, dtype",
    on_own_and_alike([(*shape, HALVES[i % 2]) for i, shape in enumerate(SHAPES)]),
)
def test_gemm_model_shapes(arch: str, op: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, w = values(m, k, dtype=dtype), values(n, k, dtype=dtype, seed=1)
    check_linear(op, arch, x, w, out_of(op, x, n), seed=m)


QKV_SHAPES = [  # tokens, hidden, heads, head_dim, rotary_dim, interleaved
    (64, 4096, (2, 1), 128, 128, False),
    (130, 576, (9, 3), 64, 64, False),
    (33, 576, (9, 3), 64, 64, True),
    (45, 128, (3, 2), 80, 20, False),
    (18, 64, (1, 1), 16, 6, True),
    (50, 96, (2, 2), 256, 256, False),
]


@pytest.mark.parametrize(
    "arch, tokens, hidden, heads, head_dim, rotary_dim, interleaved, dtype",
    on_own_and_alike([(*shape, HALVES[i % 2]) for i, shape in enumerate(QKV_SHAPES)]),
)
def test_gemm_qkv_shapes(
    arch: str, tokens: int, hidden: int, heads: tuple[int, int], head_dim: int, rotary_dim: int,
    interleaved: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    Qkv.random(
        tokens, hidden, heads, head_dim, rotary_dim, dtype=dtype, interleaved=interleaved, padding=8
    ).check(arch, seed=tokens)


@settings(max_examples=40, deadline=None)
@given(
    arch=st.sampled_from(DEVICES),
    dtype=st.sampled_from(HALVES),
    kind=st.sampled_from(KINDS[:-1]),
    m=st.integers(17, 200),
    n=st.integers(1, 200),
    k=st.integers(1, 40).map(lambda i: 8 * i),
    padding=st.tuples(st.sampled_from([0, 8, 24]), st.sampled_from([0, 8, 24]), st.integers(0, 9)),
    offset=st.tuples(st.sampled_from([0, 8]), st.sampled_from([0, 8]), st.integers(0, 3)),
    seed=st.integers(0, 2**16),
)
def test_gemm_strides(
    arch: str, dtype: torch.dtype, kind: str, m: int, n: int, k: int, padding: tuple[int, ...],
    offset: tuple[int, ...], seed: int,
) -> None:  # fmt: skip
    """Rows of x and w 16 bytes aligned, as the GEMM takes them; the outputs' any distance apart."""
    op = "linear_swiglu" if kind == "swiglu" else "linear"
    n = 2 * n if kind == "swiglu" else n
    x, w = (
        strided(values(rows, k, dtype=dtype, seed=seed + i), padding[i], offset[i])
        for i, rows in enumerate((m, n))
    )
    out = out_of(op, x, n, F32 if kind == "f32" else None)
    out = poisoned(out, padding[2], offset[2])
    residual = None
    if kind == "residual":
        residual = strided(values(m, n, dtype=dtype, seed=seed + 3), padding[2], offset[2])
    check_linear(op, arch, x, w, out, residual=residual, seed=seed)


# -------------------------------------------------------------------------------------- bits


def check_canonical_order(arch: str, size: str, dtype: torch.dtype) -> None:
    """fp32 outputs, bit by bit. k ends inside a stage and inside a group of 16."""
    m, heads = SM90_SIZES[size]
    x, w = values(m, 104, dtype=dtype), values(heads * 128, 104, dtype=dtype, seed=1)
    assert entry_of(arch, "linear", x, len(w), F32).endswith(size_on(arch, size))
    out = out_of("linear", x, len(w), F32)
    run_linear("linear", arch, x, w, out, seed=5)
    assert torch.equal(out, canonical(arch, x, w))


@pytest.mark.parametrize(
    "arch, size, dtype", on_own_and_alike([(s, d) for s in SIZES for d in HALVES])
)
def test_gemm_sums_in_the_canonical_order(arch: str, size: str, dtype: torch.dtype) -> None:
    if arch == "gpu":
        pytest.skip("the order is the same, but an MMA may drop low bits that the model keeps")
    check_canonical_order(arch, size, dtype)


@pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
@dtypes
def test_gemm_sm90_wide_tile_sums_in_the_canonical_order(dtype: torch.dtype) -> None:
    check_canonical_order("90a", "m128_n192", dtype)


@pytest.mark.parametrize(
    "arch, op, dtype",
    on_own_and_alike([(op, d) for op in ("linear", "linear_swiglu") for d in HALVES]),
)
def test_gemm_rows_have_the_same_bits_in_any_batch(arch: str, op: str, dtype: torch.dtype) -> None:
    """Of 1 row (the skinny kernel), and of 16 to 871 in each tile."""
    x, w = values(871, 152, dtype=dtype), values(2816, 152, dtype=dtype, seed=1)
    whole = out_of(op, x, len(w))
    run_linear(op, arch, x, w, whole)
    names = {entry_of("80" if arch == "gpu" else arch, op, x, len(w))}
    for m in (1, 16, 17, 64, 65, 129, 300, 500):
        rows = x[-m:]
        names.add(entry_of("80" if arch == "gpu" else arch, op, rows, len(w)))
        out = out_of(op, rows, len(w))
        run_linear(op, arch, rows, w, out, seed=m)
        assert torch.equal(out, whole[-m:]), m
    assert len(names) >= 4


@pytest.mark.parametrize("arch", BUILT, ids=lambda a: f"emu-sm_{a}")
def test_gemm_qkv_rows_have_the_same_bits_in_any_batch(arch: str) -> None:
    qkv = Qkv.random(140, 136, (3, 1), 64, 64, dtype=BF16)
    qkv.run(arch)
    q, k, v = qkv.q.clone(), qkv.k_cache.clone(), qkv.v_cache.clone()
    for t in (qkv.q, qkv.k_cache, qkv.v_cache):
        t.fill_(float("nan"))
    whole = (qkv.x, qkv.q, qkv.slots, qkv.positions)
    for first, last in ((0, 1), (1, 17), (17, 50), (50, 140)):
        qkv.x, qkv.q, qkv.slots, qkv.positions = (t[first:last] for t in whole)
        qkv.run(arch, seed=last)
    for got, expected in zip((whole[1], qkv.k_cache, qkv.v_cache), (q, k, v), strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())


@archs
@pytest.mark.parametrize("n", [77, 88])
def test_gemm_adds_the_residual_in_place(arch: str, n: int) -> None:
    x, w = values(70, 264, dtype=BF16), values(n, 264, dtype=BF16, seed=1)
    residual = values(70, n, dtype=BF16, seed=2)
    out = out_of("linear", x, n)
    check_linear("linear", arch, x, w, out, residual=residual)
    run_linear("linear", arch, x, w, residual, residual=residual)
    assert torch.equal(residual, out)


@pytest.mark.parametrize(
    "clusters, columns, blocks, cluster", [(0, 256, 128, 4), (32, 256, 128, 4), (31, 192, 124, 4),
                                           (24, 256, 132, 2)]
)  # fmt: skip
def test_gemm_sm90_clusters_run_at_once(
    clusters: int, columns: int, blocks: int, cluster: int
) -> None:
    """256 tiles are two rounds of 32 clusters of 4. Where the GPU has room for 31 they would be
    three, as are 352 narrower ones; where it has less, it is two of clusters of 2."""
    params = abi.structs()["mk_linear_params"](
        x=1 << 20, w=1 << 20, out=1 << 20, x_stride=4096, w_stride=4096, out_stride=4096, m=2048,
        n=4096, k=4096, dtype=dtype_id(torch.empty(0, dtype=BF16)), out_dtype=1,
    )  # fmt: skip
    device, plan = abi.device("90a"), abi.structs()["mk_plan"]()
    device.clusters_of_4 = clusters
    abi.check(abi.library().mk_linear_plan(*map(ctypes.byref, (params, device, plan))))
    assert plan.entry.endswith(f"_m128_n{columns}".encode())
    assert (plan.grid[0], plan.cluster[0]) == (blocks, cluster)


# ------------------------------------------------------------------------------------ counters


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(a, id=f"emu-sm_{a}", marks=[] if a == "80" else pytest.mark.slow)
        for a in BUILT
        if a != "90a"
    ],
)
def test_gemm_large_tile_meets_the_bars(arch: str) -> None:
    """At k = 4096: issue slots at most .28 of the tensor pipe's time (4 slots and half an
    m16n8k16 a clock), no bank conflict, each sector of x and w from DRAM once, outputs in whole
    sectors."""
    m, n, k = 896, 2816, 4096  # 77 tiles of 128 x 256
    if arch == "80":
        m = 640  # 55 are enough for it
    x, w = values(m, k, dtype=BF16), values(n, k, dtype=BF16, seed=1)
    assert entry_of(arch, "linear", x, n).endswith("m128_n256")
    out = out_of("linear", x, n)
    counters = run_linear("linear", arch, x, w, out)
    assert counters.issued["mma"] == m * n * k // 2048
    issued = counters.instructions - counters.issued["mov"]
    ratio = issued / 4 / (2 * counters.issued["mma"])
    print(f"sm_{arch} issue/t {ratio:.3f}")
    assert ratio <= 0.28
    assert counters.shared_wavefronts == counters.shared_wavefronts_min
    assert counters.unique_read_sectors == (m + n) * k * 2 // 32
    assert counters.write_sectors == counters.unique_write_sectors == m * n * 2 // 32


# Tile -> m, n, and the blocks that multiply, in clusters of 2 x 1: of 128 x 256 the last is half
# empty.
LARGE_TILES = {
    "m128_n256": (896, 3328, 104),
    "m128_n192": (512, 4608, 96),
    "m128_n128": (512, 3072, 96),
}
SMALLER_TILES = [("m128_n192", "plain"), ("m128_n192", "qkv"), ("m128_n128", "plain")]


@pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
@pytest.mark.parametrize(
    "size, kind",
    [
        pytest.param(*c, id="-".join(("emu-sm_90a", *c)))
        for c in [*(("m128_n256", k) for k in KINDS), *SMALLER_TILES]
    ],
)
def test_gemm_sm90_large_tile_meets_the_bars(size: str, kind: str) -> None:
    """At k = 4096, by what a tile and a stage of it take at smaller k: issue slots at most .15 of
    the tensor pipe's time, 4 clocks of 4 slots a stage and column. Each sector from DRAM once."""
    m, n, blocks = LARGE_TILES[size]
    op = "linear_swiglu" if kind == "swiglu" else "linear"
    issued = []
    for k in (64, 192):
        if kind == "qkv":
            qkv = Qkv.random(m, k, (n // 128 - 4, 2), 128, 128, dtype=BF16)
            qkv.slots[:] = torch.arange(m)
            counters = qkv.run("90a")
            read = qkv.x.nbytes + qkv.w.nbytes
            extra = sum(t.nbytes for t in (qkv.slots, qkv.positions, *qkv.angles)) // 32 + 4
            written = m * n * 2
        else:
            x, w = values(m, k, dtype=BF16), values(n, k, dtype=BF16, seed=1)
            assert entry_of("90a", op, x, n).endswith(size)
            out = out_of(op, x, n, F32 if kind == "f32" else None)
            residual = values(m, n, dtype=BF16, seed=2) if kind == "residual" else None
            counters = run_linear(op, "90a", x, w, out, residual=residual)
            read = x.nbytes + w.nbytes + (0 if residual is None else residual.nbytes)
            extra, written = 0, out.nbytes
        assert counters is not None
        assert counters.issued["mma"] == blocks * k // 64 * 4 * 8
        assert counters.shared_wavefronts == counters.shared_wavefronts_min
        assert read // 32 <= counters.unique_read_sectors <= read // 32 + extra
        assert counters.write_sectors == counters.unique_write_sectors == written // 32
        issued.append(counters.instructions - counters.issued["mov"])
    stage = (issued[1] - issued[0]) / 2
    clocks = 4 * int(size.rpartition("n")[2])
    ratio = (issued[0] + 63 * stage) / (blocks * 64 * clocks * 4)
    print(f"{size} {kind} issue/t {ratio:.3f}")
    assert ratio <= 0.15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["m64_n64", "m128_n128"], ids=lambda s: f"emu-sm_80-{s}")
def test_gemm_moves_whole_sectors_without_bank_conflicts(size: str, kind: str) -> None:
    m, n, k = (64, 512, 1024) if size == "m64_n64" else (384, 3328, 64)
    if kind == "qkv":
        qkv = Qkv.random(m, k, (n // 64 - 2, 1), 64, 64, dtype=BF16)
        qkv.slots[:] = torch.arange(m)
        counters = qkv.run("80")
        read = qkv.x.nbytes + qkv.w.nbytes
        extra = sum(t.nbytes for t in (qkv.slots, qkv.positions, *qkv.angles)) // 32 + 4
        written = m * n * 2
    else:
        op = "linear_swiglu" if kind == "swiglu" else "linear"
        x, w = values(m, k, dtype=BF16), values(n, k, dtype=BF16, seed=1)
        assert entry_of("80", op, x, n).endswith(size)
        out = out_of(op, x, n, F32 if kind == "f32" else BF16)
        residual = values(m, n, dtype=BF16) if kind == "residual" else None
        counters = run_linear(op, "80", x, w, out, residual=residual)
        read = x.nbytes + w.nbytes + (0 if residual is None else residual.nbytes)
        extra, written = 0, out.nbytes
    # Of qkv, each row's addresses are written to shared memory once, 32 bytes apart.
    excess = counters.shared_wavefronts - counters.shared_wavefronts_min
    assert excess <= (2 * m * (n // 64) if kind == "qkv" else 0)
    assert read // 32 <= counters.unique_read_sectors <= read // 32 + extra
    assert counters.write_sectors == counters.unique_write_sectors == written // 32


# ------------------------------------------------------------------------------ planted faults


def changed_library(
    folder: Path, entry: str, old: bytes, new: bytes, count: int, arch: str = "80"
) -> ctypes.CDLL:
    """A copy of the library with the fatbin that has `entry`, in whose PTX `old` is replaced
    `count` times (0: always), and those of the kernels that prepare its operands."""
    path = native_emulator.copy_of_library(folder / "package", [arch])
    file = path.parent / "kernels" / f"sm_{arch}.fatbin"
    head = b".entry " + entry.encode() + b"(\n"
    pieces = native_emulator.pieces_of(file.read_bytes())
    data = b"".join(p for p in pieces if head in p or b".entry mk_quant_prepare_x_" in p)
    start = data.index(head)
    end = data.index(b"\n}\n", start)
    body, made = re.subn(
        old, lambda m: m.expand(new).ljust(len(m[0])), data[start:end], count=count
    )
    assert made and len(body) == end - start
    file.unlink()
    file.write_bytes(data[:start] + body + data[end:])
    lib = abi.load(path)
    native_emulator.make_current(arch)
    abi.check(lib.mk_load(), lib)
    return lib


@pytest.mark.parametrize(
    "old, new, count, found",
    [
        (
            rb"bar\.sync[^;]*;",
            rb"",
            0,
            "shared.memory|not waited for",
        ),
        (rb"(cp\.async\.wait_group) [1-9];", rb"\1 9;", 0, "asynchronous copy not waited for"),
        (rb"mma\.sync", rb"//a.sync", 1, "out: element"),
        (rb", 16, %r\d+;", rb", 16;", 0, "out: element|out of bounds"),
    ],
    ids=["emu-sm_80-barrier", "emu-sm_80-wait", "emu-sm_80-mma", "emu-sm_80-tail"],
)
def test_gemm_planted_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes, count: int, found: str
) -> None:
    x, w = values(65, 200, dtype=BF16), values(130, 200, dtype=BF16, seed=1)
    x, w = strided(x, 120), strided(w, 120)  # NaN behind each row
    entry = entry_of("80", "linear", x, len(w))
    monkeypatch.setenv("MK_CUDA_DRIVER", str(emulator.build()))
    lib = changed_library(tmp_path, entry, old, new, count)
    monkeypatch.setattr(native_emulator, "emulated_library", lambda: lib)
    with pytest.raises(AssertionError, match=found):
        check_linear("linear", "80", x, w, out_of("linear", x, len(w)))


@pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
@pytest.mark.parametrize(
    "old, new, found",
    [
        (rb"wgmma\.wait_group\.sync\.aligned 1;", b"", "shared-memory race.* which a wgmma"),
        (rb"wgmma\.wait_group\.sync\.aligned 0;", b"", "^wgmma not waited for"),
        (rb"(mbarrier\.try_wait\.parity\.shared::cta\.b64 p, \[%r\d+ \+ 0\]), %r\d+;", rb"\1, 1;",
         "^uninitialised shared memory|^asynchronous copy not waited for"),
        (rb"mbarrier\.arrive\.shared::cluster\.b64 _, \[%r\d+ \+ 0\];", b"", "^deadlock"),
        (rb"wgmma\.fence\.sync\.aligned;", b"", "^missing wgmma.fence"),
        (rb"bar\.arrive [^;]*;", b"", "^deadlock"),
    ],
    ids=["emu-sm_90a-wait", "emu-sm_90a-last-wait", "emu-sm_90a-parity", "emu-sm_90a-release",
         "emu-sm_90a-fence", "emu-sm_90a-lead"],
)  # fmt: skip
def test_gemm_sm90_planted_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes, found: str
) -> None:
    """In a cluster of two, with more stages along k than the ring has."""
    x, w = values(300, 616, dtype=BF16), values(130, 616, dtype=BF16, seed=1)
    entry = entry_of("90a", "linear", x, len(w))
    monkeypatch.setenv("MK_CUDA_DRIVER", str(emulator.build()))
    lib = changed_library(tmp_path, entry, old, new, 0, "90a")
    monkeypatch.setattr(native_emulator, "emulated_library", lambda: lib)
    with pytest.raises(AssertionError, match=found):
        check_linear("linear", "90a", x, w, out_of("linear", x, len(w)))


@pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")
@pytest.mark.parametrize(
    "old, new, found",
    [
        (rb"(tensor\.5d[^{]*{%r\d+, %r\d+, %r\d+), (%r\d+), (%r\d+)}", rb"\1, \3, \2}",
         "out: element"),
        (rb"ld\.global\.v4\.b32 [^;]*;", rb"", "out: element"),
    ],
    ids=["emu-sm_90a-order", "emu-sm_90a-residual"],
)  # fmt: skip
def test_gemm_sm90_planted_fault_of_outputs_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes, found: str
) -> None:
    """Groups of columns and pairs taken for each other, and residuals that nobody asked for."""
    x, w = values(300, 616, dtype=BF16), values(160, 616, dtype=BF16, seed=1)
    residual = values(300, 160, dtype=BF16, seed=2)
    entry = entry_of("90a", "linear", x, len(w))
    monkeypatch.setenv("MK_CUDA_DRIVER", str(emulator.build()))
    lib = changed_library(tmp_path, entry, old, new, 0, "90a")
    monkeypatch.setattr(native_emulator, "emulated_library", lambda: lib)
    with pytest.raises(AssertionError, match=found):
        check_linear("linear", "90a", x, w, out_of("linear", x, len(w)), residual=residual)
