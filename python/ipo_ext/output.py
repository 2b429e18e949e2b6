"""What every form of the loss returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ipo_ext._ops import torch_internals


class IPOOutput(NamedTuple):
    """Loss, metrics and, where logits are seen, per-token log-probabilities and entropies.

    Attributes:
        loss: 0-dim, in the compute dtype (float64 if either log-probability is, else float32).
        metrics: name to tensor, ``[]``, or ``[segments]`` with ``cu_seqlens``; an ``IPOMetrics``.
        logprobs: per token, float32 (float64 for float64 logits), detached; None where
            the loss is made from log-probabilities.
        entropy: likewise.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor]
    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


# So that an exported program that returns it can be saved.
torch_internals.register_namedtuple(IPOOutput, name="ipo_ext.IPOOutput")
