"""What sm_90's linear kernels for few rows have of their own: strips of several widths, clusters
that share x, warps that fill stages. On the emulator; test_linear.py has the tests of all
architectures.
"""

from __future__ import annotations

import ctypes
import re
import struct
from pathlib import Path

import pytest
import torch

from tests import emulator, linear_cases, native_emulator
from tests import native_abi as abi
from tests.linear_cases import Qkv, canonical, check_linear, linear_params, normalised, run_linear
from tests.native_emulator import BUILT
from tests.test_kernels_memory import HALVES, poisoned, strided, values
from tests.test_linear import ceil_div

Tensor = torch.Tensor
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = pytest.mark.skipif("90a" not in BUILT, reason="sm_90a is not in this build")

# Width of a strip -> columns that make the plan choose it, of one and of two blocks a cluster. The
# last strip is cut.
COLUMNS = {
    ("n32", 1): 5024, ("n32", 2): 2050, ("n48", 1): 5730, ("n48", 2): 3850,
    ("n96", 1): 11430, ("n96", 2): 7610,
}  # fmt: skip


def out_of(op: str, x: Tensor, n: int, dtype: torch.dtype | None = None) -> Tensor:
    columns = n // 2 if op == "linear_swiglu" else n
    return poisoned(torch.empty(x.shape[0], columns, dtype=dtype or x.dtype))


def plan_of(op: str, x: Tensor, w: Tensor, out: Tensor, norm: Tensor | None) -> ctypes.Structure:
    return abi.plan(op, linear_params(x, w, out, norm), "90a")


@pytest.mark.parametrize("op", ["linear", "linear_swiglu"])
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(
    "width, cluster, m, k",
    [("n32", 1, 9, 200), ("n32", 2, 33, 1672), ("n48", 1, 16, 136), ("n48", 2, 17, 64),
     ("n96", 1, 3, 712), ("n96", 2, 32, 1096)],
)  # fmt: skip
def test_skinny_sm90_strips(
    op: str, has_norm: bool, width: str, cluster: int, m: int, k: int
) -> None:
    """More stages of k than the ring has, and fewer; k that ends inside a stage."""
    dtype = HALVES[(cluster + has_norm + (op == "linear")) % 2]
    n = COLUMNS[width, cluster]
    x = strided(values(m, k, dtype=dtype), 8)
    w = strided(values(n, k, dtype=dtype, seed=1), 16)
    norm_weight = values(k, dtype=dtype, seed=2) if has_norm else None
    out = out_of(op, x, n)
    plan = plan_of(op, x, w, out, norm_weight)
    assert plan.entry.decode().endswith(f"_m64_{width}") and plan.cluster[0] == cluster
    check_linear(op, "90a", x, w, out, norm_weight, seed=k)


@pytest.mark.parametrize("width", ["n32", "n48", "n96"])
@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "f16"])
def test_skinny_sm90_qkv(dtype: torch.dtype, width: str) -> None:
    """64 tokens with the norm, Minitron's heads for the widest strips."""
    hidden, heads = {"n32": (584, (8, 2)), "n48": (264, (25, 3)), "n96": (136, (32, 8))}[width]
    case = Qkv.random(32 if width == "n48" else 64, hidden, heads, 128, 128, dtype=dtype,
                      has_norm=True, padding=8)  # fmt: skip
    counters = case.check("90a", seed=hidden)
    assert counters is not None and counters.shared_wavefronts == counters.shared_wavefronts_min


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "f16"])
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
def test_skinny_sm90_rows_have_the_same_bits_in_any_batch(
    dtype: torch.dtype, has_norm: bool
) -> None:
    """Of 64 rows and of fewer, by strips of any width and by elements, in the canonical order."""
    x, w = values(64, 712, dtype=dtype), values(7610, 712, dtype=dtype, seed=1)
    norm_weight = values(712, dtype=dtype, seed=2) if has_norm else None
    whole = out_of("linear", x, len(w), F32)
    run_linear("linear", "90a", x, w, whole, norm_weight)
    if not has_norm:
        assert torch.equal(whole, canonical("90a", x, w))
    entries = {plan_of("linear", x, w, whole, norm_weight).entry}
    for first, m, n, offset in [
        (63, 1, 7610, 0), (5, 8, 300, 0), (40, 9, 7610, 0), (3, 16, 5730, 0), (47, 17, 3850, 0),
        (1, 50, 90, 0), (20, 33, 77, 1), (0, 64, 40, 0),
    ]:  # fmt: skip
        rows = strided(x[first : first + m], 8 - 7 * offset, offset)
        out = out_of("linear", rows, n, F32)
        entries.add(plan_of("linear", rows, w[:n], out, norm_weight).entry)
        run_linear("linear", "90a", rows, w[:n], out, norm_weight, seed=m)
        assert torch.equal(out, whole[first : first + m, :n]), (first, m, n)
    assert len(entries) == 3


@pytest.mark.parametrize("m, has_norm", [(1, True), (16, False), (64, False), (64, True)])
def test_skinny_sm90_is_deterministic(m: int, has_norm: bool) -> None:
    x, w = values(m, 1288, dtype=BF16), values(700, 1288, dtype=BF16, seed=1)
    norm_weight = values(1288, dtype=BF16, seed=2) if has_norm else None
    outs = []
    for seed in range(5):
        outs.append(out_of("linear", x, 700))
        run_linear("linear", "90a", x, w, outs[-1], norm_weight, seed=seed)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_skinny_sm90_of_many_rows_by_elements() -> None:
    """Blocks of 64 rows, the last one cut; the ring goes on from one to the next."""
    x, w = strided(values(150, 131, dtype=F16), 1), values(100, 131, dtype=F16, seed=1)
    out = out_of("linear", x, 100)
    assert plan_of("linear", x, w, out, None).grid[1] == 3
    check_linear("linear", "90a", x, w, out)


