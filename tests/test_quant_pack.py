"""mk_quant_pack, mk_quant_unpack: the layout to the bit, there and back, and what they refuse."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels import _native
from minitron_kernels.block_types import QUANT_TYPES
from tests import native_abi as abi
from tests.gguf_files import random_rows
from tests.quant_layout import IDS, decode, packed_bytes

Array = npt.NDArray[Any]
C = abi.constants()
each_type = pytest.mark.parametrize("kind", IDS)


def aligned(size: int, fill: int = 0xA5) -> Array:
    """Bytes whose address is a multiple of 16."""
    buffer = np.full(size + 16, fill, np.uint8)
    start = -buffer.ctypes.data % 16
    return buffer[start : start + size]


def pack(
    blocks: Array,
    kind: str,
    cols: int,
    row_order: Array | None = None,
    up: Array | None = None,
    threads: int = 1,
) -> Array:
    rows = len(blocks) * (2 if up is not None else 1)
    tiles = aligned(_native.quant_packed_bytes(IDS[kind], rows, cols))
    _native.quant_pack(
        blocks.ctypes.data, tiles.ctypes.data, blocks.strides[0], IDS[kind], rows, cols, threads,
        0 if row_order is None else row_order.ctypes.data,
        0 if up is None else up.ctypes.data, 0 if up is None else up.strides[0],
    )  # fmt: skip
    return tiles


def unpack(
    tiles: Array,
    kind: str,
    cols: int,
    blocks: Array,
    row_order: Array | None = None,
    up: Array | None = None,
    threads: int = 1,
) -> None:
    rows = len(blocks) * (2 if up is not None else 1)
    _native.quant_unpack(
        blocks.ctypes.data, tiles.ctypes.data, blocks.strides[0], IDS[kind], rows, cols, threads,
        0 if row_order is None else row_order.ctypes.data,
        0 if up is None else up.ctypes.data, 0 if up is None else up.strides[0],
    )  # fmt: skip


def test_types_are_ggmls() -> None:
    for kind, number in IDS.items():
        assert number == GGMLQuantizationType[kind] == C[f"MK_{kind}"]


# ------------------------------------------------------------------------------------ the layout


@each_type
@pytest.mark.parametrize("rows, tiles", [(1, 1), (16, 2), (33, 3)])
def test_layout_is_the_drawing(kind: str, rows: int, tiles: int) -> None:
    """A decoder written from the drawing finds ggml's weights, to the bit; padding is zeros."""
    elements = QUANT_TYPES[kind].elements
    for cols in {elements * tiles, 256 * tiles + (0 if elements == 256 else 96)}:
        blocks = random_rows(kind, rows, cols, np.random.default_rng(rows))
        packed = pack(blocks, kind, cols)
        assert len(packed) == packed_bytes(kind, rows, cols)
        got = decode(packed, kind, rows, cols)
        expected = quants.dequantize(blocks, GGMLQuantizationType[kind])
        assert np.array_equal(got[:rows, :cols], expected)
        # What zero bytes decode to, behind the last row and the last column.
        nothing = decode(np.zeros_like(packed), kind, rows, cols)
        assert np.array_equal(got[rows:], nothing[rows:])
        assert np.array_equal(got[:, cols:], nothing[:, cols:])


@each_type
def test_every_bit_counts(kind: str) -> None:
    """A changed bit of a tile changes the blocks (bits 6 and 7 of the bytes of 6-bit scales are
    free), and the weights: the comparison above can fail."""
    blocks = random_rows(kind, 16, 256, np.random.default_rng(1))
    packed, again = pack(blocks, kind, 256), np.zeros_like(blocks)
    expected = decode(packed, kind, 16, 256)
    start = {"Q4_K": 16 * 128, "Q5_K": 16 * 160}.get(kind, 1 << 20)
    scales = range(start, start + 256)
    changed = 0
    places = range(0, len(packed), 7)
    for at in places:
        bit = at // 7 % 8
        packed[at] ^= 1 << bit
        unpack(packed, kind, 256, again)
        assert np.array_equal(again, blocks) == (at in scales and bit > 5)
        with np.errstate(all="ignore"):
            changed += not np.array_equal(decode(packed, kind, 16, 256), expected)
        packed[at] ^= 1 << bit
    assert changed > 0.8 * len(places)  # a scale may be 0


