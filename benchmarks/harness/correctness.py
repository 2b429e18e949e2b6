"""Correct first: a provider's loss, gradients and metrics beside what they must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from benchmarks.harness.step import Work


class Expected(NamedTuple):
    """What a step must give, and how far a provider may be from it.

    Attributes:
        loss: the exact loss.
        loss_scale: what its error is relative to: the size of the terms that are added up.
        gradients: by name, in fp32, one for each of the batch's leaves.
        limits: the largest relative errors of "loss", of each gradient and of "metrics".
        metrics: by name; those that a provider has are compared.
        drops_tokens: whether a gradient's zeros say which tokens are dropped, so that a provider
            must have the same.
    """

    loss: float
    loss_scale: float
    gradients: Mapping[str, torch.Tensor]
    limits: Mapping[str, float]
    metrics: Mapping[str, torch.Tensor] | None = None
    drops_tokens: bool = False


def errors(work: Work, expected: Expected) -> dict[str, float]:
    """The relative error of each part of a step.

    Raises:
        ValueError: if one is too large: which, how large, how large it may be.
    """
    outcome = work.forward()
    gradients = work.backward(outcome, None)
    loss, metrics = outcome[:2]
    found = {"loss": abs(loss.item() - expected.loss) / expected.loss_scale}
    for ours, (name, theirs) in zip(gradients, expected.gradients.items(), strict=True):
        if expected.drops_tokens and not torch.equal(ours == 0, theirs == 0):
            raise ValueError(f"{name}: other tokens were dropped than by the reference")
        found[name] = float((ours.float() - theirs).norm() / theirs.norm())
    if metrics is not None and expected.metrics is not None:
        found["metrics"] = _largest_error(metrics, expected.metrics)
    for name, error in found.items():
        if not error < expected.limits[name]:  # a NaN is wrong too
            limit = expected.limits[name]
            raise ValueError(f"{name}: relative error {error:.1e}, at most {limit:g} expected")
    return found


def _largest_error(
    metrics: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> float:
    """Of the metrics that both have; relative to values near zero as if they were 0.01."""
    largest = [
        ((metrics[name] - value).abs() / (value.abs() + 1e-2)).max()
        for name, value in expected.items()
        if name in metrics
    ]
    return float(torch.stack(largest).max())  # a NaN stays one
