"""The loss's settings: validated once, so that no operator has to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch


@dataclasses.dataclass(frozen=True)
class IPOConfig:
    """Settings of the IPO+KL loss, under the field names of prime-rl's ``trainer.loss`` section.

    A token is kept where ``dppo_mask_low <= r <= dppo_mask_high``, decided on ``log r``, both ends
    inclusive; a kept token pays ``-A' * r + kl_tau * log(r)**2`` with
    ``A' = adv_tau * A + teacher_tau * (teacher_logprob - trainer_logprob)``
    (PrimeIntellect-ai/prime-rl pull request 2423; docs/math.md).

    Args:
        dppo_mask_low: alpha, the smallest importance ratio kept; 0 keeps every small ratio.
        dppo_mask_high: beta, the largest importance ratio kept; ``inf`` keeps every finite ratio.
        adv_tau: weight of the advantage.
        kl_tau: weight of the squared log-ratio.
        teacher_tau: weight of the teacher's log-ratio in the advantage; above 0 it needs
            ``teacher_logprobs``.

    Raises:
        ValueError: a field breaks ``0 <= dppo_mask_low <= dppo_mask_high`` or "finite and >= 0".
    """

    dppo_mask_low: float = 0.2
    dppo_mask_high: float = 5.0
    adv_tau: float = 1.0
    kl_tau: float = 1e-3
    teacher_tau: float = 0.0

    _log_bounds: ClassVar[dict[torch.dtype, tuple[float, float]]]  # of an instance; no field

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{field.name}: expected a number, got {value!r}")
            object.__setattr__(self, field.name, float(value))
        for name in ("adv_tau", "kl_tau", "teacher_tau"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        low, high = self.dppo_mask_low, self.dppo_mask_high
        if not 0 <= low < math.inf:
            raise ValueError(f"dppo_mask_low: expected a finite number >= 0, got {low!r}")
        if not low <= high:
            raise ValueError(
                f"dppo_mask_high: expected a number >= dppo_mask_low ({low!r}), got {high!r}"
            )

        log_low, log_high = (math.log(ratio) if ratio > 0 else -math.inf for ratio in (low, high))
        log_bounds = {
            dtype: (_round_to(log_low, dtype), _round_to(log_high, dtype)) for dtype in _LOG_RANGE
        }
        object.__setattr__(self, "_log_bounds", log_bounds)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> IPOConfig:
        """The config of a ``trainer.loss`` section; an unknown field is a ValueError."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in mapping.items():
            if name not in known:
                raise ValueError(
                    f"{name}: expected one of the fields {', '.join(known)}, got {name}={value!r}"
                )
        return cls(**mapping)

    def log_bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """The band's bounds on ``log r``, exactly representable in ``dtype`` (float32 or float64).

        The logarithm is taken in fp64, rounded once to nearest and clamped so that no bound is
        infinite and ``exp`` of none overflows (docs/math.md, "The band").
        """
        return self._log_bounds[dtype]


# -max, and the largest number whose exp is finite. (The float32 nearest to log(max) overflows.)
_LOG_RANGE = {
    torch.float32: (-torch.finfo(torch.float32).max, 88.72283172607422),
    torch.float64: (-torch.finfo(torch.float64).max, 709.782712893384),
}


def _round_to(value: float, dtype: torch.dtype) -> float:
    smallest, largest = _LOG_RANGE[dtype]
    value = min(max(value, smallest), largest)
    if dtype == torch.float64:
        return value
    # To 24 bits, ties to even; plain arithmetic, which torch.compile can trace.
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)
