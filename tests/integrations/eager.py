"""The loss as a user would write it by hand: the yardstick inside the trainers' own loops."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch

from ipo_ext import IPOConfig


def token_losses(
    logprobs: torch.Tensor,
    sampled: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: IPOConfig,
) -> torch.Tensor:
    """Per token, 0 where it is dropped. ``sampled`` may hold NaN, which drops."""
    x = logprobs - sampled
    low, high = math.log(config.dppo_mask_low), math.log(config.dppo_mask_high)
    keep = mask & (x >= low) & (x <= high)
    x = torch.where(keep, x, 0)
    loss = -config.adv_tau * advantages * x.exp() + config.kl_tau * x**2
    return torch.where(keep, loss, 0)


def assert_same_step(
    loss: torch.Tensor | float,
    expected: torch.Tensor,
    gradients: Iterable[torch.Tensor],
    theirs: Iterable[torch.Tensor],
) -> None:
    """A training step inside a host against the same one by hand: the loss and every gradient."""
    loss, expected = torch.as_tensor(loss).double(), expected.double()
    pairs = [(ours.double(), other.double()) for ours, other in zip(gradients, theirs, strict=True)]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
    for ours, other in pairs:
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-6)
    record_step(loss, expected, pairs)


def record_step(
    loss: torch.Tensor, expected: torch.Tensor, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """How far apart they are, a line of the file that ``IPO_EXT_STEPS`` names.

    ``scripts/test_integrations.py`` makes its table of it.
    """
    if file := os.environ.get("IPO_EXT_STEPS"):
        pairs = list(pairs)
        difference = max((ours - other).abs().max().item() for ours, other in pairs)
        largest = max(other.abs().max().item() for _, other in pairs)
        step = {
            "loss": (loss - expected).abs().item() / max(expected.abs().item(), 1e-30),
            "gradient": difference / max(largest, 1e-30),
        }
        with Path(file).open("a") as lines:
            lines.write(json.dumps(step) + "\n")
