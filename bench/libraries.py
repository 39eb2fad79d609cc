"""Kernels of other projects, for whoever has them installed; each raises NotAvailable if not.

Their modules are imported here and nowhere else. The functions take this project's layouts.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import eager
from bench.harness import NotAvailable
from bench.shapes import PAGE_SIZE

Tensor = torch.Tensor
Call = Callable[[], Any]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotAvailable(f"not installed ({error})") from error


def _on_gpu(x: Tensor) -> None:
    if not x.is_cuda:
        raise NotAvailable("for a GPU only")


def once(prepare: Callable[[], Call]) -> Call:
    """Prepared at the first call, which is not timed; raises then what preparing raises."""
    prepared = functools.cache(prepare)
    return lambda: prepared()()


# ------------------------------------------------------------------------------------ liger-kernel


def liger_rms_norm(x: Tensor, weight: Tensor) -> Call:
    def prepare() -> Call:
        _on_gpu(x)
        norm = _module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        # offset 0, rounded as Llama's code does, not in place
        return lambda: norm.apply(x, weight, eager.EPS, 0.0, "llama", False)

    return once(prepare)


def liger_silu_and_mul(gate_up: Tensor) -> Call:
    def prepare() -> Call:
        _on_gpu(gate_up)
        function = _module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        gate, up = (t.contiguous() for t in gate_up.chunk(2, -1))
        return lambda: function.apply(gate, up)

    return once(prepare)


def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Call:
    """It rotates [1, H, T, D] in place where that is contiguous, as here."""

    def prepare() -> Call:
        _on_gpu(q)
        function = _module("liger_kernel.ops.rope").LigerRopeFunction
        q4, k4 = (t[None].transpose(1, 2) for t in (q, k))

        def call() -> tuple[Tensor, Tensor]:
            out = function.apply(q4.clone(), k4.clone(), cos[None], sin[None])
            return tuple(t.transpose(1, 2)[0] for t in out)

        return call

    return once(prepare)


# -------------------------------------------------------------------------------------- flashinfer


def flashinfer_rms_norm(x: Tensor, weight: Tensor) -> Call:
    def prepare() -> Call:
        _on_gpu(x)
        norm = _module("flashinfer").norm.rmsnorm
        return lambda: norm(x, weight, eager.EPS)

    return once(prepare)


def flashinfer_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Call:
    """In place: x becomes the norm, so it is given back for the next call."""

    def prepare() -> Call:
        _on_gpu(x)
        norm, given = _module("flashinfer").norm.fused_add_rmsnorm, x.clone()

        def call() -> Tensor:
            norm(given, residual, weight, eager.EPS)
            return given

        return call

    return once(prepare)


def flashinfer_silu_and_mul(gate_up: Tensor) -> Call:
    def prepare() -> Call:
        _on_gpu(gate_up)
        function = _module("flashinfer").activation.silu_and_mul
        return lambda: function(gate_up)

    return once(prepare)


def flashinfer_prefill(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Call:
    """q, k, v packed [T, H, D], sequences of equal length, causal."""

    def prepare() -> Call:
        _on_gpu(q)
        flashinfer = _module("flashinfer")
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD")
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=q.device)
        starts = starts * (q.shape[0] // sequences)
        wrapper.plan(
            starts, starts, q.shape[1], k.shape[1], q.shape[2], causal=True, q_data_type=q.dtype
        )
        return lambda: wrapper.run(q, k, v)

    return once(prepare)


def flashinfer_decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, n: int) -> Call:
    def prepare() -> Call:
        _on_gpu(q)
        flashinfer = _module("flashinfer")
        workspace = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        batch, pages = table.shape
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * pages
        last = torch.full((batch,), n - (pages - 1) * PAGE_SIZE, dtype=torch.int32, device=q.device)
        wrapper.plan(
            starts, table.flatten(), last, q.shape[1], k_cache.shape[2], q.shape[2], PAGE_SIZE,
            q_data_type=q.dtype, kv_data_type=q.dtype,
        )  # fmt: skip
        return lambda: wrapper.run(q, (k_cache, v_cache))

    return once(prepare)


# -------------------------------------------------------------------------------------- flash-attn


def flash_attn_prefill(q: Tensor, k: Tensor, v: Tensor, sequences: int) -> Call:
    def prepare() -> Call:
        _on_gpu(q)
        function = _module("flash_attn").flash_attn_func
        batched = [t.view(sequences, -1, *t.shape[1:]) for t in (q, k, v)]
        return lambda: function(*batched, causal=True).flatten(0, 1)

    return once(prepare)


def flash_attn_decode(q: Tensor, k: Tensor, v: Tensor) -> Call:
    """k and v [B, L, Hk, D]: its paged cache wants pages of 256 tokens."""

    def prepare() -> Call:
        _on_gpu(q)
        function = _module("flash_attn").flash_attn_with_kvcache
        return lambda: function(q[:, None], k, v, cache_seqlens=k.shape[1], causal=True)[:, 0]

    return once(prepare)


# ----------------------------------------------------------------------------------------- PyTorch


def sdpa_backends(
    q: Tensor, k: Tensor, v: Tensor, back: Callable[[Tensor], Tensor]
) -> dict[str, Call]:
    """PyTorch's fused attention: what it picks, and on a GPU each of its backends. Layouts [B, H,
    L, D]; `back` gives the result this project's layout."""

    def run(backend: SDPBackend | None) -> Call:
        def call() -> Tensor:
            if backend is None:
                return back(eager.sdpa(q, k, v, causal=True))
            with sdpa_kernel(backend):
                return back(eager.sdpa(q, k, v, causal=True))

        return call

    found = {"sdpa": run(None)}
    if q.is_cuda:
        for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"):
            found[f"sdpa {name.partition('_')[0].lower()}"] = run(getattr(SDPBackend, name))
    return found


# ------------------------------------------------------------------------------------ transformers


def transformers_module(name: str, attribute: str) -> Any:
    """transformers.models.mistral.modeling_mistral.MistralRMSNorm and its like."""
    return getattr(_module(f"transformers.models.mistral.{name}"), attribute)
