"""Log-probabilities of many continuations, with what their contexts have in common computed once.

An evaluation scores several continuations of one context, and contexts that open with the same
examples. Requests are therefore sorted by their token ids, so that each one's longest prefix in
common with any other is a prefix it shares with its predecessor:

    the sky is | blue        reads 4 tokens
    the sky is | green       reads 1, its K and V of "the sky is" are the first one's pages
    the sun    | sets        reads 2

A sequence waits for the one that computes its prefix; all that wait for nothing go into one batch.
Whole pages are used in common, the page in which two sequences part is copied.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from minitron_kernels import devices
from minitron_kernels.cache import PagedKVCache
from minitron_kernels.generate import affordable_tokens
from minitron_kernels.model import Batch, MinitronForCausalLM

# A prefix of fewer tokens is computed again: waiting for it costs more.
MIN_SHARED = 16
# Tokens in the cache at a time, if the longest request needs no more and memory is not short.
CACHE_TOKENS = 16384
PAGE_SIZE = 16
MAX_STEP_TOKENS = 2048
# Logits in a step, 128 MiB of float32: 256 rows of a vocabulary of 131072.
MAX_STEP_LOGITS = 1 << 25

Request = tuple[Sequence[int], Sequence[int]]  # context ids, continuation ids


@dataclass(eq=False)
class _Sequence:
    """Token ids that the model reads, for one request or for several with the same ids.

    K and V of the first ``shared`` tokens are those of ``source``. ``wanted`` maps a row that is
    computed here to the (request, target id) pairs that take their log-probability from it.
    """

    ids: Sequence[int]
    shared: int = 0
    source: _Sequence | None = None
    level: int = 0  # of how many others, one after the other, it needs the result
    wanted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)
    done: int = 0  # tokens in the cache

    def want(self, row: int, request: int, target: int) -> None:
        """Note what ``request`` takes from ``row``, where that row is computed."""
        owner = self
        while row < owner.shared:
            assert owner.source is not None
            owner = owner.source
        owner.wanted.setdefault(row, []).append((request, target))


@torch.inference_mode()
def score_continuations(
    model: MinitronForCausalLM,
    requests: Sequence[Request],
    *,
    max_length: int | None = None,
    batch_size: int = 64,
    cache_tokens: int = CACHE_TOKENS,
    progress: Callable[[int], object] | None = None,
) -> list[tuple[float, bool]]:
    """For each (context ids, continuation ids): log-probability, and whether greedy would say it.

    The sum runs over the tokens of the continuation, each given all before it. Of a request that is
    longer than ``max_length`` tokens (default: the model's context), not counting the last one,
    which is not read, the beginning is left out. ``batch_size`` bounds the sequences in a step,
    ``cache_tokens`` those in the cache, unless one request needs more. ``progress`` is told how
    many more requests are done. The results depend on neither.

    Raises ValueError for an empty context or continuation, a continuation that alone is too long
    and ids out of range, MemoryError if the cache of the longest request does not fit.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    limit = model.config.max_position_embeddings if max_length is None else max_length
    tokens = [_tokens(model, request, limit, i) for i, request in enumerate(requests)]
    if not tokens:
        return []
    lengths = [len(ids) - 1 for ids in tokens]
    longest, total = max(lengths), sum(lengths) + len(lengths) * PAGE_SIZE
    more = max(0, min(total, cache_tokens) - longest)
    cache = model.new_cache(affordable_tokens(model, [longest, more]), PAGE_SIZE)
    scores: list[list[float]] = [[] for _ in requests]
    greedy = [True] * len(requests)
    for group in _groups(tokens, [len(r[1]) for r in requests], cache):
        for step in _steps(group, cache, batch_size, MAX_STEP_LOGITS // model.config.vocab_size):
            finished = 0
            for request, score, is_greedy in _run(model, cache, step):
                scores[request].append(score)
                greedy[request] &= is_greedy
                finished += len(scores[request]) == len(requests[request][1])
            if progress is not None:
                progress(finished)
        for sequence in group:
            cache.allocator.free(sequence.pages[sequence.shared // cache.page_size :])
    return [(math.fsum(each), every) for each, every in zip(scores, greedy, strict=True)]


def _tokens(model: MinitronForCausalLM, request: Request, limit: int, index: int) -> Sequence[int]:
    """Context and continuation of a request, checked and cut on the left."""
    context, continuation = request
    if not len(context) or not len(continuation):
        raise ValueError(f"request {index}: context and continuation must hold a token at least")
    if len(continuation) > limit:
        raise ValueError(
            f"request {index}: the continuation has {len(continuation)} tokens, the model's "
            f"context is {limit}"
        )
    tokens = [*context, *continuation][-(limit + 1) :]
    if not all(0 <= token < model.config.vocab_size for token in tokens):
        raise ValueError(f"request {index}: ids must lie in 0..{model.config.vocab_size - 1}")
    return tokens


def _groups(
    tokens: Sequence[Sequence[int]], counts: Sequence[int], cache: PagedKVCache
) -> Iterator[list[_Sequence]]:
    """The requests in order of their ids, in groups that the cache holds.

    ``counts``: how many tokens at the end of each request are its continuation.
    """
    arrays = [np.asarray(ids[:-1], dtype=">u4") for ids in tokens]
    keys = [array.tobytes() for array in arrays]  # big-endian: in the order of the ids
    group: list[_Sequence] = []
    pages = 0
    previous: int | None = None
    for i in sorted(range(len(tokens)), key=keys.__getitem__):
        if previous is None or keys[i] != keys[previous]:
            ids = tokens[i][:-1]
            shared = _common(arrays[i], arrays[previous]) if group and previous is not None else 0
            need = cache.pages_for(len(ids)) - _reused(shared) // cache.page_size
            if pages + need > cache.allocator.num_pages:
                yield group
                group, pages, shared = [], 0, 0
                need = cache.pages_for(len(ids))
            group.append(_follow(group[-1] if group else None, ids, _reused(shared)))
            pages += need
            previous = i
        first = len(tokens[i]) - 1 - counts[i]  # the row that predicts the first token
        for row in range(first, len(tokens[i]) - 1):
            group[-1].want(row, i, tokens[i][row + 1])
    yield group


def _common(a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> int:
    """How many leading elements are the same."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _reused(shared: int) -> int:
    return shared if shared >= MIN_SHARED else 0


def _follow(predecessor: _Sequence | None, ids: Sequence[int], shared: int) -> _Sequence:
    """A sequence whose first ``shared`` tokens are those of its predecessor in the order."""
    if predecessor is None or not shared:
        return _Sequence(ids)
    source = predecessor
    while source.shared >= shared:  # the prefix is no work of its own
        assert source.source is not None
        source = source.source
    return _Sequence(ids, shared, source, source.level + 1, done=shared)


_Part = tuple[_Sequence, int, int]  # a sequence and which of its tokens: from, to


def _steps(
    group: Sequence[_Sequence], cache: PagedKVCache, batch_size: int, max_rows: int
) -> Iterator[list[_Part]]:
    """What to compute together, one batch after the other; gives the sequences their pages."""
    for level in range(max(sequence.level for sequence in group) + 1):
        ready = [sequence for sequence in group if sequence.level == level]
        _allocate(ready, cache)
        waiting = deque(ready)
        while waiting:
            step: list[_Part] = []
            unfinished = []
            tokens, rows = MAX_STEP_TOKENS, max(1, max_rows)  # that still fit
            while waiting and tokens and len(step) < batch_size:
                sequence = waiting[0]
                start, end = sequence.done, min(len(sequence.ids), sequence.done + tokens)
                wanted = [row for row in sorted(sequence.wanted) if start <= row < end]
                if len(wanted) > rows:
                    end = wanted[rows]
                    wanted = wanted[:rows]
                if end == start:
                    break
                waiting.popleft()
                step.append((sequence, start, end))
                sequence.done = end
                tokens, rows = tokens - (end - start), rows - len(wanted)
                if end < len(sequence.ids):
                    unfinished.append(sequence)
            waiting.extendleft(reversed(unfinished))
            yield step


def _allocate(sequences: Sequence[_Sequence], cache: PagedKVCache) -> None:
    """Pages for each: those of its source, a copy of the one in which they part, new ones."""
    page_size = cache.page_size
    copies = []
    for sequence in sequences:
        whole, part = divmod(sequence.shared, page_size)
        own = cache.allocator.allocate(cache.pages_for(len(sequence.ids)) - whole)
        assert own is not None  # _groups has counted
        theirs = sequence.source.pages if sequence.source is not None else []
        sequence.pages = theirs[:whole] + own
        if part:
            copies.append((theirs[whole], own[0]))
    if copies:
        _copy_pages(cache, copies)


def _copy_pages(cache: PagedKVCache, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy pages, each pair from the first to the second, in all layers."""
    source, target = devices.upload(torch.tensor(pairs).T.contiguous(), cache.k.device)
    for tensor in (cache.k, cache.v):
        tensor[:, target] = tensor[:, source]


def _run(
    model: MinitronForCausalLM, cache: PagedKVCache, step: Sequence[_Part]
) -> Iterator[tuple[int, float, bool]]:
    """One forward pass: (request, log-probability, is it the likeliest) of tokens wanted from it.

    Those of one request come in the order of its tokens.
    """
    rows: list[int] = []
    pairs: list[tuple[int, int, int]] = []  # index into rows, request, target
    offset = 0
    for sequence, start, end in step:
        for row in sorted(row for row in sequence.wanted if start <= row < end):
            pairs += [(len(rows), request, target) for request, target in sequence.wanted[row]]
            rows.append(offset + row - start)
        offset += end - start
    batch = Batch.build(
        [sequence.pages for sequence, _, _ in step],
        [start for _, start, _ in step],
        [sequence.ids[start:end] for sequence, start, end in step],
        cache.page_size,
        model.device,
        rows=rows,
    )
    logits = model(batch, cache)
    if not pairs:
        return
    at, targets = devices.upload(
        torch.tensor([(index, target) for index, _, target in pairs]).T.contiguous(), model.device
    )
    logprobs = logits.log_softmax(-1)[at, targets].tolist()
    likeliest = (logits.argmax(-1)[at] == targets).tolist()
    for (_, request, _), logprob, is_greedy in zip(pairs, logprobs, likeliest, strict=True):
        yield request, logprob, is_greedy
