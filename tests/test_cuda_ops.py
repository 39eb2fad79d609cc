"""The way of CUDA tensors: ops, cuda_ops, the native layer, a kernel; against the CPU's answers.

Without a GPU the emulator stands for the driver of this process, and CPU tensors for CUDA's. The
kernels' own tests are in test_kernels_memory.py; here it is pointers, strides and allocation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from minitron_kernels import cuda_ops, ops, reference, sampling
from tests import native_abi
from tests.cuda_device import (
    PARAMS,
    both,
    cuda_device,
    launches,
    no_host_reads,
    on,
    on_cpu,
    on_device,
)
from tests.emulated_device import DEVICE, emulated
from tests.test_kernels_memory import assert_close, rope_scale

Tensor = torch.Tensor
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=PARAMS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with cuda_device(request.param, monkeypatch) as name:
        yield name


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        # Both round fp32 results once: at most one unit in the last place apart.
        torch.testing.assert_close(a, b, rtol=torch.finfo(b.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 576), (0, 64), (64,), (7, 33)])
def test_norms(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype)
    got, expected, _ = both(ops.rms_norm, device, x, weight, 1e-5)
    close(got, expected)
    residual = randn(*shape, 2, dtype=dtype)[..., 1]  # strided: copied and copied back
    got, expected, _ = both(ops.rms_norm, device, residual, weight, 1e-5)
    close(got, expected)
    target = residual.clone()
    got, expected, arguments = both(ops.add_rms_norm, device, x, target, weight, 1e-5)
    close(got, expected)
    close([arguments[1]], [target])


def test_add_rms_norm_writes_a_strided_residual(device: str) -> None:
    x, weight = randn(6, 64), randn(64)
    wide = on(randn(6, 128), device)
    total = wide[:, ::2]
    expected = (x.to(total.device) + total).cpu()
    ops.add_rms_norm(on(x, device), total, on(weight, device), 1e-5)
    assert torch.equal(total.cpu(), expected)


def test_a_copy_of_a_strided_weight_lives_until_the_launch() -> None:
    """This device forgets memory that was freed."""
    with emulated("sm_80"):
        x, residual, wide = (randn(*s).to(DEVICE) for s in ((6, 64), (6, 64), (128,)))
        weight = wide[::2]
        for op, rest in ((ops.rms_norm, ()), (ops.add_rms_norm, (residual,))):
            got = op(x, *(t.clone() for t in rest), weight, 1e-5)
            expected = op(x, *(t.clone() for t in rest), weight.contiguous(), 1e-5)
            assert torch.equal(got.cpu(), expected.cpu())


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_rope_and_append(device: str, interleaved: bool, index: torch.dtype) -> None:
    angles = torch.arange(40)[:, None] / 1e4 ** (torch.arange(32) / 32)
    cos, sin = angles.cos(), angles.sin()
    q, k, v = randn(9, 4, 64), randn(9, 2, 64), randn(9, 2, 64) + 1
    positions = torch.tensor([0, 39, 3, 3, 4, 5, 6, 7, 8], dtype=index)
    got, expected, _ = both(ops.apply_rope, device, q, k, cos, sin, positions, interleaved)
    close(got, expected)

    caches = torch.full((3, 16, 2, 64), 5.0).bfloat16(), torch.full((3, 16, 2, 64), 6.0).bfloat16()
    slots = torch.tensor([0, 47, -1, 16, 17, 18, 1, 2, 3], dtype=index)

    def append(*args: Any) -> None:
        k, v, cos, sin, positions, k_cache, v_cache, slots = args
        rope = ops.Rope(cos, sin, positions, interleaved)
        ops.rope_append(k, v, rope, (k_cache, v_cache), slots)

    *_, arguments = both(append, device, k, v, cos, sin, positions, *caches, slots)
    close(arguments[5:7], list(caches))
    assert not (caches[0] == 5).all()


def test_silu_and_embedding(device: str) -> None:
    for shape in ((4, 3, 96), (1, 2), (0, 64)):
        got, expected, _ = both(ops.silu_and_mul, device, randn(*shape))
        close(got, expected)
    table = randn(50, 72)
    for ids in (torch.tensor([[3, 49], [0, 3]]), torch.tensor([7], dtype=torch.int32)):
        got, expected, _ = both(ops.embedding, device, ids, table)
        close(got, expected)


# ----------------------------------------------------------------------------------------- linear


def magnitude(x: Tensor, w: Tensor) -> Tensor:
    """The sum of |x w|: what is left of it when terms cancel has no relative error of its own."""
    return x.double().abs() @ w.double().abs().T


def near(got: Tensor, expected: Tensor, exact: Tensor, scale: Tensor) -> None:
    """The tolerance rule against the CPU's error; 2^-8 of ``scale`` counts besides the result."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert_close(got, exact, expected, "out", exact.abs() + scale / 256)


