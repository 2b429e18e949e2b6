"""The kernels alone on a GPU, by CUDA graphs; how many a step launches, and whether it waits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks.harness import cuda, results, timing, words
from benchmarks.harness.benchmark import Recorder, Subject
from benchmarks.harness.results import Row
from benchmarks.harness.step import Work

WAITS = ("upstream_loop",)  # for the device: no graph can hold it


def rows(
    subjects: Sequence[Subject], plan: timing.Plan, phases: Sequence[str], recorder: Recorder
) -> Iterator[Row]:
    """Device time of a case's providers without Python; the metrics stay on the device.

    The clock "graph" is of forward and backward, "graph/forward" of the forward pass alone. A
    graph goes once through all of the rotated inputs.
    """
    steps = {}
    for subject in subjects:
        if subject.provider in WAITS:
            continue
        for clock, calls in _calls(subject.works).items():
            try:
                steps[subject.provider, clock] = [cuda.graph_step(calls)]
            except Exception as error:
                reason = f"graph capture failed: {words.first_line(error)}"
                recorder.leave_out(subject.case, f"{subject.provider}, {clock}", reason)
                torch.cuda.synchronize()
    case, sets = subjects[0].case, len(subjects[0].works)
    for (name, clock), values in timing.interleave(steps, timing.EventClock(), plan).items():
        each = [[seconds / sets for seconds in value] for value in values]
        yield results.make_row(case, name, each, phases, clock=clock)


def _calls(works: Sequence[Work]) -> dict[str, list[Callable[[], object]]]:
    """By clock, what a graph holds: a call for each input set."""
    forwards = [work.forward for work in works]
    if works[0].backward is None:  # a floor
        return {"graph": forwards}
    one = torch.ones((), device="cuda")
    return {"graph/forward": forwards, "graph": [_both(work, one) for work in works]}


def _both(work: Work, grad_out: torch.Tensor | None) -> Callable[[], object]:
    def call() -> object:
        outcome = work.forward()
        return work.backward(outcome, grad_out), outcome

    return call


def audit(work: Work) -> dict[str, bool | int | None]:
    """Whether a step makes the host wait, and how many kernels its forward pass launches."""
    return {
        "host_synchronisation": cuda.waits_for_device(_both(work, None)),
        "forward_launches": cuda.launches(work.forward),
    }
