"""What a run shows: live progress, table, picture, JSON; rich and matplotlib are optional."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
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


def make_reporter(settings: Settings, place: str = "1 of 1") -> Reporter:
    """Rich's progress bars where rich is installed and stdout is a terminal, else plain lines.

    `place` says which of the runs it reports on.
    """
    title = headline(settings, place)
    try:
        from rich.console import Console
    except ImportError:
        return PlainReporter(settings, title)
    console = Console()
    if not console.is_terminal:
        return PlainReporter(settings, title)
    return RichReporter(settings, title, console)


class PlainReporter:
    """A line of text now and then, and an aligned table."""

    def __init__(self, settings: Settings, title: str) -> None:
        self.settings = settings
        self.title = title
        self.every = max(1, settings.steps // PLAIN_LINES)

    def __enter__(self) -> PlainReporter:
        print(self.title, flush=True)
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def on_step(self, record: StepRecord) -> None:
        if record.step % self.every == 0 or record.step == self.settings.steps:
            progress = f"{record.step:4d}/{self.settings.steps}"
            print(f"{record.arm:<9s} {progress}  {describe(record)}", flush=True)

    def table(self, results: Sequence[ArmResult]) -> None:
        print()
        print(aligned([TABLE_HEAD, *map(table_row, results)]))


class RichReporter:
    """A progress bar for each arm with the newest step beside it, and a drawn table."""

    def __init__(self, settings: Settings, title: str, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self.title = title
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
        self.console.print(self.title, highlight=False)
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


def headline(settings: Settings, place: str) -> str:
    """What is about to run, in one line."""
    return (
        f"additions: warm-up to reward {settings.warmup_reward}, then {settings.steps} steps in "
        f"each of {len(ARMS)} arms; inference copy: {settings.rounding} weights, renewed every "
        f"{settings.staleness} steps; seed {settings.seed} ({place})"
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
    return (result.arm, *(show(measure(result)) for measure, show in MEASURES))


# What is measured of an arm, under TABLE_HEAD's titles in their order, and how it is shown.
MEASURES: tuple[tuple[Callable[[ArmResult], float], Callable[[float], str]], ...] = (
    (lambda result: result.warmup_reward, "{:.3f}".format),
    (lambda result: result.final_reward, "{:.3f}".format),
    (lambda result: result.mean_over_tokens("dropped_low"), "{:.2%}".format),
    (lambda result: result.mean_over_tokens("dropped_high"), "{:.2%}".format),
    (lambda result: result.mean_over_tokens("mismatch_kl"), "{:.4f}".format),
    (lambda result: result.peak_mismatch_kl, "{:.4f}".format),
    (lambda result: result.seconds, "{:.1f}".format),
)


def median_table(runs: Mapping[int, Sequence[ArmResult]]) -> str:
    """TABLE_HEAD's measures of each arm as medians over the seeds, and the range of each."""
    rows: list[tuple[str, ...]] = [TABLE_HEAD]
    for of_arm in zip(*runs.values(), strict=True):
        values = [[measure(result) for result in of_arm] for measure, _ in MEASURES]
        shown = [show for _, show in MEASURES]
        for name, reduce in (
            (of_arm[0].arm, statistics.median),
            ("  lowest", min),
            ("  highest", max),
        ):
            cells = (show(reduce(column)) for show, column in zip(shown, values, strict=True))
            rows.append((name, *cells))
    return f"\nmedians over the seeds {', '.join(map(str, runs))}\n{aligned(rows)}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def write_json(runs: Mapping[int, Sequence[ArmResult]], settings: Settings, path: Path) -> None:
    """The settings, and every arm's steps for each seed."""
    by_seed = [
        {"seed": seed, "arms": [asdict(result) for result in results]}
        for seed, results in runs.items()
    ]
    path.write_text(json.dumps({"settings": asdict(settings), "runs": by_seed}, indent=1) + "\n")


