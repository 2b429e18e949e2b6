"""Time and extra memory of tier 3, forward and backward, against full logits and other schemes."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import baselines_hidden as baselines
import memory
import report
import timing
import torch
from baselines_hidden import Batch

import ipo_ext

LABELS = {
    "ipo_ext": "ipo_ext",
    "eager": "eager, full logits",
    "compiled": "torch.compile, full logits",
    "blockwise": "prime-rl's scheme",
    "torch_lce": "F.linear_cross_entropy",
    "liger": "Liger-Kernel",
    "quack": "QuACK",
    "cce": "cut-cross-entropy",
    "products": "three matrix products",
}
NOTES = {
    "ipo_ext": "ipo_loss_from_hidden: the loss, all metrics, log-probabilities and entropy",
    "eager": "the logits, their log-softmax in fp32, the loss alone",
    "compiled": "the same by torch.compile, for the exact shape, warm",
    "blockwise": "8192 tokens by 8192 words at a time, fp32, logits made again in backward",
    "torch_lce": "a cross-entropy, chunked, gradients made in forward",
    "liger": "a cross-entropy, chunked, gradients made in forward",
    "quack": "a cross-entropy, chunked, gradients made in forward",
    "cce": "a cross-entropy, logits made again in backward, small gradients left out",
    "products": "the floor: logits, then both gradients, by torch.mm on the active rows, no loss",
}
PROVIDERS = tuple(LABELS)
CROSS_ENTROPIES = ("torch_lce", "liger", "quack", "cce")
ON_GPU = ("liger", "quack", "cce")
OVER_ACTIVE = ("ipo_ext", "products", "cce")  # the others work on every row, whatever is active
PHASES = ("forward", "backward")
TARGET_TOKENS = {"cpu": 2048, "cuda": 8192}


class Shape(NamedTuple):
    width: int
    vocabulary: int
    dtype: torch.dtype
    device: str


SHAPES = {
    "cpu": Shape(1024, 32_000, torch.float32, "cpu"),
    "cuda": Shape(4096, 151_936, torch.bfloat16, "cuda"),
}
QUICK_SHAPE = Shape(64, 1000, torch.float32, "cpu")


class Case(NamedTuple):
    tokens: int
    active: int  # percent of the tokens

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens, {self.active}% active"


# ---- What is timed ----

Call = Callable[[Batch], torch.Tensor]


def provider(name: str, device: str) -> Call:
    """(batch) -> loss."""
    if name in ON_GPU and device != "cuda":
        raise RuntimeError("runs on GPUs only")
    if name == "products":
        raise AssertionError("the products have no loss; see `step_of`")
    made: dict[str, Callable[[], Call]] = {
        "ipo_ext": lambda: _ipo_ext,
        "eager": lambda: baselines.full_logits,
        "compiled": baselines.compiled,
        "blockwise": lambda: baselines.sequence_by_vocabulary,
        "torch_lce": lambda: baselines.torch_linear_cross_entropy,
        "liger": baselines.liger,
        "quack": baselines.quack,
        "cce": baselines.cut_cross_entropy,
    }
    return made[name]()


def _ipo_ext(batch: Batch) -> torch.Tensor:
    *operands, num_active = batch
    output = ipo_ext.ipo_loss_from_hidden(*operands, num_active=num_active, config=baselines.CONFIG)
    return output.loss


def step_of(name: str, batch: Batch, call: Call | None) -> timing.Step:
    """Forward and backward, a mark after each."""
    if call is None:
        return _products_step(batch)

    def step(mark: timing.Mark) -> object:
        loss = call(batch)
        mark()
        gradients = torch.autograd.grad(loss, batch.leaves)
        mark()
        return gradients

    return step


def _products_step(batch: Batch) -> timing.Step:
    states = batch.hidden.detach()[: batch.num_active]
    weight = batch.weight.detach()

    def step(mark: timing.Mark) -> object:
        logits = states @ weight.t()
        mark()
        gradients = logits @ weight, logits.t() @ states
        mark()
        return gradients

    return step


# ---- Correct first ----


class Expected:
    """Loss and gradients of a batch by full logits in fp32, which its tests hold against fp64."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self._of: dict[Call, Any] = {}

    def of(self, name: str) -> Any:
        call = baselines.cross_entropy if name in CROSS_ENTROPIES else baselines.full_logits
        if call not in self._of:
            hidden, weight, *rest = self._batch
            leaves = [leaf.detach().float().requires_grad_() for leaf in (hidden, weight)]
            self._of[call] = _loss_and_gradients(call, Batch(*leaves, *rest))
        return self._of[call]


