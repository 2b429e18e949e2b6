"""Draws the loss from logits: time over the number of logits, and peak memory in their size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator

from benchmarks.harness import drawing, results
from benchmarks.harness.drawing import INK, Style
from benchmarks.harness.results import Row
from benchmarks.logits import report
from benchmarks.logits.cases import Case

STYLES = {
    "eager": Style(drawing.ORANGE, "^", "eager"),
    "compiled": Style(drawing.GREEN, "D", "torch.compile"),
    "liger": Style(drawing.PINK, "v", "Liger-Kernel\n(cross entropy)"),
    "quack": Style(drawing.VERMILION, "s", "QuACK\n(cross entropy)"),
    "ipo_ext": Style(drawing.BLUE, "o", "ipo_ext,\nall metrics"),
    "copy": Style(drawing.GREY, "", "floor: a copy\nof the logits"),
}


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a results file."""
    rows = content["results"]
    widths = {"width_ratios": [5, 5, 3]}
    figure, (left, right, bars) = drawing.subplots(1, 3, size=(12.6, 5.2), gridspec_kw=widths)
    right.sharey(left)
    for axes, dtype in ((left, "fp32"), (right, "bf16")):
        _draw_times(axes, rows, dtype)
    left.set_ylabel("forward + backward", color=INK)
    right.tick_params(labelleft=False)
    _draw_memory(bars, rows)
    lines = {"handles": left.get_lines(), "ncols": len(left.get_lines())}
    figure.legend(**lines, loc="lower center", frameon=False, labelcolor=INK)
    title = "IPO+KL loss from logits: loss and gradient"
    drawing.heading(figure, title, drawing.provenance(content, "medians, quartiles shaded"))
    figure.subplots_adjust(left=0.065, right=0.985, top=0.84, bottom=0.26, wspace=0.35)
    drawing.save(figure, path)


def _draw_times(axes: Any, rows: Sequence[Row], dtype: str) -> None:
    cases = [case for case in report.in_order(rows) if case.dtype == dtype]
    for name, style in STYLES.items():
        curve = {
            case.logits: summary for case in cases if (summary := results.total(rows, case, name))
        }
        if curve:
            medians = [summary.median for summary in curve.values()]
            drawing.line(axes, name, style, list(curve), medians)
            drawing.quartiles(axes, style, list(curve), list(curve.values()))
    _scales(axes, cases)
    axes.set_title(dtype, color=INK, fontsize=11)


def _scales(axes: Any, cases: Sequence[Case]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = {case.logits: f"{case.rows} x {case.columns:,}" for case in cases}
    axes.set_xticks(list(sizes), list(sizes.values()), rotation=30, ha="right", fontsize=8.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    drawing.label_in_units(axes.yaxis, drawing.SECONDS)
    drawing.frame(axes)


def _draw_memory(axes: Any, rows: Sequence[Row]) -> None:
    """Peak over the size of the logits, the median of the cases: it hardly depends on them."""
    peaks: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        peaks.setdefault((row["provider"], row["dtype"]), []).append(report.peak(row))
    names = [name for name in STYLES if name != "copy" and any(name in key for key in peaks)]
    for dtype, shift, alpha in (("fp32", 0.2, 1.0), ("bf16", -0.2, 0.6)):
        for index, name in enumerate(names):
            if (name, dtype) not in peaks:
                continue
            peak, place = statistics.median(peaks[name, dtype]), index + shift
            axes.barh(place, peak, height=0.36, color=STYLES[name].colour, alpha=alpha)
            axes.text(peak, place, f" {peak:.1f} {dtype}", va="center", color=INK, fontsize=8.5)
    axes.set_yticks(range(len(names)), [STYLES[name].label for name in names])
    axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
    axes.set_title("peak memory / size of the logits", color=INK, fontsize=11)
    drawing.frame(axes)
    axes.grid(visible=False, axis="y")
