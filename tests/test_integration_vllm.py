"""The kernels in vLLM: what does the work, and the plugin's entry point, without vLLM.

`paged.py` and `matrices.py` import nothing of it. Its own classes and its engine are in
test_integration_vllm_engine.py.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron_kernels import (
    cuda_attention,
    cuda_ops,
    cuda_quantized,
    ops,
    reference,
)
from minitron_kernels.block_types import QUANT_TYPES
from minitron_kernels.integrations import vllm as integration
from minitron_kernels.integrations.vllm import matrices, paged
from minitron_kernels.quantized import QuantizedTensor
from tests.cuda_device import PARAMS, cuda_device, launches, no_host_reads, on, on_cpu, on_device
from tests.test_kernels_memory import assert_close
from tests.test_model_quantized import model_rows
from tests.test_ops import cu_seqlens

Tensor = torch.Tensor
ROOT = Path(__file__).parents[1]


@pytest.fixture(params=PARAMS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with cuda_device(request.param, monkeypatch) as name:
        yield name


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


# ---------------------------------------------------------------------------------- paged cache

# Physical orders of vLLM's KVCacheLayout: of layer, block, head, token and content.
LAYOUTS = {
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


def new_cache(
    layout: str, blocks: int, heads: int, block: int, head_size: int, dtype: torch.dtype
) -> Tensor:
    """The second of two layers' caches [blocks, heads, block, 2D] in a physical order, all NaN."""
    order = LAYOUTS[layout]
    logical = (2, blocks, heads, block, 2 * head_size)
    physical = torch.full([logical[i] for i in order], float("nan"), dtype=dtype)
    return physical.permute([order.index(i) for i in range(5)])[1]


