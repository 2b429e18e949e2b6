"""Times the loss from logits over a grid of rows and columns, its peak memory beside it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import memory, timing
from benchmarks.harness.benchmark import Benchmark, Recorder, Subject
from benchmarks.harness.results import Row
from benchmarks.harness.step import step_of
from benchmarks.harness.terminal import Terminal
from benchmarks.logits import report
from benchmarks.logits.batch import Batch, make_batch
from benchmarks.logits.cases import Case, default_cases, with_each_dtype
from benchmarks.logits.providers import PROVIDERS


class FromLogits(Benchmark):
    """Times the loss from logits, forward and backward, and says how much memory it takes."""

    name = "logits"
    case_type = Case
    providers = PROVIDERS

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--sizes",
            type=lambda text: [tuple(map(int, size.split("x"))) for size in text.split(",")],
            help="rows x columns, separated by commas: 256x32000,16x128256",
        )
        parser.add_argument("--seconds", type=float, help="of timing for a case and grad_out")

    def groups(self) -> list[list[Case]]:
        cases = default_cases(self.device, self.arguments.quick)
        if self.arguments.sizes:
            cases = with_each_dtype(self.arguments.sizes)
        return [[case] for case in cases]

    def make_batch(self, case: Case) -> Batch:
        return make_batch(*case, self.device)

    def bytes_of(self, case: Case) -> int:
        return case.bytes

    def plan(self) -> timing.Plan:
        return timing.Plan(self.arguments.seconds or (0.1 if self.arguments.quick else 2.0))

    def measure_memory(self, subject: Subject, recorder: Recorder) -> dict[str, Any]:
        recorder.progress(f"{subject.case}: memory of {self.labels[subject.provider]}")
        step = step_of(subject.works[0])
        return {"peak_bytes": memory.peak_of_tensors(lambda: step(lambda: None), self.device)}

    def set_up(self) -> dict[str, Any]:
        kept = self.device == "cpu" and memory.keep_freed_memory()
        return {"seconds": self.plan().seconds, "freed_memory_is_kept": kept}

    def targets(self, rows: Sequence[Row]) -> list[Row]:
        return report.targets(rows)

    def print_tables(self, terminal: Terminal, rows: Sequence[Row]) -> None:
        report.print_tables(terminal, rows, self.labels)

    def draw(self, content: Mapping[str, Any], path: Path) -> None:
        from benchmarks.logits import picture  # needs matplotlib, which a run may do without

        picture.draw(content, path)
