"""Draws time and extra memory from hidden states over the tokens; hollow: fewer of them active."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator

from benchmarks.harness import drawing, results
from benchmarks.harness.drawing import INK, Style
from benchmarks.harness.results import OURS, Row

STYLES = {
    "eager": Style(drawing.ORANGE, "^", "eager,\nfull logits"),
    "compiled": Style(drawing.GREEN, "D", "torch.compile,\nfull logits"),
    "blockwise": Style(drawing.VERMILION, "s", "prime-rl's\nscheme"),
    "torch_lce": Style(drawing.PINK, "v", "F.linear_\ncross_entropy"),
    "liger": Style(drawing.SKY, "P", "Liger-Kernel"),
    "quack": Style(drawing.BROWN, "X", "QuACK"),
    "cce": Style(drawing.VIOLET, "p", "cut-cross-entropy"),
    "products": Style(drawing.GREY, "", "floor: three\nmatrix products"),
    "ipo_ext": Style(drawing.BLUE, "o", "ipo_ext"),
}

Value = Callable[[Row], float | None]


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a results file."""
    rows, settings = content["results"], content["settings"]
    figure, (left, right) = drawing.subplots(1, 2, size=(12.0, 5.2))
    _panel(left, rows, _seconds, "forward + backward", drawing.SECONDS)
    _name_active(left, rows)
    # The products hold the logits of the active rows: no floor of memory.
    heavy = [row for row in rows if row["provider"] != "products"]
    _panel(right, heavy, _extra_bytes, "memory beyond inputs and gradients", drawing.BYTES)
    head = f"head {settings['vocabulary']:,} x {settings['width']:,} in {settings['dtype']}"
    where = f"{head}; {drawing.provenance(content, 'medians')}"
    drawing.heading(figure, "From hidden states to loss and gradients", where)
    figure.subplots_adjust(left=0.06, right=0.885, top=0.81, bottom=0.11, wspace=0.46)
    drawing.save(figure, path)


def _seconds(row: Row) -> float | None:
    return results.phase(row).median


def _extra_bytes(row: Row) -> float | None:
    values = row.get("extra_bytes")
    return max(float(statistics.median(values)), 1e6) if values else None


def _panel(
    axes: Any, rows: Sequence[Row], value: Value, title: str, units: Mapping[float, str]
) -> None:
    """A value over the tokens: lines with all of them active, hollow marks with fewer."""
    ends = {}
    for name, style in STYLES.items():
        points = sorted(
            (row["tokens"], height)
            for row in rows
            if row["provider"] == name and row["active"] == 100
            if (height := value(row)) is not None
        )
        if points:
            drawing.line(axes, name, style, *zip(*points, strict=True))
            ends[name] = points[-1]
    for row in _partly_active(rows):
        if (height := value(row)) is not None:
            hollow = {"color": STYLES[OURS].colour, "markerfacecolor": "white", "markersize": 6}
            axes.plot(row["tokens"], height, "o", **hollow)
    _scales(axes, rows, units)
    drawing.label_ends(axes, ends, STYLES, gap=0.09, distance=1.14, fontsize=9)
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def _partly_active(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["provider"] == OURS and row["active"] < 100]


def _name_active(axes: Any, rows: Sequence[Row]) -> None:
    """The percentage beside each hollow mark."""
    for row in _partly_active(rows):
        axes.annotate(
            f"{row['active']}%",
            (row["tokens"], _seconds(row)),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=STYLES[OURS].colour,
        )


def _scales(axes: Any, rows: Sequence[Row], units: Mapping[float, str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["tokens"] for row in rows}))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    drawing.label_in_units(axes.yaxis, units)
    drawing.frame(axes)
    axes.set_xlabel("tokens, all active (hollow: ipo_ext with a share of them active)", color=INK)
