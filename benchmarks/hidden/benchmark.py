"""Times the loss from hidden states against full logits and other schemes; weighs its memory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import memory, timing
from benchmarks.harness.benchmark import Benchmark, Recorder, Subject
from benchmarks.harness.command import numbers
from benchmarks.harness.results import Row
from benchmarks.harness.step import step_of
from benchmarks.harness.terminal import Terminal
from benchmarks.hidden import batch, report
from benchmarks.hidden.cases import HEADS, QUICK_HEAD, TARGET_TOKENS, Case, Head, default_tokens
from benchmarks.hidden.providers import PROVIDERS, SKIP_INACTIVE


class FromHidden(Benchmark):
    """Times the loss from hidden states, all tokens active or fewer, and weighs its memory."""

    name = "hidden"
    case_type = Case
    providers = PROVIDERS
    grad_outs = (1.0,)

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self.head = QUICK_HEAD if arguments.quick else HEADS[self.device]

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tokens", type=numbers, help="sizes, separated by commas")
        parser.add_argument(
            "--active",
            type=numbers,
            default=[100, 75, 50, 25],
            help="percent of active tokens at the targets' size (default 100,75,50,25)",
        )
        parser.add_argument("--rounds", type=int, default=5, help="timings of each (default 5)")
        parser.add_argument("--weighings", type=int, default=2, help="of memory (default 2)")

    @classmethod
    def complaint(cls, arguments: argparse.Namespace) -> str:
        if arguments.quick and arguments.device == "cuda":
            return "--quick: expected --device cpu, got cuda"
        return ""

    def groups(self) -> list[list[Case]]:
        sizes = self.arguments.tokens or default_tokens(self.device, self.arguments.quick)
        return [self._cases(tokens) for tokens in sizes]

    def _cases(self, tokens: int) -> list[Case]:
        is_target = self.arguments.quick or tokens == TARGET_TOKENS[self.device]
        return [Case(tokens, active) for active in (self.arguments.active if is_target else [100])]

    def make_batch(self, case: Case) -> batch.Batch:
        return make_batch(case, self.head, self.device)

    def bytes_of(self, case: Case) -> int:
        return self.head.width * self.head.vocabulary * _dtype(self.head).itemsize

    def plan(self) -> timing.Plan:
        rounds = self.arguments.rounds
        # No settling: a step moves far more than any cache holds.
        return timing.Plan(warmup=1, least=rounds, most=rounds, settle=0)

    def skips(self, case: Case, provider: str) -> bool:
        return case.active < 100 and provider not in SKIP_INACTIVE

    def measure_memory(self, subject: Subject, recorder: Recorder) -> dict[str, Any]:
        recorder.progress(f"{subject.case}: memory of {self.labels[subject.provider]}")
        options = self.arguments
        of_step = subject.provider, subject.case, self.head, self.device
        how = options.threads, options.weighings
        if self.device == "cuda":
            return {"extra_bytes": extra_bytes(*of_step, *how)}
        return {"extra_bytes": memory.in_fresh_process(extra_bytes, *of_step, *how)}

    def set_up(self) -> dict[str, Any]:
        return {**self.head._asdict(), "rounds": self.arguments.rounds}

    def targets(self, rows: Sequence[Row]) -> list[Row]:
        return report.targets(rows, self.device, self.labels)

    def print_tables(self, terminal: Terminal, rows: Sequence[Row]) -> None:
        report.print_tables(terminal, rows, self.labels)

    def draw(self, content: Mapping[str, Any], path: Path) -> None:
        from benchmarks.hidden import picture  # needs matplotlib, which a run may do without

        picture.draw(content, path)


def make_batch(case: Case, head: Head, device: str) -> batch.Batch:
    """The inputs of a case."""
    return batch.make_batch(
        case.tokens,
        head.width,
        head.vocabulary,
        active=case.active / 100,
        dtype=_dtype(head),
        device=device,
    )


def extra_bytes(
    provider: str, case: Case, head: Head, device: str, threads: int, repeats: int
) -> list[int]:
    """The peaks of a few steps, less inputs, gradients and an fp32 sum of the weight's gradient."""
    torch.set_num_threads(threads)
    inputs = make_batch(case, head, device)
    step = step_of(PROVIDERS[provider].make()(inputs))
    results = sum(leaf.nbytes for leaf in inputs.leaves)
    if _dtype(head) != torch.float32:
        results += 4 * inputs.weight.numel()
    peaks = memory.peaks_of_process(lambda: step(lambda: None), device, repeats)
    return [peak - results for peak in peaks]


def _dtype(head: Head) -> torch.dtype:
    return getattr(torch, head.dtype)
