"""Times tier 1, every metric read, against upstream's loop, eager torch and torch.compile."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import baselines
import report
import timing
import torch
from baselines import Batch

import ipo_ext

MEAN_LENGTH = 1024  # tokens of a packed sequence: 64 sequences at 65,536
BYTES_PER_TOKEN = 17  # read: three floats and a bool; written: the gradient
GRAD_OUTS = (1.0, 0.5)
PHASES = ("forward", "backward", "read")
LABELS = {
    "ipo_ext": "ipo_ext",
    "upstream_loop": "upstream's loop",
    "packed_eager": "eager, packed",
    "packed_compiled": "torch.compile, packed",
    "packed_compiled_metrics": "torch.compile with metrics",
    "copy": "copy",
}
NOTES = {
    "ipo_ext": "forward, backward, all 14 metrics read",
    "upstream_loop": "forward, backward, its 6 metrics read",
    "packed_eager": "forward, backward, no metrics",
    "packed_compiled": "forward, backward, no metrics",
    "packed_compiled_metrics": "forward, backward, upstream's 6 metrics read",
    "copy": f"{BYTES_PER_TOKEN} bytes a token",
}
PROVIDERS = tuple(name for name in LABELS if name != "copy")


class Case(NamedTuple):
    tokens: int
    sequences: int

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens in {self.sequences:,} sequence{'s' * (self.sequences > 1)}"


TARGET_CASE = Case(65_536, 64)
CUDA_TARGET_CASE = Case(131_072, 64)
CUDA_LARGE_CASE = Case(2**24, 2**24 // MEAN_LENGTH)


# ---- What is timed ----

Call = Callable[[Batch], tuple[torch.Tensor, Any]]


def provider(name: str) -> Call:
    """(batch) -> (loss, metrics or None)."""
    if name == "ipo_ext":
        return _ipo_ext
    if name == "upstream_loop":
        return baselines.upstream_loop
    if name == "packed_eager":
        return baselines.packed
    if name == "packed_compiled":
        return baselines.compiled(baselines.packed)
    assert name == "packed_compiled_metrics", name
    return baselines.compiled(baselines.packed_with_metrics)


def _ipo_ext(batch: Batch) -> tuple[torch.Tensor, ipo_ext.IPOMetrics]:
    loss, metrics, *_ = ipo_ext.ipo_loss(
        batch.trainer_logprobs,
        batch.inference_logprobs,
        batch.advantages,
        batch.loss_mask,
        teacher_logprobs=batch.teacher_logprobs,
        cu_seqlens=batch.cu_seqlens,
        normalizer=batch.loss_scale,
        config=batch.config,
    )
    assert isinstance(metrics, ipo_ext.IPOMetrics)
    return loss, metrics


def read(metrics: Any) -> Any:
    """Every metric in host memory, as each form gets there fastest."""
    if metrics is None:
        return None
    if isinstance(metrics, ipo_ext.IPOMetrics):
        return metrics.tolist()
    return torch.stack(list(metrics.values())).tolist()


def train_step(call: Call, batch: Batch, grad_out: torch.Tensor | None) -> timing.Step:
    """Forward, backward, and reading the metrics, a mark after each."""

    def step(mark: timing.Mark) -> object:
        loss, metrics = call(batch)
        mark()
        gradient = torch.autograd.grad(loss, batch.trainer_logprobs, grad_out)
        mark()
        numbers = read(metrics)
        mark()
        return gradient, numbers

    return step


def copy_step(tokens: int, device: str) -> timing.Step:
    """A plain copy that moves as many bytes as the loss must, half of them read, half written."""
    source = torch.rand(tokens * BYTES_PER_TOKEN // 8, device=device)
    target = torch.empty_like(source)

    def step(mark: timing.Mark) -> object:
        target.copy_(source)
        mark()
        return target

    return step


# ---- Correct first ----


def errors(call: Call, batch: Batch) -> dict[str, float]:
    """How far loss, gradient and metrics are from the reference in float64; raises if too far."""
    packed = len(batch.lengths) <= 512  # the reference takes a segment at a time
    expected = ipo_ext.reference.ipo_loss(
        *batch[:4],
        teacher_logprobs=batch.teacher_logprobs,
        cu_seqlens=batch.cu_seqlens if packed else None,
        normalizer=batch.loss_scale,
        config=batch.config,
        dtype=torch.float64,
    )
    (gradient,) = torch.autograd.grad(expected.loss, batch.trainer_logprobs)
    loss, metrics = call(batch)
    (ours,) = torch.autograd.grad(loss, batch.trainer_logprobs)
    found = {
        # Relative to the terms that were added up, not to what is left of them.
        "loss": float((loss - expected.loss).detach().abs() / gradient.abs().sum()),
        "gradient": float((ours - gradient).norm() / gradient.norm()),
    }
    if not torch.equal(ours == 0, gradient == 0):
        raise ValueError("other tokens were dropped than by the reference")
    if metrics is not None and packed:
        found["metrics"] = max(
            float(((metrics[name] - value).abs() / (value.abs() + 1e-2)).max())
            for name, value in expected.metrics.items()
            if name in metrics
        )
    for name, error in found.items():
        if not error < (1e-4 if name == "metrics" else 1e-5):
            raise ValueError(f"{name}: relative error {error:.1e}")
    return found


# ---- One case ----


class Runner:
    """Prepares, checks and times the providers of each case; collects rows for the JSON."""

    def __init__(self, arguments: argparse.Namespace, terminal: report.Terminal) -> None:
        self.arguments = arguments
        self.terminal = terminal
        self.device = arguments.device
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.wrong = False

    def run(self, case: Case) -> None:
        torch._dynamo.reset()  # a compiled function for each shape, not one for all
        batch = baselines.make_batch(*case, device=self.device)
        calls, checks = self._prepared(case, batch)
        for grad_out in GRAD_OUTS:
            self.terminal.progress(f"{case}: timing, grad_out {grad_out:g}")
            clock, steps = self._steps(case, batch, calls, grad_out)
            timings = timing.interleave(steps, clock, self.arguments.plan)
            for name, values in timings.items():
                self._add(case, name, grad_out, self._clock_name(), values, checks.get(name))
        if self.device == "cuda":
            self.terminal.progress(f"{case}: timing, graph replay")
            self._graphs(case, batch, calls)
            self._audit(case, batch)

    def _prepared(self, case: Case, batch: Batch) -> tuple[dict[str, Call], dict[str, Any]]:
        """The providers that work, agree with the reference and are fast enough; their errors."""
        calls: dict[str, Call] = {}
        checks: dict[str, Any] = {}
        for name in self.arguments.providers:
            self.terminal.progress(f"{case}: checking {LABELS[name]}")
            try:
                call = provider(name)
                checks[name] = errors(call, batch)
            except ValueError as error:
                self.wrong = True
                self._leave_out(case, name, f"wrong: {error}")
                continue
            except Exception as error:  # a compiler that is missing, say: the others still run
                self._leave_out(case, name, f"unavailable: {_first_line(error)}")
                continue
            start = time.perf_counter()
            call(batch)
            if (seconds := time.perf_counter() - start) > max(self.arguments.plan.seconds, 1):
                self._leave_out(case, name, f"too slow: {report.duration(seconds)} forward")
                continue
            calls[name] = call
        return calls, checks

    def _steps(
        self, case: Case, batch: Batch, calls: Mapping[str, Call], grad_out: float
    ) -> tuple[timing.Clock, dict[str, list[timing.Step]]]:
        factor = None if grad_out == 1 else torch.tensor(grad_out, device=self.device)
        batches, clock = [batch], timing.WallClock()
        if self.device == "cuda":
            batches = self._rotated(case, batch)
            rotates = len(batches) * case.tokens * BYTES_PER_TOKEN > timing.l2_bytes()
            flush = self.arguments.flush and not rotates
            clock = timing.EventClock(timing.flush_buffer() if flush else None)
        steps = {
            name: [train_step(call, each, factor) for each in batches]
            for name, call in calls.items()
        }
        steps["copy"] = [copy_step(case.tokens, self.device) for _ in batches]
        return clock, steps

    def _rotated(self, case: Case, batch: Batch) -> list[Batch]:
        """The batch and copies of it in other memory, together larger than the L2 cache."""
        count = timing.sets_beyond_cache(case.tokens * BYTES_PER_TOKEN, timing.l2_bytes())
        return [batch, *(_elsewhere(batch) for _ in range(max(count, 2) - 1))]

    def _graphs(self, case: Case, batch: Batch, calls: Mapping[str, Call]) -> None:
        """Device time without Python: graphs over rotated inputs; metrics stay on the device."""
        batches = self._rotated(case, batch)
        one = torch.ones((), device="cuda")
        steps = {"copy": [_copy_graph(case.tokens, len(batches))]}
        for name in ("ipo_ext", "packed_eager", "packed_compiled", "packed_compiled_metrics"):
            if name not in calls:
                continue
            for backward in (False, True):
                key = name if backward else f"{name}/forward"
                try:
                    steps[key] = [_graph(calls[name], batches, one if backward else None)]
                except Exception as error:
                    self._leave_out(case, key, f"graph capture failed: {_first_line(error)}")
                    torch.cuda.synchronize()
        timings = timing.interleave(steps, timing.EventClock(), self.arguments.plan)
        for key, values in timings.items():
            each = [tuple(seconds / len(batches) for seconds in value) for value in values]
            name, _, forward = key.partition("/")
            self._add(case, name, 1.0, "graph/forward" if forward else "graph", each, None)

    def _audit(self, case: Case, batch: Batch) -> None:
        """How many kernels ipo_ext's forward launches, and whether a step waits for the device."""
        row = next(
            row
            for row in self.rows
            if row["tokens"] == case.tokens
            and row["sequences"] == case.sequences
            and row["provider"] == "ipo_ext"
        )
        row["host_synchronisation"] = _synchronises(batch)
        row["forward_launches"] = _launches(batch)

    def _clock_name(self) -> str:
        return "events" if self.device == "cuda" else "wall"

    def _add(
        self,
        case: Case,
        name: str,
        grad_out: float,
        clock: str,
        values: list[timing.Durations],
        check: dict[str, float] | None,
    ) -> None:
        phases = PHASES[: len(values[0])] if len(values[0]) > 1 else ()
        row: dict[str, Any] = {
            "tokens": case.tokens,
            "sequences": case.sequences,
            "provider": name,
            "grad_out": grad_out,
            "clock": clock,
            "seconds": {
                phase: timing.summarise([value[index] for value in values])._asdict()
                for index, phase in enumerate(phases)
            },
        }
        row["seconds"]["total"] = timing.summarise([sum(value) for value in values])._asdict()
        if check is not None:
            row["relative_errors"] = check
        self.rows.append(row)

    def _leave_out(self, case: Case, name: str, reason: str) -> None:
        self.left_out.append({**case._asdict(), "provider": name, "reason": reason})
        self.terminal.line(f"{case}: {name} left out, {reason}")


