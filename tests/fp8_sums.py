"""What tensor cores add of fp8 products, in numpy; after "MMA-Sim", arXiv:2511.10909.

Written apart from the emulator's (emulator/fp8_sums.h), with other means: significands and
exponents of `frexp`, whole matrices at once.
"""

from __future__ import annotations

import numpy as np

FRACTION_BITS = 13
SMALLEST_EXPONENT = {"e4m3": -6, "e5m2": -14, "f16": -14, "f32": -126}


def significand_and_exponent(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """x = significand * 2^exponent, 1 <= |significand| < 2 but for subnormals and zeros."""
    exponent = np.maximum(np.frexp(x.astype(np.float64))[1] - 1, SMALLEST_EXPONENT[name])
    return np.where(x == 0, 0.0, np.ldexp(x, -exponent)), np.where(x == 0, -126, exponent)


def narrow_sum(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, a_name: str, b_name: str, acc: str
) -> np.ndarray:
    """c[m, n] + a[m, k] b[k, n], all float64, added at once as sm_89 and wgmma of sm_90 do."""
    with np.errstate(invalid="ignore"):
        plain = a @ b + c
    sa, ea = significand_and_exponent(np.nan_to_num(a), a_name)
    sb, eb = significand_and_exponent(np.nan_to_num(b), b_name)
    sc, ec = significand_and_exponent(np.nan_to_num(c), acc)
    significands = np.concatenate([sa[:, :, None] * sb[None], sc[:, None, :]], axis=1)
    exponents = np.concatenate([ea[:, :, None] + eb[None], ec[:, None, :]], axis=1)
    largest = exponents.max(axis=1)
    units = np.trunc(np.ldexp(significands, FRACTION_BITS + exponents - largest[:, None, :]))
    total = np.ldexp(units.sum(axis=1), largest - FRACTION_BITS)
    if acc == "f16":
        with np.errstate(over="ignore"):
            rounded = total.astype(np.float16).astype(np.float64)
    else:
        significand, exponent = significand_and_exponent(total, "f32")
        kept = np.trunc(np.ldexp(significand, FRACTION_BITS))
        rounded = np.ldexp(kept, exponent - FRACTION_BITS)
        rounded = np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, rounded), rounded)
    return np.where(np.isfinite(plain), rounded, plain)


def fp8_mma_sync(
    a: np.ndarray, b: np.ndarray, c: np.ndarray, a_name: str, b_name: str, acc: str, capability: int
) -> np.ndarray:
    """mma.sync m16n8k16 or k32.

    sm_89 adds 16 products at once. Later ones have no such MMA: ptxas converts to f16, multiplies
    twice (k % 4 < 2, then the rest) from zero on, and adds c.
    """
    if capability < 90:
        for start in range(0, a.shape[1], 16):
            ks = slice(start, start + 16)
            c = narrow_sum(a[:, ks], b[ks], c, a_name, b_name, acc)
        return c
    total = np.zeros_like(c)
    for low in (True, False):
        ks = (np.arange(a.shape[1]) % 4 < 2) == low
        with np.errstate(invalid="ignore", over="ignore"):
            total = total + a[:, ks] @ b[ks]
            total = total.astype(np.float16).astype(np.float64) if acc == "f16" else cut(total)
    with np.errstate(over="ignore"):
        return (c + total).astype(np.float16 if acc == "f16" else np.float32).astype(np.float64)


def cut(x: np.ndarray) -> np.ndarray:
    """float64 to the values of float32, towards zero."""
    with np.errstate(over="ignore"):
        y = x.astype(np.float32)
    beyond = np.abs(y.astype(np.float64)) > np.abs(x)
    return np.where(beyond, np.nextafter(y, np.float32(0)), y).astype(np.float64)


def hard_values(
    rng: np.random.Generator, shape: tuple[int, ...], values: np.ndarray, special: bool
) -> np.ndarray:
    """Of a sorted list of finite values: most drawn near 1, some from all, zeros; or NaN too."""
    near = np.searchsorted(values, rng.standard_normal(shape))
    x = values[np.minimum(near, values.size - 1)]
    x = np.where(rng.random(shape) < 0.2, values[rng.integers(0, values.size, shape)], x)
    x = np.where(rng.random(shape) < 0.1, 0.0, x)
    return np.where(rng.random(shape) < 0.004, np.nan, x) if special else x
