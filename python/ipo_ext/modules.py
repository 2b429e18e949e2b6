"""The loss as ``nn.Module``: the settings held once, the call that of the function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss, ipo_loss_from_hidden
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


class LinearIPOLoss(nn.Module):
    """``ipo_loss_from_hidden`` with its settings; without parameters: the weight is an argument.

    Args:
        config: bounds and taus; default ``IPOConfig()``.
        softcap, chunk_size: as for ``ipo_loss_from_hidden``.
    """

    def __init__(
        self,
        config: IPOConfig | None = None,
        *,
        softcap: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else IPOConfig()
        self.softcap = softcap
        self.chunk_size = chunk_size

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        inference_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        loss_mask: torch.Tensor,
        **optional: Any,
    ) -> IPOOutput:
        """As ``ipo_loss_from_hidden``, which names the optional arguments."""
        return ipo_loss_from_hidden(
            hidden,
            weight,
            labels,
            inference_logprobs,
            advantages,
            loss_mask,
            config=self.config,
            **{"softcap": self.softcap, "chunk_size": self.chunk_size, **optional},
        )

    def extra_repr(self) -> str:
        return f"{self.config}, softcap={self.softcap}, chunk_size={self.chunk_size}"


class IPOLMHead(LinearIPOLoss):
    """An LM head that gives the loss: takes the place, the weight and the parameter name of one.

    The weight is the very parameter of ``linear``, so a head tied to the embedding stays tied and a
    state dict keeps its keys. Without labels it is that head still, and gives logits.

    Args:
        linear: the head, an ``nn.Linear`` without bias.
        config, softcap, chunk_size: as for ``LinearIPOLoss``.

    Raises:
        TypeError: ``linear`` is no ``nn.Linear``.
        ValueError: it has a bias.

    Example:
        >>> model.lm_head = IPOLMHead(model.lm_head)
        >>> out = model.lm_head(hidden[:, :-1], tokens[:, 1:], inference, advantages, mask)
        >>> out.loss.backward()
    """

    def __init__(
        self,
        linear: nn.Linear,
        config: IPOConfig | None = None,
        *,
        softcap: float | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(config, softcap=softcap, chunk_size=chunk_size)
        if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
            raise TypeError(
                f"linear: expected an nn.Linear, got {type(linear).__name__}, whose forward may "
                "compute something else"
            )
        if linear.bias is not None:
            raise ValueError(
                f"linear: expected an nn.Linear without bias, got {linear}: the loss from hidden "
                "states has no place for one"
            )
        self.weight: nn.Parameter = linear.weight

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, *args: Any, **optional: Any
    ) -> IPOOutput | torch.Tensor:
        """``LinearIPOLoss`` over the head's own weight; ``[..., V]`` logits without labels."""
        if labels is None:
            if args or optional:
                raise TypeError(
                    "labels: expected a tensor beside the loss's other arguments, got None; "
                    "without labels the head gives logits, of the hidden states alone"
                )
            logits = F.linear(hidden, self.weight)
            return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()
        return super().forward(hidden, self.weight, labels, *args, **optional)
