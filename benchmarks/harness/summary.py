"""Medians, quartiles and ratios of timings."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    """Median and quartiles of a number of timings, in seconds."""

    median: float
    lower: float
    upper: float
    minimum: float
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Median, quartiles (inclusive: of one value, itself), minimum and count."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, lower, upper, min(values), len(values))


class Ratio(NamedTuple):
    """How many times as long `theirs` takes as `ours`: of the medians, and a range for it.

    The range pairs their lower quartile with our upper one, and the reverse: wider than an error
    of the median, so a target that `low` meets is met on a busy machine too.
    """

    value: float
    low: float
    high: float


def ratio(theirs: Summary, ours: Summary) -> Ratio:
    return Ratio(theirs.median / ours.median, theirs.lower / ours.upper, theirs.upper / ours.lower)
