"""vLLM's RMSNorm, SiluAndMul and RotaryEmbedding by the kernels (CustomOp.register_oot).

vLLM makes these in place of its own classes of the same name, and calls them where its custom_ops
enable that name; else it compiles its own code. What the kernels do not take is left to it, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.rotary_embedding import (
    Llama3RotaryEmbedding,
    RotaryEmbedding,
)

from minitron_kernels import ops

Tensor = torch.Tensor


class MinitronRMSNorm(RMSNorm):
    """Normalises x [..., H]; with ``residual``, their sum, which is written over residual."""

    def forward_cuda(
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        weight = self.weight.data
        if (
            not self.has_weight
            or self.variance_size_override is not None
            or x.dtype != weight.dtype
        ):
            result: Tensor | tuple[Tensor, Tensor] = super().forward_cuda(x, residual)
            return result
        if residual is None:
            return ops.rms_norm(x, weight, self.variance_epsilon)
        return ops.add_rms_norm(x, residual, weight, self.variance_epsilon), residual

    forward_cpu = forward_cuda


class MinitronSiluAndMul(SiluAndMul):
    def forward_cuda(self, x: Tensor) -> Tensor:
        return ops.silu_and_mul(x)

    forward_cpu = forward_cuda


class _Rotary(nn.Module):
    """What stands before vLLM's class in the bases: its tables, with the kernels' rotation.

    ``cos``, ``sin``: fp32 [max_position, R/2], of values that vLLM has rounded to its dtype.
    """

    head_size: int
    is_neox_style: bool
    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tables: Tensor | None = getattr(self, "cos_sin_cache", None)
        halves = (None, None) if tables is None else tables.float().chunk(2, dim=-1)
        for name, half in zip(("cos", "sin"), halves, strict=True):
            half = None if half is None else half.contiguous()
            self.register_buffer(name, half, persistent=False)

    def forward_cuda(
        self, positions: Tensor, query: Tensor, key: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """query [T, Hq * D] and key [T, Hk * D], or with heads apart; new tensors."""
        if self.cos is None or self.sin is None:
            raise NotImplementedError("this rotary embedding has no tables")
        positions = positions.flatten()
        q = query.view(len(positions), -1, self.head_size)
        k = q[:, :0] if key is None else key.view(len(positions), -1, self.head_size)
        q, k = ops.apply_rope(q, k, self.cos, self.sin, positions, not self.is_neox_style)
        return q.view(query.shape), None if key is None else k.view(key.shape)

    forward_cpu = forward_cuda


class MinitronRotaryEmbedding(_Rotary, RotaryEmbedding):
    pass


class MinitronLlama3RotaryEmbedding(_Rotary, Llama3RotaryEmbedding):
    pass


_LAYERS = {
    "RMSNorm": MinitronRMSNorm,
    "SiluAndMul": MinitronSiluAndMul,
    "RotaryEmbedding": MinitronRotaryEmbedding,
    "Llama3RotaryEmbedding": MinitronLlama3RotaryEmbedding,
}


def register() -> None:
    """Where another plugin was first, its class stays."""
    for name, layer in _LAYERS.items():
        if name not in op_registry_oot:
            CustomOp.register_oot(name=name)(layer)
