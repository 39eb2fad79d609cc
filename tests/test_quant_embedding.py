"""mk_embedding_quant on the emulator: rows of packed tables, with the bits of gguf's decoder."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_kernels.block_types import QUANT_TYPES
from tests import native_abi as abi
from tests.gguf_files import SCALE_OFFSETS, random_rows
from tests.native_emulator import BUILT, DEVICES, dtype_id, run, storage_of
from tests.quant_layout import IDS
from tests.test_kernels_memory import archs, run_changed
from tests.test_quant_pack import pack

Array = npt.NDArray[Any]
Tensor = torch.Tensor
DTYPES = (torch.bfloat16, torch.float16)
each_type = pytest.mark.parametrize("kind", IDS)
POISON = -7.0


def make_params(ids: Tensor, tiles: Tensor, kind: str, vocab: int, out: Tensor) -> ctypes.Structure:
    structs = abi.structs()
    return structs["mk_embedding_quant_params"](
        embedding=structs["mk_embedding_params"](
            ids=ids.data_ptr(), out=out.data_ptr(), out_stride=out.stride(0), tokens=len(ids),
            vocab=vocab, hidden=out.shape[1], ids_dtype=dtype_id(ids), dtype=dtype_id(out),
        ),
        table=structs["mk_quant_matrix"](tiles=tiles.data_ptr(), type=IDS[kind], rows=vocab),
    )  # fmt: skip


def embed(
    ids: Tensor,
    blocks: Array,
    kind: str,
    cols: int,
    dtype: torch.dtype,
    device: str,
    padding: int = 0,
    shift: int = 0,
    seed: int = 0,
) -> Tensor:
    """Rows of the table; what lies between and before the rows of the output must be untouched."""
    tiles = torch.from_numpy(pack(blocks, kind, cols))
    buffer = torch.full((shift + len(ids) * (cols + padding) + 8,), POISON, dtype=dtype)
    out = buffer[shift : shift + len(ids) * (cols + padding)].view(len(ids), cols + padding)
    out = out[:, :cols]
    params = make_params(ids, tiles, kind, len(blocks), out)
    run("embedding_quant", device, params, [ids, tiles, storage_of(out)], seed)
    result = out.clone()
    out.fill_(POISON)
    assert (buffer == POISON).all()
    return result


def same_bits(got: Tensor, expected: Tensor) -> bool:
    """The same numbers, signs of zero included; any NaN equals any."""
    nan = got.isnan()
    equal = got.view(torch.int16) == expected.view(torch.int16)
    return bool((nan == expected.isnan()).all() and (equal | nan).all())


def expected_rows(blocks: Array, kind: str, ids: Tensor, dtype: torch.dtype) -> Tensor:
    with np.errstate(all="ignore"):
        table = torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType[kind])).to(dtype)
    inside = (ids >= 0) & (ids < len(blocks))
    rows = table[ids.long().clamp(0, len(blocks) - 1)]
    rows[~inside] = float("nan")
    return rows


def any_scale(blocks: Array, kind: str, rng: np.random.Generator) -> Array:
    """Scales of any finite bits, a fifth of them zeros and the least; some NaN and infinity."""
    elements, nbytes = QUANT_TYPES[kind].elements, QUANT_TYPES[kind].nbytes
    assert elements
    stored = blocks.reshape(-1, nbytes).copy()
    for offset in SCALE_OFFSETS[kind]:
        bits = rng.integers(0, 1 << 16, len(stored), np.uint16)
        bits = np.where(rng.random(len(stored)) < 0.2, bits & 0x8001, bits)
        stored[:, offset : offset + 2] = bits.astype("<u2")[:, None].view(np.uint8)
    return stored.reshape(blocks.shape)


@each_type
@archs
def test_rows_have_ggufs_bits(arch: str, kind: str) -> None:
    """Every slot of a tile, ids out of range, both dtypes; K of one tile and of a short one."""
    rng = np.random.default_rng(5)
    for cols, dtype in ((256, DTYPES[0]), (1024 if QUANT_TYPES[kind].elements == 256 else 576,
                                           DTYPES[1])):  # fmt: skip
        blocks = random_rows(kind, 35, cols, rng)
        ids = torch.tensor([*range(35), -1, 35, 3, 3, 1 << 40], dtype=torch.int64)
        got = embed(ids, blocks, kind, cols, dtype, arch)
        assert same_bits(got, expected_rows(blocks, kind, ids, dtype))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(IDS)), seed=st.integers(0, 2**32 - 1))
def test_any_table(data: st.DataObject, kind: str, seed: int) -> None:
    """Any bytes, NaN and infinite scales among them; K in whole blocks; rows of any alignment."""
    rng = np.random.default_rng(seed)
    block = QUANT_TYPES[kind]
    cols = data.draw(st.integers(1, 21 if block.elements == 32 else 4)) * block.elements
    vocab, tokens = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 9))
    dtype = data.draw(st.sampled_from(DTYPES))
    index = data.draw(st.sampled_from((torch.int32, torch.int64)))
    blocks = any_scale(rng.integers(0, 256, (vocab, block.row_nbytes(cols)), np.uint8), kind, rng)
    ids = torch.from_numpy(rng.integers(-1, vocab + 1, tokens)).to(index)
    got = embed(
        ids, blocks, kind, cols, dtype, data.draw(st.sampled_from(DEVICES)),
        padding=data.draw(st.integers(0, 5)), shift=data.draw(st.integers(0, 3)), seed=seed % 1000,
    )  # fmt: skip
    assert same_bits(got, expected_rows(blocks, kind, ids, dtype))


@archs
def test_model_shapes(arch: str) -> None:
    """SmolLM2's table (hidden 576, Q8_0) and Minitron-8B's (4096), few tokens of them."""
    rng = np.random.default_rng(0)
    for kind, cols in (("Q8_0", 576), ("Q4_K", 4096), ("Q6_K", 4096)):
        blocks = random_rows(kind, 64, cols, rng)
        ids = torch.tensor([63, 0, 17], dtype=torch.int32)
        got = embed(ids, blocks, kind, cols, torch.bfloat16, arch)
        assert same_bits(got, expected_rows(blocks, kind, ids, torch.bfloat16))


def test_a_row_of_many_blocks() -> None:
    """More tiles than one block of the grid has (64)."""
    blocks = random_rows("Q2_K", 3, 256 * 67, np.random.default_rng(0))
    ids = torch.tensor([2, 5])
    got = embed(ids, blocks, "Q2_K", 256 * 67, torch.float16, DEVICES[0])
    assert same_bits(got, expected_rows(blocks, "Q2_K", ids, torch.float16))


@each_type
def test_counts(kind: str) -> None:
    """Lane-instructions per weight; bytes read: those of two rows (a tile's words hold a pair), and
    written: each once. Run with -s for the table."""
    if "80" not in BUILT:
        pytest.skip("sm_80 is not in this build")
    tokens, cols = 16, 4096
    blocks = random_rows(kind, 512, cols, np.random.default_rng(0))
    tiles = torch.from_numpy(pack(blocks, kind, cols)).clone()  # as aligned as device memory
    assert tiles.data_ptr() % 32 == 0
    ids = torch.arange(0, 512, 32, dtype=torch.int32) + 5
    out = torch.zeros(tokens, cols, dtype=torch.bfloat16)
    params = make_params(ids, tiles, kind, 512, out)
    counters = run("embedding_quant", "80", params, [ids, tiles, out])
    assert counters is not None
    weights = tokens * cols
    per_weight = counters.instructions * 32 / weights
    stored = tokens * QUANT_TYPES[kind].row_nbytes(cols)
    read, written = 32 * counters.unique_read_sectors, 32 * counters.unique_write_sectors
    print(f"\n{kind} {per_weight:.2f} lane-instructions per weight, {read / stored:.2f} x bytes")
    assert written == out.nbytes and counters.write_sectors * 32 == out.nbytes
    assert read <= 2.1 * stored + 32 * tokens * (cols // 256) * 2  # and sectors of scales
    assert per_weight <= 15


def test_planted_faults_are_seen() -> None:
    """The rounding of the result and the sign of the offset, changed in the PTX."""
    kind, cols = "Q4_0", 256
    blocks = random_rows(kind, 20, cols, np.random.default_rng(0))
    tiles = torch.from_numpy(pack(blocks, kind, cols))
    ids = torch.arange(20)
    expected = expected_rows(blocks, kind, ids, torch.bfloat16)
    for old, new in ((r"cvt\.rn\.bf16x2", "cvt.rz.bf16x2"), (r"0fC1000000", "0f41000000")):
        out = torch.zeros(20, cols, dtype=torch.bfloat16)
        params = make_params(ids, tiles, kind, 20, out)
        run_changed("embedding_quant", params, [ids, tiles, out], old, new)
        assert not same_bits(out, expected)


def test_an_id_behind_the_table_is_an_error_of_the_caller() -> None:
    """vocab says 32, the memory has 16 rows: the emulator sees the access, so the ones above that
    read an id out of range read nothing."""
    blocks = random_rows("Q4_K", 16, 256, np.random.default_rng(0))
    tiles = torch.from_numpy(pack(blocks, "Q4_K", 256))
    ids, out = torch.tensor([16]), torch.zeros(1, 256, dtype=torch.bfloat16)
    params = make_params(ids, tiles, "Q4_K", 32, out)
    with pytest.raises(AssertionError, match="mk_embedding_quant"):
        run("embedding_quant", BUILT[0], params, [ids, tiles, out])