LINEAR_SHAPES = [((1,), 64, 96), ((3, 2), 40, 33), ((16,), 70, 576), ((0,), 8, 8), ((33,), 130, 64)]


@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("shape", LINEAR_SHAPES, ids=str)
def test_linear(device: str, dtype: torch.dtype, shape: tuple[tuple[int, ...], int, int]) -> None:
    rows, n, k = shape
    x, w = randn(*rows, k, dtype=dtype), randn(n, k, dtype=dtype)
    residual = randn(*rows, n + 8, dtype=dtype)[..., :n]
    exact, scale = x.double() @ w.double().T, magnitude(x.reshape(-1, k), w).view(*rows, n)
    (got,), (expected,), _ = both(ops.linear, device, x, w)
    near(got, expected, exact, scale)
    (got,), (expected,), arguments = both(ops.linear, device, x, w, residual)
    near(got, expected, exact + residual.double(), scale)
    assert torch.equal(arguments[2], residual)
    (got,), (expected,), _ = both(ops.linear, device, x, w, out_dtype=torch.float32)
    assert got.dtype == torch.float32
    assert ((got.double() - exact).abs() <= 2**-20 * scale).all()
    assert not got.isnan().any()


def test_linear_of_any_strides(device: str) -> None:
    x = randn(5, 66, 3)[..., 1].T  # neither dimension adjoins
    w = randn(66 * 5, 2)[:, 0].view(66, 5)
    (got,), (expected,), _ = both(ops.linear, device, x, w)
    near(got, expected, x.double() @ w.double().T, magnitude(x, w))


@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65])
def test_a_norm_that_rides_has_the_bits_of_rms_norm(device: str, tokens: int) -> None:
    x, w, weight = (on(t, device) for t in (randn(tokens, 96), randn(40, 96), randn(96) + 1))
    with launches() as names, no_host_reads(device):
        together = ops.linear(x, w, norm=ops.Norm(weight, 1e-5))
    assert names == ["linear"] if tokens <= 64 else ["rms_norm", "linear"]
    assert torch.equal(together, ops.linear(ops.rms_norm(x, weight, 1e-5), w))


@pytest.mark.parametrize("tokens", [1, 7, 20, 70])
@pytest.mark.parametrize("packed", [False, True], ids=["pair", "packed"])
def test_swiglu_mlp(device: str, tokens: int, packed: bool) -> None:
    hidden, inner = 64, 88
    x, residual, weight = randn(tokens, hidden), randn(tokens, hidden), randn(hidden) + 1
    gate, up, down = randn(inner, hidden) / 4, randn(inner, hidden) / 5, randn(hidden, inner) / 4
    matrices: Any = ops.pack_gate_up(gate, up) if packed else (gate, up)
    norm = ops.Norm(weight, 1e-5)
    with launches() as names:
        (got,), (expected,), _ = both(
            ops.swiglu_mlp, device, x, matrices, down, norm=norm, residual=residual
        )
    gate_up = ["linear_swiglu"] if packed else ["linear", "linear", "silu_and_mul"]
    assert names == [*(["rms_norm"] if tokens > 64 else []), *gate_up, "linear"]
    normed = ops.Norm(weight.double(), 1e-5)
    exact = reference.swiglu_mlp(
        x.double(), (gate.double(), up.double()), down.double(), normed, residual.double()
    )
    with on_cpu():
        hidden_rows = ops.silu_and_mul(ops.linear(x, torch.cat((gate, up)), norm=norm))
    near(got, expected, exact, 64 * magnitude(hidden_rows, down))


