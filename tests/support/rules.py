"""Settings of every mask rule, and how near to its bounds rounding may decide either way."""

from __future__ import annotations

import dataclasses
import math

import torch

from ipo_ext import IPOConfig, reference

RULES = {
    "dppo": IPOConfig.dppo(kl_tau=0.05),
    "dppo-lopsided": IPOConfig.dppo(0.05, 0.3, kl_tau=0.05),
    "prob-diff": IPOConfig.prob_diff(kl_tau=0.05),
    "kpop": IPOConfig.kpop(0.05, kl_tau=0.05),
    "ratio-kl-active": IPOConfig(kl_scope="active", kl_tau=0.05),
    "dppo-kl-kept": dataclasses.replace(IPOConfig.dppo(), kl_scope="kept", kl_tau=0.05),
    "everything": IPOConfig.kpop(math.inf),
    "nothing": IPOConfig.prob_diff(0.0),
}


def score(
    config: IPOConfig, trainer_logprobs: torch.Tensor, inference_logprobs: torch.Tensor
) -> torch.Tensor:
    """What an exponential rule compares with its bounds, per token, in the inputs' dtype."""
    p, q = trainer_logprobs.exp(), inference_logprobs.exp()
    if config.mask_rule == "kpop":
        return torch.maximum(reference._binary_kl(p, q), reference._binary_kl(q, p))
    return p - q


def rounding(
    config: IPOConfig,
    trainer_logprobs: torch.Tensor,
    inference_logprobs: torch.Tensor,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """How far the compute dtype may be from ``score`` in float64."""
    steepness = 40.0 if config.mask_rule == "kpop" else 8.0
    total = trainer_logprobs.double().exp() + inference_logprobs.double().exp()
    return steepness * torch.finfo(compute_dtype).eps * (1 + total)
