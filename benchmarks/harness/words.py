"""Durations, ratios and errors in a few characters."""

from __future__ import annotations

from benchmarks.harness.summary import Ratio


def duration(seconds: float) -> str:
    """Three significant digits with a unit: 0.000236 is "236 us"."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= factor * 0.9995:
            return f"{_three_digits(seconds / factor)} {unit}"
    return f"{_three_digits(seconds / 1e-9)} ns"


def times(value: float) -> str:
    """How many times as long: "61.2x"."""
    return f"{_three_digits(value)}x"


def with_range(ratio: Ratio) -> str:
    """A ratio and its range: "2.5 (2.38 - 2.61)"."""
    return f"{ratio.value:.3g} ({ratio.low:.3g} - {ratio.high:.3g})"


def first_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
