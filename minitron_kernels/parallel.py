"""Tensor parallelism: a model over several processes, each with a part of every matrix.

A rank has some KV heads with their query heads, some columns of the MLP, some tokens of the
vocabulary. Between two sums over the ranks everything is its own (Shoeybi et al. 2019):

    ids -> rows of the embedding that are here -> sum
    x [T, H] -> q, k, v of own heads -> attention -> own columns of o_proj    -> sum + x
             -> own gate and up      -> silu * up -> own columns of down_proj -> sum + x
             -> own rows of the LM head -> logits, joined

Each rank ends with the same bits: it gets the others' fp32 products, not rounded, adds them in the
order of the ranks, whatever the number of rows is, adds x and rounds once. So a row's bits depend
on the number of ranks, but on nothing else in the batch. All ranks make the same calls, and each
samples its own copy of the same token.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import ProcessGroup

from minitron_kernels import devices, ops
from minitron_kernels.block_types import block_type
from minitron_kernels.checks import check_range
from minitron_kernels.config import ModelConfig
from minitron_kernels.layers import Embedding, Linear, SwiGLUMLP
from minitron_kernels.loaders.checkpoint import (
    TORCH_DTYPES,
    Weights,
    check_finite,
    check_scales,
    convert,
)
from minitron_kernels.quantized import QuantizedTensor

if TYPE_CHECKING:
    from minitron_kernels.model import MinitronForCausalLM

Tensor = torch.Tensor
_T = TypeVar("_T")

# Its first name, deprecated in torch 2.13, and the new one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Dense matrices are cut at multiples of this many columns where their sizes allow it.
_DENSE_UNIT = 64
# What a rank that fails may raise in the others, too; anything else becomes a RuntimeError there.
_KINDS = (ValueError, TypeError, FileNotFoundError, OSError, NotImplementedError, MemoryError)


# ------------------------------------------------------------------------------ processes


def is_launched() -> bool:
    """Whether torchrun (or what sets its variables) started this process as one of several."""
    size = os.environ.get("WORLD_SIZE", "1")
    others = {"RANK", "MASTER_ADDR"} <= os.environ.keys()
    return others and size.isdecimal() and int(size) > 1


def join() -> ProcessGroup:
    """The group of all processes, made from torchrun's variables at first use.

    CPU tensors go through gloo and CUDA tensors through NCCL. Raises ValueError where there is
    neither a group nor the variables to make one.
    """
    if not dist.is_initialized():
        if not is_launched():
            raise ValueError(
                "tensor_parallel: there is no process group; start the program with torchrun, or "
                "call torch.distributed.init_process_group first"
            )
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    world = dist.group.WORLD
    assert world is not None
    return world


def group_of(tensor_parallel: bool | ProcessGroup) -> ProcessGroup | None:
    """The processes that share a model; None: this one has all of it."""
    if isinstance(tensor_parallel, ProcessGroup):
        group = tensor_parallel
    elif isinstance(tensor_parallel, bool):
        if not tensor_parallel:
            return None
        group = join()
    else:
        raise TypeError(
            "tensor_parallel must be a bool or a process group, got "
            f"{type(tensor_parallel).__name__}"
        )
    return group if group.size() > 1 else None


def own_device(device: torch.device, group: ProcessGroup) -> torch.device:
    """The GPU of this rank, where ``device`` does not say which, made the current one."""
    if device.type != "cuda" or device.index is not None:
        return device
    index, count = int(os.environ.get("LOCAL_RANK", group.rank())), torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"device {device}: there are {count} for process {index} of this machine")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def together(group: ProcessGroup | None) -> Iterator[None]:
    """An error of one rank in this block is raised by all of them, at its end."""
    if group is None:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    kind = next((i for i, each in enumerate(_KINDS) if isinstance(own, each)), None)
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, None if own is None else (kind, str(own)), group)
    if own is not None:
        raise own
    for rank, failure in enumerate(told):
        if failure is not None:
            kind, message = failure
            error_class = RuntimeError if kind is None else _KINDS[kind]
            raise error_class(f"rank {rank}: {message}")


def from_first(group: ProcessGroup | None, function: Callable[[], _T]) -> _T:
    """What ``function`` returns or raises in the first rank, which alone calls it, in all ranks."""
    if group is None:
        return function()
    own: _T | None = None
    with together(group):
        if group.rank() == 0:
            own = function()
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, own, group)
    first: _T = values[0]
    return first


def is_first_to_fail() -> bool:
    """Whether this process should tell of its error: it has found none of another's."""
    if not dist.is_initialized():  # nothing but the same mistake in all of them
        return int(os.environ.get("RANK", "0")) == 0
    try:
        return dist.distributed_c10d._get_default_store().add("minitron_kernels.errors", 1) == 1
    except RuntimeError:  # who keeps the store has gone
        return False


