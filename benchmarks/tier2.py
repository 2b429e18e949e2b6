"""Times the loss from logits over a grid of rows and columns, its peak memory beside it."""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import report
import tier1
import timing
import torch
from tier2_providers import PROVIDERS, Batch, Forward, elsewhere, expected, make_batch

GRAD_OUTS = (1.0, 0.5)
PHASES = ("forward", "backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LARGEST_ERROR = {"fp32": 1e-5, "bf16": 5e-3}  # of a gradient, relative: bf16 rounds by 1e-3


class Case(NamedTuple):
    rows: int
    columns: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.columns:,} {self.dtype}"

    @property
    def bytes(self) -> int:
        return self.rows * self.columns * DTYPES[self.dtype].itemsize


TARGET_CASES = (Case(256, 32_000, "fp32"), Case(256, 32_000, "bf16"))
CUDA_TARGET_CASE = Case(8192, 151_936, "bf16")


# ---- What is timed ----


def train_step(forward: Forward, batch: Batch, grad_out: torch.Tensor | None) -> timing.Step:
    def step(mark: timing.Mark) -> object:
        loss, backward = forward(batch)
        mark()
        gradient = backward(grad_out)
        mark()
        return loss, gradient

    return step


def copy_step(batch: Batch) -> timing.Step:
    """The floor: the logits read once, as much written, to new memory as a gradient is."""
    source = batch.logits.detach()

    def step(mark: timing.Mark) -> object:
        copy = source.clone()
        mark()
        return copy

    return step


