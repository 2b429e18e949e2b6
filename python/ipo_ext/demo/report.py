"""What a run shows: live progress, table, picture, JSON; rich and matplotlib are optional."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .train import ARMS, ArmResult, Settings, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

PLAIN_LINES = 20
"""Progress lines in each arm where there is no terminal to redraw."""

# Okabe and Ito's palette: told apart with every kind of colour vision, and in grey.
COLORS = {"mask + KL": "#0072B2", "no mask": "#D55E00"}


class Reporter(Protocol):
    """Shows a run while it goes on, inside `with`, and its table after that."""

    def __enter__(self) -> Reporter: ...
    def __exit__(self, *exception: object) -> None: ...
    def on_step(self, record: StepRecord) -> None: ...
    def table(self, results: Sequence[ArmResult]) -> None: ...


def make_reporter(settings: Settings) -> Reporter:
    """Rich's progress bars where rich is installed and stdout is a terminal, else plain lines."""
    try:
        from rich.console import Console
    except ImportError:
        return PlainReporter(settings)
    console = Console()
    return RichReporter(settings, console) if console.is_terminal else PlainReporter(settings)


class PlainReporter:
    """A line of text now and then, and an aligned table."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.every = max(1, settings.steps // PLAIN_LINES)

    def __enter__(self) -> PlainReporter:
        print(headline(self.settings), flush=True)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def on_step(self, record: StepRecord) -> None:
        if record.step % self.every == 0 or record.step == self.settings.steps:
            progress = f"{record.step:4d}/{self.settings.steps}"
            print(f"{record.arm:<9s} {progress}  {describe(record)}", flush=True)

    def table(self, results: Sequence[ArmResult]) -> None:
        rows = [TABLE_HEAD, *map(table_row, results)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print()
        for row in rows:
            cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
            print("  ".join(cells))


class RichReporter:
    """A progress bar for each arm with the newest step beside it, and a drawn table."""

    def __init__(self, settings: Settings, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.settings = settings
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[latest]}"),
            console=console,
        )
        self.bars = {
            arm: self.progress.add_task(arm, total=settings.steps, latest="") for arm in ARMS
        }

    def __enter__(self) -> RichReporter:
        self.console.print(headline(self.settings), highlight=False)
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def on_step(self, record: StepRecord) -> None:
        self.progress.update(self.bars[record.arm], completed=record.step, latest=describe(record))

    def table(self, results: Sequence[ArmResult]) -> None:
        from rich.table import Table

        table = Table(TABLE_HEAD[0])
        for title in TABLE_HEAD[1:]:
            table.add_column(title, justify="right")
        for result in results:
            table.add_row(*table_row(result))
        self.console.print(table)


def headline(settings: Settings) -> str:
    """What is about to run, in one line."""
    return (
        f"additions: warm-up to reward {settings.warmup_reward}, then {settings.steps} steps in "
        f"each of {len(ARMS)} arms; inference copy: {settings.rounding} weights, renewed every "
        f"{settings.staleness} steps; seed {settings.seed}"
    )


def describe(record: StepRecord) -> str:
    """The live numbers of one step, of constant width."""
    return (
        f"reward {record.reward:.3f}  dropped low {record.dropped_low:6.2%} "
        f"high {record.dropped_high:6.2%}  mismatch KL {record.mismatch_kl:.4f}"
    )


TABLE_HEAD = (
    "arm",
    "warm-up reward",
    "final reward",
    "dropped low",
    "dropped high",
    "mean KL",
    "peak KL",
    "seconds",
)


def table_row(result: ArmResult) -> tuple[str, ...]:
    """The cells under TABLE_HEAD; shares and the mean KL are over every loss token of the run."""
    return (
        result.arm,
        f"{result.warmup_reward:.3f}",
        f"{result.final_reward:.3f}",
        f"{result.mean_over_tokens('dropped_low'):.2%}",
        f"{result.mean_over_tokens('dropped_high'):.2%}",
        f"{result.mean_over_tokens('mismatch_kl'):.4f}",
        f"{result.peak_mismatch_kl:.4f}",
        f"{result.seconds:.1f}",
    )


def write_json(results: Sequence[ArmResult], settings: Settings, path: Path) -> None:
    """The settings and every arm's steps."""
    content = {"settings": asdict(settings), "arms": [asdict(result) for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_picture(results: Sequence[ArmResult], settings: Settings, path: Path) -> str:
    """Draws reward, dropped shares and mismatch over steps; returns what to tell the user."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return 'no picture: matplotlib is not installed (pip install "ipo_ext[demo]")'
    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    reward, dropped, mismatch = figure.subplots(3, 1, sharex=True, height_ratios=(4, 3, 3))
    draw_reward(reward, results)
    draw_dropped(dropped, results)
    draw_mismatch(mismatch, results)
    for axes in (reward, dropped, mismatch):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    for axes in (dropped, mismatch):
        axes.yaxis.set_major_formatter("{x:g}")
    mismatch.set_xlabel("reinforcement-learning step")
    mismatch.set_xlim(1, max(2, settings.steps))
    figure.suptitle(
        "IPO+KL on additions\n"
        f"rollouts from a copy with {settings.rounding} weights, renewed every "
        f"{settings.staleness} steps; seed {settings.seed}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"picture: {path}"


def draw_reward(axes: Axes, results: Sequence[ArmResult]) -> None:
    for result in results:
        _line(axes, result, "reward", label=result.arm)
    axes.axhline(results[0].warmup_reward, color="0.35", linestyle=":", label="after warm-up")
    axes.set_ylabel("reward (share of right answers)")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", ncols=3, frameon=False)


def draw_dropped(axes: Axes, results: Sequence[ArmResult]) -> None:
    """Both sides of every arm that drops anything, in per cent, on a logarithmic scale."""
    masked = [result for result in results if result.mean_over_tokens("dropped_low") > 0]
    for result in masked:
        _line(axes, result, "dropped_low", 100, label=f"{result.arm}: ratio too low")
        # A few tokens a step, often none: as measured, they would be a comb.
        label = f"{result.arm}: ratio too high"
        _line(axes, result, "dropped_high", 100, measured=False, linestyle="--", label=label)
    axes.set_ylabel("dropped (% of loss tokens)")
    if masked:
        axes.set_yscale("log")
        axes.legend(loc="upper left", ncols=2, frameon=False)


def draw_mismatch(axes: Axes, results: Sequence[ArmResult]) -> None:
    for result in results:
        _line(axes, result, "mismatch_kl", label=result.arm)
    axes.set_ylabel("mismatch KL (nats per token)")
    axes.set_yscale("log")
    axes.legend(loc="upper left", ncols=2, frameon=False)


def _line(
    axes: Axes,
    result: ArmResult,
    name: str,
    scale: float = 1,
    measured: bool = True,
    **keywords: Any,
) -> None:
    """One quantity of one arm: faint as measured, bold as a moving average over 1/20 of the run."""
    steps = [record.step for record in result.history]
    values = [scale * getattr(record, name) for record in result.history]
    color = COLORS[result.arm]
    if measured:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
    smooth = moving_average(values, window=max(1, len(values) // 20))
    axes.plot(steps, smooth, color=color, linewidth=1.8, **keywords)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    recent = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in recent]
