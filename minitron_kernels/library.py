"""Registration of the ops with torch.library, and the arguments that several of them share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, NoReturn, ParamSpec, TypeVar

import torch

Tensor = torch.Tensor


class Norm(NamedTuple):
    """An RMSNorm that rides on the op after it."""

    weight: Tensor  # [H]
    eps: float


class Rope(NamedTuple):
    """Rotary tables and the position of every token.

    ``cos``, ``sin``: fp32 [max_position, R/2], R <= D rotated features. ``positions``: int32/int64
    [T], or None where an op can tell them from the sequence lengths. ``interleaved``: pairs are
    features (2i, 2i+1), as in GGUF's llama; else (i, i + R/2), as in Hugging Face's.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor | None = None
    interleaved: bool = False


_LIBRARY = torch.library.Library("minitron_kernels", "DEF")
_NO_BACKWARD = "{} has no backward pass: use torch.no_grad(), or detach its arguments"
_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _requires_grad(*args: object, **kwargs: object) -> bool:
    return any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values()))


def op(
    schema: str, fake: Callable[..., object]
) -> Callable[[Callable[_Args, _Result]], Callable[_Args, _Result]]:
    """Register a function as an op of CPU and CUDA tensors; ``fake`` tells its outputs' shapes.

    There are no gradients. A backward pass through an op raises NotImplementedError; through one
    that also writes to an argument, PyTorch warns.
    """

    def register(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CPU")
        _LIBRARY.impl(name, function, "CUDA")
        torch.library.register_fake(f"minitron_kernels::{name}", fake, lib=_LIBRARY)
        registered = getattr(torch.ops.minitron_kernels, name).default
        if not registered._schema.is_mutable:

            def backward(ctx: object, *gradients: object) -> NoReturn:
                raise NotImplementedError(_NO_BACKWARD.format(name))

            torch.library.register_autograd(f"minitron_kernels::{name}", backward, lib=_LIBRARY)

        @functools.wraps(function)
        def call(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
            if torch.compiler.is_compiling() or (
                torch.is_grad_enabled() and _requires_grad(*args, **kwargs)
            ):
                result: _Result = registered(*args, **kwargs)
                return result
            return function(*args, **kwargs)

        return call

    return register
