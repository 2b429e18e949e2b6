"""Numbers that a call is given, as the operators take them: normalizer, and what scales logits."""

from __future__ import annotations

import math
import operator
from typing import Any, cast

import torch

from ipo_ext import _C
from ipo_ext._numbers import is_number, to_float
from ipo_ext._ops.arguments import LogitScaling

_LARGEST_COUNT = 2**63 - 1  # what an operator can be given


def scalar(
    name: str, value: float | torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    """A number that may change every step, as a tensor."""
    if value is None or isinstance(value, torch.Tensor):
        return value
    if not is_number(value):
        raise TypeError(f"{name}: expected a float or a 0-dim tensor, got {type(value).__name__}")
    number = to_float(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0 or a tensor, got {value!r}")
    dtype = _computed_in(like)
    lowest, highest = _invertible(name, dtype)
    if not lowest <= number <= highest:
        raise ValueError(
            f"{name}: expected a number from {lowest:.3g} to {highest:.3g} in {dtype}, or a "
            f"tensor, got {value!r}"
        )
    if torch.compiler.is_compiling():
        # A number that the graph computes with: as a constant, each new value would recompile.
        return like.new_ones((), dtype=torch.float64) * value
    return torch.scalar_tensor(number, dtype=torch.float64, device="cpu")


def logit_scaling(
    given: LogitScaling,
    softcap: float | None,
    logit_scale: float | None,
    like: torch.Tensor,
) -> LogitScaling:
    """``given``, which has been checked, with softcap and scale as the operators take them: they
    know no scale s and no None for a softcap c.

    ``c * tanh(s * z / c) / T`` is ``c' * tanh(z / c') / T'`` with ``c' = c / s``, ``T' = T / s``.
    """
    cap = 0.0 if softcap is None else _softcap(softcap, like)
    if logit_scale is None:
        return given._replace(softcap=cap)
    scale = _logit_scale(logit_scale, like)
    if softcap is not None:
        cap = cap / scale
        _check_held("softcap / logit_scale", cap, like, softcap, logit_scale)
    unscaled = given.temperature
    unscaled = scalar("temperature", 1.0, like) if unscaled is None else unscaled
    wide = cast(torch.Tensor, unscaled).double()
    lowest, highest = _invertible("temperature", _computed_in(like))
    scaled = (wide / scale).clamp(lowest, highest)  # as the operators would, but never to infinity
    # What is no temperature stays as it was given, for the message that will say so.
    temperature = torch.where((wide > 0) & wide.isfinite(), scaled, wide)
    return given._replace(temperature=temperature, softcap=cap)


def _softcap(softcap: float, like: torch.Tensor) -> float:
    number = _finite_number("softcap", softcap)
    _check_held("softcap", number, like, softcap)
    return number


def _logit_scale(logit_scale: float, like: torch.Tensor) -> float:
    if isinstance(logit_scale, torch.Tensor):
        raise TypeError(
            "logit_scale: expected a float or None, got Tensor; a scale that is learned, or that "
            "differs between tokens, belongs into what is scaled: pass hidden * logit_scale or "
            "logits * logit_scale"
        )
    number = _finite_number("logit_scale", logit_scale)
    lowest, highest = _invertible("temperature", _computed_in(like))
    if not lowest <= number <= highest:
        raise ValueError(
            f"logit_scale: expected a number from {lowest:.3g} to {highest:.3g} or None, "
            f"got {logit_scale!r}"
        )
    return number


def _finite_number(name: str, value: float) -> float:
    if not is_number(value):
        raise TypeError(f"{name}: expected a float or None, got {type(value).__name__}")
    number = to_float(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number > 0 or None, got {value!r}")
    return number


def _check_held(name: str, number: float, like: torch.Tensor, *given: float) -> None:
    """Raises unless the compute dtype holds the number, made of those given, with all its digits.

    The message is made where it is raised: torch.compile (2.13) traces no repr of a number.
    """
    dtype = _computed_in(like)
    lowest, highest = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    if not lowest <= number <= highest:
        raise ValueError(
            f"{name}: expected a number from {lowest:.3g} to {highest:.3g}, which {dtype} holds, "
            f"or None, got {' / '.join(map(repr, given))}"
        )


def _computed_in(like: torch.Tensor) -> torch.dtype:
    is_double = isinstance(like, torch.Tensor) and like.dtype == torch.float64
    return torch.float64 if is_double else torch.float32


def _invertible(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Of a number whose inverse is computed with; what a tensor holds counts as the nearer end."""
    if name == "temperature":
        # torch.compile (2.11) traces no bool as an index.
        highest = _C.HIGHEST_TEMPERATURES[1 if dtype == torch.float64 else 0]
        return 1 / highest, highest
    return 1 / torch.finfo(dtype).max, torch.finfo(torch.float64).max


def count(name: str, value: Any, least: int) -> int | None:
    """A number of something, as an int, or None as it is."""
    if value is None:
        return None
    if not isinstance(value, (int, torch.SymInt)):
        value = _as_int(name, value)
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an int or None, got bool")
    if value < least:
        raise ValueError(f"{name}: expected a number >= {least} or None, got {value!r}")
    if value > _LARGEST_COUNT:
        raise ValueError(
            f"{name}: expected a number below 2**63 or None, got one of {value.bit_length()} bits"
        )
    return cast(int, value)


def _as_int(name: str, value: Any) -> int:
    """Of NumPy's integers and their like; not of a tensor, which would have to be waited for."""
    if isinstance(value, torch.Tensor) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an int or None, got {type(value).__name__}")
    return operator.index(value)
