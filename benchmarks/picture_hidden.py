"""Draws tier 3's time and extra memory over the number of tokens; hollow: fewer of them active."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import report
import tier3
from picture import FAINT, GREY, INK, Style, spread

STYLES = {
    "eager": Style("#E69F00", "^", "eager,\nfull logits"),
    "compiled": Style("#009E73", "D", "torch.compile,\nfull logits"),
    "blockwise": Style("#D55E00", "s", "prime-rl's\nscheme"),
    "torch_lce": Style("#CC79A7", "v", "F.linear_\ncross_entropy"),
    "liger": Style("#56B4E9", "P", "Liger-Kernel"),
    "quack": Style("#8B6914", "X", "QuACK"),
    "cce": Style("#7A3E9D", "p", "cut-cross-entropy"),
    "products": Style(GREY, "", "floor: three\nmatrix products"),
    "ipo_ext": Style("#0072B2", "o", "ipo_ext"),
}

Value = Callable[[Mapping[str, Any]], float | None]


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Writes the picture of a run's JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12.0, 5.2), dpi=160)
    rows = content["results"]
    _panel(left, rows, _seconds, "forward + backward", {1: "s", 1e-3: "ms", 1e-6: "µs"})
    # The products hold the logits of the active rows: no floor of memory.
    heavy = [row for row in rows if row["provider"] != "products"]
    _panel(right, heavy, _extra, "memory beyond inputs and gradients", {1e9: "GB", 1e6: "MB"})
    _words(figure, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")
    plt.close(figure)


def _seconds(row: Mapping[str, Any]) -> float | None:
    return float(row["seconds"]["total"]["median"])


def _extra(row: Mapping[str, Any]) -> float | None:
    values = row.get("extra_bytes")
    return max(float(statistics.median(values)), 1e6) if values else None


def _panel(
    axes: Any, rows: list[dict[str, Any]], value: Value, title: str, units: Mapping[float, str]
) -> None:
    ends = {}
    for name, style in STYLES.items():
        points = sorted(
            (row["tokens"], value(row))
            for row in rows
            if row["provider"] == name and row["active"] == 100 and value(row) is not None
        )
        if not points:
            continue
        line = {"color": style.colour, "linewidth": 2.6 if name == "ipo_ext" else 1.6}
        line |= {"marker": style.marker} if style.marker else {"linestyle": "--"}
        axes.plot(*zip(*points, strict=True), markersize=5, **line)
        ends[name] = points[-1]
    _shares(axes, rows, value, named=value is _seconds)
    _scales(axes, rows, units)
    _labels(axes, ends)
    axes.set_title(title, loc="left", fontsize=11, color=INK)


def _shares(axes: Any, rows: list[dict[str, Any]], value: Value, *, named: bool) -> None:
    """ipo_ext with fewer active tokens, over the same number of all of them."""
    for row in rows:
        height = value(row)
        if row["provider"] != "ipo_ext" or row["active"] == 100 or height is None:
            continue
        colour = STYLES["ipo_ext"].colour
        axes.plot(row["tokens"], height, "o", color=colour, markerfacecolor="white", markersize=6)
        if not named:
            continue
        axes.annotate(
            f"{row['active']}%",
            (row["tokens"], height),
            xytext=(-8, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=colour,
        )


def _scales(axes: Any, rows: list[dict[str, Any]], units: Mapping[float, str]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    def in_units(number: float, _: int) -> str:
        size = max((size for size in units if number >= size * 0.999), default=min(units))
        return f"{number / size:g} {units[size]}"

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["tokens"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(in_units))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, length=3, which="both")
    axes.set_xlabel("tokens, all active (hollow: ipo_ext with a share of them active)", color=INK)


def _labels(axes: Any, ends: Mapping[str, tuple[int, float]]) -> None:
    """Names beside the lines' ends, moved apart where they would overlap."""
    bottom, top = (math.log10(limit) for limit in axes.get_ylim())
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = spread([math.log10(ends[name][1]) for name in order], (top - bottom) * 0.09)
    for name, height in zip(order, heights, strict=True):
        style, end = STYLES[name], ends[name]
        axes.annotate(
            style.label,
            xy=end,
            xytext=(end[0] * 1.14, 10**height),
            color=style.colour,
            fontsize=9,
            fontweight="bold" if name == "ipo_ext" else "normal",
            va="center",
            linespacing=1.0,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "relpos": (0, 0.5),
            },
        )


def _words(figure: Any, content: Mapping[str, Any]) -> None:
    versions, machine, settings = content["versions"], content["machine"], content["settings"]
    title = "From hidden states to loss and gradients"
    figure.text(0.012, 0.955, title, fontsize=13.5, color=INK, fontweight="bold", va="center")
    where = f"head {settings['vocabulary']:,} x {settings['width']:,} in {settings['dtype']}; "
    where += f"{report.device_name(machine)}; torch {versions['torch']}; medians; "
    where += f"{content['date'][:10]}; ipo_ext {versions['ipo_ext']} ({content['commit'][:9]})"
    figure.text(0.012, 0.905, where, fontsize=9, color=GREY, va="center")
    figure.subplots_adjust(left=0.06, right=0.885, top=0.81, bottom=0.11, wspace=0.46)


assert set(STYLES) == set(tier3.LABELS)
