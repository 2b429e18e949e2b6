"""verl's ``rollout_correction`` where the loss has to apply it, in bypass mode.

verl rejects by ``rollout_rs`` before it averages, so what is rejected takes no part in the average;
what its importance weights drop does. Its k1 is minus our log-ratio.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ipo_ext._sequence_rules import SequenceRule
from ipo_ext.config import IPOConfig
from ipo_ext.functional import ipo_loss

_REINFORCE = IPOConfig(mask_rule="none", pg_form="reinforce", kl_tau=0.0)

HAND_OVER = (
    "+actor_rollout_ref.actor.policy_loss.rollout_correction='${algorithm.rollout_correction}'"
)


class Bounds(NamedTuple):
    """Of a ratio."""

    low: float
    high: float


def refuse_what_is_not_handed_over(correction: Any, handed_over: Any) -> None:
    """verl does not tell its workers of what it leaves to the loss in bypass mode."""
    theirs, ours = correction or {}, handed_over or {}
    for name in dict.fromkeys([*_left_to_the_loss(theirs), *_left_to_the_loss(ours)]):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"algorithm.rollout_correction.{name}: expected the same in "
                "actor.policy_loss.rollout_correction, which the workers read, got "
                f"{theirs.get(name)!r} and there {ours.get(name)!r}; to have both alike add "
                f"{HAND_OVER}"
            )


def _left_to_the_loss(correction: Any) -> list[str]:
    """The options by which the loss differs from what it is without a correction."""
    if not correction.get("bypass_mode"):
        return []
    names: list[str] = []
    if correction.get("rollout_rs"):
        names += ["rollout_rs", "rollout_rs_threshold"]
    if correction.get("loss_type", "ppo_clip") != "ppo_clip":
        names += ["loss_type", "rollout_is", "rollout_is_threshold", "rollout_is_batch_normalize"]
    return [*names, "bypass_mode"] if names else []


def loss_of(correction: Any, ipo_config: IPOConfig) -> IPOConfig:
    """What a token pays: by ``loss_type`` ours or verl's REINFORCE with its importance weights."""
    loss_type = correction.get("loss_type")
    if loss_type == "ppo_clip":
        return ipo_config  # the weights are for verl's metrics: the ratio has them already
    if loss_type != "reinforce":
        raise ValueError(
            f"rollout_correction.loss_type: expected ppo_clip or reinforce, got {loss_type!r}"
        )
    if ipo_config != IPOConfig():
        raise ValueError(
            "rollout_correction.loss_type: expected 'ppo_clip' with an ipo_config of your own, got "
            "'reinforce', whose loss rollout_is alone says; register without a config"
        )
    if correction.get("rollout_is_batch_normalize"):
        raise ValueError(
            "rollout_correction.rollout_is_batch_normalize: expected False, got True: weights are "
            "not normalised here"
        )
    return _importance_sampled(correction.get("rollout_is"), correction.get("rollout_is_threshold"))


def _importance_sampled(level: str | None, threshold: Any) -> IPOConfig:
    if level is None:
        return _REINFORCE
    low, high = _threshold(threshold)
    if level == "token":
        weighted = IPOConfig.tis(high if low is None else math.inf)
        return weighted if low is None else _within(weighted, Bounds(low, high))
    if low is None:
        return IPOConfig.sequence_tis(high)
    rule: SequenceRule = ("sum_k1", low, high)
    return dataclasses.replace(IPOConfig.sequence_tis(math.inf), sequence_rules=(rule,))


def _threshold(threshold: Any) -> tuple[float | None, float]:
    """verl's "low_high", or one number: no lower bound."""
    parts = [float(part) for part in str(threshold).split("_", 1)]
    return (None, parts[0]) if len(parts) == 1 else (parts[0], parts[1])


def _within(config: IPOConfig, bounds: Bounds) -> IPOConfig:
    return dataclasses.replace(
        config, mask_rule="ratio", dppo_mask_low=bounds.low, dppo_mask_high=bounds.high
    )


def rejection_of(correction: Any) -> IPOConfig | None:
    """What keeps the tokens that ``rollout_rs`` keeps; None where there is no rejection."""
    options = [name.strip() for name in (correction.get("rollout_rs") or "").split(",")]
    options = [name for name in options if name]
    if not options:
        return None
    given = correction.get("rollout_rs_threshold")
    thresholds = [part.strip() for part in str(given).split(",") if part.strip()]
    if given is None:
        thresholds = []
    if len(thresholds) == 1:
        thresholds *= len(options)
    if len(thresholds) != len(options):
        raise ValueError(
            "rollout_correction.rollout_rs_threshold: expected one threshold or one for each of "
            f"{len(options)} options, got {len(thresholds)}"
        )
    bands, rules = [], []
    for option, threshold in zip(options, thresholds, strict=True):
        level, _, statistic = option.partition("_")
        if level == "token" and statistic in _BANDS:
            bands.append(_BANDS[statistic](threshold))
        elif level == "seq" and statistic in _SEQUENCE_STATISTICS:
            rules.append(_rule(statistic, threshold))
        else:
            raise ValueError(
                "rollout_correction.rollout_rs: expected options such as token_k1 or seq_mean_k3, "
                f"got {option!r}"
            )
    config = dataclasses.replace(_REINFORCE, sequence_rules=tuple(rules))
    if not bands:
        return config
    return _within(config, Bounds(max(b.low for b in bands), min(b.high for b in bands)))


def _band_of_k1(threshold: str) -> Bounds:
    low, high = _threshold(threshold)
    low = 1 / high if low is None else low
    return Bounds(1 / high, 1 / low)


def _band_of_k2(threshold: str) -> Bounds:
    reach = math.sqrt(2 * float(threshold))
    return Bounds(math.exp(-reach), math.exp(reach))


def _band_of_k3(threshold: str) -> Bounds:
    """Between the two log-ratios at which ``exp(x) - 1 - x`` is the threshold."""
    most = float(threshold)
    roots = (_root_of_k3(most, -1 - most, 0.0), _root_of_k3(most, math.log(2 + 2 * most) + 1, 0.0))
    return Bounds(*map(math.exp, roots))


def _root_of_k3(most: float, outside: float, inside: float) -> float:
    while True:
        middle = (outside + inside) / 2
        if middle in (outside, inside):
            return inside
        if math.expm1(middle) - middle > most:
            outside = middle
        else:
            inside = middle


_BANDS: dict[str, Callable[[str], Bounds]] = {
    "k1": _band_of_k1,
    "k2": _band_of_k2,
    "k3": _band_of_k3,
}
_SEQUENCE_STATISTICS = (
    *("sum_k1", "sum_k2", "sum_k3", "mean_k1", "mean_k2", "mean_k3"),
    *("max_k2", "max_k3"),
)


def _rule(statistic: Any, threshold: str) -> SequenceRule:
    if statistic.endswith("k1"):
        return (statistic, *_band_of_k1(threshold))
    return (statistic, 0.0, float(threshold))


def kept_by(
    rejection: IPOConfig, log_prob: torch.Tensor, old_log_prob: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """``[responses, tokens]``: the tokens of the mask that the rejection keeps."""
    trained = log_prob.detach().requires_grad_()
    with torch.enable_grad():
        out = ipo_loss(
            trained, old_log_prob, -torch.ones_like(old_log_prob), mask, config=rejection
        )
    return torch.autograd.grad(out.loss, trained)[0] != 0  # 1 for each that is kept
