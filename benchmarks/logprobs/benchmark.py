"""Times the loss from log-probabilities against upstream's loop, eager torch and torch.compile."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import results, timing
from benchmarks.harness.benchmark import Benchmark, Recorder, Subject
from benchmarks.harness.command import numbers
from benchmarks.harness.results import OURS, Row
from benchmarks.harness.terminal import Terminal
from benchmarks.logprobs import graph_replay, report
from benchmarks.logprobs.batch import Batch, make_batch
from benchmarks.logprobs.cases import BYTES_PER_TOKEN, MEAN_LENGTH, Case, default_cases, packed
from benchmarks.logprobs.providers import PROVIDERS


class FromLogprobs(Benchmark):
    """Times forward, backward and reading every metric; on a GPU also the kernels alone."""

    name = "logprobs"
    case_type = Case
    providers = PROVIDERS
    phases = report.PHASES
    least_sets = 2

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--tokens",
            type=numbers,
            help=f"sizes, separated by commas; a sequence has {MEAN_LENGTH} tokens on average",
        )
        parser.add_argument("--seconds", type=float, help="of timing for a size and grad_out")

    def groups(self) -> list[list[Case]]:
        cases = default_cases(self.device, self.arguments.quick)
        if self.arguments.tokens:
            cases = [packed(tokens) for tokens in self.arguments.tokens]
        return [[case] for case in cases]

    def make_batch(self, case: Case) -> Batch:
        return make_batch(*case, device=self.device)

    def bytes_of(self, case: Case) -> int:
        return case.tokens * BYTES_PER_TOKEN

    def plan(self) -> timing.Plan:
        return timing.Plan(self.arguments.seconds or (0.1 if self.arguments.quick else 4.0))

    def patience(self) -> float:
        return max(self.plan().seconds, 1.0)

    def set_up(self) -> dict[str, Any]:
        return {
            "seconds": self.plan().seconds,
            "mean_length": MEAN_LENGTH,
            "bytes_per_token": BYTES_PER_TOKEN,
        }

    def targets(self, rows: Sequence[Row]) -> list[Row]:
        return report.targets(rows)

    def print_tables(self, terminal: Terminal, rows: Sequence[Row]) -> None:
        report.print_tables(terminal, rows, self.labels)

    def draw(self, content: Mapping[str, Any], path: Path) -> None:
        from benchmarks.logprobs import picture  # needs matplotlib, which a run may do without

        picture.draw(content, path)

    def further_rows(
        self, subjects: Sequence[Subject], rows: Sequence[Row], recorder: Recorder
    ) -> Iterator[Row]:
        """On a GPU the kernels alone; our first row also says what a step does to the device."""
        if self.device != "cuda":
            return
        recorder.progress(f"{subjects[0].case}: timing, graph replay")
        yield from graph_replay.rows(subjects, self.plan(), self.phases, recorder)
        for subject in subjects:
            if subject.provider == OURS:
                row = results.find(rows, subject.case, OURS)
                row.update(graph_replay.audit(subject.works[0]))