def _elsewhere(batch: Batch) -> Batch:
    copied = [
        value.detach().clone() if isinstance(value, torch.Tensor) else value for value in batch
    ]
    copied[0].requires_grad_()
    return Batch(*copied)


def _graph(call: Call, batches: list[Batch], grad_out: torch.Tensor | None) -> timing.Step:
    def once(batch: Batch) -> object:
        loss, metrics = call(batch)
        if grad_out is None:
            return loss, metrics
        return torch.autograd.grad(loss, batch.trainer_logprobs, grad_out), loss, metrics

    return timing.graph_step([lambda each=each: once(each) for each in batches])


def _copy_graph(tokens: int, count: int) -> timing.Step:
    def nothing() -> None:
        pass

    copies = [copy_step(tokens, "cuda") for _ in range(count)]
    return timing.graph_step([lambda each=each: each(nothing) for each in copies])


def _synchronises(batch: Batch) -> bool:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = _ipo_ext(batch)
        torch.autograd.grad(loss, batch.trainer_logprobs)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _launches(batch: Batch) -> int | None:
    """Kernels of one forward pass; None where the profiler sees no device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        _ipo_ext(batch)
        torch.cuda.synchronize()
    on_device = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "emcpy" not in event.name
    ]
    return len(on_device) or None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---- Ratios and targets ----


def total(
    rows: list[dict[str, Any]], case: Case, name: str, **wanted: Any
) -> timing.Summary | None:
    """The whole step of a provider; `wanted` overrides grad_out, clock and phase."""
    phase = wanted.pop("phase", "total")
    match = {"tokens": case.tokens, "sequences": case.sequences, "provider": name, "grad_out": 1.0}
    match |= wanted
    for row in rows:
        fits = all(row[key] == value for key, value in match.items())
        if fits and (row["clock"] in ("wall", "events") or "clock" in wanted):
            return timing.Summary(**row["seconds"][phase])
    return None


def cases_of(rows: list[dict[str, Any]]) -> list[Case]:
    return sorted({Case(row["tokens"], row["sequences"]) for row in rows})


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every provider's whole step over ipo_ext's of the same case and run."""
    found = []
    for case in cases_of(rows):
        for grad_out in GRAD_OUTS:
            ours = total(rows, case, "ipo_ext", grad_out=grad_out)
            for name in LABELS:
                theirs = total(rows, case, name, grad_out=grad_out)
                if ours is None or theirs is None or name == "ipo_ext":
                    continue
                ratio = timing.ratio(theirs, ours)._asdict()
                found.append({**case._asdict(), "provider": name, "grad_out": grad_out, **ratio})
    return found


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The project's own targets for the device, met or missed by the ratio of medians."""
    found = []

    def add(
        what: str, value: float, low: float, high: float, wanted: float, at_least: bool
    ) -> None:
        target: dict[str, Any] = {"what": what, "value": value, "low": low, "high": high}
        target["wanted"] = f"at {'least' if at_least else 'most'} {wanted:g}"
        target["met"] = value >= wanted if at_least else value <= wanted
        found.append(target)

    if any(row["clock"] == "wall" for row in rows):
        ours = total(rows, TARGET_CASE, "ipo_ext")
        loop = total(rows, TARGET_CASE, "upstream_loop")
        packed = [total(rows, TARGET_CASE, name) for name in ("packed_eager", "packed_compiled")]
        if ours and loop:
            add(f"upstream's loop / ipo_ext, {TARGET_CASE}", *timing.ratio(loop, ours), 50, True)
        if ours and all(packed):
            fastest = min(packed, key=lambda summary: summary.median)
            what = f"faster of eager and torch.compile / ipo_ext, {TARGET_CASE}"
            add(what, *timing.ratio(fastest, ours), 2, True)
        return found

    forward = total(rows, CUDA_LARGE_CASE, "ipo_ext", clock="graph/forward")
    copy = total(rows, CUDA_LARGE_CASE, "copy", clock="graph")
    if forward and copy:
        what = f"share of copy bandwidth, loss + gradient + metrics, {CUDA_LARGE_CASE}"
        add(what, *timing.ratio(copy, forward), 0.9, True)
    forward = total(rows, CUDA_TARGET_CASE, "ipo_ext", clock="graph/forward")
    if forward:
        micro = [value * 1e6 for value in forward[:3]]
        what = f"microseconds under graph replay, loss + gradient + metrics, {CUDA_TARGET_CASE}"
        add(what, *micro, 5, False)
    return found