def _loss_and_gradients(call: Call, batch: Batch) -> tuple[torch.Tensor, ...]:
    loss = call(batch)
    return loss.detach(), *torch.autograd.grad(loss, batch.leaves)


def errors(name: str, call: Call, batch: Batch, expected: Expected) -> dict[str, float]:
    """How far loss and gradients are from the expected ones; raises if too far."""
    limit = 1e-4 if batch.hidden.dtype == torch.float32 else 3e-2
    names = ("loss", "grad_hidden", "grad_weight")
    found = {
        part: float((ours.float() - theirs).norm() / theirs.norm())
        for part, ours, theirs in zip(
            names, _loss_and_gradients(call, batch), expected.of(name), strict=True
        )
    }
    for part, error in found.items():
        if not error < limit:
            raise ValueError(f"{part}: relative error {error:.1e}, at most {limit:g} expected")
    return found


# ---- Memory ----


def extra_bytes(name: str, case: Case, shape: Shape, threads: int, repeats: int) -> list[int]:
    """The peaks of a few steps, less inputs, gradients and an fp32 sum of the weight's gradient."""
    torch.set_num_threads(threads)
    batch = _batch(case, shape)
    call = None if name == "products" else provider(name, shape.device)
    step = step_of(name, batch, call)
    results = sum(leaf.nbytes for leaf in batch.leaves)
    if shape.dtype != torch.float32:
        results += 4 * batch.weight.numel()
    peaks = memory.peaks(lambda: step(lambda: None), shape.device, repeats)
    return [peak - results for peak in peaks]


def _batch(case: Case, shape: Shape) -> Batch:
    return baselines.make_batch(
        case.tokens,
        shape.width,
        shape.vocabulary,
        active=case.active / 100,
        dtype=shape.dtype,
        device=shape.device,
    )


# ---- One number of tokens ----


