"""Floating point as a GPU does it: fused multiply-add with one rounding, and approximate functions.

Approximate instructions are given correctly rounded (computed in fp64, then rounded to fp32), or perturbed within the
error that the PTX ISA documents for them. The perturbation is a function of the operands' bits and the seed alone, as a
GPU's error is one of its operands: equal inputs give equal bits in every thread.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

U16, U32, U64 = (np.dtype(f"uint{bits}") for bits in (16, 32, 64))
I16, I32, I64 = (np.dtype(f"int{bits}") for bits in (16, 32, 64))
F16, F32, F64 = (np.dtype(f"float{bits}") for bits in (16, 32, 64))

SMALLEST_NORMAL = np.float32(2.0**-126)
_HALF_BITS = np.int64((1 << 29) - 1)  # the bits of an fp64 significand that fp32 has not
_HALF = np.int64(1 << 28)
_SUBNORMAL = np.uint64((1023 - 126) << 53)  # twice the bits of 2^-126

# The PTX ISA's largest errors: relative, and lg2's absolute where the operand lies in (0.5, 2).
ERRORS = {
    "ex2": 2.0**-22,
    "lg2": 2.0**-22,
    "rcp": 2.0**-23,
    "sqrt": 2.0**-23,
    "rsqrt": 2.0**-22.4,
    "div": 2.0**-22,  # 2 units in the last place, which are 2^-23 at most and 2^-24 at least
    "tanh": 2.0**-11,
}
_ROUNDING = 2.0**-24


def flushed(x: Array) -> Array:
    """fp32 with subnormal numbers as zeros of their sign."""
    return x * (np.abs(x) >= SMALLEST_NORMAL)


def bf16_to_f32(x: Array) -> Array:
    return (x.view(U16).astype(U32) << np.uint32(16)).view(F32)


def f32_to_bf16(x: Array) -> Array:
    """To the nearest, ties to even; NaN is 0x7FFF as on a GPU."""
    bits = x.view(U32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(U16)
    nan = x != x
    return np.where(nan, np.uint16(0x7FFF), rounded) if nan.any() else rounded


def to_odd(s: Array, error: Array) -> Array:
    """s + error, error less than half a unit of s, in fp64 rounded to odd: a second rounding to fewer bits is exact."""
    bits = s.view(I64)
    fix = (error != 0) & ((bits & 1) == 0)
    away = (error > 0) == (s > 0)
    step = np.where(away, 1, -1)
    return np.where(fix, bits + step, bits).view(F64)


def f64_to_bf16(x: Array) -> Array:
    """Rounded once: to fp32 by odd, which has bits enough for the second rounding to be the only one."""
    with np.errstate(over="ignore"):
        single = x.astype(F32)
    error = np.where(np.isfinite(single), x - single, 0)
    bits = single.view(I32)
    fix = (error != 0) & ((bits & 1) == 0)
    step = np.where((error > 0) == (single > 0), 1, -1).astype(I32)
    return f32_to_bf16(np.where(fix & (single != 0), bits + step, bits).view(F32))


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b and its rounding error, exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of fp32, rounded once. The product is exact in fp64; the sum is rounded there, and then again."""
    p = a.astype(F64) * b
    c = c.astype(F64)
    s = p + c
    bits = s.view(I64)
    # The second rounding can differ only where the first gave a tie, or where fp32 has fewer bits than 24.
    doubtful = ((bits & _HALF_BITS) == _HALF) | (((bits.view(U64) << np.uint64(1)) - np.uint64(1)) < _SUBNORMAL)
    if doubtful.any():
        s, error = two_sum(p, c)
        s = np.where(doubtful, to_odd(s, error), s)
    return s.astype(F32)


_SPLIT = 2.0**27 + 1
_SAFE = 2.0**900
_BEYOND = 1 + 2.0**-40  # times an error of half a unit: more than that


