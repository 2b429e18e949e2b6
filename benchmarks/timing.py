"""Interleaved timing: subjects take turns in one run, so that drift and load fall on all alike."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

Mark = Callable[[], None]
Step = Callable[[Mark], object]  # one piece of work; calls mark() at the end of each of its phases
Durations = tuple[float, ...]  # seconds of each phase


# ---- Statistics ----


class Summary(NamedTuple):
    """Median and quartiles of a number of timings, in seconds."""

    median: float
    lower: float
    upper: float
    minimum: float
    count: int


def summarise(values: Sequence[float]) -> Summary:
    """Median, quartiles (inclusive: of one value, itself), minimum and count."""
    if len(values) == 1:
        return Summary(values[0], values[0], values[0], values[0], 1)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median, lower, upper, min(values), len(values))


class Ratio(NamedTuple):
    """How many times as long `theirs` takes as `ours`: of the medians, and a range for it.

    The range pairs their lower quartile with our upper one, and the reverse: wider than an error
    of the median, so a target that `low` meets is met on a busy machine too.
    """

    value: float
    low: float
    high: float


def ratio(theirs: Summary, ours: Summary) -> Ratio:
    return Ratio(theirs.median / ours.median, theirs.lower / ours.upper, theirs.upper / ours.lower)


# ---- Clocks ----


class Clock(Protocol):
    def time(self, step: Step) -> Durations: ...


class WallClock:
    """time.perf_counter: work on the CPU."""

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


# ---- CUDA: caches and graphs ----


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties().L2_cache_size)


def flush_buffer() -> torch.Tensor:
    """Twice the L2 cache, for EventClock."""
    return torch.empty(2 * l2_bytes(), dtype=torch.int8, device="cuda")


def sets_beyond_cache(bytes_per_set: int, cache_bytes: int, most: int = 64) -> int:
    """How many input sets to rotate so that together they are twice the cache, at most `most`."""
    return max(1, min(most, math.ceil(2 * cache_bytes / bytes_per_set)))


def graph_step(calls: Sequence[Callable[[], object]]) -> Step:
    """A step that replays one CUDA graph of all `calls`: their kernels without Python between.

    Divide its duration by `len(calls)`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Held until all are captured: otherwise every call would write into the same memory, and
        # find it in the cache.
        outputs = [call() for call in calls]

    def step(mark: Mark) -> object:
        graph.replay()
        mark()
        return outputs

    return step


# ---- Turns ----


class Plan(NamedTuple):
    """How long to measure."""

    seconds: float = 2.0  # for all subjects together
    warmup: int = 3
    least: int = 5  # timings of a subject, however slow it is
    most: int = 400
    settle: int = 1  # untimed runs before each timed one: the caches are a subject's own


def interleave(
    subjects: Mapping[str, Sequence[Step]],
    clock: Clock,
    plan: Plan = Plan(),  # noqa: B008  (immutable)
) -> dict[str, list[Durations]]:
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
        timings: dict[str, list[Durations]] = {name: [] for name in subjects}
        for name in _schedule(turns):
            step = subjects[name][len(timings[name]) % len(subjects[name])]
            for _ in range(plan.settle):
                clock.time(step)
            timings[name].append(clock.time(step))
        return timings


def _schedule(turns: Mapping[str, int]) -> Iterator[str]:
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