# ---- Words ----


def print_tables(rows: list[dict[str, Any]], terminal: report.Terminal) -> None:
    _print_overview(rows, terminal)
    cases = cases_of(rows)
    detailed = [case for case in (TARGET_CASE, CUDA_TARGET_CASE) if case in cases] or cases[-1:]
    for case in detailed:
        _print_case(rows, case, terminal)


def _print_overview(rows: list[dict[str, Any]], terminal: report.Terminal) -> None:
    names = [name for name in LABELS if any(row["provider"] == name for row in rows)]
    lines = []
    for case in cases_of(rows):
        ours = total(rows, case, "ipo_ext")
        line = [f"{case.tokens:,}", f"{case.sequences:,}"]
        for name in names:
            summary = total(rows, case, name)
            text = report.duration(summary.median) if summary else "-"
            if summary and ours and name not in ("ipo_ext", "copy"):
                text += f" {report.times(summary.median / ours.median):>6}"
            line.append(text)
        lines.append(line)
    columns = ["tokens", "sequences", *(LABELS[name] for name in names)]
    title = "Forward + backward + every metric read: median, and times as long as ipo_ext"
    terminal.table(title, columns, lines)


def _print_case(rows: list[dict[str, Any]], case: Case, terminal: report.Terminal) -> None:
    lines = []
    for row in rows:
        if (row["tokens"], row["sequences"]) != case:
            continue
        seconds = {phase: timing.Summary(**value) for phase, value in row["seconds"].items()}
        whole = seconds["total"]
        ours = total(rows, case, "ipo_ext", grad_out=row["grad_out"], clock=row["clock"])
        ratio = timing.ratio(whole, ours) if ours and row["provider"] != "ipo_ext" else None
        phases = [report.duration(seconds[p].median) if p in seconds else "-" for p in PHASES]
        lines.append(
            [
                LABELS[row["provider"]],
                row["clock"],
                f"{row['grad_out']:g}",
                *phases,
                report.duration(whole.median),
                f"{report.duration(whole.lower)} - {report.duration(whole.upper)}",
                _range(*ratio) if ratio else "",
            ]
        )
    columns = ["", "clock", "grad_out", *PHASES, "total", "quartiles", "/ ipo_ext (range)"]
    terminal.table(f"{case}: medians", columns, lines)


