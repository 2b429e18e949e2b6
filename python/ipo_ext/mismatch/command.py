"""The command: from files to a report, in one pass over them."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ipo_ext import IPOConfig

from .causes import causes
from .counterfactuals import Laboratory
from .extras import Missing, need
from .page import write_page
from .picture import write_png
from .policy import DTYPES, BadModel, Policy, load
from .progress import Progress
from .readers import Found, Problem, Refused, read
from .recomputation import check_vocabulary, with_trainer_logprobs
from .report import SHOWN_PROBLEMS, Report, as_text, speller
from .rollouts import BadRecord, Rollout
from .sample import Sample
from .statistics import Statistics

DESCRIPTION = """\
Says how far trainer and engine are apart in files of rollouts, and what that looks like: a shift,
a temperature, raw log-probabilities, a truncated sampler, missing values, old weights, low
precision. Reads prime-rl's token exports and batches, verifiers' traces, responses of vLLM, SGLang
and llama.cpp with token ids, and what ipo_ext.mismatch.dump writes; the format is found by what a
file holds. Trainer log-probabilities that a file lacks are recomputed with --model."""


class BadOutput(ValueError):
    """A path to which no report can be written: in words, why."""


class Problems:
    """What was left out: all of it counted, the first shown."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.first: list[Problem] = []
        self.count = 0

    def add(self, problem: Problem) -> None:
        self.count += 1
        if len(self.first) < SHOWN_PROBLEMS:
            self.first.append(problem)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with arguments (None: those of the process).

    Returns:
        The exit status: 0, or 1 if a file was refused or nothing could be compared.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except (BadModel, BadOutput, Missing) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(arguments: argparse.Namespace) -> int:
    progress = Progress()
    problems = Problems(progress)
    files = [Found(path) for path in arguments.files]
    _check_outputs(arguments)
    policy = _loaded(arguments.model, arguments, progress)
    previous = _loaded(arguments.previous, arguments, progress)
    _check_previous(previous, policy)
    refused: list[str] = []
    rollouts = _all_rollouts(files, refused, problems, progress)
    rollouts = _comparable(rollouts, policy, problems)
    rollouts = _limited(rollouts, arguments.limit)
    statistics, sample = Statistics(dict(arguments.band)), Sample()
    compared = with_trainer_logprobs(rollouts, policy, arguments.temperature)
    for rollout in progress.watch(compared):
        statistics.add(rollout)
        sample.offer(rollout)
    statistics.finish()
    if not statistics.tokens:
        for problem in problems.first:
            progress.note(f"error: {problem}")
        progress.note("error: no token of these files could be compared")
        return 1
    laboratory = Laboratory(sample.rollouts, policy, previous, arguments.temperature)
    report = Report(
        _setting(arguments, policy),
        [found for found in files if found.format],
        problems.first,
        problems.count,
        statistics,
        causes(laboratory, statistics),
        speller(policy.tokenizer if policy else None),
    )
    print(as_text(report))
    _write(report, arguments)
    return 1 if refused else 0


def _write(report: Report, arguments: argparse.Namespace) -> None:
    if arguments.html is not None:
        with _in_words("--html", arguments.html):
            without_picture = write_page(report, arguments.html)
        print(f"\npage: {arguments.html}" + (f" ({without_picture})" if without_picture else ""))
    if arguments.png is not None:
        with _in_words("--png", arguments.png):
            write_png(report, arguments.png)
        print(f"picture: {arguments.png}")


