"""flash-attn's functions: its signatures, and its semantics against PyTorch's SDPA.

Expected results are computed from flash-attn's documentation: masks as explicit matrices, caches as
plain tensors, one sequence at a time.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import minitron_kernels
from minitron_kernels import reference
from minitron_kernels.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from tests.cuda_device import PARAMS, cuda_device, launches, no_host_reads, on_device

Tensor = torch.Tensor


@pytest.fixture(params=PARAMS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with cuda_device(request.param, monkeypatch) as name:
        yield name


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def visible(seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """Which keys a query sees, [Sq, Sk], as flash-attn's docstring says."""
    i = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k)[None]
    left, right = window[0], 0 if causal else window[1]
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    return seen


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One sequence [S, H, D]: out, lse [Hq, Sq]; rows that see nothing are 0 and -inf."""
    mask = visible(q.shape[0], k.shape[0], causal, window)
    group = q.shape[1] // k.shape[1]
    qt, kt, vt = (t.transpose(0, 1) for t in (q, k, v))
    kt, vt = kt.repeat_interleave(group, 0), vt.repeat_interleave(group, 0)
    out = F.scaled_dot_product_attention(qt[None], kt[None], vt[None], mask, scale=scale)[0]
    out = torch.where(mask.any(-1)[:, None], out, 0).transpose(0, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = qt.double() @ kt.double().transpose(1, 2) * scale
    return out, logits.masked_fill(~mask, -torch.inf).logsumexp(-1)


def close(got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """In float32 both are near the exact value; in halves `bound` is a few units of it."""
    assert got.shape == expected.shape
    torch.testing.assert_close(got.double(), expected.double(), rtol=bound, atol=bound)


def test_signatures_are_flash_attns() -> None:
    """Names, order and defaults of flash-attn 2.8; behind them flash-attn 3's descales."""
    common = (
        "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False"
    )
    descales = "q_descale=None, k_descale=None, v_descale=None"
    expected: dict[Callable[..., Any], str] = {
        flash_attn_func: f"q, k, v, {common}, {descales}",
        flash_attn_varlen_func: "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
        f"{common}, block_table=None, {descales}",
        flash_attn_with_kvcache: "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, "
        "rotary_sin=None, cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, "
        "block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
    }
    for function, arguments in expected.items():
        told = ", ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default}"
            for p in inspect.signature(function).parameters.values()
        )
        assert told == arguments
        assert getattr(minitron_kernels, function.__name__) is function


WINDOWS = [(-1, -1), (5, 0), (7, 7), (0, 0), (-1, 0), (1000, 1000), (9, 1000)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("seqlens", [(33, 33), (7, 40), (40, 7), (1, 20), (5, 1)], ids=str)
def test_flash_attn_func(causal: bool, window: tuple[int, int], seqlens: tuple[int, int]) -> None:
    batch, hq, hk, d = 2, 6, 2, 64
    q = randn(batch, seqlens[0], hq, d)
    k, v = (randn(batch, seqlens[1], hk, d, seed=s) for s in (1, 2))
    arguments = {"softmax_scale": 0.3, "causal": causal, "window_size": window}
    if not causal and window == (9, 1000) and seqlens[1] > 9:  # a window to the left, and no causal
        with pytest.raises(NotImplementedError, match=r"window_size \(9, 1000\) without causal"):
            flash_attn_func(q, k, v, **arguments)
        return
    out, lse, probs = flash_attn_func(q, k, v, return_attn_probs=True, **arguments)
    assert probs.numel() == 0 and lse.shape == (batch, hq, seqlens[0])
    left, right = (n if n < seqlens[1] else -1 for n in window)
    for b in range(batch):
        expected, expected_lse = sdpa(q[b], k[b], v[b], causal, (left, right), 0.3)
        close(out[b], expected)
        close(lse[b], expected_lse)
    assert torch.equal(flash_attn_func(q, k, v, **arguments), out)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_flash_attn_varlen_func(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 4))
    lengths = [[data.draw(st.integers(0, 40)) for _ in range(batch)] for _ in range(2)]
    hk = data.draw(st.integers(1, 2))
    hq = hk * data.draw(st.integers(1, 3))
    causal, window = data.draw(st.booleans()), data.draw(st.sampled_from([(-1, -1), (4, 4)]))
    q = randn(sum(lengths[0]), hq, 64)
    k, v = (randn(sum(lengths[1]), hk, 64, seed=s) for s in (1, 2))
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in lengths)
    longest = [max(n) for n in lengths]
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, *longest, causal=causal, window_size=window, return_attn_probs=True
    )
    left = window[0] if window[0] < longest[1] else -1
    parts = zip(*(t.split(n) for t, n in ((q, lengths[0]), (k, lengths[1]), (v, lengths[1]))),
                strict=True)  # fmt: skip
    expected = [sdpa(*part, causal, (left, left)) for part in parts]
    close(out, torch.cat([o for o, _ in expected]))
    close(lse, torch.cat([n for _, n in expected], 1))


