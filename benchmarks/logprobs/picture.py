"""Draws the whole step from log-probabilities over the number of tokens, the copy floor in it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.ticker import NullLocator

from benchmarks.harness import drawing, results, words
from benchmarks.harness.drawing import INK, Style
from benchmarks.harness.results import OURS, Row
from benchmarks.harness.summary import Summary
from benchmarks.logprobs.cases import Case

STYLES = {
    "upstream_loop": Style(drawing.VERMILION, "s", "upstream's loop\nover sequences"),
    "packed_eager": Style(drawing.ORANGE, "^", "eager, packed,\nno metrics"),
    "packed_compiled_metrics": Style(drawing.PINK, "v", "torch.compile,\nwith 6 metrics"),
    "packed_compiled": Style(drawing.GREEN, "D", "torch.compile,\nno metrics"),
    "ipo_ext": Style(drawing.BLUE, "o", "ipo_ext,\nall 14 metrics"),
    "copy": Style(drawing.GREY, "", "floor: copying\n{bytes_per_token} bytes a token"),
}

Curve = dict[int, Summary]  # the whole step, by the number of tokens


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a results file."""
    settings = content["settings"]
    figure, axes = drawing.subplots(size=(9.6, 6.0))
    curves = {
        name: curve
        for name in STYLES
        if (curve := _curve(content["results"], name, settings["mean_length"]))
    }
    for name, curve in curves.items():
        medians = [summary.median for summary in curve.values()]
        drawing.line(axes, name, STYLES[name], list(curve), medians)
        if name != "copy":
            drawing.quartiles(axes, STYLES[name], list(curve), list(curve.values()))
    _scales(axes, curves)
    axes.set_xlabel(
        f"tokens (packed sequences of {settings['mean_length']:,} on average)", color=INK
    )
    ends = {name: (max(curve), curve[max(curve)].median) for name, curve in curves.items()}
    drawing.label_ends(axes, ends, _styles(settings), gap=0.085, distance=1.55, fontsize=9.5)
    if OURS in curves and "upstream_loop" in curves:
        _distance(axes, curves[OURS], curves["upstream_loop"])
    title = "IPO+KL loss: forward, backward and every metric read"
    drawing.heading(figure, title, drawing.provenance(content, "medians, quartiles shaded"))
    figure.subplots_adjust(left=0.085, right=0.80, top=0.885, bottom=0.095)
    drawing.save(figure, path)


def _styles(settings: Mapping[str, Any]) -> dict[str, Style]:
    return {
        name: style._replace(label=style.label.format(**settings)) for name, style in STYLES.items()
    }


def _curve(rows: list[Row], name: str, mean_length: int) -> Curve:
    """At the cases whose sequences have the common mean length."""
    curve = {}
    for case in results.cases_of(rows, Case):
        summary = results.total(rows, case, name)
        if summary and case.sequences == max(1, case.tokens // mean_length):
            curve[case.tokens] = summary
    return curve


def _scales(axes: Any, curves: Mapping[str, Curve]) -> None:
    sizes = [tokens for curve in curves.values() for tokens in curve]
    exponents = range(int(math.log2(min(sizes))), int(math.log2(max(sizes))) + 1, 2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([2**exponent for exponent in exponents])
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    drawing.label_in_units(axes.yaxis, drawing.SECONDS)
    drawing.frame(axes)


def _count(value: float) -> str:
    """Powers of two in words: 65,536 is 64 Ki."""
    for unit, size in (("Mi", 2**20), ("Ki", 2**10)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def _distance(axes: Any, ours: Curve, loop: Curve) -> None:
    """At the middle of the sizes: how many times as long as ipo_ext upstream's loop takes."""
    sizes = sorted(ours.keys() & loop.keys())
    if not sizes:
        return
    tokens = sizes[(len(sizes) - 1) // 2]
    low, high = ours[tokens].median, loop[tokens].median
    arrow = {"arrowstyle": "<->", "color": INK, "linewidth": 1.0, "shrinkA": 4, "shrinkB": 4}
    axes.annotate("", (tokens, low), (tokens, high), arrowprops=arrow)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    middle = {"ha": "center", "va": "center", "color": INK, "bbox": box, "fontsize": 11}
    axes.text(tokens, math.sqrt(low * high), words.times(high / low), **middle)