@contextlib.contextmanager
def _in_words(option: str, path: Path) -> Iterator[None]:
    """Of what cannot be known before it is written, a full disk for instance."""
    try:
        yield
    except OSError as error:
        raise BadOutput(f"{option} {path}: cannot be written: {error.strerror or error}") from error


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raises before anything is computed what writing would raise after it."""
    if arguments.png is not None:
        if arguments.png.suffix.lower() != ".png":
            raise BadOutput(f"--png {arguments.png}: expected a name that ends with .png")
        need("matplotlib", "the picture")
    for option, path in (("--html", arguments.html), ("--png", arguments.png)):
        if path is not None and (why := _why_unwritable(path)):
            raise BadOutput(f"{option} {path}: cannot be written: {why}")


def _why_unwritable(path: Path) -> str | None:
    """None where a file can be written, in folders that exist or in new ones."""
    if path.is_dir():
        return "it is a folder"
    there = next(each for each in (path, *path.parents) if each.exists())
    if there != path and not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK) else f"{there} is write-protected"


def _check_previous(previous: Policy | None, policy: Policy | None) -> None:
    if previous is None:
        return
    if policy is None:
        raise BadModel("--previous: expected --model DIR beside it, got none")
    shape, expected = (list(each.head.weight.shape) for each in (previous, policy))
    if shape != expected:
        raise BadModel(
            f"--previous {previous.name}: expected a head of the shape of {policy.name}'s, "
            f"{expected}, got {shape}; give earlier weights of the same model"
        )


def _loaded(
    directory: str | None, arguments: argparse.Namespace, progress: Progress
) -> Policy | None:
    if directory is None:
        return None
    progress.note(f"loading {directory}")
    policy = load(directory, dtype=arguments.dtype, device=arguments.device)
    if policy.tokenizer is None:
        progress.note(f"{directory}: no tokenizer in it; tokens are shown by their ids")
    return policy


def _all_rollouts(
    files: Iterable[Found], refused: list[str], problems: Problems, progress: Progress
) -> Iterator[Rollout]:
    """Of one file after the other; one that is refused is named, and the next is read."""
    for found in files:
        try:
            yield from read(found.path, found, problems.add)
        except (Refused, Missing) as error:
            refused.append(f"{found.path} {error}")
            progress.note(f"error: {found.path}: {error}")


def _comparable(
    rollouts: Iterable[Rollout], policy: Policy | None, problems: Problems
) -> Iterator[Rollout]:
    """Those of which both log-probabilities are known or can be made."""
    for rollout in rollouts:
        try:
            if policy is not None:
                check_vocabulary(rollout, policy.vocabulary)
            elif rollout.trainer_logprobs is None:
                raise BadRecord(
                    "has the engine's log-probabilities alone; the trainer's are recomputed with "
                    "--model DIR, a directory that transformers reads"
                )
        except BadRecord as error:
            problems.add(Problem(rollout.where, str(error)))
            continue
        yield rollout


def _limited(rollouts: Iterable[Rollout], limit: int | None) -> Iterator[Rollout]:
    """Until so many tokens were sampled."""
    tokens = 0
    for rollout in rollouts:
        yield rollout
        tokens += int(rollout.sampled.sum())
        if limit is not None and tokens >= limit:
            return


def _setting(arguments: argparse.Namespace, policy: Policy | None) -> str:
    if policy is None:
        return "trainer: the log-probabilities in the files"
    at = "the files' own, else 1"
    if arguments.temperature is not None:
        at = f"{arguments.temperature:g}"
    return (
        f"trainer: the files' log-probabilities, or {policy.name} in {arguments.dtype} on "
        f"{policy.device}, logits divided by a temperature ({at})"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ipo_ext mismatch", description=DESCRIPTION)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="rollouts")
    parser.add_argument(
        "--model", metavar="DIR", help="the trainer's weights, read by transformers"
    )
    parser.add_argument(
        "--previous", metavar="DIR", help="weights that the engine may have had instead"
    )
    parser.add_argument(
        "--html", type=Path, metavar="OUT", help="also write one page with picture and tables"
    )
    parser.add_argument("--png", type=Path, metavar="OUT", help="also write the picture")
    parser.add_argument(
        "--temperature",
        type=_temperature,
        metavar="T",
        help="what the trainer divides logits by (default: what the file says, else 1)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the trainer's weights and arithmetic (default %(default)s)",
    )
    parser.add_argument("--device", help="for instance cpu or cuda (default: cuda if there is one)")
    parser.add_argument(
        "--limit", type=_positive, metavar="TOKENS", help="stop after so many sampled tokens"
    )
    parser.add_argument(
        "--band",
        type=_band,
        action="append",
        default=[],
        metavar="LOW,HIGH",
        help="also say what a band on the ratio would drop; may be given again",
    )
    return parser


def _temperature(text: str) -> float:
    """An argparse type: a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _band(text: str) -> tuple[str, IPOConfig]:
    """An argparse type: "0.1,10" as the configuration of that band, and its name."""
    low, comma, high = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH, for instance 0.1,10, got {text}")
    try:
        config = IPOConfig(dppo_mask_low=float(low), dppo_mask_high=float(high))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return f"ratio in [{float(low):g}, {float(high):g}]", config
