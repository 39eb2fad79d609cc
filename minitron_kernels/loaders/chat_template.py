"""Chat templates: Jinja2 programs that come with a model, so they run in a sandbox."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Trace events (calls and lines of Python) that one rendering may take: a few seconds. A chat of a
# thousand messages takes some 1e5.
_MAX_STEPS = 10_000_000
# Longest string or list that `*` may make, and largest operands of `**`.
_MAX_REPEATED = 1_000_000
_MAX_EXPONENT = 64


def render(template: str, **variables: Any) -> str:
    """Render a chat template with the helpers and the whitespace rules that transformers gives it.

    Helpers: raise_exception, strftime_now, tojson (no HTML escapes), `break` and `continue`, and
    the `generation` tag, which is transparent. The sandbox keeps the template from reaching Python;
    nested loops and recursion end at a fixed amount of work, `*` and `**` at a fixed size.

    Raises jinja2.TemplateError, or whatever Python raises for the template's mistakes.
    """
    compiled = _compile(template)
    with _step_limit(_MAX_STEPS):
        return compiled.render(**variables)


class _GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks what to train on: just its body here."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            too_large = abs(left) > _MAX_REPEATED or abs(right) > _MAX_EXPONENT
        else:
            sizes = [len(v) if hasattr(v, "__len__") else v for v in (left, right)]
            is_repeat = hasattr(left, "__len__") or hasattr(right, "__len__")
            too_large = is_repeat and sizes[0] * sizes[1] > _MAX_REPEATED
        if too_large:
            raise jinja2.TemplateError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    env = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    del env.globals["lipsum"]  # makes text of any length
    env.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    env.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return env.from_string(template)


@contextmanager
def _step_limit(limit: int) -> Iterator[None]:
    """Raise RuntimeError once the Python code inside has made `limit` calls and lines."""
    steps = 0

    def count(frame: Any, event: str, arg: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > limit:
            raise RuntimeError(f"stopped after {limit} steps")
        return count

    previous = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(previous)
