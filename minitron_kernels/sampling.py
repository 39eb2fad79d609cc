"""From logits to the next token.

A row of logits is processed in Hugging Face's order: repetition penalty, presence and frequency
penalty, logit_bias, stop ids masked while fewer than min_new_tokens are out, temperature, top_k,
top_p, min_p. At temperature 0 the token is then the largest logit, the lowest id among equals.

Otherwise it is drawn by a rule in integers, so that the order of summation, and with it the
device and the rest of the batch, cannot change the result:

1. l_i = logit_i / temperature, both fp32; m = max l_i; w_i = int64(exp(l_i - m) * 2**40), an fp32
   exp and a truncation. Every later step reads or clears w_i.
2. top_k keeps the k tokens that come first in the order (l descending, id ascending).
3. top_p keeps, of these and in this order, the first, and each token before which the w sum to
   less than int64(top_p * total), with total the sum of the w kept by top_k, in double
   arithmetic. top_p = 1 keeps all.
4. min_p keeps, of these, each token with w_i >= int64(min_p * 2**40).
5. r = out[1] << 32 | out[0], with out = Philox4x32-10 of counter (step, 0, 0, 0) and key
   (seed & 0xffffffff, seed >> 32); step counts the tokens that the request has sampled.
6. target = (r * total) >> 64, exactly, with total the sum of the w that are left; the token is the
   first in ascending order of ids at which the inclusive running sum of w exceeds target.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minitron_kernels import cuda_ops, devices
from minitron_kernels.sampling_params import SamplingParams

FloatArray = np.ndarray[tuple[int], np.dtype[np.float32]]
IntArray = np.ndarray[tuple[int], np.dtype[np.int64]]

WEIGHT_ONE = 2**40  # w of the most likely token; a sum of 2**22 of them still fits int64


@dataclass
class Sampled:
    """One token, with natural-log probabilities if the request asks for them. They are those of
    the model: log_softmax in fp32 of the logits before any processing."""

    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None  # (token id, logprob), most likely first


class SamplingState:
    """What sampling remembers of one request between its tokens.

    Args:
        params: the request's parameters.
        prompt_ids: token ids of the prompt, for the repetition penalty.
        eos_ids: the model's end-of-sequence ids; without effect with params.ignore_eos.

    Attributes:
        counts: output token -> how often it was sampled.
        step: number of tokens sampled.
        seed: params.seed, or the one drawn in its place.
        stop_ids: ids that end the request, params.stop_token_ids and eos_ids.
        largest_id: the largest token id among all these, and which argument it is in.

    Raises:
        ValueError: a negative token id.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int], eos_ids: Iterable[int] = ()
    ) -> None:
        self.params = params
        self.prompt_ids = frozenset(prompt_ids)
        self.counts: Counter[int] = Counter()
        self.step = 0
        if params.seed is None:
            # From torch's generator, so that torch.manual_seed governs it as users expect.
            self.seed = int(torch.randint(-(2**63), 2**63 - 1, ())) % 2**64
        else:
            self.seed = int(params.seed)
        model_stops = frozenset[int]() if params.ignore_eos else frozenset(eos_ids)
        self.stop_ids = model_stops.union(params.stop_token_ids)

        named = {
            "prompt_ids": self.prompt_ids,
            "eos_ids": model_stops,
            "stop_token_ids": params.stop_token_ids,
            "logit_bias": params.logit_bias,
        }
        used = [(token, name) for name, ids in named.items() for token in ids]
        self.largest_id = max(used, default=(0, ""))
        if used and min(used)[0] < 0:
            raise ValueError(f"{min(used)[1]}: token id {min(used)[0]} is negative")

    def advance(self, token_id: int) -> None:
        """Counts `token_id` as the request's next token."""
        self.counts[token_id] += 1
        self.step += 1


def sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """Samples one token for each request and advances its state.

    What a request gets depends on its row and its state only, bit for bit. The host waits for the
    device once.

    Args:
        logits: [B, V], any floating dtype, any device; not modified.
        states: B states, one for each row.

    Raises:
        TypeError: logits are not floating point.
        ValueError: shapes do not fit; a token id of a state is outside the vocabulary; a row has
            a NaN, an infinity, or no finite logit, or its biases and masks leave none. No state
            has advanced then.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[0] != len(states):
        raise ValueError(f"logits must be [{len(states)}, V], got {list(logits.shape)}")
    if not states:
        return []
    for state in states:
        token_id, name = state.largest_id
        if token_id >= logits.shape[1]:
            raise ValueError(
                f"{name}: token id {token_id} is outside the vocabulary of {logits.shape[1]}"
            )
    with torch.no_grad():
        return _sample(logits, states)


def _sample(logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    if logits.dtype == torch.float64:  # other dtypes go to fp32 without rounding, where needed
        logits = logits.float()
    scores = logits
    processed = [i for i, state in enumerate(states) if _has_processors(state)]
    if processed:
        scores = logits.to(torch.float32, copy=True)
        for i in processed:
            _process(scores[i], states[i])

    if cuda_ops.serves_logits(scores):
        rows = torch.from_numpy(cuda_ops.sampling_rows(states).view(np.uint8))
        tokens = cuda_ops.sample(scores, devices.upload(rows, scores.device))
    else:
        tokens = _pick(scores, states)
    return settle(tokens, logits, states)


def _pick(scores: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Token ids [B] int64 without our kernels; -1 where the largest score is not finite."""
    drawn = [i for i, state in enumerate(states) if state.params.temperature > 0]
    if len(drawn) == len(states):
        tokens = torch.empty(len(states), dtype=torch.int64, device=scores.device)
    else:
        tokens = scores.argmax(-1)  # the first of several equal ones; NaN counts as largest
        best = scores.gather(-1, tokens[:, None])[:, 0]
        tokens = torch.where(best.isfinite(), tokens, -1)
    for i in drawn:
        tokens[i] = _draw(scores[i].detach().float().cpu().numpy(), states[i])
    return tokens


def settle(tokens: Tensor, logits: Tensor, states: Sequence[SamplingState]) -> list[Sampled]:
    """Reads the token ids [B] that were taken of logits [B, V], and advances the states.

    The host waits for the device here. Raises ValueError if an id is negative: its row had no token
    to take. No state has advanced then.
    """
    # Everything is enqueued before the first value is read.
    asked = [i for i, state in enumerate(states) if state.params.logprobs is not None]
    if asked:
        logprobs = _rows(logits, asked).float().log_softmax(-1)
        chosen = logprobs.gather(-1, _rows(tokens, asked)[:, None].clamp(min=0))
        top_ids = _most_likely(logprobs, max(states[i].params.logprobs or 0 for i in asked))
        top = logprobs.gather(-1, top_ids)
    token_ids = tokens.tolist()
    for i, token_id in enumerate(token_ids):
        if token_id < 0:
            raise ValueError(f"logits[{i}]: {_no_token(logits[i])}")

    results = [Sampled(token_id) for token_id in token_ids]
    if asked:
        values = zip(asked, chosen.tolist(), top_ids.tolist(), top.tolist(), strict=True)
        for i, (logprob,), ids, top_logprobs in values:
            results[i].logprob = logprob
            n = states[i].params.logprobs
            results[i].top_logprobs = list(zip(ids, top_logprobs, strict=True))[:n]
    for state, token_id in zip(states, token_ids, strict=True):
        state.advance(token_id)
    return results


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """x[rows], without waiting for the device of x."""
    if len(rows) == x.shape[0]:
        return x
    return x.index_select(0, devices.upload(torch.tensor(rows), x.device))


def _no_token(row: Tensor) -> str:
    """Why no token can be taken from a row of logits."""
    if row.isnan().any():
        return "holds NaN"
    if row.isposinf().any():
        return "holds infinity"
    if row.isneginf().all():
        return "every logit is -inf"
    return "logit_bias and min_new_tokens leave no token with a finite logit"


# ---- processors: a row of fp32 logits, changed in place


def takes_logits_as_they_are(state: SamplingState) -> bool:
    """Whether the next token is taken from the model's own logits, and nothing else is told."""
    return state.params.logprobs is None and not _has_processors(state)


def _has_processors(state: SamplingState) -> bool:
    p = state.params
    return (
        p.repetition_penalty != 1
        or p.presence_penalty != 0
        or p.frequency_penalty != 0
        or bool(p.logit_bias)
        or state.step < p.min_new_tokens
    )


