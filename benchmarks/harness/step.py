"""The work of a provider on a batch, phase by phase, and the step that is timed of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from benchmarks.harness.timing import Mark, Step


class Batch(Protocol):
    """A benchmark's inputs: a NamedTuple of tensors and whatever else the host knows of them."""

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """The inputs whose gradients a step makes."""


AnyBatch = TypeVar("AnyBatch", bound=tuple)
Outcome = tuple[Any, ...]  # of a forward pass: loss, metrics or None, what else backward needs
Gradients = tuple[torch.Tensor, ...]


class Work(NamedTuple):
    """What a provider does with one batch, phase by phase; a floor has no loss, None instead."""

    forward: Callable[[], Outcome]
    backward: Callable[[Outcome, torch.Tensor | None], Gradients] | None = None  # takes grad_out
    read: Callable[[Outcome], object] | None = None  # brings the metrics into host memory


Bind = Callable[[Any], Work]  # takes a batch


# ---- Ways to make it ----


def by_autograd(
    call: Callable[[Any], Outcome], read: Callable[[Outcome], object] | None = None
) -> Bind:
    """Work whose forward calls a function of the batch, which returns loss and metrics."""

    def bind(batch: Batch) -> Work:
        leaves = batch.leaves

        def backward(outcome: Outcome, grad_out: torch.Tensor | None) -> Gradients:
            return torch.autograd.grad(outcome[0], leaves, grad_out)

        return Work(lambda: call(batch), backward, read)

    return bind


def loss_by_autograd(loss_of: Callable[[Any], torch.Tensor]) -> Bind:
    """The same for a function that returns the loss alone."""
    return by_autograd(lambda batch: (loss_of(batch), None))


def on_a_copy(bind: Bind) -> Bind:
    """For a provider that overwrites its inputs."""
    return lambda batch: bind(elsewhere(batch))


def elsewhere(batch: AnyBatch) -> AnyBatch:
    """The same batch in other memory."""
    return type(batch)(*(_copy(value) for value in batch))


def _copy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


# ---- A step ----


def step_of(work: Work, grad_out: torch.Tensor | None = None) -> Step:
    """Forward, backward and reading the metrics, as far as there are any, a mark after each."""
    forward, backward, read = work

    def step(mark: Mark) -> object:
        outcome = forward()
        mark()
        gradients = numbers = None
        if backward is not None:
            gradients = backward(outcome, grad_out)
            mark()
        if read is not None:
            numbers = read(outcome)
            mark()
        return outcome, gradients, numbers

    return step
