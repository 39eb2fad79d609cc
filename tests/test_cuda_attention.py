"""Attention of CUDA tensors: ops, the native layer, the kernels; against the CPU's answers.

The kernels' own tests are in test_attention_prefill.py and test_attention_decode.py; here it is
which of them is launched with what, around the cases in which a batch needs several.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from minitron_kernels import cuda_attention, cuda_ops, ops, reference
from tests.cuda_device import PARAMS, both, cuda_device, launches, on, on_cpu, on_device
from tests.test_cuda_ops import HALVES, angles_of, close, randn
from tests.test_kernels_memory import assert_close
from tests.test_ops import PagedCase, cu_seqlens

Tensor = torch.Tensor


@pytest.fixture(params=PARAMS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with cuda_device(request.param, monkeypatch) as name:
        yield name


def near_attention(
    got: list[Tensor],
    expected: list[Tensor],
    sequences: list[tuple[Tensor, Tensor, Tensor]],
    *masking: Any,
) -> None:
    """out and lse of sequences of (rotated) q, k, v against the exact ones, by the tolerance rule.
    A weighted mean of values that cancel has no relative error: it is taken of their sizes' mean.
    """
    wide = [tuple(t.double() for t in s) for s in sequences]
    exact = [reference.attend(*s, *masking) for s in wide]
    scale = torch.cat([reference.attend(q, k, v.abs(), *masking)[0] for q, k, v in wide])
    out = torch.cat([o for o, _ in exact])
    assert_close(got[0], out, expected[0], "out", scale)
    assert ((got[0] == 0) | (scale > 0)).all(), "a row that sees nothing is not 0"
    lse = torch.cat([n for _, n in exact], 1)
    assert got[1].shape == lse.shape
    assert torch.equal(got[1].isinf(), lse.isinf())
    torch.testing.assert_close(got[1].double(), lse, rtol=1e-5, atol=2e-5)


ATTENTION = [
    # rows of q and of keys; Hq, Hk, D; causal, window; rotated features
    ([33, 7], [70, 7], 4, 2, 64, True, None, 64),
    ([20, 0, 3], [9, 5, 3], 3, 3, 128, True, None, 0),  # rows that see no key
    ([9, 40], [30, 40], 4, 1, 64, False, 11, 32),
]


@pytest.mark.parametrize("case", ATTENTION, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
def test_attention(device: str, dtype: torch.dtype, case: tuple[Any, ...]) -> None:
    len_q, len_k, hq, hk, d, causal, window, rotated = case
    q = randn(sum(len_q), hq, d + 4, dtype=dtype)[..., :d]  # strides that kernels do not take
    k, v = randn(sum(len_k), hk, d, dtype=dtype), randn(sum(len_k) + 1, hk, d, dtype=dtype)[1:]
    cu_q, cu_k = cu_seqlens(len_q), cu_seqlens(len_k).long()
    rope = ops.Rope(*angles_of(80, rotated)) if rotated else None
    options = {"causal": causal, "softmax_scale": 0.15, "window": window, "return_lse": True}
    with launches() as names:
        got, expected, _ = both(
            ops.attention, device, q, k, v, cu_q, cu_k, max_seqlen_q=40, rope=rope, **options
        )
    assert names == [*(["apply_rope"] if rotated else []), "attention"]
    sequences = []
    for qs, ks, vs in zip(q.split(len_q), k.split(len_k), v.split(len_k), strict=True):
        if rope is not None:
            places = torch.arange(len(ks))
            ks = reference.rotate(ks, rope.cos[places], rope.sin[places]).to(dtype)
            places = places[len(ks) - len(qs) :]
            qs = reference.rotate(qs, rope.cos[places], rope.sin[places]).to(dtype)
        sequences.append((qs, ks, vs))
    near_attention(got, expected, sequences, causal, 0.15, window)


KVCACHE = [
    # cached tokens and new rows; Hq, Hk, D, page; window
    ([30, 0, 129], [1, 1, 1], 4, 1, 64, 16, None),
    ([64, 5, 40, 0], [1, 8, 0, 3], 6, 2, 128, 32, None),
    ([20, 40, 0, 31], [33, 1, 9, 8], 4, 2, 64, 64, 25),
    ([10, 100], [12, 9], 2, 2, 128, 128, None),
]


@pytest.mark.parametrize("case", KVCACHE, ids=str)
@pytest.mark.parametrize("mode", ["cached", "append", "rope", "positions"])
def test_attention_kvcache(device: str, case: tuple[Any, ...], mode: str) -> None:
    lengths, counts, hq, hk, d, page, window = case
    append, dtype = mode != "cached", torch.bfloat16
    if not append:
        lengths = [n + m for n, m in zip(lengths, counts, strict=True)]
    paged = PagedCase(lengths, counts if append else [0] * len(counts), hk, d, page, dtype)
    q = randn(sum(counts), hq, d)
    new = [
        torch.cat([t[n:] for t, n in zip(kv, lengths, strict=True)]) for kv in (paged.k, paged.v)
    ]
    starts = lengths if append else [n - m for n, m in zip(lengths, counts, strict=True)]
    places = torch.cat([torch.arange(n, n + m) for n, m in zip(starts, counts, strict=True)])
    rope = None
    if mode in ("rope", "positions"):
        rope = ops.Rope(*angles_of(200, d), None, mode == "positions")
        if mode == "positions":
            places = (places * 3 + 1) % 200
            rope = rope._replace(positions=places)
    bounds = {"max_seqlen_q": max(counts), "min_seqlen_q": min(n for n in counts if n)}
    cu_q = None if max(counts) == 1 else cu_seqlens(counts)

    def op(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        return *ops.attention_kvcache(*args, **options), *args[3:5]

    with launches() as names:
        got, expected, _ = both(
            op, device, q, *(new if append else (None, None)), paged.k_cache, paged.v_cache,
            paged.table, paged.seqlens, rope, cu_seqlens_q=cu_q, window=window, return_lse=True,
            **bounds,
        )  # fmt: skip
    decode, prefill = min(n for n in counts if n) <= 8, max(counts) > 8
    kernels = ["rope_append"] * (append and prefill) + ["attention"] * prefill
    assert names == kernels + ["attention_decode"] * decode
    turned = new[0]
    if rope is not None:
        turn = rope.cos[places], rope.sin[places], rope.interleaved
        q, turned = (reference.rotate(t, *turn).to(dtype) for t in (q, turned))
    sequences = []
    added = turned.split(counts) if append else [turned] * len(counts)  # none are new
    for i, (qs, ks) in enumerate(zip(q.split(counts), added, strict=True)):
        sequences.append((qs, torch.cat((paged.k[i][: lengths[i]], ks)), paged.v[i]))
    near_attention(got[:2], expected[:2], sequences, True, None, window)
    for mine, theirs in zip(got[2:], expected[2:], strict=True):  # CPU's caches, in place
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-6, equal_nan=True)


def test_pages_in_a_wrong_order_are_seen(device: str) -> None:
    """The comparison above can fail."""
    paged = PagedCase([40, 37], [0, 0], 2, 64, 16, torch.bfloat16)
    q, window = randn(2, 4, 64), 20  # without a window the order of keys makes no difference
    right: list[Tensor] = []
    for table, fails in ((paged.table, False), (paged.table[:, [1, 0, 2]], True)):
        arguments = (q, None, None, paged.k_cache, paged.v_cache, table.contiguous(), paged.seqlens)
        got, expected, _ = both(
            ops.attention_kvcache, device, *arguments, window=window, return_lse=True
        )
        sequences = list(zip(q.split(1), paged.k, paged.v, strict=True))
        if not fails:
            right = expected
            near_attention(got, right, sequences, True, None, window)
            continue
        with pytest.raises(AssertionError, match="relative error"):
            near_attention(got, right, sequences, True, None, window)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_decoding_token_by_token_equals_the_prompt(device: str, head_dim: int) -> None:
    """Two kernels, one answer, within what rounding allows either."""
    length, count = 90, 20
    paged = PagedCase([length], [0], 2, head_dim, 32, torch.bfloat16)
    q = on(randn(count, 8, head_dim), device)
    cache = [on(t, device) for t in (paged.k_cache, paged.v_cache, paged.table)]

    def attend(rows: Tensor, num_keys: int) -> Any:
        keys = on(torch.tensor([num_keys], dtype=torch.int32), device)
        cu_q = on(cu_seqlens([len(rows)]), device)
        bounds = {"max_seqlen_q": len(rows), "min_seqlen_q": len(rows)}
        return ops.attention_kvcache(
            rows, None, None, *cache, keys, cu_seqlens_q=cu_q, return_lse=True, **bounds
        )

    with launches() as names:
        prompt = attend(q, length)
        steps = [attend(q[i : i + 1], length - count + i + 1) for i in range(count)]
    assert names == ["attention"] + ["attention_decode"] * count
    decoded = [torch.cat([out for out, _ in steps]), torch.cat([lse for _, lse in steps], 1)]
    sequences = [(q.cpu(), paged.k[0], paged.v[0])]
    near_attention([t.cpu() for t in decoded], [t.cpu() for t in prompt], sequences, True)
    near_attention([t.cpu() for t in prompt], [t.cpu() for t in decoded], sequences, True)


@pytest.mark.parametrize("append", [False, True])
def test_a_sequence_has_the_same_bits_in_any_batch(device: str, append: bool) -> None:
    lengths, counts, hq, hk, d, page = [40, 3, 70, 17, 130], [1, 12, 4, 1, 20], 4, 2, 64, 16
    rope = ops.Rope(*(on(t, device) for t in angles_of(200, d)))
    results: dict[tuple[int, ...], list[Tensor]] = {}
    for batch in ((0, 1, 2, 3, 4), (4, 2), (3, 0), (1,), (2,)):
        paged = PagedCase(lengths, counts, hk, d, page, torch.bfloat16)
        q = randn(sum(counts), hq, d).split(counts)
        if not append:
            for i, n in enumerate(counts):
                for p in range(lengths[i], lengths[i] + n):
                    at = paged.table[i, p // page], p % page
                    paged.k_cache[at], paged.v_cache[at] = paged.k[i][p], paged.v[i][p]
        totals = [n + (0 if append else m) for n, m in zip(lengths, counts, strict=True)]

        def chosen(parts: Any, batch: tuple[int, ...] = batch) -> Tensor:
            return on(torch.cat([parts[i] for i in batch]).contiguous(), device)

        new = [
            chosen([t[n:] for t, n in zip(kv, lengths, strict=True)]) for kv in (paged.k, paged.v)
        ]
        out = ops.attention_kvcache(
            chosen(q),
            *(new if append else (None, None)),
            on(paged.k_cache, device),
            on(paged.v_cache, device),
            chosen([row[None] for row in paged.table]),
            on(torch.tensor([totals[i] for i in batch], dtype=torch.int32), device),
            rope if append else None,
            cu_seqlens_q=on(cu_seqlens([counts[i] for i in batch]), device),
        )
        assert isinstance(out, Tensor)
        results[batch] = list(out.cpu().split([counts[i] for i in batch]))
    together = results[0, 1, 2, 3, 4]
    for batch, parts in results.items():
        for i, part in zip(batch, parts, strict=True):
            assert torch.equal(part, together[i]), f"sequence {i} in batch {batch}"
    assert not torch.equal(together[0], together[3])  # the comparison can fail


def test_a_workspace_grows_and_stays_where_a_graph_has_it(device: str) -> None:
    x = on(randn(1, 1), device)
    spaces = cuda_attention.Workspaces()
    stream = torch.cuda.Stream() if device == "cuda" else None
    with torch.cuda.stream(stream):
        small = spaces.get(x, 100)
        assert not small.any() and spaces.get(x, small.numel()) is small
    address = small.data_ptr()
    if stream is not None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            assert spaces.get(x, 100) is small
    with torch.cuda.stream(stream):
        large = spaces.get(x, small.numel() + 1)
        assert large.numel() > small.numel() and not large.any()
    size = small.numel()
    del small
    again = torch.empty(size, dtype=torch.uint8, device=x.device)
    assert again.data_ptr() != address
    with torch.cuda.stream(stream):
        assert spaces.get(x, 5) is large


def test_a_graph_captured_on_a_stream_without_a_workspace_has_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.cuda.graph() captures on a stream of its own, whichever the calls before it took."""

    class Query:
        is_cuda, device = True, torch.device("cpu")

    capturing = False
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    spaces: Any = cuda_attention.Workspaces()
    small = spaces.get(Query(), 100)
    capturing = True
    assert spaces.get(Query(), 100) is small
    counters = cuda_attention.COUNTER_BYTES
    monkeypatch.setattr(torch, "empty", lambda *size, **how: torch.full(size, 77, **how))
    own = spaces.get(Query(), counters + 4096)
    assert own.numel() == counters + 4096 and not own[:counters].any() and own[counters:].all()
    assert spaces.get(Query(), counters + 4096) is not own, "the next call may run meanwhile"
    capturing = False
    assert spaces.get(Query(), 100) is small


