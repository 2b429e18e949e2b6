"""The results file: its rows, found by case and provider; ratios and targets; reading and writing.

A row holds the fields of its case, `provider`, `grad_out`, `clock`, and `seconds`: the summary of
each phase and of their `total`. Further fields are the benchmark's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import machine
from benchmarks.harness.summary import Ratio, Summary, ratio, summarise

Row = dict[str, Any]
OURS = "ipo_ext"
PHASES = ("forward", "backward")  # of a step, unless a benchmark has more
STEP_CLOCKS = ("wall", "events")  # of a step as it runs, launches by Python included


# ---- Rows ----


def make_row(
    case: NamedTuple,
    provider: str,
    timings: Sequence[Sequence[float]],
    phases: Sequence[str],
    *,
    clock: str,
    grad_out: float = 1.0,
) -> Row:
    """A row of timings; each timing holds the seconds of the first of `phases`, or of one alone."""
    count = len(timings[0])
    seconds = {"total": summarise([sum(timing) for timing in timings])._asdict()}
    if count > 1:
        for index, phase in enumerate(phases[:count]):
            seconds[phase] = summarise([timing[index] for timing in timings])._asdict()
    labels = {"provider": provider, "grad_out": grad_out, "clock": clock}
    return {**case._asdict(), **labels, "seconds": seconds}


def find(
    rows: Iterable[Row],
    case: NamedTuple,
    provider: str,
    *,
    grad_out: float = 1.0,
    clocks: Sequence[str] = STEP_CLOCKS,
) -> Row | None:
    """The row of a provider at a case; None where it was not timed."""
    wanted = {**case._asdict(), "provider": provider, "grad_out": grad_out}
    for row in rows:
        if wanted.items() <= row.items() and row["clock"] in clocks:
            return row
    return None


def phase(row: Row, name: str = "total") -> Summary:
    """The summary of a phase, by default of the whole step."""
    return Summary(**row["seconds"][name])


def total(rows: Iterable[Row], case: NamedTuple, provider: str, **wanted: Any) -> Summary | None:
    """The whole step of a provider at a case, by `find`."""
    row = find(rows, case, provider, **wanted)
    return phase(row) if row else None


def case_of(row: Row, kind: Any) -> Any:
    """The case of a row, as the benchmark's own type of case."""
    return kind(**{field: row[field] for field in kind._fields})


def cases_of(rows: Iterable[Row], kind: Any) -> list[Any]:
    """The cases that were timed, in ascending order."""
    return sorted({case_of(row, kind) for row in rows})


# ---- What follows from them ----


def ratios(rows: Sequence[Row], kind: Any) -> list[Row]:
    """Every provider's whole step over ours of the same case, grad_out and run."""
    found = []
    for row in rows:
        case, grad_out = case_of(row, kind), row["grad_out"]
        ours = total(rows, case, OURS, grad_out=grad_out)
        if ours is None or row["provider"] == OURS or row["clock"] not in STEP_CLOCKS:
            continue
        labels = {"provider": row["provider"], "grad_out": grad_out}
        found.append({**case._asdict(), **labels, **ratio(phase(row), ours)._asdict()})
    return found


def target(
    what: str, found: Ratio, *, at_least: float | None = None, at_most: float | None = None
) -> Row:
    """What this project asks of itself, met or missed by the ratio of medians."""
    if at_most is not None:
        wanted, met = f"at most {at_most:g}", found.value <= at_most
    else:
        wanted, met = f"at least {at_least:g}", found.value >= at_least
    return {"what": what, **found._asdict(), "wanted": wanted, "met": met}


# ---- Files ----


def write(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file at once, so that a run that is cut short leaves the last whole one."""
    content["machine"]["load_after"] = machine.load_average()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(path)


def read(path: Path) -> dict[str, Any]:
    """A results file, an old one in today's form: what every row holds.

    Raises:
        ValueError: for a file that does not hold rows.
    """
    content = json.loads(path.read_text())
    if "benchmark" not in content or not isinstance(content.get("results"), list):
        raise ValueError(f"{path}: expected rows of results, as benchmarks write them by --json")
    clock = "events" if "gpu" in content["machine"] else "wall"
    complete = {"grad_out": 1.0, "clock": clock}
    content["results"] = [{**complete, **row} for row in content["results"]]
    return content
