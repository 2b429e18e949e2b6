"""Drawn: how log-ratios are distributed, where they are large, what masks drop.

Needs matplotlib. One figure, written as PNG, or as SVG to stand in a page.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .extras import need
from .report import Report
from .statistics import HISTOGRAM_EDGES, Row, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey.
INSIDE, OUTSIDE, SECOND, GREY = "#0072B2", "#D55E00", "#56B4E9", "#6b6b6b"
_BAND = (math.log(0.2), math.log(5.0))  # the default configuration's, which the histogram shows
_TICKS = (-8, -1, -0.1, -0.01, 0, 0.01, 0.1, 1, 8)
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_VERSIONS = 40  # bars that have room for a name


def write_png(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _figure(report).savefig(path, dpi=150, facecolor="white")


def as_svg(report: Report) -> str:
    """An element ``<svg>`` whose text is text, in the fonts of the page."""
    matplotlib = need("matplotlib", "the picture")
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ipo_ext"}):
        _figure(report).savefig(text, format="svg", facecolor="none", metadata=_NO_METADATA)
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]


def _figure(report: Report) -> Figure:
    need("matplotlib", "the picture")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    statistics = report.statistics
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, height_ratios=(5, 4), hspace=0.06, wspace=0.04)
    _draw_distribution(figure.add_subplot(grid[0, :]), statistics)
    _draw_deviations(
        figure.add_subplot(grid[1, 0]),
        statistics.rows("logprob"),
        "the engine's log-probability",
    )
    kind, label = _second_table(statistics)
    _draw_deviations(figure.add_subplot(grid[1, 1]), statistics.rows(kind), label)
    _draw_bands(figure.add_subplot(grid[1, 2]), statistics)
    return figure


def _second_table(statistics: Statistics) -> tuple[str, str]:
    """Versions or environments where the files know several, else positions."""
    for kind, label in (("version", "version of the weights"), ("environment", "environment")):
        if 1 < len(statistics.rows(kind)) <= _VERSIONS:
            return kind, label
    return "position", "position in the answer"


def _draw_distribution(axes: Axes, statistics: Statistics) -> None:
    """Densities over a scale that is linear about 0 and logarithmic beyond."""
    edges = _all_edges()
    places = [_place(edge) for edge in edges]
    widths = [right - left for left, right in itertools.pairwise(places)]
    shares = (statistics.histogram.double() / statistics.histogram.sum().clamp(min=1)).tolist()
    heights = [100 * share / width for share, width in zip(shares, widths, strict=True)]
    middles = [(left + right) / 2 for left, right in itertools.pairwise(edges)]
    colors = [INSIDE if _BAND[0] <= middle <= _BAND[1] else OUTSIDE for middle in middles]
    axes.bar(places[:-1], heights, widths, align="edge", color=colors, edgecolor="white", lw=0.4)
    reach = _reach(statistics.histogram)
    for bound, name in zip(_BAND, ("r = 0.2", "r = 5"), strict=True):
        if abs(_place(bound)) < reach:
            axes.axvline(_place(bound), color=GREY, lw=0.9, ls=":")
            axes.text(
                _place(bound), 0.98, f" {name}", transform=axes.get_xaxis_transform(), va="top",
                color=GREY, fontsize=9, ha="left" if bound > 0 else "right",
            )  # fmt: skip
    axes.set_xlim(-reach, reach)
    axes.set_xticks([_place(tick) for tick in _TICKS], [f"{tick:g}" for tick in _TICKS])
    axes.set_xlabel(
        "log-ratio x, trainer less engine: linear within 0.001 of 0, logarithmic beyond"
    )
    axes.set_ylabel("% of tokens, for each unit of the scale")
    axes.set_title(_headline(statistics), loc="left", fontsize=11)
    _clean(axes)


def _headline(statistics: Statistics) -> str:
    of = statistics.overall
    return (
        f"{statistics.tokens:,} tokens: k3 {of.k3:.2g} nats, std of x {of.deviation:.2g}, "
        f"effective sample size {of.ess:.1%}"
    )


def _all_edges() -> list[float]:
    """Of the histogram's bins, the outer ones as wide as those beside them."""
    side = [*HISTOGRAM_EDGES, HISTOGRAM_EDGES[-1] * 1.5]
    return [-edge for edge in reversed(side)] + [0.0] + side


def _place(x: float) -> float:
    """0 to 1 over the first bin, then a unit for each doubling."""
    size = abs(x) / HISTOGRAM_EDGES[0]
    return math.copysign(size if size <= 1 else 1 + math.log2(size), x)


def _reach(histogram: torch.Tensor) -> float:
    """The scale's half-width: all that is not empty, at least to 0.1, and a little air."""
    filled = (histogram.nonzero()[:, 0] - len(histogram) // 2).tolist()
    farthest = max((max(place + 1, -place) for place in filled), default=0)
    return max(_place(0.1), _place(_all_edges()[len(histogram) // 2 + farthest])) + 0.5


def _draw_deviations(axes: Axes, rows: Sequence[Row], label: str) -> None:
    """The standard deviation of x in each row of a table, and its mean."""
    places = range(len(rows))
    axes.bar(
        places, [row.measured.deviation for row in rows], color=INSIDE, width=0.75, label="std"
    )
    means = [abs(row.measured.mean) for row in rows]
    axes.plot(places, means, "o", color=OUTSIDE, ms=4, label="|mean|")
    axes.set_xticks(list(places), [row.name for row in rows], rotation=35, ha="right", fontsize=8)
    axes.set_xlabel(label)
    axes.set_ylabel("x, nats")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.14))
    _clean(axes)


def _draw_bands(axes: Axes, statistics: Statistics) -> None:
    bands = statistics.bands()[::-1]
    low, high = [100 * band.low for band in bands], [100 * band.high for band in bands]
    places = range(len(bands))
    axes.barh(places, low, color=OUTSIDE, label="ratio too low", height=0.6)
    axes.barh(places, high, left=low, color=SECOND, label="too high", height=0.6)
    longest = max([*(a + b for a, b in zip(low, high, strict=True)), 0.01])
    for place, band in enumerate(bands):
        end = 100 * (band.low + band.high) + 0.02 * longest
        axes.text(end, place, f"{band.dropped:.2%}", va="center", fontsize=8, color=GREY)
    names = [band.name.replace("the default, ", "default: ") for band in bands]
    axes.set_yticks(list(places), names, fontsize=8)
    axes.set_xlim(0, 1.3 * longest)
    axes.set_xlabel("% of tokens that a mask drops")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, 1.14))
    _clean(axes, axis="x")


def _clean(axes: Axes, axis: Any = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=axis, color="0.9")
    axes.set_axisbelow(True)