class Step:
    """Sequences of ``total`` tokens, the last ``counts`` of them new, as vLLM describes them.

    Blocks are scattered, the null block 0 pads their table, and a row behind the last has no slot.
    """

    def __init__(
        self,
        total: list[int],
        counts: list[int],
        heads: tuple[int, int],
        head_size: int,
        block: int,
        dtype: torch.dtype,
        layout: str = "LBHNC",
    ) -> None:
        self.total, self.counts = total, counts
        hq, hk = heads
        rows = sum(counts)
        self.q = randn(rows + 1, hq, head_size, dtype=dtype, seed=1)
        self.k = [randn(n, hk, head_size, dtype=dtype, seed=2 + i) for i, n in enumerate(total)]
        self.v = [randn(n, hk, head_size, dtype=dtype, seed=50 + i) for i, n in enumerate(total)]
        width = max(-(-n // block) for n in total) + 1
        num_blocks = 2 + sum(-(-n // block) for n in total)
        order = 1 + torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(4))
        free = iter(order.tolist())
        table = [[next(free) if i * block < n else 0 for i in range(width)] for n in total]
        self.cache = new_cache(layout, num_blocks, hk, block, head_size, dtype)
        for tokens, new, blocks, k, v in zip(total, counts, table, self.k, self.v, strict=True):
            for p in range(tokens - new):
                at = self.cache[blocks[p // block], :, p % block]
                at.copy_(torch.cat((k[p], v[p]), dim=-1))
        self.slots = torch.tensor(
            [
                blocks[p // block] * block + p % block
                for tokens, new, blocks in zip(total, counts, table, strict=True)
                for p in range(tokens - new, tokens)
            ]
        )
        self.table = torch.tensor(table, dtype=torch.int32)
        self.seq_lens = torch.tensor(total, dtype=torch.int32)
        self.starts = cu_seqlens(counts)
        # New keys, and one row more, as vLLM's padded tensors have.
        pairs = list(zip(counts, range(len(counts)), strict=True))
        pad = randn(1, hk, head_size, dtype=dtype)
        self.new_k = torch.cat([self.k[i][len(self.k[i]) - n :] for n, i in pairs] + [pad])
        self.new_v = torch.cat([self.v[i][len(self.v[i]) - n :] for n, i in pairs] + [pad])

    def run(self, device: str, window: int | None = None) -> tuple[Tensor, Tensor]:
        """The cache with the new keys, and the output, whose last row is nobody's."""
        cache, table, seq_lens, starts, slots, q, k, v = (
            on_device(t, device) if device else t.clone()
            for t in (
                self.cache, self.table, self.seq_lens, self.starts, self.slots, self.q, self.new_k,
                self.new_v,
            )
        )  # fmt: skip
        least, most = paged.query_bounds(self.starts)
        hq, head_size = q.shape[1:]
        workspace = paged.Workspace(q.device, (hq, k.shape[1]), head_size)
        batch = paged.PagedBatch(
            sum(self.counts), least, most, starts, seq_lens, table, slots,
            workspace.reserve(table, cache.shape[2], most),
        )  # fmt: skip
        output = torch.full_like(q, 7.0)
        if device:
            with no_host_reads(device):
                paged.append(k, v, cache, batch.slot_mapping)
                paged.attend(q, cache, batch, 0.11, window, output)
        else:
            paged.append(k, v, cache, batch.slot_mapping)
            paged.attend(q, cache, batch, 0.11, window, output)
        return cache.cpu(), output.cpu()

    def check(self, cache: Tensor, output: Tensor, window: int | None = None) -> None:
        assert (output[-1] == 7).all(), "a row behind the batch is written"
        rows = list(zip(self.q[:-1].split(self.counts), self.k, self.v, strict=True))
        exact, scale, eager = [], [], []
        for q, k, v in rows:
            wide = q.double(), k.double(), v.double()
            exact.append(reference.attend(*wide, True, 0.11, window)[0])
            scale.append(reference.attend(*wide[:2], wide[2].abs(), True, 0.11, window)[0])
            eager.append(eager_attend(q, k, v, 0.11, window))
        assert_close(output[:-1], torch.cat(exact), torch.cat(eager), "output", torch.cat(scale))
        block = cache.shape[2]
        for slot, k, v in zip(self.slots.tolist(), self.new_k, self.new_v, strict=False):
            stored = cache[slot // block, :, slot % block]
            assert torch.equal(stored, torch.cat((k, v), dim=-1))
        assert cache[0].isnan().all(), "the null block is written"


def eager_attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """The same in PyTorch at the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    distance = torch.arange(len(q))[:, None] + (len(k) - len(q)) - torch.arange(len(k))
    hidden = distance < 0
    if window is not None:
        hidden = hidden | (distance >= window)
    return torch.einsum("hqk,khd->qhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)


STEPS = [
    # tokens and new ones of each sequence; heads; head size; block; window
    ([21, 5, 50, 16], [21, 1, 11, 1], (4, 2), 64, 16, None),
    ([129, 40], [1, 8], (8, 2), 128, 32, None),
    ([90, 64, 33], [30, 1, 33], (3, 3), 64, 64, 25),
    ([200, 10], [9, 10], (4, 1), 128, 128, None),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_cache_views(layout: str) -> None:
    cache = new_cache(layout, 5, 3, 16, 64, torch.float32)
    cache.copy_(randn(*cache.shape))
    k, v = paged.cache_views(cache, 64)
    assert k.shape == v.shape == (5, 16, 3, 64) and k.stride() == v.stride()
    assert k.data_ptr() == cache.data_ptr()
    assert torch.equal(k[2, 7, 1], cache[2, 1, 7, :64])
    assert torch.equal(v[2, 7, 1], cache[2, 1, 7, 64:])


def test_cache_views_refuse_other_shapes() -> None:
    for shape in ((5, 3, 16, 64), (2, 5, 16, 3, 128)):
        with pytest.raises(ValueError, match="kv_cache must be"):
            paged.cache_views(torch.empty(shape), 64)


@pytest.mark.parametrize(
    ("counts", "expected"), [([1, 1], (1, 1)), ([0, 9, 3, 0], (3, 9)), ([0], (0, 0)), ([], (0, 0))]
)
def test_query_bounds(counts: list[int], expected: tuple[int, int]) -> None:
    assert paged.query_bounds(cu_seqlens(counts)) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step_on_the_cpu(case: Any, dtype: torch.dtype, layout: str) -> None:
    *sizes, window = case
    step = Step(*sizes, dtype, layout)
    step.check(*step.run("", window), window)


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_a_step_on_a_gpu(device: str, case: Any) -> None:
    """Prompts and single tokens of one batch, no host wait, nothing allocated for the result."""
    *sizes, window = case
    layout = list(LAYOUTS)[STEPS.index(case) + 1]
    with on_cpu():
        step = Step(*sizes, torch.bfloat16, layout)
    with launches() as names:
        cache, output = step.run(device, window)
    counts = sizes[1]
    prefill = ["attention"] * (max(counts) > cuda_attention.MAX_DECODE_ROWS)
    decode = ["attention_decode"] * (min(counts) <= cuda_attention.MAX_DECODE_ROWS)
    assert names == ["rope_append", *prefill, *decode]
    with on_cpu():
        step.check(cache, output, window)


def test_a_wrong_slot_is_seen() -> None:
    """The comparison above can fail."""
    step = Step([40, 20], [3, 1], (2, 2), 64, 16, torch.float32)
    cache, output = step.run("")
    step.check(cache, output)
    step.slots[0] += 1
    cache, output = step.run("")
    with pytest.raises(AssertionError):
        step.check(cache, output)


def test_append_kv_refuses() -> None:
    cache = torch.zeros(2, 16, 2, 64), torch.zeros(2, 16, 2, 64)
    k = torch.ones(3, 2, 64)
    with pytest.raises(ValueError, match="slots must be below the cache's 32, got 32"):
        ops.append_kv(k, k, *cache, torch.tensor([0, 32, 1]))
    with pytest.raises(ValueError, match="slots must be"):
        ops.append_kv(k, k, *cache, torch.arange(4))
    with pytest.raises(ValueError, match=r"v must be \[T, 2, 64\]"):
        ops.append_kv(k, k[:, :1], *cache, torch.arange(3))
    with pytest.raises(TypeError, match="slots"):
        ops.append_kv(k, k, *cache, torch.arange(3).float())
    assert not cache[0].any() and not cache[1].any()
    ops.append_kv(k, 2 * k, *cache, torch.tensor([-1, 5]))
    assert cache[0].nonzero()[:, 1].unique().tolist() == [5] and (cache[1][0, 5] == 2).all()


def test_the_workspace_grows_and_keeps_what_a_graph_may_hold(device: str) -> None:
    workspace = paged.Workspace(torch.device(device), (8, 2), 128)
    table = on(torch.zeros((2, 64), dtype=torch.int32), device)
    small = workspace.reserve(table, 16, 1)
    assert small is not None and small.dtype == torch.uint8 and not small.any()
    assert workspace.reserve(table[:1], 16, 1) is small
    wide = on(torch.zeros((64, 512), dtype=torch.int32), device)
    large = workspace.reserve(wide, 16, 8)
    assert large is not None and large.numel() > small.numel()
    assert workspace.reserve(table, 16, 1) is large
    needed = cuda_attention.decode_workspace_bytes(64, 8, 2, 128, (512, 16), 8)
    assert large.numel() >= needed


def test_no_workspace_on_the_cpu() -> None:
    workspace = paged.Workspace(torch.device("cpu"), (8, 2), 128)
    assert workspace.reserve(torch.zeros((2, 64), dtype=torch.int32), 16, 1) is None


# ------------------------------------------------------------------------------------- matrices


def quantized(kind: str, rows: int, cols: int, seed: int = 0) -> QuantizedTensor:
    stored = model_rows(kind, rows, cols, np.random.default_rng(seed))
    return QuantizedTensor(torch.from_numpy(stored).contiguous(), kind, (rows, cols))


def dense(matrix: Tensor) -> Tensor:
    return matrix.dequantize() if isinstance(matrix, QuantizedTensor) else matrix.float()


@pytest.mark.parametrize("kind", [*QUANT_TYPES, None])
def test_rows_of(kind: str | None) -> None:
    w = quantized(kind, 40, 256) if kind else randn(40, 256)
    rows = matrices.rows_of(w, 8, 16)
    assert torch.equal(dense(rows), dense(w)[8:24])
    if isinstance(rows, QuantizedTensor) and isinstance(w, QuantizedTensor):  # a view of the file
        assert rows.blocks.data_ptr() == w.blocks[8:].data_ptr()
    padded = dense(matrices.rows_of(w, 30, 10, 16))
    assert padded.shape == (16, 256) and torch.equal(padded[:10], dense(w)[30:])
    assert not padded[10:].any()
    with pytest.raises(ValueError, match="rows 30"):
        matrices.rows_of(w, 30, 11)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K", None])
def test_columns_of_all_ranks_add_up(kind: str | None, ranks: int) -> None:
    """Also where a rank's columns are no whole blocks, as of Minitron-8B's 11520 over two."""
    w = quantized(kind, 24, 768) if kind else randn(24, 768)
    x = randn(5, 768)
    count = 768 // ranks
    total = torch.zeros(5, 24)
    for rank in range(ranks):
        part = matrices.columns_of(w, rank * count, count)
        layer = matrices.Matrices([part], torch.float32, torch.device("cpu"))
        total += layer(x[:, rank * count : (rank + 1) * count])
        left, right = part.padding
        own = dense(part.matrix)[:, left : part.matrix.shape[1] - right]
        assert torch.equal(own, dense(w)[:, rank * count : (rank + 1) * count])
    exact = x.double() @ dense(w).double().T
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-5)


MERGED = [
    (("Q4_K", 64), ("Q4_K", 32), ("Q6_K", 32)),
    (("Q4_0", 48), ("Q8_0", 16), ("Q4_0", 16)),
    (("Q5_K", 32), (None, 16), (None, 32)),
    (("Q3_K", 40), ("Q3_K", 40)),
]
LAUNCHED = [("Q4_K", "Q6_K"), ("Q4_0", "Q8_0", "Q4_0"), ("Q5_K", None), ("Q3_K",)]


@pytest.mark.parametrize("merged", MERGED, ids=str)
@pytest.mark.parametrize("rows", [1, 7])
def test_merged_layers(merged: Any, rows: int) -> None:
    parts = [
        matrices.Part(quantized(kind, n, 256, i) if kind else randn(n, 256, seed=i))
        for i, (kind, n) in enumerate(merged)
    ]
    layer = matrices.Matrices(parts, torch.float32, torch.device("cpu"))
    for part, stored in zip(parts, layer.parts(), strict=True):  # nothing is copied or expanded
        if isinstance(part.matrix, QuantizedTensor):
            assert stored.data_ptr() == part.matrix.blocks.data_ptr()
    w = torch.cat([dense(part.matrix) for part in parts]).double()
    x, bias = randn(2, rows, 256), randn(len(w))
    y = layer(x, bias)
    assert y.shape == (2, rows, len(w))
    torch.testing.assert_close(y.double(), x.double() @ w.T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("merged", "launched"),
    [*zip(MERGED, LAUNCHED, strict=True)],
    ids=str,
)
def test_merged_layers_on_a_gpu(
    device: str, monkeypatch: pytest.MonkeyPatch, merged: Any, launched: tuple[str | None, ...]
) -> None:
    """Neighbours of one type are one launch; weights are packed, activations not expanded."""
    with on_cpu():
        parts = [
            matrices.Part(quantized(k, n, 256, i) if k else randn(n, 256, seed=i).bfloat16())
            for i, (k, n) in enumerate(merged)
        ]
        w = torch.cat([dense(part.matrix) for part in parts])
        x = randn(4, 256).bfloat16()
        exact, rounded = x.double() @ w.double().T, (x @ w.bfloat16().T)
    layer = matrices.Matrices(parts, torch.bfloat16, torch.device(device))
    for stored in layer.parts():
        on(stored.data, device)
    x_there = on_device(x, device)
    with launches() as names, monkeypatch.context() as patch, no_host_reads(device):
        patch.setattr(cuda_quantized, "call", cuda_ops.call)  # which counts
        y = layer(x_there)
    assert names == ["linear" if kind is None else "linear_quant" for kind in launched]
    with on_cpu():
        assert_close(y.cpu(), exact, rounded, "y", x.double().abs() @ w.double().abs().T)


@pytest.mark.parametrize("kind", ["Q6_K", "Q4_0", None])
def test_embedding_of_a_padded_table(kind: str | None) -> None:
    table = quantized(kind, 40, 256) if kind else randn(40, 256)
    part = matrices.Part(matrices.rows_of(table, 0, 40, 64))
    layer = matrices.Matrices([part], torch.float32, torch.device("cpu"))
    ids = torch.tensor([[3, 39], [0, 63]])
    found = layer.embedding(ids)
    assert torch.equal(found[:, 0], dense(table)[[3, 0]])
    assert torch.equal(found[0, 1], dense(table)[39]) and not found[1, 1].any()


# ------------------------------------------------------------------------------------- the plugin


def test_the_entry_point_is_the_function() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition('[project.entry-points."vllm.general_plugins"]\n')[2]
    target = re.match(r'minitron_kernels = "(.+):(.+)"\n', section)
    assert target is not None
    assert getattr(importlib.import_module(target[1]), target[2]) is integration.register


def test_register_survives_a_missing_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with caplog.at_level(logging.WARNING):
        integration.register()
    assert "not used in this vLLM: ModuleNotFoundError" in caplog.text


class FakePlatform:
    """The questions that `unsupported` asks of vLLM's platform, nothing else."""

    device_name = "fake"

    def __init__(self, kind: str, capability: tuple[int, int] | None = None) -> None:
        self.kind, self.capability = kind, capability

    def is_cpu(self) -> bool:
        return self.kind == "cpu"

    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    def get_device_capability(self) -> Any:
        if self.capability is None:
            return None
        return types.SimpleNamespace(major=self.capability[0], minor=self.capability[1])


@pytest.mark.parametrize(
    ("platform", "reason"),
    [
        (FakePlatform("cpu"), None),
        (FakePlatform("cuda", (8, 0)), None),
        (FakePlatform("cuda", (9, 0)), None),
        (FakePlatform("cuda", (12, 0)), None),
        (FakePlatform("cuda", (7, 5)), "7.5"),
        (FakePlatform("cuda"), "no GPU"),
        (FakePlatform("rocm"), "not on fake"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_unsupported_names_the_reason(
    monkeypatch: pytest.MonkeyPatch, platform: FakePlatform, reason: str | None
) -> None:
    module: Any = types.ModuleType("vllm.platforms")
    module.current_platform = platform
    monkeypatch.setitem(sys.modules, "vllm", types.ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.platforms", module)
    found = integration.unsupported()
    assert found is None if reason is None else found is not None and reason in found


def test_a_part_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    registered = []

    def part(name: str) -> Any:
        module: Any = types.ModuleType(name)
        module.register = lambda: registered.append(name)
        return module

    monkeypatch.setattr(integration, "unsupported", lambda: None)
    for name in ("layers", "gguf"):
        monkeypatch.setitem(sys.modules, f"{integration.__name__}.{name}", part(name))
    monkeypatch.setitem(sys.modules, f"{integration.__name__}.registry", None)
    with caplog.at_level(logging.WARNING):
        integration.register()
    assert registered == ["layers", "gguf"]
    assert "registry is not registered" in caplog.text


def test_without_vllm_nothing_imports_it() -> None:
    """The modules that work without it do not name it."""
    folder = ROOT / "minitron_kernels/integrations/vllm"
    for name in ("paged.py", "matrices.py"):
        imports = re.findall(r"^\s*(?:from|import) (\S+)", (folder / name).read_text(), re.M)
        assert not [each for each in imports if each.split(".")[0] == "vllm"]
