"""Interleaved timing: subjects take turns in one run, so that drift and load fall on all alike."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import torch

Mark = Callable[[], None]
Step = Callable[[Mark], object]  # one piece of work; calls mark() at the end of each of its phases
Durations = tuple[float, ...]  # seconds of each phase
Key = TypeVar("Key", bound=Hashable)  # what a subject is called


# ---- Clocks ----


class Clock(Protocol):
    name: str  # as the results files have it

    def time(self, step: Step) -> Durations: ...


class WallClock:
    """time.perf_counter: work on the CPU."""

    name = "wall"

    def time(self, step: Step) -> Durations:
        now = time.perf_counter
        marks = [now()]
        step(lambda: marks.append(now()))
        return _differences(marks)


class EventClock:
    """CUDA events: from the first kernel's turn to the last one's end, launches by Python included.

    Args:
        flush: a buffer larger than the L2 cache, overwritten before each step so that it finds
            none of its inputs there; None leaves the cache as it is.
    """

    name = "events"

    def __init__(self, flush: torch.Tensor | None = None) -> None:
        self.flush = flush

    def time(self, step: Step) -> Durations:
        if self.flush is not None:
            self.flush.zero_()
        torch.cuda.synchronize()
        marks: list[torch.cuda.Event] = []

        def mark() -> None:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

        mark()
        step(mark)
        torch.cuda.synchronize()
        pairs = itertools.pairwise(marks)
        return tuple(before.elapsed_time(after) * 1e-3 for before, after in pairs)


def _differences(marks: Sequence[float]) -> Durations:
    return tuple(after - before for before, after in itertools.pairwise(marks))


# ---- Turns ----


class Plan(NamedTuple):
    """How long to measure."""

    seconds: float = 2.0  # for all subjects together
    warmup: int = 3
    least: int = 5  # timings of a subject, however slow it is
    most: int = 400
    settle: int = 1  # untimed runs before each timed one: the caches are a subject's own


def interleave(
    subjects: Mapping[Key, Sequence[Step]],
    clock: Clock,
    plan: Plan = Plan(),  # noqa: B008  (immutable)
) -> dict[Key, list[Durations]]:
    """Times the subjects in alternation; a subject's steps (its input sets) take turns as well.

    Every round goes through the subjects from a different first one. Subjects share the time, so
    a slow one sits out rounds, evenly spread over the run.
    """
    with _no_garbage_collection():
        estimates = {name: _warm_up(steps, clock, plan) for name, steps in subjects.items()}
        share = plan.seconds / len(subjects)
        turns = {
            name: max(plan.least, min(plan.most, int(share / seconds / (1 + plan.settle))))
            for name, seconds in estimates.items()
        }
        timings: dict[Key, list[Durations]] = {name: [] for name in subjects}
        for name in _schedule(turns):
            step = subjects[name][len(timings[name]) % len(subjects[name])]
            for _ in range(plan.settle):
                clock.time(step)
            timings[name].append(clock.time(step))
        return timings


def _schedule(turns: Mapping[Key, int]) -> Iterator[Key]:
    """Each name as often as `turns` says, its turns evenly spread over the rounds."""
    names = list(turns)
    rounds = max(turns.values())
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            if (index + 1) * turns[name] // rounds > index * turns[name] // rounds:
                yield name


def _warm_up(steps: Sequence[Step], clock: Clock, plan: Plan) -> float:
    """The shortest of a few untimed runs; a subject that takes long runs once."""
    shortest = math.inf
    for index in range(max(plan.warmup, len(steps))):
        shortest = min(shortest, max(sum(clock.time(steps[index % len(steps)])), 1e-9))
        if shortest > plan.seconds / 4:
            break
    return shortest


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
