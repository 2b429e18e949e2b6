"""What one eager call costs beyond its arithmetic: ipo_loss on 64 tokens, layer by layer.

And where a step at the size of the CPU's target goes: 65,536 tokens in 64 sequences.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import ipo_ext
from benchmarks.harness import results, timing, words
from benchmarks.harness.command import base_parser, begin
from benchmarks.harness.summary import summarise
from benchmarks.harness.terminal import Terminal
from benchmarks.logprobs import baselines
from benchmarks.logprobs.batch import make_batch
from ipo_ext._ops.arguments import LossInputs

NAME = "logprobs.overhead"

TOKENS = 64
TARGET = (65_536, 64)
CALLS = 50  # in one timing


def subjects(device: str) -> dict[str, Callable[[], object]]:
    """From a built-in function to everything that a training step calls."""
    batch = make_batch(TOKENS, 4, device=device)
    leaf, constant = batch.trainer_logprobs, batch.trainer_logprobs.detach()
    settings = batch.config.settings(torch.float32)
    rest = (batch.inference_logprobs, batch.advantages, batch.loss_mask)
    inputs = LossInputs(*rest)
    operator = torch.ops.ipo_ext.ipo_loss

    def bare(trainer_logprobs: torch.Tensor, with_gradient: bool) -> Any:
        return operator(trainer_logprobs, *inputs, *settings, with_gradient)

    def loss(trainer_logprobs: torch.Tensor, **options: Any) -> ipo_ext.IPOOutput:
        return ipo_ext.ipo_loss(trainer_logprobs, *rest, **options)

    tensor = torch.tensor(48.0, device=device)
    packed = {"cu_seqlens": batch.cu_seqlens, "normalizer": 48.0}
    return {
        "torch.mul": lambda: constant * constant,
        "torch.mul, with gradient": lambda: leaf * constant,
        "torch.mul + sum, forward + backward": lambda: _backward((leaf * constant).sum(), leaf),
        "bare operator": lambda: bare(constant, False),
        "bare operator, with gradient": lambda: bare(leaf, True),
        "bare operator, forward + backward": lambda: _backward(bare(leaf, True)[0], leaf),
        "ipo_loss": lambda: loss(constant),
        "ipo_loss, with gradient": lambda: loss(leaf),
        "ipo_loss, forward + backward": lambda: _backward(loss(leaf).loss, leaf),
        "ipo_loss, tensor normalizer": lambda: loss(leaf, normalizer=tensor),
        "ipo_loss, float normalizer": lambda: loss(leaf, normalizer=48.0),
        "ipo_loss, packed, float normalizer": lambda: loss(leaf, **packed),
        "the same, backward, metrics read": lambda: _whole(loss(leaf, **packed), leaf),
    }


class _Nothing(torch.autograd.Function):
    """What autograd and Python cost where a Function computes nothing at all."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return leaf.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return ctx.saved_tensors[0], None


def parts(device: str) -> dict[str, Callable[[], object]]:
    """A whole step, what it is made of, and the step of torch.compile that it is measured by."""
    batch = make_batch(*TARGET, device=device)
    leaf, gradient = batch.trainer_logprobs, torch.rand(TARGET[0], device=device)
    compiled = baselines.compiled(baselines.packed)

    def loss() -> ipo_ext.IPOOutput:
        return ipo_ext.ipo_loss(
            *batch[:4], cu_seqlens=batch.cu_seqlens, normalizer=batch.loss_scale
        )

    metrics = loss().metrics
    assert isinstance(metrics, ipo_ext.IPOMetrics)
    return {
        "ipo_loss": loss,
        "ipo_loss, backward": lambda: _backward(loss().loss, leaf),
        "ipo_loss, backward, metrics read": lambda: _whole(loss(), leaf),
        "torch.compile of the packed form, backward": lambda: _backward(compiled(batch)[0], leaf),
        "a Function that computes nothing": lambda: _Nothing.apply(leaf, gradient),
        "the same, backward": lambda: _backward(_Nothing.apply(leaf, gradient), leaf),
        "reading the metrics": metrics.tolist,
    }


def _backward(loss: torch.Tensor, leaf: torch.Tensor) -> object:
    return torch.autograd.grad(loss, leaf)


def _whole(output: ipo_ext.IPOOutput, leaf: torch.Tensor) -> object:
    assert isinstance(output.metrics, ipo_ext.IPOMetrics)
    return torch.autograd.grad(output.loss, leaf), output.metrics.tolist()


class _CallClock:
    """Host time of one of many calls; on CUDA, launches are paid and kernels are not waited for."""

    name = "host"

    def time(self, step: timing.Step) -> timing.Durations:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        start = time.perf_counter()
        step(lambda: None)
        return ((time.perf_counter() - start) / CALLS,)


def _many(call: Callable[[], object]) -> timing.Step:
    def step(mark: timing.Mark) -> None:
        for _ in range(CALLS):
            call()

    return step


def main(argv: list[str] | None = None) -> int:
    parser = base_parser(NAME, __doc__)
    parser.add_argument("--turns", type=int, default=200, help="timings of each subject")
    arguments = parser.parse_args(argv)
    terminal = Terminal()
    content = begin(NAME, arguments, terminal)
    if content is None:
        return 2
    content |= {"tokens": TOKENS, "results": {}}
    titles = {
        f"One call on {TOKENS} tokens": subjects,
        "{:,} tokens in {} sequences".format(*TARGET): parts,
    }
    for title, calls in titles.items():
        terminal.progress(title)
        plan = timing.Plan(seconds=1e9, warmup=5, most=arguments.turns)
        steps = {name: [_many(call)] for name, call in calls(arguments.device).items()}
        timings = timing.interleave(steps, _CallClock(), plan)
        summaries = {
            name: summarise([sum(value) for value in values]) for name, values in timings.items()
        }
        content["results"][title] = {name: each._asdict() for name, each in summaries.items()}
        rows = [
            [name, *(words.duration(value) for value in summary[:4])]
            for name, summary in summaries.items()
        ]
        columns = ["", "median", "lower quartile", "upper quartile", "minimum"]
        terminal.table(f"{title}, {arguments.device}", columns, rows)
    if arguments.json:
        results.write(arguments.json, content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
