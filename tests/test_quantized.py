"""QuantizedTensor: decoding, rows, devices, state dicts, and that nothing expands it silently."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minitron_kernels import _native
from minitron_kernels.block_types import GGML_NUMBERS, QUANT_TYPES
from minitron_kernels.quantized import QuantizedTensor, nonfinite_scale_row
from tests.gguf_files import SCALE_OFFSETS, random_rows

TYPES = tuple(SCALE_OFFSETS)


def make(kind: str, rows: int = 8, cols: int = 512, seed: int = 0) -> QuantizedTensor:
    blocks = random_rows(kind, rows, cols, np.random.default_rng(seed))
    return QuantizedTensor(torch.from_numpy(blocks), kind, (rows, cols))


class Module(nn.Module):
    def __init__(self, weight: QuantizedTensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.norm = nn.Parameter(torch.ones(4))


def test_types_are_ggmls() -> None:
    assert set(QUANT_TYPES) == set(TYPES)
    for kind, block in QUANT_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]] == (block.elements, block.nbytes)
        assert block.scale_offsets == SCALE_OFFSETS[kind]


# ---- decoding ----


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(TYPES),
    rows=st.sampled_from((0, 1, 2, 7, 33, 129)),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_dequantize_gives_ggufs_bits(kind: str, rows: int, blocks: int, seed: int) -> None:
    """Any bits, any finite scale: subnormal, negative zero and the largest included."""
    block = QUANT_TYPES[kind]
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 256, (rows, blocks, block.nbytes), np.uint8)
    for offset in SCALE_OFFSETS[kind]:
        bits = rng.integers(0, 1 << 16, (rows, blocks), np.uint16)
        bits = np.where(rng.random(bits.shape) < 0.2, bits & 0x8001, bits)  # zeros and the least
        bits = np.where(bits & 0x7C00 == 0x7C00, bits ^ 0x4000, bits).astype("<u2")
        stored[:, :, offset : offset + 2] = bits[..., None].view(np.uint8)
    stored = stored.reshape(rows, blocks * block.nbytes)
    w = QuantizedTensor(torch.from_numpy(stored), kind, (rows, blocks * block.elements))
    expected = torch.zeros(0)
    if rows:
        expected = torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType[kind]))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = w.dequantize(dtype)
        assert got.dtype == dtype and got.shape == w.shape
        same = got.flatten() == expected.to(dtype).flatten()
        assert same.all()


@pytest.mark.parametrize("kind", TYPES)
def test_dequantize_of_many_chunks(kind: str) -> None:
    w = make(kind, 129, 768)
    expected = quants.dequantize(w.blocks.numpy(), GGMLQuantizationType[kind])
    assert torch.equal(w.dequantize(), torch.from_numpy(expected))


def test_dequantize_takes_floating_dtypes_only() -> None:
    with pytest.raises(TypeError, match=r"floating-point type, got torch\.int8"):
        make("Q4_K").dequantize(torch.int8)


# ---- what keeps it packed ----


@pytest.mark.parametrize("kind", TYPES)
def test_rows_are_sliced_without_a_copy_and_gathered(kind: str) -> None:
    w = make(kind, 9)
    dense = w.dequantize()
    ids = torch.tensor([3, 3, 0, -1])
    for got, expected in (
        (w[2:5], dense[2:5]),
        (w[-2:], dense[-2:]),
        (w[4:4], dense[4:4]),
        (w[:, :], dense),
        (w[::3], dense[::3]),
        (w[ids], dense[ids]),
        (w.index_select(0, ids[:3]), dense[ids[:3]]),
        (w[torch.arange(9) % 2 == 0], dense[::2]),
        (w.clone(), dense),
        (w.detach(), dense),
    ):
        assert isinstance(got, QuantizedTensor) and got.quant_type == kind
        assert torch.equal(got.dequantize(), expected)
    assert w[2:5].blocks.data_ptr() == w.blocks.data_ptr() + 2 * w.blocks.shape[1]
    assert w.clone().blocks.data_ptr() != w.blocks.data_ptr()
    assert (
        w.nbytes
        == w.blocks.numel()
        == 9 * 512 // QUANT_TYPES[kind].elements * (QUANT_TYPES[kind].nbytes)
    )


def test_equal_sees_type_shape_and_bits() -> None:
    w, other = make("Q4_1"), make("Q4_1")
    assert torch.equal(w, other)
    other.blocks[7, 0] ^= 1
    assert not torch.equal(w, other)
    assert not torch.equal(w, w[:7]) and not torch.equal(w, make("Q4_0"))


FORBIDDEN: dict[str, Callable[[Any], Any]] = {
    "add": lambda w: w + 1,
    "multiply": lambda w: torch.ones(8, 512) * w,
    "in place": lambda w: w.add_(1),
    "sum": lambda w: w.sum(),
    "linear": lambda w: F.linear(torch.ones(2, 512), w),
    "embedding": lambda w: F.embedding(torch.tensor([1]), w),
    "float": lambda w: w.float(),
    "to dtype": lambda w: w.to(torch.bfloat16),
    "transpose": lambda w: w.T,
    "view": lambda w: w.view(-1),
    "one row": lambda w: w[3],
    "columns": lambda w: w[:, :256],
    "columns by index": lambda w: w.index_select(1, torch.tensor([0])),
    "element": lambda w: w[torch.tensor([0]), torch.tensor([1])],
    "concatenate": lambda w: torch.cat([w, w]),
    "out": lambda w: torch.add(torch.ones(8, 512), 1, out=w),
    "into dense": lambda w: torch.empty(8, 512).copy_(w),
    "from dense": lambda w: w.copy_(torch.zeros(8, 512)),
    "equal to dense": lambda w: torch.equal(w, torch.zeros(8, 512)),
    "zero": lambda w: w.zero_(),
    "pointer": lambda w: w.data_ptr(),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_everything_else_is_a_type_error(case: str) -> None:
    w = make("Q6_K")
    before = w.blocks.clone()
    with pytest.raises(TypeError, match="QuantizedTensor"):
        FORBIDDEN[case](w)
    assert torch.equal(w.blocks, before)


@pytest.mark.parametrize("call", [lambda w: w.numpy(), lambda w: w.tolist(), np.asarray])
def test_no_way_to_numpy(call: Callable[[Any], Any]) -> None:
    with pytest.raises(RuntimeError, match="not supported for tensor subclasses"):
        call(make("Q4_K"))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            ("Q4_K", (8, 256)),
            ValueError,
            r"\[8, 144\] bytes for a Q4_K matrix \[8, 256\], got .*28",
        ),
        (
            ("Q6_K", (8, 512)),
            ValueError,
            r"\[8, 420\] bytes for a Q6_K matrix \[8, 512\], got .*28",
        ),
        (("Q4_K", (8, 500)), ValueError, "rows of 500 are not a multiple of Q4_K's 256"),
        (("IQ4_XS", (8, 512)), ValueError, "type: got 'IQ4_XS', accepted: Q4_0, Q4_1"),
        ((None, (8, 512)), ValueError, "type: got None, accepted"),
        (("Q4_K", (8, 2, 256)), ValueError, r"shape must be \[N, K\], got \[8, 2, 256\]"),
    ],
)
def test_wrong_size_or_type_is_refused(
    arguments: tuple[Any, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        QuantizedTensor(make("Q4_K").blocks, *arguments)


def test_wrong_blocks_are_refused() -> None:
    blocks = make("Q4_K").blocks
    with pytest.raises(TypeError, match=r"uint8 tensor, got torch\.int8"):
        QuantizedTensor(blocks.view(torch.int8), "Q4_K", (8, 512))
    with pytest.raises(TypeError, match="uint8 tensor, got ndarray"):
        QuantizedTensor(blocks.numpy(), "Q4_K", (8, 512))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"contiguous, got strides \(1, 8\)"):
        QuantizedTensor(blocks.T.contiguous().T, "Q4_K", (8, 512))


def test_repr_says_what_it_is() -> None:
    w = make("Q5_K", 2048, 1024)
    assert repr(w) == "QuantizedTensor(Q5_K, 2048x1024, 1.38 MiB, device='cpu')"
    assert repr(Module(w).weight).startswith("Parameter of QuantizedTensor(Q5_K")


# ---- modules, files, devices, compilation ----


def test_a_module_keeps_it_through_dtype_device_and_copy() -> None:
    module = Module(make("Q3_K"))
    copied = copy.deepcopy(module)
    assert isinstance(copied.weight, nn.Parameter) and torch.equal(copied.weight, module.weight)
    assert copied.weight.blocks.data_ptr() != module.weight.blocks.data_ptr()
    half = copied.half()
    assert half.norm.dtype == torch.float16 and torch.equal(half.weight, module.weight)
    meta = copied.to("meta")
    assert isinstance(meta.weight, QuantizedTensor) and meta.weight.blocks.device.type == "meta"
    assert meta.weight.device.type == "meta" and meta.weight.nbytes == module.weight.nbytes
    empty = meta.to_empty(device="cpu")
    assert isinstance(empty.weight, QuantizedTensor) and empty.weight.device.type == "cpu"


def test_deepcopy_keeps_ties() -> None:
    w = make("Q4_K")
    first, second = copy.deepcopy([w, w])
    assert first is second and first is not w


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip(weights_only: bool, assign: bool) -> None:
    module = Module(make("Q6_K"))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=weights_only)
    device = "meta" if assign else "cpu"
    fresh = Module(QuantizedTensor.empty("Q6_K", (8, 512), device))
    assert fresh.load_state_dict(state, assign=assign).missing_keys == []
    assert isinstance(fresh.weight, nn.Parameter) and torch.equal(fresh.weight, module.weight)


@pytest.mark.parametrize("kind, cols", [("Q5_K", 512), ("Q4_K", 256)])
def test_state_dict_of_another_type_or_shape_is_refused(kind: str, cols: int) -> None:
    with pytest.raises(RuntimeError, match=r"weight(.|\n)*into Q5_K \[8, 512\]|size mismatch"):
        Module(QuantizedTensor.empty(kind, (8, cols))).load_state_dict(
            Module(make("Q4_K")).state_dict()
        )


def test_pickle_and_shared_memory() -> None:
    w = make("Q2_K")
    assert torch.equal(pickle.loads(pickle.dumps(w)), w)
    assert w.share_memory_().blocks.is_shared()


def test_parameters_cannot_require_gradients() -> None:
    with pytest.raises(RuntimeError, match="floating point"):
        nn.Parameter(make("Q4_K"))


def test_compile_takes_it_whole() -> None:
    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: torch.Tensor, w: QuantizedTensor) -> Any:
        return x @ w.dequantize().T, w[1:3], w.blocks.sum(), w.quant_type

    w, x = make("Q4_0", 4, 64), torch.randn(3, 64)
    y, rows, total, kind = run(x, nn.Parameter(w, requires_grad=False))
    assert torch.allclose(y, x @ w.dequantize().T, rtol=1e-5, atol=1e-4)
    assert torch.equal(rows, w[1:3]) and total == w.blocks.sum() and kind == "Q4_0"


# ---- scales ----


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(TYPES),
    rows=st.integers(1, 40),
    data=st.data(),
    bits=st.sampled_from((0x7C00, 0xFC00, 0x7E01, 0xFFFF)),
)
def test_nonfinite_scales_are_found(kind: str, rows: int, data: st.DataObject, bits: int) -> None:
    block = QUANT_TYPES[kind]
    w = make(kind, rows, 3 * block.elements)
    assert nonfinite_scale_row(w.blocks, kind) is None
    row = data.draw(st.integers(0, rows - 1))
    at = data.draw(st.integers(0, 2)) * block.nbytes + data.draw(
        st.sampled_from(block.scale_offsets)
    )
    w.blocks[row, at : at + 2] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
    assert nonfinite_scale_row(w.blocks, kind) == row


def test_nonfinite_scale_in_a_later_chunk_is_found() -> None:
    w = QuantizedTensor(torch.zeros(3000, 18 * 64, dtype=torch.uint8), "Q4_0", (3000, 2048))
    assert nonfinite_scale_row(w.blocks, "Q4_0") is None
    w.blocks[2999, 18 * 63 + 1] = 0x7C
    assert nonfinite_scale_row(w.blocks, "Q4_0") == 2999
    assert nonfinite_scale_row(w.blocks[:0], "Q4_0") is None


@pytest.mark.parametrize("threads", [1, 3])
def test_nonfinite_scales_of_several_matrices(threads: int) -> None:
    """The first bad row of each, whichever thread finds it; a stride between rows is no scale."""
    matrices, expected = [], []
    held = []
    for i, kind in enumerate(TYPES):
        block = QUANT_TYPES[kind]
        w = make(kind, 2000, 8 * block.elements)
        padded = torch.full((2000, 8 * block.nbytes + 2), 0xFF, dtype=torch.uint8)
        padded[:, :-2] = w.blocks
        bad = [] if i % 3 == 0 else [1999 - i, 700 + 7 * i]
        for row in bad:
            padded[row, block.scale_offsets[-1] + 1] |= 0x7C
        held.append(padded)
        matrix = padded.data_ptr(), padded.stride(0), 2000, w.shape[1], GGML_NUMBERS[kind]
        matrices.append(matrix)
        expected.append(min(bad, default=-1))
    assert _native.cpu_nonfinite_scales(matrices, threads) == expected
    assert _native.cpu_nonfinite_scales([], threads) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, 0, r"matrices\[1\].w is NULL"),
        (1, 17, r"matrices\[1\].w_row_bytes must be at least the 18 bytes of a row, got 17"),
        (2, -1, r"matrices\[1\].rows must be 0 ... 2147483647, got -1"),
        (3, 33, r"k must be a multiple of 32"),
        (4, 1, r"matrices\[1\].type"),
    ],
)
def test_nonfinite_scales_refuse_bad_matrices(field: int, value: int, message: str) -> None:
    w = make("Q4_0", 2, 32)
    good = [w.blocks.data_ptr(), 18, 2, 32, GGML_NUMBERS["Q4_0"]]
    bad = [*good]
    bad[field] = value
    with pytest.raises(ValueError, match=message):
        _native.cpu_nonfinite_scales([tuple(good), tuple(bad)], 1)
    with pytest.raises(ValueError, match="num_threads must be"):
        _native.cpu_nonfinite_scales([tuple(good)], 0)