def angles_of(positions: int, rotated: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] / 1e4 ** (torch.arange(rotated // 2) * 2 / rotated)
    return angles.cos(), angles.sin()


class QkvCase:
    """Arguments of qkv_rope_append; the caches hold 5 and 6 where nothing is written."""

    def __init__(
        self, tokens: int, hq: int, hk: int, d: int, rotated: int, interleaved: bool = False
    ) -> None:
        hidden = 72
        self.x, self.norm = randn(tokens, hidden), ops.Norm(randn(hidden) + 1, 1e-5)
        self.matrices = tuple(randn(h * d, hidden) / 6 for h in (hq, hk, hk))
        self.packed = ops.pack_qkv(*self.matrices, d, rotated, interleaved)
        positions = torch.arange(tokens) * 7 % 40
        self.rope = ops.Rope(*angles_of(40, rotated), positions, interleaved)
        self.cache = torch.full((3, 16, hk, d), 5.0), torch.full((3, 16, hk, d), 6.0)
        self.cache = tuple(c.bfloat16() for c in self.cache)
        self.slots = torch.arange(tokens, dtype=torch.int32) * 5 % 48
        self.slots[tokens // 2] = -1

    def check(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, expected: list[Tensor]) -> None:
        """``expected``: what the CPU made of the same arguments."""
        x, weight = self.x.double(), self.norm.weight.double()
        normed = reference.rms_norm(x, weight, self.norm.eps)
        cos, sin = (t[self.rope.positions] for t in self.rope[:2])
        kept = self.slots >= 0
        for i, got in enumerate((q, k_cache.flatten(0, 1), v_cache.flatten(0, 1))):
            w = self.matrices[i]
            y = (normed @ w.double().T).unflatten(1, (-1, got.shape[-1]))
            scale = magnitude(normed, w).view_as(y)
            if i < 2:
                y = reference.rotate(y, cos.double(), sin.double(), self.rope.interleaved)
                scale = rope_scale(scale, cos, sin, self.rope.interleaved)
            if i == 0:
                near(got, expected[0], y, 4 * scale)
                continue
            rows = self.slots[kept].long()
            near(got[rows], expected[i].flatten(0, 1)[rows], y[kept], 4 * scale[kept])
            others = torch.ones(48, dtype=torch.bool)
            others[rows] = False
            assert (got[others] == 4 + i).all()


QKV = [(1, 4, 2, 64, 64, False), (7, 3, 1, 32, 16, True), (19, 4, 4, 16, 16, False)]


@pytest.mark.parametrize("shape", QKV, ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["three", "packed"])
def test_qkv_rope_append(device: str, shape: tuple[Any, ...], packed: bool) -> None:
    case = QkvCase(*shape)

    def op(*args: Any) -> tuple[Any, ...]:
        q = ops.qkv_rope_append(*args)
        return q, *args[4]

    w = case.packed if packed else case.matrices
    with launches() as names:
        got, expected, _ = both(op, device, case.x, case.norm, w, case.rope, case.cache, case.slots)
    fused = ["qkv_rope_append"] if packed else ["linear"] * 3 + ["rope_append", "apply_rope"]
    assert names == [*(["rms_norm"] if shape[0] > 64 else []), *fused]
    case.check(*got, expected)


def test_rows_have_the_same_bits_in_any_batch(device: str) -> None:
    case = QkvCase(21, 4, 2, 32, 32)
    gate, up, down = randn(40, 72) / 4, randn(40, 72) / 5, randn(72, 40) / 4
    packed, norm = on_device(ops.pack_gate_up(gate, up), device), on_device(case.norm, device)
    down, w_qkv = on(down, device), on_device(case.packed, device)
    x, rope, slots = (on_device(t, device) for t in (case.x, case.rope, case.slots))

    def run(rows: slice) -> tuple[Tensor, ...]:
        cache = on_device(case.cache, device)
        turn = rope._replace(positions=rope.positions[rows])
        q = ops.qkv_rope_append(x[rows], norm, w_qkv, turn, cache, slots[rows])
        mlp = ops.swiglu_mlp(x[rows], packed, down, norm, x[rows])
        own = slots[rows][slots[rows] >= 0].long()
        return q, mlp, *(c.flatten(0, 1)[own] for c in cache)

    whole = run(slice(0, 21))
    for rows in (slice(0, 1), slice(3, 10), slice(4, 20)):
        part = run(rows)
        assert torch.equal(part[0], whole[0][rows]) and torch.equal(part[1], whole[1][rows])
        kept = slots[: rows.stop] >= 0
        first = int(kept[: rows.start].sum())
        for a, b in zip(part[2:], whole[2:], strict=True):
            assert torch.equal(a, b[first : first + len(a)])


def test_a_wrong_order_of_rows_is_seen(device: str) -> None:
    """The comparisons above can fail: gate and up that changed places, pairs that are not."""
    x, gate, up, down = randn(4, 64), randn(88, 64) / 4, randn(88, 64) / 5, randn(64, 88) / 4
    packed = ops.pack_gate_up(up, gate)
    got = ops.swiglu_mlp(*(on_device(t, device) for t in (x, packed, down)))
    with on_cpu():
        expected = ops.swiglu_mlp(x, (gate, up), down)
        hidden = ops.silu_and_mul(ops.linear(x, torch.cat((gate, up))))
    exact = reference.swiglu_mlp(x.double(), (gate.double(), up.double()), down.double())
    with pytest.raises(AssertionError, match="relative error"):
        near(got.cpu(), expected, exact, 64 * magnitude(hidden, down))

    case = QkvCase(5, 2, 1, 32, 32)
    wrong = case.packed._replace(weight=torch.cat(case.matrices))
    arguments = (case.x, case.norm, wrong, case.rope, case.cache, case.slots)
    moved = tuple(on_device(a, device) for a in arguments)
    q = ops.qkv_rope_append(*moved)
    with on_cpu():
        right = ops.qkv_rope_append(case.x, case.norm, case.packed, *arguments[3:])
    with pytest.raises(AssertionError, match="relative error"):
        case.check(q.cpu(), *(t.cpu() for t in moved[4]), [right, *case.cache])


@pytest.mark.parametrize("head_dim", [24])
def test_what_no_kernel_takes_is_computed_and_told(
    device: str, head_dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    cuda_ops._log_fallback.cache_clear()
    case = QkvCase(3, 2, 1, head_dim, 8)
    arguments = (case.x, case.norm, case.packed, case.rope, case.cache, case.slots)
    q = ops.qkv_rope_append(*(on_device(a, device) for a in arguments))
    with on_cpu():
        assert torch.equal(q.cpu(), ops.qkv_rope_append(*arguments)) or device == "cuda"
    assert "qkv_rope_append takes head_dim 16, 32, ... 256, it is 24" in caplog.text


def test_memory_that_lasts_is_asked_for_by_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that this one allocates may be a graph's, as in the warm-up of torch.compile's."""
    done: list[Any] = []

    class Memory:
        def record_stream(self, stream: Any) -> None:
            done.append(("used on", stream))

        def zero_(self) -> Memory:
            done.append("zero")
            return self

    def empty(*size: int, **how: Any) -> Memory:
        assert size == (40,) and how == {"dtype": torch.int32, "device": torch.device("cuda", 1)}
        assert threading.current_thread() is not threading.main_thread()
        return Memory()

    class Stream:
        def wait_stream(self, other: Any) -> None:
            done.append(("waits for", other))

    stream = Stream()
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: f"default of {device}")
    cuda_ops.lasting_zeros(40, torch.int32, torch.device("cuda", 1))
    assert done == [("waits for", "default of cuda:1"), ("used on", stream), "zero"]


def test_limits_are_those_of_the_header() -> None:
    constants = native_abi.constants()
    assert constants["MK_LINEAR_MAX_NORM_M"] == cuda_ops.MAX_NORM_ROWS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_equals_the_cpu_sampler(device: str, dtype: torch.dtype) -> None:
    logits = 4 * randn(24, 1031, dtype=dtype)
    logits[3, 50] = logits[3, 900] = 40.0  # a tie: the lower id
    mine = on(logits.clone(), device)
    assert cuda_ops.argmax(mine).tolist() == logits.argmax(-1).tolist()

    def states() -> list[sampling.SamplingState]:
        options: list[dict[str, Any]] = [
            {},
            {"top_k": 7},
            {"top_p": 0.8},
            {"min_p": 0.05},
            {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
            {"top_k": 1},
        ]
        return [
            sampling.SamplingState(
                sampling.SamplingParams(temperature=0.5 + 0.1 * (i % 9), seed=i, **options[i % 6]),
                [1],
            )
            for i in range(24)
        ]

    rows = torch.from_numpy(cuda_ops.sampling_rows(states()).view(np.uint8))
    got = cuda_ops.sample(mine, on(rows, device))
    with on_cpu():
        expected = [s.token_id for s in sampling.sample(logits, states())]
    assert got.tolist() == expected


def test_float32_falls_back_with_its_reason(device: str, caplog: pytest.LogCaptureFixture) -> None:
    x = randn(2, 64, dtype=torch.float32)
    if device == "cuda":
        cuda_ops._log_fallback.cache_clear()
        ops.rms_norm(x.cuda(), x[0].cuda(), 1e-5)
        assert "the tensors are torch.float32" in caplog.text
    else:
        assert not cuda_ops.serves(x)
