"""The loss as SkyRL's policy loss ``"ipo"``, a sum, since SkyRL averages by the advantages."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import (
    compute_off_policy_correction,
    off_policy_correction_enabled,
)
from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry, register_policy_loss

from ipo_ext._numbers import is_number
from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss
from ipo_ext.integrations._refusals import refuse_a_teacher, refuse_other_shapes
from ipo_ext.integrations._skyrl_options import (
    refuse_what_is_not_honoured,
    refuse_wrong_logprobs,
    warn_of_what_bends_the_ratio,
)

_DEFAULT = IPOConfig(kl_tau=0.0)


def register(
    ipo_config: IPOConfig = _DEFAULT, name: str = "ipo", *, kl_normalizer: float | None = None
) -> None:
    """Registers the loss for ``trainer.algorithm.policy_loss_type=<name>``.

    Call it before Ray starts: SkyRL then hands what is registered to its workers. The ratio is
    taken to the engine's log-probabilities, ``rollout_logprobs``; a response is a sequence. Of
    ``off_policy_correction``, masks are applied as SkyRL's own losses apply them.

    Args:
        ipo_config: the loss; by default without KL term.
        name: what had this name is replaced.
        kl_normalizer: what the KL term is divided by, usually the loss tokens of a mini-batch.
            SkyRL divides advantages only, and tells no loss by what.

    Raises:
        ValueError: ``kl_tau`` above 0 without ``kl_normalizer``, or this without that;
            ``teacher_tau`` above 0: SkyRL passes no teacher.
    """
    refuse_a_teacher(ipo_config, "SkyRL")
    _check_kl_normalizer(ipo_config.kl_tau, kl_normalizer)
    if kl_normalizer is not None:
        ipo_config = dataclasses.replace(ipo_config, kl_tau=ipo_config.kl_tau / kl_normalizer)

    def policy_loss(
        log_probs: torch.Tensor,  # [responses, tokens], as all below
        old_log_probs: torch.Tensor,
        advantages: torch.Tensor,
        config: Any,
        loss_mask: torch.Tensor | None = None,
        rollout_logprobs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        refuse_what_is_not_honoured(config)
        if rollout_logprobs is None:
            raise ValueError(
                "rollout_logprobs: expected the log-probabilities that the engine sampled with, "
                "got None: set generator.sampling_params.logprobs to 1"
            )
        if loss_mask is None:
            loss_mask = torch.ones_like(log_probs)
        refuse_other_shapes(
            "log_probs",
            log_probs,
            old_log_probs=old_log_probs,
            advantages=advantages,
            loss_mask=loss_mask,
            rollout_logprobs=rollout_logprobs,
        )
        mask = loss_mask != 0
        kept, corrections = _corrected(mask, old_log_probs, rollout_logprobs, config)
        out = ipo_loss(
            log_probs,
            rollout_logprobs,
            advantages,
            kept,
            loss_weights=loss_mask.float(),
            config=ipo_config,
        )
        return out.loss, {**corrections, **_named_as_in_skyrl(out.metrics)}

    if name in PolicyLossRegistry.list_available():
        PolicyLossRegistry.unregister(name)
    register_policy_loss(name)(policy_loss)


def check_config(config: Any) -> None:
    """Checks SkyRL's whole config before anything starts.

    The loss itself refuses the same options of ``trainer.algorithm``, but in its first step, and it
    cannot see how the engine samples. What makes that another distribution than the trained one is
    warned of.

    Args:
        config: a ``SkyRLTrainConfig``.

    Raises:
        ValueError: an option that the loss does not honour is set, the engine reports no
            log-probabilities, or those from before temperature, or the trained logits are divided
            by another temperature than the sampled ones.
    """
    refuse_what_is_not_honoured(config.trainer.algorithm)
    refuse_wrong_logprobs(config)
    warn_of_what_bends_the_ratio(config)


def _check_kl_normalizer(kl_tau: float, kl_normalizer: float | None) -> None:
    if kl_normalizer is None:
        if kl_tau > 0:
            raise ValueError(
                f"kl_normalizer: expected a number, as ipo_config.kl_tau is {kl_tau!r}, got None: "
                "SkyRL divides the advantages alone, so the KL term would be a sum over tokens"
            )
    elif not is_number(kl_normalizer) or not 0 < kl_normalizer < float("inf"):
        raise ValueError(f"kl_normalizer: expected a finite number > 0, got {kl_normalizer!r}")
    elif kl_tau == 0:
        raise ValueError(
            f"kl_normalizer: expected None, as ipo_config.kl_tau is 0, got {kl_normalizer!r}"
        )


def _corrected(
    mask: torch.Tensor, old_log_probs: torch.Tensor, rollout_logprobs: torch.Tensor, config: Any
) -> tuple[torch.Tensor, dict[str, float]]:
    """The mask without what SkyRL's ``off_policy_correction`` rejects, and SkyRL's own metrics."""
    if mask.numel() == 0 or not off_policy_correction_enabled(config.off_policy_correction):
        return mask, {}
    # SkyRL multiplies by the mask, so what lies outside it must be finite.
    old, rollout = (
        torch.where(mask, logprobs, 0) for logprobs in (old_log_probs, rollout_logprobs)
    )
    _, metrics, kept = compute_off_policy_correction(
        old, rollout, mask.to(old.dtype), config.off_policy_correction
    )
    return kept != 0, metrics


def _named_as_in_skyrl(metrics: Any) -> dict[str, float]:
    """Under ``ipo/``; SkyRL adds up what ends in ``_loss``, so these are sums and not means."""
    values = metrics.tolist()
    active = metrics.sums[metrics.SUM_ROWS.index("active")].item()
    for name in ("pg_loss", "kl_loss"):
        values[name] *= active
    return {
        "clip_ratio": values["is_masked"],
        **{f"ipo/{name}": value for name, value in values.items()},
    }
