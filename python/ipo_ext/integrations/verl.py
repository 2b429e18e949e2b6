"""The loss as verl policy loss ``"ipo"``: registered on import, aggregated by verl's own modes."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from verl.trainer.config import RolloutCorrectionConfig
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.config import omega_conf_to_dataclass

from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss
from ipo_ext.integrations._batches import of_mean_one, weights_of
from ipo_ext.integrations._refusals import (
    BOUNDS,
    OTHER_LOSS,
    refuse_a_teacher,
    refuse_changed_fields,
    refuse_other_kinds,
    refuse_other_shapes,
)
from ipo_ext.integrations._sampling import warn_of_another_distribution
from ipo_ext.integrations._verl_correction import (
    HAND_OVER,
    kept_by,
    loss_of,
    refuse_what_is_not_handed_over,
    rejection_of,
)

_DEFAULT = IPOConfig()


def register(ipo_config: IPOConfig = _DEFAULT, name: str = "ipo") -> None:
    """Registers the loss for ``actor.policy_loss.loss_mode=<name>``, replacing what had the name.

    The function that verl then calls takes ``old_log_prob`` as what the tokens were sampled with
    (``algorithm.rollout_correction.bypass_mode=True`` puts the engine's own there), a response as
    a sequence, and ``rollout_is_weights`` as weights of the tokens' losses.

    Raises:
        ValueError: ``teacher_tau`` is above 0: verl passes no teacher.
    """
    refuse_a_teacher(ipo_config, "verl")

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
        correction = _handed_over(config.policy_loss.get("rollout_correction"))
        given = {
            "log_prob": log_prob,
            "old_log_prob": old_log_prob,
            "advantages": advantages,
            "response_mask": response_mask,
        }
        if rollout_is_weights is not None:
            given["rollout_is_weights"] = rollout_is_weights
        refuse_other_kinds("log_prob", "response_mask", **given)
        refuse_other_shapes("log_prob", log_prob, **given)
        mask = kept = response_mask.bool()
        loss_config = ipo_config
        if correction is not None:
            loss_config = loss_of(correction, ipo_config)
            if (rejection := rejection_of(correction)) is not None:
                kept = kept_by(rejection, log_prob, old_log_prob, mask)
        weights = _token_weights(kept, loss_agg_mode, config.global_batch_info)
        weights, normalizer = of_mean_one(weights, mask)
        out = ipo_loss(
            log_prob,
            old_log_prob,
            advantages,
            mask,
            loss_weights=weights if rollout_is_weights is None else weights * rollout_is_weights,
            normalizer=normalizer,
            config=loss_config,
        )
        metrics = _named_as_in_verl(out.metrics)  # waits for the device, so the next need not
        _refuse_other_masks(response_mask)
        return out.loss, metrics

    register_policy_loss(name)(policy_loss)


def check_config(config: Any) -> None:
    """Checks verl's whole config, as its entry point gets it, before anything starts.

    The loss itself refuses the same, but in the first step, when models and engines are up, and
    of ``algorithm.rollout_correction`` only what was handed over to it (docs/integrations.md).

    Args:
        config: a ``DictConfig`` with ``actor_rollout_ref.actor`` and ``algorithm``.

    Raises:
        ValueError: an option that the loss does not honour is set, or the ratio would be to
            log-probabilities from before temperature. What makes the sampler's distribution another
            than the trained one is warned of.
    """
    _refuse_what_is_not_honoured(omega_conf_to_dataclass(config.actor_rollout_ref.actor))
    correction = config.algorithm.get("rollout_correction")
    handed_over = config.actor_rollout_ref.actor.policy_loss.get("rollout_correction")
    refuse_what_is_not_handed_over(correction, handed_over)
    if correction and correction.get("bypass_mode"):
        loss_of(correction, IPOConfig())
        rejection_of(correction)
        _check_sampling(config.actor_rollout_ref.rollout)


_RAW = ("raw_logprobs", None)


def _check_sampling(rollout: Any) -> None:
    """Where the ratio is to the engine; verl's agent loops set repetition_penalty to 1."""
    mode = rollout.get("logprobs_mode")
    # Unset, the engine's default is raw ones, from before temperature.
    if mode != "processed_logprobs" and (rollout.temperature != 1 or mode not in _RAW):
        raise ValueError(
            "rollout.logprobs_mode: expected processed_logprobs, from after temperature, as "
            f"rollout.temperature is {rollout.temperature!r}, got {mode!r}"
        )
    names = ("top_p", "top_k", "do_sample")
    warn_of_another_distribution({name: rollout.get(name) for name in names})


def _token_weights(mask: torch.Tensor, mode: str, batch: dict[str, Any]) -> torch.Tensor:
    return weights_of(
        lambda losses: agg_loss(loss_mat=losses, loss_mask=mask, loss_agg_mode=mode, **batch), mask
    )


def _named_as_in_verl(metrics: Any) -> dict[str, float]:
    """Ours under ``actor/ipo/``, and the three that every policy loss of verl reports."""
    values = metrics.tolist()
    return {
        "actor/pg_clipfrac": values["is_masked"],
        "actor/pg_clipfrac_lower": values["is_masked_low"],
        "actor/ppo_kl": values["mismatch_kl"],
        **{f"actor/ipo/{name}": value for name, value in values.items()},
    }


_NOT_HONOURED = {
    "clip_ratio": BOUNDS,
    "clip_ratio_low": BOUNDS,
    "clip_ratio_high": BOUNDS,
    "clip_ratio_c": BOUNDS,
    "tau_pos": OTHER_LOSS,
    "tau_neg": OTHER_LOSS,
    "clip_cov_ratio": OTHER_LOSS,
    "clip_cov_lb": OTHER_LOSS,
    "clip_cov_ub": OTHER_LOSS,
    "kl_cov_ratio": OTHER_LOSS,
    "ppo_kl_coef": OTHER_LOSS,
    "dro_beta": OTHER_LOSS,
}


def _refuse_what_is_not_honoured(config: Any) -> None:
    for section in filter(None, (config, config.get("policy_loss"))):
        refuse_changed_fields(section, _NOT_HONOURED)


def _refuse_other_masks(response_mask: torch.Tensor) -> None:
    """verl multiplies by the mask, so that any number there would be a weight, or a NaN."""
    if (
        response_mask.dtype != torch.bool
        and not ((response_mask == 0) | (response_mask == 1)).all()
    ):
        raise ValueError(
            f"response_mask: expected 0 or 1 for each token, got values from "
            f"{response_mask.min().item()} to {response_mask.max().item()}: a mask is no weight"
        )


def _handed_over(correction: Any) -> Any:
    """What the loss has to apply of a worker's config, which lacks ``algorithm``; None of none.

    verl puts a dataclass of defaults there.
    """
    if correction == RolloutCorrectionConfig():
        _warn_that_nothing_was_handed_over()
        return None
    # Decoupled, verl has applied it to the mask and to rollout_is_weights.
    return correction if correction and correction.get("bypass_mode") else None


@functools.cache  # once in each process
def _warn_that_nothing_was_handed_over() -> None:
    warnings.warn(
        "policy_loss.rollout_correction: verl does not tell its workers of "
        "algorithm.rollout_correction, so rollout_rs and loss_type, which bypass mode leaves to "
        f"the loss, are not known here. To have them honoured, hand it over: {HAND_OVER}",
        stacklevel=4,
    )


register()
