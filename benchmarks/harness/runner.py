"""Prepares, checks and times the providers of each case, and collects the rows of the results."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.harness import correctness, cuda, results, timing, words
from benchmarks.harness.benchmark import Benchmark, Case, Subject
from benchmarks.harness.correctness import Expected
from benchmarks.harness.provider import Provider
from benchmarks.harness.results import Row
from benchmarks.harness.step import Bind, Work, elsewhere, step_of
from benchmarks.harness.terminal import Terminal
from benchmarks.harness.timing import Step


class Runner:
    """Runs a benchmark, a group of cases at a time.

    Attributes:
        rows: what was timed.
        left_out: what was not, and why.
        wrong: whether a provider was refused because its results are wrong, or ours failed.
        stage: what stands before each word of progress.
    """

    def __init__(self, benchmark: Benchmark, terminal: Terminal) -> None:
        self.benchmark = benchmark
        self.terminal = terminal
        self.rows: list[Row] = []
        self.left_out: list[dict[str, Any]] = []
        self.wrong = False
        self.stage = ""
        self._missing: set[str] = set()

    @property
    def arguments(self) -> argparse.Namespace:
        return self.benchmark.arguments

    def run(self, group: Sequence[Case]) -> None:
        """Times all providers of all cases of the group in turns; then their memory."""
        torch._dynamo.reset()  # a compiled function for each shape, not one for all
        subjects = [subject for case in group for subject in self.prepare(case)]
        if not subjects:
            return
        rows = [
            row for grad_out in self.benchmark.grad_outs for row in self._timed(subjects, grad_out)
        ]
        self.rows += rows
        for subject in subjects:
            self._add_memory(subject, rows)
        self.rows += self.benchmark.further_rows(subjects, rows, self)

    def progress(self, text: str) -> None:
        """Says what is being done now."""
        self.terminal.progress(self.stage + text)

    def leave_out(self, case: Case, name: str, reason: str) -> None:
        """Records, and says, that a provider is not timed at a case."""
        self.left_out.append({**case._asdict(), "provider": name, "reason": reason})
        self.terminal.line(f"{case}: {name} left out, {reason}")

    def end_at_deadline(self, cases: Sequence[Case]) -> None:
        """Records, and says, that no provider is timed at these cases."""
        self.left_out += [{**case._asdict(), "reason": "deadline"} for case in cases]
        self.terminal.line(f"deadline: left out {', '.join(map(str, cases))}")

    # ---- Correct first ----

    def prepare(self, case: Case) -> list[Subject]:
        """The providers that are selected, there, right and fast enough, on the case's inputs."""
        batch = self.benchmark.make_batch(case)
        batches = [batch, *(elsewhere(batch) for _ in range(self._sets(case) - 1))]
        expected: dict[Any, Expected] = {}
        names = [name for name in self.benchmark.providers if self._selects(case, name)]
        subjects = [self._subject(case, name, batches, expected) for name in names]
        return [subject for subject in subjects if subject is not None]

    def _selects(self, case: Case, name: str) -> bool:
        is_missing = name in self._missing or self.benchmark.skips(case, name)
        is_wanted = name in self.arguments.providers or self.benchmark.providers[name].always
        return is_wanted and not is_missing

    def _subject(
        self, case: Case, name: str, batches: Sequence[Any], expected: dict[Any, Expected]
    ) -> Subject | None:
        provider = self.benchmark.providers[name]
        self.progress(f"{case}: checking {provider.label}")
        bind = self._made(case, name, provider)
        if bind is None:
            return None
        try:
            work = bind(batches[0])
            errors = _errors(provider, work, batches[0], expected)
        except ValueError as error:
            self.wrong = True
            self.leave_out(case, name, f"wrong: {error}")
            return None
        except Exception as error:  # a compiler that is missing, say: the others still run
            self._fail(case, name, "unavailable", error)
            return None
        if not self._is_fast_enough(case, name, work):
            return None
        return Subject(case, name, [work, *map(bind, batches[1:])], errors)

    def _made(self, case: Case, name: str, provider: Provider) -> Bind | None:
        """The provider, if it can run here; if not, it is not tried again."""
        try:
            if provider.needs_gpu and self.benchmark.device != "cuda":
                raise RuntimeError("runs on GPUs only")
            return provider.make()
        except Exception as error:  # a library that is missing, say
            self._missing.add(name)
            self._fail(case, name, "unavailable, here and after", error)
            return None

    def _fail(self, case: Case, name: str, state: str, error: Exception) -> None:
        """Leaves out a provider that raises. Ours has nothing to be missing: it is an error."""
        is_ours = name == results.OURS
        self.wrong |= is_ours
        self.leave_out(case, name, f"{'failed' if is_ours else state}: {words.first_line(error)}")

    def _is_fast_enough(self, case: Case, name: str, work: Work) -> bool:
        patience = self.benchmark.patience()
        if math.isinf(patience):
            return True
        start = time.perf_counter()
        work.forward()
        seconds = time.perf_counter() - start
        if seconds > patience:
            self.leave_out(case, name, f"too slow: {words.duration(seconds)} forward")
        return seconds <= patience

    # ---- Turns ----

    def _sets(self, case: Case) -> int:
        """How many input sets take turns; on a GPU they are together larger than its L2 cache."""
        if self.benchmark.device != "cuda":
            return 1
        enough = cuda.sets_beyond_cache(self.benchmark.bytes_of(case), cuda.l2_bytes())
        return max(enough, self.benchmark.least_sets)

    def _clock(self, subjects: Sequence[Subject]) -> timing.Clock:
        """On a GPU it empties the cache before each step where the inputs do not exceed it."""
        if self.benchmark.device != "cuda":
            return timing.WallClock()
        fits = any(
            len(subject.works) * self.benchmark.bytes_of(subject.case) <= cuda.l2_bytes()
            for subject in subjects
        )
        return timing.EventClock(cuda.flush_buffer() if fits and self.arguments.flush else None)

    def _timed(self, subjects: Sequence[Subject], grad_out: float) -> list[Row]:
        cases = ", ".join(dict.fromkeys(str(subject.case) for subject in subjects))
        self.progress(f"{cases}: timing, grad_out {grad_out:g}")
        factor = None
        if grad_out != 1:
            factor = torch.tensor(grad_out, device=self.benchmark.device)
        steps: dict[tuple[str, Case], list[Step]] = {
            (subject.provider, subject.case): [step_of(work, factor) for work in subject.works]
            for subject in subjects
        }
        clock = self._clock(subjects)
        timings = timing.interleave(steps, clock, self.benchmark.plan())
        return [
            results.make_row(
                subject.case,
                subject.provider,
                timings[subject.provider, subject.case],
                self.benchmark.phases,
                clock=clock.name,
                grad_out=grad_out,
            )
            | ({"relative_errors": subject.errors} if subject.errors else {})
            for subject in subjects
        ]

    def _add_memory(self, subject: Subject, rows: Sequence[Row]) -> None:
        try:
            fields = self.benchmark.measure_memory(subject, self)
        except Exception as error:  # no /proc, say
            self.leave_out(subject.case, subject.provider, f"memory: {words.first_line(error)}")
            return
        wanted = {**subject.case._asdict(), "provider": subject.provider}
        for row in rows:
            if wanted.items() <= row.items():
                row.update(fields)


def _errors(
    provider: Provider, work: Work, batch: Any, expected: dict[Any, Expected]
) -> dict[str, float]:
    """A provider's errors; what is expected of several providers is computed once."""
    if provider.expected is None:
        return {}
    if provider.expected not in expected:
        expected[provider.expected] = provider.expected(batch)
    return correctness.errors(work, expected[provider.expected])