def leave() -> None:
    """End the group of `join`."""
    if dist.is_initialized():
        dist.destroy_process_group()


# --------------------------------------------------------------------------------- shares


def split(total: int, parts: int, unit: int = 1) -> list[range]:
    """0..total in ``parts`` runs of whole units; the first ones may have one unit more."""
    each, more = divmod(total // unit, parts)
    ends = [0]
    for i in range(parts):
        ends.append(ends[-1] + (each + (i < more)) * unit)
    return [range(a, b) for a, b in pairwise(ends)]


class Shard:
    """One rank's part of a model: which rows and columns of which matrix.

    ``config`` is the shape of that part. Columns of a quantised matrix are cut between blocks: one
    that is cut by heads needs heads whose columns are whole blocks. Raises ValueError naming what
    there is too little of, and how many processes can share it.
    """

    def __init__(self, group: ProcessGroup, weights: Weights) -> None:
        self.group, self.rank, self.size = group, group.rank(), group.size()
        whole = weights.checkpoint.config
        q_per_kv = whole.num_attention_heads // whole.num_key_value_heads
        head_block, mlp_block = _block(weights, "o_proj"), _block(weights, "down_proj")
        width = q_per_kv * whole.head_dim  # columns of o_proj that belong to one KV head
        units = {
            "KV heads": math.lcm(head_block, width) // width,
            "columns of down_proj": max(mlp_block, math.gcd(whole.intermediate_size, _DENSE_UNIT)),
            "tokens": math.gcd(whole.vocab_size, _DENSE_UNIT),
        }
        totals = whole.num_key_value_heads, whole.intermediate_size, whole.vocab_size
        shares = []
        most = min(total // unit for total, unit in zip(totals, units.values(), strict=True))
        for total, (what, unit) in zip(totals, units.items(), strict=True):
            if total % unit or total // unit < self.size:
                units_of = f" (in units of {unit})" if unit > 1 else ""
                raise ValueError(
                    f"{whole.source}: {self.size} processes cannot share the {total} {what} of "
                    f"this model{units_of}; accepted: {'1 to ' if most > 1 else ''}{max(most, 1)}"
                )
            shares.append(split(total, self.size, unit))
        kv_heads, columns, self.vocab = shares
        own_kv, own_columns = kv_heads[self.rank], columns[self.rank]

        def scaled(part: range, by: int) -> range:
            return range(part.start * by, part.stop * by)

        q_rows, kv_rows = scaled(own_kv, width), scaled(own_kv, whole.head_dim)
        self._parts = {
            "q_proj": (0, q_rows),
            "k_proj": (0, kv_rows),
            "v_proj": (0, kv_rows),
            "o_proj": (1, q_rows),
            "gate_proj": (0, own_columns),
            "up_proj": (0, own_columns),
            "down_proj": (1, own_columns),
            "embed_tokens": (0, self.vocab[self.rank]),
            "lm_head": (0, self.vocab[self.rank]),
        }
        self.config: ModelConfig = replace(
            whole,
            num_attention_heads=len(own_kv) * q_per_kv,
            num_key_value_heads=len(own_kv),
            intermediate_size=len(own_columns),
            vocab_size=len(self.vocab[self.rank]),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        """Itself: copies of a model are shared by the same processes."""
        return self

    def part(self, name: str) -> tuple[int, range] | None:
        """The dimension of a weight that is cut, and this rank's range of it; None: it is whole."""
        return self._parts.get(name.split(".")[-2])

    def prepare(self, model: MinitronForCausalLM) -> None:
        """Exchange the modules behind which the ranks' results meet."""
        own, decoder = self.config, model.model
        decoder.embed_tokens = ParallelEmbedding(own.vocab_size, own.hidden_size, self)
        for layer in decoder.layers:
            attention = layer.get_submodule("self_attn")
            q_size = own.num_attention_heads * own.head_dim
            attention.o_proj = ParallelLinear(q_size, own.hidden_size, self)
            layer.mlp = ParallelMLP(own.hidden_size, own.intermediate_size, self)

    # ---- what the ranks exchange

    def _gather(self, part: Tensor) -> Tensor:
        """The ranks' ``part`` of one shape [...], as [size, ...]."""
        parts = part.new_empty((self.size, *part.shape))
        if not part.numel():
            return parts
        _all_gather(parts.flatten(0, 1), part.contiguous(), group=self.group)
        return parts

    def sum(self, product: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The ranks' fp32 ``product`` [T, N], added up in their order, + residual, as ``dtype``."""
        total, *others = self._gather(product)
        for other in others:
            total += other
        if residual is not None:
            total += residual
        return total.to(dtype)

    def join(self, logits: Tensor) -> Tensor:
        """The ranks' columns [T, own vocabulary] side by side: [T, V]."""
        width = max(map(len, self.vocab))
        parts = self._gather(F.pad(logits, (0, width - logits.shape[1])))
        return torch.cat([p[:, : len(own)] for p, own in zip(parts, self.vocab, strict=True)], 1)

    def same(self, value: _T) -> _T:
        """The first rank's value."""
        return from_first(self.group, lambda: value)

    def least(self, value: int) -> int:
        """The smallest of the ranks' values."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return min(values)

    def free_memory(self, device: torch.device) -> int:
        """Bytes that this rank may take: main memory is shared with the others of its machine."""
        sharing = 1
        if device.type == "cpu":
            sharing = min(self.size, int(os.environ.get("LOCAL_WORLD_SIZE", self.size)))
        return devices.free_memory(device) // sharing


def _block(weights: Weights, module: str) -> int:
    """Elements of the largest block in the rows of a module's matrices, over all layers."""
    shapes = weights.checkpoint.config.weight_shapes()
    names = [name for name in shapes if name.endswith(f".{module}.weight")]
    kinds = {weights.checkpoint.tensors[n].type for n in names if weights.stays_quantized(n)}
    return max((block_type(kind).elements for kind in kinds), default=1)


# ---------------------------------------------------------------------------------- layers


class ParallelLinear(Linear):
    """A `Linear` of which each rank has some columns; x [T, own columns]."""

    def __init__(self, in_features: int, out_features: int, shard: Shard) -> None:
        super().__init__(in_features, out_features)
        self.shard = shard

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        product = ops.linear(x, self.weight, out_dtype=torch.float32)
        return self.shard.sum(product, residual, x.dtype)


class ParallelMLP(SwiGLUMLP):
    """A `SwiGLUMLP` of which each rank has some of the intermediate features; x [T, H]."""

    def __init__(self, hidden_size: int, intermediate_size: int, shard: Shard) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.shard = shard

    def forward(
        self, x: Tensor, norm: ops.Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        w_gate_up, w_down = self.gate_up(), self.down_proj.weight
        product = ops.swiglu_mlp(x, w_gate_up, w_down, norm, out_dtype=torch.float32)
        return self.shard.sum(product, residual, x.dtype)


class ParallelEmbedding(Embedding):
    """An `Embedding` of which each rank has the rows of some tokens; ids [T] of any of them."""

    def __init__(self, rows: int, cols: int, shard: Shard) -> None:
        super().__init__(rows, cols)
        self.shard = shard

    def forward(self, ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        check_range("ids", ids, 0, self.shard.vocab[-1].stop)
        own = self.shard.vocab[self.shard.rank]
        elsewhere = (ids < own.start) | (ids >= own.stop)
        rows = super().forward((ids - own.start).masked_fill_(elsewhere, 0), dtype)
        return self.shard.sum(rows.float().masked_fill_(elsewhere[:, None], 0), None, rows.dtype)


# --------------------------------------------------------------------------------- weights


def cut(weight: Tensor, dim: int, part: range) -> Tensor:
    """Rows (dim 0) or columns of a matrix: a view, but columns of a quantised one are a copy."""
    if not isinstance(weight, QuantizedTensor):
        return weight.narrow(dim, part.start, len(part))
    if dim == 0:
        return weight[part.start : part.stop]
    row_nbytes = block_type(weight.quant_type).row_nbytes
    blocks = weight.blocks[:, row_nbytes(part.start) : row_nbytes(part.stop)].contiguous()
    return QuantizedTensor(blocks, weight.quant_type, (weight.shape[0], len(part)))


class ShardWeights(Weights):
    """One rank's part of the weights; the rest of the files is not read."""

    @classmethod
    def of(cls, weights: Weights, group: ProcessGroup) -> ShardWeights:
        """Raises ValueError if a weight is missing or of another shape, and as Shard does."""
        weights.check(weights.checkpoint.config.weight_shapes())
        return cls(
            weights.checkpoint,
            weights.dtype,
            weights.expand,
            weights.allow_nonfinite,
            Shard(group, weights),
        )

    def _part(self, name: str) -> tuple[int, range] | None:
        assert self.shard is not None
        return self.shard.part(name)

    def load(self, name: str) -> Tensor:
        """This rank's part of a weight, on the CPU: of a dense one stored in ``dtype``, a view."""
        part, info = self._part(name), self.checkpoint.tensors[name]
        if part is None:
            return super().load(name)
        if not info.is_quantized_matrix:
            stored = TORCH_DTYPES[info.type]
            dense = cut(self.checkpoint.load(name, stored), *part)
            if self.checkpoint.copies(name, stored):  # of which the rest need not live on
                dense = dense.clone(memory_format=torch.contiguous_format)
            return convert(dense, self.dtype, info)
        interleaved = self.is_interleaved(name)
        whole = self.checkpoint.load_quantized(name, interleaved=interleaved, allow_nonfinite=True)
        dim, wanted = part
        block = block_type(info.type).elements if dim == 1 else 1
        blocks = range(wanted.start // block * block, -(-wanted.stop // block) * block)
        own = cut(whole, dim, blocks)
        assert isinstance(own, QuantizedTensor)
        if not self.allow_nonfinite:
            check_scales(own.blocks, info, first_row=0 if dim else wanted.start)
        if self.stays_quantized(name):
            return own.clone() if self._is_reordered(name) else own
        dense = own.dequantize(self.dtype)
        if not self.allow_nonfinite:
            low, high = dense.aminmax()
            check_finite(float(low), float(high), self.dtype, info)
        first = wanted.start - blocks.start
        return cut(dense, dim, range(first, first + len(wanted))).contiguous()

    def _is_reordered(self, name: str) -> bool:
        """Whether a quantised matrix comes in another order of rows than the file's, as a copy."""
        return name.endswith(("q_proj.weight", "k_proj.weight")) and not self.is_interleaved(name)

    def _held(self, name: str) -> int:
        """Bytes of this rank's part of a weight."""
        part, info = self._part(name), self.checkpoint.tensors[name]
        size = info.nbytes if self.stays_quantized(name) else info.numel * self.dtype.itemsize
        return size if part is None else size * len(part[1]) // info.shape[part[0]]

    def nbytes(self) -> int:
        return sum(map(self._held, self.checkpoint.config.weight_shapes()))

    def ram_needed(self) -> int:
        total = 0
        for name in self.checkpoint.config.weight_shapes():
            part = self._part(name)
            if self.stays_quantized(name):
                is_copied = self._is_reordered(name) or (part is not None and part[0] == 1)
            else:
                is_copied = self.checkpoint.copies(name, self.dtype)
            total += self._held(name) if is_copied else 0
        return total

    def free_memory(self, device: torch.device) -> int:
        assert self.shard is not None
        return self.shard.free_memory(device)
