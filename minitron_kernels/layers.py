"""The model's layers as pure nn.Modules over `ops`, with Hugging Face's attribute names."""

from __future__ import annotations

import torch
from torch import nn

from minitron_kernels import ops

Tensor = torch.Tensor


class RMSNorm(nn.Module):
    """weight * x / rms(x), as transformers' LlamaRMSNorm; x [..., hidden_size]."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def as_norm(self) -> ops.Norm:
        """For an op that this norm is fused into."""
        return ops.Norm(self.weight, self.variance_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.variance_epsilon)


class Linear(nn.Module):
    """A bias-free matrix [out, in]; x [..., in] (+ residual [..., out]) -> [..., out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, residual)


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as transformers' LlamaMLP; x [..., hidden_size].

    ``norm`` is applied to x first, ``residual`` added to the result, where given.
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(
        self, x: Tensor, norm: ops.Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(rows.shape)
        gate_up = (self.gate_proj.weight, self.up_proj.weight)
        return ops.swiglu_mlp(rows, gate_up, self.down_proj.weight, norm, added).view(x.shape)


class Embedding(nn.Module):
    """Rows of a table [V, H]; ids [...] -> [..., H]."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))

    def forward(self, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)
