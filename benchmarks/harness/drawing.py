"""What all pictures share: colours, axes, labels beside lines, the words above them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.harness import machine
from benchmarks.harness.results import OURS
from benchmarks.harness.summary import Summary

INK, GREY, FAINT = "#222222", "#6b6b6b", "#dddddd"
# Okabe and Ito's palette, told apart with any colour vision, and two more.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, BROWN, VIOLET = "#CC79A7", "#56B4E9", "#8B6914", "#7A3E9D"


class Style(NamedTuple):
    """How a provider is drawn; a floor has no marker and its line is dashed."""

    colour: str
    marker: str
    label: str


# ---- Lines ----


def line(
    axes: Any, name: str, style: Style, places: Sequence[float], heights: Sequence[float]
) -> None:
    """A provider's line; ours is drawn thicker and over the others."""
    look: dict[str, Any] = {"marker": style.marker} if style.marker else {"linestyle": "--"}
    axes.plot(
        places,
        heights,
        color=style.colour,
        label=style.label.replace("\n", " "),
        linewidth=2.6 if name == OURS else 1.6,
        markersize=5,
        zorder=3 if name == OURS else 2,
        **look,
    )


def quartiles(
    axes: Any, style: Style, places: Sequence[float], summaries: Sequence[Summary]
) -> None:
    """Shades what lies between the quartiles."""
    low = [summary.lower for summary in summaries]
    high = [summary.upper for summary in summaries]
    axes.fill_between(places, low, high, color=style.colour, alpha=0.15, linewidth=0)


def label_ends(
    axes: Any,
    ends: Mapping[str, tuple[float, float]],
    styles: Mapping[str, Style],
    *,
    gap: float,
    distance: float,
    fontsize: float,
) -> None:
    """Names beside the lines' ends, moved apart where they would overlap.

    Args:
        ends: by provider, where its line ends, on logarithmic axes.
        gap: the least distance between two labels, as a part of the axis.
        distance: of the labels, as a multiple of the last place of all.
    """
    bottom, top = (math.log10(limit) for limit in axes.get_ylim())
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = spread([math.log10(ends[name][1]) for name in order], (top - bottom) * gap)
    right = max(place for place, _ in ends.values())
    for name, height in zip(order, heights, strict=True):
        style = styles[name]
        axes.annotate(
            style.label,
            xy=ends[name],
            xytext=(right * distance, 10**height),
            color=style.colour,
            fontsize=fontsize,
            fontweight="bold" if name == OURS else "normal",
            va="center",
            linespacing=1.05,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "relpos": (0, 0.5),
            },
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


# ---- Axes ----

SECONDS = {1.0: "s", 1e-3: "ms", 1e-6: "µs", 1e-9: "ns"}
BYTES = {1e9: "GB", 1e6: "MB"}


def in_units(value: float, units: Mapping[float, str]) -> str:
    """A number in the largest unit that it fills: 0.002 s is "2 ms"."""
    size = max((size for size in units if value >= size * 0.999), default=min(units))
    return f"{value / size:g} {units[size]}"


def label_in_units(axis: Any, units: Mapping[float, str]) -> None:
    """Major ticks in the units, minor ones without a label."""
    axis.set_major_formatter(lambda value, _: in_units(value, units))
    axis.set_minor_formatter(lambda value, _: "")


def frame(axes: Any) -> None:
    """A faint grid behind the lines; no frame above and at the right."""
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, length=3, which="both")


# ---- The whole picture ----


def subplots(*shape: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of so many rows and columns of axes, `size` in inches."""
    figure = Figure(figsize=size, dpi=160)
    return figure, figure.subplots(*shape, **options)


def heading(figure: Any, title: str, where: str) -> None:
    """A title, and below it where the figures come from."""
    inch = 1 / figure.get_figheight()
    at = {"x": 0.012, "va": "center"}
    figure.text(y=1 - 0.21 * inch, s=title, fontsize=13.5, color=INK, fontweight="bold", **at)
    figure.text(y=1 - 0.45 * inch, s=where, fontsize=9, color=GREY, **at)


def provenance(content: Mapping[str, Any], shows: str) -> str:
    """Where a picture's figures come from; `shows` says what of them is drawn."""
    versions = content["versions"]
    return "; ".join(
        [
            machine.name_of(content["machine"]),
            f"torch {versions['torch']}",
            shows,
            content["date"][:10],
            f"ipo_ext {versions['ipo_ext']} ({content['commit'][:9]})",
        ]
    )


def save(figure: Any, path: Path) -> None:
    """Writes the picture, on white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
