"""`python -m ipo_ext demo`: reinforcement learning of additions under a real mismatch, on CPU."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .report import make_reporter, median_table, write_json, write_picture
from .rollout import ROUNDINGS
from .train import ArmResult, Settings, StepRecord, run

__all__ = ["ArmResult", "Settings", "StepRecord", "main", "run"]

SMOKE = Settings(steps=16)

DESCRIPTION = """\
Trains a small causal transformer on additions, from scratch, on CPU, in about a minute: a
supervised warm-up, then reinforcement learning with ipo_loss_from_hidden, which keeps no logits.
Rollouts come from a separate inference copy of the policy that is stale and rounded to low
precision. Two arms start from the same weights and see the same prompts: "mask + KL" is the
default IPOConfig(), "no mask" keeps every token and has no KL term. One run depends on the
rounding of the machine it runs on; medians over several seeds (--seeds 0-4) much less."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo with command-line arguments (None: those of the process); the exit status."""
    arguments = _parser().parse_args(argv)
    settings = _settings(arguments)
    seeds = arguments.seeds or [settings.seed]
    runs = {}
    for number, seed in enumerate(seeds, start=1):
        of_seed = replace(settings, seed=seed)
        with make_reporter(of_seed, f"{number} of {len(seeds)}") as reporter:
            runs[seed] = run(of_seed, reporter.on_step)
        reporter.table(runs[seed])
    if len(seeds) > 1:
        print(median_table(runs))
    print(write_picture(runs, settings, arguments.output))
    if arguments.json is not None:
        write_json(runs, settings, arguments.json)
        print(f"numbers: {arguments.json}")
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    """The defaults, or the smoke run's, with what the command line says in their place."""
    chosen = {name: getattr(arguments, name) for name in ("steps", "seed", "staleness", "rounding")}
    given = {name: value for name, value in chosen.items() if value is not None}
    return replace(SMOKE if arguments.smoke else Settings(), **given)


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m ipo_ext demo", description=DESCRIPTION)
    parser.add_argument(
        "--smoke", action="store_true", help="the same code with fewer steps, a few seconds in all"
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help=f"reinforcement-learning steps in each arm (default {defaults.steps})",
    )
    seeding = parser.add_mutually_exclusive_group()
    seeding.add_argument(
        "--seed", type=int, metavar="N", help=f"of everything random (default {defaults.seed})"
    )
    seeding.add_argument(
        "--seeds",
        type=_seeds,
        metavar="N-M",
        help="a run for each seed, one after the other, then medians over them: 0-4 or 0,3,7",
    )
    parser.add_argument(
        "--staleness",
        type=_positive,
        metavar="N",
        help=f"steps between renewals of the inference copy (default {defaults.staleness})",
    )
    parser.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        help=f"storage of the inference copy's weights (default {defaults.rounding}); all but "
        "none also compute in bf16",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("ipo_ext_demo.png"),
        metavar="PNG",
        help="where the picture goes (default %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write every step's numbers")
    return parser


def _seeds(text: str) -> list[int]:
    """An argparse type: "0-4" and "0,3,7" as lists of different seeds."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds += range(int(first), int(last or first) + 1)
    if not seeds or len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"expected different seeds, got {text!r}")
    return seeds


def _positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value
