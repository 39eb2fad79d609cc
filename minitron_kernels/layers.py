"""The model's layers as pure nn.Modules over `ops`, with Hugging Face's attribute names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron_kernels import ops
from minitron_kernels.quantized import QuantizedTensor

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
    """A bias-free matrix [out, in]; x [..., in] (+ residual [..., out]) -> [..., out].

    The weight may be a QuantizedTensor, here and in the other layers with matrices.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, residual)


class Packable(nn.Module):
    """A module whose `Linear` children ``matrices`` can be packed into one parameter.

    The fused kernels read packed weights. ``pack`` replaces the children by the parameter
    ``packed_weight``; state_dict() has the matrices by their own names nevertheless (as views of
    the packed rows where possible, else as copies), and load_state_dict() takes them.
    """

    matrices: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.packed_weight: nn.Parameter | None = None

    def _pack(self, *weights: Tensor) -> Tensor:
        raise NotImplementedError

    def _unpack(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def weights(self) -> tuple[Tensor, ...]:
        """Those of ``matrices``, while they are not packed."""
        return tuple(getattr(self, name).weight for name in self.matrices)

    @property
    def is_partly_on_meta(self) -> bool:
        """Whether some of ``matrices`` have not been loaded."""
        return self.packed_weight is None and any(w.is_meta for w in self.weights())

    def pack(self) -> None:
        """Pack the matrices; both forms exist for a moment. Without effect when they are packed.

        Quantised ones stay as they are.
        """
        if self.packed_weight is not None:
            return
        if not any(isinstance(w, QuantizedTensor) for w in self.weights()):
            self.packed_weight = nn.Parameter(self._pack(*self.weights()), requires_grad=False)
            for name in self.matrices:
                setattr(self, name, None)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if destination.pop(f"{prefix}packed_weight", None) is not None:
            for name, weight in zip(self.matrices, self._unpack(), strict=True):
                destination[f"{prefix}{name}.weight"] = weight.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if self.packed_weight is not None:
            state_dict = dict(state_dict)
            names = [f"{prefix}{name}.weight" for name in self.matrices]
            absent = [name for name in names if name not in state_dict]
            found = [state_dict.pop(name) for name in names if name in state_dict]
            if not absent:
                try:
                    state_dict[f"{prefix}packed_weight"] = self._pack(*found)
                except (TypeError, ValueError) as error:
                    error_msgs.append(f"{prefix}: {error}")
            missing_keys += absent
        missing_before = len(missing_keys)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        # What is missing has been told by the names of the matrices.
        own = f"{prefix}packed_weight"
        missing_keys[missing_before:] = [k for k in missing_keys[missing_before:] if k != own]


class SwiGLUMLP(Packable):
    """down(silu(gate(x)) * up(x)), as transformers' LlamaMLP; x [..., hidden_size].

    ``norm`` is applied to x first, ``residual`` added to the result, where given.
    """

    matrices = ("gate_proj", "up_proj")

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def _pack(self, *weights: Tensor) -> Tensor:
        return ops.pack_gate_up(*weights).weight

    def _unpack(self) -> tuple[Tensor, ...]:
        assert self.packed_weight is not None
        return ops.unpack_gate_up(ops.PackedGateUp(self.packed_weight))

    def forward(
        self, x: Tensor, norm: ops.Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(rows.shape)
        gate_up: ops.PackedGateUp | tuple[Tensor, Tensor]
        if self.packed_weight is None:
            gate_up = self.gate_proj.weight, self.up_proj.weight
        else:
            gate_up = ops.PackedGateUp(self.packed_weight)
        return ops.swiglu_mlp(rows, gate_up, self.down_proj.weight, norm, added).view(x.shape)


class Embedding(nn.Module):
    """Rows of a table [V, H]; ids [...] -> [..., H], of ``dtype`` if the table is quantised."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim))

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return ops.embedding(ids, self.weight, dtype)