def write_picture(runs: Mapping[int, Sequence[ArmResult]], settings: Settings, path: Path) -> str:
    """Draws reward, dropped shares and mismatch over steps; returns what to tell the user.

    Of several seeds, the median of each step and the range between the lowest and the highest.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return 'no picture: matplotlib is not installed (pip install "ipo_ext[demo]")'
    arms = [Arm(of_arm) for of_arm in zip(*runs.values(), strict=True)]
    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    reward, dropped, mismatch = figure.subplots(3, 1, sharex=True, height_ratios=(4, 3, 3))
    draw_reward(reward, arms)
    draw_dropped(dropped, arms)
    draw_mismatch(mismatch, arms)
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
        f"{settings.staleness} steps; {_seeds_in_words(list(runs))}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return f"picture: {path}"


def _seeds_in_words(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"median and range of {len(seeds)} seeds"


class Arm:
    """One arm of every seed's run, as the picture shows it."""

    def __init__(self, results: Sequence[ArmResult]) -> None:
        self.name = results[0].arm
        self.results = results
        self.warmup_reward = statistics.median(result.warmup_reward for result in results)
        self.drops = any(result.mean_over_tokens("dropped_low") > 0 for result in results)

    def columns(self, name: str, scale: float, window: int = 1) -> list[tuple[float, ...]]:
        """For each step, the quantity of every seed as a moving average over `window` steps."""
        smooth = (
            moving_average([scale * getattr(record, name) for record in result.history], window)
            for result in self.results
        )
        return list(zip(*smooth, strict=True))


def draw_reward(axes: Axes, arms: Sequence[Arm]) -> None:
    for arm in arms:
        _line(axes, arm, "reward", label=arm.name)
    axes.axhline(arms[0].warmup_reward, color="0.35", linestyle=":", label="after warm-up")
    axes.set_ylabel("reward (share of right answers)")
    axes.set_ylim(0, 1)
    axes.legend(loc="upper left", ncols=3, frameon=False)


def draw_dropped(axes: Axes, arms: Sequence[Arm]) -> None:
    """Both sides of every arm that drops anything, in per cent, on a logarithmic scale."""
    masked = [arm for arm in arms if arm.drops]
    for arm in masked:
        _line(axes, arm, "dropped_low", 100, label=f"{arm.name}: ratio too low")
        # A few tokens a step, often none: as measured, they would be a comb.
        label = f"{arm.name}: ratio too high"
        _line(axes, arm, "dropped_high", 100, spread=False, linestyle="--", label=label)
    axes.set_ylabel("dropped (% of loss tokens)")
    if masked:
        axes.set_yscale("log")
        axes.legend(loc="upper left", ncols=2, frameon=False)


def draw_mismatch(axes: Axes, arms: Sequence[Arm]) -> None:
    for arm in arms:
        _line(axes, arm, "mismatch_kl", label=arm.name)
    axes.set_ylabel("mismatch KL (nats per token)")
    axes.set_yscale("log")
    axes.legend(loc="upper left", ncols=2, frameon=False)


def _line(
    axes: Axes,
    arm: Arm,
    name: str,
    scale: float = 1,
    spread: bool = True,
    **keywords: Any,
) -> None:
    """One quantity of one arm: a bold moving average over 1/20 of the run, the median of the seeds.

    Faint behind it what it is made of: a single run as measured, or the range of several.
    """
    color = COLORS[arm.name]
    steps = range(1, len(arm.results[0].history) + 1)
    smooth = arm.columns(name, scale, window=max(1, len(steps) // 20))
    if spread and len(arm.results) == 1:
        measured = [column[0] for column in arm.columns(name, scale)]
        axes.plot(steps, measured, color=color, linewidth=0.6, alpha=0.3)
    elif spread:
        lowest, highest = map(min, smooth), map(max, smooth)
        axes.fill_between(steps, list(lowest), list(highest), color=color, alpha=0.15, linewidth=0)
    median = [statistics.median(column) for column in smooth]
    axes.plot(steps, median, color=color, linewidth=1.8, **keywords)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    recent = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [sum(part) / len(part) for part in recent]
