"""Draws the picture of a results file: `python -m benchmarks.draw RESULTS.json PICTURE.png`."""

from __future__ import annotations

import argparse
from pathlib import Path

import benchmarks.hidden.picture
import benchmarks.logits.picture
import benchmarks.logprobs.picture
from benchmarks.harness import results

PICTURES = {
    "logprobs": benchmarks.logprobs.picture.draw,
    "logits": benchmarks.logits.picture.draw,
    "hidden": benchmarks.hidden.picture.draw,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draw", description=__doc__)
    parser.add_argument("results", type=Path, help="what a benchmark wrote by --json")
    parser.add_argument("picture", type=Path, help="where the picture goes (png)")
    arguments = parser.parse_args(argv)
    try:
        content = results.read(arguments.results)
    except ValueError as error:
        parser.error(str(error))
    benchmark = content["benchmark"]
    if benchmark not in PICTURES:
        parser.error(f"{arguments.results}: expected one of {', '.join(PICTURES)}, got {benchmark}")
    PICTURES[benchmark](content, arguments.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
