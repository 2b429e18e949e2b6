"""What the rows of the loss from hidden states say: targets and tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.harness import results, tables
from benchmarks.harness.results import OURS, Row
from benchmarks.harness.summary import Ratio, ratio
from benchmarks.harness.terminal import Terminal
from benchmarks.hidden.cases import TARGET_TOKENS, Case

# ---- Targets ----

CPU_TARGETS = {100: 1.05, 50: 0.6}  # percent active -> share of eager's time on all rows
CPU_MEMORY_TARGET = 0.1  # of eager's extra memory
CUDA_TARGETS = {100: 1.08, 75: 1.08, 50: 1.08, 25: 1.08}  # -> times the three products, those rows


def targets(rows: Sequence[Row], device: str, labels: Mapping[str, str]) -> list[Row]:
    """This project's own targets for the device, met or missed by ratios of medians."""
    found = []
    for active, wanted in (CPU_TARGETS if device == "cpu" else CUDA_TARGETS).items():
        case = Case(TARGET_TOKENS[device], active)
        against, their_case = ("eager", case._replace(active=100))
        if device == "cuda":
            against, their_case = "products", case
        ours, theirs = results.find(rows, case, OURS), results.find(rows, their_case, against)
        if ours is None or theirs is None:
            continue
        what, times = (
            f"{labels[against]}, {case}",
            ratio(results.phase(ours), results.phase(theirs)),
        )
        found.append(results.target(f"time / {what}", times, at_most=wanted))
        if device == "cpu" and "extra_bytes" in ours and "extra_bytes" in theirs:
            extra = _bytes_ratio(ours["extra_bytes"], theirs["extra_bytes"])
            found.append(results.target(f"extra memory / {what}", extra, at_most=CPU_MEMORY_TARGET))
    return found


def _bytes_ratio(ours: Sequence[int], theirs: Sequence[int]) -> Ratio:
    value = statistics.median(ours) / statistics.median(theirs)
    return Ratio(value, min(ours) / max(theirs), max(ours) / min(theirs))


# ---- Tables ----


def print_tables(terminal: Terminal, rows: Sequence[Row], labels: Mapping[str, str]) -> None:
    """Every size and provider, beside eager with all tokens active."""
    tables.medians(
        terminal,
        "Medians; memory beyond inputs and gradients",
        rows,
        first={
            "": lambda row: labels[row["provider"]],
            "tokens": lambda row: f"{row['tokens']:,}",
            "active": lambda row: f"{row['active']}%",
        },
        phases=results.PHASES,
        versus=("eager", lambda row: results.find(rows, Case(row["tokens"], 100), "eager")),
        last={"extra MB": lambda row: _megabytes(row.get("extra_bytes"))},
    )


def _megabytes(values: list[int] | None) -> str:
    if values is None:
        return "-"
    low, high = (round(value / 1e6) for value in (min(values), max(values)))
    return f"{low}" if low == high else f"{low} - {high}"
