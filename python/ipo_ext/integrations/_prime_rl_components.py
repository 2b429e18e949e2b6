"""prime-rl's other two components, cross-entropy and distillation, as settings of the same loss."""

from __future__ import annotations

import dataclasses
import math

import torch

from ipo_ext._numbers import is_number
from ipo_ext._prime_rl_sections import NEWEST
from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss
from ipo_ext.output import IPOOutput

# -w logprob, the cross-entropy: REINFORCE of an advantage of 1.
_CE = IPOConfig(mask_rule="none", pg_form="reinforce", kl_tau=0.0)
# -w (ref - trainer) min(r, 1e4), the difference a constant; dropped where p - q < -0.2.
_REF_KL = IPOConfig(
    0.2,
    math.inf,
    mask_rule="prob_diff",
    pg_form="capped",
    ratio_cap=1e4,
    adv_tau=0.0,
    teacher_tau=1.0,
    kl_tau=0.0,
)
# Until 2026-08 without the cap, and every token paid 1e-3 x^2.
_REF_KL_OF_VERSION = {
    NEWEST: _REF_KL,
    "2026-08": dataclasses.replace(
        _REF_KL, pg_form="ratio", ratio_cap=None, kl_tau=1e-3, kl_scope="active"
    ),
}


def check_version(version: str) -> None:
    if version not in _REF_KL_OF_VERSION:
        raise ValueError(
            f"version: expected one of {', '.join(_REF_KL_OF_VERSION)}, got {version!r}"
        )


def check_scale(name: str, scale: float | torch.Tensor, least: int = 1) -> None:
    """By upstream's name for it, before it is the normalizer of a component.

    A scale of no tokens is 1 upstream where the component always is, else 0.
    """
    if isinstance(scale, torch.Tensor):
        _check_scale_tensor(name, scale)
    elif not is_number(scale):
        raise TypeError(
            f"{name}: expected a number of tokens or a 0-dim tensor, got {type(scale).__name__}"
        )
    elif not scale < math.inf or scale < 0 or (scale == 0 and least > 0):
        bound = "> 0" if least > 0 else ">= 0"
        raise ValueError(f"{name}: expected a number of tokens {bound} or a tensor, got {scale!r}")


def _check_scale_tensor(name: str, scale: torch.Tensor) -> None:
    if scale.dtype == torch.bool or scale.is_complex():
        raise TypeError(f"{name}: expected a tensor of floats or integers, got {scale.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"{name}: expected a tensor of one element, got {list(scale.shape)}")
    if scale.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor that does not require grad; pass {name}.detach()"
        )
    if scale.is_cpu and not scale >= 0:  # on a GPU, to look would wait for it
        raise ValueError(f"{name}: expected a number of tokens >= 0, got {scale.item()}")


def cross_entropy(
    trainer: torch.Tensor, weights: torch.Tensor, scale: float | torch.Tensor
) -> IPOOutput:
    """Its ``teacher_kl``, of a teacher that is certain, is the mean of -logprob."""
    constant = trainer.detach()
    return ipo_loss(
        trainer,
        constant,
        torch.ones_like(constant),
        weights != 0,
        teacher_logprobs=torch.zeros_like(constant),
        loss_weights=weights,
        normalizer=_as_tensor(scale, trainer),
        config=_CE,
    )


def distillation(
    trainer: torch.Tensor,
    inference: torch.Tensor,
    ref: torch.Tensor,
    weights: torch.Tensor,
    scale: float | torch.Tensor,
    version: str,
) -> IPOOutput:
    return ipo_loss(
        trainer,
        inference,
        torch.zeros_like(inference),
        weights != 0,
        teacher_logprobs=ref,
        loss_weights=weights,
        normalizer=_as_tensor(scale, trainer),
        config=_REF_KL_OF_VERSION[version],
    )


def _as_tensor(scale: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A scale of 0, of a step without tokens of the component, is a loss of 0."""
    return torch.as_tensor(scale, dtype=torch.float64).to(like.device, non_blocking=True)
