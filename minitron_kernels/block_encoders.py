"""Float weights to GGUF's blocks: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K.

The formats are drawn at the decoders (quantized.py). The simple types have one right answer, which
is that of ggml's reference (round to the scale that the largest weight asks for). The K types leave
the scales to the encoder; here they are searched for, as ggml does, but not by ggml's steps:

    every group of 32 (16) weights x   q = round((x - min) * nmax' / range),  nmax' around nmax;
                                       s, m = weighted least squares of x on q; keep the best
    again from the best                q = round((x - m) / s);  s, m = as above
    256 weights                        scales and minima rounded to 6 (8) bits of the largest;
                                       q from the rounded ones

Weights of the squares are ggml's: |x| + rms for Q4_K and Q5_K, x^2 for Q6_K: large weights matter
more to the output than their share of the error says.

Arrays are transposed so that a group is a *column*: [32, groups, blocks]. A sum over a group then
is an addition of long rows, which NumPy vectorises, and a scale per group broadcasts along them;
with groups as rows every inner loop would have 32 iterations, and take ten times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from minitron_kernels.block_types import QUANT_TYPES

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

# Weights encoded at a time: the half dozen temporaries stay in the L2 cache.
_CHUNK_ELEMENTS = 1 << 16


def encode(rows: Floats, quant_type: str) -> Bytes:
    """Rows of finite fp32 weights [N, K] as stored rows, uint8 [N, row bytes].

    Values beyond the range of half precision come out with infinite scales. Raises ValueError for a
    type that has no encoder, and for a K that is not a whole number of blocks.
    """
    encoder = ENCODERS.get(quant_type)
    if encoder is None:
        raise ValueError(f"type: got {quant_type!r:.80}, accepted: {', '.join(ENCODERS)}")
    block = QUANT_TYPES[quant_type]
    row_nbytes = block.row_nbytes(rows.shape[1])
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, block.elements)
    out = np.empty((len(blocks), block.nbytes), np.uint8)
    step = _CHUNK_ELEMENTS // block.elements
    # A group of equal weights has no range, a scale may overflow half precision.
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        for start in range(0, len(blocks), step):
            encoder(blocks[start : start + step], out[start : start + step])
    return out.reshape(len(rows), row_nbytes)


def _put_half(out: Bytes, offset: int, values: Floats) -> None:
    out[:, offset : offset + 2] = values.astype("<f2")[:, None].view(np.uint8)


def _reciprocal(scale: Floats) -> Floats:
    """1 / scale, and 0 where that is infinite: such a scale is 0 in half precision."""
    inverse: Floats = np.reciprocal(scale)
    inverse[np.isinf(inverse)] = 0
    return inverse


# ---- blocks of 32 with one scale ----


def _largest(x: Floats) -> Floats:
    """Of every column, the element of the largest magnitude; of equal ones the first."""
    high, low = x.max(0), x.min(0)
    largest: Floats = np.maximum(high, -low)
    np.copyto(largest, low, where=high < -low)
    tied = np.flatnonzero(high == -low)
    columns = x[:, tied]
    largest[tied] = columns[np.abs(columns).argmax(0), np.arange(len(tied))]
    return largest


def _put_fours(out: Bytes, offset: int, q: Bytes) -> None:
    """4-bit numbers [32, n]: byte j holds j and, in its high bits, j + 16."""
    out[:, offset : offset + 16] = (q[:16] & 15 | q[16:] << 4).T


def _shifted(q: Bytes) -> Bytes:
    """The fifth bits."""
    fifth: Bytes = q >> np.uint8(4)
    return fifth


def _pack_bits(bits: Bytes) -> Bytes:
    """Zeros and ones [..., 8, n] to bytes [..., n], lowest first (np.packbits: 8 times slower)."""
    packed: Bytes = np.bitwise_or.reduce(bits << np.arange(8, dtype=np.uint8)[:, None], axis=-2)
    return packed


def _put_fives(out: Bytes, offset: int, q: Bytes) -> None:
    """5-bit numbers [32, n]: a word of the fifth bits, then the other four as 4-bit numbers."""
    out[:, offset : offset + 4] = _pack_bits(_shifted(q).reshape(4, 8, -1)).T
    _put_fours(out, offset + 4, q)


def _symmetric(blocks: Floats, half: int) -> tuple[Floats, Bytes]:
    """w = d (q - half): the largest weight gets q = 0, so that d takes its sign, negated."""
    x = blocks.T.copy()
    d = _largest(x) / np.float32(-half)
    x *= _reciprocal(d)
    x += np.float32(half + 0.5)
    return d, np.minimum(x, np.float32(2 * half - 1), out=x).astype(np.uint8)


def _affine(blocks: Floats, nmax: int) -> tuple[Floats, Floats, Bytes]:
    """w = d q + m with q in 0..nmax."""
    x = blocks.T.copy()
    low = x.min(0)
    d = (x.max(0) - low) / np.float32(nmax)
    x -= low
    x *= _reciprocal(d)
    x += np.float32(0.5)
    return d, low, np.minimum(x, np.float32(nmax), out=x).astype(np.uint8)


def _q4_0(blocks: Floats, out: Bytes) -> None:
    d, q = _symmetric(blocks, 8)
    _put_half(out, 0, d)
    _put_fours(out, 2, q)


def _q5_0(blocks: Floats, out: Bytes) -> None:
    d, q = _symmetric(blocks, 16)
    _put_half(out, 0, d)
    _put_fives(out, 2, q)


def _q4_1(blocks: Floats, out: Bytes) -> None:
    d, low, q = _affine(blocks, 15)
    _put_half(out, 0, d)
    _put_half(out, 2, low)
    _put_fours(out, 4, q)


def _q5_1(blocks: Floats, out: Bytes) -> None:
    d, low, q = _affine(blocks, 31)
    _put_half(out, 0, d)
    _put_half(out, 2, low)
    _put_fives(out, 4, q)


def _q8_0(blocks: Floats, out: Bytes) -> None:
    x = blocks.T.copy()
    d = np.maximum(x.max(0), -x.min(0)) / np.float32(127)
    x *= _reciprocal(d)
    whole = np.trunc(x)
    x -= whole  # rounds half away from zero, as C's roundf
    x *= 2
    whole += np.trunc(x, out=x)
    _put_half(out, 0, d)
    out[:, 2:] = whole.astype(np.int8).view(np.uint8).T


# ---- blocks of 256 in groups with scales of their own ----

# nmax' - nmax of the first search, and how often its best is taken up again. ggml takes 21 (Q4_K),
# 16 (Q5_K) and 19 (Q6_K) steps and none again: twice the work for the same error to 0.5 %.
# Tried and left out: taking Q6_K's rounded scales +-1 and +-2 as well, where better, takes twice
# the time for 0.3 % less error (1 to 6 % of the weighted one, the most where there are outliers).
_AFFINE_STEPS, _AFFINE_AGAIN = np.linspace(-1.0, 0.6, 7, dtype=np.float32), 3
_SYMMETRIC_STEPS, _SYMMETRIC_AGAIN = np.linspace(-0.9, 0.9, 7, dtype=np.float32), 1


def _columns(blocks: Floats, group: int) -> Floats:
    """[n, 256] -> [group, 256 / group, n]."""
    n = len(blocks)
    return blocks.reshape(n, -1, group).transpose(2, 1, 0).copy()


def _dot(a: Floats, b: Floats) -> Floats:
    """Sum of a * b over the group, in one pass and with no temporary."""
    result: Floats = np.einsum("gsn,gsn->sn", a, b)
    return result


class _AffineFit:
    """x ~ scale * q + low, low <= 0, of every group, with the least weighted error so far."""

    def __init__(self, x: Floats, weights: Floats, nmax: int) -> None:
        self.x, self.weights, self.nmax = x, weights, np.float32(nmax)
        self.q, self.wq = np.empty_like(x), np.empty_like(x)
        self.sum_w = weights.sum(0)
        self.sum_x = _dot(weights, x)
        self.low = np.minimum(x.min(0), 0)
        self.scale = (x.max(0) - self.low) / self.nmax
        self.gain = np.full_like(self.scale, -np.inf)

    def try_grid(self, inverse: Floats, low: Floats) -> None:
        """Fit to q = round((x - low) * inverse), and keep the groups where that is better."""
        q, wq = self.q, self.wq
        np.subtract(self.x, low, out=q)
        q *= inverse
        np.rint(q, out=q)
        np.clip(q, 0, self.nmax, out=q)
        np.multiply(q, self.weights, out=wq)
        sum_q, sum_qq, sum_xq = wq.sum(0), _dot(wq, q), _dot(wq, self.x)
        det = self.sum_w * sum_qq - sum_q * sum_q
        scale = (self.sum_w * sum_xq - self.sum_x * sum_q) / det
        low = (sum_qq * self.sum_x - sum_q * sum_xq) / det
        if (positive := low > 0).any():  # no block can express it: the best one through 0
            np.copyto(scale, sum_xq / sum_qq, where=positive)
            np.copyto(low, 0, where=positive)
        # The error is sum w x^2 - gain; for least squares (with either of the two free or both):
        gain = scale * sum_xq + low * self.sum_x
        better = (gain > self.gain) & (det > 0)
        np.copyto(self.scale, scale, where=better)
        np.copyto(self.low, low, where=better)
        np.copyto(self.gain, gain, where=better)


def _fit_affine(x: Floats, nmax: int) -> tuple[Floats, Floats]:
    """Scales and minima (positive: what is subtracted) of the groups [32, 8, n]: [8, n] each."""
    rms = np.sqrt(_dot(x, x) / np.float32(len(x)))
    weights = np.abs(x)
    weights += rms
    fit = _AffineFit(x, weights, nmax)
    low, inverse = fit.low.copy(), _reciprocal(fit.scale) / np.float32(nmax)
    for step in _AFFINE_STEPS:
        fit.try_grid(inverse * (nmax + step), low)
    for _ in range(_AFFINE_AGAIN):
        fit.try_grid(_reciprocal(fit.scale), fit.low)
    return fit.scale, -fit.low


def _round_scales(scales: Floats) -> tuple[Floats, Floats]:
    """Scales [8, n] as 6-bit multiples of d [n], d being exact in half precision."""
    largest = scales.max(0)
    d = (largest / np.float32(63)).astype(np.float16).astype(np.float32)
    return d, np.minimum(np.rint(scales * (63 * _reciprocal(largest))), np.float32(63))


def _k_affine(blocks: Floats, out: Bytes, nmax: int) -> Bytes:
    """The first 16 bytes of a Q4_K or Q5_K block; returns the numbers q [32, 8, n]."""
    x = _columns(blocks, 32)
    scales, lows = _fit_affine(x, nmax)
    d, scale = _round_scales(scales)
    dmin, low = _round_scales(lows)
    x += dmin * low
    x *= _reciprocal(d * scale)
    np.rint(x, out=x)
    np.clip(x, 0, np.float32(nmax), out=x)
    _put_half(out, 0, d)
    _put_half(out, 2, dmin)
    s, m = scale.astype(np.uint8), low.astype(np.uint8)
    out[:, 4:8] = (s[:4] | s[4:] >> 4 << 6).T
    out[:, 8:12] = (m[:4] | m[4:] >> 4 << 6).T
    out[:, 12:16] = (s[4:] & 15 | m[4:] << 4).T
    return x.astype(np.uint8)


def _put_k_fours(out: Bytes, offset: int, q: Bytes) -> None:
    """4-bit numbers [32, 8, n]: byte j of 32 holds group 2 i and, in its high bits, 2 i + 1."""
    packed = q[:, ::2] & 15 | q[:, 1::2] << 4
    out[:, offset : offset + 128] = packed.transpose(2, 1, 0).reshape(-1, 128)


def _q4_k(blocks: Floats, out: Bytes) -> None:
    _put_k_fours(out, 16, _k_affine(blocks, out, 15))


def _q5_k(blocks: Floats, out: Bytes) -> None:
    q = _k_affine(blocks, out, 31)
    _put_k_fours(out, 48, q)
    out[:, 16:48] = _pack_bits(_shifted(q)).T


def _fit_symmetric(x: Floats, half: int) -> Floats:
    """Scales [16, n] of the groups [16, 16, n]: x ~ scale * q, q in -half..half - 1."""
    weights = x * x
    wx, q, wq = weights * x, np.empty_like(x), np.empty_like(x)
    largest = _largest(x.reshape(len(x), -1)).reshape(x.shape[1:])
    scale = largest / np.float32(-half)
    best = np.full_like(scale, -np.inf)

    def try_grid(inverse: Floats) -> None:
        np.multiply(x, inverse, out=q)
        np.rint(q, out=q)
        np.clip(q, -half, half - 1, out=q)
        np.multiply(q, weights, out=wq)
        sum_xq, sum_qq = _dot(wx, q), _dot(wq, q)
        fitted = sum_xq / sum_qq
        gain = fitted * sum_xq  # the error is sum w x^2 - gain
        better = gain > best
        np.copyto(scale, fitted, where=better)
        np.copyto(best, gain, where=better)

    inverse = _reciprocal(largest)
    for step in _SYMMETRIC_STEPS:
        try_grid(inverse * (-half - step))
    for _ in range(_SYMMETRIC_AGAIN):
        try_grid(_reciprocal(scale))
    return scale


def _q6_k(blocks: Floats, out: Bytes) -> None:
    x = _columns(blocks, 16)
    scales = _fit_symmetric(x, 32)
    # The largest scale becomes -128, so that d takes its sign, negated.
    d = (_largest(scales) / np.float32(-128)).astype(np.float16).astype(np.float32)
    scale = np.clip(np.rint(scales * _reciprocal(d)), -128, 127)
    x *= _reciprocal(d * scale)
    np.rint(x, out=x)
    np.clip(x, -32, 31, out=x)
    x += 32
    q = x.astype(np.uint8).transpose(2, 1, 0).reshape(-1, 2, 4, 32)  # halves, quarters of them
    low = q[:, :, :2] & 15 | q[:, :, 2:] << 4
    high = q >> 4
    out[:, :128] = low.reshape(-1, 128)
    out[:, 128:192] = (
        high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    ).reshape(-1, 64)
    out[:, 192:208] = scale.astype(np.int8).view(np.uint8).T
    _put_half(out, 208, d)


ENCODERS: dict[str, Callable[[Floats, Bytes], Any]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
