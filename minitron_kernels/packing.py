"""Weights of several matrices in one, in the order in which the fused kernels read them.

Packing moves rows and changes no value, so that unpacking gives the same bits back. The ops take
packed weights on every device; on a GPU they make the fused kernels possible.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class PackedGateUp(NamedTuple):
    """Gate and up projections: row 2i of ``weight`` [2I, H] is gate i, row 2i + 1 is up i."""

    weight: Tensor


class PackedQKV(NamedTuple):
    """Q, K and V projections: ``weight`` [(Hq + 2 Hk) * D, H], all heads of Q, of K, then of V.

    Within a head of Q or K the rows are in *pair order*: rows 2i and 2i + 1 are the features that
    rotary embedding turns as pair i (i < rotary_dim / 2), then come the features that pass. Which
    features make a pair is told by ``interleaved`` (see `ops.Rope`); the rope of a call must agree.
    """

    weight: Tensor
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    interleaved: bool = False


def pack_gate_up(gate: Tensor, up: Tensor) -> PackedGateUp:
    """gate [I, H], up [I, H] -> a new PackedGateUp."""
    if gate.ndim != 2 or gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate {list(gate.shape)} {gate.dtype} and up {list(up.shape)} {up.dtype} must both be "
            "[I, H] of one dtype"
        )
    rows, hidden = gate.shape
    weight = torch.empty((2 * rows, hidden), dtype=gate.dtype, device=gate.device)
    weight[0::2].copy_(gate)
    weight[1::2].copy_(up)
    return PackedGateUp(weight)


def unpack_gate_up(packed: PackedGateUp) -> tuple[Tensor, Tensor]:
    """(gate [I, H], up [I, H]), views of the packed weight: every other row."""
    return packed.weight[0::2], packed.weight[1::2]


def _pairs(features: Tensor, interleaved: bool) -> Tensor:
    """The rotated features of heads [heads, R, H], in their own order, as [heads, R/2, 2, H]."""
    if interleaved:
        return features.unflatten(1, (-1, 2))
    return features.unflatten(1, (2, -1)).transpose(1, 2)


def pack_qkv(
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    head_dim: int,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> PackedQKV:
    """wq [Hq*D, H], wk and wv [Hk*D, H] -> a new PackedQKV. ``rotary_dim`` None: all of D."""
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if not 0 < rotary_dim <= head_dim or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even, 2..head_dim {head_dim}, got {rotary_dim}")
    if wk.shape != wv.shape:
        raise ValueError(f"wk {list(wk.shape)} and wv {list(wv.shape)} differ in shape")
    for name, w in (("wq", wq), ("wk", wk), ("wv", wv)):
        if w.ndim != 2 or w.shape[1] != wq.shape[-1] or w.shape[0] % head_dim or not w.shape[0]:
            raise ValueError(
                f"{name} must be [heads * {head_dim}, {wq.shape[-1]}], got {list(w.shape)}"
            )
        if w.dtype != wq.dtype:
            raise TypeError(f"{name} is {w.dtype} but wq is {wq.dtype}")
    num_q, num_kv = wq.shape[0] // head_dim, wk.shape[0] // head_dim
    weight = torch.empty(
        ((num_q + 2 * num_kv) * head_dim, wq.shape[1]), dtype=wq.dtype, device=wq.device
    )
    packed = PackedQKV(weight, num_q, num_kv, head_dim, rotary_dim, interleaved)
    _copy_rows(packed, (wq, wk, wv), pack=True)
    return packed


def unpack_qkv(packed: PackedQKV) -> tuple[Tensor, Tensor, Tensor]:
    """(wq [Hq*D, H], wk [Hk*D, H], wv [Hk*D, H]): new tensors, but wv is a view."""
    weight, num_q, num_kv, head_dim, *_ = packed
    rows_q, rows_kv = num_q * head_dim, num_kv * head_dim
    wq, wk = (
        torch.empty((rows, weight.shape[1]), dtype=weight.dtype, device=weight.device)
        for rows in (rows_q, rows_kv)
    )
    wv = weight[rows_q + rows_kv :]
    _copy_rows(packed, (wq, wk, wv), pack=False)
    return wq, wk, wv


def _copy_rows(packed: PackedQKV, matrices: tuple[Tensor, Tensor, Tensor], pack: bool) -> None:
    """Between a packed weight and (wq, wk, wv); wv is not copied back, for it is not reordered."""
    weight, num_q, num_kv, head_dim, rotary_dim, interleaved = packed
    heads = weight.unflatten(0, (-1, head_dim)).split((num_q, num_kv, num_kv))
    for ours, matrix in zip(heads, matrices, strict=True):
        theirs = matrix.unflatten(0, (-1, head_dim))
        turned = 0 if matrix is matrices[2] else rotary_dim
        moves = [(ours[:, turned:], theirs[:, turned:])]
        if turned:
            pairs = ours[:, :turned].unflatten(1, (-1, 2))
            moves.append((pairs, _pairs(theirs[:, :turned], interleaved)))
        elif not pack:
            continue
        for packed_rows, rows in moves:
            if pack:
                packed_rows.copy_(rows)
            else:
                rows.copy_(packed_rows)
