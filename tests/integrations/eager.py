"""The loss as a user would write it by hand: the yardstick inside the trainers' own loops."""

from __future__ import annotations

import math

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
