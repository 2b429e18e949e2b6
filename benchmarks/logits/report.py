"""What the rows of the loss from logits say: targets and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.harness import results, tables
from benchmarks.harness.results import OURS, Row
from benchmarks.harness.summary import ratio
from benchmarks.harness.terminal import Terminal
from benchmarks.logits.cases import CUDA_TARGET_CASE, TARGET_CASES, Case


def in_order(rows: Sequence[Row]) -> list[Case]:
    """The cases that were timed, by dtype and size."""
    return sorted(results.cases_of(rows, Case), key=lambda case: (case.dtype, case.logits))


def targets(rows: Sequence[Row]) -> list[Row]:
    """What this project asks of itself, met or missed by the ratio of medians."""
    found = []
    for case in TARGET_CASES:
        ours, eager, compiled = (
            results.total(rows, case, name) for name in (OURS, "eager", "compiled")
        )
        if ours and eager and compiled:
            fastest = min(eager, compiled, key=lambda summary: summary.median)
            what = f"faster of eager and torch.compile / ipo_ext, {case}"
            found.append(results.target(what, ratio(fastest, ours), at_least=2))
    ours, copy = (results.total(rows, CUDA_TARGET_CASE, name) for name in (OURS, "copy"))
    if ours and copy:
        what = f"share of copy bandwidth, {CUDA_TARGET_CASE}"
        found.append(results.target(what, ratio(copy, ours), at_least=0.91))
    return found


def print_tables(terminal: Terminal, rows: Sequence[Row], labels: Mapping[str, str]) -> None:
    """A table for each grad_out: every case, every provider."""
    for grad_out in dict.fromkeys(row["grad_out"] for row in rows):
        tables.medians(
            terminal,
            f"Medians, grad_out {grad_out:g}",
            [
                row
                for case in in_order(rows)
                for name in labels
                if (row := results.find(rows, case, name, grad_out=grad_out))
            ],
            first={
                "case": lambda row: str(results.case_of(row, Case)),
                "provider": lambda row: labels[row["provider"]],
            },
            phases=results.PHASES,
            versus=(OURS, lambda row: _ours_beside(rows, row)),
            last={"peak / logits": lambda row: f"{peak(row):.2f}"},
        )


def peak(row: Row) -> float:
    """A step's peak memory in sizes of the logits."""
    return row["peak_bytes"] / results.case_of(row, Case).bytes


def _ours_beside(rows: Sequence[Row], row: Row) -> Row | None:
    return results.find(rows, results.case_of(row, Case), OURS, grad_out=row["grad_out"])
