"""What every form of the loss returns."""

from __future__ import annotations

from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any, NamedTuple, Protocol

import torch

from ipo_ext._ops import torch_internals


class Metrics(Protocol):
    """Name to tensor, read as a dict is: an ``IPOMetrics``, or the dict of the reference."""

    def keys(self) -> KeysView[str]: ...
    def values(self) -> ValuesView[torch.Tensor]: ...
    def items(self) -> ItemsView[str, torch.Tensor]: ...
    def get(self, name: str, default: Any = None, /) -> Any: ...
    def __getitem__(self, name: str, /) -> torch.Tensor: ...
    def __contains__(self, name: object, /) -> bool: ...
    def __len__(self) -> int: ...


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
    metrics: Metrics
    logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


# So that an exported program that returns it can be saved.
torch_internals.register_namedtuple(IPOOutput, name="ipo_ext.IPOOutput")