def _process(row: Tensor, state: SamplingState) -> None:
    p = state.params

    def ids(tokens: Iterable[int]) -> Tensor:
        return devices.upload(torch.tensor(list(tokens), dtype=torch.int64), row.device)

    def numbers(values: Iterable[float]) -> Tensor:
        return devices.upload(torch.tensor(list(values), dtype=row.dtype), row.device)

    if p.repetition_penalty != 1:
        seen = ids(state.prompt_ids | state.counts.keys())
        values = row[seen]
        row[seen] = torch.where(
            values < 0, values * p.repetition_penalty, values / p.repetition_penalty
        )
    if state.counts and (p.presence_penalty != 0 or p.frequency_penalty != 0):
        counts = numbers(state.counts.values())
        row[ids(state.counts)] -= p.presence_penalty + p.frequency_penalty * counts
    if p.logit_bias:
        row[ids(p.logit_bias)] += numbers(p.logit_bias.values())
    if state.step < p.min_new_tokens:
        row.index_fill_(0, ids(state.stop_ids), -math.inf)


# ---- the draw (steps 1 to 6 of the module's rule)


def _draw(logits: FloatArray, state: SamplingState) -> int:
    """The token that fp32 logits [V] give, or -1 if the largest is not finite.

    By numpy: torch would wake its threads for each of these operations, which takes longer than
    the operation.
    """
    p = state.params
    with np.errstate(over="ignore"):
        scaled = logits / np.float32(p.temperature)
    largest = scaled.max()
    if not np.isfinite(largest):
        return -1
    weights = _weights(scaled - largest)
    ids = None
    if p.top_k > 0 or p.top_p < 1:  # else nothing needs an order
        ids = _kept(scaled, largest, weights, p)
        weights = weights[ids]
    if p.min_p > 0:
        weights[weights < int(p.min_p * WEIGHT_ONE)] = 0
    running = weights.cumsum()
    target = _random_64(state.seed, state.step) * int(running[-1]) >> 64
    index = int(np.searchsorted(running, target, side="right"))
    return index if ids is None else int(ids[index])


def _weights(differences: FloatArray) -> IntArray:
    """Step 1's w of l - m, which is overwritten."""
    torch.from_numpy(differences).exp_()
    differences *= WEIGHT_ONE
    return differences.astype(np.int64)


def _kept(
    scaled: FloatArray, largest: np.float32, weights: IntArray, p: SamplingParams
) -> IntArray:
    """The ids that top_k and top_p keep of a row, ascending."""
    vocab = len(scaled)
    if 0 < p.top_k < vocab:
        count = p.top_k
        least = torch.from_numpy(scaled).topk(count).values[-1].item()
    else:  # what weighs less than `light` weighs less in all than what top_p leaves out
        count, total = vocab, int(weights.sum())
        light = (total - int(p.top_p * total)) // vocab
        least = scaled[np.flatnonzero(weights >= light)].min()
    ids = np.flatnonzero(scaled >= least)
    # Only these, which are few as a rule, are put in order. Values without ids are enough: how many
    # stay gives the smallest that does, and how many of its equals.
    values = scaled[ids]
    ordered = np.sort(values)[: -count - 1 : -1]
    running = _weights(ordered - largest).cumsum()
    if p.top_p < 1:
        total = total if count == vocab else int(running[-1])
        count = 1 + int(np.searchsorted(running, int(p.top_p * total)))
    smallest = ordered[:count][-1]
    kept = values > smallest
    kept[np.flatnonzero(values == smallest)[: len(ordered[:count]) - kept.sum()]] = True
    return ids[kept]


def _most_likely(logprobs: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest of [R, V] fp32 values <= 0, descending, equal ones by id."""
    # The bits of a float >= 0 order as the float does; with the id below them no two are equal,
    # which topk needs to be deterministic.
    ids = torch.arange(logprobs.shape[-1], device=logprobs.device)
    keys = logprobs.abs().view(torch.int32).to(torch.int64) << 32 | ids
    return keys.topk(min(count, logprobs.shape[-1]), largest=False).values & 0xFFFFFFFF


def _random_64(seed: int, step: int) -> int:
    out = philox_4x32_10((step, 0, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    return out[1] << 32 | out[0]


def philox_4x32_10(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Philox4x32 with 10 rounds: four random 32-bit words for a counter and a key of 32-bit
    words (Salmon et al. 2011, section 3.3; constants as there)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0 = 0xD2511F53 * c0
        product_1 = 0xCD9E8D57 * c2
        c0, c1 = product_1 >> 32 ^ c1 ^ k0, product_1 & 0xFFFFFFFF
        c2, c3 = product_0 >> 32 ^ c3 ^ k1, product_0 & 0xFFFFFFFF
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3
