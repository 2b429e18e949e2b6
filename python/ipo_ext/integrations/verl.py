"""The loss as verl policy loss ``"ipo"``: registered on import, aggregated by verl's own modes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss

from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss

_DEFAULT = IPOConfig()


def register(ipo_config: IPOConfig = _DEFAULT, name: str = "ipo") -> None:
    """Registers the loss for ``actor.policy_loss.loss_mode=<name>``, replacing what had the name.

    The function that verl then calls takes ``old_log_prob`` as what the tokens were sampled with
    (``algorithm.rollout_correction.bypass_mode=True`` puts the engine's own there), a response as
    a sequence, and ``rollout_is_weights`` as weights of the tokens' losses.

    Raises:
        ValueError: ``teacher_tau`` is above 0: verl passes no teacher.
    """
    if ipo_config.teacher_tau > 0:
        raise ValueError(
            f"teacher_tau: expected 0, got {ipo_config.teacher_tau!r}: verl passes no teacher's "
            "log-probabilities to a policy loss"
        )

    def policy_loss(
        old_log_prob: torch.Tensor,  # [responses, tokens], as all below
        log_prob: torch.Tensor,
        advantages: torch.Tensor,
        response_mask: torch.Tensor,
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        _refuse_what_is_not_honoured(config)
        mask = response_mask.bool()
        weights = _token_weights(mask, loss_agg_mode, config.global_batch_info)
        # Weights of mean 1 over the tokens, so that weighted metrics do not depend on the mode.
        total = weights.sum()
        mean = torch.where(total > 0, total / mask.sum(), 1)
        weights = weights / mean
        out = ipo_loss(
            log_prob,
            old_log_prob,
            advantages,
            mask,
            loss_weights=weights if rollout_is_weights is None else weights * rollout_is_weights,
            normalizer=1 / mean,
            config=ipo_config,
        )
        return out.loss, _named_as_in_verl(out.metrics)

    register_policy_loss(name)(policy_loss)


def _token_weights(mask: torch.Tensor, mode: str, batch: dict[str, Any]) -> torch.Tensor:
    """What verl multiplies each token's loss by: its aggregation is linear, the gradient tells."""
    with torch.enable_grad():
        losses = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        aggregated = agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=mode, **batch)
    return torch.autograd.grad(aggregated, losses)[0]


def _named_as_in_verl(metrics: Any) -> dict[str, float]:
    """Ours under ``actor/ipo/``, and the three that every policy loss of verl reports."""
    values = metrics.tolist()
    return {
        "actor/pg_clipfrac": values["is_masked"],
        "actor/pg_clipfrac_lower": values["is_masked_low"],
        "actor/ppo_kl": values["mismatch_kl"],
        **{f"actor/ipo/{name}": value for name, value in values.items()},
    }


_OTHER_LOSS = "it belongs to another loss"
_BOUNDS = "this loss drops tokens by a mask and clips nothing; set the bounds of ipo_config"
_NOT_HONOURED = {
    "clip_ratio": _BOUNDS,
    "clip_ratio_low": _BOUNDS,
    "clip_ratio_high": _BOUNDS,
    "clip_ratio_c": _BOUNDS,
    "tau_pos": _OTHER_LOSS,
    "tau_neg": _OTHER_LOSS,
    "clip_cov_ratio": _OTHER_LOSS,
    "clip_cov_lb": _OTHER_LOSS,
    "clip_cov_ub": _OTHER_LOSS,
    "kl_cov_ratio": _OTHER_LOSS,
    "ppo_kl_coef": _OTHER_LOSS,
    "dro_beta": _OTHER_LOSS,
}


def _refuse_what_is_not_honoured(config: Any) -> None:
    policy_loss = config.get("policy_loss")
    for section in filter(None, (config, policy_loss)):
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if field.name in _NOT_HONOURED and value != field.default:
                raise ValueError(
                    f"{field.name}: expected the default {field.default!r}, got {value!r}: "
                    f"{_NOT_HONOURED[field.name]}"
                )
    correction = policy_loss and policy_loss.get("rollout_correction")
    if not correction or not correction.get("bypass_mode"):
        return  # decoupled: verl has applied it to the mask and to rollout_is_weights
    for name, expected in (("rollout_rs", None), ("loss_type", "ppo_clip")):
        value = correction.get(name)
        if value != expected:
            raise ValueError(
                f"rollout_correction.{name}: expected {expected!r} in bypass mode, got {value!r}: "
                "verl leaves it to its own bypass loss; set a mask rule of ipo_config instead"
            )


register()
