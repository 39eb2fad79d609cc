"""What the tests of the linear kernels share: parameters, the exact results, how near is near."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from minitron_kernels import reference
from tests import emulator
from tests import native_abi as abi
from tests.native_emulator import BUILT, DEVICES, dtype_id, run, storage_of
from tests.test_kernels_memory import (
    assert_close,
    assert_padding_untouched,
    poisoned,
    rope_scale,
    rope_struct,
    strided,
    tables,
    values,
)

Tensor = torch.Tensor
EPS = 1e-5


def in_turn(cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Each case on one emulated architecture, these taking turns, and on a GPU if there is one.
    The architecture comes before the case's own arguments."""
    chosen = []
    for i, case in enumerate(cases):
        name = "-".join(str(a).removeprefix("torch.") for a in case)
        arch = BUILT[(i + i // len(BUILT)) % len(BUILT)]  # each meets each of two or four options
        chosen.append(pytest.param(arch, *case, id=f"emu-sm_{arch}-{name}"))
        if "gpu" in DEVICES:
            chosen.append(pytest.param("gpu", *case, id=f"gpu-{name}", marks=pytest.mark.gpu))
    return chosen


# ------------------------------------------------------------------------- linear, linear_swiglu


def linear_params(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
) -> ctypes.Structure:
    params = abi.structs()["mk_linear_params"](
        x=x.data_ptr(), w=w.data_ptr(), out=out.data_ptr(),
        x_stride=x.stride(0), w_stride=w.stride(0), out_stride=out.stride(0),
        m=x.shape[0], n=w.shape[0], k=x.shape[1], eps=EPS, dtype=dtype_id(x),
        out_dtype=dtype_id(out),
    )  # fmt: skip
    if norm_weight is not None:
        params.norm_weight = norm_weight.data_ptr()
    if residual is not None:
        params.residual, params.residual_stride = residual.data_ptr(), residual.stride(0)
    return params


def run_linear(
    op: str,
    arch: str,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    seed: int = 0,
) -> emulator.Counters | None:
    """mk_linear or mk_linear_swiglu of these tensors into `out`."""
    params = linear_params(x, w, out, norm_weight, residual)
    tensors = [x, w, out, *(t for t in (norm_weight, residual) if t is not None and t is not out)]
    return run(op, arch, params, [storage_of(t) for t in tensors], seed)


def normalised(arch: str, x: Tensor, weight: Tensor) -> Tensor:
    """x as mk_rms_norm leaves it."""
    out = poisoned(x)
    params = abi.structs()["mk_rms_norm_params"](
        x=x.data_ptr(), weight=weight.data_ptr(), out=out.data_ptr(), x_stride=x.stride(0),
        out_stride=out.stride(0), rows=x.shape[0], hidden=x.shape[1], eps=EPS, dtype=dtype_id(x),
    )  # fmt: skip
    run("rms_norm", arch, params, [storage_of(t) for t in (x, weight, out)])
    return out


def canonical(arch: str, x: Tensor, w: Tensor) -> Tensor:
    """The sum in the order that the header fixes, as tensor cores round: the products of 8 k (16
    from sm_90 on) and the accumulator are summed exactly, and the sum is truncated to fp32."""
    x, w = x.double(), w.double()
    step = 8 if arch in ("80", "89") else 16
    acc = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    for k in range(0, x.shape[1], step):
        acc += x[:, k : k + step] @ w[:, k : k + step].T
        bits = acc.view(torch.int64)
        bits &= ~((1 << 29) - 1)
    return acc.float()


def magnitude(x: Tensor, w: Tensor) -> Tensor:
    """What the fp32 sum's own error is relative to: 2^-8 of the sum of |x w|. Sums cancel, so an
    error relative to the result alone would have no bound; relative to the whole of the sum, an
    error of many units of the result would pass."""
    return x.double().abs() @ w.double().abs().T / 256


def check_linear(
    op: str,
    arch: str,
    x: Tensor,
    w: Tensor,
    out: Tensor,
    norm_weight: Tensor | None = None,
    residual: Tensor | None = None,
    seed: int = 0,
) -> emulator.Counters | None:
    """Runs the op and compares all of `out` with the exact result, by the tolerance rule."""
    kept = None if residual is None else residual.clone()
    counters = run_linear(op, arch, x, w, out, norm_weight, residual, seed)
    if norm_weight is not None:
        x = normalised(arch, x, norm_weight)
    exact, rounded, scale = x.double() @ w.double().T, x @ w.T, magnitude(x, w)
    if op == "linear_swiglu":
        (gate, up), (g, u) = ((y[:, ::2], y[:, 1::2]) for y in (exact, scale))
        silu = torch.nn.functional.silu(gate)
        exact, scale = silu * up, g * up.abs() + u * silu.abs()
        rounded = torch.nn.functional.silu(rounded[:, ::2]) * rounded[:, 1::2]
    if kept is not None:
        exact, rounded, scale = exact + kept.double(), rounded + kept, scale + kept.double().abs()
    if out.dtype == torch.float32:
        rounded = x.float() @ w.float().T
        scale = scale * 256 * x.shape[1] / 16  # a truncation per 8 k
    assert_close(out, exact, rounded, "out", scale + exact.abs())
    assert_padding_untouched(out, "out")
    return counters


# ------------------------------------------------------------------------------- qkv_rope_append


@dataclass
class Qkv:
    """A projection of `tokens` tokens with its rope and cache; q and the caches are poisoned."""

    x: Tensor
    w: Tensor  # rows in pair order
    heads: tuple[int, int]
    rotary_dim: int
    interleaved: bool
    norm_weight: Tensor | None
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    slots: Tensor
    positions: Tensor
    angles: tuple[Tensor, Tensor]

    @classmethod
    def random(
        cls,
        tokens: int,
        hidden: int,
        heads: tuple[int, int],
        head_dim: int,
        rotary_dim: int,
        *,
        dtype: torch.dtype,
        interleaved: bool = False,
        has_norm: bool = False,
        page_size: int = 16,
        padding: int = 0,
        seed: int = 0,
    ) -> Qkv:
        """Slots in random order over a cache three times as large; one of four is negative, or
        past the end. `padding` elements after each row of x and each page."""
        hq, hk = heads
        generator = torch.Generator().manual_seed(seed)
        num_pages = 3 * tokens // page_size + 1
        slots = torch.randperm(num_pages * page_size, generator=generator)[:tokens]
        slots[3::4] = -1
        slots[1::8] = num_pages * page_size
        cache = torch.empty(num_pages, page_size * hk * head_dim, dtype=dtype)
        k_cache, v_cache = (
            poisoned(cache, padding).unflatten(1, (page_size, hk, head_dim)) for _ in range(2)
        )
        return cls(
            x=strided(values(tokens, hidden, dtype=dtype, seed=seed), padding),
            w=values((hq + 2 * hk) * head_dim, hidden, dtype=dtype, seed=seed + 1),
            heads=heads,
            rotary_dim=rotary_dim,
            interleaved=interleaved,
            norm_weight=values(hidden, dtype=dtype, seed=seed + 2) if has_norm else None,
            q=poisoned(torch.empty(tokens, hq * head_dim, dtype=dtype), padding)
            .unflatten(1, (hq, head_dim)),
            k_cache=k_cache,
            v_cache=v_cache,
            slots=slots,
            positions=torch.randint(0, 60, (tokens,), generator=generator).int(),
            angles=tables(60, rotary_dim, 1e4),
        )  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.q.shape[2]

    def run(self, arch: str, seed: int = 0) -> emulator.Counters | None:
        strides = self.k_cache.stride()
        params = abi.structs()["mk_qkv_rope_append_params"](
            **{
                name: getattr(self, name).data_ptr()
                for name in ("x", "w", "q", "k_cache", "v_cache", "slots")
            },
            norm_weight=None if self.norm_weight is None else self.norm_weight.data_ptr(),
            x_stride=self.x.stride(0), w_stride=self.w.stride(0),
            q_stride=self.q.stride(0), q_head_stride=self.q.stride(1),
            cache_page_stride=strides[0], cache_stride=strides[1], cache_head_stride=strides[2],
            tokens=self.x.shape[0], hidden=self.x.shape[1],
            num_q_heads=self.heads[0], num_kv_heads=self.heads[1], head_dim=self.head_dim,
            num_pages=self.k_cache.shape[0], page_size=self.k_cache.shape[1], eps=EPS,
            slots_dtype=dtype_id(self.slots), dtype=dtype_id(self.x),
            rope=rope_struct(self.positions, self.rotary_dim, self.interleaved, self.angles),
        )  # fmt: skip
        tensors = [self.x, self.w, self.q, self.k_cache, self.v_cache]
        tensors += [] if self.norm_weight is None else [self.norm_weight]
        tensors = [storage_of(t) for t in tensors]
        return run(
            "qkv_rope_append", arch, params,
            [*tensors, self.slots, self.positions, *self.angles], seed,
        )  # fmt: skip

    def features(self) -> Tensor:
        """The feature of each row of a head of Q or K in w."""
        half = self.rotary_dim // 2
        rows = torch.arange(self.head_dim)
        if not self.interleaved:
            rows[0 : 2 * half : 2], rows[1 : 2 * half : 2] = torch.arange(half), torch.arange(half)
            rows[1 : 2 * half : 2] += half
        return rows

    def check(self, arch: str, seed: int = 0) -> emulator.Counters | None:
        """Runs it and compares q and the caches, all of them, with the exact results."""
        counters = self.run(arch, seed)
        x = self.x if self.norm_weight is None else normalised(arch, self.x, self.norm_weight)
        hq, hk = self.heads
        cos, sin = (t[self.positions.long()] for t in self.angles)
        kept = (self.slots >= 0) & (self.slots < self.k_cache.shape[0] * self.k_cache.shape[1])
        untouched = torch.ones(self.k_cache.shape[:2], dtype=torch.bool).flatten()
        untouched[self.slots[kept]] = False

        def heads(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """Q, K and V of the product, Q and K in the order of features."""
            y = y.unflatten(1, (hq + 2 * hk, self.head_dim))
            ordered = torch.empty_like(y)
            ordered[..., self.features()] = y
            return ordered[:, :hq], ordered[:, hq : hq + hk], y[:, hq + hk :]

        exact = heads(x.double() @ self.w.double().T)
        rounded, scale = heads(x @ self.w.T), heads(magnitude(x, self.w))
        for i, name in enumerate(("q", "k_cache", "v_cache")):
            e, r, s = exact[i], rounded[i], scale[i]
            if name != "v_cache":
                s = rope_scale(s, cos, sin, self.interleaved)
                s += rope_scale(e, cos, sin, self.interleaved)
                e = reference.rotate(e, cos, sin, self.interleaved)
                r = reference.rotate(r, cos, sin, self.interleaved).to(r.dtype)
            else:
                s = s + e.abs()
            got = getattr(self, name)
            assert_padding_untouched(got, name)
            if name != "q":
                rows = got.flatten(0, 1)  # a copy where pages are padded
                assert rows[untouched].isnan().all(), f"{name}: another slot was written"
                got, e, r, s = rows[self.slots[kept]], e[kept], r[kept], s[kept]
            assert_close(got, e, r, name, s)
        return counters