def test_the_workspace_begins_with_counters() -> None:
    """Its bytes are these, and as many for each sequence."""
    one, two = (
        cuda_attention.decode_workspace_bytes(batch, 32, 8, 128, (64, 128), 1) for batch in (1, 2)
    )
    assert 2 * one - two == cuda_attention.COUNTER_BYTES


@pytest.mark.parametrize(
    ("head_dim", "page", "reason"),
    [(96, 16, "attention takes head_dim .64, 128., it is 96"), (64, 8, "pages of .* they have 8")],
)
def test_attention_that_no_kernel_takes(
    device: str, head_dim: int, page: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    cuda_ops._log_fallback.cache_clear()
    q, cache = randn(2, 4, head_dim), (randn(4, page, 2, head_dim), randn(4, page, 2, head_dim) + 1)
    table, lengths = torch.tensor([[0, 1], [3, 2]]), torch.tensor([9, 3])
    arguments = (q, None, None, *cache, table, lengths)
    with launches() as names:
        for _ in range(2):  # the reason is told once
            out = ops.attention_kvcache(*(on_device(a, device) for a in arguments))
    with on_cpu():
        expected = ops.attention_kvcache(*arguments)
    close([out.cpu()], [expected])
    assert not names
    assert len(re.findall(reason, caplog.text)) == 1
