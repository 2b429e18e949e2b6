"""The command line of a benchmark: options, the run, tables, the results file and its picture."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, results, tables
from benchmarks.harness.benchmark import Benchmark
from benchmarks.harness.facts import facts
from benchmarks.harness.runner import Runner
from benchmarks.harness.terminal import Terminal

# ---- Options ----


def base_parser(
    name: str, description: str | None, devices: Sequence[str] = ("cpu", "cuda")
) -> argparse.ArgumentParser:
    """The options of every command: device (by default the first), threads, results file."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default 2)")
    parser.add_argument("--json", type=Path, help="write every median and spread here")
    return parser


def numbers(text: str) -> list[int]:
    """The value of an option: whole numbers, separated by commas."""
    return [int(item) for item in text.split(",")]


def parse(benchmark: type[Benchmark], argv: list[str] | None) -> argparse.Namespace:
    """The options of a benchmark.

    Raises:
        SystemExit: for an option that it does not have, or that does not fit the others.
    """
    names = [name for name, provider in benchmark.providers.items() if not provider.always]
    parser = base_parser(benchmark.name, benchmark.__doc__)
    benchmark.add_options(parser)
    parser.add_argument(
        "--providers",
        type=lambda text: text.split(","),
        default=names,
        help=f"separated by commas, of {', '.join(names)} (default all)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--deadline", type=float, help="start no size after this many seconds")
    parser.add_argument(
        "--flush",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on CUDA, empty the L2 cache before each step where the inputs fit into it",
    )
    parser.add_argument("--picture", type=Path, help="draw the results here (png)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.providers) - set(names):
        parser.error(f"--providers: expected some of {', '.join(names)}, got {sorted(unknown)}")
    if complaint := benchmark.complaint(arguments):
        parser.error(complaint)
    return arguments


# ---- The run ----


def begin(name: str, arguments: argparse.Namespace, terminal: Terminal) -> dict[str, Any] | None:
    """The facts that a results file begins with; None, and a word why, without the device."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        terminal.line(f"python -m benchmarks.{name}: --device cuda, but torch sees no GPU")
        return None
    torch.set_num_threads(arguments.threads)
    content = facts(name, arguments.device)
    if warning := machine.warning_if_busy(content["machine"]):
        terminal.line(warning)
    return content


def main(benchmark_type: type[Benchmark], argv: list[str] | None = None) -> int:
    """Runs a benchmark; returns 0, 1 if one was wrong or ours failed, 2 where there is no GPU."""
    arguments = parse(benchmark_type, argv)
    terminal = Terminal()
    content = begin(benchmark_type.name, arguments, terminal)
    if content is None:
        return 2
    benchmark = benchmark_type(arguments)
    providers = benchmark.providers.items()
    content["settings"] = benchmark.set_up() | {
        "providers": {name: f"{provider.label}: {provider.note}" for name, provider in providers}
    }
    runner = Runner(benchmark, terminal)
    _run(benchmark, runner, content)
    benchmark.print_tables(terminal, runner.rows)
    tables.targets(terminal, content["targets"])
    if arguments.picture:
        benchmark.draw(content, arguments.picture)
    return 1 if runner.wrong else 0


def _run(benchmark: Benchmark, runner: Runner, content: dict[str, Any]) -> None:
    """All groups, or those that start before the deadline; the file is written after each."""
    arguments, start = benchmark.arguments, time.monotonic()
    groups = benchmark.groups()

    def record() -> None:
        content["results"] = runner.rows
        content["ratios"] = results.ratios(runner.rows, benchmark.case_type)
        content["targets"] = benchmark.targets(runner.rows)
        content["left_out"] = runner.left_out
        content["seconds_taken"] = round(time.monotonic() - start, 1)
        if arguments.json:
            results.write(arguments.json, content)

    for index, group in enumerate(groups):
        if arguments.deadline and time.monotonic() - start > arguments.deadline:
            runner.end_at_deadline([case for late in groups[index:] for case in late])
            break
        runner.stage = f"[{index + 1}/{len(groups)}] "
        runner.run(group)
        record()
    record()
