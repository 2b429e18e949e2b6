"""Random hidden states and a head, the same for every provider."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

import ipo_ext
from ipo_ext import IPOConfig

CONFIG = IPOConfig()


class Batch(NamedTuple):
    hidden: torch.Tensor  # [N, H], requires grad
    weight: torch.Tensor  # [V, H], requires grad
    labels: torch.Tensor  # [N], as all that follow
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    num_active: int  # known to the data loader

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.hidden, self.weight


def make_batch(
    tokens: int,
    width: int,
    vocabulary: int,
    *,
    active: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Batch:
    """Random tokens, a share of them active; about 2% of the active ones are dropped.

    No log-ratio lies near the band's ends, where logits rounded to bf16 could decide otherwise:
    every provider has to keep the same tokens.
    """
    random = torch.Generator(device).manual_seed(seed)
    like: dict[str, Any] = {"generator": random, "device": device}
    hidden = torch.randn(tokens, width, **like).to(dtype)
    weight = torch.randn(vocabulary, width, **like).div_(width**0.5).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), **like)
    log_ratio = torch.randn(tokens, **like) * 0.7
    for bound in CONFIG.log_bounds(torch.float32):
        near = (log_ratio - bound).abs() < 0.25
        log_ratio = torch.where(near, torch.full_like(log_ratio, bound * 0.8), log_ratio)
    num_active = round(tokens * active)
    loss_mask = torch.zeros(tokens, dtype=torch.bool, device=device)
    loss_mask[torch.randperm(tokens, **like)[:num_active]] = True
    advantages = torch.randn(tokens, **like)
    trainer, _ = ipo_ext.linear_token_logprobs(hidden, weight, labels)
    return Batch(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        labels=labels,
        inference_logprobs=trainer - log_ratio,
        advantages=advantages,
        loss_mask=loss_mask,
        num_active=num_active,
    )
