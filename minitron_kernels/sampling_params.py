"""How a request picks its tokens; what is done with it is in `sampling`. Needs no torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MIN_TEMPERATURE = 1e-5  # below, logit / temperature may overflow fp32


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request picks its tokens and when it ends. The defaults are greedy.

    Attributes:
        temperature: 0 = greedy, else at least 1e-5; logits are divided by it.
        top_k: keep the k most likely tokens; 0 = off.
        top_p: keep the most likely tokens that reach this probability together; 1 = off.
        min_p: keep tokens at least this likely relative to the most likely one; 0 = off.
        repetition_penalty: logits of tokens of the prompt or the output are divided by it where
            positive and multiplied where negative; 1 = off.
        presence_penalty: subtracted from the logits of tokens that are in the output.
        frequency_penalty: subtracted once for each time that the token is in the output.
        seed: 0 <= seed < 2**64 makes the draws reproducible; None takes one from torch's default
            generator.
        stop: strings that end the output when they appear in it.
        stop_token_ids: token ids that end the output, besides the model's end-of-sequence ids.
        max_new_tokens: most tokens to generate.
        max_length: most tokens of prompt and output together; not with max_new_tokens.
        min_new_tokens: no stop id is sampled before so many tokens are out.
        ignore_eos: do not end at the model's end-of-sequence ids.
        logit_bias: token id -> number added to its logit; -inf bans the token.
        logprobs: None = off, n = log-probability of the sampled token and of the n most likely.

    Raises:
        ValueError: a field of a wrong type or out of range, or fields that contradict each other.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, (holds, rule) in _NUMBERS.items():
            value = getattr(self, name)
            if not (_is_number(value) and holds(value)):
                raise ValueError(f"{name} must be {rule}, got {value!r}")
        for name, (least, most, is_optional) in _INTEGERS.items():
            value = getattr(self, name)
            if not (_is_integer(value, least, most) or (value is None and is_optional)):
                none = ", or None" if is_optional else ""
                raise ValueError(
                    f"{name} must be an integer from {least} to {most}{none}, got {value!r}"
                )
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")

        # Frozen, and therefore set through object: sequences of any kind are kept as tuples.
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must hold non-empty strings, got {text!r}")
        for token in self.stop_token_ids:
            if not _is_token_id(token):
                raise ValueError(f"stop_token_ids must hold token ids, got {token!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        for token, bias in self.logit_bias.items():
            if not _is_token_id(token):
                raise ValueError(f"logit_bias must have token ids as keys, got {token!r}")
            if not (_is_number(bias) and bias < math.inf):
                raise ValueError(f"logit_bias[{token}] must be finite or -inf, got {bias!r}")

        if self.max_new_tokens is not None and self.max_length is not None:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and max_length={self.max_length} "
                "cannot both be given"
            )
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} is more than "
                f"max_new_tokens={self.max_new_tokens}"
            )


_NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (
        lambda x: x == 0 or MIN_TEMPERATURE <= x < math.inf,
        f"0 (greedy) or a finite number >= {MIN_TEMPERATURE:g}",
    ),
    "top_p": (lambda x: 0 < x <= 1, "a number > 0 and <= 1 (1 = off)"),
    "min_p": (lambda x: 0 <= x <= 1, "a number >= 0 and <= 1 (0 = off)"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a finite number > 0 (1 = off)"),
    "presence_penalty": (math.isfinite, "a finite number (0 = off)"),
    "frequency_penalty": (math.isfinite, "a finite number (0 = off)"),
}
_INTEGERS = {  # least, most, None allowed
    "top_k": (0, 2**31 - 1, False),
    "seed": (0, 2**64 - 1, True),
    "max_new_tokens": (1, 2**31 - 1, True),
    "max_length": (1, 2**31 - 1, True),
    "min_new_tokens": (0, 2**31 - 1, False),
    "logprobs": (0, 2**31 - 1, True),
}


def _is_number(value: object) -> bool:
    """A real number and not NaN; bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value


def _is_integer(value: object, least: int, most: int) -> bool:
    return (
        isinstance(value, numbers.Integral)
        and not isinstance(value, bool)
        and least <= int(value) <= most
    )


def _is_token_id(value: object) -> bool:
    return _is_integer(value, 0, 2**31 - 1)


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{name} must be a sequence, got {value!r}")
    return tuple(value)
