"""What every tier returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree


class IPOOutput(NamedTuple):
    """Loss, metrics and, where a tier computes them, per-token log-probabilities and entropies.

    Attributes:
        loss: 0-dim, in the compute dtype (float64 if either log-probability is, else float32).
        metrics: name to tensor, ``[]``, or ``[segments]`` with ``cu_seqlens``; an ``IPOMetrics``.
        logprobs: per token, float32 (float64 for float64 logits), detached; None in tier 1.
        entropy: likewise.
    """

    loss: torch.Tensor
    metrics: Mapping[str, torch.Tensor]
    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


# So that an exported program that returns it can be saved.
pytree._register_namedtuple(IPOOutput, serialized_type_name="ipo_ext.IPOOutput")