class Runner:
    """Prepares, checks, times and weighs the providers; collects rows for the JSON."""

    def __init__(
        self, arguments: argparse.Namespace, shape: Shape, terminal: report.Terminal
    ) -> None:
        self.arguments = arguments
        self.shape = shape
        self.terminal = terminal
        self.rows: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        self.wrong = False

    def run(self, tokens: int) -> None:
        """All providers on all rows and, on fewer, those that then have less to do; interleaved."""
        torch._dynamo.reset()  # a compiled function for each shape, not one for all
        steps: dict[tuple[str, Case], list[timing.Step]] = {}
        checks: dict[tuple[str, Case], dict[str, float]] = {}
        for case in self._cases(tokens):
            batch = _batch(case, self.shape)
            expected = Expected(batch)
            for name in self.arguments.providers:
                if case.active < 100 and name not in OVER_ACTIVE:
                    continue
                self.terminal.progress(f"{case}: checking {LABELS[name]}")
                if prepared := self._prepared(name, case, batch, expected):
                    steps[name, case], checks[name, case] = [prepared[0]], prepared[1]
        self.terminal.progress(f"{tokens:,} tokens: timing")
        for (name, case), values in self._timings(steps).items():
            self._add(name, case, values, checks[name, case])
        for row in self.rows:
            if row["tokens"] == tokens:
                self._weigh(row)

    def _cases(self, tokens: int) -> list[Case]:
        target = TARGET_TOKENS[self.shape.device]
        shares = self.arguments.active if tokens == target or self.arguments.quick else [100]
        return [Case(tokens, active) for active in shares]

    def _prepared(
        self, name: str, case: Case, batch: Batch, expected: Expected
    ) -> tuple[timing.Step, dict[str, float]] | None:
        """The step and its errors; None for a provider that does not work or is wrong."""
        if name == "products":
            return step_of(name, batch, None), {}
        try:
            call = provider(name, self.shape.device)
            found = errors(name, call, batch, expected)
        except ValueError as error:
            self.wrong = True
            self._leave_out(name, case, f"wrong: {error}")
        except Exception as error:  # a library that is missing, say: the others still run
            self._leave_out(name, case, f"unavailable: {_first_line(error)}")
        else:
            return step_of(name, batch, call), found
        return None

    def _timings(
        self, steps: Mapping[tuple[str, Case], list[timing.Step]]
    ) -> dict[tuple[str, Case], list[timing.Durations]]:
        clock = timing.EventClock() if self.shape.device == "cuda" else timing.WallClock()
        rounds = self.arguments.rounds
        # No settling: a step moves far more than any cache holds.
        plan = timing.Plan(warmup=1, least=rounds, most=rounds, settle=0)
        keys = {f"{name} {case.active}": (name, case) for name, case in steps}
        named = {key: steps[keys[key]] for key in keys}
        return {keys[key]: values for key, values in timing.interleave(named, clock, plan).items()}

    def _add(
        self, name: str, case: Case, values: list[timing.Durations], check: dict[str, float]
    ) -> None:
        seconds = {
            phase: timing.summarise([value[index] for value in values])._asdict()
            for index, phase in enumerate(PHASES)
        }
        seconds["total"] = timing.summarise([sum(value) for value in values])._asdict()
        row = {**case._asdict(), "provider": name, "seconds": seconds, "relative_errors": check}
        self.rows.append(row)

    def _weigh(self, row: dict[str, Any]) -> None:
        name, case = row["provider"], Case(row["tokens"], row["active"])
        self.terminal.progress(f"{case}: memory of {LABELS[name]}")
        arguments = (name, case, self.shape, self.arguments.threads, self.arguments.weighings)
        try:
            if self.shape.device == "cuda":
                row["extra_bytes"] = extra_bytes(*arguments)
            else:
                row["extra_bytes"] = memory.in_fresh_process(extra_bytes, *arguments)
        except Exception as error:  # no /proc, say
            self._leave_out(name, case, f"memory: {_first_line(error)}")

    def _leave_out(self, name: str, case: Case, reason: str) -> None:
        self.left_out.append({**case._asdict(), "provider": name, "reason": reason})
        self.terminal.line(f"{case}: {name} left out, {reason}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# ---- Ratios and targets ----


def find(rows: list[dict[str, Any]], name: str, case: Case) -> dict[str, Any] | None:
    for row in rows:
        if (row["provider"], row["tokens"], row["active"]) == (name, *case):
            return row
    return None


def whole(row: dict[str, Any]) -> timing.Summary:
    return timing.Summary(**row["seconds"]["total"])


def targets(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """This project's own targets for the device, met or missed by ratios of medians."""
    bounds = CPU_TARGETS if device == "cpu" else CUDA_TARGETS
    against, memory_bound = ("eager", 0.1) if device == "cpu" else ("products", None)
    tokens, found = TARGET_TOKENS[device], []
    for active, wanted in bounds.items():
        case = Case(tokens, active)
        theirs = find(rows, against, Case(tokens, 100) if device == "cpu" else case)
        ours = find(rows, "ipo_ext", case)
        if ours is None or theirs is None:
            continue
        what = f"time / {LABELS[against]}, {case}"
        found.append(_target(what, timing.ratio(whole(ours), whole(theirs)), wanted))
        if memory_bound and "extra_bytes" in ours and "extra_bytes" in theirs:
            what = f"extra memory / {LABELS[against]}, {case}"
            found.append(_target(what, _bytes_ratio(ours, theirs), memory_bound))
    return found


CPU_TARGETS = {100: 1.05, 50: 0.6}  # percent active -> share of eager's time on all rows
CUDA_TARGETS = {100: 1.08, 75: 1.08, 50: 1.08, 25: 1.08}  # -> times the three products, those rows


def _bytes_ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> timing.Ratio:
    mine, other = ours["extra_bytes"], theirs["extra_bytes"]
    value = statistics.median(mine) / statistics.median(other)
    return timing.Ratio(value, min(mine) / max(other), max(mine) / min(other))


def _target(what: str, ratio: timing.Ratio, wanted: float) -> dict[str, Any]:
    return {
        "what": what,
        **ratio._asdict(),
        "wanted": f"at most {wanted:g}",
        "met": ratio.value <= wanted,
    }


# ---- Words ----


def print_tables(rows: list[dict[str, Any]], terminal: report.Terminal) -> None:
    lines = []
    for row in rows:
        summary = whole(row)
        eager = find(rows, "eager", Case(row["tokens"], 100))
        ratio = timing.ratio(summary, whole(eager)) if eager else None
        lines.append(
            [
                LABELS[row["provider"]],
                f"{row['tokens']:,}",
                f"{row['active']}%",
                *(report.duration(row["seconds"][phase]["median"]) for phase in PHASES),
                report.duration(summary.median),
                f"{report.duration(summary.lower)} - {report.duration(summary.upper)}",
                _range(ratio) if ratio else "-",
                _megabytes(row.get("extra_bytes")),
            ]
        )
    columns = ["", "tokens", "active", *PHASES, "total", "quartiles", "/ eager (range)", "extra MB"]
    terminal.table("Medians; memory beyond inputs and gradients", columns, lines)


def print_targets(found: list[dict[str, Any]], terminal: report.Terminal) -> None:
    rows = [
        [
            target["what"],
            _range(timing.Ratio(target["value"], target["low"], target["high"])),
            target["wanted"],
            "met" if target["met"] else "missed",
        ]
        for target in found
    ]
    if rows:
        terminal.table("Targets", ["", "median (range)", "wanted", ""], rows)


def _range(ratio: timing.Ratio) -> str:
    return f"{ratio.value:.3g} ({ratio.low:.3g} - {ratio.high:.3g})"


def _megabytes(values: list[int] | None) -> str:
    if values is None:
        return "-"
    low, high = (round(value / 1e6) for value in (min(values), max(values)))
    return f"{low}" if low == high else f"{low} - {high}"


# ---- Command line ----


def parse(argv: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(item) for item in text.split(",")]

    parser = argparse.ArgumentParser(prog="benchmarks/tier3.py", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default 2)")
    parser.add_argument("--tokens", type=numbers, help="sizes, separated by commas")
    parser.add_argument(
        "--active",
        type=numbers,
        default=[100, 75, 50, 25],
        help="percent of active tokens at the targets' size (default 100,75,50,25)",
    )
    parser.add_argument(
        "--providers",
        type=lambda text: text.split(","),
        default=list(PROVIDERS),
        help=f"separated by commas, of {', '.join(PROVIDERS)} (default all)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="timings of each (default 5)")
    parser.add_argument("--weighings", type=int, default=2, help="of memory (default 2)")
    parser.add_argument("--quick", action="store_true", help="a tiny head: does it run?")
    parser.add_argument("--json", type=Path, help="write every median and spread here")
    parser.add_argument("--picture", type=Path, help="draw time and memory here (png)")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.providers) - set(PROVIDERS):
        parser.error(f"--providers: expected some of {', '.join(PROVIDERS)}, got {sorted(unknown)}")
    if arguments.quick and arguments.device == "cuda":
        parser.error("--quick: expected --device cpu, got cuda")
    return arguments


def default_tokens(device: str, quick: bool) -> list[int]:
    """The targets' size first: what a run that is cut short should not miss."""
    if quick:
        return [256, 128]
    if device == "cuda":
        return [8192, 32_768, 16_384, 4096, 2048]
    return [2048, 1024, 512]


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    terminal = report.Terminal()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        terminal.line("benchmarks/tier3.py: --device cuda, but torch sees no GPU")
        return 2
    start = time.monotonic()
    shape = QUICK_SHAPE if arguments.quick else SHAPES[arguments.device]
    content = {"benchmark": "tier3", **report.facts(arguments.device)}
    if warning := report.busy(content["machine"]):
        terminal.line(warning)
    content["settings"] = {
        "width": shape.width,
        "vocabulary": shape.vocabulary,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "rounds": arguments.rounds,
        "providers": {name: f"{LABELS[name]}: {NOTES[name]}" for name in LABELS},
    }
    runner = Runner(arguments, shape, terminal)
    for tokens in arguments.tokens or default_tokens(arguments.device, arguments.quick):
        runner.run(tokens)
        content |= {"results": runner.rows, "left_out": runner.left_out}
        content["targets"] = targets(runner.rows, arguments.device)
        content["seconds_taken"] = round(time.monotonic() - start, 1)
        if arguments.json:
            report.write_json(arguments.json, content)
    print_tables(runner.rows, terminal)
    print_targets(content["targets"], terminal)
    if arguments.picture:
        import picture_hidden

        picture_hidden.draw(content, arguments.picture)
    return 1 if runner.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