def _range(value: float, low: float, high: float) -> str:
    return f"{value:.3g} ({low:.3g} - {high:.3g})"


def print_targets(found: list[dict[str, Any]], terminal: report.Terminal) -> None:
    rows = [
        [
            target["what"],
            _range(target["value"], target["low"], target["high"]),
            target["wanted"],
            "met" if target["met"] else "missed",
        ]
        for target in found
    ]
    if rows:
        terminal.table("Targets", ["", "median (range)", "wanted", ""], rows)


# ---- Command line ----


def case_of(tokens: int) -> Case:
    """So many tokens in packed sequences of the common mean length."""
    return Case(tokens, max(1, tokens // MEAN_LENGTH))


def default_cases(device: str, quick: bool) -> list[Case]:
    """The cases of the targets first: what a run that is cut short should not miss."""
    if quick:
        return [case_of(2**exponent) for exponent in (10, 12, 14)]
    exponents = range(10, 25 if device == "cuda" else 23, 2)
    cases = [case_of(2**exponent) for exponent in exponents]
    first = [TARGET_CASE]
    if device == "cuda":
        first += [CUDA_TARGET_CASE, CUDA_LARGE_CASE]
    return first + [case for case in cases if case not in first]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks/tier1.py", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default 2)")
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(item) for item in text.split(",")],
        help=f"sizes, separated by commas; a packed sequence has {MEAN_LENGTH} tokens on average",
    )
    parser.add_argument(
        "--providers",
        type=lambda text: text.split(","),
        default=list(PROVIDERS),
        help=f"separated by commas, of {', '.join(PROVIDERS)} (default all)",
    )
    parser.add_argument("--seconds", type=float, help="of timing for a size and grad_out")
    parser.add_argument("--deadline", type=float, help="start no size after this many seconds")
    parser.add_argument("--quick", action="store_true", help="three small sizes, little time")
    parser.add_argument(
        "--flush",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on CUDA, empty the L2 cache before each step where the inputs fit into it",
    )
    parser.add_argument("--json", type=Path, help="write every median and spread here")
    parser.add_argument("--picture", type=Path, help="draw the whole step over tokens here (png)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.providers) - set(PROVIDERS):
        parser.error(f"--providers: expected some of {', '.join(PROVIDERS)}, got {sorted(unknown)}")
    seconds = arguments.seconds or (0.1 if arguments.quick else 4.0)
    arguments.plan = timing.Plan(seconds=seconds)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    terminal = report.Terminal()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        terminal.line("benchmarks/tier1.py: --device cuda, but torch sees no GPU")
        return 2
    start = time.monotonic()
    content = {"benchmark": "tier1", **report.facts(arguments.device)}
    if warning := report.busy(content["machine"]):
        terminal.line(warning)
    content["settings"] = {
        "seconds": arguments.plan.seconds,
        "mean_length": MEAN_LENGTH,
        "bytes_per_token": BYTES_PER_TOKEN,
        "providers": {name: f"{LABELS[name]}: {NOTES[name]}" for name in LABELS},
    }
    cases = default_cases(arguments.device, arguments.quick)
    if arguments.tokens:
        cases = [case_of(tokens) for tokens in arguments.tokens]
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
    print_targets(content.get("targets", []), terminal)
    if arguments.picture:
        import picture

        picture.draw(content, arguments.picture)
    return 1 if runner.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