class CacheCase:
    """A cache of NaN but for the sequences' keys; the same as plain tensors."""

    def __init__(
        self,
        lengths: list[int],
        *,
        new: int = 0,
        room: int = 64,
        page: int = 0,
        hk: int = 2,
        d: int = 64,
        rotated: int = 0,
        interleaved: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        batch = len(lengths)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.keys = [randn(n, hk, d, seed=i, dtype=dtype) for i, n in enumerate(lengths)]
        self.values = [randn(n, hk, d, seed=50 + i, dtype=dtype) for i, n in enumerate(lengths)]
        self.k, self.v = (randn(batch, new, hk, d, seed=s, dtype=dtype) for s in (97, 98))
        order = torch.randperm(batch + 2, generator=torch.Generator().manual_seed(1))[:batch]
        self.rows = order.int()
        self.page = page
        per_row = room // page if page else 1
        self.table = (order[:, None] * per_row + torch.arange(per_row)).int()
        self.k_cache, self.v_cache = (
            torch.full(((batch + 2) * per_row, room // per_row, hk, d), torch.nan, dtype=dtype)
            for _ in range(2)
        )
        for row, keys, values in zip(order.tolist(), self.keys, self.values, strict=True):
            for cache, own in ((self.k_cache, keys), (self.v_cache, values)):
                cache.view(batch + 2, room, hk, d)[row, : len(own)] = own
        self.new, self.room, self.interleaved, self.bound = new, room, interleaved, 1e-5
        angles = torch.arange(room)[:, None] / 1e3 ** (torch.arange(rotated // 2) * 2 / 64)
        self.cos, self.sin = angles.cos(), angles.sin()

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        if not self.cos.numel():
            return x
        cos, sin = self.cos[positions.long()], self.sin[positions.long()]
        return reference.rotate(x, cos, sin, self.interleaved).to(x.dtype)

    def call(self, q: Tensor, device: str = "", **options: Any) -> tuple[Tensor, Tensor]:
        names = ("k_cache", "v_cache")
        if self.new:
            names += ("k", "v")
        if self.cos.numel():
            options |= {"rotary_interleaved": self.interleaved}
            options |= {"rotary_cos": self.cos, "rotary_sin": self.sin}
        where = {"block_table": self.table} if self.page else {"cache_batch_idx": self.rows}
        options |= {name: getattr(self, name) for name in names} | where
        options = {"cache_seqlens": self.lengths} | options
        if not device:
            return flash_attn_with_kvcache(q, **options, return_softmax_lse=True)
        moved = {name: on_device(value, device) for name, value in options.items()}
        q = on_device(q, device)
        with no_host_reads(device):
            result = flash_attn_with_kvcache(q, **moved, return_softmax_lse=True)
        self.k_cache, self.v_cache = moved["k_cache"].cpu(), moved["v_cache"].cpu()
        return result[0].cpu(), result[1].cpu()

    def widen(self) -> None:
        """From here on in float32."""
        for name in ("k", "v", "k_cache", "v_cache"):
            setattr(self, name, getattr(self, name).float())
        self.keys, self.values = ([t.float() for t in kv] for kv in (self.keys, self.values))
        self.bound = 2**-8

    def expected(
        self, q: Tensor, causal: bool, window: tuple[int, int] = (-1, -1), scale: Any = None
    ) -> tuple[Tensor, Tensor]:
        outs = []
        for i, n in enumerate(self.lengths.tolist()):
            new = self.rotated(self.k[i], torch.arange(n, n + self.new))
            keys, values = torch.cat((self.keys[i], new)), torch.cat((self.values[i], self.v[i]))
            along = torch.arange(q.shape[1]) if causal or max(window) >= 0 else 0
            rows = self.rotated(q[i], (n + torch.zeros(q.shape[1]) + along).long())
            outs.append(sdpa(rows, keys, values, causal, window, scale))
            row = self.rows[i].item()
            for cache, own in ((self.k_cache, keys), (self.v_cache, values)):
                held = cache.view(-1, self.room, *cache.shape[2:])[row]
                # (fp32: the rotation's two products may be rounded in another order)
                torch.testing.assert_close(held[: len(own)], own, rtol=self.bound, atol=1e-5)
                assert held[len(own) :].isnan().all()
        return torch.stack([o for o, _ in outs]), torch.stack([n for _, n in outs])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("page", [0, 16, 64])
@pytest.mark.parametrize(
    ("sizes", "rotary"),
    [
        *(((seqlen, 0), None) for seqlen in (1, 4)),
        *itertools.product(
            [(1, 1), (5, 5), (3, 6), (12, 2)], [None, (64, True), (64, False), (32, False)]
        ),
    ],
    ids=str,
)
def test_flash_attn_with_kvcache(
    causal: bool, page: int, sizes: tuple[int, int], rotary: tuple[int, bool] | None
) -> None:
    seqlen, new = sizes
    rotated, interleaved = rotary or (0, True)
    case = CacheCase([20, 9, 33], new=new, page=page, rotated=rotated, interleaved=interleaved)
    q = randn(3, seqlen, 4, 64, seed=9)
    out, lse = case.call(q, causal=causal)
    expected, expected_lse = case.expected(q, causal)
    close(out, expected)
    close(lse, expected_lse)


def test_kvcache_of_one_length_and_in_order() -> None:
    case = CacheCase([40, 40], room=40)
    rows = case.rows.tolist()
    cache = case.k_cache[rows], case.v_cache[rows]
    q = randn(2, 2, 4, 64)
    expected = case.expected(q, True)[0]
    for length in (None, 40, case.lengths):
        out = flash_attn_with_kvcache(q, *cache, cache_seqlens=length, causal=True)
        close(out, expected)
    wide = [torch.cat((c, c), dim=1)[:, :40] for c in cache]  # rows further apart
    close(flash_attn_with_kvcache(q, *wide, causal=True, window_size=(5, 3)),
          case.expected(q, True, (5, 0))[0])  # fmt: skip
    close(flash_attn_with_kvcache(q, *wide, window_size=(6, 6), softmax_scale=0.4),
          case.expected(q, False, (6, 6), 0.4)[0])  # fmt: skip


def test_varlen_with_a_block_table() -> None:
    for page in (16, 48):  # 48: a size that is cut into pages of 16 for the kernels
        case = CacheCase([20, 9, 33], room=48, page=page)
        counts = [3, 9, 1]
        q = randn(13, 4, 64)
        cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (counts, [20, 9, 33]))
        out = flash_attn_varlen_func(
            q, case.k_cache, case.v_cache, cu_q, cu_k, 9, 33, causal=True, block_table=case.table
        )
        parts = zip(q.split(counts), case.keys, case.values, strict=True)
        close(out, torch.cat([sdpa(*part, True)[0] for part in parts]))


def test_empty_batches_and_sequences() -> None:
    for shape in ((0, 3, 4, 64), (2, 0, 4, 64)):
        q, k = randn(*shape), randn(shape[0], 5, 2, 64)
        assert flash_attn_func(q, k, k).shape == shape
        assert flash_attn_with_kvcache(q, k, k, cache_seqlens=5).shape == shape
    out, lse, _ = flash_attn_func(
        randn(2, 3, 4, 64), randn(2, 0, 2, 64), randn(2, 0, 2, 64), return_attn_probs=True
    )
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("causal", [False, True])
def test_compiles_whole_and_writes_its_cache(causal: bool) -> None:
    def step(q: Tensor, k: Tensor, cache: tuple[Tensor, Tensor], lengths: Tensor) -> Tensor:
        angles = torch.arange(32)[:, None] * torch.ones(8) / 7
        out = flash_attn_with_kvcache(
            q, *cache, k, k, angles.cos(), angles.sin(), lengths, causal=causal
        )
        return out + flash_attn_func(q, k, k, causal=causal)

    q, k, lengths = randn(2, 3, 4, 64), randn(2, 3, 2, 64), torch.tensor([4, 9], dtype=torch.int32)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    caches = [(randn(2, 32, 2, 64), randn(2, 32, 2, 64)) for _ in range(2)]
    torch.testing.assert_close(compiled(q, k, caches[0], lengths), step(q, k, caches[1], lengths))
    assert all(map(torch.equal, *caches)) and not torch.equal(caches[0][0], randn(2, 32, 2, 64))


# ----------------------------------------------------------------------------------- CUDA tensors

BF16 = torch.bfloat16
HALF_BOUND = 2e-2  # a few units of bfloat16, on means of values of size 1


@pytest.mark.parametrize("seqlens", [(40, 70), (3, 48), (2, 33)], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_flash_attn_func_of_cuda_tensors(device: str, seqlens: tuple[int, int], d: int) -> None:
    q = randn(2, seqlens[0], 4, d, dtype=BF16)
    kv = randn(2, seqlens[1], 2, 2, d, dtype=BF16)  # k and v lie side by side
    moved = on_device(q, device), *on_device(kv, device).unbind(2)
    with launches() as names, no_host_reads(device):
        out, lse, _ = flash_attn_func(*moved, causal=True, return_attn_probs=True)
    few = seqlens[0] <= 8 and seqlens[1] % 16 == 0
    assert names == ["attention_decode" if few else "attention"]
    for b in range(2):
        expected, expected_lse = sdpa(q[b].float(), *kv[b].float().unbind(1), True)
        close(out[b].cpu(), expected, HALF_BOUND)
        close(lse[b].cpu(), expected_lse, 1e-3)


def test_flash_attn_varlen_func_of_cuda_tensors(device: str) -> None:
    counts, lengths = [3, 20], [33, 20]
    q, k, v = (randn(n, h, 64, seed=h, dtype=BF16) for n, h in ((23, 4), (53, 2), (53, 1)))
    v = v.expand(-1, 2, -1)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (counts, lengths))
    moved = [on_device(t, device) for t in (q, k, v, cu_q, cu_k)]
    with no_host_reads(device):
        out = flash_attn_varlen_func(*moved, 20, 33, window_size=(6, 6))
    parts = zip(q.split(counts), k.split(lengths), v.split(lengths), strict=True)
    expected = [sdpa(*(t.float() for t in part), window=(6, 6))[0] for part in parts]
    close(out.cpu(), torch.cat(expected), HALF_BOUND)


@pytest.mark.parametrize("page", [0, 256])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 0), (4, 4), (10, 10), (2, 3)], ids=str)
def test_flash_attn_with_kvcache_of_cuda_tensors(
    device: str, sizes: tuple[int, int], page: int
) -> None:
    rotated = 64 if sizes[1] else 0
    case = CacheCase([20, 9, 233], new=sizes[1], room=256, page=page, rotated=rotated, dtype=BF16)
    q = randn(3, sizes[0], 4, 64, seed=9, dtype=BF16)
    out, lse = case.call(q, device, causal=sizes[0] != 4)
    case.widen()
    expected, expected_lse = case.expected(q.float(), sizes[0] != 4)
    close(out, expected, HALF_BOUND)
    close(lse, expected_lse, 1e-2)


# ------------------------------------------------------------------------------------ bad arguments


def _kv(**change: Any) -> Any:
    q, cache = randn(2, 1, 4, 64), (randn(2, 32, 2, 64), randn(2, 32, 2, 64))
    return flash_attn_with_kvcache(q, *cache, **change)


def _func(**change: Any) -> Any:
    x = randn(2, 5, 2, 64)
    return flash_attn_func(**({"q": x, "k": x, "v": x} | change))


NEW = {"k": randn(2, 1, 2, 64), "v": randn(2, 1, 2, 64)}
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "dropout": (
        lambda: _func(dropout_p=0.1), NotImplementedError, "dropout_p .* got 0.1, accepted is 0.0",
    ),
    "softcap": (lambda: _func(softcap=30.0), NotImplementedError, "softcap .* got 30.0"),
    "alibi": (
        lambda: _func(alibi_slopes=torch.ones(2)), NotImplementedError, "alibi_slopes .* tensor 2",
    ),
    "window": (lambda: _func(window_size=(2, 1)), NotImplementedError, r"window_size \(2, 1\)"),
    "right window": (lambda: _func(window_size=(-1, 2)), NotImplementedError, "window_size"),
    "grad": (
        lambda: _func(q=randn(2, 5, 2, 64).requires_grad_()), NotImplementedError,
        "q requires grad",
    ),
    "rank": (lambda: _func(q=randn(5, 2, 64)), ValueError, "q must be .batch, seqlen"),
    "batch": (lambda: _func(q=randn(3, 5, 2, 64)), ValueError, "differ in shape"),
    "heads": (lambda: _func(q=randn(2, 5, 3, 64)), ValueError, "query heads .3. must be"),
    "dtype": (lambda: _func(k=randn(2, 5, 2, 64).half()), TypeError, "k is torch.float16"),
    "leftpad": (
        lambda: _kv(cache_leftpad=torch.zeros(2)), NotImplementedError, "cache_leftpad is not",
    ),
    "rows and pages": (
        lambda: _kv(block_table=torch.zeros(2, 1).int(), cache_batch_idx=torch.zeros(2).int()),
        NotImplementedError, "cache_batch_idx is not supported with block_table",
    ),
    "seqlen": (lambda: _kv(cache_seqlens=33), ValueError, "must lie in 0..32, got 33"),
    "seqlens": (
        lambda: _kv(cache_seqlens=torch.tensor([3, 33])), ValueError, r"cache_seqlens\[1\]",
    ),
    "seqlens shape": (lambda: _kv(cache_seqlens=torch.tensor([3])), ValueError, "shape 2, got 1"),
    "k alone": (lambda: _kv(k=NEW["k"], cache_seqlens=3), ValueError, "k and v must be given"),
    "k without seqlens": (lambda: _kv(**NEW), ValueError, "cache_seqlens must be given"),
    "full cache": (lambda: _kv(**NEW, cache_seqlens=32), ValueError, "33 tokens do not fit"),
    "nearly full cache": (
        lambda: _kv(k=randn(2, 3, 2, 64), v=randn(2, 3, 2, 64), cache_seqlens=30), ValueError,
        "3 more keys do not fit",
    ),
    "rotary without k": (
        lambda: _kv(rotary_cos=torch.ones(9, 8), rotary_sin=torch.ones(9, 8)), ValueError,
        "for k and v, which are None",
    ),
    "rotary half": (
        lambda: _kv(**NEW, cache_seqlens=3, rotary_cos=torch.ones(9, 8)), ValueError,
        "rotary_cos and rotary_sin must be given together",
    ),
    "rotary width": (
        lambda: _kv(
            **NEW, cache_seqlens=3, rotary_cos=torch.ones(9, 33), rotary_sin=torch.ones(9, 33)
        ), ValueError, "R <= head_dim 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD))
def test_bad_arguments_are_named(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()
