"""Draws tier 1's whole step over the number of tokens, log-log, with the copy floor in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import report
import tier1
import timing

INK, GREY, FAINT = "#222222", "#6b6b6b", "#dddddd"


class Style(NamedTuple):
    colour: str  # Okabe and Ito's palette: told apart with any colour vision
    marker: str
    label: str


STYLES = {
    "upstream_loop": Style("#D55E00", "s", "upstream's loop\nover sequences"),
    "packed_eager": Style("#E69F00", "^", "eager, packed,\nno metrics"),
    "packed_compiled_metrics": Style("#CC79A7", "v", "torch.compile,\nwith 6 metrics"),
    "packed_compiled": Style("#009E73", "D", "torch.compile,\nno metrics"),
    "ipo_ext": Style("#0072B2", "o", "ipo_ext,\nall 14 metrics"),
    "copy": Style(GREY, "", f"floor: copying\n{tier1.BYTES_PER_TOKEN} bytes a token"),
}


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a run's JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = content["results"]
    figure, axes = plt.subplots(figsize=(9.6, 6.0), dpi=160)
    ends = {}
    for name, style in STYLES.items():
        points = _points(rows, name)
        if not points:
            continue
        tokens, summaries = zip(*points, strict=True)
        medians = [summary.median for summary in summaries]
        line = {"color": style.colour, "linewidth": 2.6 if name == "ipo_ext" else 1.6}
        line |= {"linestyle": "--"} if name == "copy" else {"marker": style.marker, "markersize": 5}
        axes.plot(tokens, medians, zorder=3 if name == "ipo_ext" else 2, **line)
        if name != "copy":
            low = [summary.lower for summary in summaries]
            high = [summary.upper for summary in summaries]
            axes.fill_between(tokens, low, high, color=style.colour, alpha=0.15, linewidth=0)
        ends[name] = (tokens[-1], medians[-1])
    _scales(axes, rows)
    _labels(axes, ends)
    _distances(axes, rows)
    _words(figure, axes, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def _points(rows: list[dict[str, Any]], name: str) -> list[tuple[int, timing.Summary]]:
    """(tokens, whole step) of the cases whose sequences have the common mean length."""
    points = []
    for case in tier1.cases_of(rows):
        summary = tier1.total(rows, case, name)
        if summary and case == tier1.case_of(case.tokens):
            points.append((case.tokens, summary))
    return points


def _scales(axes: Any, rows: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row["tokens"] for row in rows})
    exponents = range(int(math.log2(sizes[0])), int(math.log2(sizes[-1])) + 1, 2)
    axes.set_xticks([2**exponent for exponent in exponents])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, length=3)
    axes.set_xlabel(f"tokens (packed sequences of {tier1.MEAN_LENGTH:,} on average)", color=INK)


def _count(value: float) -> str:
    """Powers of two in words: 65,536 is 64 Ki."""
    for unit, size in (("Mi", 2**20), ("Ki", 2**10)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def tick(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size * 0.999:
            return f"{seconds / size:g} {unit}"
    return f"{seconds / 1e-9:g} ns"


def _labels(axes: Any, ends: Mapping[str, tuple[int, float]]) -> None:
    """Names beside the lines' ends, moved apart where they would overlap."""
    bottom, top = (math.log10(limit) for limit in axes.get_ylim())
    gap = (top - bottom) * 0.085
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = spread([math.log10(ends[name][1]) for name in order], gap)
    right = max(x for x, _ in ends.values())
    for name, height in zip(order, heights, strict=True):
        x, y = ends[name]
        style = STYLES[name]
        axes.annotate(
            style.label,
            xy=(x, y),
            xytext=(right * 1.55, 10**height),
            color=style.colour,
            fontsize=9.5,
            fontweight="bold" if name == "ipo_ext" else "normal",
            va="center",
            linespacing=1.05,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": style.colour, "linewidth": 0.7, "alpha": 0.6},
        )


def spread(positions: list[float], gap: float) -> list[float]:
    """The ascending positions, moved as little as a few sweeps can to lie at least `gap` apart."""
    moved = list(positions)
    for _ in range(200):
        for index in range(len(moved) - 1):
            overlap = gap - (moved[index + 1] - moved[index])
            if overlap > 0:
                moved[index] -= overlap / 2
                moved[index + 1] += overlap / 2
    return moved


def _distances(axes: Any, rows: list[dict[str, Any]]) -> None:
    """At the targets' size: how many times as long as ipo_ext upstream and the best form take."""
    case = tier1.TARGET_CASE
    ours = tier1.total(rows, case, "ipo_ext")
    loop = tier1.total(rows, case, "upstream_loop")
    if not ours or not loop:
        return
    arrow = {"arrowstyle": "<->", "color": INK, "linewidth": 1.0, "shrinkA": 4, "shrinkB": 4}
    axes.annotate("", (case.tokens, ours.median), (case.tokens, loop.median), arrowprops=arrow)
    text = f"{report.times(loop.median / ours.median)}"
    middle = math.sqrt(loop.median * ours.median)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.text(case.tokens, middle, text, ha="center", va="center", color=INK, bbox=box, fontsize=11)


def _words(figure: Any, axes: Any, content: Mapping[str, Any]) -> None:
    figure.text(
        0.012,
        0.965,
        "IPO+KL loss: forward, backward and every metric read",
        fontsize=13.5,
        color=INK,
        fontweight="bold",
        va="center",
    )
    where = provenance(content)
    figure.text(0.012, 0.925, where, fontsize=9, color=GREY, va="center")
    figure.subplots_adjust(left=0.085, right=0.80, top=0.885, bottom=0.095)


def provenance(content: Mapping[str, Any]) -> str:
    """Where a picture's figures come from."""
    versions, machine = content["versions"], content["machine"]
    where = f"{report.device_name(machine)}; torch {versions['torch']}; medians, quartiles shaded"
    version = f"ipo_ext {versions['ipo_ext']} ({content['commit'][:9]})"
    return f"{where}; {content['date'][:10]}; {version}"
