"""Times the logits kernel alone on a GPU, without Python's launches, beside a plain copy."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.harness import results, words
from benchmarks.harness.command import base_parser, begin
from benchmarks.harness.terminal import Terminal
from benchmarks.logits.batch import CONFIG, DTYPES, make_batch
from ipo_ext._ops import library
from ipo_ext._ops.arguments import LogitScaling, LossInputs

NAME = "logits.kernel"
AHEAD = 400_000  # cycles that the device is kept busy, so that launches wait for it


class Case(NamedTuple):
    rows: int
    columns: int
    logits: str  # dtype
    gradient: str  # dtype
    active: int  # percent of the rows


DEFAULT_CASES = [
    *(Case(8192, 151_936, *dtypes) for dtypes in (("bf16", "bf16", 100), ("bf16", "bf16", 50))),
    *(Case(8192, 151_936, "fp32", gradient, 100) for gradient in ("fp32", "bf16")),
    *(
        Case(rows, columns, dtype, dtype, 100)
        for columns in (32_000, 65_536, 128_256, 200_064, 262_144)
        for dtype in ("bf16", "fp32")
        for rows in (256, 2048, 8192)
    ),
]


def microseconds(work: Callable[[], object], repeats: int) -> float:
    """The median, by events around work that is queued before the device gets to it."""
    work()
    taken = []
    for _ in range(repeats):
        torch.cuda._sleep(AHEAD)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(taken)


def calls(case: Case, device: str = "cuda") -> dict[str, Callable[[], torch.Tensor | None]]:
    """The kernel with the gradient, which it returns, and without; a copy to the same memory."""
    batch = make_batch(case.rows, case.columns, case.logits, device)
    logits, labels, inference_logprobs, advantages, _ = (tensor.detach() for tensor in batch)
    mask = torch.rand(case.rows, device=device) * 100 < case.active
    gradient = torch.empty_like(logits, dtype=DTYPES[case.gradient])
    is_fp16 = gradient.dtype == torch.float16
    row_scales = torch.empty(case.rows, device=device) if is_fp16 else None
    operators = library.operators()
    fault, _ = operators.find_faults(
        labels, None, None, None, mask, None, None, case.columns, case.rows
    )

    def kernel(into: torch.Tensor | None) -> torch.Tensor | None:
        operators.chunk_logprobs_and_gradient(
            *(logits, labels),
            *LogitScaling(None, 0.0),
            *LossInputs(inference_logprobs, advantages, mask),
            *CONFIG.settings(torch.float32),
            *(fault, into, None if into is None else row_scales),
        )
        return into

    return {
        "with_gradient": lambda: kernel(gradient),
        "forward": lambda: kernel(None),
        "copy": lambda: gradient.copy_(logits),
    }


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """A row of the results: the median microseconds of each call."""
    times = {name: microseconds(call, repeats) for name, call in calls(case).items()}
    return {**case._asdict(), "microseconds": times}


def lines(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        times = row["microseconds"]
        yield [
            f"{row['rows']:,} x {row['columns']:,}",
            f"{row['logits']} to {row['gradient']}",
            f"{row['active']}%",
            *(words.duration(times[what] * 1e-6) for what in ("with_gradient", "forward", "copy")),
            f"{times['copy'] / times['with_gradient']:.2f}",
        ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = base_parser(NAME, __doc__, devices=["cuda"])
    parser.add_argument("--repeats", type=int, default=7, help="timings of each (default 7)")
    arguments = parser.parse_args(argv)
    terminal = Terminal()
    content = begin(NAME, arguments, terminal)
    if content is None:
        return 2
    content["results"] = []
    for index, case in enumerate(DEFAULT_CASES):
        terminal.progress(f"[{index + 1}/{len(DEFAULT_CASES)}] {' '.join(map(str, case))}")
        content["results"].append(measure(case, arguments.repeats))
    columns = ["", "dtypes", "active", "with gradient", "forward", "copy", "copy / with gradient"]
    terminal.table("The kernel alone, medians", columns, list(lines(content["results"])))
    if arguments.json:
        results.write(arguments.json, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
