"""Draws the loss from logits: time over the number of logits, and peak memory in their size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import picture
import tier2
from picture import FAINT, GREY, INK, Style

STYLES = {
    "eager": Style("#E69F00", "^", "eager"),
    "compiled": Style("#009E73", "D", "torch.compile"),
    "liger": Style("#CC79A7", "v", "Liger-Kernel\n(cross entropy)"),
    "quack": Style("#D55E00", "s", "QuACK\n(cross entropy)"),
    "ipo_ext": Style("#0072B2", "o", "ipo_ext,\nall metrics"),
    "copy": Style(GREY, "", "floor: a copy\nof the logits"),
}


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a run's JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = content["results"]
    widths = {"width_ratios": [5, 5, 3]}
    figure, (left, right, bars) = plt.subplots(
        1, 3, figsize=(12.6, 5.2), dpi=160, gridspec_kw=widths
    )
    right.sharey(left)
    for axes, dtype in ((left, "fp32"), (right, "bf16")):
        _draw_times(axes, rows, dtype)
    left.set_ylabel("forward + backward", color=INK)
    right.tick_params(labelleft=False)
    _draw_memory(bars, rows)
    handles = [left.get_lines()[0]] if not rows else left.get_lines()
    figure.legend(
        handles,
        [line.get_label().replace("\n", " ") for line in handles],
        loc="lower center",
        ncols=len(handles),
        frameon=False,
        labelcolor=INK,
    )
    _words(figure, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def _draw_times(axes: Any, rows: list[dict[str, Any]], dtype: str) -> None:
    cases = [case for case in tier2.cases_of(rows) if case.dtype == dtype]
    for name, style in STYLES.items():
        found = [(case, tier2.total(rows, case, name)) for case in cases]
        points = [(case.rows * case.columns, summary) for case, summary in found if summary]
        if not points:
            continue
        logits, summaries = zip(*points, strict=True)
        bold = name == "ipo_ext"
        line = {"color": style.colour, "linewidth": 2.6 if bold else 1.6, "label": style.label}
        line |= {"linestyle": "--"} if name == "copy" else {"marker": style.marker, "markersize": 5}
        axes.plot(logits, [summary.median for summary in summaries], zorder=2 + bold, **line)
        low, high = ([getattr(s, end) for s in summaries] for end in ("lower", "upper"))
        axes.fill_between(logits, low, high, color=style.colour, alpha=0.15, linewidth=0)
    _scales(axes, cases)
    axes.set_title(dtype, color=INK, fontsize=11)


def _scales(axes: Any, cases: list[tier2.Case]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = {case.rows * case.columns: f"{case.rows} x {case.columns:,}" for case in cases}
    axes.set_xticks(list(sizes), list(sizes.values()), rotation=30, ha="right", fontsize=8.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: picture.tick(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    _frame(axes)


def _draw_memory(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Peak over the size of the logits, the median of the cases: it hardly depends on them."""
    names = [name for name in STYLES if any(row["provider"] == name for row in rows)]
    names.remove("copy")
    for shift, dtype in ((0.2, "fp32"), (-0.2, "bf16")):
        peaks = [
            statistics.median(
                row["peak_bytes"] / case.bytes
                for case in tier2.cases_of(rows)
                if case.dtype == dtype and (row := tier2.row_of(rows, case, name))
            )
            for name in names
        ]
        places = [index + shift for index in range(len(names))]
        colours = [STYLES[name].colour for name in names]
        axes.barh(places, peaks, height=0.36, color=colours, alpha=1 if dtype == "fp32" else 0.6)
        for place, peak in zip(places, peaks, strict=True):
            axes.text(peak, place, f" {peak:.1f} {dtype}", va="center", color=INK, fontsize=8.5)
    axes.set_yticks(range(len(names)), [STYLES[name].label for name in names])
    axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
    axes.set_title("peak memory / size of the logits", color=INK, fontsize=11)
    _frame(axes)
    axes.grid(visible=False, axis="y")


def _frame(axes: Any) -> None:
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, length=3)


def _words(figure: Any, content: Mapping[str, Any]) -> None:
    title = "IPO+KL loss from logits: loss and gradient"
    where = picture.provenance(content)
    figure.text(0.012, 0.965, title, fontsize=13.5, color=INK, fontweight="bold", va="center")
    figure.text(0.012, 0.922, where, fontsize=9, color=GREY, va="center")
    figure.subplots_adjust(left=0.065, right=0.985, top=0.84, bottom=0.26, wspace=0.3)