@each_type
def test_size(kind: str) -> None:
    """At most 3 % more than the file has, for whole tiles of rows and k % 64 == 0."""
    block = QUANT_TYPES[kind]
    step = max(64, block.elements)
    for cols in (step, 5 * step, 576 if step == 64 else 512, 4096, 11520, 45 * 256):
        for rows in (16, 576, 4096):
            stored = rows * block.row_nbytes(cols)
            size = _native.quant_packed_bytes(IDS[kind], rows, cols)
            assert stored <= size <= 1.03 * stored
            assert size == packed_bytes(kind, rows, cols)
    assert _native.quant_packed_bytes(IDS[kind], 0, step) == 0


def test_size_of_a_large_matrix() -> None:
    assert _native.quant_packed_bytes(IDS["Q8_0"], 1 << 24, 1 << 20) == (1 << 39) * 34


# --------------------------------------------------------------------------------- there and back


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(list(IDS)),
    rows=st.one_of(st.integers(0, 70), st.sampled_from((1, 7, 16, 33, 129))),
    blocks_per_row=st.integers(1, 21),
    gap=st.integers(0, 5),
    is_ordered=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(
    kind: str,
    rows: int,
    blocks_per_row: int,
    gap: int,
    is_ordered: bool,
    threads: int,
    seed: int,
) -> None:
    """Any bytes come back, NaN scales too; what lies between rows is left alone."""
    block = QUANT_TYPES[kind]
    cols = (blocks_per_row if block.elements == 32 else blocks_per_row // 5 + 1) * block.elements
    rng = np.random.default_rng(seed)
    nbytes = block.row_nbytes(cols)
    source = rng.integers(0, 256, (rows, nbytes + gap), np.uint8)
    order = rng.permutation(rows).astype(np.int32) if is_ordered else None
    tiles = pack(source[:, :nbytes], kind, cols, order, threads=threads)
    target = rng.integers(0, 256, (rows, nbytes + gap), np.uint8)
    expected = target.copy()
    expected[:, :nbytes] = source[:, :nbytes]
    unpack(tiles, kind, cols, target[:, :nbytes], order, threads=threads)
    assert np.array_equal(target, expected)
    # The order of rows is that of the source's.
    moved = source[:, :nbytes][order] if is_ordered else source[:, :nbytes]
    assert np.array_equal(tiles, pack(np.ascontiguousarray(moved), kind, cols))


@each_type
def test_gate_and_up_take_turns(kind: str) -> None:
    rng = np.random.default_rng(0)
    gate, up = (
        rng.integers(0, 256, (9, QUANT_TYPES[kind].row_nbytes(512)), np.uint8) for _ in "gu"
    )
    tiles = pack(gate, kind, 512, up=up)
    both = np.stack((gate, up), 1).reshape(18, -1)
    assert np.array_equal(tiles, pack(both, kind, 512))
    gate_again, up_again = np.zeros_like(gate), np.zeros_like(up)
    unpack(tiles, kind, 512, gate_again, up=up_again)
    assert np.array_equal(gate_again, gate) and np.array_equal(up_again, up)


@each_type
def test_threads_make_the_same_bytes(kind: str) -> None:
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (700, QUANT_TYPES[kind].row_nbytes(1024)), np.uint8)
    one = pack(blocks, kind, 1024, threads=1)
    for threads in (2, 3, 256):
        assert np.array_equal(one, pack(blocks, kind, 1024, threads=threads))
        again = np.zeros_like(blocks)
        unpack(one, kind, 1024, again, threads=threads)
        assert np.array_equal(again, blocks)


def test_no_byte_beyond_the_tiles_is_written() -> None:
    for kind in IDS:
        blocks = random_rows(kind, 17, 256, np.random.default_rng(0))
        size = packed_bytes(kind, 17, 256)
        tiles = aligned(size + 64)
        _native.quant_pack(
            blocks.ctypes.data, tiles.ctypes.data, blocks.strides[0], IDS[kind], 17, 256, 2
        )
        assert (tiles[size:] == 0xA5).all()


# ------------------------------------------------------------------------------- memory it touches

GUARD = """
import sys
import numpy as np, torch
from tests.test_cpu_linear import before_guard_page
from tests.test_quant_pack import IDS, QUANT_TYPES, aligned, pack, unpack
keep = []
extra = sys.argv[1] == "past"
for kind in IDS:
    for rows, cols in ((1, 256), (17, 768)):
        blocks = np.random.default_rng(0).integers(
            0, 256, (rows, QUANT_TYPES[kind].row_nbytes(cols)), np.uint8)
        guarded = before_guard_page(torch.from_numpy(blocks), keep).numpy()
        if extra:
            guarded = np.lib.stride_tricks.as_strided(guarded, (rows + 1, blocks.shape[1]))
        tiles = pack(guarded, kind, cols)
        again = before_guard_page(torch.zeros(rows, blocks.shape[1], dtype=torch.uint8), keep)
        in_guard = before_guard_page(torch.from_numpy(tiles), keep).numpy()
        unpack(in_guard, kind, cols, again.numpy())
        assert np.array_equal(again.numpy(), blocks)
print("done")
"""


