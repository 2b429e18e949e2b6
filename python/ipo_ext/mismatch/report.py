"""What the command found, in one object, and as text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from .causes import ALIKE, CLEAN, OPEN, SURE, Finding
from .readers import Found, Problem
from .statistics import Band, Extreme, Measured, Row, Statistics

SHOWN_PROBLEMS = 5
_SHOWN_EXTREMES = 8
TABLES = {
    "position": "by position in the answer",
    "logprob": "by the engine's log-probability",
    "version": "by version of the weights",
    "environment": "by environment",
}
MARKS = {SURE: "certain", ALIKE: "one of several that look alike", CLEAN: "clean", OPEN: "open"}


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that is shown.

    Attributes:
        setting: what was compared with what, in a sentence.
        files: what each file turned out to be.
        problems: the first records that were left out; ``problem_count`` of all.
        spelled: a token's text by its id, or its id where there is no tokenizer.
    """

    setting: str
    files: Sequence[Found]
    problems: Sequence[Problem]
    problem_count: int
    statistics: Statistics
    findings: Sequence[Finding]
    spelled: Callable[[Sequence[int]], list[str]]

    def tables(self) -> list[tuple[str, list[Row]]]:
        """Titles and rows; none of one row, which says what the whole does."""
        rows = ((title, self.statistics.rows(kind)) for kind, title in TABLES.items())
        return [(title, found) for title, found in rows if len(found) > 1]


def speller(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    """Tokens one by one, as text that shows where white space is."""
    if tokenizer is None:
        return lambda ids: [f"<{token}>" for token in ids]
    return lambda ids: [tokenizer.decode([token]) for token in ids]


# ---------------------------------------------------------------------------------------------
# Text


def as_text(report: Report) -> str:
    parts = [
        _files(report),
        report.setting,
        _findings(report.findings),
        _numbers(report.statistics),
        _bands(report.statistics.bands()),
        *(_table(title, rows) for title, rows in report.tables()),
        _extremes(report),
    ]
    return "\n\n".join(part for part in parts if part)


def _files(report: Report) -> str:
    lines = [str(found) for found in report.files]
    lines += [f"  left out: {problem}" for problem in report.problems]
    if report.problem_count > len(report.problems):
        lines.append(f"  and {report.problem_count - len(report.problems)} more")
    return "\n".join(lines)


def _findings(findings: Sequence[Finding]) -> str:
    lines = ["WHAT IT LOOKS LIKE"]
    for finding in findings:
        lines.append(f"  [{MARKS[finding.certainty]}] {finding.title}")
        lines.append(f"      {finding.evidence}")
        if finding.advice:
            lines.append(f"      -> {finding.advice}")
    return "\n".join(lines)


def numbers_of(statistics: Statistics) -> list[tuple[str, str, str]]:
    """Name, value and meaning of what is shown of all tokens."""
    overall = statistics.overall
    return [
        ("tokens", f"{statistics.tokens:,}", f"of {statistics.rollouts:,} rollouts"),
        ("mean x", f"{overall.mean:+.2g}", "log-ratio, trainer less engine"),
        ("std x", f"{overall.deviation:.2g}", "its standard deviation"),
        ("range", f"{overall.smallest:+.2g} to {overall.largest:+.2g}", "of x"),
        ("k1", f"{overall.k1:+.2g}", "mean of -x: the KL of the engine to the trainer"),
        ("k2", f"{overall.k2:.2g}", "mean of x^2 / 2"),
        ("k3", f"{overall.k3:.2g}", "mean of r - 1 - x: mismatch_kl of the metrics"),
        ("ESS", f"{overall.ess:.3f}", "effective sample size, a share"),
        (
            "|x| of 99%",
            f"{statistics.quantile(0.99):.2g} at most",
            f"of half the tokens {statistics.quantile(0.5):.2g}",
        ),
        *_left_out(statistics, overall),
    ]


def _left_out(statistics: Statistics, overall: Measured) -> list[tuple[str, str, str]]:
    found = []
    if statistics.missing:
        found.append(("no value", f"{statistics.missing:,}", "tokens with null or NaN, left out"))
    if overall.nonfinite:
        found.append(("infinite", f"{overall.nonfinite:.2%}", "of the tokens"))
    return found


def _numbers(statistics: Statistics) -> str:
    lines = ["ALL TOKENS"]
    for name, value, meaning in numbers_of(statistics):
        lines.append(f"  {name:<11s}{value:<20s}{meaning}".rstrip())
    return "\n".join(lines)


def _bands(bands: Sequence[Band]) -> str:
    head = ("WHAT A MASK WOULD DROP", "dropped", "low", "high")
    return aligned(
        [head]
        + [
            (f"  {b.name}", *(f"{share:.2%}" for share in (b.dropped, b.low, b.high)))
            for b in bands
        ]
    )


COLUMNS = ("tokens", "mean x", "std x", "k3", "min", "max")


def cells(row: Row) -> tuple[str, ...]:
    """Under ``COLUMNS``."""
    of = row.measured
    return (
        f"{row.tokens:,}",
        f"{of.mean:+.2g}",
        f"{of.deviation:.2g}",
        f"{of.k3:.2g}",
        f"{of.smallest:+.2g}",
        f"{of.largest:+.2g}",
    )


def _table(title: str, rows: Sequence[Row]) -> str:
    return aligned([(title.upper(), *COLUMNS)] + [(f"  {row.name}", *cells(row)) for row in rows])


def _extremes(report: Report) -> str:
    lines = ["THE FARTHEST TOKENS"]
    for extreme in report.statistics.extremes[:_SHOWN_EXTREMES]:
        before, token, after = context(report, extreme)
        lines.append(
            f"  x {extreme.log_ratio:+.3f}  engine {extreme.inference_logprob:+.2f}  trainer "
            f"{extreme.trainer_logprob:+.2f}  token {extreme.position}, {extreme.where}"
        )
        lines.append(f"      {before[-60:]}[{token}]{after[:24]}")
    return "\n".join(lines)


def context(report: Report, extreme: Extreme) -> tuple[str, str, str]:
    """The text before an extreme token, its own and what follows, on one line."""
    parts = (extreme.before, [extreme.token_id], extreme.after)
    before, token, after = ("".join(report.spelled(ids)) for ids in parts)
    return _one_line(before), _one_line(token), _one_line(after)


def _one_line(text: str) -> str:
    shown = text.replace("\n", "\\n").replace("\t", "\\t")
    return "".join(character if character.isprintable() else "\ufffd" for character in shown)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
