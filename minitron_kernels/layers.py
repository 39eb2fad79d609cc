"""The model's layers as pure nn.Modules over `ops`, with Hugging Face's attribute names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minitron_kernels import ops
from minitron_kernels.quant_packing import PackedQuantizedTensor, pack, unpack, unpack_pair
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


class MatrixModule(nn.Module):
    """A module with a matrix ``weight`` [N, K], which may be a QuantizedTensor.

    For the CUDA kernels ``pack`` turns that into a PackedQuantizedTensor. state_dict() has the
    blocks nevertheless, and load_state_dict() takes them. ``int8_activations``: as in `ops.linear`.
    """

    int8_activations = False

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, cols))

    def pack(self, device: torch.device | None = None) -> None:
        """Pack a quantised weight, and move it. Without effect on other weights."""
        if isinstance(self.weight, QuantizedTensor):
            self.weight = as_parameter(pack(self.weight, device=device))

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, PackedQuantizedTensor):
            destination[f"{prefix}weight"] = unpack(self.weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(self.weight, PackedQuantizedTensor) and isinstance(weight, QuantizedTensor):
            state_dict = {**state_dict, f"{prefix}weight": pack(weight, device=self.weight.device)}
        super()._load_from_state_dict(state_dict, prefix, *args)


def as_parameter(weight: Tensor) -> nn.Parameter:
    """``weight``, which nobody else holds, as a parameter that needs no gradient."""
    if ops.is_quantized(weight):
        # What nn.Parameter does for subclasses, less a detach(), whose first call on a subclass
        # makes torch import its distributed tensors and sympy: 0.7 s.
        weight._is_param = True
        parameter: Any = weight
        return parameter
    return nn.Parameter(weight, requires_grad=False)


class Linear(MatrixModule):
    """A bias-free matrix [out, in]; x [..., in] (+ residual [..., out]) -> [..., out]."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(out_features, in_features)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.linear(x, self.weight, residual, int8_activations=self.int8_activations)


class Packable(nn.Module):
    """A module whose `Linear` children ``matrices`` can be packed into one parameter.

    The fused kernels read packed weights. ``pack`` replaces the children by the parameter
    ``packed_weight``; state_dict() has the matrices by their own names nevertheless (as views of
    the packed rows where possible, else as copies), and load_state_dict() takes them.
    Quantised matrices are packed each on its own, unless the subclass can join them.
    ``int8_activations``: as in the ops.
    """

    matrices: tuple[str, ...]
    int8_activations = False

    def __init__(self) -> None:
        super().__init__()
        self.packed_weight: nn.Parameter | None = None

    def _pack(self, *weights: Tensor) -> Tensor:
        raise NotImplementedError

    def _unpack(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _can_join(self, *weights: Tensor) -> bool:
        """Whether _pack takes these weights."""
        return not any(map(ops.is_quantized, weights))

    def weights(self) -> tuple[Tensor, ...]:
        """Those of ``matrices``; none when they are packed."""
        if self.packed_weight is not None:
            return ()
        return tuple(getattr(self, name).weight for name in self.matrices)

    @property
    def is_partly_on_meta(self) -> bool:
        """Whether some of ``matrices`` have not been loaded."""
        return any(w.is_meta for w in self.weights())

    def pack(self, device: torch.device | None = None) -> None:
        """Pack the matrices; both forms exist for a moment. Without effect when they are packed.

        ``device``: where quantised ones go (None: they stay where they are).
        """
        if self.packed_weight is not None:
            return
        if self._can_join(*self.weights()):
            joined = self._pack(*self.weights())
            self.packed_weight = as_parameter(joined if device is None else joined.to(device))
            for name in self.matrices:
                setattr(self, name, None)
            return
        for name in self.matrices:
            getattr(self, name).pack(device)

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

    def _can_join(self, *weights: Tensor) -> bool:
        gate, up = weights
        if isinstance(gate, QuantizedTensor) and isinstance(up, QuantizedTensor):
            return gate.quant_type == up.quant_type
        return super()._can_join(gate, up)

    def _pack(self, *weights: Tensor) -> Tensor:
        gate, up = weights
        if isinstance(gate, QuantizedTensor) and isinstance(up, QuantizedTensor):
            return pack(gate, up)
        return ops.pack_gate_up(gate, up).weight

    def _unpack(self) -> tuple[Tensor, ...]:
        if isinstance(self.packed_weight, PackedQuantizedTensor):
            return unpack_pair(self.packed_weight)
        assert self.packed_weight is not None
        return ops.unpack_gate_up(ops.PackedGateUp(self.packed_weight))

    def gate_up(self) -> ops.PackedGateUp | tuple[Tensor, Tensor]:
        """The first matrices as `ops.swiglu_mlp` takes them."""
        if self.packed_weight is None:
            return self.gate_proj.weight, self.up_proj.weight
        return ops.PackedGateUp(self.packed_weight)

    def forward(
        self, x: Tensor, norm: ops.Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        added = None if residual is None else residual.reshape(rows.shape)
        w_gate_up, w_down = self.gate_up(), self.down_proj.weight
        int8 = self.int8_activations
        y = ops.swiglu_mlp(rows, w_gate_up, w_down, norm, added, int8_activations=int8)
        return y.view(x.shape)


class Embedding(MatrixModule):
    """Rows of a table [V, H]; ids [...] -> [..., H], of ``dtype`` if the table is quantised."""

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return ops.embedding(ids, self.weight, dtype)
