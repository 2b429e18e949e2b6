"""Real numbers as settings, and logarithms of bounds as the kernels compare with them."""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import Any

import torch

# -max, and the largest number whose exp is finite. (The float32 nearest to log(max) overflows.)
LOG_RANGE = {
    torch.float32: (-torch.finfo(torch.float32).max, 88.72283172607422),
    torch.float64: (-torch.finfo(torch.float64).max, 709.782712893384),
}


def is_number(value: object) -> bool:
    """Whether a setting is a real number, NumPy's included; True and False are slips."""
    # Real last: it is slow to ask, and nothing that torch.compile traces comes so far.
    return isinstance(value, (float, int, Real)) and not isinstance(value, bool)


def to_float(name: str, value: Any) -> float:
    """The number as a float; of an int beyond all floats a sentence instead of an OverflowError."""
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name}: expected a number that float64 holds, got one beyond 1.8e308"
        ) from None


MOST = sys.float_info.max


def without_infinities(bound: float) -> float:
    """As the operators take a bound that may be infinite: the largest number stands for infinity.

    AOTInductor (torch 2.14) writes an operator's numbers as JSON, which has no infinity.
    """
    # No min(): torch.compile (2.11) would make constants of bounds that change.
    bound = bound if bound < MOST else MOST
    return bound if bound > -MOST else -MOST


def log_bound(ratio: float, dtype: torch.dtype) -> float:
    """A bound on ``log r``, exactly representable in ``dtype`` (float32 or float64).

    The logarithm is taken in fp64, rounded once to nearest and clamped so that no bound is
    infinite and ``exp`` of none overflows (docs/math.md, "The band").
    """
    return _round_to(math.log(ratio) if ratio > 0 else -math.inf, dtype)


def _round_to(value: float, dtype: torch.dtype) -> float:
    smallest, largest = LOG_RANGE[dtype]
    value = min(max(value, smallest), largest)
    return value if dtype == torch.float64 else to_24_bits(value)


def to_24_bits(value: float) -> float:
    """The nearest float32, ties to even, by plain arithmetic, which torch.compile can trace."""
    if value in (math.inf, -math.inf):
        return value
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)
