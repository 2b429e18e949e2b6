"""The loss as ``nn.Module``: the settings held once, the call that of the function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss
from ipo_ext.output import IPOOutput


class IPOLoss(nn.Module):
    """``ipo_loss`` with its config; without parameters or state.

    Args:
        config: bounds and taus; default ``IPOConfig()``.
    """

    def __init__(self, config: IPOConfig | None = None) -> None:
        super().__init__()
        self.config = config if config is not None else IPOConfig()

    def forward(
        self,
        trainer_logprobs: torch.Tensor,
        inference_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        loss_mask: torch.Tensor,
        **optional: Any,
    ) -> IPOOutput:
        """As ``ipo_loss``, which names the optional arguments."""
        return ipo_loss(
            trainer_logprobs,
            inference_logprobs,
            advantages,
            loss_mask,
            config=self.config,
            **optional,
        )

    def extra_repr(self) -> str:
        return repr(self.config)
