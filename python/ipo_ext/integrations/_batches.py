"""What several adapters make of a host's batch: packed sequences, and weights of its average."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch


def cu_seqlens_of(sequences: Sequence[torch.Tensor]) -> torch.Tensor:
    ends = itertools.accumulate((len(tokens) for tokens in sequences), initial=0)
    return torch.tensor(list(ends), dtype=torch.int32).to(sequences[0].device, non_blocking=True)


def weights_of(
    aggregate: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    """What a host multiplies each token's loss by: the gradient of its linear aggregation."""
    with torch.enable_grad():
        losses = torch.zeros(like.shape, device=like.device, requires_grad=True)
        aggregated = aggregate(losses)
    return torch.autograd.grad(aggregated, losses)[0]


def of_mean_one(weights: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``loss_weights`` and ``normalizer`` that mean ``weights``; metrics then do not depend on
    how the host averages."""
    total = weights.sum()
    mean = torch.where(total > 0, total / mask.sum(), 1)
    return weights / mean, 1 / mean


# The metrics that are means over active tokens, so that shares of them add up.
PER_TOKEN = (
    *("mismatch_kl", "is_masked", "is_masked_low", "is_masked_high", "nonfinite"),
    *("pg_loss", "kl_loss", "teacher_kl", "rollout_dropped", "entropy"),
    *("sequence_dropped", "is_clipped", "ratio_capped"),
)


def per_token_shares(metrics: Any, share: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """By name, for a host that adds up what micro-batches and ranks report; ``share`` is theirs."""
    for name, value in metrics.total().items():
        if name in PER_TOKEN:
            yield name, value * share