def keep_freed_memory() -> bool:
    """Has glibc hand freed memory out again instead of back to the system; whether it could.

    Its own thresholds depend on what was freed before: one subject would pay for another's pages.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim_threshold, mmap_max = -1, -4  # M_ of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def peak_bytes(step: timing.Step, device: str) -> int:
    """The most that a step allocates at once, what it returns included."""

    def run() -> object:
        return step(lambda: None)

    run()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del kept
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


# ---- Correct first ----


def errors(
    forward: Forward, batch: Batch, wanted: tuple[float, torch.Tensor], dtype: str
) -> dict[str, float]:
    """How far loss and gradient are from float64; raises if too far."""
    exact_loss, exact_gradient = wanted
    loss, backward = forward(batch)
    gradient = backward(None).float()
    found = {
        "loss": abs(loss.item() - exact_loss) / len(batch.labels),  # of terms of about 1
        "gradient": float((gradient - exact_gradient).norm() / exact_gradient.norm()),
    }
    for name, error in found.items():
        if not error < (LARGEST_ERROR[dtype] if name == "gradient" else 1e-5):
            raise ValueError(f"{name}: relative error {error:.1e}")
    return found


# ---- One case ----


class Runner:
    """Prepares, checks and times the providers of each case; collects rows for the JSON."""

    def __init__(self, arguments: argparse.Namespace, terminal: report.Terminal) -> None:
        self.arguments = arguments
        self.terminal = terminal
        self.device: str = arguments.device
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.wrong = False
        self._missing: set[str] = set()

    def run(self, case: Case) -> None:
        torch._dynamo.reset()  # a compiled function for each shape, not one for all
        batch = make_batch(case.rows, case.columns, DTYPES[case.dtype], self.device)
        forwards, checks = self._prepared(case, batch)
        steps = {
            name: train_step(forward, self._own(name, batch), None)
            for name, forward in forwards.items()
        }
        peaks = {name: peak_bytes(step, self.device) for name, step in steps.items()}
        for grad_out in GRAD_OUTS:
            self.terminal.progress(f"{case}: timing, grad_out {grad_out:g}")
            clock, turns = self._turns(case, batch, forwards, grad_out)
            for name, values in timing.interleave(turns, clock, self.arguments.plan).items():
                facts = {"peak_bytes": peaks.get(name, case.bytes)}
                if name in checks:
                    facts["relative_errors"] = checks[name]
                self.rows.append(self._row(case, name, grad_out, values) | facts)

    def _prepared(
        self, case: Case, batch: Batch
    ) -> tuple[dict[str, Forward], dict[str, dict[str, float]]]:
        """The providers that are there and agree with float64; their errors."""
        forwards, checks = {}, {}
        wanted: dict[Callable[..., Any], tuple[float, torch.Tensor]] = {}
        for name in self.arguments.providers:
            if name in self._missing:
                continue
            self.terminal.progress(f"{case}: checking {PROVIDERS[name].label}")
            try:
                forward = PROVIDERS[name].make()
                loss = PROVIDERS[name].expected
                if loss not in wanted:
                    wanted[loss] = expected(loss, batch)
                checks[name] = errors(forward, self._own(name, batch), wanted[loss], case.dtype)
            except ValueError as error:
                self.wrong = True
                self._leave_out(case, name, f"wrong: {error}")
            except Exception as error:  # a package or a compiler that is missing, say
                self._missing.add(name)
                self._leave_out(case, name, f"unavailable, here and after: {_first_line(error)}")
            else:
                forwards[name] = forward
        return forwards, checks

    def _own(self, name: str, batch: Batch) -> Batch:
        return elsewhere(batch) if PROVIDERS[name].overwrites else batch

    def _turns(
        self, case: Case, batch: Batch, forwards: Mapping[str, Forward], grad_out: float
    ) -> tuple[timing.Clock, dict[str, list[timing.Step]]]:
        """Steps to interleave; on a GPU over batches that are together larger than its L2 cache."""
        factor = None if grad_out == 1 else torch.tensor(grad_out, device=self.device)
        batches, clock = [batch], timing.WallClock()
        if self.device == "cuda":
            count = timing.sets_beyond_cache(case.bytes, timing.l2_bytes())
            batches += [elsewhere(batch) for _ in range(count - 1)]
            clock = timing.EventClock()
        turns = {
            name: [train_step(forward, self._own(name, each), factor) for each in batches]
            for name, forward in forwards.items()
        }
        return clock, {**turns, "copy": [copy_step(each) for each in batches]}

    def _row(
        self, case: Case, name: str, grad_out: float, values: list[timing.Durations]
    ) -> dict[str, Any]:
        seconds = {"total": timing.summarise([sum(value) for value in values])._asdict()}
        if name != "copy":
            for index, phase in enumerate(PHASES):
                each = [value[index] for value in values]
                seconds[phase] = timing.summarise(each)._asdict()
        clock = "events" if self.device == "cuda" else "wall"
        of_row = {"provider": name, "grad_out": grad_out, "clock": clock}
        return {**case._asdict(), **of_row, "seconds": seconds}

    def _leave_out(self, case: Case, name: str, reason: str) -> None:
        self.left_out.append({**case._asdict(), "provider": name, "reason": reason})
        self.terminal.line(f"{case}: {name} left out, {reason}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---- Ratios and targets ----


def row_of(
    rows: list[dict[str, Any]], case: Case, name: str, grad_out: float = 1.0
) -> dict[str, Any] | None:
    match = {**case._asdict(), "provider": name, "grad_out": grad_out}
    return next((row for row in rows if match.items() <= row.items()), None)


def total(
    rows: list[dict[str, Any]], case: Case, name: str, grad_out: float = 1.0
) -> timing.Summary | None:
    """The whole step of a provider."""
    row = row_of(rows, case, name, grad_out)
    return timing.Summary(**row["seconds"]["total"]) if row else None


def cases_of(rows: list[dict[str, Any]]) -> list[Case]:
    cases = {Case(row["rows"], row["columns"], row["dtype"]) for row in rows}
    return sorted(cases, key=lambda case: (case.dtype, case.rows * case.columns))


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every provider's whole step over ipo_ext's of the same case and run."""
    found = []
    for row in rows:
        case = Case(row["rows"], row["columns"], row["dtype"])
        ours = total(rows, case, "ipo_ext", row["grad_out"])
        if ours and row["provider"] != "ipo_ext":
            theirs = timing.Summary(**row["seconds"]["total"])
            of_row = {"provider": row["provider"], "grad_out": row["grad_out"]}
            found.append({**case._asdict(), **of_row, **timing.ratio(theirs, ours)._asdict()})
    return found


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What this project asks of itself, met or missed by the ratio of medians."""

    def target(what: str, ratio: timing.Ratio, wanted: float) -> dict[str, Any]:
        met = ratio.value >= wanted
        return {"what": what, **ratio._asdict(), "wanted": f"at least {wanted:g}", "met": met}

    found = []
    for case in TARGET_CASES:
        ours, eager, compiled = (
            total(rows, case, name) for name in ("ipo_ext", "eager", "compiled")
        )
        if ours and eager and compiled:
            fastest = min(eager, compiled, key=lambda summary: summary.median)
            what = f"faster of eager and torch.compile / ipo_ext, {case}"
            found.append(target(what, timing.ratio(fastest, ours), 2))
    ours, copy = (total(rows, CUDA_TARGET_CASE, name) for name in ("ipo_ext", "copy"))
    if ours and copy:
        what = f"share of copy bandwidth, {CUDA_TARGET_CASE}"
        found.append(target(what, timing.ratio(copy, ours), 0.91))
    return found


# ---- Words ----


def print_tables(rows: list[dict[str, Any]], terminal: report.Terminal) -> None:
    for grad_out in GRAD_OUTS:
        lines = [
            _line(rows, row, case)
            for case in cases_of(rows)
            for name in (*PROVIDERS, "copy")
            if (row := row_of(rows, case, name, grad_out))
        ]
        columns = ["", "", *PHASES, "both", "quartiles", "/ ipo_ext (range)", "peak / logits"]
        terminal.table(f"Medians, grad_out {grad_out:g}", columns, lines)


def _line(rows: list[dict[str, Any]], row: dict[str, Any], case: Case) -> list[str]:
    name = row["provider"]
    seconds = {phase: timing.Summary(**value) for phase, value in row["seconds"].items()}
    whole, ours = seconds["total"], total(rows, case, "ipo_ext", row["grad_out"])
    ratio = ""
    if ours and name != "ipo_ext":
        value, low, high = timing.ratio(whole, ours)
        ratio = f"{value:.3g} ({low:.3g} - {high:.3g})"
    return [
        str(case),
        PROVIDERS[name].label if name in PROVIDERS else name,
        *(report.duration(seconds[p].median) if p in seconds else "-" for p in PHASES),
        report.duration(whole.median),
        f"{report.duration(whole.lower)} - {report.duration(whole.upper)}",
        ratio,
        f"{row['peak_bytes'] / case.bytes:.2f}",
    ]


# ---- Command line ----


def default_cases(device: str, quick: bool) -> list[Case]:
    """The cases of the targets first: what a run that is cut short should not miss."""
    sizes = [(rows, columns) for columns in (4096, 32_000, 128_256) for rows in (16, 256)]
    first = list(TARGET_CASES)
    if quick:
        sizes, first = [(4, 1000), (16, 1000)], []
    elif device == "cuda":
        sizes = [(r, c) for c in (32_000, 128_256, 151_936, 262_144) for r in (16, 1024, 8192)]
        first = [CUDA_TARGET_CASE]
    cases = [Case(*size, dtype) for dtype in DTYPES for size in sizes]
    return first + [case for case in cases if case not in first]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/tier2.py", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default 2)")
    parser.add_argument(
        "--providers",
        type=lambda text: text.split(","),
        default=list(PROVIDERS),
        help=f"separated by commas, of {', '.join(PROVIDERS)} (default all)",
    )
    parser.add_argument(
        "--sizes",
        type=lambda text: [tuple(map(int, size.split("x"))) for size in text.split(",")],
        help="rows x columns, separated by commas: 256x32000,16x128256",
    )
    parser.add_argument("--seconds", type=float, help="of timing for a case and grad_out")
    parser.add_argument("--deadline", type=float, help="start no case after this many seconds")
    parser.add_argument("--quick", action="store_true", help="two small sizes, little time")
    parser.add_argument("--json", type=Path, help="write every median and spread here")
    parser.add_argument("--picture", type=Path, help="draw time and memory here (png)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.providers) - set(PROVIDERS):
        parser.error(f"--providers: expected some of {', '.join(PROVIDERS)}, got {sorted(unknown)}")
    seconds = arguments.seconds or (0.1 if arguments.quick else 2.0)
    arguments.plan = timing.Plan(seconds=seconds)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    terminal = report.Terminal()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        terminal.line("benchmarks/tier2.py: --device cuda, but torch sees no GPU")
        return 2
    start = time.monotonic()
    content = {"benchmark": "tier2", **report.facts(arguments.device)}
    if warning := report.busy(content["machine"]):
        terminal.line(warning)
    content["settings"] = {
        "seconds": arguments.plan.seconds,
        "freed_memory_is_kept": arguments.device == "cpu" and keep_freed_memory(),
        "providers": {name: f"{p.label}: {p.note}" for name, p in PROVIDERS.items()},
    }
    cases = default_cases(arguments.device, arguments.quick)
    if arguments.sizes:
        cases = [Case(*size, dtype) for dtype in DTYPES for size in arguments.sizes]
    runner = Runner(arguments, terminal)
    for index, case in enumerate(cases):
        if arguments.deadline and time.monotonic() - start > arguments.deadline:
            terminal.line(f"deadline: left out {', '.join(map(str, cases[index:]))}")
            runner.left_out += [{**left._asdict(), "reason": "deadline"} for left in cases[index:]]
            break
        runner.run(case)
        content |= {"results": runner.rows, "ratios": ratios(runner.rows)}
        content |= {"targets": targets(runner.rows), "left_out": runner.left_out}
        if arguments.json:
            report.write_json(arguments.json, content)
    content["seconds_taken"] = round(time.monotonic() - start, 1)
    if arguments.json:
        report.write_json(arguments.json, content)
    print_tables(runner.rows, terminal)
    tier1.print_targets(content.get("targets", []), terminal)
    if arguments.picture:
        import tier2_picture

        tier2_picture.draw(content, arguments.picture)
    return 1 if runner.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
