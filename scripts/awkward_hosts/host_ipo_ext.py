"""Ours, with its defaults."""

from __future__ import annotations

import torch
from measure import Batch

from ipo_ext import ipo_loss, ipo_loss_from_hidden, token_logprobs


def loss(batch: Batch) -> torch.Tensor:
    return ipo_loss(
        batch.trainer,
        batch.sampled,
        batch.advantages,
        batch.mask,
        normalizer=batch.mask.sum().clamp(min=1),
    ).loss


def from_hidden(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    everything = torch.ones_like(ids, dtype=torch.bool)
    zeros = torch.zeros(ids.shape)
    identity = torch.eye(logits.shape[-1])
    return ipo_loss_from_hidden(logits, identity, ids, zeros, zeros, everything).logprobs


LOSSES = {"`ipo_loss`": loss}
LOGPROBS = {
    "`token_logprobs`": lambda logits, ids: token_logprobs(logits, ids)[0],
    "`ipo_loss_from_hidden`": from_hidden,
}
