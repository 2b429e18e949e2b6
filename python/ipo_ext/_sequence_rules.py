"""Rules on whole sequences as users write them: checked, and with the bounds that kernels take."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from ipo_ext._numbers import is_number, to_24_bits, to_float, without_infinities

# In the order of csrc/math/sequence_rules.h.
SequenceStatistic = Literal[
    "sum_k1", "mean_k1", "max_k1", "min_k1",
    "sum_k2", "mean_k2", "max_k2", "min_k2",
    "sum_k3", "mean_k3", "max_k3", "min_k3",
]  # fmt: skip
SequenceRule = tuple[SequenceStatistic, float, float]
STATISTICS: tuple[SequenceStatistic, ...] = get_args(SequenceStatistic)


def checked_rules(rules: Any) -> tuple[SequenceRule, ...]:
    """As tuples of a word and two floats, each statistic once: within all of its rules' bounds."""
    checked: dict[SequenceStatistic, tuple[float, float]] = {}
    if isinstance(rules, (str, Mapping)) or not isinstance(rules, Iterable):
        raise ValueError(f"sequence_rules: expected rules (name, low, high), got {rules!r}")
    for rule in rules:
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 3:
            raise ValueError(f"sequence_rules: expected rules (name, low, high), got {rule!r}")
        name, *bounds = rule
        if name not in STATISTICS:
            raise ValueError(
                f"sequence_rules: expected one of {', '.join(STATISTICS)}, got {name!r}"
            )
        if not all(map(is_number, bounds)):
            raise ValueError(f"sequence_rules: expected numbers for {name}, got {tuple(bounds)!r}")
        low, high = (to_float("sequence_rules", bound) for bound in bounds)
        if not 0 <= low <= high or low == math.inf:
            raise ValueError(
                f"sequence_rules: expected 0 <= low <= high, low finite, for {name}, got "
                f"{(low, high)!r}"
            )
        before = checked.get(name, (low, high))
        low, high = max(low, before[0]), min(high, before[1])
        if not low <= high:
            raise ValueError(
                f"sequence_rules: expected bounds of {name} that overlap, got {rules!r}"
            )
        checked[name] = low, high
    return tuple((name, *bounds) for name, bounds in checked.items())


def statistic_bound(name: SequenceStatistic, bound: float, dtype: torch.dtype) -> float:
    """What the statistic is compared with: of the extremes of k1, in the compute dtype."""
    if not name.endswith("_k1"):
        return without_infinities(bound)
    log = math.log(bound) if bound > 0 else -math.inf
    is_extreme = name.startswith(("max", "min"))
    rounded = to_24_bits(log) if is_extreme and dtype == torch.float32 else log
    return without_infinities(rounded)
