"""The one model of what a benchmark compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.correctness import Expected
from benchmarks.harness.step import Bind


@dataclass(frozen=True)
class Provider:
    """One way to do the work that a benchmark compares.

    Attributes:
        label: its name in tables.
        note: what it computes, for the results file.
        make: imports or compiles what it needs and raises where that cannot run.
        expected: what its loss and gradients must be on a batch; None for a floor, which only
            moves the bytes, or multiplies the matrices, that the work cannot do without.
        needs_gpu: whether it is left out on the CPU.
        always: timed whether it is selected or not.
    """

    label: str
    note: str
    make: Callable[[], Bind]
    expected: Callable[[Any], Expected] | None = None
    needs_gpu: bool = False
    always: bool = False
