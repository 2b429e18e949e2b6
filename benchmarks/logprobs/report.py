"""What the rows of the loss from log-probabilities say: targets and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.harness import results, tables, words
from benchmarks.harness.results import OURS, Row
from benchmarks.harness.summary import Ratio, ratio
from benchmarks.harness.terminal import Terminal
from benchmarks.logprobs.cases import CUDA_LARGE_CASE, CUDA_TARGET_CASE, TARGET_CASE, Case

PHASES = (*results.PHASES, "read")


# ---- Targets ----


def targets(rows: Sequence[Row]) -> list[Row]:
    """The project's own targets for the device, met or missed by the ratio of medians."""
    on_cpu = any(row["clock"] == "wall" for row in rows)
    return _cpu_targets(rows) if on_cpu else _cuda_targets(rows)


def _cpu_targets(rows: Sequence[Row]) -> list[Row]:
    found = []
    ours, loop, eager, compiled = (
        results.total(rows, TARGET_CASE, name)
        for name in (OURS, "upstream_loop", "packed_eager", "packed_compiled")
    )
    if ours and loop:
        what = f"upstream's loop / ipo_ext, {TARGET_CASE}"
        found.append(results.target(what, ratio(loop, ours), at_least=50))
    if ours and eager and compiled:
        fastest = min(eager, compiled, key=lambda summary: summary.median)
        what = f"faster of eager and torch.compile / ipo_ext, {TARGET_CASE}"
        found.append(results.target(what, ratio(fastest, ours), at_least=2))
    return found


def _cuda_targets(rows: Sequence[Row]) -> list[Row]:
    found = []
    forward = results.total(rows, CUDA_LARGE_CASE, OURS, clocks=["graph/forward"])
    copy = results.total(rows, CUDA_LARGE_CASE, "copy", clocks=["graph"])
    if forward and copy:
        what = f"share of copy bandwidth, loss + gradient + metrics, {CUDA_LARGE_CASE}"
        found.append(results.target(what, ratio(copy, forward), at_least=0.9))
    forward = results.total(rows, CUDA_TARGET_CASE, OURS, clocks=["graph/forward"])
    if forward:
        what = f"microseconds under graph replay, loss + gradient + metrics, {CUDA_TARGET_CASE}"
        microseconds = Ratio(*(value * 1e6 for value in forward[:3]))
        found.append(results.target(what, microseconds, at_most=5))
    return found


# ---- Tables ----


def print_tables(terminal: Terminal, rows: Sequence[Row], labels: Mapping[str, str]) -> None:
    """All sizes side by side, then the phases at the targets' sizes, or else at the largest."""
    _print_overview(terminal, rows, labels)
    cases = results.cases_of(rows, Case)
    detailed = [case for case in (TARGET_CASE, CUDA_TARGET_CASE) if case in cases] or cases[-1:]
    for case in detailed:
        tables.medians(
            terminal,
            f"{case}: medians",
            [row for row in rows if results.case_of(row, Case) == case],
            first={
                "": lambda row: labels[row["provider"]],
                "clock": lambda row: row["clock"],
                "grad_out": lambda row: f"{row['grad_out']:g}",
            },
            phases=PHASES,
            versus=(OURS, lambda row: _ours_beside(rows, row)),
        )


def _ours_beside(rows: Sequence[Row], row: Row) -> Row | None:
    case, clocks = results.case_of(row, Case), [row["clock"]]
    return results.find(rows, case, OURS, grad_out=row["grad_out"], clocks=clocks)


def _print_overview(terminal: Terminal, rows: Sequence[Row], labels: Mapping[str, str]) -> None:
    names = [name for name in labels if any(row["provider"] == name for row in rows)]

    def cell(case: Case, name: str) -> str:
        summary, ours = (results.total(rows, case, each) for each in (name, OURS))
        if summary is None:
            return "-"
        text = words.duration(summary.median)
        if ours and name not in (OURS, "copy"):
            text += f" {words.times(summary.median / ours.median):>6}"
        return text

    lines = [
        [f"{case.tokens:,}", f"{case.sequences:,}", *(cell(case, name) for name in names)]
        for case in results.cases_of(rows, Case)
    ]
    columns = ["tokens", "sequences", *(labels[name] for name in names)]
    title = "Forward + backward + every metric read: median, and times as long as ipo_ext"
    terminal.table(title, columns, lines)