def guarded_run(mode: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GUARD, mode]
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)


def test_reads_and_writes_end_with_the_blocks() -> None:
    """Blocks and tiles stand before a guard page; one row more would be a segmentation fault."""
    result = guarded_run("inside")
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert guarded_run("past").returncode == -11


# ------------------------------------------------------------------------------------- bad input

BUFFER = aligned(1 << 16)
AT = BUFFER.ctypes.data
ORDER = np.arange(32, dtype=np.int32)
VALID: dict[str, Any] = {
    "blocks": AT, "tiles": AT, "row_bytes": 288, "type": C["MK_Q4_K"], "rows": 32, "k": 512,
    "num_threads": 1,
}  # fmt: skip
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("blocks", {"blocks": None}, "NULL"),
    ("tiles", {"tiles": None}, "NULL"),
    ("tiles", {"tiles": AT + 8}, "ALIGNMENT"),
    ("row_bytes", {"row_bytes": 287}, "STRIDE"),
    ("row_bytes", {"row_bytes": -288}, "STRIDE"),
    ("row_up_bytes", {"blocks_up": AT, "row_up_bytes": 287}, "STRIDE"),
    ("rows", {"blocks_up": AT, "row_up_bytes": 288, "rows": 31}, "SHAPE"),
    ("row_order", {"blocks_up": AT, "row_up_bytes": 288, "row_order": ORDER.ctypes.data}, "VALUE"),
    ("row_order", {"row_order": ORDER.ctypes.data + 2}, "ALIGNMENT"),
    ("type", {"type": 0}, "VALUE"),
    ("type", {"type": 9}, "VALUE"),
    ("k", {"k": 480}, "SHAPE"),
    ("k", {"k": 0}, "SHAPE"),
    ("k", {"k": (1 << 20) + 256}, "SHAPE"),
    ("rows", {"rows": -1}, "SHAPE"),
    ("rows", {"rows": (1 << 24) + 1}, "SHAPE"),
    ("num_threads", {"num_threads": 0}, "SHAPE"),
    ("num_threads", {"num_threads": 257}, "SHAPE"),
]


def call(name: str, **fields: Any) -> None:
    params = abi.structs()["mk_quant_pack_params"](**fields)
    abi.check(getattr(abi.library(), name)(ctypes.byref(params)))


@pytest.mark.parametrize("field, change, status", BAD)
def test_bad_parameter_is_named(field: str, change: dict[str, Any], status: str) -> None:
    for name in ("mk_quant_pack", "mk_quant_unpack"):
        with pytest.raises(abi.StatusError) as caught:
            call(name, **{**VALID, **change})
        assert caught.value.status == f"MK_ERR_{status}"
        assert field in caught.value.message


@pytest.mark.parametrize("bad", [-1, 32, 1 << 30])
def test_row_order_out_of_range(bad: int) -> None:
    order = ORDER.copy()
    order[5] = bad
    with pytest.raises(abi.StatusError, match=rf"row_order\[5\] must be 0 \.\.\. 31, got {bad}"):
        call("mk_quant_pack", **{**VALID, "row_order": order.ctypes.data})


def test_null_arguments_and_no_rows() -> None:
    lib, size = abi.library(), ctypes.c_int64()
    assert lib.mk_quant_pack(None) == lib.mk_quant_unpack(None) == C["MK_ERR_NULL"]
    assert lib.mk_quant_packed_bytes(C["MK_Q4_0"], 1, 32, None) == C["MK_ERR_NULL"]
    assert lib.mk_quant_packed_bytes(C["MK_Q4_0"], 1, 33, ctypes.byref(size)) == C["MK_ERR_SHAPE"]
    assert lib.mk_quant_packed_bytes(1, 1, 32, ctypes.byref(size)) == C["MK_ERR_VALUE"]
    for name in ("mk_quant_pack", "mk_quant_unpack"):
        call(name, **{**VALID, "rows": 0, "blocks": None, "tiles": None})


def test_python_exceptions() -> None:
    with pytest.raises(ValueError, match="k must be a multiple of 256, the block of type = Q6_K"):
        _native.quant_packed_bytes(IDS["Q6_K"], 4, 128)
    with pytest.raises(ValueError, match="type must be one of mk_quant_type"):
        _native.quant_pack(AT, AT, 32, 5, 1, 32, 1)