def test_skinny_sm90_of_one_row_of_any_stride() -> None:
    """A tensor map must be given a stride even where there is no second row."""
    x, w = values(1, 72, dtype=BF16), values(1, 72, dtype=BF16, seed=1)
    for stride in (0, 8, 1 << 40):
        out = out_of("linear", x, 1)
        run_linear(
            "linear", "90a", x.as_strided((1, 72), (stride, 1)),
            w.as_strided((1, 72), (stride, 1)), out,
        )  # fmt: skip
        assert torch.equal(out.float(), canonical("90a", x, w).to(BF16).float()), stride


# ------------------------------------------------------------------------------------- counters


@pytest.mark.parametrize("m", [1, 16, 64])
@pytest.mark.parametrize("has_norm", [False, True], ids=["plain", "norm"])
def test_skinny_sm90_reads_each_weight_once(m: int, has_norm: bool) -> None:
    """From DRAM, and from L2 too; x as often as linear_skinny_tiles.h says, without conflicts."""
    n, k = 6144, 512
    x, w = values(m, k, dtype=BF16), values(n, k, dtype=BF16, seed=1)
    norm_weight = values(k, dtype=BF16) if has_norm else None
    out = out_of("linear", x, n)
    c = run_linear("linear", "90a", x, w, out, norm_weight)
    plan = plan_of("linear", x, w, out, norm_weight)
    columns = int(plan.entry.decode().rpartition("_n")[2])
    assert c is not None and columns == (96 if has_norm and m > 32 else 48)
    x_sectors, w_sectors, norm_sectors = x.nbytes // 32, w.nbytes // 32, has_norm * k // 16
    assert c.unique_read_sectors == x_sectors + w_sectors + norm_sectors
    assert c.unique_write_sectors == out.nbytes // 32
    strips = n // columns // plan.cluster[0]  # that read x; a norm reads it once more
    rereads = strips * x_sectors * (1 + has_norm)
    weights = n // columns * norm_sectors * min(ceil_div(m, 4), 4)  # a warp has 4 rows of 16
    assert w_sectors + rereads <= c.read_sectors <= w_sectors + rereads + weights
    assert c.shared_wavefronts == c.shared_wavefronts_min


# ------------------------------------------------------------------------------ planted faults


def changed_library(folder: Path, entry: str, old: bytes, new: bytes, count: int) -> ctypes.CDLL:
    """A copy of the library with the one fatbin that has `entry`, in whose PTX `old` is replaced
    `count` times (0: always)."""
    path = native_emulator.copy_of_library(folder / "package", ["90a"])
    file = path.parent / "kernels" / "sm_90a.fatbin"
    rest, data = file.read_bytes(), b""
    while b".entry " + entry.encode() + b"(\n" not in data:
        _magic, _version, header, payload = struct.unpack_from("<IHHQ", rest)
        data, rest = rest[: header + payload], rest[header + payload :]
    start = data.index(b".entry " + entry.encode() + b"(\n")
    end = data.index(b"\n}\n", start)
    body, made = re.subn(
        old, lambda m: m.expand(new).ljust(len(m[0])), data[start:end], count=count
    )
    assert made and len(body) == end - start, made
    file.unlink()
    file.write_bytes(data[:start] + body + data[end:])
    lib = abi.load(path)
    native_emulator.make_current("90a")
    abi.check(lib.mk_load(), lib)
    return lib


@pytest.mark.parametrize(
    "old, new, count, found",
    [
        (rb"fence\.proxy\.async[^;]*;", rb"", 0, "missing proxy fence"),
        (rb"wgmma\.wait_group\.sync\.aligned 0;", rb"", 0, "wgmma not waited for"),
        (rb"wgmma\.wait_group\.sync\.aligned 1;", rb"wgmma.wait_group.sync.aligned 7;", 0,
         "shared-memory race"),
        (rb"wgmma\.fence\.sync\.aligned;", rb"", 0, "missing wgmma.fence"),
        # The first of the four of a stage, in the loop of each product.
        (rb"(wgmma\.fence\.sync\.aligned;(?s:.*?))wgmma\.mma_async", rb"\1//mma.mma_async", 0,
         "out: element|unknown"),
        (rb"barrier\.cluster\.wait[^;]*;", rb"", 0, "barrier|mbarrier|race|cluster"),
        (rb"mbarrier\.arrive\.shared::cluster[^;]*;", rb"", 0, "deadlock"),
        (rb"\.multicast::cluster", rb"", 0, "deadlock|bad bulk copy|unknown|statement"),
    ],
    ids=["fence", "last-wait", "wait", "wgmma-fence", "mma", "cluster", "release", "multicast"],
)  # fmt: skip
def test_skinny_sm90_planted_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bytes, new: bytes, count: int, found: str
) -> None:
    """Two blocks a cluster, the norm, more stages than the ring has."""
    x, w = values(40, 1672, dtype=BF16), values(130, 1672, dtype=BF16, seed=1)
    norm_weight = values(1672, dtype=BF16, seed=2)
    out = out_of("linear", x, len(w))
    entry = plan_of("linear", x, w, out, norm_weight).entry.decode()
    monkeypatch.setenv("MK_CUDA_DRIVER", str(emulator.build()))
    lib = changed_library(tmp_path, entry, old, new, count)
    # The norm's kernel is not in it: the whole library's.
    expected = normalised("90a", x, norm_weight)
    monkeypatch.setattr(native_emulator, "emulated_library", lambda: lib)
    monkeypatch.setattr(linear_cases, "normalised", lambda *_: expected)
    with pytest.raises((AssertionError, abi.StatusError), match=found):
        check_linear("linear", "90a", x, w, out, norm_weight)
