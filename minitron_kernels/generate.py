"""Generation: continuous batching over the paged cache, streams of tokens, stop strings.

An `Engine` holds requests. Every step packs one new token of each running request and the next
chunk of each prompt still being read into one forward pass. A request's chunks are cut at multiples
of ``prefill_chunk`` of its own prompt, and its pages are reserved when it is admitted, so that
nothing about it depends on what else is in the batch.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from minitron_kernels import cpu_graphs, devices
from minitron_kernels.cpu_graphs import DecodeRecordings
from minitron_kernels.graphs import DecodeGraphs, DecodeRow, why_not
from minitron_kernels.model import Batch, MinitronForCausalLM
from minitron_kernels.sampling import (
    Sampled,
    SamplingState,
    sample,
    settle,
    takes_logits_as_they_are,
)
from minitron_kernels.sampling_params import SamplingParams

if TYPE_CHECKING:
    from minitron_kernels.loaders.stream_decoder import StreamDecoder
    from minitron_kernels.loaders.tokenizer import Tokenizer

Tensor = torch.Tensor
Prompt = str | Sequence[int]

_log = logging.getLogger(__name__)

DEFAULT_MAX_NEW_TOKENS = 128
# Of the memory that is free, the share that a cache may claim when its size is not given.
CACHE_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class TokenEvent:
    """One token of request ``index``.

    ``text`` is what became certain with it: it may be empty (half a character, or what may become
    a stop string) and the last event of a request carries all that was held back.
    """

    index: int
    token_id: int
    text: str
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    finish_reason: str | None = None


@dataclass
class Timings:
    """Wall-clock seconds and tokens of a run; a step that reads any prompt counts as prefill."""

    prefill_seconds: float = 0.0
    prefill_tokens: int = 0
    decode_seconds: float = 0.0
    decode_tokens: int = 0


@dataclass
class GenerationResult:
    """What became of one prompt.

    ``token_ids``: the new tokens, with the end-of-sequence or stop token that ended them. ``text``:
    their text, without it and cut before a stop string. ``finish_reason``: "stop", "length", or
    "interrupted" if the run was closed before. ``logprobs`` (if asked for): a dict a token, keys
    token_id, logprob, top (list of [id, logprob]). ``timings`` are those of the whole run.
    """

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "interrupted"
    logprobs: list[dict[str, Any]] | None = None
    timings: Timings = field(default_factory=Timings)


class _StopText:
    """Cuts a text stream at the first stop string, holding back what may become one."""

    def __init__(self, decoder: StreamDecoder | None, stop: Sequence[str]) -> None:
        self.decoder, self.stop = decoder, stop
        self.pending = ""

    def push(self, token_id: int) -> tuple[str, bool]:
        """(text that is now certain, whether a stop string was met)."""
        if self.decoder is None:
            return "", False
        return self._take(self.decoder.push(token_id))

    def flush(self) -> str:
        """All that is left when the request ends for another reason."""
        if self.decoder is None:
            return ""
        text, hit = self._take(self.decoder.flush())
        return text if hit else text + self.pending

    def _take(self, text: str) -> tuple[str, bool]:
        self.pending += text
        hits = [at for s in self.stop if (at := self.pending.find(s)) >= 0]
        if hits:
            return self.pending[: min(hits)], True
        held = 0
        for s in self.stop:
            for n in range(min(len(s) - 1, len(self.pending)), held, -1):
                if self.pending.endswith(s[:n]):
                    held = n
                    break
        cut = len(self.pending) - held
        certain, self.pending = self.pending[:cut], self.pending[cut:]
        return certain, False


@dataclass
class _Request:
    index: int
    tokens: list[int]  # the prompt, then what was generated
    max_tokens: int  # length of tokens at which it ends
    state: SamplingState
    text: _StopText
    result: GenerationResult
    pages: list[int] = field(default_factory=list)
    num_cached: int = 0


class Engine:
    """Runs requests of unequal lengths together, admitting more as pages become free.

    ``num_tokens`` sizes the cache; ``max_batch_size`` bounds the requests in it at a time,
    ``prefill_chunk`` the tokens of one prompt in a step, ``max_step_tokens`` all prompts' tokens in
    a step. ``cuda_graphs`` captures the steps that only decode in CUDA graphs (None: where that is
    possible; True: a reason why it is not is logged as a warning; on a CPU, False also leaves
    recording such steps). The tokens are the same.

    ``keep_last``, for dialogues: the cache keeps the tokens of the request that ended last, and of
    the next prompt only what comes after those it has in common with them is read.
    """

    def __init__(
        self,
        model: MinitronForCausalLM,
        tokenizer: Tokenizer | None,
        num_tokens: int,
        *,
        max_batch_size: int = 64,
        prefill_chunk: int = 512,
        max_step_tokens: int = 2048,
        page_size: int = 16,
        cuda_graphs: bool | None = None,
        keep_last: bool = False,
    ) -> None:
        for name, value in (
            ("max_batch_size", max_batch_size),
            ("prefill_chunk", prefill_chunk),
            ("max_step_tokens", max_step_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        self.model, self.tokenizer = model, tokenizer
        self.cache = model.new_cache(num_tokens, page_size)
        self.max_batch_size = max_batch_size
        self.prefill_chunk = prefill_chunk
        self.max_step_tokens = max_step_tokens
        self.keep_last = keep_last
        self.timings = Timings()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._kept: tuple[list[int], list[int]] = [], []  # tokens of the last request, and pages
        self._added = 0
        self._graphs: DecodeGraphs | None = None
        self._recordings: DecodeRecordings | None = None
        if cuda_graphs is not False:
            reason = why_not(model)
            if reason is None:
                self._graphs = DecodeGraphs(model, self.cache, max_batch_size)
            else:
                level = logging.WARNING if cuda_graphs else logging.DEBUG
                _log.log(level, "decoding without CUDA graphs: %s", reason)
                if (reason := cpu_graphs.why_not(model)) is None:
                    self._recordings = DecodeRecordings(model, self.cache)
                else:
                    _log.debug("decoding without recorded steps: %s", reason)

    def add(self, prompt_ids: Sequence[int], params: SamplingParams) -> GenerationResult:
        """Queue a prompt of token ids; the returned result fills as steps are run."""
        request = self._request(list(prompt_ids), params)
        have = self.cache.allocator.num_pages
        if self.cache.pages_for(request.max_tokens) > have:
            raise ValueError(
                f"prompt {request.index} needs {request.max_tokens} tokens of cache, "
                f"the engine has {have * self.cache.page_size}"
            )
        self._added += 1
        self._waiting.append(request)
        return request.result

    def _request(self, prompt_ids: list[int], params: SamplingParams) -> _Request:
        config, tokenizer, index = self.model.config, self.tokenizer, self._added
        max_tokens = total_tokens(self.model, prompt_ids, params, index)
        if params.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer; use stop_token_ids")
        eos = set(config.eos_token_ids)
        if tokenizer is not None:
            eos |= set(tokenizer.stop_token_ids)
        decoder = None if tokenizer is None else tokenizer.stream_decoder(skip_special_tokens=True)
        if params.seed is None and self.model.shard is not None:
            seed = self.model.shard.same(SamplingState(params, ()).seed)
            params = replace(params, seed=seed)
        return _Request(
            index=index,
            tokens=prompt_ids,
            max_tokens=max_tokens,
            state=SamplingState(params, prompt_ids, eos),
            text=_StopText(decoder, params.stop),
            result=GenerationResult(
                prompt_ids=list(prompt_ids),
                logprobs=None if params.logprobs is None else [],
                timings=self.timings,
            ),
        )

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._running)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_batch_size:
            if not self._reserve(self._waiting[0]):
                return  # first come, first served: a short one does not overtake
            self._running.append(self._waiting.popleft())

    def _reserve(self, request: _Request) -> bool:
        """Give a request its pages, the first of them with what is kept of its prompt."""
        (tokens, pages), self._kept = self._kept, ([], [])
        # The last token of a prompt is read again, for its logits.
        same = zip(tokens, request.tokens[:-1], strict=False)
        shared = next((i for i, (a, b) in enumerate(same) if a != b), None)
        if shared is None:
            shared = min(len(tokens), len(request.tokens) - 1)
        allocator = self.cache.allocator
        whole = self.cache.pages_for(shared)
        allocator.free(pages[whole:])
        more = allocator.allocate(self.cache.pages_for(request.max_tokens) - whole)
        if more is None:
            allocator.free(pages[:whole])
            return False
        request.pages, request.num_cached = pages[:whole] + more, shared
        return True

    def _release(self, request: _Request) -> None:
        """Take back a request's pages, or keep them in the place of the last one's."""
        pages = request.pages
        if self.keep_last:
            (_, pages), self._kept = self._kept, (request.tokens[: request.num_cached], pages)
        self.cache.allocator.free(pages)

    def cancel(self) -> None:
        """End all requests; their results keep what they have."""
        self._waiting.clear()
        while self._running:
            self._release(self._running.pop())

    def step(self) -> list[TokenEvent]:
        """One forward pass; the tokens it produced, in the order their requests were added."""
        self._admit()
        rows: list[tuple[_Request, int]] = []  # request, tokens it contributes
        prompt_tokens = 0
        for request in self._running:
            count = len(request.tokens) - request.num_cached
            if not request.result.token_ids:
                # Chunks end at multiples of prefill_chunk of the prompt, whatever the batch.
                count = min(count, self.prefill_chunk - request.num_cached % self.prefill_chunk)
                if prompt_tokens and prompt_tokens + count > self.max_step_tokens:
                    continue
                prompt_tokens += count
            rows.append((request, count))
        if not rows:
            return []
        started = time.perf_counter()
        decodes = all(r.num_cached + 1 == len(r.tokens) for r, _ in rows)
        if decodes and self._graphs is not None:
            sampled = self._decode(self._graphs, [r for r, _ in rows])
        elif decodes and self._recordings is not None and len(rows) <= cpu_graphs.MAX_ROWS:
            sampled = self._decode_recorded(self._recordings, [r for r, _ in rows])
        else:
            sampled = self._forward(rows)
        ready = [r for r, count in rows if r.num_cached == len(r.tokens)]
        events = [self._accept(r, token) for r, token in zip(ready, sampled, strict=True)]
        seconds = time.perf_counter() - started
        if prompt_tokens:
            self.timings.prefill_seconds += seconds
            self.timings.prefill_tokens += prompt_tokens
        else:
            self.timings.decode_seconds += seconds
            self.timings.decode_tokens += len(events)
        return events

    def _forward(self, rows: list[tuple[_Request, int]]) -> list[Sampled]:
        """One step of any rows; the next tokens of those whose last token is in it."""
        new = [r.tokens[r.num_cached : r.num_cached + count] for r, count in rows]
        ends = accumulate(count for _, count in rows)
        last = [
            (request, end - 1)
            for (request, count), end in zip(rows, ends, strict=True)
            if request.num_cached + count == len(request.tokens)
        ]
        batch = Batch.build(
            [r.pages for r, _ in rows],
            [r.num_cached for r, _ in rows],
            new,
            self.cache.page_size,
            self.model.device,
            rows=[row for _, row in last],
        )
        logits: Tensor = self.model(batch, self.cache)
        for request, count in rows:
            request.num_cached += count
        return sample(logits, [request.state for request, _ in last])

    def _decode(self, graphs: DecodeGraphs, requests: list[_Request]) -> list[Sampled]:
        """A step of one token of every request, all of whose next tokens are wanted."""
        states = [r.state for r in requests]
        tokens, logits = graphs.run(
            [DecodeRow(r.tokens[-1], r.num_cached, r.pages, r.state) for r in requests]
        )
        for request in requests:
            request.num_cached += 1
        if all(takes_logits_as_they_are(state) for state in states):
            return settle(tokens, logits, states)
        return sample(logits, states)

    def _decode_recorded(
        self, recordings: DecodeRecordings, requests: list[_Request]
    ) -> list[Sampled]:
        """_decode, by recorded calls on the CPU."""
        logits = recordings.run(
            [DecodeRow(r.tokens[-1], r.num_cached, r.pages, r.state) for r in requests]
        )
        for request in requests:
            request.num_cached += 1
        return sample(logits, [r.state for r in requests])

    def _accept(self, request: _Request, sampled: Sampled) -> TokenEvent:
        result, token = request.result, sampled.token_id
        request.tokens.append(token)
        result.token_ids.append(token)
        if result.logprobs is not None:
            top = [list(pair) for pair in sampled.top_logprobs or []]
            result.logprobs.append({"token_id": token, "logprob": sampled.logprob, "top": top})
        reason: str | None = None
        if token in request.state.stop_ids:
            text, reason = request.text.flush(), "stop"
        else:
            text, hit = request.text.push(token)
            if hit:
                reason = "stop"
            elif len(request.tokens) >= request.max_tokens:
                text, reason = text + request.text.flush(), "length"
        result.text += text
        if reason is not None:
            result.finish_reason = reason
            self._running.remove(request)
            self._release(request)
        return TokenEvent(request.index, token, text, sampled.logprob, sampled.top_logprobs, reason)


def total_tokens(
    model: MinitronForCausalLM, prompt_ids: Sequence[int], params: SamplingParams, index: int
) -> int:
    """Tokens, prompt included, at which a request ends. Raises ValueError for a bad prompt."""
    config, length = model.config, len(prompt_ids)
    if length == 0:
        raise ValueError(f"prompt {index} is empty; give at least one token")
    for token in prompt_ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"prompt {index} holds token id {token}; ids lie in 0..{config.vocab_size - 1}"
            )
    context = config.max_position_embeddings
    if length >= context:
        raise ValueError(
            f"prompt {index} has {length} tokens, which leaves no room in the model's context of "
            f"{context}"
        )
    if params.max_length is not None:
        if length >= params.max_length:
            raise ValueError(
                f"prompt {index} has {length} tokens, max_length is {params.max_length}; "
                "raise it, or use max_new_tokens"
            )
        limit = params.max_length
    else:
        new = params.max_new_tokens
        limit = length + (DEFAULT_MAX_NEW_TOKENS if new is None else new)
    return min(limit, context)


class TokenStream(Iterator[TokenEvent]):
    """An iterator over a run's tokens as they are produced.

    ``results`` holds a `GenerationResult` for each prompt, up to date at any moment; ``close()``
    ends the run early (those not finished stay "interrupted").
    """

    def __init__(self, engine: Engine, results: list[GenerationResult]) -> None:
        self.results = results
        self.timings = engine.timings
        self._engine: Engine | None = engine
        self._events: deque[TokenEvent] = deque()

    def __next__(self) -> TokenEvent:
        while not self._events:
            if self._engine is None or not self._engine.has_work:
                self.close()
                raise StopIteration
            self._events += self._engine.step()
        return self._events.popleft()

    def close(self) -> None:
        """End the run; the results keep what they have."""
        if self._engine is not None:
            self._engine.cancel()
        self._engine = None  # and with it the cache, if it is nobody else's
        self._events.clear()


def stream(
    model: MinitronForCausalLM,
    tokenizer: Tokenizer | None,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_batch_size: int = 64,
    prefill_chunk: int = 512,
    page_size: int = 16,
    cuda_graphs: bool | None = None,
) -> TokenStream:
    """Generate for one prompt or several, yielding a `TokenEvent` for every token as it comes.

    ``prompts``: strings (encoded with the tokenizer's special-token rules) or token ids;
    ``params``: one for all or one each (None: greedy, 128 tokens). Without a tokenizer, prompts
    must be ids and texts stay empty. The other options are those of `Engine`. Raises ValueError
    before anything is computed for a prompt that is empty, too long or holds an id out of range,
    and for contradictory options; MemoryError if one prompt's cache does not fit.
    """
    ids = [_encode(tokenizer, p, i) for i, p in enumerate(_as_list(prompts))]
    if params is None:
        params = SamplingParams()
    each = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
    for own in each:
        if not isinstance(own, SamplingParams):
            raise TypeError(f"params must be SamplingParams, one or a list, got {params!r:.60}")
    if len(each) != len(ids):
        raise ValueError(f"params has {len(each)} entries for {len(ids)} prompts")
    needs = [total_tokens(model, p, s, i) for i, (p, s) in enumerate(zip(ids, each, strict=True))]
    paged = sorted((-(-n // page_size) * page_size for n in needs), reverse=True)
    engine = Engine(
        model,
        tokenizer,
        affordable_tokens(model, paged[:max_batch_size]),
        max_batch_size=max_batch_size,
        prefill_chunk=prefill_chunk,
        page_size=page_size,
        cuda_graphs=cuda_graphs,
    )
    return TokenStream(engine, [engine.add(p, s) for p, s in zip(ids, each, strict=True)])


def generate(
    model: MinitronForCausalLM,
    tokenizer: Tokenizer | None,
    prompts: Prompt | Sequence[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    **engine_options: Any,
) -> list[GenerationResult]:
    """`stream`, run to its end: a `GenerationResult` for each prompt, in order."""
    run = stream(model, tokenizer, prompts, params, **engine_options)
    for _ in run:
        pass
    return run.results


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if hasattr(prompts, "tolist"):  # a tensor or an array, of one prompt's ids or of several's
        prompts = prompts.tolist()
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"prompts must be a string, token ids, or a list of these, got {type(prompts).__name__}"
        )
    if prompts and isinstance(prompts[0], Integral):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _encode(tokenizer: Tokenizer | None, prompt: Prompt, index: int) -> list[int]:
    if not isinstance(prompt, str):
        return _as_token_ids(prompt, f"prompt {index} must be a string or token ids")
    if tokenizer is None:
        raise ValueError(f"prompt {index} is text, which needs a tokenizer; give token ids")
    if not prompt:
        raise ValueError(f"prompt {index} is empty")
    ids: list[int] = tokenizer.encode(prompt)
    return ids


def _as_token_ids(ids: Any, rule: str) -> list[int]:
    """Ids of a list, a tensor or an array as a list."""
    try:
        return [operator.index(token) for token in ids]
    except TypeError:
        raise TypeError(f"{rule}, got {str(ids)[:60]!r}") from None


def affordable_tokens(model: MinitronForCausalLM, needs: Sequence[int]) -> int:
    """Cache tokens for ``needs`` (longest first), or as many of them as memory allows."""
    if not needs:
        return 1
    device, shard = model.device, model.shard
    free = devices.free_memory(device) if shard is None else shard.free_memory(device)
    per_token = model.own_config.kv_bytes_per_token(model.dtype.itemsize)
    budget = int(free * CACHE_MEMORY_SHARE) // per_token
    if shard is not None:  # else the ranks would admit different requests
        budget = shard.least(budget)
    if needs[0] > budget:
        raise MemoryError(
            f"the KV cache of {needs[0]} tokens needs {needs[0] * per_token / 2**30:.2f} GiB, "
            f"{free / 2**30:.2f} GiB is free; ask for fewer tokens"
        )
    return min(sum(needs), budget)


def score(
    model: MinitronForCausalLM, ids: Sequence[int], *, chunk: int = 256
) -> list[float | None]:
    """Log-probability of each token given those before it; None for the first.

    ``ids``: 1 ... context token ids. Raises ValueError if it is empty, too long or out of range.
    """
    config, ids = model.config, _as_token_ids(ids, "ids must be token ids")
    if not ids or len(ids) > config.max_position_embeddings:
        raise ValueError(
            f"ids must hold 1..{config.max_position_embeddings} tokens, got {len(ids)}"
        )
    for i in ids:
        if not 0 <= i < config.vocab_size:
            raise ValueError(f"ids must lie in 0..{config.vocab_size - 1}, got {i}")
    affordable_tokens(model, [len(ids)])
    cache = model.new_cache(len(ids))
    pages = cache.allocator.allocate(cache.pages_for(len(ids)))
    assert pages is not None
    logprobs: list[float | None] = [None]
    for start in range(0, len(ids) - 1, chunk):
        part = ids[start : min(start + chunk, len(ids) - 1)]
        batch = Batch.build([pages], [start], [part], cache.page_size, model.device)
        logits = model(batch, cache)
        following = torch.tensor(ids[start + 1 : start + 1 + len(part)])
        following = devices.upload(following, model.device)
        chosen = logits.float().log_softmax(-1).gather(1, following[:, None])[:, 0]
        logprobs += chosen.tolist()
    return logprobs


# Options of transformers' generate() that mean here what they mean there without being honoured by
# SamplingParams; what changes the result is refused, what does not is accepted.
_IGNORED_OPTIONS = ("use_cache", "return_dict_in_generate")


def generate_ids(
    model: MinitronForCausalLM,
    inputs: Tensor | None,
    attention_mask: Tensor | None,
    options: Mapping[str, Any],
) -> Tensor:
    """`MinitronForCausalLM.generate`: token ids in and out, the call of transformers."""
    options = dict(options)
    input_ids = options.pop("input_ids", None)
    if (inputs is None) == (input_ids is None):
        raise ValueError("give token ids either as inputs or as input_ids")
    inputs = input_ids if inputs is None else inputs
    if not isinstance(inputs, Tensor) or inputs.ndim != 2 or inputs.is_floating_point():
        got = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs)
        raise ValueError(f"inputs must be an integer tensor [B, S], got {got}")
    if attention_mask is None:
        attention_mask = torch.ones_like(inputs)
    if attention_mask.shape != inputs.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}, inputs {list(inputs.shape)}"
        )
    kept = attention_mask.bool().tolist()
    prompts = []
    for i, (row, mask) in enumerate(zip(inputs.tolist(), kept, strict=True)):
        first = mask.index(True) if True in mask else len(mask)
        if not all(mask[first:]):
            raise ValueError(f"attention_mask[{i}] must be zeros (left padding), then ones")
        prompts.append(row[first:])

    pad = options.pop("pad_token_id", model.config.pad_token_id)
    eos = options.pop("eos_token_id", None)
    cuda_graphs = options.pop("cuda_graphs", None)
    for name in _IGNORED_OPTIONS:
        if options.pop(name, None) not in (None, name == "use_cache"):
            raise NotImplementedError(f"{name} can only be {name == 'use_cache'}")
    params = _hf_params(options)
    eos_ids = model.config.eos_token_ids if eos is None else _as_ids(eos)
    if eos is not None:
        params = replace(
            params, ignore_eos=True, stop_token_ids=tuple({*params.stop_token_ids, *eos_ids})
        )
    if pad is None:
        pad = eos_ids[0] if eos_ids else 0
    width = inputs.shape[1]
    if params.max_length is not None and width >= params.max_length:
        raise ValueError(
            f"inputs have {width} tokens, max_length is {params.max_length}; raise it, or use "
            "max_new_tokens"
        )
    # transformers counts the padding into max_length.
    each = [
        params
        if params.max_length is None
        else replace(params, max_length=params.max_length - (width - len(p)))
        for p in prompts
    ]
    results = generate(model, None, prompts, each, cuda_graphs=cuda_graphs)
    longest = max((len(r.token_ids) for r in results), default=0)
    new = [r.token_ids + [pad] * (longest - len(r.token_ids)) for r in results]
    new_ids = torch.tensor(new, dtype=torch.int64, device=inputs.device).view(len(new), longest)
    return torch.cat([inputs.long(), new_ids], dim=1)


def _as_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, Tensor):
        value = value.tolist()
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)


def _hf_params(options: dict[str, Any]) -> SamplingParams:
    """SamplingParams of transformers' options: do_sample decides, absent means by temperature."""
    do_sample = options.pop("do_sample", None)
    options = {name: value for name, value in options.items() if value is not None}
    known = SamplingParams.__dataclass_fields__
    for name in options:
        if name not in known:
            raise TypeError(
                f"generate() got an unknown option {name!r}; accepted: cuda_graphs, do_sample, "
                f"eos_token_id, pad_token_id, {', '.join(known)}"
            )
    if do_sample and "temperature" not in options:
        options["temperature"] = 1.0
    if do_sample and options["temperature"] == 0:
        raise ValueError("do_sample=True contradicts temperature=0")
    if do_sample is False and options.get("temperature", 0.0) not in (0.0, 1.0):
        raise ValueError(f"do_sample=False contradicts temperature={options['temperature']}")
    if do_sample is False:
        options["temperature"] = 0.0
    return SamplingParams(**options)
