"""What a benchmark says of itself; the runner and the command line do the rest."""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from benchmarks.harness import results, timing
from benchmarks.harness.provider import Provider
from benchmarks.harness.results import Row
from benchmarks.harness.step import Work
from benchmarks.harness.terminal import Terminal

Case = Any  # a benchmark's own NamedTuple: one size of the inputs


class Subject(NamedTuple):
    """A provider, bound to the inputs of a case; on a GPU to several sets of them, in turn."""

    case: Case
    provider: str
    works: list[Work]
    errors: dict[str, float]


class Recorder(Protocol):
    """Where a benchmark says what it is doing and what it had to leave out."""

    def progress(self, text: str) -> None: ...

    def leave_out(self, case: Case, name: str, reason: str) -> None: ...


class Benchmark(ABC):
    """One loss, and what it is compared with; a subclass's docstring is what --help begins with.

    Attributes:
        name: of the package and in the results file.
        case_type: the type of its cases, whose fields stand in every row.
        providers: by name, in the order of the tables.
        phases: the names of a step's phases.
        grad_outs: the gradients of the loss that steps are timed with.
        least_sets: how many input sets a GPU rotates at least.
    """

    name: ClassVar[str]
    case_type: ClassVar[type]
    providers: ClassVar[Mapping[str, Provider]]
    phases: ClassVar[Sequence[str]] = results.PHASES
    grad_outs: ClassVar[Sequence[float]] = (1.0, 0.5)
    least_sets: ClassVar[int] = 1

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device: str = arguments.device

    @property
    def labels(self) -> dict[str, str]:
        """What the providers are called in tables, by name."""
        return {name: provider.label for name, provider in self.providers.items()}

    # ---- Options ----

    @classmethod
    @abstractmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """The options that only this benchmark has."""

    @classmethod
    def complaint(cls, arguments: argparse.Namespace) -> str:
        """What is wrong where options do not fit each other; empty where they do."""
        return ""

    # ---- What is measured ----

    @abstractmethod
    def set_up(self) -> dict[str, Any]:
        """Prepares the process; returns the settings that the results file records."""

    @abstractmethod
    def groups(self) -> list[list[Case]]:
        """Cases that are timed together, group after group; the targets' own come first."""

    @abstractmethod
    def make_batch(self, case: Case) -> Any:
        """The inputs of a case, the same for all providers."""

    @abstractmethod
    def bytes_of(self, case: Case) -> int:
        """What a step reads at least: on a GPU, inputs rotate until they exceed its L2 cache."""

    @abstractmethod
    def plan(self) -> timing.Plan:
        """How long a group is timed."""

    def skips(self, case: Case, provider: str) -> bool:
        """Whether a provider has nothing to show at a case."""
        return False

    def patience(self) -> float:
        """The seconds that a forward pass may take at most, else its provider is left out."""
        return math.inf

    def measure_memory(self, subject: Subject, recorder: Recorder) -> dict[str, Any]:
        """Fields of a subject's rows that say what memory its step needs."""
        return {}

    def further_rows(
        self, subjects: Sequence[Subject], rows: Sequence[Row], recorder: Recorder
    ) -> Iterator[Row]:
        """Rows of other clocks; `rows` are those of the group, which was timed just now."""
        return iter(())

    # ---- What is said of it ----

    @abstractmethod
    def targets(self, rows: Sequence[Row]) -> list[Row]:
        """What this project asks of itself, as far as it was measured."""

    @abstractmethod
    def print_tables(self, terminal: Terminal, rows: Sequence[Row]) -> None:
        """The results, for a reader."""

    @abstractmethod
    def draw(self, content: Mapping[str, Any], path: Path) -> None:
        """The picture of a results file."""
