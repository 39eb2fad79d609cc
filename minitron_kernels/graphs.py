"""Decode steps of an engine in CUDA graphs, one graph per batch size.

A decode step feeds one token of every running request through the model and samples the next. It
costs a handful of launches per layer, whose host time would exceed the GPU's at small batches;
captured in a graph they are one call. A graph reads and writes fixed addresses, so what varies
lives in one static buffer, filled on the host and copied in one go before each replay:

    sampling [N, 40 B] | ids [N] | positions [N] | slots [N] | seqlens [N] | block_table [N, W]

Batches are padded up to the next size that has a graph. A padded row has the slot -1 and the
length 0: it appends nothing, attends to nothing and, rows being independent, changes no other row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minitron_kernels import cuda_attention, cuda_ops, devices
from minitron_kernels.cache import PagedKVCache
from minitron_kernels.model import Batch, MinitronForCausalLM
from minitron_kernels.sampling import SamplingState

Tensor = torch.Tensor

_log = logging.getLogger(__name__)


def bucket_of(num_rows: int, max_rows: int) -> int:
    """The padded size of a batch: 1, 2, 4, 8, then multiples of 8, at most ``max_rows``."""
    size = 1 << (num_rows - 1).bit_length() if num_rows <= 8 else -(-num_rows // 8) * 8
    return min(size, max_rows)


def why_not(model: MinitronForCausalLM) -> str | None:
    """Why decode steps of a model cannot be captured; None: they can."""
    if not devices.has_graphs(model.device):
        return f"the model is on {model.device}, which has no CUDA graphs"
    if model.shard is not None:
        return "its results are exchanged between processes, which is not captured"
    if not cuda_ops.serves(model.model.norm.weight):
        return f"there are no kernels for {model.dtype}"
    if model.config.head_dim not in cuda_attention.HEAD_DIMS:
        return f"there is no attention kernel for head_dim {model.config.head_dim}"
    return None


@dataclass
class DecodeRow:
    """One request's part in a decode step: its last token, which has no K and V yet."""

    token_id: int
    position: int
    pages: list[int]  # the same object as long as the pages are the same
    state: SamplingState


class DecodeGraphs:
    """Runs decode steps of up to ``max_rows`` rows, captured when a size comes the second time.

    The first time it is run as it is, which loads kernels and makes their scratch memory.
    """

    def __init__(self, model: MinitronForCausalLM, cache: PagedKVCache, max_rows: int) -> None:
        self._model, self._cache, self._max_rows = model, cache, max_rows
        self._capture = devices.capture_for(model.device)
        self._seen: set[int] = set()
        self._graphs: dict[int, tuple[tuple[Tensor, ...], Callable[[], None]]] = {}
        self._can_capture = True

        context = cache.pages_for(model.config.max_position_embeddings)
        width = min(context, cache.allocator.num_pages)
        sampling = max_rows * cuda_ops.SAMPLING.itemsize
        self._head_bytes = sampling + 4 * 4 * max_rows
        num_bytes = self._head_bytes + 4 * max_rows * width
        self._host = devices.host_buffer(num_bytes, model.device)
        self._host.zero_()
        self._device = torch.empty(num_bytes, dtype=torch.uint8, device=model.device)

        bytes_ = self._host.numpy()
        self._sampling = bytes_[:sampling].view(cuda_ops.SAMPLING)
        # ids, positions, slots, seqlens
        self._columns = bytes_[sampling : self._head_bytes].view(np.int32).reshape(4, max_rows)
        self._table = bytes_[self._head_bytes :].view(np.int32).reshape(max_rows, width)
        self._owners: list[list[int] | None] = [None] * max_rows

    def run(self, rows: Sequence[DecodeRow]) -> tuple[Tensor, Tensor]:
        """(sampled ids int64 [B], or -1, logits [B, V]), both valid until the next call."""
        size = bucket_of(len(rows), self._max_rows)
        self._fill(rows)
        results = self._run(size)
        return results[0][: len(rows)], results[1][: len(rows)]

    def _fill(self, rows: Sequence[DecodeRow]) -> None:
        count, page_size = len(rows), self._cache.page_size
        self._sampling[:count] = cuda_ops.sampling_rows([row.state for row in rows])
        self._sampling[count:] = np.zeros((), cuda_ops.SAMPLING)
        columns = [
            (
                row.token_id,
                row.position,
                row.pages[row.position // page_size] * page_size + row.position % page_size,
                row.position + 1,
            )
            for row in rows
        ]
        self._columns[:, :count] = np.array(columns, dtype=np.int32).T
        self._columns[:, count:] = np.array([[0], [0], [-1], [0]])
        changed = False
        for i, row in enumerate(rows):
            if self._owners[i] is not row.pages:
                self._owners[i] = row.pages
                self._table[i, : len(row.pages)] = row.pages
                changed = True
        copied = None if changed else self._head_bytes
        self._device[:copied].copy_(self._host[:copied], non_blocking=True)

    def _run(self, size: int) -> tuple[Tensor, ...]:
        if size not in self._graphs:
            step = self._step(size)
            if size not in self._seen or not self._can_capture:
                self._seen.add(size)
                return self._capture.run(step)
            try:
                self._graphs[size] = self._capture.capture(step)
            except RuntimeError as error:
                _log.warning("decoding without CUDA graphs: a step cannot be captured: %s", error)
                self._can_capture = False
                return self._capture.run(step)
        results, replay = self._graphs[size]
        replay()
        return results

    def _step(self, size: int) -> devices.Step:
        sampling, columns, table = self._device.split(
            [
                self._max_rows * cuda_ops.SAMPLING.itemsize,
                self._columns.nbytes,
                self._table.nbytes,
            ]
        )
        ids, positions, slots, seqlens = columns.view(torch.int32).view(4, -1)[:, :size]
        batch = Batch(
            ids=ids,
            positions=positions,
            slots=slots,
            cu_seqlens_q=None,
            seqlens=seqlens,
            block_table=table.view(torch.int32).view(self._max_rows, -1)[:size],
            rows=None,
            min_seqlen_q=1,
            max_seqlen_q=1,
        )

        def step() -> tuple[Tensor, ...]:
            logits = self._model(batch, self._cache)
            return cuda_ops.sample(logits, sampling), logits

        return step
