"""The tables that every benchmark prints from the rows of its results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness import results, words
from benchmarks.harness.results import Row
from benchmarks.harness.summary import Ratio, ratio
from benchmarks.harness.terminal import Terminal

Column = Callable[[Row], str]


def medians(
    terminal: Terminal,
    title: str,
    rows: Iterable[Row],
    *,
    first: Mapping[str, Column],
    phases: Sequence[str],
    versus: tuple[str, Callable[[Row], Row | None]],
    last: Mapping[str, Column] | None = None,
) -> None:
    """A line for each row: medians of the phases and the whole step, quartiles, a ratio.

    Args:
        first, last: columns before and after the times, by their headings.
        versus: a name and, for a row, the row whose whole step it is divided by, if there is one.
    """
    name, reference_of = versus
    last = last or {}

    def line(row: Row) -> list[str]:
        whole, reference = results.phase(row), reference_of(row)
        against = reference is not None and reference is not row
        return [
            *(column(row) for column in first.values()),
            *(_median(row, phase) for phase in phases),
            words.duration(whole.median),
            f"{words.duration(whole.lower)} - {words.duration(whole.upper)}",
            words.with_range(ratio(whole, results.phase(reference))) if against else "",
            *(column(row) for column in last.values()),
        ]

    columns = [*first, *phases, "total", "quartiles", f"/ {name} (range)", *last]
    terminal.table(title, columns, map(line, rows))


def _median(row: Row, phase: str) -> str:
    return words.duration(results.phase(row, phase).median) if phase in row["seconds"] else "-"


def targets(terminal: Terminal, found: Iterable[Mapping[str, Any]]) -> None:
    """What this project asks of itself, met or missed; nothing where none was measured."""
    rows = [
        [
            target["what"],
            words.with_range(Ratio(target["value"], target["low"], target["high"])),
            target["wanted"],
            "met" if target["met"] else "missed",
        ]
        for target in found
    ]
    if rows:
        terminal.table("Targets", ["", "median (range)", "wanted", ""], rows)
