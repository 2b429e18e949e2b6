"""Random logits, the same for every provider."""

from __future__ import annotations

from typing import NamedTuple

import torch

import ipo_ext
from ipo_ext import IPOConfig

CONFIG = IPOConfig()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Batch(NamedTuple):
    logits: torch.Tensor  # [rows, columns], requires grad
    labels: torch.Tensor  # [rows], like the rest
    inference_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor]:
        return (self.logits,)


def make_batch(rows: int, columns: int, dtype: str, device: str) -> Batch:
    """Every row active, none dropped: what is left out would only flatter us."""
    random = torch.Generator(device).manual_seed(0)
    like = {"generator": random, "device": device}
    logits = torch.randn(rows, columns, **like).mul_(3).to(DTYPES[dtype])
    labels = torch.randint(columns, (rows,), **like)
    logprobs, _ = ipo_ext.token_logprobs(logits, labels)
    inference = logprobs + 0.3 * torch.randn(rows, **like)
    advantages = torch.randn(rows, **like)
    mask = torch.ones(rows, dtype=torch.bool, device=device)
    return Batch(logits.requires_grad_(), labels, inference, advantages, mask)
