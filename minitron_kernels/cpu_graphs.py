"""Decode steps of an engine on the CPU, recorded once and played back in one call.

A decode step of a small model is hundreds of native calls of a few microseconds each, and the
Python between them (layers, checks, outputs) takes as long as they do. For a number of rows the
calls are the same in every step: same weights, same outputs, and the inputs lie in static tensors
that each step fills. So the first step of a size is run with its calls recorded
(`_native.CpuRecording`), and the later ones are one call that makes them again: the same functions
with the same checks of what index tensors hold, and so the same bits.

While a step is recorded, a dispatch mode keeps what it allocates and looks for tensor operations
that are no native call; a step that has any (weights that had to be copied, a dtype of its own) is
not recorded, and decoding goes on as before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minitron_kernels import _native, cuda_ops
from minitron_kernels.cache import PagedKVCache
from minitron_kernels.graphs import DecodeRow
from minitron_kernels.model import Batch, MinitronForCausalLM

Tensor = torch.Tensor

_log = logging.getLogger(__name__)

# Above, the products take so long that Python does not matter, and a recording's outputs add up.
MAX_ROWS = 16

_EMPTY = frozenset({"aten::empty.memory_format", "aten::new_empty", "aten::empty_like"})
# Looks at token ids, which the sampler took from the vocabulary.
_CHECKS = frozenset({"aten::aminmax", "aten::item", "aten::_local_scalar_dense"})


def why_not(model: MinitronForCausalLM) -> str | None:
    """Why decode steps of a model cannot be recorded; None: they can."""
    if model.device.type != "cpu" or cuda_ops.emulate:
        return f"the model is on {model.device}"
    if model.shard is not None:
        return "its results are exchanged between processes"
    return None


def _is_view(func: Any, args: tuple[Any, ...], result: Any) -> bool:
    """Whether the tensors of a result lie in the memory of the first argument, left as it is.

    The schema alone does not tell: that of contiguous() says so even where it copies.
    """
    results = result if isinstance(result, (list, tuple)) else [result]
    if (
        func._schema.is_mutable
        or not args
        or not all(isinstance(t, Tensor) for t in (args[0], *results))
    ):
        return False
    start = args[0].untyped_storage().data_ptr()
    return all(t.untyped_storage().data_ptr() == start for t in results)


class _Watch(TorchDispatchMode):
    """Keeps the memory that is allocated; names the first operation that replaying would miss."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.missed: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else the first use imports torch._dynamo, which takes more than a second, only to keep it
        # from compiling what nobody compiles.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in _EMPTY:
            self.kept.append(result)
        elif func.name() not in _CHECKS and not _is_view(func, args, result):
            self.missed = self.missed or func.name()
        return result


class DecodeRecordings:
    """Runs decode steps of up to MAX_ROWS rows, one recording for each number of them."""

    def __init__(self, model: MinitronForCausalLM, cache: PagedKVCache) -> None:
        self._model, self._cache = model, cache
        context = cache.pages_for(model.config.max_position_embeddings)
        width = min(context, cache.allocator.num_pages)
        self._columns = torch.zeros(4, MAX_ROWS, dtype=torch.int32)
        self._table = torch.zeros(MAX_ROWS, width, dtype=torch.int32)
        self._owners: list[list[int] | None] = [None] * MAX_ROWS
        self._recorded: dict[
            tuple[int, int, bool], tuple[Tensor, Callable[[], None], list[Any]]
        ] = {}
        self._can_record = True

    def run(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Logits fp32 [B, V], valid until the next call."""
        self._fill(rows)
        key = len(rows), torch.get_num_threads(), self._model.int8_activations
        if key in self._recorded:
            logits, replay, _ = self._recorded[key]
            replay()
            return logits
        return self._record(key) if self._can_record else self._step(len(rows))

    def _fill(self, rows: Sequence[DecodeRow]) -> None:
        page_size = self._cache.page_size
        columns = [
            (
                row.token_id,
                row.position,
                row.pages[row.position // page_size] * page_size + row.position % page_size,
                row.position + 1,
            )
            for row in rows
        ]
        self._columns[:, : len(rows)] = torch.tensor(columns, dtype=torch.int32).T
        for i, row in enumerate(rows):
            if self._owners[i] is not row.pages:
                self._owners[i] = row.pages
                self._table[i, : len(row.pages)] = torch.tensor(row.pages, dtype=torch.int32)

    def _batch(self, size: int) -> Batch:
        ids, positions, slots, seqlens = self._columns[:, :size]
        return Batch(
            ids=ids,
            positions=positions,
            slots=slots,
            cu_seqlens_q=None,
            seqlens=seqlens,
            block_table=self._table[:size],
            rows=None,
            min_seqlen_q=1,
            max_seqlen_q=1,
        )

    def _step(self, size: int) -> Tensor:
        logits: Tensor = self._model(self._batch(size), self._cache)
        return logits

    def _record(self, key: tuple[int, int, bool]) -> Tensor:
        batch = self._batch(key[0])
        recording = _native.CpuRecording()
        recording.start()
        try:
            with _Watch() as watch:
                logits: Tensor = self._model(batch, self._cache)
        finally:
            recording.stop()
        if watch.missed is None:
            # Calls hold addresses: what is there must outlive them.
            kept = [
                watch.kept,
                list(self._model.parameters()),
                batch,
                self._model._rope_for(batch.positions),
            ]
            self._recorded[key] = logits, recording.replay, kept
        else:
            _log.debug("decoding without recorded steps: they contain %s", watch.missed)
            self._can_record = False
        return logits