def _split(a: Array) -> tuple[Array, Array]:
    t = a * _SPLIT
    high = t - (t - a)
    return high, a - high


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of fp64, rounded once.

    The error of the product and that of the sum, added and rounded, and then added to the sum: a result that is right
    unless it lies so near the middle of two neighbours that the errors' rounding may have turned it.
    """
    p = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    low = ah * bh
    low = low - p
    low = low + ah * bl
    low = low + al * bh
    low = low + al * bl
    s = p + c
    t = s - p
    low = low + ((p - (s - t)) + (c - t))
    result = s + low
    rest = low - (result - s)
    # Not where the split overflows either: that gives infinities and NaN, which are equal to no sum with themselves.
    sure = (result + rest * _BEYOND == result) & (np.abs(p) > 1 / _SAFE)
    if not sure.all():
        result = np.where(sure, result, s)  # which is right for NaN and products of zero, as of threads that are off
        those = np.flatnonzero(~sure & (s == s) & (a != 0) & (b != 0))
        if those.size:
            result[those] = _fma64_by_odd(*(x if x.size == 1 else x[those] for x in (a, b, c)))
    return result


def _fma64_by_odd(a: Array, b: Array, c: Array) -> Array:
    """Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums" (2008).

    Where its products would over- or underflow, with rational numbers.
    """
    a, b, c = np.broadcast_arrays(a, b, c)
    p = a * b
    plain = p + c
    (ah, al), (bh, bl) = _split(a), _split(b)
    p_low = ((ah * bh - p) + ah * bl + al * bh) + al * bl
    t, t_low = two_sum(c, p_low)
    v, v_low = two_sum(p, t)
    z, z_low = two_sum(t_low, v_low)
    result = np.asarray(v + to_odd(z, z_low))
    result = np.where(result == 0, plain, result)  # the sign of a zero
    size = np.maximum(np.maximum(np.abs(a), np.abs(b)), np.maximum(np.abs(p), np.abs(c)))
    special = ~(size < np.inf)
    result = np.where(special | (p == 0), plain, result)
    extreme = ~special & ((size > _SAFE) | ((np.abs(p) < 1 / _SAFE) & (a != 0) & (b != 0)))
    for i in np.flatnonzero(extreme):
        result[i] = _exact(float(a[i]), float(b[i]), float(c[i]))
    return result


def _exact(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c
    try:
        return float(exact)
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def maximum(a: Array, b: Array) -> Array:
    """The number where one is NaN; +0 above -0."""
    result = np.fmax(a, b)
    if not result.all():
        result = np.where((a == 0) & (b == 0), a + b, result)
    return result


def minimum(a: Array, b: Array) -> Array:
    result = np.fmin(a, b)
    if not result.all():
        result = np.where((a == 0) & (b == 0), -(-a - b), result)
    return result


class Perturbation:
    """By how much of its documented error an approximate result is off.  seed: a number, or "up" or "down" for the
    whole error in one direction."""

    def __init__(self, seed: int | str) -> None:
        if not isinstance(seed, int) and seed not in ("up", "down"):
            raise ValueError(f'perturb must be a number, "up", "down" or None, got {seed!r}')
        self.seed = seed

    def share(self, *operands: Array) -> Array | float:
        """In [-1, 1], from the operands' bits."""
        if isinstance(self.seed, str):
            return 1.0 if self.seed == "up" else -1.0
        mixed: Any = np.uint64(self.seed * 0x9E3779B97F4A7C15 % 2**64)
        for operand in operands:
            mixed = (operand.view(U32).astype(U64) ^ mixed) * np.uint64(0xD6E8FEB86659FD93)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
        return (mixed >> np.uint64(11)).astype(F64) * 2.0**-52 - 1


def approximate(
    name: str, function: Callable[..., Array], perturbation: Perturbation | None, *operands: Array
) -> Array:
    """An approximate fp32 instruction.  function: of fp64 arrays."""
    exact = function(*(x.astype(F64) for x in operands))
    if perturbation is not None:
        share = perturbation.share(*operands) * (ERRORS[name] - _ROUNDING)
        if name == "lg2":
            x = operands[0]
            error = np.where((x > 0.5) & (x < 2), share, exact * share)
        else:
            error = exact * share
        exact = np.where(np.isfinite(exact), exact + error, exact)
    return exact.astype(F32)
